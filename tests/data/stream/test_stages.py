"""The stages of a stream: the samples that webdataset gives, each once, shuffled by a seed, with ids by content."""

import errno
import io
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import tiny_tokenizer
from scenes import entries, jpeg, wds_shards

from data.batch import BadSample, UserError
from data.cold import Encoders
from data.shards.writer import ShardWriter
from data.sources.source import ReadOptions, load_splits
from data.stream.shards import (
    count_samples,
    divide_shards,
    find_local_shards,
    local_pattern,
    shard_order,
    split_by_rank,
)
from data.stream.stages import AHEAD, Decoded, Sample, collate, content_id, read_ahead, read_shard, shuffle
from data.stream.titles import TitleRules
from data.web import storage
from data.web.storage import Entry


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fsspec's memory store, emptied afterwards."""
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def in_store(*files: str) -> list[Entry]:
    """The files, copied to a store."""
    for file in files:
        MemoryFileSystem().pipe_file(f"/bucket/{Path(file).name}", Path(file).read_bytes())
    return [storage.stat(f"memory://bucket/{Path(file).name}") for file in files]


def ignore(shard: int) -> None:
    """Take the end of a shard and do nothing with it."""


def test_an_epoch_has_the_samples_that_webdataset_gives(tmp_path: Path) -> None:
    """Else a user who comes from webdataset trains on other data."""
    webdataset = pytest.importorskip("webdataset")
    shards = wds_shards(tmp_path, "train", 23, 5)
    stated = entries(shards)
    theirs = Counter[tuple[str, bytes, str]]()
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        theirs[sample["__key__"], sample["jpg"], sample["txt"].decode()] += 1
    def read(shard: int) -> Iterator[Sample]:
        return read_shard(shard, stated[shard])

    for size in (1, 2, 3):
        order, ours = shard_order(len(shards), 1, 0), Counter[tuple[str, bytes, str]]()
        for rank in range(size):
            own = split_by_rank(order, rank, size)
            taken = shuffle(read_ahead(own, read, ignore), 7, str(rank))
            ours.update((sample.key, sample.image, sample.title) for sample in taken)
        assert ours == theirs


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_read_disjoint_shards_and_together_all_that_are_left(size: int) -> None:
    """Else a shard is trained on twice, or never."""
    order = shard_order(11, 5, 3)
    assert sorted(order) == list(range(11)) and order != shard_order(11, 5, 4)
    parts = [split_by_rank(order, rank, size, finished=[2, 9]) for rank in range(size)]
    assert sorted(shard for part in parts for shard in part) == [0, 1, 3, 4, 5, 6, 7, 8, 10]


def test_shards_are_read_in_order_with_few_open_and_none_left_open(tmp_path: Path) -> None:
    """Else the order depends on how fast a disk is, or a run with a thousand shards opens all of them."""
    shards = wds_shards(tmp_path, "train", 40, 5)
    started: list[int] = []

    def read(shard: int):  # type: ignore[no-untyped-def]
        started.append(shard)
        return read_shard(shard, entries(shards)[shard])

    stream = read_ahead([3, 1, 0, 2, 5, 7], read, ignore)
    first = [next(stream).shard for _ in range(6)]
    assert first == [3] * 5 + [1] and len(started) <= 4
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-shard"]
    endless = read_ahead([0], lambda shard: (Sample(0, "", b"", "", []) for _ in iter(int, 1)), ignore)
    assert next(endless).shard == 0  # the thread waits after AHEAD samples; closing ends it
    endless.close()
    assert AHEAD and not [thread for thread in threading.enumerate() if thread.name == "read-shard"]


def test_a_shard_that_is_no_tar_ends_the_run_by_name(tmp_path: Path) -> None:
    """Else a download that broke off is passed over in silence, or ends in a traceback of a thread."""
    (tmp_path / "train-0.tar").write_bytes(b"<html>" * 500)
    for name, said in (("train-0.tar", "no tar file"), ("train-1.tar", "No such file")):
        with pytest.raises(UserError, match=f"{name}.*{said}"):
            list(read_ahead([0], partial(read_shard, shard=Entry(str(tmp_path / name), 3000, "")), ignore))


@pytest.mark.parametrize("size", [0, 1, 10, 1000])
def test_shuffling_loses_nothing_and_depends_on_the_seed_alone(size: int) -> None:
    """A buffer of 0 keeps the order of the shards; a large one is a permutation of all."""
    items = list(range(100))
    mixed = list(shuffle(items, size, "1 0 0 0"))
    assert sorted(mixed) == items and mixed == list(shuffle(items, size, "1 0 0 0"))
    assert (mixed == items) == (size == 0)
    assert size == 0 or mixed != list(shuffle(items, size, "1 1 0 0"))
    assert all(item <= place + size for place, item in enumerate(mixed))  # held back at most `size` behind


def test_equal_pictures_and_titles_have_equal_ids_and_a_missing_negative_is_marked() -> None:
    """Else a repeat in the batch is a negative of itself, or a row without a negative is pushed from its own title."""
    tokenizer = tiny_tokenizer()
    encoders = Encoders(lambda pixels: pixels, lambda tokens: tokens.ids_BL, 1, 1, "i", "t", False, tokenizer, 77)
    pixels = np.zeros((3, 8, 8), np.uint8)
    rows = [("a cat", ["a dog"], b"1"), ("A  Cat ", [], b"2"), ("a dog", ["a cat"], b"1")]
    batch = collate([Decoded(Sample(0, "", image, title, negatives), content_id(image), pixels)
                     for title, negatives, image in rows], encoders, (8, 8), 1)
    title, image = batch.title_id_B.tolist(), batch.image_id_B.tolist()
    assert title[0] == title[1] != title[2] and image[0] == image[2] != image[1] and min(title + image) >= 0
    assert batch.negative_id_BH is not None and batch.negative_id_BH.tolist() == [[title[2]], [-1], [title[0]]]
    assert batch.negative is not None and batch.negative.ids_BL.shape[0] == 3
    several = collate([Decoded(Sample(0, "", b"1", "a", negatives), 1, pixels) for negatives in (["b"], ["c", "d"])],
                      encoders, (8, 8), 2)
    alone = collate([Decoded(Sample(0, "", b"1", title, []), 1, pixels) for title in "bcd"], encoders, (8, 8), 0)
    b, c, d = alone.title_id_B.tolist()
    assert several.negative_id_BH is not None and several.negative_id_BH.tolist() == [[b, -1], [c, d]]
    assert several.negative is not None  # negative 1 of both rows, then negative 2
    assert several.negative.ids_BL[[0, 1, 3]].equal(alone.title.ids_BL)
    empty = collate([], encoders, (8, 8), 1)
    assert empty.pixels_BCSS.shape == (0, 3, 8, 8) and empty.negative_id_BH is not None
    assert collate([], encoders, (8, 8), 0).negative is None


def test_shards_are_divided_into_those_that_train_and_those_that_are_measured(tmp_path: Path) -> None:
    """Else valid is trained on; and what cannot be streamed is refused with the way out."""
    for name in ("train-0.tar", "train-1.tar", "valid-0.tar", "test-0.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    def divide(dataset: object) -> tuple[list[str], list[str]]:
        divided = divide_shards(find_local_shards(str(dataset)), str(dataset))
        return ([Path(shard.address).name for shard in divided.train],
                [Path(shard.address).name for each in divided.measured.values() for shard in each])

    assert divide(tmp_path) == (["train-0.tar", "train-1.tar"], ["test-0.tar", "valid-0.tar"])
    assert divide(f"{tmp_path}/{{train-0,valid-0}}.tar") == (["train-0.tar"], ["valid-0.tar"])
    assert local_pattern(find_local_shards(f"{tmp_path}/valid-*.tar")) == f"{tmp_path}/valid-0.tar"
    for dataset, said in ((tmp_path / "train-{0..2}.tar", "train-2.tar: no such file"),
                          (tmp_path / "train-{0..1}.tar", "no shards but train's"),
                          (tmp_path / "valid-0.tar", "no shards but valid's"),
                          (tmp_path / "{valid,test}-0.tar", "has valid, test; --splits train=NAME"),
                          (tmp_path / "notes.txt", "none called train")):
        with pytest.raises(UserError, match=said):
            divide(dataset)


def test_indexes_count_the_samples(tmp_path: Path) -> None:
    """Else an epoch of our own shards has to be measured by hand."""
    with ShardWriter(tmp_path, "train", max_samples=4) as writer:
        for number in range(10):
            writer.write(f"{number}", jpeg(number), "a title")
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    assert len(shards) == 3 and count_samples(entries(shards)) == 10
    stored = in_store(*shards, *(f"{shard}.index.json" for shard in shards))
    assert count_samples(stored[:3]) == 10 and count_samples([stored[0]._replace(size=1)]) is None
    assert count_samples(entries(shards), TitleRules(("a {}", "one {}"))) == 20  # each title is a class name then
    Path(f"{shards[1]}.index.json").unlink()
    assert count_samples(entries(shards)) is None


def test_unusable_samples_are_reported_with_their_shard_and_key(tmp_path: Path) -> None:
    """Nothing is lost in silence: what is left out has a line in the ledger."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(1), "txt": "a title"})
        writer.write({"__key__": "b", "txt": "no picture"})
        writer.write({"__key__": "c", "jpg": jpeg(2), "txt": "  "})
    problems: list[tuple[str, str]] = []

    def report(shard: str, key: str, problem: BadSample) -> None:
        problems.append((key, problem.reason))

    (shard,) = entries([str(tmp_path / "train-0.tar")])
    assert [sample.key for sample in read_shard(0, shard, report)] == ["a"]
    assert problems == [("b", "no-image"), ("c", "no-title")]


def test_a_shard_that_fails_is_read_again_from_where_it_was_and_then_named(tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one hiccup of a network disk ends days of training, or a sample comes twice."""
    (path,) = wds_shards(tmp_path, "train", 9, 9)
    (shard,) = entries([path])
    whole, (stored,) = list(read_shard(0, shard)), in_store(path)
    failures = iter([3000, 9000])

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > self.limit:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

        limit = 0

    def open_failing(shard: Entry) -> io.BytesIO:
        stream = Failing(Path(path).read_bytes())
        stream.limit = next(failures, 1 << 30)
        return stream

    monkeypatch.setattr("data.stream.stages.open_shard", open_failing)
    assert list(read_shard(0, shard)) == whole
    failures = iter([3000, 9000, 6000])
    with pytest.raises(UserError, match="train-000000.tar: Input/output error"):
        list(read_shard(0, shard))
    monkeypatch.undo()
    monkeypatch.setattr(storage, "BACKOFF", 0.0)

    Path(path).write_bytes(Path(path).read_bytes() + bytes(512))
    with pytest.raises(UserError, match="train-000000.tar has changed"):
        list(read_shard(0, shard))
    Path(path).unlink()
    with pytest.raises(UserError, match="train-000000.tar: No such file"):
        list(read_shard(0, shard))
    assert list(read_shard(0, stored)) == whole
    MemoryFileSystem().rm_file("/bucket/train-000000.tar")
    with pytest.raises(UserError, match="memory://bucket/train-000000.tar: there is no such file"):
        list(read_shard(0, stored))


def test_an_index_counts_the_titles_that_a_stream_of_class_names_yields(tmp_path: Path) -> None:
    """Else an epoch ends before all titles of a class of several words were seen."""
    with ShardWriter(tmp_path, "train") as writer:
        for key, title in enumerate(("golden retriever", "cat", "a dog in the rain")):
            writer.write(f"{key}", jpeg(key), title)
    (tmp_path / "classnames.txt").write_text("golden_retriever\ncat\n")
    shards = entries(sorted(map(str, tmp_path.glob("*.tar"))))
    rules = TitleRules.of(shards, ("a photo of a {}", "a {}, drawn"))
    assert count_samples(shards, rules) == len(list(read_shard(0, shards[0], rules=rules))) == 5


def test_class_names_and_templates_make_the_titles_that_rows_have(tmp_path: Path) -> None:
    """Else a stream trains on "17" or "golden_retriever" and is measured on "a photo of a golden retriever"."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        writer.write({"__key__": "a", "jpg": jpeg(1), "cls": 1})
        writer.write({"__key__": "b", "jpg": jpeg(2), "json": {"caption": ["a cat", "a tabby"], "negatives": ["x"]}})
        writer.write({"__key__": "c", "jpg": jpeg(3), "cls": 7})
    (tmp_path / "classnames.txt").write_text("cat\ngolden_retriever\n")
    local = entries([str(tmp_path / "train-0.tar")])
    in_store(*map(str, tmp_path.iterdir()))
    bad: list[str] = []

    def report(shard: str, key: str, problem: BadSample) -> None:
        bad.append(key)

    for templates in ((), ("a photo of a {}", "a {}, drawn")):
        options = ReadOptions(templates=templates)
        rows = load_splits(str(tmp_path), options)["train"]
        expected = rows.title.to_pylist()
        for shard in (local[0], storage.stat("memory://bucket/train-0.tar")):
            bad.clear()
            samples = list(read_shard(0, shard, report, TitleRules.of([shard], templates)))
            assert [sample.title for sample in samples] == expected and bad == ["c"]
            assert rows.label is not None
            assert [sample.class_name for sample in samples] == [label or "" for label in rows.label.to_pylist()]
    tokenizer = tiny_tokenizer()
    encoders = Encoders(lambda pixels: pixels, lambda tokens: tokens.ids_BL, 1, 1, "i", "t", False, tokenizer, 77)
    pixels = np.zeros((3, 8, 8), np.uint8)
    batch = collate([Decoded(sample, 0, pixels) for sample in samples], encoders, (8, 8), 0)
    one, other, *plain = batch.title_id_B.tolist()
    assert one == other not in plain and len({*plain}) == 2  # templates of a class are no negatives of each other
