"""Files of the feature store, written atomically, verified when opened, memory-mapped; and their folders.

A space (tower and preprocessing fingerprint) is a folder of immutable segments. A segment is a safetensors file: keys
[n, 16] u8, sums [1 + blocks] u32, values [n, width], rows in the order they came. Its header is a pure function of its
space and size; sums[0] is the CRC-32 of keys and of the other sums, sums[1 + b] that of the b-th block of values.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.reading import open_regular

KEY = 16  # bytes of a key
BLOCK = 256  # rows under one checksum
HEADER = 1024  # bytes before the data
SUFFIX = ".features.safetensors"
NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")  # as `write_segment` names one
FORMAT = "thumbtune features 1"
IN_USE = "in-use"  # a file of a space, locked by the processes that use it
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def key_of(data: bytes) -> bytes:
    """Return the 16-byte key of a content."""
    return hashlib.blake2b(data, digest_size=KEY).digest()


class Layout(NamedTuple):
    """Properties that all segments of a space share."""

    space: str
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of values."""
        return self.width * self.dtype.itemsize

    def header(self, rows: int) -> tuple[bytes, int]:
        """Return the header of a segment of `rows` rows, and the size of the whole file."""
        blocks = -(-rows // BLOCK)
        fields: dict[str, object] = {"__metadata__": {
            "format": FORMAT, "space": self.space, "block_rows": str(BLOCK)}}
        tensors = (
            ("keys", "U8", [rows, KEY], rows * KEY),
            ("sums", "U32", [1 + blocks], 4 * (1 + blocks)),
            ("values", DTYPES[self.dtype], [rows, self.width], rows * self.row_bytes))
        end = 0
        for name, dtype, shape, size in tensors:
            fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(fields).encode().ljust(HEADER - 8)
        return len(text).to_bytes(8, "little") + text, HEADER + end


class Segment(NamedTuple):
    """One memory-mapped file."""

    path: Path
    start: int  # number of its first row in the store: a multiple of BLOCK, so that row // BLOCK is the block
    keys: np.ndarray  # [n] S16
    sums: np.ndarray  # [blocks] uint32
    values: np.ndarray  # [n, row bytes] uint8

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy these rows of the store (ascending) to `out` [n, row bytes]; IndexError when one is not in this file."""
        if rows[-1] >= self.start + len(self.keys):
            raise IndexError(f"no row {rows[-1]}")
        # "clip", as "raise" would copy through a buffer; no index is clipped, the first check has seen to that.
        np.take(self.values, rows - self.start, 0, out, "clip")

    def first_bad(self, blocks: np.ndarray) -> int | None:
        """Return the first of `blocks` whose values do not match their checksum, None if all do."""
        for block in blocks.tolist():
            if zlib.crc32(self.values[block * BLOCK : (block + 1) * BLOCK].data) != self.sums[block]:
                return int(block)
        return None


def open_segment(path: Path, start: int, layout: Layout) -> Segment:
    """Map a segment and verify all of it but the values; its bytes are only compared, never parsed.

    Raises ValueError with the reason when it is not a whole segment of this space, FileNotFoundError when it is gone,
    NotAFile when it is no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        rows = (size - HEADER - 4) * BLOCK // ((KEY + layout.row_bytes) * BLOCK + 4)
        header, expected = layout.header(rows)
        if rows < 1 or size != expected:
            raise ValueError("truncated, or of another width")
        # Through the descriptor, since another rank may rename the path now. torch maps the file and keeps no
        # descriptor open, so that a store of many segments does not use them up.
        raw = torch.from_file(f"/dev/fd/{file.fileno()}", shared=False, size=size, dtype=torch.uint8).numpy()
    if raw[:HEADER].tobytes() != header:
        raise ValueError("header damaged, or of another space")
    sums_start, values_start = HEADER + rows * KEY, size - rows * layout.row_bytes
    keys, values = raw[HEADER:sums_start], raw[values_start:]
    sums = raw[sums_start:values_start].view("<u4")
    if zlib.crc32(sums[1:].data, zlib.crc32(keys.data)) != sums[0]:
        raise ValueError("keys or checksums damaged")
    return Segment(path, start, keys.view(f"S{KEY}"), sums[1:], values.reshape(rows, layout.row_bytes))


def write_segment(folder: Path, layout: Layout, keys: np.ndarray, values: Tensor) -> Path:
    """Write a segment atomically: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    flat = values.detach().to("cpu", layout.dtype).contiguous().view(torch.uint8).numpy()
    keys = np.ascontiguousarray(keys, np.uint8)
    block_sums = [zlib.crc32(flat[low : low + BLOCK].data) for low in range(0, len(flat), BLOCK)]
    sums = np.array([0, *block_sums], "<u4")
    sums[0] = zlib.crc32(sums[1:].data, zlib.crc32(keys.data))
    # A random name: processes that write at the same time need not agree on numbers.
    path = folder / (secrets.token_hex(16) + SUFFIX)
    temporary = path.with_name(path.name + ".tmp")
    folder.mkdir(parents=True, exist_ok=True)
    directory = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: `remove_stale` deletes nothing there
            fcntl.flock(directory, fcntl.LOCK_SH)
        with open(temporary, "xb") as file:
            file.writelines((layout.header(len(keys))[0], keys.data, sums.data, flat.data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        os.fsync(directory)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(directory)
    return path


def remove_stale(folder: Path) -> None:
    """Delete the temporary files of killed writers; does nothing while one writes, as that holds a lock on the folder.
    """
    with suppress(OSError):
        directory = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.glob(f"*{SUFFIX}.tmp"):
                path.unlink()
        finally:
            os.close(directory)


def hold(folder: Path) -> int | None:
    """Lock a space as in use, beside any number of others; return the descriptor that holds the lock.

    None where the folder does not exist yet, or where nothing can be locked, as in a folder that is read-only.
    """
    while True:
        try:
            descriptor = os.open(folder / IN_USE, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # `prune` has deleted the file before we locked it: lock a new one


class _Kept(Exception):
    """The reason why a space is not pruned."""


def _begin_prune(folder: Path) -> int | None:
    """Lock a space that no process holds; return the descriptor.

    None where a full disk has no room for the lock file: then no process can have made and locked it. Raises _Kept for
    a space in use, and where locks do not work: nothing shows there whether a run uses it.
    """
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        raise _Kept(f"it cannot be locked ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise _Kept("another process is using it") from None
        raise _Kept(f"the file system has no locks ({error.strerror}), so a run may be using it; when none is, delete "
                    f"{folder}") from None
    return descriptor


def spaces(cache_dir: Path) -> dict[str, int]:
    """Return the bytes on disk of every space in `cache_dir`, by its folder's name; other folders are left out."""
    sizes: dict[str, int] = {}
    for folder in sorted(cache_dir.glob("*")):
        paths = sorted(folder.glob(f"*{SUFFIX}*"))
        if not any(map(_is_ours, paths)):
            continue
        for path in paths:
            with suppress(FileNotFoundError):  # a temporary file that has just been renamed
                if path.is_file():
                    sizes[folder.name] = sizes.get(folder.name, 0) + path.stat().st_size
    return sizes


def _is_ours(path: Path) -> bool:
    """Return whether `write_segment` wrote a file, by its name or its header."""
    with suppress(OSError), open_regular(path) as file:
        return bool(NAME.match(path.name)) or FORMAT.encode() in file.read(HEADER)
    return False


class Pruned(NamedTuple):
    """Bytes that were freed, spaces that stay with the reason, and odd files that stay."""

    freed: int
    kept: dict[str, str]
    odd: list[Path]


def prune(cache_dir: Path, keep: Collection[str]) -> Pruned:
    """Delete the spaces not named in `keep` that no process can be using, and damaged segments everywhere.

    Files that this program did not write, and what is no regular file, stay where they are.
    """
    before = spaces(cache_dir)
    kept: dict[str, str] = {}
    odd: list[Path] = []
    for name in before:
        folder = cache_dir / name
        lock = None
        try:
            lock = None if name in keep else _begin_prune(folder)
            for path in folder.glob(f"*{SUFFIX}.damaged" if name in keep else f"*{SUFFIX}*"):
                if not path.is_file() or path.is_symlink():
                    odd.append(path)
                elif path.suffix == ".damaged" or _is_ours(path):
                    # A damaged segment has no header to know it by; only this program writes that ending here.
                    path.unlink(missing_ok=True)
            if lock is not None:
                (folder / IN_USE).unlink(missing_ok=True)
        except _Kept as reason:
            kept[name] = str(reason)
        except OSError as error:  # a disk that is read-only, a folder of another user
            kept[name] = f"it cannot be deleted ({error.strerror})"
        finally:
            if lock is not None:
                os.close(lock)
        with suppress(OSError):  # not empty: kept, or other files are in it
            folder.rmdir()
    return Pruned(sum(before.values()) - sum(spaces(cache_dir).values()), kept, odd)
