"""CSV and TSV: by Arrow if every row is sound, else row by row, so that bad rows are reported and the rest is kept."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.reading import MAX_LINE, bounded_lines
from data.sources.columns import Columns, detect_columns
from data.sources.dialect import BLOCK, IMAGE_VALUE, Dialect, roles_found, sniff
from data.sources.lists import is_list, parse_lists, spell_lists
from data.sources.options import ReadOptions, resolve_positions
from data.sources.records import Record, from_records
from data.sources.rows import rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa

# A line after the last one. If a quote is still open at the end of the file, it ends up inside a value.
END = "\0end"
LINE_END = re.compile(r"\r\n|\r|\n")
NAME = re.compile(r"\s*\S*[\d/]\S*\s*")  # may name an image, as 17 and a/b do


class _Shape(NamedTuple):
    """The format of a file, its columns, and which of them names the image."""

    dialect: Dialect
    written: list[str]  # column names as the header has them
    names: list[str]  # the same, without blanks around them where blanks are trimmed
    image: int
    has_header: bool


def read_csv(path: Path, options: ReadOptions, account: Account, delimiter: str) -> pa.Table:
    """Read a CSV file, all values as text, "" for an empty one. Raises UserError that names the line.

    `delimiter` is the usual one for the file's ending; another one is detected, as the encoding is.
    """
    csv.field_size_limit(MAX_LINE)
    account.apply("--delimiter", "--encoding")
    try:
        dialect = sniff(path, options, delimiter)
        differences = dialect.describe(options.delimiter or delimiter)
        if differences and not (options.encoding and options.delimiter):
            account.note(f"{path}: {differences}")
        if dialect.is_damaged:
            account.note(f"{path}: some lines are not UTF-8, their rows are dropped; --encoding, such as cp1252, reads "
                         "a file that is in another encoding")
        return _with_lists(_read(path, dialect, options, account), path, account)
    except UnicodeError as error:  # invalid bytes that cannot be kept as such, e.g. half a character of UTF-16
        name, reason = options.encoding or "UTF-16", str(error)
        if isinstance(error, UnicodeDecodeError):
            name, reason = error.encoding, error.reason
        raise UserError(f"{path}: not {name} ({reason}); name its encoding with --encoding") from None


def _with_lists(table: pa.Table, path: Path, account: Account) -> pa.Table:
    """Return the table with lists for texts that spell lists, ['…', '…'], as pandas writes a column of lists."""
    for role in [role for role in ("title", "title_neg") if role in table.column_names]:
        texts = table[role]
        if is_list(texts.type) or not spell_lists(texts):
            continue
        lists = parse_lists(texts)
        if lists is None:
            account.note(f"{path}: the {role} column looks like lists and is read as plain text; write lists as JSON "
                         'does, ["…", "…"], or write Parquet')
            continue
        account.note(f"{path}: the {role} column spells lists of texts, each of which is one {role}")
        table = table.set_column(table.column_names.index(role), role, lists)
    return table


def _read(path: Path, dialect: Dialect, options: ReadOptions, account: Account) -> pa.Table:
    written = _first_row(path, dialect)
    names = [name.strip(" ") for name in written] if dialect.trim else written
    image = _headless_image(names, options)
    columns = resolve_positions(options.columns, names)
    if image is not None:
        names = written = [str(number) for number in range(1, len(names) + 1)]
        account.note(f"{path}: no header, line {1 + dialect.skip} is read as a row; the columns are called "
                     f"{', '.join(names)}")
        columns = _by_position(options.columns, len(names), image)
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
    """Return the table, None if a row is not sound."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv as arrow

    dialect = shape.dialect
    positions = {name: shape.names.index(name) for name in chain.from_iterable(picked.values())}
    used = [shape.written[position] for position in positions.values()]
    try:
        with dialect.open(path) as file:
            table = arrow.read_csv(
                file,
                arrow.ReadOptions(block_size=BLOCK, skip_rows=dialect.skip,
                                  column_names=None if shape.has_header else shape.written),
                arrow.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
                arrow.ConvertOptions(include_columns=used, column_types=dict.fromkeys(used, pa.string())))
        table = table.rename_columns([*positions])
        if _may_join_rows(path, table, positions, shape):
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
            rows = csv.reader(bounded_lines(file, path), delimiter=dialect.delimiter,
                              skipinitialspace=dialect.skips_blanks)
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
    """Return the position of the image if the first row holds values rather than names; None for a header."""
    named = options.columns.image
    if named is None:
        if "image" in roles_found(cells, options):
            return None
        return next((position for position, cell in enumerate(cells) if IMAGE_VALUE.fullmatch(cell)), None)
    if named in cells or not named.isdecimal() or not 1 <= int(named) <= len(cells):
        return None
    position = int(named) - 1
    return position if IMAGE_VALUE.fullmatch(cells[position]) else None


def _by_position(columns: Columns, width: int, image: int) -> Columns:
    """Return the columns of a file without a header: of two, the one that is no image is the title."""
    title = columns.title
    if not title and width == 2:
        title = (str(2 - image),)
    return replace(columns, image=str(image + 1), title=title)


def _may_join_rows(path: Path, table: pa.Table, columns: Mapping[str, int], shape: _Shape) -> bool:
    """Return whether a stray quote may have joined rows, as rows and plain text do not account for all line ends.

    `columns` are those of the table and their positions in the file.
    """
    import pyarrow.compute as pc

    # Arrow reads quotes over line ends, so one stray quote swallows rows up to the next one. All line ends of the file
    # must be those between rows or inside values; where they are not, the rows are read one by one.
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
    within = {name: _count(table[name], end.encode()) for name in columns}
    if quotes % 2 or lines + (last not in b"\r\n") != head + len(table) + sum(within.values()):
        return True
    for name, column in columns.items():
        if not within[name]:
            continue
        values = table[name].filter(pc.match_substring(table[name], end))
        if any(_joined(value.as_py(), column, shape) for value in values):
            return True
    return False


def _count(texts: pa.ChunkedArray, byte: bytes) -> int:
    """Return how often a byte is in the texts of a column without nulls, in a tenth of Arrow's time."""
    count = 0
    for chunk in filter(len, texts.chunks):
        _, ends, data = chunk.buffers()
        first, last = np.frombuffer(ends, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
        count += bytes(memoryview(data or b"")[first:last]).count(byte)
    return count


def _rows(path: Path, shape: _Shape, account: Account) -> Iterator[Record]:
    """Yield the rows below the header. Raises UserError for a quote that stays open."""
    dialect, names = shape.dialect, shape.names
    row = -1 if shape.has_header else 0  # the header is no row
    like = "the header" if shape.has_header else "the first row"
    first = 1 + dialect.skip
    with dialect.open_text(path) as file:
        reader = csv.reader(chain(bounded_lines(file, path), [END]), delimiter=dialect.delimiter,
                            skipinitialspace=dialect.skips_blanks)
        while True:
            try:
                cells = next(reader)
            except csv.Error as error:
                reason = str(error)
                if reason.startswith("field larger"):
                    reason = f"a value of more than {MAX_LINE:,} characters, as a quote begins that nothing closes"
                raise UserError(f"{path}: line {first}: {reason}; close it, or write quotes within a value twice"
                                ) from None
            line, first = first, reader.line_num + 1 + dialect.skip
            if not cells:
                continue
            if END in cells[-1]:
                if cells == [END]:
                    return
                raise UserError(f"{path}: line {line} opens a quote that nothing closes; close it, or write "
                                "quotes within a value twice")
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
                size = sum(map(len, cells))
                yield Record(row, f"line {line}", dict(zip(names, cells, strict=True)), size)
            row += joined + 1


def _joined(value: str, column: int, shape: _Shape) -> int:
    """Return the number of further rows that a value of several lines holds; 0 for plain text.

    Lines that a stray quote has joined look like rows: one names a picture in the column of images, or two or more may.
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
