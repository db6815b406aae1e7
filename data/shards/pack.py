"""A dataset of any kind -> WebDataset tar shards beside each other: `run.py shards`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.cold import Reader, is_url
from data.images.decode import decode_image
from data.prefetch import threaded_map
from data.progress import Progress
from data.shards.writer import ShardWriter
from data.sources.embedded import shown_name
from data.sources.source import Rows
from data.web.fetched import Fetched

QUALITY = 95  # of re-encoded crops, without chroma subsampling: within 3/255 of the crop on photographs, on average


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
            available = _available(rows, pending, reader)
            images = threaded_map(partial(_image, rows, reader, side), available, reader.workers, 4 * reader.workers)
            for row, image in zip(pending.tolist(), images, strict=True):
                problem = image if isinstance(image, BadSample) else _write(writer, rows, row, image)
                progress(problem=problem)
                if problem is not None:
                    ledger.append({"split": name, "row": row, "image": shown_name(rows.image[row].as_py()) or None,
                                   "title": rows.title[row].as_py(), "reason": problem.reason,
                                   "detail": problem.detail})
        log(f"{name}: {len(rows):,} rows, {len(ledger) - before:,} left out")
    return ledger


def _key(row: int) -> str:
    return f"{row:09d}"


def _write(writer: ShardWriter, rows: Rows, row: int, image: bytes) -> BadSample | None:
    """Add a row; return the problem that keeps it out, None if it was written."""
    image_name = rows.image[row].as_py()
    negative = None if rows.title_neg is None else rows.title_neg[row].as_py()
    try:
        writer.write(_key(row), image, rows.title[row].as_py(), negative,
                     {"url": image_name} if is_url(image_name) else None)
    except BadSample as problem:
        return problem
    return None


def _available(rows: Rows, pending: np.ndarray, reader: Reader) -> Iterator[tuple[int, BadSample | None]]:
    """The pending rows in order, each as soon as its bytes can be read; fetching goes on meanwhile.

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
            while path not in early:  # every row that names a URL gets a result, so it will come
                result = next(fetched)
                early.setdefault(result.url, []).append(result)
            result = early[path].pop()
            if not early[path]:
                del early[path]
            yield row, BadSample(result.reason, result.detail) if result.reason else None


def _image(rows: Rows, reader: Reader, side: int, available: tuple[int, BadSample | None]) -> bytes | BadSample:
    """The bytes to store, once they are known to decode; a problem is returned, not raised, so that order is kept."""
    row, problem = available
    if problem is not None:
        return problem
    try:
        data = reader.read(rows.image[row].as_py())
        spec = replace(reader.spec, resize=side, crop=(side, side)) if side else reader.spec
        pixels_CSS = decode_image(data, spec, reader.max_pixels)
    except BadSample as bad:
        return bad
    if not side:
        return data
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_CSS.transpose(1, 2, 0))).save(
        buffer, "jpeg", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
