"""One split as columns: which column plays which role, what may stand in it, taking and fingerprinting rows.

What a dataset says is not trusted: a row may name a file below the dataset's own folder, a URL or a member of a shard,
and nothing else on this machine. Nothing here opens an image.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.batch import UserError
from data.store.segments import key_of

if TYPE_CHECKING:
    import pyarrow as pa

KNOWN = {  # role -> column names that mean it; the first there is wins
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "path", "img"),
    "title": ("title", "text", "caption", "txt"),
    "title_neg": ("title_neg", "negative", "neg_title", "negative_title", "neg_text", "neg_caption"),
}
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column"}


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


def pick(names: list[str], columns: Columns, label: str) -> dict[str, str]:
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


def in_roles(table: pa.Table, picked: Mapping[str, str]) -> pa.Table:
    """The columns picked, each under the name of its role."""
    return table.select([*picked.values()]).rename_columns([*picked])


def clean(table: pa.Table, label: str, folders: Sequence[str], relative: bool = True) -> pa.Table:
    """The columns of `in_roles` as `Rows` has them; files only from `folders`, the first being what paths start from.

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
    columns = {"image": pa.chunked_array(images, kind), "title": pc.fill_null(title, "")}
    if "title_neg" in table.column_names:
        negative = _cast(table["title_neg"], pa.string(), label, "title_neg")
        columns["title_neg"] = pc.if_else(pc.equal(negative, ""), pa.scalar(None, pa.string()), negative)
    return pa.table(columns)


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


def join_tables(name: str, tables: Sequence[pa.Table], label: str) -> Rows:
    """The tables of `clean` one after the other. Raises UserError if they hold no row."""
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


def image_names(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings that are equal for equal image references: the path, the digest of embedded bytes, "" for none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = []
    for chunk in images.chunks:
        data, path = chunk.field("bytes"), chunk.field("path")
        if data.null_count < len(data):
            digests = [key_of(value.as_buffer()).hex() if value.is_valid else None for value in data]
            path = pc.coalesce(pa.array(digests, pa.string()), path)
        names.append(pc.fill_null(path, ""))
    return pa.chunked_array(names, pa.string())
