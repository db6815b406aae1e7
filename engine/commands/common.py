"""Shared steps of the commands, in the order of a run: folder, rows, model, pairs, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.agreement import require_agreement, require_same_rows
from data.batch import ALONE, Team, UserError
from data.cold import EarlierRun, Encoders, Pipeline, Reader
from data.files import write_mark
from data.images.decode import ImageSpec
from data.images.feed import cores_of_rank
from data.ingest import ingest_shards
from data.inputs import AddedSplit, StreamedPairs
from data.ledger import Account
from data.lost import lost_files
from data.pairs import Pairs, data_key, open_pairs
from data.sources.labels import count_classes
from data.sources.options import ReadOptions, parse_delimiter, parse_encoding, parse_splits, parse_templates
from data.sources.parts import pattern_by_split
from data.sources.paths import parse_image_template
from data.sources.remote import find_files
from data.sources.source import Columns, Download, Rows, load_splits
from data.sources.split import ContentReader, divide_lone_split
from data.sources.split_names import SPLITS, select_shards
from data.store.feature_split import FeatureSplit
from data.store.sharing import find_caches
from data.text import without_secrets
from data.web.limits import FetchPolicy, check_proxy
from data.web.remote_tables import copy_file
from data.web.storage import Entry, RemoteFile, is_stored
from engine.clip.facts import ModelRecords
from engine.clip.loading import write_record
from engine.clip.model import Head, LoadedModel, ModelOptions, open_model
from engine.clip.towers import fingerprint
from engine.config.fields import Config
from engine.device import describe_device
from engine.publish.hub import check_push
from engine.ranks.world import World
from engine.run_folder.folder import open_folder
from eval.metrics import Retrieval
from eval.retrieval import measure_split

# Settings of how --dataset is read. --probe is another dataset, which is read with their defaults.
READING = ("image_column", "title_column", "negative_column", "split_column", "splits", "template", "image_root",
           "image_template", "delimiter", "encoding")


class Source(NamedTuple):
    """The rows of a dataset by split, and ledger entries of what could not be read as a row."""

    rows: dict[str, Rows]
    unreadable: list[dict[str, Any]]
    shards: Mapping[str, Sequence[Entry]] = {}  # in a store, to be streamed once the towers are there: then no rows yet
    run: EarlierRun | None = None  # one that began with these rows, of which it may have lost some

    def hand_over(self) -> Source:
        """Return the same source, with the rows no longer here: they are freed where they are no longer needed."""
        rows = dict(self.rows)
        self.rows.clear()
        return self._replace(rows=rows)

    def split_names(self) -> list[str]:
        """Return the names of the splits; a lone split counts as the three that it will be."""
        names = list(self.rows or self.shards)
        return list(SPLITS) if len(names) == 1 and names[0] not in SPLITS[1:] else names


def open_run(cfg: Config, world: World) -> tuple[Path, bool]:
    """Return the run folder and whether it holds a run to go on with. Raises UserError.

    Before that, checks that the hub would take the model, rather than hours later when it is pushed.
    """
    if cfg.push_to_hub and world.is_main:
        check_push(cfg.push_to_hub, world.say)
    return open_folder(cfg, world)


def read_rows(cfg: Config, log: Callable[[str], None], stream: bool = False, run: EarlierRun | None = None) -> Source:
    """Read the splits of --dataset; what lies at an address is fetched first. Raises UserError.

    A lone split comes whole, under the name train; see `divide_source`. With `stream`, shards in a store are only
    listed, for `stream_shards`. Files that an earlier `run` has lost are rows where the files of a folder are.
    """
    cache = cache_folder(cfg)
    stored = find_files(cfg.dataset) if is_stored(cfg.dataset) else {}
    entries_of_all_splits = chain.from_iterable(stored.values())
    is_sharded = any(entry.name.endswith(".tar") for entry in entries_of_all_splits)
    if stream and is_sharded:
        return Source({}, [], select_shards(stored, read_options(cfg), Account(log=log)))

    def download(dataset: str) -> Mapping[str, Sequence[Path | RemoteFile]]:
        if not stored:
            from data.web.remote_files import fetch_files  # its client takes a fifth of a second to import

            return pattern_by_split(fetch_files(dataset, cache / "shards", fetch_policy(cfg), log))
        copies: dict[str, list[Path | RemoteFile]] = {}
        for name, entries in stored.items():
            files = [copy_file(entry.address, cache / "stored", log) for entry in entries]
            # A table keeps its address, since its relative paths start there; a shard holds its images itself.
            copies[name] = [file.path for file in files] if is_sharded else [*files]
        return copies

    return load_source(cfg, log, download, lost_files(run.ledger) if run else frozenset())


def load_source(cfg: Config, log: Callable[[str], None], download: Download,
                lost: frozenset[str] = frozenset()) -> Source:
    """Return the rows of --dataset, whose files at an address `download` returns; see `ReadOptions` for `lost`."""
    unreadable: list[dict[str, Any]] = []
    rows = load_splits(cfg.dataset, replace(read_options(cfg), lost=lost), unreadable.append, download, log,
                       cache_folder(cfg) / "embedded")
    return Source(rows, unreadable)


def read_options(cfg: Config) -> ReadOptions:
    """Return how --dataset is to be read. Raises UserError."""
    columns = Columns(cfg.image_column or None, cfg.title_column, cfg.negative_column, cfg.split_column or None)
    return ReadOptions(columns, parse_delimiter(cfg.delimiter), parse_encoding(cfg.encoding), parse_splits(cfg.splits),
                       cfg.image_root, parse_image_template(cfg.image_template), parse_templates(cfg.template))


def open_source(cfg: Config, world: World, split: str = "train",
                shards: Mapping[str, Sequence[Entry]] | None = None, run: EarlierRun | None = None) -> Source:
    """Read the rows, before anything slow or written; `shards` are those of a store to be measured, if known.

    Raises UserError where `split` or a split of --eval-splits is missing. A lone split is whole, under the name
    train, and counts as the three that it will be.
    """
    source = Source({}, [], shards) if shards else read_rows(cfg, world.say, stream=True, run=run)
    names = source.split_names()
    if cfg.probe:
        names.append("probe")
    if not cfg.shuffle_buffer:  # else train is not among the rows
        require_split(cfg, split, names)
    for name in cfg.eval_splits:
        if name not in names:
            raise UserError(f"--eval-splits {name}: there is {', '.join(names)}")
    return source._replace(run=run)


def require_split(cfg: Config, split: str, names: Collection[str]) -> None:
    """Raise UserError where `split` is neither all nor among the names, with the flag that would name one."""
    if split == "all" or split in names:
        return
    lone = [*names][0] if len(names) == 1 else ""
    there = f"--dataset {without_secrets(cfg.dataset)} has no split {split!r}; it has {', '.join(names)}"
    if split == "train":
        fix = (f"--splits train={lone} trains on it, divided in three by --seed" if lone else
               "--splits train=NAME,test=NAME says which to use")
        raise UserError(f"{there}; {fix}")
    raise UserError(f"{there}; --split {lone} takes it" if lone else there)


def divide_source(cfg: Config, world: World, rows: Mapping[str, Rows], reader: Reader, encoders: Encoders | None = None,
                  team: Team = ALONE) -> dict[str, Rows]:
    """Return the splits of `read_rows`, a lone one made three by the content of its images and titles.

    See `divide_lone_split`; several ranks of a `team` share the reading.
    """
    contents = ContentReader(reader, cache_folder(cfg), world.live, team)
    title_ids = None if encoders is None else encoders.title_ids(contents.cache)
    splits = divide_lone_split(rows, contents, cfg.seed, title_ids)
    if splits.keys() != rows.keys():
        total = sum(len(split) for split in rows.values())
        sizes = ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
        classes = count_classes(rows).get("train")
        by_class = f", the images of each of {classes:,} classes apart" if classes else ""
        world.say(f"one split of {total:,} rows, made three by --seed {cfg.seed}{by_class}: {sizes}")
    return splits


def cache_folder(cfg: Config) -> Path:
    """Return the folder of the feature store and of what was fetched."""
    return Path(cfg.cache_dir).expanduser()


def mark_cache(cfg: Config) -> None:
    """Mark a --cache-dir that is new or empty as ours, so that it is not read as data. Raises UserError."""
    folder = cache_folder(cfg)
    try:
        if not (folder.exists() and any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_mark(folder, "cache")
    except OSError as error:
        raise UserError(f"--cache-dir {folder} cannot be used: {error.strerror}; choose another folder") from None


def fetch_policy(cfg: Config) -> FetchPolicy:
    """Return the rules for requests over the network: allowed hosts, larger thumbnails, proxy."""
    proxy = cfg.proxy and check_proxy(cfg.proxy)
    return FetchPolicy(allow_hosts=cfg.allow_host, variants=cfg.variants, proxy=proxy)


def make_reader(cfg: Config, spec: ImageSpec) -> Reader:
    """Return the reader that turns an image reference into the pixels `spec` describes."""
    fetched = cache_folder(cfg) / "fetched"
    workers = cfg.workers or cores_of_rank()  # 0: as many as this rank has cores
    return Reader(fetched, spec, fetch_policy(cfg), cfg.max_pixels, workers, cfg.retry_failed, cfg.augment)


def load_model(cfg: Config, world: World, reread: bool = False) -> LoadedModel:
    """Open --model for this rank's device, all frozen but the parameters that --trainable names.

    With `reread` the whole model is loaded and checked, whatever an earlier run has recorded of it.
    """
    model = open_recorded(cfg, world, _model_options(cfg), reread)
    world.say(model.describe())
    return model


def _model_options(cfg: Config) -> ModelOptions:
    return ModelOptions(cfg.trainable, cfg.mode, cfg.scale, cfg.precision, cfg.augment, cfg.gradient_checkpointing)


def read_weights(cfg: Config, world: World) -> Mapping[str, Tensor]:
    """Return the weights of --model that train, read again."""
    return open_model(cfg.model, _model_options(cfg), world.device).trainable


def open_recorded(cfg: Config, world: World, options: ModelOptions, reread: bool = False) -> LoadedModel:
    """Name the device, and open --model by its record in --cache-dir, or whole; then rank 0 leaves a record."""
    records = model_records(cfg, world)
    model = open_model(cfg.model, options, world.device, None if reread else records)
    world.say(describe_device(cfg, world.device, world.size))
    if model.clip.record is None:
        mark_cache(cfg)
        write_record(model.clip, records, world.warn)
    return model


def model_records(cfg: Config, world: World) -> ModelRecords:
    """Return the records of models in --cache-dir, which rank 0 writes."""
    return ModelRecords(cache_folder(cfg) / "models", world.is_main)


def make_encoders(model: LoadedModel, compile_image_tower: str = "off") -> Encoders:
    """Return the towers as the encoders that data/ works with: no autograd, the run's precision, a name by content."""
    clip, facts, precision = model.clip, model.clip.facts, model.precision
    image, text = model.encoders(compile_image_tower)
    return Encoders(
        image=image,
        image_width=facts.widths["vision_model"],
        image_space=fingerprint(clip, "vision_model", clip.spec.fingerprint(), precision),
        text=text,
        text_width=facts.widths["text_model"],
        text_space=fingerprint(clip, "text_model", facts.tokenizer_fingerprint, precision),
        stored=model.stored, tokenizer=clip.tokenizer, max_tokens=clip.max_tokens)


def open_pipeline(cfg: Config, world: World, model: LoadedModel) -> Pipeline:
    """Return the Pipeline of this rank, from references and titles to features; find out which ranks share a cache.

    Raises AgreedError where ranks have other models.
    """
    mark_cache(cfg)
    team = find_caches(cache_folder(cfg), world.team, world.say)
    encoders = make_encoders(model, cfg.compile)
    require_agreement(team, model_to_compare(model, encoders))
    reader = make_reader(cfg, model.clip.spec)
    return Pipeline(reader, encoders, team, cache_folder(cfg), world.device, world.live)


def open_data(cfg: Config, world: World, model: LoadedModel, source: Source, only: str = "") -> Pairs:
    """Return the pairs of `source`: every image and title read and, where features are stored, encoded once.

    Rows that cannot be used are dropped and counted. `only` names the one split that is opened, or all.
    """
    pipeline = replace(open_pipeline(cfg, world, model), run=source.run)
    team, streamed = pipeline.team, bool(source.shards)
    source = stream_shards(cfg, world, source, pipeline, only)
    require_same_rows(team, source.rows)
    rows = divide_source(cfg, world, source.rows, pipeline.reader, pipeline.encoders, team)
    if only or not cfg.shuffle_buffer:
        require_split(cfg, only or "train", rows)
    unreadable = source.unreadable
    del source  # frees a lone split that was divided, if the caller has handed it over
    if only not in ("", "all"):
        rows = {only: rows[only]}
        unreadable = [entry for entry in unreadable if entry.get("split", only) == only]
    measured = [name for name in rows if not cfg.eval_splits or name in cfg.eval_splits]
    pairs = open_pairs(rows, unreadable, pipeline, cfg.max_bad, cfg.mine_negatives, measured)
    require_agreement(team, pairs.identity)
    world.say(pairs.describe())
    if cfg.profile != "off" and pairs.feed_report:
        world.say(f"pictures of the cold pass: {pairs.feed_report}")
    if streamed and isinstance(pairs.inputs, StreamedPairs) and not only and not cfg.shuffle_buffer:
        world.say("every step reads its pictures from the store, one request each; --shuffle-buffer N reads the "
                  "shards in sequence")
    return pairs


def model_to_compare(model: LoadedModel, encoders: Encoders) -> dict[str, object]:
    """Return digests of the base model for ranks to compare: weights, preprocessing, precision."""
    digests = model.clip.facts.digests
    names = ("logit_scale", *model.clip.family.projections)
    return {"the image tower": encoders.image_space, "the text tower": encoders.text_space,
            "the precision": str(model.precision),
            "the base weights of the projections": [digests[name] for name in names]}


def stream_shards(cfg: Config, world: World, source: Source, pipeline: Pipeline, only: str = "") -> Source:
    """Return the rows of shards in a store, which are streamed into the feature store first, or `source` as it is.

    Of several splits, only valid or test are streamed where `only` names them. Raises UserError.
    """
    if not source.shards:
        return source
    shards = source.shards
    if len(shards) > 1 and only in SPLITS[1:] and only in shards:
        shards = {only: shards[only]}
    # train, valid, test, then others: overlap is counted against the splits before.
    in_order = sorted(shards, key=[*SPLITS, *shards].index)
    files = ingest_shards({name: shards[name] for name in in_order}, pipeline)
    return load_source(replace(cfg, splits=()), world.say, lambda dataset: files)  # --splits has named the shards


def open_probe(cfg: Config, world: World) -> Source | None:
    """Return the rows of --probe, None without one. Raises UserError."""
    return open_source(_probe_settings(cfg), world, "test") if cfg.probe else None


def with_probe(cfg: Config, world: World, model: LoadedModel, pairs: Pairs, source: Source | None) -> Pairs:
    """Return `pairs` with the test split of --probe beside them, as a split of its own that is only measured."""
    if source is None:
        return pairs
    probe = open_data(_probe_settings(cfg), world, model, source, only="test")
    return replace(
        pairs,
        splits={**pairs.splits, "probe": probe.splits["test"]},
        ledger=[*pairs.ledger, *({**entry, "split": "probe"} for entry in probe.ledger)],
        identity={**pairs.identity, data_key("probe"): probe.identity[data_key("test")]},
        contents={**pairs.contents, "probe": probe.contents["test"]},
        classes={**pairs.classes, **({"probe": probe.classes["test"]} if probe.classes else {})},
        features=AddedSplit(pairs, "probe", probe, "test"))


def _probe_settings(cfg: Config) -> Config:
    """Return the settings that read --probe as a dataset of its own."""
    reading = {name: getattr(Config, name) for name in READING}
    return replace(cfg, dataset=cfg.probe, probe="", shuffle_buffer=0, eval_splits=(), mine_negatives="off", **reading)


def evaluate_splits(splits: Mapping[str, FeatureSplit], head: Head,
                    world: World | None = None) -> dict[str, Retrieval]:
    """Return ranks and triplets of splits with the head as it is now; ranks of a `world` share the work."""
    return {name: evaluate_split(head, split, world) for name, split in splits.items()}


def evaluate_split(head: Head, split: FeatureSplit, world: World | None = None) -> Retrieval:
    """Return ranks and triplets of one split."""
    sharing = ((world.rank, world.size), world.sum) if world else ()
    result = measure_split(head.image, head.text, split.parts(), *sharing)
    return replace(result, pairs=result.pairs - split.lost)
