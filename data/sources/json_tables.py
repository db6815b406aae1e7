"""JSON lines, and JSON files that are one value: an array of objects, or an object that holds one.

Numbers stay as they are written, as in all text tables.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data.batch import BadSample, UserError
from data.ledger import Account
from data.reading import MAX_LINE, bounded_lines, open_unpacked
from data.sources.options import ReadOptions
from data.sources.pictures import is_picture
from data.sources.records import AS_WRITTEN, Record, from_records, parse_json_object
from data.sources.split_names import SPLIT_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 20  # bytes of an array that are read at one time
HEAD = 1 << 16  # bytes by which an array is recognised
BLANKS = (" ", "\t", "\r", "\n")
MAX_JSON = 1 << 29  # bytes of a value that is not read item by item; it takes ten times that in memory
SHAPES = ('an array [{"image": …, "title": …}, …], an object with such an array under "data", columns {"image": […], '
          '"title": […]}, or {"a.jpg": "title", …}')


def read_json_lines(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    """Read one object a line. Raises UserError."""
    def records() -> Iterator[Record]:
        row = 0
        with open_unpacked(path) as file:
            for number, line in enumerate(bounded_lines(file, path), 1):
                if not line.strip():
                    continue
                where = f"line {number}"
                try:
                    yield Record(row, where, parse_json_object(line, where), len(line))
                except BadSample as problem:
                    account.drop(str(path), row, problem)
                row += 1

    return from_records(records(), options.columns, str(path), f"{path} holds no rows", account)


def read_json(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    """Read a file called .json: one of SHAPES, or JSON lines, as `Dataset.to_json` writes them. Raises UserError."""
    if _is_lines(path):
        return read_json_lines(path, options, account)
    items = _array_items(path)
    if not _is_array(path):
        items = ((item, 0) for item in _items(load_json(path), path, account))

    def records() -> Iterator[Record]:
        for row, (item, size) in enumerate(items):
            if isinstance(item, dict):
                yield Record(row, f"item {row}", item, size)
            else:
                account.drop(str(path), row, BadSample("bad-json", f"item {row} is a {type(item).__name__}, no object"))

    return from_records(records(), options.columns, str(path), f"{path} holds no rows", account)


class _ArrayItems:
    """The items of a file that is one JSON array, and their sizes in it; memory does not grow with the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._is_whole = "", 0, False

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Yield them, numbers as text. Raises ValueError, RecursionError."""
        self._next()
        self._at += 1  # the bracket
        is_open = self._next() != "]"
        self._at += not is_open
        while is_open:
            yield self._value()
            separator = self._next()
            if separator not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", self._text, self._at)
            self._at += 1
            is_open = separator == ","
            self._next()
        if self._next():
            raise json.JSONDecodeError("Extra data", self._text, self._at)

    def _next(self) -> str:
        """Return the next character that is no white space, without taking it; "" at the end."""
        while True:
            while self._text[self._at : self._at + 1] in BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_whole:
                return ""
            self._fill()

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = AS_WRITTEN.raw_decode(self._text, self._at)
                if end < len(self._text) or self._is_whole:  # a number may go on in the next block
                    size, self._at = end - self._at, end
                    return value, size
            except ValueError:
                if self._is_whole or len(self._text) - self._at > MAX_LINE:
                    raise
            self._fill()

    def _fill(self) -> None:
        """Read as much again as is left, so that a large item is not tried many times."""
        block = self._file.read(max(BLOCK, len(self._text) - self._at))
        self._is_whole = not block
        self._text = self._text[self._at :] + self._decoder.decode(block, final=not block)
        self._at = 0


def _array_items(path: Path) -> Iterator[tuple[Any, int]]:
    """Yield the items of a file that is one JSON array, and their sizes. Raises UserError."""
    items = 0
    try:
        with open_unpacked(path) as file:
            for value in _ArrayItems(file):
                items += 1
                yield value
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error, f"item {items}: ") from None


def _is_array(path: Path) -> bool:
    """Return whether the value of a JSON file is an array."""
    with open_unpacked(path) as file:
        return file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def load_json(path: Path) -> Any:
    """Return the value of a JSON file, numbers as text. Raises UserError."""
    with open_unpacked(path) as file:
        content = file.read(MAX_JSON + 1)
    if len(content) > MAX_JSON:
        raise UserError(f"{path}: more than {MAX_JSON:,} bytes of JSON that are one value; write JSON lines, an object "
                        "on each, or an array of objects")
    try:
        return AS_WRITTEN.decode(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _not_json(path, error) from None


def _not_json(path: Path, error: Exception, place: str = "") -> UserError:
    """Return the error for a file that cannot be parsed; `place` says where in it."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"{path} is not UTF-8; save the file as UTF-8")
    return UserError(f"{path} is not JSON ({place}{str(error)[:200]})")


def _is_lines(path: Path) -> bool:
    """Return whether the first line that is not blank is a whole object."""
    with open_unpacked(path) as file:
        first = next((line for line in iter(partial(file.readline, MAX_LINE), b"") if line.strip()), b"")
        more = any(line.strip() for line in iter(partial(file.readline, MAX_LINE), b""))
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return False
    try:
        fields = parse_json_object(first, "line 1")
    except BadSample:
        return False
    return more or not any(isinstance(value, (dict, list)) for value in fields.values())


def _items(value: Any, path: Path, account: Account) -> Sequence[Any]:
    """Return the objects of a JSON value in one of SHAPES. Raises UserError."""
    lists = {name: field for name, field in value.items() if _holds_objects(field)} if isinstance(value, dict) else {}
    if len(lists) > 1 and len(lists) == len(value) and all(name.lower() in SPLIT_NAMES for name in lists):
        account.note(f"{path}: the rows are the objects under the names of splits")
        rows = []
        for name, items in lists.items():
            rows += [{"split": name, **row} if isinstance(row, dict) else row for row in items]
        return rows
    if len(lists) == 1 or "data" in lists:
        name = "data" if "data" in lists else next(iter(lists))
        account.note(f"{path}: the rows are the objects under {name!r}")
        return lists[name]
    if isinstance(value, dict) and value:
        if all(map(is_picture, value)) and all(isinstance(title, (str, list)) for title in value.values()):
            account.note(f"{path}: image names with their titles")
            return [{"image": image, "title": title} for image, title in value.items()]
        columns = {name: list(field.values()) if isinstance(field, dict) else field for name, field in value.items()}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) == 1 and -1 not in lengths and _same_keys(value):
            account.note(f"{path}: an object of columns")
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    names = ", ".join(map(str, value))[:100] if isinstance(value, dict) else ""
    shown = f"an object with {names}" if names else f"a {type(value).__name__}"
    raise UserError(f"{path}: holds {shown}; what can be read is {SHAPES}, JSON lines, or COCO's and Karpathy's files")


def _holds_objects(field: Any) -> bool:
    return isinstance(field, list) and bool(field) and isinstance(field[0], dict)


def _same_keys(columns: Mapping[str, Any]) -> bool:
    """Return whether all columns that are objects (as pandas writes them) have the same row names."""
    return len({tuple(column) for column in columns.values() if isinstance(column, dict)}) <= 1
