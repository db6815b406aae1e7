"""How frozen towers run: without autograd, in batches that fit, compiled where that pays.

Dimension key: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import UserError, map_tensors

CPU_BATCH = 32  # measured best: what 64 leave between two layers is past the caches, and allocated anew each time
CPU_TITLES = 96  # of titles likewise: one has some 14 tokens where an image has 50
GPU_BATCH = 512  # a GPU is busy from here on
FILLED = 64  # compiled lots are filled up to multiples of this, which is what the cold pass hands over at once
COMPILE_AFTER = 20_000  # inputs: sooner a compilation, about a minute, costs more than it saves


class BatchedEncoder:
    """`encode` (Towers.image or Towers.text) as a function of any number of inputs, a tensor or a tuple of them.

    `batch` inputs go through at a time; where a GPU has no room for them, it is halved for good. `compiled` is auto, on
    or off: auto compiles on a GPU once COMPILE_AFTER inputs have come. It is for inputs of one shape, not for titles.
    """

    def __init__(self, encode: Callable[[Any], Tensor], device: torch.device, precision: torch.dtype,
                 compiled: str = "off", cpu_batch: int | None = None) -> None:
        self.encode, self.device, self.precision, self.compiled = encode, device, precision, compiled
        self.batch = (cpu_batch or CPU_BATCH) if device.type == "cpu" else GPU_BATCH
        self._seen = 0
        self._fast: Callable[[Any], Tensor] | None = None

    def __call__(self, inputs: Any) -> Tensor:
        """Features of all inputs, on the device."""
        count = len(inputs) if isinstance(inputs, Tensor) else len(inputs[0])
        done: list[Tensor] = []
        low = 0
        while low < count or not done:
            part = _slice(inputs, low, low + self.batch)
            try:
                done.append(self._run(part))
            except torch.OutOfMemoryError as error:
                if self.batch == 1:
                    raise UserError("the device has no room for one input of the towers; use --device cpu or a smaller "
                                    "--model") from error
                self.batch = max(1, min(self.batch, count - low) // 2)
                torch.cuda.empty_cache()
                continue
            low += self.batch
        self._seen += count
        return done[0] if len(done) == 1 else torch.cat(done)

    def _run(self, part: Any) -> Tensor:
        moved = part.to(self.device) if isinstance(part, Tensor) else map_tensors(part, lambda one: one.to(self.device))
        with torch.no_grad(), torch.autocast(self.device.type, self.precision, enabled=self.precision.itemsize < 4):
            if self.compiled == "on" or (self.compiled == "auto" and self.device.type == "cuda"
                                         and self._seen >= COMPILE_AFTER):
                return self._run_compiled(moved)
            return self.encode(moved)

    def _run_compiled(self, pixels: Tensor) -> Tensor:
        """Short lots are filled up, so that there are few shapes to compile for: one for the lots of the cold pass."""
        try:
            self._fast = self._fast or torch.compile(self.encode, dynamic=False)
            short = min(self.batch - len(pixels), -len(pixels) % FILLED)
            whole = torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])]) if short else pixels
            return self._fast(whole)[: len(pixels)]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise UserError(f"the towers do not compile here ({str(error).splitlines()[0]}); use --compile off"
                            ) from error


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), CLIP's activation, to the bit as transformers has it.

    Where nothing trains on a CPU it works in place on a few rows at a time, which then stay in the cache between its
    three passes: 6 % of an image tower's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not x.is_contiguous():
            return x * torch.sigmoid(1.702 * x)
        for rows in x.view(-1, x.shape[-1]).split(32):
            rows.mul_(torch.sigmoid(1.702 * rows))
        return x


def use_quick_gelu(tower: Any) -> None:
    """Put QuickGelu in place of transformers' own, where a tower has that."""
    if tower.config.hidden_act == "quick_gelu":
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = QuickGelu()


def _slice(inputs: Any, low: int, high: int) -> Any:
    return inputs[low:high] if isinstance(inputs, Tensor) else map_tensors(inputs, lambda one: one[low:high])
