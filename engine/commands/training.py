"""The training data of a run: rows in an exact random order, or shards as a stream with a shuffle buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from data.agreement import require_same_shards
from data.batch import Batches, UserError
from data.inputs import CachedPairs, StreamedPairs
from data.ledger import Account, read_ledger
from data.lost import LostPictures
from data.pairs import Pairs, data_key
from data.prefetch import EpochBatches, OrderDigest
from data.sources.options import parse_templates
from data.sources.parts import pattern_by_split
from data.sources.remote import find_files
from data.sources.split_names import select_shards
from data.stream.batches import Problems, ShardBatches
from data.stream.shards import (
    Divided,
    count_samples,
    divide_shards,
    find_local_shards,
    local_pattern,
    require_lost_shards,
    shards_digest,
)
from data.stream.stages import count_negatives, read_shard
from data.stream.titles import TitleRules
from data.web.storage import Entry, is_stored, scheme_of
from engine.clip.model import LoadedModel
from engine.commands.common import cache_folder, fetch_policy, read_options
from engine.config.fields import Config
from engine.ranks.sharing import world_of_steps
from engine.ranks.world import World
from engine.run_folder import folder
from engine.run_folder.checkpoint import Order, Saver, State
from engine.run_folder.nonfinite import NonfiniteGuard

LOOKED_AT = 64  # samples of the first shard in which negatives are looked for


@dataclass(frozen=True)
class RowTraining:
    """The kept rows of train."""

    pairs: Pairs
    world: World
    out: Path

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.pairs.splits["train"])

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of the data."""
        return self.pairs.identity

    def order(self, cfg: Config) -> Order:
        """Return the digest of the order, a function of seed and epoch."""
        return OrderDigest(self.rows, cfg.batch_size, cfg.seed)

    @property
    def lost(self) -> LostPictures | None:
        """The pictures that are lost while they are streamed; None for stored features."""
        return self.pairs.inputs.lost if isinstance(self.pairs.inputs, StreamedPairs) else None

    def begin(self, step: int, stop: Callable[[], None]) -> Sequence[Mapping[str, Any]]:
        """Return the ledger of a run that goes on from a step; later losses are added to its file at once.

        `stop` ends the run after the next step, when too much is lost.
        """
        if self.lost is not None:
            self.lost.begin(step)
            self.lost.record = partial(folder.append_to_ledger, self.out / "ledger.jsonl")
            self.lost.stop = stop
        return self.ledger()

    def ledger(self) -> Sequence[Mapping[str, Any]]:
        """Return the rows that the opening dropped, and those lost since."""
        return self.pairs.all_dropped()

    def step_world(self, cfg: Config, world: World, model: LoadedModel) -> World:
        """Return the world that shares a step: all ranks, or this rank alone where that is faster."""
        inputs = self.pairs.inputs
        if not isinstance(inputs, CachedPairs):
            return world
        embedding = model.head.visual_projection.weight.shape[0]
        return world_of_steps(world, inputs.splits["train"], cfg.batch_size, embedding, cfg.loss == "symmetric")

    def batches(self, cfg: Config, state: State, world: World) -> Batches:
        """Return this rank's inputs among the ranks of `world`; the order depends on the step alone, not on `state`."""
        return self.pairs.batches("train", cfg.batch_size, cfg.seed, world.rank, world.size)

    def save(self, saver: Saver, state: State) -> None:
        """Write a checkpoint; account for pictures lost since the opening.

        Raises UserError on all ranks when those and the rows dropped are more than --max-bad.
        """
        # First, so that a run which ends for too many losses can go on from this step when they are mended.
        saver.save(state)
        if self.lost is None:
            return
        try:
            self.lost.share(self.world.team)
        finally:
            self.world.on_main(lambda: folder.write_ledger(self.out / "ledger.jsonl", self.ledger()))

    def guard(self, cfg: Config, world: World, out: Path, trained: nn.Module) -> NonfiniteGuard:
        """Return a guard that embeds the rows of a step again to see which are not finite."""
        train = self.pairs.splits["train"]

        def rows(step: int) -> list[int]:
            order = EpochBatches(len(train), cfg.batch_size, cfg.seed)
            return train.row_N[next(order.from_step(step)).numpy()].tolist()

        return NonfiniteGuard(out, trained, self.batches(cfg, State(), world), rows, world)


@dataclass
class ShardTraining:
    """The shards of train, read in sequence; no row of them is known before it is read."""

    pairs: Pairs  # of the measured splits
    stream: ShardBatches
    world: World
    out: Path
    has_reported_negatives: bool = False  # those that are not used

    @property
    def rows(self) -> int:
        """Samples of an epoch."""
        return self.stream.samples

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of the measured splits, and of names, sizes and versions of the shards."""
        return {**self.pairs.identity, data_key("train"): shards_digest(self.stream.shards)}

    def order(self, cfg: Config) -> Order:
        """Return a digest of the settings that decide the order; resuming and the number of ranks change it."""
        return replace(self.stream, batch_size=cfg.batch_size)

    def begin(self, step: int, stop: Callable[[], None]) -> Sequence[Mapping[str, Any]]:
        """Return the ledger: rows dropped at the opening, and samples that an earlier process found unusable."""
        self._lost.begin(step)
        for line in read_ledger(self.out / "ledger.jsonl"):
            if line.get("split") == "train" and {"shard", "key", "detail"} <= line.keys():
                self.stream.problems.add([line])
        return self._ledger()

    @property
    def _lost(self) -> LostPictures:
        """Pictures of the measured splits."""
        assert isinstance(self.pairs.inputs, StreamedPairs)  # see `refuse_cached`
        return self.pairs.inputs.lost

    def _ledger(self) -> Sequence[Mapping[str, Any]]:
        return [*self.pairs.all_dropped(), *self.stream.problems.entries.values()]

    def step_world(self, cfg: Config, world: World, model: LoadedModel) -> World:
        """Return `world`: every rank reads other shards."""
        return world

    def batches(self, cfg: Config, state: State, world: World) -> Batches:
        """Return this rank's inputs: shards that are finished in the current epoch are not read again."""
        self.stream = replace(self.stream, batch_size=cfg.batch_size, resumed=(state.step, state.shards))
        return self.stream

    def save(self, saver: Saver, state: State) -> None:
        """Write a checkpoint with the shards that all ranks have finished; account for samples found unusable.

        Raises UserError on all ranks when those are more than --max-bad.
        """
        stream = self.stream
        entries = [*stream.problems.entries.values()]
        parts = self.world.exchange((stream.finished(state.step), entries, stream.unused_negatives))
        finished_shards: set[int] = set()
        for finished, entries_of_rank, _ in parts:
            finished_shards.update(finished)
            stream.problems.add(entries_of_rank)
        state.shards = sorted(finished_shards)
        self.world.on_main(lambda: folder.write_ledger(self.out / "ledger.jsonl", self._ledger()))
        saver.save(state)
        unused = sum(count for _, _, count in parts)
        if unused and not self.has_reported_negatives:
            self.has_reported_negatives = True
            self.world.say(f"{unused:,} samples so far have more negatives than the first {LOOKED_AT} of the first "
                           f"shard ({stream.negatives}); those are not used")
        stream.problems.check(state.step * stream.batch_size)

    def keep_ledger(self) -> None:
        """Write this rank's ledger, when the stream ends the run before the next checkpoint."""
        folder.write_ledger(self.out / "ledger.jsonl", self._ledger())

    def guard(self, cfg: Config, world: World, out: Path, trained: nn.Module) -> NonfiniteGuard:
        """Return a guard that names the samples of a step; a stream is not read again to find which it was."""
        def rows(step: int) -> list[str]:
            return [*chain.from_iterable(world.exchange(self.stream.keys.get(step, [])))]

        return NonfiniteGuard(out, trained, None, rows, world)


Training = RowTraining | ShardTraining


def split_dataset(cfg: Config, log: Callable[[str], None]) -> tuple[Config, Divided]:
    """Return the settings for the splits that are opened row by row, and the shards of train to stream, if any.

    For shards in a store, those of the measured splits are returned too. Raises UserError where --shuffle-buffer has no
    shards to stream.
    """
    if not cfg.shuffle_buffer:
        return cfg, Divided([], {})
    if is_stored(cfg.dataset):
        files = find_files(cfg.dataset)
    elif scheme_of(cfg.dataset) in ("http", "https"):
        from data.web.remote_files import fetch_files  # its client takes a fifth of a second to import

        paths = fetch_files(cfg.dataset, cache_folder(cfg) / "shards", fetch_policy(cfg), log)
        files = pattern_by_split([Entry(str(path), 0, "") for path in paths])
    else:
        files = find_local_shards(cfg.dataset)
    divided = divide_shards(select_shards(files, read_options(cfg), Account(log=log)), cfg.dataset)
    if is_stored(cfg.dataset):
        return cfg, divided
    splits = tuple(pair for pair in cfg.splits if pair.partition("=")[0].strip() in divided.measured)
    return replace(cfg, dataset=local_pattern(divided.measured), splits=splits), Divided(divided.train, {})


def open_training(cfg: Config, world: World, pairs: Pairs, shards: Sequence[Entry], out: Path) -> Training:
    """Return the training data: the rows of train, or a stream of `shards`. Raises UserError."""
    if not shards:
        return RowTraining(pairs, world, out)
    if len(shards) < world.size:
        raise UserError(f"train has {len(shards)} shards for {world.size} ranks, and each rank reads whole ones; write "
                        "smaller shards or use fewer ranks")
    require_same_shards(shards, world.team)
    require_lost_shards(shards, read_ledger(out / "ledger.jsonl"))
    rules = TitleRules.of(shards, parse_templates(cfg.template))
    samples = cfg.train_samples or count_samples(shards, rules)
    if not samples:
        raise UserError("not every shard of train has an index that counts its samples; give --train-samples N, how "
                        "many make an epoch, or write the shards with `run.py shards`")
    assert isinstance(pairs.inputs, StreamedPairs)  # see `refuse_cached`
    problems = Problems(samples, cfg.max_bad)
    negatives = count_negatives(read_shard(0, shards[0], rules=rules), LOOKED_AT)
    stream = ShardBatches(shards, samples, cfg.batch_size, cfg.seed, cfg.shuffle_buffer, negatives,
                          pairs.inputs.pipeline, problems, rules=rules)
    world.say(f"stream: train {samples:,} samples an epoch; shards: {len(shards):,}; shuffle buffer: "
              f"{cfg.shuffle_buffer:,} a rank; leaks of train into the measured splits are not looked for")
    training = ShardTraining(pairs, stream, world, out)
    problems.keep = training.keep_ledger
    return training


def refuse_cached(cfg: Config, model: LoadedModel) -> None:
    """Raise UserError for a shuffle buffer where training reads stored features."""
    if cfg.shuffle_buffer and model.cached:
        raise UserError("--shuffle-buffer streams pictures through the towers, and with cached features none are read; "
                        "leave it out, or train towers (--trainable all), or add --augment")
