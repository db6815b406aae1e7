"""Rows -> distinct inputs; verdicts on them -> kept rows and the ledger. Nothing here opens an image.

Dimension key: M distinct image references, P distinct titles, N rows of a split, D distinct images by content.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, UserError
from data.identity import TitleIds, clip_words, distinct
from data.ledger import dropped_rows, place_of
from data.sources.rows import Rows, image_names
from data.store.segments import KEY
from data.titles import is_blank

if TYPE_CHECKING:
    import pyarrow as pa


class References:
    """M distinct images, each bytes or a path, where the splits have them: images embedded in a dataset that is mapped
    from disk stay there until one is asked for.
    """

    def __init__(self, images: pa.ChunkedArray, row_M: np.ndarray) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self._images, self._row_M = images, row_M
        self.path: pa.ChunkedArray = pc.struct_field(images, "path").take(pa.array(row_M))  # null where embedded

    def __len__(self) -> int:
        return len(self._row_M)

    def __getitem__(self, index: int) -> pa.StructScalar:
        return self._images[int(self._row_M[index])]


@dataclass(frozen=True)
class Catalogue:
    """The distinct inputs of all splits, and which of them each row holds."""

    splits: Mapping[str, Rows]
    references: References
    titles: pa.StringArray  # P distinct titles, negatives among them, each as it is first spelt
    title_keys: np.ndarray  # [P, 16] uint8
    image_N: Mapping[str, np.ndarray]  # split -> index into references
    title_N: Mapping[str, np.ndarray]  # split -> index into titles
    negative_N: Mapping[str, np.ndarray | None]  # likewise, -1 where a row has no negative

    def title(self, split: str, row: int) -> str:
        """The title of a row as the row spells it."""
        return str(self.splits[split].title[row].as_py())


class DecodeResult(NamedTuple):
    """What became of one image reference: its content key, or why it cannot be used."""

    reference: int
    key: bytes
    problem: BadSample | None
    pixels: np.ndarray | None = None


class DecodeResults:
    """Verdicts on many references in two arrays, without pixels; a Python object for each that failed, for no other.

    Iterating makes them again, one at a time.
    """

    def __init__(self) -> None:
        self._reference, self._key = array("q"), bytearray()
        self.problems: dict[int, BadSample] = {}

    def add(self, verdict: DecodeResult) -> None:
        """Take one down."""
        if verdict.problem is not None:
            self.problems[verdict.reference] = verdict.problem
        self._reference.append(verdict.reference)
        self._key += verdict.key or bytes(KEY)

    def __len__(self) -> int:
        return len(self._reference)

    def __iter__(self) -> Iterator[DecodeResult]:
        for at, reference in enumerate(self._reference):
            problem = self.problems.get(reference)
            yield DecodeResult(reference, b"" if problem else bytes(self._key[KEY * at : KEY * (at + 1)]), problem)

    def good(self) -> tuple[np.ndarray, np.ndarray]:
        """The references that can be used, and the keys of their content, uint8 [n, 16]."""
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
    negative_N: Tensor | None

    def __len__(self) -> int:
        return len(self.row_N)


def catalogue(splits: Mapping[str, Rows], read: TitleIds | None = None) -> Catalogue:
    """Find the distinct image references and titles of all splits, vectorised; titles as `read` by a model or, where
    none is loaded, as any CLIP model would (`clip_words`).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = list(splits)
    ends = np.cumsum([len(splits[name]) for name in names])
    images = pa.chunked_array([chunk for rows in splits.values() for chunk in rows.image.chunks])
    name_of = image_names(images)
    encoded = name_of.combine_chunks().dictionary_encode()
    image_all = encoded.indices.to_numpy(zero_copy_only=False)
    first = np.unique(image_all, return_index=True)[1]

    columns = [rows.title for rows in splits.values()]
    columns += [rows.title_neg for rows in splits.values() if rows.title_neg is not None]
    text = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()).combine_chunks()
    coded = text.dictionary_encode()
    keys = (read or clip_words()).keys(coded.dictionary)
    number, first_P = distinct(keys)
    text_all = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    text_all = np.append(number, -1)[text_all]
    negative_N: dict[str, np.ndarray | None] = {}
    at = int(ends[-1])
    for name in names:
        count = len(splits[name]) if splits[name].title_neg is not None else 0
        negative_N[name] = text_all[at : at + count] if count else None
        at += count
    parts = dict(zip(names, np.split(image_all, ends[:-1]), strict=True))
    titles = dict(zip(names, np.split(text_all[: ends[-1]], ends[:-1]), strict=True))
    return Catalogue(splits, References(images, first), coded.dictionary.take(pa.array(first_P)), keys[first_P], parts,
                     titles, negative_N)


def keys_and_usable(verdicts: Sequence[DecodeResults], references: int) -> tuple[np.ndarray, np.ndarray]:
    """What several ranks found, by reference: content keys [M, 16], and whether it can be used [M]."""
    key_MK, good_M = np.zeros((references, KEY), np.uint8), np.zeros(references, bool)
    for each in verdicts:
        reference, key = each.good()
        key_MK[reference], good_M[reference] = key, True
    return key_MK, good_M


def keep_usable_rows(found: Catalogue, verdicts: Sequence[DecodeResults], lost: Sequence[Mapping[str, Any]], max_bad: float) -> tuple[
        dict[str, Split], np.ndarray, np.ndarray, list[Mapping[str, Any]]]:
    """Turn verdicts on all M references, as several ranks gave them, into kept rows and the ledger.

    Returns splits, the distinct content keys [D, 16], for each of them one reference index [D], and ledger entries,
    those of `lost` (what never became a row) first. kept + dropped = rows in, for every split. Raises UserError when
    more than `max_bad` of all rows would go, or a split would be left empty.
    """
    key_MK, good_M = keys_and_usable(verdicts, len(found.references))
    image_M, usable = np.full(len(good_M), -1, np.int64), np.flatnonzero(good_M)
    image_M[usable], first = distinct(key_MK[usable])
    example = usable[first]
    problems = {reference: problem for each in verdicts for reference, problem in each.problems.items()}
    blank_P = is_blank(found.titles)
    splits, ledger = {}, list(lost)
    for name in found.splits:
        splits[name], dropped = _settle_split(found, name, image_M, problems, blank_P)
        ledger += dropped
    check_bad_share(sum(map(len, found.splits.values())) + dropped_rows(lost), ledger, max_bad)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"split {name!r} has no usable row ({describe_reasons(ledger)})")
    return splits, key_MK[example], example, ledger


def _settle_split(found: Catalogue, name: str, image_M: np.ndarray, problems: Mapping[int, BadSample],
                  blank_P: np.ndarray) -> tuple[Split, list[dict[str, Any]]]:
    image_N, title_N, negative_N = found.image_N[name], found.title_N[name], found.negative_N[name]
    untitled_N = blank_P[title_N]
    good_N = (image_M[image_N] >= 0) & ~untitled_N
    ledger = []
    for row in np.flatnonzero(~good_N):
        problem = BadSample("no-title") if untitled_N[row] else problems[int(image_N[row])]
        ledger.append({"split": name, "row": int(row), "image": found.references[image_N[row]]["path"].as_py(),
                       "title": found.title(name, int(row)), "reason": problem.reason, "detail": problem.detail})
    if negative_N is not None:
        negative_N = np.where(np.append(blank_P, True)[negative_N], -1, negative_N)
        if (negative_N < 0).all():
            negative_N = None
    kept = np.flatnonzero(good_N)
    return Split(name, kept, torch.from_numpy(image_M[image_N[kept]]), torch.from_numpy(title_N[kept]),
                 None if negative_N is None else torch.from_numpy(negative_N[kept])), ledger


def check_bad_share(rows: int, ledger: Sequence[Mapping[str, Any]], max_bad: float) -> None:
    """Raises UserError when more than a share `max_bad` of all rows is in the ledger, with the reasons."""
    dropped = dropped_rows(ledger)
    if dropped > max_bad * rows:
        raise UserError(f"{dropped:,} of {rows:,} rows cannot be used ({describe_reasons(ledger)}); mend them or raise "
                        f"--max-bad (now {100 * max_bad:.3g}%)")


def describe_reasons(ledger: Sequence[Mapping[str, Any]]) -> str:
    """The reasons in a ledger and how many rows each dropped, most frequent first, with one example."""
    counts = Counter[str]()
    for entry in ledger:
        counts[entry["reason"]] += dropped_rows([entry])
    first = next((entry for entry in ledger if dropped_rows([entry])), None)
    if first is None:
        return "it is empty"
    shown = ", ".join(f"{reason} {count}" for reason, count in counts.most_common() if count)
    return f"{shown}; e.g. {first.get('image') or place_of(first)}: {first['detail'] or first['reason']}"


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """16-byte keys as one uint8 array [n, 16]."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
