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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import config as settings
from engine.config import Config

if TYPE_CHECKING:
    import torch

    from data.pairs import Encoders, Pairs
    from engine.dist import World
    from engine.model import Head
    from engine.stop import Stop
    from engine.towers import Clip, Towers
    from eval.metrics import Retrieval

HERE = Path(__file__).resolve().parent
DEMO_MODEL = HERE / "data" / "demo_model"
DATA = ["dataset", "image_column", "title_column", "negative_column", "allow_host", "max_bad", "max_pixels"]
MACHINE = ["device", "precision", "workers", "dist_timeout"]
TRAIN = [name for name in settings.config_fields() if name != "split"]
COMMANDS = {  # name -> (what it does, its settings, the defaults that differ)
    "train": ("tune a model on pairs; the default", TRAIN, {}),
    "demo": ("tune a small model on drawn thumbnails: offline, under two minutes",
             [name for name in TRAIN if name not in DATA and name != "model"],
             {"model": str(DEMO_MODEL), "epochs": 30, "batch_size": 64, "lr": 1e-3, "log_every": 50}),
    "eval": ("the metrics of any CLIPModel on one split: a table on stderr, JSON on stdout",
             ["model", "split", "out", "cache_dir", *DATA, *MACHINE], {}),
}


@dataclass(frozen=True)
class Parts:
    """A loaded model taken apart: what stays frozen, what is tuned, and where they run."""

    clip: Clip
    towers: Towers
    head: Head
    trainable: dict[str, torch.nn.Parameter]
    cached: bool
    precision: torch.dtype


def open_model(cfg: Config, world: World) -> Parts:
    """Load the CLIPModel, freeze it by name, put it on this rank's device."""
    from engine.model import Head
    from engine.towers import Towers, describe_trainable, freeze, load_clip, pick_mode, pick_precision

    clip = load_clip(cfg.model)
    trainable = freeze(clip.model, cfg.trainable)
    towers, head = Towers(clip).to(world.device), Head(clip, cfg.scale).to(world.device)
    say(world, describe_trainable(clip.model, trainable))
    precision = pick_precision(cfg.precision, world.device)
    return Parts(clip, towers, head, trainable, pick_mode(cfg.mode, trainable), precision)


def open_data(cfg: Config, world: World, parts: Parts, only: str = "") -> Pairs:
    """Read the rows, run the cold pass with the towers' help, account for every row."""
    from data.batch import UserError
    from data.cold import Reader
    from data.decode import ImageSpec
    from data.fetch import FetchPolicy
    from data.pairs import Team, open_pairs
    from data.source import Columns, load_splits

    rows = load_splits(cfg.dataset, Columns(cfg.image_column or None, cfg.title_column or None,
                                            cfg.negative_column or None), cfg.seed)
    wanted = only or "train"
    if wanted not in rows:
        raise UserError(f"--dataset {cfg.dataset} has no split {wanted!r}; it has {', '.join(rows)}")
    cache = Path(cfg.cache_dir).expanduser()
    spec = ImageSpec.from_processor(parts.clip.image_processor)
    reader = Reader(cache / "fetched", spec, FetchPolicy(allow_hosts=cfg.allow_host), cfg.max_pixels, cfg.workers)
    pairs = open_pairs({only: rows[only]} if only else rows, reader, encoders(parts, spec.fingerprint(), world.device),
                       Team(world.rank, world.size, world.exchange), cache, cfg.max_bad, world.device,
                       partial(say, world))
    say(world, f"pairs: {', '.join(f'{name} {len(split):,}' for name, split in pairs.splits.items())}; "
               f"{len(pairs.ledger):,} rows dropped{' (see ledger.jsonl)' if pairs.ledger else ''}")
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
    return {name: measure_split(head.image, head.text, split.features(torch.arange(len(split), device=split.device)),
                                split.image_row_N) for name, split in residents.items()}


def train(cfg: Config, world: World, stop: Stop) -> int:
    """Base metrics, the loop, tuned metrics, the exported model."""
    from engine import checkpoint, folder
    from engine.log import Log
    from engine.model import Streamed, distribute
    from engine.optim import adamw
    from engine.profiler import profiler
    from engine.train import Plan, State, fit

    out = folder.open_folder(cfg, world)
    parts = open_model(cfg, world)
    pairs = open_data(cfg, world, parts)
    plan, state = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs), State()
    optimizer = adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay)
    saved = checkpoint.Saver(out, parts.trainable, optimizer, pairs.identity, cfg.keep, world)
    if cfg.resume:
        saved.resume(state, partial(say, world))
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    log = Log(out, world, plan.steps_per_epoch, state.step)
    metrics = folder.read_json(out / "metrics.json") if state.step else {}

    def evaluate() -> None:
        ends = state.step in (0, plan.steps)  # between the ends, only what is watched
        names = [name for name in pairs.splits if ends or name in ("train", "valid")]
        scores = {name: found.summarise() for name, found in measure(pairs, parts.head, names).items()}
        log.metrics(scores, state.step)
        saved.note(state, scores)
        if ends:
            metrics["tuned" if state.step else "base"] = scores
            folder.write_metrics(out, metrics, world)

    if "base" not in metrics:
        evaluate()
    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    model = distribute(parts.head if parts.cached else Streamed(parts.towers, parts.head), world.size)
    with stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank) as trace:
        fit(model, batches, optimizer, plan, state, world, cfg, parts.precision, log=log, profiler=trace,
            evaluate=evaluate, checkpoint=saved.save, stop=partial(stop.agreed, world))
    log.close()
    return 128 + state.stopped if state.stopped else finish(cfg, world, parts, out, metrics)


def finish(cfg: Config, world: World, parts: Parts, out: Path, metrics: dict[str, Any]) -> int:
    """What a finished run leaves behind: the model folder and the table."""
    from engine.export import export
    from eval.report import table

    if world.is_main:
        export(parts.clip, out / "model", cfg, table(metrics), parts.trainable)
        print(table(metrics), flush=True)
        say(world, f"run folder {out}  model {out / 'model'}  (tensorboard --logdir {out.parent})")
    return 0


def demo(cfg: Config, world: World, stop: Stop) -> int:
    """Draw thumbnails and titles, then tune the small model that ships with the project on them."""
    from data.demo import write_demo

    folder = Path(cfg.cache_dir).expanduser() / "demo"
    if world.is_main and not (folder / "test.csv").exists():
        say(world, f"drawing thumbnails into {folder}")
        write_demo(folder)
    world.barrier()
    return train(replace(cfg, dataset=str(folder), out=cfg.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"),
                 world, stop)


def evaluate(cfg: Config, world: World, stop: Stop) -> int:
    """The metrics alone, for any CLIPModel."""
    from engine import folder
    from eval.report import table

    parts = open_model(cfg, world)
    pairs = open_data(cfg, world, parts, only=cfg.split)
    scores = {cfg.split: measure(pairs, parts.head, [cfg.split])[cfg.split].summarise()}
    if world.is_main:
        say(world, table({parts.clip.name: scores}))
        print(json.dumps(scores, indent=2))
        if cfg.out:
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            folder.write_json(Path(cfg.out) / "metrics.json", scores)
            folder.write_ledger(Path(cfg.out) / "ledger.jsonl", pairs.ledger)
    return 0


def say(world: World, text: str) -> None:
    """One line for people on stderr, from rank 0."""
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = settings.parse("run.py", arguments, COMMANDS, "train")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from data.batch import UserError
    from engine import dist
    from engine.stop import Stop

    stop, functions = Stop(), {"train": train, "demo": demo, "eval": evaluate}
    rank = int(os.environ.get("RANK", 0))
    try:
        return functions[command](cfg, dist.init(cfg.device, cfg.dist_timeout), stop)
    except UserError as error:
        if rank:
            time.sleep(2)  # rank 0 has most likely met the same mistake and says it for all
        print(f"run.py {command}: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        dist.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
