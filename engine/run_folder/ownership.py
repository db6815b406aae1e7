"""Whose is what lies where we want to write? Foreign files and folders in the way are refused before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data.batch import UserError
from data.files import first_foreign, is_foreign_page, kind_of, read_text, write_mark

# What a run writes: a folder that holds one of these and no run's config.json is not taken.
RUN_FILES = ("config.json", "steps.jsonl", "evaluations.jsonl", "metrics.json", "ledger.jsonl", "tensorboard",
             "checkpoints", "model", "report.html", "answers.npz", "profile", "manifest.json", "sweep.jsonl",
             "sweep.json", "recipe.toml")
EVALUATION_FILES = ("metrics.json", "ledger.jsonl")
# What a checkpoint holds.
MANIFEST = "manifest.json"
FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")


def is_run(folder: Path) -> bool:
    """Is there a config.json in `folder` that a run of ours has written?"""
    try:
        return isinstance(json.loads(read_text(folder / "config.json"))["config"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def refuse_out(folder: Path, names: Iterable[str], dataset: str) -> None:
    """Raises UserError when --out is where the dataset lies, or holds one of `names`, which would be replaced."""
    source = Path(dataset).expanduser()
    home = Path(os.path.realpath(source if source.is_dir() else source.parent))
    place = Path(os.path.realpath(folder))
    if source.exists() and place == home:
        raise UserError(f"--out {folder} is the folder of --dataset, where results would be read as data; choose "
                        "another folder, which may lie in it")
    if source.exists() and home in place.parents and holds_others(folder):
        raise UserError(f"--out {folder} lies in --dataset and is not empty, so what it holds may be data; choose a "
                        "new folder, which may lie beside it")
    if taken := next((name for name in names if os.path.lexists(folder / name)), None):
        raise UserError(f"--out {folder} holds {taken}, which is not thumbtune's to replace; choose another folder")


def holds_others(folder: Path) -> bool:
    """Is it a folder of somebody else's that is not empty? Such a one may be written into, but is never called ours."""
    return folder.is_dir() and not kind_of(folder) and any(folder.iterdir())


def refuse_foreign_parts(folder: Path) -> None:
    """Raises UserError for what lies where a resumed run will write and was not made by one."""
    page = folder / "report.html"
    obstacle = (first_foreign(folder / "model") or _foreign_checkpoint(folder / "checkpoints")
                or (page if is_foreign_page(page) else None))
    if obstacle:
        raise UserError(f"--resume: {obstacle} was not made by thumbtune and would be replaced; move it elsewhere")


def open_evaluation(out: str, dataset: str) -> Path:
    """The folder --out of `eval`, made and marked. Raises UserError where others' files would be replaced."""
    folder = Path(out).expanduser()
    if is_run(folder):
        raise UserError(f"--out {folder} holds a run, whose metrics would be replaced; choose another folder")
    if kind_of(folder) != "evaluation":
        refuse_out(folder, EVALUATION_FILES, dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not holds_others(folder):
            write_mark(folder, "evaluation")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def _foreign_checkpoint(root: Path) -> Path | None:
    """The first `step-*` that holds no file of a checkpoint: one of another program. A damaged one of ours has some."""
    for folder in sorted(root.glob("step-*")):
        if not any((folder / name).is_file() for name in (*FILES, MANIFEST)):
            return folder
    return None


def refuse_foreign_page(path: str) -> None:
    """Raises UserError when --html would replace what is no page of ours."""
    if is_foreign_page(Path(path).expanduser()):
        raise UserError(f"--html {path} is there and no page of thumbtune's; choose another name")


def refuse_foreign_shards(out: str, dataset: str) -> None:
    """Raises UserError when --out of `shards` holds others' shards or a ledger."""
    folder = Path(out).expanduser()
    if kind_of(folder) != "shards":
        refuse_out(folder, ["ledger.jsonl", *sorted(path.name for path in folder.glob("*.tar*"))], dataset)


def open_shards(out: str) -> Path:
    """The folder --out of `shards`, made and marked. Raises UserError."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_mark(folder, "shards")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder
