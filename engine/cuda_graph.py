"""The cached step as a CUDA graph: one call launches its ninety-odd kernels, most of them shorter than their launch.

A graph repeats what was captured: the same kernels on the same addresses with the same Python values. So row numbers
and learning rate are copied into fixed tensors, and only full batches are replayed; a short batch has other shapes and
runs eagerly. Before a graph is used, one replay is compared with the eager step, which notices most edits of the step
that a graph cannot repeat, such as a counter in Python. Where the two differ, or the capture fails, every step runs
eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from data.batch import Batches, CachedBatches, Features
from engine.optim import AdamWL2SP
from engine.ranks.world import World

WARMUP_STEPS = 3  # eager steps before the capture: they create the optimizer's state and the libraries' workspaces
MIN_STEPS = 500  # in shorter runs the capture, about a tenth of a second, costs more than it saves
MAX_REPLAY_ERROR = 0.1  # relative to a step's change: AdamW amplifies rounding of the smallest gradients

Outputs = tuple[Tensor, Tensor]  # loss, gradient norm
Captured = TypeVar("Captured")
EagerStep = Callable[[Features, int, float | Tensor], Outputs]  # inputs, rows of the global batch, learning rate


class CudaCapture:
    """The side stream for warm-up and capture; it is one, as autograd remembers the stream a leaf was first used on."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def side_stream(self) -> Iterator[list[warnings.WarningMessage]]:
        """Inside, everything runs on the side stream, ordered after earlier and before later work.

        Yields the list that receives torch's warnings, among them those of host syncs.
        """
        current, sync_mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield caught
            finally:
                torch.cuda.set_sync_debug_mode(sync_mode)
        current.wait_stream(self.stream)

    def capture(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Return `capture(step)` on the side stream."""
        return capture(step, self.stream)


def capture(function: Callable[[], Captured],
            stream: torch.cuda.Stream | None = None) -> tuple[Captured, Callable[[], None]]:
    """Record the kernels of `function` as a CUDA graph without running them; return its output and the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # restores the stream also when the capture fails
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = function()
    return output, graph.replay


class GraphedStep:
    """A step that takes row numbers; full batches of `rows` rows are replayed from a CUDA graph.

    `look_up` returns the features of row numbers. `log` is called with one line if no graph can be used.
    """

    def __init__(self, step: EagerStep, look_up: Callable[[Tensor], Features], optimizer: AdamWL2SP,
                 rows: int, log: Callable[[str], None],
                 region: Callable[[str], AbstractContextManager[object]]) -> None:
        self.step, self.look_up, self.optimizer, self.rows = step, look_up, optimizer, rows
        self.log, self.region = log, region
        self._cuda, self._warmup_steps, self._disabled = CudaCapture(), 0, False
        self._replay: Callable[[], None] | None = None
        self._index_B: Tensor
        self._lr: Tensor
        self._outputs: Outputs

    def __call__(self, index_B: Tensor, rows: int, lr: float) -> Outputs:
        """Return loss and gradient norm of a step; index_B are this rank's row numbers, `rows` counts those of all."""
        if self._disabled or rows != self.rows:
            return self.step(self.look_up(index_B), rows, lr)
        if self._replay is not None:
            with self.region("graph"):
                self._index_B.copy_(index_B)
                self._lr.fill_(lr)
                self._replay()
                return self._outputs[0].clone(), self._outputs[1].clone()  # the next replay overwrites the originals
        if self._warmup_steps == WARMUP_STEPS:
            return self._capture_and_compare(index_B, lr)
        self._warmup_steps += 1
        with self._cuda.side_stream() as caught:
            outputs = self.step(self.look_up(index_B), rows, lr)
        if self._warmup_steps == WARMUP_STEPS and any("synchroniz" in str(warning.message) for warning in caught):
            self._disable("it asks the host for a value")  # a capture would fail
        return outputs

    def _capture_and_compare(self, index_B: Tensor, lr: float) -> Outputs:
        """Capture the step, replay it, undo the replay, take the step eagerly; keep the graph if both agree."""
        self._index_B, self._lr = index_B.clone(), torch.tensor(lr, device=index_B.device)
        try:
            self._outputs, replay = self._cuda.capture(
                lambda: self.step(self.look_up(self._index_B), self.rows, self._lr))
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._disable(f"it cannot be captured ({str(error.__context__ or error).splitlines()[0][:150]})")
            return self.step(self.look_up(index_B), self.rows, lr)
        # The capture ran no kernel, so the state is still that of before the step.
        before = self._copy_state()
        with self.optimizer.changing():
            replay()
            replayed = [*(output.clone() for output in self._outputs), *self._copy_state()]
            for tensor, old in zip(self._state(), before, strict=True):
                tensor.copy_(old)
        outputs = self.step(self.look_up(index_B), self.rows, lr)
        if not outputs[1].isfinite():  # the update was skipped, so there is nothing to compare: capture the next step
            return outputs
        self._replay = replay
        # Compare each change by the step with the change by the replay; those of loss and norm count from 0.
        before = [torch.zeros_like(output) for output in outputs] + before
        for tensor, other, old in zip([*outputs, *self._state()], replayed, before, strict=True):
            if not (tensor - other).norm() <= MAX_REPLAY_ERROR * (tensor - old).norm():  # NaN disables it as well
                self._disable("replayed, it does something else")
                break
        return outputs

    def _disable(self, reason: str) -> None:
        self._disabled = True
        self.log(f"no CUDA graph of the step: {reason}; --cuda-graph off does not try")

    def _state(self) -> list[Tensor]:
        """Return every tensor that a step changes: the parameters and the optimizer's state."""
        tensors: list[Tensor] = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter.detach(), *self.optimizer.state.get(parameter, {}).values()]
        return tensors

    def _copy_state(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._state()]


def should_capture(batches: Batches, steps: int, world: World) -> TypeGuard[CachedBatches]:
    """Return whether to capture the step: each GPU computes whole steps, features lie on it, and steps are many.

    Steps that ranks share run eagerly: NCCL's watchdog, which names a stalled rank, cannot see into a graph, and such
    steps are long enough (ranks/sharing.py) to hide the time of the launches.
    """
    return (world.device.type == "cuda" and world.size == 1 and steps >= MIN_STEPS
            and isinstance(batches, CachedBatches) and batches.device.type == "cuda")
