"""End a run after three steps in a row whose gradient is not finite, and name the rows that cause it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from data.batch import Batches, UnsoundWeights
from engine.ranks.world import World

# One such step is skipped: a single bad batch, or an overflow that does not come again, need not end a run.
IN_A_ROW = 3


class Culprit(TypedDict):
    """A row whose gradient may be the cause, and its embeddings that are not finite."""

    row: int | str  # its number, or the name of its sample
    not_finite: list[str]


class NonfiniteGuard:
    """Ends a run whose gradient norms stay non-finite. The norms are the same on every rank, so all ranks end together.

    `batches` are this rank's inputs, None where a step cannot be read again; `rows(step)` returns the numbers or names
    of the rows of the global batch.
    """

    def __init__(self, run: Path, model: nn.Module, batches: Batches | None,
                 rows: Callable[[int], Sequence[int | str]], world: World) -> None:
        self.run, self.model, self.batches, self.rows, self.world = run, model, batches, rows, world
        self.skipped: list[int] = []  # the latest steps in a row (from 0) that were skipped

    def check(self, norms: Mapping[int, float]) -> None:
        """Check the gradient norms of further steps, from 1. Raises UnsoundWeights once three in a row were skipped."""
        for step, norm in norms.items():
            self.skipped = [] if math.isfinite(norm) else [*self.skipped, step - 1]
            if len(self.skipped) == IN_A_ROW:
                raise UnsoundWeights(self._write_report())

    def _write_report(self) -> str:
        """Write the rows with non-finite embeddings into the run folder; return the error message."""
        culprits = {step + 1: self._nonfinite_rows(step) for step in self.skipped}
        path = self.run / f"nan-step-{self.skipped[-1] + 1:08d}.json"
        if self.world.is_main:
            path.write_text(json.dumps({"skipped_steps": culprits}, indent=2) + "\n", encoding="utf-8")
        rows = {entry["row"] for entry in chain.from_iterable(culprits.values())}
        shown = ", ".join(sorted(map(str, rows), key=lambda row: (len(row), row))[:10])
        if len(rows) > 10:
            shown += f" and {len(rows) - 10} more"
        last = self.run / "checkpoints" / "last"
        good = f"the last good checkpoint is {last.resolve()}" if last.exists() else "no checkpoint was written yet"
        return (f"{IN_A_ROW} steps in a row had a gradient that is not finite; rows {shown} of the training split "
                f"(see {path}); {good}")

    @torch.no_grad()
    def _nonfinite_rows(self, step: int) -> list[Culprit]:
        """Return the rows of a step with non-finite embeddings and which; all rows if every embedding is finite."""
        if self.batches is None:
            return [{"row": row, "not_finite": []} for row in self.rows(step)]
        out = self.model(next(self.batches.from_step(step)))
        texts = out.text_XE.split(max(1, len(out.image_BE)))  # titles, then negatives 1, 2, ...
        embeddings = [("image", out.image_BE), ("title", texts[0])]
        embeddings += [("title_neg", negative_BE) for negative_BE in texts[1:]]
        names_of_rows: list[dict[str, None]] = [{} for _ in out.image_BE]
        for name, embedding_BE in embeddings:
            for i in (~embedding_BE.isfinite().all(-1)).nonzero()[:, 0].tolist():
                names_of_rows[i][name] = None
        entries: list[Culprit] = []
        names_of_all = map(list, chain.from_iterable(self.world.exchange(names_of_rows)))  # ranks hold parts in order
        for row, names in zip(self.rows(step), names_of_all, strict=True):
            entries.append({"row": row, "not_finite": names})
        return [entry for entry in entries if entry["not_finite"]] or entries
