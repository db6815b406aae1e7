"""Checks that output folders hold nothing of other programs that would be replaced; done before any work."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from data.batch import UserError
from data.files import first_foreign, is_foreign_page, kind_of, write_mark
from data.reading import parse_json, read_text

# Files of a run: a folder that holds one of these without a run's config.json is refused.
RUN_FILES = ("config.json", "steps.jsonl", "evaluations.jsonl", "metrics.json", "ledger.jsonl", "tensorboard",
             "checkpoints", "model", "report.html", "answers.npz", "profile", "manifest.json", "sweep.jsonl",
             "sweep.json", "recipe.toml")
EVALUATION_FILES = ("metrics.json", "ledger.jsonl")
# Files of a checkpoint.
MANIFEST = "manifest.json"
STEP = re.compile(r"step-\d{8}")
FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds the config.json of a run."""
    try:
        return isinstance(parse_json(read_text(folder / "config.json"))["config"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def refuse_out(folder: Path, names: Iterable[str], dataset: str) -> None:
    """Raise UserError when --out is the folder of the dataset, or holds one of `names`, which would be replaced."""
    source = Path(dataset).expanduser()
    dataset_folder = Path(os.path.realpath(source if source.is_dir() else source.parent))
    place = Path(os.path.realpath(folder))  # by its real path, as a link may lead into the dataset
    if source.exists() and place == dataset_folder:
        raise UserError(f"--out {folder} is the folder of --dataset, where results would be read as data; choose "
                        "another folder, which may lie in it")
    if source.exists() and dataset_folder in place.parents and holds_others(folder):
        raise UserError(f"--out {folder} lies in --dataset and is not empty, so what it holds may be data; choose a "
                        "new folder, which may lie beside it")
    for name in names:
        if os.path.lexists(folder / name):
            raise UserError(f"--out {folder} holds {name}, which is not thumbtune's to replace; choose another folder")


def holds_others(folder: Path) -> bool:
    """Return whether `folder` is not empty and has no mark: files may be added to it, but it gets no mark."""
    return folder.is_dir() and not kind_of(folder) and any(folder.iterdir())


def refuse_foreign_parts(folder: Path) -> None:
    """Raise UserError for a model, checkpoint or page that a resumed run would replace and no run has written."""
    page = folder / "report.html"
    obstacle = first_foreign(folder / "model") or _foreign_checkpoint(folder / "checkpoints")
    if obstacle is None and is_foreign_page(page):
        obstacle = page
    if obstacle:
        raise UserError(f"--resume: {obstacle} was not made by thumbtune and would be replaced; move it elsewhere")


def open_evaluation(out: str, dataset: str) -> Path:
    """Make and mark the folder --out of `eval`. Raises UserError where files of other programs would be replaced."""
    folder = Path(out).expanduser()
    if is_run(folder):
        raise UserError(f"--out {folder} holds a run, whose metrics would be replaced; choose another folder")
    if kind_of(folder) != "evaluation":
        refuse_out(folder, EVALUATION_FILES, dataset)
    return _make_and_mark(folder, "" if holds_others(folder) else "evaluation")


def _foreign_checkpoint(root: Path) -> Path | None:
    """Return the first `step-*` that holds files and none of a checkpoint's; a damaged checkpoint is empty or has some.
    """
    for folder in sorted(root.glob("step-*")):
        is_empty = STEP.fullmatch(folder.name) and folder.is_dir() and not any(folder.iterdir())
        if not is_empty and not any((folder / name).is_file() for name in (*FILES, MANIFEST)):
            return folder
    return None


def refuse_foreign_page(path: str) -> None:
    """Raise UserError when --html would replace a file that is no report of thumbtune."""
    if is_foreign_page(Path(path).expanduser()):
        raise UserError(f"--html {path} is there and no page of thumbtune's; choose another name")


def refuse_foreign_shards(out: str, dataset: str) -> None:
    """Raise UserError when --out of `shards` holds shards or a ledger of other programs."""
    folder = Path(out).expanduser()
    if kind_of(folder) != "shards":
        refuse_out(folder, ["ledger.jsonl", *sorted(path.name for path in folder.glob("*.tar*"))], dataset)


def open_shards(out: str) -> Path:
    """Make and mark the folder --out of `shards`. Raises UserError."""
    return _make_and_mark(Path(out).expanduser(), "shards")


def _make_and_mark(folder: Path, kind: str) -> Path:
    """Make a folder, mark it unless `kind` is empty, and return it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if kind:
            write_mark(folder, kind)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder
