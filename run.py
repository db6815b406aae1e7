#!/usr/bin/env python
"""thumbtune: fine-tune CLIP's projections on (thumbnail, title) pairs. One short function a command.

    rows --data.source--> data.cold: fetch, decode, towers once --> features --engine.train--> embeddings, loss, step
                                     eval.retrieval: Recall@K, triplet accuracy --> engine.log, eval.report
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
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
    from engine.dist import World
    from engine.model import Head, Parts
    from engine.stop import Stop
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
    team, cache = Team(world.rank, world.size, world.exchange), Path(cfg.cache_dir).expanduser()
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
    from engine.finite import Finite
    from engine.model import distribute
    from engine.optim import Anchor, adamw
    from engine.profiler import profiler
    from engine.train import Plan, fit

    out = folder.open_folder(cfg, world)
    parts = open_parts(cfg, world)
    trained, anchor = parts.trained_model(cfg.micro_batch), Anchor(parts.trainable.values(), cfg.l2_sp)
    pairs = open_data(cfg, world, parts)
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    optimizer = adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay)
    saved = checkpoint.Saver(out, parts.trainable, optimizer, pairs.identity, cfg.keep, world)
    state = saved.resume(world.say) if cfg.resume else checkpoint.State()
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    log = Log(out, world, plan.steps_per_epoch, state.step)
    metrics = folder.read_json(out / "metrics.json") if state.step else {}

    def evaluate() -> None:
        ends = state.step in (0, plan.steps)  # between the ends, only what is watched
        names = [name for name in pairs.splits if ends or name in ("train", "valid")]
        found = measure(pairs, parts.head, names)
        scores = {name: one.summarise() if ends else one.values() for name, one in found.items()}
        log.metrics(scores, state.step)
        saved.note(state, scores)
        if ends:
            metrics["tuned" if state.step else "base"] = scores
            folder.write_metrics(out, metrics, world)

    if ("tuned" if state.step == plan.steps else "base") not in metrics:  # a signal may have cut the last one off
        evaluate()
    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    finite = Finite(out, trained, batches, partial(pairs.row_numbers, "train", cfg.batch_size, cfg.seed), world)
    model = distribute(trained, world.size)
    with stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank) as trace:
        fit(model, batches, optimizer, plan, state, world, cfg, parts.precision, log=log, profiler=trace,
            anchor=anchor, evaluate=evaluate, checkpoint=saved.save, watch=finite.watch, stop=partial(stop.agreed, world))
    log.close()
    return 128 + state.stopped if state.stopped else finish(cfg, world, parts, out, metrics)


def finish(cfg: Config, world: World, parts: Parts, out: Path, metrics: dict[str, Any]) -> int:
    """What a finished run leaves behind: the model folder and the table."""
    from engine.export import export
    from eval.report import table

    if world.is_main:
        export(parts.clip, out / "model", cfg, table(metrics), parts.trainable)
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


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = parse("run.py", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from data.batch import RunFailed, UserError
    from engine import dist
    from engine.stop import Stop

    stop, functions = Stop(), {"train": train, "demo": demo, "eval": evaluate, "shards": shards, "check": check}
    try:
        return functions[command](cfg, dist.init(cfg.device, cfg.dist_timeout), stop)
    except UserError as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # rank 0 has most likely met the same mistake and says it for all
        print(f"run.py {command}: {error}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as error:
        if not int(os.environ.get("RANK", 0)):
            print(f"run.py {command} failed: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:  # a full disk, a folder that went away: what was saved before is whole
        print(f"run.py {command} failed: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
