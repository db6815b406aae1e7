"""The table of recipes in the README: each recipe on the test split, at several numbers of training pairs, over seeds.

    python tests/recipe_table.py --model MODEL --dataset PAIRS

No test: it takes minutes. It runs the product's own loop, loss and metrics from stored features, in one process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.sources.folds import take
from data.store.resident import Resident
from engine.commands import common
from engine.config.fields import Config
from engine.config.recipes import RECIPES
from engine.ranks import world as dist
from engine.sweep.trials import Tuner
from eval.intervals import paired_test

REFERENCE = {"duplicates": "keep"}
ARMS: dict[str, Mapping[str, Any]] = {
    "reference": REFERENCE, "tuned reference": {**REFERENCE, "lr": 3e-3, "epochs": 10}, "best": RECIPES["best"]}
SIZES = (0, 300, 100, 53)  # 0: all
RESAMPLES = 2_000


def measured(model: str, dataset: str, cache: str, seeds: int) -> Iterator[tuple[int, str, Tensor]]:
    """(pairs, recipe, 1-based ranks [seeds, ways, rows of test]), the base model first."""
    cfg = replace(Config(), model=model, dataset=dataset, cache_dir=cache, precision="fp32", device="cpu")
    world = dist.init("cpu", 60)
    parts = common.open_parts(cfg, world)
    residents = common.open_data(cfg, world, parts, common.open_source(cfg, world)).residents()
    train, tuner = residents["train"], Tuner(parts, Resident.batches)

    def ranks() -> Tensor:
        found = common.measure_rows(parts.head, residents["test"])
        return torch.stack([found.image_to_text_rank_N, found.text_to_image_rank_N]) + 1

    yield 0, "base", ranks()[None]
    for size in SIZES:
        for name, settings in ARMS.items():
            found = []
            for seed in range(seeds):
                drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(500 + seed))
                rows = take(train, drawn[:size].sort()[0]) if size else train
                tried = replace(cfg, seed=42 + 1_000 * seed, **settings)
                tuner.tune(replace(tried, batch_size=min(tried.batch_size, len(rows))), rows)
                found.append(ranks())
            yield len(rows), name, torch.stack(found)


def cells(rank_SN: np.ndarray, draw_BN: np.ndarray) -> list[str]:
    """Every metric, averaged over seeds S, with its 95 % bootstrap interval over rows."""
    values = {"R@1": rank_SN <= 1, "R@5": rank_SN <= 5, "R@10": rank_SN <= 10, "MRR": 1 / rank_SN}
    found = []
    for value_SN in values.values():
        value_N = value_SN.mean(0)
        low, high = np.quantile(value_N[draw_BN].mean(1), [0.025, 0.975])
        found.append(f"{value_N.mean():.3f} [{low:.3f}, {high:.3f}]")
    medians = [np.median(rank_SN[:, draw_N], 1).mean() for draw_N in draw_BN]
    low, high = np.quantile(medians, [0.025, 0.975])
    return [*found, f"{np.median(rank_SN, 1).mean():.1f} [{low:.0f}, {high:.0f}]"]


def main() -> None:
    """Print the table, Markdown, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--cache-dir", default=Config().cache_dir)
    parser.add_argument("--seeds", type=int, default=10)
    asked = parser.parse_args()
    print("| way | pairs | recipe | R@1 | R@5 | R@10 | MRR | median rank | MRR over reference | over tuned reference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    known: dict[tuple[int, str], Tensor] = {}
    for pairs, name, rank_SWN in measured(asked.model, asked.dataset, asked.cache_dir, asked.seeds):
        known[pairs, name] = rank_SWN
        draw_BN = np.random.default_rng(0).integers(0, rank_SWN.shape[-1], (RESAMPLES, rank_SWN.shape[-1]))
        for way, label in enumerate(("image to text", "text to image")):
            gains = ["", ""]
            if name == "best":
                reciprocal = {arm: (1 / known[pairs, arm][:, way].double()).mean(0) for arm in ARMS}
                tests = [paired_test(reciprocal[other], reciprocal["best"]) for other in list(ARMS)[:2]]
                gains = [f"{t.difference:+.4f} [{t.ci95[0]:+.4f}, {t.ci95[1]:+.4f}], p {t.p_value:.4f}" for t in tests]
            print("|", " | ".join([label, str(pairs), name, *cells(rank_SWN[:, way].numpy(), draw_BN), *gains]), "|",
                  flush=True)


if __name__ == "__main__":
    main()
