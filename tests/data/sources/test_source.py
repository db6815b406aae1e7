"""Any dataset becomes the same rows: kinds of files, torture titles, hostile paths, bad input."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import full, noting
from PIL import Image

from data.batch import UserError
from data.files import write_mark
from data.ledger import dropped_rows
from data.shards.index import read_member
from data.sources import csv_tables, records
from data.sources.embedded import EmbeddedPictures, shown_name
from data.sources.options import ReadOptions
from data.sources.source import Columns, Rows, load_splits

OPENSTAX = Path(__file__).resolve().parents[4] / "shared" / "data" / "openstax-titles"
TITLES = ["NA", "None", "null", "NaN", "nan", "N/A", "#N/A", "", " ", " padded ", "1984", "007", "1e5", "1.0", "-0",
          "inf", "true", "2020-01-01", "2020-01-01T00:00:00Z", "\U0001f600\U0001f469\u200d\U0001f467", "مرحبا",
          "日本語", "e\u0301", "a,b", "a\tb", 'say "hi"', '"', '""', "two\nlines", "three\r\nlines\n", "trailing\n",
          "\\n \\u0041", "'; --", "x" * 5000, "\u2028 and \x85", "\ufeffmark", "#comment", "=1+1", "{}", "[1]"]


def table(rows: int = 4, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"image": [f"{split}{i}.jpg" for i in range(rows)], "title": [f"{split} {i}" for i in range(rows)], **more}


def write(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".jsonl":
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return path


def picture(path: Path, colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(buffer, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def read(dataset: Path) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    """The splits of a dataset, and what it has lost."""
    lost: list[dict[str, Any]] = []
    return load_splits(str(dataset), ledger=lost.append), lost


def pairs(rows: Rows) -> list[tuple[Any, ...]]:
    lists = rows.title_neg.to_pylist() if rows.title_neg is not None else [None] * len(rows)
    negatives = [texts[0] if texts and len(texts) == 1 else texts or None for texts in lists]
    images = [image if shown_name(image) == image else read_member(image) for image in rows.image.to_pylist()]
    return list(zip(images, rows.title.to_pylist(), negatives, strict=True))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_titles_are_strings_whatever_they_look_like(tmp_path: Path, ending: str) -> None:
    images = [f"{i}.jpg" for i in range(len(TITLES))]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.{ending}", {"image": images, "title": TITLES, "title_neg": TITLES[::-1]})
    splits = load_splits(str(tmp_path))
    assert list(splits) == ["train", "test"]
    negatives = [title if title.strip() else None for title in TITLES[::-1]]
    paths = [str(tmp_path / image) for image in images]
    assert pairs(splits["train"]) == list(zip(paths, TITLES, negatives, strict=True))
    lists = splits["train"].title_neg
    text = pa.large_string()  # columns of more than 2 GiB can be joined and taken from
    assert lists is not None and lists.type == pa.list_(text)
    assert splits["train"].title.type == splits["train"].image.type == text
    assert splits["train"].title.null_count == 0


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_json_and_parquet_values_that_are_no_strings_become_their_text(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(records, "RECORDS", chunk)
    (tmp_path / "train.jsonl").write_text('\ufeff{}\n{"url": "http://h/1", "text": 1984, "size": {"w": 1}}\n\n'
                                          '{"text": 1e5, "url": null, "path": ["unused"], "negative": 7}\n'
                                          '{"url": "http://h/3", "text": true}\n{"url": "http://h/4", "text": null}',
                                          encoding="utf-8")
    write(tmp_path / "valid.parquet", {"url": [b"\xff", None], "caption": [7, None]})
    write(tmp_path / "dev", {"url": []})  # a file that is none of ours is passed over
    splits = load_splits(str(tmp_path), embedded=tmp_path / "cache")
    assert pairs(splits["train"]) == [("", "", None), ("http://h/1", "1984", None), ("", "1e5", "7"),
                                      ("http://h/3", "true", None), ("http://h/4", "", None)]
    assert pairs(splits["valid"]) == [(b"\xff", "7", None), ("", "", None)]


def test_csv_with_a_byte_order_mark_and_lines_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK", 256)
    titles = ["line\n" * (i % 20) + '5" disk' for i in range(200)]
    for split in ("train", "test"):
        path = write(tmp_path / f"{split}.csv", table(200, title=titles))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'last.jpg,a 5" disk\n')
    assert load_splits(str(tmp_path))["train"].title.to_pylist() == [*titles, 'a 5" disk']


def test_images_are_bytes_or_absolute_paths_or_urls(tmp_path: Path) -> None:
    structs = [{"bytes": b"raw", "path": "/etc/name-only.jpg"}, {"bytes": None, "path": "a/../b.jpg"},
               {"bytes": None, "path": "HTTPS://h/../x.jpg"}, {"bytes": None, "path": str(tmp_path / "c.jpg")},
               {"bytes": None, "path": "..dots../d.jpg"}, None]
    write(tmp_path / "train.parquet", table(6, image=structs))
    write(tmp_path / "test.parquet", {"img": ["x.jpg", ""], "txt": ["one", "two"]})
    splits = load_splits(str(tmp_path), embedded=tmp_path / "cache")
    assert [row[0] for row in pairs(splits["train"])] == [
        b"raw", f"{tmp_path}/a/../b.jpg", "HTTPS://h/../x.jpg", f"{tmp_path}/c.jpg", f"{tmp_path}/..dots../d.jpg", ""]
    assert splits["test"].image.to_pylist() == [f"{tmp_path}/x.jpg", ""]
    assert splits["train"].image.type == splits["test"].image.type


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "..", "a/..", "{folder}/../x.jpg",
                                  "{folder}x/y", " /etc/passwd ", "../x.tar#0+100"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_no_row_of_a_fetched_table_reaches_a_file_outside_the_dataset(
        tmp_path: Path, path: str, ending: str) -> None:
    folder = tmp_path / "set"
    hostile = path.format(folder=folder)
    write(folder / f"train.{ending}", {"image": ["ok.jpg", "http://h/../ok.jpg", hostile], "title": ["a", "b", "c"]})
    write(folder / "test.csv", table())
    lost: list[dict[str, Any]] = []
    splits = load_splits("https://h/set", ledger=lost.append,
                         download=lambda _: {"train": [folder / f"train.{ending}"], "test": [folder / "test.csv"]})
    assert splits["train"].title.to_pylist() == ["a", "b"]
    assert [(entry["split"], entry["row"], entry["reason"], entry["title"]) for entry in lost] == [
        ("train", 2, "outside-folder", "c")]
    assert repr(hostile.strip()) in lost[0]["detail"]


def test_a_linked_folder_may_name_its_images_by_either_path(tmp_path: Path) -> None:
    real = tmp_path / "real"
    write(real / "train.csv", table(2, image=[f"{real}/a.jpg", f"{tmp_path}/link/b.jpg"]))
    write(real / "test.csv", table(2))
    (tmp_path / "link").symlink_to(real)
    assert [row[0] for row in pairs(load_splits(str(tmp_path / "link"))["train"])] == [f"{real}/a.jpg",
                                                                                     f"{tmp_path}/link/b.jpg"]


def test_columns_are_found_in_order_or_named(tmp_path: Path) -> None:
    both = {"url": ["http://h/u"], "Thumbnail": ["t.jpg"], "caption": ["c"], " Text ": ["t"], "NEGATIVE": ["n"],
            "extra": ["e"]}
    for ending in ("csv", "jsonl", "parquet"):
        folder = tmp_path / ending
        for split in ("train", "test"):
            write(folder / f"{split}.{ending}", both)
        assert pairs(load_splits(str(folder))["train"]) == [(f"{folder}/t.jpg", "t", "n")]
        named = Columns(image="url", title=("caption",), title_neg=("extra",))
        assert pairs(load_splits(str(folder), ReadOptions(named))["train"]) == [("http://h/u", "c", "e")]
        with pytest.raises(UserError, match="'captoin'.*there are url, Thumb.*did you mean 'caption'"):
            load_splits(str(folder), ReadOptions(Columns(title=("captoin",))))


def test_splits_are_found_under_any_usual_name(tmp_path: Path) -> None:
    write(tmp_path / "Train-00001-of-00002.parquet", table(2, "b", title_neg=["n", None]))
    write(tmp_path / "train-00000-of-00002.parquet", table(3, "a"))
    write(tmp_path / "VAL.csv", table(2, "v"))
    write(tmp_path / "test.jsonl", table(1, "t"))
    write(tmp_path / "notes.csv", {"whatever": ["1"]})
    splits = load_splits(str(tmp_path))
    assert {name: rows.name for name, rows in splits.items()} == {"train": "train", "valid": "valid", "test": "test"}
    assert [len(rows) for rows in splits.values()] == [5, 2, 1]
    negatives = splits["train"].title_neg
    assert negatives is not None and sorted(negatives.to_pylist(), key=str) == [None, None, None, ["n"], []]
    lone = load_splits(str(tmp_path / "{T,t}rain-0000{0..1}-of-00002.parquet".replace("{T,t}", "*")))
    assert {name: len(rows) for name, rows in lone.items()} == {"train": 5}


def test_image_folders_with_sidecars(tmp_path: Path) -> None:
    for split, rows in (("train", 3), ("validation", 1)):
        for i in range(rows):
            picture(tmp_path / split / "deep" / f"{i}.JPG")
            (tmp_path / split / "deep" / f"{i}.txt").write_bytes(f"\ufefftitle, {i}\r\n".encode())
    (tmp_path / "train/deep/1.json").write_text('{"title_neg": "none", "title": "unused", "caption": 12, "url": {}}')
    (tmp_path / "train/deep/2.txt").unlink()
    (tmp_path / "train/deep/._2.jpg").write_bytes(b"resource fork")
    splits = load_splits(str(tmp_path))
    here = tmp_path / "train" / "deep"
    assert pairs(splits["train"]) == [(f"{here}/0.JPG", "title, 0", None), (f"{here}/1.JPG", "title, 1", "none"),
                                      (f"{here}/2.JPG", "", None)]
    assert [row[1] for row in pairs(splits["valid"])] == ["title, 0"]
    captions = load_splits(str(here), ReadOptions(Columns(title=("caption",))))
    assert sorted(row[1] for rows in captions.values() for row in pairs(rows)) == ["", "", "12"]


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    images: dict[str, bytes] = {}
    for split, count in (("train", 3), ("test", 2)):
        for shard in range(2):
            with tarfile.open(tmp_path / f"{split}-{shard:06}.tar", "w") as file:
                for i in range(count):
                    title = f"{split} {shard} {i}"
                    images[title] = picture(tmp_path / "one.jpg", len(images))
                    parts = {"jpg": images[title], "txt": title.encode(), "json": b'{"title_neg": "n"}'}
                    for ending, data in parts.items():
                        member = tarfile.TarInfo(f"{i:04}.{ending}")
                        member.size = len(data)
                        file.addfile(member, io.BytesIO(data))
    (tmp_path / "one.jpg").unlink()
    with tarfile.open(tmp_path / "test-000001.tar", "a") as file:
        file.addfile(tarfile.TarInfo("lonely.txt"))
    write(tmp_path / "train-000000.parquet", table(1))  # what img2dataset puts beside its shards
    lost: list[dict[str, Any]] = []
    splits = load_splits(str(tmp_path), ledger=lost.append)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "test": 4}
    assert [loss["reason"] for loss in lost] == ["no-image"]
    for rows in splits.values():
        for reference, title, negative in pairs(rows):
            path, _, place = reference.partition("#")
            at, size = map(int, place.split("+"))
            assert Path(path).read_bytes()[at : at + size] == images[title] and negative == "n"
    lone = load_splits(str(tmp_path / "train-{000000..000001}.tar"))
    assert {name: len(rows) for name, rows in lone.items()} == {"train": 6}
    both = load_splits(str(tmp_path / "{train,test}-{000000..000001}.tar"))
    assert {name: len(rows) for name, rows in both.items()} == {"train": 6, "test": 4}
    with pytest.raises(UserError, match="train-000002.tar: no such file"):
        load_splits(str(tmp_path / "train-{000000..000009}.tar"))


@pytest.mark.parametrize(("name", "content", "message"), [
    ("train.csv", b'image,title\na.jpg,one\nb.jpg,"two\nc.jpg,three\n', "line 3 opens a quote"),
    ("train.csv", "image,title\na.jpg,one\n".encode("utf-16")[:-1], "not utf-16-le .*--encoding"),
    ("train.csv", b"image,title,title\na,b,c\n", "'title' is there 2 times"),
    ("train.csv", b"picture,title\na.jpg,one\n", "no image column.*there are picture, title.*--image-column"),
    ("train.csv", b"image,words\na.jpg,one\n", "no title column.*--title-column"),
    ("train.csv", b"image,title\n", "holds no rows"),
    ("train.csv", b"", "there are none"),
    ("train.jsonl", b'[1, 2]\n', "line 1 is not a JSON object"),
    ("train.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    ("train.jsonl", b'{"image": "a.jpg", "title": "\xe9"}', "line 1 is not UTF-8"),
    ("train.jsonl", b'\n{"image": "a.jpg", "title": "\\ud83d"}', "line 2: 'title' is not valid Unicode"),
    ("train.jsonl", b'{"image": "a.jpg", "title": [{}]}', "line 1: 'title' is a dict"),
    ("train.jsonl", b"\n\n", "holds no rows"),
    ("train.parquet", b"PAR1 nothing of the kind", "not a Parquet file"),
    ("train.xlsx", b"PK", "found neither tables"),
    ("0.jpg", b"picture", "no titles; write the title of each into KEY.txt.*a folder of its own"),
])
def test_broken_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_splits(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


GOOD = b'{"image": "a.jpg", "title": "x"}\n'


@pytest.mark.parametrize(("name", "content", "row", "reason", "detail"), [
    ("all.csv", b"image,title\na.jpg,x\nb.jpg,two,2\nc.jpg,y\n", 1, "bad-row", "line 3 has 3 fields, the header 2"),
    ("all.csv", b'image,title\na.jpg,"x\n1"\nb.jpg\nc.jpg,y\n', 1, "bad-row", "line 4 has 1 fields"),
    ("all.csv", b"image,title\na.jpg,x\nb.jpg,caf\xe9\nc.jpg,y\n", 1, "not-utf8", "line 3: 'title' is not valid"),
    ("all.tsv", b"image\ttitle\na.jpg\tx\nb\xff.jpg\tz\nc.jpg\ty\n", 1, "not-utf8", "line 3: 'image' is not valid"),
    ("all.jsonl", GOOD + b'\n{"image": \n' + GOOD, 1, "bad-json", "line 3 is not JSON"),
    ("all.jsonl", GOOD + b"[1]\n" + GOOD, 1, "bad-json", "line 2 is not a JSON object"),
    ("all.jsonl", GOOD + b'{"image": "b.jpg", "title": "caf\xe9"}\n' + GOOD, 1, "not-utf8", "line 2 is not UTF-8"),
    ("all.jsonl", GOOD + b'{"image": "b.jpg", "title": "\\ud83d"}\n' + GOOD, 1, "not-utf8", "line 2: 'title'"),
    ("all.jsonl", GOOD + b'{"image": "b.jpg", "title": [{}]}\n' + GOOD, 1, "not-text", "line 2: 'title' is a dict"),
    ("all.jsonl", GOOD + b"[" * 100_000 + b"\n" + GOOD, 1, "bad-json", "line 2 is not JSON"),
])
def test_one_bad_row_is_one_ledger_entry(
        tmp_path: Path, name: str, content: bytes, row: int, reason: str, detail: str) -> None:
    """One row of millions must not end a run, nor be lost without a word."""
    (tmp_path / name).write_bytes(content)
    splits, lost = read(tmp_path / name)
    assert sum(map(len, splits.values())) == 2
    assert [(entry["file"], entry["row"], entry["reason"]) for entry in lost] == [
        (str(tmp_path / name), row, reason)] and lost[0]["detail"].startswith(detail)


def test_millions_of_bad_rows_take_bounded_memory_and_are_all_counted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a file of numbers, or a damaged one, ends the process for want of memory before --max-bad refuses it."""
    monkeypatch.setattr("data.ledger.ENTRIES", 3)
    entries: list[dict[str, Any]] = []
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.jpg", "title": "a"}, *range(20)]))
    (tmp_path / "valid.jsonl").write_text('{"image": "a.jpg", "title": "a"}\n' + "{\n" * 5)
    rows = load_splits(str(tmp_path), ledger=entries.append)
    assert [len(split) for split in rows.values()] == [1, 1] and dropped_rows(entries) == 25
    assert [(entry["split"], entry.get("rows", 1)) for entry in entries] == [("train", 1)] * 3 + [
        ("train", 17), ("valid", 5)]
    assert "later ones" in entries[-1]["detail"] and entries[-1]["row"] == 1


def test_a_parquet_row_that_is_not_utf8_is_dropped(tmp_path: Path) -> None:
    latin = pa.array([b"fine", b"caf\xe9", None, b"good"], pa.binary()).view(pa.string())
    write(tmp_path / "all.parquet", {"image": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"], "title": latin})
    splits, lost = read(tmp_path)
    assert sorted(row[1] for rows in splits.values() for row in pairs(rows)) == ["", "fine", "good"]
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(1, "not-utf8")]


def test_pictures_are_bytes_in_any_encoding_of_arrow(tmp_path: Path) -> None:
    """Pandas' categories and fixed widths are bytes too: taken for paths, every row of such a table was dropped."""
    jpegs = pa.array([b"\xff\xd8a", b"\xff\xd8b", b"\xff\xd8a"], pa.binary())
    for split, column in (("train", jpegs.dictionary_encode()), ("test", jpegs.cast(pa.binary(3)))):
        write(tmp_path / f"{split}.parquet", {"image": column, "title": ["a", "b", "c"]})
    for rows in load_splits(str(tmp_path), embedded=tmp_path / "cache").values():
        assert [row[0] for row in pairs(rows)] == jpegs.to_pylist()


@pytest.mark.parametrize("head", [("image", "title"), ("title", "image"), ("title", "image", "negative")])
@pytest.mark.parametrize("closing", [17, 11, 30])
def test_rows_that_a_stray_quote_has_joined_are_counted(
        tmp_path: Path, head: tuple[str, ...], closing: int) -> None:
    """A quote that is closed by the next one, many rows on, swallows them all without an error of the parser."""
    lines = [",".join({"image": f"{row}.jpg", "title": f"title {row}", "negative": f"not {row}"}[name]
                      for name in head) for row in range(40)]
    lines[10] = lines[10].replace("title", '"title')
    lines[closing] = lines[closing].replace("title", 'title"')
    (tmp_path / "all.csv").write_text("\n".join([",".join(head), *lines]) + "\n", encoding="utf-8")
    splits, lost = read(tmp_path)
    assert sum(map(len, splits.values())) + sum(entry.get("rows", 1) for entry in lost) == 40
    assert [(entry["row"], entry["reason"], entry["rows"]) for entry in lost] == [(10, "open-quote", closing - 9)]
    assert lost[0]["detail"].startswith(f"line 12 opens a quote that closes in line {closing + 2}")


def test_titles_of_several_lines_are_no_joined_rows(tmp_path: Path) -> None:
    titles = ["a poem, in\nthree lines, with\ncommas", "see\nhttps://h/x.jpg", "1, 2\n3, 4 and 5, 6\n7, 8", "\n\n",
              "a\r\nb"]
    write(tmp_path / "all.csv", {"image": [f"{row}.jpg" for row in range(5)], "title": titles})
    splits, lost = read(tmp_path)
    assert sorted(row[1] for rows in splits.values() for row in pairs(rows)) == sorted(titles) and not lost


def test_blanks_around_paths_go_and_addresses_without_a_scheme_are_https(tmp_path: Path) -> None:
    images = [" a.jpg", "b.jpg\t", " http://h/c.jpg ", "//h/d.jpg", "  "]
    for ending in ("csv", "jsonl", "parquet"):
        write(tmp_path / ending / f"train.{ending}", {"image": images, "title": list("abcde")})
        write(tmp_path / ending / f"test.{ending}", table())
        said: list[str] = []
        rows = load_splits(str(tmp_path / ending), log=said.append)["train"]
        here = tmp_path / ending
        assert [row[0] for row in pairs(rows)] == [f"{here}/a.jpg", f"{here}/b.jpg", "http://h/c.jpg",
                                                   "https://h/d.jpg", ""]
        assert len(said) == 1 and "read as https://" in said[0]


def test_numbers_of_a_parquet_column_become_text_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"image": ["a.jpg", "b.jpg"], "title": [7, 1984]})
    write(tmp_path / "test.parquet", table())
    said: list[str] = []
    rows = load_splits(str(tmp_path), log=said.append)["train"]
    assert rows.title.to_pylist() == ["7", "1984"] and len(said) == 1 and "holds int64" in said[0]


def mutated(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """The bytes with one change, and how many rows of a text table that can cost without a trace."""
    at = rng.randrange(len(data))
    kind = rng.choice(("flip", "cut", "insert", "line"))
    if kind == "flip":
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1:], 2  # a line end that goes joins two rows
    if kind == "cut":
        gap = rng.randrange(1, 400)
        return data[:at] + data[at + gap:], 2 + data[at : at + gap].count(b"\n")
    if kind == "insert":
        more = rng.choice((b'"', b"\n", b"\0", b"\r", b"\xff", b"{", b",,", b"\xed\xa0\x80"))
        return data[:at] + more + data[at:], 2
    lines = data.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines), 2


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_damaged_tables_are_rows_ledger_entries_or_one_error(tmp_path: Path, ending: str) -> None:
    """Whatever happened to a file, no traceback, no error of several lines, and no rows that vanish."""
    titles = [f"two\nlines {row}" if row % 5 == 0 else f'title {row}, "é"' for row in range(30)]
    whole = write(tmp_path / f"whole.{ending}", {"image": [f"{row}.jpg" for row in range(30)], "title": titles})
    data, rng, endings = whole.read_bytes(), random.Random(0), Counter[str]()
    for _ in range(full(60, 2000)):
        damaged, cost = mutated(data, rng)
        (tmp_path / f"all.{ending}").write_bytes(damaged)
        try:
            splits, lost = read(tmp_path / f"all.{ending}")
        except UserError as error:
            assert "\n" not in str(error)
            endings["error"] += 1
            continue
        json.dumps(lost, ensure_ascii=False).encode()  # as ledger.jsonl is written
        kept, dropped = sum(map(len, splits.values())), sum(entry.get("rows", 1) for entry in lost)
        assert ending == "parquet" or kept + dropped >= 30 - cost, damaged
        endings["ledger" if lost else "rows"] += 1
    assert len(endings) >= 2, endings


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    def refusal(dataset: object) -> str:
        with pytest.raises(UserError) as caught:
            load_splits(str(dataset))
        return str(caught.value)

    assert "no such file or folder" in refusal(tmp_path / "missing")
    assert "no such file or folder" in refusal("owner/train.csv")
    assert "only local files" in refusal("https://h/train-000000.tar")
    assert "which of a.csv, b.csv" in refusal(write(tmp_path / "two/a.csv", table()).parent) if write(
        tmp_path / "two/b.csv", table()) else None
    assert "not a known kind" in refusal(write(tmp_path / "train.xls", table()))
    write(tmp_path / "twice/valid.csv", table())
    assert "there twice" in refusal(write(tmp_path / "twice/val.csv", table()).parent)
    write(tmp_path / "half/train.csv", table())
    assert "test.csv: holds no rows" in refusal(write(tmp_path / "half/test.csv", table(0)).parent)
    assert "column holds list<" in refusal(write(tmp_path / "list.parquet", {"image": ["a"], "title": [[["x"]]]}))
    assert "column holds list<" in refusal(write(tmp_path / "list.parquet", {"image": [[1]], "title": ["x"]}))
    latin = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    assert "is not UTF-8" in refusal(write(tmp_path / "latin.parquet", {"image": ["a"], "title": latin}))
    assert "is not UTF-8" in refusal(write(tmp_path / "latin.parquet", {"image": latin, "title": ["a"]}))


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset_builder
    content = picture(tmp_path / "x.jpg")
    good = {"image": [{"bytes": content, "path": "x.jpg"}] * 2, "text": ["NA", "1984"]}
    evil = {"image": [{"bytes": None, "path": "/etc/passwd"}], "text": ["x"]}

    def hub(kind: str, **splits: dict[str, Any]) -> dict[str, Rows]:
        files = {name: str(write(tmp_path / f"{name}.{kind}", part)) for name, part in splits.items()}
        local = real(kind, data_files=files, cache_dir=str(tmp_path / "cache"))
        asked: list[Any] = []
        builder = noting(lambda *_: local, lambda *named: asked.append(named))
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        load_splits("owner/name:large.en")
        found = load_splits("owner/name")
        assert asked == [("owner/name", "large.en"), ("owner/name", None)]
        return found

    splits = hub("parquet", test=good, validation=good, train=good)
    assert {name: pairs(rows) for name, rows in splits.items()} == dict.fromkeys(
        ("train", "valid", "test"), [(content, "NA", None), (content, "1984", None)])
    with pytest.raises(UserError, match=r"split test, row 0: .*the image '/etc/passwd'"):
        hub("parquet", train=good, test=evil)
    with pytest.raises(UserError, match="'x.jpg' is no URL"):
        hub("parquet", train={"url": ["x.jpg"], "title": ["x"]}, test={"url": ["x.jpg"], "title": ["x"]})
    text = {"url": ["http://h/1", "http://h/2"], "title": ["NA", "007"]}
    assert [row[1] for row in pairs(hub("csv", train=text, test=text)["train"])] == ["NA", "007"]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *named: 1 / 0)
    with pytest.raises(UserError, match="owner/name cannot be loaded"):
        load_splits("owner/name")


def test_a_dataset_repository_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loading script is refused, not run, and nobody is asked on the terminal whether it may."""
    from data.sources.library import hub_parts
    from data.sources.parts import ReadContext

    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nimport datasets\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found evil\.py"):
        hub_parts(str(tmp_path / "evil"), ReadContext(ReadOptions(), EmbeddedPictures()))
    with pytest.raises(UserError, match=r"evil\.py: a loading script; scripts are never run"):
        load_splits(str(tmp_path / "evil"))
    assert not (tmp_path / "ran").exists()


def test_take_and_fingerprint_are_blind_to_chunks() -> None:
    rng = np.random.default_rng(0)
    values = [None if i % 7 == 0 else "é" * (i % 5) for i in range(100)]

    def rows(cuts: list[int]) -> Rows:
        def chunked(items: list[Any], kind: pa.DataType) -> pa.ChunkedArray:
            return pa.chunked_array([items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)], kind)

        images = [f"/x/{i % 9}.jpg" if i % 2 else "" for i in range(100)]
        return Rows("train", chunked(images, pa.string()), chunked([f"t{i}" for i in range(100)], pa.string()),
                    chunked(values, pa.string()))

    whole, cut = rows([]), rows([0, 1, 1, 40, 77, 100])
    for indices in (np.arange(100), rng.permutation(100), rng.integers(0, 100, 30), np.array([], int)):
        for taken in (whole.take(indices), cut.take(indices)):
            assert pairs(taken) == [pairs(whole)[i] for i in indices]
    assert whole.fingerprint() == cut.fingerprint() == cut.take(np.arange(100)).fingerprint()
    without = Rows("train", whole.image, whole.title, None)
    swapped = Rows("train", whole.image, whole.title_neg, whole.title)
    blank = Rows("train", whole.image, whole.title, pa.chunked_array([[value or "" for value in values]]))
    moved = Rows("train", whole.image, whole.title, pa.chunked_array([values[1:] + values[:1]]))
    hidden = pa.Array.from_buffers(pa.string(), 2, [pa.py_buffer(b"\1"), pa.py_buffer(np.array([0, 1, 3], np.int32)),
                                                     pa.py_buffer(b"abc")])  # "a" and a null that has bytes
    some = [Rows("train", whole.image.slice(0, 2), whole.title.slice(0, 2), pa.chunked_array([hidden]))]
    some += [Rows("train", whole.image.slice(0, 2), whole.title.slice(0, 2), pa.chunked_array([["a", None]]))]
    assert some[0].fingerprint() == some[1].fingerprint()
    prints = [some.fingerprint() for some in (whole, without, swapped, blank, moved, whole.take(np.arange(99)))]
    assert len(set(prints)) == len(prints)


@pytest.mark.skipif(not OPENSTAX.is_dir(), reason="the development data is not here")
def test_real_pairs() -> None:
    splits = load_splits(str(OPENSTAX))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1012, "valid": 217, "test": 218}
    for rows in splits.values():
        assert all(Path(image).is_file() and title and negative for image, title, negative in pairs(rows))


@pytest.mark.parametrize("kind", ["run", "cache"])
def test_what_we_wrote_into_a_dataset_is_not_read_as_data(kind: str, tmp_path: Path) -> None:
    """A run whose --out lies among the images leaves the split of the next run, and of its own resume, as it was."""
    for i in range(9):
        picture(tmp_path / "deep" / f"{i}.jpg", i)
        (tmp_path / "deep" / f"{i}.txt").write_text(f"title {i}")
    before = {name: pairs(rows) for name, rows in load_splits(str(tmp_path)).items()}
    for place in ("runs/a", "deep/runs/b"):
        picture(tmp_path / place / "tensorboard" / "sprite.png")
        write_mark(tmp_path / place, kind)
    said: list[str] = []
    assert {name: pairs(rows) for name, rows in load_splits(str(tmp_path), log=said.append).items()} == before
    assert len(said) == 1 and "folders that thumbtune wrote: 2" in said[0]
