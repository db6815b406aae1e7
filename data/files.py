"""Files that are there or not there after a crash, never half: fsync, rename, digests, and a lock on a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

_locks: dict[tuple[int, int], int] = {}  # device and inode -> descriptor, held until the process ends, however it ends


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
