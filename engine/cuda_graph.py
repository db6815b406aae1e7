"""The cached step as a CUDA graph: one call launches its sixty-odd kernels, each of which runs shorter than its launch.

A graph repeats what was captured: the same kernels on the same addresses with the same Python values. So row numbers
and learning rate are copied into tensors that stay, and only whole batches are replayed; a short one has other shapes
and runs as ever. What a graph does not hold (an edit that counts steps in Python, say) may show at once: before a graph
is used one replay of it is compared with the step itself. Where the two differ, or none can be captured, none is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor

from data.batch import Batches
from engine.ranks.world import World

WARM = 3  # steps first, after which the optimizer's state and the libraries' workspaces exist
PAYS = 500  # steps of a run from which on a capture, about a tenth of a second, is worth it
APART = 0.1  # of what a step changes: AdamW makes much of the last bits of the smallest gradients

Outputs = tuple[Tensor, Tensor]  # loss, gradient norm
Step = Callable[[Any, int, Any], Outputs]  # this rank's inputs, rows of the global batch, learning rate (also a tensor)


class Cuda:
    """Captures on a stream of its own, on which the steps before run too: autograd remembers the stream of a leaf."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def aside(self) -> Iterator[list[warnings.WarningMessage]]:
        """Inside, everything runs on that stream, after what came before and before what comes after.

        Yields the list that torch's warnings come to, of the host waiting for the device above all.
        """
        here, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        here.wait_stream(self.stream)

    def capture(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Record what `step` would start, without running it: where its results will be, and the replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # comes back here also when the capture fails
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                outputs = step()
        return outputs, graph.replay


class Graphed:
    """`step` of what `look` makes of row numbers, for batches of `rows` rows replayed from a graph."""

    def __init__(self, step: Step, look: Callable[[Tensor], Any], optimizer: torch.optim.Optimizer, rows: int,
                 say: Callable[[str], None], region: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.step, self.look, self.optimizer, self.rows = step, look, optimizer, rows
        self.say, self.region = say, region
        self._cuda, self._warm, self._given_up = Cuda(), 0, False
        self._replay: Callable[[], None] | None = None
        self._index_B: Tensor
        self._lr: Tensor
        self._outputs: Outputs

    def __call__(self, index_B: Tensor, rows: int, lr: float) -> Outputs:
        """Loss and gradient norm of this step; `index_B` are its row numbers, `rows` how many these are."""
        if self._given_up or rows != self.rows:
            return self.step(self.look(index_B), rows, lr)
        if self._replay is not None:
            with self.region("graph"):
                self._index_B.copy_(index_B)
                self._lr.fill_(lr)
                self._replay()
                return self._outputs[0].clone(), self._outputs[1].clone()
        if self._warm == WARM:
            return self._record(index_B, lr)
        self._warm += 1
        with self._cuda.aside() as found:
            outputs = self.step(self.look(index_B), rows, lr)
        if self._warm == WARM and any("synchroniz" in str(warning.message) for warning in found):
            self._give_up("it asks the host for a value")  # a capture would fail
        return outputs

    def _record(self, index_B: Tensor, lr: float) -> Outputs:
        """Capture the step, replay it, undo that, then take the step; from now on the graph, if both did the same."""
        self._index_B, self._lr = index_B.clone(), torch.tensor(lr, device=index_B.device)
        try:
            self._outputs, replay = self._cuda.capture(
                lambda: self.step(self.look(self._index_B), self.rows, self._lr))
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._give_up(f"it cannot be captured ({str(error.__context__ or error).splitlines()[0][:150]})")
            return self.step(self.look(index_B), self.rows, lr)
        before = self._copies()
        replay()
        replayed = [*(output.clone() for output in self._outputs), *self._copies()]
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)
        outputs = self.step(self.look(index_B), self.rows, lr)
        if outputs[1].isfinite():  # else the update was skipped, which tells nothing: record the next step
            nothing = [torch.zeros_like(output) for output in outputs]
            same = all(bool((one - other).norm() <= APART * (one - old).norm()) for one, other, old in
                       zip([*outputs, *self._state()], replayed, nothing + before, strict=True))
            self._replay = replay
            if not same:
                self._give_up("replayed, it does something else")
        return outputs

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self.say(f"no CUDA graph of the step: {why}; --cuda-graph off does not try")

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        return [tensor.detach() for group in self.optimizer.param_groups for parameter in group["params"]
                for tensor in (parameter, *self.optimizer.state.get(parameter, {}).values())]

    def _copies(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self._state()]


def pays(batches: Callable[[int], Iterator[Any]], steps: int, world: World) -> TypeGuard[Batches]:
    """Is a graph possible and worth it: on one GPU, with features that lie there, for enough steps?

    With several ranks it is not: NCCL's watchdog, which names a stalled rank, cannot look into a graph.
    """
    return (world.device.type == "cuda" and world.size == 1 and steps >= PAYS and isinstance(batches, Batches)
            and batches.device.type == "cuda")
