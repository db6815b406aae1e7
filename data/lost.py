"""Pictures that could be decoded when a run began and cannot be any more, as streaming meets them.

Each is read again a few times, then named, entered into the ledger and not asked for any more; the run goes on until
more than --max-bad of all rows are lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from data.batch import BadSample
from data.catalogue import Catalogue, Split, check_bad_share
from data.images.feed import Lot
from data.images.reader import Reader
from data.images.worker import Job, Spent, Task, do_task
from data.ledger import LINES, dropped_rows
from data.sources.embedded import shown_name
from data.web import storage

RETRIES = 2  # of all that fails in a lot


@dataclass
class LostPictures:
    """The ledger entries of rows whose picture was lost after the opening, by image reference."""

    catalogue: Catalogue
    splits: Mapping[str, Split]
    example_D: np.ndarray  # a reference of each distinct image
    reader: Reader
    dropped: Sequence[Mapping[str, Any]]  # the ledger of the opening
    rows: int  # of all splits, those in it included
    max_bad: float
    log: Callable[[str], None]
    entries: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def task(self, reference: int, crop: tuple[int, int, int | None] | None = None) -> Task | BadSample:
        """Return what is to be done for a reference: nothing if it is lost."""
        if reference in self.entries:
            return BadSample("lost")
        return Task(self.catalogue.references[reference].as_py(), crop)

    def read_again(self, lot: Lot[int], tasks: Sequence[Task | BadSample | np.ndarray], job: Job) -> list[int]:
        """Decode what has failed in a lot once more, into its records; return the places that are lost.

        Raises UserError when more than `max_bad` of all rows are.
        """
        problems = {place: outcome.problem for place, outcome in enumerate(lot.outcomes) if outcome.problem is not None}
        lost = [*problems]
        for tried in range(RETRIES):
            failed = [(place, task) for place in problems if isinstance(task := tasks[place], Task)]
            if not failed:
                break
            time.sleep(storage.BACKOFF * 2**tried)
            for place, task in failed:
                problem = do_task(task, job, self.reader, lot.records, place, Spent()).problem
                if problem is None:
                    del problems[place]
                else:
                    problems[place] = problem
        for place, problem in problems.items():
            if lot.tags[place] not in self.entries:
                self._enter(lot.tags[place], BadSample(*problem))
        return [place for place in lost if place in problems]

    def ledger(self) -> list[dict[str, Any]]:
        """Return the entries."""
        return [entry for entries in self.entries.values() for entry in entries]

    def check(self, lost: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError when more than `max_bad` of all rows are lost or were dropped at the opening."""
        if len(lost) + dropped_rows(self.dropped) > self.max_bad * self.rows:
            check_bad_share(self.rows, [*lost, *self.dropped], self.max_bad)

    def _enter(self, reference: int, problem: BadSample) -> None:
        image = shown_name(self.catalogue.references[reference].as_py()) or None
        detail = f"could be decoded when the run began, and cannot be now: {problem.detail}"
        (number,) = np.flatnonzero(self.example_D == reference)
        entries = self.entries[reference] = []
        for name, split in self.splits.items():
            for row in split.row_N[split.image_N.numpy() == number].tolist():
                entries.append({"split": name, "row": row, "image": image, "title": self.catalogue.title(name, row),
                                "reason": problem.reason, "detail": detail})
        if len(self.entries) <= LINES:
            more = "; further ones are in ledger.jsonl alone" if len(self.entries) == LINES else ""
            self.log(f"{image or 'a picture of the dataset'} {detail or problem.reason}; the run goes on without it "
                     f"(in training another row takes its place, when measured a blank picture){more}")
        self.check(self.ledger())


def replace_rows(rows_B: Tensor, pixels: np.ndarray, lost: Sequence[int], spare: tuple[int, np.ndarray]) -> Tensor:
    """Return the rows with `spare`, a row and its pixels, in the lost places, also in `pixels`.

    A row that a batch has twice has equal ids, so it is no negative of itself.
    """
    rows_B = rows_B.clone()
    rows_B[[*lost]], pixels[[*lost]] = spare
    return rows_B
