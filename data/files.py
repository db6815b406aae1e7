"""Files and folders that are whole or absent after a crash, a mark in folders of this program, digests.

A folder of this program holds the file MARK with its kind and, if it is ever replaced or deleted as a whole, the files
written into it. Only what a mark lists is replaced or deleted. Other files are opened only if they are regular: reading
a named pipe would wait without end.
"""

from __future__ import annotations

import ctypes
import errno
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, AnyStr

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MARK = ".thumbtune"
GENERATOR = '<meta name="generator" content="thumbtune">'  # the mark of an HTML page
LEFT_BEHIND = re.compile(r"\.(.+)-(\d+)(\.old)?", re.DOTALL)  # .NAME-PID being written or deleted; .old: to be replaced

MAX_HOLE = 1 << 30  # bytes of a sparse file in a row that may never have been written
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2

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
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotAFile(path, KINDS[stat.S_IFSOCK]) from None
        raise
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


MAX_UNPACKED = 1 << 33  # bytes that a .gz may hold


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


MAX_LINE = 1 << 24  # characters or bytes


def bounded_lines(file: IO[AnyStr], path: str | Path) -> Iterator[AnyStr]:
    """Yield the lines of a file. Raises TooLarge at one of more than MAX_LINE: it would be in memory as a whole."""
    for number in count(1):
        line = file.readline(MAX_LINE)
        if not line:
            return
        if len(line) == MAX_LINE and line.splitlines()[0] == line:
            reason = f"line {number} has more than {MAX_LINE:,} characters; write each row on a line of its own"
            raise TooLarge(errno.EFBIG, reason, str(path))
        yield line


def read_regular(path: str | Path, most: int | None = None) -> bytes:
    """Return the bytes of a regular file. Raises NotAFile, OSError, TooLarge where it has more than `most`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        limit = -1 if most is None else most + 1
        data = b"" if most is not None and size > most else file.read(limit) or b""  # None: some of /proc would block
        if most is not None and max(size, len(data)) > most:
            raise TooLarge(errno.EFBIG, f"{max(size, most + 1):,} bytes, {most:,} allowed", str(path))
        return data


def parse_json(text: str | bytes) -> Any:
    """Return what JSON holds. Raises ValueError, also for values nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def read_text(path: str | Path, most: int | None = None) -> str:
    """Return the text of a regular file in UTF-8. Raises NotAFile, OSError, TooLarge, UnicodeDecodeError."""
    return read_regular(path, most).decode("utf-8")


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader, or a crash, sees the old or the new one. Raises OSError.

    A lone surrogate, as in a file name that is not UTF-8, is written as a JSON string writes it.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replaced_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give the path of a temporary file for the block to write, which then replaces `path` in one step. Raises OSError.

    `durable` waits until it is on the disk. The folder must exist.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def keep_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Remove the lines of a text file that are not kept, in one step; make the file where there is none.

    A file that loses nothing is not written: a crash cannot harm it, and its digest stays. Raises OSError.
    """
    before = read_regular(path).decode("utf-8", "replace") if path.exists() else None
    text = "".join(f"{line}\n" for line in (before or "").splitlines() if is_kept(line))
    if text != before:
        replace_text(path, text)


def write_mark(folder: Path, kind: str, files: Iterable[str] = ()) -> None:
    """Mark `folder` as this program's, with its kind and the files in it. Raises OSError."""
    mark = {"made_by": "thumbtune", "kind": kind, "files": sorted(files)}
    replace_text(folder / MARK, json.dumps(mark, indent=1) + "\n")


def _read_mark(folder: Path) -> tuple[str, list[str]]:
    """Return kind and files of a marked folder; "" and none for a folder without a mark."""
    try:
        mark = parse_json(read_text(folder / MARK))
        if mark["made_by"] != "thumbtune":
            return "", []
        return str(mark["kind"]), list(map(str, mark["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def kind_of(folder: Path) -> str:
    """The kind that `write_mark` gave to a folder; "" for a folder without a mark, which is not this program's."""
    return _read_mark(folder)[0]


def is_whole(folder: Path, kind: str) -> bool:
    """True for a marked folder of that kind in which no file is missing."""
    marked, files = _read_mark(folder)
    return marked == kind and bool(files) and all((folder / name).exists() for name in files)


def is_output(folder: Path) -> bool:
    """True for a folder that this program wrote, unless it is a dataset to be read (shards)."""
    return kind_of(folder) not in ("", "shards")


def first_foreign(folder: Path) -> Path | None:
    """The first path at `folder` or in it that this program did not make; None: it may be made or replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder
    kind, files = _read_mark(folder)
    made = {folder / name for name in (MARK, *files)}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        if not kind:
            return folder
        if path not in made and (path.is_symlink() or not path.is_dir()):
            return path
    return None


def is_foreign_page(path: Path) -> bool:
    """True if `path` exists and is neither a page of this program nor an empty file."""
    if not path.is_file():
        return os.path.lexists(path)
    with path.open("rb") as file:
        head = file.read(4096)
    return bool(head) and GENERATOR.encode() not in head


@contextmanager
def replaced_folder(folder: Path, kind: str, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error it takes the place of `folder`.

    It is written beside `folder`, marked as `kind` and, if `durable`, synced to the disk; the two are exchanged, and
    then the old one is deleted. Where no system call exchanges them, the old one is renamed aside first: a process that
    dies between leaves nothing under the name, but both folders whole beside it, and `recover_folders` puts the old one
    back. Raises FileExistsError naming what is in the way and has no mark, OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folders(folder.parent)
    _refuse(first_foreign(folder))
    new = _beside(folder)
    old = new.with_name(new.name + ".old")
    new.mkdir(exist_ok=True)
    _refuse(first_foreign(new))
    try:
        write_mark(new, kind)
        yield new
        write_mark(new, kind, (str(path.relative_to(new)) for path in new.rglob("*") if path.name != MARK))
        for path in (*new.rglob("*"), new) if durable else ():
            fsync(path)
        _refuse(first_foreign(folder))
        if folder.exists() and _exchange(new, folder):
            old = new
        else:
            if folder.exists():
                folder.replace(old)
            new.replace(folder)
        fsync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            old.replace(folder)
        _delete(new)
        raise
    _delete(old)


def _exchange(new: Path, folder: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(AT_FDCWD, bytes(new), AT_FDCWD, bytes(folder), RENAME_EXCHANGE) == 0


def _refuse(obstacle: Path | None) -> None:
    if obstacle is not None:
        raise FileExistsError(errno.EEXIST, "not made by thumbtune, so it is not replaced", str(obstacle))


def delete_folder(folder: Path) -> None:
    """Delete a folder of this program, first renaming it; one that holds anything foreign stays as it is."""
    if first_foreign(folder) is None:
        doomed = _beside(folder)
        folder.replace(doomed)
        _delete(doomed)


def recover_folders(parent: Path, locked: bool = False) -> None:
    """Put back folders that a killed `replaced_folder` has left aside in `parent`, and delete unfinished ones.

    Folders of processes that live are left alone, unless the caller holds a lock that keeps other writers out.
    """
    for path in sorted(parent.glob(".*")):
        left = LEFT_BEHIND.fullmatch(path.name)
        if left is None or path.is_symlink() or not path.is_dir() or not (locked or _is_dead(int(left[2]))):
            continue
        # killed before `write_mark`
        barely_begun = locked and all(name.startswith(f".{MARK}") for name in os.listdir(path))
        if not (kind_of(path) or barely_begun):
            continue
        folder = parent / left[1]
        if left[3] and not folder.exists():
            path.replace(folder)
        else:
            _delete(path)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{os.getpid()}")


def _is_dead(pid: int) -> bool:
    """True if no process of this number lives here; true for this one, which is not writing now."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return pid == os.getpid()


def _delete(folder: Path) -> None:
    """Delete a folder, its mark last, so that the rest after a kill or an error is still marked."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def fsync(path: Path) -> Path:
    """Wait until a file or folder is on the disk; return its path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(root: Path, digests: Mapping[str, str]) -> list[str]:
    """Problems of the files named relative to `root`: missing, unreadable, or with another digest."""
    wrong = []
    for name, digest in digests.items():
        try:
            if sha256(root / name) != digest:
                wrong.append(f"{name} changed")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    return wrong
