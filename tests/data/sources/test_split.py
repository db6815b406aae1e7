"""One split made three: no picture and no title on two sides, the same three whoever asks."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import tiny_tokenizer
from scenes import scene_picture
from test_source import OPENSTAX, pairs, table, write

from data.cold import Reader
from data.identity import TitleIds, clip_words
from data.images.decode import ImageSpec
from data.sources.rows import Rows
from data.sources.source import load_splits
from data.sources.split import ContentReader, components, divide_lone_split
from data.web.limits import FetchPolicy


def split(dataset: Path, cache: Path, seed: int = 42, titles: TitleIds | None = None) -> dict[str, Rows]:
    """The splits of a dataset as every command makes them."""
    reader = Reader(cache / "fetched", ImageSpec.clip(), FetchPolicy(), 25_000_000, 2)
    rows = load_splits(str(dataset), embedded=cache / "embedded")
    return divide_lone_split(rows, ContentReader(reader, cache), seed, titles)


def naive_groups(*codes: list[int]) -> list[int]:
    """Flood from every row through the rows it shares a code with."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for kind, code in enumerate(codes):
        for row, value in enumerate(code):
            members[kind, value].append(row)
    group = [-1] * len(codes[0])
    for first in range(len(group)):
        reached = [first] if group[first] < 0 else []
        for row in reached:
            if group[row] < 0:
                group[row] = first
                reached += [other for kind, code in enumerate(codes) for other in members.pop((kind, code[row]), [])]
    return group


def test_groups_equal_a_naive_flood() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        rows = rng.randrange(1, 200)
        codes = [[rng.randrange(1 + rng.choice((rows // 4, rows, 4 * rows))) for _ in range(rows)] for _ in range(2)]
        assert components(*map(np.array, codes)).tolist() == naive_groups(*codes)
    chain = np.random.default_rng(0).permutation(20_001)  # one component whose ends are 20,000 rows apart
    assert (components(chain // 2, (chain + 1) // 2) == 0).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("rows", "variety"), [(1, 1), (2, 9), (3, 99), (40, 20), (200, 60), (400, 9000)])
def test_one_split_becomes_three_and_keeps_sharing_rows_together(
        tmp_path: Path, rows: int, variety: int, seed: int) -> None:
    rng = random.Random(seed)
    titles = [f"title {rng.randrange(variety)}" if rng.random() < 0.9 else "" for _ in range(rows)]
    images = [rng.choice([None, b"%d" % rng.randrange(variety)]) for _ in range(rows)]
    path = write(tmp_path / "pairs.parquet", {"image": pa.array(images, pa.binary()), "title": titles})
    splits = split(path, tmp_path, seed)
    parts = {name: pairs(part) for name, part in splits.items()}
    assert sorted(map(str, [row for part in parts.values() for row in part])) == sorted(
        map(str, zip([image or "" for image in images], titles, [None] * rows, strict=True)))
    assert all(part.name == name and len(part) for name, part in splits.items()) and "train" in splits
    for place in (0, 1):
        homes: dict[object, set[str]] = defaultdict(set)
        for name, part in parts.items():
            for row in part:
                homes[row[place]].add(name)
        homes.pop("", None)
        assert all(len(names) == 1 for names in homes.values())
    if variety > 10 * rows:
        held = max(1, round(0.15 * rows))
        assert [len(part) for part in splits.values()] == [rows - 2 * held, held, held]
        assert split(path, tmp_path, seed + 1)["train"].fingerprint() != splits["train"].fingerprint()
    again = split(path, tmp_path, seed)
    assert {name: part.fingerprint() for name, part in again.items()} == {
        name: part.fingerprint() for name, part in splits.items()}


@pytest.mark.parametrize(("shared", "sizes"), [
    ((80,), (80, 10, 10)), ((40, 40), (80, 10, 10)), ((70, 15), (70, 15, 15)), ((100,), (100,))])
def test_a_title_that_many_rows_share_trains(tmp_path: Path, shared: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    titles = [f"Video {group}" for group, size in enumerate(shared) for _ in range(size)]
    titles += [f"title {i}" for i in range(len(titles), 100)]
    splits = split(write(tmp_path / "pairs.csv", table(100, title=titles)), tmp_path)
    assert tuple(map(len, splits.values())) == sizes


def homes(splits: dict[str, Rows], what: list[object]) -> dict[object, set[str]]:
    """In which splits each of `what` lies; one for each row, whose title ends with `#` and its number."""
    found: dict[object, set[str]] = defaultdict(set)
    for name, rows in splits.items():
        for title in rows.title.to_pylist():
            found[what[int(title.rpartition("#")[2])]].add(name)
    return found


def test_a_picture_under_two_names_stays_on_one_side(tmp_path: Path) -> None:
    """Else the test split measures pictures that were trained on: as copies of a file, or embedded and as a file."""
    (tmp_path / "images").mkdir()
    for picture in range(40):
        scene_picture(picture).save(tmp_path / f"images/a{picture}.jpg")
        shutil.copy(tmp_path / f"images/a{picture}.jpg", tmp_path / f"images/b{picture}.jpg")
    data = [(tmp_path / f"images/a{picture}.jpg").read_bytes() for picture in range(40)]
    data[0] = b"<html>"  # no picture, and yet the same
    for name in "ab":
        (tmp_path / f"images/{name}0.jpg").write_bytes(data[0])
    files = [f"images/{name}{picture}.jpg" for picture in range(40) for name in "ab"]
    titles = [f"title #{row}" for row in range(80)]
    named = split(write(tmp_path / "named.csv", {"image": files, "title": titles}), tmp_path)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": data[row // 2], "path": None} if row % 2 else {"bytes": None, "path": file}
                       for row, file in enumerate(files)], kind)
    mixed = split(write(tmp_path / "mixed.parquet", {"image": images, "title": titles}), tmp_path)
    for splits in (named, mixed):
        assert {name: len(rows) for name, rows in splits.items()} == {"train": 56, "valid": 12, "test": 12}
        assert all(len(names) == 1 for names in homes(splits, [row // 2 for row in range(80)]).values())
    assert {name: rows.title.to_pylist() for name, rows in named.items()} == {
        name: rows.title.to_pylist() for name, rows in mixed.items()}


def test_titles_that_a_model_reads_alike_stay_on_one_side(tmp_path: Path) -> None:
    """Else a test title was trained on in other letters, blanks or, with the model at hand, behind its last token."""
    words = [f"How to caf\u00e9 {number}" for number in range(60)]
    titles = [spell(word) for word in words for spell in (str.upper, lambda word: f"  {word.lower()}\u00a0")]
    rows = table(120, title=titles)
    path = write(tmp_path / "pairs.csv", rows)
    splits = split(path, tmp_path)
    assert {name: len(part) for name, part in splits.items()} == {"train": 84, "valid": 18, "test": 18}
    sides = {name: {" ".join(title.lower().split()) for title in part.title.to_pylist()}
             for name, part in splits.items()}
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == 60
    titles = [f"{'word ' * 90}{number} #{2 * number + twin}" for number in range(60) for twin in (0, 1)]
    read = TitleIds(tiny_tokenizer(), 77)
    long = write(tmp_path / "long.csv", table(120, title=titles[:2] + [f"t #{row}" for row in range(2, 120)]))
    for seed in range(6):
        assert len(homes(split(long, tmp_path, seed, read), [0, 0, *range(2, 120)])[0]) == 1


def test_every_command_makes_the_same_three(tmp_path: Path) -> None:
    """Else `check` speaks of another test split than the one a run measures."""
    rng = random.Random(0)
    titles = [rng.choice((f"Title {rng.randrange(90)}", f"TITLE  {rng.randrange(90)}", "")) for _ in range(200)]
    path = write(tmp_path / "pairs.csv", table(200, title=titles))
    bare = split(path, tmp_path)
    assert len(bare) == 3 and sum(map(len, bare.values())) == 200
    readers = (None, TitleIds(tiny_tokenizer(), 77), clip_words())
    for cache, read in zip((tmp_path / "other", tmp_path, tmp_path), readers, strict=True):
        again = split(path, cache, 42, read)
        assert {name: rows.fingerprint() for name, rows in again.items()} == {
            name: rows.fingerprint() for name, rows in bare.items()}


@pytest.mark.skipif(not OPENSTAX.is_dir(), reason="the development data is not here")
def test_real_pairs_are_split_by_size(tmp_path: Path) -> None:
    three = split(OPENSTAX / "train.csv", tmp_path)
    assert {name: len(rows) for name, rows in three.items()} == {"train": 708, "valid": 152, "test": 152}
