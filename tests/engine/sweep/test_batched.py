"""Runs trained together: the weights that `fit` gives each configuration alone, whatever it sets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sources.folds import folds
from data.store.feature_split import FeatureSplit
from engine.clip.model import ModelOptions, open_model
from engine.config.fields import Config
from engine.loss import MAX_LOGITS
from engine.ranks.world import World
from engine.sweep.batched import PROJECTIONS, Projections, group_configurations, train_together
from engine.sweep.trials import Run, Tuner

BASE = replace(Config(), batch_size=8, lr=1e-3, precision="fp32", device="cpu", seed=3)
V, T = 32, 24  # feature widths of `tiny_clip`


def feature_pairs(rows: int, negatives: int) -> FeatureSplit:
    """Random features in which some images, titles and negatives occur twice, and some negatives are missing."""
    generator = torch.Generator().manual_seed(1)

    def numbers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    negative_NH = numbers(rows, rows, negatives) - numbers(2, rows, negatives) * rows if negatives else None
    if negative_NH is not None:
        negative_NH = negative_NH.clamp(min=-1)
    return FeatureSplit(torch.randn(rows, V, generator=generator), torch.randn(rows, T, generator=generator),
                        numbers(rows, rows), numbers(rows, rows), negative_NH)


@pytest.fixture(scope="module")
def tuner(tiny_model: Path) -> Tuner:
    return Tuner(open_model(str(tiny_model), ModelOptions(precision="fp32"), torch.device("cpu")), FeatureSplit.batches)


def weights_of(tuner: Tuner) -> Projections:
    return Projections(*(tuner.model.trainable[name].detach().clone() for name in PROJECTIONS))


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("common", [
    {}, {"loss": "symmetric"}, {"loss": "sigmoid"}, {"duplicates": "multi"}, {"duplicates": "keep", "hardness": 4.0},
    {"loss": "symmetric", "hardness": 3.0}])
def test_runs_trained_together_end_where_each_ends_alone(tuner: Tuner, common: dict[str, Any], negatives: int) -> None:
    """A sweep would crown a configuration whose run in training is another one."""
    pairs = feature_pairs(37, negatives)  # 37 rows: the last batch of an epoch is short
    configs = [replace(BASE, **common, **settings) for settings in (
        {}, {"epochs": 5, "lr": 3e-3}, {"epochs": 1, "scale": 5.0, "l2_sp": 0.05},
        {"schedule": "cosine", "warmup": 0.2}, {"clip_norm": 0.01, "weight_decay": 0.1},
        {"clip_norm": 0.0, "epochs": 3}, {"relative": True, "lr": 0.02, "l2_sp": 1e-4})]
    tuner.reset()
    together = train_together(weights_of(tuner), pairs, configs, torch.float32)
    for place, cfg in enumerate(configs):
        tuner.tune(cfg, pairs)
        for alone, weight_K in zip(weights_of(tuner), together, strict=True):
            # Adam divides by the gradient's size, so rounding of a tiny gradient moves a weight by a share of lr.
            torch.testing.assert_close(weight_K[place], alone, atol=1e-2 * min(cfg.lr, 3e-3), rtol=1e-4)


def test_a_step_that_is_not_finite_is_skipped_for_its_run_alone(tuner: Tuner) -> None:
    """One configuration that diverges would take the others of its bundle with it."""
    pairs = feature_pairs(20, 0)
    tuner.reset()
    configs = [BASE, replace(BASE, scale=float("inf"))]
    together = train_together(weights_of(tuner), pairs, configs, torch.float32)
    base = weights_of(tuner)
    tuner.tune(BASE, pairs)
    for weight_K, alone, before in zip(together, weights_of(tuner), base, strict=True):
        torch.testing.assert_close(weight_K[0], alone, atol=1e-2 * BASE.lr, rtol=1e-4)
        assert torch.equal(weight_K[1], before)


def test_groups_share_batches_and_loss_and_stay_within_memory() -> None:
    pairs = feature_pairs(600, 1)
    configs = [BASE, replace(BASE, lr=1.0), replace(BASE, batch_size=16), replace(BASE, epochs=9),
               replace(BASE, loss="symmetric"), replace(BASE, seed=4)]
    assert group_configurations(configs, pairs) == [[0, 1, 3], [2], [4], [5]]
    half = int((MAX_LOGITS["cpu"] // 5) ** 0.5)  # two negatives' worth of candidates, two runs at a time
    assert group_configurations([replace(BASE, batch_size=half)] * 5, pairs) == [[0, 1], [2, 3], [4]]
    assert group_configurations([replace(BASE, batch_size=4 * half)] * 5, pairs) == []


def test_cross_validation_mixes_base_grouped_and_single_configurations(tuner: Tuner) -> None:
    """Scores would belong to other configurations than the journal says."""
    pairs = feature_pairs(60, 1)
    runs = [Run(3 + fold, *part) for fold, part in enumerate(folds(pairs, 2, 3))]
    configs = [None, BASE, replace(BASE, batch_size=4), replace(BASE, lr=1e-2, interpolate="0.5"), None]
    world = World(0, 0, 1, torch.device("cpu"))

    def measure(held_out: FeatureSplit) -> tuple[int, Projections]:
        return len(held_out), weights_of(tuner)

    results = tuner.cross_validate(configs, runs, measure, world)
    for cfg, by_run in zip(configs, results, strict=True):
        for run, (row_N, (rows, weights)) in zip(runs, by_run, strict=True):
            assert torch.equal(row_N, run.row_N) and rows == len(run.held_out)
            tuner.reset() if cfg is None else tuner.tune(replace(cfg, seed=run.seed), run.train)
            for got, alone in zip(weights, weights_of(tuner), strict=True):
                torch.testing.assert_close(got, alone, atol=1e-4, rtol=1e-4)
