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

from data.batch import ALONE, Team
from data.catalogue import Split

MAX_SIMILARITIES = {"cpu": 1 << 24, "cuda": 1 << 28}  # at a time: 64 MiB and 1 GiB in fp32, however many titles


def mine_negatives(split: Split, title_PT: Tensor, rule: str, known_splits: Sequence[Split] = (),
                   team: Team = ALONE) -> Split:
    """Return the split with a negative for every row that has none but its own title; other rows stay as they are.

    A negative is another row's title that no row of the split, or of `known_splits`, pairs with the row's image. `rule`
    "hard" takes the most similar title by cosine of the text features; "far" is the original's rule: rows in order,
    each takes the least similar title that no earlier row took. A row without any such title gets none.

    Similarities are computed where title_PT lies. The ranks of `team` share the chunks of rows of "hard"; each chunk
    has the same rows on any number of ranks, so its products have the same bits. In "far" each row depends on those
    before it: every rank mines all, and rank 0's result counts.
    """
    used_U, row_title_N = split.title_N.unique(return_inverse=True)
    given_NH = split.negative_N
    if given_NH is None:
        given_NH = torch.full_like(split.title_N, -1)[:, None]
    missing_N = ((given_NH < 0) | (given_NH == split.title_N[:, None])).all(1)
    if len(used_U) < 2 or not bool(missing_N.any()):
        return split
    device = title_PT.device
    unit_UT = F.normalize(title_PT[used_U.to(device)].float(), dim=-1)
    titles = _TitlesOfImages([split, *known_splits], used_U, device)
    taken_U = torch.zeros(len(used_U), dtype=torch.bool, device=device)
    rows_at_once = max(1, MAX_SIMILARITIES.get(device.type, 1 << 24) // len(used_U))
    hard = rule == "hard"
    picks: dict[int, Tensor] = {}  # by chunk
    for number, start in enumerate(range(0, len(given_NH), rows_at_once)):
        if hard and number % team.size != team.rank:  # another rank's chunk
            continue
        chunk = slice(start, start + rows_at_once)
        similarity_RU = unit_UT[row_title_N[chunk].to(device)] @ unit_UT.T
        own_RU = titles.mask(split.image_N[chunk].to(device))
        if hard:
            best_R, picks_R = similarity_RU.masked_fill_(own_RU, -torch.inf).max(1)
            picks_R = picks_R.masked_fill(best_R.isinf(), -1)
        else:
            picks_R = _far(similarity_RU.masked_fill_(own_RU, torch.inf), taken_U)
        picks[number] = picks_R.cpu()
    picks_by_rank = team.exchange(picks)
    for picks_of_rank in picks_by_rank if hard else picks_by_rank[:1]:
        picks |= picks_of_rank
    picks_N = torch.cat([picks[number] for number in sorted(picks)])
    picked_N = torch.where(picks_N < 0, -1, used_U[picks_N])
    chosen_NH = given_NH.masked_fill(missing_N[:, None], -1)
    chosen_NH[:, 0] = torch.where(missing_N, picked_N, chosen_NH[:, 0])
    return replace(split, negative_N=chosen_NH if bool((chosen_NH >= 0).any()) else None)


class _TitlesOfImages:
    """The titles, of `used_U` (ascending), that rows of `splits` pair with each image."""

    def __init__(self, splits: Sequence[Split], used_U: Tensor, device: torch.device) -> None:
        image_A = torch.cat([split.image_N for split in splits])
        title_A = torch.cat([split.title_N for split in splits])
        is_used_A = torch.isin(title_A, used_U)
        pairs_A2 = torch.stack([image_A[is_used_A], title_A[is_used_A]], 1).unique(dim=0)  # by image
        self._image_A = pairs_A2[:, 0].contiguous().to(device)
        self._title_A = torch.searchsorted(used_U, pairs_A2[:, 1].contiguous()).to(device)
        self._titles = len(used_U)

    def mask(self, image_R: Tensor) -> Tensor:
        """Return which titles are paired with each image, bool [R, U]."""
        mask_RU = torch.zeros(len(image_R), self._titles, dtype=torch.bool, device=image_R.device)
        first_R = torch.searchsorted(self._image_A, image_R)
        count_R = torch.searchsorted(self._image_A, image_R, right=True) - first_R
        row = torch.arange(len(image_R), device=image_R.device).repeat_interleave(count_R)
        offset = torch.arange(len(row), device=image_R.device)
        offset -= (count_R.cumsum(0) - count_R).repeat_interleave(count_R)
        mask_RU[row, self._title_A[first_R.repeat_interleave(count_R) + offset]] = True
        return mask_RU


def _far(similarity_RU: Tensor, taken_U: Tensor) -> Tensor:
    """Return the least similar titles that are not in `taken_U`, and add them to it; once all are taken, clear it.

    A similarity of infinity is never picked; -1 where there is no other. No row waits for the device.
    """
    picks_R = torch.full((len(similarity_RU),), -1, device=similarity_RU.device)
    for row, similarity_U in enumerate(similarity_RU):
        exists = ~similarity_U.isinf().all()
        is_exhausted = similarity_U.masked_fill(taken_U, torch.inf).isinf().all()
        taken_U &= ~(is_exhausted & exists)
        pick = similarity_U.masked_fill(taken_U, torch.inf).argmin(0, keepdim=True)
        picks_R[row] = torch.where(exists, pick[0], -1)
        taken_U.index_copy_(0, pick, taken_U[pick] | exists)
    return picks_R
