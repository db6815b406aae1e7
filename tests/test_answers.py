"""The answers people look at equal a naive search, count ranks as the metrics do, and survive their file."""

from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F

from eval.metrics import retrieval_ranks
from eval.report.answers import (
    LISTED,
    Space,
    answer,
    first_rows,
    hardest,
    improved,
    load_answers,
    save_answers,
    worsened,
)


def space(n: int = 83, seed: int = 0) -> Space:
    """Random embeddings; titles and images repeat."""
    make = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, n - 20, (n,), generator=make) for _ in range(2)]
    vectors = [F.normalize(torch.randn(n, 8, generator=make), dim=1)[id_N] for id_N in ids]
    return Space(vectors[0], vectors[1], ids[1], ids[0])


def test_answers_equal_a_naive_search_and_the_metrics() -> None:
    here = space()
    found = answer(here)
    ranks = retrieval_ranks(here.image_NE, here.title_NE, here.title_id_N, here.image_id_N)
    sides = {"image_to_text": (here.image_NE, here.title_NE, here.title_id_N),
             "text_to_image": (here.title_NE, here.image_NE, here.image_id_N)}
    for (way, (queries, gallery, names)), rank_N in zip(sides.items(), ranks, strict=True):
        got = found[way]
        assert got.query_Q.tolist() == list(range(83))
        torch.testing.assert_close(got.rank_Q, rank_N)
        for q in range(83):
            best: dict[int, float] = {}
            for score, name in zip((gallery @ queries[q]).tolist(), names.tolist(), strict=True):
                best[name] = max(score, best.get(name, -2))
            wanted = sorted(best.values(), reverse=True)[:LISTED]
            torch.testing.assert_close(got.score_QK[q], torch.tensor(wanted))
            assert len(set(names[got.best_QK[q]].tolist())) == LISTED  # no title twice
            assert got.right_QK[q].tolist() == [
                bool(here.title_id_N[q] == here.title_id_N[row] or here.image_id_N[q] == here.image_id_N[row])
                for row in got.best_QK[q]]
            assert (got.margin_Q[q] >= 0) == (got.rank_Q[q] == 0)


def test_a_long_split_is_sampled_and_a_tiny_one_works() -> None:
    assert len(answer(space(500), count=40)["image_to_text"].query_Q) == 40
    one = answer(Space(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1).long(), torch.zeros(1).long()))
    assert one["text_to_image"].rank_Q.tolist() == [0] and one["text_to_image"].best_QK.tolist() == [[0]]
    assert first_rows(torch.tensor([5, 3, 5, 3, 9])).tolist() == [0, 1, 4]


def test_wins_and_losses_are_told_apart_and_the_file_keeps_them(tmp_path: Path) -> None:
    answers = {"base": answer(space()), "tuned": answer(space(seed=1))}
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
