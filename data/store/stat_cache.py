"""Content keys of image files from the last time they were read, so that unchanged files are not read again.

As in git's index, a file counts as unchanged when its size, its times of modification and of change, its inode and its
device are those of the last read. One written within SETTLED seconds before that is read again: a later write may leave
the times equal.
Dimension key: M image references.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.batch import Team
from data.catalogue import DecodeResult, DecodeResults, keys_and_usable
from data.files import open_regular, replaced_file
from data.images.reader import is_url
from data.shards.index import is_range, parse_reference
from data.shards.manifests import manifest_keys
from data.store.segments import KEY
from data.web.fetched import cached_path
from data.web.storage import is_stored

SETTLED = 2.0  # seconds; the coarsest clock of a file system in use


class StatCache:
    """Content keys of M references whose files have not changed since they were last read.

    `paths` are files, URLs (with fetched bytes in the folder `fetched`), ranges of files, or "". Members of streamed
    shards are known by the manifests of these; other images in a store count, as URLs do, as unchanged. `stamps` [M, 5]
    are size, modification and change time, inode and device, -1 where there is no file; `keys` [M, 16] are valid where
    `known` [M] is true. A cache that cannot be read, or was written with other stamps, counts as empty; failed writes
    are ignored.
    """

    def __init__(self, folder: Path, paths: Sequence[str], fetched: Path) -> None:
        names = hashlib.blake2b("\0".join(paths).encode("utf-8", "replace"), digest_size=16)
        self._file, self._began = folder / f"{names.hexdigest()}.npz", time.time()
        self.stamps = _stamps(paths, fetched)
        self.keys = np.zeros((len(paths), KEY), np.uint8)
        self.known = np.zeros(len(paths), bool)
        unreadable = (OSError, ValueError, KeyError, zipfile.BadZipFile)
        with suppress(*unreadable), open_regular(self._file) as npz, np.load(npz) as file:
            stamp_M5, keys = file["stamps"], file["keys"]
            if stamp_M5.shape == self.stamps.shape and keys.shape == self.keys.shape and keys.dtype == np.uint8:
                self.known = (stamp_M5 == self.stamps).all(1) & (self.stamps[:, 0] >= 0)
                self.keys = keys
        recorded, is_recorded = manifest_keys(fetched.parent, paths)
        self.keys[is_recorded], self.known[is_recorded] = recorded[is_recorded], True

    def exchange(self, results: DecodeResults, unchanged: np.ndarray, team: Team) -> list[DecodeResults]:
        """Return the results of all ranks, those of this rank's `unchanged` references added; remember new ones."""
        has_new = len(results) > 0
        for reference in unchanged.tolist():
            results.add(DecodeResult(reference, self.keys[reference].tobytes(), None))
        parts = team.exchange((results, has_new))
        all_results = [part for part, _ in parts]
        if team.leads_cache and any(has_new for _, has_new in parts):
            self.remember(*keys_and_usable(all_results, len(self.known)))
        return all_results

    def remember(self, keys: np.ndarray, good: np.ndarray) -> None:
        """Save the keys [M, 16] of the `good` [M] references."""
        settled = self.stamps[:, 1:3].max(1) < (self._began - SETTLED) * 1e9
        stamp_M5 = np.where((good & settled)[:, None], self.stamps, -1)
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self._file, durable=False) as temporary:
                np.savez(temporary, stamps=stamp_M5, keys=keys)


def _stamps(paths: Sequence[str], fetched: Path) -> np.ndarray:
    """Return size, modification and change time, inode and device of each path's file, int64 [M, 5]; -1: no file."""
    stamp_M5 = np.full((len(paths), 5), -1, np.int64)
    files: dict[str, os.stat_result] = {}  # those of which ranges are read
    for row, path in enumerate(paths):
        if not path:
            continue
        with suppress(OSError, ValueError):  # ValueError: a NUL in the path
            if is_stored(path):
                stamp_M5[row] = -1 if is_range(path) else 0
                continue
            if is_range(path):
                file = parse_reference(path)[0]
                stat = files.get(file) or files.setdefault(file, os.stat(file))
            else:
                stat = os.stat(cached_path(path, fetched) if is_url(path) else path)
            stamp_M5[row] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, _signed(stat.st_ino), stat.st_dev
    return stamp_M5


def _signed(inode: int) -> int:
    """Return the 64 bits of an inode number as int64 holds them."""
    return inode - (1 << 64) if inode >> 63 else inode
