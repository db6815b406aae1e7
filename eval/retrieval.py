"""Project the features of a split and measure retrieval between its images and titles.

Dimension key: N rows of the split, B rows of a part, H hard negatives of a row, M pairs of a row and a negative, U
distinct images, W distinct titles, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Features
from eval.distinct import Distinct
from eval.intervals import Interval
from eval.metrics import NotFinite, Ranks, Retrieval, Triplets, compare, retrieval_ranks, triplet_correct

ROWS_COMPARED = 4096  # embeddings compared at once
Project = Callable[[Tensor], Tensor]  # features [n, V or T] -> unit embeddings [n, E]


@dataclass(frozen=True)
class SplitEmbeddings:
    """The embeddings of a split's distinct images and titles, and which are paired."""

    image_UE: Tensor
    title_WE: Tensor
    distinct: Distinct
    eps: float  # of the least precise dtype among features and embeddings

    def collapse(self) -> str:
        """Return a sentence if all embeddings of a side are equal up to rounding, else ""."""
        sides = []
        for name, x_QE in (("image", self.image_UE), ("title", self.title_WE)):
            if equal_rows(x_QE, self.eps):
                sides.append(f"all {len(x_QE):,} {name} embeddings are equal to rounding")
        if not sides:
            return ""
        return f"the model has collapsed: {' and '.join(sides)}, so every answer is a tie and its figures mean nothing"


def equal_rows(x_QE: Tensor, eps: float) -> bool:
    """Return whether there are two or more unit vectors and all are equal up to rounding."""
    if len(x_QE) < 2:
        return False
    # A projection in fp32 sums some thousand products, and its input and output are rounded to `eps`.
    tolerance = 4 * eps + 64 * torch.finfo(torch.float32).eps
    for x_CE in x_QE.split(ROWS_COMPARED):
        if not bool(((x_CE - x_QE[0]).norm(dim=1) <= tolerance).all()):
            return False
    return True


@torch.inference_mode()
def embed_split(project_image: Project, project_text: Project,
                parts: Iterable[Features]) -> tuple[SplitEmbeddings, Triplets | None]:
    """Embed the distinct images and titles of a split, and compare titles with each of their hard negatives.

    `parts` are the features of consecutive rows of the split; only their embeddings are kept.
    """
    images, titles, image_ids, title_ids = [], [], [], []
    correct, rows = [], []
    start, eps = 0, 0.0
    for part in parts:
        image_BE, title_BE = project_image(part.image_BV), project_text(part.title_BT)
        images.append(image_BE)
        titles.append(title_BE)
        image_ids.append(part.image_id_B)
        title_ids.append(part.title_id_B)
        eps = max(torch.finfo(x.dtype).eps for x in (image_BE, title_BE, part.image_BV, part.title_BT))
        if part.negative_BHT is not None and part.negative_id_BH is not None:
            row_M, place_M = (part.negative_id_BH >= 0).nonzero(as_tuple=True)
            negative_ME = project_text(part.negative_BHT[row_M, place_M])
            correct_M = triplet_correct(image_BE[row_M], title_BE[row_M], negative_ME)
            # A negative that is the row's own title is a tie, which products of two shapes may round to a win.
            own_title_M = part.negative_id_BH[row_M, place_M] == part.title_id_B[row_M]
            correct.append(correct_M & ~own_title_M)
            rows.append(row_M + start)
        start += len(image_BE)
    image_NE, title_NE = torch.cat(images), torch.cat(titles)
    distinct = Distinct.from_ids(torch.cat(image_ids), torch.cat(title_ids))
    embeddings = SplitEmbeddings(image_NE[distinct.image_row_U], title_NE[distinct.title_row_W], distinct, eps)
    row_M = torch.cat(rows) if rows else distinct.unit_N[:0]
    if not len(row_M):
        return embeddings, None
    return embeddings, Triplets(torch.cat(correct), row_M, distinct.unit_N[row_M])


@torch.inference_mode()
def measure_split(project_image: Project, project_text: Project, parts: Iterable[Features],
                  shard: tuple[int, int] = (0, 1),
                  all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> Retrieval:
    """Return ranks in both directions, and triplets for rows with hard negatives.

    `shard` (rank, world size) and `all_reduce` (sum over ranks) divide the score tiles among ranks; every rank returns
    the same result. Raises NotFinite for embeddings with NaN or infinity, UserError for no rows.
    """
    embeddings, triplets = embed_split(project_image, project_text, parts)
    distinct = embeddings.distinct
    rank_U, rank_W = retrieval_ranks(embeddings.image_UE, embeddings.title_WE, distinct, None, shard, all_reduce)
    image_to_text = Ranks(rank_U, distinct.image_row_U, distinct.image_unit_U, len(rank_W))
    text_to_image = Ranks(rank_W, distinct.title_row_W, distinct.title_unit_W, len(rank_U))
    return Retrieval(image_to_text, text_to_image, triplets, pairs=len(distinct.unit_N),
                     units=len(distinct.unit_N.unique()), collapsed=embeddings.collapse())


def measure_if_finite(measure: Callable[[], Retrieval]) -> Retrieval | None:
    """Return `measure()`, or None for a model whose embeddings hold NaN or infinity."""
    try:
        return measure()
    except NotFinite:
        return None


def differences(before: Mapping[str, Retrieval],
                after: Mapping[str, Retrieval]) -> dict[str, dict[str, dict[str, float | Interval]]]:
    """Return after minus before on the same rows, as in metrics.json: split -> metric -> value, ci95, p."""
    by_split = {}
    for split, result in after.items():
        tests = compare(before[split], result)
        by_split[split] = {name: test.as_json() for name, test in tests.items()}
    return by_split
