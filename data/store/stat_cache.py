"""What image files held when they were last read, so that one that is as it was need not be read again.

As in git's index, a file counts as unchanged when its size and its times of modification and of change are those of the
last look. One written within SETTLED seconds before that look is read again: a later write may leave the times equal.
Dimension key: M image references.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.cold import is_url
from data.files import open_regular
from data.store.segments import KEY
from data.web.fetch import cached_path

SETTLED = 2.0  # seconds; the coarsest clock of a file system in use


class StatCache:
    """Content keys of M references, as far as the files are as they were at the last look.

    `paths` are files, URLs (whose fetched bytes lie in `fetched`), members of shards, or None. `known` [M] says for
    which ones `keys` [M, 16] hold. What cannot be read or written is a look that did not take place.
    """

    def __init__(self, folder: Path, paths: Sequence[str | None], fetched: Path) -> None:
        names = hashlib.blake2b("\0".join(path or "" for path in paths).encode("utf-8", "replace"), digest_size=16)
        self._file, self._began = folder / f"{names.hexdigest()}.npz", time.time()
        self._stamp_M3 = _stamps(paths, fetched)
        self.keys = np.zeros((len(paths), KEY), np.uint8)
        self.known = np.zeros(len(paths), bool)
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), open_regular(self._file) as npz, np.load(npz) as it:
            stamp_M3, keys = it["stamps"], it["keys"]
            if stamp_M3.shape == self._stamp_M3.shape and keys.shape == self.keys.shape and keys.dtype == np.uint8:
                self.known = (stamp_M3 == self._stamp_M3).all(1) & (self._stamp_M3[:, 0] >= 0)
                self.keys = keys

    def remember(self, keys: np.ndarray, good: np.ndarray) -> None:
        """Keep the keys [M, 16] of the `good` [M] references for the next look."""
        settled = self._stamp_M3[:, 1:].max(1) < (self._began - SETTLED) * 1e9
        stamp_M3 = np.where((good & settled)[:, None], self._stamp_M3, -1)
        temporary = self._file.with_name(f".{secrets.token_hex(8)}.npz")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                np.savez(temporary, stamps=stamp_M3, keys=keys)
                temporary.replace(self._file)
            finally:
                temporary.unlink(missing_ok=True)


def _stamps(paths: Sequence[str | None], fetched: Path) -> np.ndarray:
    """Size, modification and change time of the file behind each path, int64 [M, 3]; -1 where there is none."""
    stamp_M3, shards = np.full((len(paths), 3), -1, np.int64), dict[str, os.stat_result]()
    for row, path in enumerate(paths):
        if path is None:
            continue
        with suppress(OSError, ValueError):  # ValueError: a NUL in the path
            shard, is_member, _ = path.rpartition("#")
            if is_member and shard.endswith(".tar"):
                found = shards.get(shard) or shards.setdefault(shard, os.stat(shard))
            else:
                found = os.stat(cached_path(path, fetched) if is_url(path) else path)
            stamp_M3[row] = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return stamp_M3
