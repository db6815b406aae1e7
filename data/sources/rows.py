"""One split as columns: finding the columns by role, checking their values, taking and fingerprinting rows.

What a dataset says is not trusted: a row may name a file below the dataset's own folder, a URL or a member of a shard,
and nothing else on this machine. A row that cannot be used is left out and reported to the `Account`. Nothing here
opens an image.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.store.segments import key_of
from data.web.storage import PACKAGES, scheme_of

if TYPE_CHECKING:
    import pyarrow as pa

KNOWN = {  # role -> column names that mean it; the first there is wins
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "path", "img"),
    "title": ("title", "text", "caption", "txt"),
    "title_neg": ("title_neg", "negative", "neg_title", "negative_title", "neg_text", "neg_caption"),
}
ADDRESS = f"^(https?|{'|'.join(PACKAGES)})://"  # images at such an address are read
ROW = "row"  # a column beside those of the roles: the row's number in its file, where some are left out already
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column"}


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None: detect."""

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


def detect_columns(names: list[str], columns: Columns, label: str, embedded: Collection[str] = ()) -> dict[str, str]:
    """Role -> the column that plays it: the user's, else the first known name. Raises UserError naming the columns.

    Of the known image columns those that hold pictures (`embedded`) come before those that hold paths or addresses.
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
        usual.sort(key=lambda name: role != "image" or name not in embedded)  # stable
        column = named or next(iter(usual), None)
        if column is not None:
            picked[role] = column
        elif role != "title_neg":
            raise UserError(f"{label}: no {role} column ({', '.join(known)}); {existing}; name one with {FLAGS[role]}")
    for column in picked.values():
        if names.count(column) > 1:
            raise UserError(f"{label}: the column {column[:100]!r} is there {names.count(column)} times; rename all "
                            "but one")
    return picked


def rename_to_roles(table: pa.Table, picked: Mapping[str, str]) -> pa.Table:
    """Select the picked columns, each under the name of its role."""
    return table.select([*picked.values()]).rename_columns([*picked])


def to_row_columns(table: pa.Table, label: str, folders: Sequence[str], account: Account,
                   relative: bool = True) -> pa.Table:
    """The columns of `rename_to_roles` as `Rows` has them; files only from `folders`, paths relative to the first.

    Blanks around paths and addresses go. A row whose text is not UTF-8 or whose image leaves the folders is dropped.
    Raises UserError on a column that cannot play its role.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    problems: dict[int, BadSample] = {}  # by place in the table
    images, start = [], 0
    for chunk in table["image"].chunks:
        data, path = _bytes_and_path(chunk, label, start, problems)
        path = pc.utf8_trim_whitespace(path)
        path = pc.if_else(pc.or_(pc.is_valid(data), pc.equal(path, "")), pa.scalar(None, pa.string()), path)
        path = _inside(_with_scheme(path, label, account), start, folders, relative, problems)
        images.append(pa.StructArray.from_arrays([data, path], fields=[*kind]))
        start += len(chunk)
    title = _texts(table["title"], label, "title", problems)
    columns = {"image": pa.chunked_array(images, kind), "title": pc.fill_null(title, "")}
    if not _is_text(table["title"].type):
        account.note(f"{label}: the title column holds {table['title'].type}; its values are used as text")
    if "title_neg" in table.column_names:
        negative = _texts(table["title_neg"], label, "title_neg", problems)
        columns["title_neg"] = pc.if_else(pc.equal(negative, ""), pa.scalar(None, pa.string()), negative)
    numbers = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
    return without(pa.table(columns), problems, numbers, label, account)


def without(table: pa.Table, problems: Mapping[int, BadSample], numbers: np.ndarray, label: str,
            account: Account) -> pa.Table:
    """The table without the rows at `problems`, which are dropped by their `numbers` in the file `label`."""
    import pyarrow as pa

    if not problems:
        return table
    for place in sorted(problems):
        image, title = table["image"][place].as_py(), table["title"][place].as_py()
        account.drop(label, int(numbers[place]), problems[place], image["path"] if isinstance(image, dict) else None,
                     title if isinstance(title, str) else None)
    keep = np.ones(len(table), bool)
    keep[[*problems]] = False
    return table.filter(pa.array(keep))


def _bytes_and_path(chunk: pa.Array, label: str, start: int,
                    problems: dict[int, BadSample]) -> tuple[pa.Array, pa.Array]:
    """Images of any kind as large_binary and string, null where an image is not of that kind."""
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
    try:
        data = data.cast(pa.large_binary())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise _unfit(label, "image", data.type) from None
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


def _with_scheme(path: pa.Array, label: str, account: Account) -> pa.Array:
    """Add https: to addresses without a scheme (//host/x.jpg)."""
    import pyarrow.compute as pc

    bare = pc.fill_null(pc.starts_with(path, "//"), False)
    if pc.any(bare).as_py():
        account.note(f"{label}: image addresses that begin with // are read as https://")
        path = pc.if_else(bare, pc.binary_join_element_wise("https:", path, ""), path)
    return path


def _inside(path: pa.Array, start: int, folders: Sequence[str], relative: bool,
            problems: dict[int, BadSample]) -> pa.Array:
    """URLs as they are, other paths absolute. One that leaves `folders` is a problem of its row; `..` by spelling."""
    import pyarrow.compute as pc

    if scheme_of(folders[0]):
        return _inside_store(path, start, folders[0], problems)
    url = pc.match_substring_regex(path, ADDRESS if relative else "^https?://", ignore_case=True)
    absolute = pc.starts_with(path, "/")
    roots = tuple(folder.rstrip("/") + "/" for folder in folders)
    suspect = pc.match_substring_regex(path, r"(^|/)\.\.(/|$)")
    if relative:
        suspect = pc.or_(suspect, pc.and_not(absolute, pc.starts_with(path, roots[0])))
        full = pc.if_else(pc.or_(url, absolute), path, pc.binary_join_element_wise(roots[0], path, ""))
    else:
        suspect, full = pc.or_(suspect, True), path
    suspect = pc.fill_null(pc.and_not(suspect, url), False)
    fix = ("move the images there" if relative else
           "if it is a path in the repository, download that and pass its folder")
    for row in np.flatnonzero(suspect.to_numpy(zero_copy_only=False)):
        if not os.path.normpath(full[row].as_py()).startswith(roots):
            image = path[row].as_py()[:200]
            problems[start + int(row)] = BadSample(
                "outside-folder", f"the image {image!r} is no URL and no file below {folders[0]}; {fix}")
    return full


def _inside_store(path: pa.Array, start: int, folder: str, problems: dict[int, BadSample]) -> pa.Array:
    """Addresses as they are, other paths as addresses below `folder`; what names a local file is a problem."""
    import pyarrow.compute as pc

    is_address = pc.fill_null(pc.match_substring_regex(path, ADDRESS, ignore_case=True), False)
    full = pc.if_else(is_address, path, pc.binary_join_element_wise(f"{folder}/", path, ""))
    suspect = pc.fill_null(pc.match_substring_regex(path, r"^/|://|(^|/)\.\.(/|$)"), False)
    for row in np.flatnonzero(pc.and_not(suspect, is_address).to_numpy(zero_copy_only=False)):
        problems[start + int(row)] = BadSample(
            "outside-folder", f"the image {path[row].as_py()[:200]!r} is neither below {folder} nor an address that is "
                              "read; a table of a store names no files of this machine")
    return full


def join_tables(name: str, tables: Sequence[pa.Table], label: str, account: Account) -> Rows:
    """The tables of `to_row_columns` one after the other. Raises UserError if they hold no row that can be used."""
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    if not table.num_rows and account.dropped:
        raise UserError(f"{label}: no row can be used ({account.dropped:,} dropped); {account.example}")
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
