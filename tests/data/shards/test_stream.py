"""A tar read as a stream gives what the same tar gives as a file, also a damaged one."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers import picture

from data.batch import BadSample, UserError
from data.shards import stream
from data.shards.index import read_index
from data.shards.stream import ForwardFile, stream_samples


class Forward(io.BytesIO):
    """Bytes that can be read and nothing else, as those of a connection."""

    def seek(self, *_: Any) -> int:
        raise AssertionError("a stream is not sought in")


def write_tar(path: Path, rng: random.Random, kind: int) -> bytes:
    """Samples whose files come in any order, with long names, texts in JSON, folders, links and files of none."""
    with tarfile.open(path, "w", format=kind) as tar:
        for number in range(30):
            key = f"{'f' * rng.choice((1, 120))}/{number:04}"
            files = {"jpg": picture(number, rng.randrange(1, 3000)), "txt": f"título {number}".encode()}
            if rng.random() < 0.5:
                files["json"] = b'{"title_neg": "not %d"}' % number
            if rng.random() < 0.1:
                files["txt"] = b""
            if rng.random() < 0.1:
                files["cls"] = b"3" * 5000
            for ending in rng.sample(sorted(files), len(files)):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(files[ending])
                tar.addfile(info, io.BytesIO(files[ending]))
            if rng.random() < 0.2:
                link = tarfile.TarInfo(f"{key}.webp")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(link)
    return path.read_bytes()


def streamed(data: bytes, name: str) -> tuple[list[tuple[Any, ...]], list[tuple[str, str, str]], list[bytes]] | str:
    problems: list[tuple[str, str, str]] = []

    def report(key: str, problem: BadSample) -> None:
        problems.append((key, problem.reason, problem.detail))

    try:
        samples = list(stream_samples(ForwardFile(Forward(data), len(data), name), report))
    except UserError as error:
        return str(error)
    return [sample.values for sample in samples], problems, [sample.image for sample in samples]


def indexed(data: bytes, path: Path) -> tuple[list[tuple[Any, ...]], list[tuple[str, str, str]], list[bytes]] | str:
    path.write_bytes(data)
    entries: list[dict[str, Any]] = []
    try:
        table = read_index(path, entries.append)
    except UserError as error:
        return str(error)
    rows = [tuple(row.values()) for row in table.to_pylist()]
    problems = [(entry["key"], entry["reason"], entry["detail"]) for entry in entries]
    return rows, problems, [data[row[1] : row[1] + row[2]] for row in rows]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_stream_gives_the_samples_of_the_file_whatever_the_damage(tmp_path: Path, kind: int) -> None:
    """A shard from a store would have other rows, or other dropped ones, than the same shard on the disk."""
    rng = random.Random(kind)
    whole = write_tar(tmp_path / "whole.tar", rng, kind)
    damaged = [whole, b"", whole[:511], b"\x1f\x8b" + bytes(2000), rng.randbytes(5000), bytes(100_000) + whole]
    for _ in range(40):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 4) if data else 0):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((1, 600, 5000))] = rng.randbytes(rng.choice((1, 600, 5000)))
        damaged.append(bytes(data))
    path = tmp_path / "x.tar"
    for content in damaged:
        assert streamed(content, str(path)) == indexed(content, path)


def test_memory_is_bounded_whatever_a_tar_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar with endless files before the end of a sample would fill the memory."""
    monkeypatch.setattr(stream, "MAX_HELD", 20_000)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, size in [*((f"a.{ending}.jpg", 3000) for ending in range(100)), ("b.jpg", 900), ("b.txt", 9)]:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    file = ForwardFile(Forward(path.read_bytes()), path.stat().st_size, "x.tar")
    problems: list[str] = []
    samples = list(stream_samples(file, lambda key, problem: problems.append(f"{key} {problem.reason}")))
    assert [sample.values[0] for sample in samples] == ["b"] and problems == ["a ambiguous"]
    assert not file._held
