"""Rows -> distinct inputs; verdicts on them -> kept rows and the ledger. Nothing here opens an image.

Dimension key: M distinct image references, P distinct titles, N rows of a split, D distinct images by content.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import BadSample, UserError
from data.rows import Rows, image_names

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Catalogue:
    """The distinct inputs of all splits, and which of them each row holds."""

    splits: Mapping[str, Rows]
    references: pa.StructArray  # M distinct images: bytes or path
    titles: pa.StringArray  # P distinct titles, negatives among them
    image_N: Mapping[str, np.ndarray]  # split -> index into references
    title_N: Mapping[str, np.ndarray]  # split -> index into titles
    negative_N: Mapping[str, np.ndarray | None]  # likewise, -1 where a row has no negative


class Verdict(NamedTuple):
    """What became of one image reference: its content key, or why it cannot be used."""

    reference: int
    key: bytes
    problem: BadSample | None
    pixels: np.ndarray | None = None


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


def catalogue(splits: Mapping[str, Rows]) -> Catalogue:
    """Find the distinct image references and titles of all splits, vectorised."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = list(splits)
    ends = np.cumsum([len(splits[name]) for name in names])
    images = pa.chunked_array([chunk for rows in splits.values() for chunk in rows.image.chunks])
    name_of = image_names(images)
    encoded = name_of.combine_chunks().dictionary_encode()
    image_all = encoded.indices.to_numpy(zero_copy_only=False)
    first = np.unique(image_all, return_index=True)[1]
    references = images.take(pa.array(first)).combine_chunks()

    columns = [rows.title for rows in splits.values()]
    columns += [rows.title_neg for rows in splits.values() if rows.title_neg is not None]
    text = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()).combine_chunks()
    coded = text.dictionary_encode()
    text_all = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    negative_N: dict[str, np.ndarray | None] = {}
    at = int(ends[-1])
    for name in names:
        count = len(splits[name]) if splits[name].title_neg is not None else 0
        negative_N[name] = text_all[at : at + count] if count else None
        at += count
    parts = dict(zip(names, np.split(image_all, ends[:-1]), strict=True))
    titles = dict(zip(names, np.split(text_all[: ends[-1]], ends[:-1]), strict=True))
    return Catalogue(splits, references, coded.dictionary, parts, titles, negative_N)


def settle(found: Catalogue, verdicts: Sequence[Verdict], lost: Sequence[Mapping[str, Any]], max_bad: float) -> tuple[
        dict[str, Split], np.ndarray, np.ndarray, list[Mapping[str, Any]]]:
    """Turn verdicts on all M references into kept rows and the ledger.

    Returns splits, the distinct content keys [D, 16], for each of them one reference index [D], and ledger entries,
    those of `lost` (what never became a row) first. kept + dropped = rows in, for every split. Raises UserError when
    more than `max_bad` of all rows would go, or a split would be left empty.
    """
    content: dict[bytes, int] = {}
    image_of = np.full(len(found.references), -1, np.int64)
    example: list[int] = []
    problems: dict[int, BadSample] = {}
    for verdict in sorted(verdicts, key=lambda v: v.reference):
        if verdict.problem is not None:
            problems[verdict.reference] = verdict.problem
            continue
        if verdict.key not in content:
            content[verdict.key] = len(content)
            example.append(verdict.reference)
        image_of[verdict.reference] = content[verdict.key]
    empty = {i for i, title in enumerate(found.titles.to_pylist()) if not title.strip()}
    splits, ledger = {}, list(lost)
    for name in found.splits:
        splits[name], dropped = _settle_split(found, name, image_of, problems, empty)
        ledger += dropped
    refuse_if_too_bad(sum(map(len, found.splits.values())) + len(lost), ledger, max_bad)
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"split {name!r} has no usable row ({reasons(ledger)})")
    return splits, as_keys(list(content)), np.asarray(example, np.int64), ledger


def _settle_split(found: Catalogue, name: str, image_of: np.ndarray, problems: Mapping[int, BadSample],
                  empty: set[int]) -> tuple[Split, list[dict[str, Any]]]:
    image_N, title_N, negative_N = found.image_N[name], found.title_N[name], found.negative_N[name]
    untitled_N = np.isin(title_N, list(empty))
    good_N = (image_of[image_N] >= 0) & ~untitled_N
    ledger = []
    for row in np.flatnonzero(~good_N):
        problem = BadSample("no-title") if untitled_N[row] else problems[int(image_N[row])]
        ledger.append({"split": name, "row": int(row), "image": found.references[image_N[row]]["path"].as_py(),
                       "title": found.titles[title_N[row]].as_py(), "reason": problem.reason, "detail": problem.detail})
    if negative_N is not None:
        negative_N = np.where(np.isin(negative_N, list(empty)), -1, negative_N)
        if (negative_N < 0).all():
            negative_N = None
    kept = np.flatnonzero(good_N)
    return Split(name, kept, torch.from_numpy(image_of[image_N[kept]]), torch.from_numpy(title_N[kept]),
                 None if negative_N is None else torch.from_numpy(negative_N[kept])), ledger


def refuse_if_too_bad(rows: int, ledger: Sequence[Mapping[str, Any]], max_bad: float) -> None:
    """Raises UserError when more than a share `max_bad` of all rows is in the ledger, with the reasons."""
    if len(ledger) > max_bad * rows:
        raise UserError(f"{len(ledger):,} of {rows:,} rows cannot be used ({reasons(ledger)}); mend them or raise "
                        f"--max-bad (now {100 * max_bad:.3g}%)")


def reasons(ledger: Sequence[Mapping[str, Any]]) -> str:
    """The reasons in a ledger, most frequent first, with one example."""
    if not ledger:
        return "it is empty"
    counts = Counter(entry["reason"] for entry in ledger).most_common()
    first = ledger[0]
    return ", ".join(f"{reason} {count}" for reason, count in counts) + (
        f"; e.g. {first['image'] or 'row ' + str(first['row'])}: {first['detail'] or first['reason']}")


def as_keys(keys: Sequence[bytes]) -> np.ndarray:
    """16-byte keys as one uint8 array [n, 16]."""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
