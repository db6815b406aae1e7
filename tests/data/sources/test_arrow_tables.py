"""Parquet and Arrow files that are other than they look."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers import full
from pyarrow import feather, parquet

from data.batch import UserError
from data.ledger import Account
from data.sources import arrow_tables
from data.sources.arrow_sizes import unpacked_size
from data.sources.embedded import EmbeddedPictures
from data.sources.paths import ImageLocation
from data.sources.rows import join_tables, to_row_columns
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


@pytest.mark.parametrize("kind", ["zstd", "lz4", "dictionary", "nested"])
def test_a_small_arrow_file_that_takes_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            kind: str) -> None:
    """Compressed buffers, a dictionary that stands for more than it holds, and lists would end the machine as well."""
    monkeypatch.setattr(arrow_tables, "UNPACKED", 1 << 22)
    monkeypatch.setattr(arrow_tables, "MAX_RATIO", 20)
    title = pa.array(["x" * 5000] * 4000)  # 20 MB
    path = tmp_path / ("train.parquet" if kind == "nested" else "train.feather")
    if kind == "nested":
        lists = pa.ListArray.from_arrays(pa.array(np.arange(0, 4001, 4), pa.int32()), title)
        parquet.write_table(pa.table({"image": ["a.jpg"] * 1000, "caption": lists}), path, compression="zstd")
    else:
        titles = title.dictionary_encode() if kind == "dictionary" else title
        table = pa.table({"image": ["a.jpg"] * 4000, "title": titles})
        feather.write_feather(table, path, compression="uncompressed" if kind == "dictionary" else kind)
    with pytest.raises(UserError, match=r"its columns take 20,\d\d\d,\d\d\d bytes in memory"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_the_unpacked_size_of_an_arrow_file_is_that_of_its_columns(tmp_path: Path, compression: str) -> None:
    """A size that is read from the wrong place would refuse sound files, or take bombs."""
    table = pa.table({"image": [f"{row}.jpg" for row in range(3000)], "number": [*range(3000)]})
    feather.write_feather(table, tmp_path / "a.feather", compression=compression, chunksize=700)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema,
                           options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
        stream.write_table(table, 1000)
    for file in ("a.feather", "a.arrow"):
        assert unpacked_size(tmp_path / file) == pytest.approx(table.nbytes, rel=0.02)
    feather.write_feather(table, tmp_path / "plain.feather", compression="uncompressed")
    assert unpacked_size(tmp_path / "plain.feather") == 0


@pytest.mark.skipif(full(0, 1) == 0, reason="takes 6 GB of memory; THUMBTUNE_FULL=1")
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_more_than_two_gib_of_titles_are_read_and_taken_from(kind: str) -> None:
    """32-bit offsets of Arrow end there: a lone split, which is divided by taking rows of it, ended in a traceback."""
    title = "x" * (1 << 20)
    chunks = [pa.array([title] * 22)] * 100
    if kind == "large_string":
        chunks = [pa.array([title] * 2200, pa.large_string())]
    if kind == "dictionary":
        chunks = [pa.DictionaryArray.from_arrays(pa.array(np.zeros(2200, np.int32)), pa.array([title]))]
    table = pa.table({"image": [f"{row}.jpg" for row in range(2200)], "title": pa.chunked_array(chunks)})
    account, location = Account(), ImageLocation(["/folder"], anywhere=True)
    rows = join_tables("train", [to_row_columns(table, "a", location, account, EmbeddedPictures())], "a", account)
    taken = rows.take(np.arange(2199, -1, -1))
    assert len(taken) == 2200 and taken.image[0].as_py() == "/folder/2199.jpg" and taken.title.nbytes > 1 << 31
