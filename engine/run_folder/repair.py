"""Repair of a damaged run folder: what a run can go on without is set aside or written again, and a line says so.

Logs and results (answers, metrics, page, TensorBoard) are written again as far as they can be. Settings and checkpoints
cannot be: a run that lacks them says so and ends.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.batch import UserError
from data.files import MARK, first_foreign
from data.reading import parse_json, read_text

FILES = ("answers.npz", "evaluations.jsonl", "ledger.jsonl", "manifest.json", "metrics.json", "steps.jsonl")
FOLDERS = ("profile", "tensorboard")
MAX_NAME = 200  # bytes of a text file that stands for a link
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # what file systems without links answer


def unused_name(path: Path) -> Path:
    """Return `path`, or where that exists `path` with the first free number appended."""
    free, number = path, 2
    while os.path.lexists(free):
        free = path.with_name(f"{path.name}-{number}")
        number += 1
    return free


def remove_unfinished(folder: Path) -> None:
    """Delete files that a killed process was about to rename to a file of the run; the folder is locked."""
    names = (*FILES, "config.json", "report.html", MARK)
    for name in names:
        for path in folder.glob(f".{name}.{'[0-9a-f]' * 16}{Path(name).suffix}"):
            if path.is_file() and not path.is_symlink():
                path.unlink()


def set_aside(path: Path, folder: Path, log: Callable[[str], None]) -> None:
    """Rename what is in the way of a file of the run to damaged-NAME in `folder`, where it can be looked at."""
    place = unused_name(folder / f"damaged-{path.name}")
    path.replace(place)
    log(f"{path} is not what a run writes there; it is now {place.name}")


def set_aside_obstacles(folder: Path, log: Callable[[str], None]) -> None:
    """Set aside folders in the place of files that a resumed run writes, and files in the place of folders."""
    for name in FILES:
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            set_aside(folder / name, folder, log)
    for name in FOLDERS:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            set_aside(folder / name, folder, log)
    for path in sorted((folder / "tensorboard").rglob("*")):
        # Names of TensorBoard's files have an ending, names of its folders have none.
        is_file = "." in path.name
        if os.path.lexists(path) and is_file != path.is_file():
            set_aside(path, folder, log)


def pointed_name(link: Path) -> str:
    """Return the name that `last` or `best` points at, "" where it points nowhere.

    Where a copy of the run came through a file system without links, a text file stands in their place.
    """
    with suppress(OSError, ValueError):
        if link.is_symlink():
            return os.path.basename(os.readlink(link))
        if link.is_file() and link.stat().st_size <= MAX_NAME:
            return os.path.basename(read_text(link).strip())
    return ""


def replace_link(link: Path, target: str) -> None:
    """Point a relative symlink at another name of its folder, in one step; a text file where there are no links.

    A folder in its place is a copy that `cp -L` made of a checkpoint, and is deleted; any other one is set aside.
    """
    temporary = link.with_name(f".{link.name}-link")
    temporary.unlink(missing_ok=True)
    # Made under another name and renamed: a link cannot be replaced in one step otherwise.
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        temporary.write_text(target + "\n", encoding="utf-8")
    if link.is_dir() and not link.is_symlink():
        if first_foreign(link) is None:
            shutil.rmtree(link)
        else:
            link.replace(unused_name(link.with_name(f"damaged-{link.name}")))
    temporary.replace(link)


def saved_metrics(path: Path, base: Mapping[str, object], log: Callable[[str], None]) -> dict[str, Any]:
    """Return metrics.json as an earlier process left it, as far as it is whole.

    `base` are the base model's metrics, measured now: they are returned where those of the file have other splits or
    names. Those of a tuned model are left out then, to be measured again.
    """
    problem = ""
    content: Any = None
    try:
        content = parse_json(read_text(path))
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError) as error:
        problem = f"is damaged ({error})"
    if isinstance(content, dict) and _is_like(content.get("base"), base):
        tuned = content.get("tuned")
        if tuned is None or (isinstance(content.get("difference"), dict) and _has_names(tuned, base)):
            return content
        problem = "is damaged (the tuned model's figures)"
        content = {name: content[name] for name in content.keys() - {"tuned", "difference"}}
    else:
        problem = problem or "is damaged (the base model's figures)"
        content = {"base": dict(base)}
    log(f"{path} {problem}: its figures are measured again")
    return content


def _has_names(value: object, like: Mapping[str, object]) -> bool:
    """Return whether metrics by split have the splits and at least the names of `like`."""
    if not isinstance(value, dict) or value.keys() != like.keys():
        return False
    for split, metrics in like.items():
        saved = value[split]
        if not isinstance(metrics, Mapping) or not isinstance(saved, dict):
            return False
        if not metrics.keys() - {"collapsed"} <= saved.keys():
            return False
    return True


def _is_like(value: object, like: object) -> bool:
    """Return whether two JSON values have the same names and kinds, whatever the numbers, which are finite in both."""
    if isinstance(like, Mapping):
        return isinstance(value, dict) and value.keys() == like.keys() and all(
            _is_like(value[name], like[name]) for name in like)
    if isinstance(like, (list, tuple)):
        return isinstance(value, list) and len(value) == len(like)
    if isinstance(like, (int, float)):
        return isinstance(value, (int, float)) and (abs(value) < math.inf or not abs(like) < math.inf)
    return type(value) is type(like)


def require_folder(path: Path) -> None:
    """Raise UserError where a run's checkpoints folder is no folder."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"--resume: {path} is no folder, so the run's checkpoints are gone; put a copy of them back, "
                        "or move it away to begin again with step 0")
