"""The loss against its definition and against sentence-transformers; its gradient on several ranks against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import on_ranks
from torch import nn

from data.batch import Features, share
from engine.dist import World
from engine.loss import ranking_loss
from engine.model import Embeddings, distribute
from engine.train import candidates

V, T, E = 7, 5, 4


def test_equals_the_definition() -> None:
    torch.manual_seed(0)
    image, titles = F.normalize(torch.randn(5, E), dim=-1), F.normalize(torch.randn(10, E), dim=-1)
    expected = 0.0
    for i in range(5):
        scores = [20.0 * float(image[i] @ titles[j]) for j in range(10)]
        expected += (math.log(sum(math.exp(s) for s in scores)) - scores[i]) / 5
    assert ranking_loss(image, titles, torch.tensor(20.0), 0, 5).item() == pytest.approx(expected, abs=1e-5)


def test_a_missing_negative_is_no_candidate() -> None:
    torch.manual_seed(0)
    image, titles = F.normalize(torch.randn(3, E), dim=-1), F.normalize(torch.randn(6, E), dim=-1)
    absent = torch.tensor([False] * 4 + [True, False])
    without = ranking_loss(image, titles[~absent], torch.tensor(20.0), 0, 3)
    torch.testing.assert_close(ranking_loss(image, titles, torch.tensor(20.0), 0, 3, absent), without)


class TwoLinear(nn.Module):
    """A head as small as it gets, with the same start on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(V, E, bias=False), nn.Linear(T, E, bias=False)

    def forward(self, features: Features) -> Embeddings:
        image, title, negative = (F.normalize(layer(x), dim=-1) for layer, x in (
            (self.image, features.image_BV), (self.text, features.title_BT), (self.text, features.negative_BT)))
        return Embeddings(image, title, negative, torch.tensor(20.0, dtype=torch.float64))


def one_step(rows: int, gaps: bool) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one global batch of `rows`, on whatever ranks there are."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    world = World(rank, rank, size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    image, title, negative = (torch.randn(rows, width, generator=generator).double() for width in (V, T, T))
    negative_id = torch.arange(rows) + 100
    negative_id[1::3] = -1 if gaps else 7
    parts = [share(rows, r, size) for r in range(size)]
    mine = slice(*parts[rank])
    features = Features(image[mine], title[mine], negative[mine], torch.arange(rows)[mine], negative_id[mine])
    model = TwoLinear().double()  # so that what differs is the arithmetic of ranks, not rounding
    wrapped = distribute(model, size)  # must outlive the backward pass
    out = wrapped(features)
    titles, absent = candidates(world, out, features.negative_id_B, [b - a for a, b in parts])
    loss = ranking_loss(out.image_BE, titles, out.scale, mine.start, rows, absent)
    (loss * size).backward()  # as the loop does
    return world.sum(loss.detach()).item(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("ranks", "rows", "gaps"), [(2, 8, False), (2, 5, True), (3, 7, False), (3, 2, False)])
def test_ranks_add_up_to_one_process(ranks: int, rows: int, gaps: bool) -> None:
    loss, gradients = one_step(rows, gaps)
    for their_loss, their_gradients in on_ranks(ranks, one_step, rows, gaps):
        assert their_loss == pytest.approx(loss, abs=1e-6)
        for theirs, ours in zip(their_gradients, gradients, strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
