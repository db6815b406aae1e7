"""Locks between processes on files and folders; the kernel frees them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

POLL_S = 0.2  # seconds between two tries of a lock that another process holds
_locks: dict[tuple[int, int], int] = {}  # device and inode -> descriptor, held until the process ends, however it ends


def try_lock(file: int | IO[bytes]) -> bool:
    """Lock an open file or folder without waiting; return False where another process holds it or just deleted it.

    The kernel frees the lock when the file is closed, also by a kill. Returns True where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    # A file without a name was deleted between open and lock: the next process would lock a new file of that name.
    descriptor = file if isinstance(file, int) else file.fileno()
    return os.fstat(descriptor).st_nlink > 0


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, for a block; wait while another process holds it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        while not try_lock(file):
            time.sleep(POLL_S)
        yield


def lock_folder(folder: Path) -> bool:
    """Lock `folder` for this process as long as it lives; return False if another one holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    status = os.fstat(descriptor)
    place = status.st_dev, status.st_ino
    # flock knows descriptors, not processes: a second descriptor of this process would be refused.
    if place in _locks or not try_lock(descriptor):
        os.close(descriptor)
        return place in _locks
    _locks[place] = descriptor
    return True
