"""How commands open a model, its rows and its pairs, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.batch import ALONE, Team, UserError
from data.cold import Reader
from data.files import write_mark
from data.images.decode import ImageSpec, tokenizer_fingerprint
from data.pairs import Encoders, Pairs, data_key, open_pairs
from data.sources.source import Columns, Rows, load_splits
from data.sources.split import ORDER, WHOLE, divide_lone_split
from data.store.feature_split import FeatureSplit
from data.web.fetch import FetchPolicy
from data.web.guard import check_proxy
from data.web.remote_shards import fetch_shards
from engine.clip.encoder import CPU_TITLES, BatchedEncoder
from engine.clip.model import Head, LoadedModel, open_model
from engine.clip.towers import fingerprint
from engine.config.fields import Config
from engine.publish.hub import check_push
from engine.ranks.world import World
from engine.run_folder.folder import open_folder
from eval.metrics import Retrieval
from eval.retrieval import measure_split


def load_model(cfg: Config, world: World) -> LoadedModel:
    """The CLIPModel taken apart, frozen by name, on this rank's device."""
    parts = open_model(cfg.model, cfg.trainable, cfg.mode, cfg.scale, cfg.precision, world.device, cfg.augment,
                       cfg.gradient_checkpointing)
    world.say(parts.describe())
    return parts


def read_rows(cfg: Config, tell: Callable[[str], None] = lambda text: None) -> tuple[
        dict[str, Rows], list[dict[str, Any]]]:
    """The splits of --dataset, and ledger entries of what became no row; shards at an address are fetched first.

    A lone split is whole, under the name train; see `divide_source`.
    """
    def download(pattern: str) -> list[Path]:
        return fetch_shards(pattern, Path(cfg.cache_dir).expanduser() / "shards", fetch_policy(cfg), tell)

    columns = Columns(cfg.image_column or None, cfg.title_column or None, cfg.negative_column or None)
    lost: list[dict[str, Any]] = []
    return load_splits(cfg.dataset, columns, lost.append, download, tell), lost


def divide_source(cfg: Config, world: World, rows: Mapping[str, Rows], look: Reader, towers: Encoders | None = None,
            team: Team = ALONE) -> dict[str, Rows]:
    """The splits of `read_rows`, a lone one made three by content, which `look` reads; see `divide_lone_split`."""
    cache = Path(cfg.cache_dir).expanduser()
    splits = divide_lone_split(rows, look, cache, cfg.seed, world.live,
                    None if towers is None else towers.titles(cache), team)
    if splits.keys() != rows.keys():
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
        world.say(f"one split of {sum(map(len, rows.values())):,} rows, made three by --seed {cfg.seed}: {sizes}")
    return splits


def fetch_policy(cfg: Config) -> FetchPolicy:
    """What may be asked for over the network, and how."""
    return FetchPolicy(allow_hosts=cfg.allow_host, variants=cfg.variants, proxy=cfg.proxy and check_proxy(cfg.proxy))


def make_reader(cfg: Config, spec: ImageSpec) -> Reader:
    """How this run turns an image reference into pixels."""
    folder = Path(cfg.cache_dir).expanduser() / "fetched"
    return Reader(folder, spec, fetch_policy(cfg), cfg.max_pixels, cfg.workers, cfg.retry_failed, cfg.augment)


Source = tuple[dict[str, Rows], list[dict[str, Any]]]  # rows by split, ledger entries of what became no row


def open_source(cfg: Config, world: World, split: str = "train") -> Source:
    """Read the rows before anything slow or written. Raises UserError, also where `split` or an --eval-splits is not.

    A lone split is whole, under the name train, and counts as the three that it will be.
    """
    source = read_rows(cfg, world.say)
    names = [*(ORDER if list(source[0]) == [WHOLE] else source[0]), *(["probe"] if cfg.probe else [])]
    require_split(cfg, split, names)
    if wrong := [name for name in cfg.eval_splits if name not in names]:
        raise UserError(f"--eval-splits {wrong[0]}: there is {', '.join(names)}")
    return source


def require_split(cfg: Config, split: str, names: Collection[str]) -> None:
    """Raises UserError where `split` is not among the names."""
    if split not in names:
        raise UserError(f"--dataset {cfg.dataset} has no split {split!r}; it has {', '.join(names)}")


def open_data(cfg: Config, world: World, parts: LoadedModel, source: Source, only: str = "") -> Pairs:
    """Run the cold pass over the rows of `source` with the towers' help, account for every row."""
    mark_cache(cfg, world)
    spec = ImageSpec.from_processor(parts.clip.image_processor)
    team, look = Team(world.rank, world.size, world.monitored_exchange), make_reader(cfg, spec)
    towers = make_encoders(parts, spec.fingerprint(), world.device, cfg.compile)
    rows, lost = divide_source(cfg, world, source[0], look, towers, team), source[1]
    require_split(cfg, only or "train", rows)
    if only:
        lost = [entry for entry in lost if entry.get("split", only) == only]
    pairs = open_pairs({only: rows[only]} if only else rows, lost, look, towers, team,
                       Path(cfg.cache_dir).expanduser(), cfg.max_bad, cfg.mine_negatives, world.device, world.live)
    world.say(pairs.describe())
    return pairs


def mark_cache(cfg: Config, world: World) -> None:
    """Mark a --cache-dir that is new or empty as ours, so that it is not read as data. Raises UserError."""
    folder = Path(cfg.cache_dir).expanduser()
    try:
        if world.is_main and not (folder.exists() and any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_mark(folder, "cache")
    except OSError as error:
        raise UserError(f"--cache-dir {folder} cannot be used: {error.strerror}; choose another folder") from None


def make_encoders(parts: LoadedModel, image_preprocessing: str, device: torch.device,
             compiled: str = "off") -> Encoders:
    """Lend the towers to the data room: without autograd, in the run's precision, named by what they are."""
    towers, clip = parts.towers, parts.clip
    title_preprocessing = tokenizer_fingerprint(clip.tokenizer, clip.max_tokens)
    image, text = clip.config.vision_config, clip.config.text_config
    return Encoders(
        image=BatchedEncoder(towers.image, device, parts.precision, compiled), image_width=image.hidden_size,
        text=BatchedEncoder(towers.text, device, parts.precision, cpu_batch=CPU_TITLES), text_width=text.hidden_size,
        image_space=fingerprint(clip, "vision_model", image_preprocessing, parts.precision),
        text_space=fingerprint(clip, "text_model", title_preprocessing, parts.precision),
        stored=parts.stored, tokenizer=clip.tokenizer, max_tokens=clip.max_tokens)


def evaluate_splits(residents: Mapping[str, FeatureSplit], head: Head, names: Collection[str],
            world: World | None = None) -> dict[str, Retrieval]:
    """Ranks and triplets of the named splits with the head as it is now; all ranks of a `world` share the work."""
    return {name: evaluate_split(head, split, world) for name, split in residents.items() if name in names}


def evaluate_split(head: Head, split: FeatureSplit, world: World | None = None) -> Retrieval:
    """Ranks and triplets of some rows."""
    team = ((world.rank, world.size), world.sum) if world else ()
    return measure_split(head.image, head.text, split.parts(), *team)


def open_probe(cfg: Config, world: World) -> Source | None:
    """The rows of --probe, None without one. Raises UserError."""
    return open_source(_probe_settings(cfg), world, "test") if cfg.probe else None


def _probe_settings(cfg: Config) -> Config:
    return replace(cfg, dataset=cfg.probe, probe="", eval_splits=(), image_column="", title_column="",
                   negative_column="", mine_negatives="off")


def with_probe(cfg: Config, world: World, parts: LoadedModel, pairs: Pairs, source: Source | None) -> Pairs:
    """The pairs, and the test split of --probe beside them as a split of its own, only ever measured."""
    if source is None:
        return pairs
    probe = open_data(_probe_settings(cfg), world, parts, source, only="test")
    return replace(
        pairs, splits={**pairs.splits, "probe": probe.splits["test"]},
        ledger=[*pairs.ledger, *({**entry, "split": "probe"} for entry in probe.ledger)],
        identity={**pairs.identity, data_key("probe"): probe.identity[data_key("test")]},
        contents={**pairs.contents, "probe": probe.contents["test"]},
        residents=lambda: {**pairs.residents(), "probe": probe.residents()["test"]})


def open_run(cfg: Config, world: World) -> tuple[Path, bool]:
    """The run folder and whether it holds a run to go on with; first of all, whether the hub would take the model."""
    if cfg.push_to_hub and world.is_main:
        check_push(cfg.push_to_hub, world.say)
    return open_folder(cfg, world)
