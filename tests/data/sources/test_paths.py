"""Image paths as people's tables have them: absolute, file:, Windows, ids, images in another folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from data.batch import UserError
from data.sources.options import ReadOptions
from data.sources.paths import parse_image_template
from data.sources.source import load_splits


def images(path: Path, written: list[str], options: ReadOptions | None = None) -> tuple[list[str], list[str]]:
    """The image references of a table with these paths, and the lines said."""
    path.parent.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    pd.DataFrame({"image": written, "title": [f"title {row}" for row in range(len(written))]}).to_csv(path, index=False)
    rows = load_splits(str(path), options or ReadOptions(), log=said.append)["train"]
    return rows.image.to_pylist(), said


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_a_table_of_the_user_may_point_anywhere(tmp_path: Path) -> None:
    """open_clip users have absolute paths in their CSVs; all these rows were dropped as outside the folder."""
    touch(tmp_path / "set/here.jpg", tmp_path / "set/back\\slash.jpg")
    read, said = images(tmp_path / "set/table.csv", [
        "here.jpg", "/data/a.jpg", "../b.jpg", "file:///data/a%20b.jpg", "file://localhost/c.jpg", "images\\c.jpg",
        "back\\slash.jpg", "here.jpg#3", "https://h/a%20b.jpg#1"])
    base = f"{tmp_path}/set"
    assert read == [f"{base}/here.jpg", "/data/a.jpg", f"{base}/../b.jpg", "/data/a b.jpg", "/c.jpg",
                    f"{base}/images/c.jpg", f"{base}/back\\slash.jpg", f"{base}/here.jpg", "https://h/a%20b.jpg#1"]
    assert len(said) == 2 and "is read as /" in said[0] and "without #" in said[1]


def test_ids_become_paths_by_a_template_below_a_root(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    options = ReadOptions(image_root=str(tmp_path / "coco"), image_template="COCO_val2014_{:012}.jpg")
    read, _ = images(tmp_path / "table.csv", ["42", "0007", "https://h/x.jpg"], options)
    assert read == [f"{tmp_path}/coco/COCO_val2014_000000000042.jpg", f"{tmp_path}/coco/COCO_val2014_000000000007.jpg",
                    "https://h/x.jpg"]
    read, _ = images(tmp_path / "table.csv", ["007", "x"], ReadOptions(image_template="{}.jpg"))
    assert read == [f"{tmp_path}/007.jpg", f"{tmp_path}/x.jpg"]
    for template in ("x.jpg", "{}{}", "{name}", "{:x}"):
        with pytest.raises(UserError, match="--image-template"):
            parse_image_template(template)
    with pytest.raises(UserError, match="--image-root .* no such folder"):
        images(tmp_path / "table.csv", ["a.jpg"], ReadOptions(image_root=str(tmp_path / "none")))


@pytest.mark.parametrize("prefix", ["/no/such/flickr/", "C:\\Users\\me\\flickr\\", "file:///C:/flickr/"])
def test_absolute_paths_of_another_machine_are_found_below_the_root(tmp_path: Path, prefix: str) -> None:
    """The error advised --image-root, which did nothing for absolute paths."""
    slash = "\\" if "\\" in prefix else "/"
    names = [f"{prefix}part{slash}{row}.jpg" for row in range(3)]
    touch(*(tmp_path / "pictures" / "part" / f"{row}.jpg" for row in range(2)))
    read, said = images(tmp_path / "table.csv", names, ReadOptions(image_root=str(tmp_path / "pictures")))
    assert read == [f"{tmp_path}/pictures/part/{row}.jpg" for row in range(3)]
    assert "are read below" in said[-1]


def test_paths_that_are_here_stay_and_an_unused_root_is_said(tmp_path: Path) -> None:
    touch(tmp_path / "here/0.jpg", tmp_path / "pictures/0.jpg")
    options = ReadOptions(image_root=str(tmp_path / "pictures"), image_template="{}.png")
    read, said = images(tmp_path / "table.csv", [f"{tmp_path}/here/0.jpg"], options)
    assert read == [f"{tmp_path}/here/0.jpg"]
    assert len(said) == 1 and "not used" in said[0] and "--image-root, --image-template" in said[0]


def test_ids_that_pandas_made_floats_are_numbers_again(tmp_path: Path) -> None:
    """A column of ids with a gap is written as 7.0."""
    pd.DataFrame({"image": [7, None], "title": ["a", "b"]}).to_csv(tmp_path / "table.csv", index=False)
    rows = load_splits(str(tmp_path / "table.csv"), ReadOptions(image_template="{:03}.jpg"))["train"]
    assert rows.image.to_pylist() == [f"{tmp_path}/007.jpg", ""]


@pytest.mark.parametrize(("table", "folder"), [
    ("captions.csv", "Images"), ("results.csv", "flickr30k_images/flickr30k_images"), ("text/table.csv", "images")])
def test_images_in_a_folder_nearby_are_found_and_that_is_said(tmp_path: Path, table: str, folder: str) -> None:
    """Kaggle's Flickr8k and Flickr30k name images without their folder: every row was a missing file."""
    names = [f"{row}.jpg" for row in range(30)]
    touch(*(tmp_path / folder / name for name in names[:25]))
    read, said = images(tmp_path / table, names)
    assert read == [f"{tmp_path}/{folder}/{name}" for name in names]
    assert len(said) == 1 and f"read from {tmp_path}/{folder}" in said[0] and "--image-root" in said[0]


def test_no_folder_is_guessed_where_an_image_is_in_place_or_missing_or_in_two(tmp_path: Path) -> None:
    """An image of another folder with the same name would be trained on without a word."""
    names = [f"{row}.jpg" for row in range(5)]
    touch(*(tmp_path / "images" / name for name in names), tmp_path / "4.jpg")
    assert images(tmp_path / "table.csv", names)[0] == [f"{tmp_path}/{name}" for name in names]
    (tmp_path / "4.jpg").unlink()
    (tmp_path / "images/3.jpg").unlink()
    assert images(tmp_path / "table.csv", names)[0] == [f"{tmp_path}/{name}" for name in names]
    touch(tmp_path / "images/3.jpg", *(tmp_path / "copies" / name for name in names))
    with pytest.raises(UserError, match="copies and in .*images; choose with --image-root"):
        images(tmp_path / "table.csv", names)


def test_names_without_their_ending_are_found(tmp_path: Path) -> None:
    touch(*(tmp_path / "images" / f"{row}.png" for row in range(3)))
    read, said = images(tmp_path / "table.csv", ["0", "1", "2"])
    assert read == [f"{tmp_path}/images/{row}.png" for row in range(3)] and "with .png after their names" in said[0]
