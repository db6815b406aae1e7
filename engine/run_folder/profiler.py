"""One flag writes a trace of a few steps; without it the profiler is an object that does nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

from engine.run_folder.log import Log

REGIONS = ("load", "towers", "project", "loss", "backward", "optim", "graph")  # of a step, as the loop names them

SKIP, WARM, RECORD = 1, 1, 4  # steps: the first is start-up, the second warms the profiler up
NOWHERE = nullcontext()


class Profiler:
    """The null object: profiling is off."""

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        return None

    def region(self, name: str) -> AbstractContextManager[Any]:
        """A named part of the step: free, where `record_function` costs 10 us even when nothing is recorded."""
        return NOWHERE

    def step(self) -> None:
        """Nothing to do."""


class Trace(Profiler):
    """Records RECORD steps and writes `FOLDER/rank0.*.pt.trace.json` for TensorBoard's trace viewer or Perfetto.

    Says then where the time of these steps went, and at the end where that of the whole run did.
    """

    def __init__(self, folder: Path, rank: int, log: Log) -> None:
        self._write, self._log = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}"), log

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(
            activities=kinds,
            schedule=schedule(wait=SKIP, warmup=WARM, active=RECORD, repeat=1),
            on_trace_ready=self._ready,
        )

    def _ready(self, trace: profile) -> None:
        self._write(trace)
        self._log.report_time(f"{RECORD} recorded steps", region_seconds(trace))

    def __enter__(self) -> Profiler:
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        self._log.report_time("the run", self._log.seconds())

    def region(self, name: str) -> AbstractContextManager[Any]:
        """A named part of the step, as the trace shows it."""
        return record_function(name)

    def step(self) -> None:
        """Tell the schedule that a step ended."""
        self._profile.step()


def region_seconds(trace: profile) -> dict[str, float]:
    """Seconds in each region of the recorded steps: the device's where there is one, else the host's.

    The towers run within `project`, which is shown without them.
    """
    found = {event.key: max(event.device_time_total, 0) or event.cpu_time_total for event in trace.key_averages()
             if event.key in REGIONS}
    if "towers" in found:
        found["project"] = found.get("project", 0) - found["towers"]
    return {name: found[name] / 1e6 for name in REGIONS if name in found}


def profiler(on: bool, folder: Path, rank: int, log: Log) -> Profiler:
    """A Trace when asked for, else the null object."""
    return Trace(folder, rank, log) if on else Profiler()
