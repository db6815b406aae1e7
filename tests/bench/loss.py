"""P8: the loss in chunks against the whole matrix at once: time and peak memory."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.loss import Candidates, Objective

from .harness import Arm, Bench, Figure, Race


def large_batch(bench: Bench) -> None:
    """P8: forward and backward of the loss at a large batch, with negatives."""
    rows, generator = 2048 if bench.quick else 8192, torch.Generator().manual_seed(0)
    image_GE, text_CE = (F.normalize(torch.randn(count, 512, generator=generator), dim=-1).requires_grad_()
                         for count in (rows, 2 * rows))
    ours, whole = partial(chunked_loss, image_GE, text_CE), partial(whole_loss, image_GE, text_CE)
    peak, other = peak_bytes(ours), peak_bytes(whole)
    bench.add(Figure("P8", f"loss at batch {rows:,}: peak memory against the whole matrix", "<= 0.125", [peak / other],
                     f"{peak / 2**20:,.0f} MiB", f"{other / 2**20:,.0f} MiB"))
    bench.race(Race("P8", f"loss at batch {rows:,}, forward and backward: times faster", ">= 1", ours, whole, rounds=3))


def chunked_loss(image_GE: Tensor, text_CE: Tensor) -> None:
    """The product's loss over titles, then negatives, forward and backward."""
    rows = len(image_GE)
    ids_G = torch.arange(rows)
    candidates = Candidates(text_CE, torch.arange(len(text_CE)), torch.cat([ids_G, torch.full_like(ids_G, -1)]))
    (Objective().sum_over_rows(image_GE, candidates, torch.tensor(20.0), 0) / rows).backward()


def whole_loss(image_GE: Tensor, text_CE: Tensor) -> None:
    """The same by cross entropy over the full matrix."""
    F.cross_entropy(20.0 * (image_GE @ text_CE.T), torch.arange(len(image_GE))).backward()


def peak_bytes(arm: Arm) -> int:
    """How far the resident memory of this process rises during a call (Linux keeps the mark)."""
    arm()  # what it allocates once
    ctypes.CDLL(None).malloc_trim(0)  # or what that freed, kept by the allocator, would hide what comes
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of_process("VmRSS")
    arm()
    return memory_of_process("VmHWM") - before


def memory_of_process(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
