"""The stages of a stream, each a generator over what the one before it yields.

    shards ─▶ read_ahead ─▶ shuffle ─▶ decode ─▶ take batches ─▶ collate
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from queue import Empty, Queue
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from data.batch import BadSample, Batch, UserError
from data.cold import Encoders
from data.images.decode import collate_tokens, tokenize
from data.images.feed import Feed, grouped
from data.images.reader import Reader
from data.images.worker import Task, ToPixels, content_number
from data.ledger import discard
from data.shards.stream import ForwardFile, stream_samples
from data.store.segments import key_of
from data.stream.shards import open_shard
from data.stream.titles import AS_THEY_ARE, TitleRules
from data.web import storage
from data.web.storage import Entry, public_name

OPEN = 3  # shards that are read at once
AHEAD = 64  # samples of each of them that wait to be taken
RETRIES = 2  # further tries of a shard on this machine that cannot be read; a store's requests have their own
Report = Callable[[str, str, BadSample], None]  # shard, key, problem
Item = TypeVar("Item")


class Sample(NamedTuple):
    """A picture and one of its titles, as they are in their shard; each further title is a sample of its own."""

    shard: int  # its number
    key: str
    image: bytes
    title: str
    negatives: Sequence[str]
    class_name: str = ""  # of a title made from it; the titles of a class are no negatives of each other


class Decoded(NamedTuple):
    """A sample and the pixels of its picture, None where it cannot be decoded."""

    sample: Sample
    image_id: int
    pixels_CSS: np.ndarray | None


def read_shard(number: int, shard: Entry, report: Report = lambda shard, key, problem: None,
               rules: TitleRules = AS_THEY_ARE) -> Generator[Sample]:
    """Yield the samples of one shard in order; what cannot be used is reported. Raises UserError.

    A shard that fails is opened again and read from the sample that was reached.
    """
    given = 0
    for tried in range(RETRIES + 1):
        try:
            for sample in islice(_read_once(number, shard, report, rules), given, None):
                given += 1
                yield sample
            return
        except OSError as error:
            if tried == RETRIES:
                raise UserError(f"{public_name(shard.address)}: {error.strerror or error}") from error
        time.sleep(storage.BACKOFF * 2**tried)


def _read_once(number: int, shard: Entry, report: Report, rules: TitleRules) -> Iterator[Sample]:
    """Yield the samples of one shard. Raises UserError, OSError."""
    name, classes, known = public_name(shard.address), rules.classes_of(shard), rules.known_names(shard)
    with open_shard(shard) as stream:
        file = ForwardFile(stream, shard.size, name)
        for (key, _, _, texts, negatives), image in stream_samples(file, partial(report, name), classes):
            for title, class_name in rules.titles(texts, known):
                yield Sample(number, key, image, title, negatives, class_name)
        # The last block of a stream from a store comes only if the shard has not changed since it was listed.
        file.skip_rest()


class _Reading:
    """A thread that reads one iterator into a bounded queue."""

    def __init__(self, items: Iterable[Sample]) -> None:
        self._queue: Queue[Sample | BaseException | None] = Queue(AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(items,), daemon=True, name="read-shard")
        self._thread.start()

    def _read(self, items: Iterable[Sample]) -> None:
        end: BaseException | None = None
        try:
            for item in items:
                self._queue.put(item)
                if self._closed:
                    return
        except BaseException as error:  # is raised where the samples are taken
            end = error
        self._queue.put(end)

    def take(self) -> Iterator[Sample]:
        """Yield the samples as they are read. Raises the error that ended the reading."""
        while isinstance(item := self._queue.get(), Sample):
            yield item
        if item is not None:
            raise item

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        while self._thread.is_alive():
            with suppress(Empty):
                self._queue.get(timeout=0.01)
        self._thread.join()


def read_ahead(shards: Sequence[int], read: Callable[[int], Iterable[Sample]],
               ended: Callable[[int], None]) -> Generator[Sample]:
    """Yield the samples of the shards one after another while threads read the next ones, OPEN at once in all.

    `ended` is called with each shard after its last sample. The order is that of the shards, however fast they come.
    """
    waiting = list(shards)
    readings: list[tuple[int, _Reading]] = []
    try:
        while waiting or readings:
            while waiting and len(readings) < OPEN:
                shard = waiting.pop(0)
                readings.append((shard, _Reading(read(shard))))
            shard, reading = readings[0]
            yield from reading.take()
            ended(shard)
            readings.pop(0)
    finally:
        for _, reading in readings:
            reading.close()


def shuffle(items: Iterable[Item], size: int, seed: str) -> Iterator[Item]:
    """Yield the items in random order, each time one drawn from a buffer of `size` items."""
    draw, buffer = random.Random(seed), list[Item]()
    for item in items:
        buffer.append(item)
        if len(buffer) > size:
            # Swapped with the last one, as taking an item out of the middle of a list moves all behind it.
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


def decode(stream: Iterable[Sample], reader: Reader, crop_seed: tuple[int, int], report: Callable[[Sample, BadSample],
           None], pictures: int, log: Callable[[str], None] = discard) -> Generator[Decoded]:
    """Decode in order, ahead of what is taken; with --augment a random crop of each. `pictures` is about how many.

    `crop_seed` is seed and epoch; a crop is a function of both and of the image's content.
    """
    feed = Feed(ToPixels(reader.spec, reader.max_pixels), reader, pictures, log)
    crop = (*crop_seed, None) if reader.augment else None
    tasks = ((sample, Task(sample.image, crop)) for sample in stream)
    with closing(feed.lots(grouped(tasks, feed.lot))) as lots:
        for lot in lots:
            for sample, outcome, pixels_CSS in zip(lot.tags, lot.outcomes, lot.records, strict=True):
                image_id = content_number(outcome.key or key_of(sample.image))
                if outcome.problem is not None:
                    report(sample, BadSample(*outcome.problem))
                yield Decoded(sample, image_id, None if outcome.problem else pixels_CSS.copy())


def collate(batch: Sequence[Decoded], encoders: Encoders, crop: tuple[int, int], negatives: int) -> Batch:
    """Tokenise and stack a batch; each row gets `negatives` hard negatives, missing ones with the id -1.

    Equal ids mean equal bytes or token ids, as in every batch. They are digests: a stream has no list of all rows to
    number contents by.
    """
    pixels = [item.pixels_CSS for item in batch if item.pixels_CSS is not None]
    pixels_BCSS = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, *crop, dtype=torch.uint8)
    image_id_B = torch.tensor([item.image_id for item in batch], dtype=torch.int64)
    texts = [item.sample.title for item in batch]
    exists = [True] * len(batch)
    for place in range(negatives):  # negative 1 of all rows, then negative 2 of all rows, …
        for item in batch:
            exists.append(place < len(item.sample.negatives))
            # A missing negative is filled with the row's own title; its id -1 keeps it out of the loss.
            texts.append(item.sample.negatives[place] if exists[-1] else item.sample.title)
    tokens = tokenize(encoders.tokenizer, texts, encoders.max_tokens)
    ids = [content_id(np.array(row_ids, np.int32).tobytes()) for row_ids in tokens]
    for place, item in enumerate(batch):
        if item.sample.class_name:  # titles of one class are the same to the loss, whatever their templates
            ids[place] = content_id(item.sample.class_name.encode("utf-8", "surrogatepass"))
    id_KB = torch.where(torch.tensor(exists, dtype=torch.bool), torch.tensor(ids, dtype=torch.int64), -1)
    id_KB = id_KB.reshape(1 + negatives, len(batch))
    title = collate_tokens(tokens[: len(batch)], encoders.pad_id)
    if not negatives:
        return Batch(pixels_BCSS, title, None, image_id_B, id_KB[0], None)
    negative = collate_tokens(tokens[len(batch) :], encoders.pad_id)
    return Batch(pixels_BCSS, title, negative, image_id_B, id_KB[0], id_KB[1:].T.contiguous())


def content_id(data: bytes) -> int:
    """Return a number of 63 bits for a content; two contents share one with a chance of 1e-19."""
    return content_number(key_of(data))


def count_negatives(shard: Generator[Sample], looked_at: int) -> int:
    """Return the largest number of negatives among the first samples of a shard."""
    with closing(shard):
        return max((len(sample.negatives) for sample in islice(shard, looked_at)), default=0)
