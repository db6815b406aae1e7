"""`run.py sweep`: settings tried by cross-validation; the best one trained on all rows and tested once."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.batch import RunFailed, UserError
from data.pairs import Pairs, data_key
from data.sources.folds import concatenate, folds
from data.store.feature_split import FeatureSplit
from engine.commands.common import evaluate_split, evaluate_splits, load_model, open_data, open_run, open_source
from engine.commands.train import find_overlap, write_results
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import folder
from engine.sweep.space import configurations, describe_settings
from engine.sweep.trials import SEED_STRIDE, Journal, Run, Tuner
from engine.train import Plan
from eval.leaderboard import leaderboard, score_configuration, to_host
from eval.metrics import Retrieval
from eval.retrieval import differences, measure_if_finite


def sweep(cfg: Config, world: World, stop: StopSignal) -> int:
    """Try settings by cross-validation over all rows but test's; retrain the best on them, and test that once."""
    tried = configurations(cfg)
    out, begun = open_run(cfg, world)
    source = open_source(cfg, world)
    parts = load_model(cfg, world)
    if not parts.cached:
        raise UserError("sweep trains from stored features: only projections and logit_scale can be --trainable")
    pairs = open_data(cfg, world, parts, source)
    rows = concatenate([split for name, split in pairs.residents().items() if name in ("train", "valid")])
    runs = [Run(seed, *fold) for seed in range(cfg.seed, cfg.seed + cfg.seeds * SEED_STRIDE, SEED_STRIDE)
            for fold in folds(rows, cfg.folds, seed)]
    for settings in tried:  # a batch too large for a fold is better said now
        Plan(min(len(run.train) for run in runs), replace(cfg, **settings).batch_size, 1)
    folder.write_run_header(out, cfg, world, parts.precision, pairs.ledger)
    # what trials depend on; test is measured at the end alone, base and tuned together
    identity = {key: value for key, value in pairs.identity.items()
                if key not in {data_key(name) for name in pairs.splits if name not in ("train", "valid")}}
    journal = Journal(out, world, identity, cfg.best_metric, begun)
    todo = [settings for settings in tried if not journal.is_finished(settings)]
    tuner = Tuner(parts, FeatureSplit.batches)

    def held_out(rows: FeatureSplit) -> Retrieval | None:
        return to_host(measure_if_finite(partial(evaluate_split, parts.head, rows)))

    base, began = tuner.cross_validate(None, runs, held_out, world), time.monotonic()
    with stop.graceful_exit():
        for done, settings in enumerate(todo, start=1):
            found = tuner.cross_validate(replace(cfg, **settings), runs, held_out, world)
            score = journal.add(settings, score_configuration(found, base, len(rows), cfg.best_metric))
            speed = done * len(runs) / (time.monotonic() - began) * 60
            world.say(f"{done}/{len(todo)}  {cfg.best_metric} {score:.4f}  ({describe_settings(settings)})  {speed:,.0f} runs/min")
            if stop.agreed_signal(world, done):
                world.say(f"stopped; run.py sweep --resume --out {out} goes on from what sweep.jsonl holds")
                break
    return finish_sweep(cfg, world, tuner, pairs, rows, journal, out)


def finish_sweep(cfg: Config, world: World, tuner: Tuner, pairs: Pairs, rows: FeatureSplit, journal: Journal,
             out: Path) -> int:
    """Retrain the winner on all rows but test's, measure it there once; leaderboard, recipe and model."""
    lines = journal.best_first()
    if "collapsed" in lines[0]:
        raise RunFailed(f"every configuration has collapsed ({lines[0]['collapsed']}); try a smaller lr in --space")
    best = replace(cfg, **lines[0]["settings"])
    tuner.reset()
    before = evaluate_splits(pairs.residents(), tuner.parts.head, ["test"])
    tuner.tune(best, rows)
    after = evaluate_splits(pairs.residents(), tuner.parts.head, ["test"])
    metrics: dict[str, Any] = {when: {name: one.summarise() for name, one in found.items()}
                               for when, found in (("base", before), ("tuned", after))}
    metrics["difference"] = differences(before, after)
    metrics |= find_overlap(pairs, world)
    folder.write_metrics(out, metrics, world)
    if world.is_main:
        journal.write_summary(out, cfg)
        print(leaderboard(lines[:10], [describe_settings(line["settings"]) for line in lines[:10]], cfg.best_metric) + "\n")
        world.say(f"winner: {describe_settings(lines[0]['settings'])}  (run.py --config {out / 'recipe.toml'})")
    return write_results(best, world, tuner.parts, out, metrics)
