"""Columns with several texts a row: values of lists and of several columns, and a row for each title.

Dimension key: N rows, F values of all rows, end to end.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.titles import VISIBLE

if TYPE_CHECKING:
    import pyarrow as pa

PIECE = 1 << 13  # texts that are looked at at one time
FIELDS = ("raw", "caption", "text")  # the text in a list of structs: `raw` in the sentences of Karpathy's splits


def joined(*parts: str | pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return the texts and columns of texts joined, value by value, as large_string; null where a column is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.large_string()
    columns = [pa.scalar(part, kind) if isinstance(part, str) else part.cast(kind) for part in parts]
    return pc.binary_join_element_wise(*columns, pa.scalar("", kind))


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's types of lists."""
    import pyarrow as pa

    return (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind))


def decoded(chunk: pa.Array) -> pa.Array:
    """Return an array without a dictionary, as text of 64-bit offsets where that is text of any kind.

    A short dictionary may stand for more text than the 2 GiB that 32-bit offsets reach.
    """
    import pyarrow as pa

    if not pa.types.is_dictionary(chunk.type):
        return chunk
    values = chunk.dictionary
    if pa.types.is_string(values.type) or pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    elif pa.types.is_binary(values.type):
        values = values.cast(pa.large_binary())
    return values.take(chunk.indices)


def flatten(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return all values [F] of a column in order, lists flattened, and the row of each value [F]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values, kind, row_F = column, column.type, np.arange(len(column))
    if is_list(kind):
        values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], kind.value_type)
        lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        row_F = np.repeat(row_F, lengths_N)
    if is_list(kind) and pa.types.is_struct(values.type):
        field = text_field([field.name for field in values.type])
        values = pc.struct_field(values, field) if field else values
    return values, row_F


def text_field(names: Iterable[str]) -> str | None:
    """Return the field that holds the text of an object in a list; None if none is known."""
    existing = {*names}
    return next((name for name in FIELDS if name in existing), None)


def spell_lists(texts: pa.ChunkedArray) -> bool:
    """Return whether all texts that are not blank are in brackets."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = 0
    for start in range(0, len(texts), PIECE):  # most columns are known by their first piece
        piece = texts.slice(start, PIECE)
        said = piece.filter(pa.array(holds_text(piece)))
        count += len(said)
        if not pc.all(pc.match_substring_regex(said, r"(?s)^\s*\[.*\]\s*$"), min_count=0).as_py():
            return False
    return count > 0


def parse_lists(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return texts that spell lists of texts, in JSON or as Python shows them, as lists; None unless all do."""
    import pyarrow as pa

    lists = []
    for text in texts.to_pylist():
        values = _parse_list(text.strip()) if text and text.strip() else []
        if values is None:
            return None
        lists.append(values)
    return pa.chunked_array([pa.array(lists, pa.list_(pa.large_string()))])


def _parse_list(text: str) -> list[str] | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if repr(values) != text:  # ['a' 'b'], as numpy shows them, would be one text
            return None
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


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
    chunks: list[pa.Array] = []
    for values, _ in parts:
        chunks += map(decoded, values.chunks)
    kinds = {chunk.type for chunk in chunks}
    if len(kinds) > 1 or all(map(_is_text, kinds)):
        # The take below joins all chunks: together they may hold more than the 2 GiB that 32-bit offsets reach.
        kind = pa.large_string()
        if not all(map(_is_text, kinds)) and all(_is_text(each) or _is_bytes(each) for each in kinds):
            kind = pa.large_binary()
        chunks = [chunk.cast(kind) for chunk in chunks]
    row_F = np.concatenate([row_F for _, row_F in parts])
    order = np.argsort(row_F, kind="stable")
    values = pa.chunked_array(chunks, chunks[0].type if chunks else pa.large_string())
    return as_lists(values.take(pa.array(order)), row_F[order], len(columns[0]))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
            or pa.types.is_null(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def without_blanks(values: pa.ChunkedArray, row_F: np.ndarray, rows: int) -> pa.ChunkedArray:
    """Return texts [F] as one list a row, without nulls and without texts of white space alone."""
    import pyarrow as pa

    is_text_F = holds_text(values)
    if is_text_F.all():
        return as_lists(values, row_F, rows)
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


def holds_text(values: pa.ChunkedArray) -> np.ndarray:
    """Return which texts [F] have a character that is seen: not white space, control or format (zero width) alone."""
    import pyarrow.compute as pc

    return pc.match_substring_regex(pc.fill_null(values, ""), VISIBLE).to_numpy()
