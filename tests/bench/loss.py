"""P8: the loss in chunks against the whole matrix at once: time and peak memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.loss import Candidates, Objective

from .harness import Arm, Bench, Figure, Race


@dataclass(frozen=True)
class LargeBatch:
    """Embeddings of `rows` images [G, E] and of their titles, then negatives [C, E], and both ways to the loss."""

    image_GE: Tensor
    title_CE: Tensor

    @classmethod
    def random(cls, rows: int) -> LargeBatch:
        """Unit vectors of 512 numbers."""
        generator = torch.Generator().manual_seed(0)
        image_GE, title_CE = (F.normalize(torch.randn(count, 512, generator=generator), dim=-1).requires_grad_()
                              for count in (rows, 2 * rows))
        return cls(image_GE, title_CE)

    def chunked(self) -> None:
        """The product's loss, forward and backward."""
        rows = len(self.image_GE)
        ids_G = torch.arange(rows)
        image_id_C = torch.cat([ids_G, torch.full_like(ids_G, -1)])
        candidates = Candidates(self.title_CE, torch.arange(2 * rows), image_id_C)
        Objective()(self.image_GE, candidates, torch.tensor(20.0), 0, rows).backward()

    def whole(self) -> None:
        """The same by cross entropy over the full matrix."""
        F.cross_entropy(20.0 * (self.image_GE @ self.title_CE.T), torch.arange(len(self.image_GE))).backward()


def large_batch(bench: Bench) -> None:
    """P8: forward and backward of the loss at a large batch, with negatives."""
    rows = 2048 if bench.quick else 8192
    batch = LargeBatch.random(rows)
    ours, other = peak_bytes(batch.chunked), peak_bytes(batch.whole)
    bench.add(Figure("P8", f"loss at batch {rows:,}: peak memory against the whole matrix", "<= 0.125", [ours / other],
                     f"{ours / 2**20:,.0f} MiB", f"{other / 2**20:,.0f} MiB"))
    bench.race(Race("P8", f"loss at batch {rows:,}, forward and backward: times faster", ">= 1", batch.chunked,
                    batch.whole, rounds=3))


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
