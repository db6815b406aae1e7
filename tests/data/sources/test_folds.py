"""Folds: every row is held out once, and nothing of a held-out row is met in training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import UserError
from data.prefetch import epoch_order
from data.sources.folds import concatenate, fold_of, folds, take_rows
from data.store.feature_split import FeatureSplit


def pairs(rows: int, titles: int, images: int, seed: int) -> FeatureSplit:
    """Random pairs with repeats, some without a negative; features say which title or image they are of."""
    generator = torch.Generator().manual_seed(seed)
    title_N, image_N = (torch.randint(high, (rows,), generator=generator) for high in (titles, images))
    negative_NH = torch.randint(titles, (rows, 2), generator=generator)
    negative_NH[torch.rand(rows, 2, generator=generator) < 0.2] = -1
    return FeatureSplit(torch.arange(images).float()[:, None], torch.arange(titles).float()[:, None], image_N, title_N,
                        negative_NH)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("titles", "images"), [(40, 50_000), (50_000, 40), (1_000, 1_000), (600, 600)])
def test_no_title_and_no_image_of_a_held_out_row_is_trained_on(titles: int, images: int, seed: int) -> None:
    whole = pairs(300, titles, images, seed)
    parts = folds(whole, 5, seed)
    assert torch.equal(torch.cat([part.row_N for part in parts]).sort()[0], torch.arange(300))
    for part in parts:
        assert len(part.train) + len(part.held) == 300 and len(part.held) == len(part.row_N)
        assert torch.equal(whole.title_row_N[part.row_N], part.held.title_row_N)
        rest_N = torch.ones(300, dtype=torch.bool).index_fill(0, part.row_N, False)
        assert part.train.negative_row_NH is not None and whole.negative_row_NH is not None
        given_NH, kept_NH = whole.negative_row_NH[rest_N], part.train.negative_row_NH
        assert torch.equal(kept_NH, torch.where(torch.isin(given_NH, part.held.title_row_N), -1, given_NH))
        seen = torch.cat([part.train.title_row_N, part.train.negative_row_NH.flatten()])
        assert not torch.isin(part.held.title_row_N, seen).any()
        assert not torch.isin(part.held.image_row_N, part.train.image_row_N).any()
    assert torch.equal(parts[0].row_N, folds(whole, 5, seed)[0].row_N)


def test_folds_are_even_and_another_seed_draws_others() -> None:
    title_N, image_N = np.arange(1003) // 2, np.arange(1003)
    one, other = (fold_of(title_N, image_N, 7, seed) for seed in (0, 1))
    for fold_N in (one, other):
        assert np.ptp(np.bincount(fold_N)) <= 2
        assert (fold_N[:-1:2] == fold_N[1::2]).all()
    assert (one != other).mean() > 0.5


def test_pairs_that_hang_together_cannot_be_folded() -> None:
    with pytest.raises(UserError, match="--folds 5 .* there are 1"):
        folds(pairs(50, 1, 50, 0), 5, 0)


def test_joined_splits_hold_their_rows_in_order_and_are_met_as_in_a_run() -> None:
    whole = pairs(30, 100, 100, 0)
    first, second = take_rows(whole, torch.arange(20)), take_rows(whole, torch.arange(20, 30))
    again = concatenate([first, second])
    assert again.negative_row_NH is not None and whole.negative_row_NH is not None
    assert torch.equal(again.title_row_N, whole.title_row_N)
    assert torch.equal(again.negative_row_NH, whole.negative_row_NH)
    bare = FeatureSplit(second.image_MV, second.title_PT, second.image_row_N, second.title_row_N)
    single = replace(second, negative_row_NH=whole.negative_row_NH[20:, :1])  # fewer negatives a row than the first
    joined = concatenate([first, bare, single]).negative_row_NH
    assert joined is not None and joined[:20].equal(whole.negative_row_NH[:20])
    assert joined[20:30].tolist() == [[-1, -1]] * 10
    assert joined[30:, :1].equal(whole.negative_row_NH[20:, :1]) and joined[30:, 1].tolist() == [-1] * 10
    assert concatenate([bare, bare]).negative_row_NH is None
    steps = [step for step, _ in zip(whole.batches(16, 7).from_step(1), range(3), strict=False)]
    orders = [epoch_order(30, 7, epoch) for epoch in (0, 1)]
    for step, rows in zip(steps, (orders[0][16:], orders[1][:16], orders[1][16:]), strict=True):
        assert torch.equal(step.title_id_B, whole.title_row_N[rows])
