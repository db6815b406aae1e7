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
from data.shards.records import read_record
from data.sources import img2dataset
from data.sources.csv_tables import read_csv
from data.sources.pictures import PICTURES, pictures
from data.sources.records import Record, from_records, parse_json_object
from data.sources.rows import ROW, Columns, detect_columns, holds_bytes, rename_to_roles, without
from data.web.storage import RemoteFile

if TYPE_CHECKING:
    import pyarrow as pa

ADDRESS = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
TEXT_TABLES = frozenset((".csv", ".tsv", ".jsonl"))
TABLES = TEXT_TABLES | {".parquet"}


def read_table(path: Path, columns: Columns, account: Account) -> pa.Table:
    """A file by its ending, or the images of a folder. Raises UserError."""
    if path.is_dir():
        message_if_empty = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ "
                            f"valid/ test/, nor images ({' '.join(sorted(PICTURES))})")
        return from_records(pictures(path, account), columns, str(path), message_if_empty, account,
                            " (images with KEY.txt, KEY.json)")
    readers: dict[str, Callable[[Path, Columns, Account], pa.Table]] = {
        ".csv": partial(read_csv, delimiter=","), ".tsv": partial(read_csv, delimiter="\t"), ".jsonl": _jsonl,
        ".parquet": _parquet, ".tar": _shard}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: not a known kind of dataset; known are {' '.join(readers)} and folders")
    return readers[path.suffix.lower()](path, columns, account)


def _jsonl(path: Path, columns: Columns, account: Account) -> pa.Table:
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

    return from_records(records(), columns, str(path), f"{path} holds no rows", account)


def _parquet(path: Path, columns: Columns, account: Account) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    open_regular(path).close()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            embedded = {field.name for field in schema if holds_bytes(field.type)}
            picked = detect_columns(schema.names, columns, str(path), embedded)
            failures = img2dataset.status_columns(schema.names) if picked["image"] in embedded else []
            whole = file.read(columns=[*{*picked.values(), *failures}])
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a Parquet file that can be read ({text})") from error
    table = rename_to_roles(whole, picked)
    if not failures:
        return table
    table = table.append_column(ROW, pa.array(np.arange(len(table))))
    bad = img2dataset.failed(whole)
    return without(table, bad, np.arange(len(table)), str(path), account)


def read_remote(file: RemoteFile, columns: Columns, account: Account) -> pa.Table:
    """A table of a store by its copy, or a shard by its record. Raises UserError."""
    if file.path.suffix.lower() != ".arrow":
        return read_table(file.path, columns, account)
    record = read_record(file.path)
    if record is None:
        raise UserError(f"{file.address}: its record {file.path} is gone or damaged; run again")
    for entry in record.problems:
        account.drop_sample(entry)
    return _index_as_rows(record.table, file.address, columns)


def _shard(path: Path, columns: Columns, account: Account) -> pa.Table:
    return _index_as_rows(read_index(path, account.drop_sample), str(path.absolute()), columns)


def _index_as_rows(index: pa.Table, shard: str, columns: Columns) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    at, size = (index[name].cast(pa.string()) for name in ("image_offset", "image_size"))
    image = pc.binary_join_element_wise(f"{shard}#", at, "+", size, "")
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    return rename_to_roles(table, detect_columns(table.column_names, columns, shard))


def holds_addresses(path: Path, columns: Columns) -> bool:
    """True if the first row of a table names its image by URL; False where it cannot be read."""
    account = Account()
    try:
        image = read_table(path, columns, account)["image"]
    except (UserError, OSError):
        return False
    return len(image) > 0 and not holds_bytes(image.type) and ADDRESS.match(str(image[0].as_py())) is not None
