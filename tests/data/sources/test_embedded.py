"""Pictures that tables hold are read from the disk, range by range, whatever Arrow type they have."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.batch import UserError
from data.shards.index import read_member
from data.sources.embedded import EmbeddedPictures, shown_name, write_once
from data.sources.library import mapped_table
from data.sources.source import Rows, load_splits

DATA = [b"\xff\xd8one", None, b"\xff\xd8two", b"\xff\xd8" + bytes(5000), b"", b"\xff\xd8one"]


def bytes_of(rows: Rows) -> list[bytes | None]:
    return [read_member(image) if image else None for image in rows.image.to_pylist()]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary", "struct", "large struct",
                                  "sliced"])
def test_pictures_of_any_arrow_type_are_found_again(tmp_path: Path, kind: str) -> None:
    """A wrong offset trains every row on another row's picture."""
    values = pa.array(DATA, pa.binary())
    if kind == "dictionary":
        column: pa.Array = values.dictionary_encode()
    elif "struct" in kind:
        data = values.cast(pa.large_binary()) if "large" in kind else values
        column = pa.StructArray.from_arrays([data, pa.array(["x.jpg"] * len(DATA))], ["bytes", "path"])
    elif kind == "sliced":
        column = pa.array([b"before", *DATA, b"after"]).slice(1, len(DATA))
    else:
        column = values.cast(getattr(pa, kind)())
    wanted = [value or None for value in DATA]
    pictures = EmbeddedPictures(tmp_path / "cache")
    in_memory = column.field("bytes") if "struct" in kind else column
    found = pictures.references(in_memory, "a table in memory")
    assert [None if name is None else read_member(name) for name in found.to_pylist()] == wanted
    if kind != "binary_view":  # Parquet has no such type; pyarrow writes it as binary
        pq.write_table(pa.table({"image": column, "title": list("abcdef")}), tmp_path / "train.parquet")
        pd.DataFrame({"image": ["https://h/x.jpg"], "title": ["t"]}).to_parquet(tmp_path / "test.parquet")
        rows = load_splits(str(tmp_path), embedded=tmp_path / "cache")["train"]
        names = ["x.jpg" if value is None else "" for value in DATA]
        assert [shown_name(image) for image in rows.image.to_pylist()] == [
            str(tmp_path / name) if name and "struct" in kind else "" for name in names]
        assert [read_member(image) for image in rows.image.to_pylist() if ".arrow#" in image] == [
            value for value in wanted if value]


def test_an_unchanged_parquet_is_copied_once(tmp_path: Path) -> None:
    """Every run of a large dataset would copy it again; a changed file must not show its old pictures."""
    def write(data: list[bytes]) -> Path:
        path = tmp_path / "all.parquet"
        images = [{"bytes": value, "path": None} for value in data]
        pd.DataFrame({"image": images, "title": list("ab")}).to_parquet(path)
        return path

    path, cache = write([b"first", b"second"]), tmp_path / "cache"
    (one,) = load_splits(str(path), embedded=cache).values()
    copies = sorted(cache.glob("*.arrow"))
    written = copies[0].stat().st_mtime_ns
    (again,) = load_splits(str(path), embedded=cache).values()
    assert len(copies) == 1 and copies[0].stat().st_mtime_ns == written and again.image == one.image
    write([b"third", b"longer than it was"])
    (changed,) = load_splits(str(path), embedded=cache).values()
    assert bytes_of(changed) == [b"third", b"longer than it was"] and bytes_of(one) == [b"first", b"second"]
    with pytest.raises(UserError, match="--cache-dir"):
        load_splits(str(path))


def test_the_cache_files_of_datasets_are_not_copied(tmp_path: Path) -> None:
    """A hub dataset of 100 GB lies on the disk already."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": bytes([row]) * (row + 1), "path": None} for row in range(40)],
            "title": [f"title {row}" for row in range(40)]}
    made = datasets.Dataset.from_dict(rows)
    made.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    stored = datasets.load_from_disk(str(tmp_path / "saved"))
    for dataset, copied in ((stored, 0), (stored.shuffle(seed=0), 1), (made, 1)):
        cache = tmp_path / f"cache{copied}"
        pictures = EmbeddedPictures(cache)
        table = mapped_table(dataset, pictures)
        found = [name for chunk in table["image"].chunks
                 for name in pictures.references(chunk.field("bytes"), "saved").to_pylist()]
        assert [read_member(name) for name in found] == [row["bytes"] for row in dataset["image"]]
        assert bool(list(cache.glob("*.arrow"))) == bool(copied)


def _copy_slowly(path: Path, log: Path) -> None:
    def write(part: Path) -> None:
        with log.open("a") as file:
            file.write("written\n")
        part.write_bytes(b"half")
        time.sleep(0.5)
        part.write_bytes(b"whole")

    write_once(path, write)
    assert path.read_bytes() == b"whole"


def test_one_process_copies_and_a_killed_copy_is_not_believed(tmp_path: Path) -> None:
    """Eight ranks would write 8 copies, or read half of one."""
    path, log = tmp_path / "cache" / "x.arrow", tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    killed = spawn.Process(target=_copy_slowly, args=(path, log))
    killed.start()
    while not list(path.parent.glob(".x.arrow.*")):
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not path.exists() and list(path.parent.glob(".x.arrow.*"))
    ranks = [spawn.Process(target=_copy_slowly, args=(path, log)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert log.read_text().count("written") == 2 and not list(path.parent.glob(".x.arrow.*"))


def test_opening_a_parquet_keeps_no_picture_in_memory(tmp_path: Path) -> None:
    """A dataset may be larger than the memory, and every rank opens it."""
    pictures = [np.random.default_rng(row).bytes(1 << 18) for row in range(256)]  # 64 MiB
    table = pa.table({"image": pictures, "title": [f"title {row}" for row in range(256)]})
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=16)
    del table
    before = pa.total_allocated_bytes()
    (rows,) = load_splits(str(tmp_path / "all.parquet"), embedded=tmp_path / "cache").values()
    assert pa.total_allocated_bytes() - before < 1 << 20
    assert bytes_of(rows) == pictures
