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
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.batch import Team
from data.catalogue import DecodeResults, keys_and_usable
from data.files import replaced_file
from data.images.reader import STORE_START, URL_START, matching
from data.reading import open_regular
from data.shards.index import REFERENCE
from data.shards.manifests import manifest_keys
from data.store.segments import KEY
from data.titles import text_chunks
from data.web.fetched import cached_path

if TYPE_CHECKING:
    import pyarrow as pa

SETTLED = 2.0  # seconds; the coarsest clock of a file system in use
PIECE = 65_536  # references that are copied at a time
NO_FILE = (-1,) * 5  # stamps where there is no file
RANGE, RANGE_END = f"^{REFERENCE.pattern}$", "#[0-9]+\\+[0-9]+$"  # of a reference FILE#OFFSET+SIZE


class StatCache:
    """Content keys of M references whose files have not changed since they were last read.

    `paths` are files, URLs (with fetched bytes in the folder `fetched`), ranges of files, or "". Members of streamed
    shards are known by the manifests of these; other images in a store count, as URLs do, as unchanged. `stamps` [M, 5]
    are size, modification and change time, inode and device, -1 where there is no file; `keys` [M, 16] are valid where
    `known` [M] is true; `is_local` [M] are files of this machine, or ranges of them. A cache that cannot be read, or
    was written with other stamps, counts as empty; failed writes are ignored.
    """

    def __init__(self, folder: Path, paths: pa.LargeStringArray, fetched: Path) -> None:
        import pyarrow as pa

        self._file, self._began = folder / f"{_digest(paths)}.npz", time.time()
        is_url, is_stored = matching(paths, URL_START), matching(paths, STORE_START)
        is_range = matching(paths, RANGE)
        self.paths, self.is_local = paths, ~(matching(paths, "^$") | is_url | is_stored)
        self.stamps = np.full((len(paths), 5), -1, np.int64)
        self.stamps[is_stored & ~is_range] = 0
        self._stat(self.is_local & ~is_range, lambda path: path)
        self._stat(is_url & ~is_range, lambda path: cached_path(path, fetched))
        self._stat_ranges(is_range & ~is_stored)
        self.keys = np.zeros((len(paths), KEY), np.uint8)
        self.known = np.zeros(len(paths), bool)
        unreadable = (OSError, ValueError, KeyError, zipfile.BadZipFile)
        with suppress(*unreadable), open_regular(self._file) as npz, np.load(npz) as file:
            stamp_M5, keys = file["stamps"], file["keys"]
            if stamp_M5.shape == self.stamps.shape and keys.shape == self.keys.shape and keys.dtype == np.uint8:
                self.known = (stamp_M5 == self.stamps).all(1) & (self.stamps[:, 0] >= 0)
                self.keys = keys
        is_member = is_stored & is_range
        if is_member.any():
            recorded, is_recorded = manifest_keys(fetched.parent, paths.filter(pa.array(is_member)).to_pylist())
            members = np.flatnonzero(is_member)[is_recorded]
            self.keys[members], self.known[members] = recorded[is_recorded], True

    def _stat(self, wanted: np.ndarray, file_of: Callable[[str], str | Path]) -> None:
        """Set the stamps of the paths `wanted` [M], whose files are `file_of` them."""
        import pyarrow as pa

        if wanted.any():
            files = chain.from_iterable(text_chunks(self.paths.filter(pa.array(wanted))))
            self.stamps[wanted] = _stamps(map(file_of, files))

    def _stat_ranges(self, wanted: np.ndarray) -> None:
        """Set the stamps of the ranges of files `wanted` [M]; each file is looked at once."""
        import pyarrow as pa
        import pyarrow.compute as pc

        stamps: dict[str, np.ndarray] = {}  # by file
        places = np.flatnonzero(wanted)
        for start in range(0, len(places), PIECE):
            part = places[start : start + PIECE]
            files = pc.replace_substring_regex(self.paths.take(pa.array(part)), RANGE_END, "").dictionary_encode()
            names = files.dictionary.to_pylist()
            for name in names:
                if name not in stamps:
                    stamps[name] = _stamps([name])[0]
            self.stamps[part] = np.array([stamps[name] for name in names])[files.indices.to_numpy()]

    def exchange(self, results: DecodeResults, unchanged: np.ndarray, team: Team) -> list[DecodeResults]:
        """Return the results of all ranks, those of this rank's `unchanged` references added; remember new ones."""
        has_new = len(results) > 0
        results.add_known(unchanged, self.keys[unchanged])
        parts = team.exchange((results, has_new))
        all_results = [part for part, _ in parts]
        if team.leads_cache and any(has_new for _, has_new in parts):
            self.remember(*keys_and_usable(all_results, len(self.known)))
        return all_results

    def remember(self, keys: np.ndarray, good: np.ndarray) -> None:
        """Save the keys [M, 16] of the `good` [M] references."""
        # A file written just now may be written again within the same tick of the file system's clock.
        settled = self.stamps[:, 1:3].max(1) < (self._began - SETTLED) * 1e9
        stamp_M5 = np.where((good & settled)[:, None], self.stamps, -1)
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self._file, durable=False) as temporary:
                np.savez(temporary, stamps=stamp_M5, keys=keys)


def _digest(paths: pa.LargeStringArray) -> str:
    """Return a digest of all paths in order."""
    digest = hashlib.blake2b(digest_size=16)
    for number, chunk in enumerate(text_chunks(paths)):
        digest.update(("\0" * (number > 0) + "\0".join(chunk)).encode())
    return digest.hexdigest()


def _stamps(files: Iterable[str | Path]) -> np.ndarray:
    """Return size, modification and change time, inode and device of each file, int64 [n, 5]; -1: no file."""
    stamps = array("q")
    for file in files:
        try:
            status = os.stat(file)
        except (OSError, ValueError):  # ValueError: a NUL in the path
            stamps.extend(NO_FILE)
        else:
            stamps.extend((status.st_size, status.st_mtime_ns, status.st_ctime_ns, _signed(status.st_ino),
                           status.st_dev))
    return np.frombuffer(stamps, np.int64).reshape(-1, 5)


def _signed(inode: int) -> int:
    """Return an inode number, which has 64 bits without a sign, as the int64 with the same bits."""
    return inode - (1 << 64) if inode >> 63 else inode
