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
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.sources.folds import take_rows
from data.store.feature_split import FeatureSplit
from engine.commands import common
from engine.config.fields import Config
from engine.config.recipes import RECIPES
from engine.ranks import world as dist
from engine.sweep.trials import Tuner
from eval.intervals import Units, mean_interval, median_interval, paired_test
from eval.metrics import Ranks

REFERENCE = {"duplicates": "keep"}
ARMS: dict[str, Mapping[str, Any]] = {
    "reference": REFERENCE, "tuned reference": {**REFERENCE, "lr": 3e-3, "epochs": 10}, "best": RECIPES["best"]}
SIZES = (0, 300, 100, 53)  # 0: all


class Way(NamedTuple):
    """One direction: 1-based ranks of all seeds, and which queries are of the same unit."""

    rank_SQ: Tensor
    units: Units


def measured(model: str, dataset: str, cache: str, seeds: int) -> Iterator[tuple[int, str, list[Way]]]:
    """(pairs, recipe, for both ways 1-based ranks [seeds, queries] and their units), the base model first."""
    cfg = replace(Config(), model=model, dataset=dataset, cache_dir=cache, precision="fp32", device="cpu")
    world = dist.init("cpu", 60)
    parts = common.load_model(cfg, world)
    pairs = common.open_data(cfg, world, parts, common.open_source(cfg, world))
    residents = pairs.feature_splits(pairs.splits)
    train, tuner = residents["train"], Tuner(parts, FeatureSplit.batches)

    def ranks() -> tuple[Ranks, Ranks]:
        found = common.evaluate_split(parts.head, residents["test"])
        return found.image_to_text, found.text_to_image

    def ways(found: list[tuple[Ranks, Ranks]]) -> list[Way]:
        return [Way(torch.stack([one.rank_Q for one in way]) + 1, Units(way[0].unit_Q))
                for way in zip(*found, strict=True)]

    yield 0, "base", ways([ranks()])
    for size in SIZES:
        for name, settings in ARMS.items():
            found = []
            for seed in range(seeds):
                drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(500 + seed))
                rows = take_rows(train, drawn[:size].sort()[0]) if size else train
                tried = replace(cfg, seed=42 + 1_000 * seed, **settings)
                tuner.tune(replace(tried, batch_size=min(tried.batch_size, len(rows))), rows)
                found.append(ranks())
            yield len(rows), name, ways(found)


def cells(way: Way) -> list[str]:
    """Every metric, averaged over seeds, with its 95 % interval over units."""
    rank_SQ = way.rank_SQ.double()
    found = []
    for value_SQ in (rank_SQ <= 1, rank_SQ <= 5, rank_SQ <= 10, 1 / rank_SQ):
        value_Q = value_SQ.double().mean(0)
        low, high = mean_interval(value_Q, 0, 1, way.units)
        found.append(f"{value_Q.mean():.3f} [{low:.3f}, {high:.3f}]")
    low, high = median_interval(rank_SQ.mean(0), way.units)
    return [*found, f"{rank_SQ.quantile(0.5, dim=1).mean():.1f} [{low:.0f}, {high:.0f}]"]


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
    known: dict[tuple[int, str], list[Way]] = {}
    for pairs, name, ways in measured(asked.model, asked.dataset, asked.cache_dir, asked.seeds):
        known[pairs, name] = ways
        for way, label in enumerate(("image to text", "text to image")):
            gains = ["", ""]
            if name == "best":
                reciprocal = {arm: (1 / known[pairs, arm][way].rank_SQ.double()).mean(0) for arm in ARMS}
                tests = [paired_test(reciprocal[other], reciprocal["best"], ways[way].units)
                         for other in list(ARMS)[:2]]
                gains = [f"{t.difference:+.4f} [{t.ci95[0]:+.4f}, {t.ci95[1]:+.4f}], p {t.p_value:.4f}" for t in tests]
            print("|", " | ".join([label, str(pairs), name, *cells(ways[way]), *gains]), "|",
                  flush=True)


if __name__ == "__main__":
    main()
