"""Images that look the same: a signature (LOOK) of each, then all pairs of alike ones without comparing all pairs.

Dimension key: C colour channels, S side of a square in pixels, W cosine waves, N images, Q pairs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from PIL import Image

from data.images.decode import FORMATS, ImageSpec, decode_image

S, W, CELLS = 32, 8, 8  # pixels, waves and cells along a side of the square that an image is squeezed into
SQUARE = ImageSpec((S, S), (S, S), int(Image.Resampling.BILINEAR), 1 / 255, (0.0,) * 3, (1.0,) * 3)
COSINES_WS = np.cos(np.pi / S * np.arange(W)[:, None] * (np.arange(S) + 0.5))
LUMA_C = np.array([0.299, 0.587, 0.114])
LOOK = np.dtype([("hash", np.uint64), ("side", np.int32), ("cells", np.uint8, (3, CELLS, CELLS))])  # 204 bytes
# Bits of 64 that may differ. With 8, each of the four bands could differ in two, and one flip would miss the pair.
NEAR = 7
BANDS, FLIPS = 4, (0, *(1 << bit for bit in range(16)))
PASSES = BANDS * len(FLIPS)  # of `near_pairs`
CROWD = 128  # images with equal bands beyond which each is compared with its neighbours alone
# Levels of 255: by which cells may differ once brightness and contrast are evened out, and by which brightness may.
SAME_CELL, SAME_MEAN = 20, 32
CHUNK = 1 << 18  # candidate pairs at a time, 2 MB an array
SLICE = 1 << 14  # pairs whose cells are compared at a time, 12 MB an array


@dataclass(frozen=True)
class ToSignature:
    """Decodes into the LOOK of an image, in whatever process pictures are decoded."""

    max_pixels: int
    record: ClassVar[np.dtype] = LOOK

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> np.ndarray:
        """Return the LOOK. Raises BadSample."""
        return picture_signature(data, self.max_pixels)


def picture_signature(data: bytes, max_pixels: int) -> np.ndarray:
    """Return the LOOK of an image: hash, shortest side in pixels, colours. Raises BadSample as `decode_image`."""
    pixels_CSS = decode_image(data, SQUARE, max_pixels)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # the header alone
        side = min(image.size)
    cells = pixels_CSS.reshape(3, CELLS, S // CELLS, CELLS, S // CELLS).mean((2, 4)).round()
    return np.array((perceptual_hash(pixels_CSS), side, cells), LOOK)


def perceptual_hash(pixels_CSS: np.ndarray) -> np.uint64:
    """Return 64 bits of uint8 pixels [3, 32, 32]: which of the 8x8 longest cosine waves are stronger than their median.

    Stronger by a ripple of one grey level at least: less is noise, and a plain image hashes to 0. Brightness, the wave
    that is constant, is left out. After "pHash", Zauner 2010, Implementation and Benchmarking of Perceptual Hashes.
    """
    wave_WW = COSINES_WS @ np.tensordot(LUMA_C, pixels_CSS, 1) @ COSINES_WS.T
    wave_WW[0, 0] = median = np.median(wave_WW.ravel()[1:])
    return np.packbits(wave_WW > median + S * S / 4).view(np.uint64)[0]


def first_similar(looks_N: np.ndarray, is_in_NS: np.ndarray, passed: Callable[[], None] = lambda: None) -> np.ndarray:
    """Return, for each image and set, the first other image of the set that looks like it.

    Takes LOOKs [N] and membership [N, sets].

    Returns int64 [N, sets], N where there is none. `passed` is called after each of PASSES passes. Time and memory grow
    with N, not with the number of pairs: of images in a crowd it is the first of those compared, see `near_pairs`.
    """
    N, sets = is_in_NS.shape
    first_NS = np.full((N, sets), N)
    for left, right in similar_pairs(looks_N, passed):
        for image, twin in ((left, right), (right, left)):
            for number in range(sets):
                there = is_in_NS[twin, number]
                np.minimum.at(first_NS[:, number], image[there], twin[there])
    return first_NS


def similar_pairs(looks_N: np.ndarray, passed: Callable[[], None] = lambda: None) -> Iterator[
        tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of LOOKs [N] that are alike, as two index arrays [Q] at a time; memory stays bounded."""
    hash_N = np.ascontiguousarray(looks_N["hash"])
    for left_Q, right_Q in near_pairs(hash_N, _colour_order(looks_N["cells"]), passed):
        for start in range(0, len(left_Q), SLICE):
            left, right = left_Q[start:start + SLICE], right_Q[start:start + SLICE]
            same = _same_cells(looks_N["cells"][left], looks_N["cells"][right])
            yield left[same], right[same]


def crowded(hash_N: np.ndarray) -> int:
    """Return the number of images whose hash more than CROWD images have."""
    _, counts = np.unique(hash_N, return_counts=True)
    return int(counts[counts > CROWD].sum())


def _colour_order(cells_N: np.ndarray) -> np.ndarray:
    """Return an order [N] in which images of similar mean colour are near one another.

    By 4 bits of each channel, interleaved (Morton's curve). Images of equal value come in random order: in the order of
    the rows, the images of one split would have no neighbours of another.
    """
    means = [np.empty((0, 3))]
    for start in range(0, len(cells_N), SLICE):
        means.append(cells_N[start:start + SLICE].mean((2, 3)))
    mean_N3 = np.concatenate(means).astype(np.uint32)
    place_N = np.zeros(len(cells_N), np.uint64)
    for bit in (7, 6, 5, 4):
        for channel in range(3):
            place_N = place_N << np.uint64(1) | (mean_N3[:, channel] >> bit & 1).astype(np.uint64)
    return np.lexsort((np.random.default_rng(0).permutation(len(cells_N)), place_N))


def near_pairs(hash_N: np.ndarray, order_N: np.ndarray | None = None, passed: Callable[[], None] = lambda: None
               ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of uint64 hashes that differ in at most NEAR bits, as two index arrays [Q] at a time.

    Were two bits to differ in each of the four 16-bit bands, eight would: so in some band at most one does, and equal
    values of that band, or values one bit apart, find the pair (multi-index hashing, Norouzi, Punjani, Fleet 2012).
    A crowd, more than CROWD hashes with one value, would make pairs by its square (all plain images hash to 0): of it
    each is paired with CROWD hashes nearest in value, equal ones in `order_N`. All other pairs come, each once.
    """
    order_N = np.arange(len(hash_N)) if order_N is None else order_N
    size_BN = np.empty((BANDS, len(hash_N)), np.int64)  # how many have the value of the band that each has
    for band in range(BANDS):
        values_N = hash_N.view(np.uint16).reshape(-1, BANDS)[:, band]
        size_BN[band] = np.bincount(values_N, minlength=1 << 16)[values_N] if len(hash_N) else 0
    for band in range(BANDS):
        table = _BandTable(hash_N, order_N, band)
        for flip in FLIPS:
            for left_Q, right_Q in table.candidates(flip):
                odd_Q = hash_N[left_Q] ^ hash_N[right_Q]
                near = np.flatnonzero(np.bitwise_count(odd_Q) <= NEAR)
                left, right = left_Q[near], right_Q[near]
                odd = odd_Q[near].view(np.uint16).reshape(-1, BANDS)
                was_compared = np.maximum(size_BN[:band, left], size_BN[:band, right]) <= CROWD
                was_compared |= odd_Q[near] == 0  # equal hashes have the same neighbours in every band
                fresh = ~((np.bitwise_count(odd[:, :band]) <= 1).T & was_compared).any(0)
                yield left[fresh], right[fresh]
            passed()


class _BandTable:
    """Hashes sorted by one band of 16 bits, then by the others, then by a given order."""

    def __init__(self, hash_N: np.ndarray, order_N: np.ndarray, band: int) -> None:
        turn = np.uint64(16 * (band + 1) % 64)
        key_N = hash_N >> turn | hash_N << np.uint64(64 - int(turn)) if turn else hash_N
        self.order_N = order_N[np.argsort(key_N[order_N], kind="stable")]
        self.key_N = key_N[self.order_N]
        self.value_N = (self.key_N >> np.uint64(48)).astype(np.int64)
        self.start_V = np.searchsorted(self.value_N, np.arange((1 << 16) + 1))

    def candidates(self, flip: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pairs of images whose values differ by `flip`, about CHUNK at a time."""
        # Only from the side without the bit: from both, each pair would come twice.
        at = np.flatnonzero(self.value_N & flip == 0)
        partner = self.value_N[at] | flip
        low, high = self.start_V[partner] if flip else at + 1, self.start_V[partner + 1]
        crowd = np.flatnonzero(high - self.start_V[partner] > CROWD)
        if flip and len(crowd):
            # In a crowd, compare with the CROWD hashes around the place of the hash that differs in this bit alone.
            near = np.searchsorted(self.key_N, self.key_N[at[crowd]] ^ np.uint64(flip << 48))
            low[crowd] = np.clip(near - CROWD // 2, low[crowd], high[crowd] - CROWD)
        high[crowd] = np.minimum(high[crowd], low[crowd] + CROWD)
        for index, member in _members(low, high):
            yield self.order_N[at[index]], self.order_N[member]


def _members(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (number of the range, member) for all members of all ranges [low, high), about CHUNK at a time."""
    end = np.cumsum(high - low)
    marks = np.arange(CHUNK, end[-1] if len(end) else 0, CHUNK)
    for first, last in pairwise([0, *np.searchsorted(end, marks) + 1, len(end)]):
        count = high[first:last] - low[first:last]
        begin = np.cumsum(count) - count
        index = np.repeat(np.arange(len(count)), count)
        yield first + index, np.arange(len(index)) + (low[first:last] - begin)[index]


def _same_cells(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which pairs of cells uint8 [Q, 3, 8, 8] are alike, brightness and contrast evened out; bool [Q].

    The hash compares structure only; this separates images that differ in colour, or in one place of a template.
    """
    one, other = (cells.reshape(len(cells), -1).astype(np.float32) for cells in (one, other))
    mean, other_mean = one.mean(1, keepdims=True), other.mean(1, keepdims=True)
    spread, other_spread = (np.maximum(cells.std(1, keepdims=True), 1) for cells in (one, other))
    standard, other_standard = (one - mean) / spread, (other - other_mean) / other_spread
    # In levels again, by the mean of both spreads: standardised noise of a plain image would look like structure.
    difference = np.abs(standard - other_standard) * (spread + other_spread) / 2
    return (difference.max(1) <= SAME_CELL) & (np.abs(mean - other_mean)[:, 0] <= SAME_MEAN)
