"""CSV and TSV: by Arrow where every row is sound, else row by row, so that a bad row is named and the rest is kept."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.dialect import IMAGE_VALUE, BLOCK, Dialect, roles_found, sniff
from data.sources.options import ReadOptions, resolve_positions
from data.sources.records import Record, from_records
from data.sources.rows import Columns, detect_columns, rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa

END = "\0end"  # fed to the reader after the last line; a quote that is still open swallows it
LINE_END = re.compile(r"\r\n|\r|\n")
NAME = re.compile(r"\s*\S*[\d/]\S*\s*")  # may name an image, as 17 and a/b do


class _Shape(NamedTuple):
    """The rows of a file: its format, its columns, and which of them names the image."""

    dialect: Dialect
    written: list[str]  # column names as the header has them
    names: list[str]  # the same, without blanks around them where blanks are trimmed
    image: int
    has_header: bool


def read_csv(path: Path, options: ReadOptions, account: Account, delimiter: str) -> pa.Table:
    """A CSV file, all values text and "" where one is empty. Raises UserError that names the line.

    `delimiter` is the usual one for the file's ending; another one is found by itself, as the encoding is.
    """
    csv.field_size_limit(1 << 30)
    try:
        dialect = sniff(path, options, delimiter)
        said = dialect.describe(options.delimiter or delimiter)
        if said and not (options.encoding and options.delimiter):
            account.note(f"{path}: {said}")
        if dialect.is_damaged:
            account.note(f"{path}: some lines are not UTF-8, their rows are dropped; --encoding, such as cp1252, reads "
                         "a file that is in another encoding")
        return _read(path, dialect, options, account)
    except UnicodeError as error:  # bytes that cannot be passed on as wrong ones; of UTF-16, a half one
        name, reason = options.encoding or "UTF-16", str(error)
        if isinstance(error, UnicodeDecodeError):
            name, reason = error.encoding, error.reason
        raise UserError(f"{path}: not {name} ({reason}); name its encoding with --encoding") from None


def _read(path: Path, dialect: Dialect, options: ReadOptions, account: Account) -> pa.Table:
    written = _first_row(path, dialect)
    names = [name.strip(" ") for name in written] if dialect.trim else written
    image = _headless_image(names, options)
    columns = resolve_positions(options.columns, names)
    if image is not None:
        account.note(f"{path}: no header, line {1 + dialect.skip} is read as a row; the columns are called "
                     f"{', '.join(str(place + 1) for place in range(len(names)))}")
        columns = _by_position(options.columns, len(names), image)
        names = written = [str(place + 1) for place in range(len(names))]
    if len(names) == 1:
        account.note(f"{path}: line {1 + dialect.skip} has one column; --delimiter names another separator")
    picked = detect_columns(names, columns, str(path), account)
    shape = _Shape(dialect, written, names, names.index(picked["image"][0]), image is None)
    if not dialect.skips_blanks:
        table = _read_by_arrow(path, shape, picked)
        if table is not None:
            return table
    message_if_empty = f"{path}: holds no rows; fill it or remove it"
    return from_records(_rows(path, shape, account), columns, str(path), message_if_empty, account)


def _read_by_arrow(path: Path, shape: _Shape, picked: Mapping[str, Sequence[str]]) -> pa.Table | None:
    """The table, None where a row is not sound."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow

    dialect = shape.dialect
    places = {name: shape.names.index(name) for role in picked for name in picked[role]}
    used = [shape.written[place] for place in places.values()]
    try:
        with dialect.open(path) as file:
            table = arrow.read_csv(
                file,
                arrow.ReadOptions(block_size=BLOCK, skip_rows=dialect.skip,
                                  column_names=None if shape.has_header else shape.written),
                arrow.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
                arrow.ConvertOptions(include_columns=used, column_types=dict.fromkeys(used, pa.string())))
        table = table.rename_columns([*places])
        if _may_join_rows(path, table, places, shape):
            return None
    except (ValueError, KeyError):  # a row of another width, or one that is not UTF-8
        return None
    if dialect.trim:
        columns = [pc.utf8_trim(column, " ") for column in table.columns]
        table = pa.table(dict(zip(table.column_names, columns, strict=True)))
    return rename_to_roles(table, picked)


def _first_row(path: Path, dialect: Dialect) -> list[str]:
    try:
        with dialect.open_text(path) as file:
            rows = csv.reader(file, delimiter=dialect.delimiter, skipinitialspace=dialect.skips_blanks)
            names = next(filter(None, rows), [])
    except csv.Error as error:
        raise UserError(f"{path}: line {1 + dialect.skip}: {error}") from None
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: line {1 + dialect.skip} is not {dialect.encoding.upper()}; save the file as UTF-8 or "
                        "name its encoding with --encoding") from None
    return names


def _headless_image(cells: Sequence[str], options: ReadOptions) -> int | None:
    """The place of the image where the first row has no names but reads like a row; None for a header."""
    named = options.columns.image
    if named is None:
        if "image" in roles_found(cells, options):
            return None
        return next((place for place, cell in enumerate(cells) if IMAGE_VALUE.fullmatch(cell)), None)
    if named in cells or not named.isdecimal() or not 1 <= int(named) <= len(cells):
        return None
    place = int(named) - 1
    return place if IMAGE_VALUE.fullmatch(cells[place]) else None


def _by_position(columns: Columns, width: int, image: int) -> Columns:
    """The columns of a file without a header: of two, the one that is no image is the title."""
    title = columns.title
    if not title and width == 2:
        title = (str(2 - image),)
    return replace(columns, image=str(image + 1), title=title)


def _may_join_rows(path: Path, table: pa.Table, columns: Mapping[str, int], shape: _Shape) -> bool:
    """True if a stray quote may have joined rows; False if rows, and values that are text, account for all line ends.

    `columns` are those of the table, and where they stand in the file.
    """
    import pyarrow.compute as pc

    quotes = newlines = returns = 0
    last = b"\n"
    with shape.dialect.open(path) as file:
        for block in iter(partial(file.read, BLOCK), b""):
            quotes += block.count(b'"')
            newlines += block.count(b"\n")
            returns += block.count(b"\r")
            last = block[-1:]
    if not quotes:
        return False
    end, lines = ("\n", newlines) if newlines else ("\r", returns)
    head = shape.dialect.skip + shape.has_header
    within = sum(pc.sum(pc.count_substring(table[name], end)).as_py() or 0 for name in columns)
    if quotes % 2 or lines + (last not in b"\r\n") != head + len(table) + within:
        return True
    for name, column in columns.items():
        values = table[name].filter(pc.match_substring(table[name], end))
        if any(_joined(value.as_py(), column, shape) for value in values):
            return True
    return False


def _rows(path: Path, shape: _Shape, account: Account) -> Iterator[Record]:
    """The rows below the header. Raises UserError at a quote that stays open."""
    dialect, names = shape.dialect, shape.names
    row = -1 if shape.has_header else 0  # the header is no row
    like = "the header" if shape.has_header else "the first row"
    first = 1 + dialect.skip
    with dialect.open_text(path) as file:
        reader = csv.reader(chain(file, [END]), delimiter=dialect.delimiter,
                            skipinitialspace=dialect.skips_blanks)
        while True:
            try:
                cells = next(reader)
            except csv.Error as error:
                raise UserError(f"{path}: line {first}: {error}") from None
            line, first = first, reader.line_num + 1 + dialect.skip
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
                problem = BadSample("bad-row", f"line {line} has {len(cells)} fields, {like} {len(names)}; quote "
                                               "what holds the separator")
                account.drop(str(path), row, problem)
            elif row >= 0:
                if dialect.trim:
                    cells = [cell.strip(" ") for cell in cells]
                yield Record(row, f"line {line}", dict(zip(names, cells, strict=True)))
            row += joined + 1


def _joined(value: str, column: int, shape: _Shape) -> int:
    """The number of further rows that a value of several lines holds; 0 where it is plain text.

    Lines that a stray quote has joined read like rows: one names a picture where rows do, or at least two may do so.
    """
    first, *others = (line.split(shape.dialect.delimiter) for line in LINE_END.split(value))
    whole = [line for line in others[:-1] if len(line) == len(shape.names)]
    images = [line[shape.image] for line in whole]
    images += [line[shape.image] for line in others[-1:] if shape.image < len(line) > 1]
    if shape.image >= column and 1 < len(first) == len(shape.names) - column:
        images.append(first[shape.image - column])
    is_sure = any(IMAGE_VALUE.fullmatch(image) for image in images)
    is_likely = len(whole) == len(others) - 1 > 1 and all(NAME.fullmatch(line[shape.image]) for line in whole)
    return len(others) if is_sure or is_likely else 0
