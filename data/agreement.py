"""Comparisons between ranks of what they are about to work on: a rank with other data or settings ends the run.

Dimension key: M image references, K bytes of a key.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.batch import AgreedError, BadSample, Team
from data.images.reader import Reader
from data.reading import open_regular
from data.sources.rows import Rows, digest_column
from data.store.segments import key_of
from data.store.stat_cache import StatCache
from data.web.storage import Entry, is_stored

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLED = 64  # images that every rank reads where the files of two ranks may be copies
END = 1 << 20  # bytes of a shard that are compared, from each end
SHOWN = 60  # characters of a value in an error


def require_agreement(team: Team, things: Mapping[str, object]) -> None:
    """Raise AgreedError on all ranks where a thing is not the same on all of them, naming the rank and the things.

    `things` are values by name; those of flags (`--lr`) are shown, others are digests.
    """
    if team.size == 1:
        return
    parts = team.exchange((platform.node(), dict(things)))
    host_0, first = parts[0]
    for rank, (host, other) in enumerate(parts):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            shown = [_shown(name, other.get(name), first.get(name)) for name in names[:3]]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise AgreedError(f"rank {rank} on {host} differs from rank 0 on {host_0} in {', '.join(shown)}{more}; "
                              "start all ranks with the same settings, data and model")


def _shown(name: str, value: object, value_0: object) -> str:
    return f"{name} ({str(value)[:SHOWN]}, not {str(value_0)[:SHOWN]})" if name.startswith("--") else name


def require_same_rows(team: Team, splits: Mapping[str, Rows]) -> None:
    """Raise AgreedError on all ranks unless all have read the same rows in the same order."""
    if team.size > 1:
        require_agreement(team, rows_to_compare(splits))


def rows_to_compare(splits: Mapping[str, Rows]) -> dict[str, object]:
    """Return digests of the rows of each split, in order; image names count without their folders."""
    things: dict[str, object] = {"the splits": {name: len(rows) for name, rows in splits.items()}}
    for name, rows in splits.items():
        things[f"the titles of {name} or their order"] = _digest(rows.title)
        things[f"the image names of {name} or their order"] = _digest(_without_folders(rows.image))
        for kind, column in (("negatives", rows.title_neg), ("classes", rows.label)):
            if column is not None:
                things[f"the {kind} of {name}"] = _digest(column)
    return things


def _digest(column: pa.ChunkedArray) -> str:
    return hashlib.sha256(digest_column(column)).hexdigest()


def _without_folders(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    return pc.replace_substring_regex(paths, "^.*/", "")


def require_same_images(stats: StatCache, reader: Reader, team: Team) -> None:
    """Raise AgreedError on all ranks where two ranks see different files under the names of the M references.

    Each image is read by one rank, so nothing later would notice. Files with the same sizes and times on all ranks are
    the same files; of others, as of copies on each node, the sizes and the contents of SAMPLED ones are compared.
    """
    if team.size == 1:
        return
    stamp_M3 = stats.stamps[:, :3] * stats.is_local[:, None]
    size_M = np.ascontiguousarray(stamp_M3[:, 0])
    parts = team.exchange((key_of(stamp_M3.tobytes()), key_of(size_M.tobytes())))
    if len({stamps for stamps, _ in parts}) == 1:
        return
    if len({sizes for _, sizes in parts}) > 1:
        # Other sizes are proof enough: `require_agreement` names the files, and none has to be read.
        values = dict(enumerate(size_M.tolist()))
    else:
        local = np.flatnonzero(stats.is_local)
        # Spread over the dataset: folders that were copied at different times are all looked at.
        places = np.unique(np.linspace(0, max(0, len(local) - 1), SAMPLED).astype(np.int64))
        sample = local[places[: len(local)]]
        values = {place: _key(stats.paths[place].as_py(), reader) for place in sample.tolist()}
    names = {}
    for place in values:
        name = stats.paths[place].as_py().rpartition("/")[2]  # of any folder
        names[place] = f"image {place} ({name})"  # numbered, as two folders may hold files of one name
    require_agreement(team, {names[place]: value for place, value in values.items()})


def require_same_shards(shards: Sequence[Entry], team: Team) -> None:
    """Raise AgreedError on all ranks where two ranks see different local shards under the same names.

    As with images: where sizes or times differ, as of copies on each node, both ends of SAMPLED shards are compared.
    """
    # A store shows all ranks the same shards.
    if team.size == 1 or any(is_stored(shard.address) for shard in shards):
        return
    stamps = []
    for shard in shards:
        status = os.stat(shard.address)
        stamps.append((shard.name, status.st_size, status.st_mtime_ns))
    if len({*team.exchange(key_of(repr(stamps).encode()))}) == 1:
        return
    places = np.unique(np.linspace(0, len(shards) - 1, SAMPLED).astype(np.int64)).tolist()
    digests: dict[str, object] = {}
    for place in places:
        digests[f"shard {shards[place].name}"] = _ends_of(shards[place].address)
    require_agreement(team, digests)


def _ends_of(path: str) -> bytes:
    """Return a digest of the size of a file and of its first and last END bytes."""
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = file.read(END)
        file.seek(max(0, size - END))
        return key_of(b"%d " % size + first + file.read(END))


def _key(reference: str, reader: Reader) -> bytes:
    try:
        return key_of(reader.read(reference))
    except BadSample as problem:
        return problem.reason.encode()
