"""The bench: how figures are judged and printed, what its arithmetic counts, and that its GPU part opens its models."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from bench import gpu, jobs
from bench.harness import Bench, Figure, Race, amount
from bench.inputs import image_flops, random_clip
from helpers import HAS_GPU
from stand_in import GPU, stand_in
from torch.utils.flop_counter import FlopCounterMode

from engine.clip.loading import load_clip
from engine.clip.towers import Towers


def test_figures_know_whether_they_reach_their_goal(tmp_path: Path) -> None:
    bench = Bench(True, tmp_path, "", "")
    bench.add(Figure("P9", "b", ">= 4", [3.0, 5.0, 4.0], "1", "2"))
    bench.add(Figure("P1", "a", "<= 2.5", [3.0]))
    bench.add(Figure("P1", "a", "<= 2.5", not_measured="one core"))
    ticks = iter(range(0, 1000, 10))
    # Every call of the clock is 10 later, so that both arms take 10 s.
    bench.race(Race("P2", "c", ">= 2", lambda: None, lambda: None, work=(2, 1), unit="x", clock=lambda: next(ticks)))
    assert [figure.reached for figure in bench.figures] == [True, False, None, True]
    assert [line.split("|")[1].strip() for line in bench.table().splitlines()[2:]] == ["P1", "P1", "P2", "P9"]
    assert "not measured: one core" in bench.table() and bench.as_json()[0]["values"] == [3.0, 5.0, 4.0]
    assert (bench.figures[-1].ours, bench.figures[-1].against) == ("0.2 x/s", "0.1 x/s")
    assert amount(0.0021) == "2.1 ms" and amount(2.0, 10, "pairs") == "5 pairs/s"


def test_the_parts_of_a_warm_train_are_functions_that_it_has() -> None:
    """A renamed function would end the measurement."""
    assert all(callable(resolve_name(name)) for names in jobs.PARTS.values() for name in names)


def test_flops_of_an_image_are_those_of_its_products() -> None:
    clip = random_clip("ViT-B/32")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Towers(clip).image(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
    assert image_flops(clip.vision_model.config) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


@pytest.mark.skipif(HAS_GPU, reason="a real GPU needs no stand-in")
def test_the_gpus_figures_open_their_models(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "random_clip", lambda shape: load_clip(str(tiny_model)))
    for name in ("product_rate", "tower_rate", "epoch_seconds", "steps_without_sync"):
        monkeypatch.setattr(gpu, name, lambda *_: 1.0)
    bench = Bench(True, tmp_path, "", "")
    with stand_in():
        gpu.towers(bench)
        gpu.warm_epochs(bench)
    assert GPU.type == "cuda" and len(bench.figures) == 8 and "bfloat16" in bench.figures[0].what
