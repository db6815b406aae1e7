"""The distinct images and titles of a split, their pairs, and the independent units of rows that share either.

Dimension key: N rows of a split, U distinct images, W distinct titles, P distinct pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import UserError
from data.sources.split import components


@dataclass(frozen=True)
class Distinct:
    """The queries and candidates of a split. All tensors are int64; images and titles are in the order of the rows.

    A unit is a connected component of rows that share an image or a title; it is named by its first row.
    """

    unit_N: Tensor  # the unit of each row
    image_row_U: Tensor  # the first row of each distinct image
    title_row_W: Tensor  # the first row of each distinct title
    image_P: Tensor  # 0 .. U-1: the image of each distinct pair, ascending
    title_P: Tensor  # 0 .. W-1: its title

    @classmethod
    def from_ids(cls, image_id_N: Tensor | None, title_id_N: Tensor) -> Distinct:
        """Return the distinct items of rows with these ids; without image ids every row has its own image.

        Raises UserError for no rows.
        """
        if not len(title_id_N):
            raise UserError("there are no pairs to measure; choose a split that has rows")
        row_N = torch.arange(len(title_id_N), device=title_id_N.device)
        image_row_U, image_N = (row_N, row_N) if image_id_N is None else first_rows(image_id_N)
        title_row_W, title_N = first_rows(title_id_N)
        unit_N = torch.from_numpy(components(title_N.cpu().numpy(), image_N.cpu().numpy())).to(row_N.device)
        pair_P = (image_N * len(title_row_W) + title_N).unique()
        return cls(unit_N, image_row_U, title_row_W, pair_P // len(title_row_W), pair_P % len(title_row_W))

    @property
    def image_unit_U(self) -> Tensor:
        """The unit of each distinct image."""
        return self.unit_N[self.image_row_U]

    @property
    def title_unit_W(self) -> Tensor:
        """The unit of each distinct title."""
        return self.unit_N[self.title_row_W]


def first_rows(id_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first row of each distinct id, ascending [U], and the index (0 .. U-1) of each row's id in it [N]."""
    ids, code_N = id_N.unique(return_inverse=True)  # codes in the order of the ids, not of the rows
    row_N = torch.arange(len(id_N), device=id_N.device)
    row_U = torch.full_like(ids, len(id_N), dtype=torch.int64).scatter_reduce(0, code_N, row_N, "amin")
    row_U, order_U = row_U.sort()
    index_U = torch.empty_like(order_U).scatter(0, order_U, row_N[:len(order_U)])
    return row_U, index_U[code_N]
