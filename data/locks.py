"""Locks between processes on files and folders; the kernel frees them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_locks: dict[tuple[int, int], int] = {}  # device and inode -> descriptor, held until the process ends, however it ends


def try_lock(file: int | IO[bytes]) -> bool:
    """Lock an open file or folder without waiting; False where another process holds it or has just deleted it.

    The kernel frees the lock when the file is closed, also by a kill. Without locks on the
    file system the answer is always True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return os.fstat(file if isinstance(file, int) else file.fileno()).st_nlink > 0


@contextmanager
def locked(path: Path, pause: float = 0.2) -> Iterator[None]:
    """Hold the lock file `path`, which stays, for a block; wait while another process holds it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        while not try_lock(file):
            time.sleep(pause)
        yield


def lock_folder(folder: Path) -> bool:
    """Lock `folder` for this process as long as it lives; False if another one holds the lock."""
    handle = os.open(folder, os.O_RDONLY)
    place = os.fstat(handle).st_dev, os.fstat(handle).st_ino
    if place in _locks or not try_lock(handle):
        os.close(handle)
        return place in _locks
    _locks[place] = handle
    return True
