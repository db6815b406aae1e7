"""Any dataset -> its splits: a hub name, table files, a folder of images with sidecars, tar shards."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from data.batch import UserError
from data.ledger import Account, Ledger, discard
from data.reading import NotAFile
from data.sources.captions import local_file_parts
from data.sources.columns import Columns as Columns
from data.sources.embedded import EmbeddedPictures
from data.sources.folders import Folder, folder_parts
from data.sources.labels import class_titles
from data.sources.library import hub_parts
from data.sources.options import ReadOptions as ReadOptions
from data.sources.parts import DatasetPart, ReadContext, expand_pattern, file_parts, pattern_by_split
from data.sources.paths import path_of_file_url
from data.sources.rows import Rows as Rows
from data.sources.rows import join_tables, to_row_columns
from data.sources.split_names import SPLITS, UNSPLIT, divide_by_column, select_groups, without_split_column
from data.sources.tables import TABLES, ending
from data.web.storage import RemoteFile, parent, scheme_of

DETECT = ReadOptions()
Download = Callable[[str], Mapping[str, Sequence[Path | RemoteFile]]]  # the files at an address, by split


def _refuse(pattern: str) -> NoReturn:
    raise UserError(f"{pattern}: only local files are read here; download them and pass their folder")


def load_splits(dataset: str, options: ReadOptions = DETECT, ledger: Ledger = discard,
                download: Download = _refuse, log: Callable[[str], None] = discard,
                embedded: Path | None = None) -> dict[str, Rows]:
    """Read a dataset's splits: `train`, `valid`, `test` in this order, then others under the names they have.

    `dataset`: a folder with {train,valid,test} as .csv .tsv .jsonl .parquet, as -*.tar shards or as folders; a folder
    that is one table, shards, or images with KEY.txt and KEY.json; one such file; a pattern `train-{000..009}.tar`;
    tables and shards at an address, which `download` returns by split; or a hub name OWNER/NAME, with several
    configurations OWNER/NAME:CONFIGURATION. A lone split, unless it is called valid or test, is called train:
    `divide_lone_split` makes it three. `ledger` gets an entry for each row that cannot be read (see data/ledger.py);
    every other row is kept, also without image or title. `log` gets a line for what is not used or is changed. The
    pictures of a Parquet file are copied to the folder `embedded` (see data/sources/embedded.py). Raises UserError.
    """
    account = Account(ledger, log, lost=options.lost)
    if scheme_of(dataset) == "file":
        dataset = path_of_file_url(dataset)
    # Python keeps bytes of a path that are not UTF-8 as surrogates, which Arrow's strings cannot hold.
    if any("\udc80" <= char <= "\udcff" for char in os.path.abspath(dataset)):
        raise UserError(f"{dataset}: the name of the folder is not UTF-8; rename it, or give a link to it")
    if Path(dataset).expanduser().exists():  # else the datasets library reads it, which needs pandas
        keep_pandas_out()
    context = ReadContext(options, EmbeddedPictures(embedded, log), is_local="://" not in dataset)
    try:
        splits = _read(_parts(dataset, context, download, account), context, account)
    except OSError as error:
        raise UserError(f"{error.filename or dataset}: {error.strerror or error}") from error
    account.close(dataset)
    account.note_unused(options.by_flag())
    _release_memory()
    if len(splits) == 1 and not splits.keys() & {"valid", "test"}:
        return {"train": replace(next(iter(splits.values())), name="train")}
    return dict(sorted(splits.items(), key=lambda item: (*SPLITS, item[0]).index(item[0])))


def keep_pandas_out() -> None:
    """Keep pyarrow from importing pandas, which takes .2 s, only to compare values with the types of pandas.

    pyarrow looks for pandas once in a process: it looks here, and finds none. An installed pandas works with pyarrow
    afterwards, but pd.NA and pd.NaT in a column of Python objects do not.
    """
    if "pandas" in sys.modules:
        return
    import pyarrow as pa

    sys.modules["pandas"] = None  # type: ignore[assignment]  # an import in Python or C++ fails, one in Cython is None
    try:
        for _ in range(2):  # first the Cython half of pyarrow looks, then the C++ half
            with suppress(ImportError, AttributeError):
                pa.array([])
    finally:
        sys.modules.pop("pandas", None)


def _release_memory() -> None:
    """Give back to the system what Arrow keeps of the memory that reading took: 150 MB after a million rows."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _parts(dataset: str, context: ReadContext, download: Download, account: Account) -> list[DatasetPart]:
    """Return the parts of what the user named. Raises UserError, OSError."""
    path = Path(dataset).expanduser()
    folder, colon, configuration = dataset.rpartition(":")
    if "://" in dataset:
        return file_parts(download(dataset), context)
    if path.is_dir():
        return folder_parts(Folder(path, "", context, account))
    if path.is_file():
        (split,) = pattern_by_split([path])
        return local_file_parts(split, path, context, account)
    if path.exists():
        raise NotAFile(path, "a pipe or a device")
    if colon and Path(folder).expanduser().is_dir():
        return folder_parts(Folder(Path(folder).expanduser(), configuration, context, account))
    if "{" in dataset or "*" in dataset:
        return file_parts(pattern_by_split(list(expand_pattern(str(path)))), context)
    if re.fullmatch(r"[\w.-]*\w/[\w.-]+(:[\w.-]+)?", dataset) and ending(path) not in TABLES | {".tar"}:
        return hub_parts(dataset, context)
    raise UserError(f"{dataset}: there is no such file or folder, and a hub dataset's name is OWNER/NAME")


def _read(parts: Sequence[DatasetPart], context: ReadContext, account: Account) -> dict[str, Rows]:
    """Return the rows of each split, part after part; a single group is divided by its column of splits."""
    options = context.options
    groups: dict[str, list[DatasetPart]] = {}
    for part in parts:
        groups.setdefault(part.split, []).append(part)
    rows: dict[str, Rows] = {}
    for name, group in select_groups(groups, options, account).items():
        account.begin(None if name == UNSPLIT else name)
        tables = []
        for part in group:
            location = part.image_location(options)
            table = to_row_columns(part.read(account), part.source, location, account, context.embedded)
            tables.append(class_titles(table, options.templates, part.source, account))
        sources = [part.source for part in group]
        if len(groups) > 1 and options.columns.split is None:
            divided = {name: without_split_column(name, tables, account)}
        else:
            divided = divide_by_column(name, tables, sources, options, account)
        source = sources[0] if len({*sources}) == 1 else parent(sources[0])
        for split, each in divided.items():
            rows[split] = join_tables(split, each, source, account)
    return rows
