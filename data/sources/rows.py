"""One split as columns: checking their values, taking and fingerprinting rows.

A dataset is not trusted: unless the user named a table on this machine, a row may name a file below the dataset's own
folder, a URL or a member of a shard, and nothing else (see paths.py). A row that cannot be used is left out and
reported to the `Account`. Nothing here opens an image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.columns import CLASS_COLUMNS, FLAGS
from data.sources.embedded import EmbeddedPictures, shown_name
from data.sources.lists import decoded, explode, flatten, holds_text, is_list, join_columns, without_blanks
from data.sources.paths import ENDINGS, ImageLocation, absolute_paths

if TYPE_CHECKING:
    import pyarrow as pa

ROW = "row"  # a column beside those of the roles: the row's number in its file, where some are left out already
LABEL = "label"  # a column beside those of the roles: the name of the row's class, where titles are made of it
SHOWN = 20  # titles that are looked at for names of pictures
PICTURE = re.compile(rf"\S+({ENDINGS})", re.IGNORECASE)
EXTRA_COLUMNS = ("split", LABEL)  # columns that readers may give beside image, title and title_neg
PIECE = 1 << 16  # image paths that are worked on at one time


@dataclass(frozen=True)
class Rows:
    """One split, columnar. The image "" is no image, the title "" no title.

    All text has 64-bit offsets: what is joined or taken from many chunks may be more than the 2 GiB of 32-bit ones.
    """

    name: str
    image: pa.ChunkedArray  # large_string, no nulls: an absolute path, http(s) URL, or FILE#OFFSET+SIZE
    title: pa.ChunkedArray  # large_string, no nulls
    title_neg: pa.ChunkedArray | None  # list<large_string>, [] or null for none; None without such a column
    label: pa.ChunkedArray | None = None  # large_string: the class that a title names, null for none; None: no classes

    def __len__(self) -> int:
        return len(self.title)

    def take(self, indices: np.ndarray) -> Rows:
        """Return the rows at `indices` in that order, copied."""
        negative = None if self.title_neg is None else _take(self.title_neg, indices)
        label = None if self.label is None else _take(self.label, indices)
        return Rows(self.name, _take(self.image, indices), _take(self.title, indices), negative, label)

    def fingerprint(self) -> str:
        """Return a digest of all values in order, however chunked; no file is opened."""
        columns = self.image, self.title, self.title_neg
        digests = b"".join(b"none" if column is None else digest_column(column) for column in columns)
        return hashlib.blake2b(digests, digest_size=16).hexdigest()


def rename_to_roles(table: pa.Table, picked: Mapping[str, Sequence[str]]) -> pa.Table:
    """Select the picked columns, each under the name of its role; several of one role become one column of lists.

    Titles that are class names have LABEL beside them.
    """
    import pyarrow as pa

    columns = {}
    for role, names in picked.items():
        several = [_without_empty_cells(table[name]) for name in names] if len(names) > 1 else []
        columns[role] = join_columns(several) if several else table[names[0]]
    if {name.strip().lower() for name in picked["title"]} <= {*CLASS_COLUMNS}:
        is_plain = not is_list(columns["title"].type)
        columns[LABEL] = columns["title"] if is_plain else pa.array([""] * len(table), pa.large_string())
    return pa.table(columns)


def _without_empty_cells(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts with null for those that are blank: a row need not have a value in each column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    return pc.if_else(pa.chunked_array([pa.array(holds_text(column))]), column, pa.scalar(None, column.type))


def to_row_columns(table: pa.Table, source: str, location: ImageLocation, account: Account,
                   embedded: EmbeddedPictures) -> pa.Table:
    """Return the columns of `rename_to_roles` as `Rows` has them, with ROW and EXTRA_COLUMNS; images lie at `location`.

    Each title of a list makes a row with the image and the negatives; blank ones are dropped rows.
    Blanks around paths and addresses are removed. A row whose text is not UTF-8 or whose image leaves the folders is
    dropped. Raises UserError for a column of a type that its role cannot have.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    problems: dict[int, BadSample] = {}  # by place in the table
    blanks: dict[str, np.ndarray] = {}  # by role, the places of blank values in lists
    pictures, paths, start = [], [], 0
    for chunk in _pieces(table["image"]):
        data, path = _bytes_and_path(chunk, source, start, problems)
        path = pc.utf8_trim_whitespace(path)
        is_none = pc.or_(pc.is_valid(data), pc.equal(path, ""))
        paths.append(pc.if_else(is_none, pa.scalar(None, path.type), path))
        pictures.append(embedded.references(data, source))
        start += len(chunk)
    named = pa.chunked_array(_merged(paths), pa.large_string())
    paths_N = absolute_paths(named, location, source, account, problems).chunks
    images = []
    for picture, path in zip(_merged(pictures), paths_N, strict=True):
        # A coalesce would copy every path, fill_null copies none where each row has one.
        has_pictures = picture.null_count < len(picture)
        images.append(pc.coalesce(picture, path, "") if has_pictures else pc.fill_null(path, ""))
    columns = {"image": pa.chunked_array(images, pa.large_string())}
    for role in ("title", "title_neg"):
        if role not in table.column_names:
            continue
        values, row_F = flatten(table[role])
        if pa.types.is_primitive(values.type) or pa.types.is_decimal(values.type):
            account.note(f"{source}: the {role} column holds {values.type}; its values are used as text")
        bad: dict[int, BadSample] = {}  # by place among the values
        texts = _texts(values, source, role, bad)
        problems |= {int(row_F[place]): problem for place, problem in bad.items()}
        is_plain = role == "title" and not is_list(table[role].type)
        if picture := _picture_name(texts):
            account.note(f"{source}: the {role} column holds names of pictures, such as {picture[:100]!r}; "
                         f"{FLAGS[role]} names another column")
        columns[role] = pc.fill_null(texts, "") if is_plain else without_blanks(texts, row_F, len(table))
        if not is_plain:
            blanks[role] = row_F[pc.is_valid(texts).to_numpy() & ~holds_text(texts)]
    columns |= {name: table[name] for name in EXTRA_COLUMNS if name in table.column_names}
    numbers = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
    columns[ROW] = pa.array(numbers)
    for role, row_B in blanks.items():
        _account_for_blanks(role, row_B[~np.isin(row_B, [*problems])], pa.table(columns), source, account)
    rows = drop_rows(pa.table(columns), problems, numbers, source, account)
    return explode(rows, "title") if is_list(rows["title"].type) else rows


def _account_for_blanks(role: str, row_B: np.ndarray, table: pa.Table, source: str, account: Account) -> None:
    """Report the blank values of lists, given by their rows in the table of Rows: each blank title is a dropped row.

    Where all of a list are blank, one of them is left, as a row without a title.
    """
    if not len(row_B):
        return
    if role != "title":
        account.note(f"{source}: {len(row_B):,} blank negatives are not used")
        return
    left_N = np.diff(table["title"].combine_chunks().offsets.to_numpy())
    rows, counts = np.unique(row_B, return_counts=True)
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        dropped = count - int(left_N[row] == 0)
        if dropped:
            image, number = shown_name(table["image"][row].as_py()) or None, table[ROW][row].as_py()
            problem = BadSample("no-title", f"{dropped} of {count + int(left_N[row])} captions are blank")
            account.drop(source, number, problem, image, rows=dropped)


def _pieces(column: pa.ChunkedArray) -> list[pa.Array]:
    """Return the chunks of a column, those of text cut to PIECE rows: copies made of a piece are small and soon freed.
    """
    if holds_bytes(column.type):  # a chunk of pictures in memory is copied to a file of its own
        return column.chunks
    pieces: list[pa.Array] = []
    for chunk in column.chunks:
        pieces += [chunk.slice(start, PIECE) for start in range(0, len(chunk), PIECE)]
    return pieces


def _merged(chunks: Sequence[pa.Array]) -> list[pa.Array]:
    """Return chunks with neighbours joined up to PIECE rows: tables of pictures come in thousands of small chunks."""
    import pyarrow as pa

    groups: list[list[pa.Array]] = []
    rows = PIECE + 1  # no group yet
    for chunk in chunks:
        if rows + len(chunk) > PIECE:
            groups.append([])
            rows = 0
        groups[-1].append(chunk)
        rows += len(chunk)
    return [pa.concat_arrays(group) if len(group) > 1 else group[0] for group in groups]


def _picture_name(texts: pa.ChunkedArray) -> str:
    """Return the first text where all of the first ones are names of pictures, else ""."""
    shown = [text for text in texts.slice(0, SHOWN).to_pylist() if text]
    return shown[0] if shown and all(PICTURE.fullmatch(text) for text in shown) else ""


def drop_rows(table: pa.Table, problems: Mapping[int, BadSample], numbers: np.ndarray, source: str,
            account: Account) -> pa.Table:
    """Return the table without the rows at `problems`; they are reported by their `numbers` in the file `source`."""
    import pyarrow as pa

    if not problems:
        return table
    for place in sorted(problems):
        image, title = table["image"][place].as_py(), table["title"][place].as_py()
        title = next(iter(title), None) if isinstance(title, list) else title
        image = image.get("path") if isinstance(image, dict) else image
        image = shown_name(image) or None if isinstance(image, str) else None
        account.drop(source, int(numbers[place]), problems[place], image, title if isinstance(title, str) else None)
    keep = np.ones(len(table), bool)
    keep[[*problems]] = False
    return table.filter(pa.array(keep))


def _bytes_and_path(chunk: pa.Array, source: str, start: int,
                    problems: dict[int, BadSample]) -> tuple[pa.Array, pa.Array]:
    """Return images of any type as bytes and as paths, null where an image has none of these."""
    import pyarrow as pa

    kind = chunk.type
    data, path = pa.nulls(len(chunk), pa.large_binary()), pa.nulls(len(chunk), pa.large_string())
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
    """Return whether values of this type are embedded pictures: bytes, or Hugging Face's Image."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
            or pa.types.is_fixed_size_binary(kind))


def _unfit(source: str, role: str, kind: pa.DataType) -> UserError:
    wanted = "bytes, a path or a URL" if role == "image" else "one text"
    if role == "image" and is_list(kind):
        return UserError(f"{source}: the image column holds {kind}; a row has one image: write a row for each")
    return UserError(f"{source}: the {role} column holds {kind}; it must hold {wanted} a row")


def _texts(column: pa.ChunkedArray, source: str, role: str, problems: dict[int, BadSample]) -> pa.ChunkedArray:
    import pyarrow as pa

    chunks, start = [], 0
    for chunk in _pieces(column):
        chunks.append(_text_chunk(chunk, source, role, start, problems))
        start += len(chunk)
    return pa.chunked_array(chunks, pa.large_string())


def _text_chunk(chunk: pa.Array, source: str, role: str, start: int, problems: dict[int, BadSample]) -> pa.Array:
    """Return the values as text; one that is not UTF-8 becomes null and a problem of its row."""
    import pyarrow as pa

    chunk = decoded(chunk)
    try:
        cast = chunk.cast(pa.large_string())
        cast.validate(full=True)  # a cast from bytes checks UTF-8, one from text of a file does not
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
    return pa.array(texts, pa.large_string())


def join_tables(name: str, tables: Sequence[pa.Table], source: str, account: Account) -> Rows:
    """Return the tables of `to_row_columns` as one split. Raises UserError if they hold no row that can be used."""
    import pyarrow as pa

    table = pa.concat_tables(tables, promote_options="default")
    if not table.num_rows and account.dropped:
        raise UserError(f"{source}: no row can be used ({account.dropped:,} dropped); {account.example}")
    if not table.num_rows:
        raise UserError(f"{source}: holds no rows; fill it or remove it")
    negative, classes = (table[role] if role in table.column_names else None for role in ("title_neg", LABEL))
    return Rows(name, table["image"], table["title"], negative, classes)


def _take(column: pa.ChunkedArray, indices: np.ndarray) -> pa.ChunkedArray:
    """Return `column.take(indices)`, chunk by chunk: Arrow would first join all chunks, with all their images."""
    import pyarrow as pa

    starts = np.cumsum([0, *map(len, column.chunks)])
    chunk_of = np.searchsorted(starts, indices, side="right") - 1
    order = np.argsort(chunk_of, kind="stable")
    used, firsts = np.unique(chunk_of[order], return_index=True)
    parts = [column.chunk(chunk).take(pa.array(indices[rows] - starts[chunk]))
             for chunk, rows in zip(used, np.split(order, firsts)[1:], strict=True)]
    taken = pa.chunked_array(parts, column.type)
    # Ascending rows, as those of a split, come out in order; others are put back into theirs.
    return taken if (np.diff(order) > 0).all() else taken.take(pa.array(np.argsort(order)))


def digest_column(column: pa.ChunkedArray) -> bytes:
    """Return a digest of a column's values: their lengths (-1 for null), then their bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if is_list(column.type):
        values, row_F = flatten(column)
        return np.bincount(row_F, minlength=len(column)).tobytes() + digest_column(values)
    lengths, content = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for chunk in column.chunks:
        chunk = chunk.cast(pa.large_binary())
        lengths.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy())
        chunk = pc.fill_null(chunk, b"")
        _, ends, data = chunk.buffers()
        first, last = np.frombuffer(ends, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
        content.update(memoryview(data or b"")[first:last])
    return lengths.digest() + content.digest()
