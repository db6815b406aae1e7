"""Which steps ranks share: the size of a step is what torch counts, and the choice is the same on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.store.feature_split import FeatureSplit
from engine.clip.model import ModelOptions, open_model
from engine.loss import Objective
from engine.optim import adamw
from engine.ranks import sharing
from engine.ranks.sharing import flop_of_step, world_of_steps
from engine.ranks.world import World
from engine.run_folder.profiler import Profiler
from engine.train import Replica, Step

CPU, ROWS, EMBEDDING = torch.device("cpu"), 12, 16


def make_pairs(negatives: int) -> FeatureSplit:
    ids = torch.arange(ROWS)
    negative_row_NH = torch.stack([ids.roll(place + 1) for place in range(negatives)], 1) if negatives else None
    return FeatureSplit(torch.randn(ROWS, 32), torch.randn(ROWS, 24), ids, ids, negative_row_NH)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("loss", ["image-to-text", "symmetric"])
def test_the_size_of_a_step_is_what_its_products_cost(negatives: int, loss: str, tiny_model: Path) -> None:
    parts = open_model(str(tiny_model), ModelOptions(precision="fp32"), CPU)
    pairs = make_pairs(negatives)
    replica = Replica(parts.head, adamw(parts.trainable.values(), 1e-3, 0.0), World(0, 0, 1, CPU), parts.precision)
    step, inputs = Step(replica, Objective(loss), 1.0, Profiler()), next(pairs.batches(ROWS, 0).from_step(0))
    with FlopCounterMode(display=False) as counter:
        step(inputs, ROWS, 1e-3)
    assert flop_of_step(pairs, ROWS, EMBEDDING, loss == "symmetric") == counter.get_total_flops()


def test_small_steps_of_equal_ranks_are_computed_whole_and_the_console_says_so(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, ranks = make_pairs(1), [World(rank, rank, 2, CPU) for rank in range(2)]
    others = ["the same"]
    monkeypatch.setattr(sharing, "_processor", lambda device: "the same")
    monkeypatch.setattr(World, "exchange", lambda self, value: [value, *others])

    def choose(world: World, pairs: FeatureSplit = pairs, rows: int = ROWS) -> World:
        return world_of_steps(world, pairs, rows, EMBEDDING, False)

    alone = [choose(world) for world in ranks]
    assert [(world.rank, world.size, world.is_main) for world in alone] == [(0, 1, True), (0, 1, False)]
    assert "each of the 2 ranks computes the whole batch" in capsys.readouterr().err  # rank 0 has said it, once
    assert choose(ranks[1], rows=100_000) is ranks[1] and capsys.readouterr().err == ""
    assert choose(ranks[0], rows=100_000) is ranks[0] and "2 ranks share each batch" in capsys.readouterr().err
    others[0] = "another GPU"
    assert choose(ranks[0]) is ranks[0] and "unlike processors" in capsys.readouterr().err
    on_gpu = [replace(world, device=torch.device("cuda")) for world in ranks]  # tables that did not fit there
    assert choose(on_gpu[0]) is on_gpu[0] and "on the host" in capsys.readouterr().err
    one = World(0, 0, 1, CPU)
    assert choose(one, rows=100_000) is one and capsys.readouterr().err == ""
