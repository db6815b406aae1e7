"""Features and batches of opened pairs, from the feature store or from the towers anew.

Dimension key: B rows of a batch, D distinct images by content, P distinct titles, V/T image/text feature width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, CachedBatches, Team, Tokens, share
from data.catalogue import Catalogue, Split
from data.cold import DecodedImages, Pipeline, encode_images, encode_titles, require_pixels
from data.identity import TitleIds
from data.images.decode import collate_tokens
from data.images.feed import Feed, Lot
from data.images.worker import Task, ToPixels
from data.prefetch import EpochBatches, prefetch_to_device
from data.store.feature_split import FeatureSplit, StoredTable, loss_ids


class FeatureSource(Protocol):
    """Features of every split of a dataset."""

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Return the features of the splits `names`, as far as there are such splits."""


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

    @classmethod
    def open(cls, catalogue: Catalogue, splits: Mapping[str, Split], example_D: np.ndarray,
             pipeline: Pipeline, decoded: DecodedImages) -> StreamedPairs:
        """Tokenize all titles."""
        ids = TitleIds(pipeline.encoders.tokenizer, pipeline.encoders.max_tokens).tokens(catalogue.titles)
        return cls(catalogue, splits, example_D, ids, pipeline, decoded)

    def feature_splits(self, names: Collection[str]) -> Mapping[str, FeatureSplit]:
        """Encode what the splits `names` hold and return their features; ranks share the work."""
        team, encoders = self.pipeline.team, self.pipeline.encoders
        splits = [split for name, split in self.splits.items() if name in names]
        splits, used_D, used_P = _keep_used(splits)
        reference_D = self.example_D[used_D]
        own_D = owned_references(reference_D, team)
        ids = [self.token_ids[title] for title in used_P[slice(*share(len(used_P), team.rank, team.size))].tolist()]
        parts = team.exchange((
            own_D, encode_images(self.catalogue, own_D, self.pipeline, self.decoded.take()),
            encode_titles(ids, encoders.pad_id, encoders.text, encoders.text_width)))
        place_D = np.argsort(np.concatenate([own for own, _, _ in parts]))  # references ascend with D
        image_DV = torch.cat([image for _, image, _ in parts])[torch.from_numpy(place_D)]
        title_PT = torch.cat([title for _, _, title in parts])
        group_P = self.catalogue.title_group_P
        return make_feature_splits({split.name: split for split in splits}, image_DV, title_PT, self.pipeline.device,
                                   None if group_P is None else group_P[torch.from_numpy(used_P)])

    def batches(self, split: str, batch_size: int, seed: int, rank: int, size: int) -> StreamedBatches:
        """Return the batches of pixels and tokens of `rank` of `size` ranks."""
        order = EpochBatches(len(self.splits[split]), batch_size, seed, rank, size)
        return StreamedBatches(self, self.splits[split], order)


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
        reader, size = self.pairs.pipeline.reader, self.order.size
        largest = -(-min(self.order.batch_size, len(self.split)) // size)
        feed = Feed(ToPixels(reader.spec, reader.max_pixels), reader, len(self.split) // size,
                    self.pairs.pipeline.log, lot=largest)
        under_way = deque[Tensor]()  # the row numbers of steps that are being decoded

        def groups() -> Iterator[list[tuple[int, Task]]]:
            for step, rows_B in enumerate(self.order.from_step(first_step), first_step):
                under_way.append(rows_B)
                yield self._tasks(step, rows_B)

        with closing(feed.lots(groups())) as lots:
            for lot in lots:
                yield self._make(under_way.popleft(), lot)

    def _tasks(self, step: int, rows_B: Tensor) -> list[tuple[int, Task]]:
        """Return the images of a step to be decoded, randomly cropped with --augment, by reference."""
        epoch = step // -(-len(self.split) // self.order.batch_size)
        tasks = []
        for row, image in zip(rows_B.tolist(), self.split.image_N[rows_B].tolist(), strict=True):
            reference = int(self.pairs.example_D[image])
            crop = (self.order.seed, epoch, row) if self.pairs.pipeline.reader.augment else None
            tasks.append((reference, Task(self.pairs.catalogue.references[reference].as_py(), crop)))
        return tasks

    def _make(self, rows_B: Tensor, lot: Lot[int]) -> Batch:
        """Return the batch of these rows: their decoded images, and their titles padded."""
        require_pixels(lot, self.pairs.catalogue)
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


@dataclass(frozen=True)
class AddedSplit:
    """The features of a dataset, and beside them a split of another one under a name of its own."""

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
    """Return the splits as indices into the images and titles that they use, and which those are, ascending."""
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
