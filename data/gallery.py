"""A dataset as a gallery to search in: its distinct images or titles, their features from the store. One process.

Nothing is decoded or fetched again that the store knows, and each kind of gallery leaves the other kind alone.
Dimension key: N distinct items of the gallery, M distinct image references.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.batch import BadSample, UserError
from data.catalogue import Catalogue, catalogue
from data.cold import Reader, encode_titles, fill_images, fill_titles, is_url
from data.decode import collate_tokens as collate_tokens
from data.decode import decode_image, open_image, rgb, tokenize
from data.features import FeatureStore
from data.pairs import Encoders
from data.resident import Mapped
from data.segments import keys_of_titles
from data.source import Rows


class Item(NamedTuple):
    """One answer: the first row of the dataset that holds it. `image` is a path or URL, "" where the row has bytes."""

    split: str
    row: int
    image: str
    title: str
    reference: Mapping[str, Any]  # of the image, as `Reader.read` takes it


@dataclass(frozen=True)
class Gallery:
    """N distinct items (equal content once), each with the first row it stands in."""

    features: Mapped
    found: Catalogue
    at_N: np.ndarray  # row number over all splits, one after the other

    def __len__(self) -> int:
        return len(self.at_N)

    def item(self, index: int) -> Item:
        """Where item `index` stands."""
        row = int(self.at_N[index])
        for split, rows in self.found.splits.items():
            if row < len(rows):
                reference = rows.image[row].as_py()
                return Item(split, row, reference["path"] or "", rows.title[row].as_py(), reference)
            row -= len(rows)
        raise IndexError(index)
