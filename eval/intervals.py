"""How sure a figure is: 95 % intervals from per-row values, and the paired test of one model against another.

Rows are what varies: a pair is drawn anew, its gallery stays. Everything is seeded and deterministic.
Dimension key: N rows, K distinct values, B resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import UserError

RESAMPLES = 4_000  # of a bootstrap
FLIPS = 9_999  # of a sign-flip test that is too large to enumerate
ENUMERATE = 16  # non-zero differences whose 2^m sign patterns are all tried
DISTINCT = 1_024  # values told apart while resampling; beyond, they merge into bins 1.6 % wide
Z = 1.959964  # 97.5 % point of the normal distribution
POISSON_5 = (0.051293, 0.355362, 0.817691)  # 5 % points of Gamma(1), Gamma(2), Gamma(3)

Array = NDArray[np.float64]
Interval = list[float]


@dataclass(frozen=True)
class PairedTest:
    """After minus before, on average over rows; its 95 % interval; the two-sided p of "no difference"."""

    difference: float
    ci95: Interval
    p_value: float

    def as_json(self) -> dict[str, float | Interval]:
        """As it stands in metrics.json."""
        return {"value": self.difference, "ci95": self.ci95, "p": self.p_value}


def share_interval(hit_N: Tensor) -> Interval:
    """95 % interval of the share of True rows: Wilson's, with a Poisson limit for one to three misses or hits.

    A percentile bootstrap of 12 hits in 12 rows says [1, 1]; this says [.757, 1]. Source: Brown, Cai, DasGupta,
    "Interval Estimation for a Binomial Proportion", Statistical Science 16(2), 2001, modified Wilson interval.
    """
    return _share_interval(int(hit_N.sum()), len(hit_N))


def _share_interval(hits: int, n: int) -> Interval:
    share, shrink = hits / n, 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / shrink
    rare = POISSON_5[:2 if n <= 50 else 3]
    low = rare[hits - 1] / n if 1 <= hits <= len(rare) else centre - half
    high = 1 - rare[n - hits - 1] / n if 1 <= n - hits <= len(rare) else centre + half
    return [max(0.0, min(low, share)), min(1.0, max(high, share))]


def mean_interval(value_N: Tensor, lowest: float, highest: float, seed: int, resamples: int = RESAMPLES) -> Interval:
    """95 % bootstrap of the mean of values that lie within `lowest` and `highest`.

    Resampling N rows is one multinomial draw over the K distinct values, so memory is B x K whatever N. The
    percentiles are those of Hesterberg ("What Teachers Should Know About the Bootstrap", The American Statistician
    69(4), 2015, expanded percentile interval), without which 12 rows cover 90 %. Where all rows are alike a bootstrap
    claims certainty; instead, the share of rows that may differ and still go unseen (`share_interval` of N in N) is
    given to the extremes. A mean rank stays too sure while few rows make up its long tail: 12 rows cover some 84 %.
    """
    value_K, count_K = _histogram(_numpy(value_N))
    n = int(count_K.sum())
    if len(value_K) == 1:
        alike, value = _share_interval(n, n)[0], float(value_K[0])
        return [alike * value + (1 - alike) * extreme for extreme in (lowest, highest)]
    count_BK = np.random.default_rng(seed).multinomial(n, count_K / n, size=resamples)
    return _percentiles(count_BK @ value_K / n, NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student_t(n - 1)))


def _student_t(freedom: int) -> float:
    """97.5 % point of Student's t, expanded around the normal's (Abramowitz and Stegun 26.7.5)."""
    terms = (Z, (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def median_interval(value_N: Tensor, seed: int) -> Interval:
    """95 % percentile bootstrap of the median, without drawing rows.

    The m-th smallest of N resampled rows is the row at a Beta(m, N - m + 1) quantile of the sorted rows, and the one
    after it follows from the smallest of the N - m uniforms left above (order statistics of the uniform).
    """
    sorted_N, rng = np.sort(_numpy(value_N)), np.random.default_rng(seed)
    n = len(sorted_N)
    middle = (n + 1) // 2
    lower_B = upper_B = rng.beta(middle, n - middle + 1, RESAMPLES)
    if n % 2 == 0:
        upper_B = 1 - (1 - lower_B) * rng.random(RESAMPLES) ** (1 / (n - middle))
    low_B, high_B = (sorted_N[np.minimum((u * n).astype(np.int64), n - 1)] for u in (lower_B, upper_B))
    return _percentiles((low_B + high_B) / 2)


def paired_test(before_N: Tensor, after_N: Tensor, seed: int = 0, resamples: int = RESAMPLES,
                flips: int = FLIPS) -> PairedTest:
    """Compare two models on the same rows: hits (bool) or values within 0 and 1, such as reciprocal ranks.

    p is that of the sign-flip permutation test of the mean difference: exact when at most 16 rows differ or all differ
    by the same size (for hits this is McNemar's exact test), otherwise from seeded flips as (1 + as extreme) / (1 +
    flips). The interval is `mean_interval`. Raises UserError for no rows or rows that cannot be paired.
    """
    if before_N.shape != after_N.shape or not len(before_N):
        raise UserError(f"cannot pair {len(before_N)} rows with {len(after_N)}; measure both models on the same rows")
    difference_N = after_N.double() - before_N.double()
    interval = mean_interval(difference_N, -1, 1, seed, resamples)
    return PairedTest(difference_N.mean().item(), interval, _sign_flip_p(_numpy(difference_N), seed, flips))


def _sign_flip_p(difference_N: Array, seed: int, flips: int) -> float:
    """Chance that random signs of the differences make a sum at least as far from zero, two-sided."""
    moved_M = difference_N[difference_N != 0]
    m = len(moved_M)
    if m == 0:
        return 1.0
    size_K, count_K = _histogram(np.abs(moved_M))
    if len(size_K) == 1:  # only the number of plus signs matters: Binomial(m, 1/2)
        more = max(int((moved_M > 0).sum()), int((moved_M < 0).sum()))
        j = torch.arange(more, m + 1, dtype=torch.float64)
        log_ways = math.lgamma(m + 1) - torch.lgamma(j + 1) - torch.lgamma(m - j + 1)
        return min(1.0, 2 * math.exp(torch.logsumexp(log_ways, 0).item() - m * math.log(2)))
    if m <= ENUMERATE:
        plus = np.arange(2**m)[:, None] >> np.arange(m) & 1
        sums = (2 * plus - 1) @ moved_M
    else:
        plus = np.random.default_rng(seed).binomial(count_K, 0.5, size=(flips, len(size_K)))
        sums = (2 * plus - count_K) @ size_K
    noise = 1e-9 * np.abs(moved_M).sum()  # equal sums added in another order
    extreme = int((np.abs(sums) >= abs(moved_M.sum()) - noise).sum())
    return extreme / len(sums) if m <= ENUMERATE else (1 + extreme) / (1 + flips)


def _histogram(value_N: Array) -> tuple[Array, NDArray[np.int64]]:
    """Distinct values and their counts, at most DISTINCT: more are merged into bins and stand there by their mean.

    Bins are 1.6 % wide above a thousandth of the largest value and as narrow as there below it, so the mean is kept
    and the variance within a bin, which is lost, is some 1e-5 of the whole.
    """
    value_K, count_K = np.unique(value_N, return_counts=True)
    if len(value_K) <= DISTINCT:
        return value_K, count_K
    bins = np.rint(64 * np.arcsinh(value_K * (1000 / np.abs(value_K).max())))
    start = np.flatnonzero(np.diff(bins, prepend=-np.inf))
    merged_K = np.add.reduceat(count_K, start)
    return np.add.reduceat(value_K * count_K, start) / merged_K, merged_K


def _percentiles(value_B: Array, tail: float = 0.025) -> Interval:
    low, high = np.quantile(value_B, [tail, 1 - tail])
    return [float(low), float(high)]


def _numpy(value_N: Tensor) -> Array:
    return value_N.detach().cpu().double().numpy()
