"""Identity of images and titles: the one definition that losses, metrics, splits and the feature store use.

Images are the same when their bytes are equal. Titles are the same when the model's tokenizer makes equal token ids of
them, truncated to what its text tower reads: CLIP's folds case and white space and composes accents (NFC).

Dimension key: P titles, K bytes of a key, n keys, D distinct ones, N rows of a split.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.files import replaced_file
from data.images.decode import FastTokenizer, tokenize
from data.reading import open_regular
from data.store.segments import KEY, key_of
from data.titles import CHUNK, TokenLists, text_chunks, text_slices

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

UNTRUNCATED = 1 << 30  # tokens
PLAIN = r"^[\t\n\r -~]*\z"  # titles of which Arrow finds the words as CLIP's tokenizers do
WORD, WORD_END = r"('s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+)\s*", "\x1f"
SPACE, LETTER, DIGIT, MARK = range(4)  # kinds of characters of PLAIN titles
KIND = bytes(SPACE if chr(code).isspace() else LETTER if chr(code).isalpha() else DIGIT if chr(code).isdigit() else MARK
             for code in range(256))
BYTE_LEVEL = Path(__file__).with_name("demo_model") / "tokenizer.json"
Overlap = dict[str, dict[str, dict[str, int]]]  # split -> earlier split -> images, titles, rows


class Contents(NamedTuple):
    """The content keys of a split's kept rows, uint8 [N, K] each."""

    image_NK: np.ndarray
    title_NK: np.ndarray


@dataclass(frozen=True)
class TitleIds:
    """Identity of titles under a tokenizer, cut to `max_tokens`. `name` is unique to the two.

    With a folder `cache` the keys of many titles are kept there: tokenizing a million takes a core about 45 seconds.
    """

    tokenizer: FastTokenizer
    max_tokens: int
    name: str = ""
    cache: Path | None = None

    def tokens(self, titles: pa.LargeStringArray) -> TokenLists:
        """Return the token ids of all titles."""
        chunks = (tokenize(self.tokenizer, chunk, self.max_tokens) for chunk in text_chunks(titles))
        return TokenLists.of(chain.from_iterable(chunks))

    def keys(self, titles: pa.LargeStringArray) -> np.ndarray:
        """Return the content keys [P, K] uint8 of all titles: equal exactly where token ids are."""
        if self.cache is None or len(titles) < CHUNK:
            return self._keys(titles)
        file = self.cache / f"titles-{_digest(titles, self.name)}.npz"
        unreadable = (OSError, ValueError, KeyError, zipfile.BadZipFile)
        with suppress(*unreadable), open_regular(file) as npz, np.load(npz, allow_pickle=False) as stored:
            keys_PK = stored["keys"]
            if keys_PK.shape == (len(titles), KEY) and keys_PK.dtype == np.uint8:
                return keys_PK
        keys_PK = self._keys(titles)
        with suppress(OSError):  # without the cache titles are only tokenized again
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(file, durable=False) as temporary:
                np.savez(temporary, keys=keys_PK)
        return keys_PK

    def _keys(self, titles: pa.LargeStringArray) -> np.ndarray:
        """Return `keys` without the cache, in chunks of titles: the token ids of all would take more memory."""
        parts = [np.empty((0, KEY), np.uint8)]
        for chunk in text_chunks(titles):
            parts.append(keys_of_tokens(TokenLists.of(iter(tokenize(self.tokenizer, chunk, self.max_tokens)))))
        return np.concatenate(parts)


class _Backend(NamedTuple):
    backend_tokenizer: Tokenizer


@dataclass(frozen=True)
class ClipWords(TitleIds):
    """`clip_words`: keys of the words of titles, which are found for ASCII without the tokenizer."""

    def _keys(self, titles: pa.LargeStringArray) -> np.ndarray:
        """Return keys of the words, computed in chunks of titles."""
        parts = [np.empty((0, KEY), np.uint8)]
        for chunk in text_slices(titles):
            parts.append(self._word_keys(chunk))
        return np.concatenate(parts)

    def _word_keys(self, titles: pa.LargeStringArray) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.compute as pc

        is_plain = pc.match_substring_regex(titles, PLAIN)
        is_plain = pc.and_not(is_plain, pc.match_substring(titles, "<|")).to_numpy(zero_copy_only=False)
        has_mark = pc.match_substring(titles, "'").to_numpy(zero_copy_only=False)
        keys = np.empty((len(titles), KEY), np.uint8)
        for is_one, spelt in ((is_plain & ~has_mark, _plain_words), (is_plain & has_mark, _words_with_apostrophes)):
            if is_one.any():
                words = spelt(titles.filter(pa.array(is_one))).to_pylist()
                keys[is_one] = np.frombuffer(b"".join(map(key_of, words)), np.uint8).reshape(-1, KEY)
        others = titles.filter(pa.array(~is_plain)).to_pylist()
        keys[~is_plain] = np.frombuffer(b"".join(map(self._key, others)), np.uint8).reshape(-1, KEY)
        return keys

    def _key(self, title: str) -> bytes:
        """Return the key of a title with characters beyond ASCII: the words that the tokenizer itself finds."""
        backend = self.tokenizer.backend_tokenizer
        if "<|" in title:  # the names of BOS and EOS are found before words are
            return key_of(b"ids" + np.array(backend.encode(title).ids, np.int32).tobytes())
        text = backend.normalizer.normalize_str(title.encode("utf-8", "replace").decode("utf-8"))
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return key_of("".join(word + WORD_END for word in words).encode("utf-8"))


def _plain_words(titles: pa.LargeStringArray) -> pa.LargeBinaryArray:
    """Return titles of ASCII without apostrophes in lower case, WORD_END behind each word, no white space.

    What `_words_with_apostrophes` returns, in a tenth of its time: a word is a run of letters, a digit, or a run of
    other characters.
    """
    import pyarrow as pa

    titles = titles.cast(pa.large_string())
    _, ends, data = titles.buffers()
    bounds = np.frombuffer(ends, np.int64)[titles.offset : titles.offset + len(titles) + 1]
    text = bytes(memoryview(data or b"")[bounds[0] : bounds[-1]])
    bounds = bounds - bounds[0]
    kind = np.frombuffer(text.translate(KIND), np.uint8)
    next_kind = np.append(kind[1:], SPACE)[: len(kind)]
    next_kind[bounds[bounds > 0] - 1] = SPACE  # the last character of a title
    is_end = (kind != SPACE) & ((kind == DIGIT) | (kind != next_kind))
    length = (kind != SPACE) + is_end.astype(np.uint8)
    place = np.append(0, np.cumsum(length, dtype=np.int64))  # where each character goes
    words = np.repeat(np.frombuffer(text.lower(), np.uint8), length)
    words[place[1:][is_end] - 1] = ord(WORD_END)
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(titles),
                                            [None, pa.py_buffer(place[bounds]), pa.py_buffer(words)])


def _words_with_apostrophes(titles: pa.LargeStringArray) -> pa.LargeBinaryArray:
    """Return titles of ASCII in lower case, WORD_END behind each word, no white space."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words = pc.replace_substring_regex(pc.ascii_lower(titles), WORD, f"\\1{WORD_END}")
    return pc.replace_substring_regex(words, "^\\s+", "").cast(pa.large_binary())


@cache
def clip_words() -> ClipWords:
    """Return the identity of titles without a model: token ids before truncation, under any CLIP tokenizer.

    CLIP tokenizers differ only in their vocabulary. They normalise and split words in the same way, and each spells
    every word in pieces of its bytes, the last of which ends the word: so titles get equal ids from one exactly when
    they get equal ids from another, and the demo's small vocabulary serves. The place where a model truncates depends
    on its own vocabulary: titles that differ only behind that place count as different here.
    """
    from tokenizers import Tokenizer

    return ClipWords(_Backend(Tokenizer.from_file(str(BYTE_LEVEL))), UNTRUNCATED, "words 2")


def keys_of_tokens(tokens: TokenLists) -> np.ndarray:
    """Return the content keys [P, K] uint8 of titles, given their token ids."""
    joined = b"".join(key_of(tokens.raw(index)) for index in range(len(tokens)))
    return np.frombuffer(joined, np.uint8).reshape(-1, KEY)


def distinct(keys_nK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct keys in order of appearance; return the number of each key [n], and first positions [D]."""
    import pyarrow as pa

    data = pa.py_buffer(np.ascontiguousarray(keys_nK))
    keys_n = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY), len(keys_nK), [None, data])
    number_n = keys_n.dictionary_encode().indices.to_numpy().astype(np.int64)
    before_n = np.maximum.accumulate(np.append(-1, number_n))[:-1]
    return number_n, np.flatnonzero(number_n > before_n)


def overlap(splits: Mapping[str, Contents]) -> Overlap:
    """Count the rows of each split whose image, title, or pair of both is also in an earlier split; omit zeros."""
    if not splits:
        return {}
    import pyarrow as pa

    ends = np.cumsum([len(contents.image_NK) for contents in splits.values()])[:-1]
    image, _ = distinct(np.concatenate([contents.image_NK for contents in splits.values()]))
    title, titles = distinct(np.concatenate([contents.title_NK for contents in splits.values()]))
    row = pa.array(image * len(titles) + title).dictionary_encode().indices.to_numpy()
    shared: Overlap = {}
    for kind, number in (("images", image), ("titles", title), ("rows", row)):
        earlier: dict[str, np.ndarray] = {}  # split -> which numbers it has
        for name, number_N in zip(splits, np.split(number, ends), strict=True):
            for other, has_number in earlier.items():
                counts = shared.setdefault(name, {}).setdefault(other, {})
                counts[kind] = int(has_number[number_N].sum())
            earlier[name] = np.zeros(number.max(initial=-1) + 1, bool)
            earlier[name][number_N] = True
    kept = {name: {other: counts for other, counts in others.items() if any(counts.values())}
            for name, others in shared.items()}
    return {name: others for name, others in kept.items() if others}


def describe_overlap(shared: Overlap, rows: Mapping[str, int]) -> str:
    """Return the overlap in one line, "" where there is none; `rows` are the numbers of rows by split."""
    parts = []
    for name, others in shared.items():
        for other, counts in others.items():
            parts.append(f"of {rows[name]:,} {name} rows {counts['images']:,} have an image of {other}, "
                         f"{counts['titles']:,} a title, {counts['rows']:,} are whole rows of it")
    return f"overlap: {'; '.join(parts)}" if parts else ""


def _digest(titles: pa.LargeStringArray, name: str) -> str:
    """Return a digest of all titles in order, and of `name`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.blake2b(name.encode(), digest_size=16)
    digest.update(pc.binary_length(titles).cast(pa.int32()).to_numpy(zero_copy_only=False).tobytes())
    titles = titles.cast(pa.large_string())
    _, ends, data = titles.buffers()
    first, last = np.frombuffer(ends, np.int64)[[titles.offset, titles.offset + len(titles)]]
    digest.update(memoryview(data or b"")[first:last])
    return digest.hexdigest()
