"""Keeping the feature store in order: how large its spaces are, whether their bytes are what was written, pruning."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from data.files import open_regular
from data.store.features import FeatureStore
from data.store.segments import DTYPES, HEADER, SUFFIX, prune, spaces


class Space(NamedTuple):
    """One space of the store: its folder's name, bytes on disk, rows, and the segments that are damaged."""

    name: str
    nbytes: int
    rows: int
    damaged: list[str]


def verify_spaces(cache: Path) -> list[Space]:
    """Read every byte of every space in a --cache-dir; damaged segments are renamed `*.damaged`, to be encoded again.

    Raises UserError when a folder cannot be read.
    """
    return [_look_over(cache / "features" / name, size) for name, size in spaces(cache / "features").items()]


def _look_over(folder: Path, nbytes: int) -> Space:
    damaged = sorted(path.name.removesuffix(".damaged") for path in folder.glob(f"*{SUFFIX}.damaged"))
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:  # the space's shape is in the header of any whole segment
            with open_regular(path) as file:
                values = json.loads(file.read(HEADER)[8:])["values"]
            width, dtype = int(values["shape"][1]), next(t for t, name in DTYPES.items() if name == values["dtype"])
            break
        except (ValueError, KeyError, TypeError, IndexError, StopIteration):
            continue
    else:
        return Space(folder.name, nbytes, 0, damaged + sorted(path.name for path in folder.glob(f"*{SUFFIX}")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is damaged is in the answer
        store = FeatureStore(folder, width, dtype)
        found = store.verify()
    return Space(folder.name, nbytes, len(store), sorted({*damaged, *found}))


def delete_spaces(cache: Path, keep: Collection[str]) -> int:
    """Delete the spaces of a --cache-dir that are not named in `keep`, and damaged segments; the bytes freed."""
    return prune(cache / "features", keep)


def describe_spaces(found: Collection[Space]) -> str:
    """One line a space, then one for each damaged segment."""
    lines = [f"{space.name}  {space.nbytes / 1e6:12,.1f} MB  {space.rows:12,} rows  "
             f"{'FAILED' if space.damaged else 'ok'}" for space in found]
    lines += [f"{space.name}/{name} is damaged" for space in found for name in space.damaged]
    return "\n".join([*lines, f"{len(found)} spaces, {sum(space.nbytes for space in found) / 1e6:,.1f} MB"])
