"""P7 and P15: ranks both ways against the bare product; every interval and paired test of a run."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.nn.functional as F

from eval.distinct import Distinct
from eval.metrics import Ranks, Retrieval, Triplets, compare, retrieval_ranks

from .harness import Bench, Figure, Race, amount, timed


def ranks(bench: Bench) -> None:
    """P7: ranks in both directions of N x N distinct pairs against the bare matrix product of the same size."""
    n = 2_000 if bench.quick else 10_000
    generator = torch.Generator().manual_seed(0)
    image_NE, title_NE = (F.normalize(torch.randn(n, 512, generator=generator), dim=-1) for _ in range(2))
    distinct, out_NN = Distinct.from_ids(None, torch.arange(n)), torch.empty(n, n)
    bench.race(Race("P7", f"Recall both ways, {n:,} x {n:,} x 512, against the bare product", "<= 1.15",
                    lambda: retrieval_ranks(image_NE, title_NE, distinct),
                    lambda: torch.mm(image_NE, title_NE.T, out=out_NN), cost=True, rounds=7))


def intervals(bench: Bench) -> None:
    """P15: all intervals and paired tests of a run: before and after, Recall, ranks and triplets. CPU time."""
    for count, goal in ((1_000, "<= 0.3"), (100_000, "<= 2"))[: 1 if bench.quick else 2]:
        before, after = (random_retrieval(count, seed) for seed in (0, 1))
        seconds = [timed(partial(statistics, before, after), time.process_time) for _ in range(2)]
        bench.add(Figure("P15", f"all intervals and paired tests of a run, {count:,} queries: s", goal, seconds,
                         amount(min(seconds))))


def statistics(before: Retrieval, after: Retrieval) -> None:
    """What metrics.json says of a split."""
    before.summarise()
    after.summarise()
    compare(before, after)


def random_retrieval(count: int, seed: int) -> Retrieval:
    """Ranks with a long tail, as a weak model has them."""
    generator, row_N = torch.Generator().manual_seed(seed), torch.arange(count)
    image_to_text_Q, text_to_image_Q = (count ** torch.rand(2, count, generator=generator)).long() - 1
    return Retrieval(Ranks(image_to_text_Q, row_N, row_N, count), Ranks(text_to_image_Q, row_N, row_N, count),
                     Triplets(torch.rand(count, generator=generator) < 0.8, row_N, row_N), count, count)
