#!/usr/bin/env python
"""thumbtune: fine-tune CLIP's projections on (thumbnail, title) pairs. One short function a command.

    rows --data.source--> data.cold: fetch, decode, towers once --> features --engine.train--> embeddings, loss, step
                                     eval.retrieval: Recall@K, triplet accuracy --> engine.log, eval.report

The three rooms meet only here. In order: how things are opened; how they are measured; the commands, each with what
only it needs behind it: train, demo, sweep, eval, shards, check, search, export, verify; and `main`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli import parse
from engine.config import Config

if TYPE_CHECKING:
    import torch
    from torch import nn

    from data.cold import Reader
    from data.decode import ImageSpec
    from data.fetch import FetchPolicy
    from data.pairs import Encoders, Pairs
    from data.resident import Resident
    from data.source import Rows
    from engine.checkpoint import Saver, State
    from engine.dist import World
    from engine.log import Log
    from engine.model import Head, Parts
    from engine.stop import Stop
    from engine.train import Plan
    from engine.trials import Journal, Tuner
    from engine.verify import Finding
    from eval.metrics import Retrieval
    from eval.search import Found
    from eval.show import Show


# Opening: the model in parts, the rows, the pairs ready to train on


def open_parts(cfg: Config, world: World) -> Parts:
    """The CLIPModel taken apart, frozen by name, on this rank's device."""
    from engine.model import open_model

    parts = open_model(cfg.model, cfg.trainable, cfg.mode, cfg.scale, cfg.precision, world.device, cfg.augment,
                       cfg.gradient_checkpointing)
    world.say(parts.describe())
    return parts


def read_rows(cfg: Config, tell: Callable[[str], None] = lambda text: None) -> tuple[
        dict[str, Rows], list[dict[str, Any]]]:
    """The splits of --dataset, and ledger entries of what shards have lost; shards at an address are fetched first."""
    from data.source import Columns, load_splits

    def download(pattern: str) -> list[Path]:
        from data.remote import fetch_shards

        return fetch_shards(pattern, Path(cfg.cache_dir).expanduser() / "shards", fetch_policy(cfg), tell)

    columns = Columns(cfg.image_column or None, cfg.title_column or None, cfg.negative_column or None)
    lost: list[dict[str, Any]] = []
    return load_splits(cfg.dataset, columns, cfg.seed, lost.append, download), lost


def fetch_policy(cfg: Config) -> FetchPolicy:
    """What may be asked for over the network, and how."""
    from data.fetch import FetchPolicy

    return FetchPolicy(allow_hosts=cfg.allow_host, variants=cfg.variants)


def reader(cfg: Config, spec: ImageSpec) -> Reader:
    """How this run turns an image reference into pixels."""
    from data.cold import Reader

    folder = Path(cfg.cache_dir).expanduser() / "fetched"
    return Reader(folder, spec, fetch_policy(cfg), cfg.max_pixels, cfg.workers, cfg.retry_failed, cfg.augment)


def open_data(cfg: Config, world: World, parts: Parts, only: str = "") -> Pairs:
    """Read the rows, run the cold pass with the towers' help, account for every row."""
    from data.batch import UserError
    from data.decode import ImageSpec
    from data.pairs import Team, open_pairs

    (rows, lost), wanted = read_rows(cfg, world.say), only or "train"
    if wanted not in rows:
        raise UserError(f"--dataset {cfg.dataset} has no split {wanted!r}; it has {', '.join(rows)}")
    spec = ImageSpec.from_processor(parts.clip.image_processor)
    team, cache = Team(world.rank, world.size, world.meet), Path(cfg.cache_dir).expanduser()
    pairs = open_pairs({only: rows[only]} if only else rows, lost, reader(cfg, spec),
                       encoders(parts, spec.fingerprint(), world.device, cfg.compile), team, cache, cfg.max_bad,
                       cfg.mine_negatives, world.device, world.live)
    world.say(pairs.describe())
    return pairs


def encoders(parts: Parts, image_preprocessing: str, device: torch.device,
             compiled: str = "off") -> Encoders:
    """Lend the towers to the data room: without autograd, in the run's precision, named by what they are."""
    from data.decode import tokenizer_fingerprint
    from data.pairs import Encoders
    from engine.frozen import CPU_TITLES, Frozen
    from engine.towers import fingerprint

    towers, clip = parts.towers, parts.clip
    title_preprocessing = tokenizer_fingerprint(clip.tokenizer, clip.max_tokens)
    image, text = clip.config.vision_config, clip.config.text_config
    return Encoders(
        image=Frozen(towers.image, device, parts.precision, compiled), image_width=image.hidden_size,
        text=Frozen(towers.text, device, parts.precision, cpu_batch=CPU_TITLES), text_width=text.hidden_size,
        image_space=fingerprint(clip, "vision_model", image_preprocessing, parts.precision),
        text_space=fingerprint(clip, "text_model", title_preprocessing, parts.precision),
        stored=parts.stored, tokenizer=clip.tokenizer, max_tokens=clip.max_tokens)


# Measuring: the same head on any rows, and what a run remembers of it


def measure(residents: Mapping[str, Resident], head: Head, names: Collection[str],
            world: World | None = None) -> dict[str, Retrieval]:
    """Ranks and triplets of the named splits with the head as it is now; all ranks of a `world` share the work."""
    return {name: measure_rows(head, split, world) for name, split in residents.items() if name in names}


def measure_rows(head: Head, split: Resident, world: World | None = None) -> Retrieval:
    """Ranks and triplets of some rows."""
    from eval.retrieval import measure_split

    team = ((world.rank, world.size), world.sum) if world else ()
    return measure_split(head.image, head.text, split.parts(), *team)


def with_probe(cfg: Config, world: World, parts: Parts, pairs: Pairs) -> Pairs:
    """The pairs, and the test split of --probe beside them as a split of its own, only ever measured."""
    if not cfg.probe:
        return pairs
    other = replace(cfg, dataset=cfg.probe, image_column="", title_column="", negative_column="", mine_negatives="off")
    probe = open_data(other, world, parts, only="test")
    return replace(
        pairs, splits={**pairs.splits, "probe": probe.splits["test"]},
        ledger=[*pairs.ledger, *({**entry, "split": "probe"} for entry in probe.ledger)],
        residents=lambda: {**pairs.residents(), "probe": probe.residents()["test"]})


def open_run(cfg: Config, world: World) -> tuple[Path, bool]:
    """The run folder and whether it holds a run to go on with; first of all, whether the hub would take the model."""
    from engine.folder import open_folder
    from engine.hub import check_push

    if cfg.push_to_hub and world.is_main:
        check_push(cfg.push_to_hub, world.say)
    return open_folder(cfg, world)


def measured(cfg: Config, pairs: Pairs) -> list[str]:
    """The splits that --eval-splits names and the probe, else all there are."""
    from data.batch import UserError

    for name in cfg.eval_splits:
        if name not in pairs.splits:
            raise UserError(f"--eval-splits {name}: there is {', '.join(pairs.splits)}")
    return [name for name in pairs.splits if name in (*cfg.eval_splits, "probe") or not cfg.eval_splits]


@dataclass
class Judge:
    """Measures the head and tells all who want to know: at both ends everything, between them only what is watched."""

    pairs: Pairs
    names: Sequence[str]  # of the splits to measure
    parts: Parts
    plan: Plan
    state: State
    saved: Saver
    log: Log
    show: Show
    world: World
    metrics: dict[str, Any]  # what metrics.json holds
    base: Mapping[str, Retrieval]  # row by row, of the model that the run began with

    def __call__(self, taken: int = 0) -> None:
        """`taken` is the step whose weights have been put in place of the last ones, if any have."""
        step = self.state.step
        ends = bool(taken) or step in (0, self.plan.steps)
        residents = self.pairs.residents()
        watched = [name for name in self.names if name in ("train", "valid")]
        found = measure(residents, self.parts.head, self.names if ends or not watched else watched, self.world)
        scores = {name: one.summarise() if ends else one.values() for name, one in found.items()}
        self.log.metrics(scores, taken or step)
        self.saved.note(self.state, scores)
        if ends:
            self._keep(found, scores, residents[self.show.split])

    def _keep(self, found: Mapping[str, Retrieval], scores: dict[str, Any], shown: Resident) -> None:
        """What the run folder says of one end."""
        from engine import folder
        from eval.answers import embed
        from eval.retrieval import differences

        when = "tuned" if self.state.step else "base"
        self.metrics[when] = scores
        if when == "tuned":
            self.metrics["difference"] = differences(self.base, found)
        else:
            self.base = found
        folder.write_metrics(self.saved.run, self.metrics, self.world)
        if self.world.is_main:
            head = self.parts.head
            space = embed(head.image, head.text, shown.parts())
            self.show.look(when, space, self.log.board, self.state.step)


# The commands


def interpolated(cfg: Config, judge: Judge, base: Mapping[str, torch.Tensor]) -> None:
    """Leave the parameters between base and tuned as --interpolate says; how valid (else train) and probe take it."""
    from engine.interpolate import interpolate

    parts, names = judge.parts, judge.names
    watched = list(dict.fromkeys([next(name for name in ("valid", "train", *names) if name in names),
                                  *({"probe"} & set(names))]))

    def score() -> dict[str, dict[str, float]]:
        found = measure(judge.pairs.residents(), parts.head, watched, judge.world)
        return {name: found[name].values() for name in watched}

    curve = interpolate(parts.trainable, base, cfg.interpolate, score, cfg.best_metric)
    judge.metrics["interpolation"] = curve
    judge.log.curve("interpolation", curve["curve"])


def train(cfg: Config, world: World, stop: Stop) -> int:
    """Base metrics, the loop, tuned metrics, the exported model."""
    from engine import checkpoint, folder
    from engine.board import Drift, comparable
    from engine.interpolate import snapshot
    from engine.log import Log
    from engine.model import distribute
    from engine.profiler import profiler
    from engine.recipes import fitted
    from engine.train import Plan, fit

    (out, begun), parts = open_run(cfg, world), open_parts(cfg, world)
    trained = parts.trained_model(cfg.micro_batch)
    pairs = with_probe(cfg, world, parts, open_data(cfg, world, parts))
    cfg = fitted(cfg, len(pairs.splits["train"]))
    names, plan = measured(cfg, pairs), Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    saved = saver(cfg, world, out, parts, pairs)
    start, drift = snapshot(parts.trainable) if cfg.interpolate else {}, Drift(parts.trainable)
    base = measure(pairs.residents(), parts.head, names, world) if begun else {}  # before tuned weights return
    state = saved.resume(world.say) if begun else checkpoint.State()
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    metrics = folder.read_json(out / "metrics.json") if state.step else {}
    log = Log(out, world, plan.steps_per_epoch, plan.steps, state.step, drift, comparable(cfg), metrics.get("base"))
    show = open_show(out, pairs, names, resumed=state.step > 0)
    judge = Judge(pairs, names, parts, plan, state, saved, log, show, world, metrics, base)
    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    watch, model = watcher(cfg, world, out, pairs, trained), distribute(trained, world.size)
    with closing(log), stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank, log) as trace:
        evaluate = stop.at_once()(judge)  # what was trained is on the disk by then
        if not state.step or (state.evaluated < state.step and plan.due(state.step, cfg.eval_every)):
            evaluate()  # the base model; or what a signal or a crash has cut off
        fit(model, batches, saved.optimizer, plan, state, world, cfg, parts.precision, log=log, profiler=trace,
            evaluate=evaluate, checkpoint=saved.save, stop=partial(stop.agreed, world), watch=watch)
        if taken := saved.take_best(state, world.say):
            evaluate(taken)
        if cfg.interpolate and not state.stopped:
            interpolated(cfg, judge, start)
            evaluate(taken or state.step)
    return finish(cfg, world, parts, out, metrics, partial(report, out, pairs, show))


def watcher(cfg: Config, world: World, out: Path, pairs: Pairs,
            trained: nn.Module) -> Callable[[int, list[float]], None]:
    """What ends a run whose gradients stay not finite, and can name the rows to blame."""
    from data.prefetch import slices
    from engine.finite import Finite

    def rows(step: int) -> list[int]:
        train = pairs.splits["train"]
        return train.row_N[next(slices(len(train), cfg.batch_size, cfg.seed, 0, 1, step)).numpy()].tolist()

    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    return Finite(out, trained, batches, rows, world).watch


def open_show(out: Path, pairs: Pairs, names: Sequence[str], resumed: bool) -> Show:
    """What people are shown of the model: answers about test, else valid."""
    from eval.show import Show, shown_split

    return Show(out, shown_split(names), pairs.album.title, pairs.album.picture, resumed)


def report(out: Path, pairs: Pairs, show: Show) -> Path:
    """The before/after page of a run."""
    from eval.report import write_report

    sizes = {name: len(split) for name, split in pairs.splits.items()}
    return write_report(out, show.split, sizes, show.answers, show.title, show.picture)


def saver(cfg: Config, world: World, out: Path, parts: Parts, pairs: Pairs) -> Saver:
    """The optimizer, and what saves and resumes this run and knows what its checkpoints belong to."""
    from data.prefetch import order_digest
    from engine.checkpoint import Saver
    from engine.cli import FREE_ON_RESUME
    from engine.config import as_dict
    from engine.optim import adamw

    rows = len(pairs.splits["train"])
    identity = {**pairs.identity, "the precision": str(parts.precision), "the number of pairs": str(rows)}
    recipe = {key: value for key, value in as_dict(cfg).items() if key not in FREE_ON_RESUME}
    optimizer = adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp)
    return Saver(out, parts.trainable, optimizer, identity, recipe,
                 order_digest(rows, cfg.batch_size, cfg.seed), cfg.keep, cfg.best_metric, cfg.patience, world)


def finish(cfg: Config, world: World, parts: Parts, out: Path, metrics: dict[str, Any],
           write_page: Callable[[], Path] | None = None) -> int:
    """What a finished run leaves behind: the model folder, the page, the table, the digests of it all."""
    from engine import folder
    from engine.export import Origin, Tuned, export
    from engine.hub import push
    from eval.report import table

    if world.is_main:
        tuned = Tuned(parts.trainable, Origin.of(cfg, parts.clip, parts.trainable, metrics))
        export(parts.clip, out / "model", tuned, table(metrics), cfg.license)
        page = f"report      {write_page()}\n" if write_page else ""
        folder.seal(out)
        print(table(metrics), flush=True)
        world.say(f"run folder  {out}\nmodel       {out / 'model'}\n{page}"
                  f"TensorBoard tensorboard --logdir {out.parent}")
        if cfg.push_to_hub:
            push(out / "model", cfg, str(out), ["push_to_hub", "private"], world.say)
    return 0


def demo(cfg: Config, world: World, stop: Stop) -> int:
    """Draw thumbnails and titles, then tune the small model that ships with the project on them."""
    from data.demo import write_demo

    folder = Path(cfg.cache_dir).expanduser() / "demo"
    if world.is_main:
        world.say(f"drawing thumbnails into {folder}")
        write_demo(folder)
    world.barrier()
    return train(replace(cfg, dataset=str(folder)), world, stop)


def sweep(cfg: Config, world: World, stop: Stop) -> int:
    """Try settings by cross-validation over all rows but test's; retrain the best on them, and test that once."""
    from data.batch import UserError
    from data.folds import folds, join
    from data.resident import Resident
    from engine import folder
    from engine.sweep import configurations, named
    from engine.train import Plan
    from engine.trials import REPEAT, Journal, Run, Tuner
    from eval.leaderboard import judge, on_host

    tried = configurations(cfg)
    out, begun = open_run(cfg, world)
    parts = open_parts(cfg, world)
    if not parts.cached:
        raise UserError("sweep trains from stored features: only projections and logit_scale can be --trainable")
    pairs = open_data(cfg, world, parts)
    rows = join([split for name, split in pairs.residents().items() if name in ("train", "valid")])
    runs = [Run(seed, *fold) for seed in range(cfg.seed, cfg.seed + cfg.seeds * REPEAT, REPEAT)
            for fold in folds(rows, cfg.folds, seed)]
    for settings in tried:  # a batch too large for a fold is better said now
        Plan(min(len(run.train) for run in runs), replace(cfg, **settings).batch_size, 1)
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    journal = Journal(out, world, pairs.identity, cfg.best_metric, begun)
    todo = [settings for settings in tried if not journal.known(settings)]
    tuner, held_out = Tuner(parts, Resident.batches), lambda rows: on_host(measure_rows(parts.head, rows))
    base, began = tuner.cross_validate(None, runs, held_out, world), time.monotonic()
    with stop.gracefully():
        for done, settings in enumerate(todo, start=1):
            found = tuner.cross_validate(replace(cfg, **settings), runs, held_out, world)
            score = journal.add(settings, judge(found, base, len(rows), cfg.best_metric))
            speed = done * len(runs) / (time.monotonic() - began) * 60
            world.say(f"{done}/{len(todo)}  {cfg.best_metric} {score:.4f}  ({named(settings)})  {speed:,.0f} runs/min")
            if stop.agreed(world, done):
                world.say(f"stopped; run.py sweep --resume --out {out} goes on from what sweep.jsonl holds")
                break
    return conclude(cfg, world, tuner, pairs, rows, journal, out)


def conclude(cfg: Config, world: World, tuner: Tuner, pairs: Pairs, rows: Resident, journal: Journal,
             out: Path) -> int:
    """Retrain the winner on all rows but test's, measure it there once; leaderboard, recipe and model."""
    from engine import folder
    from engine.sweep import named
    from eval.leaderboard import leaderboard
    from eval.retrieval import differences

    lines, best = journal.ranked(), replace(cfg, **journal.ranked()[0]["settings"])
    tuner.reset()
    before = measure(pairs.residents(), tuner.parts.head, ["test"])
    tuner.tune(best, rows)
    after = measure(pairs.residents(), tuner.parts.head, ["test"])
    metrics: dict[str, Any] = {when: {name: one.summarise() for name, one in found.items()}
                               for when, found in (("base", before), ("tuned", after))}
    metrics["difference"] = differences(before, after)
    folder.write_metrics(out, metrics, world)
    if world.is_main:
        journal.conclude(out, cfg)
        print(leaderboard(lines[:10], [named(line["settings"]) for line in lines[:10]], cfg.best_metric) + "\n")
        world.say(f"winner: {named(lines[0]['settings'])}  (run.py --config {out / 'recipe.toml'})")
    return finish(best, world, tuner.parts, out, metrics)


def evaluate(cfg: Config, world: World, stop: Stop) -> int:
    """The metrics alone, for any CLIPModel."""
    from engine import folder
    from eval.report import table

    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts, only=cfg.split)
    scores = {cfg.split: measure(pairs.residents(), parts.head, [cfg.split], world)[cfg.split].summarise()}
    if world.is_main:
        world.say(table({parts.clip.name: scores}))
        print(json.dumps(scores, indent=2))
        if cfg.out:
            folder.write_json(Path(cfg.out) / "metrics.json", scores)
            folder.write_ledger(Path(cfg.out) / "ledger.jsonl", pairs.ledger)
    return 0


def shards(cfg: Config, world: World, stop: Stop) -> int:
    """Any dataset as tar shards: one process, resumable."""
    from data.batch import UserError
    from data.catalogue import refuse_if_too_bad
    from data.decode import ImageSpec
    from data.pack import pack
    from engine import folder

    if not world.is_main:
        return 0
    if not cfg.out:
        raise UserError("shards needs a folder to write to: --out DIR")
    (rows, lost), out = read_rows(cfg, world.say), Path(cfg.out).expanduser()
    ledger = lost + pack(rows, reader(cfg, ImageSpec.clip()), out, cfg.resize, world.say)
    folder.write_ledger(out / "ledger.jsonl", ledger)
    refuse_if_too_bad(sum(map(len, rows.values())) + len(lost), ledger, cfg.max_bad)
    return 0


def check(cfg: Config, world: World, stop: Stop) -> int:
    """A look at all images and titles before any GPU time: one process."""
    from data.check import check as look_over
    from data.decode import ImageSpec
    from data.findings import as_json, table

    if not world.is_main:
        return 0
    rows, lost = read_rows(cfg, world.say)
    findings, usable = look_over(rows, reader(cfg, ImageSpec.clip()), world.say, lost)
    counts = {name: len(split) for name, split in rows.items()}
    print(json.dumps(as_json(findings, counts, usable), indent=2) if cfg.json
          else table(findings, counts, usable, len(lost)))
    return int(cfg.strict and any(finding.severity == "error" for finding in findings))


def search(cfg: Config, world: World, stop: Stop) -> int:
    """The best thumbnails for titles, or the best titles for a picture: one process, from stored features."""
    from data import gallery
    from engine.folder import write_text
    from eval.search import as_json, as_text
    from eval.search_page import page

    if not world.is_main:
        return 0
    titles = gallery.read_queries(cfg.query, cfg.queries, cfg.image)
    splits, results, look = find(cfg, world, titles)
    place = os.path.abspath(cfg.dataset)
    if cfg.html:
        shown = {(answer.split, answer.row) for found in results for answer in found.answers}
        previews = gallery.pictures(splits, shown, cfg.image, look)
        write_text(Path(cfg.html).expanduser(), page(place, results, previews))
    print(json.dumps(as_json(results), indent=2) if cfg.json else as_text(results, place), flush=True)
    return 0


def find(cfg: Config, world: World, titles: Sequence[str]) -> tuple[dict[str, Rows], list[Found], Reader]:
    """Answers to `titles`, or to --image where there are none."""
    import torch

    from data import gallery
    from data.decode import ImageSpec
    from engine.model import open_model
    from eval.search import found, top_k

    splits = gallery.choose(read_rows(cfg, world.say)[0], cfg.split, cfg.dataset)
    parts = open_model(cfg.model, cfg.trainable, "cached", cfg.scale, cfg.precision, world.device)
    spec, cache, head = ImageSpec.from_processor(parts.clip.image_processor), Path(cfg.cache_dir), parts.head
    look, towers = reader(cfg, spec), encoders(parts, spec.fingerprint(), world.device)
    project: Callable[[torch.Tensor], torch.Tensor]
    with torch.no_grad():
        if titles:
            asked = head.text(gallery.title_features(titles, towers).to(world.device))
            shelf, project = gallery.open_images(splits, look, towers, cache.expanduser(), world.say), head.image
        else:
            asked = head.image(gallery.image_features(cfg.image, look, towers).to(world.device))
            shelf, project = gallery.open_titles(splits, towers, cache.expanduser()), head.text
        best = top_k(asked, lambda start, stop: project(shelf.chunk(start, stop).to(world.device)), len(shelf), cfg.top)
    return splits, found(titles, cfg.image, *best, shelf.item), look


def export(cfg: Config, world: World, stop: Stop) -> int:
    """A run, or its projections alone, as a Hugging Face folder, and to the hub: one process."""
    from engine.handing import hand_on
    from eval.report import table

    if world.is_main:
        hand_on(cfg, table, world.say)
    return 0


def verify(cfg: Config, world: World, stop: Stop) -> int:
    """Check a run folder again, or the feature store; exit 1 when something is not what it was."""
    from data.batch import UserError
    from engine import verify as again
    from engine.folder import settings_of

    if not cfg.run:
        return verify_store(cfg, world)
    run = Path(cfg.run).expanduser()
    if (run / "sweep.jsonl").exists():
        raise UserError(f"--run {run} is a sweep's folder and has no steps; train with --config {run}/recipe.toml and "
                        "verify that run")
    mine = {name: getattr(cfg, name) for name in ("device", "workers", "allow_host", "max_pixels")}  # not the folder's
    given = {name: getattr(cfg, name) for name in ("dataset", "model") if getattr(cfg, name)}
    old = replace(settings_of(run), cache_dir=cfg.cache_dir, **mine, **given)
    findings, whole = again.files(run)
    findings.append(again.exported(run, whole))
    try:
        findings += rerun(old, world, run, whole)
    except UserError as error:  # data or base model gone
        findings.append(again.Finding("replay and metrics", again.UNCHECKED, str(error)))
    if world.is_main:
        print(again.table(findings), flush=True)
    return int(again.failed(findings))


def rerun(cfg: Config, world: World, run: Path, whole: Sequence[Path]) -> list[Finding]:
    """Train a few steps again, and measure the exported model again."""
    from engine import verify as again
    from engine.folder import read_json
    from engine.retrace import retrace
    from engine.train import Plan

    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts)
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    findings = retrace(cfg, world, run, whole, parts, saver(cfg, world, run, parts, pairs), plan, pairs.ledger,
                       pairs.batches("train", cfg.batch_size, cfg.seed, world.device))
    if not (run / "model").exists():
        return findings
    written, tuned = read_json(run / "metrics.json").get("tuned", {}), replace(cfg, model=str(run / "model"))
    parts = open_parts(tuned, world)
    found = measure(with_probe(tuned, world, parts, open_data(tuned, world, parts)).residents(), parts.head, written)
    scores = {name: one.summarise() for name, one in found.items()}
    exact = again.same_machine(run, world) and not any(finding.apart for finding in findings)
    return [*findings, again.metrics(scores, written, exact)]


def verify_store(cfg: Config, world: World) -> int:
    """Read the feature store again; with --prune, delete what is not --model's."""
    from data.decode import ImageSpec
    from data.upkeep import describe, look_over, tidy

    if not world.is_main:
        return 0
    cache, keep = Path(cfg.cache_dir).expanduser(), set[str]()
    found = look_over(cache)
    print(describe(found))
    if cfg.prune and cfg.model:
        parts = open_parts(cfg, world)
        towers = encoders(parts, ImageSpec.from_processor(parts.clip.image_processor).fingerprint(), world.device)
        keep = {towers.image_space, towers.text_space}
    if cfg.prune:
        kept = sorted(keep & {space.name for space in found})
        print(f"pruned {tidy(cache, keep) / 1e6:,.1f} MB; kept {', '.join(kept) or 'nothing'}")
    return int(any(space.damaged for space in found))


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = parse("run.py", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from engine.stop import Stop

    stop = Stop()  # before torch is loaded, which takes a while
    from safetensors import SafetensorError  # which stands for what the disk said as well

    from data.batch import RunFailed, UserError
    from engine import dist

    functions = {"train": train, "demo": demo, "eval": evaluate, "shards": shards, "check": check, "search": search,
                 "export": export, "sweep": sweep, "verify": verify}
    try:
        with dist.asking("averaging gradients"):  # what else ranks ask of one another says so itself
            return functions[command](cfg, dist.init(cfg.device, cfg.dist_timeout, cfg.quiet), stop)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return dist.leave(141)
    except (UserError, RunFailed, OSError, SafetensorError) as error:  # the last two: a full disk, a folder gone
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # rank 0 has most likely met the same and says it for all
        mistake = isinstance(error, UserError)
        print(f"run.py {command}{'' if mistake else ' failed'}: {error}", file=sys.stderr, flush=True)
        return dist.leave(2 if mistake else 1)
    except SystemExit as signalled:
        return dist.leave(int(signalled.code or 0))
    finally:
        dist.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
