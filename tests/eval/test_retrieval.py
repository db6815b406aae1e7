"""A split measured: distinct queries, triplets by row, units, and a collapse called by its name."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Features
from eval.metrics import NotFinite
from eval.retrieval import embed_split, equal_rows, measure_if_finite, measure_split

N = 60


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def flat(x: Tensor) -> Tensor:
    """All alike but for the rounding of a projection."""
    noise = torch.randn(len(x), x.shape[1], generator=torch.Generator().manual_seed(len(x)))
    return unit(torch.ones_like(x) + 1e-6 * noise)


def parts(captions: int = 3, dtype: torch.dtype = torch.float32) -> Iterator[Features]:
    """Images with several captions each, in lots of 25 rows; every second row has a negative, every fourth two."""
    generator = torch.Generator().manual_seed(0)
    image, title = torch.randn(N, 8, generator=generator), torch.randn(N, 8, generator=generator)
    image_id, title_id = torch.arange(N) // captions, torch.arange(N)
    negative_id = torch.stack([torch.where(title_id % 2 == 0, (title_id + 7) % N, -1),
                               torch.where(title_id % 4 == 0, (title_id + 9) % N, -1)], 1)
    negative = title[negative_id.clamp(min=0)]
    for rows in torch.arange(N).split(25):
        yield Features(image[image_id[rows]].to(dtype), title[rows].to(dtype), negative[rows].to(dtype),
                       image_id[rows], title_id[rows], negative_id[rows])


def test_a_split_is_measured_by_distinct_queries_and_says_how_many() -> None:
    found = measure_split(unit, unit, parts())
    assert found.sizes() == {"pairs": N, "units": N // 3, "image_to_text_queries": N // 3,
                             "image_to_text_candidates": N, "text_to_image_queries": N,
                             "text_to_image_candidates": N // 3}
    assert embed_split(unit, unit, parts())[0].image_UE.shape == (N // 3, 8) and not found.collapsed


def test_triplets_are_all_pairs_of_a_row_and_a_negative() -> None:
    """A row with several negatives counted by its first one would hide the ones that the model falls for."""
    whole = Features(*(torch.cat(lots) for lots in zip(*parts(), strict=True)))
    assert whole.negative_BHT is not None and whole.negative_id_BH is not None
    rows, correct = [], []
    for row in range(N):
        image, title = unit(whole.image_BV[row, None])[0], unit(whole.title_BT[row, None])[0]
        for negative, number in zip(whole.negative_BHT[row], whole.negative_id_BH[row].tolist(), strict=True):
            if number >= 0:
                rows.append(row)
                correct.append(float(image @ title) > float(image @ unit(negative[None])[0]))
    measured = measure_split(unit, unit, parts())
    triplets = measured.triplets
    assert triplets is not None and triplets.row_M.tolist() == rows and triplets.correct_M.tolist() == correct
    assert len(rows) == N // 2 + N // 4 and triplets.unit_M.tolist() == [row // 3 * 3 for row in rows]
    assert measured.values()["triplet_accuracy"] == pytest.approx(sum(correct) / len(correct))


def test_a_negative_that_is_the_rows_own_title_is_never_beaten() -> None:
    """A projection rounds by the number of its rows, which made a quarter of such ties correct."""
    def rounded(x: Tensor) -> Tensor:
        noise = torch.randn(len(x), x.shape[1], generator=torch.Generator().manual_seed(len(x)))
        return unit(x + 1e-6 * noise)

    same = (part._replace(negative_BHT=part.title_BT[:, None], negative_id_BH=torch.where(part.title_id_B % 2 == 0,
            part.title_id_B, -1)[:, None]) for part in parts())
    _, triplets = embed_split(rounded, rounded, same)
    assert triplets is not None and len(triplets.row_M) == N // 2 and not triplets.correct_M.any()


@pytest.mark.parametrize("captions", [1, 3])
def test_a_collapsed_model_is_named_and_scores_no_hit(captions: int) -> None:
    """Embeddings that are all alike used to score Recall@1 = 1.000."""
    for image, title, words in ((unit, flat, "all 60 title"), (flat, unit, f"all {N // captions} image")):
        found = measure_split(image, title, parts(captions))
        assert words in found.collapsed and found.values()["collapsed"]
    exact = measure_split(lambda x: unit(torch.ones_like(x)), lambda x: unit(torch.ones_like(x)), parts(captions))
    assert " and " in exact.collapsed
    assert exact.image_to_text.rank_Q.tolist() == [N - captions] * (N // captions)
    assert exact.text_to_image.rank_Q.tolist() == [N // captions - 1] * N


def test_what_counts_as_equal_follows_the_number_format() -> None:
    vectors = unit(torch.ones(50, 64) + 2e-3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    assert equal_rows(vectors, torch.finfo(torch.bfloat16).eps) and not equal_rows(vectors, 1e-7)
    assert not equal_rows(vectors[:1], 1.0)  # one alone says nothing
    assert not embed_split(unit, unit, parts(dtype=torch.bfloat16))[0].collapse()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    def broken(x: Tensor) -> Tensor:
        return unit(x).index_fill(0, torch.tensor([3]), bad)

    with pytest.raises(NotFinite, match="NaN or infinity"):
        measure_split(broken, unit, parts())
    assert measure_if_finite(lambda: measure_split(unit, broken, parts())) is None
