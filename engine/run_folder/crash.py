"""The run folder of this process, removed if unused; the line about an unexpected error. Imports nothing heavy."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from data.files import MARK, kind_of, write_mark
from data.text import hide_secrets, public_arguments, show

WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")  # see engine/ranks/launch.py


@dataclass
class NewRunFolder:
    """The run folder of this process, None before it is opened, and the folders created for it."""

    folder: Path | None = None
    made: list[Path] = field(default_factory=list)  # innermost first
    marked: bool = False  # by this process

    def make(self, folder: Path, holds_run: bool, is_new: bool = False) -> None:
        """Make a folder and mark it as a run's, unless it holds other files; note which folders were created.

        Raises OSError; with `is_new`, FileExistsError where there is one already.
        """
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=not is_new)
        self.folder = folder
        if not kind_of(folder) and (holds_run or not any(folder.iterdir())):
            write_mark(folder, "run")
            self.marked = True

    def discard(self) -> None:
        """Undo `make` if nothing has been written into the folder since."""
        with suppress(OSError):
            if self.marked and self.folder is not None and os.listdir(self.folder) == [MARK]:
                (self.folder / MARK).unlink()
            for path in self.made:
                path.rmdir()
        self.folder, self.made, self.marked = None, [], False


CURRENT_RUN = NewRunFolder()


def end_rank(code: int) -> None:
    """End this process at once if it is one of several ranks, else return.

    Threads of gloo may outlive the group that was left, and have aborted a Python that ended in order (2 runs of 60).
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_now(code)


@contextmanager
def early_end_announced() -> Iterator[None]:
    """Inside, a mistake on the command line ends the other ranks too, where it may be of this rank alone."""
    try:
        yield
    except SystemExit as ended:
        if ended.code and any(os.environ.get(name, "1") != "1" for name in WORLD_SIZES):
            from engine.ranks.rendezvous import announce_early_end  # loads torch

            announce_early_end()
        raise


def end_now(code: int) -> NoReturn:
    """End this process with nothing but a flush of what it has printed."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or its reader is gone
            stream.flush()
    os._exit(code)


def say_error(text: str) -> None:
    """Print a line on stderr, if stderr is open."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            show(text, sys.stderr)


def rank_from_environment() -> int:
    """Return RANK of the environment, 0 where it is no number."""
    rank = os.environ.get("RANK", "")
    return int(rank) if re.fullmatch(r"[0-9]{1,9}", rank) else 0


def explain_crash(command: str, error: BaseException, rank: int) -> str:
    """Return one line about an unexpected error; write its traceback to the run folder, else to a temporary folder."""
    text = "".join(traceback.format_exception(error))
    summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    name = f"error-rank-{rank}-{os.getpid()}.txt"
    # The run folder's disk may be full, which may be the error: then a temporary folder, then the present one.
    folders = [CURRENT_RUN.folder]
    with suppress(OSError):  # there is none where every disk is full
        folders.append(Path(tempfile.gettempdir()))
    with suppress(OSError):  # it was deleted
        folders.append(Path.cwd())
    for folder in folders:
        if folder is None or not folder.is_dir():
            continue
        with suppress(OSError):
            path = folder / (name if folder == CURRENT_RUN.folder else f"thumbtune-{name}")
            path.write_text(f"{public_arguments(sys.argv)}\n{hide_secrets(text)}", "utf-8", "backslashreplace")
            return f"run.py {command} failed: {summary} (not foreseen; the traceback is in {path})"
    return f"run.py {command} failed: {summary} (not foreseen, and the traceback could not be written)"
