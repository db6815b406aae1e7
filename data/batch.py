"""The shared vocabulary: what flows between the rooms, with shapes.

Dimension key: B local batch, V/T image/text feature width, L tokens, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Moved = TypeVar("Moved", bound=tuple)


class UserError(Exception):
    """A mistake the user can mend: one sentence that names the thing and the fix. Exit code 2, no traceback."""


class RunFailed(Exception):
    """A run that cannot go on though nothing was typed wrong: one sentence. Exit code 1, no traceback."""


class BadSample(Exception):
    """One row that cannot be used: `reason` is a short stable word for the ledger, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Tokens(NamedTuple):
    """Padded token ids and their attention mask, both int64."""

    ids_BL: Tensor
    mask_BL: Tensor


class Batch(NamedTuple):
    """Tower inputs of one step: uint8 pixels (normalised on the device) and tokens."""

    pixels_BCSS: Tensor
    title: Tokens
    negative: Tokens | None
    image_id_B: Tensor
    title_id_B: Tensor
    negative_id_B: Tensor | None


class Features(NamedTuple):
    """Pooled tower outputs before projection; equal int64 `*_id_B` mean identical bytes or title, -1 no negative."""

    image_BV: Tensor
    title_BT: Tensor
    negative_BT: Tensor | None
    image_id_B: Tensor
    title_id_B: Tensor
    negative_id_B: Tensor | None


@dataclass(frozen=True)
class Batches:
    """Cached inputs: called with a step, this rank's features of every step from there on.

    They are `look` of the row numbers that `rows` yields.
    """

    rows: Callable[[int], Iterator[Tensor]]
    look: Callable[[Tensor], Features]
    device: torch.device  # of the tables, and so of the row numbers

    def __call__(self, first_step: int) -> Iterator[Features]:
        """Without end."""
        return map(self.look, self.rows(first_step))


@dataclass(frozen=True)
class Team:
    """The other ranks, as far as this room needs them."""

    rank: int
    size: int
    exchange: Callable[[Any], list[Any]]  # what every rank said, in rank order


ALONE = Team(0, 1, lambda value: [value])


def map_tensors(item: Moved, function: Callable[[Tensor], Tensor]) -> Moved:
    """The same (nested) NamedTuple with `function` applied to every tensor; None stays None."""
    return type(item)(*(
        function(value) if isinstance(value, Tensor)
        else map_tensors(value, function) if isinstance(value, tuple) else value
        for value in item
    ))


def share(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Rank's contiguous part [start, stop) of `rows`, as even as can be; earlier ranks take the extra rows."""
    base, extra = divmod(rows, size)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)
