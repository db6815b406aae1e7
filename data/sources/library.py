"""Datasets that the `datasets` library finds or reads: those of the hub, saved ones, folders with configurations.

The library finds the files and their splits. Tables of known endings are read by the readers of this project, as the
library guesses types and reports no dropped rows; it prepares others as Arrow files, whose images stay undecoded. No
code of a dataset is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batch import UserError
from data.ledger import Account
from data.sources.arrow_tables import ClassNames, roles_of
from data.sources.csv_tables import read_csv
from data.sources.embedded import EmbeddedPictures
from data.sources.parts import DatasetPart, ReadContext, folder_spellings
from data.sources.split_names import UNSPLIT
from data.sources.tables import TABLES, TEXT_TABLES, ending, read_table

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes beside the rows
NOTHING_FOUND = ("DataFilesNotFoundError", "EmptyDatasetError")


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written a folder."""
    return any((folder / name).is_file() for name in SAVED)


def saved_parts(folder: Path, context: ReadContext) -> list[DatasetPart]:
    """Return the parts of a saved dataset. Raises UserError."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, from several libraries; all concern this folder
        raise UserError(f"{folder}: was written by save_to_disk and cannot be loaded ({_line(error)}); save it again, "
                        "or write it with to_parquet") from error
    splits = {UNSPLIT: saved} if isinstance(saved, datasets.Dataset) else saved
    parts = []
    for name, split in splits.items():
        source = folder if name == UNSPLIT else folder / str(name)
        read = partial(_read_prepared, split, str(folder), context)
        parts.append(DatasetPart(str(name), str(source), folder_spellings(folder), read))
    return parts


def _read_prepared(split: datasets.Dataset, source: str, context: ReadContext, account: Account) -> pa.Table:
    """Read a split of the library from its Arrow table, so that images are not decoded."""
    table = mapped_table(split, context.embedded)
    table = roles_of(table, context.options.columns, source, account, _classes(split.features))
    _refuse_archives(table["image"], source)
    return table


def mapped_table(dataset: datasets.Dataset, embedded: EmbeddedPictures) -> pa.Table:
    """Return the rows of a `datasets.Dataset` as Arrow, mapped from its cache files if possible; images undecoded."""
    import pyarrow as pa

    if dataset._indices is None and dataset.cache_files:  # neither shuffled nor filtered, and not made in memory
        table = pa.concat_tables([embedded.open(Path(file["filename"])) for file in dataset.cache_files])
        if len(table) == len(dataset):
            return table
    return dataset.with_format("arrow")[:]


def _refuse_archives(images: pa.ChunkedArray, source: str) -> None:
    """Raise UserError for images that the library would read out of an archive: `zip://0.jpg::/data/train.zip`."""
    import pyarrow as pa

    first = images[0].as_py() if len(images) and pa.types.is_struct(images.type) else None
    path = (first or {}).get("path") or ""
    if "::" in path and not (first or {}).get("bytes"):
        raise UserError(f"{source}: its images lie in {path.rpartition('::')[2]}; unpack that and pass the folder")


def local_parts(folder: Path, configuration: str, context: ReadContext) -> list[DatasetPart]:
    """Return the parts of a folder as `datasets.load_dataset(folder)` finds them. Raises UserError."""
    script = folder / f"{folder.name}.py"
    if script.is_file():
        raise UserError(f"{script}: a loading script; scripts are never run here. Convert the dataset once where you "
                        "trust it (to_parquet, save_to_disk) and pass that folder")
    return _parts(str(folder), configuration, context, folder_spellings(folder))


def hub_parts(name: str, context: ReadContext) -> list[DatasetPart]:
    """Return the parts of a hub dataset OWNER/NAME or OWNER/NAME:CONFIGURATION. Raises UserError."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository, _, configuration = name.partition(":")
    cached = os.path.join(HF_HUB_CACHE, "datasets--" + repository.replace("/", "--"))
    return _parts(repository, configuration, context, [cached])


def _parts(name: str, configuration: str, context: ReadContext, folders: Sequence[str]) -> list[DatasetPart]:
    """Return the parts of `name`, a folder or a dataset of the hub, as the library finds them."""
    import datasets

    is_local = os.path.isdir(name)
    folders = (*folders, str(datasets.config.DOWNLOADED_DATASETS_PATH))  # where the library unpacks archives
    shown = f"{name}:{configuration}" if configuration else name
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        data_files = builder.config.data_files or {}
        # Parquet of the hub is prepared by the library, which keeps it as Arrow files that are read where they lie.
        readable = TABLES | {".tar"} if is_local else TEXT_TABLES
        all_files = [*chain.from_iterable(data_files.values())]
        # `field` names a part of a JSON file, which only the library looks up.
        has_field = getattr(builder.config, "field", None)
        read_here = bool(data_files) and not has_field and all(ending(file) in readable for file in all_files)
        if read_here:
            splits = datasets.DownloadManager().download(data_files)
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except Exception as error:  # of many kinds, from several libraries; all concern this name
        raise UserError(_advice(shown, is_local, error)) from error
    separator = getattr(builder.config, "sep", None) or ","
    parts = []
    for split, content in splits.items():
        source = f"{shown}, split {split}"
        if not read_here:
            read = partial(_read_prepared, content, source, context)
            parts.append(DatasetPart(str(split), source, folders, read, relative=False, anywhere=is_local))
            continue
        for path in map(Path, content):
            read = partial(read_table, path, context.options, embedded=context.embedded)
            if ending(path) == ".csv":
                read = partial(read_csv, path, context.options, delimiter=separator)
            if is_local:
                parts.append(DatasetPart(str(split), str(path), folder_spellings(path.parent), read))
            else:
                parts.append(DatasetPart(str(split), source, folders, read, relative=False, anywhere=False))
    return parts


def _classes(features: Mapping[str, Any]) -> ClassNames:
    """Return the class names of each column of class labels."""
    import datasets

    return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _advice(name: str, is_local: bool, error: Exception) -> str:
    """Return the cause of an error of the library, and what to do about it."""
    from datasets.exceptions import DatasetNotFoundError

    text = " ".join(str(error).split())[:300]
    if "Config name is missing" in text or "BuilderConfig" in text:
        base = name if is_local else name.partition(":")[0]
        return f"{name}: its configuration is named as in {base}:CONFIGURATION ({text})"
    if is_local:
        if type(error).__name__ in NOTHING_FOUND:
            return f"{name}: the library `datasets` finds no data there"
        return f"{name}: the library `datasets` cannot load it ({_line(error)})"
    if "gated" in text:
        return f"{name} is gated: accept its terms on its hub page, then run `hf auth login`"
    if isinstance(error, DatasetNotFoundError):
        return f"{name}: neither a local folder nor a dataset of the hub; check the name, or `hf auth login` if private"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return f"{name} cannot be had from the hub ({text}); check the network, or pass a local folder"
    return f"{name} cannot be loaded ({_line(error)}); download it and pass its folder"
