#!/usr/bin/env python
"""thumbtune: fine-tune CLIP's projections on (thumbnail, title) pairs. One short function a command.

    rows --data.source--> data.cold: fetch, decode, towers once --> features --engine.train--> embeddings, loss, step
                                     eval.retrieval: Recall@K, triplet accuracy --> engine.log, eval.report
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.cli import parse
from engine.config import Config

if TYPE_CHECKING:
    import torch

    from data.cold import Reader
    from data.decode import ImageSpec
    from data.pairs import Encoders, Pairs
    from data.source import Rows
    from engine.checkpoint import Saver, State
    from engine.dist import World
    from engine.model import Head, Parts
    from engine.stop import Stop
    from engine.verify import Finding
    from eval.metrics import Retrieval


def open_parts(cfg: Config, world: World) -> Parts:
    """The CLIPModel taken apart, frozen by name, on this rank's device."""
    from engine.model import open_model

    parts = open_model(cfg.model, cfg.trainable, cfg.mode, cfg.scale, cfg.precision, world.device)
    world.say(parts.describe())
    return parts


def read_rows(cfg: Config) -> tuple[dict[str, Rows], list[dict[str, Any]]]:
    """The splits of --dataset, and ledger entries of what shards have lost."""
    from data.source import Columns, load_splits

    columns = Columns(cfg.image_column or None, cfg.title_column or None, cfg.negative_column or None)
    lost: list[dict[str, Any]] = []
    return load_splits(cfg.dataset, columns, cfg.seed, lost.append), lost


def reader(cfg: Config, spec: ImageSpec) -> Reader:
    """How this run turns an image reference into pixels."""
    from data.cold import Reader
    from data.fetch import FetchPolicy

    folder = Path(cfg.cache_dir).expanduser() / "fetched"
    policy = FetchPolicy(allow_hosts=cfg.allow_host, variants=cfg.variants)
    return Reader(folder, spec, policy, cfg.max_pixels, cfg.workers, cfg.retry_failed)


def open_data(cfg: Config, world: World, parts: Parts, only: str = "") -> Pairs:
    """Read the rows, run the cold pass with the towers' help, account for every row."""
    from data.batch import UserError
    from data.decode import ImageSpec
    from data.pairs import Team, open_pairs

    (rows, lost), wanted = read_rows(cfg), only or "train"
    if wanted not in rows:
        raise UserError(f"--dataset {cfg.dataset} has no split {wanted!r}; it has {', '.join(rows)}")
    spec = ImageSpec.from_processor(parts.clip.image_processor)
    team, cache = Team(world.rank, world.size, world.meet), Path(cfg.cache_dir).expanduser()
    pairs = open_pairs({only: rows[only]} if only else rows, lost, reader(cfg, spec),
                       encoders(parts, spec.fingerprint(), world.device), team, cache, cfg.max_bad,
                       cfg.mine_negatives, world.device, world.say)
    world.say(pairs.describe())
    return pairs


def encoders(parts: Parts, image_preprocessing: str, device: torch.device) -> Encoders:
    """Lend the towers to the data room: without autograd, in the run's precision, named by what they are."""
    from data.decode import tokenizer_fingerprint
    from data.pairs import Encoders
    from engine.towers import fingerprint, frozen

    towers, clip = parts.towers, parts.clip
    title_preprocessing = tokenizer_fingerprint(clip.tokenizer, clip.max_tokens)
    return Encoders(
        image=frozen(towers.image, device, parts.precision), image_width=clip.config.vision_config.hidden_size,
        text=frozen(towers.text, device, parts.precision), text_width=clip.config.text_config.hidden_size,
        image_space=fingerprint(towers.vision_model, image_preprocessing, parts.precision),
        text_space=fingerprint(towers.text_model, title_preprocessing, parts.precision),
        stored=parts.cached, tokenizer=clip.tokenizer, max_tokens=clip.max_tokens)


def measure(pairs: Pairs, head: Head, names: Sequence[str]) -> dict[str, Retrieval]:
    """Ranks and triplets of the named splits with the head as it is now."""
    import torch

    from eval.retrieval import measure_split

    residents = {name: split for name, split in pairs.residents().items() if name in names}
    return {name: measure_split(head.image, head.text, split.features(torch.arange(len(split))), split.image_row_N)
            for name, split in residents.items()}


def train(cfg: Config, world: World, stop: Stop) -> int:
    """Base metrics, the loop, tuned metrics, the exported model."""
    from engine import checkpoint, folder
    from engine.log import Log
    from engine.model import distribute
    from engine.profiler import profiler
    from engine.train import Plan, fit

    out, begun = folder.open_folder(cfg, world)
    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts)
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    saved = saver(cfg, world, out, parts, pairs)
    state = saved.resume(world.say) if begun else checkpoint.State()
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    log = Log(out, world, plan.steps_per_epoch, state.step)
    metrics = folder.read_json(out / "metrics.json") if state.step else {}

    @stop.at_once()  # what was trained is on the disk by then
    def evaluate(taken: int = 0) -> None:  # the step whose weights have been taken back, if any have
        ends = bool(taken) or state.step in (0, plan.steps)  # between the ends, only what is watched
        names = [name for name in pairs.splits if ends or name in ("train", "valid")]
        found = measure(pairs, parts.head, names)
        scores = {name: one.summarise() if ends else one.values() for name, one in found.items()}
        log.metrics(scores, taken or state.step)
        saved.note(state, scores)
        if ends:
            metrics["tuned" if state.step else "base"] = scores
            folder.write_metrics(out, metrics, world)

    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    model = distribute(parts.trained_model(), world.size)
    with closing(log), stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank) as trace:
        if not state.step or (state.evaluated < state.step and plan.due(state.step, cfg.eval_every)):
            evaluate()  # the base model; or what a signal or a crash has cut off
        fit(model, batches, saved.optimizer, plan, state, world, cfg, parts.precision, log=log, profiler=trace,
            evaluate=evaluate, checkpoint=saved.save, stop=partial(stop.agreed, world))
        if taken := saved.take_best(state, world.say):
            evaluate(taken)
    return finish(cfg, world, parts, out, metrics)


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
    return Saver(out, parts.trainable, adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay), identity, recipe,
                 order_digest(rows, cfg.batch_size, cfg.seed), cfg.keep, cfg.best_metric, cfg.patience, world)


def finish(cfg: Config, world: World, parts: Parts, out: Path, metrics: dict[str, Any]) -> int:
    """What a finished run leaves behind: the model folder, the table, and the digests of it all."""
    from engine import folder
    from engine.export import export
    from eval.report import table

    if world.is_main:
        export(parts.clip, out / "model", cfg, table(metrics), parts.trainable)
        folder.seal(out)
        print(table(metrics), flush=True)
        world.say(f"run folder {out}  model {out / 'model'}  (tensorboard --logdir {out.parent})")
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


def evaluate(cfg: Config, world: World, stop: Stop) -> int:
    """The metrics alone, for any CLIPModel."""
    from engine import folder
    from eval.report import table

    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts, only=cfg.split)
    scores = {cfg.split: measure(pairs, parts.head, [cfg.split])[cfg.split].summarise()}
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
    (rows, lost), out = read_rows(cfg), Path(cfg.out).expanduser()
    ledger = lost + pack(rows, reader(cfg, ImageSpec.clip()), out, cfg.resize, world.say)
    folder.write_ledger(out / "ledger.jsonl", ledger)
    refuse_if_too_bad(sum(map(len, rows.values())) + len(lost), ledger, cfg.max_bad)
    return 0


def check(cfg: Config, world: World, stop: Stop) -> int:
    """A look at all images and titles before any GPU time: one process."""
    from data.check import as_json, table
    from data.check import check as look_over
    from data.decode import ImageSpec

    if not world.is_main:
        return 0
    rows, lost = read_rows(cfg)
    findings = look_over(rows, reader(cfg, ImageSpec.clip()), world.say, lost)
    print(json.dumps(as_json(findings, rows), indent=2) if cfg.json else table(findings, rows))
    return int(cfg.strict and any(finding.severity == "error" for finding in findings))


def verify(cfg: Config, world: World, stop: Stop) -> int:
    """Check a run folder again, or the feature store; exit 1 when something is not what it was."""
    from data.batch import UserError
    from engine import verify as again
    from engine.folder import settings_of

    if not cfg.run:
        return verify_store(cfg, world)
    run = Path(cfg.run).expanduser()
    mine = {name: getattr(cfg, name) for name in ("device", "workers", "allow_host", "max_pixels")}  # not the folder's
    given = {name: getattr(cfg, name) for name in ("dataset", "model") if getattr(cfg, name)}
    old = replace(settings_of(run), cache_dir=cfg.cache_dir, **mine, **given)
    findings, whole = again.files(run)
    try:
        findings += retrace(old, world, run, list(whole))
    except UserError as error:  # data or base model gone
        findings.append(again.Finding("replay and metrics", again.UNCHECKED, str(error)))
    if world.is_main:
        print(again.table(findings), flush=True)
    return int(again.failed(findings))


def retrace(cfg: Config, world: World, run: Path, whole: Sequence[Path]) -> list[Finding]:
    """Train a few steps again from the base model and from a checkpoint; measure the exported model again."""
    from engine import verify as again
    from engine.checkpoint import State, load, state_of
    from engine.folder import read_json
    from engine.train import Plan

    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts)
    saved, logged = saver(cfg, world, run, parts, pairs), again.read_steps(run)
    findings = [again.steps(logged, Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs).rows_at),
                again.ledger(run, pairs.ledger), again.orders(whole, saved.order),
                again.replay(0, losses_from(State(), cfg, world, parts, pairs, saved), logged, parts.precision)]
    if earlier := [folder for folder in whole if int(folder.name[5:]) < max(logged, default=0)]:
        content = load(earlier[-1])
        changed, state = saved.restore(content), state_of(content[2])
        findings.append(again.Finding("data, model, recipe", again.FAILED, "; ".join(changed)) if changed else
                        again.replay(state.step, losses_from(state, cfg, world, parts, pairs, saved), logged,
                                     parts.precision))
    metrics = read_json(run / "metrics.json")
    findings.append(again.exported(run, whole, "interpolation" in metrics))
    if not (run / "model").exists():
        return findings
    tuned = replace(cfg, model=str(run / "model"))
    parts = open_parts(tuned, world)
    found = {name: one.summarise() for name, one in
             measure(open_data(tuned, world, parts), parts.head, list(metrics.get("tuned", {}))).items()}
    return [*findings, again.metrics(found, metrics.get("tuned", {}), again.same_machine(run, world))]


def losses_from(state: State, cfg: Config, world: World, parts: Parts, pairs: Pairs, saved: Saver) -> dict[int, float]:
    """The losses of the next few steps, trained again; nothing is written."""
    from engine.model import distribute
    from engine.profiler import Profiler
    from engine.train import Plan, fit
    from engine.verify import REPLAYED, Recorder

    recorder, end = Recorder(world), state.step + REPLAYED
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    fit(distribute(parts.trained_model(), world.size), pairs.batches("train", cfg.batch_size, cfg.seed, world.device),
        saved.optimizer, plan, state, world, cfg, parts.precision, log=recorder, profiler=Profiler(),
        evaluate=lambda: None, checkpoint=lambda _: None, stop=lambda step: int(step >= end))
    return recorder.losses


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


def heed(thread: threading.ExceptHookArgs) -> None:
    """Say what ended a thread, but not that a disk refused: TensorBoard's thread hands that on to the main one."""
    if not isinstance(thread.exc_value, OSError):
        threading.__excepthook__(thread)


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = parse("run.py", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from engine.stop import Stop

    stop = Stop()  # before torch is loaded, which takes a while
    threading.excepthook = heed
    from safetensors import SafetensorError  # which stands for what the disk said as well

    from data.batch import RunFailed, UserError
    from engine import dist

    functions = {"train": train, "demo": demo, "eval": evaluate, "shards": shards, "check": check,
                 "verify": verify}
    try:
        with dist.asking("averaging gradients"):  # what else ranks ask of one another says so itself
            return functions[command](cfg, dist.init(cfg.device, cfg.dist_timeout), stop)
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
