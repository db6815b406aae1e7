"""Columns with several texts a row: values of lists and of several columns, and a row for each title.

Dimension key: N rows, F values of all rows, end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "raw"  # of a list of structs, the text: the sentences of COCO in its Karpathy splits


def is_list(kind: pa.DataType) -> bool:
    """True for Arrow's types of lists."""
    import pyarrow as pa

    return (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def flatten(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return all values [F] of a column in order, those within lists one by one, and the row of each [F]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values, kind, lengths_N = column, column.type, np.ones(len(column), np.int64)
    if is_list(kind):
        values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type)
        lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    if pa.types.is_struct(values.type) and FIELD in {field.name for field in values.type}:
        values = pc.struct_field(values, FIELD)
    return values, np.repeat(np.arange(len(column)), lengths_N)


def as_lists(values: pa.ChunkedArray | pa.Array, row_F: np.ndarray, rows: int) -> pa.ChunkedArray:
    """Return values [F] as one list a row; `row_F` ascends, a row without values has []."""
    import pyarrow as pa

    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    ends = np.cumsum(np.bincount(row_F, minlength=rows)) if rows else np.empty(0, np.int64)
    offsets = pa.array(np.append(0, ends), pa.int64())
    return pa.chunked_array([pa.LargeListArray.from_arrays(offsets, values).cast(pa.list_(values.type))])


def join_columns(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Return columns as one whose lists hold the values of each row, in the order of the columns."""
    import pyarrow as pa

    parts = [flatten(column) for column in columns]
    kinds = {values.type for values, _ in parts}
    if len(kinds) > 1:
        is_bytes = all(map(_is_text_or_bytes, kinds))
        parts = [(values.cast(pa.large_binary() if is_bytes else pa.string()), row_F) for values, row_F in parts]
    chunks = [chunk for values, _ in parts for chunk in values.chunks]
    values = pa.chunked_array(chunks, parts[0][0].type)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    row_F = np.concatenate([row_F for _, row_F in parts])
    order = np.argsort(row_F, kind="stable")
    return as_lists(values.take(pa.array(order)), row_F[order], len(columns[0]))


def _is_text_or_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(is_kind(kind) for is_kind in (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
        pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_null))


def without_blanks(values: pa.ChunkedArray, row_F: np.ndarray, rows: int) -> pa.ChunkedArray:
    """Return texts [F] as one list a row, without nulls and without texts of white space alone."""
    import pyarrow as pa

    is_text_F = ~_is_blank(values)
    return as_lists(values.filter(pa.array(is_text_F)), row_F[is_text_F], rows)


def explode(table: pa.Table, column: str) -> pa.Table:
    """Return the table with a row for each text of `column`, whose lists are `without_blanks`; "" for one without."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = table[column]
    length_N = pc.list_value_length(texts).to_numpy()
    row_F = np.repeat(np.arange(len(texts)), np.maximum(length_N, 1))
    padded = pc.if_else(pc.greater(pc.list_value_length(texts), 0), texts, pa.scalar([""], texts.type))
    values, _ = flatten(padded)
    taken = table.drop_columns([column]).take(pa.array(row_F))
    return taken.add_column(table.column_names.index(column), column, values)


def _is_blank(values: pa.ChunkedArray) -> np.ndarray:
    import pyarrow.compute as pc

    return pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), "").to_numpy()
