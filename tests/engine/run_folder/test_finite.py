"""Gradients that are not finite: all ranks skip the same steps, and stop after three in a row with the rows named."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import on_ranks
from torch import Tensor, nn

from data.batch import Features, RunFailed, share
from engine.clip.model import Embeddings, distribute, l2_normalize
from engine.config.fields import Config
from engine.optim import Plan, adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.log import NullLog
from engine.run_folder.nonfinite import NonfiniteGuard
from engine.train import Callbacks, Replica, fit

ROWS, BATCH = 24, 6


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 4, bias=False), nn.Linear(3, 4, bias=False)

    def forward(self, features: Features) -> Embeddings:
        assert features.negative_BHT is not None
        texts = torch.cat([features.title_BT, *features.negative_BHT.unbind(1)])
        image, text = self.image(features.image_BV), self.text(texts)
        return Embeddings(l2_normalize(image), l2_normalize(text), torch.tensor(20.0))


class Norms(NullLog):
    """A log that keeps the gradient norms, as the real one does until it flushes; a late one as on a GPU."""

    def __init__(self, late: bool = False) -> None:
        self.late = late
        self.norms: dict[int, float] = {}
        self.copying: dict[int, float] = {}

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        self.norms[step] = grad_norm.item()

    def flush(self, wait: bool = False) -> dict[int, float]:
        fresh, self.norms = self.norms, {}
        if self.late and not wait:
            fresh, self.copying = self.copying, fresh
        elif self.late:
            fresh, self.copying = {**self.copying, **fresh}, {}
        return fresh


def train(run: Path, bad: dict[int, float], log_every: int = 2, late: bool = False) -> tuple[str, list[Tensor], int]:
    """One epoch without shuffling, row i holding `bad[i]` as a feature: what it ended with, weights a step, steps.

    It is a feature of the image, the title or the second negative, as i leaves 0, 1 or 2 divided by 3.
    """
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    world = World(rank, rank, size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    image, title = torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, 3, generator=generator)
    negatives, negative_ids = torch.randn(ROWS, 2, 3, generator=generator), torch.arange(2 * ROWS).view(ROWS, 2) + ROWS
    for row, value in bad.items():
        (image, title, negatives[:, 1])[row % 3][row, 0] = value

    class InOrder:
        def from_step(self, step: int) -> Iterator[Features]:
            for at in range(step, ROWS // BATCH):
                low, high = (at * BATCH + cut for cut in share(BATCH, rank, size))
                ids = torch.arange(low, high)
                yield Features(image[low:high], title[low:high], negatives[low:high], ids, ids, negative_ids[low:high])

    batches = InOrder()
    model, weights, state = Linears(), [], State()
    cfg = Config(batch_size=BATCH, epochs=1, log_every=log_every, eval_every=100, save_every=100 if late else 1)
    guard = NonfiniteGuard(run, model, batches,
                           lambda step: list(range(100 + step * BATCH, 100 + (step + 1) * BATCH)), world)
    try:
        replica = Replica(distribute(model, size), adamw(model.parameters(), 1e-2, 0.0), world, torch.float32)
        callbacks = Callbacks(Norms(late), check_gradients=guard.check,
                              save_checkpoint=lambda _: weights.append(model.image.weight.detach().clone()))
        fit(replica, batches, Plan(ROWS, BATCH, 1), state, cfg, callbacks)
    except RunFailed as failure:
        return str(failure), weights, state.step
    return "", weights, state.step


def check(found: list[tuple[str, list[Tensor], int]], run: Path) -> None:
    for failure, weights, step in found:
        assert failure == found[0][0] and step == 3 and len(weights) == 2
        assert "rows 101, 111, 115 of the training split" in failure and "no checkpoint" in failure
        assert all(one.isfinite().all() and one.equal(found[0][1][0]) for one in weights)  # skipped by all
    blamed = json.loads((run / "nan-step-00000003.json").read_text())["skipped_steps"]
    assert blamed == {"1": [{"row": 101, "not_finite": ["title"]}], "2": [{"row": 111, "not_finite": ["title_neg"]}],
                      "3": [{"row": 115, "not_finite": ["image"]}]}


BAD = {1: math.nan, 11: math.inf, 15: -math.inf}  # on two ranks: of the first, of the second, of the second


def test_three_in_a_row_end_the_run_and_name_the_rows(tmp_path: Path) -> None:
    check([train(tmp_path, BAD)], tmp_path)


def test_norms_that_arrive_late_end_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    """On a GPU the log is one flush behind: the third bad step is heard of at the fourth, whose checkpoint waits."""
    failure, weights, step = train(tmp_path, BAD, log_every=1, late=True)
    assert "rows 101, 111, 115" in failure and step == 4 and not weights


def test_a_stream_names_the_samples_of_the_steps(tmp_path: Path) -> None:
    """Its batches cannot be read again; else the run would end with an error about that, or without a name."""
    guard = NonfiniteGuard(tmp_path, Linears(), None, lambda step: [f"train-{step}.tar, a"],
                           World(0, 0, 1, torch.device("cpu")))
    with pytest.raises(RunFailed, match=r"rows train-0.tar, a, train-1.tar, a, train-2.tar, a of the training split"):
        guard.check(dict.fromkeys((1, 2, 3), math.nan))


def test_ranks_skip_and_stop_together(tmp_path: Path) -> None:
    check(on_ranks(2, train, tmp_path, BAD), tmp_path)


@pytest.mark.parametrize("log_every", [1, 4])
def test_two_in_a_row_are_forgiven(log_every: int, tmp_path: Path) -> None:
    failure, weights, step = train(tmp_path, {1: math.nan, 11: math.nan, 20: math.nan}, log_every)
    assert not failure and step == 4 and not list(tmp_path.iterdir())
    assert weights[0].equal(weights[1]) and weights[2].isfinite().all() and not weights[2].equal(weights[1])
    assert weights[3].equal(weights[2])
