"""Intervals and paired tests against every outcome weighted, brute-force enumeration and known truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from eval.intervals import Units, mean_interval, median_interval, paired_test, share_interval


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_coverage(n: int, p: float) -> float:
    """Chance that `share_interval` of n rows holds p: every outcome, weighted."""
    total = 0.0
    for hits in range(n + 1):
        low, high = share_interval(torch.arange(n) < hits)
        total += (low <= p <= high) * math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)
    return total


@pytest.mark.parametrize("n", [12, 53, 200])
def test_share_intervals_cover_the_truth(n: int) -> None:
    coverage = [exact_coverage(n, p) for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)]
    assert min(coverage) > 0.92 and 0.94 < sum(coverage) / len(coverage) < 0.99
    assert exact_coverage(12, 0.95) > 0.94
    low, high = share_interval(torch.ones(12, dtype=torch.bool))
    assert low == pytest.approx(0.7575, abs=1e-4) and high == 1


def coverage_of(interval: Callable[[Tensor], list[float]], draw: Callable[[], Tensor], truth: float) -> float:
    """Share of 300 intervals that hold the truth: its own noise is 1.3 points."""
    intervals = [interval(draw()) for _ in range(300)]
    return sum(low <= truth <= high for low, high in intervals) / len(intervals)


def test_rank_intervals_cover_the_truth() -> None:
    """Ranks are drawn from a known population with a long tail, which costs the mean some coverage."""
    population = (torch.randn(5_000, generator=rng(0)).mul(1.2).exp() * 3).long().clamp(max=99) + 1
    generator = rng(1)

    def draw() -> Tensor:
        return population[torch.randint(5_000, (60,), generator=generator)]

    median = population.double().median().item()
    assert coverage_of(lambda x: mean_interval(x, 1, 100), draw, population.double().mean().item()) > 0.85
    assert coverage_of(lambda x: mean_interval(1 / x.double(), 0.01, 1), draw,
                       (1 / population.double()).mean().item()) > 0.91
    assert coverage_of(lambda x: median_interval(x), draw, median) > 0.92


def exact_median_coverage(n: int) -> float:
    """Chance that the median of distinct values lies between the order statistics that `median_interval` takes."""
    low, high = median_interval(torch.arange(n))
    return sum(math.comb(n, below) for below in range(int(low) + 1, int(high) + 1)) / 2**n


@pytest.mark.parametrize("n", [12, 53, 200, 1001])
def test_median_intervals_cover_the_truth(n: int) -> None:
    assert 0.94 < exact_median_coverage(n) < 0.99


def clustered(units: int, share: float, alike: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal values of five queries a unit, correlated by `alike`, of which `share` lie below 0; and their units."""
    unit = torch.randn(units, 1, generator=generator) * math.sqrt(alike)
    own = torch.randn(units, 5, generator=generator) * math.sqrt(1 - alike)
    quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1.0))
    return (unit + own - quantile).flatten(), torch.arange(units).repeat_interleave(5)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_intervals_of_five_captions_an_image_cover_the_truth(share: float, alike: float) -> None:
    """Rows drawn one by one cover 60 to 70 % where captions of an image go together: figures look surer than they are.

    400 samples; the noise of a coverage of 95 % is 1.1 points.
    """
    generator, held = rng(0), [0] * 4
    for _ in range(400):
        value_N, unit_N = clustered(60, share, alike, generator)
        units, level_N = Units(unit_N), (1 + torch.erf(value_N / math.sqrt(2))) / 2
        truths = [(share_interval(value_N < 0, units), share), (median_interval(value_N, units), -_quantile(share)),
                  (mean_interval(level_N, 0, 1, units), _mean_level(share)), (share_interval(value_N < 0), share)]
        for index, ((low, high), truth) in enumerate(truths):
            held[index] += low <= truth <= high
    assert all(count / 400 > 0.92 for count in held[:3])
    assert alike < 0.9 or held[3] / 400 < 0.75


def _quantile(share: float) -> float:
    return NormalDist().inv_cdf(share)


def _mean_level(share: float) -> float:
    """E[Phi(X - q)] for a standard normal X: P(Y < X - q) of another one."""
    return NormalDist().cdf(-_quantile(share) / math.sqrt(2))


def test_units_say_how_many_draws_there_were() -> None:
    """Twelve images with five captions each, all found, are twelve draws; one unit tells nothing of others."""
    hits, units = torch.ones(60, dtype=torch.bool), Units(torch.arange(12).repeat_interleave(5))
    assert share_interval(hits, units) == pytest.approx(share_interval(torch.ones(12, dtype=torch.bool)))
    assert mean_interval(hits, 0, 1, units) == pytest.approx(mean_interval(torch.ones(12), 0, 1))
    one = Units(torch.zeros(60, dtype=torch.int64))
    assert share_interval(hits, one)[0] < 0.25 and mean_interval(hits, 0, 1, one)[0] < 0.25
    assert median_interval(torch.arange(60), one) == [0, 59]
    # captions that differ within their image only, and repeats of single rows
    spread = torch.arange(300) % 5 < 2
    low, high = share_interval(spread, Units(torch.arange(60).repeat_interleave(5)))
    assert 0.34 < low < 0.4 < high < 0.46
    value = torch.rand(30, generator=rng(0))
    again, unit = value.repeat_interleave(4), torch.arange(30).repeat_interleave(4)
    assert mean_interval(again, 0, 1, Units(unit)) == pytest.approx(mean_interval(value, 0, 1), abs=1e-6)


def test_the_paired_test_flips_units() -> None:
    """Five captions of one image that move together are one piece of evidence."""
    before, after = torch.zeros(60), torch.zeros(60)
    after[:25] = 1
    units = Units(torch.arange(12).repeat_interleave(5))
    assert paired_test(before, after, units).p_value == pytest.approx(2 * 0.5**5)
    assert paired_test(before, after).p_value == pytest.approx(2 * 0.5**25)
    difference = torch.randn(100, generator=rng(1)).double() / 10
    unit = torch.arange(100) // 9
    sums = torch.zeros(12, dtype=torch.float64).index_add(0, unit, difference)
    found = paired_test(torch.zeros(100), difference, Units(unit)).p_value
    assert found == pytest.approx(brute_p(sums.tolist()), abs=1e-12)


@pytest.mark.parametrize("units", [70, 400])
def test_the_normal_rest_of_many_differences_changes_no_p(units: int) -> None:
    """Against signs that are all drawn, with sizes from very small to large."""
    size = torch.rand(units, generator=rng(units)).double().pow(4)
    sign = torch.where(torch.rand(units, generator=rng(1)) < 0.57, 1.0, -1.0).double()
    signs = torch.randint(0, 2, (40_000, units), generator=rng(2)).double() * 2 - 1
    want = ((signs @ size).abs() >= (sign @ size).abs()).double().mean().item()
    found = paired_test(torch.zeros(units), sign * size).p_value
    assert found == pytest.approx(want, abs=4 * math.sqrt(max(want, 0.01) * (1 / 9999 + 1 / 40_000)))


def test_twelve_rows_alike_are_not_certainty() -> None:
    low, high = mean_interval(torch.ones(12), 0, 1)
    assert low == pytest.approx(0.7575, abs=1e-4) and high == 1
    same = paired_test(torch.ones(12).bool(), torch.ones(12).bool())
    assert same.p_value == 1 and same.difference == 0 and same.ci95[0] < -0.15 and same.ci95[1] > 0.15


def brute_p(difference: list[float]) -> float:
    target = abs(sum(difference)) - 1e-9
    sums = [abs(sum(s * d for s, d in zip(signs, difference, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(difference))]
    return sum(s >= target for s in sums) / len(sums)


@pytest.mark.parametrize("seed", range(6))
def test_paired_test_equals_enumeration(seed: int) -> None:
    before, after = torch.rand(2, 12, generator=rng(seed)).double().mul(4).round().div(4)
    assert paired_test(before, after).p_value == pytest.approx(brute_p((after - before).tolist()), abs=1e-12)
    hits_before, hits_after = before > 0.4, after > 0.4
    want = brute_p((hits_after.double() - hits_before.double()).tolist())
    assert paired_test(hits_before, hits_after).p_value == pytest.approx(want, abs=1e-12)


def test_flipped_signs_agree_with_enumeration_and_are_seeded() -> None:
    sizes = torch.rand(18, generator=rng(5)).double() * 0.9 + 0.1
    after = torch.where(torch.arange(18) < 13, sizes, torch.zeros(18, dtype=torch.float64))
    found = paired_test(sizes - after, after, seed=1)
    # all 2^18 patterns, vectorised
    signs = (torch.arange(2**18)[:, None] >> torch.arange(18) & 1).double() * 2 - 1
    difference = after - (sizes - after)
    want = ((signs @ difference).abs() >= difference.sum().abs() - 1e-9).double().mean().item()
    assert found.p_value == pytest.approx(want, abs=4 * math.sqrt(want / 9999))
    assert found == paired_test(sizes - after, after, seed=1) != paired_test(sizes - after, after, seed=2)
    assert paired_test(torch.zeros(60), torch.rand(60, generator=rng(0)) + 0.1).p_value == 1 / 10_000  # never 0


def test_paired_intervals_cover_the_truth() -> None:
    """Hits: every outcome of 12 rows, weighted, where 35 % are won and 5 % lost. Reciprocal ranks: 200 samples."""
    covered = 0.0
    for won, lost in itertools.product(range(13), repeat=2):
        if won + lost <= 12:
            row = torch.arange(12)
            low, high = paired_test((row >= won) & (row < won + lost), row < won).ci95
            ways = math.comb(12, won) * math.comb(12 - won, lost)
            covered += (low <= 0.3 <= high) * ways * 0.35**won * 0.05**lost * 0.6 ** (12 - won - lost)
    assert 0.94 < covered < 0.99
    generator = rng(0)

    def draw() -> Tensor:
        before, after = torch.rand(2, 12, generator=generator).double() / 2
        return after + 0.1 - before

    assert coverage_of(lambda x: mean_interval(x, -1, 1), draw, 0.1) > 0.91
