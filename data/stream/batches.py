"""This rank's batches of a stream of shards, and the finished shards that a checkpoint records.

An epoch is `samples` samples in ceil(samples / batch_size) steps, on every rank equally many. A rank whose shards hold
fewer than its part of that (or lose some as unusable) goes on with its shards from the first, in another order; what
they hold beyond it is left out of that epoch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from data.batch import BadSample, Batch, UserError, share
from data.catalogue import check_bad_share, describe_reasons
from data.cold import Pipeline
from data.ledger import dropped_rows
from data.prefetch import prefetch_to_device, threaded_map
from data.stream.shards import shard_order, split_by_rank
from data.stream.stages import Decoded, Sample, collate, decode, read_ahead, read_shard, shuffle
from data.stream.titles import TitleRules
from data.web.storage import Entry, public_name

KEYS_KEPT = 64  # steps whose sample keys are kept, to name what a gradient failed on


class Progress:
    """The finished shards of one epoch, every sample of which has been trained on, each with the step of the last one.
    """

    def __init__(self, finished: Collection[int] = ()) -> None:
        self._finished = [(0, shard) for shard in sorted(finished)]
        self._under_way: Counter[int] = Counter()  # samples that are read and not trained on
        self._ended: set[int] = set()  # read to the end

    def begin(self, sample: Sample) -> Sample:
        """Note that a sample is read."""
        self._under_way[sample.shard] += 1
        return sample

    def end_of(self, shard: int) -> None:
        """Note that a shard is read to its end."""
        self._ended.add(shard)

    def trained(self, shards: Sequence[int], step: int) -> None:
        """Note samples of these shards, one each, as used by the step before `step`."""
        self._under_way.subtract(shards)
        for shard in sorted(shard for shard in self._ended if self._under_way[shard] <= 0):
            self._ended.remove(shard)
            self._finished.append((step, shard))

    def finished(self, step: int) -> list[int]:
        """Return the shards that are finished after `step` steps."""
        return [shard for after, shard in self._finished if after <= step]


@dataclass
class Problems:
    """Ledger entries of the samples of train that cannot be used, each once however often it is read."""

    samples: int  # of an epoch
    max_bad: float
    entries: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None  # writes the ledger when the stream ends the run

    def report(self, shard: str, key: str, problem: BadSample) -> None:
        """Add the entry of a sample, or of damage."""
        self.add([_entry(shard, key, problem)])

    def report_shard(self, shard: Entry, rows: int, problem: BadSample) -> None:
        """Add the entry of a shard of which about `rows` samples cannot be read."""
        self.add([{**_entry(public_name(shard.address), "", problem), "rows": rows, "bytes": shard.size}])

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add the entries of other ranks or of an earlier process."""
        for entry in entries:
            self.entries.setdefault((entry["shard"], entry["key"], entry["detail"]), dict(entry))

    def check(self, seen: int = 0) -> None:
        """Raise UserError when more than `max_bad` of an epoch, or of more samples that are `seen`, cannot be used."""
        rows = max(self.samples, seen)
        if dropped_rows(self.entries.values()) > self.max_bad * rows:
            check_bad_share(rows, [*self.entries.values()], self.max_bad)


def _entry(shard: str, key: str, problem: BadSample) -> dict[str, Any]:
    return {"split": "train", "shard": shard, "key": key, "reason": problem.reason, "detail": problem.detail}


@dataclass
class ShardBatches:
    """Batches of pixels and tokens from shards that are read in sequence."""

    shards: Sequence[Entry]  # sorted
    samples: int  # of an epoch, over all ranks
    batch_size: int  # of all ranks together
    seed: int
    shuffle_buffer: int
    negatives: int  # hard negatives of a row
    pipeline: Pipeline
    problems: Problems
    resumed: tuple[int, Collection[int]] = (0, ())  # the step that a run goes on from, the shards finished then
    rules: TitleRules = TitleRules()
    keys: dict[int, list[str]] = field(default_factory=dict)  # of the samples of the latest steps
    unused_negatives: int = 0  # samples that have more of them than `negatives`
    _progress: dict[int, Progress] = field(default_factory=dict)  # by epoch
    _lost: set[int] = field(default_factory=set)  # shards that cannot be read any more

    @property
    def steps_per_epoch(self) -> int:
        """ceil(samples / batch_size)."""
        return -(-self.samples // self.batch_size)

    def at_step(self, step: int) -> str:
        """Return a digest of the settings that decide the order; the same for each step, as resuming changes it."""
        decisive = [self.samples, self.batch_size, self.seed, self.shuffle_buffer, self.negatives]
        return hashlib.sha256(repr(decisive).encode()).hexdigest()

    def finished(self, step: int) -> list[int]:
        """Return this rank's shards of the current epoch that are finished after `step` steps."""
        epoch, steps = divmod(step, self.steps_per_epoch)
        progress = self._progress.get(epoch)
        return progress.finished(step) if progress and steps else []

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the inputs of every step from `step` on, on the device, without end.

        Where that is inside an epoch, the shards of it that are finished are not read again.
        """
        encoders, crop = self.pipeline.encoders, self.pipeline.reader.spec.crop
        make = partial(collate, encoders=encoders, crop=crop, negatives=self.negatives)
        batches = threaded_map(make, self._decoded_batches(step), 1, 1)
        return prefetch_to_device(batches, self.pipeline.device)

    def _decoded_batches(self, step: int) -> Iterator[list[Decoded]]:
        try:
            yield from self._epochs(step)
        except UserError:
            self.problems.keep()
            raise

    def _epochs(self, step: int) -> Iterator[list[Decoded]]:
        for epoch in count(step // self.steps_per_epoch):
            finished = self.resumed[1] if step and step == self.resumed[0] else ()
            progress = self._progress[epoch] = Progress(finished)
            # Batches are made ahead of the loop: a checkpoint may still ask for the epoch before this one.
            self._progress.pop(epoch - 2, None)
            with closing(self._epoch(epoch, finished, progress)) as stream:
                while step < (epoch + 1) * self.steps_per_epoch:
                    step += 1
                    yield self._take(stream, step, progress)

    def _take(self, stream: Iterator[Decoded], step: int, progress: Progress) -> list[Decoded]:
        """Return this rank's part of the batch of the step before `step`."""
        rows = min(self.batch_size, self.samples - (step - 1) % self.steps_per_epoch * self.batch_size)
        low, high = share(rows, self.pipeline.team.rank, self.pipeline.team.size)
        batch: list[Decoded] = []
        used: list[int] = []
        while len(batch) < high - low:
            item = next(stream)
            used.append(item.sample.shard)
            if item.pixels_CSS is not None:
                batch.append(item)
        progress.trained(used, step)
        self.unused_negatives += sum(len(item.sample.negatives) > self.negatives for item in batch)
        self.keys[step - 1] = [f"{self._name(item.sample.shard)}, {item.sample.key}" for item in batch]
        self.keys.pop(step - 1 - KEYS_KEPT, None)
        # This rank's problems alone may be more than --max-bad of all rows; a checkpoint adds those of other ranks.
        self.problems.check()
        return batch

    def _epoch(self, epoch: int, finished: Collection[int], progress: Progress) -> Generator[Decoded]:
        """Yield this rank's samples of an epoch, then those of its shards again, without end."""
        team, reader = self.pipeline.team, self.pipeline.reader
        for repeat in count():
            order = shard_order(len(self.shards), self.seed, epoch, repeat)
            own = split_by_rank(order, team.rank, team.size, finished)
            progress, finished, skipped = (Progress() if repeat else progress), (), finished
            usable = 0
            with closing(read_ahead(own, self._read, progress.end_of)) as read:
                seed = f"{self.seed} {epoch} {repeat} {team.rank}"
                shuffled = shuffle(map(progress.begin, read), self.shuffle_buffer, seed)
                pictures = self.samples // team.size
                crop_seed, log = (self.seed, epoch), self.pipeline.log
                with closing(decode(shuffled, reader, crop_seed, self._report, pictures, log)) as decoded:
                    for item in decoded:
                        usable += item.pixels_CSS is not None
                        yield item
            if not usable and not skipped:
                reasons = describe_reasons([*self.problems.entries.values()])
                raise UserError(f"{self._name(own[0])} and {len(own) - 1} more shards hold no usable sample "
                                f"({reasons})")

    def _read(self, shard: int) -> Iterator[Sample]:
        """Yield the samples of a shard; one that cannot be read, or has changed, is named and left out from then on."""
        given = 0
        if shard in self._lost:
            return
        try:
            for sample in read_shard(shard, self.shards[shard], self.problems.report, self.rules):
                given += 1
                yield sample
        except UserError as error:
            self._lost.add(shard)
            rows = max(1, self.samples // len(self.shards) - given)
            self.problems.report_shard(self.shards[shard], rows, BadSample("unreadable-shard", str(error)))
            self.pipeline.log(f"{error}; after {given:,} samples the run goes on without the rest of it")

    def _name(self, shard: int) -> str:
        return public_name(self.shards[shard].address)

    def _report(self, sample: Sample, problem: BadSample) -> None:
        self.problems.report(self._name(sample.shard), sample.key, problem)
