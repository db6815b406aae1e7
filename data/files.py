"""Files that are there or not there after a crash, never half: fsync, rename, digests, and a lock on a folder.

What others wrote is opened only if it is a regular file: a named pipe would be waited for without end.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path

_locks: dict[tuple[int, int], int] = {}  # device and inode -> descriptor, held until the process ends, however it ends

KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
         stat.S_IFDIR: "a folder"}


class NotAFile(OSError):
    """There is something else than a regular file."""

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"{kind}, not a regular file", str(path))


def open_descriptor(path: str | Path) -> int:
    """A descriptor to read a regular file, opened without waiting. Raises NotAFile, OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise NotAFile(path, KINDS[stat.S_IFSOCK]) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise NotAFile(path, KINDS.get(stat.S_IFMT(mode), "something else"))
    return descriptor


def open_regular(path: str | Path, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Open a regular file to read its bytes. Raises NotAFile, OSError."""
    return io.BufferedReader(io.FileIO(path, opener=lambda name, flags: open_descriptor(name)), buffering)


def read_regular(path: str | Path) -> bytes:
    """The bytes of a regular file. Raises NotAFile, OSError."""
    with open_regular(path) as file:
        return file.read()


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader, or a crash, sees the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        synced(temporary).replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_link(link: Path, target: str) -> None:
    """Point a relative symlink at another name of its folder, in one step."""
    temporary = link.with_name(f".{link.name}-link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def synced(path: Path) -> Path:
    """Wait until a file or folder is on the disk; its path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def altered(root: Path, digests: Mapping[str, str]) -> list[str]:
    """Which of the files named relative to `root` are missing, unreadable or not what their digest says."""
    wrong = []
    for name, digest in digests.items():
        try:
            if sha256(root / name) != digest:
                wrong.append(f"{name} changed")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    return wrong


def lock(folder: Path) -> bool:
    """Hold `folder` for this process as long as it lives; False when another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    place = os.fstat(handle).st_dev, os.fstat(handle).st_ino
    if place in _locks:
        os.close(handle)
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    except OSError:  # a file system without locks: nobody is ever refused there
        pass
    _locks[place] = handle
    return True
