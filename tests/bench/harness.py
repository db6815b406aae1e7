"""The harness: two arms take turns in one process; a ratio is the median of the rounds' ratios."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

Arm = Callable[[], object]
Clock = Callable[[], float]
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
PACKAGES = ("torch", "transformers", "pillow", "sentence-transformers", "webdataset")
HEADINGS = ("figure", "what is measured", "ours", "against", "median [lowest, highest]", "goal", "reached")


class NotMeasured(Exception):
    """This machine, or --quick, cannot give a figure; the message says why."""


@dataclass(frozen=True)
class Figure:
    """One line of the table. The goal, such as ">= 5" or "<= 1.15", is about the median of `values`."""

    name: str
    what: str
    goal: str = ""
    values: Sequence[float] = ()  # one a round
    ours: str = ""
    against: str = ""
    not_measured: str = ""  # why

    @property
    def reached(self) -> bool | None:
        """Whether the median meets the goal; None where there is no value or no goal."""
        if not self.values or not self.goal:
            return None
        sign, limit = self.goal.split()[:2]
        bound = float(limit.replace(",", ""))
        return median(self.values) >= bound if sign == ">=" else median(self.values) <= bound

    def cells(self) -> list[str]:
        """The columns of HEADINGS."""
        middle = ""
        if self.values:
            middle, low, high = (_number(value) for value in (median(self.values), min(self.values), max(self.values)))
            middle += f" [{low}, {high}]" if low != high else ""
        reached = {True: "yes", False: "no", None: ""}[self.reached]
        if self.not_measured:
            middle = f"not measured: {self.not_measured}"
        return [self.name, self.what, self.ours, self.against, middle, self.goal, reached]


@dataclass(frozen=True)
class Race:
    """Two arms and how they are timed. `work` is how much of `l2_normalize` a call of ours and of the other does."""

    name: str
    what: str
    goal: str
    ours: Arm
    against: Arm
    work: tuple[float, float] = (1, 1)
    unit: str = ""  # "" shows seconds for one unit of work
    cost: bool = False  # the ratio is our time over the other's, else our rate over the other's
    rounds: int = 5
    clock: Clock = time.process_time


@dataclass
class Bench:
    """Collects figures and prints each as soon as it is known; `quick` means fewer rounds and smaller inputs.

    `model` and `dataset` are those of the warm jobs, "" for the demo's.
    """

    quick: bool
    scratch: Path
    model: str
    dataset: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Record one figure."""
        self.figures.append(figure)
        print("  ".join(cell for cell in figure.cells() if cell), file=sys.stderr, flush=True)

    def race(self, race: Race) -> None:
        """Call both arms in turn for `rounds` (2 if quick), at most 20 s (5 s); one call of each before warms up."""
        race.ours()
        race.against()
        taken: list[tuple[float, float]] = []
        end = time.perf_counter() + (5 if self.quick else 20)
        while len(taken) < (2 if self.quick else race.rounds) and not (taken and time.perf_counter() > end):
            taken.append((timed(race.ours, race.clock), timed(race.against, race.clock)))
        work, other_work = race.work
        faster = [(other / other_work) / (ours / work) for ours, other in taken]
        ours, other = (median(side) for side in zip(*taken, strict=True))
        self.add(Figure(race.name, race.what, race.goal, [1 / ratio for ratio in faster] if race.cost else faster,
                        amount(ours, work, race.unit), amount(other, other_work, race.unit)))

    def table(self) -> str:
        """All figures as Markdown, in the order of their numbers."""
        rows = [list(HEADINGS), *(figure.cells() for figure in sorted(self.figures, key=_number_in_name))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, object]]:
        """All figures with the values of every round."""
        return [{**asdict(figure), "reached": figure.reached} for figure in self.figures]


def timed(arm: Arm, clock: Clock = time.perf_counter) -> float:
    """Seconds one call takes."""
    start = clock()
    arm()
    return clock() - start


def children_cpu() -> float:
    """CPU seconds of all child processes that have ended, their own children included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def amount(seconds: float, work: float = 1, unit: str = "") -> str:
    """Work done a second, or without a unit the seconds for one unit of work."""
    if unit:
        return f"{work / seconds:,.4g} {unit}/s"
    each = seconds / work
    size, name = next((pair for pair in UNITS if each >= pair[0]), UNITS[-1])
    return f"{each / size:.3g} {name}"


def machine() -> dict[str, str]:
    """What the figures were measured on: CPU, cores, bf16 units, GPU, load, versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"CPU": model[1] if model else platform.processor(), "cores": str(len(os.sched_getaffinity(0))),
            "bf16 units": " ".join(bf16) or "none",
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "load": f"{os.getloadavg()[0]:.1f}", **versions}


def _number(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _number_in_name(figure: Figure) -> int:
    number = re.match(r"P(\d+)", figure.name)
    return int(number[1]) if number else 99
