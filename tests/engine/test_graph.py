"""The step replayed from a graph against the step itself.

On a CPU a tape stands for the CUDA graph: it notes every kernel of a step with its operands, leaves the tensors as they
were, and starts the same kernels on the same tensors again. Like a graph it knows nothing of what Python did between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.batch import CachedBatches, Features
from data.prefetch import EpochBatches
from data.store.feature_split import FeatureSplit
from engine import cuda_graph as graph
from engine import train
from engine.clip.model import LoadedModel, ModelOptions, open_model
from engine.config.fields import Config
from engine.cuda_graph import MIN_STEPS, Outputs, should_capture
from engine.optim import Plan, adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.log import NullLog
from engine.train import Callbacks, Replica, fit

ROWS, BATCH, EPOCHS, STEPS = 28, 8, 4, 16  # four steps an epoch, the last one short
LR = 2**-7  # and, falling to 0 in 16 steps, always a number that fp32 has: a graph's learning rate is fp32
CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Notes kernels; `undo` puts back what they changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kernel is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        named = {argument.name: argument for argument in kernel._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        for name, value in given.items():
            if named[name].alias_info is not None and named[name].alias_info.is_write:
                for tensor in tree_leaves(value):
                    if memory(tensor) not in self.made:
                        self.before.setdefault(memory(tensor), (tensor, tensor.clone()))
        out = kernel(*args, **kwargs)
        self.made |= {memory(one) for one in tree_leaves(out) if isinstance(one, Tensor)} - {
            memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        self.calls.append((kernel, args, kwargs, out))
        return out

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, before in self.before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for kernel, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(kernel(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and memory(old) != memory(new):
                    old.copy_(new)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Taped:
    """Stands for CudaCapture."""

    captures = 0

    @contextmanager
    def side_stream(self) -> Iterator[list[warnings.WarningMessage]]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield found

    def capture(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        Taped.captures += 1
        tape = Tape()
        with tape:
            outputs = step()
        tape.undo()
        return outputs, tape.replay


class Steps(NullLog):
    """Notes loss and gradient norm of every step, and what is said."""

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, Tensor]] = []  # kept for later, as by the Log
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        self.noted.append((loss, grad_norm))


def opened(model: Path, trainable: str = "projection", precision: str = "fp32",
           device: torch.device = CPU) -> LoadedModel:
    return open_model(str(model), ModelOptions(trainable.split(","), precision=precision), device)


def run(parts: LoadedModel, monkeypatch: pytest.MonkeyPatch | None, bad: int = -1, device: torch.device = CPU,
        **recipe: Any) -> tuple[Steps, list[Tensor]]:
    """A run of the loop; with a `monkeypatch` from a graph, on a CPU a tape. The batch of step `bad` holds a NaN."""
    generator = torch.Generator().manual_seed(0)
    image, title = (torch.randn(ROWS + 1, width, generator=generator)
                    for width in parts.clip.facts.widths.values())
    image[ROWS, 0] = float("nan")
    each = torch.arange(ROWS + 1)
    negatives = torch.stack([each // 3, each - 1], 1)
    pairs = FeatureSplit(image, title, each, each // 2, negatives, title_group_P=each // 4).to(device)  # titles repeat

    class WithBadStep(EpochBatches):
        def from_step(self, first: int) -> Iterator[Tensor]:
            for step, index_B in enumerate(super().from_step(first), first):
                yield torch.cat([index_B[1:], torch.full_like(index_B[:1], ROWS)]) if step == bad else index_B

    cfg = Config(**{"batch_size": BATCH, "epochs": EPOCHS, "lr": LR, "log_every": 1, **recipe})
    if monkeypatch is not None:
        if device.type == "cpu":
            monkeypatch.setattr(graph, "CudaCapture", Taped)
        monkeypatch.setattr(train, "should_capture", lambda *_: True)
    log = Steps()
    optimizer = adamw(parts.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp)
    batches = CachedBatches(WithBadStep(ROWS, BATCH, 0, device=device), pairs.training_features, device)
    fit(Replica(parts.head, optimizer, World(0, 0, 1, device), parts.precision), batches, Plan(ROWS, BATCH, EPOCHS),
        State(), cfg, Callbacks(log))
    return log, [parameter.detach() for parameter in parts.trainable.values()]


@pytest.mark.parametrize(("trainable", "precision", "recipe"), [
    ("projection", "fp32", {}), ("projection", "bf16", {"loss": "symmetric", "duplicates": "multi", "l2_sp": 0.1}),
    ("projection,logit_scale", "fp32", {"loss": "sigmoid", "weight_decay": 0.1, "clip_norm": 0.0}),
    ("projection", "fp32", {"hardness": 5.0, "duplicates": "keep", "clip_norm": 0.1}),
    ("projection", "fp32", {"bad": 9}), ("projection", "fp32", {"bad": 4})])
def test_a_replayed_step_is_the_step_to_the_bit(trainable: str, precision: str, recipe: dict[str, Any],
                                                tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, weights = run(opened(tiny_model, trainable, precision), None, **recipe)
    monkeypatch.setattr(Taped, "captures", 0)
    replayed, same = run(opened(tiny_model, trainable, precision), monkeypatch, **recipe)
    assert Taped.captures == (2 if recipe.get("bad") == 4 else 1) and not replayed.said  # 4: the one to compare with
    torch.testing.assert_close(replayed.noted, steps.noted, rtol=0, atol=0, equal_nan=True)
    assert all(one.equal(other) for one, other in zip(weights, same, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_graph_does_what_the_step_does(precision: str, tiny_model: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    steps, weights = run(opened(tiny_model, "projection", precision, device), None, device=device)
    replayed, same = run(opened(tiny_model, "projection", precision, device), monkeypatch, device=device)
    assert not replayed.said
    torch.testing.assert_close((replayed.noted, same), (steps.noted, weights), rtol=1e-4, atol=1e-5)


def counts_in_python(objective: Any, *args: Any, seen: list[int], function: Any) -> Tensor:
    """An edit of the loss that a graph cannot hold: every other step counts double."""
    seen.append(0)
    return function(objective, *args) * (1 + len(seen) % 2)


def asks_the_host(*args: Any, function: Any) -> Any:
    """An edit of the loss or of the update that a graph cannot hold either."""
    return function(*args) if args[-1] != torch.ones(()).item() else None


def test_a_step_that_asks_the_host_is_not_captured(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*args: Any, function: Any = train.global_batch_loss) -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # as torch says it
        return function(*args)

    monkeypatch.setattr(train, "global_batch_loss", asks)
    monkeypatch.setattr(Taped, "captures", 0)
    log, _ = run(opened(tiny_model), monkeypatch)
    assert Taped.captures == 0 and len(log.said) == 1 and "asks the host" in log.said[0] and len(log.noted) == STEPS


@pytest.mark.parametrize("name", ["global_batch_loss", "update"])
def test_a_step_that_cannot_be_captured_is_the_step(name: str, tiny_model: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, name, partial(asks_the_host, function=getattr(train, name)))
    steps, weights = run(opened(tiny_model), None, clip_norm=0.5)
    again, same = run(opened(tiny_model), monkeypatch, clip_norm=0.5)
    assert len(again.said) == 1 and "not permitted when" in again.said[0] and "--cuda-graph off" in again.said[0]
    torch.testing.assert_close((again.noted, same), (steps.noted, weights), rtol=0, atol=0)


def test_a_graph_that_leaves_something_out_is_not_used(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "global_batch_loss",
                        partial(counts_in_python, seen=[], function=train.global_batch_loss))
    log, _ = run(opened(tiny_model), monkeypatch)
    assert len(log.said) == 1 and "something else" in log.said[0] and len(log.noted) == STEPS


class Streamed:
    """Batches that come from no feature table."""

    def from_step(self, step: int) -> Iterator[Features]:
        return iter(())


def test_shared_steps_short_runs_and_host_tables_have_no_graph() -> None:
    gpu, rows, ids = torch.device("cuda"), EpochBatches(ROWS, BATCH, 0), torch.arange(ROWS)
    pairs = FeatureSplit(torch.randn(ROWS, 2), torch.randn(ROWS, 2), ids, ids)
    for size, steps, place, expected in ((1, MIN_STEPS, gpu, True), (2, MIN_STEPS, gpu, False),
                                         (1, MIN_STEPS - 1, gpu, False), (1, MIN_STEPS, CPU, False)):
        batches = CachedBatches(rows, pairs.features, place)
        assert should_capture(batches, steps, World(0, 0, size, gpu)) is expected
    whole = CachedBatches(rows, pairs.features, gpu)
    assert should_capture(whole, MIN_STEPS, World(1, 1, 8, gpu).alone())  # each rank computes whole steps
    assert not should_capture(Streamed(), MIN_STEPS, World(0, 0, 1, gpu))
    assert not should_capture(CachedBatches(rows, pairs.features, CPU), MIN_STEPS, World(0, 0, 1, CPU))
