"""Tables of recipes: base, reference and auto on the test split, at several numbers of training pairs, over seeds.

    python tests/recipe_table.py --sets openstax=MODEL=DATASET,coco=TESTBEDS --seeds 10

A set is NAME=MODEL=DATASET (a model and pairs as `run.py` takes them), or the name of stored features: coco, convirt or
unaligned, in the folder --testbeds. No test: it takes minutes. Training and choice are the product's own, from stored
features, in one process. Training rows whose title or image also stands in test are left out, and said.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.sources.folds import concatenate, take_rows
from data.store.feature_split import FeatureSplit
from engine.commands import common
from engine.config.fields import Config
from engine.ranks import world as dist
from engine.ranks.world import World
from engine.sweep.batched import PROJECTIONS, Projections, project, train_together
from engine.sweep.choose import candidate_weights, choose
from eval.intervals import Units, mean_interval, paired_test
from eval.metrics import Ranks
from eval.retrieval import measure_split

ARMS: dict[str, Mapping[str, Any]] = {
    "reference": {"duplicates": "keep"},
    "fixed": {"epochs": 40, "batch_size": 128, "lr": 3e-3, "loss": "symmetric", "scale": 10.0, "l2_sp": 0.01}}
SIZES = (53, 100, 300, 0)  # 0: all
ALONE = World(0, 0, 1, torch.device("cpu"))


class PairSet(NamedTuple):
    """A base model and pairs to tune it on and to measure it by."""

    name: str
    base: Projections
    train: FeatureSplit
    test: FeatureSplit


class Way(NamedTuple):
    """One direction: 1-based ranks of all seeds, and which queries are of the same unit."""

    rank_SQ: Tensor
    units: Units


def opened(name: str, model: str, dataset: str, cache: str) -> PairSet:
    """Return a model's features of a dataset; train and valid are tuned on."""
    cfg = replace(Config(), model=model, dataset=dataset, cache_dir=cache, precision="fp32", device="cpu")
    parts = common.load_model(cfg, ALONE)
    splits = common.open_data(cfg, ALONE, parts, common.open_source(cfg, ALONE))
    residents = splits.feature_splits(splits.splits)
    rows = concatenate([residents[split] for split in ("train", "valid")])
    base = Projections(*(parts.trainable[weight].detach().clone() for weight in PROJECTIONS))
    return without_shared(PairSet(name, base, rows, residents["test"]))


def without_shared(pairs: PairSet) -> PairSet:
    """Return the set without the training rows whose title or image also stands in test."""
    shared_N = (torch.isin(pairs.train.title_row_N, pairs.test.title_row_N)
                | torch.isin(pairs.train.image_row_N, pairs.test.image_row_N))
    print(f"{pairs.name}: {int(shared_N.sum())} training rows share a title or image with test and are left out",
          file=sys.stderr)
    return pairs._replace(train=take_rows(pairs.train, (~shared_N).nonzero()[:, 0]))


def embedded(name: str, folder: Path) -> PairSet:
    """Return 500 pairs of stored embeddings, in fixed random orthogonal projections; 200 are the test split."""
    stored = {"coco": "clip-coco.npy", "convirt": "convirt-radiology.npy"}[name]
    sides = torch.from_numpy(np.load(folder / stored))
    generator = torch.Generator().manual_seed(0)
    rotation_EE = torch.linalg.qr(torch.randn(2, 512, 512, generator=generator))[0]
    features = torch.bmm(sides, rotation_EE)  # so that rotation @ feature is the embedding
    order = torch.randperm(500, generator=generator)
    pairs = FeatureSplit(features[0], features[1], order, order)
    return PairSet(name, Projections(*rotation_EE), take_rows(pairs, torch.arange(200, 500)),
                   take_rows(pairs, torch.arange(200)))


def unaligned(folder: Path, dataset: Path) -> PairSet:
    """Return features of two towers that know nothing of each other, aligned on every second training pair."""
    images, titles = np.load(folder / "openstax-mobilenet.npz"), np.load(folder / "openstax-minilm.npz")
    image_place = {name.split("/")[-1]: place for place, name in enumerate(images["images"].tolist())}
    title_place = {name: place for place, name in enumerate(titles["titles"].tolist())}
    splits = {}
    for split in ("train", "valid", "test"):
        with (dataset / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            places = [(image_place[row["image"].split("/")[-1]], title_place[row["title"]])
                      for row in csv.DictReader(file)]
        image_row_N, title_row_N = torch.tensor(places).unbind(1)
        splits[split] = FeatureSplit(torch.from_numpy(images["features"]).float(),
                                     torch.from_numpy(titles["features"]).float(), image_row_N, title_row_N)
    even, odd = (take_rows(splits["train"], torch.arange(start, len(splits["train"]), 2)) for start in (0, 1))
    generator = torch.Generator().manual_seed(0)
    width = 256
    untrained = Projections(*(torch.randn(width, size, generator=generator) / size**0.5 for size in (1280, 384)))
    cfg = replace(Config(), loss="symmetric", batch_size=128, epochs=20, lr=3e-4)
    base = Projections(*(weight_K[0] for weight_K in train_together(untrained, even, [cfg], torch.float32)))
    rows = concatenate([odd, splits["valid"]])
    return without_shared(PairSet("unaligned", base, rows, splits["test"]))


def ranks(weights: Projections, test: FeatureSplit) -> tuple[Ranks, Ranks]:
    """Return the ranks of both ways."""
    result = measure_split(lambda image_BV: project(weights.image_KEV[None], image_BV.float())[0],
                           lambda title_BT: project(weights.text_KET[None], title_BT.float())[0], test.parts())
    return result.image_to_text, result.text_to_image


def arms(pairs: PairSet, size: int, seed: int) -> Iterator[tuple[str, Projections]]:
    """Yield the weights of each arm after tuning on `size` pairs drawn by `seed`."""
    drawn_N = torch.randperm(len(pairs.train), generator=torch.Generator().manual_seed(500 + seed))
    rows = take_rows(pairs.train, drawn_N[:size].sort()[0] if size else drawn_N.sort()[0])
    cfg = replace(Config(), seed=42 + 1_000 * seed)
    for name, settings in ARMS.items():
        tried = replace(cfg, **settings)
        tried = replace(tried, batch_size=min(tried.batch_size, len(rows)))
        yield name, Projections(*(weight_K[0] for weight_K in train_together(pairs.base, rows, [tried],
                                                                             torch.float32)))
    began = time.process_time()
    choice = choose(pairs.base, rows, cfg, torch.float32, ALONE)
    weights = candidate_weights(pairs.base, rows, cfg, torch.float32, choice.candidate)
    print(f"{pairs.name} {size} seed {seed}: {choice.candidate.describe()}; best {choice.best.describe()}; "
          f"{time.process_time() - began:.1f} CPU s", file=sys.stderr, flush=True)
    yield "auto", weights


def line(pairs: PairSet, size: int, seeds: int) -> Iterator[str]:
    """Yield the lines of one set and number of pairs, for both ways."""
    if size > len(pairs.train):
        return
    ranks_by_arm: dict[str, list[tuple[Ranks, Ranks]]] = {"base": [ranks(pairs.base, pairs.test)] * seeds}
    for seed in range(seeds):
        for name, weights in arms(pairs, size, seed):
            ranks_by_arm.setdefault(name, []).append(ranks(weights, pairs.test))
    for place, way in enumerate(("image to text", "text to image")):
        rank_by_arm = {}
        for name, by_seed in ranks_by_arm.items():
            rank_by_arm[name] = Way(torch.stack([both[place].rank_Q for both in by_seed]).double() + 1,
                                    Units(by_seed[0][place].unit_Q))
        for name, (rank_SQ, units) in rank_by_arm.items():
            cells = [pairs.name, str(size or len(pairs.train)), way, name]
            for value_SQ in (rank_SQ <= 1, rank_SQ <= 10, 1 / rank_SQ):
                value_Q = value_SQ.double().mean(0)
                low, high = mean_interval(value_Q, 0, 1, units)
                cells.append(f"{value_Q.mean():.3f} [{low:.3f}, {high:.3f}]")
            for other in ("base", "reference"):
                test = paired_test((1 / rank_by_arm[other].rank_SQ).mean(0), (1 / rank_SQ).mean(0), units)
                cells.append(f"{test.difference:+.4f} [{test.ci95[0]:+.4f}, {test.ci95[1]:+.4f}], p {test.p_value:.4f}")
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, Markdown, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", required=True, help="several, with commas between")
    parser.add_argument("--testbeds", type=Path, default=Path("../shared/data/feature-testbeds"))
    parser.add_argument("--openstax", type=Path, default=Path("../shared/data/openstax-titles"))
    parser.add_argument("--cache-dir", default=Config().cache_dir)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of pairs; 0: all")
    given = parser.parse_args()
    dist.init("cpu", 60)
    print("| set | pairs | way | recipe | R@1 | R@10 | MRR | MRR over base | MRR over reference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for part in given.sets.split(","):
        name, *opening = part.split("=")
        if opening:
            pairs = opened(name, opening[0], opening[1], given.cache_dir)
        else:
            pairs = unaligned(given.testbeds, given.openstax) if name == "unaligned" else embedded(name, given.testbeds)
        for size in map(int, given.sizes.split(",")):
            for text in line(pairs, size, given.seeds):
                print(text, flush=True)


if __name__ == "__main__":
    main()
