"""The files of a dataset in a store: a folder, a file or a pattern at an address -> its tables or shards by split."""

from __future__ import annotations

from collections.abc import Sequence

from data.batch import UserError
from data.shards.index import expand_braces
from data.sources.parts import FILE_SPLITS, files_by_split, pattern_by_split, unique_splits
from data.sources.split_names import SPLIT_NAMES, UNSPLIT
from data.sources.tables import TABLES, ending
from data.web.storage import Entry, expand, is_folder, list_folder, public_name

READABLE = (f"of a store, tables ({' '.join(sorted(TABLES))}) and shards (.tar) are read; copy other files here, or "
            "pack them with run.py shards")


def find_files(dataset: str) -> dict[str, list[Entry]]:
    """Return the tables or shards at an address by split. Raises UserError.

    Size and version of an entry may be missing; `data.web.storage.stat` returns them.
    """
    _refuse_odd_address(dataset)
    if "*" in dataset or "{" in dataset:
        addresses = []
        for name in expand_braces(dataset):
            addresses += expand(name) if "*" in name else [name]
        files = pattern_by_split([Entry(address, 0, "") for address in dict.fromkeys(addresses)])
    elif is_folder(dataset):
        files = _find(dataset)
    else:
        files = pattern_by_split([Entry(dataset, 0, "")])
    for entries in files.values():
        for entry in entries:
            if ending(entry.name) not in TABLES | {".tar"}:
                raise UserError(f"{public_name(entry.address)}: {READABLE}")
    return files


def _refuse_odd_address(address: str) -> None:
    """Raise UserError for an address that no driver can take as it is meant."""
    before, mark, _ = address.partition("?")
    if not before.partition("://")[2].strip("/"):
        raise UserError(f"{before}: names no bucket; write SCHEME://BUCKET/FOLDER")
    if mark and ending(before) not in TABLES | {".tar"}:
        raise UserError(f"{public_name(address)}: what follows its ? would be a query, which a folder has none of; "
                        "a name with ? in it cannot be read: rename it, or copy it and pass the copy")


def _find(folder: str) -> dict[str, list[Entry]]:
    entries = list_folder(folder)
    if splits := files_by_split([entry for entry in entries if not entry.is_folder]):
        return splits
    folders = [entry for entry in entries if entry.is_folder and entry.name.lower() in FILE_SPLITS]
    if folders:
        named = []
        for entry in folders:
            files = _without_splits(entry.address, list_folder(entry.address))
            named.append((SPLIT_NAMES[entry.name.lower()], entry.name, files))
        return unique_splits(named)
    return {UNSPLIT: _without_splits(folder, entries)}


def _without_splits(folder: str, entries: Sequence[Entry]) -> list[Entry]:
    """Return the shards of a folder without splits, else its one table. Raises UserError."""
    files = [entry for entry in entries if not entry.is_folder]
    shards = [entry for entry in files if ending(entry.name) == ".tar"]
    tables = [entry for entry in files if ending(entry.name) in TABLES]
    if not shards and not tables:
        shown = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise UserError(f"{public_name(folder)}: holds {shown}; {READABLE}")
    if not shards and len(tables) > 1:
        names = ", ".join(entry.name for entry in tables[:5])
        raise UserError(f"{public_name(folder)}: which of {names}? Pass one of them or a pattern, or call them train, "
                        "valid and test")
    return shards or tables
