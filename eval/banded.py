"""Ranks from products in half precision: only scores close to a threshold are computed again, exactly.

The threshold of a query is the score of its best right answer. A candidate whose low-precision score is above the
threshold by more than the error bound is ahead, a candidate below it by more than the bound is behind; the scores in
between, the band, are computed again. So the ranks are those of exact scores, which are products in fp64 rounded to
fp32: equal embeddings have equal scores.

Dimension key: U distinct images, W distinct titles, P distinct pairs, Q queries (U or W), E embedding, R x C one tile
of the U x W scores, M scores in the band.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eval.distinct import Distinct

PIECE = 1 << 15  # scores that are computed exactly at once
STRIP = 1024  # rows of a tile whose scores are computed in fp64 at once
BAND_SHARE = 256  # where more than 1 / BAND_SHARE of a tile is in the band, the whole tile in fp64 takes less time
MIN_CAPACITY = 1 << 16
TORCH_TILE, KERNEL_TILE = 8192, 32768  # sides; the kernel writes no scores, and larger tiles need fewer launches
# Additions in a tensor core truncate, and align a block of products to their largest (Fasi et al. 2021, "Numerical
# behavior of NVIDIA tensor cores"): at most this much of |x||y| for each of the E products.
ADDITION = 2.0**-22


class Limits(NamedTuple):
    """The band of each query of a side: scores above `high` are ahead for sure, scores below `low` are behind."""

    low_Q: Tensor
    high_Q: Tensor

    def part(self, rows: slice) -> Limits:
        """Return the limits of some queries."""
        return Limits(self.low_Q[rows], self.high_Q[rows])


class Scan(NamedTuple):
    """The result of a tile: how many scores are ahead for sure, and which are in the band."""

    sure_R: Tensor
    sure_C: Tensor
    code_M: Tensor | None  # 4 * (row * C + col) + 1 in the row's band + 2 in the column's; None: more than `capacity`


@dataclass(frozen=True)
class Side:
    """The embeddings of all images or of all titles, exact and rounded, and the lengths that bound their difference."""

    exact_QE: Tensor
    rounded_QE: Tensor
    length_Q: Tensor  # float64, the longer of both
    residual_Q: Tensor  # float64, length of the difference

    @classmethod
    def of(cls, exact_QE: Tensor, dtype: torch.dtype) -> Side:
        """Return the side of these embeddings; the lengths are computed PIECE rows at a time."""
        rounded_QE = exact_QE.to(dtype)
        lengths, residuals = [], []
        for exact, rounded in zip(exact_QE.split(PIECE), rounded_QE.split(PIECE), strict=True):
            exact, rounded = exact.double(), rounded.double()
            lengths.append(torch.maximum(exact.norm(dim=1), rounded.norm(dim=1)))
            residuals.append((exact - rounded).norm(dim=1))
        return cls(exact_QE.contiguous(), rounded_QE.contiguous(), torch.cat(lengths), torch.cat(residuals))

    def limits(self, other: Side, best_Q: Tensor) -> Limits:
        """Return the limits of queries of this side, whose best right answers score `best_Q`.

        With x = x' + dx and y = y' + dy, |xy - x'y'| <= |dx||y| + |x'||dy| (Cauchy, Schwarz), and the sum of the E
        products, which are exact in fp32, is off by at most E * ADDITION * |x'||y'|. Rounding the exact score to fp32
        adds 2^-24 |x||y|, the limits themselves as much.
        """
        width = self.exact_QE.shape[1]
        rounding = (width * ADDITION + 2.0**-22) * self.length_Q * other.length_Q.max()
        band_Q = self.residual_Q * other.length_Q.max() + self.length_Q * other.residual_Q.max() + rounding
        infinity = best_Q.new_tensor(math.inf)
        low_Q, high_Q = (best_Q.double() - band_Q).float(), (best_Q.double() + band_Q).float()
        return Limits(low_Q.nextafter(-infinity), high_Q.nextafter(infinity))


class BandedRanks:
    """Ranks in both directions, added up tile by tile; `dtype` is that of the products' factors.

    fp16 rounds unit vectors as finely as TF32 does; bf16 rounds eight times coarser, and its band would hold eight
    times as many scores.
    """

    def __init__(self, image_UE: Tensor, title_WE: Tensor, distinct: Distinct,
                 dtype: torch.dtype = torch.float16) -> None:
        self.images, self.titles = Side.of(image_UE, dtype), Side.of(title_WE, dtype)
        self.right_P = distinct.image_P * len(title_WE) + distinct.title_P  # ascending
        score_P = self._exact(distinct.image_P, distinct.title_P)
        self.best_U = image_UE.new_full((len(image_UE),), -math.inf)
        self.best_W = image_UE.new_full((len(title_WE),), -math.inf)
        self.best_U.scatter_reduce_(0, distinct.image_P, score_P, "amax")
        self.best_W.scatter_reduce_(0, distinct.title_P, score_P, "amax")
        self.limit_U = self.images.limits(self.titles, self.best_U)
        self.limit_W = self.titles.limits(self.images, self.best_W)
        # Values that overflow `dtype` have no error bound: then every tile is computed exactly.
        self._is_bounded = all(bool(limit.isfinite().all()) for limit in (*self.limit_U, *self.limit_W))
        self.rank_U = torch.zeros_like(self.best_U, dtype=torch.int64)
        self.rank_W = torch.zeros_like(self.best_W, dtype=torch.int64)
        self._has_kernel = can_use_kernel(image_UE.device)

    def tile(self) -> tuple[int, int]:
        """Return the sides of a tile that suit the device."""
        side = KERNEL_TILE if self._has_kernel else TORCH_TILE
        return side, side

    def add_tile(self, row: int, col: int, tile: list[int]) -> None:
        """Count the wrong candidates of the tile at this corner that score at least as high as the best right one."""
        rows, cols = slice(row, row + tile[0]), slice(col, col + tile[1])
        scan = self._scan(rows, cols) if self._is_bounded else None
        if scan is None or scan.code_M is None:
            self._count_all(rows, cols)
            return
        self.rank_U[rows] += scan.sure_R
        self.rank_W[cols] += scan.sure_C
        for code_M in scan.code_M.split(PIECE):
            self._recount(code_M, row, col, len(scan.sure_C))

    def _scan(self, rows: slice, cols: slice) -> Scan:
        """Return the scan of a tile, by the Triton kernel while that works."""
        image_RE, title_CE = self.images.rounded_QE[rows], self.titles.rounded_QE[cols]
        capacity = max(MIN_CAPACITY, len(image_RE) * len(title_CE) // BAND_SHARE)
        arguments = image_RE, title_CE, self.limit_U.part(rows), self.limit_W.part(cols), capacity
        if self._has_kernel:
            from eval.band_kernel import scan_by_kernel

            try:
                return scan_by_kernel(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton's own errors have no common class; without a C compiler it has none
                self._has_kernel = False
                warnings.warn(f"Recall is counted without Triton's kernel ({str(error).strip()[:150]})", stacklevel=2)
        return scan_by_torch(*arguments)

    def _recount(self, code_M: Tensor, row: int, col: int, width: int) -> None:
        """Count the wrong answers of a band whose exact score is at least the threshold."""
        pair_M = code_M >> 2
        row_M, col_M = pair_M // width + row, pair_M % width + col
        score_M = self._exact(row_M, col_M)
        key_M = row_M * len(self.best_W) + col_M
        nearest_M = torch.searchsorted(self.right_P, key_M).clamp_(max=len(self.right_P) - 1)
        is_wrong_M = self.right_P[nearest_M] != key_M
        ahead_row_M = (code_M & 1).bool() & is_wrong_M & (score_M >= self.best_U[row_M])
        ahead_col_M = (code_M & 2).bool() & is_wrong_M & (score_M >= self.best_W[col_M])
        self.rank_U.scatter_add_(0, row_M, ahead_row_M.long())
        self.rank_W.scatter_add_(0, col_M, ahead_col_M.long())

    def _exact(self, row_M: Tensor, col_M: Tensor) -> Tensor:
        """Return exact scores of these pairs, rounded to fp32."""
        parts = []
        # Products and sums row by row, not a matrix product: the order of additions is the same for every pair.
        for row, col in zip(row_M.split(PIECE), col_M.split(PIECE), strict=True):
            product_ME = self.images.exact_QE[row].double().mul_(self.titles.exact_QE[col])
            parts.append(product_ME.sum(1).float())
        return torch.cat(parts)

    def _count_all(self, rows: slice, cols: slice) -> None:
        """Count a tile from exact scores alone, as where the model has collapsed and all scores are in the band."""
        title_EC, best_C = self.titles.exact_QE[cols].double().T, self.best_W[cols]
        first_col, width = cols.start, len(best_C)
        stop = min(rows.stop, len(self.best_U))
        for low in range(rows.start, stop, STRIP):
            strip = slice(low, min(low + STRIP, stop))
            score_RC = (self.images.exact_QE[strip].double() @ title_EC).float()
            bounds = torch.tensor([strip.start, strip.stop], device=self.right_P.device) * len(self.best_W)
            first, last = torch.searchsorted(self.right_P, bounds).tolist()
            row_P, col_P = self.right_P[first:last] // len(self.best_W), self.right_P[first:last] % len(self.best_W)
            inside_P = (col_P >= first_col) & (col_P < first_col + width)
            score_RC[row_P[inside_P] - low, col_P[inside_P] - first_col] = -math.inf
            self.rank_U[strip] += (score_RC >= self.best_U[strip, None]).sum(1)
            self.rank_W[cols] += (score_RC >= best_C).sum(0)


def scan_by_torch(image_RE: Tensor, title_CE: Tensor, limit_R: Limits, limit_C: Limits, capacity: int) -> Scan:
    """Return the scan of a tile. A GPU multiplies in TF32, which holds fp16 and bf16 values exactly."""
    with _tf32_products(image_RE.device):
        score_RC = image_RE.float() @ title_CE.float().T
    sure_R, sure_C = (score_RC > limit_R.high_Q[:, None]).sum(1), (score_RC > limit_C.high_Q).sum(0)
    in_row_RC = (score_RC >= limit_R.low_Q[:, None]) & (score_RC <= limit_R.high_Q[:, None])
    in_col_RC = (score_RC >= limit_C.low_Q) & (score_RC <= limit_C.high_Q)
    pair_M = (in_row_RC | in_col_RC).view(-1).nonzero().squeeze(1)
    if len(pair_M) > capacity:
        return Scan(sure_R, sure_C, None)
    flags_M = in_row_RC.view(-1)[pair_M].long() + 2 * in_col_RC.view(-1)[pair_M].long()
    return Scan(sure_R, sure_C, 4 * pair_M + flags_M)


@contextmanager
def _tf32_products(device: torch.device) -> Iterator[None]:
    """Let a GPU's fp32 matrix products use TF32 meanwhile; a CPU's are left alone."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


def has_fast_half(device: torch.device) -> bool:
    """Return whether half-precision products plus a recount take less time than exact ones: on GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def can_use_kernel(device: torch.device) -> bool:
    """Return whether the device can run the kernel and Triton is installed; torch's CUDA wheels bring it."""
    if not has_fast_half(device):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
