"""Any dataset -> its splits: a hub name, table files, a folder of images with sidecars, tar shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data.batch import UserError
from data.files import NotAFile, is_output
from data.ledger import Account, Ledger, discard
from data.shards.index import expand_braces
from data.sources import img2dataset
from data.sources.csv_tables import read_csv
from data.sources.embedded import EmbeddedPictures
from data.sources.labels import class_titles
from data.sources.options import ReadOptions as ReadOptions
from data.sources.paths import Places
from data.sources.pictures import holds_titled_pictures
from data.sources.rows import Columns as Columns
from data.sources.rows import Rows as Rows
from data.sources.rows import detect_columns, holds_bytes, join_tables, rename_to_roles, to_row_columns
from data.sources.split import ORDER, WHOLE
from data.sources.split_names import LONE, divide_by_column, select_groups, without_split_column
from data.sources.tables import TABLES, TEXT_TABLES, holds_addresses, read_table

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-.*)?\.(tar|csv|tsv|jsonl|parquet)")
DETECT = ReadOptions()
Download = Callable[[str], Sequence[Path]]


@dataclass(frozen=True)
class Part:
    """One table of a dataset, read when its turn comes."""

    label: str  # the file or folder, for the ledger and for errors
    folders: Sequence[str]  # images lie below these; relative paths start at the first
    read: Callable[[Account], pa.Table]  # columns under the names of their roles
    relative: bool = True  # False: image paths without a folder name nothing
    anywhere: bool = True  # the user named a table on this machine, whose images may lie anywhere on it

    def places(self, options: ReadOptions) -> Places:
        """Return where its images lie. Raises UserError."""
        return Places(self.folders, self.relative, self.anywhere, options.image_template).under(options.image_root)


def _refuse(pattern: str) -> NoReturn:
    raise UserError(f"{pattern}: only local files are read here; download them and pass their folder")


def load_splits(dataset: str, options: ReadOptions = DETECT, ledger: Ledger = discard,
                download: Download = _refuse, log: Callable[[str], None] = discard,
                embedded: Path | None = None) -> dict[str, Rows]:
    """Read a dataset's splits: `train`, `valid`, `test` in this order, then others under the names they have.

    `dataset`: a folder with {train,valid,test} as .csv .tsv .jsonl .parquet, as -*.tar shards or as folders; a folder
    that is one table, shards, or images with KEY.txt and KEY.json; one such file; a pattern `train-{000..009}.tar`,
    also as an address, whose files `download` brings; or a hub name OWNER/NAME, with several configurations
    OWNER/NAME:CONFIGURATION. A lone split, unless it is called valid or test, is called train: `divide_lone_split`
    makes it three. `ledger` gets an entry for each row that cannot be read (see data/ledger.py); every other row is
    kept, also without image or title. `log` gets a line for what was not used or was changed. Pictures that a Parquet
    file holds are copied to the folder `embedded` (see data/sources/embedded.py). Raises UserError.
    """
    account, pictures = Account(ledger, log), EmbeddedPictures(embedded, log)
    path = Path(dataset).expanduser()
    try:
        if "://" in dataset:
            files = _in_splits(download(dataset))
        elif path.is_dir():
            files = _find(path, options, account)
        elif path.is_file():
            files = {"all": [path]}
        elif path.exists():
            raise NotAFile(path, "a pipe or a device")
        elif "{" in dataset or "*" in dataset:
            files = _in_splits(list(_expand(str(path))))
        elif re.fullmatch(r"[\w.-]*\w/[\w.-]+(:[\w.-]+)?", dataset) and path.suffix.lower() not in TABLES | {".tar"}:
            files = None
        else:
            raise UserError(f"{dataset}: there is no such file or folder, and a hub dataset's name is OWNER/NAME")
        if files is None:
            groups = _hub(dataset, options, pictures)
        else:
            groups = _local(files, options, pictures, is_own="://" not in dataset)
        splits = _read(groups, options, account, pictures)
    except OSError as error:
        raise UserError(f"{error.filename or dataset}: {error.strerror or error}") from error
    account.close(dataset)
    if len(splits) == 1 and not splits.keys() & {"valid", "test"}:
        return {WHOLE: replace(next(iter(splits.values())), name=WHOLE)}
    return dict(sorted(splits.items(), key=lambda item: (*ORDER, item[0]).index(item[0])))


def _find(folder: Path, options: ReadOptions, account: Account) -> dict[str, list[Path]]:
    """The files of each split of a folder; a folder in their place stands for the images in it."""
    entries = _entries(folder)
    if splits := _by_split(entries):
        return splits
    named = [entry for entry in entries if entry.name.lower() in SPLITS and entry.is_dir()]
    folders = [entry for entry in named if not is_output(entry)]
    for entry in named if folders else ():
        if entry not in folders:
            account.pass_over("own-output", str(entry))
    if folders:
        return _one_kind((SPLITS[entry.name.lower()], entry.name, _files_without_splits(entry, options, account))
                         for entry in folders)
    return {"all": _files_without_splits(folder, options, account)}


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _files_without_splits(folder: Path, options: ReadOptions, account: Account) -> list[Path]:
    """The files of a folder that names no splits: shards, else one table, else the folder itself for its images.

    Images with sidecars come before tables that hold their addresses; what img2dataset wrote as parts is one table.
    """
    entries = _entries(folder)
    shards = [file for file in entries if file.suffix.lower() == ".tar"]
    tables = [file for file in entries if file.suffix.lower() in TABLES]
    if shards:
        img2dataset.report_failures(tables, account)
        return shards
    if tables and holds_titled_pictures(folder) and all(holds_addresses(file, options) for file in tables):
        account.note(f"{folder}: the images with sidecars are read, not the addresses in {tables[0].name}")
        img2dataset.report_failures(tables, account)
        return [folder]
    if len(tables) > 1 and not all(img2dataset.PART.fullmatch(file.name) for file in tables):
        raise UserError(f"{folder}: which of {', '.join(file.name for file in tables[:5])}? Pass one of them or a "
                        "pattern, or call them train, valid and test")
    return tables or [folder]


def _by_split(entries: Sequence[Path]) -> dict[str, list[Path]]:
    """Files called after a split (`train.csv`, `val-00001-of-00009.parquet`); where there are shards, shards alone."""
    named = [(match, entry) for entry in entries if (match := SPLIT_FILE.fullmatch(entry.name.lower()))]
    shards = [(match, entry) for match, entry in named if match[3] == "tar"]
    kinds: dict[tuple[str, str], list[Path]] = {}
    for match, entry in shards or named:
        kinds.setdefault((SPLITS[match[1]], f"{match[1]}{'-*' if match[2] else ''}.{match[3]}"), []).append(entry)
    return _one_kind((split, kind, files) for (split, kind), files in kinds.items())


def _in_splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files that a pattern names, by split if all of them are called after one."""
    splits = _by_split(files)
    named = sum(map(len, splits.values()))
    return splits if named == len(files) else {"all": list(files)}


def _one_kind(named: Iterable[tuple[str, str, list[Path]]]) -> dict[str, list[Path]]:
    """The files by split, from (split, its name there, files). Raises UserError for a split under two names."""
    splits: dict[str, tuple[str, list[Path]]] = {}
    for split, kind, files in named:
        if split in splits:
            raise UserError(f"split {split!r} is there twice, as {splits[split][0]} and {kind}; keep one")
        splits[split] = kind, files
    return {split: files for split, (_, files) in splits.items()}


def _expand(pattern: str) -> Iterator[Path]:
    """The files of a pattern with {000..009}, {a,b} and *. Raises UserError at the first that is missing."""
    for name in expand_braces(pattern):
        files = sorted(glob.glob(name)) if "*" in name else [name] if os.path.isfile(name) else []
        if not files:
            raise UserError(f"{name}: no such file; the pattern asks for it")
        yield from map(Path, files)


def _local(files: Mapping[str, Sequence[Path]], options: ReadOptions, embedded: EmbeddedPictures,
           is_own: bool) -> dict[str, list[Part]]:
    """The tables of each split; they are the user's own (`is_own`), or were brought from an address."""
    groups: dict[str, list[Part]] = {}
    for name, paths in files.items():
        for path in paths:
            folder = path if path.is_dir() else path.parent
            folders = os.path.abspath(folder), os.path.realpath(folder)
            read = partial(read_table, path, options, embedded=embedded)
            groups.setdefault(name, []).append(Part(str(path), folders, read, anywhere=is_own))
    return groups


def _read(groups: Mapping[str, Sequence[Part]], options: ReadOptions, account: Account,
          embedded: EmbeddedPictures) -> dict[str, Rows]:
    """The rows of each split, its parts one after the other; a lone group is divided by its column of splits."""
    rows: dict[str, Rows] = {}
    for name, parts in select_groups(groups, options, account).items():
        account.begin(None if name == LONE else name)
        tables = []
        for part in parts:
            places = part.places(options)
            table = to_row_columns(part.read(account), part.label, places, account, embedded)
            tables.append(class_titles(table, options.templates, part.label, account))
        labels = [part.label for part in parts]
        if len(groups) > 1 and options.columns.split is None:
            divided = {name: without_split_column(name, tables, account)}
        else:
            divided = divide_by_column(name, tables, labels, options, account)
        label = labels[0] if len({*labels}) == 1 else str(Path(labels[0]).parent)
        for split, each in divided.items():
            rows[split] = join_tables(split, each, label, account)
    return rows


def _hub(name: str, options: ReadOptions, embedded: EmbeddedPictures) -> dict[str, list[Part]]:
    """The splits of a hub dataset, images as uploaded. CSV and JSONL are read here: the library guesses their types."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    prepared: Mapping[str, Any] = {}
    repository, _, configuration = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(repository, configuration or None)
        files = builder.config.data_files or {}
        suffixes = {Path(file).suffix for paths in files.values() for file in paths}
        as_text = bool(files) and suffixes <= TEXT_TABLES
        separator = getattr(builder.config, "sep", None)
        read = partial(read_csv, delimiter=separator) if separator else partial(read_table, embedded=embedded)
        if as_text:
            files = datasets.DownloadManager().download(files)
        else:
            builder.download_and_prepare()
            prepared = builder.as_dataset()
    except Exception as error:  # of many kinds, from several libraries; all concern this name
        raise UserError(_hub_advice(name, error)) from error
    cached = os.path.join(HF_HUB_CACHE, "datasets--" + repository.replace("/", "--"))
    folders = cached, str(datasets.config.DOWNLOADED_DATASETS_PATH)  # where image folders and archives come to lie

    def read_prepared(split: str, label: str, account: Account) -> pa.Table:
        table = mapped_table(prepared[split], embedded)
        with_bytes = {field.name for field in table.schema if holds_bytes(field.type)}
        return rename_to_roles(table, detect_columns(table.column_names, options.columns, label, account, with_bytes))

    groups: dict[str, list[Part]] = {}
    for split in map(str, files if as_text else prepared):
        label = f"{name}, split {split}"
        if as_text:
            reads = [partial(read, Path(file), options) for file in files[split]]
        else:
            reads = [partial(read_prepared, split, label)]
        groups[split] = [Part(label, folders, each, relative=False, anywhere=False) for each in reads]
    return groups


def mapped_table(dataset: datasets.Dataset, embedded: EmbeddedPictures) -> pa.Table:
    """The rows of a `datasets.Dataset` as Arrow, its cache files mapped where it is made of them; images undecoded."""
    import pyarrow as pa

    if dataset._indices is None and dataset.cache_files:  # neither shuffled nor filtered, and not made in memory
        table = pa.concat_tables([embedded.open(Path(file["filename"])) for file in dataset.cache_files])
        if len(table) == len(dataset):
            return table
    return dataset.with_format("arrow")[:]


def _hub_advice(name: str, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = " ".join(str(error).split())[:300]
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"{name}: its configuration is named as in {name.partition(':')[0]}:CONFIGURATION ({text})"
    if "gated" in text:
        return f"{name} is gated: accept its terms on its hub page, then run `hf auth login`"
    if isinstance(error, DatasetNotFoundError):
        return f"{name}: neither a local folder nor a dataset of the hub; check the name, or `hf auth login` if private"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return f"{name} cannot be had from the hub ({text}); check the network, or pass a local folder"
    return f"{name} cannot be loaded ({type(error).__name__}: {text}); download it and pass its folder"
