"""What reading a dataset drops, passes over and changes: one ledger entry a row, one line on the console a reason.

An entry names its place ("file" and "row", counted from 0 in that file; "shard" and "key" in a tar), "reason" and
"detail". It stands for one row; "rows" says so where it stands for several, or for none: files that were not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.batch import BadSample

Ledger = Callable[[dict[str, Any]], None]
UNUSED = {  # reason -> what such files are
    "sidecar-without-image": "texts without an image of their name", "linked-folder": "linked folders, not followed",
    "own-output": "folders that thumbtune wrote"}


def _nowhere(entry: dict[str, Any]) -> None:
    pass


def _unsaid(text: str) -> None:
    pass


@dataclass
class Account:
    """Keeps kept + dropped = rows in: readers report here every row that they do not return."""

    ledger: Ledger = _nowhere
    tell: Callable[[str], None] = _unsaid
    split: str | None = None  # that is being read, where it has a name
    dropped: int = 0  # rows of it
    example: str = ""  # of them, for people
    _unused: dict[str, list[str]] = field(default_factory=dict)  # reason -> files
    _notes: set[str] = field(default_factory=set)

    def begin(self, split: str | None) -> None:
        """The next split is being read; None: rows that are not split yet."""
        self.split, self.dropped, self.example = split, 0, ""

    def drop(self, file: str, row: int, problem: BadSample, image: str | None = None, title: str | None = None,
             rows: int = 1) -> None:
        """A row (or `rows` of them, from `row` on) of a table or a folder cannot be used."""
        entry = {"file": file, "row": row, "image": image, "title": title, "reason": problem.reason,
                 "detail": problem.detail} | ({"rows": rows} if rows != 1 else {})
        self._enter(entry, rows)

    def drop_sample(self, entry: dict[str, Any]) -> None:
        """A sample of a shard cannot be used: {"shard", "key", "reason", "detail"}."""
        self._enter(entry, 1)

    def _enter(self, entry: Mapping[str, Any], rows: int) -> None:
        entry = {name: _writable(value) for name, value in entry.items()}
        entry = {"split": self.split, **entry} if self.split else entry
        self.dropped += rows
        self.example = self.example or f"{place_of(entry)}: {entry['reason']}: {entry['detail']}"
        self.ledger(entry)

    def pass_over(self, reason: str, file: str) -> None:
        """A file that looks like data is not used; `reason` is one of UNUSED."""
        self._unused.setdefault(reason, []).append(_writable(file))

    def note(self, text: str) -> None:
        """Say once what was changed or chosen."""
        if text not in self._notes:
            self._notes.add(text)
            self.tell(text)

    def close(self, dataset: str) -> None:
        """Report the files passed over: an entry and part of a line for each reason."""
        words = []
        for reason, files in self._unused.items():
            words.append(f"{UNUSED[reason]}: {len(files):,} (e.g. {files[0]})")
            self.ledger({"file": dataset, "reason": reason, "detail": f"e.g. {files[0]}",
                         "rows": 0, "files": len(files)})
        if words:
            self.tell(f"not used, {'; '.join(words)}")


def dropped_rows(ledger: Iterable[Mapping[str, Any]]) -> int:
    """How many rows the entries of a ledger stand for."""
    return sum(entry.get("rows", 1) for entry in ledger)


def place_of(entry: Mapping[str, Any]) -> str:
    """Where the row of a ledger entry was, for people."""
    if "shard" in entry:
        return f"{entry['shard']}, {entry['key'] or '(unknown sample)'}"
    row = f"row {entry['row']}" if "row" in entry else "files"
    return f"{entry['file']}, {row}" if "file" in entry else entry.get("image") or row


def _writable(value: Any) -> Any:
    """Text that UTF-8 can hold: file names may hold any bytes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
