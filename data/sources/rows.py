"""One split as columns: finding the columns by role, checking their values, taking and fingerprinting rows.

What a dataset says is not trusted: unless the user named a table on this machine, a row may name a file below the
dataset's own folder, a URL or a member of a shard, and nothing else here (see paths.py). A row that cannot be used is
left out and reported to the `Account`. Nothing here opens an image.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.embedded import EmbeddedPictures, shown_name
from data.sources.lists import explode, flatten, is_list, join_columns, without_blanks
from data.sources.paths import ImageLocation, absolute_paths

if TYPE_CHECKING:
    import pyarrow as pa

CLASS_COLUMNS = ("label", "labels", "class", "class_name", "category")  # titles where nothing else is one
KNOWN = {  # role -> column names that mean it; the first there is wins
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "path", "img", "image_name", "filepath", "anchor", "positive"),
    "title": ("title", "text", "caption", "txt", "captions", "sentences", "sentences_raw", "raw", "comment", "positive",
              "anchor", *CLASS_COLUMNS),
    "title_neg": ("title_neg", "negative", "negatives", "neg", "neg_title", "negative_title", "neg_text",
                  "neg_caption"),
    "split": ("split",),
}
OPTIONAL = ("title_neg", "split")  # roles that a dataset may lack
NUMBERED = re.compile(r"(.*?)[_ .-]?(\d{1,3})")  # caption_0, caption1, caption 2: a family of columns
ROW = "row"  # a column beside those of the roles: the row's number in its file, where some are left out already
LABEL = "label"  # another one: the name of the row's class, where titles are made of it
EXTRA_COLUMNS = ("split", LABEL)  # columns that readers may give beside image, title and title_neg
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column",
         "split": "--split-column"}


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None and () mean: detect. Each of several titles makes a row."""

    image: str | None = None
    title: tuple[str, ...] = ()
    title_neg: tuple[str, ...] = ()
    split: str | None = None

    def names(self, role: str) -> tuple[str, ...]:
        """Return the names given for a role."""
        if role in ("image", "split"):
            name = self.image if role == "image" else self.split
            return (name,) if name else ()
        return self.title if role == "title" else self.title_neg


@dataclass(frozen=True)
class Rows:
    """One split, columnar. The image "" is no image, the title "" no title."""

    name: str
    image: pa.ChunkedArray  # string, no nulls: an absolute path, http(s) URL, or FILE#OFFSET+SIZE
    title: pa.ChunkedArray  # string, no nulls
    title_neg: pa.ChunkedArray | None  # list<string>, [] or null for none; None without such a column
    label: pa.ChunkedArray | None = None  # string: the class that the title names, null for none; None without classes

    def __len__(self) -> int:
        return len(self.title)

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at `indices` in that order, copied."""
        negative = None if self.title_neg is None else _take(self.title_neg, indices)
        label = None if self.label is None else _take(self.label, indices)
        return Rows(self.name, _take(self.image, indices), _take(self.title, indices), negative, label)

    def fingerprint(self) -> str:
        """A digest of all values in order, however chunked: one pass over the columns, no file is opened."""
        columns = self.image, self.title, self.title_neg
        digests = b"".join(b"none" if column is None else _digest(column) for column in columns)
        return hashlib.blake2b(digests, digest_size=16).hexdigest()


def detect_columns(names: list[str], columns: Columns, source: str, account: Account,
                   with_bytes: Collection[str] = ()) -> dict[str, list[str]]:
    """Role -> the columns that play it: the user's, else the first known name with its numbered family (caption_0, …).

    Of the known image columns those that hold pictures (`with_bytes`) come first; no picture is a title. A choice is
    noted. Raises UserError naming the columns.
    """
    existing = f"there are {', '.join(_shown(names)) or 'none'}"
    picked: dict[str, list[str]] = {}
    choices = []
    for role, known in KNOWN.items():
        given = columns.names(role)
        for name in set(given) - set(names):
            close = difflib.get_close_matches(name, names, 1)
            raise UserError(f"{source}: no column {name!r} for {FLAGS[role]}; {existing}"
                            + (f"; did you mean {close[0]!r}?" if close else ""))
        families = [] if given else _families(role, names, with_bytes, [*columns.names("image"), *picked.get("image", ())])
        if given or families:
            picked[role] = [*given] or families[0]
        elif role not in OPTIONAL:
            raise UserError(f"{source}: no {role} column ({', '.join(known)}); {existing}; name one with {FLAGS[role]}")
        if len(families) > 1 or families and len(families[0]) > 1:
            unused = [name for family in families[1:] for name in family]
            choices.append(f"{role} = {', '.join(_shown(picked[role]))}"
                           + (f" (not used: {', '.join(_shown(unused))})" if unused else ""))
    if choices:
        account.note(f"columns: {'; '.join(choices)}")
    for column in [name for role in picked for name in picked[role]]:
        if names.count(column) > 1:
            raise UserError(f"{source}: the column {column[:100]!r} is there {names.count(column)} times; rename all "
                            "but one")
    return picked


def _families(role: str, names: Sequence[str], with_bytes: Collection[str], images: Collection[str]) -> list[list[str]]:
    """The columns that may play a role, best first: each known name with those that are it and a number."""
    numbered: dict[str, dict[int, str]] = {base: {} for base in KNOWN[role]}
    for name in reversed(names):
        spelled = name.strip().lower()
        match = NUMBERED.fullmatch(spelled)
        if role != "image" and (name in images or name in with_bytes):
            continue
        if spelled in numbered:
            numbered[spelled][-1] = name
        elif match and match[1] in numbered and role not in ("image", "split"):
            numbered[match[1]][int(match[2])] = name
    families = [[family[number] for number in sorted(family)] for family in numbered.values() if family]
    if role == "image":
        families = [[name] for (name,) in families if name in with_bytes or name.strip().lower() != "positive"]
        families.sort(key=lambda family: family[0] not in with_bytes)  # stable
    return families


def _shown(names: Sequence[str]) -> list[str]:
    return [" ".join(name[:100].split()) for name in names[:20]]


def is_known(name: str) -> bool:
    """True for a column that `detect_columns` may pick."""
    spelled = name.strip().lower()
    match = NUMBERED.fullmatch(spelled)
    bases = {spelled, match[1]} if match else {spelled}
    return any(not bases.isdisjoint(known) for known in KNOWN.values())


def rename_to_roles(table: pa.Table, picked: Mapping[str, Sequence[str]]) -> pa.Table:
    """Select the picked columns, each under the name of its role; several of one role become one column of lists.

    Titles that are class names have LABEL beside them.
    """
    import pyarrow as pa

    columns = {}
    for role, names in picked.items():
        columns[role] = table[names[0]] if len(names) == 1 else join_columns([table[name] for name in names])
    if {name.strip().lower() for name in picked["title"]} <= {*CLASS_COLUMNS}:
        is_plain = not is_list(columns["title"].type)
        columns[LABEL] = columns["title"] if is_plain else pa.array([""] * len(table), pa.string())
    return pa.table(columns)


def to_row_columns(table: pa.Table, source: str, location: ImageLocation, account: Account,
                   embedded: EmbeddedPictures) -> pa.Table:
    """The columns of `rename_to_roles` as `Rows` has them, with ROW and those of EXTRA_COLUMNS; images lie in `places`.

    A list of titles makes a row of each, with the image and the negatives; blank ones go where another one stays.
    Blanks around paths and addresses go. A row whose text is not UTF-8 or whose image leaves the folders is dropped.
    Raises UserError on a column that cannot play its role.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    problems: dict[int, BadSample] = {}  # by place in the table
    pictures, paths, start = [], [], 0
    for chunk in table["image"].chunks:
        data, path = _bytes_and_path(chunk, source, start, problems)
        path = pc.utf8_trim_whitespace(path)
        paths.append(pc.if_else(pc.or_(pc.is_valid(data), pc.equal(path, "")), pa.scalar(None, pa.string()), path))
        pictures.append(embedded.references(data, label))
        start += len(chunk)
    paths_N = absolute_paths(pa.chunked_array(paths, pa.string()), location, source, account, problems).chunks
    images = [pc.coalesce(picture, path, "") for picture, path in zip(pictures, paths_N, strict=True)]
    columns = {"image": pa.chunked_array(images, pa.string())}
    for role in [role for role in ("title", "title_neg") if role in table.column_names]:
        values, row_F = flatten(table[role])
        if not _is_text(values.type):
            account.note(f"{source}: the {role} column holds {values.type}; its values are used as text")
        bad: dict[int, BadSample] = {}  # by place among the values
        texts = _texts(values, source, role, bad)
        problems |= {int(row_F[place]): problem for place, problem in bad.items()}
        is_plain = role == "title" and not is_list(table[role].type)
        columns[role] = pc.fill_null(texts, "") if is_plain else without_blanks(texts, row_F, len(table))
    columns |= {name: table[name] for name in EXTRA_COLUMNS if name in table.column_names}
    numbers = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
    columns[ROW] = pa.array(numbers)
    rows = drop_rows(pa.table(columns), problems, numbers, source, account)
    return explode(rows, "title") if is_list(rows["title"].type) else rows


def drop_rows(table: pa.Table, problems: Mapping[int, BadSample], numbers: np.ndarray, source: str,
            account: Account) -> pa.Table:
    """The table without the rows at `problems`, which are dropped by their `numbers` in the file `source`."""
    import pyarrow as pa

    if not problems:
        return table
    for place in sorted(problems):
        image, title = table["image"][place].as_py(), table["title"][place].as_py()
        title = next(iter(title), None) if isinstance(title, list) else title
        image = image.get("path") if isinstance(image, dict) else image
        account.drop(source, int(numbers[place]), problems[place],
                     shown_name(image) or None if isinstance(image, str) else None,
                     title if isinstance(title, str) else None)
    keep = np.ones(len(table), bool)
    keep[[*problems]] = False
    return table.filter(pa.array(keep))


def _bytes_and_path(chunk: pa.Array, source: str, start: int,
                    problems: dict[int, BadSample]) -> tuple[pa.Array, pa.Array]:
    """Images of any kind as bytes and string, null where an image is not of that kind."""
    import pyarrow as pa

    kind = chunk.type
    data, path = pa.nulls(len(chunk), pa.large_binary()), pa.nulls(len(chunk), pa.string())
    if pa.types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:  # Hugging Face's Image
        fields = dict(zip((field.name for field in kind), chunk.flatten(), strict=True))
        data, path = fields.get("bytes", data), fields.get("path", path)
    elif holds_bytes(kind):
        data = chunk
    else:
        path = chunk
    if not holds_bytes(data.type) and not pa.types.is_null(data.type):
        raise _unfit(source, "image", data.type)
    return data, _text_chunk(path, source, "image", start, problems)


def holds_bytes(kind: pa.DataType) -> bool:
    """True for the type of embedded pictures: bytes or Hugging Face's Image."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
            or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean,
               pa.types.is_temporal)
    return not any(is_kind(kind) for is_kind in numbers)


def _unfit(source: str, role: str, kind: pa.DataType) -> UserError:
    wanted = "bytes, a path or a URL" if role == "image" else "one text"
    return UserError(f"{source}: the {role} column holds {kind}; it must hold {wanted} a row")


def _texts(column: pa.ChunkedArray, source: str, role: str, problems: dict[int, BadSample]) -> pa.ChunkedArray:
    import pyarrow as pa

    chunks, start = [], 0
    for chunk in column.chunks:
        chunks.append(_text_chunk(chunk, source, role, start, problems))
        start += len(chunk)
    return pa.chunked_array(chunks, pa.string())


def _text_chunk(chunk: pa.Array, source: str, role: str, start: int, problems: dict[int, BadSample]) -> pa.Array:
    """The values as text; one that is not UTF-8 becomes null and a problem of its row."""
    import pyarrow as pa

    try:
        cast = chunk.cast(pa.string())
        cast.validate(full=True)
        return cast
    except pa.ArrowNotImplementedError:
        raise _unfit(source, role, chunk.type) from None
    except pa.ArrowInvalid:
        pass
    try:
        raw = chunk.cast(pa.large_binary())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise _unfit(source, role, chunk.type) from None
    texts: list[str | None] = []
    for row, value in enumerate(raw, start):
        data = value.as_py()
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError:
            texts.append(None)
            problems[row] = BadSample("not-utf8", f"the {role} is not UTF-8 text: {data[:80]!r}")
    return pa.array(texts, pa.string())


def join_tables(name: str, tables: Sequence[pa.Table], source: str, account: Account) -> Rows:
    """The tables of `to_row_columns` one after the other. Raises UserError if they hold no row that can be used."""
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    if not table.num_rows and account.dropped:
        raise UserError(f"{source}: no row can be used ({account.dropped:,} dropped); {account.example}")
    if not table.num_rows:
        raise UserError(f"{source}: holds no rows; fill it or remove it")
    negative, classes = (table[role] if role in table.column_names else None for role in ("title_neg", LABEL))
    return Rows(name, table["image"], table["title"], negative, classes)


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

    if is_list(column.type):
        values, row_F = flatten(column)
        return np.bincount(row_F, minlength=len(column)).tobytes() + _digest(values)
    lengths, content = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for chunk in column.chunks:
        chunk = chunk.cast(pa.large_binary())
        lengths.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy())
        chunk = pc.fill_null(chunk, b"")
        _, ends, data = chunk.buffers()
        first, last = np.frombuffer(ends, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        content.update(memoryview(data or b"")[first:last])
    return lengths.digest() + content.digest()
