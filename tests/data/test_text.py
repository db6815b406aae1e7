"""Text from data reaches terminals and tables without steering them."""

import io

from data.text import hide_secrets, markdown_table, printable, show


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
