"""A folder -> the parts of the dataset in it, by the first function of KINDS that returns some.

A new kind of folder is a function that returns its parts, or None for a folder of another kind, and a line in KINDS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.files import is_output
from data.ledger import Account
from data.reading import open_regular
from data.sources import img2dataset
from data.sources.arrow_tables import column_names
from data.sources.captions import find_layouts, local_file_parts
from data.sources.library import is_saved, local_parts, saved_parts
from data.sources.parts import (
    FILE_SPLITS,
    DatasetPart,
    ReadContext,
    file_part,
    file_parts,
    files_by_split,
    files_by_word,
    folder_spellings,
    unique_splits,
)
from data.sources.paths import PICTURES
from data.sources.pictures import class_folders, holds_pictures, holds_titled_pictures, read_class_folders
from data.sources.rows import ROW, drop_rows
from data.sources.split_names import SPLIT_NAMES, UNSPLIT, canonical_split
from data.sources.tables import ADVICE, ARROW_READERS, TABLES, ending, holds_addresses, read_metadata, without_sidecars

if TYPE_CHECKING:
    import pyarrow as pa

HIVE = re.compile(r"([^=]+)=([^=]*)")  # a folder of a partitioned table
METADATA = re.compile(r"metadata\.(csv|jsonl|parquet)")  # of the `datasets` library, beside images
CARD = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)  # the head of a README.md, YAML
MAX_CARD = 1 << 22  # bytes of it that are looked at
KNOWN_LAYOUTS = (f"tables ({' '.join(sorted(TABLES))}, also .csv.gz …), nor shards (.tar), nor train/ valid/ test/, "
                 f"nor images ({' '.join(sorted(PICTURES))}) with KEY.txt or in a folder for each class, nor "
                 "captions_*.json of COCO or dataset_*.json of Karpathy, nor what save_to_disk writes")


@dataclass(frozen=True)
class Folder:
    """A folder of a dataset, and how it is read."""

    path: Path
    configuration: str
    context: ReadContext
    account: Account

    @cached_property
    def entries(self) -> list[Path]:
        """Its files and folders by name, without hidden ones (`.part-0.parquet.crc`)."""
        return sorted(entry for entry in self.path.iterdir() if not entry.name.startswith("."))

    @cached_property
    def tables(self) -> list[Path]:
        """Its tables by their ending, without JSON that belongs to images."""
        files = [entry for entry in without_sidecars(self.entries) if ending(entry) in TABLES]
        return [file for file in files if not file.is_dir()]

    def inner(self, path: Path) -> Folder:
        """Return a folder in it."""
        return replace(self, path=path)

    def part(self, split: str, source: Path, read: Callable[[Account], pa.Table]) -> DatasetPart:
        """Return a part whose image paths start at this folder."""
        return DatasetPart(split, str(source), folder_spellings(self.path), read)


def folder_parts(folder: Folder) -> list[DatasetPart]:
    """Return the parts of a folder by its kind. Raises UserError naming what it holds if it is of no kind."""
    if folder.configuration:
        return local_parts(folder.path, folder.configuration, folder.context)
    for find_parts in KINDS:
        parts = find_parts(folder)
        if parts is not None:
            return parts
    names = [entry.name + "/" * entry.is_dir() for entry in folder.entries]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    advice = next((ADVICE[ending(name)] for name in names if ending(name) in ADVICE), "")
    message = f"{folder.path} holds {shown}{advice}; found neither {KNOWN_LAYOUTS}"
    if advice:
        raise UserError(message)
    try:
        parts = local_parts(folder.path, "", folder.context)
    except UserError as error:
        raise UserError(f"{message}; {str(error).removeprefix(f'{folder.path}: ')}") from error
    folder.account.note(f"{folder.path}: read as the library `datasets` finds its files and splits")
    return parts


def _saved(folder: Folder) -> list[DatasetPart] | None:
    """Read a dataset written by save_to_disk."""
    return saved_parts(folder.path, folder.context) if is_saved(folder.path) else None


def _configured(folder: Folder) -> list[DatasetPart] | None:
    """Read a clone of a hub dataset whose README.md lists the files of each split."""
    card = folder.path / "README.md"
    if not card.is_file():
        return None
    with open_regular(card) as file:
        head = CARD.match(file.read(MAX_CARD).decode("utf-8", "replace"))
    if head is None or not re.search(r"^configs:", head[1], re.MULTILINE) or "data_files" not in head[1]:
        return None
    folder.account.note(f"{folder.path}: the splits are those of README.md")
    return local_parts(folder.path, "", folder.context)


def _named_files(folder: Folder) -> list[DatasetPart] | None:
    """Read files called after splits."""
    parts = _parts(files_by_split(folder.entries), folder)
    if parts:
        _note_unused(folder, parts)
    return parts or None


def _parts(splits: Mapping[str, Sequence[Path]], folder: Folder) -> list[DatasetPart]:
    parts = []
    for split, files in splits.items():
        for file in files:
            parts += local_file_parts(split, file, folder.context, folder.account)
    return parts


def _captions(folder: Folder) -> list[DatasetPart] | None:
    """Read a published layout of captions; of several, read the first and note the others."""
    layouts = list(find_layouts(folder.path))
    if not layouts:
        return None
    (layout, files), *others = layouts
    used = set(files)
    unused: list[Path] = []
    for _, files_of_other in others:
        unused += files_of_other
    unused += [file for file in folder.tables if file not in used and ending(file) != ".json"]
    if unused:
        names = ", ".join(dict.fromkeys(file.name for file in unused[:4]))
        folder.account.note(f"{folder.path}: read as {layout.name} ({files[0].name}), not {names}; pass one of those "
                            "files to read it instead")
    return layout.parts(files, folder.context, folder.account)


def _named_folders(folder: Folder) -> list[DatasetPart] | None:
    """Read folders called after splits."""
    named = [entry for entry in folder.entries if entry.name.lower() in FILE_SPLITS and entry.is_dir()]
    folders = [entry for entry in named if not is_output(entry)]
    if not folders:
        return None
    for entry in named:
        if entry not in folders:
            folder.account.pass_over("own-output", str(entry))
    splits = unique_splits((SPLIT_NAMES[entry.name.lower()], entry.name, [entry]) for entry in folders)
    metadata = [file for file in folder.tables if METADATA.fullmatch(file.name)]
    if metadata:  # one for all splits, whose images are named from here
        names = [entry.name for entry in folders]
        return [folder.part(split, metadata[0], partial(_read_below, metadata[0], entry.name, names, folder.context))
                for split, (entry,) in splits.items()]
    _note_unused(folder, [], [entry for entry in folder.entries if entry.is_dir() and entry not in named])
    parts = []
    for split, (entry,) in splits.items():
        parts += [replace(part, split=split) for part in _without_splits(folder.inner(entry))]
    return parts


def _note_unused(folder: Folder, used: Sequence[DatasetPart], folders: Sequence[Path] = ()) -> None:
    """Say which tables and shards of a folder are none of the parts, and that `folders` are none."""
    sources = {part.source for part in used}
    shards = [entry for entry in folder.entries if entry.suffix.lower() == ".tar"]
    others = [file for file in (*folder.tables, *shards) if file.name != "ledger.jsonl"]
    unused = [file.name for file in others if str(file) not in sources]
    unused += [f"{entry.name}/" for entry in folders if not is_output(entry)]
    if unused:
        more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
        folder.account.note(f"{folder.path}: not used beside the splits: {', '.join(unused[:4])}{more}")


def _read_below(metadata: Path, name: str, names: Sequence[str], context: ReadContext, account: Account) -> pa.Table:
    """Return the rows of a metadata file whose images are below the folder `name`, one of `names`.

    With the first of these, rows whose image is below none of them are dropped.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_metadata(metadata, context.options, account, context.embedded)
    if ROW not in table.column_names:
        table = table.append_column(ROW, pa.array(np.arange(len(table))))
    slashed = pc.replace_substring(table["image"].cast(pa.large_string()), "\\", "/")
    image = pc.fill_null(pc.replace_substring_regex(slashed, r"^(\./)+", ""), "")
    if name == names[0]:
        is_below = np.logical_or.reduce([pc.starts_with(image, f"{each}/").to_numpy() for each in names])
        problem = BadSample("no-split", f"the image is in none of the folders {', '.join(names)}")
        strays = dict.fromkeys(np.flatnonzero(~is_below).tolist(), problem)
        drop_rows(table, strays, table[ROW].to_numpy(), str(metadata), account)
    return table.filter(pc.starts_with(image, f"{name}/"))


def _hive(folder: Folder) -> list[DatasetPart] | None:
    """Read a partitioned table in folders KEY=VALUE, where `split=train` names a split."""
    if not any(HIVE.fullmatch(entry.name) and entry.is_dir() for entry in folder.entries):
        return None
    splits: dict[str, list[Path]] = {}
    keys: dict[str, None] = {}
    for file in sorted(path for path in folder.path.rglob("*") if ending(path) in TABLES and path.is_file()):
        names = file.relative_to(folder.path).parts[:-1]
        if any(name.startswith((".", "_")) for name in names):
            continue
        pairs = [match.groups() for name in names if (match := HIVE.fullmatch(name))]
        keys.update(dict.fromkeys(key for key, _ in pairs))
        split = next((canonical_split(value) for key, value in pairs if key.lower() == "split"), UNSPLIT)
        splits.setdefault(split, []).append(file)
    if not splits:
        return None
    folder.account.note(f"{folder.path}: a table partitioned by {', '.join(keys)}")
    return file_parts(splits, folder.context)


def _data_folder(folder: Folder) -> list[DatasetPart] | None:
    """Read a clone of a hub dataset without configurations: `data/train-00000-of-00001.parquet`."""
    data = folder.path / "data"
    parts = _named_files(folder.inner(data)) if data.is_dir() and not is_output(data) else None
    if parts:
        _note_unused(folder, [])
    return parts


def _inner(folder: Folder) -> list[DatasetPart] | None:
    """Read a folder that holds only another one with the dataset, as unpacked archives do."""
    entries = [entry for entry in folder.entries if not entry.name.lower().startswith(("readme", "license"))]
    if len(entries) != 1 or not entries[0].is_dir() or is_output(entries[0]):
        return None
    inner = folder.inner(entries[0])
    has_files = any(ending(entry) in TABLES | {".tar"} for entry in inner.entries)
    for find_parts in KINDS if has_files else KINDS[:-1]:
        parts = find_parts(inner)
        if parts is not None:
            folder.account.note(f"{folder.path}: the dataset is in its folder {inner.path.name}")
            return parts
    return None


def _without_splits(folder: Folder) -> list[DatasetPart]:
    return _rows(folder) or [file_part(UNSPLIT, folder.path, folder.context)]


def _rows(folder: Folder) -> list[DatasetPart] | None:
    """Read shards, tables or images without splits."""
    shards = [file for file in folder.entries if file.suffix.lower() == ".tar"]
    tables = folder.tables
    if shards:
        img2dataset.report_failures(tables, folder.account)
        return file_parts({UNSPLIT: shards}, folder.context)
    are_json = all(ending(file) == ".json" for file in tables)
    are_titled = bool(tables) and holds_titled_pictures(folder.path)
    if are_titled and (are_json or all(holds_addresses(each, folder.context.options) for each in tables)):
        addresses = "" if are_json else "the addresses in "
        folder.account.note(f"{folder.path}: the images with sidecars are read, not {addresses}{tables[0].name}")
        img2dataset.report_failures(tables, folder.account)
        return [file_part(UNSPLIT, folder.path, folder.context)]
    if tables:
        if are_titled:
            folder.account.note(f"{folder.path}: {tables[0].name} is read, not the texts beside the images")
        return _tables(folder, tables)
    if class_folders(folder.path):
        return [folder.part(UNSPLIT, folder.path, partial(read_class_folders, folder.path))]
    if holds_pictures(folder.path):
        return [file_part(UNSPLIT, folder.path, folder.context)]
    return None


def _tables(folder: Folder, tables: Sequence[Path]) -> list[DatasetPart]:
    """Read tables whose names have words for splits, or which are parts of one table. Raises UserError for others."""
    metadata = [file for file in tables if METADATA.fullmatch(file.name)]
    if len(metadata) == 1:
        others = [file.name for file in tables if file not in metadata]
        if others:
            folder.account.note(f"{folder.path}: {metadata[0].name} is read, not {', '.join(others[:4])}")
        read = partial(read_metadata, metadata[0], folder.context.options, embedded=folder.context.embedded)
        return [folder.part(UNSPLIT, metadata[0], read)]
    if len(tables) == 1 or all(img2dataset.PART.fullmatch(file.name) for file in tables):
        return _parts({UNSPLIT: tables}, folder)
    splits = files_by_word(tables)
    if splits:
        named = []
        for split, files in splits.items():
            names = ", ".join(file.name for file in files[:3])
            named.append(f"{split}: {names}")
        folder.account.note(f"{folder.path}: splits by the words of file names: {'; '.join(named)}")
        return _parts(splits, folder)
    if _are_one_table(tables):
        folder.account.note(f"{folder.path}: {len(tables)} numbered files ({tables[0].name}, …) are one table")
        return file_parts({UNSPLIT: tables}, folder.context)
    raise UserError(f"{folder.path}: which of {', '.join(file.name for file in tables[:5])}? Pass one of them or a "
                    "pattern, or call them train, valid and test")


def _are_one_table(tables: Sequence[Path]) -> bool:
    """Return whether the names of files differ by a number only, and the files of Arrow have the same columns."""
    names = {re.sub(r"\d+", "#", file.name) for file in tables}
    if len(names) > 1 or "#" not in names.pop():
        return False
    columns = [column_names(file) for file in tables if ending(file) in ARROW_READERS]
    return all(each == columns[0] for each in columns)


# The order decides: a folder may look like several kinds. What names its splits comes before what is divided by seed,
# and what a tool wrote (a saved dataset, a README.md with configurations) before what only names suggest.
KINDS = (_saved, _configured, _named_files, _captions, _named_folders, _data_folder, _hive, _inner, _rows)
