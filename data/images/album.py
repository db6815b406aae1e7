"""Titles and small pictures of kept rows, for reports; pictures are read again, since the store holds features only.

Dimension key: D distinct images by content.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.catalogue import Catalogue, Split
from data.images.decode import decode_whole
from data.images.reader import Reader

if TYPE_CHECKING:
    from data.lost import LostPictures

QUALITY = 78
# A sheet of small pictures takes a quarter of the time that Pillow's default level, 6, takes, and 1.2 times its bytes.
PNG_LEVEL = 1


@dataclass(frozen=True)
class RowPreviews:
    """Title and picture of any row of a split; `row` counts the kept rows."""

    catalogue: Catalogue
    splits: Mapping[str, Split]
    example_D: np.ndarray  # a reference of each distinct image
    reader: Reader
    lost: LostPictures | None = None  # where evaluations leave out what is lost

    def title(self, split: str, row: int) -> str:
        """Return the row's own title."""
        return self.catalogue.title(split, int(self.splits[split].row_N[self._measured(split, row)]))

    def _measured(self, split: str, row: int) -> int:
        """Return the row that evaluations measure in the place of a row."""
        row_N = None if self.lost is None else self.lost.stand_ins(self.splits[split])
        return row if row_N is None else int(row_N[row])

    def picture(self, split: str, row: int, side: int = 160) -> bytes:
        """Return the image as a JPEG whose longer side has `side` pixels; empty when it can no longer be read."""
        image = int(self.splits[split].image_N[self._measured(split, row)])
        try:
            reference = self.catalogue.references[int(self.example_D[image])].as_py()
            data = self.reader.fetch_and_read(reference)
            return small_jpeg(data, side, self.reader.max_pixels)
        except BadSample:
            return b""


def small_jpeg(data: bytes, side: int, max_pixels: int) -> bytes:
    """Return an upright JPEG of image bytes, whole and in proportion, at most `side` pixels long. Raises BadSample."""
    pixels_HWC = decode_whole(data, side, max_pixels).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def png(pixels_HWC: np.ndarray) -> bytes:
    """Return uint8 RGB pixels as a PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels_HWC).save(out, "PNG", compress_level=PNG_LEVEL)
    return out.getvalue()
