"""Stream shards from a store once, in sequence, straight into the feature store; nothing else is kept of them.

Ranks share the shards. Pictures are decoded while the stream goes on and encoded in lots, which may reach over the end
of a shard; a shard's manifest (data/shards/manifests.py) is written when its last feature is stored. A
killed run begins again at the first shard without a manifest, and does not encode again what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from data.batch import BadSample
from data.cold import FeatureWriter, Pipeline
from data.identity import distinct
from data.images.feed import Feed, Lot
from data.images.reader import Reader
from data.images.worker import KnownKeys, Task, ToPixels
from data.prefetch import threaded_map
from data.progress import DownloadProgress
from data.shards.manifests import ShardManifest, make_manifest, manifest_path, read_manifest, write_manifest
from data.shards.stream import ForwardFile, class_names, stream_samples
from data.store.features import FeatureStore
from data.store.segments import KEY
from data.store.sharing import share_features, share_files
from data.web.fetched import disk_errors_as_user_errors
from data.web.storage import Entry, RemoteFile, open_stream, parent, public_name, stat

STATS_AT_ONCE = 16  # shards whose version is asked for at the same time
MAX_AHEAD = 1 << 28  # bytes of pictures that wait to be decoded
PICTURE_BYTES = 50_000  # assumed size of a picture, to estimate how many a shard holds before it is read
END = BadSample("end")  # the task behind the last picture of a shard: its outcome comes when all before it are decoded


def ingest_shards(splits: Mapping[str, Sequence[Entry]], pipeline: Pipeline) -> dict[str, list[RemoteFile]]:
    """Stream the shards that have no manifest of their present version; return all shards by split with manifests.

    Those whose features the store lacks, as after a change of the model, are streamed too. Raises UserError.
    """
    team, cache = pipeline.team, pipeline.cache
    # All ranks take the listing of rank 0: a store may gain a shard between two listings.
    splits = team.exchange(splits)[0]
    entries_of_all_splits = chain.from_iterable(splits.values())
    shards = list(dict.fromkeys(entry.address for entry in entries_of_all_splits))
    store = pipeline.encoders.image_store(cache) if pipeline.encoders.stored else None
    own = shards[team.rank :: team.size]
    classes = {folder: class_names(f"{folder}/x.tar") for folder in sorted({*map(parent, shards)})}
    missing: dict[str, Entry] = {}
    changed: list[str] = []
    for entry in threaded_map(stat, own, STATS_AT_ONCE, STATS_AT_ONCE):
        manifest = read_manifest(manifest_path(cache, entry.address))
        names = classes[parent(entry.address)]
        if manifest is None or manifest.classes != names or not _is_current(manifest, entry, pipeline.reader, store):
            missing[entry.address] = entry
        # Only a change is logged: that a shard is new, or that another model needs its pictures, is expected.
        if manifest is not None and (manifest.entry != entry or manifest.classes != names):
            place = "" if manifest.entry != entry else "the file of class names beside "
            changed.append(f"{place}{public_name(entry.address)}")
    if changed:
        more = f" (and {len(changed) - 1:,} more shards)" if len(changed) > 1 else ""
        pipeline.log(f"{changed[0]} has changed since it was streamed: it is streamed again{more}")
    all_missing: dict[str, Entry] = {}
    for missing_on_rank in team.exchange(missing):
        all_missing |= missing_on_rank
    todo = [all_missing[address] for address in shards if address in all_missing]
    _Ingestion(pipeline, store, classes).run(todo[team.rank :: team.size])
    team.exchange(None)  # every rank has written
    _share(shards, store, pipeline)
    if todo:
        encoded = ""
        if store is not None:
            store.refresh()
            encoded = f", {store.grown:,} images encoded"
        pipeline.log(f"streamed {len(todo):,} of {len(shards):,} shards once{encoded}")
    files: dict[str, list[RemoteFile]] = {}
    for name, entries in splits.items():
        files[name] = [RemoteFile(entry.address, manifest_path(cache, entry.address)) for entry in entries]
    return files


def _share(shards: Sequence[str], store: FeatureStore | None, pipeline: Pipeline) -> None:
    """Give every rank's cache the manifests and features of all shards."""
    if not pipeline.team.has_caches:
        return
    paths = [manifest_path(pipeline.cache, address) for address in shards]
    with disk_errors_as_user_errors(pipeline.cache):
        share_files(paths, pipeline.team)
    if store is not None:
        manifests = filter(None, map(read_manifest, paths))
        keys = np.concatenate([np.empty((0, KEY), np.uint8), *(manifest.keys() for manifest in manifests)])
        share_features(store, keys[distinct(keys)[1]], pipeline.team, pipeline.log)


def _is_current(manifest: ShardManifest, entry: Entry, reader: Reader, store: FeatureStore | None) -> bool:
    if manifest.entry != entry or manifest.max_pixels > reader.max_pixels:
        return False
    return store is None or bool((store.locate(manifest.keys()) >= 0).all())


@dataclass
class _Shard:
    """A shard being streamed."""

    entry: Entry
    classes: Sequence[str]  # the names of the classes, from a file beside the shard
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # values of COLUMNS
    keys: list[bytes] = field(default_factory=list)  # in the order of `rows`
    problems: list[dict[str, Any]] = field(default_factory=list)

    def report(self, key: str, problem: BadSample) -> None:
        """Add the ledger entry of a sample that cannot be used."""
        self.problems.append({"shard": public_name(self.entry.address), "key": key, "reason": problem.reason,
                              "detail": problem.detail})


class _Ingestion:
    """Streams this rank's shards."""

    def __init__(self, pipeline: Pipeline, store: FeatureStore | None, classes: Mapping[str, Sequence[str]]) -> None:
        self.pipeline, self.reader, self.classes = pipeline, pipeline.reader, classes
        self.writer = FeatureWriter(store, pipeline.encoders.image)
        self.failure: Exception | None = None
        self.progress: DownloadProgress

    def run(self, entries: Sequence[Entry]) -> None:
        """Stream these shards, one after the other. Raises UserError, after storing what came before the failure."""
        self.progress = DownloadProgress("shards streamed", len(entries), self.pipeline.log)
        for entry in entries:
            self.progress.expect(entry.size)
        todo, known = list(entries), self.writer.known_keys()
        # The feed skips pictures whose keys are in the store before the checksums of their features are looked at.
        # Shards with a feature that turned out to be damaged are streamed again, with no key known.
        while todo:
            todo, known = self._stream(todo, known), KnownKeys()
        self.writer.flush()  # of a shard that failed, so that another run need not encode it again
        if self.failure is not None:
            raise self.failure

    def _stream(self, entries: Sequence[Entry], known: KnownKeys) -> list[Entry]:
        """Stream these shards; return those to be streamed again: stored features of their pictures are damaged."""
        job = ToPixels(self.reader.spec, self.reader.max_pixels, known)
        pictures = sum(entry.size for entry in entries) // PICTURE_BYTES
        feed = Feed(job, self.reader, pictures, self.pipeline.log)
        damaged: dict[str, Entry] = {}
        with closing(feed.lots(self._groups(entries, feed))) as lots:
            for lot in lots:
                for place in self.writer.add(lot):
                    damaged[lot.tags[place].entry.address] = lot.tags[place].entry
                self._finish(self._add(lot), damaged)
        return [*damaged.values()]

    def _add(self, lot: Lot[_Shard]) -> list[_Shard]:
        """Add the keys of a lot to its shards; return the shards that end in it."""
        ended = list[_Shard]()
        for shard, outcome in zip(lot.tags, lot.outcomes, strict=True):
            if outcome.problem == (END.reason, END.detail):
                ended.append(shard)
            else:
                shard.keys.append(b"" if outcome.problem else outcome.key)
        return ended

    def _finish(self, ended: Sequence[_Shard], damaged: Mapping[str, Entry]) -> None:
        """Write the manifests of these shards, whose pictures are all encoded, but not of those that are `damaged`."""
        if ended:
            self.writer.flush()
        for shard in ended:
            if shard.entry.address in damaged:
                continue
            manifest = make_manifest(shard.entry, self.reader.max_pixels, shard.problems, shard.rows, shard.keys,
                                     shard.classes)
            with disk_errors_as_user_errors(self.pipeline.cache):
                write_manifest(self.pipeline.cache, manifest)
            self.progress()

    def _groups(self, entries: Sequence[Entry], feed: Feed) -> Iterator[list[tuple[_Shard, Task | BadSample]]]:
        """Yield the pictures of shards in order, up to the first `failure`, as groups that a feed takes.

        All groups that wait in the feed hold MAX_AHEAD bytes at most, and one picture each in any case.
        """
        group: list[tuple[_Shard, Task | BadSample]] = []
        size = 0
        try:
            for shard, data in chain.from_iterable(map(self._pictures_of, entries)):
                group.append((shard, END if data is None else Task(data)))
                size += len(data or b"")
                if len(group) == feed.lot or size > MAX_AHEAD // feed.slots:
                    yield group
                    group, size = [], 0
        except Exception as error:
            self.failure = error
        if group:
            yield group

    def _pictures_of(self, entry: Entry) -> Iterator[tuple[_Shard, bytes | None]]:
        """Yield the pictures of a shard in the order of its samples, then None."""
        shard = _Shard(entry, self.classes[parent(entry.address)])
        with open_stream(entry.address, entry) as stream:
            file = ForwardFile(stream, entry.size, public_name(entry.address))
            for sample in stream_samples(file, shard.report, shard.classes):
                shard.rows.append(sample.values)
                self.progress.add_bytes(len(sample.image))
                yield shard, sample.image
            file.skip_rest()  # the stream's last block comes only if the shard has not changed meanwhile
        yield shard, None
