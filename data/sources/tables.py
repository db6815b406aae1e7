"""One file, or one folder of images -> a table of the columns in use, under the names of their roles.

Titles are read as they are written: no reader here guesses types. A row that cannot be used is left out and reported
to the `Account` with its number (from 0, in its file).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data.batch import UserError
from data.files import open_regular
from data.ledger import Account
from data.shards.index import read_index
from data.shards.samples import class_names_beside
from data.sources.arrow_tables import read_arrow, read_parquet
from data.sources.csv_tables import read_csv
from data.sources.embedded import EmbeddedPictures
from data.sources.json_tables import read_json, read_json_lines
from data.sources.options import ReadOptions
from data.sources.pictures import PICTURES, SIDECARS, is_picture, pictures
from data.sources.records import from_records
from data.sources.rows import LABEL, detect_columns, holds_bytes, rename_to_roles

if TYPE_CHECKING:
    import pyarrow as pa

ADDRESS = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
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
POINTER = b"version https://git-lfs.github.com/spec/"
NO_ROWS = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")  # of the `datasets` library


def ending(path: str | Path) -> str:
    """The ending that tells how to read a file, in lower case: `.csv` also for x.csv.gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    if suffixes[-1:] == [".gz"] and len(suffixes) == 2 and suffixes[0] in TEXT_TABLES:
        return suffixes[0]
    return suffixes[-1] if suffixes else ""


def without_sidecars(files: Sequence[Path]) -> list[Path]:
    """Files of one folder without the JSON files that are no tables: those of images, and those about a dataset."""
    images = {file.stem for file in files if is_picture(file.name)}
    has_sidecars = any(file.stem in images for file in files if file.suffix.lower() in SIDECARS)
    return [file for file in files if file.suffix.lower() != ".json"
            or not (has_sidecars or file.name in NO_ROWS or file.name.endswith("_stats.json"))]


def read_table(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """A file by its ending, or the images of a folder. Raises UserError."""
    if path.is_dir():
        message_if_empty = (f"{path}: found neither tables ({' '.join(sorted(TABLES))}), nor shards (.tar), nor train/ "
                            f"valid/ test/, nor images ({' '.join(sorted(PICTURES))})")
        return from_records(pictures(path, account), options.columns, str(path), message_if_empty, account,
                            " (images with KEY.txt, KEY.json)")
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


def _shard(path: Path, options: ReadOptions, account: Account) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    index = read_index(path, account.drop_sample)
    at, size = (index[name].cast(pa.string()) for name in ("image_offset", "image_size"))
    image = pc.binary_join_element_wise(f"{path.absolute()}#", at, "+", size, "")
    table = pa.table({"image": image, "title": index["title"], "title_neg": index["title_neg"]})
    table = rename_to_roles(table, detect_columns(table.column_names, options.columns, str(path), account))
    if classes := class_names_beside(path):
        title = pc.list_element(table["title"], 0)
        is_class = pc.and_(pc.is_in(title, pa.array(classes)), pc.equal(pc.list_value_length(table["title"]), 1))
        label = pc.if_else(is_class, title, pa.scalar(None, pa.string()))
        table = table.append_column(LABEL, label)
    return table


def holds_addresses(path: Path, options: ReadOptions) -> bool:
    """True if the first row of a table names its image by URL; False where it cannot be read."""
    account = Account()
    try:
        image = read_table(path, options, account, EmbeddedPictures())["image"]
    except (UserError, OSError):
        return False
    return len(image) > 0 and not holds_bytes(image.type) and ADDRESS.match(str(image[0].as_py())) is not None


def read_metadata(path: Path, options: ReadOptions, account: Account, embedded: EmbeddedPictures) -> pa.Table:
    """A metadata file of images, whose column file_name names them whatever other columns there are."""
    if options.columns.image is None:
        options = replace(options, columns=replace(options.columns, image="file_name"))
    return read_table(path, options, account, embedded)
