"""Check a dataset before any GPU time: unusable rows, repeats, leaks from one split into another.

Dimension key: M image references, P distinct titles, N rows of a split, S splits. An image is named by the number of
the first reference with its content, a title by a number that equal titles share; -1 is none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.batch import BadSample
from data.catalogue import Catalogue, build_catalogue
from data.check.findings import SEVERITIES, TINY, Finding
from data.check.similar import CROWD, LOOK, PASSES, ToSignature, crowded, first_similar
from data.cold import decode_distinct
from data.identity import distinct
from data.images.reader import Reader
from data.ledger import dropped_rows
from data.progress import Progress
from data.sources.embedded import shown_name
from data.sources.labels import class_codes
from data.sources.rows import Rows
from data.store.segments import KEY
from data.text import hide_secrets, printable
from data.titles import is_blank, text_slices

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 5
NA_TITLES = {"na", "n/a", "none", "null", "nil", "nan", "-"}
# CLIP reads 75 tokens of a title. Without a tokenizer their number is estimated: each of these pieces is one or more.
# More than 70 have 1,254 of 1,279 English texts that are too long, and 22 of 4,106 that are not.
PIECE, TOO_MANY_PIECES = r"[A-Za-z]{1,12}|[^\s\pZA-Za-z]", 70


def check(rows: Mapping[str, Rows], reader: Reader, log: Callable[[str], None],
          unread: Sequence[Mapping[str, Any]] = ()) -> tuple[list[Finding], dict[str, int]]:
    """Open every image and read every title once; return the findings, worst first, and usable rows of each split.

    `unread`: ledger entries of rows that could not be read. Rows count from 0, as in the ledger. The reader's spec is
    not used: what decodes for one model decodes for all. Images are the same when their bytes are, titles when CLIP
    reads the same words (`data.identity`); exact but for titles longer than a model's 77 tokens that differ only behind
    them, which that model takes for one title. Memory: under 1 KB a row, and no pixels.
    """
    inputs = build_catalogue(rows)
    image_M, looks_M, problems = _signatures(inputs, reader, log)
    flaw_P = _flaws(inputs.titles)
    title_P = np.append(np.where(flaw_P == "no-title", -1, np.arange(len(flaw_P))), -1)
    findings = _unread(unread)
    for name in rows:
        findings += _images(inputs, name, image_M, looks_M["side"], problems)
        findings += _texts(inputs, name, flaw_P, title_P)
    findings += _repeats(inputs, image_M, title_P, _similar(inputs, image_M, looks_M, log))
    place = {name: number for number, name in enumerate(rows)}
    usable = {}
    for name in rows:
        has_image_N = image_M[inputs.image_N[name]] >= 0
        has_title_N = flaw_P[inputs.title_N[name]] != "no-title"
        usable[name] = int((has_image_N & has_title_N).sum())
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), place.get(finding.split, -1)))
    return findings, usable


def _finding(split: str, kind: str, severity: str, is_so_N: np.ndarray, show: Callable[[int], str]) -> list[Finding]:
    """Return the finding of the rows `is_so_N` [N], with the first of them as examples; [] for none."""
    row_N = np.flatnonzero(is_so_N)
    examples = tuple(f"row {row}: {show(row)}" for row in row_N[:EXAMPLES].tolist())
    return [Finding(split, kind, severity, len(row_N), examples)] if len(row_N) else []


def _unread(unread: Sequence[Mapping[str, Any]]) -> list[Finding]:
    entries: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for entry in unread:
        entries[Path(entry.get("shard") or entry["file"]).name, entry["reason"]].append(entry)
    findings = []
    for (file, reason), alike in entries.items():
        rows = dropped_rows(alike)
        count = rows or sum(entry["files"] for entry in alike)
        examples = tuple(_unread_place(entry) for entry in alike[:EXAMPLES])
        findings.append(Finding(file, reason, "error" if rows else "warning", count, examples))
    return findings


def _unread_place(entry: Mapping[str, Any]) -> str:
    """Return the place of a ledger entry within its file, and its detail."""
    if not dropped_rows([entry]):
        return printable(entry["detail"])
    place = f"row {entry['row']}" if "row" in entry else entry["key"] or "(unknown sample)"
    return printable(f"{place}: {entry['detail']}")


def _signatures(inputs: Catalogue, reader: Reader, log: Callable[[str], None]) -> tuple[
        np.ndarray, np.ndarray, dict[int, BadSample]]:
    """Decode all references; return the image of each [M], its LOOK [M], and the problems of those that fail."""
    M = len(inputs.references)
    key_MK = np.zeros((M, KEY), np.uint8)
    looks_M = np.zeros(M, LOOK)
    problems: dict[int, BadSample] = {}
    for result in decode_distinct(inputs, reader, range(M), ToSignature(reader.max_pixels), log):
        if result.problem is not None:
            problems[result.reference] = result.problem
        else:
            key_MK[result.reference] = np.frombuffer(result.key, np.uint8)
            looks_M[result.reference] = result.pixels
    number_M, first = distinct(key_MK)
    # Failed references share the key of zeros: they are no image, rather than one image.
    image_M = first[number_M]
    image_M[list(problems)] = -1
    return image_M, looks_M, problems


def _flaws(titles: pa.LargeStringArray) -> np.ndarray:
    """Return the flaw of each title, "" for none, str [P]."""
    return np.concatenate([np.empty(0, object), *map(_flaws_of_some, text_slices(titles))])


def _flaws_of_some(titles: pa.LargeStringArray) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    flaw_P = np.full(len(titles), "", object)
    long_P = np.flatnonzero(pc.greater(pc.utf8_length(titles), TOO_MANY_PIECES))
    pieces = pc.count_substring_regex(titles.take(pa.array(long_P)), PIECE).to_numpy(zero_copy_only=False)
    flaw_P[long_P[pieces > TOO_MANY_PIECES]] = "long-title"
    short_P = np.flatnonzero(pc.less(pc.binary_length(titles), 1 << 10))
    names = pc.utf8_lower(pc.utf8_trim_whitespace(titles.take(pa.array(short_P))))
    is_na = pc.is_in(names, pa.array(sorted(NA_TITLES), names.type)).to_numpy(zero_copy_only=False)
    flaw_P[short_P[is_na]] = "na-title"
    flaw_P[is_blank(titles)] = "no-title"
    return flaw_P


def _images(inputs: Catalogue, name: str, image_M: np.ndarray, side_M: np.ndarray,
            problems: Mapping[int, BadSample]) -> list[Finding]:
    reference_N = inputs.image_N[name]
    flaw_N = np.where(side_M < TINY, "tiny-image", "").astype(object)[reference_N]
    for row in np.flatnonzero(image_M[reference_N] < 0):
        flaw_N[row] = problems[int(reference_N[row])].reason

    def show(row: int) -> str:
        path = _path(inputs, name, row)
        reference = int(reference_N[row])
        detail = f"{side_M[reference]} px"
        if reference in problems:
            detail = printable(problems[reference].detail)
        return detail if path in detail else f"{path} {detail}"

    findings = []
    for flaw in sorted(set(flaw_N) - {""}):
        severity = "warning" if flaw == "tiny-image" else "error"
        findings += _finding(name, flaw, severity, flaw_N == flaw, show)
    return findings


def _texts(inputs: Catalogue, name: str, flaw_P: np.ndarray, title_P: np.ndarray) -> list[Finding]:
    flaw_N = flaw_P[inputs.title_N[name]]
    title_N = title_P[inputs.title_N[name]]
    negative_N = inputs.negative_N[name]
    show = partial(_title, inputs, name)
    findings = _finding(name, "no-title", "error", flaw_N == "no-title", partial(_path, inputs, name))
    findings += _finding(name, "na-title", "hint", flaw_N == "na-title", show)
    findings += _finding(name, "long-title", "hint", flaw_N == "long-title", show)
    if negative_N is not None:
        negative_NH = title_P[negative_N]
        is_title_NH = (negative_NH == title_N[:, None]) & (title_N[:, None] >= 0)
        findings += _finding(name, "no-negative", "hint", (negative_NH < 0).all(1), show)
        findings += _finding(name, "negative-is-title", "error", is_title_NH.any(1), show)
    return findings


def _path(inputs: Catalogue, name: str, row: int) -> str:
    """Return the image of a row for people: its address or the end of its path; without either, the row's title."""
    reference = inputs.references[inputs.image_N[name][row]].as_py()
    path = hide_secrets(shown_name(reference))
    if reference and not path:
        return _title(inputs, name, row)
    return printable(path if "://" in path else "/".join(path.split("/")[-2:]))


def _title(inputs: Catalogue, name: str, row: int) -> str:
    title = inputs.title(name, row)
    return repr(printable(title if len(title) <= 60 else f"{title[:59]}…"))


def _repeats(inputs: Catalogue, image_M: np.ndarray, title_P: np.ndarray, similar_MS: np.ndarray) -> list[Finding]:
    """Find images and titles that a split's rows share with earlier rows of it, and with the splits before it."""
    names = list(inputs.splits)
    findings = []
    image = {name: image_M[inputs.image_N[name]] for name in names}
    title = {name: title_P[inputs.title_N[name]] for name in names}
    first_image = {name: _first_rows(image[name], len(image_M)) for name in names}
    first_title = {name: _first_rows(title[name], len(title_P)) for name in names}
    for place, name in enumerate(names):
        for other_place, other in enumerate(names[:place + 1]):
            titled_N = first_title[other][title[name]]
            titled_N[class_codes(inputs.splits[name]) >= 0] = -1  # class names repeat
            same_N = first_image[other][image[name]]
            similar_N = similar_MS[image[name], other_place]
            if other == name:
                for twin_N in (titled_N, same_N):
                    twin_N[twin_N == np.arange(len(twin_N))] = -1  # a row is no repeat of itself
                similar_N[similar_N > image[name]] = -1  # each pair of look-alikes counts once, at its later image
                # Several captions of one image, each in a row, are how datasets are made: a hint, not a repeat.
                is_caption_N = _is_caption(image[name], title[name]) & (same_N >= 0)
                findings += _finding(name, "several-titles", "hint", is_caption_N,
                                     partial(_beside, inputs, name, name, same_N.copy(), _path))
                same_N[is_caption_N] = -1
                kinds = "repeated-title", "repeated-image", "similar-image"
            else:
                similar_N[same_N >= 0] = -1
                kinds = f"title-in-{other}", f"image-in-{other}", f"similar-image-in-{other}"
            severities = "warning", "warning" if other == name else "error", "warning"
            twins = titled_N, same_N, first_image[other][similar_N]
            for kind, severity, twin_N, show in zip(kinds, severities, twins, (_title, _path, _path), strict=True):
                findings += _finding(name, kind, severity, twin_N >= 0,
                                     partial(_beside, inputs, name, other, twin_N, show))
    return findings


def _is_caption(image_N: np.ndarray, title_N: np.ndarray) -> np.ndarray:
    """Return for each row [N] whether all titles of its image differ: such rows are captions of it, not repeats."""
    pair_N = image_N * (title_N.max(initial=0) + 2) + title_N + 1
    _, pair_N, count = np.unique(pair_N, return_inverse=True, return_counts=True)
    is_repeat_N = (count[pair_N] > 1) & (title_N >= 0)
    return ~np.isin(image_N, image_N[is_repeat_N])


def _beside(inputs: Catalogue, name: str, other: str, twin_N: np.ndarray, show: Callable[[Catalogue, str, int], str],
            row: int) -> str:
    return f"{show(inputs, name, row)} and {other} row {twin_N[row]}: {show(inputs, other, int(twin_N[row]))}"


def _first_rows(label_N: np.ndarray, labels: int) -> np.ndarray:
    """Return the first row with each label [labels + 1]; -1 for none, and in the last place."""
    first = np.full(labels + 1, -1)
    row = np.flatnonzero(label_N >= 0)[::-1]  # the last to be written stays
    first[label_N[row]] = row
    return first


def _similar(inputs: Catalogue, image_M: np.ndarray, looks_M: np.ndarray, log: Callable[[str], None]) -> np.ndarray:
    """Return the first other image in each split that looks like each image [M + 1, S]; -1: none, and the last row."""
    is_in_MS = np.zeros((len(image_M), len(inputs.splits)), bool)
    for place, name in enumerate(inputs.splits):
        image_N = image_M[inputs.image_N[name]]
        is_in_MS[image_N[image_N >= 0], place] = True
    distinct = np.flatnonzero(image_M == np.arange(len(image_M)))
    similar_MS = np.full((len(image_M) + 1, len(inputs.splits)), -1)
    looks = looks_M[distinct]
    if many := crowded(looks["hash"]):
        log(f"{many:,} images are alike in structure, as plain ones are, in groups of more than {CROWD}: each of these "
            f"is compared with the {CROWD} next to it in structure and colour on either side, not with all")
    progress = Progress("passes of comparing images", PASSES, log)
    similar_MS[distinct] = np.append(distinct, -1)[first_similar(looks, is_in_MS[distinct], progress)]
    return similar_MS
