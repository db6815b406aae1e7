"""The distinct images and titles of a dataset's usable rows, their features in the store, and which row has which.

Only numbers and keys are held for all of them: features are gathered, and texts made, a slice at a time.
Dimension key: N distinct images or titles of a table, M image references, D distinct images by content, P titles,
R usable rows of all splits, H negatives of a row, K bytes of a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.catalogue import Catalogue, Split, build_catalogue, keep_usable_rows
from data.cold import Pipeline
from data.pairs import add_missing_images, add_missing_titles, stored_table
from data.sources.embedded import shown_name
from data.sources.source import Rows
from data.store.feature_split import StoredTable
from data.store.features import CHUNK
from data.text import hide_secrets, unsigned

if TYPE_CHECKING:
    import pyarrow as pa

Columns = dict[str, "pa.Array"]


@dataclass(frozen=True)
class UsableRows:
    """R usable rows, one split after the other, with the numbers of their images and titles in the two tables."""

    names: Sequence[str]  # of the splits
    split_R: np.ndarray  # index into `names`
    row_R: np.ndarray  # number of the row in its split
    image_R: np.ndarray
    title_R: np.ndarray
    negative_RH: np.ndarray  # -1 where a row has fewer than H

    def __len__(self) -> int:
        return len(self.row_R)

    def places(self, rows: np.ndarray) -> Columns:
        """Return the columns split and row of these rows."""
        import pyarrow as pa

        index = pa.array(self.split_R[rows], pa.int32())
        names = pa.DictionaryArray.from_arrays(index, pa.array(self.names, pa.string())).dictionary_decode()
        return {"split": names, "row": pa.array(self.row_R[rows], pa.int64())}

    def columns(self, start: int, stop: int) -> Columns:
        """Return the rows from `start` to `stop`: place, image, title and hard negatives, these three by number."""
        import pyarrow as pa

        part = slice(start, stop)
        negative_RH = self.negative_RH[part]
        is_there_RH = negative_RH >= 0
        ends = np.append(0, is_there_RH.sum(1).cumsum())
        numbers = pa.array(negative_RH[is_there_RH], pa.int64())
        negatives = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), numbers)
        return {**self.places(np.arange(len(self))[part]), "image": pa.array(self.image_R[part], pa.int64()),
                "title": pa.array(self.title_R[part], pa.int64()), "negatives": negatives}


@dataclass(frozen=True)
class DistinctInputs:
    """N distinct images, or titles, in the order of the first usable row that has each."""

    kind: str  # image | title
    features: StoredTable
    key_NK: np.ndarray
    first_N: np.ndarray  # number of that row among all usable rows
    caption_N: np.ndarray  # index into the catalogue's titles: the title itself, or that of the image's first row
    reference_N: np.ndarray | None  # of images: index into the catalogue's references
    negatives_from: int  # titles from this number on are hard negatives and no row's own title
    rows: UsableRows
    catalogue: Catalogue

    def __len__(self) -> int:
        return len(self.first_N)

    def columns(self, start: int, stop: int) -> Columns:
        """Return the columns of the inputs from `start` to `stop`: number, place of the first row, digest, names."""
        import pyarrow as pa

        number = np.arange(len(self))[start:stop]
        columns = {self.kind: pa.array(number, pa.int64()), **self.rows.places(self.first_N[number]),
                   "digest": pa.array([key.tobytes().hex() for key in self.key_NK[number]], pa.string())}
        if self.reference_N is None:
            columns["negative_only"] = pa.array(number >= self.negatives_from)
        else:
            references = self.catalogue.references.take(pa.array(self.reference_N[number])).to_pylist()
            columns["image_path"] = pa.array([_public_name(name) for name in references], pa.string())
        columns["caption"] = self.catalogue.titles.take(pa.array(self.caption_N[number]))
        return columns


def _public_name(reference: str | None) -> str | None:
    """Return an image's name for a file that others get; the same whatever its address is signed with."""
    return hide_secrets(unsigned(shown_name(reference))) or None


@dataclass(frozen=True)
class EmbeddingTables:
    """A dataset as two tables of distinct inputs and the rows that index them."""

    images: DistinctInputs
    titles: DistinctInputs
    rows: UsableRows
    ledger: Sequence[Mapping[str, Any]]

    def digest(self) -> str:
        """Return the SHA-256 of everything in the tables but the features."""
        rows, digest = self.rows, hashlib.sha256()
        for numbers in (rows.split_R, rows.row_R, rows.image_R, rows.title_R, rows.negative_RH,
                        self.images.key_NK, self.titles.key_NK):
            digest.update(repr(numbers.shape).encode() + np.ascontiguousarray(numbers).data)
        for table in (self.images, self.titles):
            for start in range(0, len(table), CHUNK):
                columns = table.columns(start, start + CHUNK)
                names = [columns[name].to_pylist() for name in ("split", "image_path", "caption") if name in columns]
                digest.update(repr(names).encode())
        return digest.hexdigest()


def open_tables(rows: Mapping[str, Rows], unread: Sequence[Mapping[str, Any]], pipeline: Pipeline,
                max_bad: float) -> EmbeddingTables:
    """Read every image and title, encode those whose features are not stored, and number those of usable rows.

    `unread` are ledger entries of what never became a row. All ranks share the reading and the encoding. Raises
    UserError when more than `max_bad` of all rows are unusable or a split ends up empty.
    """
    cache, encoders = pipeline.cache, pipeline.encoders
    catalogue = build_catalogue(rows, encoders.title_ids(cache))
    images = encoders.image_store(cache)
    results = add_missing_images(catalogue, images, pipeline)
    splits, key_DK, example_D, ledger = keep_usable_rows(catalogue, results, unread, max_bad)
    titles = add_missing_titles(catalogue, pipeline)

    usable, image_N, title_N, own_titles = _number(splits)
    first_image_N = np.unique(usable.image_R, return_index=True)[1]
    first_own_title_N = np.unique(usable.title_R, return_index=True)[1]
    first_title_N = np.append(first_own_title_N, _first_rows_with(usable.negative_RH, len(title_N))[own_titles:])
    all_title_R = np.concatenate([split.title_N.numpy() for split in splits.values()])
    return EmbeddingTables(
        DistinctInputs("image", stored_table(images, key_DK[image_N]), key_DK[image_N], first_image_N,
                       all_title_R[first_image_N], example_D[image_N], 0, usable, catalogue),
        DistinctInputs("title", stored_table(titles, catalogue.title_keys[title_N]), catalogue.title_keys[title_N],
                       first_title_N, title_N, None, own_titles, usable, catalogue),
        usable, ledger)


def _number(splits: Mapping[str, Split]) -> tuple[UsableRows, np.ndarray, np.ndarray, int]:
    """Number the images and titles of all splits by their first row; titles that are negatives alone come last.

    Returns the rows, the images' numbers among the D, the titles' among the P, and how many are a row's own title.
    """
    image_R = np.concatenate([split.image_N.numpy() for split in splits.values()])
    title_R = np.concatenate([split.title_N.numpy() for split in splits.values()])
    widths = [split.negative_N.shape[1] for split in splits.values() if split.negative_N is not None]
    most = max(widths, default=0)
    parts = []
    for split in splits.values():
        padded_NH = np.full((len(split), most), -1, np.int64)
        if split.negative_N is not None:
            padded_NH[:, :split.negative_N.shape[1]] = split.negative_N.numpy()
        parts.append(padded_NH)
    negative_RH = np.concatenate(parts)

    image_N, own_N = _by_appearance(image_R), _by_appearance(title_R)
    negative_N = _by_appearance(negative_RH[negative_RH >= 0])
    title_N = np.append(own_N, negative_N[~np.isin(negative_N, own_N)])
    place_P = np.full(title_N.max() + 2, -1, np.int64)  # the last place is that of -1, no negative
    place_P[title_N] = np.arange(len(title_N))
    place_D = np.full(image_N.max() + 1, -1, np.int64)
    place_D[image_N] = np.arange(len(image_N))
    usable = UsableRows(
        list(splits), np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()]),
        np.concatenate([split.row_N for split in splits.values()]), place_D[image_R], place_P[title_R],
        place_P[negative_RH])
    return usable, image_N, title_N, len(own_N)


def _by_appearance(values: np.ndarray) -> np.ndarray:
    """Return the distinct values in the order in which they first appear."""
    distinct, first = np.unique(values, return_index=True)
    return distinct[np.argsort(first)]


def _first_rows_with(number_RH: np.ndarray, count: int) -> np.ndarray:
    """Return for each number below `count` the first row that holds it, -1 where none does."""
    first_N = np.full(count, -1, np.int64)
    distinct, place = np.unique(number_RH, return_index=True)
    width = max(1, number_RH.shape[1])
    first_N[distinct[distinct >= 0]] = place[distinct >= 0] // width
    return first_N
