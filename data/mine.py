"""Hard negatives for rows that have none, from the text features of their own split.

Dimension key: P distinct titles of all splits, U of a split, N its rows, T text feature width, R a chunk of rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.catalogue import Split

CHUNK = 1024  # rows of similarities at a time


def mine(split: Split, title_PT: Tensor, how: str) -> Split:
    """The split with a negative for every row that lacks one; the title of another row, never an equal title.

    `how` is `hard`, the most similar title by cosine of the text features, or `far`, the original's rule: rows in
    order, each takes the least similar title that no row before it took. A split of one distinct title gets none.
    """
    used_U, row_title_N = split.title_N.unique(return_inverse=True)
    given_N = torch.full_like(split.title_N, -1) if split.negative_N is None else split.negative_N
    if len(used_U) < 2 or bool((given_N >= 0).all()):
        return split
    unit_UT = F.normalize(title_PT[used_U].float(), dim=-1)
    taken_U = torch.zeros(len(used_U), dtype=torch.bool)
    chosen_N = given_N.clone()
    for start in range(0, len(chosen_N), CHUNK):
        own_R = row_title_N[start : start + CHUNK]
        similarity_RU = unit_UT[own_R] @ unit_UT.T
        if how == "hard":
            similarity_RU[torch.arange(len(own_R)), own_R] = -torch.inf
            picks_R = similarity_RU.argmax(1)
        else:
            picks_R = _far(similarity_RU, own_R, taken_U)
        missing_R = given_N[start : start + CHUNK] < 0
        chosen_N[start : start + CHUNK][missing_R] = used_U[picks_R][missing_R]
    return replace(split, negative_N=chosen_N)


def _far(similarity_RU: Tensor, own_R: Tensor, taken_U: Tensor) -> Tensor:
    """Least similar titles not yet in `taken_U`, which is brought up to date; once all are taken it starts afresh."""
    picks = []
    for similarity_U, own in zip(similarity_RU, own_R.tolist(), strict=True):
        similarity_U[own] = torch.inf
        if bool(similarity_U.masked_fill(taken_U, torch.inf).isinf().all()):
            taken_U.zero_()
        pick = int(similarity_U.masked_fill(taken_U, torch.inf).argmin())
        taken_U[pick] = True
        picks.append(pick)
    return torch.tensor(picks)
