"""Tables of features, in memory or in the store's files, and the pairs that index them.

Dimension key: B rows of a batch, M distinct images, P distinct titles, N pairs, H hard negatives of a pair, V/T
image/text feature width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import CachedBatches, Features, map_tensors
from data.prefetch import EpochBatches
from data.store.features import CHUNK, FeatureStore

CPU = torch.device("cpu")
PART = 65_536  # pairs, or their negatives, that an evaluation reads at a time


class StoredTable(NamedTuple):
    """A feature table that stays in the store's files: its row i is the store's row `rows[i]`. Used like a tensor."""

    store: FeatureStore
    rows: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the table as a tensor."""
        return len(self.rows) * self.store.width * self.store.dtype.itemsize

    def index_select(self, _: int, index: Tensor) -> Tensor:
        """Return the rows [B, width] of a CPU index [B]."""
        return self.store.gather(self.rows[index.numpy()])

    def to(self, device: torch.device) -> Tensor:
        """Return the whole table as a tensor; the host never holds a second copy of it."""
        # In chunks into memory of the device: the host may not have room for the table.
        table = torch.empty(len(self.rows), self.store.width, dtype=self.store.dtype, device=device)
        for low in range(0, len(self.rows), CHUNK):
            table[low : low + CHUNK] = self.store.gather(self.rows[low : low + CHUNK])
        return table


@dataclass(frozen=True)
class FeatureSplit:
    """One split as features: M distinct images, P distinct titles, N pairs. Equal rows mean identical content."""

    image_MV: Tensor | StoredTable
    title_PT: Tensor | StoredTable
    image_row_N: Tensor  # int64, where the tables are
    title_row_N: Tensor
    negative_row_NH: Tensor | None = None  # -1 where a pair has fewer than H negatives
    device: torch.device = CPU  # where features come out
    title_group_P: Tensor | None = None  # int64: titles with equal numbers are no negatives of each other in training
    lost: int = 0  # rows whose pictures streaming has lost: each is a copy of another, for metrics that count it once

    def __len__(self) -> int:
        return len(self.image_row_N)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of image and text features."""
        return _width(self.image_MV), _width(self.title_PT)

    def parts(self) -> Iterator[Features]:
        """Yield the features of all pairs in order, in parts: all at once may be as large as the tables."""
        negatives = 1 if self.negative_row_NH is None else self.negative_row_NH.shape[1]
        return map(self.features, torch.arange(len(self)).split(max(1, PART // negatives)))

    def to(self, device: torch.device | str, room: int | None = None) -> FeatureSplit:
        """Return the same split with features on `device`.

        Tables that are elsewhere are moved if they fit in `room` bytes (by default a share of the free memory); else
        all stay, and each batch is gathered on the host and copied from pinned memory.
        """
        device = torch.device(device)
        needed = 0
        for table in (self.image_MV, self.title_PT):
            if isinstance(table, StoredTable) or table.device.type != device.type:
                needed += table.nbytes
        if needed > (_room(device) if room is None else room):
            return replace(self, device=device)
        negative = None if self.negative_row_NH is None else self.negative_row_NH.to(device)
        group = None if self.title_group_P is None else self.title_group_P.to(device)
        return FeatureSplit(self.image_MV.to(device), self.title_PT.to(device), self.image_row_N.to(device),
                            self.title_row_N.to(device), negative, device, group, self.lost)

    def batches(self, batch_size: int, seed: int, rank: int = 0, size: int = 1) -> CachedBatches:
        """Return the batches of features that `rank` of `size` ranks trains on in a run of `seed`."""
        device = self.image_row_N.device
        rows = EpochBatches(len(self), batch_size, seed, rank, size, device)
        return CachedBatches(rows, self.training_features, device)

    def features(self, rows: Tensor) -> Features:
        """Return the features of the pairs `rows` [B] int64; no host sync if these are on the device of the tables."""
        return self._to_device(self._look_up(rows))

    def training_features(self, rows: Tensor) -> Features:
        """Return the same features; titles have the ids that the loss compares."""
        features = self._look_up(rows)
        negative_BH = features.negative_id_BH
        return self._to_device(features._replace(
            title_id_B=loss_ids(features.title_id_B, self.title_group_P),
            negative_id_BH=None if negative_BH is None else loss_ids(negative_BH, self.title_group_P)))

    def _look_up(self, rows: Tensor) -> Features:
        rows = rows.to(self.image_row_N.device)
        image_B = self.image_row_N.index_select(0, rows)
        title_B = self.title_row_N.index_select(0, rows)
        image_BV = self.image_MV.index_select(0, image_B)
        title_BT = self.title_PT.index_select(0, title_B)
        if self.negative_row_NH is None:
            return Features(image_BV, title_BT, None, image_B, title_B, None)
        negative_BH = self.negative_row_NH.index_select(0, rows)
        # Missing negatives (-1) get the features of title 0; the loss takes them out by their id.
        negative_XT = self.title_PT.index_select(0, negative_BH.clamp(min=0).flatten())
        negative_BHT = negative_XT.unflatten(0, negative_BH.shape)
        return Features(image_BV, title_BT, negative_BHT, image_B, title_B, negative_BH)

    def _to_device(self, features: Features) -> Features:
        if features.image_id_B.device.type == self.device.type:
            return features
        return map_tensors(features, lambda part: part.pin_memory().to(self.device, non_blocking=True))


def _width(table: Tensor | StoredTable) -> int:
    return table.store.width if isinstance(table, StoredTable) else table.shape[1]


def loss_ids(title_ids: Tensor, title_group_P: Tensor | None) -> Tensor:
    """Return the ids of titles that the loss compares: their groups', or, without groups, their own; -1 stays."""
    if title_group_P is None:
        return title_ids
    return title_group_P[title_ids.clamp(min=0)].masked_fill(title_ids < 0, -1)


def fits(table: StoredTable, device: torch.device) -> bool:
    """Return whether there is room on the device for a table and for it in fp32."""
    return table.nbytes + 4 * len(table.rows) * table.store.width <= _room(device)


def _room(device: torch.device) -> int:
    """Return the bytes that tables may take: 4/5 of a GPU's free memory; of the host's, this rank's share of a half."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 4 // 5)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
