"""How `run.py bench` measures: races of two arms in turn, and the table they end in; Recall's own race.

Seconds are CPU time of this process (the machine may be shared) unless a row says otherwise.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from eval.distinct import Distinct
from eval.metrics import retrieval_ranks

Arm = Callable[[], object]
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


class Figure(NamedTuple):
    """One row of the table; `ratio` is (median, lowest, highest) over the rounds."""

    row: str
    what: str
    ours: str
    against: str
    ratio: tuple[float, float, float] | None
    goal: str  # such as ">= 5" or "<= 1.15"; "" where there is none

    @property
    def reached(self) -> bool | None:
        """Does the median hold the goal? None where nothing was measured or wanted."""
        if self.ratio is None or not self.goal:
            return None
        sign, limit = self.goal.split()[:2]
        return self.ratio[0] >= float(limit) if sign == ">=" else self.ratio[0] <= float(limit)


class Bench:
    """Collects figures and tells each as it is known; `quick` means fewer rounds and smaller inputs."""

    def __init__(self, quick: bool, tell: Callable[[str], None]) -> None:
        self.quick, self.tell, self.figures = quick, tell, list[Figure]()

    def race(self, row: str, what: str, ours: Arm, against: Arm, goal: str, *, work: tuple[float, float] = (1, 1),
             unit: str = "s", cost: bool = False, rounds: int = 5, limit_s: float = 20.0,
             clock: Callable[[], float] = time.process_time) -> None:
        """Call both arms in turn, after one call each to warm up, for `rounds` (2 if quick) or `limit_s` of the clock.

        `work` is how much of `unit` a call of ours and of the other does; the ratio of a round is our rate over the
        other's, with `cost` our time over the other's.
        """
        times: list[tuple[float, float]] = []
        end = time.perf_counter() + limit_s / (4 if self.quick else 1)
        for turn in range(1 + (2 if self.quick else rounds)):
            taken = _seconds(ours, clock), _seconds(against, clock)
            if turn:
                times.append(taken)
            if times and time.perf_counter() > end:
                break
        ratios = [(b / a * work[0] / work[1]) ** (-1 if cost else 1) for a, b in times]
        mine, other = (median(each) for each in zip(*times, strict=True))
        self.note(row, what, amount(mine, work[0], unit), amount(other, work[1], unit), ratios, goal)

    def note(self, row: str, what: str, ours: str, against: str = "", ratios: list[float] | None = None,
             goal: str = "") -> None:
        """Take down a figure that is no race."""
        ratio = (median(ratios), min(ratios), max(ratios)) if ratios else None
        self.figures.append(Figure(row, what, ours, against, ratio, goal))
        self.tell("  ".join(part for part in _cells(self.figures[-1]) if part))

    def fold(self, row: str, found: Mapping[str, float], ours: str, against: str, goals: Mapping[str, str]) -> None:
        """Take down what a room measured by itself: names are `SUBJECT: ARM` and `SUBJECT: times faster`."""
        for subject in dict.fromkeys(name.rpartition(": ")[0] for name in found):
            part = {name.rpartition(": ")[2]: value for name, value in found.items() if name.startswith(subject + ":")}
            def shown(arm: str, part: dict[str, float] = part) -> str:
                return next((f"{value:,.4g} {name.rpartition(', ')[2]}" for name, value in part.items()
                             if name.startswith(arm)), "")
            ratio = [part["times faster"]] if "times faster" in part else None
            self.note(row, subject, shown(ours), shown(against), ratio,
                      next((goal for start, goal in goals.items() if subject.startswith(start)), ""))

    def table(self) -> str:
        """A Markdown table of everything taken down."""
        rows = [["row", "what", "ours", "against", "ratio", "goal", "reached"],
                *(_cells(figure) for figure in sorted(self.figures, key=_place))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
                 for row in rows]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        """The same for programs."""
        return [figure._asdict() | {"reached": figure.reached} for figure in self.figures]


def amount(seconds: float, work: float, unit: str) -> str:
    """Seconds in a readable unit, or work done a second."""
    if unit == "s":
        size, name = next((pair for pair in UNITS if seconds >= pair[0]), UNITS[-1])
        return f"{seconds / size:.3g} {name}"
    return f"{work / seconds:,.4g} {unit}/s"


def measure_recall(bench: Bench) -> None:
    """P7: ranks in both directions of N x N pairs against the bare matrix product of the same size."""
    n = 2_000 if bench.quick else 10_000
    generator = torch.Generator().manual_seed(0)
    image_NE, title_NE = (F.normalize(torch.randn(n, 512, generator=generator), dim=-1) for _ in range(2))
    distinct, out_NN = Distinct.of(None, torch.arange(n)), torch.empty(n, n)
    bench.race("P7", f"Recall@K both ways, {n:,} x {n:,} x 512, against the bare product",
               lambda: retrieval_ranks(image_NE, title_NE, distinct),
               lambda: torch.mm(image_NE, title_NE.T, out=out_NN),
               "<= 1.15", cost=True, rounds=7)


def measure_recall_on(bench: Bench, device: torch.device) -> None:
    """The GPU's row: ranks both ways of a million pairs, seconds by the clock."""
    n = 100_000 if bench.quick else 1_000_000
    image_NE, title_NE = (F.normalize(torch.randn(n, 512, device=device), dim=-1) for _ in range(2))
    took, distinct = [], Distinct.of(None, torch.arange(n, device=device))
    for _ in range(2):
        start = time.perf_counter()
        retrieval_ranks(image_NE, title_NE, distinct)[0].sum().item()  # waits for the device
        took.append(time.perf_counter() - start)
    bench.note("GPU", f"exact Recall both ways, {n:,} x {n:,} x 512: seconds", f"{took[-1]:.2f} s", "", [took[-1]],
               "" if bench.quick else "<= 5")


def versions() -> str:
    """The machine and what runs on it, one line."""
    import importlib.metadata

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    known = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pillow")}
    with suppress(importlib.metadata.PackageNotFoundError):
        known["sentence-transformers"] = importlib.metadata.version("sentence-transformers")
    return (f"{cpu}, {os.cpu_count()} cores{gpu}; Python {platform.python_version()}, "
            + ", ".join(f"{name} {version}" for name, version in known.items()))


def _place(figure: Figure) -> int:
    return int(figure.row[1:]) if figure.row[1:].isdigit() else 99


def _seconds(arm: Arm, clock: Callable[[], float]) -> float:
    start = clock()
    arm()
    return clock() - start


def _cells(figure: Figure) -> list[str]:
    ratio = ""
    if figure.ratio is not None:
        middle, low, high = (f"{value:,.2f}" if value < 100 else f"{value:,.0f}" for value in figure.ratio)
        ratio = middle if low == high else f"{middle} [{low}, {high}]"
    reached = {True: "yes", False: "no", None: ""}[figure.reached]
    return [figure.row, figure.what, figure.ours, figure.against, ratio, figure.goal, reached]
