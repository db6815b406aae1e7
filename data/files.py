"""Files and folders that are whole or absent after a crash, a mark in folders of this program, digests.

A folder of this program holds the file MARK with its kind and, if it is ever replaced or deleted as a whole, the files
written into it. Only what a mark lists is replaced or deleted. Files that others made are read by `reading.py`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data.reading import open_regular, parse_json, read_regular, read_text

MARK = ".thumbtune"
GENERATOR = '<meta name="generator" content="thumbtune">'  # the mark of an HTML page
LEFT_BEHIND = re.compile(r"\.(.+)-(\d+)(\.old)?", re.DOTALL)  # .NAME-PID being written or deleted; .old: to be replaced

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # of a write, which names no file
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def replace_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader, or a crash, sees the old or the new one. Raises OSError.

    A lone surrogate, as in a file name that is not UTF-8, is written as a JSON string writes it.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def replaced_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give the path of a temporary file for the block to write, which then replaces `path` in one step. Raises OSError.

    `durable` waits until it is on the disk. The folder must exist.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)  # the new name is on the disk only when its folder is
    except OSError as error:
        name_file(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def name_file(error: BaseException, path: Path) -> None:
    """Give an error of a full or failing disk the path that was being written, unless it has one."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename is None:
        error.filename = str(path)


def keep_lines(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Remove the lines of a text file that are not kept, in one step; make the file where there is none.

    A file that loses nothing is not written: a crash cannot harm it, and its digest stays. Raises OSError.
    """
    before = read_regular(path).decode("utf-8", "replace") if path.exists() else None
    text = "".join(f"{line}\n" for line in (before or "").splitlines() if is_kept(line))
    if text != before:
        replace_text(path, text)


def write_mark(folder: Path, kind: str, files: Iterable[str] = ()) -> None:
    """Mark `folder` as this program's, with its kind and the files in it. Raises OSError."""
    mark = {"made_by": "thumbtune", "kind": kind, "files": sorted(files)}
    replace_text(folder / MARK, json.dumps(mark, indent=1) + "\n")


def _read_mark(folder: Path) -> tuple[str, list[str]]:
    """Return kind and files of a marked folder; "" and none for a folder without a mark."""
    try:
        mark = parse_json(read_text(folder / MARK))
        if mark["made_by"] != "thumbtune":
            return "", []
        return str(mark["kind"]), list(map(str, mark["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "", []


def kind_of(folder: Path) -> str:
    """Return the kind that `write_mark` gave to a folder; "" without a mark: the folder is not this program's."""
    return _read_mark(folder)[0]


def is_whole(folder: Path, kind: str) -> bool:
    """Return whether a folder is marked as that kind and no file is missing in it."""
    marked, files = _read_mark(folder)
    return marked == kind and bool(files) and all((folder / name).exists() for name in files)


def is_output(folder: Path) -> bool:
    """Return whether this program wrote a folder, other than shards, which are a dataset to be read."""
    return kind_of(folder) not in ("", "shards")


def first_foreign(folder: Path) -> Path | None:
    """Return the first path at `folder` or in it that this program did not make; None if it may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder
    kind, files = _read_mark(folder)
    made = {folder / name for name in (MARK, *files)}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        if not kind:
            return folder
        if path not in made and (path.is_symlink() or not path.is_dir()):
            return path
    return None


def is_foreign_page(path: Path) -> bool:
    """Return whether `path` exists and is neither a page of this program nor an empty file."""
    if not path.is_file():
        return os.path.lexists(path)
    with path.open("rb") as file:
        head = file.read(4096)
    return bool(head) and GENERATOR.encode() not in head


@contextmanager
def replaced_folder(folder: Path, kind: str, durable: bool = True) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error it takes the place of `folder`.

    It is written beside `folder`, marked as `kind` and, if `durable`, synced to the disk; the two are exchanged, and
    then the old one is deleted. Where no system call exchanges them, the old one is renamed aside first: a process that
    dies between leaves nothing under the name, but both folders whole beside it, and `recover_folders` puts the old one
    back. Raises FileExistsError naming what is in the way and has no mark, OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folders(folder.parent)
    _refuse(first_foreign(folder))
    # Beside the folder, not in /tmp: a rename works within one file system only.
    new = _beside(folder)
    old = new.with_name(new.name + ".old")
    new.mkdir(exist_ok=True)
    _refuse(first_foreign(new))
    try:
        write_mark(new, kind)
        yield new
        write_mark(new, kind, (str(path.relative_to(new)) for path in new.rglob("*") if path.name != MARK))
        for path in (*new.rglob("*"), new) if durable else ():
            fsync(path)
        # Checked again: filling the folder may have taken hours, in which others may have put files there.
        _refuse(first_foreign(folder))
        if folder.exists() and _exchange(new, folder):
            old = new
        else:
            if folder.exists():
                folder.replace(old)
            new.replace(folder)
        fsync(folder.parent)
    except BaseException as error:
        name_file(error, folder)
        if old.exists() and not folder.exists():
            old.replace(folder)
        _delete(new)
        raise
    _delete(old)


def _exchange(new: Path, folder: Path) -> bool:
    """Exchange the names of two folders in one step; return False where the system or the file system cannot."""
    # Python has no function for it; os.replace cannot replace a folder that is not empty.
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(AT_FDCWD, bytes(new), AT_FDCWD, bytes(folder), RENAME_EXCHANGE) == 0)


def _refuse(obstacle: Path | None) -> None:
    if obstacle is not None:
        raise FileExistsError(errno.EEXIST, "not made by thumbtune, so it is not replaced", str(obstacle))


def delete_folder(folder: Path) -> None:
    """Delete a folder of this program, first renaming it; do nothing if it holds anything foreign."""
    if first_foreign(folder) is None:
        doomed = _beside(folder)
        folder.replace(doomed)
        _delete(doomed)


def recover_folders(parent: Path, locked: bool = False) -> None:
    """Put back folders that a killed `replaced_folder` has renamed aside in `parent`, and delete unfinished ones.

    Folders of processes that still run are left alone, unless the caller holds a lock that keeps other writers out.
    """
    for path in sorted(parent.glob(".*")):
        left = LEFT_BEHIND.fullmatch(path.name)
        if left is None or path.is_symlink() or not path.is_dir():
            continue
        if not locked and not _is_dead(int(left[2])):  # its writer may be at work
            continue
        # A writer killed before `write_mark` left an empty folder, or one with the mark's temporary file alone.
        barely_begun = locked and all(name.startswith(f".{MARK}") for name in os.listdir(path))
        if not (kind_of(path) or barely_begun):
            continue
        folder = parent / left[1]
        if left[3] and not folder.exists():
            path.replace(folder)
        else:
            _delete(path)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-{os.getpid()}")


def _is_dead(pid: int) -> bool:
    """Return whether no process of this number lives here; True for this one, which is not writing now."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return pid == os.getpid()


def _delete(folder: Path) -> None:
    """Delete a folder, its mark last, so that the rest after a kill or an error is still marked."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


def fsync(path: Path) -> Path:
    """Wait until a file or folder is on the disk; return its path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 in hex of a file's bytes. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(root: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the problems of files named relative to `root`: missing, unreadable, or with another digest."""
    wrong = []
    for name, digest in digests.items():
        try:
            if sha256(root / name) != digest:
                wrong.append(f"{name} changed")
        except OSError as error:
            wrong.append(f"{name}: {error.strerror}")
    return wrong
