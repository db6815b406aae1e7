"""`run.py sweep`: try settings by cross-validation, retrain the best one on all rows and test it once."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.batch import RunFailed, UserError
from data.pairs import Pairs
from data.sources.folds import concatenate, folds
from data.store.feature_split import FeatureSplit
from engine.commands.common import evaluate_split, evaluate_splits, load_model, open_data, open_run, open_source
from engine.commands.train import find_overlap, identity_of, named_classes, summaries, write_results
from engine.config.fields import Config, as_dict
from engine.optim import Plan
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import folder
from engine.sweep.space import configurations, describe_settings
from engine.sweep.trials import SEED_STRIDE, Journal, Run, Tuner
from eval.leaderboard import leaderboard, score_configuration, to_host
from eval.metrics import Retrieval
from eval.retrieval import differences, measure_if_finite

TOGETHER = 16  # configurations whose runs are trained together
SEARCHED = ("train", "valid")  # splits that trials train on and hold out; test is measured once, at the end


def sweep(cfg: Config, world: World, stop: StopSignal) -> int:
    """Try settings by cross-validation over all rows but those of test; retrain the best on them, and test it once."""
    # Open everything that a typo could break before anything slow.
    tried = configurations(cfg)
    out, resuming = open_run(cfg, world)
    source = open_source(cfg, world)
    model = load_model(cfg, world)
    if not model.cached:
        raise UserError("sweep trains from stored features: only projections and logit_scale can be --trainable")
    pairs = open_data(cfg, world, model, source)
    rows = concatenate([*pairs.feature_splits(SEARCHED).values()])
    runs = cross_validation_runs(cfg, rows)
    smallest = min(len(run.train) for run in runs)
    # `Plan` refuses a batch that is larger than a fold: now, not after hours of trials.
    for settings in tried:
        Plan(smallest, replace(cfg, **settings).batch_size, 1)

    # Trials depend on train and valid alone: a test split that changed does not discard them.
    identity = identity_of(pairs.identity, pairs, SEARCHED)
    # Before config.json is replaced: a refused resume leaves that file unchanged.
    journal = Journal(out, world, identity, cfg.best_metric, resuming)
    folder.write_run_header(out, as_dict(cfg, "sweep"), world, model.precision, pairs.ledger)
    tuner = Tuner(model, FeatureSplit.batches)

    def held_out(rows: FeatureSplit) -> Retrieval | None:
        return to_host(measure_if_finite(partial(evaluate_split, model.head, rows)))

    base = tuner.cross_validate([None], runs, held_out, world)[0]
    began, finished, trained = time.monotonic(), 0, 0
    remaining = sum(not journal.is_finished(settings) for settings in tried)
    with stop.graceful_exit():
        # The same configurations train together whatever was finished before: products of other sizes would be rounded
        # otherwise, and a resumed sweep would get other scores.
        for bundle in [tried[first:first + TOGETHER] for first in range(0, len(tried), TOGETHER)]:
            if all(map(journal.is_finished, bundle)):
                continue
            results = tuner.cross_validate([replace(cfg, **settings) for settings in bundle], runs, held_out, world)
            trained += len(bundle)
            speed = trained * len(runs) / (time.monotonic() - began) * 60
            for settings, held in zip(bundle, results, strict=True):
                if journal.is_finished(settings):
                    continue
                score = journal.add(settings, score_configuration(held, base, len(rows), cfg.best_metric))
                finished += 1
                world.say(f"{finished}/{remaining}  {cfg.best_metric} {score:.4f}  ({describe_settings(settings)})  "
                          f"{speed:,.0f} runs/min")
            if stop.agreed_signal(world, finished):
                world.say(f"stopped; run.py sweep --resume --out {out} goes on from what sweep.jsonl holds")
                break

    best, metrics = retrain_best(cfg, tuner, pairs, rows, journal)
    metrics |= find_overlap(pairs, world) | named_classes(pairs)
    folder.write_metrics(out, metrics, world)
    if world.is_main:
        journal.write_summary(out, cfg)
    code = write_results(best, world, model, out, metrics)
    if world.is_main:
        print_winner(cfg, world, journal, out)
    return code


def cross_validation_runs(cfg: Config, rows: FeatureSplit) -> list[Run]:
    """Return one run a fold for each of --seeds seeds."""
    runs: list[Run] = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds * SEED_STRIDE, SEED_STRIDE):
        runs += [Run(seed, *fold) for fold in folds(rows, cfg.folds, seed)]
    return runs


def retrain_best(cfg: Config, tuner: Tuner, pairs: Pairs, rows: FeatureSplit,
                 journal: Journal) -> tuple[Config, dict[str, Any]]:
    """Retrain the best configuration on all `rows`; return its settings, and the metrics of test before and after."""
    winner = journal.best_first()[0]
    if "collapsed" in winner:
        raise RunFailed(f"every configuration has collapsed ({winner['collapsed']}); try a smaller lr in --space")
    best = replace(cfg, **winner["settings"])
    head = tuner.model.head
    tuner.reset()
    base = evaluate_splits(pairs.feature_splits(["test"]), head)
    tuner.tune(best, rows)
    tuned = evaluate_splits(pairs.feature_splits(["test"]), head)
    return best, {"base": summaries(base), "tuned": summaries(tuned), "difference": differences(base, tuned)}


def print_winner(cfg: Config, world: World, journal: Journal, out: Path) -> None:
    """Print the best configurations, and the command that trains with the winner."""
    lines = journal.best_first()[:10]
    described = [describe_settings(line["settings"]) for line in lines]
    world.show(leaderboard(lines, described, cfg.best_metric) + "\n", str(out / "sweep.jsonl"))
    world.say(f"winner: {described[0]}  (run.py --config {out / 'recipe.toml'})")
