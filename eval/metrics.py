"""Ranks, Recall@K, MRR and triplet accuracy of embedded pairs: pure functions, chunked, never the whole score matrix.

Dimension key: N rows of a split, U distinct images, W distinct titles, P distinct pairs, Q queries (U or W), E
embedding, R x C one tile of the U x W scores, M triplets, X and Y are U and W sorted and padded to whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from eval.banded import BandedRanks, has_fast_half
from eval.distinct import Distinct
from eval.intervals import Interval, PairedTest, Units, mean_interval, median_interval, paired_test, share_interval

RECALL_AT = (1, 5, 10)
BLOCK = 64
CPU_TILE = (2560, 2560)  # large, so that the product runs at its full rate; counted in strips that fit in L2
ACCELERATOR_TILE = (8192, 8192)


class NotFinite(UserError):
    """The embeddings hold NaN or infinity, so they have no ranks."""


@torch.no_grad()
def retrieval_ranks(image_UE: Tensor, title_WE: Tensor, distinct: Distinct, chunk: tuple[int, int] | None = None,
                    shard: tuple[int, int] = (0, 1),
                    all_reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> tuple[Tensor, Tensor]:
    """Return 0-based ranks of each distinct image among titles [U] and of each title among images [W], from one pass.

    The rank is the number of wrong candidates whose score is at least that of the best right one: a tie counts against
    the query. A candidate is right when a row of the split pairs it with the query; other right ones never count.

    Embeddings are L2-normalised, so that a score is a cosine. `chunk` is the tile (R images, C titles), rounded up to
    multiples of 64. `shard` (index, count) takes every count-th tile from the index-th on, and `all_reduce` sums the
    counts of all shards: sums of integers, so the number of shards changes no rank. Raises NotFinite for NaN or
    infinity.

    On a GPU from Ampere on, products run in fp16, and scores close to a threshold are computed again: eval/banded.py.
    """
    if has_fast_half(image_UE.device) and torch.float64 not in (image_UE.dtype, title_WE.dtype):
        return _banded_ranks(image_UE, title_WE, distinct, chunk, shard, all_reduce)
    sizes = len(image_UE), len(title_WE)
    on_cpu = image_UE.device.type == "cpu"
    tile = _tile(chunk or (CPU_TILE if on_cpu else ACCELERATOR_TILE), sizes)
    scores = _Scores(image_UE, title_WE, distinct, [BLOCK, BLOCK] if on_cpu else tile)
    best_U, best_W = scores.best_right()
    _require_finite(best_U, best_W)

    rank_U, rank_W = (torch.zeros_like(order) for order in (scores.order_U, scores.order_W))
    right = scores.pairs_by(tile)
    tile_RC = best_U.new_empty(tile)
    image_row = -1
    for row, col in _corners(sizes, tile)[shard[0]::shard[1]]:
        if row != image_row:  # tiles come row by row, so images are gathered once for a row of tiles
            image_RE, image_row = scores.images(row, tile[0]), row
        scores_RC = scores.of(image_RE, col, tile_RC)[:sizes[0] - row, :sizes[1] - col]
        if (row, col) in right:  # no right answer counts as ahead of another one
            row_P, col_P = right[row, col]
            scores_RC[row_P - row, col_P - col] = -math.inf
        rows, cols = slice(row, row + tile[0]), slice(col, col + tile[1])
        _count_at_least(scores_RC, best_U[rows], best_W[cols], rank_U[rows], rank_W[cols])
    counts = all_reduce(torch.cat([rank_U, rank_W]))
    return counts[:sizes[0]][scores.order_U.argsort()], counts[sizes[0]:][scores.order_W.argsort()]


def _banded_ranks(image_UE: Tensor, title_WE: Tensor, distinct: Distinct, chunk: tuple[int, int] | None,
                  shard: tuple[int, int], all_reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Do `retrieval_ranks` with low-precision products and an exact recount."""
    sizes = len(image_UE), len(title_WE)
    with torch.autocast(image_UE.device.type, enabled=False):
        ranks = BandedRanks(_at_least_fp32(image_UE), _at_least_fp32(title_WE), distinct)
        _require_finite(ranks.best_U, ranks.best_W)
        tile = _tile(chunk or ranks.tile(), sizes)
        for row, col in _corners(sizes, tile)[shard[0]::shard[1]]:
            ranks.add_tile(row, col, tile)
    counts = all_reduce(torch.cat([ranks.rank_U, ranks.rank_W]))
    return counts[:sizes[0]], counts[sizes[0]:]


def _tile(limits: tuple[int, int], sizes: tuple[int, int]) -> list[int]:
    """Return the sides of a tile in whole blocks: the limits, or the number of items where that is smaller."""
    return [math.ceil(min(limit, size) / BLOCK) * BLOCK for limit, size in zip(limits, sizes, strict=True)]


def _corners(sizes: tuple[int, int], tile: list[int]) -> list[tuple[int, int]]:
    """Return the first row and column of every tile."""
    return [(row, col) for row in range(0, sizes[0], tile[0]) for col in range(0, sizes[1], tile[1])]


def _require_finite(best_U: Tensor, best_W: Tensor) -> None:
    """Raise NotFinite unless the score of every query's best right answer is finite."""
    if not bool(best_U.isfinite().all() & best_W.isfinite().all()):
        raise NotFinite("the model's embeddings hold NaN or infinity; use an earlier checkpoint or another model")


def _count_at_least(scores_RC: Tensor, best_R: Tensor, best_C: Tensor, rank_R: Tensor, rank_C: Tensor) -> None:
    """Add to the rank of each row and column how many scores of the tile are at least its best right score."""
    # On a CPU torch writes comparisons 4x faster as floats than as bools (exact up to 2^24); 32 rows a core fit in L2.
    strip = 32 * torch.get_num_threads() if scores_RC.device.type == "cpu" else len(scores_RC)
    ahead_SC = torch.empty_like(scores_RC[:strip])
    count_R, count_C = torch.zeros_like(best_R), torch.zeros_like(best_C)
    for scores_SC, best_S, count_S in zip(*(x.split(strip) for x in (scores_RC, best_R, count_R)), strict=True):
        ahead = ahead_SC[:len(scores_SC)]
        torch.sum(torch.ge(scores_SC, best_S[:, None], out=ahead), 1, out=count_S)
        count_C += torch.ge(scores_SC, best_C, out=ahead).sum(0)
    rank_R += count_R.long()
    rank_C += count_C.long()


class _Scores:
    """Images and titles sorted by unit, which puts the scores of right answers near the diagonal.

    Both sides are padded to whole blocks. On a CPU a product of 64 x 64 is bit-equal to a part of any larger one (a
    row-wise dot product or 8 x 8 is not); elsewhere a block is a whole tile and all products have one shape. So the
    best right scores equal the same scores in the tiles, and candidates with equal embeddings tie in any position.
    """

    def __init__(self, image_UE: Tensor, title_WE: Tensor, distinct: Distinct, block: list[int]) -> None:
        self.block = block
        self.order_U = distinct.image_unit_U.argsort(stable=True)
        self.order_W = distinct.title_unit_W.argsort(stable=True)
        self.order_X = F.pad(self.order_U, (0, -len(self.order_U) % block[0]))
        order_Y = F.pad(self.order_W, (0, -len(self.order_W) % block[1]))
        self.image_UE = _at_least_fp32(image_UE)
        self.title_YE = _at_least_fp32(title_WE).index_select(0, order_Y)  # images are gathered a strip at a time
        self.row_P = self.order_U.argsort()[distinct.image_P]
        self.col_P = self.order_W.argsort()[distinct.title_P]

    def images(self, row: int, count: int) -> Tensor:
        """Return at most `count` images from `row` on, padding included [R, E]."""
        return self.image_UE.index_select(0, self.order_X[row:row + count])

    def of(self, image_RE: Tensor, col: int, out: Tensor) -> Tensor:
        """Return the scores of these images and the titles from `col` on, padding included, computed in `out`."""
        title_CE = self.title_YE[col:col + out.shape[1]]
        return torch.mm(image_RE, title_CE.T, out=out[:len(image_RE), :len(title_CE)])

    def pairs_by(self, tile: list[int]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Return the rows and columns of right answers by the corner of their tile; tiles without any are left out."""
        across = -(-len(self.title_YE) // tile[1])
        tile_P, order_P = (self.row_P // tile[0] * across + self.col_P // tile[1]).sort(stable=True)
        tiles, counts = tile_P.unique_consecutive(return_counts=True)
        rows = self.row_P[order_P].split(counts.tolist())
        cols = self.col_P[order_P].split(counts.tolist())
        by_corner = {}
        for index, row_P, col_P in zip(tiles.tolist(), rows, cols, strict=True):
            corner = index // across * tile[0], index % across * tile[1]
            by_corner[corner] = row_P, col_P
        return by_corner

    def best_right(self) -> tuple[Tensor, Tensor]:
        """Return the score of the best right answer of every image [U] and of every title [W], in sorted order."""
        best_U = self.image_UE.new_full((len(self.order_U),), -math.inf)
        best_W = self.image_UE.new_full((len(self.order_W),), -math.inf)
        block_RC = self.image_UE.new_empty(self.block)
        for (row, col), (row_P, col_P) in self.pairs_by(self.block).items():
            score_P = self.of(self.images(row, self.block[0]), col, block_RC)[row_P - row, col_P - col]
            best_U.scatter_reduce_(0, row_P, score_P, "amax")
            best_W.scatter_reduce_(0, col_P, score_P, "amax")
        return best_U, best_W


@torch.no_grad()
def triplet_correct(image_ME: Tensor, title_ME: Tensor, negative_ME: Tensor, chunk: int = 65_536) -> Tensor:
    """Return whether cos(image, title) > cos(image, negative), bool [M]: a tie is wrong.

    The arithmetic is that of sentence-transformers' TripletEvaluator; rows need not be normalised.
    """
    parts = []
    for rows in zip(image_ME.split(chunk), title_ME.split(chunk), negative_ME.split(chunk), strict=True):
        image, title, negative = (F.normalize(_at_least_fp32(x), dim=-1) for x in rows)
        parts.append((image * title).sum(-1) > (image * negative).sum(-1))
    return torch.cat(parts)


def recall_at(rank_Q: Tensor, k: int) -> float:
    """Return the share of 0-based ranks within the first `k`; a `k` beyond the gallery means all of it."""
    _require_rows(rank_Q)
    return (rank_Q < k).double().mean().item()


def median_rank(rank_Q: Tensor) -> float:
    """Return the median of the 1-based ranks; the mean of the two middle ones when Q is even."""
    _require_rows(rank_Q)
    sorted_Q = rank_Q.sort()[0].double()
    count = len(rank_Q)
    return (sorted_Q[(count - 1) // 2] + sorted_Q[count // 2]).item() / 2 + 1


def mean_rank(rank_Q: Tensor) -> float:
    """Return the mean of the 1-based ranks."""
    _require_rows(rank_Q)
    return rank_Q.double().mean().item() + 1


def mean_reciprocal_rank(rank_Q: Tensor) -> float:
    """Return the mean of 1 / (1-based rank)."""
    _require_rows(rank_Q)
    return reciprocal(rank_Q).mean().item()


def reciprocal(rank_Q: Tensor) -> Tensor:
    """Return 1 / (1-based rank), float64 [Q]."""
    return 1 / (rank_Q.double() + 1)


@dataclass(frozen=True)
class Ranks:
    """One direction: the 0-based rank of every query among `candidates` distinct ones."""

    rank_Q: Tensor
    row_Q: Tensor  # the first row of the split that holds the query
    unit_Q: Tensor  # the first row of its independent unit
    candidates: int

    def hits(self, k: int) -> Tensor:
        """Return which queries have a right answer among the first `k`, bool [Q]."""
        return self.rank_Q < k


@dataclass(frozen=True)
class Triplets:
    """Every row with each of its hard negatives: whether the row's title scores above that negative (bool)."""

    correct_M: Tensor
    row_M: Tensor  # the row of the split, ascending; a row with several negatives occurs as often
    unit_M: Tensor  # the first row of its independent unit


@dataclass(frozen=True)
class Retrieval:
    """Ranks of one model on one split in both directions, and its triplets.

    `collapsed` is the reason why the figures mean nothing: all embeddings of a side are equal; "" for other models.
    """

    image_to_text: Ranks
    text_to_image: Ranks
    triplets: Triplets | None  # None for a split without hard negatives
    pairs: int
    units: int
    collapsed: str = ""

    def sizes(self) -> dict[str, int]:
        """Return the numbers of pairs, units, queries and candidates, as in metrics.json."""
        sizes = {"pairs": self.pairs, "units": self.units}
        for way, ranks in self._directions():
            sizes[f"{way}_queries"] = len(ranks.rank_Q)
            sizes[f"{way}_candidates"] = ranks.candidates
        return sizes

    def values(self) -> dict[str, float]:
        """Return every metric by name, and `collapsed` (bool). Raises UserError for no rows."""
        values: dict[str, float] = {}
        for way, ranks in self._directions():
            values |= {f"{way}_R@{k}": recall_at(ranks.rank_Q, k) for k in RECALL_AT}
            values[f"{way}_median_rank"] = median_rank(ranks.rank_Q)
            values[f"{way}_mean_rank"] = mean_rank(ranks.rank_Q)
            values[f"{way}_mrr"] = mean_reciprocal_rank(ranks.rank_Q)
        if self.triplets is not None:
            values["triplet_accuracy"] = self.triplets.correct_M.double().mean().item()
        return {**values, "collapsed": bool(self.collapsed)}

    def summarise(self) -> dict[str, float | Interval]:
        """Return `sizes` and `values`, each metric followed by its 95 % interval `NAME_ci95: [low, high]`."""
        values = self.values()
        intervals: dict[str, Interval] = {}
        for way, ranks in self._directions():
            units, rank_Q = Units(ranks.unit_Q), ranks.rank_Q
            worst_rank = ranks.candidates
            intervals |= {f"{way}_R@{k}": share_interval(ranks.hits(k), units) for k in RECALL_AT}
            intervals[f"{way}_median_rank"] = median_interval(rank_Q + 1, units)
            intervals[f"{way}_mean_rank"] = mean_interval(rank_Q + 1, 1, worst_rank, units)
            intervals[f"{way}_mrr"] = mean_interval(reciprocal(rank_Q), 1 / worst_rank, 1, units)
        if self.triplets is not None:
            intervals["triplet_accuracy"] = share_interval(self.triplets.correct_M, Units(self.triplets.unit_M))
        summary: dict[str, float | Interval] = dict(self.sizes())
        for name, value in values.items():
            summary[name] = value
            if name in intervals:
                summary[f"{name}_ci95"] = intervals[name]
        return summary

    def means(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield each metric that is a mean over queries: its name, its values (hits or reciprocal ranks), rows, units.

        A paired test and a sweep compare models by these; the three tensors are [Q] each.
        """
        for way, ranks in self._directions():
            for k in RECALL_AT:
                yield f"{way}_R@{k}", ranks.hits(k), ranks.row_Q, ranks.unit_Q
            yield f"{way}_mrr", reciprocal(ranks.rank_Q), ranks.row_Q, ranks.unit_Q
        if self.triplets is not None:
            yield "triplet_accuracy", self.triplets.correct_M, self.triplets.row_M, self.triplets.unit_M

    def _directions(self) -> tuple[tuple[str, Ranks], tuple[str, Ranks]]:
        return ("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image)


def compare(before: Retrieval, after: Retrieval) -> dict[str, PairedTest]:
    """Return the paired test of every metric of `means`; both must come from the same rows in the same order."""
    tests = {}
    for (name, before_Q, *_), (_, after_Q, _, unit_Q) in zip(before.means(), after.means(), strict=True):
        tests[name] = paired_test(before_Q, after_Q, Units(unit_Q))
    return tests


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_rows(x_Q: Tensor) -> None:
    if not len(x_Q):
        raise UserError("there are no rows to measure; choose a split that has some")
