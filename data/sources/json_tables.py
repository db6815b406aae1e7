"""JSON lines, and JSON files that are one value: an array of objects, or an object that holds one.

Numbers stay as they are written, as in all text tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batch import BadSample, UserError
from data.files import open_unpacked
from data.ledger import Account
from data.sources.options import ReadOptions
from data.sources.pictures import is_picture
from data.sources.records import AS_WRITTEN, Record, from_records, parse_json_object
from data.sources.split_names import SPLIT_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

SHAPES = ('an array [{"image": …, "title": …}, …], an object with such an array under "data", columns {"image": […], '
          '"title": […]}, or {"a.jpg": "title", …}')


def read_json_lines(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    """Read one object a line. Raises UserError."""
    def records() -> Iterator[Record]:
        row = 0
        with open_unpacked(path) as file:
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


def read_json(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    """Read a file called .json: one of SHAPES, or JSON lines, as `Dataset.to_json` writes them. Raises UserError."""
    if _is_lines(path):
        return read_json_lines(path, options, account)
    value = load_json(path)

    def records() -> Iterator[Record]:
        for row, item in enumerate(_items(value, path, account)):
            if isinstance(item, dict):
                yield Record(row, f"item {row}", item)
            else:
                account.drop(str(path), row, BadSample("bad-json", f"item {row} is a {type(item).__name__}, no object"))

    return from_records(records(), options.columns, str(path), f"{path} holds no rows", account)


def load_json(path: Path) -> Any:
    """Return the value of a JSON file, numbers as text. Raises UserError."""
    with open_unpacked(path) as file:
        content = file.read()
    try:
        return AS_WRITTEN.decode(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({str(error)[:200]})") from None


def _is_lines(path: Path) -> bool:
    """Return whether the first line that is not blank is a whole object."""
    with open_unpacked(path) as file:
        first = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    try:
        fields = parse_json_object(first, "line 1")
    except BadSample:
        return False
    return more or not any(isinstance(value, (dict, list)) for value in fields.values())


def _items(value: Any, path: Path, account: Account) -> Sequence[Any]:
    """Return the objects of a JSON value in one of SHAPES. Raises UserError."""
    if isinstance(value, list):
        return value
    lists = {name: field for name, field in value.items() if _holds_objects(field)} if isinstance(value, dict) else {}
    if len(lists) > 1 and len(lists) == len(value) and all(name.lower() in SPLIT_NAMES for name in lists):
        account.note(f"{path}: the rows are the objects under the names of splits")
        return [{"split": name, **row} if isinstance(row, dict) else row for name in lists for row in lists[name]]
    if len(lists) == 1 or "data" in lists:
        name = "data" if "data" in lists else next(iter(lists))
        account.note(f"{path}: the rows are the objects under {name!r}")
        return lists[name]
    if isinstance(value, dict) and value:
        if all(map(is_picture, value)) and all(isinstance(title, (str, list)) for title in value.values()):
            account.note(f"{path}: image names with their titles")
            return [{"image": image, "title": title} for image, title in value.items()]
        columns = {name: list(field.values()) if isinstance(field, dict) else field for name, field in value.items()}
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) == 1 and -1 not in lengths and _same_keys(value):
            account.note(f"{path}: an object of columns")
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    names = ", ".join(map(str, value))[:100] if isinstance(value, dict) else ""
    shown = f"an object with {names}" if names else f"a {type(value).__name__}"
    raise UserError(f"{path}: holds {shown}; what can be read is {SHAPES}, JSON lines, or COCO's and Karpathy's files")


def _holds_objects(field: Any) -> bool:
    return isinstance(field, list) and bool(field) and isinstance(field[0], dict)


def _same_keys(columns: Mapping[str, Any]) -> bool:
    """Return whether all columns that are objects (as pandas writes them) have the same row names."""
    return len({tuple(column) for column in columns.values() if isinstance(column, dict)}) <= 1
