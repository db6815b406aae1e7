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
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from engine.cli import parse
from engine.config import Config

if TYPE_CHECKING:
    import torch

    from data.cold import Reader
    from data.decode import ImageSpec
    from data.fetch import FetchPolicy
    from data.pairs import Encoders, Pairs
    from data.resident import Resident
    from data.source import Rows
    from engine.checkpoint import Saver
    from engine.dist import World
    from engine.model import Head, Parts
    from engine.stop import Stop
    from eval.metrics import Retrieval
    from eval.search import Found
    from eval.show import Show


def open_parts(cfg: Config, world: World) -> Parts:
    """The CLIPModel taken apart, frozen by name, on this rank's device."""
    from engine.model import open_model

    parts = open_model(cfg.model, cfg.trainable, cfg.mode, cfg.scale, cfg.precision, world.device)
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
    return Reader(folder, spec, fetch_policy(cfg), cfg.max_pixels, cfg.workers, cfg.retry_failed)


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
                       encoders(parts, spec.fingerprint(), world.device), team, cache, cfg.max_bad,
                       cfg.mine_negatives, world.device, world.live)
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


def measure(residents: Mapping[str, Resident], head: Head, names: Sequence[str]) -> dict[str, Retrieval]:
    """Ranks and triplets of the named splits with the head as it is now."""
    from eval.retrieval import measure_split

    return {name: measure_split(head.image, head.text, split.features(split.rows()), split.image_row_N)
            for name, split in residents.items() if name in names}


def train(cfg: Config, world: World, stop: Stop) -> int:
    """Base metrics, the loop, tuned metrics, the exported model."""
    from engine import checkpoint, folder
    from engine.hub import check_push
    from engine.log import Drift, Log
    from engine.model import distribute
    from engine.profiler import profiler
    from engine.train import Plan, fit
    from eval.answers import embed
    from eval.show import Show, shown_split

    if cfg.push_to_hub and world.is_main:
        check_push(cfg.push_to_hub, world.say)
    out, begun = folder.open_folder(cfg, world)
    parts = open_parts(cfg, world)
    pairs = open_data(cfg, world, parts)
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    saved = saver(cfg, world, out, parts, pairs)
    drift = Drift(parts.trainable)  # from the base model, so before a resume
    state = saved.resume(world.say) if begun else checkpoint.State()
    folder.begin(out, cfg, world, parts.precision, pairs.ledger)
    metrics = folder.read_json(out / "metrics.json") if state.step else {}
    log = Log(out, world, plan.steps_per_epoch, plan.steps, state.step, drift, metrics.get("base"))
    show = Show(out, shown_split(pairs.splits), pairs.album.title, pairs.album.picture, resumed=state.step > 0)

    @stop.at_once()  # what was trained is on the disk by then
    def evaluate(taken: int = 0) -> None:  # the step whose weights have been taken back, if any have
        ends = bool(taken) or state.step in (0, plan.steps)  # between the ends, only what is watched
        names = [name for name in pairs.splits if ends or name in ("train", "valid")]
        residents = pairs.residents()
        found = measure(residents, parts.head, names)
        scores = {name: one.summarise() if ends else one.values() for name, one in found.items()}
        log.metrics(scores, taken or state.step)
        saved.note(state, scores)
        if ends:
            when, split = "tuned" if state.step else "base", residents[show.split]
            metrics[when] = scores
            folder.write_metrics(out, metrics, world)
            if world.is_main:
                space = embed(parts.head.image, parts.head.text, split.features(split.rows()), split.image_row_N)
                show.look(when, space, log.board, state.step)

    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    model = distribute(parts.trained_model(), world.size)
    with closing(log), stop.gracefully(), profiler(cfg.profile, out / "profile", world.rank) as trace:
        if not state.step or (state.evaluated < state.step and plan.due(state.step, cfg.eval_every)):
            evaluate()  # the base model; or what a signal or a crash has cut off
        fit(model, batches, saved.optimizer, plan, state, world, cfg, parts.precision, log=log, profiler=trace,
            evaluate=evaluate, checkpoint=saved.save, stop=partial(stop.agreed, world))
        if taken := saved.take_best(state, world.say):
            evaluate(taken)
    return finish(cfg, world, parts, pairs, out, metrics, show)


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


def finish(cfg: Config, world: World, parts: Parts, pairs: Pairs, out: Path, metrics: dict[str, Any],
           show: Show) -> int:
    """What a finished run leaves behind: the model folder, the report page, the table, the digests of it all."""
    from engine import folder
    from engine.export import Origin, Tuned, export
    from engine.hub import push, push_command
    from eval.report import table, write_report

    if world.is_main:
        tuned = Tuned(parts.trainable, Origin.of(cfg, parts.clip, parts.trainable, metrics))
        export(parts.clip, out / "model", tuned, table(metrics), cfg.license)
        folder.seal(out)
        sizes = {name: len(split) for name, split in pairs.splits.items()}
        page = write_report(out, show.split, sizes, show.answers, show.title, show.picture)
        print(table(metrics), flush=True)
        world.say(f"run folder  {out}\nmodel       {out / 'model'}\nreport      {page}\n"
                  f"TensorBoard tensorboard --logdir {out.parent}")
        if cfg.push_to_hub:
            later = push_command(cfg, str(out), ["push_to_hub", "private"])
            world.say(f"pushed to {push(out / 'model', cfg.push_to_hub, cfg.private, later)}")
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
    scores = {cfg.split: measure(pairs.residents(), parts.head, [cfg.split])[cfg.split].summarise()}
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
    from eval.search import as_json, as_text

    if not world.is_main:
        return 0
    titles = gallery.read_queries(cfg.query, cfg.queries, cfg.image)
    splits, results, look = find(cfg, world, titles)
    if cfg.html:
        write_pictures(cfg, splits, results, look)
    text = json.dumps(as_json(results), indent=2) if cfg.json else as_text(results, os.path.abspath(cfg.dataset))
    print(text, flush=True)
    return 0


def find(cfg: Config, world: World, titles: Sequence[str]) -> tuple[dict[str, Rows], list[Found], Reader]:
    """Answers to `titles`, or to --image where there are none."""
    import torch

    from data import gallery
    from data.decode import ImageSpec
    from engine.model import open_model
    from eval.search import found, top_k

    splits = gallery.choose(read_rows(cfg)[0], cfg.split, cfg.dataset)
    parts = open_model(cfg.model, cfg.trainable, "cached", cfg.scale, cfg.precision, world.device)
    spec, cache, head = ImageSpec.from_processor(parts.clip.image_processor), Path(cfg.cache_dir), parts.head
    look, towers = reader(cfg, spec), encoders(parts, spec.fingerprint(), world.device)
    with torch.no_grad():
        if titles:
            asked = head.text(gallery.title_features(titles, towers).to(world.device))
            shelf, project = gallery.open_images(splits, look, towers, cache.expanduser(), world.say), head.image
        else:
            asked = head.image(gallery.image_features(cfg.image, look, towers).to(world.device))
            shelf, project = gallery.open_titles(splits, towers, cache.expanduser()), head.text
        best = top_k(asked, lambda start, stop: project(shelf.chunk(start, stop).to(world.device)), len(shelf), cfg.top)
    return splits, found(titles, cfg.image, *best, shelf.item), look


def write_pictures(cfg: Config, splits: dict[str, Rows], results: Sequence[Found], look: Reader) -> None:
    """The page of --html."""
    from data.gallery import pictures
    from engine import folder
    from eval.search_page import page

    shown = {(answer.split, answer.row) for one in results for answer in one.answers}
    previews = pictures(((place, splits[place[0]].image[place[1]].as_py()) for place in shown), look)
    if cfg.image:
        previews |= pictures([(cfg.image, {"bytes": None, "path": cfg.image})], look)
    folder.write_text(Path(cfg.html).expanduser(), page(f"Search in {cfg.dataset}", results, previews))


def export(cfg: Config, world: World, stop: Stop) -> int:
    """A run, or its projections alone, as a Hugging Face folder, and to the hub: one process."""
    from data.batch import UserError
    from engine.card import set_licence
    from engine.export import finished_folder, new_folder
    from engine.hub import check_push, push, push_command

    if not world.is_main:
        return 0
    if not cfg.run or not (cfg.to or cfg.push_to_hub):
        raise UserError("export what and where? --run DIR, and --to DIR or --push-to-hub NAME or both")
    if cfg.push_to_hub:
        check_push(cfg.push_to_hub, world.say)
    with TemporaryDirectory() as scratch:
        ready = None if cfg.to or cfg.checkpoint or cfg.model or cfg.dtype != "fp32" else finished_folder(cfg.run)
        folder = ready or (new_folder(cfg.to) if cfg.to else Path(scratch) / "model")
        if ready is None:
            rebuild(cfg, folder)
            world.say(f"model {folder}")
        elif cfg.license != "other":
            set_licence(folder / "README.md", cfg.license)
        if cfg.push_to_hub:
            later = push_command(cfg, cfg.run, ["push_to_hub", "private", "checkpoint", "model", "dtype", "license"])
            world.say(f"pushed to {push(folder, cfg.push_to_hub, cfg.private, later)}")
    return 0


def rebuild(cfg: Config, folder: Path) -> None:
    """Put what --run has trained back on its base model; the whole Hugging Face folder."""
    from engine.export import export, read_tuned, restore
    from engine.towers import load_clip
    from eval.report import table

    tuned = read_tuned(cfg.run, cfg.checkpoint)
    clip = load_clip(cfg.model or tuned.origin.base, None if cfg.model else tuned.origin.commit or None)
    restore(clip, tuned)
    measured = {when: scores for when, scores in tuned.origin.metrics.items() if when in ("base", "tuned")}
    export(clip, folder, tuned, table(measured) if measured else "", cfg.license, cfg.dtype)


def main(arguments: Sequence[str]) -> int:
    """Run one command on this rank; the exit code says how it went."""
    command, cfg = parse("run.py", arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our own threads call it
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's library writes to stderr otherwise
    from engine.stop import Stop

    stop = Stop()  # before torch is loaded, which takes a while
    from data.batch import RunFailed, UserError
    from engine import dist

    functions = {"train": train, "demo": demo, "eval": evaluate, "shards": shards, "check": check, "search": search,
                 "export": export}
    try:
        with dist.asking("averaging gradients"):  # what else ranks ask of one another says so itself
            return functions[command](cfg, dist.init(cfg.device, cfg.dist_timeout, cfg.quiet), stop)
    except (UserError, RunFailed, OSError) as error:  # OSError: a full disk, a folder gone; what was saved is whole
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # rank 0 has most likely met the same and says it for all
        mistake = isinstance(error, UserError)
        print(f"run.py {command}{'' if mistake else ' failed'}: {error}", file=sys.stderr, flush=True)
        return dist.leave(2 if mistake else 1)
    finally:
        dist.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
