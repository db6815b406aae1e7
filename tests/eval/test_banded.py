"""Ranks from low-precision products are those of exact scores, ties included: nothing within rounding is guessed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import noting
from stand_in import GPU, plain, stand_in
from test_metrics import KINDS, ids_of, naive_ranks, quantised, rng, whole_numbers
from torch import Tensor

from eval import banded
from eval.banded import BandedRanks, Limits, Scan, scan_by_torch
from eval.distinct import Distinct
from eval.metrics import retrieval_ranks

CPU = torch.device("cpu")
HALVES = (torch.float16, torch.bfloat16)


def banded_ranks(image_NE: Tensor, title_NE: Tensor, ids: tuple[Tensor | None, Tensor], dtype: torch.dtype,
                 tile: int = 128) -> tuple[Tensor, Tensor]:
    """Ranks of embeddings by row, in tiles of this side."""
    distinct = Distinct.from_ids(*ids)
    ranks = BandedRanks(image_NE[distinct.image_row_U], title_NE[distinct.title_row_W], distinct, dtype)
    for row in range(0, len(ranks.rank_U), tile):
        for col in range(0, len(ranks.rank_W), tile):
            ranks.add_tile(row, col, [tile, tile])
    return ranks.rank_U, ranks.rank_W


def exact_ranks(image_NE: Tensor, title_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Of one-to-one pairs, from the whole matrix in fp64, rounded to fp32."""
    score_NN = (image_NE.double() @ title_NE.double().T).float()
    best_N = score_NN.diagonal().clone()
    score_NN.fill_diagonal_(-math.inf)
    return (score_NN >= best_N[:, None]).sum(1), (score_NN >= best_N).sum(0)


def unit(n: int, e: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, e, generator=rng(seed)), dim=1)


def assert_ranks(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for got, expected in zip(found, want, strict=True):
        assert got.dtype == torch.int64 and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_the_plain_paths_for_scores_that_fp32_holds_exactly(
        kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties all the time, and numbers that half precision rounds; then so small a room that every tile is in fp64."""
    image_id, title_id = ids_of(kind, 300)
    few, many = ([make(seed) for seed in (1, 2)] for make in (
        lambda seed: quantised(300, 12, seed), lambda seed: whole_numbers(300, 12, 1000, seed)))
    for image, title in (few, many):
        image, title = image[image_id], title[title_id]
        want = naive_ranks(image, title, image_id, title_id)
        distinct = Distinct.from_ids(image_id, title_id)
        plain_path = retrieval_ranks(image[distinct.image_row_U], title[distinct.title_row_W], distinct, (128, 128))
        assert_ranks(plain_path, want)
        assert_ranks(banded_ranks(image, title, (image_id, title_id), dtype), want)
        with monkeypatch.context() as patch:
            patch.setattr(banded, "MIN_CAPACITY", 0)
            assert_ranks(banded_ranks(image, title, (image_id, title_id), dtype), want)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("e", [3, 64, 700])
def test_ranks_are_those_of_exact_scores_however_close_they_are(e: int, dtype: torch.dtype) -> None:
    """Rivals of a right answer differ from it by single bits in one place, or lie at the edge of the band."""
    n, ids = 250, torch.arange(250)
    image, title = unit(n, e, 0), F.normalize(unit(n, e, 0) + 0.3 * unit(n, e, 1), dim=1)
    title[1::2] = title[::2]
    for step, row in enumerate(range(1, n, 2)):
        towards = torch.tensor(math.inf if step % 2 else -math.inf)
        title[row, step % e] = title[row, step % e].nextafter(towards)
    image[125:] = image[:125] * (1 + torch.linspace(-2, 2, 125)[:, None] * torch.finfo(dtype).eps)
    want = exact_ranks(image, title)
    assert all(len(rank.unique()) > 2 for rank in want)
    assert_ranks(banded_ranks(image, title, (None, ids), dtype), want)


def test_the_band_is_small_where_embeddings_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's is a few in a thousand of the scores: else the recount would cost more than the products save."""
    recounted: list[int] = []
    monkeypatch.setattr(BandedRanks, "_recount", noting(
        BandedRanks._recount, lambda ranks, code_M, *_: recounted.append(len(code_M))))
    image = unit(1000, 512, 0)
    banded_ranks(image, F.normalize(image + unit(1000, 512, 1), dim=1), (None, torch.arange(1000)), torch.float16, 1000)
    assert 1000 <= sum(recounted) < 1000**2 / 256


def test_equal_embeddings_tie_and_a_collapsed_model_is_last() -> None:
    image = unit(515, 70, 0)
    title, twin = F.normalize(image + 0.02 * unit(515, 70, 1), dim=1), torch.arange(515) % 257
    found = banded_ranks(image[twin], title[twin], (None, torch.randperm(515, generator=rng(2))), torch.float16)
    assert_ranks(found, (twin.bincount()[twin] - 1,) * 2)
    for n in (2, 300):
        same = unit(1, 70, n).expand(n, 70)
        assert_ranks(banded_ranks(same, same, (None, torch.arange(n)), torch.float16), (torch.full((n,), n - 1),) * 2)


def test_what_fp16_cannot_hold_is_computed_exactly() -> None:
    image, title = whole_numbers(200, 3, 2000, 0) * 2.0**10, whole_numbers(200, 3, 2000, 1)  # up to 2 million
    assert_ranks(banded_ranks(image, title, (None, torch.arange(200)), torch.float16), exact_ranks(image, title))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no stand-in")
def test_on_a_gpu_ranks_come_from_the_band_and_are_the_cpus() -> None:
    image, title = whole_numbers(300, 64, 500, 0), whole_numbers(300, 64, 500, 1)
    image_id, title_id = ids_of("random duplicates", 300)
    distinct = Distinct.from_ids(image_id, title_id)
    here = retrieval_ranks(image[distinct.image_row_U], title[distinct.title_row_W], distinct)
    with stand_in():
        there = Distinct.from_ids(image_id.to(GPU), title_id.to(GPU))
        embeddings = image.to(GPU)[there.image_row_U], title.to(GPU)[there.title_row_W]
        found = [torch.zeros_like(ranks) for ranks in here]
        for index in range(3):  # three ranks of a job
            with torch.autocast("cuda", torch.bfloat16):
                part = retrieval_ranks(*embeddings, there, (64, 128), (index, 3))
            for total, ranks in zip(found, part, strict=True):
                total += plain(ranks)
    assert_ranks((found[0], found[1]), here)


def test_the_kernel_finds_what_torch_finds() -> None:
    """On a GPU; elsewhere by Triton's interpreter, where Triton is installed."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        compare_scans(torch.device("cuda"))
        return
    folders = [str(path) for path in (Path(__file__).parent, *Path(__file__).parents[1:3])]  # this, tests, the project
    code = f"import sys; sys.path[:0] = {folders}; import test_banded, torch; test_banded.compare_scans()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, check=False,
                          capture_output=True, text=True, timeout=300)  # Triton reads the variable when it is imported
    assert done.returncode == 0, done.stderr


def limits(count: int, device: torch.device) -> Limits:
    """Some bands among the scores of `quantised` embeddings."""
    low_Q, high_Q = torch.randint(-9, 10, (2, count), generator=rng(count)).float().sort(0)[0].to(device)
    return Limits(low_Q, high_Q)


def compare_scans(device: torch.device = CPU) -> None:
    """Tiles of one block, of whole blocks and of parts; thresholds that leave some scores above, in and below."""
    from eval.band_kernel import scan_by_kernel

    for rows, cols, width in ((1, 1, 5), (128, 128, 64), (140, 270, 70)):
        image, title = (quantised(count, width, seed).half().to(device) for seed, count in enumerate((rows, cols)))
        limit_R, limit_C = (limits(count, device) for count in (rows, cols))
        want = scan_by_torch(image, title, limit_R, limit_C, 1 << 20)
        found = scan_by_kernel(image, title, limit_R, limit_C, 1 << 20)
        assert found.code_M is not None and want.code_M is not None
        assert found.code_M.sort()[0].equal(want.code_M)
        assert found.sure_R.equal(want.sure_R.int()) and found.sure_C.equal(want.sure_C.int())
        capacity = len(want.code_M) - 1
        assert capacity < 100 or scan_by_kernel(image, title, limit_R, limit_C, capacity).code_M is None
    assert capacity > 1000


def test_a_kernel_that_cannot_be_built_is_said_and_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Scan:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(sys.modules, "eval.band_kernel", type("Module", (), {"scan_by_kernel": fail}))
    monkeypatch.setattr(banded, "can_use_kernel", lambda device: True)
    image, title = unit(200, 16, 0), unit(200, 16, 1)
    with pytest.warns(UserWarning, match="without Triton's kernel .Failed to find C compiler"):
        found = banded_ranks(image, title, (None, torch.arange(200)), torch.float16)
    assert_ranks(found, exact_ranks(image, title))
