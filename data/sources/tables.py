"""One file, or one folder of images -> a table of the columns in use, under the names of their roles.

Titles are read as they are written: no reader here guesses types. No Python object outlives the row it was read from.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data.batch import UserError
from data.files import is_output
from data.shards.index import Ledger, read_index
from data.sources.rows import KNOWN, Columns, in_roles, pick

if TYPE_CHECKING:
    import pyarrow as pa

TEXT_TABLES = frozenset((".csv", ".tsv", ".jsonl"))
TABLES = TEXT_TABLES | {".parquet"}
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
RECORDS = 10_000  # JSON records that are Python objects at one time
BLOCK = 1 << 24  # bytes of a CSV file read at one time; a row must fit into it
END = "\0end"  # fed to the CSV reader after the last line; a quote that is still open swallows it
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # the title 1e5 stays 1e5


def read_table(path: Path, columns: Columns, ledger: Ledger | None = None,
               left_out: list[str] | None = None) -> pa.Table:
    """A file by its ending, or the images of a folder. Raises UserError.

    `left_out` takes the folders with images that are output of ours, and are not read.
    """
    if path.is_dir():
        left_out = [] if left_out is None else left_out
        nothing = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ valid/ "
                   f"test/, nor images ({' '.join(sorted(PICTURES))})")
        return _records(_pictures(path, left_out), columns, f"{path} (images with KEY.txt, KEY.json)", nothing)
    readers: dict[str, Callable[[Path, Columns], pa.Table]] = {
        ".csv": partial(read_csv, delimiter=","), ".tsv": partial(read_csv, delimiter="\t"), ".jsonl": _jsonl,
        ".parquet": _parquet, ".tar": partial(_shard, ledger=ledger)}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: not a known kind of dataset; known are {' '.join(readers)} and folders")
    return readers[path.suffix.lower()](path, columns)


def read_csv(path: Path, columns: Columns, delimiter: str) -> pa.Table:
    """A CSV file, all values text and "" where one is empty. Raises UserError that names the line."""
    import pyarrow as pa
    from pyarrow import csv as arrow

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
        picked = pick(names, columns, str(path))
        table = arrow.read_csv(
            path, arrow.ReadOptions(block_size=BLOCK), arrow.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            arrow.ConvertOptions(include_columns=[*{*picked.values()}],
                                 column_types=dict.fromkeys(picked.values(), pa.string())))
        with path.open("rb") as raw:  # Arrow takes a quote left open as one long field
            odd = sum(block.count(b'"') for block in iter(partial(raw.read, BLOCK), b"")) % 2
        fault = _csv_fault(path, delimiter) if odd else None
    except (ValueError, KeyError, csv.Error) as error:
        fault = _csv_fault(path, delimiter) or f"cannot be read ({' '.join(str(error).split())})"
    if fault:
        raise UserError(f"{path}: {fault}")
    return in_roles(table, picked)


def _csv_fault(path: Path, delimiter: str) -> str | None:
    """What is wrong with a CSV file and in which line, by a slow second reading; None if nothing is found."""
    csv.field_size_limit(1 << 30)
    width, start = 0, 1
    try:
        with path.open("rb") as file:
            reader = csv.reader(_csv_lines(file), delimiter=delimiter)
            for row in reader:
                if row and END in row[-1]:
                    return None if row == [END] else f"line {start} opens a quote that nothing closes"
                if row and len(row) != (width := width or len(row)):
                    return f"line {start} has {len(row)} fields, the header {width}; quote what holds the separator"
                start = reader.line_num + 1
    except csv.Error as error:
        return f"line {start}: {error}"
    except UnicodeDecodeError:
        return f"line {reader.line_num + 1} is not UTF-8; save the file as UTF-8"
    return None


def _csv_lines(file: Iterable[bytes]) -> Iterator[str]:
    for line in file:
        yield line.decode("utf-8-sig")
    yield END


def _jsonl(path: Path, columns: Columns) -> pa.Table:
    def records() -> Iterator[tuple[str, dict[str, Any]]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield (where := f"{path}: line {number}"), _json(line, where)

    return _records(records(), columns, str(path), f"{path} holds no rows")


def _json(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = AS_WRITTEN.decode(text.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; write {{\"image\": …, \"title\": …}}")
    return record


def _pictures(folder: Path, left_out: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images at any depth below `folder`, sorted, each with the fields of KEY.json and with KEY.txt as title.

    Folders that this program wrote are not entered; `left_out` takes their paths.
    """
    def refuse(error: OSError) -> NoReturn:
        raise error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        outputs = [name for name in folders if is_output(Path(here, name))]
        left_out += [os.path.join(here, name) for name in outputs]
        folders[:] = [name for name in folders if name not in outputs]
        present = set(files)
        for file in sorted(files):
            stem, ending = os.path.splitext(file)
            if ending.lower() not in PICTURES or file.startswith("."):
                continue
            sidecar = os.path.join(here, stem)
            record = {}
            if stem + ".json" in present:
                record = _json(Path(sidecar + ".json").read_bytes(), sidecar + ".json")
            if stem + ".txt" in present:
                record["title"] = _sidecar_text(sidecar + ".txt")
            yield os.path.join(here, file), record | {"image": os.path.abspath(os.path.join(here, file))}


def _sidecar_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save the file as UTF-8") from error


def _records(records: Iterator[tuple[str, dict[str, Any]]], columns: Columns, label: str, nothing: str) -> pa.Table:
    """(where, record) pairs as a table of the fields in use; `nothing` is the error when there are none."""
    import pyarrow as pa

    known = {name for names in KNOWN.values() for name in names}
    named = {columns.image, columns.title, columns.title_neg}
    names: dict[str, Any] = {}
    faults: dict[str, UserError] = {}  # by field; they matter if the field turns out to be in use
    parts = []
    while chunk := list(islice(records, RECORDS)):
        for _, record in chunk:
            names.update(record)
        used = [name for name in names if name in named or name.strip().lower() in known]
        fields = {name: _field_column(name, chunk, faults) for name in used}
        parts.append(pa.table({**fields, "": pa.nulls(len(chunk))}))  # the last keeps the count if no field is in use
    if not parts:
        raise UserError(nothing)
    picked = pick(list(names), columns, label)
    for name in picked.values():
        if name in faults:
            raise faults[name]
    return in_roles(pa.concat_tables(parts, promote_options="default"), picked)


def _field_column(name: str, chunk: Sequence[tuple[str, dict[str, Any]]], faults: dict[str, UserError]) -> pa.Array:
    import pyarrow as pa

    try:  # nearly always text and nulls
        return pa.array([record.get(name) for _, record in chunk], pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        pass
    try:
        return pa.array([_field(where, name, record.get(name)) for where, record in chunk], pa.string())
    except UserError as error:
        faults.setdefault(name, error)
        return pa.nulls(len(chunk), pa.string())


def _field(where: str, name: str, value: Any) -> bytes | None:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: {name!r} is not valid Unicode ({error.reason})") from error
    if isinstance(value, (dict, list)):
        raise UserError(f"{where}: {name!r} is a {type(value).__name__}; it must be text")
    return None if value is None else json.dumps(value).encode()


def _parquet(path: Path, columns: Columns) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            picked = pick(file.schema_arrow.names, columns, str(path))
            return in_roles(file.read(columns=[*picked.values()]), picked)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def _shard(path: Path, columns: Columns, ledger: Ledger | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    index = read_index(path, ledger)
    at, size = (index[name].cast(pa.string()) for name in ("image_offset", "image_size"))
    image = pc.binary_join_element_wise(f"{os.path.abspath(path)}#", at, "+", size, "")
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    return in_roles(table, pick(table.column_names, columns, str(path)))
