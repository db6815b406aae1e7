"""A dataset as a gallery to search in: its distinct images or its distinct titles, with features from the store.

One process. Images whose features are stored are not decoded, and a gallery of titles opens no image.
Dimension key: M distinct image references, N distinct items of the gallery, Q queries, V/T image/text feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, UserError
from data.catalogue import build_catalogue
from data.cold import Encoders, encode_missing_images, encode_missing_titles, encode_titles
from data.identity import distinct, keys_of_tokens
from data.images.album import small_jpeg
from data.images.decode import decode_image, tokenize
from data.images.reader import Reader, is_url
from data.reading import read_text
from data.sources.embedded import shown_name
from data.sources.source import Rows
from data.store.feature_split import StoredTable
from data.store.features import FeatureStore
from data.store.stat_cache import StatCache
from data.titles import TokenLists, is_blank

MAX_QUERIES = 1 << 26  # bytes of a file of titles to search for
SIDE = 320  # pixels of the longer side of a preview


class Item(NamedTuple):
    """An item as its first row has it. `image` is a path or URL, "" where the row holds the picture itself or none."""

    split: str
    row: int
    image: str
    title: str
    reference: str  # the image, for `Reader.read`


@dataclass(frozen=True)
class Gallery:
    """N distinct items; equal content counts once, at the first row that holds it."""

    splits: Mapping[str, Rows]
    features: StoredTable
    row_N: np.ndarray  # number of that row, counted over all splits

    def __len__(self) -> int:
        return len(self.row_N)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Return the features of the items from `start` to `stop`."""
        return self.features.store.gather(self.features.rows[start:stop])

    def item(self, index: int) -> Item:
        """Return item `index` as the dataset has it."""
        row = int(self.row_N[index])
        for split, rows in self.splits.items():
            if row < len(rows):
                reference = rows.image[row].as_py()
                return Item(split, row, shown_name(reference), rows.title[row].as_py(), reference)
            row -= len(rows)
        raise IndexError(index)


def open_images(splits: Mapping[str, Rows], reader: Reader, encoders: Encoders, cache: Path,
                log: Callable[[str], None]) -> Gallery:
    """Return all usable images, titled or not; the number of others is logged. Raises UserError when there is none.

    Only files that are new or have changed since they were last read are read.
    """
    catalogue = build_catalogue(splits, encoders.title_ids(cache))
    store = encoders.image_store(cache)
    stats = StatCache(cache / "seen", catalogue.references, reader.folder)
    keys = stats.keys.copy()
    good = stats.known & (store.locate(stats.keys) >= 0)
    unread = np.flatnonzero(~good)
    if len(unread):
        results = encode_missing_images(catalogue, reader, unread.tolist(), store, encoders.image, log)
        references, new_keys = results.good()
        keys[references], good[references] = new_keys, True
        problems = [*results.problems.values()]
        if len(references):
            stats.remember(keys, good)
        if problems:
            log(f"{len(problems):,} of {len(keys):,} images cannot be used, such as {problems[0]}")
    if not good.any():
        raise UserError("the dataset has no image that can be searched; `run.py check` says what is wrong with it")
    first = _first_rows(catalogue.image_N, len(keys))
    usable = np.flatnonzero(good)[np.argsort(first[good])]
    shown = usable[distinct(keys[usable])[1]]
    return _gallery(splits, store, keys[shown], first[shown])


def open_titles(splits: Mapping[str, Rows], encoders: Encoders, cache: Path) -> Gallery:
    """Return all titles that are not blank. Raises UserError when there is none."""
    catalogue = build_catalogue(splits, encoders.title_ids(cache))
    first = _first_rows(catalogue.title_N, len(catalogue.titles))
    shown = np.flatnonzero((first >= 0) & ~is_blank(catalogue.titles))
    if not len(shown):
        raise UserError("the dataset has no title that can be searched; name the column with --title-column")
    keys = catalogue.title_keys[shown]
    store = encoders.title_store(cache)
    missing = np.flatnonzero(store.locate(keys) < 0)

    def tokens(part: slice) -> list[list[int]]:
        return encoders.tokenize(catalogue.titles.take(shown[missing[part]]))

    encode_missing_titles(tokens, keys[missing], store, encoders.pad_id, encoders.text)
    return _gallery(splits, store, keys, first[shown])


def _first_rows(index_N: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Return for each of `count` inputs its first row, counted over all splits; -1 where only a negative holds it."""
    first = np.full(count, -1, np.int64)
    inputs, rows = np.unique(np.concatenate([*index_N.values()]), return_index=True)
    first[inputs] = rows
    return first


def _gallery(splits: Mapping[str, Rows], store: FeatureStore, keys: np.ndarray, first: np.ndarray) -> Gallery:
    # In the order of rows: which of two items with equal scores comes first does not depend on the store.
    order = np.argsort(first)
    return Gallery(splits, StoredTable(store, store.locate(keys[order])), first[order])


def title_features(titles: Sequence[str], encoders: Encoders, cache: Path) -> Tensor:
    """Return text features [Q, T] of queries, stored ones where there are; others are encoded, and not stored."""
    ids = tokenize(encoders.tokenizer, titles, encoders.max_tokens)
    store = encoders.title_store(cache)
    rows = store.locate(keys_of_tokens(TokenLists.of(iter(ids))))
    known = np.flatnonzero(rows >= 0)
    new = np.flatnonzero(rows < 0)
    features_QT = torch.empty(len(ids), encoders.text_width)
    features_QT[known] = store.gather(rows[known])
    new_ids = [ids[place] for place in new]
    features_QT[new] = encode_titles(new_ids, encoders.pad_id, encoders.text, encoders.text_width)
    return features_QT


def image_features(image: str, reader: Reader, encoders: Encoders) -> Tensor:
    """Return image features [1, V] of a file or, through the fetcher and its guard, of a URL. Raises UserError."""
    try:
        pixels = decode_image(read_image(image, reader), reader.spec, reader.max_pixels)
    except BadSample as problem:
        raise UserError(f"--image {image} cannot be used: {problem}") from None
    return encoders.image(torch.from_numpy(pixels)[None]).cpu()


def read_image(image: str, reader: Reader) -> bytes:
    """Return the bytes of a file or URL. Raises BadSample."""
    if is_url(image):
        (fetched,) = reader.fetch([image])
        if fetched.reason is not None:
            raise BadSample(fetched.reason, fetched.detail)
    return reader.read(image)


def read_queries(given: Sequence[str], file: str, image: str) -> list[str]:
    """Return the queries: `given` titles, then those in `file`, one a line. UserError: none, or an image as well."""
    titles = list(given)
    if file:
        try:
            titles += read_text(Path(file).expanduser(), MAX_QUERIES).splitlines()
        except (OSError, ValueError) as error:  # a NUL in the name, or no UTF-8
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UserError(f"--queries {file}: {reason}; give a text file with one title a line") from None
    titles = [title.strip() for title in titles if title.strip()]
    if image and titles:
        raise UserError("search for titles or for --image, not both at once")
    if not image and not titles:
        raise UserError('search for what? `run.py search "a title"`, --queries FILE or --image FILE')
    return titles


def select_splits(splits: dict[str, Rows], wanted: str, dataset: str) -> dict[str, Rows]:
    """Return the split `wanted`, or `all` of them. Raises UserError when there is none of that name."""
    if wanted != "all" and wanted not in splits:
        raise UserError(f"--dataset {dataset} has no split {wanted!r}; it has {', '.join(splits)} (all: every one)")
    return splits if wanted == "all" else {wanted: splits[wanted]}


def preview_pictures(splits: Mapping[str, Rows], places: Iterable[tuple[str, int]], image: str,
                     reader: Reader) -> dict[tuple[str, int] | str, bytes]:
    """Return small JPEGs of rows (split, number) and of the query `image`, if any; unreadable ones are left out."""
    references: dict[tuple[str, int] | str, str] = {
        (split, row): splits[split].image[row].as_py() for split, row in places}
    if image:
        references[image] = image
    previews = {}
    for name, reference in references.items():
        with suppress(BadSample):
            previews[name] = small_jpeg(reader.read(reference), SIDE, reader.max_pixels)
    return previews
