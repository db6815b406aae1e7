"""P6 and P9: the cold pass into the feature store, and a store of a million pairs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.catalogue import Catalogue, build_catalogue
from data.cold import Reader, encode_missing_images, encode_missing_titles, encode_titles
from data.identity import clip_words
from data.images.decode import ImageSpec, decode_image, tokenize
from data.images.feed import SMALL_LOT as LOT
from data.sources.source import load_splits
from data.sources.split import ContentReader, divide_lone_split
from data.store.feature_split import StoredTable
from data.store.features import FeatureStore
from data.web.limits import FetchPolicy

from .harness import Bench, Figure, Race, timed
from .inputs import Model, vit_b32, write_pairs
from .loss import memory_of_process

BATCH = 8192  # random rows asked for at once


def read_pairs(folder: Path, images: int, workers: int) -> tuple[Catalogue, Reader]:
    """The catalogue of `images` new pairs in a folder, and how a run reads them."""
    write_pairs(folder, {"train": images}, negatives=False)
    reader = Reader(folder, ImageSpec.clip(), FetchPolicy(), 25_000_000, workers)
    rows = divide_lone_split(load_splits(str(folder)), ContentReader(reader, folder / "cache"), 0)
    return build_catalogue(rows, clip_words()), reader


@dataclass
class ColdPass:
    """A cold pass over files, and its parts alone: decoding, and both towers on ready inputs."""

    model: Model
    catalogue: Catalogue
    reader: Reader
    folder: Path
    numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        self.titles = self.catalogue.titles.to_pylist()
        self.ids = tokenize(self.model.parts.clip.tokenizer, self.titles, 77)
        self.references = [self.catalogue.references[i].as_py() for i in range(len(self.catalogue.references))]
        self.pixels = torch.from_numpy(np.stack([self.reader.pixels(reference) for reference in self.references]))

    def whole(self) -> None:
        """Files, decoding, towers, a new store."""
        place = self.folder / f"features-{next(self.numbers)}"
        images, titles = (FeatureStore(place / name, width)
                          for name, width in zip(("images", "titles"), self.model.widths, strict=True))
        encode_missing_images(self.catalogue, self.reader, range(len(self.references)), images, self.model.image,
                              lambda _: None)
        encode_missing_titles(lambda part: self.ids[part], self.catalogue.title_keys, titles, 0, self.model.text)

    def parts(self) -> None:
        """On one core they cannot overlap, so their sum is the limit; a GPU would leave the slower of them."""
        for reference in self.references:
            decode_image(self.reader.read(reference), self.reader.spec)
        for chunk in self.pixels.split(LOT):
            self.model.image(chunk)
        encode_titles(self.ids, 0, self.model.text, self.model.widths[1])


def cold_pass(bench: Bench) -> None:
    """P6: the whole cold pass against decode + towers alone."""
    folder, images = bench.scratch / "cold", 8 if bench.quick else 64
    cold = ColdPass(vit_b32(), *read_pairs(folder / "pairs", images, 1), folder)
    bench.race(Race("P6", f"cold pass over {images} pairs (files, decode, towers, store) against decode + towers alone",
                    ">= 0.95", cold.whole, cold.parts, rounds=3))


def million_pairs(bench: Bench) -> None:
    """P9: a store of synthetic pairs: open, find and verify all, random rows, memory that stays flat."""
    rows, rng = 50_000 if bench.quick else 1_000_000, np.random.default_rng(0)
    keys = rng.integers(256, size=(rows, 16), dtype=np.uint8)
    places = {bench.scratch / "store" / name: width for name, width in (("images", 768), ("titles", 512))}
    write_store(places, keys)
    start = time.perf_counter()
    stores = [FeatureStore(place, width) for place, width in places.items()]
    opened = time.perf_counter() - start
    size = sum(store.nbytes for store in stores) / 2**30
    bench.add(Figure("P9", f"open a store of {rows:,} pairs ({size:.1f} GiB): s by the clock", "<= 1", [opened]))
    start = time.process_time()
    tables = [StoredTable(store, store.locate(keys)) for store in stores]
    bench.add(Figure("P9", "find all its keys and verify every byte: s", "", [time.process_time() - start]))
    steps = [torch.from_numpy(rng.integers(rows, size=BATCH)) for _ in range(8)]
    in_memory = [torch.randn(min(rows, 65_536), width) for width in places.values()]
    near = [index % len(in_memory[0]) for index in steps]
    read = 2 * BATCH * len(steps)
    bench.race(Race("P9", "its random rows (fp32, by 8,192), against 65,536 rows in memory", "",
                    lambda: gather(tables, steps), lambda: gather(in_memory, near), work=(read, read), unit="rows"))
    seconds = [timed(lambda: gather(tables, steps), time.process_time) for _ in range(2 if bench.quick else 5)]
    bench.add(Figure("P9", "its random rows: million rows/s a core", ">= 1", [read / each / 1e6 for each in seconds]))
    before = memory_of_process("RssAnon")
    gather(tables, steps * 4)
    grown = (memory_of_process("RssAnon") - before) / 2**20
    bench.add(Figure("P9", f"private memory after {4 * read:,} more rows: MiB", "<= 1", [grown]))


def write_store(places: dict[Path, int], keys: np.ndarray) -> None:
    """Random features for these keys, 65,536 rows a segment."""
    for place, width in places.items():
        store, values = FeatureStore(place, width), torch.randn(min(len(keys), 65_536), width)
        for low in range(0, len(keys), len(values)):
            part = keys[low : low + len(values)]
            store.append(part, values[: len(part)])


def gather(tables: Sequence[Tensor | StoredTable], steps: Sequence[Tensor]) -> None:
    """Rows of every table, step by step; as in the loop none is kept, or new memory would be what is measured."""
    for index in steps:
        for table in tables:
            table.index_select(0, index)
