"""Text tables as programs write them: separators, encodings, no header, positions, and what is said of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.batch import UserError
from data.sources.columns import Columns
from data.sources.options import ReadOptions, parse_delimiter, parse_encoding, parse_templates
from data.sources.source import DETECT, load_splits

TITLES = ["a café, small", "“quoted” – dash", "two\nlines", 'say "hi"', "a;b|c\td", "plain", " padded "]
IMAGES = [f"{row}.jpg" for row in range(len(TITLES))]
FRAME = pd.DataFrame({"image": IMAGES, "title": TITLES})


def titles(path: Path, options: ReadOptions = DETECT) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """The titles of a table, the lines said, and the ledger."""
    said: list[str] = []
    lost: list[dict[str, Any]] = []
    splits = load_splits(str(path), options, lost.append, log=said.append)
    return splits["train"].title.to_pylist(), said, lost


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_tables_of_pandas_in_any_separator_and_encoding(
        tmp_path: Path, ending: str, separator: str, encoding: str) -> None:
    """A table that Excel or pandas wrote in Europe was refused, or its titles were read as something else."""
    path = tmp_path / f"table.{ending}"
    FRAME.to_csv(path, sep=separator, encoding=encoding, index=False)
    read, said, lost = titles(path)
    assert read == TITLES and not lost
    is_plain = separator == ("\t" if ending == "tsv" else ",") and encoding in ("utf-8", "utf-8-sig")
    assert len(said) == (0 if is_plain else 1)
    assert is_plain or ("separator" in said[0]) == (separator != ("\t" if ending == "tsv" else ","))
    assert is_plain or ("encoding" in said[0]) == (not encoding.startswith("utf-8"))


def test_excel_names_its_separator_in_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="cp1252") as file:
        file.write("sep=;\r\n")
        writer = csv.writer(file, dialect="excel", delimiter=";")
        writer.writerows([("image", "title"), ("a.jpg", "café"), ("b.jpg",), ("c.jpg", 'two\nlines, "x"')])
    read, said, lost = titles(path)
    assert read == ["café", 'two\nlines, "x"'] and said == [f"{path}: separator ';', encoding cp1252"]
    assert lost[0]["row"] == 1 and lost[0]["detail"].startswith("line 4 has 1 fields, the header 2")


def test_flickr30k_results_with_blanks_around_bars(tmp_path: Path) -> None:
    """Captions came with a blank before them, and quotes in them opened a field; the file's known bad row is named."""
    path = tmp_path / "results.csv"
    path.write_text('image_name| comment_number| comment\n1.jpg| 0| Two "young" guys , outside .\n'
                    '1.jpg| 1| "A sign" is shown .\n2.jpg| 4   A dog runs .\n3.jpg| 0| ok .\n', encoding="utf-8")
    read, said, lost = titles(path)
    assert read == ['Two "young" guys , outside .', '"A sign" is shown .', "ok ."]
    assert said == [f"{path}: separator ' | '"]
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(2, "bad-row")]


def test_a_file_without_a_header_keeps_its_first_row(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    FRAME.to_csv(path, index=False, header=False)
    read, said, lost = titles(path)
    assert read == TITLES and not lost and len(said) == 1 and "no header, line 1 is read as a row" in said[0]
    FRAME.assign(number=range(len(FRAME)))[["number", "title", "image"]].to_csv(path, index=False, header=False)
    with pytest.raises(UserError, match="there are 1, 2, 3; name one with --title-column"):
        titles(path)
    assert titles(path, ReadOptions(Columns(image="3", title=("2",))))[0] == TITLES
    FRAME.rename(columns={"image": "left", "title": "right"}).to_csv(path, index=False)
    assert titles(path, ReadOptions(Columns(image="1", title=("2",)))) == (TITLES, [], [])


def test_what_the_user_says_of_a_table_wins(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    pd.DataFrame({"image": IMAGES[:1], "title": ["日本語"]}).to_csv(path, sep="^", encoding="shift_jis", index=False)
    with pytest.raises(UserError, match="--image-column"):
        titles(path)
    options = ReadOptions(delimiter=parse_delimiter("^"), encoding=parse_encoding("Shift-JIS"))
    assert titles(path, options) == (["日本語"], [], [])
    assert (parse_delimiter("tab"), parse_delimiter(r"\t"), parse_delimiter(" | ")) == ("\t", "\t", "|")
    for delimiter in (",,", '"', "\n"):
        with pytest.raises(UserError, match="--delimiter .* must be one character"):
            parse_delimiter(delimiter)
    with pytest.raises(UserError, match="--encoding"):
        parse_encoding("base64")


def test_a_single_damaged_row_is_no_other_encoding(tmp_path: Path) -> None:
    """A UTF-8 file with a few broken rows must not be read as cp1252: all its other accents would be garbled."""
    path = tmp_path / "table.csv"
    rows = [f"{row}.jpg,café {row}\n".encode() for row in range(50)]
    rows[3] = rows[7] = b"x.jpg,caf\xe9\n"
    path.write_bytes(b"image,title\n" + b"".join(rows))
    read, said, lost = titles(path)
    assert len(read) == 48 and {title[:4] for title in read} == {"café"}
    assert [entry["row"] for entry in lost] == [3, 7] and "--encoding" in said[0]


def test_templates_may_hold_commas() -> None:
    parts = ("a photo of a {}", "a type of pet", "in the wild", "a {}")
    assert parse_templates(parts) == ("a photo of a {}, a type of pet, in the wild", "a {}")
    with pytest.raises(UserError, match="--template"):
        parse_templates(("a photo",))


@pytest.mark.parametrize("write", [str, json.dumps], ids=["pandas", "json"])
def test_lists_that_pandas_writes_are_titles_one_by_one(tmp_path: Path, write: Callable[[list[str]], str]) -> None:
    """The whole text "['a dog', 'dogs']" was the title; Flickr30k on the hub is such a table."""
    frame = pd.DataFrame({"image": IMAGES[:3], "raw": [write(["a dog", "it's"]), write(["a, \"cat\""]), None],
                          "negative": [write(["x", "y"]), None, write(["z"])]})
    frame.to_csv(tmp_path / "table.csv", index=False)
    said: list[str] = []
    rows = load_splits(str(tmp_path / "table.csv"), log=said.append)["train"]
    assert rows.title.to_pylist() == ["a dog", "it's", 'a, "cat"', ""]
    assert rows.title_neg is not None and rows.title_neg.to_pylist() == [["x", "y"], ["x", "y"], [], ["z"]]
    assert len(said) == 2 and all("spells lists" in line for line in said)


def test_lists_of_numpy_are_no_lists_and_brackets_are_text(tmp_path: Path) -> None:
    """['a' 'b'], an array of two, is one text "ab" to Python."""
    shown = [str(np.array(["a dog", "dogs"], object)), str(np.array(["a cat"], object))]
    pd.DataFrame({"image": IMAGES[:2], "title": shown}).to_csv(tmp_path / "table.csv", index=False)
    read, said, _ = titles(tmp_path / "table.csv")
    assert read == shown and len(said) == 1 and "looks like lists" in said[0]
    frame = pd.DataFrame({"image": IMAGES[:2], "title": ["[Official] dog", "cat [4K]"]})
    frame.to_csv(tmp_path / "table.csv", index=False)
    read, said, _ = titles(tmp_path / "table.csv")
    assert read == ["[Official] dog", "cat [4K]"] and not said
