"""Steps that were skipped because their gradient was not finite: counted, and after three in a row the rows named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batches, RunFailed
from engine.ranks.world import World

IN_A_ROW = 3


class NonfiniteGuard:
    """Ends a run whose gradient norms stay not finite. The norms are the same on every rank, so all ranks end together.

    `batches` are this rank's inputs; `rows(step)` returns the source's row numbers of the global batch.
    """

    def __init__(self, run: Path, model: nn.Module, batches: Batches,
                 rows: Callable[[int], Sequence[int]], world: World) -> None:
        self.run, self.model, self.batches, self.rows, self.world = run, model, batches, rows, world
        self.skipped: list[int] = []  # the latest steps (from 0), all skipped

    def check(self, step: int, norms: Sequence[float]) -> None:
        """Check the gradient norms of the steps before `step`. Raises RunFailed once three in a row were skipped."""
        for at, norm in enumerate(norms, step - len(norms)):
            self.skipped = [] if math.isfinite(norm) else [*self.skipped, at]
            if len(self.skipped) == IN_A_ROW:
                raise RunFailed(self._capture())

    def _capture(self) -> str:
        """Write which rows are to blame into the run folder; one sentence that says so."""
        found = {step + 1: self._blame(step) for step in self.skipped}
        path = self.run / f"nan-step-{self.skipped[-1] + 1:08d}.json"
        if self.world.is_main:
            path.write_text(json.dumps({"skipped_steps": found}, indent=2) + "\n", encoding="utf-8")
        rows = sorted({entry["row"] for entries in found.values() for entry in entries})
        shown = ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        last = self.run / "checkpoints" / "last"
        good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "no checkpoint was written yet"
        return (f"{IN_A_ROW} steps in a row had a gradient that is not finite; rows {shown} of the training split "
                f"(see {path}); {good}")

    @torch.no_grad()
    def _blame(self, step: int) -> list[dict[str, Any]]:
        """The rows of a step with what is not finite of them; all of them, with nothing, if each alone is fine."""
        out = self.model(next(self.batches.from_step(step)))
        local = {"image": _broken(out.image_BE)}
        for name, text_BE in zip(("title", "title_neg"), out.text_XE.split(max(1, len(out.image_BE))), strict=False):
            local[name] = _broken(text_BE)
        parts = self.world.exchange(local)
        broken = {name: [flag for part in parts for flag in part.get(name, [])] for name in parts[0]}
        entries = [{"row": int(row), "not_finite": [name for name in broken if broken[name][i]]}
                   for i, row in enumerate(self.rows(step))]
        return [entry for entry in entries if entry["not_finite"]] or entries


def _broken(embedding_BE: Tensor) -> list[bool]:
    return (~embedding_BE.isfinite().all(-1)).tolist()
