"""Dividing one split into three; rows that share a title or an image stay together.

Dimension key: N rows, M image references, K bytes of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from data.agreement import require_same_images
from data.batch import ALONE, Team, share
from data.catalogue import Catalogue, DecodeResults, build_catalogue, keys_and_usable
from data.cold import decode_distinct
from data.identity import TitleIds, clip_words, distinct
from data.images.reader import Reader
from data.images.worker import ToKey
from data.ledger import discard
from data.sources.labels import class_codes
from data.sources.rows import Rows
from data.sources.split_names import SPLITS
from data.store.segments import key_of
from data.store.stat_cache import StatCache
from data.titles import is_blank

HELD_OUT = 0.15  # share of valid, and of test, when a dataset has one split only


@dataclass(frozen=True)
class ContentReader:
    """Reads images for their content keys; ranks share the work, unchanged files are not read again."""

    reader: Reader
    cache: Path
    log: Callable[[str], None] = discard
    team: Team = ALONE

    def keys(self, inputs: Catalogue) -> np.ndarray:
        """Return the content key of each reference, uint8 [M, K]; one that cannot be read has a key of its own."""
        M, team = len(inputs.references), self.team
        own = np.arange(*share(M, team.rank, team.size))
        stats = StatCache(self.cache / "seen", inputs.references, self.reader.folder)
        require_same_images(stats, self.reader, team)
        is_known = stats.known[own]
        results = DecodeResults()
        for result in decode_distinct(inputs, self.reader, own[~is_known].tolist(), ToKey(), self.log):
            results.add(result)
        key_MK, good_M = keys_and_usable(stats.exchange(results, own[is_known], team), M)
        for reference in np.flatnonzero(~good_M):
            key_MK[reference] = np.frombuffer(key_of(b"cannot be read: %d" % reference), np.uint8)
        return key_MK


def divide_lone_split(splits: Mapping[str, Rows], contents: ContentReader, seed: int,
                      titles: TitleIds | None = None) -> dict[str, Rows]:
    """Return the splits of a dataset: those it has, or train, valid and test of the one it has, 70/15/15 by `seed`.

    Rows with the same image or the same title stay together, by content: all images are read (fetched, if they are
    URLs) but not decoded. Rows that cannot be used take part, so that the split does not depend on what decodes. The
    same rows, content and seed give the same split with any model and with none; but a model's `titles` also keep
    titles together that are the same only because they are cut, see `clip_words`. Where titles are class names, each
    class is divided by its images instead.
    """
    if list(splits) != ["train"]:
        return dict(splits)
    rows = splits["train"]
    # By the words of titles, not by a model's tokens: the split is the same for every model.
    inputs = build_catalogue(splits, replace(clip_words(), cache=contents.cache / "seen"))
    image_N = distinct(contents.keys(inputs))[0][inputs.image_N["train"]]
    image_N = _codes(image_N, _has_no_image(inputs))
    if rows.label is not None:
        parts = stratified_split(seed, class_codes(rows), image_N)
    else:
        codes = [image_N, _title_codes(inputs)]
        if titles is not None:
            codes.append(_title_codes(build_catalogue(splits, titles)))
        parts = three_way_split(seed, *codes)
    del inputs  # the rows are copied now, beside the undivided ones
    return {name: replace(rows.take(part), name=name) for name, part in parts.items()}


def _has_no_image(inputs: Catalogue) -> np.ndarray:
    """Return which rows of the one split name no image, bool [N]."""
    import pyarrow.compute as pc

    return pc.equal(inputs.references, "").to_numpy(zero_copy_only=False)[inputs.image_N["train"]]


def _title_codes(inputs: Catalogue) -> np.ndarray:
    title_N = inputs.title_N["train"]
    return _codes(title_N, is_blank(inputs.titles)[title_N])


def _codes(code_N: np.ndarray, alone_N: np.ndarray) -> np.ndarray:
    """Return the codes int64 [N], with a code of its own for each row of `alone_N`."""
    code_N = code_N.astype(np.int64)
    code_N[alone_N] = code_N.max(initial=0) + 1 + np.arange(alone_N.sum())
    return code_N


def three_way_split(seed: int, *codes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the row numbers of train, valid and test, 70/15/15 by `seed`; an empty one is absent.

    Rows that share a code, directly or through others, stay together. `codes` are int64 [N].

    Groups go first, largest first, each to the split that is emptiest for its size and has room (else to train); then
    the other rows, shuffled, fill what is missing. A group larger than 15 % therefore trains.
    """
    group_N = components(*codes)
    N = len(group_N)
    size_N = np.bincount(group_N, minlength=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).numpy()
    held = max(1, round(HELD_OUT * N)) if N >= 3 else 0  # two rows cannot fill three splits
    goal = [N - 2 * held, held, held]
    room = goal.copy()
    split_N = np.zeros(N, np.int8)  # of each group, at the place of its first row
    groups = order[size_N[order] > 1]
    for group in groups[np.argsort(-size_N[groups], kind="stable")]:
        size = int(size_N[group])
        best = max((k for k in range(3) if room[k] >= size), key=lambda k: room[k] / goal[k], default=0)
        split_N[group] = best
        room[best] -= size
    single = order[size_N[order] == 1]
    ends = np.cumsum(np.maximum(room, 0))
    ends = np.round(ends * len(single) / max(1, ends[-1])).astype(np.int64)
    for k, (first, last) in enumerate(pairwise([0, *ends])):
        split_N[single[first:last]] = k
    parts = {name: np.flatnonzero(split_N[group_N] == k) for k, name in enumerate(SPLITS)}
    return {name: part for name, part in parts.items() if len(part)}


def stratified_split(seed: int, class_N: np.ndarray, image_N: np.ndarray) -> dict[str, np.ndarray]:
    """Return the row numbers of train, valid and test, 70/15/15 of the images of each class by `seed`.

    All rows of an image stay together; one of several classes counts for that of its first row. A class of three images
    or more is in all splits, one of fewer trains.
    """
    group_N = components(image_N)
    class_of_group = class_N[group_N]
    split_N = np.zeros(len(class_N), np.int8)  # of each group, at the place of its first row
    groups = np.flatnonzero(group_N == np.arange(len(group_N)))
    groups = groups[np.argsort(class_of_group[groups], kind="stable")]
    ends = np.flatnonzero(np.diff(class_of_group[groups])) + 1
    for members in np.split(groups, ends):
        parts = three_way_split(seed, np.arange(len(members)))
        for name, part in parts.items():
            split_N[members[part]] = SPLITS.index(name)
    rows = {name: np.flatnonzero(split_N[group_N] == k) for k, name in enumerate(SPLITS)}
    return {name: part for name, part in rows.items() if len(part)}


def components(*codes: np.ndarray) -> np.ndarray:
    """Return the connected components of rows that share a code, as the least row number of each row's component.

    Rows adopt the least number among those of equal code, their representatives adopt it with them (so it crosses a
    component in few rounds), and numbers are followed to where they lead; until nothing changes.
    """
    group = np.arange(len(codes[0]))
    while True:
        before = group.copy()
        for code in codes:
            least = np.full(code.max() + 1, len(code))
            np.minimum.at(least, code, group)
            np.minimum.at(group, group.copy(), least[code])
            group = np.minimum(group, least[code])
        group = group[group]
        if np.array_equal(group, before):
            return group
