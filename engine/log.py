"""What a run says: on-device meters, steps.jsonl, TensorBoard, one console line a flush. Rank 0 writes.

Nothing here waits for the device except `flush`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from engine.dist import World

Metrics = Mapping[str, Mapping[str, Any]]  # split -> name -> value or [lo, hi]


class Log:
    """Collects steps on the device and writes them out at every flush."""

    def __init__(self, folder: Path, world: World, steps_per_epoch: int, first_step: int = 0) -> None:
        self.world, self.steps_per_epoch = world, steps_per_epoch
        self._pending: list[tuple[int, Tensor, Tensor, float, int]] = []
        self._clock, self._waited = time.perf_counter(), 0.0
        self._file, self._writer = None, None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._file = _carry_on(folder / "steps.jsonl", first_step)
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for data apart from the step."""
        start = time.perf_counter()
        with record_function("load"):
            yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What is not a step (evaluation, saving): named in the trace, and the clock of the steps stands still."""
        start = time.perf_counter()
        with record_function(name):
            yield
        self._clock += time.perf_counter() - start

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        """Remember one step; `loss` is this rank's part, both tensors stay on the device."""
        self._pending.append((step, loss, grad_norm, lr, rows))

    def flush(self, total_steps: int) -> list[float]:
        """Sum the losses over ranks, fetch everything in one copy, write it; the gradient norms since the last one."""
        if not self._pending:
            return []
        losses = self.world.sum(torch.stack([entry[1] for entry in self._pending]))
        norms = torch.stack([entry[2] for entry in self._pending])
        values = torch.stack([losses, norms]).tolist()
        seconds = time.perf_counter() - self._clock
        if self._file is not None and self._writer is not None:
            self._write(values[0], values[1], seconds, total_steps)
        self._pending.clear()
        self._clock, self._waited = time.perf_counter(), 0.0
        return values[1]

    def _write(self, losses: list[float], norms: list[float], seconds: float, total_steps: int) -> None:
        assert self._file is not None and self._writer is not None
        for (step, _, _, lr, rows), loss, norm in zip(self._pending, losses, norms, strict=True):
            epoch = step / self.steps_per_epoch
            line = {"step": step, "epoch": round(epoch, 6), "loss": loss, "lr": lr, "grad_norm": norm, "rows": rows}
            self._file.write(json.dumps(line) + "\n")
            for name, value in (("loss", loss), ("lr", lr), ("grad_norm", norm)):
                self._writer.add_scalar(f"train/{name}", value, step)
        self._file.flush()
        step, pairs = self._pending[-1][0], sum(entry[4] for entry in self._pending)
        speed, wait = pairs / seconds, self._waited / seconds
        self._writer.add_scalar("speed/pairs_per_second", speed, step)
        self._writer.add_scalar("speed/data_wait_share", wait, step)
        eta = (total_steps - step) * seconds / len(self._pending)
        self.world.say(f"step {step}/{total_steps}  epoch {step / self.steps_per_epoch:.2f}  loss {losses[-1]:.4f}  "
                       f"lr {self._pending[-1][3]:.2e}  {speed:,.0f} pairs/s  wait {wait:.0%}  eta {eta:,.0f} s")

    def metrics(self, scores: Metrics, step: int) -> None:
        """Write an evaluation: one scalar a metric and split."""
        if self._writer is not None:
            for split, values in scores.items():
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._writer.add_scalar(f"{split}/{name}", value, step)
            self._writer.flush()
        for split, values in scores.items():
            self.world.say(f"{'base' if step == 0 else f'step {step}'}  {split}:  " + _headline(values))

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _headline(values: Mapping[str, Any]) -> str:
    wanted = {"image_to_text_R@1": "R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
              "image_to_text_median_rank": "median rank", "triplet_accuracy": "triplet"}
    return "  ".join(f"{short} {values[name]:.3g}" for name, short in wanted.items() if name in values)


def _carry_on(path: Path, first_step: int) -> Any:
    """Open steps.jsonl for appending, without the lines after `first_step` (a torn last line included)."""
    kept = []
    if first_step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
