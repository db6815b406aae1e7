"""The tables that a dataset is made of, and the split that a file's name tells.

A `Part` is one table that is read when its turn comes: finding the parts of a dataset opens few files, and reading them
is the same for all kinds of datasets.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.batch import UserError
from data.ledger import Account
from data.shards.index import expand_braces
from data.sources.rows import Columns
from data.sources.tables import TABLES, read_table, without_sidecars

if TYPE_CHECKING:
    import pyarrow as pa

LONE = "all"  # the split of parts whose dataset names none
SPLITS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid",
          "dev": "valid", "test": "test", "testing": "test"}
FOLDERS = SPLITS.keys() - {"training", "testing"}
_ENDINGS = "|".join(re.escape(each[1:]) for each in sorted(TABLES | {".tar"}))
SPLIT_FILE = re.compile(rf"({'|'.join(sorted(FOLDERS))})(-.*)?\.({_ENDINGS})(\.gz)?")
WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")  # a split anywhere in a name, as `datasets` finds it


@dataclass(frozen=True)
class Part:
    """One table of a dataset."""

    split: str
    label: str  # the file or folder, for the ledger and for errors
    folders: Sequence[str]  # images lie below these; relative paths start at the first
    read: Callable[[Account], pa.Table]  # columns under the names of their roles
    relative: bool = True  # False: image paths without a folder name nothing


def folders_of(*folders: Path) -> tuple[str, ...]:
    """Folders as paths may spell them: absolute, and with links resolved."""
    return tuple(spell(folder) for folder in folders for spell in (os.path.abspath, os.path.realpath))


def file_part(split: str, file: Path, columns: Columns) -> Part:
    """The part that a file of a known ending holds, or a folder of images."""
    folder = file if file.is_dir() else file.parent
    return Part(split, str(file), folders_of(folder), lambda account: read_table(file, columns, account))


def file_parts(splits: Mapping[str, Sequence[Path]], columns: Columns) -> list[Part]:
    """The parts of files by split."""
    return [file_part(split, file, columns) for split, files in splits.items() for file in files]


def by_split(entries: Sequence[Path]) -> dict[str, list[Path]]:
    """Files called after a split (`train.csv`, `val-00001-of-00009.parquet`); where there are shards, shards alone."""
    named = [(match, entry) for entry in without_sidecars(entries)
             if (match := SPLIT_FILE.fullmatch(entry.name.lower()))]
    shards = [(match, entry) for match, entry in named if match[3] == "tar"]
    kinds: dict[tuple[str, str], list[Path]] = {}
    for match, entry in shards or named:
        kind = f"{match[1]}{'-*' if match[2] else ''}.{match[3]}{match[4] or ''}"
        kinds.setdefault((SPLITS[match[1]], kind), []).append(entry)
    return one_kind((split, kind, files) for (split, kind), files in kinds.items())


def by_word(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that is a word of their names (`coco_train_2017.csv`); empty unless each holds just one."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = {SPLITS[word] for word in WORD.findall(file.name.lower())}
        if len(words) != 1:
            return {}
        splits.setdefault(words.pop(), []).append(file)
    return splits


def in_splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files that a pattern names, by split if all of them are called after one."""
    splits = by_split(files)
    named = sum(map(len, splits.values()))
    return splits if named == len(files) else {LONE: list(files)}


def one_kind(named: Iterable[tuple[str, str, list[Path]]]) -> dict[str, list[Path]]:
    """The files by split, from (split, its name there, files). Raises UserError for a split under two names."""
    splits: dict[str, tuple[str, list[Path]]] = {}
    for split, kind, files in named:
        if split in splits:
            raise UserError(f"split {split!r} is there twice, as {splits[split][0]} and {kind}; keep one")
        splits[split] = kind, files
    return {split: files for split, (_, files) in splits.items()}


def expand(pattern: str) -> Iterator[Path]:
    """The files of a pattern with {000..009}, {a,b} and *. Raises UserError at the first that is missing."""
    for name in expand_braces(pattern):
        files = sorted(glob.glob(name)) if "*" in name else [name] if os.path.isfile(name) else []
        if not files:
            raise UserError(f"{name}: no such file; the pattern asks for it")
        yield from map(Path, files)
