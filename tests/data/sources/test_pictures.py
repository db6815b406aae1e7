"""Folders of images: every file that looks like data is a row, a ledger entry or counted; nothing waits for a pipe."""

from __future__ import annotations

import io
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.batch import BadSample, UserError
from data.check.checks import check
from data.check.findings import Finding, table
from data.cold import Reader
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from data.sources.source import ReadOptions, Rows, load_splits
from data.web.limits import FetchPolicy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for torch's


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def folder_of(path: Path, count: int) -> Path:
    """`count` images with titles."""
    path.mkdir(parents=True)
    for row in range(count):
        (path / f"{row:02d}.jpg").write_bytes(jpeg(row))
        (path / f"{row:02d}.txt").write_text(f"title {row}", encoding="utf-8")
    return path


def read(dataset: Path) -> tuple[dict[str, Rows], list[dict[str, Any]], list[str]]:
    """The splits of a dataset, what it has lost, what was said."""
    lost: list[dict[str, Any]] = []
    said: list[str] = []
    folder = dataset.with_name(f"{dataset.name}-embedded")
    return load_splits(str(dataset), ledger=lost.append, log=said.append, embedded=folder), lost, said


def reader(cache: Path) -> Reader:
    return Reader(cache, ImageSpec.clip(), FetchPolicy(), 10**8, 2)


def count(splits: Mapping[str, Rows]) -> int:
    return sum(map(len, splits.values()))


def looked_over(dataset: Path, cache: Path) -> tuple[list[Finding], int, str]:
    """What `check` finds, how many rows it finds usable, and its last line."""
    rows, lost, _ = read(dataset)
    findings, usable = check(rows, reader(cache), lambda text: None, lost)
    page = table(findings, {name: len(part) for name, part in rows.items()}, usable, dropped_rows(lost))
    return findings, sum(usable.values()), page.splitlines()[-1]


def test_every_file_that_looks_like_data_is_accounted_for(tmp_path: Path) -> None:
    """Pairs would vanish because of an ending, a link or a lost image, and nobody would know."""
    here = folder_of(tmp_path / "set", 20)
    (here / "20.HEIC").write_bytes(b"picture of an unknown kind")
    (here / "20.txt").write_text("a title beside it")
    (here / "21.txt").write_text("its image is gone")
    (here / "22.json").write_text('{"title": "likewise"}')
    (here / "23.jpg").write_bytes(jpeg(23))  # no title
    (here / "24.TXT").write_text("an ending in capitals")
    (here / "24.JPG").write_bytes(jpeg(24))
    (here / "notes.pdf").write_bytes(b"neither picture nor title")
    (tmp_path / "elsewhere").mkdir()
    (here / "linked").symlink_to(tmp_path / "elsewhere")
    (here / ".thumbs").mkdir()
    splits, lost, said = read(here)
    assert count(splits) == 22 and "an ending in capitals" in [
        title for rows in splits.values() for title in rows.title.to_pylist()]
    assert Counter(entry["reason"] for entry in lost) == Counter(
        {"unknown-ending": 1, "sidecar-without-image": 1, "linked-folder": 1})
    assert dropped_rows(lost) == 1 and [entry["files"] for entry in lost if "files" in entry] == [1, 2]
    assert len(said) == 1
    assert "without an image of their name: 2" in said[0] and "linked folders, not followed: 1" in said[0]
    findings, usable, last = looked_over(here, tmp_path / "cache")
    assert {(one.kind, one.count) for one in findings} >= {
        ("unknown-ending", 1), ("sidecar-without-image", 2), ("linked-folder", 1), ("no-title", 1)}
    assert usable == 21 and "drop 2 of 23 rows" in last


@pytest.mark.parametrize("kind", ["sidecars", "class folders"])
def test_a_picture_that_a_run_has_lost_is_still_a_row(tmp_path: Path, kind: str) -> None:
    """Else a run that lost it while it streamed could not be gone on with: its rows would be others."""
    folder = folder_of(tmp_path / "set", 4)
    if kind == "class folders":
        for row, path in enumerate(sorted(folder.glob("*.jpg"))):
            path.with_suffix(".txt").unlink()
            (folder / f"class {row % 2}").mkdir(exist_ok=True)
            path.rename(folder / f"class {row % 2}" / path.name)
    whole, other = load_splits(str(folder))["train"], str(folder / "of another dataset.jpg")
    path = whole.image[1].as_py()
    Path(path).unlink()
    rows = load_splits(str(folder), ReadOptions(lost=frozenset([path, other.replace("set", "sat")])))["train"]
    assert rows.fingerprint() == whole.fingerprint() != load_splits(str(folder))["train"].fingerprint()


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("07.txt", b"caf\xe9", "bad-title"), ("07.json", b"{", "bad-json"), ("07.json", b"[1]", "bad-json"),
    ("07.json", b'{"title_neg": [{}]}', "not-text"), ("07.json", b'{"title_neg": "\\ud83d"}', "not-utf8"),
    ("07.txt", b"x" * (1 << 20) + b"y", "too-large"), ("\udcff.jpg", b"whatever", "bad-name")])
def test_a_bad_sidecar_or_name_is_one_ledger_entry(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    here = folder_of(tmp_path / "set", 20)
    (here / name).write_bytes(content)
    splits, lost, _ = read(here)
    assert count(splits) + len(lost) == 20 + (reason == "bad-name")
    assert [entry["reason"] for entry in lost] == [reason]
    json.dumps(lost, ensure_ascii=False).encode()  # as ledger.jsonl is written


def test_nothing_waits_for_a_pipe_a_socket_or_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named pipe among the images would stop a run for ever."""
    here = folder_of(tmp_path / "set", 20)
    os.mkfifo(here / "pipe.jpg")
    (here / "pipe.txt").write_text("a pipe")
    (here / "linked.jpg").symlink_to(here / "pipe.jpg")
    (here / "device.jpg").symlink_to("/dev/zero")
    (here / "folder.jpg").symlink_to(tmp_path)
    os.unlink(here / "07.txt")
    os.mkfifo(here / "07.txt")
    plug = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(here)  # the path of a socket is short
    plug.bind("socket.jpg")
    for name in ("linked", "device", "socket"):
        (here / f"{name}.txt").write_text(name)
    findings, usable, _ = looked_over(here, tmp_path / "cache")
    plug.close()
    assert usable == 19
    assert sum(one.count for one in findings if one.kind == "not-a-file") == 5
    _, lost, _ = read(here)
    assert [entry["reason"] for entry in lost if dropped_rows([entry])] == ["not-a-file"]  # 07.txt
    for path in ("/dev/zero", here / "pipe.jpg", here / "socket.jpg", tmp_path):
        with pytest.raises(BadSample, match="not-a-file.*not a regular file"):
            reader(tmp_path).read(str(path))


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.parquet", "train-000000.tar"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_table_that_is_a_pipe_is_refused(tmp_path: Path, name: str, whole: bool) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        load_splits(str(tmp_path / name if whole else tmp_path))


META = ("url", "caption", "key", "status", "error_message", "width", "height")


def img2dataset_rows(count: int, failed: frozenset[int]) -> dict[str, list[Any]]:
    """The columns that img2dataset writes for every address (its writer.py and downloader.py)."""
    status = ["failed_to_download" if row in failed else "success" for row in range(count)]
    return {"url": [f"http://127.0.0.1:9/{row}.jpg" for row in range(count)],
            "caption": [f"caption {row}" for row in range(count)], "key": [f"{row:09d}" for row in range(count)],
            "status": status, "error_message": ["HTTP Error 404" if row in failed else None for row in range(count)],
            "width": [None if row in failed else 80 for row in range(count)]}


def write_img2dataset(folder: Path, layout: str, failed: frozenset[int], parts: int = 2) -> Path:
    """What img2dataset leaves of eight addresses a part."""
    folder.mkdir()
    for part in range(parts):
        columns, name = img2dataset_rows(8, failed), f"{part:05d}"
        images = [None if row in failed else jpeg(8 * part + row) for row in range(8)]
        if layout == "parquet":
            columns |= {"jpg": images, "txt": [None if row in failed else columns["caption"][row] for row in range(8)]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        (folder / f"{name}_stats.json").write_text(json.dumps({"count": 8, "successes": 8 - len(failed)}))
        samples = [(key, image, {field: columns[field][row] for field in columns if field != "jpg"})
                   for row, (key, image) in enumerate(zip(columns["key"], images, strict=True)) if image]
        if layout == "files":
            (folder / name).mkdir()
            for key, image, meta in samples:
                (folder / name / f"{key}.jpg").write_bytes(image)
                (folder / name / f"{key}.txt").write_text(meta["caption"])
                (folder / name / f"{key}.json").write_text(json.dumps(meta))
        if layout == "webdataset":
            webdataset = pytest.importorskip("webdataset")
            with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
                for key, image, meta in samples:
                    writer.write({"__key__": key, "jpg": image, "txt": meta["caption"], "json": meta})
    return folder


@pytest.mark.parametrize("layout", ["parquet", "files", "webdataset"])
def test_img2dataset_is_read_in_its_three_layouts(tmp_path: Path, layout: str) -> None:
    """Its addresses would be fetched again, many of them dead, though the pictures lie beside them."""
    here = write_img2dataset(tmp_path / layout, layout, failed=frozenset({2, 5}))
    splits, lost, _ = read(here)
    rows = [row for part in splits.values() for row in zip(part.image.to_pylist(), part.title.to_pylist(), strict=True)]
    assert sorted(title for _, title in rows) == sorted(f"caption {row}" for row in (0, 1, 3, 4, 6, 7) for _ in "ab")
    assert {reader(tmp_path).read(image)[:2] for image, _ in rows} == {b"\xff\xd8"}
    failures = [entry for entry in lost if dropped_rows([entry])]
    assert [(Path(entry["file"]).name, entry["row"], entry["reason"], entry["detail"]) for entry in failures] == [
        (f"0000{part}.parquet", row, "failed-to-download", "HTTP Error 404") for part in (0, 1) for row in (2, 5)]
