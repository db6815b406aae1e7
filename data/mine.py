"""Mine hard negatives for rows that have none, by the text features of their own split.

Dimension key: P distinct titles of all splits, U of a split, N its rows, H hard negatives of a row, T text feature
width, R a chunk of rows, A pairs of an image and a title.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.catalogue import Split

CHUNK = 1024  # rows of similarities at a time


def mine_negatives(split: Split, title_PT: Tensor, rule: str, known_splits: Sequence[Split] = ()) -> Split:
    """Return the split with a negative for every row that has none but its own title; other rows stay as they are.

    A negative is another row's title that no row of the split, or of `known_splits`, pairs with the row's image. `rule`
    "hard" takes the most similar title by cosine of the text features; "far" is the original's rule: rows in order,
    each takes the least similar title that no earlier row took. A row without any such title gets none.
    """
    used_U, row_title_N = split.title_N.unique(return_inverse=True)
    given_NH = torch.full_like(split.title_N, -1)[:, None] if split.negative_N is None else split.negative_N
    missing_N = ((given_NH < 0) | (given_NH == split.title_N[:, None])).all(1)
    if len(used_U) < 2 or not bool(missing_N.any()):
        return split
    unit_UT = F.normalize(title_PT[used_U].float(), dim=-1)
    titles = _TitlesOfImages([split, *known_splits], used_U)
    taken_U = torch.zeros(len(used_U), dtype=torch.bool)
    chosen_NH = given_NH.masked_fill(missing_N[:, None], -1)
    for start in range(0, len(chosen_NH), CHUNK):
        chunk = slice(start, start + CHUNK)
        similarity_RU = unit_UT[row_title_N[chunk]] @ unit_UT.T
        own_RU = titles.mask(split.image_N[chunk])
        if rule == "hard":
            best_R, picks_R = similarity_RU.masked_fill_(own_RU, -torch.inf).max(1)
            picks_R = picks_R.masked_fill(best_R.isinf(), -1)
        else:
            picks_R = _far(similarity_RU.masked_fill_(own_RU, torch.inf), taken_U)
        picked_R = torch.where(picks_R < 0, -1, used_U[picks_R])
        chosen_NH[chunk, 0] = torch.where(missing_N[chunk], picked_R, chosen_NH[chunk, 0])
    return replace(split, negative_N=chosen_NH if bool((chosen_NH >= 0).any()) else None)


class _TitlesOfImages:
    """The titles, of `used_U` (ascending), that rows of `splits` pair with each image."""

    def __init__(self, splits: Sequence[Split], used_U: Tensor) -> None:
        image_A = torch.cat([split.image_N for split in splits])
        title_A = torch.cat([split.title_N for split in splits])
        is_used_A = torch.isin(title_A, used_U)
        pairs_A2 = torch.stack([image_A[is_used_A], title_A[is_used_A]], 1).unique(dim=0)  # by image
        self._image_A = pairs_A2[:, 0].contiguous()
        self._title_A = torch.searchsorted(used_U, pairs_A2[:, 1].contiguous())
        self._titles = len(used_U)

    def mask(self, image_R: Tensor) -> Tensor:
        """Return which titles are paired with each image, bool [R, U]."""
        mask_RU = torch.zeros(len(image_R), self._titles, dtype=torch.bool)
        first_R = torch.searchsorted(self._image_A, image_R)
        count_R = torch.searchsorted(self._image_A, image_R, right=True) - first_R
        row = torch.arange(len(image_R)).repeat_interleave(count_R)
        offset = torch.arange(len(row)) - (count_R.cumsum(0) - count_R).repeat_interleave(count_R)
        mask_RU[row, self._title_A[first_R.repeat_interleave(count_R) + offset]] = True
        return mask_RU


def _far(similarity_RU: Tensor, taken_U: Tensor) -> Tensor:
    """Return the least similar titles that are not in `taken_U`, and add them to it; once all are taken, clear it.

    A similarity of infinity is never picked; -1 where there is no other.
    """
    picks = []
    for similarity_U in similarity_RU:
        if bool(similarity_U.isinf().all()):
            picks.append(-1)
            continue
        if bool(similarity_U.masked_fill(taken_U, torch.inf).isinf().all()):
            taken_U.zero_()
        pick = int(similarity_U.masked_fill(taken_U, torch.inf).argmin())
        taken_U[pick] = True
        picks.append(pick)
    return torch.tensor(picks)
