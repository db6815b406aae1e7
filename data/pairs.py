"""A dataset ready to train on and measure: cached (features from the store) or streaming (pixels every step).

Dimension key: D distinct images by content, P distinct titles, V/T image/text feature width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Batches, Features, Team, Tokens, UserError, share
from data.catalogue import Catalogue, DecodeResult, DecodeResults, Split, catalogue, keep_usable_rows, keys_and_usable
from data.cold import Reader, encode_images, encode_missing_images, encode_missing_titles, encode_titles, streamed_batch
from data.identity import Contents, TitleIds
from data.images.album import RowPreviews
from data.images.augment import random_region
from data.images.decode import tokenize
from data.ledger import dropped_rows
from data.mine import mine_negatives
from data.prefetch import epoch_batches, prefetch_to_device, threaded_map
from data.sources.source import Rows
from data.store.feature_split import FeatureSplit, StoredTable
from data.store.features import FeatureStore
from data.store.segments import spaces
from data.store.stat_cache import StatCache


@dataclass(frozen=True)
class Encoders:
    """What the towers lend to this room: two functions, and the names of the feature spaces they map into."""

    image: Callable[[Tensor], Tensor]  # uint8 pixels [B, 3, S, S] -> [B, V]
    text: Callable[[Tokens], Tensor]  # tokens [B, L] -> [B, T]
    image_width: int
    text_width: int
    image_space: str
    text_space: str
    stored: bool  # are the features constants, to be computed once and kept?
    tokenizer: Any
    max_tokens: int

    def titles(self, cache: Path) -> TitleIds:
        """How titles are told apart: as the tokenizer reads them."""
        return TitleIds(self.tokenizer, self.max_tokens, self.text_space, cache / "seen")


@dataclass(frozen=True)
class Pairs:
    """All splits of a dataset after the cold pass; the two functions are where cached and streaming differ."""

    splits: Mapping[str, Split]
    ledger: Sequence[Mapping[str, Any]]
    identity: Mapping[str, str]  # digests of each split's kept rows and of the base model's towers
    contents: Mapping[str, Contents]  # each split's content keys
    residents: Callable[[], Mapping[str, FeatureSplit]]  # every split's features; encoded anew on each call if streaming
    batches: Callable[[str, int, int, torch.device], Callable[[int], Iterator[Features] | Iterator[Batch]]]
    # (split, batch size, seed, device) -> first step -> this rank's inputs of every step from there on
    album: RowPreviews
    store: str = ""  # what the cold pass did to the feature store

    def describe(self) -> str:
        """Kept rows of each split, dropped rows; the feature store, where there is one."""
        kept = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        dropped = f"{dropped_rows(self.ledger):,} rows dropped{' (see ledger.jsonl)' if self.ledger else ''}"
        return f"pairs: {kept}; {dropped}" + (f"\n{self.store}" if self.store else "")


def open_pairs(rows: Mapping[str, Rows], lost: Sequence[Mapping[str, Any]], reader: Reader, encoders: Encoders,
               team: Team, cache: Path, max_bad: float, mine_how: str, device: torch.device,
               tell: Callable[[str], None]) -> Pairs:
    """Look at every row, run the towers where their features are constants, and account for what is dropped.

    `lost` are ledger entries of what never became a row. Raises UserError when too many rows are unusable or a split
    ends up empty.
    """
    began, found = time.monotonic(), catalogue(rows, encoders.titles(cache))
    images = FeatureStore(cache / "features" / encoders.image_space, encoders.image_width) if encoders.stored else None
    verdicts = _look(found, reader, images, encoders, team, cache, tell)
    splits, image_keys, example, ledger = keep_usable_rows(found, verdicts, lost, max_bad)
    if mine_how != "off" or images is not None:
        titles = _encoded_titles(found, encoders, team, cache, tell)
        title_table = _table(titles, found.title_keys)
        if mine_how != "off":
            features_PT = title_table.to(torch.device("cpu"))
            splits = {name: mine_negatives(split, features_PT, mine_how, [*splits.values()]) for name, split in splits.items()}
    contents = {name: Contents(image_keys[split.image_N.numpy()], found.title_keys[split.title_N.numpy()])
                for name, split in splits.items()}
    identity = {**{data_key(name): _fingerprint(contents[name], split.negative_N, found.title_keys)
                   for name, split in splits.items()},
                "the base model": encoders.image_space + encoders.text_space}
    album = RowPreviews(found, splits, example, reader)
    streams = partial(_streams, found, splits, example, reader, encoders, team, device)
    if images is None:
        return Pairs(splits, ledger, identity, contents, *streams(), album)
    image_table, seconds = _table(images, image_keys), time.monotonic() - began
    ready = _residents(splits, image_table, title_table, device)
    batches = streams()[1] if reader.augment else partial(_cached, ready, team)
    return Pairs(splits, ledger, identity, contents, lambda: ready, batches, album,
                 _say_store(cache, images, titles, seconds))


def _streams(found: Catalogue, splits: Mapping[str, Split], example: np.ndarray, reader: Reader, encoders: Encoders,
             team: Team, device: torch.device) -> tuple[Callable[[], Mapping[str, FeatureSplit]], Callable[..., Any]]:
    """`residents` and `batches` of Pairs through the towers: all features anew on each call, inputs of every step."""
    ids = TitleIds(encoders.tokenizer, encoders.max_tokens).tokens(found.titles)
    makers = {name: streamed_batch(split, found, example, reader, ids, encoders.tokenizer.pad_token_id)
              for name, split in splits.items()}
    return (partial(_encode_all, found, splits, example, ids, reader, encoders, team, device),
            partial(_streamed, splits, makers, team, reader))


def _look(found: Catalogue, reader: Reader, images: FeatureStore | None, encoders: Encoders, team: Team, cache: Path,
          tell: Callable[[str], None]) -> list[DecodeResults]:
    """Every rank's verdicts on its share of the images. Where features are stored, a file is not read again if it is
    as it was at the last look and its features are there.
    """
    own = np.arange(*share(len(found.references), team.rank, team.size))
    if images is None:
        return team.exchange(encode_missing_images(found, reader, own.tolist(), None, encoders.image, tell))
    seen = StatCache(cache / "seen", found.references.path.to_pylist(), reader.folder)
    is_known = seen.known[own] & (images.locate(seen.keys[own]) >= 0)
    verdicts = encode_missing_images(found, reader, own[~is_known].tolist(), images, encoders.image, tell)
    for reference in own[is_known].tolist():
        verdicts.add(DecodeResult(reference, seen.keys[reference].tobytes(), None))
    answers = team.exchange((verdicts, bool(is_known.all())))
    of_all = [each for each, _ in answers]
    if team.rank == 0 and not all(nothing_new for _, nothing_new in answers):
        seen.remember(*keys_and_usable(of_all, len(found.references)))
    return of_all


def _encoded_titles(found: Catalogue, encoders: Encoders, team: Team, cache: Path,
                    tell: Callable[[str], None]) -> FeatureStore:
    """The store of title features, brought up to date by all ranks."""
    def tokens(some: Sequence[int]) -> list[list[int]]:
        return tokenize(encoders.tokenizer, found.titles.take(some).to_pylist(), encoders.max_tokens)

    titles = FeatureStore(cache / "features" / encoders.text_space, encoders.text_width)
    # One rank's view of the store is everybody's: another may look when some features are written already.
    missing = team.exchange(np.flatnonzero(titles.locate(found.title_keys) < 0))[0]
    own = missing[slice(*share(len(missing), team.rank, team.size))]
    encode_missing_titles(tokens, found.title_keys, titles, own, encoders.tokenizer.pad_token_id, encoders.text, tell)
    team.exchange(None)  # every rank has written
    return titles


def _encode_all(found: Catalogue, splits: Mapping[str, Split], example: np.ndarray, ids: Sequence[Sequence[int]],
                reader: Reader, encoders: Encoders, team: Team, device: torch.device) -> Mapping[str, FeatureSplit]:
    """The features of everything with the towers as they are now; ranks share the work."""
    images, titles = share(len(example), team.rank, team.size), share(len(ids), team.rank, team.size)
    pad_id = encoders.tokenizer.pad_token_id
    parts = team.exchange((
        encode_images(found, example[slice(*images)], reader, encoders.image, encoders.image_width),
        encode_titles(ids[slice(*titles)], pad_id, encoders.text, encoders.text_width)))
    return _residents(splits, torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), device)


def data_key(split: str) -> str:
    """The name under which `identity` holds the digest of a split's rows."""
    return f"the data of {split}"


def _fingerprint(contents: Contents, negative_N: Tensor | None, title_keys: np.ndarray) -> str:
    """A digest of what a split's rows hold, in order: equal data gives equal runs and equal figures."""
    digest = hashlib.sha256(contents.image_NK.tobytes() + contents.title_NK.tobytes())
    if negative_N is not None:
        digest.update(title_keys[negative_N.numpy()].tobytes() + (negative_N.numpy() < 0).tobytes())
    return digest.hexdigest()


def _table(store: FeatureStore, keys: np.ndarray) -> StoredTable:
    """The features of `keys` in their order, whichever rank wrote them."""
    store.refresh()
    rows = store.locate(keys)
    if (rows < 0).any():
        raise UserError(f"{(rows < 0).sum():,} features written by other ranks are not in {store.folder}; "
                        "--cache-dir must be one folder that all ranks share")
    return StoredTable(store, rows)


def _say_store(cache: Path, images: FeatureStore, titles: FeatureStore, seconds: float) -> str:
    """What was encoded, and how large the store is: the two spaces of this model, and all others."""
    whole = sum(spaces(cache / "features").values())
    return (f"features: {images.grown:,} images and {titles.grown:,} titles encoded, {seconds:.1f} s; this model's "
            f"{(images.nbytes + titles.nbytes) / 1e6:,.1f} MB of {whole / 1e6:,.1f} MB in {cache / 'features'}")


def _residents(splits: Mapping[str, Split], image_DV: Tensor | StoredTable, title_PT: Tensor | StoredTable,
               device: torch.device) -> dict[str, FeatureSplit]:
    residents = {}
    for name, split in splits.items():
        ready = FeatureSplit(image_DV, title_PT, split.image_N, split.title_N, split.negative_N).to(device)
        image_DV, title_PT = ready.image_MV, ready.title_PT  # one copy serves all splits
        residents[name] = ready
    return residents


def _cached(ready: Mapping[str, FeatureSplit], team: Team, split: str, batch_size: int, seed: int,
            device: torch.device) -> Batches:
    return ready[split].batches(batch_size, seed, team.rank, team.size)


def _streamed(splits: Mapping[str, Split], makers: Mapping[str, Callable[..., Batch]], team: Team, reader: Reader,
              split: str, batch_size: int, seed: int, device: torch.device) -> Callable[[int], Iterator[Batch]]:
    def batches(first_step: int) -> Iterator[Batch]:
        rows = epoch_batches(len(splits[split]), batch_size, seed, team.rank, team.size, first_step)
        return prefetch_to_device(threaded_map(make, enumerate(rows, first_step), reader.workers, reader.workers + 1), device)

    def make(step: tuple[int, Tensor]) -> Batch:
        epoch = step[0] // -(-len(splits[split]) // batch_size)
        return makers[split](step[1], partial(random_region, seed, epoch) if reader.augment else None)

    return batches
