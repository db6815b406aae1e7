"""The losses: rows of this rank ranked against the candidates of all ranks, a chunk of rows at a time.

Each loss is a sum over pairs of base(S) - target * score(S), and its slope by the logits S is share(S) - target; these
three are all there is to a loss, see `softmax`. So one pass makes loss and gradient together, and neither the [B, C]
matrix nor an autograd graph over it ever exists.

Dimension key: B rows of this rank, R rows of a chunk, G rows of all ranks, C candidates (G titles, then G negatives;
or G images), E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = {"cpu": 1 << 21, "cuda": 1 << 24}  # logits held at once: so many rows that adding gradients up costs little
NEVER = -1e30  # the logit of what is no candidate: exp is 0 as with -inf, and 0 times it is 0 and not NaN
SIGMOID_BIAS = -10.0  # Zhai et al. 2023, section 3.2; constant, see `sigmoid`


class Candidates(NamedTuple):
    """What rows are ranked against. Equal ids mean identical content; negatives have the image -1."""

    embedding_CE: Tensor
    title_id_C: Tensor
    image_id_C: Tensor
    absent_C: Tensor | None = None  # which stand for a missing negative


def softmax(logits_RC: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Cross entropy: -sum_j T_ij log softmax(S_i)_j, for targets that sum to 1 in each row.

    With the own title as target MultipleNegativesRankingLoss (Henderson et al. 2017, arXiv 1705.00652, section 4), with
    several titles in equal parts SupCon's L_out (Khosla et al. 2020, arXiv 2004.11362, equation 2).
    """
    log_share_RC = logits_RC.log_softmax(-1)
    return None, log_share_RC, log_share_RC.exp()


def sigmoid(logits_RC: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Each pair judged alone: -sum_j log sigmoid(z_ij (S_ij + bias)), z = 1 where the target is 1, else -1.

    Zhai et al. 2023 (arXiv 2303.15343), equation 1. Their bias is learned from -10 on; here it stays: AdamW moves one
    number by at most the learning rate a step, and no ranking depends on it.
    """
    logits_RC = logits_RC + SIGMOID_BIAS
    return F.softplus(logits_RC).sum(), logits_RC, logits_RC.sigmoid()


@dataclass(frozen=True)
class Objective:
    """Which loss, and what it does with repeats: identical titles or identical images are the same answer.

    `duplicates`: "mask" takes such candidates out (all but one's own), "multi" makes them further right answers, "keep"
    leaves them negatives, as sentence-transformers does. An explicit negative that is the row's own title is one too.
    """

    loss: str = "image-to-text"  # or "symmetric", "sigmoid"
    duplicates: str = "mask"
    hardness: float = 0.0  # logits of negatives rise by hardness * cosine, without gradient

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
        """Loss of a chunk of rows from `low` on, and its slope by scale * cosine_RC, which is overwritten.

        Hardness as Lan et al. 2025 (arXiv 2503.04812), equation 5, for all negatives: sentence-transformers'
        hardness_mode "all_negatives".
        """
        own = first_row + low
        right_RC, blocked_RC = self._answers(candidates, own, len(cosine_RC))
        logits_RC = cosine_RC.mul_(scale + hardness * ~right_RC if hardness and right_RC is not None else scale)
        if blocked_RC is not None:
            logits_RC.masked_fill_(blocked_RC, NEVER)
        base, score_RC, slope_RC = sigmoid(logits_RC) if self.loss == "sigmoid" else softmax(logits_RC)
        if right_RC is None:
            slope_RC.diagonal(own).sub_(1)
            gain = score_RC.diagonal(own).sum()
        else:
            target_RC = right_RC.to(score_RC.dtype)
            if self.loss != "sigmoid":
                target_RC /= target_RC.sum(-1, keepdim=True)
            slope_RC.sub_(target_RC)
            gain = (target_RC * score_RC).sum()
        return -gain if base is None else base - gain, slope_RC

    def _answers(self, candidates: Candidates, own: int, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Which candidates are right for rows whose own answers are `own ...` (None: those alone, and nobody asks for
        the rest), and which do not count for them (None: all do).
        """
        title_C, absent_C = candidates.title_id_C, candidates.absent_C
        if self.duplicates == "multi":
            return _repeats(candidates, own, count), absent_C
        right_RC, blocked_RC = None, absent_C
        if self.hardness:
            right_RC = torch.zeros(count, len(title_C), dtype=torch.bool, device=title_C.device)
            right_RC.diagonal(own).fill_(True)
        if self.duplicates == "mask":
            blocked_RC = _repeats(candidates, own, count)
            blocked_RC.diagonal(own).fill_(False)
            if absent_C is not None:
                blocked_RC.logical_or_(absent_C)
        return right_RC, blocked_RC


def _repeats(candidates: Candidates, own: int, count: int) -> Tensor:
    """Which candidates have the title or the image of candidates `own ...`, bool [count, C]."""
    title_C, image_C = candidates.title_id_C.int(), candidates.image_id_C.int()  # half the bytes to compare
    return (title_C[own : own + count, None] == title_C).logical_or_(image_C[own : own + count, None] == image_C)


class _Look(Protocol):
    """Loss of a chunk of rows and its slope by scale * cosine; it may overwrite the cosines."""

    def __call__(self, cosine_RC: Tensor, scale: Tensor, low: int) -> tuple[Tensor, Tensor]: ...


class _Contrast(torch.autograd.Function):
    """weight * the loss over all rows; the gradient is made on the way, see `_chunks`."""

    @staticmethod
    def forward(ctx: Any, query_BE: Tensor, candidate_CE: Tensor, scale: Tensor, weight: float, look: _Look) -> Tensor:
        ctx.save_for_backward(query_BE, candidate_CE, scale)
        ctx.weight, ctx.again = weight, partial(_chunks, look, ctx.needs_input_grad[2])
        loss, ctx.found = ctx.again(query_BE, candidate_CE, scale)
        return loss * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = ctx.saved_tensors[2]
        found = ctx.found or ctx.again(*ctx.saved_tensors)[1]  # again: a graph that was retained
        (by_query_BE, by_candidate_CE, by_scale), ctx.found = found, None  # nobody else's, so scaled where they are
        grad = grad * ctx.weight
        scaled = grad * scale
        return (by_query_BE.mul_(scaled), by_candidate_CE.mul_(scaled), None if by_scale is None else by_scale * grad,
                None, None)


def _chunks(look: _Look, by_scale_too: bool, query_BE: Tensor, candidate_CE: Tensor, scale: Tensor) -> tuple[
        Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """The loss over all rows, a chunk of them at a time, and its gradients: by the queries and by the candidates, both
    divided by the scale, [B, E] and [C, E], and by the scale.
    """
    losses, by_query, by_scale = [], [], []
    by_candidate_CE: Any = None
    height = max(1, CHUNK[query_BE.device.type] // len(candidate_CE))
    for number, query_RE in enumerate(query_BE.split(height)):  # of no rows, one chunk of none
        cosine_RC = query_RE @ candidate_CE.T
        kept_RC = cosine_RC.clone() if by_scale_too else None
        loss, slope_RC = look(cosine_RC, scale, number * height)
        losses.append(loss)
        if kept_RC is not None:
            by_scale.append((slope_RC * kept_RC).sum())
        by_query.append(slope_RC @ candidate_CE)
        by_candidate_CE = (slope_RC.T @ query_RE if by_candidate_CE is None
                           else by_candidate_CE.addmm_(slope_RC.T, query_RE))
    return reduce(torch.add, losses), (by_query[0] if len(by_query) == 1 else torch.cat(by_query), by_candidate_CE,
                                       torch.stack(by_scale).sum() if by_scale else None)
