"""Many titles without a Python object for each: their keys, and their tokens in two arrays.

Dimension key: P titles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from data.images.decode import tokenize
from data.prefetch import batched
from data.store.segments import KEY, keys_of_titles

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 8192  # titles that are Python objects at one time


class TokenLists(Sequence[Sequence[int]]):
    """A sequence of lists of token ids, kept end to end; a slice shares their memory."""

    def __init__(self, ids: np.ndarray, bound: np.ndarray) -> None:
        self._ids, self._bound = ids, bound  # list i is ids[bound[i] : bound[i + 1]]

    @classmethod
    def of(cls, lists: Iterator[Sequence[int]]) -> TokenLists:
        """Pack lists, a CHUNK of them at a time."""
        parts, lengths = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
        for some in batched(lists, CHUNK):
            parts.append(np.fromiter(chain.from_iterable(some), np.int32))
            lengths.append(np.fromiter(map(len, some), np.int64))
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
        at = range(len(self))[index]
        return self._ids[self._bound[at] : self._bound[at + 1]].tolist()


def texts(titles: pa.StringArray) -> Iterator[list[str]]:
    """The titles, a CHUNK of them at a time."""
    for start in range(0, len(titles), CHUNK):
        yield titles.slice(start, CHUNK).to_pylist()


def title_keys(titles: pa.StringArray) -> np.ndarray:
    """The content keys [P, 16] uint8 of all titles."""
    return np.concatenate([np.empty((0, KEY), np.uint8), *map(keys_of_titles, texts(titles))])


def blank(titles: pa.StringArray) -> np.ndarray:
    """Which titles hold nothing but white space; bool [P]."""
    return np.array([not title.strip() for some in texts(titles) for title in some], bool)


def title_tokens(titles: pa.StringArray, tokenizer: Any, max_tokens: int) -> TokenLists:
    """The tokens of all titles."""
    return TokenLists.of(ids for some in texts(titles) for ids in tokenize(tokenizer, some, max_tokens))
