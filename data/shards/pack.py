"""A dataset of any kind -> WebDataset tar shards beside each other: `run.py shards`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.images.decode import ImageSpec, decode_image
from data.images.feed import Feed, grouped
from data.images.reader import Reader, is_url
from data.images.worker import Outcome, Task
from data.progress import Progress
from data.shards.index import is_range, parse_reference
from data.shards.writer import ShardWriter
from data.sources.embedded import shown_name
from data.sources.source import Rows
from data.text import hide_secrets
from data.web.fetched import Fetched

# JPEG quality of crops, without chroma subsampling: within 3/255 of the crop on photographs, on average.
QUALITY = 95


def pack(splits: Mapping[str, Rows], reader: Reader, out: Path, side: int,
         log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write every usable row to OUT/{split}-000000.tar, … in order; return the rows left out as ledger entries.

    Images keep their bytes, or with `side` become JPEG crops of that many pixels a side. A row's key is its number.
    Fetching, decoding and writing overlap. After a kill the same call goes on behind the last complete shard; URLs
    fetched before are not asked for again.
    """
    ledger: list[dict[str, Any]] = []
    for name, rows in splits.items():
        before = len(ledger)
        with ShardWriter(out, name) as writer:
            done = writer.done()
            pending = np.array([row for row in range(len(rows)) if _key(row) not in done], np.int64)
            progress = Progress(f"{name} rows", len(pending), log)
            for row, outcome in _packed(rows, pending, reader, side, log):
                problem = BadSample(*outcome.problem) if outcome.problem else _write(writer, rows, row, outcome.content)
                progress(problem=problem)
                if problem is not None:
                    ledger.append({"split": name, "row": row, "image": shown_name(rows.image[row].as_py()) or None,
                                   "title": rows.title[row].as_py(), "reason": problem.reason,
                                   "detail": problem.detail})
        log(f"{name}: {len(rows):,} rows, {len(ledger) - before:,} left out")
    return ledger


def links_out(splits: Mapping[str, Rows], folder: Path) -> list[str]:
    """Return the images and texts that links inside a folder lead to outside of it, as "NAME -> FILE"."""
    below, real = os.path.abspath(folder) + os.sep, os.path.realpath(folder) + os.sep
    outside = dict[str, None]()
    for rows in splits.values():
        for chunk in rows.image.chunks:
            for path in chunk.unique().to_pylist():
                file = parse_reference(path)[0] if is_range(path) else path
                stem = os.path.splitext(file)[0]
                for name in (file, *filter(os.path.islink, (f"{stem}.txt", f"{stem}.json"))):
                    if name.startswith(below) and not (target := os.path.realpath(name)).startswith(real):
                        outside[f"{name[len(below):]} -> {target}"] = None
    return [*outside]


def _key(row: int) -> str:
    return f"{row:09d}"


def _write(writer: ShardWriter, rows: Rows, row: int, image: bytes) -> BadSample | None:
    """Add a row; return the problem that keeps it out, None if it was written."""
    image_name = rows.image[row].as_py()
    negative = None if rows.title_neg is None else rows.title_neg[row].as_py()
    try:
        writer.write(_key(row), image, rows.title[row].as_py(), negative,
                     {"url": hide_secrets(image_name)} if is_url(image_name) else None)
    except BadSample as problem:
        return problem
    return None


def _available(rows: Rows, pending: np.ndarray, reader: Reader) -> Iterator[tuple[int, BadSample | None]]:
    """Yield the pending rows in order, each as soon as its bytes can be read; fetching goes on meanwhile.

    Only what has landed before its turn came is remembered.
    """
    def urls() -> Iterator[str]:
        for row in pending.tolist():
            path = rows.image[row].as_py()
            if is_url(path):
                yield path

    with closing(reader.fetch(urls())) as fetched:  # starts at the first `next`
        early: dict[str, list[Fetched]] = {}
        for row in pending.tolist():
            path = rows.image[row].as_py()
            if not is_url(path):
                yield row, None
                continue
            # Every row that names a URL gets a result, so that of this row will come.
            while path not in early:
                result = next(fetched)
                early.setdefault(result.url, []).append(result)
            result = early[path].pop()
            if not early[path]:
                del early[path]
            yield row, BadSample(result.reason, result.detail) if result.reason else None


def _packed(rows: Rows, pending: np.ndarray, reader: Reader, side: int,
            log: Callable[[str], None]) -> Iterator[tuple[int, Outcome]]:
    """Yield the pending rows in order, each with the bytes to store, once they are known to decode."""
    spec = replace(reader.spec, resize=side, crop=(side, side)) if side else reader.spec
    feed = Feed(ToStored(spec, reader.max_pixels, is_crop=side > 0), reader, len(pending), log)
    tasks = ((row, problem or Task(rows.image[row].as_py())) for row, problem in _available(rows, pending, reader))
    with closing(feed.lots(grouped(tasks, feed.lot))) as lots:
        for lot in lots:
            yield from zip(lot.tags, lot.outcomes, strict=True)


@dataclass(frozen=True)
class ToStored:
    """Decodes a picture to check it, and returns its bytes, or those of a JPEG of the crop."""

    spec: ImageSpec
    max_pixels: int
    is_crop: bool
    record: ClassVar[np.dtype] = np.dtype((np.uint8, (0,)))

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> bytes:
        """Return the bytes to store. Raises BadSample."""
        pixels_CSS = decode_image(data, self.spec, self.max_pixels)
        if not self.is_crop:
            return data
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels_CSS.transpose(1, 2, 0))).save(
            buffer, "jpeg", quality=QUALITY, subsampling=0)
        return buffer.getvalue()
