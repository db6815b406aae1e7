"""`run.py train --recipe auto`: choose by cross-validation how to tune, tune once on all pairs, measure test once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.batch import UserError
from data.pairs import Pairs
from data.sources.folds import concatenate
from data.store.feature_split import FeatureSplit
from engine.clip.model import LoadedModel
from engine.commands import train
from engine.commands.common import evaluate_splits
from engine.config.fields import Config, as_dict
from engine.optim import Plan
from engine.ranks.world import World
from engine.run_folder import folder
from engine.run_folder.board import WeightDrift, comparable_settings
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log, Reference
from engine.sweep.batched import PROJECTIONS, Projections
from engine.sweep.choose import Choice, candidate_weights, choose, loss_scale, run_settings, split_pairs
from engine.sweep.interpolate import blend
from engine.sweep.trials import Tuner
from eval.report.show import AnswerLog, shown_split
from eval.retrieval import differences, embed_split

TUNED_ON = ("train", "valid")


def train_auto(cfg: Config, world: World, out: Path, model: LoadedModel, pairs: Pairs) -> int:
    """Choose a way to tune on train and valid, apply it to all of them, and measure the other splits before and after.

    Raises UserError where the pairs or what trains do not allow it.
    """
    if not model.cached or {*model.trainable} != {*PROJECTIONS}:
        raise UserError("--recipe auto tunes both projections from stored features; leave out what makes towers run or "
                        "other parameters train, or use --recipe reference")
    names = [name for name in pairs.splits if name not in TUNED_ON]
    if not names:
        raise UserError("--recipe auto tunes on train and valid and measures test, and there is no other split; name "
                        "one, such as --splits train=train,test=valid")
    if folder.is_complete(out, as_dict(cfg, "train"), world):
        return train.repeat_results(world, out)
    rows = concatenate([split for name, split in pairs.feature_splits(TUNED_ON).items()])
    tuner = Tuner(model, FeatureSplit.batches)
    base = Projections(*(tuner.base[name] for name in PROJECTIONS))
    world.say(f"auto: {len(rows):,} pairs, {len(split_pairs(rows, cfg.seed))} held-out parts")
    metrics: dict[str, Any] = train.find_overlap(pairs, world) | train.named_classes(pairs)
    folder.write_run_header(out, as_dict(cfg, "train"), world, model.precision, pairs.ledger)

    choice = choose(base, rows, cfg, model.precision, world)
    world.say(f"auto: {choice.describe()}")
    final = final_settings(cfg, choice, base, rows)
    metrics["auto"] = choice.as_json(final)
    plan = Plan(len(rows), final.batch_size, final.epochs)
    with closing(Log(out, world, plan, State(), WeightDrift(model.trainable),
                     Reference(comparable_settings(final), {}))) as log:
        answers = AnswerLog(out, shown_split(names), pairs.album.title, pairs.album.picture, resumed=False)
        record = partial(measure, world, model, pairs, names, log, answers, metrics)
        before = record("base", 0)
        apply_choice(tuner, choice, final, rows, log, world)
        after = record("tuned", plan.steps)
        metrics["difference"] = differences(before, after)
    folder.write_metrics(out, metrics, world)
    return train.write_results(final, world, model, out, metrics, partial(train.write_run_report, out, pairs, answers))


def final_settings(cfg: Config, choice: Choice, base: Projections, rows: FeatureSplit) -> Config:
    """Return the settings of the run on all pairs; for a closed form, those of one step that is none."""
    if choice.candidate.kind != "run":
        return replace(cfg, batch_size=len(rows), epochs=1)
    settings = run_settings(cfg, choice.candidate.rate, len(rows), loss_scale(base, rows))
    return replace(settings, interpolate=f"{choice.candidate.share:g}")


def apply_choice(tuner: Tuner, choice: Choice, final: Config, rows: FeatureSplit, log: Log, world: World) -> None:
    """Give the head its weights; the first rank computes them, so that their number changes nothing."""
    parameters = tuner.parts.trainable
    if world.is_main and choice.candidate.kind == "run":
        tuner.tune(final, rows, log)
    elif world.is_main:
        base = Projections(*(tuner.base[name] for name in PROJECTIONS))
        weights = candidate_weights(base, rows, final, tuner.parts.precision, [choice.candidate])[choice.candidate]
        tuned = dict(zip(PROJECTIONS, weights, strict=True))
        blend(parameters, tuned, tuned, 1.0)
    if world.size > 1:
        first = world.exchange({name: value.detach().cpu() for name, value in parameters.items()})[0]
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(first[name])


def measure(world: World, model: LoadedModel, pairs: Pairs, names: list[str], log: Log, answers: AnswerLog,
            metrics: dict[str, Any], when: str, step: int) -> Any:
    """Measure the splits `names` and keep scores and answers as those of the base or the tuned model."""
    splits = pairs.feature_splits(names)
    results = evaluate_splits(splits, model.head, world)
    metrics[when] = train.summaries(results)
    log.metrics(metrics[when], step)
    for name, result in results.items():
        if result.collapsed:
            log.say(f"warning: {name}: {result.collapsed}")
    if world.is_main:
        space, _ = embed_split(model.head.image, model.head.text, splits[answers.split].parts())
        answers.record(when, space, results[answers.split], log.board, step)
    return results
