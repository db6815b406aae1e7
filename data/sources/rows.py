"""One split as columns: finding the columns by role, checking their values, taking and fingerprinting rows.

What a dataset says is not trusted: unless the user named a table on this machine, a row may name a file below the
dataset's own folder, a URL or a member of a shard, and nothing else here (see paths.py). A row that cannot be used is
left out and reported to the `Account`. Nothing here opens an image.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.embedded import EmbeddedPictures, shown_name
from data.sources.paths import Places, absolute_paths

if TYPE_CHECKING:
    import pyarrow as pa

CLASS_COLUMNS = ("label", "labels", "class", "class_name", "category")  # titles where nothing else is one
KNOWN = {  # role -> column names that mean it; the first there is wins
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "filepath", "path", "img", "image_name"),
    "title": ("title", "text", "caption", "txt", "comment", *CLASS_COLUMNS),
    "title_neg": ("title_neg", "negative", "neg_title", "negative_title", "neg_text", "neg_caption"),
    "split": ("split",),
}
OPTIONAL = ("title_neg", "split")  # roles that a dataset may lack
ROW = "row"  # a column beside those of the roles: the row's number in its file, where some are left out already
LABEL = "label"  # another one: the name of the row's class, where titles are made of it
BESIDE = ("split", LABEL)  # columns that readers may give beside image, title and title_neg
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column",
         "split": "--split-column"}


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None: detect."""

    image: str | None = None
    title: str | None = None
    title_neg: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Rows:
    """One split, columnar. The image "" is no image, the title "" no title."""

    name: str
    image: pa.ChunkedArray  # string, no nulls: an absolute path, http(s) URL, or FILE#OFFSET+SIZE
    title: pa.ChunkedArray  # string, no nulls
    title_neg: pa.ChunkedArray | None  # string, null where a row has no negative; None without such a column
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


def detect_columns(names: list[str], columns: Columns, label: str, with_bytes: Collection[str] = ()) -> dict[str, str]:
    """Role -> the column that plays it: the user's, else the first known name. Raises UserError naming the columns.

    Of the known image columns those that hold pictures (`with_bytes`) come before those that hold paths or addresses.
    """
    shown = [" ".join(name[:100].split()) for name in names[:20]]
    existing = f"there are {', '.join(shown) or 'none'}"
    spelled = {name.strip().lower(): name for name in reversed(names)}
    picked: dict[str, str] = {}
    for role, known in KNOWN.items():
        named: str | None = getattr(columns, role)
        if named is not None and named not in names:
            close = difflib.get_close_matches(named, names, 1)
            raise UserError(f"{label}: no column {named!r} for {FLAGS[role]}; {existing}"
                            + (f"; did you mean {close[0]!r}?" if close else ""))
        usual = [spelled[name] for name in known if name in spelled]
        usual.sort(key=lambda name: role != "image" or name not in with_bytes)  # stable
        column = named or next(iter(usual), None)
        if column is not None:
            picked[role] = column
        elif role not in OPTIONAL:
            raise UserError(f"{label}: no {role} column ({', '.join(known)}); {existing}; name one with {FLAGS[role]}")
    for column in picked.values():
        if names.count(column) > 1:
            raise UserError(f"{label}: the column {column[:100]!r} is there {names.count(column)} times; rename all "
                            "but one")
    return picked


def rename_to_roles(table: pa.Table, picked: Mapping[str, str]) -> pa.Table:
    """Select the picked columns, each under the name of its role; class names also as LABEL."""
    roles = table.select([*picked.values()]).rename_columns([*picked])
    if picked["title"].strip().lower() in CLASS_COLUMNS:
        roles = roles.append_column(LABEL, roles["title"])
    return roles


def to_row_columns(table: pa.Table, label: str, places: Places, account: Account,
                   embedded: EmbeddedPictures) -> pa.Table:
    """The columns of `rename_to_roles` as `Rows` has them, with ROW and those of BESIDE; images lie in `places`.

    Blanks around paths and addresses go. A row whose text is not UTF-8 or whose image leaves the folders is dropped.
    Raises UserError on a column that cannot play its role.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    problems: dict[int, BadSample] = {}  # by place in the table
    pictures, paths, start = [], [], 0
    for chunk in table["image"].chunks:
        data, path = _bytes_and_path(chunk, label, start, problems)
        path = pc.utf8_trim_whitespace(path)
        paths.append(pc.if_else(pc.or_(pc.is_valid(data), pc.equal(path, "")), pa.scalar(None, pa.string()), path))
        pictures.append(embedded.references(data, label))
        start += len(chunk)
    images = absolute_paths(pa.chunked_array(paths, pa.string()), places, label, account, problems).chunks
    images = [pc.coalesce(picture, path, "") for picture, path in zip(pictures, images, strict=True)]
    title = _texts(table["title"], label, "title", problems)
    columns = {"image": pa.chunked_array(images, pa.string()), "title": pc.fill_null(title, "")}
    if not _is_text(table["title"].type):
        account.note(f"{label}: the title column holds {table['title'].type}; its values are used as text")
    if "title_neg" in table.column_names:
        negative = _texts(table["title_neg"], label, "title_neg", problems)
        columns["title_neg"] = pc.if_else(pc.equal(negative, ""), pa.scalar(None, pa.string()), negative)
    columns |= {name: table[name] for name in BESIDE if name in table.column_names}
    numbers = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
    columns[ROW] = pa.array(numbers)
    return without(pa.table(columns), problems, numbers, label, account)


def without(table: pa.Table, problems: Mapping[int, BadSample], numbers: np.ndarray, label: str,
            account: Account) -> pa.Table:
    """The table without the rows at `problems`, which are dropped by their `numbers` in the file `label`."""
    import pyarrow as pa

    if not problems:
        return table
    for place in sorted(problems):
        image, title = table["image"][place].as_py(), table["title"][place].as_py()
        image = image.get("path") if isinstance(image, dict) else image
        account.drop(label, int(numbers[place]), problems[place],
                     shown_name(image) or None if isinstance(image, str) else None,
                     title if isinstance(title, str) else None)
    keep = np.ones(len(table), bool)
    keep[[*problems]] = False
    return table.filter(pa.array(keep))


def _bytes_and_path(chunk: pa.Array, label: str, start: int,
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
        raise _unfit(label, "image", data.type)
    return data, _text_chunk(path, label, "image", start, problems)


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


def _unfit(label: str, role: str, kind: pa.DataType) -> UserError:
    wanted = "bytes, a path or a URL" if role == "image" else "one text"
    return UserError(f"{label}: the {role} column holds {kind}; it must hold {wanted} a row")


def _texts(column: pa.ChunkedArray, label: str, role: str, problems: dict[int, BadSample]) -> pa.ChunkedArray:
    import pyarrow as pa

    chunks, start = [], 0
    for chunk in column.chunks:
        chunks.append(_text_chunk(chunk, label, role, start, problems))
        start += len(chunk)
    return pa.chunked_array(chunks, pa.string())


def _text_chunk(chunk: pa.Array, label: str, role: str, start: int, problems: dict[int, BadSample]) -> pa.Array:
    """The values as text; one that is not UTF-8 becomes null and a problem of its row."""
    import pyarrow as pa

    try:
        cast = chunk.cast(pa.string())
        cast.validate(full=True)
        return cast
    except pa.ArrowNotImplementedError:
        raise _unfit(label, role, chunk.type) from None
    except pa.ArrowInvalid:
        pass
    try:
        raw = chunk.cast(pa.large_binary())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise _unfit(label, role, chunk.type) from None
    texts: list[str | None] = []
    for row, value in enumerate(raw, start):
        data = value.as_py()
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError:
            texts.append(None)
            problems[row] = BadSample("not-utf8", f"the {role} is not UTF-8 text: {data[:80]!r}")
    return pa.array(texts, pa.string())


def join_tables(name: str, tables: Sequence[pa.Table], label: str, account: Account) -> Rows:
    """The tables of `to_row_columns` one after the other. Raises UserError if they hold no row that can be used."""
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    if not table.num_rows and account.dropped:
        raise UserError(f"{label}: no row can be used ({account.dropped:,} dropped); {account.example}")
    if not table.num_rows:
        raise UserError(f"{label}: holds no rows; fill it or remove it")
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

    lengths, content = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for chunk in column.chunks:
        chunk = chunk.cast(pa.large_binary())
        lengths.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy())
        chunk = pc.fill_null(chunk, b"")
        _, ends, data = chunk.buffers()
        first, last = np.frombuffer(ends, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        content.update(memoryview(data or b"")[first:last])
    return lengths.digest() + content.digest()
