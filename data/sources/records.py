"""Records (rows read one at a time) -> a table of the columns in use, under the names of their roles.

Records become Arrow columns RECORDS at a time, which bounds the memory of Python objects.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.columns import KNOWN, Columns, detect_columns, is_known
from data.sources.lists import is_list, join_columns, text_field
from data.sources.rows import ROW, drop_rows, rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa

RECORDS, RECORD_BYTES = 10_000, 1 << 26  # records that are Python objects at one time, and their size in the file
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # the title 1e5 stays 1e5


class Record(NamedTuple):
    """A row of a file that is read one row at a time."""

    row: int  # its number in the file, from 0
    where: str  # its line or item, for messages
    fields: dict[str, Any]
    size: int = 0  # bytes or characters that it takes there


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Return the object that a line or a file holds. Raises BadSample: not-utf8, bad-json."""
    try:
        line = text.decode().removeprefix("\ufeff").strip(" \t\r\n")
        record, end = AS_WRITTEN.raw_decode(line)
        if end != len(line):
            raise json.JSONDecodeError("Extra data", line, end)
    except UnicodeDecodeError:
        raise BadSample("not-utf8", f"{where} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad-json", f"{where} is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadSample("bad-json", f"{where} is not a JSON object; write {{\"image\": …, \"title\": …}}")
    return record


def from_records(records: Iterator[Record], columns: Columns, source: str, message_if_empty: str, account: Account,
                 kind: str = "") -> pa.Table:
    """Return records as a table of the fields in use and ROW; `message_if_empty` is the error if there are none.

    `source` names the file, `kind` describes it in errors. A bad field drops its row only if it is in use. A list of
    texts is several titles or negatives.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    named = {*chain.from_iterable(map(columns.names, KNOWN))}
    names: dict[str, None] = {}
    problems: dict[str, dict[int, BadSample]] = defaultdict(dict)  # by field, then by place in the table
    parts, start, before = [], 0, account.dropped
    for chunk in _chunks(records):
        for record in chunk:
            names.update(dict.fromkeys(record.fields))
        used = [name for name in names if name in named or is_known(name)]
        fields = {name: _field_column(name, chunk, start, problems[name]) for name in used}
        parts.append(pa.table({**fields, "": pa.array([record.row for record in chunk], pa.int64())}))
        start += len(chunk)
    if not parts and account.dropped > before:
        return pa.table({name: pa.array([], pa.large_string()) for name in ("image", "title")})
    if not parts:
        raise UserError(message_if_empty)
    picked = detect_columns(list(names), columns, source + kind, account)
    whole = pa.concat_tables(_with_same_lists(parts), promote_options="default")
    table = rename_to_roles(whole, {**picked, ROW: [""]})
    used = [*chain.from_iterable(picked.values())]
    bad: dict[int, BadSample] = {}
    for name in used:
        bad |= problems[name]
    if is_list(table["image"].type):
        lists = pc.indices_nonzero(table["image"].is_valid()).to_pylist()
        problem = BadSample("not-text", f"{picked['image'][0]!r} is a list; it must be text")
        bad |= dict.fromkeys(lists, problem)
    return drop_rows(table, bad, table[ROW].to_numpy(), source, account)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yield records, RECORDS of them or RECORD_BYTES at a time."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if len(chunk) == RECORDS or size > RECORD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _field_column(name: str, chunk: Sequence[Record], start: int, problems: dict[int, BadSample]) -> pa.Array:
    import pyarrow as pa

    try:  # nearly always text and nulls
        return pa.array([record.fields.get(name) for record in chunk], pa.large_string())
    except (pa.ArrowException, UnicodeEncodeError):
        pass
    values: list[list[bytes]] = []
    has_lists = False
    for place, record in enumerate(chunk, start):
        value = record.fields.get(name)
        has_lists |= isinstance(value, list)
        texts: list[bytes | None] = []
        try:
            items = [_text_of(item) for item in value] if isinstance(value, list) else [value]
            texts = [_field(record.where, name, item) for item in items]
        except BadSample as problem:
            problems[place] = problem
        values.append([text for text in texts if text is not None])
    if has_lists:
        return pa.array(values, pa.list_(pa.large_string()))
    return pa.array([texts[0] if texts else None for texts in values], pa.large_string())


def _text_of(item: Any) -> Any:
    """Return the text of an object in a list, {"raw": "…"}; everything else as it is."""
    field = text_field(item) if isinstance(item, dict) else None
    return item[field] if field else item


def _with_same_lists(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """Return the tables with lists in each column that has lists in one of them."""
    listed: set[str] = set()
    for part in parts:
        listed.update(name for name in part.column_names if is_list(part[name].type))
    converted = []
    for part in parts:
        for place, name in enumerate(part.column_names):
            if name in listed and not is_list(part[name].type):
                part = part.set_column(place, name, join_columns([part[name]]))
        converted.append(part)
    return converted


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
