"""What runs on a GPU, run on a stand-in for one: nothing mixes devices, a step never waits, results are the CPU's.

`stand_in` says what it cannot show: kernels, streams, memory, NCCL and graphs are a real GPU's alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HAS_GPU
from stand_in import GPU, plain, stand_in
from torch import Tensor

from data.batch import Features, map_tensors
from data.prefetch import prefetch_to_device
from data.sources.folds import concatenate, folds
from data.store.feature_split import FeatureSplit, StoredTable
from data.store.features import FeatureStore
from engine import train
from engine.clip.loading import load_clip
from engine.clip.model import ModelOptions, build_model
from engine.commands import train as train_command
from engine.config.cli import parse
from engine.loss import Objective
from engine.optim import Plan, adamw
from engine.ranks import world as dist
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder.board import WeightDrift
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log
from engine.run_folder.profiler import Profiler
from engine.train import Replica, Step
from eval.distinct import Distinct
from eval.metrics import retrieval_ranks, triplet_correct
from eval.retrieval import measure_split
from eval.search import top_k

pytestmark = pytest.mark.skipif(HAS_GPU, reason="a real GPU needs no stand-in")
CPU, ROWS = torch.device("cpu"), 8


def test_the_stand_in_notices_what_a_gpu_would() -> None:
    with stand_in() as gpu:
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert there.is_cuda and (there + 1).device == GPU and torch.tensor([1.0], device="cuda").is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        gpu.syncs.clear()
        assert here.pin_memory().to(GPU, non_blocking=True).is_cuda and not gpu.syncs
        for count, wait in enumerate((lambda: there.sum().item(), lambda: there.cpu(), lambda: here.to(GPU),
                                      lambda: bool(there[0] > 0), lambda: there[there > 0], lambda: there.nonzero(),
                                      lambda: there[torch.tensor([0])]), start=1):
            wait()
            assert len(gpu.syncs) >= count, count


def steps(model: Path, device: torch.device, precision: str, l2_sp: float, lr: float, watch: list[str],
          **objective: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The last loss and norm of three steps, and the weights after them; the second step's norm is infinite."""
    parts = build_model(load_clip(str(model)), ModelOptions(("projection", "logit_scale"), precision=precision), device)
    generator, ids = torch.Generator().manual_seed(0), torch.arange(ROWS)
    image, title = (torch.randn(ROWS, width, generator=generator) for width in (32, 24))
    negatives, negative_ids = torch.randn(ROWS, 2, 24, generator=generator), torch.stack([ids - 1, ids // 3 + 1], 1)
    on_host = Features(image, title, negatives, ids // 2, ids // 3, negative_ids)
    inputs = map_tensors(on_host, lambda part: part.to(device))
    weights = list(parts.trainable.values())
    replica = Replica(parts.head, adamw(weights, lr, 0.01, l2_sp), World(0, 0, 1, device), parts.precision)
    step = Step(replica, Objective(**objective), 1.0, Profiler())
    rate = torch.tensor(lr, device=device)
    broken = inputs._replace(image_BV=inputs.image_BV * torch.inf)
    watch.clear()
    for some, how in ((inputs, lr), (broken, lr), (inputs, rate)):
        loss, norm = step(some, ROWS, how)
    assert not watch
    assert all(replica.optimizer.state[weight]["step"].device == device for weight in weights)
    return plain(loss), plain(norm), [plain(weight.detach()) for weight in weights]


@pytest.mark.parametrize(("precision", "l2_sp", "objective"), [
    ("fp32", 0.0, {}), ("bf16", 0.1, {}), ("fp32", 0.0, {"duplicates": "keep", "hardness": 2.0}),
    ("fp32", 0.0, {"loss": "symmetric", "duplicates": "multi"}), ("bf16", 0.0, {"loss": "symmetric", "hardness": 2.0}),
    ("fp32", 0.1, {"loss": "sigmoid"}), ("fp32", 0.0, {"loss": "sigmoid", "duplicates": "multi"})])
def test_a_step_never_waits_and_is_the_cpus(precision: str, l2_sp: float, objective: dict[str, Any],
                                            tiny_model: Path) -> None:
    products = torch.bfloat16 if precision == "bf16" else None
    objective["product_dtype"] = products
    with stand_in() as gpu:
        there = steps(tiny_model, GPU, precision, l2_sp, 1e-3, gpu.syncs, **objective)
    here = steps(tiny_model, CPU, precision, l2_sp, 1e-3, [], **objective)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


class Endless(StopSignal):
    """A StopSignal that no signal reaches; after `end` steps it says that one has."""

    def __init__(self, end: int) -> None:
        self.end = end

    @contextmanager
    def graceful_exit(self) -> Iterator[None]:
        yield

    @contextmanager
    def immediate_exit(self) -> Iterator[None]:
        yield

    def agreed_signal(self, world: World, step: int) -> int:
        return 15 * (step == self.end)


def trained(model: Path, pairs: Path, folder: Path, patch: pytest.MonkeyPatch, *flags: str, device: str = "cuda",
            free: int = 2**33, end: int = -1) -> list[dict[str, Any]]:
    """steps.jsonl of a run; on the stand-in, AssertionError where a step waits, or a flush without need."""
    places = {"model": model, "dataset": pairs, "out": folder / "run", "cache-dir": folder / "cache", "device": device}
    _, cfg = parse("run.py", ["train", *(f"--{name}={place}" for name, place in places.items()), "--quiet",
                              "--epochs=1", "--eval-splits=valid", *flags])
    call, flush = Step.__call__, Log.flush
    with stand_in(free) if device == "cuda" else nullcontext() as gpu:
        def watched(self: Step, *args: Any) -> Any:
            before = len(gpu.syncs) if gpu else 0
            result = call(self, *args)
            assert not gpu or len(gpu.syncs) == before, set(gpu.syncs[before:])
            return result

        def watched_flush(self: Log, wait: bool = False) -> dict[int, float]:
            before = len(gpu.syncs) if gpu else 0
            norms = flush(self, wait)
            assert wait or not gpu or len(gpu.syncs) == before, set(gpu.syncs[before:])
            return norms

        patch.setattr(train.Step, "__call__", watched)
        patch.setattr(Log, "flush", watched_flush)
        # transformers looks at addresses, which a stand-in has not
        patch.setattr(train_command, "write_results", lambda *_: 0)
        try:
            train_command.train(cfg, dist.init(device, 60), Endless(end))
        except KeyError:  # stopped: there are no metrics of a tuned model
            assert end > 0
        finally:
            patch.undo()
    return [json.loads(line) for line in (folder / "run" / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("trainable", ["projection,logit_scale", "projection,text_model.encoder.layers.1"])
def test_a_run_is_the_cpus(trainable: str, tiny_model: Path, pairs: Path, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--trainable", trainable, "--precision", "fp32", "--log-every", "1"]
    flags += ["--lr-text", "1e-5", "--weight-decay", "0.1"] if "layers" in trainable else []
    here = trained(tiny_model, pairs, tmp_path / "cpu", monkeypatch, *flags, device="cpu")
    there = trained(tiny_model, pairs, tmp_path / "gpu", monkeypatch, *flags)
    assert len(here) == 3 and here == [pytest.approx(step, rel=1e-4) for step in there]


def test_a_resumed_run_and_tables_beside_the_gpu_change_nothing(tiny_model: Path, pairs: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tiny_model, pairs, tmp_path / "whole", monkeypatch, free=0)
    trained(tiny_model, pairs, tmp_path / "cut", monkeypatch, end=2)
    assert trained(tiny_model, pairs, tmp_path / "cut", monkeypatch, "--resume") == whole


def test_the_log_waits_for_no_copy_unless_all_has_to_be_written(tmp_path: Path) -> None:
    """Each flush writes the steps of the one before; a checkpoint, and the end, find every step written."""
    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]

    with stand_in() as gpu:
        log = Log(tmp_path, World(0, 0, 1, GPU, quiet=True), Plan(90, 9, 1), State(), WeightDrift({}))
        for step, expected, wait in ((1, [], False), (2, [1], False), (3, [2, 3], True), (4, [], False)):
            log.step(step, torch.tensor(step / 2, device=GPU), torch.tensor(float(step), device=GPU), 0.1, 9)
            gpu.syncs.clear()
            assert log.flush(wait) == {number: float(number) for number in expected}
            assert bool(gpu.syncs) is wait
        assert steps() == [1, 2, 3] and log.flush() == {}
        log.close()
    assert steps() == [1, 2, 3, 4]


def residents(folder: Path) -> tuple[FeatureSplit, FeatureSplit]:
    """The same 40 pairs twice: tables in memory, tables in the store's files."""
    keys, values = np.random.default_rng(0).integers(0, 256, (40, 16), np.uint8), torch.randn(40, 24)
    store = FeatureStore(folder, 24)
    store.append(keys, values)
    rows = torch.arange(40)
    negatives = torch.stack([rows - 1, rows // 3], 1)
    split = FeatureSplit(values, values, rows, rows // 2, negatives, title_group_P=rows // 4)
    image, title = (StoredTable(store, store.locate(keys)) for _ in range(2))
    return split, replace(split, image_MV=image, title_PT=title)


def test_no_batch_waits_wherever_the_tables_are(tmp_path: Path) -> None:
    split, mapped = residents(tmp_path)
    with stand_in() as gpu:
        for on_gpu in (split.to(GPU), mapped.to(GPU), mapped.to(GPU, room=0)):
            gpu.syncs.clear()
            for first in (0, 3):
                for got, want in islice(zip(
                        on_gpu.batches(16, 1).from_step(first), split.batches(16, 1).from_step(first), strict=True), 4):
                    assert all(part is not None and part.device == GPU for part in got)
                    torch.testing.assert_close(map_tensors(got, plain), want)
            assert not gpu.syncs
        ahead = list(prefetch_to_device(iter([split.features(torch.arange(5))] * 3), GPU))
        assert [part.image_BV.device for part in ahead] == [GPU] * 3 and not gpu.syncs


def test_measuring_searching_and_sweeping_are_the_cpus(tmp_path: Path) -> None:
    split, mapped = residents(tmp_path)

    unit = torch.nn.functional.normalize

    def found(pairs: FeatureSplit, device: torch.device) -> list[Any]:
        one = measure_split(unit, lambda x: unit(x.flip(-1) + 1), pairs.parts())
        gallery = unit(pairs.to(CPU).features(torch.arange(40)).image_BV).to(device)
        fold = folds(concatenate([pairs, replace(pairs, negative_row_NH=None)]), 3, 0)[1]
        batch = next(fold.train.batches(16, 0).from_step(1))
        means = [plain(part) for _, *parts in one.means() for part in parts]
        return [one.summarise(), *means, *(plain(part) for part in batch),
                *top_k(gallery[:7], lambda low, high: gallery[low:high], 40, 5, chunk=16),
                *map(plain, retrieval_ranks(gallery, gallery.flip(0), Distinct.from_ids(
                    None, torch.arange(len(gallery), device=device)), (64, 64))),
                plain(triplet_correct(gallery, gallery.flip(0), gallery.roll(1, 0)))]

    here = found(split, CPU)
    with stand_in():
        for on_gpu in (split.to(GPU), mapped.to(GPU, room=0)):
            torch.testing.assert_close(found(on_gpu, GPU), here)
