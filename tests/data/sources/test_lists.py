"""Several captions and several negatives a row become rows and lists, however a dataset spells them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_frame
from PIL import Image

from data.batch import UserError
from data.catalogue import build_catalogue
from data.cold import Reader
from data.images.decode import ImageSpec
from data.ledger import Account, dropped_rows
from data.shards.pack import pack
from data.sources import records
from data.sources.embedded import EmbeddedPictures
from data.sources.options import ReadOptions
from data.sources.paths import ImageLocation
from data.sources.rows import to_row_columns
from data.sources.source import DETECT, Columns, Rows, load_splits
from data.sources.split import ContentReader, divide_lone_split
from data.web.fetch import FetchPolicy

CAPTIONS: list[list[str | None]] = [
    ["a dog", "the dog", "dogs"], ["a cat"], [], ["", None, "a bird", " "], ["a fish", "two fish"]]
WANTED = [("0", "a dog"), ("0", "the dog"), ("0", "dogs"), ("1", "a cat"), ("2", ""), ("3", "a bird"), ("4", "a fish"),
          ("4", "two fish")]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def read(path: Path, columns: Columns = DETECT.columns) -> tuple[Rows, list[str], list[dict[str, Any]]]:
    said: list[str] = []
    lost: list[dict[str, Any]] = []
    splits = load_splits(str(path), ReadOptions(columns), lost.append, log=said.append, embedded=path.parent / "cache")
    (rows,) = splits.values()
    return rows, said, lost


def shown(rows: Rows) -> list[tuple[str, str]]:
    names = [Path(image).stem for image in rows.image.to_pylist()]
    return list(zip(names, rows.title.to_pylist(), strict=True))


def lists(kind: str) -> pa.Array:
    text = pa.large_string() if "large" in kind else pa.string()
    if kind == "fixed":
        padded = [[*captions, *[None] * 4][:4] for captions in CAPTIONS]
        return pa.array(padded, pa.list_(pa.string(), 4))
    if kind == "dictionary":
        flat = pa.array([text for captions in CAPTIONS for text in captions]).dictionary_encode()
        return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, CAPTIONS)]), pa.int32()), flat)
    if kind == "struct":
        return pa.array([[{"raw": text, "sentid": 1} for text in captions] for captions in CAPTIONS])
    types = {"list": pa.list_(text), "large": pa.large_list(text), "view": pa.list_view(text)}
    return pa.array([captions or None for captions in CAPTIONS] if kind == "large" else CAPTIONS, types[kind])


@pytest.mark.parametrize("kind", ["list", "large", "fixed", "view", "dictionary", "struct"])
def test_a_list_of_captions_is_a_row_each(tmp_path: Path, kind: str) -> None:
    """Flickr30k on the hub was refused; a caption beside another image would train on nonsense."""
    images = pa.array([f"{row}.jpg" for row in range(5)])
    given = pa.array([["n", ""], None, [], ["m"], ["o", "p"]])
    table = pa.table({"image": images, "title": lists(kind), "title_neg": given})
    sliced = pa.concat_tables([table, table]).slice(1, 8)
    for part, wanted in ((table, WANTED), (sliced, [*WANTED[3:], *WANTED[:6]])):
        columns = to_row_columns(part, "x", ImageLocation([str(tmp_path)]), Account(), EmbeddedPictures())
        rows = Rows("train", *(columns[name] for name in ("image", "title", "title_neg")))
        negatives = {"0": ["n"], "1": [], "2": [], "3": ["m"], "4": ["o", "p"]}
        assert shown(rows) == wanted
        assert rows.title_neg is not None
        assert rows.title_neg.to_pylist() == [negatives[name] for name, _ in wanted]
    if kind in ("list", "large", "fixed", "struct"):
        pq.write_table(table.rename_columns(["image", "captions", "negatives"]), tmp_path / "all.parquet")
        assert shown(read(tmp_path / "all.parquet")[0]) == WANTED


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_json_lines_may_mix_texts_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(records, "RECORDS", chunk)
    lines: list[dict[str, Any]] = [{"image": f"{row}.jpg", "caption": captions[0] if len(captions) == 1 else captions}
                                   for row, captions in enumerate(CAPTIONS)]
    lines[1]["negative"] = ["n", 7]
    lines.append({"image": "5.jpg", "caption": ["good", {"id": "bad"}]})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, _, lost = read(tmp_path / "all.jsonl")
    assert shown(rows) == WANTED and rows.title_neg is not None
    assert rows.title_neg.to_pylist() == [["n", "7"] if name == "1" else [] for name, _ in WANTED]
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(5, "not-text"), (3, "no-title")]


def test_a_title_that_is_not_utf8_is_told_by_the_row_of_the_file(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"b", b"caf\xe9", b"d"], pa.binary()).view(pa.string())
    titles = pa.ListArray.from_arrays(pa.array([0, 2, 3, 4], pa.int32()), texts)
    pq.write_table(pa.table({"image": ["0.jpg", "1.jpg", "2.jpg"], "title": titles}), tmp_path / "all.parquet")
    rows, _, lost = read(tmp_path / "all.parquet")
    assert shown(rows) == [("0", "a"), ("0", "b"), ("2", "d")]
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(1, "not-utf8")]


FAMILIES = {  # columns of a table -> titles and negatives taken, in order, and the line that says so
    ("image", "caption_1", "caption_0", "caption_10"): (("caption_0", "caption_1", "caption_10"), (), "caption_0, cap"),
    ("img", "caption", "caption.1"): (("caption", "caption.1"), (), "title = caption, caption.1"),
    ("image_name", " comment_number", " comment"): ((" comment",), (), ""),
    ("URL", "TEXT"): (("TEXT",), (), ""), ("filepath", "title"): (("title",), (), ""),
    ("image", "caption 1", "caption2", "title"): (("title",), (), "title (not used: caption 1, caption2)"),
    ("image", "title", "negative_1", "negative_2"): (("title",), ("negative_1", "negative_2"), "negative_1, negat"),
    ("image", "title", "neg_1", "title_neg"): (("title",), ("title_neg",), "title_neg (not used: neg_1)"),
    ("anchor", "positive", "negative_1"): (("positive",), ("negative_1",), "image = anchor; title = positive"),
    ("image", "title", "hard_negative", "false_caption"): (
        ("title",), (), "title_neg = none (not used: hard_negative, false_caption)"),
    ("image", "image_2", "title"): (("title",), (), "image = image (not used: image_2)"),
    ("url", "image_path", "title"): (("title",), (), "image = url (not used: image_path)"),
}


@pytest.mark.parametrize("names", FAMILIES, ids=",".join)
@pytest.mark.parametrize("ending", ["csv", "parquet", "jsonl"])
def test_columns_of_one_family_are_taken_together_and_choices_are_said(
        tmp_path: Path, names: tuple[str, ...], ending: str) -> None:
    """Of caption_0 … caption_4 none was found; of negative_1 … none was used, and nobody was told."""
    titles, negatives, line = FAMILIES[names]
    frame = pd.DataFrame({name: [f"{name} {row}" for row in range(3)] for name in names})
    path = tmp_path / f"all.{ending}"
    write_frame(frame, path)
    rows, said, _ = read(path)
    wanted = [f"{name} {row}" for row in range(3) for name in titles]
    if ending == "csv" and all(name.startswith(" ") for name in names[1:]):
        wanted = [title.strip() for title in wanted]  # blanks behind the separators of a header are no part of names
    assert rows.title.to_pylist() == wanted
    taken = rows.title_neg.to_pylist() if rows.title_neg is not None else [[]] * len(rows)
    assert taken == [[f"{name} {row}" for name in negatives] for row in range(3) for _ in titles]
    assert len(said) == bool(line) and line in "".join(said)


def test_columns_that_the_user_names(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["0.jpg"], "title": ["t"], "long": ["l"], "n": ["n1"], "m": [["m1", "m2"]]})
    frame.to_parquet(tmp_path / "all.parquet")
    rows, _, _ = read(tmp_path / "all.parquet", Columns(title=("long", "title"), title_neg=("n", "m")))
    assert rows.title.to_pylist() == ["l", "t"] and rows.title_neg is not None
    assert rows.title_neg.to_pylist() == [["n1", "m1", "m2"]] * 2
    with pytest.raises(UserError, match="no column 'longg' for --title-column.*did you mean 'long'"):
        read(tmp_path / "all.parquet", Columns(title=("title", "longg")))


def test_the_picture_of_a_triplet_is_found_by_its_type(tmp_path: Path) -> None:
    """sentence-transformers' columns, either way round: a picture is never taken for a text."""
    pictures = [{"bytes": jpeg(1), "path": None}]
    for names in (("anchor", "positive"), ("positive", "anchor")):
        frame = pd.DataFrame(dict(zip(names, (pictures, ["a text"]), strict=True)))
        frame["negative_1"] = pictures if names[0] == "positive" else ["another text"]
        frame.to_parquet(tmp_path / "all.parquet")
        rows, said, _ = read(tmp_path / "all.parquet")
        assert rows.title.to_pylist() == ["a text"] and rows.image[0].as_py().startswith(str(tmp_path / "cache"))
        assert (rows.title_neg is None) == (names[0] == "positive")


def test_ragged_negatives_become_a_table_of_titles() -> None:
    negatives = [["b", "c"], None, [], ["a"], ["x", "B", "a"]]
    rows = Rows("train", pa.chunked_array([list("01234")]), pa.chunked_array([list("abcde")]),
                pa.chunked_array([negatives[:2], negatives[2:]], pa.list_(pa.string())))
    catalogue = build_catalogue({"train": rows, "test": Rows("test", rows.image, rows.title, None)})
    names = catalogue.titles.to_pylist()
    table = catalogue.negative_N["train"]
    assert table is not None and table.shape == (5, 3) and catalogue.negative_N["test"] is None
    assert [[names[at] for at in row if at >= 0] for row in table] == [["b", "c"], [], [], ["a"], ["x", "b", "a"]]


def test_captions_of_one_image_stay_on_one_side_and_survive_packing(tmp_path: Path) -> None:
    """Else a test picture was trained on under another caption; and shards would lose captions or negatives."""
    frame = pd.DataFrame({"image": [{"bytes": jpeg(row), "path": None} for row in range(20)],
                          "caption": [[f"caption {n} of {row}" for n in range(5)] for row in range(20)],
                          "negatives": [["one", "two"][: row % 3] for row in range(20)]})
    frame.to_parquet(tmp_path / "all.parquet")
    rows, _, _ = read(tmp_path / "all.parquet")
    reader = Reader(tmp_path / "fetched", ImageSpec.clip(), FetchPolicy(), 25_000_000, 2)
    parts = divide_lone_split({"train": rows}, ContentReader(reader, tmp_path / "cache"), 0)
    sides = [{title.rpartition(" ")[2] for title in part.title.to_pylist()} for part in parts.values()]
    assert list(map(len, parts.values())) == [70, 15, 15] and sum(map(len, sides)) == len(set.union(*sides)) == 20
    assert pack({"train": rows}, reader, tmp_path / "out", 0, print) == []
    (packed,) = load_splits(str(tmp_path / "out")).values()
    assert packed.title.to_pylist() == rows.title.to_pylist() and packed.title_neg is not None
    assert rows.title_neg is not None and packed.title_neg.to_pylist() == rows.title_neg.to_pylist()


def test_tars_with_several_captions(tmp_path: Path) -> None:
    """webdataset's writer makes KEY.0.txt, KEY.1.txt of several texts, and JSON of lists."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), verbose=0) as writer:
        numbered = {f"{n}.txt": f"text {n}" for n in (10, 0, 2)}
        writer.write({"__key__": "a", "jpg": jpeg(0), **numbered})
        listed = {"captions": ["one", "", None, "two"], "negative": ["n", "m"]}
        writer.write({"__key__": "b", "jpg": jpeg(1), "json": listed})
        texts = {"txt": "first", "caption_1.txt": "second"}
        writer.write({"__key__": "c", "jpg": jpeg(2), **texts, "json": {"title": "no"}})
        writer.write({"__key__": "d", "jpg": jpeg(3), "x.txt": "which", "y.txt": "of these"})
        writer.write({"__key__": "e", "jpg": jpeg(4), "json": {"caption": ["fine", 7, {}]}})
    rows, _, lost = read(tmp_path / "train-000000.tar")
    assert rows.title.to_pylist() == ["text 0", "text 2", "text 10", "one", "two", "first", "second"]
    assert rows.title_neg is not None and rows.title_neg.to_pylist() == [[], [], [], ["n", "m"], ["n", "m"], [], []]
    assert [(entry["key"], entry["reason"]) for entry in lost] == [
        ("b", "no-title"), ("d", "ambiguous"), ("e", "bad-json")]


@pytest.mark.parametrize("field", ["raw", "caption", "text"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_texts_in_lists_of_objects(tmp_path: Path, ending: str, field: str) -> None:
    """The same table was read as Parquet and dropped row by row as JSON lines."""
    objects = [[{field: "a dog", "id": 1}, {field: "dogs", "id": 2}], [{field: "a cat", "id": 3}]]
    frame = pd.DataFrame({"image": ["0.jpg", "1.jpg"], "captions": objects})
    path = tmp_path / f"all.{ending}"
    if ending == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    rows, _, lost = read(path)
    assert shown(rows) == [("0", "a dog"), ("0", "dogs"), ("1", "a cat")] and not lost


def test_titles_and_negatives_that_name_pictures_are_said(tmp_path: Path) -> None:
    """sentence-transformers' anchor may be the text: in a CSV nothing tells, and images and titles changed places."""
    texts, images = ["a dog", "a cat"], ["0.jpg", "1.jpg"]
    frame = pd.DataFrame({"anchor": texts, "positive": images, "negative": images[::-1]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    _, said, _ = read(tmp_path / "a.csv")
    assert "image = anchor; title = positive" in said[0]
    assert "title column holds names of pictures, such as '0.jpg'; --title-column" in said[1]
    assert "title_neg column holds names of pictures, such as '1.jpg'; --negative-column" in said[2]
    pictures = pa.array([jpeg(0), jpeg(1)])
    pq.write_table(pa.table({"anchor": pictures, "positive": texts, "negative": pictures}), tmp_path / "b.parquet")
    rows, said, _ = read(tmp_path / "b.parquet")
    assert rows.title.to_pylist() == texts and rows.title_neg is None
    assert "title_neg = none (not used: negative)" in said[0]


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_dictionaries_of_any_text_are_texts(tmp_path: Path, text: pa.DataType) -> None:
    """A column of polars' Enum was refused; as a column of splits it was not used, without a word."""
    def encoded(*values: str) -> pa.Array:
        words = [*dict.fromkeys(values)]
        codes = pa.array([words.index(value) for value in values], pa.uint8())
        return pa.DictionaryArray.from_arrays(codes, pa.array(words, text))

    table = pa.table({"image": encoded("0.jpg", "1.jpg", "0.jpg"), "label": encoded("cat", "dog", "cat"),
                      "negative": encoded("x", "x", "y"), "split": encoded("train", "test", "train")})
    with pa.ipc.new_file(str(tmp_path / "all.arrow"), table.schema) as file:
        file.write_table(table)
    splits = load_splits(str(tmp_path / "all.arrow"), embedded=tmp_path / "cache")
    assert {name: shown(rows) for name, rows in splits.items()} == {
        "train": [("0", "cat"), ("0", "cat")], "test": [("1", "dog")]}
    assert splits["train"].title_neg is not None and splits["train"].title_neg.to_pylist() == [["x"], ["y"]]


def test_a_column_plays_one_role(tmp_path: Path) -> None:
    """A column that the user made a title was its own negative as well."""
    columns = {name: [f"{name} {row}" for row in range(2)] for name in ("caption", "negative_1", "negative_2")}
    pd.DataFrame({"image": ["0.jpg", "1.jpg"], **columns}).to_csv(tmp_path / "all.csv", index=False)
    rows, said, _ = read(tmp_path / "all.csv", Columns(title=("caption", "negative_1")))
    assert rows.title.to_pylist() == ["caption 0", "negative_1 0", "caption 1", "negative_1 1"]
    assert rows.title_neg is not None and rows.title_neg.to_pylist() == [
        [f"negative_2 {row}"] for row in range(2) for _ in range(2)]


def test_negatives_that_templates_leave_as_they_are_are_said(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["0.jpg", "1.jpg"], "label": ["cat", "dog"], "negative": ["dog", None]})
    frame.to_csv(tmp_path / "all.csv", index=False)
    said: list[str] = []
    load_splits(str(tmp_path / "all.csv"), ReadOptions(templates=("a {}",)), log=said.append)
    assert any("negatives stay as they are" in line for line in said)
    frame.drop(columns="negative").to_csv(tmp_path / "all.csv", index=False)
    said.clear()
    load_splits(str(tmp_path / "all.csv"), ReadOptions(templates=("a {}",)), log=said.append)
    assert len(said) == 1


def test_blank_captions_are_dropped_rows_and_blank_negatives_are_counted(tmp_path: Path) -> None:
    """Else an image with five captions, two of them empty, trains with three and nothing says so."""
    captions = [["a", "", "\u200b\u00a0", "b"], ["", " "], ["c"], []]
    lines = [{"image": f"{row}.jpg", "caption": each, "negative": ["n", " ", ""]} for row, each in enumerate(captions)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, said, lost = read(tmp_path / "all.jsonl")
    assert rows.title.to_pylist() == ["a", "b", "", "c", ""]  # a row without a title is dropped when it is opened
    assert [(entry["row"], entry["reason"], entry.get("rows", 1)) for entry in lost] == [
        (0, "no-title", 2), (1, "no-title", 1)]
    assert len(rows) + dropped_rows(lost) == sum(max(1, len(texts)) for texts in captions)
    assert any("8 blank negatives are not used" in line for line in said)


def test_empty_cells_of_several_title_columns_are_no_captions(tmp_path: Path) -> None:
    """A table with columns caption_0 to caption_4 has empty cells where an image has fewer."""
    (tmp_path / "all.csv").write_text("image,caption_0,caption_1\n0.jpg,a,b\n1.jpg,c,\n2.jpg,,\n")
    rows, _, lost = read(tmp_path / "all.csv", Columns(title=("caption_0", "caption_1")))
    assert rows.title.to_pylist() == ["a", "b", "c", ""] and not lost
