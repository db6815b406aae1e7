"""Titles are the same exactly when token ids are, with a model and without one; what splits share is counted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers import tiny_tokenizer

from data import identity
from data.identity import Contents, TitleIds, clip_words, describe_overlap, distinct, overlap
from data.images.decode import FastTokenizer, tokenize

VOCABULARY = Path(__file__).resolve().parents[3] / "shared" / "clip-tokenizer"
ALIKE = [  # titles that CLIP reads alike, a line each
    ["A Cat", "a cat", " a \t CAT\n", "a\u00a0cat", "a\u3000cat", "A\u2028cat"],
    ["cat !", "cat!", "CAT  !"], ["caf\u00e9", "cafe\u0301", "CAFE\u0301"], ["", " ", "\u2003"],
    ["it's", "IT'S", "it 's"],
    ["4 8", "48", " 4  8 "], ["\ufb01n"], ["fin"], ["\uff43at"], ["a-cat"], ["a - cat x"], ["acat"], ["\u200bcat"],
    ["cat\u200b"], ["\ufeffcat"], ["\x00"], ["\x1c"], ["a\x07cat"], ["\U0001f600"], ["\U0001f469\u200d\U0001f467"],
    ["\u0130stanbul"], ["istanbul", "ISTANBUL"], ["stra\u00dfe", "STRA\u1e9eE"], ["strasse", "STRASSE"], ["\u03c3"],
    ["\u03c2"],
    ["<|endoftext|>"], ["< |endoftext| >"], ["\u65e5\u672c"], ["\u65e5 \u672c"], ["\u1e9b\u0323"], ["K\u212a", "kk"],
    ["word " * 300 + "a", "Word  " * 300 + "A"], ["word " * 300 + "b"],
]
TITLES = [title for line in ALIKE for title in line]
CLASSES = [number for number, line in enumerate(ALIKE) for _ in line]


@pytest.fixture(params=["small vocabulary", "CLIP's"])
def tokenizer(request: pytest.FixtureRequest) -> object:
    if request.param == "small vocabulary":
        return tiny_tokenizer()
    if not VOCABULARY.is_dir():
        pytest.skip("needs CLIP's vocabulary")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(VOCABULARY)


def classes(ids: Sequence[object]) -> list[int]:
    """For each item the place of the first that equals it."""
    return [ids.index(one) for one in ids]


def test_titles_are_alike_without_a_model_where_they_are_with_one(tokenizer: FastTokenizer) -> None:
    """Else `check`, `shards` and a run disagree about which titles are the same."""
    whole = distinct(clip_words().keys(pa.array(TITLES)))[0]
    ids = tokenize(tokenizer, TITLES, 1 << 20)
    assert classes(whole.tolist()) == classes(ids)
    assert classes(ids) == classes(CLASSES)
    cut = distinct(TitleIds(tokenizer, 77).keys(pa.array(TITLES)))[0]
    assert classes(cut.tolist()) == classes(tokenize(tokenizer, TITLES, 77))
    assert cut[TITLES.index("word " * 300 + "a")] == cut[TITLES.index("word " * 300 + "b")]


def test_kept_keys_are_those_of_these_titles_and_this_tokenizer(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CHUNK", 2)
    titles = pa.array(["a", "B", "b", "c d"])
    read, others = TitleIds(tiny_tokenizer(), 77, "tiny", tmp_path), pa.array(["a", "Bb", "", "c d"])
    first = read.keys(titles)
    (file,) = tmp_path.glob("titles-*.npz")
    monkeypatch.setattr(TitleIds, "tokens", lambda *_: pytest.fail("tokenized again"))
    assert (read.keys(titles) == first).all() and (first[1] == first[2]).all()
    assert (read.keys(pa.concat_arrays([pa.array(["x"]), titles]).slice(1)) == first).all()
    monkeypatch.undo()
    monkeypatch.setattr(identity, "CHUNK", 2)
    assert (read.keys(others)[1] != first[1]).any() and len([*tmp_path.glob("titles-*.npz")]) == 2
    broken = bytearray(file.read_bytes())
    broken[len(broken) // 2] ^= 1
    file.write_bytes(broken)
    assert (read.keys(titles) == first).all()


def test_distinct_numbers_in_the_order_they_come() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 3, (300, 16), np.uint8) * (rng.random((300, 16)) < 0.05)  # many repeats, many trailing zeros
    number, first = distinct(keys.astype(np.uint8))
    seen: dict[bytes, int] = {}
    assert number.tolist() == [seen.setdefault(key.tobytes(), len(seen)) for key in keys.astype(np.uint8)]
    assert [keys[place].tobytes() for place in first] == [*map(bytes, seen)]
    assert [len(part) for part in distinct(np.empty((0, 16), np.uint8))] == [0, 0]


def test_overlap_equals_counting_by_hand() -> None:
    rng = np.random.default_rng(1)
    rows = {name: [tuple(map(int, rng.integers(0, 40, 2))) for _ in range(count)]
            for name, count in (("train", 30), ("valid", 8), ("test", 12))}
    rows["probe"] = [(100, 100)]

    def keys(values: list[int]) -> np.ndarray:
        return np.array([[value, *[0] * 15] for value in values], np.uint8)

    found = overlap({name: Contents(keys([image for image, _ in some]), keys([title for _, title in some]))
                     for name, some in rows.items()})
    for earlier, name in itertools.combinations(rows, 2):
        counts = {"images": sum(image in {i for i, _ in rows[earlier]} for image, _ in rows[name]),
                  "titles": sum(title in {t for _, t in rows[earlier]} for _, title in rows[name]),
                  "rows": sum(row in rows[earlier] for row in rows[name])}
        assert found.get(name, {}).get(earlier, dict.fromkeys(counts, 0)) == counts
    assert "probe" not in found and "train" not in found
    line = describe_overlap(found, {name: len(some) for name, some in rows.items()})
    assert "\n" not in line and f"of 12 test rows {found['test']['train']['images']} have an image of train" in line
    assert overlap({}) == {} and describe_overlap({}, {}) == ""


def test_words_that_arrow_finds_are_those_of_the_tokenizer() -> None:
    """Else `check` calls titles the same that CLIP tells apart, or the reverse."""
    draw = random.Random(0)
    pieces = ["a", "b", "A", "'s", "'", "'ll", "1", "2", " ", "  ", "\t", "\n", "!", "_", ",", "é", "e\u0301", "\u212a",
              "k", "K", "\u00a0", "\x0b", "日", "<|endoftext|>", "<|", "\x1f", "\x00"]
    titles = ["".join(draw.choices(pieces, k=draw.randrange(4))) for _ in range(4000)]
    tokenizer = clip_words().tokenizer
    assert classes(distinct(clip_words().keys(pa.array(titles)))[0].tolist()) == classes(
        tokenize(tokenizer, titles, 1 << 20))
