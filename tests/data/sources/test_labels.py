"""Class names as titles: spelling, templates, the ids of the loss, and a split that has every class on all sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data.batch import UserError
from data.catalogue import build_catalogue
from data.sources.columns import Columns
from data.sources.labels import class_codes, count_classes
from data.sources.options import ReadOptions
from data.sources.rows import Rows
from data.sources.source import load_splits
from data.sources.split import stratified_split

NAMES = ["golden_retriever", "cat", "Red Fox"]


def labelled(path: Path, *templates: str, rows: int = 9) -> tuple[Rows, list[str]]:
    """The rows of a table with a column of classes, and the lines said."""
    frame = pd.DataFrame({"image": [f"{row}.jpg" for row in range(rows)], "label": NAMES * (rows // 3)})
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    said: list[str] = []
    return load_splits(str(path), ReadOptions(templates=templates), log=said.append)["train"], said


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_class_names_are_titles_in_plain_words(tmp_path: Path, ending: str) -> None:
    rows, said = labelled(tmp_path / f"table.{ending}")
    assert rows.title.to_pylist()[:3] == ["golden retriever", "cat", "Red Fox"]
    assert len(said) == 1 and "names of 3 classes (Red Fox, cat, golden_retriever)" in said[0]
    assert count_classes({"train": rows}) == {"train": 3}


def test_each_template_is_a_title_and_titles_of_a_class_are_no_negatives(tmp_path: Path) -> None:
    """"a cat." was pushed away from a picture of a cat whose title is "a photo of a cat"."""
    rows, _ = labelled(tmp_path / "table.csv", "a photo of a {}", "a {}.")
    assert rows.title.to_pylist()[:4] == ["a photo of a golden retriever", "a golden retriever.", "a photo of a cat",
                                          "a cat."]
    assert rows.image.to_pylist()[:4:2] == [f"{tmp_path}/0.jpg", f"{tmp_path}/1.jpg"]
    catalogue = build_catalogue({"train": rows})
    assert catalogue.title_group_P is not None
    assert torch.equal(catalogue.title_group_P, torch.tensor([0, 0, 2, 2, 4, 4]))


def test_numbers_are_no_titles_and_a_title_comes_before_a_class(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["a.jpg", "b.jpg"], "label": [0, 1]})
    for ending in ("csv", "parquet"):
        path = tmp_path / f"table.{ending}"
        frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
        with pytest.raises(UserError, match=r"classes are numbers \(0, 1.*--title-column"):
            load_splits(str(path))
    frame.assign(text=["x", "y"]).to_csv(tmp_path / "table.csv", index=False)
    rows = load_splits(str(tmp_path / "table.csv"))["train"]
    assert rows.title.to_pylist() == ["x", "y"] and rows.label is None
    rows = load_splits(str(tmp_path / "table.csv"), ReadOptions(Columns(title=("text",)), templates=("a {}",)))["train"]
    assert rows.title.to_pylist() == ["a x", "a y"]


def test_numbers_with_gaps_are_no_titles(tmp_path: Path) -> None:
    """pandas writes a column of class numbers with a gap as 0.0, 1.0, which became titles."""
    for labels in ([0, 1, None], [-1, 0, 1]):
        pd.DataFrame({"image": ["0.jpg", "1.jpg", "2.jpg"], "label": labels}).to_csv(tmp_path / "x.csv", index=False)
        with pytest.raises(UserError, match="the classes are numbers"):
            load_splits(str(tmp_path / "x.csv"))


def test_every_class_is_on_all_sides_and_no_image_is_on_two() -> None:
    """Whole classes were held out: their titles were never trained on, and the figures were those of other classes."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(5), [100, 40, 3, 2, 7])
    image_N = rng.permutation(len(class_N))
    image_N[1::2][:20] = image_N[::2][:20]  # rows of one image, as templates make them
    parts = stratified_split(7, class_N, image_N)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(class_N)))
    images = [set(image_N[part].tolist()) for part in parts.values()]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    for name, part in parts.items():
        assert set(class_N[part].tolist()) == ({0, 1, 2, 3, 4} if name == "train" else {0, 1, 2, 4})
    of_first = [int((class_N[part] == 1).sum()) for part in parts.values()]
    assert of_first == [28, 6, 6]
    assert not np.array_equal(parts["test"], stratified_split(8, class_N, image_N)["test"])


def test_rows_without_a_class_are_rows_without_a_title(tmp_path: Path) -> None:
    pd.DataFrame({"image": ["a.jpg", "b.jpg"], "label": ["cat", None]}).to_parquet(tmp_path / "table.parquet")
    rows = load_splits(str(tmp_path / "table.parquet"), ReadOptions(templates=("a {}", "one {}")))["train"]
    assert rows.title.to_pylist() == ["a cat", "one cat", ""] and class_codes(rows).tolist() == [0, 0, -1]
