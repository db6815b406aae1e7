"""Any dataset -> its splits, columnar: a hub name, table files, a folder of images with sidecars, tar shards.

What a dataset says is not trusted: a row may name a file below the dataset's own folder, a URL or a member of a shard,
and nothing else on this machine. Nothing here opens an image, and no Python object outlives the row it was read from.
"""

from __future__ import annotations

import csv
import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from data.batch import UserError
from data.shards import Ledger, expand_braces, read_index

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
ORDER = ("train", "valid", "test")
HELD_OUT = 0.15  # share of valid, and of test, when a dataset has one split only
KNOWN = {  # role -> column names that mean it; the first there is wins
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "path", "img"),
    "title": ("title", "text", "caption", "txt"),
    "title_neg": ("title_neg", "negative", "neg_title", "negative_title", "neg_text", "neg_caption"),
}
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column"}
TEXT_TABLES = frozenset((".csv", ".tsv", ".jsonl"))
TABLES = TEXT_TABLES | {".parquet"}
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})(-.*)?\.(tar|csv|tsv|jsonl|parquet)")
RECORDS = 10_000  # JSON records that are Python objects at one time
BLOCK = 1 << 24  # bytes of a CSV file read at one time; a row must fit into it
END = "\0end"  # fed to the CSV reader after the last line; a quote that is still open swallows it
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # the title 1e5 stays 1e5


@dataclass(frozen=True)
class Columns:
    """The user's own column names; None means: detect."""

    image: str | None = None
    title: str | None = None
    title_neg: str | None = None


@dataclass(frozen=True)
class Rows:
    """One split, columnar. A row whose image has neither bytes nor path has no image; the title "" is no title."""

    name: str
    image: pa.ChunkedArray  # struct<bytes: large_binary, path: string>; path: absolute, http(s) URL or TAR#OFFSET+SIZE
    title: pa.ChunkedArray  # string, no nulls
    title_neg: pa.ChunkedArray | None  # string, null where a row has no negative; None without such a column

    def __len__(self) -> int:
        return len(self.title)

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at `indices` in that order, copied."""
        negative = None if self.title_neg is None else _take(self.title_neg, indices)
        return Rows(self.name, _take(self.image, indices), _take(self.title, indices), negative)

    def fingerprint(self) -> str:
        """A digest of all values in order, however chunked: one pass over the columns, no file is opened."""
        import pyarrow.compute as pc

        columns = pc.struct_field(self.image, "bytes"), pc.struct_field(self.image, "path"), self.title, self.title_neg
        digests = b"".join(b"none" if column is None else _digest(column) for column in columns)
        return hashlib.blake2b(digests, digest_size=16).hexdigest()


def load_splits(dataset: str, columns: Columns = Columns(), seed: int = 42,
                ledger: Ledger | None = None) -> dict[str, Rows]:
    """Read a dataset's splits: `train`, `valid`, `test` in this order, then others under the names they have.

    `dataset`: a folder with {train,valid,test} as .csv .tsv .jsonl .parquet, as -*.tar shards or as folders; a folder
    that is one table, shards, or images with KEY.txt and KEY.json; one such file; a pattern `train-{000..009}.tar`; or
    a hub name OWNER/NAME. Exactly one split is made three by `seed` (`_three`). `ledger` is told of each sample that a
    shard has lost, as `read_index` tells it; every other row is kept, also without image or title. Raises UserError.
    """
    path = Path(dataset).expanduser()
    try:
        if "://" in dataset:
            raise UserError(f"{dataset}: datasets are not read from URLs; download the files and pass their folder")
        if path.is_dir():
            found = _find(path)
        elif path.is_file():
            found = {"all": [path]}
        elif "{" in dataset or "*" in dataset:
            files = list(_expand(str(path)))
            found = _by_split(files)
            if sum(map(len, found.values())) < len(files):
                found = {"all": files}
        elif re.fullmatch(r"[\w.-]*\w/[\w.-]+", dataset) and path.suffix.lower() not in TABLES | {".tar"}:
            found = None
        else:
            raise UserError(f"{dataset}: there is no such file or folder, and a hub dataset's name is OWNER/NAME")
        splits = _hub(dataset, columns) if found is None else _local(found, columns, ledger)
    except OSError as error:
        raise UserError(f"{error.filename or dataset}: {error.strerror or error}") from error
    if len(splits) == 1:
        return _three(next(iter(splits.values())), seed)
    return dict(sorted(splits.items(), key=lambda item: (*ORDER, item[0]).index(item[0])))


# Which files there are


def _find(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder; a folder in their place stands for the images in it."""
    entries = _entries(folder)
    if found := _by_split(entries):
        return found
    folders = [entry for entry in entries if entry.name.lower() in SPLITS and entry.is_dir()]
    if folders:
        return _one_kind((SPLITS[entry.name.lower()], entry.name, _unsplit(entry)) for entry in folders)
    return {"all": _unsplit(folder)}


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _unsplit(folder: Path) -> list[Path]:
    """What a folder that names no splits consists of: shards, else one table, else images."""
    shards = [file for file in _entries(folder) if file.suffix.lower() == ".tar"]
    tables = [file for file in _entries(folder) if file.suffix.lower() in TABLES]
    if len(tables) > 1 and not shards:
        raise UserError(f"{folder}: which of {', '.join(file.name for file in tables[:5])}? Pass one of them or a "
                        "pattern, or call them train, valid and test")
    return shards or tables or [folder]


def _by_split(entries: Sequence[Path]) -> dict[str, list[Path]]:
    """Files called after a split (`train.csv`, `val-00001-of-00009.parquet`); where there are shards, shards alone."""
    named = [(match, entry) for entry in entries if (match := SPLIT_FILE.fullmatch(entry.name.lower()))]
    shards = [(match, entry) for match, entry in named if match[3] == "tar"]
    kinds: dict[tuple[str, str], list[Path]] = {}
    for match, entry in shards or named:
        kinds.setdefault((SPLITS[match[1]], f"{match[1]}{'-*' if match[2] else ''}.{match[3]}"), []).append(entry)
    return _one_kind((split, kind, files) for (split, kind), files in kinds.items())


def _one_kind(found: Iterable[tuple[str, str, list[Path]]]) -> dict[str, list[Path]]:
    """(split, what it is called, files) by split. Raises UserError where a split is there under two names."""
    splits: dict[str, tuple[str, list[Path]]] = {}
    for split, kind, files in found:
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


# Files to tables: each reader returns the columns in use, under the names of their roles


def _local(found: Mapping[str, Sequence[Path]], columns: Columns, ledger: Ledger | None) -> dict[str, Rows]:
    splits = {}
    for name, files in found.items():
        tables = []
        for file in files:
            folder, table = file if file.is_dir() else file.parent, _read(file, columns, ledger)
            tables.append(_clean(table, str(file), (os.path.abspath(folder), os.path.realpath(folder))))
        splits[name] = _rows(name, tables, str(files[0] if len(files) == 1 else files[0].parent))
    return splits


def _read(path: Path, columns: Columns, ledger: Ledger | None = None) -> pa.Table:
    if path.is_dir():
        nothing = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ valid/ "
                   f"test/, nor images ({' '.join(sorted(PICTURES))})")
        return _records(_pictures(path), columns, f"{path} (images with KEY.txt, KEY.json)", nothing)
    readers: dict[str, Callable[[Path, Columns], pa.Table]] = {
        ".csv": partial(_csv, delimiter=","), ".tsv": partial(_csv, delimiter="\t"), ".jsonl": _jsonl,
        ".parquet": _parquet, ".tar": partial(_shard, ledger=ledger)}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: not a known kind of dataset; known are {' '.join(readers)} and folders")
    return readers[path.suffix.lower()](path, columns)


def _csv(path: Path, columns: Columns, delimiter: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
        picked = _pick(names, columns, str(path))
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
    return _in_roles(table, picked)


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


def _pictures(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images at any depth below `folder`, sorted, each with the fields of KEY.json and with KEY.txt as title."""
    def refuse(error: OSError) -> NoReturn:
        raise error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
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
    picked = _pick(list(names), columns, label)
    for name in picked.values():
        if name in faults:
            raise faults[name]
    return _in_roles(pa.concat_tables(parts, promote_options="default"), picked)


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
            picked = _pick(file.schema_arrow.names, columns, str(path))
            return _in_roles(file.read(columns=[*picked.values()]), picked)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def _shard(path: Path, columns: Columns, ledger: Ledger | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    index = read_index(path, ledger)
    at, size = (index[name].cast(pa.string()) for name in ("image_offset", "image_size"))
    image = pc.binary_join_element_wise(f"{os.path.abspath(path)}#", at, "+", size, "")
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    return _in_roles(table, _pick(table.column_names, columns, str(path)))


def _hub(name: str, columns: Columns) -> dict[str, Rows]:
    """The splits of a hub dataset, images as uploaded. CSV and JSONL are read here: the library guesses their types."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    prepared: Mapping[str, Any] = {}
    try:
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files or {}
        as_text = bool(files) and {Path(file).suffix for some in files.values() for file in some} <= TEXT_TABLES
        separator = getattr(builder.config, "sep", None)
        read = partial(_csv, delimiter=separator) if separator else _read
        if as_text:
            files = datasets.DownloadManager().download(files)
        else:
            builder.download_and_prepare()
            prepared = builder.as_dataset()
    except Exception as error:  # of many kinds, from several libraries; all of them are about this name
        raise UserError(_hub_advice(name, error)) from error
    repository = os.path.join(HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
    folders = repository, str(datasets.config.DOWNLOADED_DATASETS_PATH)  # where image folders and archives come to lie
    splits: dict[str, Rows] = {}
    for found in files if as_text else prepared:
        label = f"{name}, split {found}"
        if as_text:
            tables = [read(Path(file), columns) for file in files[found]]
        else:
            table = prepared[found].data.table  # mapped from disk; taken from here, images are never decoded
            tables = [_in_roles(table, _pick(table.column_names, columns, label))]
        split = SPLITS.get(str(found).lower(), str(found))
        split = str(found) if split in splits else split
        splits[split] = _rows(split, [_clean(table, label, folders, relative=False) for table in tables], label)
    return splits


def _hub_advice(name: str, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = " ".join(str(error).split())[:300]
    if "gated" in text:
        return f"{name} is gated: accept its terms on its hub page, then run `hf auth login`"
    if isinstance(error, DatasetNotFoundError):
        return f"{name}: neither a local folder nor a dataset of the hub; check the name, or `hf auth login` if private"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return f"{name} cannot be had from the hub ({text}); check the network, or pass a local folder"
    return f"{name} cannot be loaded ({type(error).__name__}: {text}); download it and pass its folder"


# Tables to rows


def _pick(names: list[str], columns: Columns, label: str) -> dict[str, str]:
    """Role -> the column that plays it: the user's, else the first known name. Raises UserError naming the columns."""
    there = f"there are {', '.join(names[:20]) or 'none'}"
    spelled = {name.strip().lower(): name for name in reversed(names)}
    picked: dict[str, str] = {}
    for role, known in KNOWN.items():
        named: str | None = getattr(columns, role)
        if named is not None and named not in names:
            close = difflib.get_close_matches(named, names, 1)
            raise UserError(f"{label}: no column {named!r} for {FLAGS[role]}; {there}"
                            + (f"; did you mean {close[0]!r}?" if close else ""))
        column = named or next((spelled[name] for name in known if name in spelled), None)
        if column is not None:
            picked[role] = column
        elif role != "title_neg":
            raise UserError(f"{label}: no {role} column ({', '.join(known)}); {there}; name one with {FLAGS[role]}")
    for column in picked.values():
        if names.count(column) > 1:
            raise UserError(f"{label}: the column {column!r} is there {names.count(column)} times; rename all but one")
    return picked


def _in_roles(table: pa.Table, picked: Mapping[str, str]) -> pa.Table:
    return table.select([*picked.values()]).rename_columns([*picked])


def _clean(table: pa.Table, label: str, folders: Sequence[str], relative: bool = True) -> pa.Table:
    """The columns of `_in_roles` as `Rows` has them; files only from `folders`, the first being what paths start from.

    Raises UserError on a column that cannot play its role and on an image path that leaves the folders.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    images, start = [], 0
    for chunk in table["image"].chunks:
        data, path = _bytes_and_path(chunk, label)
        path = pc.if_else(pc.or_(pc.is_valid(data), pc.equal(path, "")), pa.scalar(None, pa.string()), path)
        path = _inside(path, label, start, folders, relative)
        images.append(pa.StructArray.from_arrays([data, path], fields=[*kind]))
        start += len(chunk)
    title = _cast(table["title"], pa.string(), label, "title")
    clean = {"image": pa.chunked_array(images, kind), "title": pc.fill_null(title, "")}
    if "title_neg" in table.column_names:
        negative = _cast(table["title_neg"], pa.string(), label, "title_neg")
        clean["title_neg"] = pc.if_else(pc.equal(negative, ""), pa.scalar(None, pa.string()), negative)
    return pa.table(clean)


def _bytes_and_path(chunk: pa.Array, label: str) -> tuple[pa.Array, pa.Array]:
    """Images of any kind as large_binary and string, null where an image is not of that kind."""
    import pyarrow as pa

    kind, binary = chunk.type, (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    data, path = pa.nulls(len(chunk), pa.large_binary()), pa.nulls(len(chunk), pa.string())
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:  # Hugging Face's Image
        fields = dict(zip((field.name for field in kind), chunk.flatten(), strict=True))
        data, path = fields.get("bytes", data), fields.get("path", path)
    elif any(is_kind(kind) for is_kind in binary):
        data = chunk
    else:
        path = chunk
    return _cast(data, pa.large_binary(), label, "image"), _cast(path, pa.string(), label, "image")


def _cast(column: Any, kind: pa.DataType, label: str, role: str) -> Any:
    """An array, chunked or not, as text known to be UTF-8, or as bytes."""
    import pyarrow as pa

    try:
        cast = column.cast(kind)
        cast.validate(full=True)
    except pa.ArrowNotImplementedError:
        wanted = "bytes, a path or a URL" if role == "image" else "one text"
        raise UserError(f"{label}: the {role} column holds {column.type}; it must hold {wanted} a row") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{label}: the {role} column is not all UTF-8 text ({error})") from None
    return cast


def _inside(path: pa.Array, label: str, start: int, folders: Sequence[str], relative: bool) -> pa.Array:
    """URLs as they are, other paths absolute. Raises UserError at the first that leaves `folders`; `..` by spelling."""
    import pyarrow.compute as pc

    url = pc.match_substring_regex(path, "^https?://", ignore_case=True)
    absolute = pc.starts_with(path, "/")
    roots = tuple(folder.rstrip("/") + "/" for folder in folders)
    doubt = pc.match_substring_regex(path, r"(^|/)\.\.(/|$)")
    if relative:
        doubt = pc.or_(doubt, pc.and_not(absolute, pc.starts_with(path, roots[0])))
        full = pc.if_else(pc.or_(url, absolute), path, pc.binary_join_element_wise(roots[0], path, ""))
    else:
        doubt, full = pc.or_(doubt, True), path
    doubt = pc.fill_null(pc.and_not(doubt, url), False)
    for row in np.flatnonzero(doubt.to_numpy(zero_copy_only=False)):
        if not os.path.normpath(full[row].as_py()).startswith(roots):
            raise UserError(f"{label}, row {start + row + 1}: the image {path[row].as_py()[:200]!r} is no URL and no "
                            f"file below {folders[0]}; " + ("move the images there" if relative else
                            "if it is a path in the repository, download that and pass its folder"))
    return full


def _rows(name: str, tables: Sequence[pa.Table], label: str) -> Rows:
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    if not table.num_rows:
        raise UserError(f"{label}: holds no rows; fill it or remove it")
    return Rows(name, table["image"], table["title"], table["title_neg"] if "title_neg" in table.column_names else None)


def _take(column: pa.ChunkedArray, indices: np.ndarray) -> pa.ChunkedArray:
    """`column.take(indices)` chunk by chunk: Arrow would first join all chunks into one, with all their images."""
    import pyarrow as pa

    starts = np.cumsum([0, *map(len, column.chunks)])
    chunk_of = np.searchsorted(starts, indices, side="right") - 1
    order = np.argsort(chunk_of, kind="stable")
    used, firsts = np.unique(chunk_of[order], return_index=True)
    parts = [column.chunk(chunk).take(pa.array(indices[rows] - starts[chunk]))
             for chunk, rows in zip(used, np.split(order, firsts)[1:], strict=True)]
    taken = pa.chunked_array(parts, column.type)
    return taken if (np.diff(order) > 0).all() else taken.take(pa.array(np.argsort(order)))


def _digest(column: pa.ChunkedArray) -> bytes:
    """A digest of a column's values: their lengths (-1 for null), then their bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths, content = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for chunk in column.chunks:
        chunk = chunk.cast(pa.large_binary())
        lengths.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy())
        chunk = pc.fill_null(chunk, b"")
        _, ends, data = chunk.buffers()
        first, last = np.frombuffer(ends, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        content.update(memoryview(data or b"")[first:last])
    return lengths.digest() + content.digest()


# One split to three


def _three(rows: Rows, seed: int) -> dict[str, Rows]:
    """Split 70/15/15 by `seed`; rows that share a title or an image stay together. A share left empty is absent.

    Groups go first, largest first, each to the split that is emptiest for its size and has room (else to train); then
    the other rows, shuffled, fill what is missing. A group larger than 15 % therefore trains.
    """
    N = len(rows)
    group_N = _groups(_codes(rows.title), _codes(_image_names(rows.image)))
    size_N = np.bincount(group_N, minlength=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).numpy()
    held = max(1, round(HELD_OUT * N)) if N >= 3 else 0
    goal = [N - 2 * held, held, held]
    room = goal.copy()
    split_N = np.zeros(N, np.int8)  # of each group, at the place of its first row
    groups = order[size_N[order] > 1]
    for group in groups[np.argsort(-size_N[groups], kind="stable")]:
        size = int(size_N[group])
        best = max((k for k in range(3) if room[k] >= size), key=lambda k: room[k] / goal[k], default=0)
        split_N[group] = best
        room[best] -= size
    single = order[size_N[order] == 1]
    ends = np.cumsum(np.maximum(room, 0))
    ends = np.round(ends * len(single) / max(1, ends[-1])).astype(np.int64)
    for k, (first, last) in enumerate(pairwise([0, *ends])):
        split_N[single[first:last]] = k
    parts = {name: np.flatnonzero(split_N[group_N] == k) for k, name in enumerate(ORDER)}
    return {name: replace(rows.take(part), name=name) for name, part in parts.items() if len(part)}


def _groups(*codes: np.ndarray) -> np.ndarray:
    """The connected components of rows that share a code: for each row the least row number of its component.

    Rows adopt the least number among those of equal code, their representatives adopt it with them (so it crosses a
    component in few rounds), and numbers are followed to where they lead; until nothing changes.
    """
    group = np.arange(len(codes[0]))
    while True:
        before = group.copy()
        for code in codes:
            least = np.full(code.max() + 1, len(code))
            np.minimum.at(least, code, group)
            np.minimum.at(group, group.copy(), least[code])
            group = np.minimum(group, least[code])
        group = group[group]
        if np.array_equal(group, before):
            return group


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """int64 [N], equal for equal values; null and "" are equal to nothing."""
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(values).unify_dictionaries()
    code = np.concatenate([pc.fill_null(chunk.indices, -1).to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    alone = (code < 0) | pc.fill_null(pc.equal(values, ""), True).to_numpy()
    code[alone] = code.max() + 1 + np.arange(alone.sum())
    return code


def _image_names(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings that are equal for equal images: the path, or a digest of the bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = []
    for chunk in images.chunks:
        data, path = chunk.field("bytes"), chunk.field("path")
        if data.null_count < len(data):
            digests = [hashlib.sha256(value.as_buffer()).hexdigest() if value.is_valid else None for value in data]
            path = pc.coalesce(pa.array(digests, pa.string()), path)
        names.append(path)
    return pa.chunked_array(names, pa.string())
