"""CSV and TSV: by Arrow where every row is sound, else row by row, so that a bad row is named and the rest is kept."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.batch import BadSample, UserError
from data.files import open_unpacked
from data.ledger import Account
from data.sources.pictures import PICTURES
from data.sources.records import Record, from_records
from data.sources.rows import Columns, detect_columns, rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 24  # bytes of a file read at one time; a longer row is read row by row
END = "\0end"  # fed to the reader after the last line; a quote that is still open swallows it
ADDRESS = re.compile(rf"\s*(https?://\S+|.*({'|'.join(map(re.escape, sorted(PICTURES)))}))\s*", re.IGNORECASE)
LINE_END = re.compile(r"\r\n|\r|\n")
NAME = re.compile(r"\s*\S*[\d/]\S*\s*")  # may name an image, as 17 and a/b do


class _Shape(NamedTuple):
    """The format of a file's rows."""

    delimiter: str
    width: int  # fields of a row
    image: int  # the field that names the image


def read_csv(path: Path, columns: Columns, account: Account, delimiter: str) -> pa.Table:
    """A CSV file, all values text and "" where one is empty. Raises UserError that names the line."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    names = _header(path, delimiter)
    picked = detect_columns(names, columns, str(path))
    shape = _Shape(delimiter, len(names), names.index(picked["image"]))
    try:
        table = arrow.read_csv(
            open_unpacked(path) if path.suffix.lower() == ".gz" else path, arrow.ReadOptions(block_size=BLOCK),
            arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow.ConvertOptions(include_columns=[*{*picked.values()}],
                                 column_types=dict.fromkeys(picked.values(), pa.string())))
        sound = not _may_join_rows(path, table, {name: names.index(name) for name in picked.values()}, shape)
    except (ValueError, KeyError):  # a row of another width, or one that is not UTF-8
        sound = False
    if sound:
        return rename_to_roles(table, picked)
    rows = _rows(path, names, shape, account)
    return from_records(rows, columns, str(path), f"{path}: holds no rows; fill it or remove it", account)


def _text(path: Path) -> io.TextIOWrapper:
    """A file as text with its own line ends; bytes that are not UTF-8 become halves of surrogate pairs."""
    return io.TextIOWrapper(open_unpacked(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(path: Path, delimiter: str) -> list[str]:
    csv.field_size_limit(1 << 30)
    try:
        with _text(path) as file:
            names = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
    except csv.Error as error:
        raise UserError(f"{path}: line 1: {error}") from None
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: line 1 is not UTF-8; save the file as UTF-8") from None
    return names


def _may_join_rows(path: Path, table: pa.Table, columns: Mapping[str, int], shape: _Shape) -> bool:
    """True if a stray quote may have joined rows; False if rows, and values that are text, account for all line ends.

    `columns` are those of the table, and where they stand in the file.
    """
    import pyarrow.compute as pc

    quotes = newlines = returns = 0
    last = b"\n"
    with open_unpacked(path) as file:
        for block in iter(partial(file.read, BLOCK), b""):
            quotes += block.count(b'"')
            newlines += block.count(b"\n")
            returns += block.count(b"\r")
            last = block[-1:]
    if not quotes:
        return False
    end, lines = ("\n", newlines) if newlines else ("\r", returns)
    within = sum(pc.sum(pc.count_substring(table[name], end)).as_py() or 0 for name in columns)
    if quotes % 2 or lines + (last not in b"\r\n") != 1 + len(table) + within:
        return True
    for name, column in columns.items():
        values = table[name].filter(pc.match_substring(table[name], end))
        if any(_joined(value.as_py(), column, shape) for value in values):
            return True
    return False


def _rows(path: Path, names: Sequence[str], shape: _Shape, account: Account) -> Iterator[Record]:
    """The rows below the header. Raises UserError at a quote that stays open."""
    row, first = -1, 1  # the header is no row
    with _text(path) as file:
        reader = csv.reader(chain(file, [END]), delimiter=shape.delimiter)
        while True:
            try:
                cells = next(reader)
            except csv.Error as error:
                raise UserError(f"{path}: line {first}: {error}") from None
            line, first = first, reader.line_num + 1
            if not cells:
                continue
            if END in cells[-1]:
                if cells == [END]:
                    return
                raise UserError(f"{path}: line {line} opens a quote that nothing closes")
            joined = 0
            if first - line > 1:
                column = next((number for number, cell in enumerate(cells) if LINE_END.search(cell)), 0)
                joined = _joined(cells[column], column, shape)
            if joined:
                problem = BadSample("open-quote", f"line {line} opens a quote that closes in line {first - 1}; "
                                                  f"{joined} rows lie within it; close or double the quote")
                account.drop(str(path), row, problem, rows=joined + 1)
            elif len(cells) != len(names):
                problem = BadSample("bad-row", f"line {line} has {len(cells)} fields, the header {len(names)}; quote "
                                               "what holds the separator")
                account.drop(str(path), row, problem)
            elif row >= 0:
                yield Record(row, f"line {line}", dict(zip(names, cells, strict=True)))
            row += joined + 1


def _joined(value: str, column: int, shape: _Shape) -> int:
    """The number of further rows that a value of several lines holds; 0 where it is plain text.

    Lines that a stray quote has joined read like rows: one names a picture where rows do, or at least two may do so.
    """
    first, *others = (line.split(shape.delimiter) for line in LINE_END.split(value))
    whole = [line for line in others[:-1] if len(line) == shape.width]
    images = [line[shape.image] for line in whole]
    images += [line[shape.image] for line in others[-1:] if shape.image < len(line) > 1]
    if shape.image >= column and 1 < len(first) == shape.width - column:
        images.append(first[shape.image - column])
    is_sure = any(ADDRESS.fullmatch(image) for image in images)
    is_likely = len(whole) == len(others) - 1 > 1 and all(NAME.fullmatch(line[shape.image]) for line in whole)
    return len(others) if is_sure or is_likely else 0
