"""What a run says: on-device meters, steps.jsonl, evaluations.jsonl, TensorBoard, one live console line. Rank 0 writes.

Nothing here waits for the device except `flush` and `metrics`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from data.files import read_regular
from engine.ranks.world import World
from engine.run_folder.board import TensorBoardWriter, WeightDrift, memory

Metrics = Mapping[str, Mapping[str, Any]]  # split -> name -> value or [lo, hi]
HEADLINE = {"image_to_text_R@1": "R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
            "image_to_text_median_rank": "median rank", "triplet_accuracy": "triplet"}


class Log:
    """Collects steps on the device and writes them out at every flush.

    `recipe` are the settings worth comparing runs by; `base` are the base model's metrics if this run, resumed, has
    measured them before.
    """

    def __init__(self, folder: Path, world: World, steps_per_epoch: int, steps: int, first_step: int,
                 drift: WeightDrift, recipe: Mapping[str, Any] | None = None, base: Metrics | None = None) -> None:
        self.world, self.steps_per_epoch = world, steps_per_epoch
        self._pending: list[tuple[int, Tensor, Tensor, float, int]] = []
        self._clock, self._waited, self._recall = time.perf_counter(), 0.0, ""
        self._began = self._clock
        self._whole = dict.fromkeys(("waiting for data", "evaluate", "checkpoint"), 0.0)
        self._base, self._drift, self._recipe, self.steps = base or {}, drift, recipe or {}, steps
        self._files = [_carry_on(folder / name, first_step) for name in ("steps.jsonl", "evaluations.jsonl")
                       if world.is_main]
        self.board = TensorBoardWriter(folder / "tensorboard" if world.is_main else None, first_step, steps)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Times the wait for data apart from the step."""
        start = time.perf_counter()
        with record_function("load"):
            yield
        self._waited += time.perf_counter() - start
        self._whole["waiting for data"] += time.perf_counter() - start

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What is not a step (evaluation, saving): named in the trace, and the clock of the steps stands still."""
        start = time.perf_counter()
        with record_function(name):
            yield
        self._clock += time.perf_counter() - start
        self._whole[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Where the time since the beginning went; the steps are what is left."""
        rest = time.perf_counter() - self._began - sum(self._whole.values())
        return {"steps": rest, **self._whole}

    def spent(self, what: str, seconds: Mapping[str, float]) -> None:
        """Say where the time of `what` went, and show it in TensorBoard."""
        whole = sum(seconds.values()) or 1.0
        shares = {name: value / whole for name, value in sorted(seconds.items(), key=lambda pair: -pair[1])}
        self.world.say(f"time of {what}, {whole:.3g} s:  " + "  ".join(f"{k} {v:.0%}" for k, v in shares.items()))
        self.board.scalars({f"profile/{what}: {name}": share for name, share in shares.items()}, 0)

    def say(self, text: str) -> None:
        """One line for people."""
        self.world.say(text)

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
        if self.world.is_main:
            self._write(values[0], values[1])
            self._tell(values[0][-1], seconds, total_steps)
        self._pending.clear()
        self._clock, self._waited = time.perf_counter(), 0.0
        return values[1]

    def _write(self, losses: list[float], norms: list[float]) -> None:
        for (step, _, _, lr, rows), loss, norm in zip(self._pending, losses, norms, strict=True):
            line = {"step": step, "epoch": self._epoch(step), "loss": loss, "lr": lr, "grad_norm": norm, "rows": rows}
            self._files[0].write(json.dumps(line) + "\n")
            if self.board.due("steps", step):
                self.board.scalars({"fit/loss": loss, "fit/lr": lr, "fit/grad_norm": norm}, step)
        self._files[0].flush()

    def _tell(self, loss: float, seconds: float, total_steps: int) -> None:
        """How fast it goes, to TensorBoard and the console; the last line stays on the screen."""
        step, pairs = self._pending[-1][0], sum(entry[4] for entry in self._pending)
        speed, wait = pairs / seconds, self._waited / seconds
        if self.board.due("speed", step):
            self.board.scalars({"machine/pairs_per_second": speed, "machine/data_wait_share": wait,
                                **memory(self.world.device)}, step)
        eta = (total_steps - step) * seconds / len(self._pending)
        tell = self.world.say if step == total_steps else self.world.live
        tell(f"step {step}/{total_steps}  epoch {step / self.steps_per_epoch:.2f}  loss {loss:.4f}{self._recall}  "
             f"lr {self._pending[-1][3]:.2e}  {speed:,.0f} pairs/s  wait {wait:.0%}  eta {_duration(eta)}")

    def metrics(self, scores: Metrics, step: int) -> None:
        """Write an evaluation; the one at step 0 is the base model's, the reference of all later ones."""
        if step == 0:
            self._base = scores
        if self.world.is_main:
            plain = {split: {name: value for name, value in values.items() if isinstance(value, float)}
                     for split, values in scores.items()}  # without counts, intervals and `collapsed`
            drift = self._drift()
            line = {"step": step, "epoch": self._epoch(step), **plain}
            self._files[1].write(json.dumps(line) + "\n")
            self._files[1].flush()
            self.board.metrics(plain, self._base, step)
            if self.board.due("drift", step):
                self.board.scalars(drift, step)
            if step in (0, self.steps):
                self.board.hparams(self._recipe, list(scores), done=step > 0)
            self.board.flush()
        for split, values in scores.items():
            self.world.say(f"{'base' if step == 0 else f'step {step}'}  {split}:  " + _headline(values))
        split = "valid" if "valid" in scores else next(iter(scores))
        self._recall = f"  {split} R@10 {scores[split]['image_to_text_R@10']:.3f}"

    def _epoch(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 6)

    def curve(self, name: str, points: Sequence[Mapping[str, Any]]) -> None:
        """Write what is no time series: `alpha` of each point, in hundredths, takes the place of the step."""
        for point in points if self.world.is_main else ():
            for split in point.keys() - {"alpha"}:
                found = {f"{name}/{split}/{metric}": value for metric, value in point[split].items()}
                self.board.scalars(found, round(100 * point["alpha"]))

    def close(self) -> None:
        """Flush and close the files; nothing half-written stays on the screen."""
        self.world.live("")
        for file in self._files:
            file.close()
        self.board.close()


class Silent(Log):
    """A log that says and keeps nothing."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Not timed."""
        yield

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Not timed."""
        yield

    def say(self, text: str) -> None:
        """Unsaid."""

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        """Forgotten."""

    def flush(self, total_steps: int) -> list[float]:
        """Nothing to write."""
        return []


def _headline(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{short} {values[name]:.3g}" for name, short in HEADLINE.items() if name in values)


def _duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 7:05, 3:07:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _carry_on(path: Path, first_step: int) -> Any:
    """Open a file of one line a step for appending, without those after `first_step` (a torn last one included)."""
    kept = []
    if first_step and path.exists():
        for line in read_regular(path).decode("utf-8", "replace").splitlines():
            try:
                if json.loads(line)["step"] <= first_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")
