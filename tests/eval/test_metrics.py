"""Metrics against the naive full matrix and the peers' evaluators."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from eval.distinct import Distinct
from eval.metrics import (
    Ranks,
    Retrieval,
    Triplets,
    _Scores,
    compare,
    mean_rank,
    mean_reciprocal_rank,
    median_rank,
    paired_test,
    recall_at,
    retrieval_ranks,
    triplet_correct,
)
from eval.report.table import metrics_table


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_ranks(image_NE: Tensor, title_NE: Tensor, image_id_N: Tensor, title_id_N: Tensor) -> tuple[Tensor, Tensor]:
    """The whole matrix at once; the definition, literally."""
    images, titles = ({name: row for row, name in reversed(list(enumerate(ids.tolist())))}
                      for ids in (image_id_N, title_id_N))
    images, titles = (dict(sorted(first.items(), key=lambda item: item[1])) for first in (images, titles))
    scores_UW = image_NE[list(images.values())] @ title_NE[list(titles.values())].T
    right_UW = torch.zeros(len(images), len(titles), dtype=torch.bool)
    places = [{name: place for place, name in enumerate(first)} for first in (images, titles)]
    for image, title in zip(image_id_N.tolist(), title_id_N.tolist(), strict=True):
        right_UW[places[0][image], places[1][title]] = True

    def one_way(scores_QC: Tensor, right_QC: Tensor) -> Tensor:
        best_Q1 = scores_QC.masked_fill(~right_QC, -math.inf).amax(1, keepdim=True)
        return ((scores_QC >= best_Q1) & ~right_QC).sum(1)

    return one_way(scores_UW, right_UW), one_way(scores_UW.T, right_UW.T)


def ranks_of(image_NE: Tensor, title_NE: Tensor, image_id_N: Tensor | None, title_id_N: Tensor,
             chunk: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """`retrieval_ranks` of embeddings by row."""
    distinct = Distinct.from_ids(image_id_N, title_id_N)
    return retrieval_ranks(image_NE[distinct.image_row_U], title_NE[distinct.title_row_W], distinct, chunk)


def ids_of(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Image and title ids of `n` rows in random order, as data of this kind have them."""
    row = torch.randperm(n, generator=rng(n))
    drawn_image, drawn_title = (torch.randint(max(1, n // 2), (n,), generator=rng(seed)) for seed in (3, 4))
    return {
        "one to one": (row, row),
        "five captions an image": (row // 5, row),
        "ten class titles": (row, row % 10),
        "chains": ((row + 1) // 2, row // 2),
        "random duplicates": (drawn_image, drawn_title),
        "one title": (row, row * 0), "one image": (row * 0, row),
    }[kind]


KINDS = ("one to one", "five captions an image", "ten class titles", "chains", "random duplicates", "one title",
         "one image")


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
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_the_full_matrix_of_distinct_items(n: int, chunk: tuple[int, int] | None,
                                                              kind: str) -> None:
    """Otherwise a figure is not what a specialist computes by hand, ties and duplicates included."""
    image_id, title_id = ids_of(kind, n)
    image, title = quantised(n, 12, 1)[image_id], quantised(n, 12, 2)[title_id]
    found = ranks_of(image, title, image_id, title_id, chunk)
    for got, want in zip(found, naive_ranks(image, title, image_id, title_id), strict=True):
        assert got.dtype == torch.int64 and torch.equal(got, want)


def test_right_answers_never_count_even_where_rounding_puts_them_above_the_threshold(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS may round a small product unlike a large one: thresholds one bit lower change no rank."""
    exact = _Scores.best_right
    below = torch.tensor(-math.inf)
    monkeypatch.setattr(_Scores, "best_right", lambda scores: tuple(x.nextafter(below) for x in exact(scores)))
    for kind in KINDS:
        image_id, title_id = ids_of(kind, 450)
        image, title = (torch.randn(450, 64, generator=rng(seed))[ids] for seed, ids in ((0, image_id), (1, title_id)))
        found = ranks_of(image, title, image_id, title_id, (128, 192))
        for got, want in zip(found, naive_ranks(image, title, image_id, title_id), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("block", [[128, 64], [320, 320], [1024, 512]])
def test_the_best_right_answers_are_the_same_in_blocks_of_any_size(block: list[int]) -> None:
    """An accelerator's blocks are whole tiles: mostly padding where there are few rows."""
    for kind in KINDS:
        distinct = Distinct.from_ids(*ids_of(kind, 450))
        image = quantised(len(distinct.image_row_U), 12, 1)
        title = quantised(len(distinct.title_row_W), 12, 2)
        want = _Scores(image, title, distinct, [64, 64]).best_right()
        assert all(map(torch.equal, _Scores(image, title, distinct, block).best_right(), want))


def test_a_very_long_chain_is_one_unit_and_found_in_few_rounds() -> None:
    row = torch.randperm(200_000, generator=rng(0))
    assert not Distinct.from_ids((row + 1) // 2, row // 2).unit_N.any()


@pytest.mark.parametrize("n", [2, 3, 50, 129, 333])
@pytest.mark.parametrize("e", [3, 17, 512])
@pytest.mark.parametrize("chunk", [(128, 128), (128, 384), None])
def test_a_model_whose_embeddings_are_all_equal_is_last_everywhere(n: int, e: int,
                                                                   chunk: tuple[int, int] | None) -> None:
    """Every score is the same number, so a last bit that differs would show as a hit."""
    collapsed = F.normalize(torch.randn(1, e, generator=rng(n)), dim=1).expand(n, e)
    for image_id, title_id in (ids_of(kind, n) for kind in ("one to one", "ten class titles", "chains")):
        found = ranks_of(collapsed, collapsed, image_id, title_id, chunk)
        for got, want in zip(found, naive_ranks(torch.ones(n, 1), torch.ones(n, 1), image_id, title_id), strict=True):
            assert torch.equal(got, want)


def test_candidates_with_the_very_same_embedding_tie() -> None:
    """Wherever the two stand in the tiles, the other one counts against the query, at any n."""
    for n in (38, 515, 1301):
        image = F.normalize(torch.randn(n, 512, generator=rng(n)), dim=1)
        title = F.normalize(image + 0.02 * torch.randn(n, 512, generator=rng(n + 1)), dim=1)
        twin = torch.arange(n) % (n // 2)
        image, title = image[twin], title[twin]
        for rank in ranks_of(image, title, None, torch.randperm(n, generator=rng(2))):
            assert torch.equal(rank, twin.bincount()[twin] - 1)


def test_ranks_by_eye() -> None:
    title = torch.eye(3)
    image = torch.tensor([[0.9, 0.1, 0.0],    # own title first
                          [0.5, 0.3, 0.2],    # title 0 is better
                          [0.4, 0.3, 0.1]])   # titles 0 and 1 are better
    i2t, t2i = ranks_of(image, title, None, torch.arange(3))
    assert i2t.tolist() == [0, 1, 2]
    assert t2i.tolist() == [0, 1, 1]  # title 1: images 1 and 2 tie at .3, against it; title 2: image 1 is better
    i2t, t2i = ranks_of(image, title, None, torch.tensor([0, 1, 0]))
    assert i2t.tolist() == [0, 1, 0]  # image 2 has title 0 as well, which wins
    assert t2i.tolist() == [0, 1]  # there are two titles
    assert recall_at(torch.tensor([0, 1, 2]), 1) == pytest.approx(1 / 3) and recall_at(torch.tensor([0, 1]), 99) == 1
    assert median_rank(torch.tensor([0, 1, 2, 9])) == 2.5 and median_rank(torch.tensor([4, 0, 2])) == 3
    assert mean_rank(torch.tensor([0, 1, 2])) == 2
    assert mean_reciprocal_rank(torch.tensor([0, 1, 3])) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_recall_equals_sentence_transformers(kind: str) -> None:
    """The peer's protocol: distinct queries, a distinct corpus, several right answers."""
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    image_id, title_id = ids_of(kind, 200)
    image, title = (F.normalize(torch.randn(400, 16, generator=rng(seed)), dim=1)[ids]
                    for seed, ids in ((0, image_id), (1, title_id)))
    ranks = ranks_of(image, title, image_id, title_id)
    images, titles = ({f"{side}{name}": row for row, name in enumerate(ids.tolist())}
                      for side, ids in (("i", image_id), ("t", title_id)))
    right: dict[str, set[str]] = {}
    for a, b in zip(image_id.tolist(), title_id.tolist(), strict=True):
        right.setdefault(f"i{a}", set()).add(f"t{b}")
        right.setdefault(f"t{b}", set()).add(f"i{a}")
    shifted = {name: row + 200 for name, row in titles.items()}
    model = Lookup(torch.cat([image, title]))
    for rank, queries, corpus in ((ranks[0], images, shifted), (ranks[1], shifted, images)):
        want = evaluation.InformationRetrievalEvaluator(
            queries, corpus, right, accuracy_at_k=[1, 5, 10], mrr_at_k=[1000], write_csv=False,
            score_functions={"cosine": lambda a, b: a @ b.T})(model)
        for k in (1, 5, 10):
            assert recall_at(rank, k) == pytest.approx(want[f"cosine_accuracy@{k}"], abs=1e-9)
        assert mean_reciprocal_rank(rank) == pytest.approx(want["cosine_mrr@1000"], abs=1e-9)


def test_half_precision_is_scored_in_float32_under_autocast_too() -> None:
    image, title = (whole_numbers(300, 64, 500, s).half() for s in (0, 1))  # 500 has more bits than bf16
    ids = torch.arange(300)
    want = naive_ranks(image.double(), title.double(), ids, ids)
    rough = naive_ranks(image.bfloat16().double(), title.bfloat16().double(), ids, ids)
    assert not all(map(torch.equal, want, rough))
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = ranks_of(image, title, ids, ids)
    for got, exact in zip(found, want, strict=True):
        assert torch.equal(got, exact)


def test_nothing_to_measure_or_not_a_number_is_the_users_to_know() -> None:
    none, ids = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    for call in (lambda: ranks_of(none, none, ids, ids), lambda: recall_at(ids, 1), lambda: paired_test(ids, ids)):
        with pytest.raises(UserError, match="rows"):
            call()
    with pytest.raises(UserError, match="same rows"):
        paired_test(torch.ones(3), torch.ones(4))
    for bad in (math.nan, math.inf):
        poisoned = torch.randn(200, 8, generator=rng(0))
        poisoned[150, 3] = bad
        for pair in ((poisoned, torch.ones(200, 8)), (torch.ones(200, 8), poisoned)):
            with pytest.raises(UserError, match="NaN"):
                ranks_of(*pair, None, torch.arange(200))


class Lookup:
    """What TripletEvaluator needs of a model: row numbers in, embeddings out."""

    similarity_fn_name = "cosine"

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *_: None})()

    def encode_query(self, rows: list[int], convert_to_tensor: bool = False, **_: object) -> object:
        return self.table[rows] if convert_to_tensor else self.table[rows].numpy()

    encode_document = encode_query


def test_triplets_equal_sentence_transformers() -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    n = 500
    image, title, negative = quantised(n, 5, 1) + 0.5, quantised(n, 5, 2) + 0.5, quantised(n, 5, 3) + 0.5
    title[:40] = negative[:40]  # ties
    rows = [list(range(i * n, (i + 1) * n)) for i in range(3)]
    evaluator = evaluation.TripletEvaluator(*rows)
    want = evaluator(Lookup(torch.cat([image, title, negative])))["cosine_accuracy"]
    correct = triplet_correct(image, title, negative, chunk=77)
    assert correct.dtype == torch.bool and not correct[:40].any()
    assert correct.double().mean().item() == pytest.approx(want, abs=1e-7)
    assert not len(triplet_correct(image[:0], title[:0], negative[:0]))


def retrieval(rank_Q: Tensor, backward_Q: Tensor, correct_M: Tensor | None = None) -> Retrieval:
    """Of pairs that share nothing: every query and every triplet is a row and a unit of its own."""
    row_Q = torch.arange(len(rank_Q))
    triplets = None if correct_M is None else Triplets(correct_M, row_Q[:len(correct_M)], row_Q[:len(correct_M)])
    return Retrieval(Ranks(rank_Q, row_Q, row_Q, len(row_Q)), Ranks(backward_Q, row_Q, row_Q, len(row_Q)), triplets,
                     len(row_Q), len(row_Q))


def test_summary_has_the_names_of_the_run_folder() -> None:
    ranks = torch.randint(0, 40, (60,), generator=rng(0))
    summary: dict[str, Any] = retrieval(ranks, ranks // 2, ranks < 30).summarise()
    per_way = ("R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr")
    names = [f"{way}_{name}" for way in ("image_to_text", "text_to_image") for name in per_way] + ["triplet_accuracy"]
    sizes = ["pairs", "units", *(f"{way}_{kind}" for way in ("image_to_text", "text_to_image")
                                 for kind in ("queries", "candidates"))]
    assert list(summary) == [*sizes, *(key for name in names for key in (name, f"{name}_ci95")), "collapsed"]
    for name in names:
        low, high = summary[f"{name}_ci95"]
        assert low < summary[name] < high and type(summary[name]) is float
    assert [summary[name] for name in sizes] == [60] * 6 and summary["collapsed"] is False
    assert "triplet_accuracy" not in retrieval(ranks, ranks).summarise()


def test_compare_pairs_every_metric_that_is_a_mean_over_queries() -> None:
    before = retrieval(torch.tensor([3, 0, 9, 1] * 5), torch.tensor([2, 0, 0, 1] * 5), torch.tensor([True, False] * 10))
    after = retrieval(torch.tensor([0, 0, 4, 1] * 5), torch.tensor([2, 0, 0, 1] * 5), torch.tensor([True, True] * 10))
    found = compare(before, after)
    assert found["image_to_text_R@1"].difference == 0.25
    assert found["image_to_text_R@1"].p_value == pytest.approx(2 * 0.5**5)
    assert found["text_to_image_mrr"].p_value == 1 and found["text_to_image_mrr"].difference == 0
    assert found["triplet_accuracy"].difference == 0.5
    assert found["image_to_text_mrr"].difference == pytest.approx(
        mean_reciprocal_rank(after.image_to_text.rank_Q) - mean_reciprocal_rank(before.image_to_text.rank_Q))


def test_the_table_shows_both_and_the_paired_test_between_them() -> None:
    before, after = (retrieval(torch.arange(60) // step, torch.arange(60), torch.arange(60) > 29) for step in (1, 3))
    difference: dict[str, Any] = {name: test.as_json() for name, test in compare(before, after).items()}
    text = metrics_table({"base": {"test": before.summarise()}, "tuned": {"test": after.summarise()},
                  "difference": {"test": difference}})
    line = next(line for line in text.splitlines() if "image to text R@1 " in line)
    gain = difference["image_to_text_R@1"]
    assert re.search(r"\| 0\.017 \[0\.\d+, 0\.\d+\] +\| 0\.050 \[", line)
    assert f"| +0.033 [{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}] | {gain['p']:.3f}".replace("| 0.", "| .") in line
    assert re.search(r"median rank +\| 30\.5 \[.*\| 10\.5 \[.*\| - +\| - ", text)
    assert re.search(r"\| <\.001 +\|", text)
    assert text.count("| 60, 60 independent ") == text.count("| 60 images, 60 titles ") == 2 and "collapsed" not in text
    collapsed = {**after.summarise(), "collapsed": True}
    text = metrics_table({"base": {"test": before.summarise()}, "tuned": {"test": collapsed}})
    assert re.search(r"collapsed +\| no +\| yes", text)
