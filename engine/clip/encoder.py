"""Run frozen towers without autograd, in batches that fit into memory, compiled or replayed where that is worth it.

Dimension key: B batch.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Tokens, UserError, map_tensors
from engine.cuda_graph import capture

Inputs = Tensor | Tokens

CPU_BATCH = 32  # images; measured best: activations of 64 exceed the caches and are allocated anew in every batch
CPU_TITLES = 96  # titles, likewise: a title has some 14 tokens where an image has 50
GPU_BATCH = 512  # enough to keep a GPU busy
PADDED_TO = 64  # compiled batches are padded to multiples of this, the batch of the cold pass
GRAPH_AFTER = 3  # batches of one shape in a row; then it is worth a CUDA graph
COMPILE_AFTER = 20_000  # inputs; below, a compilation of about a minute costs more than it saves
MIN_BUSY_SHARE = 0.8  # of the time that the device encodes; below it, a faster tower would wait for pictures


class BatchedEncoder:
    """Applies `encode` (an ImageTower or a TextTower) to any number of inputs, pixels or tokens.

    `batch` inputs are encoded at a time; where a GPU runs out of memory, `batch` is halved from then on. Titles have
    many shapes and run eagerly. So do images on a CPU; on a GPU, batches of one shape are replayed as a CUDA graph.
    `compiled` is auto, on or off: auto compiles on a GPU after COMPILE_AFTER images if the tower is the bottleneck.
    """

    # `encode` takes pixels or tokens, whichever its tower takes: Any, as no type of one argument says that.
    def __init__(self, encode: Callable[[Any], Tensor], device: torch.device, precision: torch.dtype,
                 compiled: str = "off", cpu_batch: int | None = None) -> None:
        self.encode, self.device, self.precision, self.compiled = encode, device, precision, compiled
        self.batch = (cpu_batch or CPU_BATCH) if device.type == "cpu" else GPU_BATCH
        self._seen = 0
        self._clock: DeviceClock | None = None
        self._fast: Callable[[Tensor], Tensor] | None = None  # compiled
        self._graphs = OneShapeGraph(encode) if device.type == "cuda" else None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the features of all inputs, on the device."""
        count = len(inputs) if isinstance(inputs, Tensor) else len(inputs[0])
        features: list[Tensor] = []
        low = 0
        while low < count or not features:  # no inputs at all run once, for the width of the features
            part = _apply(lambda tensor: tensor[low:low + self.batch], inputs)  # noqa: B023
            try:
                features.append(self._run(part))
            except torch.OutOfMemoryError as error:
                if self.batch == 1:
                    raise UserError("the device has no room for one input of the towers; use --device cpu or a smaller "
                                    "--model") from error
                self.batch = max(1, min(self.batch, count - low) // 2)
                torch.cuda.empty_cache()
                continue
            low += self.batch
        self._seen += count
        return features[0] if len(features) == 1 else torch.cat(features)

    def _run(self, part: Inputs) -> Tensor:
        moved = _apply(lambda tensor: tensor.to(self.device, non_blocking=True), part)
        mixed = self.precision.itemsize < 4
        with torch.no_grad(), torch.autocast(self.device.type, self.precision, mixed, cache_enabled=False):
            if not isinstance(moved, Tensor) or not len(moved):
                return self.encode(moved)
            if self._should_compile():
                return self._run_compiled(moved)
            if self._graphs is None:
                return self.encode(moved)
            self._clock = self._clock or DeviceClock()
            with self._clock.encoding():
                return self._graphs(moved)

    def _should_compile(self) -> bool:
        """Return whether to run compiled; the first batch never is, as the towers cast their weights in it."""
        if self._fast is not None or self.compiled == "on":
            return self._seen > 0 and self.compiled != "off"
        if self.compiled == "off" or self._clock is None or self._clock.inputs_since(self._seen) < COMPILE_AFTER:
            return False
        is_bottleneck = self._clock.busy_share() >= MIN_BUSY_SHARE
        self._clock = None if is_bottleneck else DeviceClock(self._seen)  # decide again after COMPILE_AFTER more
        return is_bottleneck

    def _run_compiled(self, pixels: Tensor) -> Tensor:
        """Encode a padded batch: padding keeps the number of shapes to compile low, and the cold pass needs one."""
        try:
            self._fast = self._fast or torch.compile(self.encode, dynamic=False)
            short = min(self.batch - len(pixels), -len(pixels) % PADDED_TO)
            padded = torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])]) if short else pixels
            return self._fast(padded)[: len(pixels)]
        except (RuntimeError, SubprocessError, OSError) as error:
            if not _is_compile_error(error):
                raise
            problem = str(error).strip().splitlines()[0][:150]
            if self.compiled == "on":
                raise UserError(f"the towers do not compile here ({problem}); use --compile off") from error
            warnings.warn(f"the image tower runs uncompiled, as it does not compile here ({problem}); --compile off "
                          "does not try", stacklevel=2)
            self.compiled, self._fast = "off", None
            return self.encode(pixels)


def _is_compile_error(error: Exception) -> bool:
    """Return whether torch.compile failed, or Triton, which runs a C compiler only at the first launch."""
    if not isinstance(error, RuntimeError):
        return True  # the C compiler is missing, or lacks Python.h
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) or "C compiler" in str(error)


class OneShapeGraph:
    """`encode`, as a CUDA graph for the shape that comes GRAPH_AFTER times in a row; other shapes run eagerly.

    One launch replaces some 400 with Python between them, which leaves the main thread to the feed. The graph is used
    only if its features equal those of the eager pass to the bit.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self._shape, self._repeats, self._disabled = torch.Size(), 0, False
        self._pixels: Tensor | None = None  # the graph's input
        self._features: Tensor  # and its output
        self._replay: Callable[[], None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the features of pixels that lie on the device."""
        if self._pixels is not None and pixels.shape == self._shape:
            return self._replayed(pixels)
        features = self.encode(pixels)
        if self._pixels is None and not self._disabled:
            self._repeats = self._repeats + 1 if pixels.shape == self._shape else 1
            self._shape = pixels.shape
            if self._repeats >= GRAPH_AFTER:
                self._capture(pixels, features)
        return features

    def _replayed(self, pixels: Tensor) -> Tensor:
        assert self._pixels is not None
        self._pixels.copy_(pixels)
        self._replay()
        return self._features.clone()

    def _capture(self, pixels: Tensor, features: Tensor) -> None:
        """Record the kernels of `encode` for this shape and compare one replay with `features`."""
        self._disabled = True
        try:
            graph_input = pixels.clone()
            self._features, self._replay = capture(lambda: self.encode(graph_input))
            self._pixels = graph_input
            if self._replayed(pixels).equal(features):
                return
            problem = "replayed, it does something else"
        except RuntimeError as error:  # memory among them: the graph keeps its activations
            problem = f"it cannot be captured ({str(error.__context__ or error).strip().splitlines()[0][:150]})"
        self._pixels = None
        warnings.warn(f"no CUDA graph of the image tower: {problem}", stacklevel=2)


class DeviceClock:
    """Measures by CUDA events, for which the host never waits, in what share of the time the device encodes.

    `seen` is the number of inputs that were encoded before.
    """

    def __init__(self, seen: int = 0) -> None:
        self._seen, self._began, self._busy_ms = seen, time.monotonic(), 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Count the time of the kernels that are launched inside as busy."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._spans.append((start, end))
        while self._spans and self._spans[0][1].query():
            start, end = self._spans.pop(0)
            self._busy_ms += start.elapsed_time(end)

    def inputs_since(self, seen: int) -> int:
        """Return how many of the first `seen` inputs came since this clock was started."""
        return seen - self._seen

    def busy_share(self) -> float:
        """Return the busy share so far; batches that are not finished do not count yet."""
        return self._busy_ms / 1000 / max(1e-9, time.monotonic() - self._began)


class LazyEncoder:
    """An encoder that loads its tower on first use."""

    def __init__(self, make: Callable[[], BatchedEncoder]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._encoder: BatchedEncoder | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the features of all inputs, on the device."""
        with self._lock:  # several threads may have the first input
            self._encoder = self._encoder or self._make()
        return self._encoder(inputs)


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), CLIP's activation, equal to transformers' to the bit.

    On a CPU without autograd it works in place on a few rows at a time, which stay in the cache between its three
    passes; that saves 6 % of an image tower's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not x.is_contiguous():
            return x * torch.sigmoid(1.702 * x)
        for rows in x.view(-1, x.shape[-1]).split(32):
            rows.mul_(torch.sigmoid(1.702 * rows))
        return x


def use_quick_gelu(tower: nn.Module) -> None:
    """Replace transformers' QuickGELU by the one here, wherever a tower uses it."""
    from transformers.activations import QuickGELUActivation

    for module in tower.modules():
        if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
            module.activation_fn = QuickGelu()


def _apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return pixels, or every tensor of tokens, after `function`."""
    return function(inputs) if isinstance(inputs, Tensor) else map_tensors(inputs, function)
