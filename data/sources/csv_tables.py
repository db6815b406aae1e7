"""CSV and TSV: by Arrow where every row is sound, else row by row, so that a bad row is named and the rest is kept."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from data.batch import BadSample, UserError
from data.files import open_regular
from data.ledger import Account
from data.sources.pictures import PICTURES
from data.sources.records import Record, from_records
from data.sources.rows import Columns, in_roles, pick

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 24  # bytes of a file read at one time; a longer row is read row by row
END = "\0end"  # fed to the reader after the last line; a quote that is still open swallows it
ADDRESS = re.compile(rf"\s*(https?://\S+|.*({'|'.join(map(re.escape, sorted(PICTURES)))}))\s*", re.IGNORECASE)
LINE_END = re.compile(r"\r\n|\r|\n")
NAME = re.compile(r"\s*\S*[\d/]\S*\s*")  # may name an image, as 17 and a/b do


def read_csv(path: Path, columns: Columns, account: Account, delimiter: str) -> pa.Table:
    """A CSV file, all values text and "" where one is empty. Raises UserError that names the line."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    names = _header(path, delimiter)
    picked = pick(names, columns, str(path))
    try:
        table = arrow.read_csv(
            path, arrow.ReadOptions(block_size=BLOCK), arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow.ConvertOptions(include_columns=[*{*picked.values()}],
                                 column_types=dict.fromkeys(picked.values(), pa.string())))
        sound = not _may_join_lines(path, len(table))
    except (ValueError, KeyError):  # a row of another width, or one that is not UTF-8
        sound = False
    if sound:
        return in_roles(table, picked)
    rows = _rows(path, delimiter, names, names.index(picked["image"]), account)
    return from_records(rows, columns, str(path), f"{path}: holds no rows; fill it or remove it", account)


def _text(path: Path) -> io.TextIOWrapper:
    """A file as text with its own line ends; bytes that are not UTF-8 become halves of surrogate pairs."""
    return io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


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


def _may_join_lines(path: Path, rows: int) -> bool:
    """May a quoted value hold line ends? Sound tables hold such values, and so does one that a stray quote joins."""
    quotes = lines = returns = 0
    last = b"\n"
    with open_regular(path) as file:
        for block in iter(partial(file.read, BLOCK), b""):
            quotes += block.count(b'"')
            lines += block.count(b"\n")
            returns += block.count(b"\r")
            last = block[-1:]
    lines = (lines or returns) + (last not in b"\r\n")
    return quotes > 0 and (quotes % 2 == 1 or lines != rows + 1)


def _rows(path: Path, delimiter: str, names: Sequence[str], place: int, account: Account) -> Iterator[Record]:
    """The rows below the header, `place` being the column of images. Raises UserError at a quote that stays open."""
    row, first = -1, 1  # the header is no row
    with _text(path) as file:
        reader = csv.reader(chain(file, [END]), delimiter=delimiter)
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
            joined = _joined(cells, delimiter, len(names), place) if first - line > 1 else 0
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


def _joined(cells: Sequence[str], delimiter: str, width: int, place: int) -> int:
    """How many further rows of the table the first value of several lines holds; 0 where it is just text.

    Lines that a stray quote has joined read like rows: one names a picture where rows do, or at least two may do so.
    """
    column = next(number for number, cell in enumerate(cells) if LINE_END.search(cell))
    first, *others = (line.split(delimiter) for line in LINE_END.split(cells[column]))
    whole = [line for line in others[:-1] if len(line) == width]
    images = [line[place] for line in whole] + [line[place] for line in others[-1:] if place < len(line) > 1]
    if place >= column and 1 < len(first) == width - column:
        images.append(first[place - column])
    is_sure = any(ADDRESS.fullmatch(image) for image in images)
    is_likely = len(whole) == len(others) - 1 > 1 and all(NAME.fullmatch(line[place]) for line in whole)
    return len(others) if is_sure or is_likely else 0
