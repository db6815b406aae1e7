"""Features and batches of opened pairs, from the feature store or computed by the towers when they are needed.

Dimension key: B rows of a batch, D distinct images by content, P distinct titles, V/T image/text feature width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from data.batch import AgreedError, BadSample, Batch, CachedBatches, Team, Tokens, share
from data.catalogue import Catalogue, Split
from data.cold import DecodedImages, Pipeline, encode_titles
from data.identity import TitleIds
from data.images.decode import collate_tokens
from data.images.feed import Feed, Lot, grouped
from data.images.worker import Task, ToPixels
from data.lost import LostPictures, fill_places, next_good
from data.prefetch import EpochBatches, prefetch_to_device
from data.store.feature_split import FeatureSplit, StoredTable, loss_ids


class FeatureSource(Protocol):
    """Features of every split of a dataset."""

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Return the features of those of the splits `names` that exist."""


@dataclass(frozen=True)
class CachedPairs:
    """Features from the store, constant for the whole run."""

    splits: Mapping[str, FeatureSplit]

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Return the features of these splits."""
        return {name: split for name, split in self.splits.items() if name in names}

    def batches(self, split: str, batch_size: int, seed: int, rank: int, size: int) -> CachedBatches:
        """Return the batches of features of `rank` of `size` ranks."""
        return self.splits[split].batches(batch_size, seed, rank, size)


@dataclass(frozen=True)
class StreamedPairs:
    """Pixels and tokens for every batch; features by the towers as they are at the time of the call."""

    catalogue: Catalogue
    splits: Mapping[str, Split]
    example_D: np.ndarray  # a reference of each distinct image
    token_ids: Sequence[Sequence[int]]  # of each of the P titles
    pipeline: Pipeline
    decoded: DecodedImages  # from the opening
    lost: LostPictures

    @classmethod
    def open(cls, pipeline: Pipeline, decoded: DecodedImages, lost: LostPictures) -> StreamedPairs:
        """Return the pairs with all titles tokenized."""
        catalogue = lost.catalogue
        ids = TitleIds(pipeline.encoders.tokenizer, pipeline.encoders.max_tokens).tokens(catalogue.titles)
        return cls(catalogue, lost.splits, lost.example_D, ids, pipeline, decoded, lost)

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Encode the images and titles of the splits `names`; return their features. Ranks share the work."""
        team, encoders = self.pipeline.team, self.pipeline.encoders
        splits = [split for name, split in self.splits.items() if name in names]
        if not splits:
            return {}
        splits, used_D, used_P = _keep_used(splits)
        reference_D = self.example_D[used_D]
        own_D, losses = owned_references(reference_D, team), self.lost
        own_P = used_P[slice(*share(len(used_P), team.rank, team.size))]
        ids = [self.token_ids[title] for title in own_P.tolist()]
        parts = team.exchange((
            own_D, encode_images(own_D, self.pipeline, self.decoded.take(), losses),
            encode_titles(ids, encoders.pad_id, encoders.text, encoders.text_width)))
        place_D = np.argsort(np.concatenate([own for own, _, _ in parts]))  # references ascend with D
        image_DV = torch.cat([image for _, image, _ in parts])[torch.from_numpy(place_D)]
        title_PT = torch.cat([title for _, _, title in parts])
        group_P = self.catalogue.title_group_P
        losses.share(team)
        lost = np.flatnonzero(np.isin(used_D, losses.lost_images()))
        kept = {split.name: without_lost(split, lost) for split in splits}
        made = make_feature_splits({name: split for name, (split, _) in kept.items()}, image_DV, title_PT,
                                   self.pipeline.device, None if group_P is None else group_P[torch.from_numpy(used_P)])
        return {name: replace(split, lost=kept[name][1]) for name, split in made.items()}

    def batches(self, split: str, batch_size: int, seed: int, rank: int, size: int) -> StreamedBatches:
        """Return the batches of pixels and tokens of `rank` of `size` ranks."""
        order = EpochBatches(len(self.splits[split]), batch_size, seed, rank, size)
        return StreamedBatches(self, self.splits[split], order)


class _UnderWay(NamedTuple):
    """A step that is being decoded."""

    step: int  # from 1
    rows_B: Tensor  # of the epoch's order
    tasks: list[tuple[int, Task | BadSample]]  # by reference


@dataclass(frozen=True)
class StreamedBatches:
    """Batches of pixels and tokens, decoded ahead of the loop."""

    pairs: StreamedPairs
    split: Split
    order: EpochBatches

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the inputs of every step from `step` on, on the device, without end.

        On a CPU, the pixels of a step are valid until the next one is asked for.
        """
        return prefetch_to_device(self._batches(step), self.pairs.pipeline.device)

    def _batches(self, first_step: int) -> Iterator[Batch]:
        reader, size, losses = self.pairs.pipeline.reader, self.order.size, self.pairs.lost
        largest = -(-min(self.order.batch_size, len(self.split)) // size)
        job = ToPixels(reader.spec, reader.max_pixels)
        feed = Feed(job, reader, len(self.split) // size, self.pairs.pipeline.log, lot=largest)
        under_way = deque[_UnderWay]()
        spare: tuple[int, np.ndarray] | None = None  # a row, and its pixels, that was decoded

        def groups() -> Iterator[list[tuple[int, Task | BadSample]]]:
            for step, rows_B in enumerate(self.order.from_step(first_step), first_step + 1):
                under_way.append(_UnderWay(step, rows_B, self._tasks(step, rows_B)))
                yield under_way[-1].tasks

        with closing(feed.lots(groups())) as lots:
            for lot in lots:
                now = under_way.popleft()
                losses.step = now.step
                losses.read_again(lot, [task for _, task in now.tasks], job)
                while (others := self._others(lot, now)) and not losses.too_many:
                    losses.read_others(lot, others, job)
                rows_B = self._present(now.step, now.rows_B)
                if others:
                    # More is lost than --max-bad allows. The loop ends after this step, which needs a full batch: all
                    # ranks take part in its collectives.
                    rows_B = fill_places(rows_B, lot.records, [*others], spare)
                elif len(rows_B):
                    spare = int(rows_B[0]), lot.records[0].copy()
                losses.step = now.step + 1  # what an evaluation after it loses
                yield self._make(rows_B, lot)

    def _others(self, lot: Lot[int], now: _UnderWay) -> dict[int, tuple[int, Task | BadSample]]:
        """Return, by place in the lot, the pictures to be decoded in place of those that are lost by now."""
        if not self.pairs.lost.lost_images(now.step):
            return {}
        tasks = enumerate(self._tasks(now.step, now.rows_B))
        return {place: (reference, task) for place, (reference, task) in tasks if lot.tags[place] != reference}

    def _present(self, step: int, rows_B: Tensor) -> Tensor:
        """Return the rows, each whose picture is lost at this step replaced by its stand-in."""
        stand_in_N = self.pairs.lost.stand_ins(self.split, step)
        return rows_B if stand_in_N is None else stand_in_N[rows_B]

    def _tasks(self, step: int, rows_B: Tensor) -> list[tuple[int, Task | BadSample]]:
        """Return the images of a step (from 1) to be decoded, randomly cropped with --augment, by reference."""
        epoch = (step - 1) // -(-len(self.split) // self.order.batch_size)
        rows_B = self._present(step, rows_B)
        tasks = []
        for row, image in zip(rows_B.tolist(), self.split.image_N[rows_B].tolist(), strict=True):
            reference = int(self.pairs.example_D[image])
            crop = (self.order.seed, epoch, row) if self.pairs.pipeline.reader.augment else None
            tasks.append((reference, self.pairs.lost.task(reference, crop, step)))
        return tasks

    def _make(self, rows_B: Tensor, lot: Lot[int]) -> Batch:
        """Return the batch of these rows: their decoded images, and their titles padded."""
        image_B, title_B = self.split.image_N[rows_B], self.split.title_N[rows_B]
        pixels_BCSS = torch.from_numpy(lot.records)
        title, group_P = self._tokens(title_B), self.pairs.catalogue.title_group_P
        title_id_B = loss_ids(title_B, group_P)
        if self.split.negative_N is None:
            return Batch(pixels_BCSS, title, None, image_B, title_id_B, None)
        negative_BH = self.split.negative_N[rows_B]
        negative = self._tokens(negative_BH.clamp(min=0).T.flatten())
        return Batch(pixels_BCSS, title, negative, image_B, title_id_B, loss_ids(negative_BH, group_P))

    def _tokens(self, titles_B: Tensor) -> Tokens:
        ids = [self.pairs.token_ids[title] for title in titles_B.tolist()]
        return collate_tokens(ids, self.pairs.pipeline.encoders.pad_id)


def encode_images(references: np.ndarray, pipeline: Pipeline, decoded: dict[int, np.ndarray],
                  lost: LostPictures) -> Tensor:
    """Return image features [len(references), V] on the CPU, in order, of references that decoded at the opening.

    Those whose pixels are in `decoded` are not read again; a blank picture is encoded for those that are lost.
    """
    reader, encode, width = pipeline.reader, pipeline.encoders.image, pipeline.encoders.image_width
    job = ToPixels(reader.spec, reader.max_pixels)
    feed = Feed(job, reader, len(references) - len(decoded), pipeline.log)
    under_way = deque[Task | BadSample | np.ndarray]()

    def tasks() -> Iterator[tuple[int, Task | BadSample | np.ndarray]]:
        for index in references.tolist():
            kept = decoded.pop(index, None)
            under_way.append(lost.task(index) if kept is None else kept)
            yield index, under_way[-1]

    parts = []
    with closing(feed.lots(grouped(tasks(), feed.lot))) as lots:
        for lot in lots:
            own_tasks = [under_way.popleft() for _ in lot.tags]
            lot.records[lost.read_again(lot, own_tasks, job)] = 0
            parts.append(encode(torch.from_numpy(lot.records)).cpu())
    return torch.cat(parts) if parts else torch.empty(0, width)


def without_lost(split: Split, lost: np.ndarray) -> tuple[Split, int]:
    """Return a split to be measured without the rows of these images, and the number of such rows.

    Each of them becomes a copy of the next row that is not lost, without negatives: metrics count each image and title
    once, and rows keep their numbers.
    """
    lost_N = np.isin(split.image_N.numpy(), lost)
    if not lost_N.any():
        return split, 0
    good = np.flatnonzero(~lost_N)
    if not len(good):
        raise AgreedError(f"no picture of split {split.name!r} can be read any more; mend them and --resume")
    row_N = torch.from_numpy(next_good(lost_N))
    negative_N = split.negative_N
    if negative_N is not None:
        negative_N = negative_N.masked_fill(torch.from_numpy(lost_N)[:, None], -1)
    kept = replace(split, image_N=split.image_N[row_N], title_N=split.title_N[row_N], negative_N=negative_N)
    return kept, int(lost_N.sum())


@dataclass(frozen=True)
class AddedSplit:
    """The features of a dataset, and a split of another dataset beside them under its own name."""

    features: FeatureSource
    name: str
    other: FeatureSource
    other_name: str

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Return the features of these splits."""
        splits = dict(self.features.feature_splits(names))
        if self.name in names:
            splits[self.name] = self.other.feature_splits([self.other_name])[self.other_name]
        return splits


def owned_references(references: np.ndarray, team: Team) -> np.ndarray:
    """Return those of the image references that this rank decodes.

    Each reference has one rank, whichever splits are measured: what that rank decoded at the opening it need not
    decode again. Every second reference for two ranks, and so on, so that each split is shared out evenly.
    """
    return references[references % team.size == team.rank]


def _keep_used(splits: Sequence[Split]) -> tuple[list[Split], np.ndarray, np.ndarray]:
    """Return the splits renumbered to the images and titles that they use, and the old numbers of these, ascending."""
    titles = [split.title_N for split in splits]
    titles += [split.negative_N for split in splits if split.negative_N is not None]
    used_D = torch.cat([split.image_N for split in splits]).unique()
    used_P = torch.cat([title.flatten() for title in titles]).unique()
    used_P = used_P[used_P >= 0]  # -1: no negative
    kept = []
    for split in splits:
        negative_N = split.negative_N
        if negative_N is not None:
            negative_N = torch.where(negative_N < 0, -1, torch.searchsorted(used_P, negative_N))
        kept.append(replace(split, image_N=torch.searchsorted(used_D, split.image_N),
                            title_N=torch.searchsorted(used_P, split.title_N), negative_N=negative_N))
    return kept, used_D.numpy(), used_P.numpy()


def make_feature_splits(splits: Mapping[str, Split], image_DV: Tensor | StoredTable, title_PT: Tensor | StoredTable,
                        device: torch.device, title_group_P: Tensor | None = None) -> dict[str, FeatureSplit]:
    """Return the splits as indices into the two tables, with features on `device`."""
    feature_splits = {}
    for name, split in splits.items():
        features = FeatureSplit(image_DV, title_PT, split.image_N, split.title_N, split.negative_N,
                                title_group_P=title_group_P).to(device)
        image_DV, title_PT = features.image_MV, features.title_PT  # one copy serves all splits
        feature_splits[name] = features
    return feature_splits
