"""The log of a run: steps.jsonl, evaluations.jsonl, TensorBoard, one progress line on the console. Rank 0 writes.

Nothing here waits for the device except `metrics` and, where everything has to be on the disk, `flush`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.profiler import record_function

from data.files import keep_lines
from data.reading import parse_json, read_text
from engine.optim import Plan
from engine.ranks.world import World
from engine.run_folder.board import Metrics, TensorBoardWriter, WeightDrift, memory
from engine.run_folder.checkpoint import State

HEADLINE = {"image_to_text_R@1": "R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
            "image_to_text_median_rank": "median rank", "triplet_accuracy": "triplet"}


class LoggedStep(NamedTuple):
    """A step that the next flush writes."""

    step: int
    loss: Tensor  # this rank's part, on the device
    grad_norm: Tensor  # on the device
    lr: float
    rows: int


class Flush(NamedTuple):
    """Steps whose values are on the way to the host."""

    steps: list[LoggedStep]
    values: Tensor  # losses of all ranks and gradient norms [2, steps], on the host
    arrived: torch.cuda.Event | None  # when they are there; None: now
    seconds: float  # that the steps took
    waited: float  # of these, for data


class Reference(NamedTuple):
    """The settings and metrics that TensorBoard compares a run by."""

    recipe: Mapping[str, object]
    base: Metrics  # of the base model; {} until step 0 is evaluated


NO_REFERENCE = Reference({}, {})


class Log:
    """Collects steps on the device and writes them out at every flush.

    `state` is that of the checkpoint resumed from; later lines of an earlier process are cut off.
    """

    def __init__(self, folder: Path, world: World, plan: Plan, state: State, drift: WeightDrift,
                 reference: Reference = NO_REFERENCE) -> None:
        self.world, self.plan = world, plan
        self._pending: list[LoggedStep] = []
        self._copying: deque[Flush] = deque()
        self._began = time.perf_counter()
        self.written = state.step  # the last step whose values are in the files of rank 0
        self._flushed_at = self._began  # later by the time spent on evaluations and checkpoints since
        self._waited = 0.0  # for data since the last flush
        self._recall = ""  # part of the progress line: R@10 of the last evaluation
        self._seconds = dict.fromkeys(("waiting for data", "evaluate", "checkpoint"), 0.0)
        self._drift, self._recipe, self._base = drift, reference.recipe, reference.base
        self._files: list[TextIO] = []
        self._known: set[str] = set()  # lines of evaluations.jsonl
        if world.is_main:
            last_evaluation = state.evaluated if state.step else -1  # a run begins with the evaluation of step 0
            steps, evaluations = LogFile(folder / "steps.jsonl", ascending=True), LogFile(folder / "evaluations.jsonl")
            self._files = [steps.open(state.step, _is_step), evaluations.open(last_evaluation, _is_evaluation)]
            self._known = {*read_text(evaluations.path).splitlines()}
            if steps.count < state.step:
                world.warn(f"{steps.path} was damaged: it lacks {state.step - steps.count:,} of {state.step:,} steps, "
                           "which are not trained again")
            if evaluations.damaged or not evaluations.count and last_evaluation >= 0:
                world.warn(f"{evaluations.path} was damaged: {evaluations.count:,} evaluations of it are left")
        self.board = TensorBoardWriter(folder / "tensorboard" if world.is_main else None, state.step, plan.steps,
                                       world.warn)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait for data apart from the step."""
        start = time.perf_counter()
        with record_function("load"):
            yield
        seconds = time.perf_counter() - start
        self._waited += seconds
        self._seconds["waiting for data"] += seconds

    @contextmanager
    def pause_step_clock(self, name: str) -> Iterator[None]:
        """Leave an evaluation or a checkpoint out of the pairs per second; `name` is its region in the trace."""
        start = time.perf_counter()
        with record_function(name):
            yield
        seconds = time.perf_counter() - start
        self._flushed_at += seconds
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Return the seconds since the log was opened, by what they were spent on; the rest are steps."""
        rest = time.perf_counter() - self._began - sum(self._seconds.values())
        return {"steps": rest, **self._seconds}

    def report_time(self, period: str, seconds: Mapping[str, float]) -> None:
        """Print the shares of the time of `period`, largest first, and write them to TensorBoard."""
        total = sum(seconds.values()) or 1.0
        text = ""
        for name in sorted(seconds, key=seconds.__getitem__, reverse=True):
            share = seconds[name] / total
            text += f"  {name} {share:.0%}"
            self.board.scalars({f"profile/{period}: {name}": share}, 0)
        self.world.say(f"time of {period}, {total:.3g} s:{text}")

    def say(self, text: str) -> None:
        """Print one line."""
        self.world.say(text)

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        """Keep one step until the next flush; `loss` is this rank's part, both tensors stay on the device."""
        self._pending.append(LoggedStep(step, loss, grad_norm, lr, rows))

    def flush(self, wait: bool = False) -> dict[int, float]:
        """Write steps; return their gradient norms by step.

        From a GPU values are copied without a wait: each flush starts a copy and writes the steps of the one before.
        With `wait` it also writes its own.
        """
        if self._pending:
            self._copying.append(self._start_copy())
        norms: dict[int, float] = {}
        while self._copying and (wait or len(self._copying) > 1 or self._copying[0].arrived is None):
            norms |= self._write(self._copying.popleft())
        self._flushed_at, self._waited = time.perf_counter(), 0.0
        return norms

    def _start_copy(self) -> Flush:
        """Sum the losses over ranks and start copying all values to the host."""
        steps, self._pending = self._pending, []
        losses = self.world.sum(torch.stack([entry.loss for entry in steps]))
        values = torch.stack([losses, torch.stack([entry.grad_norm for entry in steps])])
        seconds = time.perf_counter() - self._flushed_at
        if values.device.type != "cuda":
            return Flush(steps, values.cpu(), None, seconds, self._waited)
        # Only a copy into pinned memory runs beside the host; one into pageable memory would wait for the device.
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Flush(steps, on_host, arrived, seconds, self._waited)

    def _write(self, flush: Flush) -> dict[int, float]:
        """Write the steps of a flush, on rank 0; return their gradient norms by step."""
        if flush.arrived is not None:
            flush.arrived.synchronize()
        losses, norms = flush.values.tolist()
        if self.world.is_main:
            self._write_steps(flush.steps, losses, norms)
            self._report_progress(flush, losses[-1])
        self.written = flush.steps[-1].step
        return dict(zip((entry.step for entry in flush.steps), norms, strict=True))

    def _write_steps(self, steps: Sequence[LoggedStep], losses: list[float], norms: list[float]) -> None:
        text = ""
        for entry, loss, norm in zip(steps, losses, norms, strict=True):
            line = {"step": entry.step, "epoch": self._epoch(entry.step), "loss": loss, "lr": entry.lr,
                    "grad_norm": norm, "rows": entry.rows}
            text += json.dumps(line) + "\n"
        self._files[0].write(text)
        self._files[0].flush()
        self.written = steps[-1].step
        for entry, loss, norm in zip(steps, losses, norms, strict=True):
            if self.board.due("steps", entry.step):
                self.board.scalars({"fit/loss": loss, "fit/lr": entry.lr, "fit/grad_norm": norm}, entry.step)

    def _report_progress(self, flush: Flush, loss: float) -> None:
        """Write speed and memory to TensorBoard, and the progress line; that of the last step stays on the terminal."""
        step, lr = flush.steps[-1].step, flush.steps[-1].lr
        pairs = sum(entry.rows for entry in flush.steps)
        speed, wait = pairs / flush.seconds, flush.waited / flush.seconds
        if self.board.due("speed", step):
            self.board.scalars({"machine/pairs_per_second": speed, "machine/data_wait_share": wait,
                                **memory(self.world.device)}, step)
        eta = (self.plan.steps - step) * flush.seconds / len(flush.steps)
        show = self.world.say if step == self.plan.steps else self.world.live
        epoch = step / self.plan.steps_per_epoch
        show(f"step {step}/{self.plan.steps}  epoch {epoch:.2f}  loss {loss:.4f}{self._recall}  "
             f"lr {lr:.2e}  {speed:,.0f} pairs/s  wait {wait:.0%}  eta {_duration(eta)}")

    def metrics(self, scores: Metrics, step: int) -> None:
        """Write an evaluation; that of step 0 is the base model's, which TensorBoard shows beside all later ones."""
        if step == 0:
            self._base = scores
        if self.world.is_main:
            plain = {split: _floats(values) for split, values in scores.items()}
            drift = self._drift()
            line = {"step": step, "epoch": self._epoch(step), **plain}
            text = json.dumps(line)
            # A run that was killed after its last step measures that step again, and may have written the line before.
            if text not in self._known:
                self._files[1].write(text + "\n")
                self._files[1].flush()
            self.board.metrics(plain, self._base, step)
            if self.board.due("drift", step):
                self.board.scalars(drift, step)
            if step in (0, self.plan.steps):
                self.board.hparams(self._recipe, list(scores), done=step > 0)
            self.board.flush()
        model = f"step {step}" if step else "base"
        for split, values in scores.items():
            headline = [f"{short} {values[name]:.3g}" for name, short in HEADLINE.items() if name in values]
            self.world.say(f"{model}  {split}:  " + "  ".join(headline))
        split = "valid" if "valid" in scores else next(iter(scores))
        self._recall = f"  {split} R@10 {scores[split]['image_to_text_R@10']:.3f}"

    def _epoch(self, step: int) -> float:
        return round(step / self.plan.steps_per_epoch, 6)

    def curve(self, name: str, points: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics over alpha to TensorBoard; 100 * alpha takes the place of the step."""
        if not self.world.is_main:
            return
        for point in points:
            for split in point.keys() - {"alpha"}:
                scores = {f"{name}/{split}/{metric}": value for metric, value in _floats(point[split]).items()}
                self.board.scalars(scores, round(100 * point["alpha"]))

    def close(self) -> None:
        """Write what is on the way to the host, close the files, and erase the progress line."""
        with suppress(RuntimeError):  # a GPU has failed: the error of the step ends the run, not that of this copy
            while self._copying:
                self._write(self._copying.popleft())
        self.world.live("")
        for file in self._files:
            file.close()
        self.board.close()


class NullLog(Log):
    """The null object: nothing is printed or kept."""

    def __init__(self) -> None:
        pass

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Do not time it."""
        yield

    @contextmanager
    def pause_step_clock(self, name: str) -> Iterator[None]:
        """Do not time it."""
        yield

    def say(self, text: str) -> None:
        """Print nothing."""

    def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
        """Keep nothing."""

    def flush(self, wait: bool = False) -> dict[int, float]:
        """Write nothing; return no gradient norms."""
        return {}


def _floats(values: Mapping[str, object]) -> dict[str, float]:
    """Return the metrics without counts, intervals and `collapsed`."""
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _duration(seconds: float) -> str:
    """Format seconds as 42 s, 7:05 or 3:07:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class LogFile:
    """A file with one JSON object a line, each with its step; a resumed run goes on with it."""

    def __init__(self, path: Path, ascending: bool = False) -> None:
        self.path, self.ascending = path, ascending  # ascending: each line is of a later step than the one before
        self.count = 0  # lines kept by `open`
        self.damaged = 0  # lines that could not be read or were out of order

    def open(self, last_step: int, is_whole: Callable[[Mapping[str, Any]], bool]) -> TextIO:
        """Open it for appending, without damaged or misplaced lines and without those behind that of `last_step`.

        A line behind it may be of an earlier step: the evaluation of the best weights at the end of a run.
        """
        is_over, before = False, -1

        def is_kept(text: str) -> bool:
            nonlocal is_over, before
            try:
                line = parse_json(text)
                if not is_whole(line) or (self.ascending and line["step"] <= before and not is_over):
                    raise ValueError(text)
            except (ValueError, KeyError, TypeError, AttributeError):
                self.damaged += not is_over
                return False
            before = line["step"]
            is_over = is_over or before > last_step
            self.count += not is_over
            return not is_over

        keep_lines(self.path, is_kept)
        return self.path.open("a", encoding="utf-8")


def _is_step(line: Mapping[str, Any]) -> bool:
    """Return whether it is a line of steps.jsonl."""
    return isinstance(line["step"], int) and isinstance(line["loss"], (int, float)) and isinstance(line["rows"], int)


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    """Return whether it is a line of evaluations.jsonl."""
    splits = line.keys() - {"step", "epoch"}
    return isinstance(line["step"], int) and bool(splits) and all(isinstance(line[name], dict) for name in splits)
