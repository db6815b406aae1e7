"""95 % confidence intervals in closed form, and the paired test of one model against another.

The sampling unit is the independent unit: an image with its titles, and everything connected to it through a shared
image or title. Intervals describe other samples of units with the same gallery. A metric is a ratio over units (sum of
the values / number of values); its variance is linearised around that ratio (Cochran, "Sampling Techniques", 3rd ed.
1977, chapter 6), which for units of one value is the variance of a mean. Only the signs of `paired_test` are random,
from a seed.
Dimension key: N values (one a query), U units, F flips, K distinct sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import UserError

FLIPS = 9_999  # random sign patterns of a test that is too large to enumerate
ENUMERATE = 16  # at most so many differing units: all 2^U sign patterns are tried
LARGEST = 64  # the largest differences get signs of their own; the sum of the smaller ones is close to normal
Z = 1.959964  # 97.5 % point of the normal distribution
POISSON_5 = (0.051293, 0.355362, 0.817691)  # 5 % points of Gamma(1), Gamma(2), Gamma(3)

Array = NDArray[np.float64]
Interval = list[float]


@dataclass(frozen=True)
class PairedTest:
    """After minus before, on average over queries; its 95 % interval; the two-sided p of "no difference"."""

    difference: float
    ci95: Interval
    p_value: float

    def as_json(self) -> dict[str, float | Interval]:
        """Return the entry of metrics.json."""
        return {"value": self.difference, "ci95": self.ci95, "p": self.p_value}


class Units:
    """The independent units that N values belong to; `unit_N` holds small numbers, equal for the same unit."""

    def __init__(self, unit_N: Tensor) -> None:
        self.unit_N = unit_N.cpu().numpy()
        count = np.bincount(self.unit_N)
        self.present = np.flatnonzero(count)
        self.count_U: Array = count[self.present].astype(np.float64)
        self.n = len(self.unit_N)

    @classmethod
    def single(cls, n: int) -> Units:
        """Return N units of one value each."""
        return cls(torch.arange(n))

    @property
    def correlated_size(self) -> float:
        """Kish's effective sample size for values that are equal within a unit."""
        return self.n**2 / float((self.count_U**2).sum())

    def sums(self, value_N: Array) -> Array:
        """Return the sum of each unit's values [U]."""
        return np.bincount(self.unit_N, value_N)[self.present].astype(np.float64)

    def effective_size(self, hit_N: Array) -> float:
        """Return the number of independent draws whose share of hits has the same variance.

        It is N for units of one value, else N divided by the design effect (Kish, "Survey Sampling", 1965). That is a
        weighted mean of two: the observed one, whose weight is the number of units that hold a miss (or a hit, if those
        are fewer), and the one of full correlation within units, whose weight is 2.
        """
        correlated = self.n / self.correlated_size  # the design effect of full correlation within units
        if correlated == 1:
            return float(self.n)
        units, share, observed, weight = len(self.count_U), float(hit_N.mean()), correlated, 0
        if 0 < share < 1 and units > 1:
            hits_U = self.sums(hit_N)
            variance = float(((hits_U - share * self.count_U) ** 2).sum()) * units / (units - 1)
            observed = variance / (self.n * share * (1 - share))
            weight = min(int((hits_U > 0).sum()), int((hits_U < self.count_U).sum()))
        return self.n / max(1.0, (weight * observed + 2 * correlated) / (weight + 2))


def share_interval(hit_N: Tensor, units: Units | None = None) -> Interval:
    """Return the 95 % interval of the share of True values: Wilson's, or Poisson limits for up to three hits or misses.

    A percentile bootstrap of 12 hits in 12 rows gives [1, 1]; this gives [.757, 1]. Source: Brown, Cai, DasGupta,
    "Interval Estimation for a Binomial Proportion", Statistical Science 16(2), 2001, modified Wilson interval; the
    number of draws is `Units.effective_size`.
    """
    hit = _numpy(hit_N)
    return _wilson(float(hit.mean()), (units or Units.single(len(hit))).effective_size(hit))


def _wilson(share: float, n: float) -> Interval:
    shrink = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / shrink
    low_hits, low_misses = _poisson_lower(share * n, n), _poisson_lower((1 - share) * n, n)
    low = centre - half if low_hits is None else low_hits
    high = centre + half if low_misses is None else 1 - low_misses
    return [max(0.0, min(low, share)), min(1.0, max(high, share))]


def _poisson_lower(hits: float, n: float) -> float | None:
    """Return the Poisson lower limit of a share of at most three hits (two, up to 50 draws); None for more."""
    limits = (0.0, *POISSON_5[:2 if n <= 50 else 3])
    if hits > len(limits) - 1 + 1e-9:
        return None
    return float(np.interp(hits, range(len(limits)), limits)) / n


def mean_interval(value_N: Tensor, lowest: float, highest: float, units: Units | None = None) -> Interval:
    """Return the 95 % interval of the mean of values between `lowest` and `highest`.

    It is the percentile bootstrap in closed form, up to its skewness (Hall, "The Bootstrap and Edgeworth Expansion",
    1992), widened as Hesterberg does ("What Teachers Should Know About the Bootstrap", The American Statistician 69(4),
    2015, expanded percentile interval); without that, intervals from 12 rows cover 90 %. Values that are all equal
    would give an interval of no width: instead, as large a share of units as may differ (Wilson's limit for n in n) is
    moved to each extreme. The interval of a mean rank is too narrow while few rows make up its long tail: from 12 rows
    it covers 84 %.
    """
    value = _numpy(value_N)
    units, mean = units or Units.single(len(value)), float(value.mean())
    residual_U = units.sums(value - mean)
    squares, n = float((residual_U**2).sum()), units.correlated_size
    if squares <= (1e-12 * np.abs(value).max() * units.n) ** 2:  # all values are equal, up to the rounding of the mean
        equal = _wilson(1.0, n)[0]
        return [equal * mean + (1 - equal) * extreme for extreme in (lowest, highest)]
    reach = math.sqrt(n / (n - 1)) * _student_t(n - 1)
    spread = math.sqrt(squares) / units.n
    skewness = float((residual_U**3).sum()) / squares**1.5
    shift = skewness * (reach**2 - 1) / 6
    low, high = mean + spread * (shift - reach), mean + spread * (shift + reach)
    return [max(lowest, min(low, mean)), min(highest, max(high, mean))]


def _student_t(freedom: float) -> float:
    """Return the 97.5 % point of Student's t, expanded around the normal's (Abramowitz and Stegun 26.7.5)."""
    terms = (Z, (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96, (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384)
    return sum(term / max(freedom, 1.0)**power for power, term in enumerate(terms))


def median_interval(value_N: Tensor, units: Units | None = None) -> Interval:
    """Return the 95 % interval of the median: the sample quantiles at the limits of the interval of a share of 1/2.

    Source: Woodruff, "Confidence Intervals for Medians and Other Position Measures", JASA 47, 1952.
    """
    sorted_N = np.sort(_numpy(value_N))
    n = len(sorted_N)
    below = (_numpy(value_N) <= sorted_N[(n - 1) // 2]).astype(np.float64)
    half = Z / 2 / math.sqrt((units or Units.single(n)).effective_size(below))
    first, last = math.floor(n * (0.5 - half)), math.ceil(n * (0.5 + half)) - 1
    return [float(sorted_N[max(0, first)]), float(sorted_N[min(n - 1, last)])]


def paired_test(before_N: Tensor, after_N: Tensor, units: Units | None = None, seed: int = 0) -> PairedTest:
    """Compare two models on the same queries by hits (bool) or by values between 0 and 1, such as reciprocal ranks.

    p is that of the sign-flip permutation test of the units' summed differences: exact when at most 16 units differ or
    all differ by the same size (for hits this is McNemar's exact test), otherwise from FLIPS seeded sign patterns as
    (1 + as extreme) / (1 + FLIPS). The interval is `mean_interval`. Raises UserError for no queries or unequal numbers
    of them.
    """
    if before_N.shape != after_N.shape or not len(before_N):
        raise UserError(f"cannot pair {len(before_N)} rows with {len(after_N)}; measure both models on the same rows")
    difference_N = after_N.double() - before_N.double()
    units = units or Units.single(len(difference_N))
    p_value = _sign_flip_p(units.sums(_numpy(difference_N)), seed)
    return PairedTest(difference_N.mean().item(), mean_interval(difference_N, -1, 1, units), p_value)


def _sign_flip_p(difference_U: Array, seed: int) -> float:
    """Return the probability that random signs of the differences give a sum at least as far from zero, two-sided."""
    noise = 1e-9 * np.abs(difference_U).sum()  # rounding of equal sums added in another order
    moved_U = difference_U[np.abs(difference_U) > noise / len(difference_U)]
    m = len(moved_U)
    if m == 0:
        return 1.0
    size_U = np.sort(np.abs(moved_U))[::-1]
    if size_U[0] - size_U[-1] <= noise / m:  # only the number of plus signs matters: Binomial(m, 1/2)
        more = max(int((moved_U > 0).sum()), int((moved_U < 0).sum()))
        j = torch.arange(more, m + 1, dtype=torch.float64)
        log_ways = math.lgamma(m + 1) - torch.lgamma(j + 1) - torch.lgamma(m - j + 1)
        return min(1.0, 2 * math.exp(torch.logsumexp(log_ways, 0).item() - m * math.log(2)))
    exact = m <= ENUMERATE
    sums = _all_sums(size_U) if exact else _drawn_sums(size_U, np.random.default_rng(seed))
    extreme = int((np.abs(sums) >= abs(moved_U.sum()) - noise).sum())
    return extreme / len(sums) if exact else (1 + extreme) / (1 + FLIPS)


def _all_sums(size_U: Array) -> Array:
    """Return the sums under all sign patterns, [2^U]."""
    sums = np.zeros(1)
    for size in size_U:
        sums = np.concatenate([sums + size, sums - size])
    return sums


def _drawn_sums(size_U: Array, rng: np.random.Generator) -> Array:
    """Return FLIPS sums under random signs of the sizes, which are in descending order."""
    size_K, count_K = np.unique(size_U, return_counts=True)
    if len(size_K) <= LARGEST // 4:  # few distinct sizes: draw how many of each are positive
        return (2 * rng.binomial(count_K, 0.5, size=(FLIPS, len(size_K))) - count_K) @ size_K
    largest, rest = size_U[:LARGEST], size_U[LARGEST:]
    bits = np.unpackbits(rng.integers(0, 256, (FLIPS, LARGEST // 8), np.uint8), axis=1)[:, :len(largest)]
    return (2.0 * bits - 1) @ largest + rng.standard_normal(FLIPS) * math.sqrt(float((rest**2).sum()))


def _numpy(value_N: Tensor) -> Array:
    return value_N.detach().cpu().double().numpy()
