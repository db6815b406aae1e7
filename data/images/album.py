"""Titles and small pictures of kept rows, for the few that people look at; the store holds features, not pictures.

Dimension key: D distinct images by content.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.catalogue import Catalogue, Split
from data.cold import Reader
from data.images.decode import decode_whole

QUALITY = 78


@dataclass(frozen=True)
class RowPreviews:
    """What a row of a split looks like; `row` counts the kept rows."""

    found: Catalogue
    splits: Mapping[str, Split]
    example: np.ndarray  # [D] a reference of each distinct image
    reader: Reader

    def title(self, split: str, row: int) -> str:
        """The row's own title."""
        return self.found.title(split, int(self.splits[split].row_N[row]))

    def picture(self, split: str, row: int, side: int = 160) -> bytes:
        """The row's image as a JPEG whose longer side has `side` pixels; empty when its bytes went away meanwhile."""
        image = int(self.splits[split].image_N[row])
        try:
            data = self.reader.read(self.found.references[int(self.example[image])].as_py())
            return small_jpeg(data, side, self.reader.max_pixels)
        except BadSample:
            return b""


def small_jpeg(data: bytes, side: int, max_pixels: int) -> bytes:
    """Image bytes -> an upright JPEG, whole and in proportion, at most `side` pixels long. Raises BadSample."""
    pixels_HWC = decode_whole(data, side, max_pixels).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
