"""Project held-out features and measure how pairs find each other.

Dimension key: N rows of the split, B some of them, U distinct images, W distinct titles, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Features
from eval.distinct import Distinct
from eval.metrics import NotFinite, Ranks, Retrieval, Triplets, compare, retrieval_ranks, triplet_correct

Project = Callable[[Tensor], Tensor]  # features [n, V or T] -> unit embeddings [n, E]


@dataclass(frozen=True)
class Space:
    """The embeddings of a split's distinct images and titles, and who belongs to whom."""

    image_UE: Tensor
    title_WE: Tensor
    distinct: Distinct
    eps: float  # of the number format in which features or embeddings were computed

    def collapse(self) -> str:
        """One sentence if all embeddings of a side are equal to rounding, "" if not."""
        sides = [f"all {len(x_QE):,} {name} embeddings are equal to rounding"
                 for name, x_QE in (("image", self.image_UE), ("title", self.title_WE)) if equal_rows(x_QE, self.eps)]
        if not sides:
            return ""
        return f"the model has collapsed: {' and '.join(sides)}, so every answer is a tie and its figures mean nothing"


def equal_rows(x_QE: Tensor, eps: float, chunk: int = 4096) -> bool:
    """Are two or more unit vectors all equal to rounding?

    A projection in fp32 adds up some thousand products, the result is rounded to `eps` on either side.
    """
    tolerance = 4 * eps + 64 * torch.finfo(torch.float32).eps
    if len(x_QE) < 2:
        return False
    return all(bool(((x_CE - x_QE[0]).norm(dim=1) <= tolerance).all()) for x_CE in x_QE.split(chunk))


@torch.inference_mode()
def embed(project_image: Project, project_text: Project, parts: Iterable[Features]) -> tuple[Space, Triplets | None]:
    """Embed the distinct images and titles of a split, and tell for rows with a negative whether their title beats it.

    `parts` are the features of the split, some rows at a time, of which only the embeddings stay.
    """
    seen, correct, rows, start, eps = [], [], [], 0, 0.0
    for some in parts:
        image_BE, title_BE = project_image(some.image_BV), project_text(some.title_BT)
        seen.append((image_BE, title_BE, some.image_id_B, some.title_id_B))
        eps = max(torch.finfo(x.dtype).eps for x in (image_BE, title_BE, some.image_BV, some.title_BT))
        if some.negative_BT is not None and some.negative_id_B is not None:
            given = (some.negative_id_B >= 0).nonzero()[:, 0]
            correct.append(triplet_correct(image_BE[given], title_BE[given], project_text(some.negative_BT[given])))
            rows.append(given + start)
        start += len(image_BE)
    image_NE, title_NE, image_id_N, title_id_N = map(torch.cat, zip(*seen, strict=True))
    distinct = Distinct.of(image_id_N, title_id_N)
    space = Space(image_NE[distinct.image_row_U], title_NE[distinct.title_row_W], distinct, eps)
    row_M = torch.cat(rows) if rows else distinct.unit_N[:0]
    return space, Triplets(torch.cat(correct), row_M, distinct.unit_N[row_M]) if len(row_M) else None


@torch.inference_mode()
def measure_split(project_image: Project, project_text: Project, parts: Iterable[Features],
                  part: tuple[int, int] = (0, 1),
                  total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Retrieval:
    """Ranks in both directions and, for rows with a negative, whether their own title beats it.

    `part` (rank, ranks) and `total` (the sum over ranks) share the score tiles among ranks; all get the same numbers.
    Raises NotFinite for embeddings with NaN or infinity, UserError for no rows.
    """
    space, triplets = embed(project_image, project_text, parts)
    distinct = space.distinct
    rank_U, rank_W = retrieval_ranks(space.image_UE, space.title_WE, distinct, None, part, total)
    return Retrieval(Ranks(rank_U, distinct.image_row_U, distinct.image_unit_U, len(rank_W)),
                     Ranks(rank_W, distinct.title_row_W, distinct.title_unit_W, len(rank_U)), triplets,
                     len(distinct.unit_N), len(distinct.unit_N.unique()), space.collapse())


def measure_if_finite(measure: Callable[[], Retrieval]) -> Retrieval | None:
    """What `evaluate_splits` returns; None where the model's embeddings hold NaN or infinity."""
    try:
        return measure()
    except NotFinite:
        return None


def differences(before: Mapping[str, Retrieval], after: Mapping[str, Retrieval]) -> dict[str, dict[str, Any]]:
    """After minus before on the same rows, as it stands in metrics.json: split -> metric -> value, ci95, p."""
    return {split: {name: test.as_json() for name, test in compare(before[split], found).items()}
            for split, found in after.items()}
