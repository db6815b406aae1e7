"""Rows that are read one at a time -> a table of the columns in use, under the names of their roles.

Records become Arrow columns RECORDS at a time, so that the memory of Python objects stays bounded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.rows import KNOWN, ROW, Columns, detect_columns, rename_to_roles, without

if TYPE_CHECKING:
    import pyarrow as pa

RECORDS = 10_000  # records that are Python objects at one time
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # the title 1e5 stays 1e5


class Record(NamedTuple):
    """A row of a file that is read one row at a time."""

    row: int  # its number in the file, from 0
    where: str  # its place, for people
    fields: dict[str, Any]


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that a line or a file holds. Raises BadSample: not-utf8, bad-json."""
    try:
        record = AS_WRITTEN.decode(text.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise BadSample("not-utf8", f"{where} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad-json", f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadSample("bad-json", f"{where} is not a JSON object; write {{\"image\": …, \"title\": …}}")
    return record


def from_records(records: Iterator[Record], columns: Columns, label: str, message_if_empty: str, account: Account,
                 kind: str = "") -> pa.Table:
    """Records as a table of the fields in use and ROW; `message_if_empty` is the error where the file holds none.

    `label` names the file, `kind` describes it in errors. A bad field drops its row only if it is in use.
    """
    import pyarrow as pa

    known = {name for names in KNOWN.values() for name in names}
    named = {columns.image, columns.title, columns.title_neg, columns.split}
    names: dict[str, None] = {}
    problems: dict[str, dict[int, BadSample]] = defaultdict(dict)  # by field, then by place in the table
    parts, start, before = [], 0, account.dropped
    while chunk := list(islice(records, RECORDS)):
        for record in chunk:
            names.update(dict.fromkeys(record.fields))
        used = [name for name in names if name in named or name.strip().lower() in known]
        fields = {name: _field_column(name, chunk, start, problems[name]) for name in used}
        parts.append(pa.table({**fields, "": pa.array([record.row for record in chunk], pa.int64())}))
        start += len(chunk)
    if not parts and account.dropped > before:
        return pa.table({name: pa.array([], pa.string()) for name in ("image", "title")})
    if not parts:
        raise UserError(message_if_empty)
    picked = detect_columns(list(names), columns, label + kind)
    table = rename_to_roles(pa.concat_tables(parts, promote_options="default"), {**picked, ROW: ""})
    bad = {place: problem for name in picked.values() for place, problem in problems[name].items()}
    return without(table, bad, table[ROW].to_numpy(), label, account)


def _field_column(name: str, chunk: Sequence[Record], start: int, problems: dict[int, BadSample]) -> pa.Array:
    import pyarrow as pa

    try:  # nearly always text and nulls
        return pa.array([record.fields.get(name) for record in chunk], pa.string())
    except (pa.ArrowException, UnicodeEncodeError):
        pass
    values: list[bytes | None] = []
    for place, record in enumerate(chunk, start):
        try:
            values.append(_field(record.where, name, record.fields.get(name)))
        except BadSample as problem:
            values.append(None)
            problems[place] = problem
    return pa.array(values, pa.string())


def _field(where: str, name: str, value: Any) -> bytes | None:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            shown = value[:80].encode("utf-8", "backslashreplace").decode()
            raise BadSample("not-utf8", f"{where}: {name!r} is not valid Unicode (UTF-8): {shown}") from None
    if isinstance(value, (dict, list)):
        raise BadSample("not-text", f"{where}: {name!r} is a {type(value).__name__}; it must be text")
    return None if value is None else json.dumps(value).encode()


def explode(table: pa.Table) -> pa.Table:
    """A table with one row for each title, where its titles are lists; the numbers of the rows in the file stay."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = table["title"].type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return table
    if ROW not in table.column_names:
        table = table.append_column(ROW, pa.array(np.arange(len(table))))
    title = table["title"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(title), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(table)), np.maximum(lengths, 1))
    places = np.full(len(rows), -1)
    places[(lengths > 0)[rows]] = np.arange(lengths.sum())
    flat = pc.list_flatten(title).take(pa.array(places, mask=places < 0))
    table = table.take(pa.array(rows))
    return table.set_column(table.column_names.index("title"), "title", flat)
