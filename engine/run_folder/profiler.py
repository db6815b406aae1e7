"""The trace of a few steps that --profile writes; without the flag, the profiler is a null object."""

from __future__ import annotations

import json
import time
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from data.batch import UserError
from engine.config.settings import profiled_steps
from engine.run_folder.log import Log

REGIONS = ("load", "towers", "project", "loss", "backward", "optim", "graph")  # names of record_function in a step

SKIPPED, RECORDED = 2, 4  # steps by default: the first is start-up, the second warms the profiler up
MAX_ALLOCATIONS = 100_000  # the newest, in a memory snapshot
MAX_NESTING = 2  # towers within project
NOWHERE = nullcontext()

Event = Mapping[str, Any]  # of a trace, in the Chrome trace format


class Profiler:
    """The null object: profiling is off."""

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        return None

    def region(self, name: str) -> AbstractContextManager[object]:
        """Return a null context; `record_function` would cost 10 us even when nothing is recorded."""
        return NOWHERE

    def step(self) -> None:
        """Do nothing."""


class Trace(Profiler):
    """Records steps and writes `FOLDER/rank0.*.pt.trace.json` for TensorBoard's trace viewer or Perfetto.

    `skipped` steps come before them. In detail, the trace also has Python stacks, shapes and memory, and on a GPU
    `FOLDER/rank0.*.memory.pickle` shows every allocation at pytorch.org/memory_viz. Prints the time of each region in
    these steps, and at the end what the time of the whole run was spent on.
    """

    def __init__(self, prefix: Path, log: Log, skipped: int, steps: int, detailed: bool) -> None:
        self._prefix, self._log, self._skipped, self._steps = prefix, log, skipped, steps
        self._memory = MemoryHistory() if detailed and torch.cuda.is_available() else None
        self._taken = 0
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that without a step before them nothing warms up
            plan = schedule(wait=max(0, skipped - 1), warmup=min(1, skipped), active=steps, repeat=1)
        self._profile = profile(activities=kinds, schedule=plan, on_trace_ready=self._on_trace_ready,
                                with_stack=detailed, profile_memory=detailed, record_shapes=detailed)

    def _on_trace_ready(self, trace: profile) -> None:
        self._prefix.parent.mkdir(parents=True, exist_ok=True)
        path = self._prefix.with_name(f"{self._prefix.name}.pt.trace.json")
        trace.export_chrome_trace(str(path))
        if self._log.world.is_main:
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
            kernels = kernel_seconds(events)
            self._log.report_time(f"{'kernels in ' if kernels else ''}{self._taken - self._skipped} recorded steps",
                                  kernels or host_seconds(events))

    def _record_memory(self, is_over: bool = False) -> None:
        """Start and end the history of the GPU's allocations with the recorded steps."""
        if self._memory is None:
            return
        if self._taken == self._skipped and not is_over:
            self._memory.start()
        if self._taken == self._skipped + self._steps or is_over:
            self._memory.write(self._prefix.with_name(f"{self._prefix.name}.memory.pickle"))

    def __enter__(self) -> Profiler:
        self._profile.__enter__()
        self._record_memory()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._record_memory(is_over=True)
        self._profile.__exit__(kind, error, trace)
        if (recorded := max(0, self._taken - self._skipped)) < self._steps:
            self._log.say(f"--profile: the run ended when {recorded} of the {self._steps} steps were recorded")
        self._log.report_time("the run", self._log.seconds())

    def region(self, name: str) -> AbstractContextManager[object]:
        """Return a context that names a part of the step in the trace."""
        return record_function(name)

    def step(self) -> None:
        """Advance the schedule by one step."""
        self._taken += 1
        self._profile.step()
        self._record_memory()


class MemoryHistory:
    """Every allocation on the GPU, with its stack, between `start` and `write`."""

    def __init__(self) -> None:
        self._is_on = False

    def start(self) -> None:
        """Begin."""
        torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS)
        self._is_on = True

    def write(self, path: Path) -> None:
        """Write the snapshot and end; nothing where nothing began."""
        if self._is_on:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._is_on = False


def host_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Return the host's seconds in each region of a trace; the towers run within `project`, which is without them."""
    microseconds: dict[str, float] = {}
    for region in _regions(events):
        microseconds[region["name"]] = microseconds.get(region["name"], 0.0) + region["dur"]
    if "towers" in microseconds:
        microseconds["project"] = microseconds.get("project", 0.0) - microseconds["towers"]
    return {name: microseconds[name] / 1e6 for name in REGIONS if name in microseconds}


def kernel_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Return the seconds of the GPU's kernels by the region in which the host launched them, {} without any.

    Autograd launches those of `backward` from a thread of its own, so a kernel belongs to the innermost region of the
    time of its launch, whichever thread that was.
    """
    regions = sorted(_regions(events), key=lambda region: region["ts"])
    starts = [region["ts"] for region in regions]
    launched_at = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched_at[event.get("args", {}).get("correlation")] = event["ts"]
    microseconds: dict[str, float] = {}
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch, name = launched_at.get(event.get("args", {}).get("correlation"), -1.0), "other"
        latest = bisect_right(starts, launch) - 1
        for region in regions[max(0, latest - MAX_NESTING + 1) : latest + 1]:  # an inner one comes last
            name = region["name"] if launch <= region["ts"] + region["dur"] else name
        microseconds[name] = microseconds.get(name, 0.0) + event["dur"]
    return {name: microseconds[name] / 1e6 for name in (*REGIONS, "other") if name in microseconds}


def _regions(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") == "user_annotation" and event["name"] in REGIONS]


def require_profiled_steps(text: str, steps: int) -> None:
    """Raise UserError where --profile names steps that a run of `steps` steps does not have."""
    named = profiled_steps(text)
    if named and named.stop > steps:
        raise UserError(f"--profile {text}: the run has {steps:,} steps; name some of 0:{steps}")


def profiler(text: str, step: int, run: Path, rank: int, log: Log) -> Profiler:
    """Return a Trace of the steps that --profile asks for in a run that goes on after `step`, else the null object."""
    if text == "off":
        return Profiler()
    named = profiled_steps(text)
    if named and named.stop <= step:
        log.say(f"--profile {text}: the run goes on after step {step}, so these steps are not recorded")
        return Profiler()
    prefix = run / "profile" / f"rank{rank}.{time.time_ns() // 1_000_000}"
    if named is None:
        return Trace(prefix, log, SKIPPED, RECORDED, detailed=False)
    first = max(named.start, step)
    return Trace(prefix, log, first - step, named.stop - first, detailed=True)
