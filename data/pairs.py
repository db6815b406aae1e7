"""A dataset ready to train on and measure: every row accounted for, features encoded or pixels to be streamed.

Dimension key: M distinct image references, D distinct images by content, P distinct titles, N rows, K bytes of a key.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.agreement import require_same_images
from data.batch import Batches, Team, UserError, share
from data.catalogue import (
    Catalogue,
    DecodeResults,
    Split,
    build_catalogue,
    keep_usable_rows,
    keys_and_usable,
    release_freed_memory,
)
from data.cold import DecodedImages, Pipeline, check_images, encode_missing_images, encode_missing_titles
from data.identity import Contents
from data.images.album import RowPreviews
from data.images.feed import SHOWN_S, Times
from data.images.reader import URL_START, Reader, matching
from data.inputs import CachedPairs, FeatureSource, StreamedPairs, make_feature_splits, owned_references
from data.ledger import dropped_rows
from data.lost import LostPictures, restore
from data.mine import mine_negatives
from data.sources.labels import count_classes
from data.sources.source import Rows
from data.store.feature_split import FeatureSplit, StoredTable, fits
from data.store.features import FeatureStore
from data.store.segments import spaces
from data.store.sharing import NETWORK_FOLDER_S, missing_everywhere, share_features
from data.store.stat_cache import StatCache

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Pairs:
    """All splits of a dataset after the cold pass."""

    splits: Mapping[str, Split]
    ledger: Sequence[Mapping[str, Any]]
    identity: Mapping[str, str]  # digests of each split's kept rows and of the base model's towers
    contents: Mapping[str, Contents]  # each split's content keys
    features: FeatureSource
    inputs: CachedPairs | StreamedPairs
    album: RowPreviews
    store_report: str = ""  # what the cold pass added to the feature store
    feed_report: str = ""  # rates of reading and decoding in the cold pass
    classes: Mapping[str, int] = field(default_factory=dict)  # their number, of splits whose titles are class names

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Return the features of those of the splits `names` that exist; streaming encodes them again on each call."""
        return self.features.feature_splits(names)

    def batches(self, split: str, batch_size: int, seed: int, rank: int, size: int) -> Batches:
        """Return the inputs of `rank` in a training run; `batch_size` is that of all `size` ranks together."""
        return self.inputs.batches(split, batch_size, seed, rank, size)

    def all_dropped(self) -> Sequence[Mapping[str, Any]]:
        """Return the ledger, and the entries of what was lost since the opening."""
        return [*self.ledger, *(self.inputs.lost.ledger() if isinstance(self.inputs, StreamedPairs) else [])]

    def describe(self) -> str:
        """Return the kept rows of each split, the dropped rows, and the state of the feature store, if there is one."""
        kept = ", ".join(f"{name} {len(split):,}" for name, split in self.splits.items())
        dropped = f"{dropped_rows(self.ledger):,} rows dropped{' (see ledger.jsonl)' if self.ledger else ''}"
        return f"pairs: {kept}; {dropped}" + (f"\n{self.store_report}" if self.store_report else "")


def open_pairs(rows: dict[str, Rows], unread: Sequence[Mapping[str, Any]], pipeline: Pipeline, max_bad: float,
               mining: str, measured: Collection[str] = ()) -> Pairs:
    """Read every image and title, encode them where features are constant, and account for dropped rows.

    `rows` is emptied, so that what is not needed of it is freed; `unread` are ledger entries of what never became a
    row; `mining` is "off" or a rule of `mine_negatives`; `measured` are splits that are evaluated before the first
    step. Raises UserError when more than `max_bad` of all rows are unusable or a split ends up empty.
    """
    began = time.monotonic()
    reader, encoders, cache, device = pipeline.reader, pipeline.encoders, pipeline.cache, pipeline.device
    catalogue = build_catalogue(rows, encoders.title_ids(cache))
    catalogue = replace(catalogue, splits={name: replace(split, title_neg=None) for name, split in rows.items()})
    rows.clear()  # the negatives, a third of all text, are among the catalogue's titles
    images = encoders.image_store(cache) if encoders.stored else None
    decoded = DecodedImages()
    if images is None:
        decoded = DecodedImages({image for name in measured for image in catalogue.image_N[name].tolist()})
        results = _check_images(catalogue, decoded, pipeline)
    else:
        results = add_missing_images(catalogue, images, pipeline)
    splits, image_keys, example_D, ledger = keep_usable_rows(catalogue, results, unread, max_bad)
    if images is not None:
        share_features(images, image_keys, pipeline.team, pipeline.log)
    if mining != "off" or images is not None:
        titles = add_missing_titles(catalogue, pipeline)
        title_table = stored_table(titles, catalogue.title_keys)
    if mining != "off":
        place = device if fits(title_table, device) else torch.device("cpu")
        pipeline.log(f"mining {mining} negatives on {place.type}")
        features_PT, unmined = title_table.to(place), [*splits.values()]
        splits = {name: mine_negatives(split, features_PT, mining, unmined, pipeline.team)
                  for name, split in splits.items()}

    contents, identity = {}, {}
    for name, split in splits.items():
        contents[name] = Contents(image_keys[split.image_N.numpy()], catalogue.title_keys[split.title_N.numpy()])
        identity[data_key(name)] = _fingerprint(contents[name], split, catalogue)
    identity["the base model"] = encoders.image_space + encoders.text_space
    row_count = sum(map(len, catalogue.splits.values())) + dropped_rows(unread)
    lost = LostPictures(catalogue, splits, example_D, image_keys, reader, ledger, row_count, max_bad, pipeline.log,
                        is_measured=images is None)
    if pipeline.run is not None:
        lost.adopt(pipeline.run.ledger, results, pipeline.run.replays)
    album = RowPreviews(catalogue, splits, example_D, reader, lost if images is None else None)

    classes = count_classes(catalogue.splits)
    if images is None:
        streamed = StreamedPairs.open(pipeline, decoded, lost)
        return Pairs(splits, ledger, identity, contents, streamed, streamed, album, classes=classes)
    release_freed_memory()  # before the tables are made
    image_table, seconds = stored_table(images, image_keys), time.monotonic() - began
    feature_splits = make_feature_splits(splits, image_table, title_table, device, catalogue.title_group_P)
    cached = CachedPairs(feature_splits)
    inputs = StreamedPairs.open(pipeline, decoded, lost) if reader.augment else cached
    times = [each.times for each in results if each.times is not None and each.times.pictures]
    report = _describe_store(cache, images, titles, seconds, times)
    rates = "; ".join(f"rank {rank}: {each.describe()}" for rank, each in enumerate(times))
    return Pairs(splits, ledger, identity, contents, cached, inputs, album, report, rates, classes)


def _check_images(catalogue: Catalogue, decoded: DecodedImages, pipeline: Pipeline) -> list[DecodeResults]:
    """Return every rank's results of decoding its images; an unchanged file that decoded once is not read again."""
    reader, team = pipeline.reader, pipeline.team
    own = owned_references(np.arange(len(catalogue.references)), team)
    folder = pipeline.cache / "seen" / f"decoded-{reader.max_pixels}"  # what --max-pixels refused may decode now
    stats = StatCache(folder, catalogue.references, reader.folder)
    require_same_images(stats, reader, team)
    is_known = stats.known[own]
    results = check_images(catalogue, reader, own[~is_known].tolist(), decoded, pipeline.log)
    all_results = stats.exchange(results, own[is_known], team)
    if team.has_caches:
        _fetch_for_this_cache(catalogue.references, all_results, reader, team)
    _restore(all_results, catalogue, stats, pipeline)
    return all_results


def _fetch_for_this_cache(references: pa.LargeStringArray, results: Sequence[DecodeResults], reader: Reader,
                          team: Team) -> None:
    """Fetch the URLs whose bytes only another rank's cache holds: in streaming any rank may need any image."""
    import pyarrow as pa

    members = [rank for rank in range(team.size) if team.cache_of[rank] == team.cache_of[team.rank]]
    is_usable_M = keys_and_usable(results, len(references))[1]
    urls = references.filter(pa.array(is_usable_M & matching(references, URL_START))).to_pylist()
    failed = [fetched for fetched in reader.fetch(urls[members.index(team.rank) :: len(members)]) if fetched.reason]
    if any(team.exchange(bool(failed))):
        example = f", such as {failed[0].url} ({failed[0].reason})" if failed else ""
        raise UserError(f"{len(failed):,} images that other ranks fetched cannot be fetched by rank {team.rank}"
                        f"{example}; give all ranks one --cache-dir, or run again")


def _restore(results: Sequence[DecodeResults], catalogue: Catalogue, stats: StatCache, pipeline: Pipeline) -> None:
    """Count pictures that the resumed run has lost as read (`lost.restore`), where every step reads pictures."""
    if pipeline.run is not None and (pipeline.reader.augment or not pipeline.encoders.stored):
        restore(catalogue, results, pipeline.run.ledger, stats.keys, pipeline.log)


def add_missing_images(catalogue: Catalogue, images: FeatureStore, pipeline: Pipeline) -> list[DecodeResults]:
    """Return every rank's results for its share of the images.

    An unchanged file whose features are stored is not read again.
    """
    reader, encode, team, log = pipeline.reader, pipeline.encoders.image, pipeline.team, pipeline.log
    own = np.arange(*share(len(catalogue.references), team.rank, team.size))
    stats = StatCache(pipeline.cache / "seen", catalogue.references, reader.folder)
    require_same_images(stats, reader, team)
    is_known = stats.known[own] & (images.locate(stats.keys[own]) >= 0)
    results = encode_missing_images(catalogue, reader, own[~is_known].tolist(), images, encode, log)
    all_results = stats.exchange(results, own[is_known], team)
    _restore(all_results, catalogue, stats, pipeline)
    return all_results


def add_missing_titles(catalogue: Catalogue, pipeline: Pipeline) -> FeatureStore:
    """Return the store of title features after all ranks have added what it lacked."""
    encoders, team = pipeline.encoders, pipeline.team
    store = encoders.title_store(pipeline.cache)
    missing = missing_everywhere(store, catalogue.title_keys, team)
    own = missing[slice(*share(len(missing), team.rank, team.size))]

    def tokens(part: slice) -> list[list[int]]:
        return encoders.tokenize(catalogue.titles.take(own[part]))

    encode_missing_titles(tokens, catalogue.title_keys[own], store, encoders.pad_id, encoders.text, pipeline.log)
    team.exchange(None)  # every rank has written
    share_features(store, catalogue.title_keys, team, pipeline.log)
    return store


def data_key(split: str) -> str:
    """Return the key under which `identity` holds the digest of a split's rows."""
    return f"the data of {split}"


def _fingerprint(contents: Contents, split: Split, catalogue: Catalogue) -> str:
    """Return a digest of the contents of a split's rows, in order: equal data gives equal runs and equal figures."""
    digest = hashlib.sha256(np.ascontiguousarray(contents.image_NK).data)
    digest.update(np.ascontiguousarray(contents.title_NK).data)
    if split.negative_N is not None:
        negative_N = split.negative_N.numpy()
        digest.update(catalogue.title_keys[negative_N].data)
        digest.update(np.ascontiguousarray(negative_N < 0).data)
    if catalogue.title_group_P is not None:  # other classes of the same titles mask other negatives
        digest.update(catalogue.title_keys[catalogue.title_group_P[split.title_N].numpy()].data)
    return digest.hexdigest()


def stored_table(store: FeatureStore, keys: np.ndarray) -> StoredTable:
    """Return the features of `keys` in their order, whichever rank wrote them."""
    rows = store.wait_for(keys, NETWORK_FOLDER_S)
    if (rows < 0).any():
        raise UserError(f"{(rows < 0).sum():,} features written by other ranks are not in {store.folder}; does another "
                        "program delete files there?")
    return StoredTable(store, rows)


def _describe_store(cache: Path, images: FeatureStore, titles: FeatureStore, seconds: float,
                    times: Sequence[Times]) -> str:
    """Return how much was encoded, and the size of the store: the two spaces of this model, and all spaces."""
    total = sum(spaces(cache / "features").values())
    waited = ""
    if times and seconds >= SHOWN_S:
        share_of_time = sum(each.waited_share for each in times) / len(times)
        waited = f", waiting for pictures {share_of_time:.0%} of the image pass"
    return (f"features: {images.grown:,} images and {titles.grown:,} titles encoded, {seconds:.1f} s{waited}; this "
            f"model's {(images.nbytes + titles.nbytes) / 1e6:,.1f} MB of {total / 1e6:,.1f} MB in {cache / 'features'}")
