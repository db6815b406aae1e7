"""One file, or one folder of images -> a table of the columns in use, under the names of their roles.

Titles are read as they are written; no types are guessed. A row that cannot be used is left out and reported to the
`Account` with its number (from 0, in its file).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from data.batch import UserError
from data.ledger import Account
from data.reading import open_regular
from data.shards.index import read_index
from data.shards.manifests import read_manifest
from data.shards.samples import class_names_beside, spell_class
from data.sources.arrow_tables import read_arrow, read_parquet
from data.sources.columns import detect_columns
from data.sources.csv_tables import read_csv
from data.sources.embedded import EmbeddedPictures
from data.sources.json_tables import read_json, read_json_lines
from data.sources.lists import joined
from data.sources.options import ReadOptions
from data.sources.paths import PICTURES
from data.sources.pictures import SIDECARS, holds_pictures, holds_titled_pictures, is_picture, pictures
from data.sources.records import from_records
from data.sources.rows import LABEL, holds_bytes, rename_to_roles
from data.web.storage import RemoteFile, public_name

if TYPE_CHECKING:
    import pyarrow as pa


class HasName(Protocol):
    """A file or folder on this machine or in a store."""

    @property
    def name(self) -> str:
        """The last part of its path or address."""


File = TypeVar("File", bound=HasName)
WEB_ADDRESS = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
TEXT_READERS: dict[str, Callable[[Path, ReadOptions, Account], pa.Table]] = {  # also with .gz after the ending
    ".csv": partial(read_csv, delimiter=","), ".tsv": partial(read_csv, delimiter="\t"), ".jsonl": read_json_lines,
    ".ndjson": read_json_lines, ".json": read_json}
ARROW_READERS: dict[str, Callable[[Path, ReadOptions, Account, EmbeddedPictures], pa.Table]] = {
    ".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
TEXT_TABLES = frozenset(TEXT_READERS)
TABLES = TEXT_TABLES | ARROW_READERS.keys()
ADVICE = {  # ending of another kind of file -> how to convert it
    ".xlsx": "; write a CSV: pandas.read_excel(FILE).to_csv(NEW, index=False)",
    ".xls": "; write a CSV: pandas.read_excel(FILE).to_csv(NEW, index=False)",
    ".pkl": "; a pickle runs code when it is read: write Parquet where you trust it, DataFrame.to_parquet(NEW)",
    ".pickle": "; a pickle runs code when it is read: write Parquet where you trust it, DataFrame.to_parquet(NEW)",
    **dict.fromkeys((".zip", ".rar", ".7z", ".tgz"), "; unpack it and pass the folder"),
    **dict.fromkeys((".bz2", ".xz", ".zst", ".gz"), "; unpack it (a .csv, .tsv or .json may be packed as .gz)"),
    ".mdb": "; write shards: webdataset.ShardWriter",
    ".tfrecord": "; write shards: webdataset.ShardWriter", ".db": "; write Parquet: pandas.read_sql(…).to_parquet(NEW)",
    ".sqlite": "; write Parquet: pandas.read_sql(…).to_parquet(NEW)"}
MARKUP = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml|error)", re.IGNORECASE)
POINTER = b"version https://git-lfs.github.com/spec/"
NO_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")  # of the `datasets` library


def ending(path: str | Path) -> str:
    """Return the ending that decides how a file is read, in lower case: `.csv` also for x.csv.gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    if suffixes[-1:] == [".gz"] and len(suffixes) == 2 and suffixes[0] in TEXT_TABLES:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def without_sidecars(files: Sequence[File]) -> list[File]:
    """Return the files of one folder without JSON files that are no tables: those of images, or about the dataset."""
    names = [Path(file.name) for file in files]
    images = {name.stem for name in names if is_picture(name.name)}
    has_sidecars = any(name.stem in images for name in names if name.suffix.lower() in SIDECARS)
    return [file for file, name in zip(files, names, strict=True) if name.suffix.lower() != ".json"
            or not (has_sidecars or name.name in NO_ROWS or name.name.endswith(("_stats.json", ".index.json")))]


def read_table(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Read a file by its ending, or the images of a folder. Raises UserError."""
    if path.is_dir():
        message_if_empty = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ "
                            f"valid/ test/, nor images ({' '.join(sorted(PICTURES))})")
        try:
            return from_records(pictures(path, account), options.columns, str(path), message_if_empty, account,
                                " (images; a title is in KEY.txt or KEY.json beside KEY.jpg)")
        except UserError:
            if options.columns.title or not holds_pictures(path) or holds_titled_pictures(path):
                raise
            raise UserError(f"{path}: its images have no titles; write the title of each into KEY.txt beside it, or "
                            "give each class a folder of its own, with no image outside of these") from None
    kind = ending(path)
    if kind not in TABLES | {".tar", ".txt"}:
        known = " ".join((*TEXT_READERS, *ARROW_READERS))
        advice = ADVICE.get(kind, "")
        raise UserError(f"{path}: not a known kind of dataset; known are {known} .tar and folders{advice}")
    with open_regular(path) as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(f"{path}: a pointer of Git LFS, not the file; run `git lfs pull` in its folder")
    if kind == ".tar":
        return _shard(path, options, account)
    if kind in ARROW_READERS:
        return ARROW_READERS[kind](path, options, account, embedded)
    return TEXT_READERS[".csv" if kind == ".txt" else kind](path, options, account)


def read_remote(file: RemoteFile, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Read the copy of a table, or the manifest of a shard. Raises UserError."""
    if ending(file.name) != ".tar":
        return _read_copy(file, options, account, embedded)
    manifest = read_manifest(file.path)
    if manifest is None:
        raise UserError(f"{file.address}: its manifest {file.path} is gone or damaged; run again")
    for entry in manifest.problems:
        account.drop_sample(entry)
    rows = _index_as_rows(manifest.table, file.address, options, account)
    return _with_labels(rows, manifest.classes)


def _read_copy(file: RemoteFile, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Read the copy of a table; errors name its address. Raises UserError."""
    address = public_name(file.address)
    with open_regular(file.path) as copy:
        if MARKUP.match(copy.read(64)):
            raise UserError(f"{address}: a page or other markup, not a table; see in a browser what is there")
    try:
        return read_table(file.path, options, account, embedded)
    except UserError as error:
        raise UserError(str(error).replace(str(file.path), address)) from error


def _shard(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    table = _index_as_rows(read_index(path, account.drop_sample), str(path.absolute()), options, account)
    return _with_labels(table, class_names_beside(path))


def _with_labels(table: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return the rows of a shard with LABEL, where classes have names: the lone title that is one of them, or null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not classes:
        return table
    title, is_lone = pc.list_element(table["title"], 0), pc.equal(pc.list_value_length(table["title"]), 1)
    is_class = pc.and_(pc.is_in(title, pa.array(map(spell_class, classes), pa.large_string())), is_lone)
    return table.append_column(LABEL, pc.if_else(is_class, title, pa.scalar(None, pa.large_string())))


def _index_as_rows(index: pa.Table, shard: str, options: ReadOptions, account: Account) -> pa.Table:
    import pyarrow as pa

    image = joined(f"{shard}#", index["image_offset"], "+", index["image_size"])
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    return rename_to_roles(table, detect_columns(table.column_names, options.columns, shard, account))


def holds_addresses(path: Path, options: ReadOptions) -> bool:
    """Return whether the first row of a table names its image by URL; False if it cannot be read."""
    account = Account()
    try:
        image = read_table(path, options, account, EmbeddedPictures())["image"]
    except (UserError, OSError):
        return False
    return len(image) > 0 and not holds_bytes(image.type) and WEB_ADDRESS.match(str(image[0].as_py())) is not None


def read_metadata(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """Read a metadata file of images, which are named in its column file_name."""
    if options.columns.image is None:
        options = replace(options, columns=replace(options.columns, image="file_name"))
    return read_table(path, options, account, embedded)
