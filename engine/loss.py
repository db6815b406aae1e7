"""The losses: rows of this rank ranked against the candidates of all ranks, a chunk of rows at a time.

Each loss is a sum over rows of f(logits, target) whose slope by the logits is known in closed form. So one pass makes
loss and gradient together, and neither the [B, C] matrix nor an autograd graph over it ever exists.

Dimension key: B rows of this rank, R rows of a chunk, G rows of all ranks, C candidates (G titles, then G negatives;
or G images), E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}  # logits held at once: what a CPU's cache keeps, what fills a GPU
NEVER = -1e30  # the logit of what is no candidate: exp is 0 as with -inf, and 0 times it is 0 and not NaN
SIGMOID_BIAS = -10.0  # Zhai et al. 2023, section 3.2; constant, see `sigmoid`


class Candidates(NamedTuple):
    """What rows are ranked against. Equal ids mean identical content; title -1: no candidate, image -1: a negative."""

    embedding_CE: Tensor
    title_id_C: Tensor
    image_id_C: Tensor


def softmax(logits_RC: Tensor, target_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy with rows of `target_RC` that sum to 1: sum_i(logsumexp_j S_ij - sum_j T_ij S_ij), and its slope.

    With the own title as target MultipleNegativesRankingLoss (Henderson et al. 2017, arXiv 1705.00652, section 4), with
    several titles in equal parts SupCon's L_out (Khosla et al. 2020, arXiv 2004.11362, equation 2).
    """
    log_share_RC = logits_RC.log_softmax(-1)
    return -(target_RC * log_share_RC).sum(), log_share_RC.exp_().sub_(target_RC)


def sigmoid(logits_RC: Tensor, target_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair judged alone: -sum_ij log sigmoid(z_ij (S_ij + bias)), z = 1 where `target_RC` is 1, else -1.

    Zhai et al. 2023 (arXiv 2303.15343), equation 1. Their bias is learned from -10 on; here it stays: AdamW moves one
    number by at most the learning rate a step, and no ranking depends on it.
    """
    logits_RC = logits_RC + SIGMOID_BIAS
    return F.softplus(logits_RC).sum() - (target_RC * logits_RC).sum(), logits_RC.sigmoid().sub_(target_RC)


@dataclass(frozen=True)
class Objective:
    """Which loss, and what it does with repeats: identical titles or identical images are the same answer.

    `duplicates`: "mask" takes such candidates out (all but one's own), "multi" makes them further right answers, "keep"
    leaves them negatives, as sentence-transformers does. An explicit negative that is the row's own title is one too.
    """

    loss: str = "image-to-text"  # or "symmetric", "sigmoid"
    duplicates: str = "mask"
    hardness: float = 0.0  # logits of negatives rise by hardness * cosine, without gradient
    smoothing: float = 0.0

    def __call__(self, image_BE: Tensor, titles: Candidates, scale: Tensor, first_row: int, rows: int,
                 title_BE: Tensor | None = None, images: Candidates | None = None) -> Tensor:
        """This rank's part of the mean over the global batch of `rows`; the parts of all ranks add up to it.

        image_BE (and title_BE) are rows `first_row ...` of it. With `title_BE` and `images` symmetric: half image to
        text, half text to image over the positives (Radford et al. 2021, arXiv 2103.00020, figure 3; equals
        sentence-transformers' directions query_to_doc and doc_to_query with partition_mode "per_direction").
        """
        forward = partial(self._rows, titles, first_row, self.hardness)
        if title_BE is None or images is None:
            return _Contrast.apply(image_BE, titles.embedding_CE, scale, 1 / rows, forward)
        backward = partial(self._rows, images, first_row, 0.0)
        return (_Contrast.apply(image_BE, titles.embedding_CE, scale, 0.5 / rows, forward)
                + _Contrast.apply(title_BE, images.embedding_CE, scale, 0.5 / rows, backward))

    def _rows(self, candidates: Candidates, first_row: int, hardness: float, cosine_RC: Tensor, scale: Tensor,
              low: int) -> tuple[Tensor, Tensor]:
        """Loss of a chunk of rows from `low` on, and its slope by scale * cosine_RC.

        Hardness as Lan et al. 2025 (arXiv 2503.04812), equation 5, for all negatives: sentence-transformers'
        hardness_mode "all_negatives". Smoothing spreads its share evenly over all candidates (Szegedy et al. 2016).
        """
        positive_RC, blocked_RC = self._answers(candidates, first_row + low, len(cosine_RC))
        target_RC = positive_RC.to(cosine_RC.dtype)
        logits_RC = cosine_RC * (scale + hardness * (1 - target_RC) if hardness else scale)
        if blocked_RC is not None:
            logits_RC.masked_fill_(blocked_RC, NEVER)
        if self.loss == "sigmoid":
            return sigmoid(logits_RC, target_RC)
        if self.duplicates == "multi":
            target_RC /= target_RC.sum(-1, keepdim=True)
        if self.smoothing:
            open_RC = torch.ones_like(target_RC) if blocked_RC is None else (~blocked_RC).to(target_RC.dtype)
            target_RC.lerp_(open_RC / open_RC.sum(-1, keepdim=True), self.smoothing)
        return softmax(logits_RC, target_RC)

    def _answers(self, candidates: Candidates, own: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Which candidates are right for rows whose own answers are `own ...`, and which of them do not count."""
        title_C, image_C = candidates.title_id_C, candidates.image_id_C
        absent_C = title_C < 0
        if self.duplicates == "keep":
            same_RC = absent_C.new_zeros(count, len(title_C))
        else:
            mine = slice(own, own + count)
            same_RC = (title_C[mine, None] == title_C) | (image_C[mine, None] == image_C)
        if self.duplicates == "multi":
            return same_RC, absent_C
        blocked_RC = same_RC | absent_C
        blocked_RC.diagonal(own).fill_(False)
        positive_RC = torch.zeros_like(blocked_RC)
        positive_RC.diagonal(own).fill_(True)
        return positive_RC, blocked_RC


class _Look(Protocol):
    """Loss of a chunk of rows and its slope by scale * cosine."""

    def __call__(self, cosine_RC: Tensor, scale: Tensor, low: int) -> tuple[Tensor, Tensor]: ...


class _Contrast(torch.autograd.Function):
    """weight * the loss over all rows; the gradient is made on the way, chunk by chunk, kept as [B, E] and [C, E]."""

    @staticmethod
    def forward(ctx: Any, query_BE: Tensor, candidate_CE: Tensor, scale: Tensor, weight: float, look: _Look) -> Tensor:
        loss, by_scale = query_BE.new_zeros(()), torch.zeros_like(scale)
        by_query_BE, by_candidate_CE = torch.empty_like(query_BE), torch.zeros_like(candidate_CE)
        height = max(1, CHUNK[query_BE.device.type] // len(candidate_CE))
        for low in range(0, len(query_BE), height):
            query_RE = query_BE[low : low + height]
            cosine_RC = query_RE @ candidate_CE.T
            part, slope_RC = look(cosine_RC, scale, low)
            loss += part
            torch.mm(slope_RC, candidate_CE, out=by_query_BE[low : low + height])
            by_candidate_CE.addmm_(slope_RC.T, query_RE)
            if ctx.needs_input_grad[2]:
                by_scale += (slope_RC * cosine_RC).sum()
        ctx.save_for_backward(by_query_BE, by_candidate_CE, by_scale, scale)
        ctx.weight = weight
        return loss * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        by_query_BE, by_candidate_CE, by_scale, scale = ctx.saved_tensors
        grad = grad * ctx.weight
        return by_query_BE * (grad * scale), by_candidate_CE * (grad * scale), by_scale * grad, None, None
