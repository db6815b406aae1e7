"""The tables that a dataset is made of, and the split that a file's name stands for.

Finding the parts of a dataset opens few files; each part is read later, in the same way for all kinds of datasets.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data.batch import UserError
from data.ledger import Account
from data.shards.index import expand_braces
from data.sources.embedded import EmbeddedPictures
from data.sources.options import ReadOptions
from data.sources.paths import ImageLocation
from data.sources.split_names import SPLIT_NAMES, UNSPLIT
from data.sources.tables import TABLES, File, read_remote, read_table, without_sidecars
from data.web.storage import RemoteFile, parent, public_name

if TYPE_CHECKING:
    import pyarrow as pa

FILE_SPLITS = SPLIT_NAMES.keys() - {"training", "testing", "restval"}  # names of files and folders
_ENDINGS = "|".join(re.escape(each[1:]) for each in sorted(TABLES | {".tar"}))
SPLIT_FILE = re.compile(rf"({'|'.join(sorted(FILE_SPLITS))})(-.*)?\.({_ENDINGS})(\.gz)?")
WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])")  # a split anywhere in a name


class ReadContext(NamedTuple):
    """How a dataset is read."""

    options: ReadOptions
    embedded: EmbeddedPictures
    is_local: bool = True  # its tables are the user's own, whose images may lie anywhere on this machine


@dataclass(frozen=True)
class DatasetPart:
    """One table of a dataset."""

    split: str
    source: str  # the file or folder, for the ledger and for errors
    folders: Sequence[str]  # images lie below these; relative paths start at the first
    read: Callable[[Account], pa.Table]  # columns under the names of their roles
    relative: bool = True  # False: image paths without a folder name nothing
    anywhere: bool = True  # absolute paths and .. may leave the folders

    def image_location(self, options: ReadOptions) -> ImageLocation:
        """Return where its images lie. Raises UserError."""
        location = ImageLocation(self.folders, self.relative, self.anywhere, options.image_template)
        return location.under(options.image_root)


def folder_spellings(*folders: Path) -> tuple[str, ...]:
    """Return each folder as an absolute path, and the same with links resolved."""
    spellings: list[str] = []
    for folder in folders:
        spellings += [os.path.abspath(folder), os.path.realpath(folder)]
    return tuple(spellings)


def file_part(split: str, file: Path | RemoteFile, context: ReadContext) -> DatasetPart:
    """Return the part that a table, a shard or a folder of images holds.

    The images of a file in a store lie below its folder there, or have addresses of their own.
    """
    if isinstance(file, RemoteFile):
        read = partial(read_remote, file, context.options, embedded=context.embedded)
        return DatasetPart(split, public_name(file.address), [parent(file.address)], read, anywhere=False)
    folder = file if file.is_dir() else file.parent
    read = partial(read_table, file, context.options, embedded=context.embedded)
    return DatasetPart(split, str(file), folder_spellings(folder), read, anywhere=context.is_local)


def file_parts(splits: Mapping[str, Sequence[Path | RemoteFile]], context: ReadContext) -> list[DatasetPart]:
    """Return the parts of files by split."""
    parts = []
    for split, files in splits.items():
        parts += [file_part(split, file, context) for file in files]
    return parts


def files_by_split(entries: Sequence[File]) -> dict[str, list[File]]:
    """Return the files called after a split (`train.csv`, `val-00001-of-00009.parquet`); of shards and tables, shards.

    Raises UserError where a split is there in two formats.
    """
    patterns: dict[tuple[str, str], list[File]] = {}
    for entry in without_sidecars(entries):
        match = SPLIT_FILE.fullmatch(entry.name.lower())
        if match is not None:
            name, numbered, ending, packed = match.groups("")
            pattern = f"{name}{'-*' if numbered else ''}.{ending}{packed}"
            patterns.setdefault((SPLIT_NAMES[name], pattern), []).append(entry)
    named = [(split, pattern, files) for (split, pattern), files in patterns.items()]
    # Tables beside shards usually hold the same rows without the pictures.
    shards = [each for each in named if ".tar" in each[1]]
    return unique_splits(shards or named)


def files_by_word(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return files by the split that is a word of their names (`coco_train_2017.csv`); {} unless each has just one."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = {SPLIT_NAMES[word] for word in WORD.findall(file.name.lower())}
        if len(words) != 1:
            return {}
        splits.setdefault(words.pop(), []).append(file)
    return splits


def pattern_by_split(files: Sequence[File]) -> dict[str, list[File]]:
    """Return the files of a pattern by split if all of them are called after one, else all as UNSPLIT."""
    splits = files_by_split(files)
    named = sum(map(len, splits.values()))
    return splits if named == len(files) else {UNSPLIT: list(files)}


def unique_splits(named: Iterable[tuple[str, str, list[File]]]) -> dict[str, list[File]]:
    """Return files by split, from (split, its name there, files). Raises UserError for a split under two names."""
    splits: dict[str, tuple[str, list[File]]] = {}
    for split, kind, files in named:
        if split in splits:
            raise UserError(f"split {split!r} is there twice, as {splits[split][0]} and {kind}; keep one")
        splits[split] = kind, files
    return {split: files for split, (_, files) in splits.items()}


def expand_pattern(pattern: str) -> Iterator[Path]:
    """Yield the files of a pattern with {000..009}, {a,b} and *. Raises UserError at the first that is missing."""
    for name in expand_braces(pattern):
        files = sorted(glob.glob(name)) if "*" in name else [name]
        if files == [name] and not os.path.isfile(name) or not files:
            raise UserError(f"{name}: no such file; the pattern asks for it")
        yield from map(Path, files)
