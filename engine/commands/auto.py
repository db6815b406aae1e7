"""`run.py train --recipe auto`: choose by cross-validation how to tune, tune once on all pairs, measure test once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
from engine.run_folder.verification import FAILED, OK, UNCHECKED, Finding
from engine.sweep.batched import PROJECTIONS, Projections
from engine.sweep.choose import CANDIDATES, Choice, candidate_weights, choose, loss_scale, run_settings, split_pairs
from engine.sweep.interpolate import blend
from engine.sweep.trials import Tuner
from eval.metrics import Retrieval
from eval.report.show import AnswerLog, shown_split
from eval.retrieval import differences

TUNED_ON = ("train", "valid")


def train_auto(cfg: Config, world: World, out: Path, model: LoadedModel, pairs: Pairs) -> int:
    """Choose a way to tune on train and valid, apply it to all of them, and measure the other splits before and after.

    Raises UserError where the pairs or what trains do not allow it.
    """
    family = model.clip.family
    if family.projections != PROJECTIONS:
        raise UserError(f"--recipe auto tunes projections without a bias, which {family.model_class} has none of; use "
                        "--recipe reference")
    if not model.cached or {*model.trainable} != {*PROJECTIONS}:
        raise UserError("--recipe auto tunes both projections from stored features; leave out what makes towers run or "
                        "other parameters train, or use --recipe reference")
    names = [name for name in pairs.splits if name not in TUNED_ON]
    if not names:
        raise UserError("--recipe auto tunes on train and valid and measures test, and there is no other split; name "
                        "one, such as --splits train=train,test=valid")
    if folder.is_complete(out, as_dict(cfg, "train"), world):
        return train.repeat_results(world, out)
    rows = tuned_rows(pairs)
    tuner = Tuner(model, FeatureSplit.batches)
    metrics: dict[str, Any] = train.find_overlap(pairs, world) | train.named_classes(pairs)
    folder.write_run_header(out, as_dict(cfg, "train"), world, model.precision, pairs.ledger)

    choice, final = choose_settings(cfg, world, tuner, rows)
    metrics["auto"] = choice.as_json(final)
    plan = Plan(len(rows), final.batch_size, final.epochs)
    # Rank 0 trains alone, so its log asks no other rank for a share of the loss.
    with closing(Log(out, world.alone(), plan, State(), WeightDrift(model.trainable),
                     Reference(comparable_settings(final), {}))) as log:
        answers = AnswerLog(out, shown_split(names), pairs.album.title, pairs.album.picture)
        recorder = Recorder(world, model, pairs, names, log, answers)
        before = recorder.measure("base", 0)
        apply_choice(tuner, choice, final, rows, world, log)
        after = recorder.measure("tuned", plan.steps)
    metrics |= {**recorder.scores, "difference": differences(before, after)}
    folder.write_metrics(out, metrics, world)
    return train.write_results(final, world, model, out, metrics, partial(train.write_run_report, out, pairs, answers))


def tuned_rows(pairs: Pairs) -> FeatureSplit:
    """Return the rows of train and valid."""
    names = [name for name in TUNED_ON if name in pairs.splits]
    return concatenate([*pairs.feature_splits(names).values()])


def choose_settings(cfg: Config, world: World, tuner: Tuner, rows: FeatureSplit) -> tuple[Choice, Config]:
    """Return the choice for `rows`, and the settings of the run on all of them; say what was tried and chosen."""
    base = tuner.base_projections()
    parts = len(split_pairs(rows, cfg.seed))
    world.say(f"auto: {len(CANDIDATES)} candidates, {len(rows):,} pairs of train and valid, held out in {parts} parts")
    choice = choose(base, rows, cfg, tuner.model.precision, world)
    world.say(f"auto: {choice.describe()}")
    return choice, final_settings(cfg, choice, base, rows)


def recompute(cfg: Config, world: World, run: Path, model: LoadedModel, pairs: Pairs) -> Finding:
    """Choose and tune again as the run in `run` did, and compare the weights with the exported ones."""
    rows, tuner = tuned_rows(pairs), Tuner(model, FeatureSplit.batches)
    choice, final = choose_settings(cfg, world, tuner, rows)
    apply_choice(tuner, choice, final, rows, world)
    try:
        exported = load_file(run / "model" / "projections.safetensors")
    except (OSError, SafetensorError) as error:
        return Finding("choice and weights", UNCHECKED, str(error))
    difference = 0.0
    for name, weight in model.trainable.items():
        largest = float((weight.detach().cpu().float() - exported[name]).abs().max())
        # In units of the weights' standard deviation, so that one limit serves models of any scale.
        difference = max(difference, largest / float(exported[name].std()))
    detail = f"{choice.candidate.describe()}; largest difference of a weight {difference:.2g} of their deviation"
    same = difference <= (1e-3 if model.precision == torch.float32 else 1e-1)
    return Finding("choice and weights", OK if same else FAILED, detail, difference)


def final_settings(cfg: Config, choice: Choice, base: Projections, rows: FeatureSplit) -> Config:
    """Return the settings of the run on all pairs; for a closed form, those of one step, which is not taken."""
    if choice.candidate.kind != "run":
        # The log and config.json state a number of steps: one step over all rows stands for the closed form.
        return replace(cfg, batch_size=len(rows), epochs=1)
    settings = run_settings(cfg, choice.candidate.rate, len(rows), loss_scale(base, rows))
    return replace(settings, interpolate=f"{choice.candidate.share:g}")


def apply_choice(tuner: Tuner, choice: Choice, final: Config, rows: FeatureSplit, world: World,
                 log: Log | None = None) -> None:
    """Give the head its weights; rank 0 computes them, so the number of ranks changes nothing."""
    parameters = tuner.model.trainable
    if world.is_main and choice.candidate.kind == "run":
        tuner.tune(final, rows, log)
    elif world.is_main:
        weights = candidate_weights(tuner.base_projections(), rows, final, tuner.model.precision, choice.candidate)
        tuned = dict(zip(PROJECTIONS, weights, strict=True))
        blend(parameters, tuned, tuned, 1.0)
    if world.size > 1:
        on_host = {name: value.detach().cpu() for name, value in parameters.items()}
        weights_of_rank_0 = world.exchange(on_host)[0]
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(weights_of_rank_0[name])


@dataclass(frozen=True)
class Recorder:
    """Measures the splits `names`, and keeps their scores and the answers that people are shown."""

    world: World
    model: LoadedModel
    pairs: Pairs
    names: Sequence[str]
    log: Log
    answers: AnswerLog
    scores: dict[str, Any] = field(default_factory=dict)  # entries of metrics.json

    def measure(self, when: str, step: int) -> Mapping[str, Retrieval]:
        """Measure the model as it is, base or tuned, and return its ranks by split."""
        splits = self.pairs.feature_splits(self.names)
        results = evaluate_splits(splits, self.model.head, self.world)
        self.scores[when] = train.summaries(results)
        self.log.metrics(self.scores[when], step)
        train.warn_of_collapse(self.log, results)
        if self.world.is_main:
            shown = self.answers.split
            space = train.embed_shown(self.model, splits[shown])
            self.answers.record(when, space, results[shown], self.log.board, step)
        return results
