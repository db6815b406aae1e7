"""Which ranks share a --cache-dir, and features for those that do not: every node may have a cache of its own.

Dimension key: n content keys, G cache folders.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch

from data.batch import Team
from data.files import replaced_file
from data.reading import read_regular
from data.store.features import SEGMENT, FeatureStore

NETWORK_FOLDER_S = 5.0  # how long to look for another node's file: an NFS client may know an older listing
ROUND = 1 << 26  # bytes of features that all ranks together send at one time
POLL_S = 0.1


def find_caches(cache: Path, team: Team, log: Callable[[str], None]) -> Team:
    """Return the team with `cache_of` set; log where the ranks have several cache folders. `cache` must exist.

    Ranks of one machine compare device and inode of their folders. Then one rank of each folder writes a file into it,
    and all of these look for the others' files, as one network folder looks different from each machine. The names are
    new, so that no NFS client remembers that they are absent.
    """
    if team.size == 1:
        return team
    status = os.stat(cache)
    places = team.exchange((_machine(), status.st_dev, status.st_ino))
    leaders = [places.index(place) for place in places]  # lowest rank with the same folder of the same machine
    if len({*leaders}) == 1:
        return replace(team, cache_of=tuple(leaders))
    # Numbers of devices and inodes mean nothing on another machine. A file that both machines see does.
    token = cache / f".probe-{uuid4().hex}"
    if leaders[team.rank] == team.rank:
        with suppress(OSError):  # read-only: found by the files of others
            token.write_text("ranks look for this file\n", encoding="utf-8")
    try:
        names = team.exchange(token.name)
        seen: list[int] = []
        if leaders[team.rank] == team.rank:
            far = {rank for rank in {*leaders} if places[rank][0] != places[team.rank][0]}
            seen = _look_for(cache, {rank: names[rank] for rank in {*leaders}}, far)
        parts = team.exchange((min([*seen, leaders[team.rank]]), platform.node()))
    finally:
        token.unlink(missing_ok=True)
    cache_of = []
    for rank in range(team.size):
        while rank != (lower := min(parts[rank][0], leaders[rank])):
            rank = lower
        cache_of.append(rank)
    groups = sorted({*cache_of})
    if len(groups) > 1:
        hosts = ", ".join(f"rank {rank} on {parts[rank][1]}" for rank in groups[:4])
        log(f"{len(groups)} cache folders for {team.size} ranks ({hosts}{', …' if len(groups) > 4 else ''}): each rank "
            "encodes its share into its own, and receives the rest")
    return replace(team, cache_of=tuple(cache_of))


def _machine() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def _look_for(cache: Path, names: dict[int, str], far: set[int]) -> list[int]:
    """Return the ranks whose file is in the folder; those of `far` ranks, on other machines, may come late."""
    deadline = time.monotonic() + NETWORK_FOLDER_S
    seen: list[int] = []
    while len(seen) < len(names):
        seen = [rank for rank, name in names.items() if _exists(cache / name)]
        if far <= {*seen} or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return seen


def _exists(path: Path) -> bool:
    with suppress(OSError):
        # Opened: an NFS client may answer a stat from its cache, but asks the server at an open.
        os.close(os.open(path, os.O_RDONLY))
        return True
    return False


def missing_everywhere(store: FeatureStore, keys: np.ndarray, team: Team) -> np.ndarray:
    """Return the positions of the keys [n, 16] that no cache holds; the same on all ranks."""
    return np.flatnonzero(~_held(store, keys, team).any(0))


def _held(store: FeatureStore, keys: np.ndarray, team: Team) -> np.ndarray:
    """Return which cache holds which key, bool [G, n], as one rank of each sees it: others may see new files later."""
    bits = np.packbits(store.locate(keys) >= 0) if team.leads_cache else None
    return np.array([np.unpackbits(part, count=len(keys)) for part in team.exchange(bits) if part is not None], bool)


def share_features(store: FeatureStore, keys: np.ndarray, team: Team, log: Callable[[str], None]) -> None:
    """Copy features [n] between the caches of all ranks: afterwards each holds what any of them held.

    A rank sends its part of what its cache is the first to hold, ROUND bytes of all ranks at a time.
    """
    if not team.has_caches:
        return
    store.refresh()
    held_Gn, groups = _held(store, keys, team), sorted({*team.cache_of})
    source_n = np.where(held_Gn.any(0) & ~held_Gn.all(0), held_Gn.argmax(0), -1)  # the cache that sends each
    sent_by: list[np.ndarray] = []
    for rank in range(team.size):
        members = [other for other in range(team.size) if team.cache_of[other] == team.cache_of[rank]]
        sent = np.flatnonzero(source_n == groups.index(team.cache_of[rank]))
        sent_by.append(sent[members.index(rank) :: len(members)])
    rows = max(1, ROUND // (team.size * store.width * store.dtype.itemsize))
    own, received = sent_by[team.rank], _Received(store, keys)
    lacking_n = ~held_Gn[groups.index(team.cache_of[team.rank])]
    for start in range(0, max(map(len, sent_by)), rows):
        part = own[start : start + rows]
        for places, values in team.exchange((part, store.gather(store.locate(keys[part])).numpy())):
            if team.leads_cache:
                received.add(places[lacking_n[places]], values[lacking_n[places]])
    received.flush()
    team.exchange(None)  # every rank has written
    store.refresh()
    if copied := int((source_n >= 0).sum()):
        log(f"{copied:,} features copied between {len(groups)} cache folders")


class _Received:
    """Features from other ranks on their way into a store, SEGMENT rows at a time."""

    def __init__(self, store: FeatureStore, keys: np.ndarray) -> None:
        self.store, self.keys = store, keys
        self.places: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, places: np.ndarray, values: np.ndarray) -> None:
        """Take these rows; `places` are positions in `keys`."""
        self.places.append(places)
        self.values.append(values)
        if sum(map(len, self.places)) >= SEGMENT:
            self.flush()

    def flush(self) -> None:
        """Write the features received so far."""
        if self.places:
            self.store.append(self.keys[np.concatenate(self.places)], torch.from_numpy(np.concatenate(self.values)))
            self.places, self.values = [], []


def share_files(paths: Sequence[Path], team: Team) -> None:
    """Copy files between the caches of all ranks, until each has all that one of them has; `paths` are this rank's."""
    if not team.has_caches:
        return
    parts = team.exchange([path.exists() for path in paths] if team.leads_cache else None)
    held = {rank: part for rank, part in enumerate(parts) if part is not None}
    for place, path in enumerate(paths):
        sources = [rank for rank in held if held[rank][place]]
        if not sources or len(sources) == len(held):
            continue
        data = team.exchange(read_regular(path) if team.rank == sources[0] else None)[sources[0]]
        if team.leads_cache and data is not None and not held[team.rank][place]:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path) as temporary:
                temporary.write_bytes(data)
