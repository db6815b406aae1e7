"""Parquet files that are other than they look."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.batch import UserError
from data.sources import arrow_tables
from data.sources.source import load_splits


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_parquet_file_that_takes_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              dictionary: bool) -> None:
    """It would end the machine before its first row is looked at."""
    monkeypatch.setattr(arrow_tables, "UNPACKED", 1 << 22)
    table = pa.table({"image": ["images/a.jpg"] * 4000, "title": ["x" * 5000] * 4000})  # 20 MB
    parquet.write_table(table, tmp_path / "train.parquet", compression="zstd", use_dictionary=dictionary)
    assert (tmp_path / "train.parquet").stat().st_size < 20_000
    with pytest.raises(UserError, match=r"train.parquet: its columns take 20,\d\d\d,\d\d\d bytes"):
        load_splits(str(tmp_path))


def test_repeated_titles_are_no_bomb(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["images/a.jpg"] * 50_000, "title": ["one of two", "another"] * 25_000})
    frame.to_parquet(tmp_path / "train.parquet")
    assert len(load_splits(str(tmp_path))["train"]) == 50_000
