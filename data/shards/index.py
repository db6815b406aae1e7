"""WebDataset tar shards: their index, and random access to their images.

Tars are not trusted: nothing is extracted, and names are only labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data.batch import BadSample, UserError
from data.ledger import Ledger
from data.reading import open_descriptor
from data.shards.samples import MAX_IMAGE, class_names_beside, row, samples
from data.shards.tar import BLOCK, members, open_tar, read_at
from data.web import storage

if TYPE_CHECKING:
    import pyarrow as pa

MAX_INDEX = 1 << 28
MAX_SHARDS = 1_000_000  # that one pattern may name
HANDLES = 64  # files kept open
REFERENCE = re.compile(r"([^\0]+)#([0-9]{1,18})\+([1-9][0-9]{0,17})")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)(?:\.\.(\d+))?|([^{}]*,[^{}]*))\}")
COLUMNS = ("key", "image_offset", "image_size", "title", "title_neg")
INDEX = (*COLUMNS, "sha256")
FORMAT = "thumbtune shard index 2"


def read_index(path: Path, ledger: Ledger | None = None) -> pa.Table:
    """Return the samples of a shard in order, as a table of COLUMNS, without reading an image.

    int64 offsets and sizes are bytes of the tar; `title` and `title_neg` are lists of texts. `ledger` gets an
    entry for each sample dropped: {"shard", "key", "reason", "detail"}; the key "" stands for damage that may have
    hidden samples. A sidecar index that fits is used instead: an edit that keeps the tar's size and all bytes its index
    sampled is not noticed. Raises UserError if the file is no tar, OSError.
    """
    with open_tar(path) as file:
        table = indexed(path, file)
        table = scanned(path, file, ledger) if table is None else table
    return table.select(COLUMNS).replace_schema_metadata(None)


def read_member(reference: str) -> bytes:
    """Return the bytes at FILE#OFFSET+SIZE, of a tar or any other regular file, in any thread.

    Raises BadSample (truncated, too-large, bad-reference), OSError.
    """
    path, offset, size = parse_reference(reference)
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{size} bytes, {MAX_IMAGE} allowed")
    status = os.stat(path)
    data = b""
    if offset + size <= status.st_size:
        # Held in a variable: a handle that another thread drops from the cache stays open while it is read here.
        handle = _handle(path, status.st_dev, status.st_ino, status.st_mtime_ns)
        data = os.pread(handle.descriptor, size, offset)
    if len(data) < size:
        raise BadSample("truncated", f"{path} ends before the {size} bytes at {offset} do")
    return data


def read_stored(reference: str, max_bytes: int) -> bytes:
    """Return the bytes of an image in a store, whole or at ADDRESS#OFFSET+SIZE. Raises BadSample, also if too large."""
    if REFERENCE.fullmatch(reference) is None:
        return storage.read(reference, max_bytes)
    address, offset, size = parse_reference(reference)
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{size} bytes, {MAX_IMAGE} allowed")
    return storage.read_range(address, offset, size)


class _Handle:
    """An open file, closed when neither the cache nor a thread that reads holds it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


@lru_cache(HANDLES)
def _handle(path: str, *_identity: int) -> _Handle:  # another file of that name is another handle
    return _Handle(open_descriptor(path))


def is_range(reference: str) -> bool:
    """Return whether a reference names a range of a file rather than a whole one."""
    return REFERENCE.fullmatch(reference) is not None


def parse_reference(reference: str) -> tuple[str, int, int]:
    """Return the file, offset and size (at least 1) that a reference names. Raises BadSample (bad-reference)."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise BadSample("bad-reference", f"{reference[:200]!r} is not FILE#OFFSET+SIZE")
    return match[1], int(match[2]), int(match[3])


def expand_braces(pattern: str) -> list[str]:
    """Return the names of a pattern with {000..009}, {0..8..2} and {a,b}, in order.

    Raises UserError above MAX_SHARDS.
    """
    names = list(islice(_expanded(pattern), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise UserError(f"{pattern} names more than {MAX_SHARDS:,} files; narrow its ranges")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, step, words = match.groups()
    options = words.split(",") if words else _numbers(first, last, int(step or 1) or 1)
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])


def _numbers(first: str, last: str, step: int) -> Iterator[str]:
    """Yield the numbers of {first..last..step}, up or down, with leading zeros where one of the two has some."""
    is_padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    start, stop = int(first), int(last)
    for number in range(start, stop + 1, step) if start <= stop else range(start, stop - 1, -step):
        yield f"{number:0{width}}"


# The index beside a tar: a line that identifies the tar and the index body, then the columns


def sidecar(path: Path) -> Path:
    """Return the path of the index of a tar."""
    return path.with_name(path.name + ".index.json")


def seal(file: BinaryIO, body: bytes) -> dict[str, Any]:
    """Return the identity of a tar (its size and 64 blocks spread over it, no time) and of the body of its index."""
    size = file.seek(0, os.SEEK_END)
    # Neither the time, which a copy changes, nor all bytes, which would take as long as scanning the tar.
    sampled = b"".join(read_at(file, (size - BLOCK) * i // 63, BLOCK) for i in range(64))
    return {"format": FORMAT, "tar_bytes": size, "tar_sha256_of_64_blocks": hashlib.sha256(sampled).hexdigest(),
            "index_sha256": hashlib.sha256(body).hexdigest()}


def indexed(path: Path, file: BinaryIO) -> pa.Table | None:
    """Return the index beside a tar; None where it is missing or damaged, or does not fit this tar."""
    try:
        with open_tar(sidecar(path)) as index:
            claim, _, body = read_at(index, 0, min(index.seek(0, os.SEEK_END), MAX_INDEX)).partition(b"\n")
        identity = seal(file, body)
        if json.loads(claim) != identity:
            return None
        columns = json.loads(body)
        table = _table(columns, INDEX).replace_schema_metadata({"tar_sha256": columns["tar_sha256"]})
        offset, size = (table[name].to_numpy() for name in COLUMNS[1:3])
        # An index comes with its tar from elsewhere: it may name no bytes outside of it.
        inside = (offset >= 0) & (size > 0) & (size <= MAX_IMAGE) & (offset <= identity["tar_bytes"] - size)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return table if inside.all() and not any(table[name].null_count for name in COLUMNS) else None


def tar_digest(index: pa.Table) -> str:
    """Return the SHA-256 in hex of the whole tar that an index was written with."""
    return index.schema.metadata[b"tar_sha256"].decode()


def _table(columns: Mapping[str, Any], names: Iterable[str]) -> pa.Table:
    import pyarrow as pa

    kinds = dict.fromkeys(COLUMNS[1:3], pa.int64()) | dict.fromkeys(COLUMNS[3:], pa.list_(pa.string()))
    return pa.table({name: pa.array(columns[name], kinds.get(name, pa.string())) for name in names})


def scanned(path: Path, file: BinaryIO, ledger: Ledger | None) -> pa.Table:
    """Return what `read_index` does, from the tar itself."""
    def report(key: str, problem: BadSample) -> None:
        if ledger is not None:
            ledger({"shard": str(path), "key": key, "reason": problem.reason, "detail": problem.detail})

    rows: list[tuple[Any, ...]] = []
    classes = class_names_beside(path)
    for key, files in samples(members(file, report)):
        try:
            rows.append((key, *row(file, files, classes, partial(report, key))))
        except BadSample as problem:
            report(key, problem)
    return table_of(rows)


def table_of(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    """Return the index of samples, from the values of COLUMNS of each."""
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    return _table(dict(zip(COLUMNS, columns, strict=True)), COLUMNS)
