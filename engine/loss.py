"""MultipleNegativesRankingLoss over the candidates of all ranks.

Dimension key: B rows of this rank, G rows of all ranks, C candidates (G titles, then G negatives), E embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ranking_loss(image_BE: Tensor, candidates_CE: Tensor, scale: Tensor, first_row: int, rows: int,
                 absent_C: Tensor | None = None) -> Tensor:
    """This rank's part of mean_i(logsumexp_j S_ij - S_ii), with S = scale * cos(image_i, candidate_j), in fp32.

    image_BE are rows `first_row ...` of the global batch of `rows`; row i's own title is candidate i. The parts of all
    ranks add up to the loss, and so do their gradients. `absent_C` marks candidates that stand for a missing negative.
    Source: Henderson et al. 2017 (arXiv 1705.00652), section 4; as MultipleNegativesRankingLoss in
    sentence-transformers, image -> text.
    """
    logits_BC = scale * (image_BE @ candidates_CE.T)
    if absent_C is not None:
        logits_BC = logits_BC.masked_fill(absent_C, float("-inf"))
    labels_B = torch.arange(first_row, first_row + len(image_BE), device=image_BE.device)
    return F.cross_entropy(logits_BC, labels_B, reduction="sum") / rows
