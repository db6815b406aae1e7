"""Losses as plain PyTorch functions, and the wrapper that computes them a chunk of rows at a time.

To add a loss, write a function like `info_nce` and name it in LOSSES and in the choices of `loss` in config/fields.py;
autograd differentiates it. Repeats, hard negatives, chunks and ranks are handled around it.

Dimension key: B rows of this rank, R rows of a chunk, G rows of all ranks, C candidates (G titles, then
negative 1 of all G rows, negative 2 of all rows, …; or G images), E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from data.batch import UserError

MAX_LOGITS = {"cpu": 3 << 19, "cuda": 1 << 26}  # logits per chunk, by device; a batch with fewer is one chunk
IGNORED_LOGIT = -1e30  # its exp is 0, like that of -inf; but 0 * IGNORED_LOGIT is 0, where 0 * -inf is NaN
SIGMOID_BIAS = -10.0  # Zhai et al. 2023, section 3.2; constant, see `sigmoid`


class Loss(Protocol):
    """A loss summed over the rows of a chunk of logits; a chunk may have no rows."""

    def __call__(self, logits_RC: Tensor, target_RC: Tensor, ignored_RC: Tensor) -> Tensor:
        """Return the sum as a scalar that autograd can differentiate by the logits.

        target_RC holds target probabilities, which sum to 1 in each row and are 0 for wrong answers. ignored_RC is
        True for candidates that do not count for a row. Their logits are IGNORED_LOGIT already, so a loss that is 0
        for a wrong answer with a very negative logit can leave ignored_RC alone.
        """
        ...


def info_nce(logits_RC: Tensor, target_RC: Tensor, ignored_RC: Tensor) -> Tensor:
    """Return the cross entropy of the right answers among all candidates.

    With one right answer this is MultipleNegativesRankingLoss (Henderson et al. 2017, arXiv 1705.00652, section 4),
    with several SupCon's L_out (Khosla et al. 2020, arXiv 2004.11362, equation 2).
    """
    return F.cross_entropy(logits_RC, target_RC, reduction="sum")


def sigmoid(logits_RC: Tensor, target_RC: Tensor, ignored_RC: Tensor) -> Tensor:
    """Return the binary cross entropy of each pair, right or wrong: Zhai et al. 2023 (arXiv 2303.15343), equation 1.

    softplus(-x) is -log sigmoid(x). In the paper the bias starts at -10 and is learned. Here it is constant: AdamW
    would move it by at most the learning rate a step, and no ranking depends on it.
    """
    sign_RC = torch.where(target_RC > 0, -1.0, 1.0)
    return F.softplus(sign_RC * (logits_RC + SIGMOID_BIAS)).sum()


LOSSES: dict[str, Loss] = {"image-to-text": info_nce, "symmetric": info_nce, "sigmoid": sigmoid}


class Candidates(NamedTuple):
    """The embeddings that rows are ranked against, and their ids; equal ids mean identical content.

    A negative has the image id -1, a missing negative the title id -1.
    """

    embedding_CE: Tensor
    title_id_C: Tensor
    image_id_C: Tensor


@dataclass(frozen=True)
class Objective:
    """Which loss, and how repeats and hard negatives enter it.

    `duplicates` decides how candidates count whose title or image is identical to the row's own: "mask" ignores them,
    "multi" makes them right answers, "keep" leaves them negatives, as sentence-transformers does. An explicit negative
    that is the row's own title is one of them.
    """

    loss: str = "image-to-text"  # a key of LOSSES; "symmetric" adds the text-to-image direction
    duplicates: str = "mask"
    hardness: float = 0.0  # added to the logits of negatives: hardness * cosine, without gradient
    product_dtype: torch.dtype | None = None  # of the factors of matrix products, summed in fp32; None: as embedded

    def sum_over_rows(self, query_BE: Tensor, candidates: Candidates, scale: Tensor, first_row: int) -> Tensor:
        """Return the loss of the queries, summed; the right answer of query i is candidate first_row + i."""
        def loss_of_chunk(logits_RC: Tensor, low: int) -> Tensor:
            target_RC, ignored_RC = self.targets(candidates, first_row + low, len(logits_RC))
            with torch.no_grad():  # hardness is a constant to the gradient, as in the paper
                self.harden(logits_RC, target_RC, scale)
                logits_RC.masked_fill_(ignored_RC, IGNORED_LOGIT)
            return LOSSES[self.loss](logits_RC, target_RC, ignored_RC)

        return chunked(loss_of_chunk, scale * query_BE, candidates.embedding_CE, self.product_dtype)

    def harden(self, logits: Tensor, target_RC: Tensor, scale: Tensor) -> None:
        """Add hardness * cosine to the logits [..., R, C] of negatives, in place; logits / scale is the cosine.

        Lan et al. 2025 (arXiv 2503.04812), equation 5, for all negatives: sentence-transformers' hardness_mode
        "all_negatives".
        """
        if self.hardness:
            logits += logits * (target_RC == 0) * (self.hardness / scale)

    def targets(self, candidates: Candidates, first: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return target probabilities and ignored candidates (bool), both [rows, C].

        The own answer of row i is candidate first + i.
        """
        title_C, image_C = candidates.title_id_C, candidates.image_id_C  # a stream's ids need all of their 63 bits
        absent_C = title_C < 0
        if self.duplicates == "keep":
            target_RC = self._own_answers(candidates, first, rows)
            return target_RC, absent_C.expand_as(target_RC)
        own = slice(first, first + rows)
        same_RC = (title_C[own, None] == title_C).logical_or_(image_C[own, None] == image_C)
        if self.duplicates == "multi":
            target_RC = same_RC.to(candidates.embedding_CE.dtype)
            return target_RC / target_RC.sum(-1, keepdim=True), absent_C.expand_as(same_RC)
        same_RC.diagonal(first).fill_(False)
        return self._own_answers(candidates, first, rows), same_RC.logical_or_(absent_C)

    @staticmethod
    def _own_answers(candidates: Candidates, first: int, rows: int) -> Tensor:
        """Return [rows, C] with 1 at column first + i of row i, in the dtype of the embeddings."""
        target_RC = candidates.embedding_CE.new_zeros(rows, len(candidates.title_id_C))
        target_RC.diagonal(first).fill_(1)
        return target_RC


def chunked(loss_of_chunk: Callable[[Tensor, int], Tensor], query_BE: Tensor, candidate_CE: Tensor,
            product_dtype: torch.dtype | None = None) -> Tensor:
    """Return the sum of `loss_of_chunk(logits_RC, first row)` over chunks of the logits query_BE @ candidate_CE.T.

    Logits that fit into one chunk are left to autograd. Otherwise the gradient of each chunk is computed right after
    its loss, so that only one chunk of the [B, C] matrix and of its graph exists at a time.
    """
    rows = max(1, MAX_LOGITS[query_BE.device.type] // len(candidate_CE))
    if len(query_BE) <= rows:
        if product_dtype is None:
            return loss_of_chunk(query_BE @ candidate_CE.T, 0)
        return loss_of_chunk(_Logits.apply(query_BE, candidate_CE, product_dtype), 0)
    return _Chunked.apply(query_BE, candidate_CE, loss_of_chunk, rows, product_dtype)


def multiply(left_RX: Tensor, right_XC: Tensor) -> Tensor:
    """Return the matrix product. With half-precision factors it is fp32, as a GPU's tensor cores accumulate in fp32."""
    if left_RX.dtype.itemsize >= 4:
        return left_RX @ right_XC
    if left_RX.is_cuda:
        return torch.mm(left_RX, right_XC, out_dtype=torch.float32)
    return left_RX.float() @ right_XC.float()


class _Logits(torch.autograd.Function):
    """query_BE @ candidate_CE.T with factors in half precision, forwards and backwards."""

    @staticmethod
    def forward(ctx: FunctionCtx, query_BE: Tensor, candidate_CE: Tensor, dtype: torch.dtype) -> Tensor:
        low_query_BE, low_candidate_CE = query_BE.to(dtype), candidate_CE.to(dtype)
        ctx.save_for_backward(low_query_BE, low_candidate_CE)
        return multiply(low_query_BE, low_candidate_CE.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad_BC: Tensor) -> tuple[Tensor, Tensor, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        query_BE, candidate_CE = saved
        low_grad_BC = grad_BC.to(query_BE.dtype)
        return multiply(low_grad_BC, candidate_CE), multiply(low_grad_BC.T, query_BE), None


class _Chunked(torch.autograd.Function):
    """A loss over chunks of logits whose gradient is made in the forward pass.

    Autograd differentiates the loss by the logits; the chain rule through the matrix product is written here.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query_BE: Tensor, candidate_CE: Tensor,
                loss_of_chunk: Callable[[Tensor, int], Tensor], rows: int,
                product_dtype: torch.dtype | None) -> Tensor:
        total = query_BE.new_zeros(())
        query_grad_BE, candidate_grad_CE = torch.empty_like(query_BE), torch.zeros_like(candidate_CE)
        with torch.enable_grad():
            # The logits given here need no gradient, so a loss that needs one depends on another trained tensor.
            if loss_of_chunk(query_BE.new_zeros(0, len(candidate_CE)), 0).requires_grad:
                raise UserError("a loss computed in chunks has a gradient by its logits alone, and this one depends on "
                                "another trained tensor; raise MAX_LOGITS in engine/loss.py above the logits of a step")
        dtype = product_dtype or query_BE.dtype
        candidate_CE = candidate_CE.to(dtype)
        for low in range(0, len(query_BE), rows):
            query_RE = query_BE[low : low + rows].to(dtype)
            logits_RC = multiply(query_RE, candidate_CE.T).requires_grad_()
            with torch.enable_grad():
                loss = loss_of_chunk(logits_RC, low)
            (grad_RC,) = torch.autograd.grad(loss, logits_RC)
            total += loss.detach()
            grad_RC = grad_RC.to(dtype)
            if product_dtype is None:  # in place, which saves an [R, E] and a [C, E] for each chunk
                torch.mm(grad_RC, candidate_CE, out=query_grad_BE[low : low + rows])
                candidate_grad_CE.addmm_(grad_RC.T, query_RE)
            else:
                query_grad_BE[low : low + rows] = multiply(grad_RC, candidate_CE)
                candidate_grad_CE += multiply(grad_RC.T, query_RE)
        ctx.save_for_backward(query_grad_BE, candidate_grad_CE)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        query_grad_BE, candidate_grad_CE = (saved * grad for saved in ctx.saved_tensors)
        return query_grad_BE, candidate_grad_CE, None, None, None
