"""The cold pass: every distinct image and title is opened, decoded and encoded once, ranks sharing the work.

Dimension key: V/T image/text feature width, B rows of a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, Batch, Tokens
from data.catalogue import Catalogue, DecodeResult, DecodeResults, Split, as_keys
from data.files import NotAFile, read_regular
from data.images.augment import Region
from data.images.decode import ImageSpec, collate_tokens, decode_image
from data.prefetch import Progress, batched, threaded_map
from data.shards.index import read_member
from data.store.features import FeatureStore
from data.store.segments import key_of
from data.web.fetch import Fetched, FetchPolicy, cached_path, delete_fetched, fetch
from data.web.guard import unused_proxy

CHUNK = 64  # images handed to the tower at once
TITLES = 512  # likewise titles
SEGMENT = 4096  # features written at once
NO_PICTURE = {"empty", "not-image", "truncated", "undecodable"}  # reasons of `decode_image` that lie in the bytes
URL_START = "^(?i)https?://"


@dataclass(frozen=True)
class Reader:
    """How a reference becomes pixels: where fetched bytes lie, what the decoder makes, what the fetcher may do."""

    folder: Path
    spec: ImageSpec
    policy: FetchPolicy
    max_pixels: int
    workers: int
    retry_failed: bool = False
    augment: bool = False  # training sees random parts of its images

    def fetch(self, urls: Iterable[str]) -> Generator[Fetched]:
        """Bring these URLs into the folder; each one's fate as it is known."""
        return fetch(urls, self.folder, self.policy, self.retry_failed)

    def forget(self, reference: Mapping[str, Any]) -> None:
        """Drop what was fetched for a reference, as it is no picture; a later run asks for it again."""
        if reference["bytes"] is None and is_url(reference["path"] or ""):
            delete_fetched(reference["path"], self.folder)

    def read(self, reference: Mapping[str, Any]) -> bytes:
        """The bytes behind one reference. Raises BadSample when they are not to be had."""
        data, path = reference["bytes"], reference["path"]
        if data is not None:
            return bytes(data)
        try:
            if not path:
                raise BadSample("no-image", "the row names no image")
            if is_url(path):
                return read_regular(cached_path(path, self.folder))
            return read_member(path) if ".tar#" in path else read_regular(path)
        except FileNotFoundError:
            raise BadSample("missing-file", path) from None
        except NotAFile as error:
            raise BadSample("not-a-file", f"{path}: {error.strerror}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BadSample("unreadable-file", f"{path}: {error}") from None

    def pixels(self, reference: Mapping[str, Any],
               region: Callable[[int, int], Region] | None = None) -> np.ndarray:
        """uint8 pixels [3, S, S] of one reference, or of a region of it. Raises BadSample."""
        return decode_image(self.read(reference), self.spec, self.max_pixels, region)


def is_url(path: str) -> bool:
    """Does this reference have to be fetched?"""
    return path.lower().startswith(("http://", "https://"))


def decode_distinct(found: Catalogue, reader: Reader, mine: Sequence[int], known: Callable[[bytes], bool],
          tell: Callable[[str], None], decode: Callable[[bytes], np.ndarray] | None = None) -> Iterator[DecodeResult]:
    """Open, and where its content is not `known` decode, each of `mine` references; in any order, bounded memory.

    `decode` takes the place of the reader's own decoding into pixels, and may raise BadSample as that does.
    """
    decode = decode or partial(decode_image, spec=reader.spec, max_pixels=reader.max_pixels)

    def look(available: tuple[int, BadSample | None]) -> DecodeResult:
        index, problem = available
        if problem is not None:
            return DecodeResult(index, b"", problem)
        reference = found.references[index].as_py()
        try:
            data = reader.read(reference)
            key = key_of(data)
            return DecodeResult(index, key, None, None if known(key) else decode(data))
        except BadSample as found_out:
            if found_out.reason in NO_PICTURE:
                reader.forget(reference)
            return DecodeResult(index, b"", found_out)

    pace = Progress("images", len(mine), tell)
    for verdict in threaded_map(look, _available(found, reader, np.asarray(mine, np.int64), tell), reader.workers, 2 * CHUNK):
        pace(problem=verdict.problem)
        yield verdict


def _available(found: Catalogue, reader: Reader, mine: np.ndarray,
               tell: Callable[[str], None]) -> Iterator[tuple[int, BadSample | None]]:
    """The references as their bytes become readable: local ones at once, URLs as the fetcher finishes them."""
    import pyarrow.compute as pc

    path = found.references.path  # null where the bytes are embedded
    is_remote_R = pc.fill_null(pc.match_substring_regex(path, URL_START), False).to_numpy()[mine]
    for index in mine[~is_remote_R]:
        yield int(index), None
    remote = mine[is_remote_R]
    asked: dict[str, int] = {}  # those that the fetcher has in hand; no URL comes twice

    def urls() -> Iterator[str]:
        for index in remote:
            asked[url := path[index].as_py()] = int(index)
            yield url

    if len(remote) and not reader.policy.proxy and (name := unused_proxy()):
        tell(f"{name} is set and not used: images are fetched directly; --proxy URL fetches them through a proxy")
    for fetched in reader.fetch(urls()) if len(remote) else ():
        yield asked.pop(fetched.url), BadSample(fetched.reason, fetched.detail) if fetched.reason else None


def encode_missing_images(found: Catalogue, reader: Reader, mine: Sequence[int], store: FeatureStore | None,
                encode: Callable[[Tensor], Tensor], tell: Callable[[str], None]) -> DecodeResults:
    """Look at `mine` references; what the store does not hold yet goes through the tower once, in CHUNKs.

    Without a store images are only decoded, to know now which rows streaming can use.
    """
    seen = DecodeResults()
    fresh: set[bytes] = set()  # encoded, and not yet in the store
    lock = threading.Lock()  # `known` is asked from the decoding threads

    def known(key: bytes) -> bool:
        with lock:
            return store is not None and (key in fresh or store.locate(as_keys([key]))[0] >= 0)

    keys: list[bytes] = []
    values: list[Tensor] = []
    for chunk in batched(decode_distinct(found, reader, mine, known, tell), CHUNK):
        for verdict in chunk:
            seen.add(verdict)
        if store is None:
            continue
        new = {v.key: v.pixels for v in chunk if v.pixels is not None and not known(v.key)}
        if new:
            keys += new
            fresh.update(new)
            values.append(encode(torch.from_numpy(np.stack(list(new.values())))).cpu())
        if len(keys) >= SEGMENT:
            with lock:
                store.append(as_keys(keys), torch.cat(values))
                fresh.clear()
            keys, values = [], []
    if store is not None and keys:
        store.append(as_keys(keys), torch.cat(values))
    return seen


def encode_missing_titles(tokens: Callable[[Sequence[int]], Sequence[Sequence[int]]], keys: np.ndarray, store: FeatureStore,
                own: Sequence[int], pad_id: int, encode: Callable[[Tokens], Tensor],
                tell: Callable[[str], None] = lambda text: None) -> None:
    """Encode `own` of the titles, this rank's share of what the store does not hold yet; `tokens` reads some."""
    pace = Progress("titles", len(own), tell)
    for part in batched(own, SEGMENT):
        store.append(keys[np.asarray(part)], encode_titles(tokens(part), pad_id, encode, store.width, pace))


def encode_titles(ids: Sequence[Sequence[int]], pad_id: int, encode: Callable[[Tokens], Tensor], width: int,
                  pace: Callable[[int], None] = lambda count: None) -> Tensor:
    """Text features [len(ids), T] on the CPU, in order; like lengths go to the tower together."""
    if not ids:
        return torch.empty(0, width)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for chunk in batched(order, TITLES):
        parts.append(encode(collate_tokens([ids[i] for i in chunk], pad_id)).cpu())
        pace(len(chunk))
    return torch.cat(parts)[torch.argsort(torch.tensor(order))]


def streamed_batch(split: Split, found: Catalogue, example: np.ndarray, reader: Reader, ids: Sequence[Sequence[int]],
                   pad_id: int) -> Callable[..., Batch]:
    """A function that makes the Batch of given row numbers: images read and decoded, titles padded.

    Its second argument, if any, says which region of a row's image to show: row, width, height -> region.
    """
    def make(rows_B: Tensor, region: Callable[[int, int, int], Region] | None = None) -> Batch:
        image_B, title_B = split.image_N[rows_B], split.title_N[rows_B]
        negative_B = None if split.negative_N is None else split.negative_N[rows_B]
        pixels = [reader.pixels(found.references[int(example[i])].as_py(), region and partial(region, row))
                  for row, i in zip(rows_B.tolist(), image_B.tolist(), strict=True)]
        side = reader.spec.crop
        return Batch(
            torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, *side, dtype=torch.uint8),
            collate_tokens([ids[i] for i in title_B.tolist()], pad_id),
            None if negative_B is None else collate_tokens([ids[max(i, 0)] for i in negative_B.tolist()], pad_id),
            image_B, title_B, negative_B,
        )
    return make


def encode_images(found: Catalogue, references: np.ndarray, reader: Reader, encode: Callable[[Tensor], Tensor],
                  width: int) -> Tensor:
    """Image features [len(references), V] on the CPU, in order, of references already known to decode."""
    decoded = threaded_map(lambda index: reader.pixels(found.references[int(index)].as_py()), references, reader.workers,
                    2 * CHUNK)
    parts = [encode(torch.from_numpy(np.stack(chunk))).cpu() for chunk in batched(decoded, CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, width)
