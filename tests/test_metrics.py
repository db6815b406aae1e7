"""Metrics against the naive full matrix, the peer's evaluator, brute-force enumeration and known truth."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from eval.families import families
from eval.intervals import _histogram
from eval.metrics import (
    Retrieval,
    _Pairs,
    compare,
    mean_interval,
    mean_rank,
    mean_reciprocal_rank,
    median_interval,
    median_rank,
    paired_test,
    recall_at,
    retrieval_ranks,
    share_interval,
    triplet_correct,
)
from eval.report import table


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_ranks(scores_NN: Tensor, title_id_N: Tensor, image_id_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """The whole matrix at once; the definition, literally."""
    correct_NN = title_id_N[:, None] == title_id_N
    if image_id_N is not None:
        correct_NN = correct_NN | (image_id_N[:, None] == image_id_N)

    def one_way(scores_NN: Tensor) -> Tensor:
        best_N = scores_NN.masked_fill(~correct_NN, -math.inf).amax(1, keepdim=True)
        return ((scores_NN > best_N) & ~correct_NN).sum(1)

    return one_way(scores_NN), one_way(scores_NN.T)


def quantised(n: int, e: int, seed: int) -> Tensor:
    """Rows of -1, 0, 1: scores are whole numbers, exact in any order of addition, and tie all the time."""
    return torch.randint(-1, 2, (n, e), generator=rng(seed)).float()


def whole_numbers(n: int, e: int, most: int, seed: int) -> Tensor:
    """Rows whose scores are whole numbers below 2^24, which fp32 adds up exactly in any order, and few of them tie."""
    assert most**2 * e < 2**24
    return torch.randint(-most, most + 1, (n, e), generator=rng(seed)).float()


# chunk sides are rounded up to 64: one tile, tiles in both directions, edges that are no whole tile
@pytest.mark.parametrize(("n", "chunk"), [(1, None), (2, None), (53, None), (257, (128, 128)), (389, (128, 256)),
                                          (640, (384, 128)), (1100, None), (700, (1, 1))])
@pytest.mark.parametrize("titles", [1, 7, 300, 10**9])
@pytest.mark.parametrize("images", [None, 5, 10**9])
def test_ranks_equal_the_full_matrix_under_ties_and_duplicates(n: int, chunk: tuple[int, int] | None, titles: int,
                                                               images: int | None) -> None:
    image, title = quantised(n, 12, 1), quantised(n, 12, 2)
    title_id = torch.randint(titles, (n,), generator=rng(3)) - titles // 2
    image_id = None if images is None else torch.randint(images, (n,), generator=rng(4))
    found = retrieval_ranks(image, title, title_id, image_id, chunk)
    for got, want in zip(found, naive_ranks(image @ title.T, title_id, image_id), strict=True):
        assert got.dtype == torch.int64 and torch.equal(got, want)


def test_answers_are_left_out_even_where_rounding_puts_them_above_the_threshold(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS may round a small product unlike a large one: thresholds one bit lower change no rank."""
    exact = _Pairs.best_correct
    below = torch.tensor(-math.inf)
    monkeypatch.setattr(_Pairs, "best_correct", lambda pairs: tuple(x.nextafter(below) for x in exact(pairs)))
    image, title = (whole_numbers(450, 64, 500, s) for s in (0, 1))
    title_id, image_id = (torch.randint(300, (450,), generator=rng(s)) for s in (2, 3))
    found = retrieval_ranks(image, title, title_id, image_id, (128, 192))
    for got, want in zip(found, naive_ranks(image @ title.T, title_id, image_id), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("block", [128, 320, 1024])
def test_the_best_correct_answers_are_the_same_in_blocks_of_any_size(block: int) -> None:
    """An accelerator's blocks are whole tiles: mostly padding where there are few rows."""
    image, title = quantised(450, 12, 1), quantised(450, 12, 2)
    for titles, images in ((10**9, None), (300, 300), (5, None)):
        title_id = torch.randint(titles, (450,), generator=rng(3))
        image_id = None if images is None else torch.randint(images, (450,), generator=rng(4))
        want = _Pairs(image, title, title_id, image_id, 64).best_correct()
        assert all(map(torch.equal, _Pairs(image, title, title_id, image_id, block).best_correct(), want))


def test_families_of_a_very_long_chain_are_found_in_few_rounds() -> None:
    row = torch.randperm(200_000, generator=rng(0))
    assert not families(row // 2, (row + 1) // 2).any()


def test_titles_and_images_that_link_in_a_long_chain() -> None:
    n = 401  # 0 shares its title with 1, 1 its image with 2, 2 its title with 3 ...: one family, few correct pairs
    order = torch.randperm(n, generator=rng(0))
    title_id, image_id = (torch.arange(n) // 2)[order], ((torch.arange(n) + 1) // 2)[order]
    image, title = quantised(n, 8, 1), quantised(n, 8, 2)
    found = retrieval_ranks(image, title, title_id, image_id, (128, 256))
    for got, want in zip(found, naive_ranks(image @ title.T, title_id, image_id), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("n", [1, 3, 50, 129, 333])
@pytest.mark.parametrize("e", [3, 17, 512])
@pytest.mark.parametrize("chunk", [(128, 128), (128, 384), None])
def test_rounding_never_counts_an_answer_against_itself(n: int, e: int, chunk: tuple[int, int] | None) -> None:
    """Every score is the same number in exact arithmetic, so a last bit that differs would show as a rank."""
    collapsed = F.normalize(torch.randn(1, e, generator=rng(n)), dim=1).expand(n, e)
    for title_id in (torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.arange(n) % 7):
        for rank in retrieval_ranks(collapsed, collapsed, title_id, None, chunk):
            assert not rank.any()


def test_other_rows_with_the_very_same_embedding_tie() -> None:
    """Titles that differ in letter case have two ids and one embedding: neither is ahead of the other, at any n."""
    for n in (38, 515, 1301):
        image = F.normalize(torch.randn(n, 512, generator=rng(n)), dim=1)
        title = F.normalize(image + 0.02 * torch.randn(n, 512, generator=rng(n + 1)), dim=1)
        twin = torch.arange(n) % (n // 2)
        image, title = image[twin], title[twin]
        for rank in retrieval_ranks(image, title, torch.randperm(n, generator=rng(2))):
            assert not rank.any()


def test_ranks_by_eye() -> None:
    title = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0],    # own title first
                          [0.5, 0.3, 0.2],    # title 0 is better
                          [0.4, 0.3, 0.1]])   # titles 0 and 1 are better
    i2t, t2i = retrieval_ranks(image, title, torch.arange(3))
    assert i2t.tolist() == [0, 1, 2]
    assert t2i.tolist() == [0, 0, 1]  # title 1: images 1 and 2 tie at .3, in its favour; title 2: image 1 is better
    i2t, _ = retrieval_ranks(image, title, torch.tensor([0, 1, 0]))
    assert i2t.tolist() == [0, 1, 0]  # image 2's title reads like title 0, which wins
    assert recall_at(torch.tensor([0, 1, 2]), 1) == pytest.approx(1 / 3) and recall_at(torch.tensor([0, 1]), 99) == 1
    assert median_rank(torch.tensor([0, 1, 2, 9])) == 2.5 and median_rank(torch.tensor([4, 0, 2])) == 3
    assert mean_rank(torch.tensor([0, 1, 2])) == 2
    assert mean_reciprocal_rank(torch.tensor([0, 1, 3])) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_half_precision_is_scored_in_float32_under_autocast_too() -> None:
    image, title = (whole_numbers(300, 64, 500, s).half() for s in (0, 1))  # 500 has more bits than bf16
    ids = torch.arange(300)
    want = naive_ranks(image.double() @ title.double().T, ids, None)
    rough = naive_ranks(image.bfloat16().float() @ title.bfloat16().float().T, ids, None)
    assert not all(map(torch.equal, want, rough))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = retrieval_ranks(image, title, ids)
    for got, exact in zip(found, want, strict=True):
        assert torch.equal(got, exact)


def test_nothing_to_measure_or_not_a_number_is_the_users_to_know() -> None:
    none, ids = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    for call in (lambda: retrieval_ranks(none, none, ids), lambda: Retrieval(ids, ids).summarise(),
                 lambda: recall_at(ids, 1), lambda: paired_test(ids, ids)):
        with pytest.raises(UserError, match="rows"):
            call()
    with pytest.raises(UserError, match="same rows"):
        paired_test(torch.ones(3), torch.ones(4))
    for bad in (math.nan, math.inf):
        poisoned = torch.randn(200, 8, generator=rng(0))
        poisoned[150, 3] = bad
        for pair in ((poisoned, torch.ones(200, 8)), (torch.ones(200, 8), poisoned)):
            with pytest.raises(UserError, match="NaN"):
                retrieval_ranks(*pair, torch.arange(200))


class Lookup:
    """What TripletEvaluator needs of a model: row numbers in, embeddings out."""

    similarity_fn_name = "cosine"

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_: None})()

    def encode_query(self, rows: list[int], **_: object) -> object:
        return self.table[rows].numpy()

    encode_document = encode_query


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_triplets_equal_sentence_transformers(margin: float) -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    n = 500
    image, title, negative = quantised(n, 5, 1) + 0.5, quantised(n, 5, 2) + 0.5, quantised(n, 5, 3) + 0.5
    title[:40] = negative[:40]  # ties
    rows = [list(range(i * n, (i + 1) * n)) for i in range(3)]
    evaluator = evaluation.TripletEvaluator(*rows, margin=margin)
    want = evaluator(Lookup(torch.cat([image, title, negative])))["cosine_accuracy"]
    correct = triplet_correct(image, title, negative, margin, chunk=77)
    assert correct.dtype == torch.bool and not correct[:40].any()
    assert correct.double().mean().item() == pytest.approx(want, abs=1e-7)
    assert not len(triplet_correct(image[:0], title[:0], negative[:0]))


def test_summary_has_the_names_of_the_run_folder_and_a_seed_decides() -> None:
    ranks = torch.randint(0, 40, (60,), generator=rng(0))
    found = Retrieval(ranks, ranks // 2, ranks < 30)
    summary: dict[str, Any] = found.summarise(seed=3)
    per_way = ("R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr")
    names = [f"{way}_{name}" for way in ("image_to_text", "text_to_image") for name in per_way] + ["triplet_accuracy"]
    assert list(summary) == [key for name in names for key in (name, f"{name}_ci95")]
    for name in names:
        low, high = summary[f"{name}_ci95"]
        assert low < summary[name] < high
    assert summary == found.summarise(seed=3) != found.summarise(seed=4)
    for triplet in (None, torch.empty(0, dtype=torch.bool)):
        assert "triplet_accuracy" not in Retrieval(ranks, ranks, triplet).summarise()


def test_compare_pairs_every_metric_that_is_a_mean_over_rows() -> None:
    before = Retrieval(torch.tensor([3, 0, 9, 1] * 5), torch.tensor([2, 0, 0, 1] * 5), torch.tensor([True, False] * 10))
    after = Retrieval(torch.tensor([0, 0, 4, 1] * 5), torch.tensor([2, 0, 0, 1] * 5), torch.tensor([True, True] * 10))
    found = compare(before, after)
    assert found["image_to_text_R@1"].difference == 0.25
    assert found["image_to_text_R@1"].p_value == pytest.approx(2 * 0.5**5)
    assert found["text_to_image_mrr"].p_value == 1 and found["text_to_image_mrr"].difference == 0
    assert found["triplet_accuracy"].difference == 0.5
    assert found["image_to_text_mrr"].difference == pytest.approx(
        mean_reciprocal_rank(after.image_to_text_rank_N) - mean_reciprocal_rank(before.image_to_text_rank_N))


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
    assert coverage_of(lambda x: mean_interval(x, 1, 100, 0), draw, population.double().mean().item()) > 0.85
    assert coverage_of(lambda x: mean_interval(1 / x.double(), 0.01, 1, 0), draw,
                       (1 / population.double()).mean().item()) > 0.91
    assert coverage_of(lambda x: median_interval(x, 0), draw, median) > 0.92


def test_the_median_bootstrap_is_the_one_that_draws_rows() -> None:
    for n in (10, 11, 12, 40):
        ranks = torch.arange(n).double() * 10
        drawn = ranks[torch.randint(n, (50_000, n), generator=rng(1))].sort(dim=1)[0]
        medians = (drawn[:, (n - 1) // 2] + drawn[:, n // 2]) / 2
        want = torch.quantile(medians, torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert median_interval(ranks[torch.randperm(n, generator=rng(2))], 0) == want.tolist()


def test_merged_values_keep_the_mean_and_the_variance() -> None:
    skewed = torch.randn(50_000, generator=rng(0)).mul(2).exp().round().double()
    for values in (skewed, torch.rand(9_000, generator=rng(1)).double() - 0.3):
        value_K, count_K = _histogram(values.numpy())
        assert len(value_K) <= 1024 and count_K.sum() == len(values)
        mean = (value_K * count_K).sum() / len(values)
        assert mean == pytest.approx(values.mean().item(), rel=1e-9)
        variance = (value_K**2 * count_K).sum() / len(values) - mean**2
        assert variance == pytest.approx(values.var(correction=0).item(), rel=2e-4)


def test_twelve_rows_alike_are_not_certainty() -> None:
    low, high = mean_interval(torch.ones(12), 0, 1, 0)
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

    assert coverage_of(lambda x: mean_interval(x, -1, 1, 0), draw, 0.1) > 0.91


def test_the_table_shows_both_and_the_paired_test_between_them() -> None:
    before, after = (Retrieval(torch.arange(60) // step, torch.arange(60), torch.arange(60) > 29) for step in (1, 3))
    difference = {name: test.as_json() for name, test in compare(before, after).items()}
    text = table({"base": {"test": before.summarise()}, "tuned": {"test": after.summarise()},
                  "difference": {"test": difference}})
    line = next(line for line in text.splitlines() if "image to text R@1 " in line)
    gain = difference["image_to_text_R@1"]
    assert re.search(r"\| 0\.017 \[0\.\d+, 0\.\d+\] +\| 0\.050 \[", line)
    assert f"| +0.033 [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}] | {gain['p']:.3f}".replace("| 0.", "| .") in line
    assert re.search(r"median rank +\| 30\.5 \[.*\| 10\.5 \[.*\| - +\| - ", text)
    assert re.search(r"\| <\.001 +\|", text)
