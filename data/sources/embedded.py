"""Pictures that tables hold as values, as references FILE#OFFSET+SIZE to where their bytes lie on the disk.

In an uncompressed Arrow file each value is a range of bytes that any thread can read; the file is neither mapped nor
held in memory. Arrow files, such as the cache of `datasets`, are used where they lie; the pictures of a Parquet file,
or of a table in memory, are first copied to an Arrow file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.batch import UserError
from data.files import replaced_file
from data.ledger import discard
from data.progress import Progress
from data.reading import open_regular
from data.sources.lists import joined

if TYPE_CHECKING:
    import pyarrow as pa

COPY = "embedded pictures 2"  # another layout of the copies gets another number
ROWS = 64  # rows of a Parquet file that are unpacked at one time
BATCH_BYTES = 1 << 24  # of the batches of a copy, but for the last rows: small pictures would make too many batches
POLL_S = 0.2  # between checks of a copy that another process is writing


class _Map(NamedTuple):
    """An Arrow file in the address space of this process."""

    path: str
    content: pa.Buffer


class EmbeddedPictures:
    """Turns values of bytes into references; `folder` holds the copies, None refuses pictures that need one."""

    def __init__(self, folder: Path | None = None, log: Callable[[str], None] = discard) -> None:
        self._folder, self._log = folder, log
        self._maps: list[_Map] = []

    def open(self, path: Path) -> pa.Table:
        """Map an Arrow file (IPC file, stream or Feather), so that `references` finds its values.

        Raises OSError; pyarrow.ArrowInvalid for another kind of file.
        """
        import pyarrow as pa

        open_regular(path).close()
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()  # the map itself, not a copy
        self._maps.append(_Map(os.path.abspath(path), content))
        # From a buffer over the map, arrays are views of it: `_find` knows by their addresses where they lie.
        is_file = content.slice(0, 6).to_pybytes() == b"ARROW1"
        source = pa.BufferReader(content)
        return (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()

    def map_parquet_column(self, path: Path, column: str) -> pa.ChunkedArray:
        """Map a column of a Parquet file from its copy; a file that has not changed is copied once.

        Raises UserError where it cannot be written, OSError and pyarrow.ArrowException where it cannot be read.
        """
        status = os.stat(path)
        identity = COPY, os.path.abspath(path), column, status.st_size, status.st_mtime_ns, status.st_ino
        copy = self._copy_path(str(path), repr(identity).encode("utf-8", "surrogateescape"))
        write_once(copy, partial(self._write, partial(_parquet_batches, path, column, self._log)))
        return self.open(copy).column(0)

    def references(self, values: pa.Array, source: str) -> pa.Array:
        """Return FILE#OFFSET+SIZE for each value, null for null and for no bytes; values in memory are copied first."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = values.type
        if values.null_count == len(values):
            return pa.nulls(len(values), pa.large_string())
        if pa.types.is_dictionary(kind):
            return self.references(values.dictionary, source).take(values.indices)
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            values = values.cast(pa.large_binary())
        data, bounds = _content(values)
        if bounds[0] == bounds[-1]:  # values of no bytes at all
            return pa.nulls(len(values), pa.large_string())
        location = self._find(data)
        if location is None:
            return self._copied(values, source)
        path, base = location
        start, size = pa.array(base + bounds[:-1]), pa.array(np.diff(bounds))
        names = joined(f"{path}#", start, "+", size)
        return pc.if_else(pc.greater(size, 0), names, pa.scalar(None, pa.large_string()))

    def _find(self, data: pa.Buffer) -> tuple[str, int] | None:
        """Return the mapped file that a buffer lies in, and its offset there; None for a buffer in memory."""
        for path, content in self._maps:
            offset = data.address - content.address
            if 0 <= offset and offset + data.size <= content.size:
                return path, offset
        return None

    def _copied(self, values: pa.Array, source: str) -> pa.Array:
        """Copy an array to a file named by its content; return the references to the copy."""
        import pyarrow as pa

        values = values.cast(pa.large_binary())
        data, bounds = _content(values)
        digest = hashlib.blake2b(COPY.encode())
        digest.update(np.diff(bounds).tobytes())
        digest.update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
        digest.update(memoryview(data)[bounds[0] : bounds[-1]])
        batch = pa.record_batch([values], ["image"])
        copy = self._copy_path(source, digest.digest())
        write_once(copy, partial(self._write, lambda: iter([batch])))
        (chunk,) = self.open(copy).column(0).chunks
        return self.references(chunk, source)

    def _copy_path(self, source: str, identity: bytes) -> Path:
        if self._folder is None:
            raise UserError(f"{source} holds pictures, which have to be copied to a folder; give one (--cache-dir)")
        return self._folder / f"{hashlib.blake2b(identity, digest_size=16).hexdigest()}.arrow"

    def _write(self, batches: Callable[[], Iterator[pa.RecordBatch]], path: Path) -> None:
        """Write batches as an Arrow file. Raises UserError where the disk refuses."""
        import pyarrow as pa

        writer: pa.RecordBatchWriter | None = None
        try:
            with open(path, "wb") as file:
                for batch in batches():
                    try:
                        writer = writer or pa.ipc.new_file(file, batch.schema)
                        writer.write_batch(batch)
                    except OSError as error:
                        raise _disk_refuses(path, error) from None
                if writer is not None:
                    writer.close()
        except PermissionError as error:
            raise _disk_refuses(path, error) from None


def _content(values: pa.Array) -> tuple[pa.Buffer, np.ndarray]:
    """Return the buffer that holds the values of a binary array, and their bounds in it, int64 [values + 1]."""
    import pyarrow as pa

    _, ends, data = values.buffers()
    width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    return data, np.frombuffer(ends, width)[values.offset : values.offset + len(values) + 1].astype(np.int64)


def shown_name(reference: str | None) -> str:
    """Return a reference as messages show it: "" for a picture in an Arrow file, which has no name of its own."""
    reference = reference or ""
    file, is_range, _ = reference.rpartition("#")
    return "" if is_range and file.endswith((".arrow", ".feather")) else reference


def write_once(path: Path, write: Callable[[Path], None]) -> None:
    """Make a file by `write` unless it exists: whole or not at all, by one process while others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "ab")
    except OSError as error:
        raise _disk_refuses(path, error) from None
    with lock:
        while not path.exists():
            try:
                # Without waiting: the holder may finish the file in between, and then nothing has to be locked.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_parts(path)
            except BlockingIOError:
                time.sleep(POLL_S)
                continue
            except OSError:  # a file system without locks: every process writes a part of its own
                pass
            if path.exists():
                return
            with replaced_file(path) as part:
                write(part)


def _remove_parts(path: Path) -> None:
    """Delete the parts of a file that killed processes left; the caller holds its lock."""
    for part in path.parent.glob(f".{path.name}.*"):
        part.unlink(missing_ok=True)


def _disk_refuses(path: Path, error: OSError) -> UserError:
    return UserError(f"{path.parent}: pictures cannot be copied there ({error.strerror or error}); free some space or "
                     "choose another --cache-dir")


def _parquet_batches(path: Path, column: str, log: Callable[[str], None]) -> Iterator[pa.RecordBatch]:
    """Yield a column of a Parquet file, BATCH_BYTES at a time, as the column "image"."""
    import pyarrow as pa
    from pyarrow import parquet

    parts: list[pa.Array] = []
    size = 0
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        progress = Progress(f"pictures copied from {path.name}", file.metadata.num_rows, log)
        for batch in file.iter_batches(ROWS, columns=[column]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):  # an Arrow file has one dictionary for all batches
                values = values.dictionary_decode()
            parts.append(values)
            size += values.nbytes
            if size >= BATCH_BYTES:
                yield pa.record_batch([pa.concat_arrays(parts)], ["image"])
                parts, size = [], 0
            progress(len(batch))
    if parts:
        yield pa.record_batch([pa.concat_arrays(parts)], ["image"])
