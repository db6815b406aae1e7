"""The trace of a few steps that --profile writes; without the flag, the profiler is a null object."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

from engine.run_folder.log import Log

REGIONS = ("load", "towers", "project", "loss", "backward", "optim", "graph")  # names of record_function in a step

SKIP, WARM, RECORD = 1, 1, 4  # steps: the first is start-up, the second warms the profiler up
NOWHERE = nullcontext()


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
    """Records RECORD steps and writes `FOLDER/rank0.*.pt.trace.json` for TensorBoard's trace viewer or Perfetto.

    Prints the time of each region in these steps, and at the end what the time of the whole run was spent on.
    """

    def __init__(self, folder: Path, rank: int, log: Log) -> None:
        self._write = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")
        self._log = log
        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(
            activities=kinds,
            schedule=schedule(wait=SKIP, warmup=WARM, active=RECORD, repeat=1),
            on_trace_ready=self._on_trace_ready,
        )

    def _on_trace_ready(self, trace: profile) -> None:
        self._write(trace)
        self._log.report_time(f"{RECORD} recorded steps", region_seconds(trace))

    def __enter__(self) -> Profiler:
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        self._log.report_time("the run", self._log.seconds())

    def region(self, name: str) -> AbstractContextManager[object]:
        """Return a context that names a part of the step in the trace."""
        return record_function(name)

    def step(self) -> None:
        """Advance the schedule by one step."""
        self._profile.step()


def region_seconds(trace: profile) -> dict[str, float]:
    """Return the seconds in each region of the recorded steps: device time where there is some, else host time.

    The towers run within `project`, whose time is given without them.
    """
    microseconds: dict[str, float] = {}
    for event in trace.key_averages():
        if event.key in REGIONS:
            microseconds[event.key] = max(event.device_time_total, 0) or event.cpu_time_total
    if "towers" in microseconds:
        microseconds["project"] = microseconds.get("project", 0) - microseconds["towers"]
    return {name: microseconds[name] / 1e6 for name in REGIONS if name in microseconds}


def profiler(on: bool, folder: Path, rank: int, log: Log) -> Profiler:
    """Return a Trace if `on`, else the null object."""
    return Trace(folder, rank, log) if on else Profiler()
