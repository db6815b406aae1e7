"""The splits that a dataset names itself, by files or by a column, and what --splits makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import write_frame

from data.batch import UserError
from data.sources.columns import Columns
from data.sources.options import ReadOptions, parse_splits
from data.sources.source import load_splits

VALUES = ["train"] * 6 + ["restval"] * 3 + ["Val"] * 2 + ["test"] * 2 + ["extra", " "]
FRAME = pd.DataFrame({"image": [f"{row}.jpg" for row in range(len(VALUES))],
                      "title": [f"title {row}" for row in range(len(VALUES))], "split": VALUES})


def sizes(dataset: Path, *splits: str, column: str | None = None) -> tuple[
        dict[str, int], list[str], list[dict[str, Any]]]:
    """The rows of each split, the lines said, and the ledger."""
    said: list[str] = []
    lost: list[dict[str, Any]] = []
    options = ReadOptions(Columns(split=column), splits=parse_splits(splits))
    found = load_splits(str(dataset), options, lost.append, log=said.append)
    return {name: len(rows) for name, rows in found.items()}, said, lost


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_column_of_splits_divides_a_table(tmp_path: Path, ending: str) -> None:
    """Karpathy's test rows were trained on: the column that says so was not looked at."""
    path = tmp_path / f"table.{ending}"
    write_frame(FRAME, path)
    found, said, lost = sizes(path)
    assert found == {"train": 9, "valid": 2, "test": 2, "extra": 1}
    assert [(entry["row"], entry["reason"]) for entry in lost] == [(14, "no-split")]
    assert len(said) == 1 and "train 9 (restval + train)" in said[0] and "1 that name none" in said[0]
    found, said, _ = sizes(path, "train=train", "test=extra+val")
    assert found == {"train": 6, "test": 3} and "not used: restval 3, test 2" in said[0]


def test_another_column_has_to_be_named(tmp_path: Path) -> None:
    FRAME.rename(columns={"split": "part"}).to_csv(tmp_path / "table.csv", index=False)
    assert sizes(tmp_path / "table.csv")[0] == {"train": 15}
    assert sizes(tmp_path / "table.csv", column="part")[0]["train"] == 9
    FRAME.assign(split=[f"of {row % 3}" for row in range(15)]).to_csv(tmp_path / "table.csv", index=False)
    found, said, _ = sizes(tmp_path / "table.csv")
    assert found == {"train": 15} and "names neither train, valid nor test" in said[0]


def test_a_column_of_splits_that_holds_no_names_is_no_reason_to_stop_unless_it_was_named(tmp_path: Path) -> None:
    for values in ([["train"]] * 15, [""] * 15, [1.5] * 15):
        FRAME.assign(split=values).to_parquet(tmp_path / "table.parquet")
        found, _, lost = sizes(tmp_path / "table.parquet")
        assert found == {"train": 15} and not lost
    FRAME.assign(split="").to_parquet(tmp_path / "table.parquet")
    with pytest.raises(UserError, match="--split-column split holds no names"):
        sizes(tmp_path / "table.parquet", column="split")


def test_splits_are_named_chosen_and_joined(tmp_path: Path) -> None:
    FRAME.drop(columns="split").to_csv(tmp_path / "whole.csv", index=False)
    assert sizes(tmp_path / "whole.csv", "test=all")[0] == {"test": 15}
    FRAME.assign(split="test").to_csv(tmp_path / "lone.csv", index=False)
    assert sizes(tmp_path / "lone.csv")[0] == {"test": 15}
    assert sizes(tmp_path / "lone.csv", "train=test")[0] == {"train": 15}
    files = tmp_path / "files"
    files.mkdir()
    for name in ("train", "validation"):
        FRAME.to_csv(files / f"{name}.csv", index=False)
    found, said, lost = sizes(files)
    assert found == {"train": 15, "valid": 15} and not lost and "the column 'split' is not used" in said[0]
    assert sizes(files, "train=train", "test=validation")[0] == {"train": 15, "test": 15}
    assert sizes(files, "train=train+val")[0] == {"train": 30}
    assert sizes(files, column="split")[0] == {"train": 18, "valid": 4, "test": 4, "extra": 2}


@pytest.mark.parametrize(("splits", "message"), [
    (["train=dev2"], "there is no split 'dev2'; there is train, valid"),
    (["train=train", "test=train"], "twice"), (["train=train", "train=val"], "names train twice"),
    (["train"], "SPLIT=")])
def test_a_split_that_is_not_there_is_refused(tmp_path: Path, splits: list[str], message: str) -> None:
    for name in ("train", "valid"):
        FRAME.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(UserError, match=message):
        sizes(tmp_path, *splits)
