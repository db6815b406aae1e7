"""`run.py train`: base metrics, the loop, tuned metrics, the exported model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.identity import Overlap, describe_overlap, overlap
from data.pairs import Pairs, data_key
from data.prefetch import epoch_batches, order_digest
from data.store.feature_split import FeatureSplit
from engine.clip.model import LoadedModel, distribute
from engine.commands.common import evaluate_splits, load_model, open_data, open_probe, open_run, open_source, with_probe
from engine.config.cli import FREE_ON_RESUME
from engine.config.fields import Config, as_dict
from engine.config.recipes import fit_to_data
from engine.optim import adamw
from engine.publish.export import Origin, Tuned, export
from engine.publish.hub import push
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import checkpoint, folder
from engine.run_folder.board import WeightDrift, comparable_settings
from engine.run_folder.checkpoint import Saver, State
from engine.run_folder.log import Log
from engine.run_folder.nonfinite import NonfiniteGuard
from engine.run_folder.profiler import profiler
from engine.sweep.interpolate import interpolate, snapshot
from engine.train import Callbacks, Plan, Replica, fit
from eval.metrics import Retrieval
from eval.report.report import table, write_report
from eval.report.show import AnswerLog, shown_split
from eval.retrieval import differences, embed


def train(cfg: Config, world: World, stop: StopSignal) -> int:
    """Base metrics, the loop, tuned metrics, the exported model."""
    out, begun = open_run(cfg, world)
    source, probe = open_source(cfg, world), open_probe(cfg, world)  # a typo is said before a model loads
    parts = load_model(cfg, world)
    trained = parts.trained_model(cfg.micro_batch)
    pairs = with_probe(cfg, world, parts, open_data(cfg, world, parts, source), probe)
    cfg = fit_to_data(cfg, len(pairs.splits["train"]))
    names, plan = evaluated_splits(cfg, pairs), Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    saved = make_saver(cfg, world, out, parts, pairs, names)
    start, drift = snapshot(parts.trainable) if cfg.interpolate else {}, WeightDrift(parts.trainable)
    base = evaluate_splits(pairs.residents(), parts.head, names, world) if begun else {}  # before tuned weights return
    state = saved.resume(world.say) if begun else checkpoint.State()
    shared = find_overlap(pairs, world)
    folder.write_run_header(out, cfg, world, parts.precision, pairs.ledger)
    metrics = (folder.read_json(out / "metrics.json") if state.step else {}) | shared
    if state.step and "base" not in metrics:  # metrics.json was deleted
        metrics["base"] = {name: one.summarise() for name, one in base.items()}
    log = Log(out, world, plan.steps_per_epoch, plan.steps, state.step, drift, comparable_settings(cfg), metrics.get("base"))
    show = make_answer_log(out, pairs, names, resumed=state.step > 0)
    judge = Evaluator(pairs, names, parts, plan, state, saved, log, show, world, metrics, base)
    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    guard = nonfinite_guard(cfg, world, out, pairs, trained)
    replica = Replica(distribute(trained, world.size), saved.optimizer, world, parts.precision)
    with closing(log), stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank, log) as trace:
        evaluate = stop.at_once()(judge)  # what was trained is on the disk by then
        if not state.step or (state.evaluated < state.step and plan.due(state.step, cfg.eval_every)):
            evaluate()  # the base model; or what a signal or a crash has cut off
        callbacks = Callbacks(log, trace, evaluate, saved.save, partial(stop.agreed, world), guard.check)
        fit(replica, batches, plan, state, cfg, callbacks)
        if taken := saved.take_best(state, world.say):
            evaluate(taken)
        if cfg.interpolate and not state.stopped:
            apply_interpolation(cfg, judge, start)
            evaluate(taken or state.step)
    return write_results(cfg, world, parts, out, metrics, partial(write_run_report, out, pairs, show))


@dataclass
class Evaluator:
    """Measures the head and tells all who want to know: at both ends everything, between them only what is watched."""

    pairs: Pairs
    names: Sequence[str]  # of the splits to measure
    parts: LoadedModel
    plan: Plan
    state: State
    saved: Saver
    log: Log
    show: AnswerLog
    world: World
    metrics: dict[str, Any]  # what metrics.json holds
    base: Mapping[str, Retrieval]  # row by row, of the model that the run began with

    def __call__(self, taken: int = 0) -> None:
        """`taken` is the step whose weights have been put in place of the last ones, if any have."""
        step = self.state.step
        ends = bool(taken) or step in (0, self.plan.steps)
        residents = self.pairs.residents()
        watched = [name for name in self.names if name in ("train", "valid")]
        found = evaluate_splits(residents, self.parts.head, self.names if ends or not watched else watched, self.world)
        scores = {name: one.summarise() if ends else one.values() for name, one in found.items()}
        self.log.metrics(scores, taken or step)
        for name, one in found.items():
            if one.collapsed:
                self.log.say(f"warning: {name}: {one.collapsed}")
        self.saved.note(self.state, scores)
        if ends:
            self._keep(found, scores, residents[self.show.split])

    def _keep(self, found: Mapping[str, Retrieval], scores: dict[str, Any], shown: FeatureSplit) -> None:
        """What the run folder says of one end."""
        when = "tuned" if self.state.step else "base"
        self.metrics[when] = scores
        if when == "tuned":
            self.metrics["difference"] = differences(self.base, found)
        else:
            self.base = found
        folder.write_metrics(self.saved.run, self.metrics, self.world)
        if self.world.is_main:
            head = self.parts.head
            space, _ = embed(head.image, head.text, shown.parts())
            self.show.look(when, space, found[self.show.split], self.log.board, self.state.step)


def evaluated_splits(cfg: Config, pairs: Pairs) -> list[str]:
    """The splits that --eval-splits names and the probe, else all there are."""
    return [name for name in pairs.splits if name in (*cfg.eval_splits, "probe") or not cfg.eval_splits]


def find_overlap(pairs: Pairs, world: World) -> dict[str, Overlap]:
    """What metrics.json says of splits that share images or titles, nothing where none do; also said in one line."""
    shared = overlap(pairs.contents)
    if shared:
        world.say(describe_overlap(shared, {name: len(split) for name, split in pairs.splits.items()}))
    return {"overlap": shared} if shared else {}


def apply_interpolation(cfg: Config, judge: Evaluator, base: Mapping[str, torch.Tensor]) -> None:
    """Leave the parameters between base and tuned as --interpolate says; how valid (else train) and probe take it."""
    parts, names = judge.parts, judge.names
    watched = list(dict.fromkeys([next(name for name in ("valid", "train", *names) if name in names),
                                  *({"probe"} & set(names))]))

    def score() -> dict[str, dict[str, float]]:
        found = evaluate_splits(judge.pairs.residents(), parts.head, watched, judge.world)
        return {name: found[name].values() for name in watched}

    curve = interpolate(parts.trainable, base, cfg.interpolate, score, cfg.best_metric)
    judge.metrics["interpolation"] = curve
    judge.log.curve("interpolation", curve["curve"])


def nonfinite_guard(cfg: Config, world: World, out: Path, pairs: Pairs, trained: nn.Module) -> NonfiniteGuard:
    """Return the guard that ends a run whose gradients stay not finite, and names the rows to blame."""
    def rows(step: int) -> list[int]:
        train = pairs.splits["train"]
        return train.row_N[next(epoch_batches(len(train), cfg.batch_size, cfg.seed, 0, 1, step)).numpy()].tolist()

    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    return NonfiniteGuard(out, trained, batches, rows, world)


def make_answer_log(out: Path, pairs: Pairs, names: Sequence[str], resumed: bool) -> AnswerLog:
    """What people are shown of the model: answers about test, else valid."""
    return AnswerLog(out, shown_split(names), pairs.album.title, pairs.album.picture, resumed)


def write_run_report(out: Path, pairs: Pairs, show: AnswerLog) -> Path:
    """The before/after page of a run."""
    sizes = {name: len(split) for name, split in pairs.splits.items()}
    return write_report(out, show.split, sizes, show.answers, show.title, show.picture)


def make_saver(cfg: Config, world: World, out: Path, parts: LoadedModel, pairs: Pairs, names: Sequence[str]) -> Saver:
    """The optimizer, and what saves and resumes this run and knows what its checkpoints belong to: the rows of train
    and of the splits `names`, which are measured, among it.
    """
    rows = len(pairs.splits["train"])
    unused = {data_key(name) for name in pairs.splits if name not in ("train", *names)}
    known = {key: value for key, value in pairs.identity.items() if key not in unused}
    identity = {**known, "the precision": str(parts.precision), "the number of pairs": str(rows)}
    recipe = {key: value for key, value in as_dict(cfg).items() if key not in FREE_ON_RESUME}
    optimizer = adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp)
    return Saver(out, parts.trainable, optimizer, identity, recipe,
                 order_digest(rows, cfg.batch_size, cfg.seed), cfg.keep, cfg.best_metric, cfg.patience, world)


def write_results(cfg: Config, world: World, parts: LoadedModel, out: Path, metrics: dict[str, Any],
           write_page: Callable[[], Path] | None = None) -> int:
    """What a finished run leaves behind: the model folder, the page, the table, the digests of it all."""
    if world.is_main:
        tuned = Tuned(parts.trainable, Origin.of(cfg, parts.clip, parts.trainable, metrics))
        export(parts.clip, out / "model", tuned, table(metrics), cfg.license)
        page = f"report      {write_page()}\n" if write_page else ""
        folder.write_manifest(out)
        print(table(metrics), flush=True)
        world.say(f"run folder  {out}\nmodel       {out / 'model'}\n{page}"
                  f"TensorBoard tensorboard --logdir {out.parent}")
        if cfg.push_to_hub:
            push(out / "model", cfg, str(out), ["push_to_hub", "private"], world.say)
    return 0
