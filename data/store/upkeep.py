"""Maintenance of the feature store: sizes of its spaces, verification, pruning."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.reading import open_regular, parse_json
from data.store.features import FeatureStore
from data.store.segments import DTYPES, HEADER, SUFFIX, Layout, Pruned, prune, spaces


class Space(NamedTuple):
    """One space of the store: its folder's name, bytes on disk, rows, and names of damaged segments."""

    name: str
    nbytes: int
    rows: int
    damaged: list[str]


def verify_spaces(cache: Path) -> list[Space]:
    """Read every byte of every space in a --cache-dir; damaged segments are renamed `*.damaged`, to be encoded again.

    Raises UserError when a folder cannot be read.
    """
    return [_verify_space(cache / "features" / name, size) for name, size in spaces(cache / "features").items()]


def _verify_space(folder: Path, nbytes: int) -> Space:
    damaged = {path.name.removesuffix(".damaged") for path in folder.glob(f"*{SUFFIX}.damaged")}
    layout = _read_layout(folder)
    if layout is None:
        damaged |= {path.name for path in folder.glob(f"*{SUFFIX}")}
        return Space(folder.name, nbytes, 0, sorted(damaged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged segments are returned
        store = FeatureStore(folder, layout.width, layout.dtype)
        damaged.update(store.verify())
    return Space(folder.name, nbytes, len(store), sorted(damaged))


def _read_layout(folder: Path) -> Layout | None:
    """Return the layout of a space by the header of its first whole segment; None when there is none."""
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError), open_regular(path) as file:
            values = parse_json(file.read(HEADER)[8:])["values"]
            return Layout(folder.name, int(values["shape"][1]), dtypes[values["dtype"]])
    return None


def delete_spaces(cache: Path, keep: Collection[str]) -> Pruned:
    """Delete the spaces of a --cache-dir that are not named in `keep` nor used by a process, and damaged segments."""
    return prune(cache / "features", keep)


def describe_spaces(spaces: Collection[Space]) -> str:
    """Return one line for each space, then one for each damaged segment, then the total."""
    lines = []
    for space in spaces:
        verdict = "FAILED" if space.damaged else "ok"
        lines.append(f"{space.name}  {space.nbytes / 1e6:12,.1f} MB  {space.rows:12,} rows  {verdict}")
    for space in spaces:
        lines += [f"{space.name}/{name} is damaged" for name in space.damaged]
    total = sum(space.nbytes for space in spaces)
    lines.append(f"{len(spaces)} spaces, {total / 1e6:,.1f} MB")
    return "\n".join(lines)
