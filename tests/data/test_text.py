"""Text from data reaches terminals and tables without steering them."""

import io
import json
import logging
import sys
import warnings

import pytest

from data.text import (
    clean_library_output,
    hide_secrets,
    json_text,
    markdown_table,
    printable,
    public_arguments,
    show,
    unsigned,
    without_secrets,
)


def test_hostile_text_cannot_steer_a_terminal() -> None:
    hostile = "\x1b[31mred\x9b0m\x00\u202eright to left\u2066\n\u2028\udc80"
    assert printable(hostile).isprintable() and "red" in printable(hostile)
    assert printable("plain título 日本 🎬") == "plain título 日本 🎬"


def test_what_is_shown_keeps_its_lines_and_nothing_that_a_terminal_obeys() -> None:
    """File names and titles come through errors, remarks and tables alike: they are cleaned where text leaves."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show("first \x1b]0;title\x07\n\x9b2Jsecond \udcff\u202e日", shown)
    assert shown.buffer.getvalue() == b"first  ]0;title \n 2Jsecond   \\u65e5\n"
    signed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    show("missing: https://me:SECRET@host/a.jpg?sig=SECRET", signed)
    assert b"host/a.jpg" in signed.buffer.getvalue() and b"SECRET" not in signed.buffer.getvalue()


def test_a_pipe_in_a_cell_does_not_add_a_column() -> None:
    assert markdown_table([["name", "n"], ["a|b", "1"], ["c", "20"]]) == "\n".join([
        "| name | n  |", "|------|----|", "| a\\|b | 1  |", "| c    | 20 |"])
    assert markdown_table([["n", "text"], ["1", "long"]], pad_last=False).splitlines()[1] == "|---|--|"


def test_no_line_or_file_holds_what_an_address_is_signed_with() -> None:
    """A ledger that is sent to a colleague would let anyone fetch until the signature ends."""
    one, other = (f"missing: https://me:SECRET@host/a.jpg?X-Amz-Signature=SECRET{n}&v=1, run again" for n in "12")
    assert "SECRET" not in hide_secrets(one) + hide_secrets(other) and hide_secrets(one) != hide_secrets(other)
    assert hide_secrets(one).startswith("missing: https://host/a.jpg?blake2b-")
    assert hide_secrets(one).endswith("run again")
    for plain in ("https://img.host/vi/a.jpg?size=3&v=2", "s3://bucket/a{000..3}.tar", "a?token=1", "C://x", ""):
        assert hide_secrets(plain) == plain


def test_every_way_to_sign_an_address_is_known() -> None:
    """Object stores and CDNs name their signatures as they like; an unknown name with a long value counts as one."""
    queries = ["sv=2022&se=2027&sp=r&sig=SECRET%3D", "X-Goog-Signature=SECRET", "Policy=SECRET&Key-Pair-Id=SECRET",
               "code=SECRET7890", "md5=SECRET&expires=12", "jwt=SECRET", "hdnts=exp=1~hmac=SECRET", "pwd=SECRET",
               "verify=1-SECRET", "oh=SECRET_AfC12345678", "session=SECRET", "v=1;sig=SECRET", "SECRETisallthereis"]
    texts = [f"GET https://host/a.jpg?{query}: 403" for query in queries]
    texts += [f"pool(host='h'): url: /a.jpg?{query} (Caused by x)" for query in queries[:-1]]
    texts += ["http://host/#access_token=SECRET", "s3://KEY:SEC/RET+SECRET@bucket/x", "http://SECRET@host/x",
              "{'Authorization': 'Bearer SECRET789012345678'}", "hf_SECRET789012345678",
              "AccountKey=SECRET7890123456=="]
    for text in texts:
        assert "SECRET" not in hide_secrets(text), text
        assert hide_secrets(hide_secrets(text)) == hide_secrets(text), text
    for plain in ("https://host:8080/@me/a.jpg", "abfss://container@account/x", "hf_modules", "Who? me=you, then=her"):
        assert hide_secrets(plain) == plain


def test_a_command_line_is_kept_without_what_is_secret_in_it() -> None:
    words = ["--proxy", "me:SECRET@host:1", "--proxy=me:SECRET@host", "--dataset", "https://h/x.csv?sig=SECRET", "a:b"]
    assert public_arguments(words) == ["--proxy", "host:1", "--proxy=host", "--dataset", "https://h/x.csv", "a:b"]


def test_a_signed_address_is_the_same_file_tomorrow() -> None:
    """Each day's list of a bucket is signed anew: its pictures would be fetched and stored again every day."""
    for query, kept in {"X-Amz-Algorithm=A&X-Amz-Credential=c&X-Amz-Date={}&X-Amz-Expires=9&X-Amz-SignedHeaders=host&"
                        "versionId=3&X-Amz-Signature={}": "?versionId=3",
                        "sv=2022&st={}&se=2027&sr=b&sp=r&sig={}": "", "w=300&Expires={}&Signature={}&Key-Pair-Id=K":
                        "?w=300"}.items():
        assert unsigned(f"https://h/a.jpg?{query.format(1, 2)}") == f"https://h/a.jpg{kept}"
    for plain in ("https://h/a.jpg?id=3&sig=1", "https://h/a.jpg?Expires=3", "https://h/a.jpg", "/a.jpg?Signature"):
        assert unsigned(plain) == plain
    assert without_secrets("https://h/a.jpg?id=3") == "https://h/a.jpg?id=3"


def test_a_json_line_is_one_line_that_keeps_every_character() -> None:
    """A title with U+2028 would be two lines to `splitlines`, and `cat ledger.jsonl` would obey a title with U+009B."""
    value = {"title": "日本 \u2028 \x85 \x9b2J \u202e \x1b[31m \U000e0001 \udc80 \n"}
    line = json_text(value)
    assert json.loads(line) == value and line.isprintable() and "日本" in line
    assert json_text(value, 2).count("\n") == 2


def test_libraries_cannot_steer_a_terminal_or_show_a_signature(caplog: pytest.LogCaptureFixture) -> None:
    """huggingface_hub logs the signed address of a download that it tries again."""
    before = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        clean_library_output()
        logging.getLogger("a.library").warning("%s again \x1b[31m", "https://h/x?Signature=SECRET")
        shown = warnings.formatwarning(UserWarning("\x1b]0;x\x07\nhttps://h/x?Signature=SECRET"), UserWarning, "f", 1)
    finally:
        logging.setLogRecordFactory(before[0])
        warnings.formatwarning = before[1]
    for text in (caplog.messages[0], shown.removesuffix("\n")):
        assert text.isprintable() and "SECRET" not in text and "https://h/x?" in text


def test_a_line_for_people_is_cut_and_a_result_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """A title of a megabyte in an error would push the fix, which stands at its end, off the screen."""
    show(f"error: {'x' * 10**6}: use --fix", sys.stderr)
    show("y" * 10**6)
    said = capsys.readouterr()
    assert len(said.err) < 3_000 and said.err.endswith(": use --fix\n") and said.out == "y" * 10**6 + "\n"
