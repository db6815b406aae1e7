"""Embeddings of a dataset as files: .npy for faiss and clip-retrieval, Parquet for databases and data frames.

    OUT/images/img_emb/img_emb_0000.npy          unit vectors [n, E] of distinct images
    OUT/images/metadata/metadata_0000.parquet    row i belongs to vector i: number, place, digest, path, title, vector
    OUT/titles/text_emb/, OUT/titles/metadata/   the same of distinct titles
    OUT/rows/rows_0000.parquet                   every usable row: the numbers of its image, title and negatives
    OUT/embeddings.json                          model, dataset, counts, and whether all is written

images/ and titles/ are folders as `clip-retrieval inference` writes them. Files are written a part at a time and get
their name when they are whole, so that a killed run goes on with the first part that is missing. Parts that are there
are read again by their checksums, those of Parquet's pages and that of the vectors in the metadata's header, and a
damaged one is written again.
Dimension key: n inputs of a part, E embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from data.batch import UserError
from data.embedding_tables import Columns, DistinctInputs, EmbeddingTables
from data.files import kind_of, replaced_file, sha256, write_mark
from data.locks import lock_folder
from data.progress import Progress
from data.reading import open_regular
from engine.run_folder.folder import read_json, write_json
from engine.run_folder.ownership import refuse_out

KIND = "embeddings"  # of the folder's mark
LAYOUT = 1  # part of every identity: files of another layout are not gone on with
PART = 65_536  # rows of a file: 200 MB of 768 numbers in fp32
CHUNK = 2048  # rows in memory at one time, and in a row group of Parquet; larger ones are no faster
SUMMARY = "embeddings.json"
DTYPES: dict[str, np.dtype] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
FLAGS = ("split", "dtype", "vectors")  # names in the summary whose change a message names
VECTORS_SHA256 = b"vectors_sha256"  # in the header of a part's metadata
INPUTS = {"image": ("images", "img_emb"), "title": ("titles", "text_emb")}  # kind -> folder, name of the vectors

Project = Callable[[Tensor], Tensor]  # stored features [n, V or T] -> unit vectors [n, E], fp32


class Table(Protocol):
    """Anything with columns that are made a slice at a time."""

    def __len__(self) -> int: ...

    def columns(self, start: int, stop: int) -> Columns:
        """Return the rows from `start` to `stop`."""


@dataclass(frozen=True)
class EmbeddingWriter:
    """Writes tables into `folder`; `vectors` says where embeddings go: npy, parquet or both."""

    folder: Path
    dtype: np.dtype
    vectors: str
    log: Callable[[str], None]  # of progress
    say: Callable[[str], None]  # of what was damaged

    def write(self, tables: EmbeddingTables, image: Project, title: Project) -> int:
        """Write every part that is missing or damaged; return how many were whole. Raises UserError, OSError."""
        kept = self._write_inputs(tables.images, image) + self._write_inputs(tables.titles, title)
        for number, start, stop in _parts(tables.rows):
            path = self.folder / "rows" / f"rows_{number}.parquet"
            if self._is_whole(path, stop - start):
                kept += 1
                continue
            with _new_file(path) as temporary:
                _write_parquet(temporary, (tables.rows.columns(low, high) for low, high in _chunks(start, stop)))
        return kept

    def _write_inputs(self, inputs: DistinctInputs, project: Project) -> int:
        folder, name = INPUTS[inputs.kind]
        progress = Progress(f"{inputs.kind} embeddings", len(inputs), self.log)
        kept = 0
        for number, start, stop in _parts(inputs):
            vectors = self.folder / folder / name / f"{name}_{number}.npy"
            metadata = self.folder / folder / "metadata" / f"metadata_{number}.parquet"
            if self._is_whole(metadata, stop - start, None if self.vectors == "parquet" else vectors):
                kept += 1
            else:
                self._write_part(inputs, (start, stop), project, vectors, metadata)
            progress(stop - start)
        return kept

    def _write_part(self, inputs: DistinctInputs, bounds: tuple[int, int], project: Project, vectors: Path,
                    metadata: Path) -> None:
        """Write the vectors of one part, and what belongs to them; the part counts as written with the latter."""
        with ExitStack() as files:
            temporary = files.enter_context(_new_file(metadata))
            npy = None
            if self.vectors != "parquet":
                npy = NpyFile(files.enter_context(_new_file(vectors)), bounds[1] - bounds[0], self.dtype)
                files.callback(npy.close)
            chunks = self._chunks_with_vectors(inputs, bounds, project, npy)
            _write_parquet(temporary, chunks, lambda: {} if npy is None else {VECTORS_SHA256: npy.sha256()})

    def _is_whole(self, path: Path, rows: int, vectors: Path | None = None) -> bool:
        """Return whether a part, with its `vectors`, is there as it was written; what is damaged is said."""
        if not os.path.lexists(path):
            return False
        try:
            header = _read_whole(path, rows)
            if vectors is not None and sha256(vectors).encode() != header.get(VECTORS_SHA256):
                raise OSError(f"{vectors} is not what was written")
        except FileNotFoundError:
            return False
        except OSError as error:  # pyarrow's errors are of this class, or of ValueError
            self.say(f"{path} or its vectors are damaged ({error}); they are written again")
        except ValueError as error:
            self.say(f"{path} is damaged ({error}); it is written again")
        else:
            return True
        return False

    def _chunks_with_vectors(self, inputs: DistinctInputs, bounds: tuple[int, int], project: Project,
                             npy: NpyFile | None) -> Iterator[Columns]:
        """Yield the columns of a part chunk by chunk, after their vectors have gone to the npy file."""
        import pyarrow as pa

        for low, high in _chunks(*bounds):
            vector_nE = project(inputs.features.store.gather(inputs.features.rows[low:high])).cpu()
            if not bool(vector_nE.isfinite().all()):
                raise UserError("the model's embeddings hold NaN or infinity; use another --model")
            rounded_nE = vector_nE.numpy().astype(self.dtype)
            if npy is not None:
                npy.append(rounded_nE)
            columns = inputs.columns(low, high)
            if self.vectors != "npy":
                columns["embedding"] = pa.FixedSizeListArray.from_arrays(
                    pa.array(rounded_nE.reshape(-1)), rounded_nE.shape[1])
            yield columns


class NpyFile:
    """A .npy file of `count` rows that is written a few rows at a time; numpy's own writer takes whole arrays."""

    def __init__(self, path: Path, count: int, dtype: np.dtype) -> None:
        self._path, self._file, self._count, self._dtype = path, path.open("wb"), count, dtype
        self._begun = False

    def append(self, rows: np.ndarray) -> None:
        """Write rows [n, E] behind those before."""
        if not self._begun:
            header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
                      "shape": (self._count, rows.shape[1])}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._begun = True
        self._file.write(np.ascontiguousarray(rows).data)

    def sha256(self) -> bytes:
        """Return the digest of the file as it is now."""
        self._file.flush()
        return sha256(self._path).encode()

    def close(self) -> None:
        """Write what is buffered. Raises OSError."""
        self._file.close()


def check_folder(out: str, dataset: str) -> Path:
    """Return the folder --out, before any work. Raises UserError where it holds anything but embeddings of ours."""
    folder = Path(out).expanduser()
    if kind_of(folder) == KIND:
        return folder
    refuse_out(folder, (), dataset)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--out {out} is there and holds no embeddings of thumbtune's; choose a new folder")
    return folder


def begin_folder(folder: Path, summary: dict[str, Any]) -> None:
    """Make, mark and lock the folder, and delete what a kill left half written, or all parts without their summary.

    Raises UserError where it holds embeddings of something else, or where another process is writing them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_mark(folder, KIND)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    if not lock_folder(folder):
        raise UserError(f"--out {folder}: another process is writing there; wait for it or choose another folder")
    before = read_json(folder / SUMMARY)
    for name in FLAGS if before else ():
        if before.get(name) != summary[name]:
            raise UserError(f"--out {folder} was written with --{name} {before.get(name)}, not {summary[name]}; choose "
                            "a new folder")
    if before and before.get("identity") != summary["identity"]:
        raise UserError(f"--out {folder} holds embeddings of {before.get('dataset')} by {before.get('model')}, and the "
                        "model or the data are others now; choose a new folder")
    # Without the summary nothing says whose embeddings the parts hold: they are written again.
    for part in folder.glob("*/**/.*_*.*" if before else "*/**/*_*.*"):
        if part.suffix in (".npy", ".parquet"):
            part.unlink()
    write_json(folder / SUMMARY, summary)


def _parts(table: Table) -> Iterator[tuple[str, int, int]]:
    """Yield number, first row and last row (exclusive) of each part; numbers have equal length, to sort as text."""
    digits = max(4, len(str(len(table) // PART)))
    for number, start in enumerate(range(0, len(table), PART)):
        yield f"{number:0{digits}}", start, min(start + PART, len(table))


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, CHUNK):
        yield low, min(low + CHUNK, stop)


def _new_file(path: Path) -> AbstractContextManager[Path]:
    """Return `replaced_file` of a path whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return replaced_file(path)


def _write_parquet(path: Path, chunks: Iterable[Columns], header: Callable[[], dict[bytes, bytes]] = dict) -> None:
    """Write chunks of columns as row groups; vectors, which do not compress, are stored plainly.

    `header` is asked for texts of the file's header when all chunks are written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for columns in chunks:
            table = pa.table(columns)
            if writer is None:
                packed = [name for name in columns if name != "embedding"]
                writer = parquet.ParquetWriter(path, table.schema, use_dictionary=packed, write_page_checksum=True,
                                               compression={name: "zstd" for name in packed})
            writer.write_table(table)
        if writer is not None:
            writer.add_key_value_metadata(header())
    finally:
        if writer is not None:
            writer.close()


def _read_whole(path: Path, rows: int) -> dict[bytes, bytes]:
    """Read every byte of a Parquet file, a row group at a time; return the texts of its header.

    Raises OSError, or ValueError where it is damaged or has another number of rows.
    """
    from pyarrow import parquet

    with open_regular(path) as file, parquet.ParquetFile(file, page_checksum_verification=True) as table:
        if table.metadata.num_rows != rows:
            raise ValueError(f"{table.metadata.num_rows:,} rows, not {rows:,}")
        for group in range(table.num_row_groups):
            table.read_row_group(group)
        return dict(table.metadata.metadata or {})
