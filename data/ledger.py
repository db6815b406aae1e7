"""The ledger of rows and files that reading a dataset leaves out: one entry a row, one console line a reason.

An entry has a place, a "reason" and a "detail". The place of a row that cannot be read is "file" and "row", from
0 in that file ("shard" and "key" in a tar); of a row whose image or title fails later it is "split" and "row", counted
from 0 in that split after a lone one was divided. An entry stands for one row unless it has "rows": several rows, or 0
for files that were not used. Behind the first ENTRIES, rows of a file with one reason share an entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.batch import BadSample
from data.reading import parse_json, read_text
from data.text import printable

Ledger = Callable[[dict[str, Any]], None]
UNUSED = {  # reason -> description of such files
    "sidecar-without-image": "texts without an image of their name", "linked-folder": "linked folders, not followed",
    "own-output": "folders that thumbtune wrote"}
KINDS = (("split", str), ("row", int), ("rows", int), ("bytes", int), ("reason", str), ("content", str), ("step", int),
         ("back", int))
LINES = 5  # of one kind that are logged
ENTRIES = 200_000  # some 200 MB; further rows of a dataset have one entry for each file and reason


def discard(_: object) -> None:
    """Take an entry or a line and do nothing with it."""


@dataclass
class Account:
    """Accounts for every row, so that kept + dropped = rows in: readers report each row they do not return."""

    ledger: Ledger = discard
    log: Callable[[str], None] = discard
    split: str | None = None  # the split being read, None before rows are split
    lost: Collection[str] = ()  # paths of pictures that a run had when it began: rows, though their files may be gone
    dropped: int = 0  # rows of that split
    example: str = ""  # the first of them, printable
    _unused: dict[str, list[str]] = field(default_factory=dict)  # reason -> files
    _notes: set[str] = field(default_factory=set)
    _alike: dict[str, list[str]] = field(default_factory=dict)  # notes by what they say of any file
    _applied: set[str] = field(default_factory=set)  # flags that had something to apply to
    _entries: int = 0
    _shared: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)  # entries of several rows

    def begin(self, split: str | None) -> None:
        """Begin another split; None for rows that are not split yet."""
        self.split, self.dropped, self.example = split, 0, ""

    def drop(self, file: str, row: int, problem: BadSample, image: str | None = None, title: str | None = None,
             rows: int = 1) -> None:
        """Drop a row (or `rows` of them, from `row` on) of a table or a folder."""
        entry = {"file": file, "row": row, "image": image, "title": title, "reason": problem.reason,
                 "detail": problem.detail} | ({"rows": rows} if rows != 1 else {})
        self._enter(entry, rows)

    def drop_sample(self, entry: dict[str, Any]) -> None:
        """Drop a sample of a shard: {"shard", "key", "reason", "detail"}."""
        self._enter(entry, 1)

    def _enter(self, entry: Mapping[str, Any], rows: int) -> None:
        entry = {name: _writable(value) for name, value in entry.items()}
        entry = {"split": self.split, **entry} if self.split else entry
        self.dropped += rows
        if not self.example:
            self.example = printable(f"{place_of(entry)}: {entry['reason']}: {entry['detail']}")
        self._entries += 1
        if self._entries <= ENTRIES:
            self.ledger(entry)
            return
        kind = self.split or "", entry.get("shard") or entry["file"], entry["reason"]
        shared = self._shared.setdefault(kind, entry | {"rows": 0, "detail": f"{entry['detail']}; and later ones"})
        shared["rows"] += rows

    def pass_over(self, reason: str, file: str) -> None:
        """Record a file that looks like data and is not used; `reason` is one of UNUSED."""
        self._unused.setdefault(reason, []).append(_writable(file))

    def note(self, text: str) -> None:
        """Log once what was changed or chosen; of lines that differ by file or numbers, the first LINES."""
        if text in self._notes:
            return
        self._notes.add(text)
        # Without the file that it begins with, numbers and what is in brackets, a note says the same of any file.
        said = re.sub(r"\(.*\)|\d[\d,]*", "#", text.partition(": ")[2] or text)
        alike = self._alike.setdefault(said, [])
        alike.append(text)
        if len(alike) <= LINES:
            self.log(printable(text))

    def apply(self, *flags: str) -> None:
        """Record that flags have something to apply to."""
        self._applied.update(flags)

    def note_unused(self, flags: Mapping[str, object]) -> None:
        """Log the flags that were given and had nothing to apply to."""
        unused = [flag for flag, value in flags.items() if value and flag not in self._applied]
        if unused:
            self.note(f"not used, as nothing that was read depends on it: {', '.join(unused)}")

    def close(self, dataset: str) -> None:
        """Report entries of several rows, and the files passed over: an entry and part of one line for each reason."""
        for entry in self._shared.values():
            self.ledger(entry)
        self._shared.clear()
        for alike in self._alike.values():
            if len(alike) > LINES:
                self.log(printable(f"{len(alike) - LINES:,} more lines like: {alike[-1]}"))
        phrases = []
        for reason, files in self._unused.items():
            phrases.append(f"{UNUSED[reason]}: {len(files):,} (e.g. {files[0]})")
            self.ledger({"file": dataset, "reason": reason, "detail": f"e.g. {files[0]}",
                         "rows": 0, "files": len(files)})
        if phrases:
            self.log(printable(f"not used, {'; '.join(phrases)}"))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the entries of ledger.jsonl that can be read, [] without the file; its last line may be half written."""
    entries = []
    with suppress(OSError, UnicodeDecodeError):
        for line in read_text(path).split("\n"):
            with suppress(ValueError):
                entry = parse_json(line)
                if isinstance(entry, dict) and all(isinstance(entry.get(name, kind()), kind) for name, kind in KINDS):
                    bytes.fromhex(entry.get("content", ""))  # raises ValueError for damage, so the line is left out
                    entries.append(entry)
    return entries


def dropped_rows(ledger: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of rows that ledger entries stand for."""
    return sum(entry.get("rows", 1) for entry in ledger)


def place_of(entry: Mapping[str, Any]) -> str:
    """Return the place of a ledger entry's row, for people."""
    if "shard" in entry:
        return f"{entry['shard']}, {entry['key'] or '(unknown sample)'}"
    row = f"row {entry['row']}" if "row" in entry else "files"
    return f"{entry['file']}, {row}" if "file" in entry else entry.get("image") or row


def _writable(value: Any) -> Any:
    """Return text that UTF-8 can hold: file names may hold any bytes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
