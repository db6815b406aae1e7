"""A dataset of any kind -> WebDataset tar shards beside each other: `run.py shards`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.cold import Reader, is_url
from data.decode import decode_image
from data.prefetch import ahead
from data.shard_writer import ShardWriter
from data.source import Rows

QUALITY = 95  # of re-encoded crops, without chroma subsampling: within 3/255 of the crop on photographs, on average


def pack(splits: Mapping[str, Rows], reader: Reader, out: Path, side: int,
         tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write every usable row to OUT/{split}-000000.tar, … in order; the rows left out as ledger entries.

    Images keep their bytes, or with `side` become JPEG crops of that many pixels a side. A row's key is its number.
    After a kill the same call goes on behind the last complete shard; URLs fetched before are not asked for again.
    """
    ledger: list[dict[str, Any]] = []
    for name, rows in splits.items():
        with ShardWriter(out, name) as writer:
            done = writer.done()
            pending = [row for row in range(len(rows)) if _key(row) not in done]
            problems = _fetched(rows, pending, reader, tell)
            for row, image in ahead(lambda row: (row, _image(rows, row, reader, side, problems)), pending,  # noqa: B023
                                    reader.workers, 4 * reader.workers):
                title = rows.title[row].as_py()
                negative = None if rows.title_neg is None else rows.title_neg[row].as_py()
                try:
                    if isinstance(image, BadSample):
                        raise image
                    writer.write(_key(row), image, title, negative)
                except BadSample as problem:
                    ledger.append({"split": name, "row": row, "image": rows.image[row]["path"].as_py(),
                                   "title": title, "reason": problem.reason, "detail": problem.detail})
        tell(f"{name}: {len(rows):,} rows, {sum(entry['split'] == name for entry in ledger):,} left out")
    return ledger


def _key(row: int) -> str:
    return f"{row:09d}"


def _fetched(rows: Rows, pending: list[int], reader: Reader, tell: Callable[[str], None]) -> dict[str, BadSample]:
    """Fetch what the pending rows name by URL; what went wrong, by URL."""
    def urls() -> Iterator[str]:
        for row in pending:
            path = rows.image[row]["path"].as_py()
            if path and is_url(path):
                yield path
    results = list(reader.fetch(urls()))
    if results:
        tell(f"fetched {sum(one.reason is None for one in results):,} of {len(results):,} URLs")
    return {one.url: BadSample(one.reason, one.detail) for one in results if one.reason is not None}


def _image(rows: Rows, row: int, reader: Reader, side: int, problems: Mapping[str, BadSample]) -> bytes | BadSample:
    """The bytes to store, after one look at whether they decode; a problem is returned, so that order is kept."""
    reference = rows.image[row].as_py()
    if reference["path"] in problems:
        return problems[reference["path"]]
    try:
        data = reader.read(reference)
        spec = replace(reader.spec, resize=side, crop=(side, side)) if side else reader.spec
        pixels_CSS = decode_image(data, spec, reader.max_pixels)
    except BadSample as problem:
        return problem
    if not side:
        return data
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_CSS.transpose(1, 2, 0))).save(
        buffer, "jpeg", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
