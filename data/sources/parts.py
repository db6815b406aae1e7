"""The tables that a dataset is made of, and the split that a file's name tells.

A `DatasetPart` is one table that is read when its turn comes: finding the parts of a dataset opens few files, and reading them
is the same for all kinds of datasets.
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
from data.sources.split_names import UNSPLIT, SPLIT_NAMES
from data.sources.tables import TABLES, File, read_remote, read_table, without_sidecars
from data.web.storage import RemoteFile, parent, public_name

if TYPE_CHECKING:
    import pyarrow as pa

FILE_SPLITS = SPLIT_NAMES.keys() - {"training", "testing", "restval"}  # names of files and folders
_ENDINGS = "|".join(re.escape(each[1:]) for each in sorted(TABLES | {".tar"}))
SPLIT_FILE = re.compile(rf"({'|'.join(sorted(FILE_SPLITS))})(-.*)?\.({_ENDINGS})(\.gz)?")
WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])")  # a split anywhere in a name, as `datasets` finds it


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
        return ImageLocation(self.folders, self.relative, self.anywhere, options.image_template).under(options.image_root)


def folder_spellings(*folders: Path) -> tuple[str, ...]:
    """Folders as paths may spell them: absolute, and with links resolved."""
    return tuple(spell(folder) for folder in folders for spell in (os.path.abspath, os.path.realpath))


def file_part(split: str, file: Path, context: ReadContext) -> DatasetPart:
    """The part that a file of a known ending holds, or a folder of images."""
    folder = file if file.is_dir() else file.parent
    read = partial(read_table, file, context.options, embedded=context.embedded)
    return DatasetPart(split, str(file), folder_spellings(folder), read, anywhere=context.is_local)


def remote_part(split: str, file: RemoteFile, context: ReadContext) -> DatasetPart:
    """The part that a table or shard in a store holds; its images lie there too, or at other addresses."""
    read = partial(read_remote, file, context.options, embedded=context.embedded)
    return DatasetPart(split, public_name(file.address), [parent(file.address)], read, anywhere=False)


def file_parts(splits: Mapping[str, Sequence[Path | RemoteFile]], context: ReadContext) -> list[DatasetPart]:
    """The parts of files by split."""
    parts = []
    for split, files in splits.items():
        for file in files:
            if isinstance(file, RemoteFile):
                parts.append(remote_part(split, file, context))
            else:
                parts.append(file_part(split, file, context))
    return parts


def files_by_split(entries: Sequence[File]) -> dict[str, list[File]]:
    """Files called after a split (`train.csv`, `val-00001-of-00009.parquet`); where there are shards, shards alone."""
    named = [(match, entry) for entry in without_sidecars(entries)
             if (match := SPLIT_FILE.fullmatch(entry.name.lower()))]
    shards = [(match, entry) for match, entry in named if match[3] == "tar"]
    kinds: dict[tuple[str, str], list[File]] = {}
    for match, entry in shards or named:
        kind = f"{match[1]}{'-*' if match[2] else ''}.{match[3]}{match[4] or ''}"
        kinds.setdefault((SPLIT_NAMES[match[1]], kind), []).append(entry)
    return unique_splits((split, kind, files) for (split, kind), files in kinds.items())


def files_by_word(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that is a word of their names (`coco_train_2017.csv`); empty unless each holds just one."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = {SPLIT_NAMES[word] for word in WORD.findall(file.name.lower())}
        if len(words) != 1:
            return {}
        splits.setdefault(words.pop(), []).append(file)
    return splits


def pattern_by_split(files: Sequence[File]) -> dict[str, list[File]]:
    """The files that a pattern names, by split if all of them are called after one."""
    splits = files_by_split(files)
    named = sum(map(len, splits.values()))
    return splits if named == len(files) else {UNSPLIT: list(files)}


def unique_splits(named: Iterable[tuple[str, str, list[File]]]) -> dict[str, list[File]]:
    """The files by split, from (split, its name there, files). Raises UserError for a split under two names."""
    splits: dict[str, tuple[str, list[File]]] = {}
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
