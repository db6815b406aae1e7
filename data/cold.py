"""The cold pass: open, decode and encode every distinct image and title once; ranks share the work.

Dimension key: V/T image/text feature width, B rows of a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, Team, Tokens
from data.catalogue import Catalogue, DecodeResult, DecodeResults, as_keys
from data.files import NotAFile, read_regular
from data.identity import TitleIds
from data.images.augment import Region
from data.images.decode import ImageSpec, PaddingTokenizer, collate_tokens, decode_image, tokenize
from data.prefetch import batched, threaded_map
from data.progress import Progress
from data.shards.index import is_range, read_member, read_stored
from data.store.features import FeatureStore
from data.store.segments import key_of
from data.web.fetched import Fetched, cached_path, delete_fetched
from data.web.limits import FetchPolicy, unused_proxy
from data.web.storage import PACKAGES, is_stored

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 64  # images that the tower encodes at once
TITLES = 512  # titles that the tower encodes at once
SEGMENT = 4096  # features written at once
PIXELS = 1 << 28  # bytes of decoded images that a rank keeps from the opening for the first evaluation
NO_PICTURE = {"empty", "not-image", "truncated", "undecodable"}  # reasons of `decode_image` that are in the bytes
URL_START = "^(?i)https?://"
STORE_START = f"^(?i)({'|'.join(PACKAGES)})://"
STORE_REQUESTS = 32  # images that are read from a store at the same time


@dataclass(frozen=True)
class Reader:
    """Reads image references: fetched bytes, files, and ranges of files (members of shards, embedded pictures)."""

    folder: Path  # of fetched bytes
    spec: ImageSpec
    policy: FetchPolicy
    max_pixels: int
    workers: int
    retry_failed: bool = False
    augment: bool = False  # training uses random crops

    def fetch(self, urls: Iterable[str]) -> Generator[Fetched]:
        """Fetch these URLs into the folder; yield the result of each as it arrives."""
        from data.web.fetch import fetch  # its client takes a fifth of a second to import

        return fetch(urls, self.folder, self.policy, self.retry_failed)

    def forget(self, reference: str) -> None:
        """Delete the fetched bytes of a reference that are no picture, so that a later run fetches them again."""
        if is_url(reference):
            delete_fetched(reference, self.folder)

    def read(self, reference: str) -> bytes:
        """Return the bytes of a reference. Raises BadSample when they are missing or cannot be read."""
        try:
            if not reference:
                raise BadSample("no-image", "the row names no image")
            if is_stored(reference):
                return read_stored(reference, self.policy.max_bytes)
            if is_url(reference):
                return read_regular(cached_path(reference, self.folder))
            return read_member(reference) if is_range(reference) else read_regular(reference)
        except FileNotFoundError:
            raise BadSample("missing-file", reference) from None
        except NotAFile as error:
            raise BadSample("not-a-file", f"{reference}: {error.strerror}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BadSample("unreadable-file", f"{reference}: {error}") from None

    def pixels(self, reference: str, region: Callable[[int, int], Region] | None = None) -> np.ndarray:
        """Return uint8 pixels [3, S, S] of a reference, or of a region of it. Raises BadSample."""
        return decode_image(self.read(reference), self.spec, self.max_pixels, region)


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

    def tokenize(self, titles: pa.StringArray) -> list[list[int]]:
        """Return the token ids of titles."""
        return tokenize(self.tokenizer, titles.to_pylist(), self.max_tokens)

    def image_store(self, cache: Path) -> FeatureStore:
        """Open the store of image features in a --cache-dir."""
        return FeatureStore(cache / "features" / self.image_space, self.image_width)

    def title_store(self, cache: Path) -> FeatureStore:
        """Open the store of title features in a --cache-dir."""
        return FeatureStore(cache / "features" / self.text_space, self.text_width)


@dataclass(frozen=True)
class Pipeline:
    """From references and titles to features on this rank: reader, towers, ranks, cache folder, device, log."""

    reader: Reader
    encoders: Encoders
    team: Team
    cache: Path
    device: torch.device
    log: Callable[[str], None]


def is_url(path: str) -> bool:
    """Return whether a reference has to be fetched."""
    return path.lower().startswith(("http://", "https://"))


def decode_distinct(catalogue: Catalogue, reader: Reader, references: Sequence[int], known: Callable[[bytes], bool],
                    log: Callable[[str], None],
                    decode: Callable[[bytes], np.ndarray] | None = None) -> Iterator[DecodeResult]:
    """Read the given references, and decode those whose content key is not `known`; in any order, in bounded memory.

    `decode` replaces the reader's own decoding into pixels, and may raise BadSample as that does.
    """
    decode = decode or partial(decode_image, spec=reader.spec, max_pixels=reader.max_pixels)

    def read_and_decode(available: tuple[int, BadSample | bytes | None]) -> DecodeResult:
        index, read = available
        if isinstance(read, BadSample):
            return DecodeResult(index, b"", read)
        reference = catalogue.references[index].as_py()
        try:
            data = read or reader.read(reference)
            key = key_of(data)
            return DecodeResult(index, key, None, None if known(key) else decode(data))
        except BadSample as failure:
            if failure.reason in NO_PICTURE:
                reader.forget(reference)
            return DecodeResult(index, b"", failure)

    progress = Progress("images", len(references), log)
    available = _available(catalogue, reader, np.asarray(references, np.int64), log)
    for result in threaded_map(read_and_decode, available, reader.workers, 2 * CHUNK):
        progress(problem=result.problem)
        yield result


def _matching(references: pa.StringArray, pattern: str) -> np.ndarray:
    """Return which references match, bool [M]."""
    import pyarrow.compute as pc

    return pc.match_substring_regex(references, pattern).to_numpy(zero_copy_only=False)


def _available(catalogue: Catalogue, reader: Reader, references: np.ndarray,
               log: Callable[[str], None]) -> Iterator[tuple[int, BadSample | bytes | None]]:
    """Yield the references as their bytes become readable, or why they cannot be.

    Local ones come at once, those in a store with their bytes, URLs as the fetcher finishes them.
    """
    is_remote_R = _matching(catalogue.references, URL_START)[references]
    is_stored_R = _matching(catalogue.references, STORE_START)[references]
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

    Kept are those of the references `wanted`, as far as `room` bytes go; what is not kept is decoded again.
    """

    def __init__(self, wanted: Collection[int] = (), room: int = PIXELS) -> None:
        self._wanted, self._room = frozenset(wanted), room
        self._pixels: dict[int, np.ndarray] = {}

    def keep(self, reference: int, pixels_CSS: np.ndarray) -> None:
        """Keep the pixels of a reference, if they are wanted and there is room."""
        if reference in self._wanted and pixels_CSS.nbytes <= self._room:
            self._pixels[reference] = pixels_CSS
            self._room -= pixels_CSS.nbytes

    def take(self) -> dict[int, np.ndarray]:
        """Return what is kept, by reference, and keep nothing any more."""
        self._wanted, pixels, self._pixels = frozenset(), self._pixels, {}
        return pixels


def check_images(catalogue: Catalogue, reader: Reader, references: Sequence[int], decoded: DecodedImages,
                 log: Callable[[str], None]) -> DecodeResults:
    """Read and decode the given references, to know before the first step which rows streaming can use."""
    results = DecodeResults()
    for result in decode_distinct(catalogue, reader, references, lambda key: False, log):
        results.add(result)
        if result.pixels is not None:
            decoded.keep(result.reference, result.pixels)
    return results


class FeatureWriter:
    """Encodes the pictures that a store lacks, and stores their features in segments; without a store it does nothing.

    `known` may be called from any thread.
    """

    def __init__(self, store: FeatureStore | None, encode: Callable[[Tensor], Tensor]) -> None:
        self.store, self.encode = store, encode
        self._unwritten: dict[bytes, Tensor] = {}  # key -> features [V] that are not yet in the store
        self._lock = threading.Lock()

    def known(self, key: bytes) -> bool:
        """Return whether the features of a content key are computed."""
        with self._lock:
            return self.store is not None and (key in self._unwritten or self.store.locate(as_keys([key]))[0] >= 0)

    def add(self, chunk: Sequence[DecodeResult]) -> None:
        """Encode the new pictures of a chunk at once."""
        if self.store is None:
            return
        new = {each.key: each.pixels for each in chunk if each.pixels is not None and not self.known(each.key)}
        if new:
            features_BV = self.encode(torch.from_numpy(np.stack(list(new.values())))).cpu()
            with self._lock:
                self._unwritten.update(zip(new, features_BV, strict=True))
        if len(self._unwritten) >= SEGMENT:
            self.flush()

    def flush(self) -> None:
        """Store what has been encoded. Raises UserError."""
        with self._lock:
            if self.store is not None and self._unwritten:
                self.store.append(as_keys(list(self._unwritten)), torch.stack(list(self._unwritten.values())))
                self._unwritten.clear()


def encode_missing_images(catalogue: Catalogue, reader: Reader, references: Sequence[int], store: FeatureStore,
                          encode: Callable[[Tensor], Tensor], log: Callable[[str], None]) -> DecodeResults:
    """Read the given references; encode those that the store does not hold yet, in CHUNKs, and store the features."""
    results, writer = DecodeResults(), FeatureWriter(store, encode)
    for chunk in batched(decode_distinct(catalogue, reader, references, writer.known, log), CHUNK):
        for result in chunk:
            results.add(result)
        writer.add(chunk)
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


def encode_images(catalogue: Catalogue, references: np.ndarray, pipeline: Pipeline,
                  decoded: dict[int, np.ndarray]) -> Tensor:
    """Return image features [len(references), V] on the CPU, in order, of references already known to decode.

    Those whose pixels are in `decoded` are not read again.
    """
    reader, encode, width = pipeline.reader, pipeline.encoders.image, pipeline.encoders.image_width

    def pixels(index: int) -> np.ndarray:
        kept = decoded.pop(index, None)
        return reader.pixels(catalogue.references[index].as_py()) if kept is None else kept

    images = threaded_map(pixels, references.tolist(), reader.workers, 2 * CHUNK)
    parts = [encode(torch.from_numpy(np.stack(chunk))).cpu() for chunk in batched(images, CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, width)
