"""Ranks, Recall@K, MRR and triplet accuracy of embedded pairs: pure functions, chunked, never an N x N matrix.

Dimension key: N pairs (rows of a split, and so the gallery), P the same padded to whole blocks, E embedding, R x C one
tile of the N x N scores, M triplets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from eval.families import families
from eval.intervals import Interval, PairedTest, mean_interval, median_interval, paired_test, share_interval

RECALL_AT = (1, 5, 10)
BLOCK = 64
CPU_TILE = (2560, 2560)  # large, so that the product runs at its full rate; counted in strips that fit in L2
ACCELERATOR_TILE = (8192, 8192)


@torch.no_grad()
def retrieval_ranks(image_NE: Tensor, title_NE: Tensor, title_id_N: Tensor, image_id_N: Tensor | None = None,
                    chunk: tuple[int, int] | None = None, part: tuple[int, int] = (0, 1),
                    total: Callable[[Tensor], Tensor] = lambda counts: counts) -> tuple[Tensor, Tensor]:
    """0-based ranks of each pair image -> text and text -> image (int64, [N] each), from one pass over score tiles.

    The rank is the number of candidates that score strictly better than the best correct answer. A candidate is
    correct when its title or its image is identical (equal id) to the query's own; correct answers never count
    against a query. Any other candidate with an equal score counts in the query's favour.

    Rows are [N, E], L2-normalised, so that a score is a cosine. `chunk` is the tile (R images, C titles), rounded up
    to multiples of 64. `part` (i, n) does every n-th tile from the i-th on, and `total` adds the counts of all parts
    up: the same integers however many there are. Raises UserError for N = 0 and for embeddings with NaN or infinity.
    """
    n, on_cpu = _count_rows(title_id_N), image_NE.device.type == "cpu"
    tile = [math.ceil(min(step, n) / BLOCK) * BLOCK for step in chunk or (CPU_TILE if on_cpu else ACCELERATOR_TILE)]
    pairs = _Pairs(image_NE, title_NE, title_id_N, image_id_N, BLOCK if on_cpu else math.gcd(*tile))
    best_i2t_N, best_t2i_N = pairs.best_correct()
    if not bool((best_i2t_N.isfinite() & best_t2i_N.isfinite()).all()):
        raise UserError("the model's embeddings hold NaN or infinity; use an earlier checkpoint")

    ranks_2N, tile_RC = pairs.order_N.new_zeros(2, n), best_i2t_N.new_empty(tile)
    image_RE = pairs.image_NE.new_empty(tile[0], pairs.image_NE.shape[1])
    corners = [(row, col) for row in range(0, n, tile[0]) for col in range(0, n, tile[1])][part[0]::part[1]]
    for row, tiles in groupby(corners, key=lambda corner: corner[0]):
        images = pairs.images(row, image_RE)
        for _, col in tiles:
            scores_RC = pairs.scores(images, col, tile_RC)[:n - row, :n - col]
            for starts, correct_BRC in pairs.answers(row, col, tile):
                for (r, c), correct_RC in zip(starts, correct_BRC, strict=True):
                    block = scores_RC[r - row:r - row + pairs.block, c - col:c - col + pairs.block]
                    block.masked_fill_(correct_RC[:block.shape[0], :block.shape[1]], -math.inf)
            rows, cols = slice(row, row + tile[0]), slice(col, col + tile[1])
            _count_better(scores_RC, best_i2t_N[rows], best_t2i_N[cols], ranks_2N[0, rows], ranks_2N[1, cols])
    rank_2N = total(ranks_2N)[:, pairs.order_N.argsort()]
    return rank_2N[0], rank_2N[1]


def _count_better(scores_RC: Tensor, best_R: Tensor, best_C: Tensor, rank_R: Tensor, rank_C: Tensor) -> None:
    """Add to both ranks how many scores of a tile are above the best correct one of their row and of their column."""
    # On a CPU torch compares into floats 4x faster than into bools, exact up to a tile; 32 rows a core fit in L2.
    strip = 32 * torch.get_num_threads() if scores_RC.device.type == "cpu" else len(scores_RC)
    better_SC = torch.empty_like(scores_RC[:strip])
    count_R, count_C = torch.zeros_like(best_R), torch.zeros_like(best_C)
    for scores_SC, best_S, count_S in zip(*(x.split(strip) for x in (scores_RC, best_R, count_R)), strict=True):
        better = better_SC[:len(scores_SC)]
        torch.sum(torch.gt(scores_SC, best_S[:, None], out=better), 1, out=count_S)
        count_C += torch.gt(scores_SC, best_C, out=better).sum(0)
    rank_R += count_R.long()
    rank_C += count_C.long()


class _Pairs:
    """The pairs in an order that puts correct answers into blocks along the diagonal of the score matrix.

    The last rows are padded to a whole block. On a CPU a product of 64 x 64 has the bits of any larger one (a row-wise
    dot product or 8 x 8 has not); elsewhere a block is a whole tile and all products have one shape. So thresholds
    equal the scores they came from, and two candidates with equal embeddings tie wherever they stand.
    """

    def __init__(self, image_NE: Tensor, title_NE: Tensor, title_id_N: Tensor, image_id_N: Tensor | None,
                 block: int) -> None:
        family_N, self.order_N = families(title_id_N, image_id_N).sort(stable=True)
        self.n, self.block = len(family_N), block
        self.order_P = F.pad(self.order_N, (0, -self.n % block))
        self.ids = [id_N[self.order_P] for id_N in (title_id_N, image_id_N) if id_N is not None]
        self.image_NE, title_NE = _wide(image_NE), _wide(title_NE)
        self.title_PE = title_NE.index_select(0, self.order_P)  # images are gathered a strip at a time
        first = family_N[::block].contiguous()
        last = family_N[torch.arange(block - 1, self.n + block - 1, block, device=first.device).clamp(max=self.n - 1)]
        low, high = torch.searchsorted(family_N, first), torch.searchsorted(family_N, last, right=True)
        self.span = torch.stack([low // block * block, high], 1).tolist()  # columns with correct answers, by block row

    def images(self, row: int, out: Tensor) -> Tensor:
        """Images from `row` on, [<= R, E], gathered in `out`, the last ones padding."""
        return torch.index_select(self.image_NE, 0, self.order_P[row:row + len(out)], out=out[:len(self.order_P) - row])

    def scores(self, image_RE: Tensor, col: int, out: Tensor) -> Tensor:
        """Scores of these images and the titles from `col` on, padding too, computed in `out`."""
        title_CE = self.title_PE[col:col + out.shape[1]]
        return torch.mm(image_RE, title_CE.T, out=out[:len(image_RE), :len(title_CE)])

    def sides(self, corners: list[tuple[int, int]]) -> Tensor:
        """The rows and the columns of the blocks that begin there, int64 [2, B, block]."""
        step = torch.arange(self.block, device=self.order_P.device)
        return torch.tensor(corners, device=step.device).T[:, :, None] + step

    def answers(self, row: int, col: int, tile: list[int]) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        """Blocks of a tile that can hold correct answers, some at a time: where they begin, and which are correct.

        Correct is [B, block, block] bool: title ids or image ids are equal. Padding repeats a row, ids and all.
        """
        blocks = self.blocks(row, col, tile)
        while corners := list(islice(blocks, math.ceil(2**18 / self.block**2))):
            row_BR, col_BC = self.sides(corners)
            same = [id_P[row_BR][:, :, None] == id_P[col_BC][:, None] for id_P in self.ids]
            yield corners, same[0].logical_or_(same[-1])

    def blocks(self, row: int, col: int, tile: list[int]) -> Iterator[tuple[int, int]]:
        """Where the blocks within a tile begin that can hold correct answers."""
        for r in range(row, min(row + tile[0], self.n), self.block):
            low, high = self.span[r // self.block]
            for c in range(max(low, col), min(high, col + tile[1]), self.block):
                yield r, c

    def best_correct(self) -> tuple[Tensor, Tensor]:
        """The score of the best correct answer of every image and of every title, [N] each."""
        best_2P = self.image_NE.new_full((2, len(self.order_P)), -math.inf)
        image_RE = self.image_NE.new_empty(self.block, self.image_NE.shape[1])
        for corners, correct_BRC in self.answers(0, 0, [self.n, self.n]):
            own_BRC = best_2P.new_empty(correct_BRC.shape)
            for (row, col), own_RC, some in zip(corners, own_BRC, correct_BRC.flatten(1).any(1).tolist(), strict=True):
                if some:  # a large family is mostly empty
                    self.scores(self.images(row, image_RE), col, own_RC)
            own_BRC.masked_fill_(~correct_BRC, -math.inf)
            for best_P, at_BR, side in zip(best_2P, self.sides(corners), (2, 1), strict=True):
                best_P.scatter_reduce_(0, at_BR.flatten(), own_BRC.amax(side).flatten(), "amax")
        return best_2P[0, :self.n], best_2P[1, :self.n]


@torch.no_grad()
def triplet_correct(image_ME: Tensor, title_ME: Tensor, negative_ME: Tensor, margin: float = 0.0,
                    chunk: int = 65_536) -> Tensor:
    """[M] bool: cos(image, title) > cos(image, negative) + margin, strictly: a tie is wrong.

    The arithmetic is that of sentence-transformers' TripletEvaluator; rows need not be normalised.
    """
    parts = []
    for rows in zip(image_ME.split(chunk), title_ME.split(chunk), negative_ME.split(chunk), strict=True):
        image, title, negative = (F.normalize(_wide(x), dim=-1) for x in rows)
        parts.append((image * title).sum(-1) > (image * negative).sum(-1) + margin)
    return torch.cat(parts)


def recall_at(rank_N: Tensor, k: int) -> float:
    """Share of 0-based ranks within the first `k`; a `k` beyond the gallery means all of it."""
    _count_rows(rank_N)
    return (rank_N < k).double().mean().item()


def median_rank(rank_N: Tensor) -> float:
    """Median of the 1-based ranks; the mean of the two middle ones when N is even."""
    n = _count_rows(rank_N)
    sorted_N = rank_N.sort()[0].double()
    return (sorted_N[(n - 1) // 2] + sorted_N[n // 2]).item() / 2 + 1


def mean_rank(rank_N: Tensor) -> float:
    """Mean of the 1-based ranks."""
    _count_rows(rank_N)
    return rank_N.double().mean().item() + 1


def mean_reciprocal_rank(rank_N: Tensor) -> float:
    """Mean of 1 / (1-based rank)."""
    _count_rows(rank_N)
    return reciprocal(rank_N).mean().item()


def reciprocal(rank_N: Tensor) -> Tensor:
    """1 / (1-based rank), float64 [N]."""
    return 1 / (rank_N.double() + 1)


@dataclass(frozen=True)
class Retrieval:
    """What one model does on one split, row by row: 0-based ranks both ways, and triplets where there are negatives."""

    image_to_text_rank_N: Tensor
    text_to_image_rank_N: Tensor
    triplet_M: Tensor | None = None

    def values(self) -> dict[str, float]:
        """Every metric by name. Raises UserError for no rows."""
        found: dict[str, float] = {}
        for way, rank_N in self._ways():
            found |= {f"{way}_R@{k}": recall_at(rank_N, k) for k in RECALL_AT}
            found |= {f"{way}_median_rank": median_rank(rank_N), f"{way}_mean_rank": mean_rank(rank_N),
                      f"{way}_mrr": mean_reciprocal_rank(rank_N)}
        if self.triplet_M is not None and len(self.triplet_M):
            found["triplet_accuracy"] = self.triplet_M.double().mean().item()
        return found

    def summarise(self, seed: int = 0) -> dict[str, float | Interval]:
        """`values`, each followed by its 95 % interval `NAME_ci95: [low, high]`; the costlier the more rows."""
        intervals: dict[str, Interval] = {}
        for way, rank_N in self._ways():
            n = _count_rows(rank_N)
            intervals |= {f"{way}_R@{k}": share_interval(rank_N < k) for k in RECALL_AT}
            intervals |= {f"{way}_median_rank": median_interval(rank_N + 1, seed),
                          f"{way}_mean_rank": mean_interval(rank_N + 1, 1, n, seed),
                          f"{way}_mrr": mean_interval(reciprocal(rank_N), 1 / n, 1, seed)}
        if self.triplet_M is not None and len(self.triplet_M):
            intervals["triplet_accuracy"] = share_interval(self.triplet_M)
        return {key: part for name, value in self.values().items()
                for key, part in ((name, value), (f"{name}_ci95", intervals[name]))}

    def rows(self) -> dict[str, Tensor]:
        """Per-row hits (bool) and reciprocal ranks, by metric name: what `compare` pairs."""
        found = {f"{way}_R@{k}": rank_N < k for way, rank_N in self._ways() for k in RECALL_AT}
        found |= {f"{way}_mrr": reciprocal(rank_N) for way, rank_N in self._ways()}
        if self.triplet_M is not None and len(self.triplet_M):
            found["triplet_accuracy"] = self.triplet_M
        return found

    def _ways(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        return ("image_to_text", self.image_to_text_rank_N), ("text_to_image", self.text_to_image_rank_N)


def compare(before: Retrieval, after: Retrieval, seed: int = 0) -> dict[str, PairedTest]:
    """The paired test of every metric that is a mean over rows; both must come from the same rows in the same order."""
    before_rows, after_rows = before.rows(), after.rows()
    return {name: paired_test(before_rows[name], after_rows[name], seed) for name in before_rows}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _count_rows(x_N: Tensor) -> int:
    if not len(x_N):
        raise UserError("there are no pairs to measure; choose a split that has rows")
    return len(x_N)
