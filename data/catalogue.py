"""From rows to distinct inputs, and from decode results to kept rows and the ledger. No image is opened here.

Dimension key: M distinct image references, P distinct titles, N rows of a split, H negatives of a row,
F negatives of all rows, D distinct images by content.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, UserError
from data.identity import TitleIds, clip_words, distinct
from data.ledger import dropped_rows, place_of
from data.sources.embedded import shown_name
from data.sources.labels import title_groups
from data.sources.lists import flatten
from data.sources.rows import Rows
from data.store.segments import KEY
from data.titles import is_blank

if TYPE_CHECKING:
    import pyarrow as pa

    from data.images.feed import Times


@dataclass(frozen=True)
class Catalogue:
    """The distinct inputs of all splits, and their indices for each row."""

    splits: Mapping[str, Rows]
    references: pa.LargeStringArray  # M distinct images: a path, URL or FILE#OFFSET+SIZE each, "" for none
    titles: pa.LargeStringArray  # P distinct titles, negatives included, each in its first spelling
    title_keys: np.ndarray  # [P, 16] uint8
    image_N: Mapping[str, np.ndarray]  # split -> indices into references
    title_N: Mapping[str, np.ndarray]  # split -> indices into titles
    negative_N: Mapping[str, np.ndarray | None]  # split -> indices into titles [N, H], -1 for none
    title_group_P: Tensor | None = None  # number of the first title of each title's class; None: all are on their own

    def title(self, split: str, row: int) -> str:
        """Return the title of a row in its own spelling."""
        return str(self.splits[split].title[row].as_py())


class DecodeResult(NamedTuple):
    """The result of reading one image reference: its content key, or why it cannot be used."""

    reference: int
    key: bytes
    problem: BadSample | None
    pixels: np.ndarray | None = None


class DecodeResults:
    """Results of many references in two arrays, without pixels; Python objects only for those that failed.

    Iterating yields a DecodeResult for each.
    """

    def __init__(self) -> None:
        self._reference, self._key = array("q"), bytearray()
        self.problems: dict[int, BadSample] = {}
        self.restored: dict[int, BadSample] = {}  # why they cannot be read now; a run had them when it began
        self.times: Times | None = None  # of the feed that they came from

    def add(self, result: DecodeResult) -> None:
        """Append a result."""
        if result.problem is not None:
            self.problems[result.reference] = result.problem
        self._reference.append(result.reference)
        self._key += result.key or bytes(KEY)

    def add_known(self, references: np.ndarray, key_nK: np.ndarray) -> None:
        """Append references that can be used, whose content keys are known."""
        self._reference.frombytes(np.ascontiguousarray(references, np.int64).tobytes())
        self._key += np.ascontiguousarray(key_nK, np.uint8).tobytes()

    def restore(self, keys: Mapping[int, bytes]) -> None:
        """Count references that are among the results as read, with these keys."""
        for position in np.flatnonzero(np.isin(np.array(self._reference, np.int64), [*keys])).tolist():
            reference = self._reference[position]
            self._key[KEY * position : KEY * (position + 1)] = keys[reference]
            other = BadSample("changed-file", "it is another picture now")
            self.restored[reference] = self.problems.pop(reference, other)

    def __len__(self) -> int:
        return len(self._reference)

    def __iter__(self) -> Iterator[DecodeResult]:
        for position, reference in enumerate(self._reference):
            problem = self.problems.get(reference)
            key = b"" if problem else bytes(self._key[KEY * position : KEY * (position + 1)])
            yield DecodeResult(reference, key, problem)

    def good(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the references that can be used, and the keys of their content, uint8 [n, 16]."""
        reference = np.frombuffer(self._reference, np.int64)
        is_good = ~np.isin(reference, list(self.problems))
        return reference[is_good], np.frombuffer(self._key, np.uint8).reshape(-1, KEY)[is_good]


@dataclass(frozen=True)
class Split:
    """The kept rows of one split as indices into the distinct images (by content) and titles."""

    name: str
    row_N: np.ndarray  # the row's number in the source
    image_N: Tensor
    title_N: Tensor
    negative_N: Tensor | None  # [N, H], -1 for none

    def __len__(self) -> int:
        return len(self.row_N)


def build_catalogue(splits: Mapping[str, Rows], title_ids: TitleIds | None = None) -> Catalogue:
    """Find the distinct image references and titles of all splits, vectorised.

    Titles are compared by `title_ids` of a model or, where none is loaded, as any CLIP model would (`clip_words`).
    """
    import pyarrow.compute as pc

    release_freed_memory()  # of reading the tables
    ends = np.cumsum([len(rows) for rows in splits.values()])
    images = [pc.fill_null(chunk, "") for rows in splits.values() for chunk in rows.image.chunks]
    image_all, references = _encoded(images)

    columns = [rows.title for rows in splits.values()]
    negatives = {name: flatten(rows.title_neg) for name, rows in splits.items() if rows.title_neg is not None}
    columns += [values for values, _ in negatives.values()]
    title_all, titles, title_keys = _distinct_titles(columns, title_ids or clip_words())
    negative_N: dict[str, np.ndarray | None] = dict.fromkeys(splits)
    start = int(ends[-1])
    for name, (_, row_F) in negatives.items():
        negative_N[name] = _padded(title_all[start : start + len(row_F)], row_F, len(splits[name]))
        start += len(row_F)
    image_N = dict(zip(splits, np.split(image_all, ends[:-1]), strict=True))
    title_N = dict(zip(splits, np.split(title_all[: ends[-1]], ends[:-1]), strict=True))
    groups = title_groups(splits, title_N, len(titles))
    release_freed_memory()
    return Catalogue(splits, references, titles, title_keys, image_N, title_N, negative_N, groups)


def release_freed_memory() -> None:
    """Give freed memory back to the system: Arrow and the C library keep a third of a big table's size."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _padded(value_F: np.ndarray, row_F: np.ndarray, rows: int) -> np.ndarray | None:
    """Return values, one list a row, as [N, H], where H is the longest list and -1 fills up; None where H is 0."""
    length_N = np.bincount(row_F, minlength=rows)
    if not len(value_F):
        return None
    place_F = np.arange(len(row_F)) - (np.cumsum(length_N) - length_N)[row_F]
    padded_NH = np.full((rows, length_N.max()), -1, np.int64)
    padded_NH[row_F, place_F] = value_F
    return padded_NH


def _distinct_titles(columns: Sequence[pa.ChunkedArray], title_ids: TitleIds) -> tuple[
        np.ndarray, pa.LargeStringArray, np.ndarray]:
    """Return the number of each entry's title (-1 where null), the P distinct titles, and their keys [P, 16]."""
    import pyarrow as pa

    spelling_all, spelt = _encoded([chunk for column in columns for chunk in column.chunks])
    keys = title_ids.keys(spelt)  # spellings that give equal token ids are one title
    number, first_P = distinct(keys)
    if len(first_P) == len(spelt):
        return spelling_all, spelt, keys
    return np.append(number, -1)[spelling_all], spelt.take(pa.array(first_P)), keys[first_P]


def _encoded(chunks: Sequence[pa.Array]) -> tuple[np.ndarray, pa.LargeStringArray]:
    """Return the number of each value (-1 where null), int64, and the distinct values in order of appearance.

    With 64-bit offsets, chunk by chunk: all together may be more than the 2 GiB that an Arrow string array holds.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    large = pa.chunked_array([chunk.cast(pa.large_string()) for chunk in chunks], pa.large_string())
    encoded = large.dictionary_encode().chunks  # all with one dictionary, which grows from chunk to chunk
    if not encoded:
        return np.empty(0, np.int64), pa.array([], pa.large_string())
    numbers = [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in encoded]
    return np.concatenate(numbers, dtype=np.int64), encoded[-1].dictionary


def keys_and_usable(results: Sequence[DecodeResults], references: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, by reference, the content keys [M, 16] and whether it can be used [M], from the results of all ranks."""
    key_MK, good_M = np.zeros((references, KEY), np.uint8), np.zeros(references, bool)
    for rank_results in results:
        reference, key = rank_results.good()
        key_MK[reference], good_M[reference] = key, True
    return key_MK, good_M


def keep_usable_rows(catalogue: Catalogue, results: Sequence[DecodeResults], unread: Sequence[Mapping[str, Any]],
                     max_bad: float) -> tuple[dict[str, Split], np.ndarray, np.ndarray, list[Mapping[str, Any]]]:
    """Turn the results of all M references, from all ranks, into kept rows and the ledger.

    Returns splits, the distinct content keys [D, 16], for each of them one reference index [D], and ledger entries,
    those of `unread` (what never became a row) first. kept + dropped = rows in, for every split. Raises UserError when
    more than `max_bad` of all rows would be dropped, or a split would be left empty.
    """
    key_MK, good_M = keys_and_usable(results, len(catalogue.references))
    image_M, usable = np.full(len(good_M), -1, np.int64), np.flatnonzero(good_M)
    image_M[usable], first = distinct(key_MK[usable])
    example_D = usable[first]
    problems: dict[int, BadSample] = {}
    for rank_results in results:
        problems |= rank_results.problems
    blank_P = is_blank(catalogue.titles)
    splits, ledger = {}, list(unread)
    for name in catalogue.splits:
        splits[name], dropped = _keep_usable_rows_of(catalogue, name, image_M, problems, blank_P)
        ledger += dropped
    check_bad_share(sum(map(len, catalogue.splits.values())) + dropped_rows(unread), ledger, max_bad)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"split {name!r} has no usable row ({describe_reasons(ledger)})")
    return splits, key_MK[example_D], example_D, ledger


def _keep_usable_rows_of(catalogue: Catalogue, name: str, image_M: np.ndarray, problems: Mapping[int, BadSample],
                         blank_P: np.ndarray) -> tuple[Split, list[dict[str, Any]]]:
    """Return the kept rows of one split, and ledger entries of the others."""
    image_N, title_N, negative_N = catalogue.image_N[name], catalogue.title_N[name], catalogue.negative_N[name]
    untitled_N = blank_P[title_N]
    good_N = (image_M[image_N] >= 0) & ~untitled_N
    ledger = []
    for row in np.flatnonzero(~good_N).tolist():
        problem = BadSample("no-title") if untitled_N[row] else problems[int(image_N[row])]
        path = shown_name(catalogue.references[image_N[row]].as_py()) or None
        ledger.append({"split": name, "row": row, "image": path, "title": catalogue.title(name, row),
                       "reason": problem.reason, "detail": problem.detail})
    kept = np.flatnonzero(good_N)
    kept_negative = None
    if negative_N is not None:
        negative_N = np.where(np.append(blank_P, True)[negative_N], -1, negative_N)
        if (negative_N >= 0).any():
            kept_negative = torch.from_numpy(negative_N[kept])
    image, title = torch.from_numpy(image_M[image_N[kept]]), torch.from_numpy(title_N[kept])
    return Split(name, kept, image, title, kept_negative), ledger


def check_bad_share(rows: int, ledger: Sequence[Mapping[str, Any]], max_bad: float) -> None:
    """Raise UserError, with the reasons, when more than a share `max_bad` of all rows is in the ledger."""
    dropped = dropped_rows(ledger)
    if dropped > max_bad * rows:
        missing = any(entry["reason"] == "missing-file" for entry in ledger)
        folder = ", name their folder with --image-root" if missing else ""
        raise UserError(f"{dropped:,} of {rows:,} rows cannot be used ({describe_reasons(ledger)}); mend them{folder} "
                        f"or raise --max-bad (now {100 * max_bad:.3g}%)")


def describe_reasons(ledger: Sequence[Mapping[str, Any]]) -> str:
    """Return the reasons in a ledger and how many rows each dropped, most frequent first, with one example."""
    counts = Counter[str]()
    for entry in ledger:
        counts[entry["reason"]] += dropped_rows([entry])
    first = next((entry for entry in ledger if dropped_rows([entry])), None)
    if first is None:
        return "it is empty"
    shown = ", ".join(f"{reason} {count}" for reason, count in counts.most_common() if count)
    return f"{shown}; e.g. {first.get('image') or place_of(first)}: {first['detail'] or first['reason']}"


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """Return 16-byte keys as one uint8 array [n, 16]."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
