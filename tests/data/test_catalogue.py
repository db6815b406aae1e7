"""Verdicts become rows and a ledger as the rule says, written out naively; titles without an object each."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data import titles as module
from data.batch import BadSample, UserError
from data.catalogue import DecodeResult, DecodeResults, _encoded, build_catalogue, check_bad_share, keep_usable_rows
from data.identity import clip_words
from data.sources.rows import Rows
from data.store.segments import key_of
from data.titles import TokenLists, is_blank


def make_rows(name: str, rng: random.Random, count: int) -> Rows:
    images = [rng.choice([f"/x/{rng.randrange(30)}.jpg", ""]) for _ in range(count)]
    texts = [rng.choice(["", " \t", "\x1c", "\u3000", f"title {rng.randrange(20)}"]) for _ in range(count)]
    negatives = [rng.choice([None, " ", f"title {rng.randrange(25)}"]) for _ in range(count)]
    return Rows(name, pa.chunked_array([pa.array(images)]), pa.chunked_array([pa.array(texts)]),
                pa.chunked_array([pa.array(negatives, pa.string())]))


@pytest.mark.parametrize("seed", range(8))
def test_kept_and_dropped_rows_are_those_of_the_rule(seed: int) -> None:
    rng = random.Random(seed)
    splits = {name: make_rows(name, rng, rng.randrange(20, 60)) for name in ("train", "valid")}
    found = build_catalogue(splits)
    fate = {ref: BadSample("gone", f"no {ref}") if rng.random() < 0.2 or not found.references[ref].as_py()
            else key_of(b"%d" % rng.randrange(12)) for ref in range(len(found.references))}
    ranks = [DecodeResults() for _ in range(3)]
    for ref in rng.sample(sorted(fate), len(fate)):
        end = fate[ref]
        ranks[ref % 3].add(DecodeResult(ref, b"", end) if isinstance(end, BadSample) else DecodeResult(ref, end, None))
    ranks = pickle.loads(pickle.dumps(ranks))  # as ranks exchange them
    assert sum(map(len, ranks)) == len(fate)
    for verdict in (one for each in ranks for one in each):
        bad = fate[verdict.reference]
        assert verdict.key == bad if verdict.problem is None else str(verdict.problem) == str(bad)
    lost = [{"shard": "s", "key": "k", "reason": "truncated", "detail": "", "image": None, "row": 0}]
    kept, keys, example, ledger = keep_usable_rows(found, ranks, lost, 1.0)
    assert ledger[0] is lost[0] and sum(map(len, splits.values())) + 1 == len(ledger) + sum(map(len, kept.values()))
    assert len(set(map(bytes, keys))) == len(keys)
    assert all(fate[int(ref)] == bytes(key) for ref, key in zip(example, keys, strict=True))
    assert list(example) == sorted(example)
    for name, rows in splits.items():
        dropped = {entry["row"]: entry["reason"] for entry in ledger[1:] if entry["split"] == name}
        negatives, negative_N = rows.title_neg, kept[name].negative_N
        assert negatives is not None and negative_N is not None
        for row in range(len(rows)):
            title, negative = rows.title[row].as_py(), negatives[row].as_py()
            image = fate[int(found.image_N[name][row])]
            expected = "no-title" if not title.strip() else "gone" if isinstance(image, BadSample) else None
            assert dropped.get(row) == expected
            if expected is None:
                at = int(np.flatnonzero(kept[name].row_N == row)[0])
                assert bytes(keys[kept[name].image_N[at]]) == image
                assert found.titles[int(kept[name].title_N[at])].as_py() == title
                other = int(negative_N[at])
                assert (found.titles[other].as_py() if other >= 0 else None) == (
                    negative if negative and negative.strip() else None)
    with pytest.raises(UserError, match=r"rows cannot be used \(.*(gone|no-title) \d+.*--max-bad \(now 5%\)"):
        keep_usable_rows(found, ranks, lost, 0.05)


def test_titles_in_pieces_equal_titles_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    rng = random.Random(1)
    some = [rng.choice(["", " ", "a", "日本", "x" * 50]) + str(n) * (n % 3) for n in range(50)]
    words = clip_words()
    assert (words.keys(pa.array(some)) == np.concatenate([words.keys(pa.array([title])) for title in some])).all()
    assert is_blank(pa.array(some)).tolist() == [not title.strip() for title in some]
    assert words.keys(pa.array([], pa.string())).shape == (0, 16) and len(is_blank(pa.array([], pa.string()))) == 0
    lists = [[rng.randrange(49408) for _ in range(rng.randrange(5))] for _ in range(40)]
    packed = TokenLists.of(iter(lists))
    assert list(packed) == lists and packed[-1] == lists[-1] and len(TokenLists.of(iter([]))) == 0
    for part in (slice(0, 0), slice(3, 20), slice(20, 99), slice(None), slice(30, 10)):
        assert list(packed[part]) == lists[part] and len(packed[part]) == len(lists[part])
    with pytest.raises(IndexError):
        packed[40]


def test_values_are_numbered_alike_in_chunks_and_at_once() -> None:
    """Else a table that is read in several chunks pairs images with the titles of other rows."""
    rng = random.Random(2)
    values = [rng.choice(["", None, "a", "日本", *"bcdefghij"]) for _ in range(60)]
    chunks = [pa.array(part, pa.string()) for part in (values[:7], [], values[7:20], values[20:])]
    numbers, texts = _encoded(chunks)
    assert [None if number < 0 else texts[number].as_py() for number in numbers.tolist()] == values
    assert texts.to_pylist() == [*dict.fromkeys(value for value in values if value is not None)]
    assert [len(part) for part in _encoded([])] == [0, 0]


def test_too_many_bad_rows_are_refused_with_an_example_of_any_kind() -> None:
    """Samples that a shard has lost have no row number; files that were not used are no rows."""
    sample: dict[str, Any] = {"shard": "/x/one.tar", "key": "7", "reason": "no-title", "detail": ""}
    joined: dict[str, Any] = {"file": "/x/all.csv", "row": 3, "image": None, "title": None, "reason": "open-quote",
                              "detail": "line 5", "rows": 8}
    unused: dict[str, Any] = {"file": "/x", "reason": "linked-folder", "detail": "e.g. /x/y", "rows": 0, "files": 1000}
    check_bad_share(100, [unused, sample], 0.01)
    for ledger, said in (([unused, sample, sample], "2 of 100 rows .*no-title 2; e.g. /x/one.tar, 7: no-title"),
                         ([joined, sample], "9 of 100 rows .*open-quote 8, no-title 1; e.g. /x/all.csv, row 3: ")):
        with pytest.raises(UserError, match=said):
            check_bad_share(100, ledger, 0.01)
