"""What this process has begun in its run folder, and what it leaves there when it ends badly. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data.files import MARK, kind_of, write_mark


@dataclass
class NewRunFolder:
    """The run folder of this process, None before there is one, and the folders that were made for it."""

    folder: Path | None = None
    made: list[Path] = field(default_factory=list)  # innermost first
    marked: bool = False

    def make(self, folder: Path, holds_run: bool) -> None:
        """Make a folder and mark it as a run's, unless others' files are in it; remember what was not there before.

        Raises OSError.
        """
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        if not kind_of(folder) and (holds_run or not any(folder.iterdir())):
            write_mark(folder, "run")
            self.marked = True

    def discard(self) -> None:
        """Take back `make` where nothing has been written into the folder since: a run that never began."""
        with suppress(OSError):
            if self.marked and self.folder is not None and os.listdir(self.folder) == [MARK]:
                (self.folder / MARK).unlink()
            for path in self.made:
                path.rmdir()
        self.folder, self.made, self.marked = None, [], False


BEGUN = NewRunFolder()


def explain_crash(command: str, error: BaseException, rank: int) -> str:
    """One line about an error that nobody foresaw, and where its traceback is now: in the run folder, else beside."""
    text = "".join(traceback.format_exception(error))
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    name = f"error-rank-{rank}-{os.getpid()}.txt"
    for folder in (BEGUN.folder, Path(tempfile.gettempdir()), Path.cwd()):
        if folder is None or not folder.is_dir():
            continue
        with suppress(OSError):
            path = folder / (name if folder == BEGUN.folder else f"thumbtune-{name}")
            path.write_text(f"{sys.argv}\n{text}", encoding="utf-8", errors="backslashreplace")
            return f"run.py {command} failed: {what} (not foreseen; the traceback is in {path})"
    return f"run.py {command} failed: {what} (not foreseen, and the traceback could not be written)"
