"""Run frozen towers without autograd, in batches that fit into memory, compiled where that is worth it.

Dimension key: B batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Tokens, UserError, map_tensors

Inputs = Tensor | Tokens

CPU_BATCH = 32  # measured best: the activations of 64 exceed the caches, and are allocated anew each time
CPU_TITLES = 96  # batch of titles, likewise: a title has some 14 tokens where an image has 50
GPU_BATCH = 512  # enough to keep a GPU busy
PADDED_TO = 64  # compiled batches are padded to multiples of this, the batch of the cold pass
COMPILE_AFTER = 20_000  # inputs; below, a compilation of about a minute costs more than it saves


class BatchedEncoder:
    """Applies `encode` (Towers.image or Towers.text) to any number of inputs, pixels or tokens.

    `batch` inputs are encoded at a time; where a GPU runs out of memory, `batch` is halved from then on. `compiled` is
    auto, on or off: auto compiles on a GPU after COMPILE_AFTER inputs. Only inputs of one shape can be compiled, not
    titles.
    """

    def __init__(self, encode: Callable[[Any], Tensor], device: torch.device, precision: torch.dtype,
                 compiled: str = "off", cpu_batch: int | None = None) -> None:
        self.encode, self.device, self.precision, self.compiled = encode, device, precision, compiled
        self.batch = (cpu_batch or CPU_BATCH) if device.type == "cpu" else GPU_BATCH
        self._seen = 0
        self._fast: Callable[[Tensor], Tensor] | None = None

    def __call__(self, inputs: Inputs) -> Tensor:
        """Return the features of all inputs, on the device."""
        count = len(inputs) if isinstance(inputs, Tensor) else len(inputs[0])
        features: list[Tensor] = []
        low = 0
        while low < count or not features:
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
        moved = _apply(lambda tensor: tensor.to(self.device), part)
        with torch.no_grad(), torch.autocast(self.device.type, self.precision, enabled=self.precision.itemsize < 4):
            many = self.device.type == "cuda" and self._seen >= COMPILE_AFTER
            if isinstance(moved, Tensor) and (self.compiled == "on" or (self.compiled == "auto" and many)):
                return self._run_compiled(moved)
            return self.encode(moved)

    def _run_compiled(self, pixels: Tensor) -> Tensor:
        """Encode a padded batch, so that there are few shapes to compile: one for the batches of the cold pass."""
        try:
            self._fast = self._fast or torch.compile(self.encode, dynamic=False)
            short = min(self.batch - len(pixels), -len(pixels) % PADDED_TO)
            padded = torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])]) if short else pixels
            return self._fast(padded)[: len(pixels)]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(f"the towers do not compile here ({str(error).splitlines()[0]}); use --compile off"
                            ) from error


class LazyEncoder:
    """An encoder that is made, and its tower loaded, when there is something to encode."""

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


def use_quick_gelu(tower: Any) -> None:
    """Replace transformers' QuickGELU by the one here, in a tower that uses it."""
    if tower.config.hidden_act == "quick_gelu":
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = QuickGelu()


def _apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    return function(inputs) if isinstance(inputs, Tensor) else map_tensors(inputs, function)
