"""Any dataset -> its splits: a hub name, table files, a folder of images with sidecars, tar shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from data.batch import UserError
from data.files import NotAFile, is_output
from data.ledger import Account, Ledger, discard
from data.shards.index import expand_braces
from data.sources import img2dataset
from data.sources.csv_tables import read_csv
from data.sources.pictures import holds_titled_pictures
from data.sources.rows import Columns as Columns
from data.sources.rows import Rows as Rows
from data.sources.rows import detect_columns, holds_bytes, join_tables, rename_to_roles, to_row_columns
from data.sources.split import ORDER, WHOLE
from data.sources.tables import TABLES, TEXT_TABLES, holds_addresses, read_remote, read_table
from data.web.storage import RemoteFile, parent, public_name, scheme_of

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-.*)?\.(tar|csv|tsv|jsonl|parquet)")
DETECT = Columns()
Download = Callable[[str], Mapping[str, Sequence[Path | RemoteFile]]]


class Named(Protocol):
    """A file or folder by its name."""

    @property
    def name(self) -> str:
        """The last part of its path or address."""


File = TypeVar("File", bound=Named)


def _refuse(pattern: str) -> NoReturn:
    raise UserError(f"{pattern}: only local files are read here; download them and pass their folder")


def load_splits(dataset: str, columns: Columns = DETECT, ledger: Ledger = discard,
                download: Download = _refuse, log: Callable[[str], None] = discard) -> dict[str, Rows]:
    """Read a dataset's splits: `train`, `valid`, `test` in this order, then others under the names they have.

    `dataset`: a folder with {train,valid,test} as .csv .tsv .jsonl .parquet, as -*.tar shards or as folders; a folder
    that is one table, shards, or images with KEY.txt and KEY.json; one such file; a pattern `train-{000..009}.tar`;
    tables and shards at an address, which `download` brings, by split; or a hub name OWNER/NAME, with several
    configurations OWNER/NAME:CONFIGURATION. A lone split, unless it is called valid or test, is called train:
    `divide_lone_split` makes it three. `ledger` gets an entry for each row that cannot be read (see data/ledger.py);
    every other row is kept, also without image or title. `log` gets a line for what was not used or was changed.
    Raises UserError.
    """
    account = Account(ledger, log)
    if scheme_of(dataset) == "file":
        dataset = unquote(urlsplit(dataset).path)
    path = Path(dataset).expanduser()
    files: Mapping[str, Sequence[Path | RemoteFile]] | None
    try:
        if "://" in dataset:
            files = download(dataset)
        elif path.is_dir():
            files = _find(path, columns, account)
        elif path.is_file():
            files = {"all": [path]}
        elif path.exists():
            raise NotAFile(path, "a pipe or a device")
        elif "{" in dataset or "*" in dataset:
            files = in_splits(list(_expand(str(path))))
        elif re.fullmatch(r"[\w.-]*\w/[\w.-]+(:[\w.-]+)?", dataset) and path.suffix.lower() not in TABLES | {".tar"}:
            files = None
        else:
            raise UserError(f"{dataset}: there is no such file or folder, and a hub dataset's name is OWNER/NAME")
        splits = _hub(dataset, columns, account) if files is None else _local(files, columns, account)
    except OSError as error:
        raise UserError(f"{error.filename or dataset}: {error.strerror or error}") from error
    account.close(dataset)
    if len(splits) == 1 and not splits.keys() & {"valid", "test"}:
        return {WHOLE: replace(next(iter(splits.values())), name=WHOLE)}
    return dict(sorted(splits.items(), key=lambda item: (*ORDER, item[0]).index(item[0])))


def _find(folder: Path, columns: Columns, account: Account) -> dict[str, list[Path]]:
    """The files of each split of a folder; a folder in their place stands for the images in it."""
    entries = _entries(folder)
    if splits := by_split(entries):
        return splits
    named = [entry for entry in entries if entry.name.lower() in SPLITS and entry.is_dir()]
    folders = [entry for entry in named if not is_output(entry)]
    for entry in named if folders else ():
        if entry not in folders:
            account.pass_over("own-output", str(entry))
    if folders:
        return one_kind((SPLITS[entry.name.lower()], entry.name, _files_without_splits(entry, columns, account))
                         for entry in folders)
    return {"all": _files_without_splits(folder, columns, account)}


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _files_without_splits(folder: Path, columns: Columns, account: Account) -> list[Path]:
    """The files of a folder that names no splits: shards, else one table, else the folder itself for its images.

    Images with sidecars come before tables that hold their addresses; what img2dataset wrote as parts is one table.
    """
    entries = _entries(folder)
    shards = [file for file in entries if file.suffix.lower() == ".tar"]
    tables = [file for file in entries if file.suffix.lower() in TABLES]
    if shards:
        img2dataset.report_failures(tables, account)
        return shards
    if tables and holds_titled_pictures(folder) and all(holds_addresses(file, columns) for file in tables):
        account.note(f"{folder}: the images with sidecars are read, not the addresses in {tables[0].name}")
        img2dataset.report_failures(tables, account)
        return [folder]
    if len(tables) > 1 and not all(img2dataset.PART.fullmatch(file.name) for file in tables):
        raise UserError(f"{folder}: which of {', '.join(file.name for file in tables[:5])}? Pass one of them or a "
                        "pattern, or call them train, valid and test")
    return tables or [folder]


def by_split(entries: Sequence[File]) -> dict[str, list[File]]:
    """Files called after a split (`train.csv`, `val-00001-of-00009.parquet`); where there are shards, shards alone."""
    named = [(match, entry) for entry in entries if (match := SPLIT_FILE.fullmatch(entry.name.lower()))]
    shards = [(match, entry) for match, entry in named if match[3] == "tar"]
    kinds: dict[tuple[str, str], list[File]] = {}
    for match, entry in shards or named:
        kinds.setdefault((SPLITS[match[1]], f"{match[1]}{'-*' if match[2] else ''}.{match[3]}"), []).append(entry)
    return one_kind((split, kind, files) for (split, kind), files in kinds.items())


def in_splits(files: Sequence[File]) -> dict[str, list[File]]:
    """The files that a pattern names, by split if all of them are called after one."""
    splits = by_split(files)
    named = sum(map(len, splits.values()))
    return splits if named == len(files) else {"all": list(files)}


def one_kind(named: Iterable[tuple[str, str, list[File]]]) -> dict[str, list[File]]:
    """The files by split, from (split, its name there, files). Raises UserError for a split under two names."""
    splits: dict[str, tuple[str, list[File]]] = {}
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


def _local(splits: Mapping[str, Sequence[Path | RemoteFile]], columns: Columns, account: Account) -> dict[str, Rows]:
    rows = {}
    for name, files in splits.items():
        account.begin(None if name == "all" else name)
        tables = []
        for file in files:
            if isinstance(file, RemoteFile):
                table, folder_address = read_remote(file, columns, account), parent(file.address)
                tables.append(to_row_columns(table, public_name(file.address), [folder_address], account))
                continue
            table = read_table(file, columns, account)
            folder = file if file.is_dir() else file.parent
            folders = os.path.abspath(folder), os.path.realpath(folder)
            tables.append(to_row_columns(table, str(file), folders, account))
        first = files[0]
        if isinstance(first, RemoteFile):
            label = public_name(first.address if len(files) == 1 else parent(first.address))
        else:
            label = str(first if len(files) == 1 else first.parent)
        rows[name] = join_tables(name, tables, label, account)
    return rows


def _hub(name: str, columns: Columns, account: Account) -> dict[str, Rows]:
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
        read = partial(read_csv, delimiter=separator) if separator else read_table
        if as_text:
            files = datasets.DownloadManager().download(files)
        else:
            builder.download_and_prepare()
            prepared = builder.as_dataset()
    except Exception as error:  # of many kinds, from several libraries; all concern this name
        raise UserError(_hub_advice(name, error)) from error
    cached = os.path.join(HF_HUB_CACHE, "datasets--" + repository.replace("/", "--"))
    folders = cached, str(datasets.config.DOWNLOADED_DATASETS_PATH)  # where image folders and archives come to lie
    splits: dict[str, Rows] = {}
    for hub_split in files if as_text else prepared:
        label = f"{name}, split {hub_split}"
        split = SPLITS.get(str(hub_split).lower(), str(hub_split))
        split = str(hub_split) if split in splits else split
        account.begin(split)
        if as_text:
            tables = [read(Path(file), columns, account) for file in files[hub_split]]
        else:
            table = prepared[hub_split].data.table  # mapped from disk; taken from here, images are never decoded
            embedded = {field.name for field in table.schema if holds_bytes(field.type)}
            tables = [rename_to_roles(table, detect_columns(table.column_names, columns, label, embedded))]
        tables = [to_row_columns(table, label, folders, account, relative=False) for table in tables]
        splits[split] = join_tables(split, tables, label, account)
    return splits


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
