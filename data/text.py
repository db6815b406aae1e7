"""Text for people: what a terminal would obey is taken out of it, and rows become a Markdown table."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from typing import TextIO

SECRET = re.compile(r"(?i)(^|&)[^=&]*(sig|key|token|secret|credential|auth|passw)[^=&]*=")  # names of parameters
ADDRESS = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)([^\s/?@'"<>]*@)?([^\s?'"<>]*)(\?[^\s'"<>]*)?""")


def hide_secrets(text: str) -> str:
    """The text without credentials in its addresses, and with a digest in place of queries that carry some.

    So a file or a line shows which of two signed addresses is meant, and no one can fetch with it.
    """
    return ADDRESS.sub(_public_address, text) if "://" in text else text


def _public_address(match: re.Match[str]) -> str:
    scheme, _, place, query = match.groups()
    if query and SECRET.search(query[1:]):
        query = f"?blake2b-{hashlib.blake2b(query.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"
    return scheme + place + (query or "")


def printable(text: str) -> str:
    """The text as one line: a blank for each line end, control character, direction mark and lone surrogate."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


def printable_lines(text: str) -> str:
    """The text with each of its lines `printable`."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def show(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print lines to stdout or `file`: the one place where text that names of others may be in goes to a terminal.

    Raises OSError, and ValueError or AttributeError where the stream is closed.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    lines = printable_lines(hide_secrets(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(lines, end=end, file=file, flush=True)


def markdown_table(rows: Sequence[Sequence[str]], pad_last: bool = True) -> str:
    """Return a Markdown table, the first row as its header, columns aligned; a "|" in a cell is escaped.

    `pad_last=False` leaves the last column as wide as each of its cells, for long text.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if not pad_last:
        widths[-1] = 0
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
