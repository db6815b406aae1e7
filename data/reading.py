"""Reading of files that others made: only regular ones, without waiting, and no more bytes than a limit.

Opening a named pipe would wait for a writer without end; a small file may hold gigabytes as it is unpacked.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Generator, Iterator
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, AnyStr

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_HOLE = 1 << 30  # bytes of a sparse file in a row that may never have been written
MAX_UNPACKED = 1 << 33  # bytes that a .gz may hold
MAX_LINE = 1 << 24  # characters or bytes
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFDIR: "a folder"}


class NotAFile(OSError):
    """A path that is something else than a regular file."""

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"{kind}, not a regular file", str(path))


class TooLarge(OSError):
    """A file with more bytes than are read."""


class Unfinished(TooLarge):
    """A file of which a large part was never written, as an unfinished copy or download leaves it."""

    def __init__(self, path: str | Path, size: int) -> None:
        super().__init__(errno.EINVAL, f"{size:,} bytes in a row were never written; copy it again", str(path))


def open_descriptor(path: str | Path) -> int:
    """Return a descriptor to read a regular file, opened without waiting. Raises NotAFile, Unfinished, OSError."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for a writer. It changes nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # Linux's answer to opening a socket
            raise NotAFile(path, KINDS[stat.S_IFSOCK]) from None
        raise
    # Of the descriptor, not the path: another file may be renamed to that name in between.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise NotAFile(path, KINDS.get(stat.S_IFMT(status.st_mode), "something else"))
    if status.st_size > MAX_HOLE and (hole := _large_hole(descriptor, status.st_size)):
        os.close(descriptor)
        raise Unfinished(path, hole)
    return descriptor


def _large_hole(descriptor: int, size: int) -> int:
    """Return the bytes of a hole above MAX_HOLE in a file; 0 if there is none among its first 1,000."""
    stop = 0
    for _ in range(1000):
        try:
            start = os.lseek(descriptor, stop, os.SEEK_HOLE)
        except OSError:  # a file system that knows no holes
            break
        try:
            stop = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind it
            stop = size
        if stop - start > MAX_HOLE:
            return stop - start
        if stop >= size:
            break
    os.lseek(descriptor, 0, os.SEEK_SET)
    return 0


def open_regular(path: str | Path, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Open a regular file to read its bytes. Raises NotAFile, OSError."""
    return io.BufferedReader(io.FileIO(path, opener=lambda name, flags: open_descriptor(name)), buffering)


class BlockStream(io.RawIOBase):
    """Blocks of bytes, which a generator yields, as a file to be read once."""

    def __init__(self, blocks: Generator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer`; return the number of bytes, 0 at the end."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        """Close the generator."""
        self._blocks.close()
        super().close()


def open_unpacked(path: str | Path) -> io.BufferedReader:
    """Open a regular file to read its bytes, those of a .gz unpacked. Raises NotAFile, OSError."""
    file = open_regular(path)
    is_packed = str(path).lower().endswith(".gz")
    return io.BufferedReader(BlockStream(_unpack(file, str(path))), 1 << 18) if is_packed else file


def _unpack(file: io.BufferedReader, path: str) -> Generator[bytes]:
    """Yield the bytes that a gzip file holds, at most MAX_UNPACKED: a small file may hold any number of them."""
    count = 0
    with file, gzip.GzipFile(fileobj=file) as unpacked:
        try:
            while block := unpacked.read1(1 << 18):
                count += len(block)
                if count > MAX_UNPACKED:
                    raise OSError(errno.EFBIG, f"holds more than {MAX_UNPACKED:,} bytes; unpack it", path)
                yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise OSError(errno.EIO, f"a damaged gzip file ({error})", path) from None


def bounded_lines(file: IO[AnyStr], path: str | Path) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises TooLarge at one of more than MAX_LINE: it would be in memory as a whole."""
    for number in count(1):
        line = file.readline(MAX_LINE)
        if not line:
            return
        # A line of exactly MAX_LINE that ends with its line end is whole.
        if len(line) == MAX_LINE and line.splitlines()[0] == line:
            reason = f"line {number} has more than {MAX_LINE:,} characters; write each row on a line of its own"
            raise TooLarge(errno.EFBIG, reason, str(path))
        yield line


def read_regular(path: str | Path, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a regular file. Raises NotAFile, OSError, TooLarge where it has more than `max_bytes`."""
    with open_regular(path) as file:
        if max_bytes is None:
            return file.read() or b""  # None: some files of /proc would block
        size = os.fstat(file.fileno()).st_size
        data = b""
        if size <= max_bytes:
            # One byte more than allowed: files of /proc claim a size of 0, and a file may grow while it is read.
            data = file.read(max_bytes + 1) or b""
        if max(size, len(data)) > max_bytes:
            raise TooLarge(errno.EFBIG, f"{max(size, max_bytes + 1):,} bytes, {max_bytes:,} allowed", str(path))
        return data


def parse_json(text: str | bytes) -> Any:
    """Return what JSON holds. Raises ValueError, also for values nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def read_text(path: str | Path, max_bytes: int | None = None) -> str:
    """Return the text of a regular file in UTF-8. Raises NotAFile, OSError, TooLarge, UnicodeDecodeError."""
    return read_regular(path, max_bytes).decode("utf-8")
