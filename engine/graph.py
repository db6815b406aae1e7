"""The cached step as a CUDA graph: one call launches its sixty-odd kernels, each of which runs shorter than its launch.

A graph repeats what was captured: the same kernels on the same addresses with the same Python values. So inputs and
learning rate are copied into tensors that stay, and only whole batches are replayed; a short one has other shapes and
runs as ever. What a graph does not hold (an edit that counts steps in Python, say) may show at once: before a graph is
used one replay of it is compared with the step itself. Where the two differ, or nothing can be captured, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from data.batch import Features, map_tensors
from engine.dist import World

WARM = 3  # steps first, after which the optimizer's state and the libraries' workspaces exist
PAYS = 500  # steps of a run from which on a capture, about a tenth of a second, is worth it
APART = 0.01  # of what a step changes: how far a replay may be from the step

Outputs = tuple[Tensor, Tensor]  # loss, gradient norm
Step = Callable[[Any, int, Any], Outputs]  # this rank's inputs, rows of the global batch, learning rate (also a tensor)


class Cuda:
    """Captures on a stream of its own, on which the steps before run too: autograd remembers the stream of a leaf."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, everything runs on that stream, after what came before and before what comes after."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def capture(self, step: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Record what `step` would start, without running it: where its results will be, and the replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.current_stream()):  # comes back here also when the capture fails
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                outputs = step()
        return outputs, graph.replay


class Graphed:
    """`step` for batches of `rows` rows replayed from a graph, every other one as it is; called like `step`."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, rows: int, say: Callable[[str], None],
                 region: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.step, self.optimizer, self.rows, self.say, self.region = step, optimizer, rows, say, region
        self._cuda, self._warm, self._given_up = Cuda(), 0, False
        self._replay: Callable[[], None] | None = None
        self._inputs: Features
        self._lr: Tensor
        self._outputs: Outputs

    def __call__(self, inputs: Any, rows: int, lr: float) -> Outputs:
        """Loss and gradient norm of this step."""
        if self._given_up or rows != self.rows or not isinstance(inputs, Features):
            return self.step(inputs, rows, lr)
        if self._replay is not None:
            with self.region("graph"):
                self._set(inputs, lr)
                self._replay()
                return self._outputs[0].clone(), self._outputs[1].clone()
        if self._warm == WARM:
            return self._record(inputs, lr)
        self._warm += 1
        with self._cuda.aside():
            return self.step(inputs, rows, lr)

    def _set(self, inputs: Features, lr: float) -> None:
        for kept, new in zip(self._inputs, inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        self._lr.fill_(lr)

    def _record(self, inputs: Features, lr: float) -> Outputs:
        """Capture the step, replay it, undo that, then take the step; from now on the graph, if both did the same."""
        self._inputs, self._lr = map_tensors(inputs, Tensor.clone), torch.tensor(lr, device=inputs.image_BV.device)
        try:
            self._outputs, replay = self._cuda.capture(lambda: self.step(self._inputs, self.rows, self._lr))
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            self._give_up(f"it cannot be captured ({str(error.__context__ or error).splitlines()[0][:150]})")
            return self.step(inputs, self.rows, lr)
        before = self._copies()
        replay()
        replayed = [*(output.clone() for output in self._outputs), *self._copies()]
        for tensor, old in zip(self._state(), before, strict=True):
            tensor.copy_(old)
        outputs = self.step(inputs, self.rows, lr)
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


def graphed(step: Step, optimizer: torch.optim.Optimizer, wanted: str, rows: int, steps: int, world: World,
            say: Callable[[str], None], region: Callable[[str], AbstractContextManager[Any]]) -> Step:
    """`step`, from a graph where `wanted` is auto and it pays: on one GPU and for enough steps.

    With several ranks it stays as it is: NCCL's watchdog, which names a stalled rank, cannot look into a graph.
    """
    pays = world.device.type == "cuda" and world.size == 1 and steps >= PAYS
    return Graphed(step, optimizer, rows, say, region) if wanted == "auto" and pays else step
