"""One file, or one folder of images -> a table of the columns in use, under the names of their roles.

Titles are read as they are written: no reader here guesses types. A row that cannot be used is left out and reported
to the `Account` with its number (from 0, in its file).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.files import open_regular
from data.ledger import Account
from data.shards.index import read_index
from data.sources import img2dataset
from data.sources.csv_tables import read_csv
from data.sources.embedded import EmbeddedPictures
from data.sources.options import ReadOptions
from data.sources.pictures import PICTURES, pictures
from data.sources.records import Record, from_records, parse_json_object
from data.sources.rows import ROW, detect_columns, holds_bytes, rename_to_roles, without

if TYPE_CHECKING:
    import pyarrow as pa

ADDRESS = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
TEXT_TABLES = frozenset((".csv", ".tsv", ".jsonl"))
TABLES = TEXT_TABLES | {".parquet"}


def read_table(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """A file by its ending, or the images of a folder. Raises UserError."""
    if path.is_dir():
        message_if_empty = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ "
                            f"valid/ test/, nor images ({' '.join(sorted(PICTURES))})")
        return from_records(pictures(path, account), options.columns, str(path), message_if_empty, account,
                            " (images with KEY.txt, KEY.json)")
    readers: dict[str, Callable[[Path, ReadOptions, Account], pa.Table]] = {
        ".csv": partial(read_csv, delimiter=","), ".tsv": partial(read_csv, delimiter="\t"),
        ".txt": partial(read_csv, delimiter=","), ".jsonl": _jsonl,
        ".parquet": partial(_parquet, embedded=embedded), ".tar": _shard}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: not a known kind of dataset; known are {' '.join(readers)} and folders")
    return readers[path.suffix.lower()](path, options, account)


def _jsonl(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    def records() -> Iterator[Record]:
        row = 0
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"line {number}"
                try:
                    yield Record(row, where, parse_json_object(line, where))
                except BadSample as problem:
                    account.drop(str(path), row, problem)
                row += 1

    return from_records(records(), options.columns, str(path), f"{path} holds no rows", account)


def _parquet(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    open_regular(path).close()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            with_bytes = {field.name for field in schema if holds_bytes(field.type)}
            picked = detect_columns(schema.names, options.columns, str(path), account, with_bytes)
            (image,) = picked["image"]
            failures = img2dataset.status_columns(schema.names) if image in with_bytes else []
            used = {*failures, *(name for role in picked for name in picked[role])}
            whole = file.read(columns=[*(used - {image} if image in with_bytes else used)])
        if image in with_bytes:
            whole = whole.append_column(image, embedded.of_parquet(path, image))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a Parquet file that can be read ({text})") from error
    table = rename_to_roles(whole, picked)
    if not failures:
        return table
    table = table.append_column(ROW, pa.array(np.arange(len(table))))
    bad = img2dataset.failed(whole)
    return without(table, bad, np.arange(len(table)), str(path), account)


def _shard(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    index = read_index(path, account.drop_sample)
    at, size = (index[name].cast(pa.string()) for name in ("image_offset", "image_size"))
    image = pc.binary_join_element_wise(f"{path.absolute()}#", at, "+", size, "")
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    return rename_to_roles(table, detect_columns(table.column_names, options.columns, str(path), account))


def holds_addresses(path: Path, options: ReadOptions) -> bool:
    """True if the first row of a table names its image by URL; False where it cannot be read."""
    account = Account()
    try:
        image = read_table(path, options, account, EmbeddedPictures())["image"]
    except (UserError, OSError):
        return False
    return len(image) > 0 and not holds_bytes(image.type) and ADDRESS.match(str(image[0].as_py())) is not None
