"""Many titles without a Python object for each: their token ids in two arrays, and a mask of blank ones.

Dimension key: P titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, overload

import numpy as np

from data.prefetch import batched

if TYPE_CHECKING:
    import pyarrow as pa

# A character that is seen. Cf are format characters: U+200B, a space without width, is one.
VISIBLE = r"[^\pZ\p{Cc}\p{Cf}]"
CHUNK, CHUNK_BYTES = 8192, 1 << 24  # titles that are Python objects at one time, and their size unless one is larger


class TokenLists(Sequence[Sequence[int]]):
    """A sequence of lists of token ids, kept end to end; a slice shares their memory."""

    def __init__(self, ids: np.ndarray, bound: np.ndarray) -> None:
        self._ids, self._bound = ids, bound  # list i is ids[bound[i] : bound[i + 1]]

    @classmethod
    def of(cls, lists: Iterator[Sequence[int]]) -> TokenLists:
        """Pack lists, a CHUNK of them at a time."""
        parts, lengths = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
        for chunk in batched(lists, CHUNK):
            parts.append(np.fromiter(chain.from_iterable(chunk), np.int32))
            lengths.append(np.fromiter(map(len, chunk), np.int64))
        return cls(np.concatenate(parts), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self._bound) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> TokenLists: ...
    def __getitem__(self, index: int | slice) -> list[int] | TokenLists:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return TokenLists(self._ids, self._bound[start : max(start, stop) + 1])
        index = range(len(self))[index]
        return self._ids[self._bound[index] : self._bound[index + 1]].tolist()

    def raw(self, index: int) -> bytes:
        """Return the ids of list `index` (0 or more) as bytes, four each."""
        return self._ids[self._bound[index] : self._bound[index + 1]].tobytes()


def text_chunks(texts: pa.LargeStringArray) -> Iterator[list[str]]:
    """Yield titles, or other texts, a CHUNK of them or CHUNK_BYTES at a time."""
    for part in text_slices(texts):
        yield part.to_pylist()


def text_slices(texts: pa.LargeStringArray) -> Iterator[pa.LargeStringArray]:
    """Yield the texts of `text_chunks` as slices."""
    import pyarrow.compute as pc

    for start in range(0, len(texts), CHUNK):
        part = texts.slice(start, CHUNK)
        end_P = np.cumsum(pc.binary_length(part).to_numpy(zero_copy_only=False), dtype=np.int64)
        first = 0
        while first < len(part):
            room = CHUNK_BYTES + (end_P[first - 1] if first else 0)
            last = max(first + 1, int(np.searchsorted(end_P, room, side="right")))
            yield part.slice(first, last - first)
            first = last


def is_blank(titles: pa.LargeStringArray) -> np.ndarray:
    """Return which titles hold nothing that is seen: white space, control and format characters alone, bool [P]."""
    import pyarrow.compute as pc

    return ~pc.match_substring_regex(titles, VISIBLE).to_numpy(zero_copy_only=False)
