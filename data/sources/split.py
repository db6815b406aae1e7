"""One split made three, rows that share a title or an image kept together.

Dimension key: N rows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.sources.rows import Rows, image_names

if TYPE_CHECKING:
    import pyarrow as pa

ORDER = ("train", "valid", "test")
HELD_OUT = 0.15  # share of valid, and of test, when a dataset has one split only


def three(rows: Rows, seed: int) -> dict[str, Rows]:
    """Split 70/15/15 by `seed`; rows that share a title or an image stay together. A share left empty is absent.

    Groups go first, largest first, each to the split that is emptiest for its size and has room (else to train); then
    the other rows, shuffled, fill what is missing. A group larger than 15 % therefore trains.
    """
    N = len(rows)
    group_N = components(_codes(rows.title), _codes(image_names(rows.image)))
    size_N = np.bincount(group_N, minlength=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).numpy()
    held = max(1, round(HELD_OUT * N)) if N >= 3 else 0
    goal = [N - 2 * held, held, held]
    room = goal.copy()
    split_N = np.zeros(N, np.int8)  # of each group, at the place of its first row
    groups = order[size_N[order] > 1]
    for group in groups[np.argsort(-size_N[groups], kind="stable")]:
        size = int(size_N[group])
        best = max((k for k in range(3) if room[k] >= size), key=lambda k: room[k] / goal[k], default=0)
        split_N[group] = best
        room[best] -= size
    single = order[size_N[order] == 1]
    ends = np.cumsum(np.maximum(room, 0))
    ends = np.round(ends * len(single) / max(1, ends[-1])).astype(np.int64)
    for k, (first, last) in enumerate(pairwise([0, *ends])):
        split_N[single[first:last]] = k
    parts = {name: np.flatnonzero(split_N[group_N] == k) for k, name in enumerate(ORDER)}
    return {name: replace(rows.take(part), name=name) for name, part in parts.items() if len(part)}


def components(*codes: np.ndarray) -> np.ndarray:
    """The connected components of rows that share a code: for each row the least row number of its component.

    Rows adopt the least number among those of equal code, their representatives adopt it with them (so it crosses a
    component in few rounds), and numbers are followed to where they lead; until nothing changes.
    """
    group = np.arange(len(codes[0]))
    while True:
        before = group.copy()
        for code in codes:
            least = np.full(code.max() + 1, len(code))
            np.minimum.at(least, code, group)
            np.minimum.at(group, group.copy(), least[code])
            group = np.minimum(group, least[code])
        group = group[group]
        if np.array_equal(group, before):
            return group


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """int64 [N], equal for equal values; null and "" are equal to nothing."""
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(values).unify_dictionaries()
    code = np.concatenate([pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    alone = (code < 0) | pc.fill_null(pc.equal(values, ""), True).to_numpy()
    code[alone] = code.max() + 1 + np.arange(alone.sum())
    return code
