"""Cross-validation over pairs in which no title and no image of a held-out row occurs in training, in any role.

Dimension key: N rows, H hard negatives of a row, K folds, V/T image/text feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from data.sources.split import components
from data.store.feature_split import FeatureSplit


class Fold(NamedTuple):
    """The rows to train on and those held out; `row_N` are the numbers of the latter in the whole."""

    train: FeatureSplit
    held: FeatureSplit
    row_N: Tensor


def concatenate(splits: Sequence[FeatureSplit]) -> FeatureSplit:
    """Return the rows of several splits that share their tables, as one split in order."""
    first = splits[0]
    width = max(0 if split.negative_row_NH is None else split.negative_row_NH.shape[1] for split in splits)
    negative_NH = first.image_row_N.new_full((sum(map(len, splits)), width), -1)
    start = 0
    for split in splits:
        if split.negative_row_NH is not None:
            negative_NH[start : start + len(split), : split.negative_row_NH.shape[1]] = split.negative_row_NH
        start += len(split)
    return replace(first, image_row_N=torch.cat([split.image_row_N for split in splits]),
                   title_row_N=torch.cat([split.title_row_N for split in splits]),
                   negative_row_NH=negative_NH if bool((negative_NH >= 0).any()) else None)


def take_rows(pairs: FeatureSplit, row_N: Tensor) -> FeatureSplit:
    """Return some rows of a split, in this order."""
    row_N = row_N.to(pairs.image_row_N.device)
    return replace(pairs, image_row_N=pairs.image_row_N[row_N], title_row_N=pairs.title_row_N[row_N],
                   negative_row_NH=None if pairs.negative_row_NH is None else pairs.negative_row_NH[row_N])


def fold_of(title_N: np.ndarray, image_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, int64 [N]; rows that share a title or an image, also through others, share it.

    Groups go largest first, equal ones shuffled by `seed`, to the fold with the fewest rows. Raises UserError when
    there are fewer groups than folds.
    """
    group_N = components(title_N, image_N)
    size_N = np.bincount(group_N, minlength=len(group_N))
    groups = np.flatnonzero(size_N)
    if len(groups) < folds:
        raise UserError(f"--folds {folds} needs as many pairs that share no title and no image; there are "
                        f"{len(groups)}")
    # Shuffled first: the stable sort by size below keeps this order among groups of one size.
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).numpy()]
    fold_G = np.zeros(len(group_N), np.int64)
    room = [(0, fold) for fold in range(folds)]
    heapify(room)
    for group in groups[np.argsort(-size_N[groups], kind="stable")].tolist():
        rows, fold = heappop(room)
        fold_G[group] = fold
        heappush(room, (rows + int(size_N[group]), fold))
    return fold_G[group_N]


def folds(pairs: FeatureSplit, count: int, seed: int) -> list[Fold]:
    """Return `count` folds; the negatives of training rows do not include held-out titles.

    Titles that are class names are in all folds; only rows of one image stay together then.
    """
    fold_N = _fold_numbers(pairs, count, seed)
    return [_fold(pairs, fold_N == fold) for fold in range(count)]


def hold_out(pairs: FeatureSplit, count: int, seed: int) -> Fold:
    """Return the first of `count` folds."""
    return _fold(pairs, _fold_numbers(pairs, count, seed) == 0)


def _fold_numbers(pairs: FeatureSplit, count: int, seed: int) -> Tensor:
    image_N = pairs.image_row_N.cpu().numpy()
    title_N = pairs.title_row_N.cpu().numpy() if pairs.title_group_P is None else image_N
    return torch.from_numpy(fold_of(title_N, image_N, count, seed))


def _fold(pairs: FeatureSplit, is_held_N: Tensor) -> Fold:
    held_row_N = is_held_N.nonzero()[:, 0]
    held = take_rows(pairs, held_row_N)
    train = take_rows(pairs, (~is_held_N).nonzero()[:, 0])
    if train.negative_row_NH is not None:
        # A held-out title must not be pushed away from training images either: that would be training on it.
        leaks_NH = torch.isin(train.negative_row_NH, held.title_row_N)
        train = replace(train, negative_row_NH=train.negative_row_NH.masked_fill(leaks_NH, -1))
    return Fold(train, held, held_row_N)
