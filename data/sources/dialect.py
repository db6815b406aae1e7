"""The format of a text table: its separator, its encoding, lines above the header, blanks around values.

Files of other encodings are read as UTF-8. Bytes that are invalid stay invalid, so that their row is reported.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.reading import BlockStream, bounded_lines, open_unpacked
from data.sources.columns import FLAGS, KNOWN
from data.sources.options import ReadOptions, resolve_positions
from data.sources.paths import ENDINGS

BLOCK = 1 << 24  # bytes of a file read at one time
SAMPLE = 1 << 16  # characters from which the separator is detected
SAMPLE_ROWS = 20
SEPARATORS = (",", ";", "\t", "|")
MIN_INVALID = 20  # lines that are not UTF-8 for each line with accents that is, for a file to count as cp1252
MAX_ACCENTED = 10_000  # lines with accents from which the encoding is detected
UTF8 = ("utf-8", "utf-8-sig")
IMAGE_VALUE = re.compile(rf"\s*(https?://\S+|file://\S+|.*({ENDINGS})(#\d+)?)\s*", re.IGNORECASE)
EXCEL_LINE = re.compile(r"sep=(.)\s*", re.IGNORECASE)  # Excel's first line, which names the separator


class Dialect(NamedTuple):
    """The format of one file."""

    delimiter: str
    encoding: str = "utf-8"
    skip: int = 0  # lines above the header
    trim: bool = False  # blanks around values are removed
    is_damaged: bool = False  # some lines are not in the encoding

    @property
    def skips_blanks(self) -> bool:
        """Return whether blanks may precede an opening quote; between bars, quotes are part of the text."""
        return self.trim and self.delimiter != "|"

    def open(self, path: Path) -> BinaryIO:
        """Open a file as UTF-8."""
        file = open_unpacked(path)
        return file if self.encoding in UTF8 else io.BufferedReader(BlockStream(_as_utf8(file, self.encoding)), BLOCK)

    def open_text(self, path: Path) -> io.TextIOWrapper:
        """Open a file as text below `skip`, line ends unchanged; invalid bytes become surrogate escapes."""
        text = io.TextIOWrapper(self.open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")
        for _ in range(self.skip):
            text.readline()
        return text

    def describe(self, usual: str) -> str:
        """Return the differences from plain UTF-8 with the `usual` separator, "" for none."""
        parts = []
        if self.delimiter != usual:
            shown = {"\t": "tab", "|": "' | '" if self.trim else "'|'"}
            parts.append(f"separator {shown.get(self.delimiter, repr(self.delimiter))}")
        if self.encoding not in UTF8:
            parts.append(f"encoding {self.encoding}")
        return ", ".join(parts)


def _as_utf8(file: BinaryIO, encoding: str) -> Generator[bytes]:
    """Yield a file in another encoding as UTF-8."""
    errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    with file:
        for block in iter(partial(file.read, BLOCK), b""):
            yield decoder.decode(block).encode("utf-8", errors)
        yield decoder.decode(b"", final=True).encode("utf-8", errors)


def sniff(path: Path, options: ReadOptions, usual: str) -> Dialect:
    """Detect the format of a file, as far as `options` do not give it; `usual` is the separator of its ending."""
    encoding = options.encoding or _marked_encoding(path)
    with Dialect(usual, encoding).open_text(path) as text:
        sample = text.read(SAMPLE)
    first, _, below = sample.partition("\n")
    excel = EXCEL_LINE.fullmatch(first)
    sample = below if excel else sample
    separators = [options.delimiter] if options.delimiter else [*dict.fromkeys((usual, *SEPARATORS))]
    if excel and not options.delimiter:
        separators = [excel[1]]
    best = max(separators, key=partial(_fit, sample, options))  # of equal ones the first: the usual one of the ending
    header = next(iter(_sample_rows(sample, best)), [])
    trim = len(header) > 1 and all(cell[:1] == " " for cell in header[1:])
    is_damaged = encoding == "utf-8" and not _is_utf8(path)
    if is_damaged and not options.encoding and _is_cp1252(path, bool(excel) or best == ";"):
        encoding, is_damaged = "cp1252", False
    return Dialect(best, encoding, 1 if excel else 0, trim, is_damaged)


def _sample_rows(sample: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
            if row:
                rows.append(row)
            if len(rows) == SAMPLE_ROWS:
                break
    except csv.Error:
        pass
    return rows


def _fit(sample: str, options: ReadOptions, delimiter: str) -> tuple[int, bool, float]:
    """Return how well a separator fits: roles found in the header, a picture named there, rows of the same width."""
    rows = _sample_rows(sample, delimiter)
    if not rows or len(rows[0]) < 2:
        return 0, False, 0.0
    names = [name.strip() for name in rows[0]]
    even = sum(len(row) == len(names) for row in rows) / len(rows)
    return len(roles_found(names, options)), any(map(IMAGE_VALUE.fullmatch, names)), even


def roles_found(names: Sequence[str], options: ReadOptions) -> set[str]:
    """Return the roles for which a header has a column, named by the user, known, or counted from 1."""
    columns = resolve_positions(options.columns, names)
    lowered = {name.lower() for name in names}
    roles = set()
    for role in FLAGS:
        given = columns.names(role)
        if given and {*given} <= {*names} or not given and lowered & {*KNOWN[role]}:
            roles.add(role)
    return roles


def _marked_encoding(path: Path) -> str:
    """Return UTF-16 where a byte order mark or the zero bytes of a header in ASCII show it, else UTF-8."""
    with open_unpacked(path) as file:
        head = file.read(64)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[::2], head[1::2]
    if len(head) > 8 and not any(odd) and all(even):
        return "utf-16-le"
    if len(head) > 8 and not any(even) and all(odd):
        return "utf-16-be"
    return "utf-8"


def _is_cp1252(path: Path, from_excel: bool) -> bool:
    """Return whether several lines are not UTF-8 and hardly any line with accents is.

    A single such line is a damaged row, except in files as Excel writes them in Western Europe (`;`), where it is a
    rare accent. A byte that cp1252 lacks rules it out.
    """
    invalid = valid = 0
    with open_unpacked(path) as file:
        for line in bounded_lines(file, path):
            if line.isascii():
                continue
            try:
                line.decode()
                valid += 1
            except UnicodeDecodeError:
                try:
                    line.decode("cp1252")
                except UnicodeDecodeError:
                    return False
                invalid += 1
            if invalid + valid == MAX_ACCENTED:
                break
    return invalid >= valid * MIN_INVALID and (invalid > 1 or from_excel)


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_unpacked(path) as file:
            for block in iter(partial(file.read, BLOCK), b""):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True
