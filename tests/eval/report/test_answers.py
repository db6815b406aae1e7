"""The answers people look at equal a naive search, stand at the place that the metrics say, and survive their file."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from eval.distinct import Distinct, first_rows
from eval.metrics import Ranks, Retrieval, retrieval_ranks
from eval.report.answers import (
    TOP_K,
    AnswersByDirection,
    answer_queries,
    hardest,
    improved,
    load_answers,
    save_answers,
    worsened,
)
from eval.retrieval import SplitEmbeddings

EPS = torch.finfo(torch.float32).eps


def space_of(image_NE: Tensor, title_NE: Tensor, image_id_N: Tensor, title_id_N: Tensor) -> SplitEmbeddings:
    """From embeddings by row."""
    distinct = Distinct.from_ids(image_id_N, title_id_N)
    return SplitEmbeddings(image_NE[distinct.image_row_U], title_NE[distinct.title_row_W], distinct, EPS)


def space(n: int = 83, seed: int = 0) -> SplitEmbeddings:
    """Random embeddings; titles and images repeat."""
    make = torch.Generator().manual_seed(seed)
    image_id, title_id = (torch.randint(0, max(1, n - 20), (n,), generator=torch.Generator().manual_seed(side))
                          for side in (1, 2))
    image, title = (F.normalize(torch.randn(n, 8, generator=make), dim=1)[ids] for ids in (image_id, title_id))
    return space_of(image, title, image_id, title_id)


def found_in(here: SplitEmbeddings) -> Retrieval:
    """What is measured there."""
    distinct = here.distinct
    rank_U, rank_W = retrieval_ranks(here.image_UE, here.title_WE, distinct)
    return Retrieval(Ranks(rank_U, distinct.image_row_U, distinct.image_unit_U, len(rank_W)),
                     Ranks(rank_W, distinct.title_row_W, distinct.title_unit_W, len(rank_U)), None,
                     len(distinct.unit_N), len(distinct.unit_N.unique()))


def answers_in(here: SplitEmbeddings, count: int = 1_000) -> AnswersByDirection:
    return answer_queries(here, found_in(here), count)


@pytest.mark.parametrize("tied", [False, True])
def test_answers_equal_a_naive_search_and_the_metrics(tied: bool) -> None:
    """The place a right answer is shown at is its rank, also among equal scores."""
    here = space()
    if tied:
        here = replace(here, image_UE=here.image_UE.sign(), title_WE=here.title_WE.sign())
    found, measured, distinct = answers_in(here), found_in(here), here.distinct
    right_UW = torch.zeros(len(here.image_UE), len(here.title_WE), dtype=torch.bool)
    right_UW[distinct.image_P, distinct.title_P] = True
    scores_UW = here.image_UE @ here.title_WE.T
    for way, ranks, scores_QC, right_QC, rows in (
            ("image_to_text", measured.image_to_text, scores_UW, right_UW, distinct.title_row_W),
            ("text_to_image", measured.text_to_image, scores_UW.T, right_UW.T, distinct.image_row_U)):
        got = found[way]
        assert torch.equal(got.query_Q, ranks.row_Q) and torch.equal(got.rank_Q, ranks.rank_Q)
        for q in range(len(got.query_Q)):
            torch.testing.assert_close(got.score_QK[q], scores_QC[q].sort(descending=True)[0][:TOP_K])
            candidates = [rows.tolist().index(row) for row in got.best_QK[q].tolist()]
            assert len(set(candidates)) == TOP_K  # nothing twice
            assert got.right_QK[q].tolist() == right_QC[q, candidates].tolist()
            shown = got.right_QK[q].long()
            assert (int(shown.argmax()) == got.rank_Q[q]) if shown.any() else got.rank_Q[q] >= TOP_K
            assert (got.margin_Q[q] > 0) == (got.rank_Q[q] == 0)


def test_a_long_split_is_sampled_and_a_tiny_one_works() -> None:
    assert len(answers_in(space(500), count=40)["image_to_text"].query_Q) == 40
    one = answers_in(space_of(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1).long(), torch.zeros(1).long()))
    assert one["text_to_image"].rank_Q.tolist() == [0] and one["text_to_image"].best_QK.tolist() == [[0]]
    rows, codes = first_rows(torch.tensor([5, 3, 5, 3, 9]))
    assert rows.tolist() == [0, 1, 4] and codes.tolist() == [0, 1, 0, 1, 2]


def test_wins_and_losses_are_told_apart_and_the_file_keeps_them(tmp_path: Path) -> None:
    answers = {"base": answers_in(space()), "tuned": answers_in(space(seed=1))}
    base, tuned = (answers[when]["image_to_text"] for when in answers)
    assert all(tuned.rank_Q[q] < base.rank_Q[q] for q in improved(base, tuned, 9))
    assert all(tuned.rank_Q[q] > base.rank_Q[q] for q in worsened(base, tuned, 9))
    assert tuned.rank_Q[hardest(tuned, 1)[0]] == tuned.rank_Q.max()
    assert not improved(base, base, 9) and not worsened(base, base, 9)
    save_answers(tmp_path / "answers.npz", "test", answers)
    split, read = load_answers(tmp_path / "answers.npz")
    assert split == "test" and load_answers(tmp_path / "none.npz") == ("", {})
    for when, both in answers.items():
        for way, one in both.items():
            assert all(torch.equal(getattr(one, field.name), getattr(read[when][way], field.name))
                       for field in fields(one))


def test_a_damaged_file_of_answers_is_named(tmp_path: Path) -> None:
    """After a full disk `--resume` ends in one line that says which file to move."""
    path = tmp_path / "answers.npz"
    path.write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"answers\.npz is damaged"):
        load_answers(path)
