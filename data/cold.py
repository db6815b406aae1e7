"""The cold pass: open, decode and encode every distinct image and title once; ranks share the work.

Dimension key: V/T image/text feature width, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, Team, Tokens
from data.catalogue import Catalogue, DecodeResult, DecodeResults, as_keys
from data.identity import TitleIds
from data.images.decode import PaddingTokenizer, collate_tokens, tokenize
from data.images.feed import Feed, Lot, grouped
from data.images.reader import STORE_START, URL_START, Reader, matching
from data.images.worker import Job, KnownKeys, Task, ToPixels
from data.prefetch import batched, threaded_map
from data.progress import Progress
from data.store.features import SEGMENT, FeatureStore
from data.web.limits import unused_proxy

if TYPE_CHECKING:
    import pyarrow as pa

TITLES = 512  # titles that the tower encodes at once
PIXELS = 1 << 28  # bytes of decoded images that a rank keeps from the opening for the first evaluation
# Reasons of `decode_image` that lie in the bytes; others depend on settings, such as --max-pixels.
NO_PICTURE = {"empty", "not-image", "truncated", "undecodable"}
STORE_REQUESTS = 32  # images that are read from a store at the same time


@dataclass(frozen=True)
class Encoders:
    """The frozen towers as two functions, the names of the feature spaces that they map into, and the tokenizer."""

    image: Callable[[Tensor], Tensor]  # uint8 pixels [B, 3, S, S] -> [B, V]
    text: Callable[[Tokens], Tensor]  # tokens [B, L] -> [B, T]
    image_width: int
    text_width: int
    image_space: str
    text_space: str
    stored: bool  # features are constants, computed once and kept in the feature store
    tokenizer: PaddingTokenizer
    max_tokens: int

    @property
    def pad_id(self) -> int:
        """The id of the padding token."""
        return self.tokenizer.pad_token_id

    def title_ids(self, cache: Path) -> TitleIds:
        """Return the identity of titles: their token ids under this tokenizer."""
        return TitleIds(self.tokenizer, self.max_tokens, self.text_space, cache / "seen")

    def tokenize(self, titles: pa.LargeStringArray) -> list[list[int]]:
        """Return the token ids of titles."""
        return tokenize(self.tokenizer, titles.to_pylist(), self.max_tokens)

    def image_store(self, cache: Path) -> FeatureStore:
        """Open the store of image features in a --cache-dir."""
        return FeatureStore(cache / "features" / self.image_space, self.image_width)

    def title_store(self, cache: Path) -> FeatureStore:
        """Open the store of title features in a --cache-dir."""
        return FeatureStore(cache / "features" / self.text_space, self.text_width)


class EarlierRun(NamedTuple):
    """An earlier run on the data that is being opened."""

    ledger: Sequence[Mapping[str, Any]]  # what it dropped and lost
    replays: bool  # its steps are trained again, to verify them; else it goes on


@dataclass(frozen=True)
class Pipeline:
    """From references and titles to features on this rank: reader, towers, ranks, cache folder, device, log."""

    reader: Reader
    encoders: Encoders
    team: Team
    cache: Path
    device: torch.device
    log: Callable[[str], None]
    run: EarlierRun | None = None  # a run that began with the same data and is resumed or verified


def decode_lots(catalogue: Catalogue, references: Sequence[int], feed: Feed) -> Iterator[Lot[int]]:
    """Read and decode the given references; yield them in lots, which are valid until the next one is asked for."""
    reader = feed.reader
    progress = Progress("images", len(references), feed.log)

    def tasks() -> Iterator[tuple[int, Task | BadSample]]:
        for index, read in _available(catalogue, reader, np.asarray(references, np.int64), feed.log):
            if isinstance(read, BadSample):
                yield index, read
            else:
                yield index, Task(catalogue.references[index].as_py() if read is None else read)

    with closing(feed.lots(grouped(tasks(), feed.lot))) as lots:
        for lot in lots:
            good = 0
            for index, outcome in zip(lot.tags, lot.outcomes, strict=True):
                if outcome.problem is None:
                    good += 1
                    continue
                # A server may have answered with a page: bytes that are no picture are fetched again by a later run.
                if outcome.problem[0] in NO_PICTURE:
                    reader.forget(catalogue.references[index].as_py())
                progress(problem=BadSample(*outcome.problem))
            progress(good)
            yield lot


def as_results(lot: Lot[int]) -> Iterator[DecodeResult]:
    """Yield the result of each reference of a lot; pixels are valid as long as the lot."""
    for place, (index, outcome) in enumerate(zip(lot.tags, lot.outcomes, strict=True)):
        if outcome.problem is not None:
            yield DecodeResult(index, b"", BadSample(*outcome.problem))
        else:
            yield DecodeResult(index, outcome.key, None, lot.records[place] if outcome.is_filled else None)


def decode_distinct(catalogue: Catalogue, reader: Reader, references: Sequence[int], job: Job,
                    log: Callable[[str], None]) -> Iterator[DecodeResult]:
    """Read the given references and decode them by `job`, in bounded memory.

    A result's pixels, or whatever the job makes, are valid until the next result is asked for.
    """
    for lot in decode_lots(catalogue, references, Feed(job, reader, len(references), log)):
        yield from as_results(lot)


def _available(catalogue: Catalogue, reader: Reader, references: np.ndarray,
               log: Callable[[str], None]) -> Iterator[tuple[int, BadSample | bytes | None]]:
    """Yield each reference when its bytes can be read, or with the reason why they cannot.

    Local files and fetched URLs come with None: a worker reads them. Images in a store come with their bytes.
    """
    is_remote_R = matching(catalogue.references, URL_START)[references]
    is_stored_R = matching(catalogue.references, STORE_START)[references]
    for index in references[~(is_remote_R | is_stored_R)]:
        yield int(index), None

    def read(index: int) -> tuple[int, BadSample | bytes]:
        try:
            return index, reader.read(catalogue.references[index].as_py())
        except BadSample as problem:
            return index, problem

    if is_stored_R.any():
        yield from threaded_map(read, references[is_stored_R].tolist(), STORE_REQUESTS, STORE_REQUESTS)
    remote = references[is_remote_R]
    in_flight: dict[str, int] = {}  # URL -> its reference; references are distinct, so no URL comes twice

    def urls() -> Iterator[str]:
        for index in remote:
            url = catalogue.references[index].as_py()
            in_flight[url] = int(index)
            yield url

    if not len(remote):
        return
    if not reader.policy.proxy and (name := unused_proxy()):
        log(f"{name} is set and not used: images are fetched directly; --proxy URL fetches them through a proxy")
    for fetched in reader.fetch(urls()):
        problem = BadSample(fetched.reason, fetched.detail) if fetched.reason else None
        yield in_flight.pop(fetched.url), problem


class DecodedImages:
    """Pixels from the opening until the first evaluation takes them, so that no image is decoded twice for both.

    Those of the references `wanted` are kept, up to PIXELS bytes; what is not kept is decoded again.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self._wanted = frozenset(wanted)
        self._room = PIXELS  # bytes
        self._pixels: dict[int, np.ndarray] = {}

    def keep(self, reference: int, pixels_CSS: np.ndarray) -> None:
        """Keep the pixels of a reference, if they are wanted and there is room."""
        if reference in self._wanted and pixels_CSS.nbytes <= self._room:
            self._pixels[reference] = pixels_CSS.copy()
            self._room -= pixels_CSS.nbytes

    def take(self) -> dict[int, np.ndarray]:
        """Return the kept pixels by reference; from now on nothing is kept."""
        pixels, self._pixels = self._pixels, {}
        self._wanted = frozenset()
        return pixels


def check_images(catalogue: Catalogue, reader: Reader, references: Sequence[int], decoded: DecodedImages,
                 log: Callable[[str], None]) -> DecodeResults:
    """Read and decode the given references, to find out before the first step which rows streaming can use."""
    results, job = DecodeResults(), ToPixels(reader.spec, reader.max_pixels)
    for result in decode_distinct(catalogue, reader, references, job, log):
        results.add(result)
        if result.pixels is not None:
            decoded.keep(result.reference, result.pixels)
    return results


class FeatureWriter:
    """Encodes the pictures that a store lacks, and stores their features in segments; without a store it does nothing.
    """

    def __init__(self, store: FeatureStore | None, encode: Callable[[Tensor], Tensor]) -> None:
        self.store, self.encode = store, encode
        self._unwritten: dict[bytes, Tensor] = {}  # key -> features [V] that are not yet in the store

    def known_keys(self) -> KnownKeys:
        """Return the keys that the store holds now; the checksums of their features are not looked at."""
        return KnownKeys(*(self.store.sorted_keys() if self.store is not None else ()))

    def add(self, lot: Lot[Any]) -> list[int]:
        """Encode the new pictures of a lot at once.

        Returns the places of pictures that were not decoded, since the store knows them, but whose features turn out to
        be damaged: they have to be decoded after all.
        """
        store, places = self.store, dict[bytes, int]()
        for place, outcome in enumerate(lot.outcomes):
            if outcome.problem is None and outcome.key not in self._unwritten:
                places.setdefault(outcome.key, place)
        if store is None or not places:
            return []
        is_missing = (store.locate(as_keys([*places])) < 0).tolist()
        missing = dict(compress(places.items(), is_missing))
        decoded = {key: place for key, place in missing.items() if lot.outcomes[place].is_filled}
        if decoded:
            rows = [*decoded.values()]
            # A lot that is new as a whole needs no copy: the tower reads the shared memory of the decoders.
            records = lot.records if len(rows) == len(lot.records) else lot.records[rows]
            features = self.encode(torch.from_numpy(records)).cpu()
            self._unwritten.update(zip(decoded, features, strict=True))
        if len(self._unwritten) >= SEGMENT:
            self.flush()
        return [place for key, place in missing.items() if key not in decoded]

    def flush(self) -> None:
        """Write the features that are encoded and not yet stored. Raises UserError."""
        if self.store is not None and self._unwritten:
            self.store.append(as_keys(list(self._unwritten)), torch.stack(list(self._unwritten.values())))
            self._unwritten.clear()


def encode_missing_images(catalogue: Catalogue, reader: Reader, references: Sequence[int], store: FeatureStore,
                          encode: Callable[[Tensor], Tensor], log: Callable[[str], None]) -> DecodeResults:
    """Read the given references; encode those that the store does not hold yet, in lots, and store the features."""
    results, writer = DecodeResults(), FeatureWriter(store, encode)
    todo, known = references, writer.known_keys()
    # The feed skips pictures whose keys are in the store before the checksums of their features are looked at. Those
    # whose features turned out to be damaged are read a second time, with no key known.
    while len(todo):
        job = ToPixels(reader.spec, reader.max_pixels, known)
        feed = Feed(job, reader, len(todo), log, pinned=torch.cuda.is_initialized())
        results.times = results.times or feed.times
        damaged: list[int] = []
        for lot in decode_lots(catalogue, todo, feed):
            again = [lot.tags[place] for place in writer.add(lot)]
            damaged += again
            for result in as_results(lot):
                if result.reference not in again:
                    results.add(result)
        todo, known = damaged, KnownKeys()
    writer.flush()
    return results


def encode_missing_titles(tokens: Callable[[slice], Sequence[Sequence[int]]], keys: np.ndarray, store: FeatureStore,
                          pad_id: int, encode: Callable[[Tokens], Tensor],
                          log: Callable[[str], None] = lambda text: None) -> None:
    """Encode the titles of `keys` [n, 16], which the store lacks; `tokens` returns the ids of a slice of them."""
    progress = Progress("titles", len(keys), log)
    for start in range(0, len(keys), SEGMENT):
        part = slice(start, start + SEGMENT)
        store.append(keys[part], encode_titles(tokens(part), pad_id, encode, store.width, progress))


def encode_titles(ids: Sequence[Sequence[int]], pad_id: int, encode: Callable[[Tokens], Tensor], width: int,
                  progress: Callable[[int], None] = lambda count: None) -> Tensor:
    """Return text features [len(ids), T] on the CPU, in order; titles of similar length are encoded together."""
    if not ids:
        return torch.empty(0, width)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for chunk in batched(order, TITLES):
        parts.append(encode(collate_tokens([ids[i] for i in chunk], pad_id)).cpu())
        progress(len(chunk))
    return torch.cat(parts)[torch.argsort(torch.tensor(order))]
