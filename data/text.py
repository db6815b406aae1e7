"""Text for people: what a terminal would obey is taken out of it, and rows become a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """The text as one line: a blank for each line end, control character, direction mark and lone surrogate."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


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
