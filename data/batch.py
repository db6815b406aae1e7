"""The types that pass between data/, engine/ and eval/, with shapes; errors; how ranks divide rows.

Dimension key: B local batch, H hard negatives of a row, V/T image/text feature width, L tokens, S image side in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple)
Value = TypeVar("Value")


class UserError(Exception):
    """A mistake that the user can fix: one sentence that names the thing and the fix. Exit code 2, no traceback."""


class AgreedError(UserError):
    """A UserError that every rank raises at the same time: rank 0 prints it."""


class RunFailed(Exception):
    """A failure of the run itself, not of its arguments: one sentence. Exit code 1, no traceback."""


class UnsoundWeights(RunFailed):
    """A failure whose cause is in the weights or gradients: no checkpoint may hold them."""


class BadSample(Exception):
    """A row that cannot be used: `reason` is a short stable word for the ledger, `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Tokens(NamedTuple):
    """Padded token ids and their attention mask, both int64."""

    ids_BL: Tensor
    mask_BL: Tensor


class Batch(NamedTuple):
    """Tower inputs of one step: uint8 pixels (normalised on the device) and tokens.

    The ids are those of Features.
    """

    pixels_BCSS: Tensor
    title: Tokens
    negative: Tokens | None  # [H * B, L]: negative 1 of all rows, then negative 2 of all rows, …
    image_id_B: Tensor
    title_id_B: Tensor
    negative_id_BH: Tensor | None

    def take(self, rows: slice) -> Batch:
        """Return the batch of some rows."""
        kept = map_tensors(self._replace(negative=None), lambda part: part[rows])
        if self.negative is None or self.negative_id_BH is None:
            return kept
        sizes = self.negative_id_BH.T.shape
        return kept._replace(negative=map_tensors(
            self.negative, lambda part: part.unflatten(0, sizes)[:, rows].flatten(0, 1)))


class Features(NamedTuple):
    """Pooled tower outputs before projection.

    Equal int64 ids mean identical bytes or titles. A row with fewer than H negatives is filled up with the id -1.
    """

    image_BV: Tensor
    title_BT: Tensor
    negative_BHT: Tensor | None
    image_id_B: Tensor
    title_id_B: Tensor
    negative_id_BH: Tensor | None


class Batches(Protocol):
    """This rank's inputs of a training run."""

    def from_step(self, step: int) -> Iterator[Batch | Features]:
        """Yield the inputs of every step from `step` (from 0) on, without end."""


class RowBatches(Protocol):
    """This rank's row numbers of a training run."""

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Yield the row numbers [B] int64 of every step from `step` (from 0) on, without end."""


@dataclass(frozen=True)
class CachedBatches:
    """Batches of features that are looked up by row number."""

    rows: RowBatches
    features: Callable[[Tensor], Features]
    device: torch.device  # of the feature tables, and so of the row numbers

    def from_step(self, step: int) -> Iterator[Features]:
        """Yield the features of every step from `step` on, without end."""
        return map(self.features, self.rows.from_step(step))


class Exchange(Protocol):
    """An all-gather of Python objects."""

    def __call__(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in rank order."""


@dataclass(frozen=True)
class Team:
    """This rank among all ranks, and how they exchange values."""

    rank: int
    size: int
    exchange: Exchange
    cache_of: tuple[int, ...] = ()  # by rank: the lowest rank with the same cache folder; (): all have one

    @property
    def has_caches(self) -> bool:
        """Return whether ranks have several cache folders, as one on each node."""
        return len({*self.cache_of}) > 1

    @property
    def leads_cache(self) -> bool:
        """Return whether this is the one rank of its cache folder that writes what is written once."""
        return self.rank == (self.cache_of[self.rank] if self.cache_of else 0)


ALONE = Team(0, 1, lambda value: [value])


def map_tensors(item: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    """Return the same (nested) NamedTuple with `function` applied to every tensor; None stays None."""
    values = []
    for value in item:
        if isinstance(value, Tensor):
            value = function(value)
        elif isinstance(value, tuple):
            value = map_tensors(value, function)
        values.append(value)
    return type(item)(*values)


def share(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the contiguous part [start, stop) of `rows` for `rank` of `size`; earlier ranks take the extra rows."""
    base, extra = divmod(rows, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)
