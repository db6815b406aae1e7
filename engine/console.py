"""The console: standard streams that are safe to print to, and lines of progress that cannot hold up a run."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

from data.text import clean_library_output, show

PATIENCE_S = 1.0  # how long a line of progress waits for somebody to read
CLEAR = "\x1b[2K"  # erases the progress line of a terminal


def open_console() -> None:
    """Prepare the standard streams of this process for text of any language and of any origin."""
    hold_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, a title can be printed
            stream.reconfigure(errors="backslashreplace")
    clean_library_output()


def hold_standard_descriptors() -> None:
    """Open the null device for each standard stream that was closed when this process was started, as by `2>&-`.

    Else the next file that is opened gets its number, and what a library in C prints goes into that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def print_result(text: str, place: str = "") -> str:
    """Print a result on stdout. Where that fails and it is in a file, `place`, return a line that says so, else "".

    Raises OSError where the result is lost: BrokenPipeError where its reader has gone, as `| head` does.
    """
    try:
        show(text)
    except (OSError, ValueError) as error:
        mute_stdout()
        reason = getattr(error, "strerror", None) or error
        if place:
            return f"the result could not be printed ({reason}); it is in {place}"
        if isinstance(error, BrokenPipeError):
            raise
        raise OSError(f"the result could not be printed ({reason})") from error
    return ""


def mute_stdout() -> None:
    """Point stdout at /dev/null once nothing can be written to it.

    Python flushes it once more as it ends, and would exit with another code where that fails.
    """
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class ProgressPrinter:
    """Prints lines of progress to stderr. None of them can end or hold up the run.

    Where the terminal or a `tee` is gone, or the disk of a log is full, the line is lost. Where nobody reads (a
    terminal stopped by Ctrl-S, a pager that waits), lines are left out until somebody does; the first one waits
    PATIENCE_S.
    """

    def __init__(self) -> None:
        self.left_out = 0  # lines since somebody read

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._print(text, CLEAR if on_terminal() else "", "\n")

    def live(self, text: str) -> None:
        """Print a line on a terminal that the next one replaces, as much of it as the terminal is wide."""
        self._print(whole_fields(text, _columns() - 1), CLEAR, "\r")

    def _print(self, text: str, before: str, end: str) -> None:
        with suppress(OSError, ValueError):
            if sys.stderr is None:
                return
            if not _has_room(sys.stderr, 0 if self.left_out else PATIENCE_S):
                self.left_out += 1
                return
            missing = f"({self.left_out:,} lines are left out here: nobody read them)\n" if self.left_out else ""
            self.left_out = 0
            print(before, end="", file=sys.stderr)
            show(missing + text, sys.stderr, end)


def on_terminal() -> bool:
    """Return whether stderr is a terminal on which a line can be erased."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def whole_fields(line: str, width: int) -> str:
    """Return the fields of a line, two blanks apart, that fit into `width` columns; no number is cut in half."""
    if len(line) <= width:
        return line
    return line[: width + 2].rpartition("  ")[0] or line[:width]


def _columns() -> int:
    """Return the width of the terminal behind stderr; stdout may go to a file."""
    columns = os.environ.get("COLUMNS", "")
    with suppress(OSError, ValueError, AttributeError):
        columns = columns or str(os.get_terminal_size(sys.stderr.fileno()).columns)
    return int(columns) if columns.isdecimal() and int(columns) else 80


def _has_room(stream: TextIO, seconds: float) -> bool:
    """Return whether a line can be written to a stream without waiting, now or within so many seconds."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return True
    watch = select.poll()
    watch.register(descriptor, select.POLLOUT)
    return bool(watch.poll(1000 * seconds))
