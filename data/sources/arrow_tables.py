"""Parquet, Arrow IPC (feather) and tables of the `datasets` library -> columns under the names of their roles.

Class labels of `datasets` are numbers, whose names are in the schema; the names become the titles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.batch import UserError
from data.ledger import Account
from data.reading import open_regular, parse_json
from data.sources import img2dataset
from data.sources.arrow_sizes import unpacked_size
from data.sources.columns import CLASS_COLUMNS, KNOWN, Columns, detect_columns
from data.sources.embedded import EmbeddedPictures
from data.sources.lists import is_list
from data.sources.options import ReadOptions
from data.sources.rows import LABEL, ROW, drop_rows, holds_bytes, rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

OFFSET = 4  # bytes that a value takes at least in memory
UNPACKED, MAX_RATIO = 1 << 30, 1000  # bytes, and times a Parquet file's own, that its columns may take in memory
ClassNames = Mapping[str, Sequence[str]]  # column -> the names of its classes


def read_parquet(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Read a Parquet file, of its columns only those in use. Raises UserError."""
    import pyarrow as pa
    from pyarrow import parquet

    open_regular(path).close()
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = _with_labels(schema, class_names(schema), options.columns)
            picked = _detect(schema, columns, str(path), account)
            (image,) = picked["image"]
            kind = schema.field(image).type
            is_copied = holds_bytes(kind)
            failures = img2dataset.status_columns(schema.names) if _holds_pictures(kind) else []
            used = {*failures, *chain.from_iterable(picked.values())}
            if is_copied:  # its pictures go to a file of their own, a few rows at a time
                used.remove(image)
            _refuse_huge(path, file.metadata, used)
            whole = file.read(columns=[*used])
        if is_copied:
            whole = whole.append_column(image, embedded.map_parquet_column(path, image))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a Parquet file that can be read ({text})") from error
    table = _to_roles(whole, picked, class_names(schema))
    if not failures:
        return table
    table = table.append_column(ROW, pa.array(np.arange(len(table))))
    bad = img2dataset.failed(whole)
    return drop_rows(table, bad, np.arange(len(table)), str(path), account)


def _refuse_huge(path: Path, metadata: parquet.FileMetaData, columns: Collection[str]) -> None:
    """Raise UserError where columns in use take more than UNPACKED bytes and MAX_RATIO times the file's in memory."""
    sizes, repeated = Counter[str](), set[str]()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            chunk = group.column(place)
            packed, unpacked, name = chunk.total_compressed_size, chunk.total_uncompressed_size, chunk.path_in_schema
            if name.partition(".")[0] not in columns:
                continue
            if min(packed, unpacked, chunk.num_values) < 0:
                raise ValueError(f"column {name} claims {min(packed, unpacked, chunk.num_values):,} values or bytes")
            sizes[name] += max(unpacked, OFFSET * chunk.num_values)  # equal or null values take no bytes in the file
            # These sizes count each value of a dictionary once, however often it is repeated. A column that is far
            # smaller than its number of values, or than its unpacked size, may repeat a long value many times.
            if chunk.has_dictionary_page and (packed < chunk.num_values or packed * 100 < unpacked):
                repeated.add(name)
    _refuse_inflated(path, sizes.total())
    for name in repeated:
        sizes[name] = max(sizes[name], _decoded_size(path, name))
    _refuse_inflated(path, sizes.total())


def _refuse_inflated(path: Path, size: int) -> None:
    if size > max(UNPACKED, MAX_RATIO * path.stat().st_size):
        raise UserError(f"{path}: its columns take {size:,} bytes in memory, more than {MAX_RATIO:,} times the file's; "
                        "if that is meant, write it without compression and without dictionaries")


def _decoded_size(path: Path, column: str) -> int:
    """Return the bytes of all values of a column, which is read as a dictionary and its indices.

    `column` is a path in the schema, as title.list.element.
    """
    from pyarrow import parquet

    size = 0
    with parquet.ParquetFile(path, read_dictionary=[column]) as file:
        for batch in file.iter_batches(1 << 16, columns=[column]):
            size += dictionary_size(batch.column(0))
    return size


def dictionary_size(values: pa.Array) -> int:
    """Return the bytes of all values of a column of texts by number, or of lists of them; 0 for another column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while is_list(values.type):
        values = values.flatten()
    if pa.types.is_struct(values.type):
        return sum(map(dictionary_size, values.flatten()))
    if not pa.types.is_dictionary(values.type) or not len(values.dictionary):
        return 0
    kind = values.type.value_type
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind)
            or pa.types.is_large_binary(kind)):
        return 0
    length = pc.binary_length(values.dictionary.cast(pa.large_binary())).cast(pa.int64())
    return pc.sum(length.take(values.indices)).as_py() or 0


def read_arrow(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Open an Arrow IPC file or stream (.arrow, .feather), mapped from the disk. Raises UserError."""
    import pyarrow as pa

    try:
        _refuse_inflated(path, unpacked_size(path))
        table = embedded.open(path)
        chunks = chain.from_iterable(column.chunks for column in table.columns)
        _refuse_inflated(path, sum(map(dictionary_size, chunks)))
    except (pa.ArrowException, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not an Arrow file that can be read ({text}); "
                        "write it with pyarrow.feather.write_feather, version 2") from error
    return roles_of(table, options.columns, str(path), account)


def roles_of(table: pa.Table, columns: Columns, source: str, account: Account,
             classes: ClassNames | None = None) -> pa.Table:
    """Return the columns in use under their roles. `classes`: class names that are not in the schema."""
    named = {**class_names(table.schema), **(classes or {})}
    picked = _detect(table.schema, _with_labels(table.schema, named, columns), source, account)
    return _to_roles(table, picked, named)


def column_names(path: Path) -> list[str] | None:
    """Return the columns of a Parquet or Arrow file; None for another kind of file or one that cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        open_regular(path).close()
        if path.suffix.lower() == ".parquet":
            return list(parquet.read_schema(path).names)
        with pa.memory_map(str(path)) as source:
            return list(pa.ipc.open_file(source).schema.names)
    except (pa.ArrowException, OSError, ValueError):
        return None


def class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Return the names of the classes of each ClassLabel column, from what `datasets` writes into a schema."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _with_labels(schema: pa.Schema, classes: ClassNames, columns: Columns) -> Columns:
    """Return `columns` with the only column of class labels as the title, where no column is known to hold titles."""
    labels = [name for name in schema.names if name in classes]
    titles = {*KNOWN["title"]} - {*CLASS_COLUMNS}
    if columns.title or len(labels) != 1 or {name.strip().lower() for name in schema.names} & titles:
        return columns
    return replace(columns, title=(labels[0],))


def _detect(schema: pa.Schema, columns: Columns, source: str, account: Account) -> dict[str, list[str]]:
    with_bytes = {field.name for field in schema if _holds_pictures(field.type)}
    return detect_columns(schema.names, columns, source, account, with_bytes)


def _holds_pictures(kind: pa.DataType) -> bool:
    return holds_bytes(kind.value_type if is_list(kind) else kind)


def _to_roles(table: pa.Table, picked: Mapping[str, Sequence[str]], classes: ClassNames) -> pa.Table:
    """Return the picked columns by role; class names for their numbers, and one image a row for lists of one."""
    roles = rename_to_roles(table, picked).replace_schema_metadata(None)
    title = picked["title"][0]
    if len(picked["title"]) == 1 and title in classes:
        names = _names_of(roles["title"], classes[title])
        roles = roles.set_column(roles.column_names.index("title"), "title", names)
        if LABEL in roles.column_names:
            roles = roles.drop_columns([LABEL])
        roles = roles.append_column(LABEL, names)
    if is_list(roles["image"].type) and _may_be_image(roles["image"].type.value_type):
        images = _only_items(roles["image"])
        roles = roles.set_column(roles.column_names.index("image"), "image", images)
    return roles


def _names_of(column: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    """Return class names for class numbers; null for -1, which is no class, and for numbers that have no name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_integer(column.type):
        return column
    is_named = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))
    numbers = pc.if_else(is_named, column, pa.scalar(None, column.type))
    texts = pa.array(names, pa.large_string())
    return pa.chunked_array([texts.take(chunk) for chunk in numbers.chunks], texts.type)


def _only_items(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace lists of at most one item by the items; return a column with longer lists as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    chunks = []
    for chunk in column.chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy()
        if len(lengths) and lengths.max() > 1:
            return column
        places = pa.array(np.cumsum(lengths) - 1, mask=lengths == 0)
        chunks.append(pc.list_flatten(chunk).take(places))
    return pa.chunked_array(chunks, column.type.value_type)


def _may_be_image(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return holds_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
