"""Batches of a stream: an epoch of equal steps on all ranks, resumed by whole shards, with its losses accounted for."""

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_tokenizer
from scenes import entries, wds_shards

from data.batch import Batch, Team, UserError
from data.cold import Encoders, Pipeline, Reader
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from data.stream.batches import Problems, ShardBatches
from data.stream.shards import require_lost_shards
from data.stream.stages import Sample, read_shard
from data.web import storage
from data.web.fetch import FetchPolicy
from data.web.storage import Entry


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six shards of five samples."""
    return wds_shards(tmp_path_factory.mktemp("shards"), "train", 30, 5)


def stream(shards: list[str], rank: int = 0, size: int = 1, augment: bool = False, **changes: object) -> ShardBatches:
    """The batches of a rank: 8 rows in all a step, 4 steps an epoch."""
    encoders = Encoders(lambda pixels: pixels, lambda tokens: tokens.ids_BL, 1, 1, "i", "t", False, tiny_tokenizer(),
                        77)
    reader = Reader(Path("fetched"), ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2, augment=augment)
    team = Team(rank, size, lambda value: [value])
    pipeline = Pipeline(reader, encoders, team, Path("cache"), torch.device("cpu"), print)
    made = ShardBatches(entries(shards), 30, 8, 42, 4, 1, pipeline, Problems(30, 0.05))
    return replace(made, **changes)  # type: ignore[arg-type]


def keys(batches: ShardBatches, steps: int, start: int = 0) -> list[list[str]]:
    """The keys of the samples of some steps."""
    for _ in itertools.islice(batches.from_step(start), steps):
        pass
    return [[name.split(", ")[1] for name in batches.keys[step]] for step in range(start, start + steps)]


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same."""
    return (torch.equal(one.pixels_BCSS, other.pixels_BCSS) and torch.equal(one.title_id_B, other.title_id_B)
            and torch.equal(one.title.ids_BL, other.title.ids_BL))


def test_one_rank_sees_every_sample_once_an_epoch_in_an_order_of_its_own(shards: list[str]) -> None:
    """Else some pairs weigh double, or every epoch shows the same batches."""
    steps = keys(stream(shards), 8)
    epochs = [list(itertools.chain(*steps[:4])), list(itertools.chain(*steps[4:]))]
    assert [len(step) for step in steps] == [8, 8, 8, 6] * 2
    assert all(Counter(epoch) == Counter(f"train{number:05d}" for number in range(30)) for epoch in epochs)
    assert epochs[0] != epochs[1] and steps == keys(stream(shards), 8) != keys(stream(shards, seed=43), 8)


@pytest.mark.parametrize("augment", [False, True])
def test_the_same_seed_gives_the_same_batches_to_the_bit(augment: bool, shards: list[str]) -> None:
    """Else a run cannot be repeated; also random crops depend on seed, epoch and picture alone."""
    first, second = ([*itertools.islice(stream(shards, augment=augment).from_step(0), 5)] for _ in range(2))
    assert all(map(equal, first, second))
    assert augment == (not equal(first[0], next(stream(shards).from_step(0))))


def test_ranks_take_equally_many_steps_of_disjoint_samples(shards: list[str]) -> None:
    """Else the rank that has fewer batches leaves the others waiting in a collective for ever."""
    for size, apart in ((1, True), (2, True), (3, False), (4, False)):  # 8 rows for 3 ranks, 6 shards for 4 are uneven
        parts = [keys(stream(shards, rank, size), 4) for rank in range(size)]
        assert [sum(len(part[step]) for part in parts) for step in range(4)] == [8, 8, 8, 6]
        seen = Counter(key for part in parts for step in part for key in step)
        assert (max(seen.values()) == 1) == apart


def test_a_resumed_epoch_reads_no_finished_shard_and_no_sample_of_it(shards: list[str], monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    """Else a run that is interrupted daily reads the first shards again and again."""
    for size in (1, 2):
        ranks = [stream(shards, rank, size) for rank in range(size)]
        seen = Counter(key for rank in ranks for step in keys(rank, 3) for key in step)
        finished = sorted({shard for rank in ranks for shard in rank.finished(3)})
        assert finished and all(rank.finished(4) == [] for rank in ranks)  # a new epoch
        held = {sample.key for shard in finished for sample in read_shard(shard, entries(shards)[shard])}
        assert held <= seen.keys()
        read: list[str] = []

        def noted(shard: int, entry: Entry, *args: object, read: list[str] = read) -> object:
            read.append(entry.address)
            return read_shard(shard, entry, *args)  # type: ignore[arg-type]

        monkeypatch.setattr("data.stream.batches.read_shard", noted)
        for other in (size, 1):  # on as many ranks, or on one
            read.clear()
            rest = Counter(key for rank in range(other) for step in keys(
                stream(shards, rank, other, resumed=(3, finished)), 1, 3) for key in step)
            assert sum(rest.values()) == 6 and not rest.keys() & held
            assert not {shards[shard] for shard in finished} & {*read[: len(shards) - len(finished)]}
        monkeypatch.undo()


def broken(shards: list[str], bad: set[str]) -> list[str]:
    """The same shards; the pictures whose keys are in `bad` are cut short inside."""
    import tarfile

    for shard in shards:
        with tarfile.open(shard) as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
        with open(shard, "r+b") as file:
            for name, (offset, size) in places.items():
                if name in {f"{key}.jpg" for key in bad}:
                    file.seek(offset + 20)
                    file.write(bytes(size - 20))
    return shards


def test_pictures_that_do_not_decode_are_ledgered_once_and_bounded(tmp_path: Path) -> None:
    """Else a stream trains on whatever is left, and nobody hears of it."""
    shards = broken(wds_shards(tmp_path, "train", 30, 5), {"train00003"})
    batches = stream(shards)
    seen = Counter(itertools.chain(*keys(batches, 8)))
    assert "train00003" not in seen and sum(seen.values()) == 60  # a sample of the shards again in its place
    (entry,) = batches.problems.entries.values()
    assert entry["key"] == "train00003" and entry["split"] == "train" and entry["shard"] == shards[0]
    broken(shards, {"train00004", "train00005"})
    with pytest.raises(UserError, match="of 30 rows cannot be used .*--max-bad"):
        keys(stream(shards), 8)


def test_shards_without_a_usable_sample_end_the_run(tmp_path: Path) -> None:
    """Else a rank reads them over and over for ever."""
    shards = broken(wds_shards(tmp_path, "train", 4, 2), {f"train{number:05d}" for number in range(4)})
    with pytest.raises(UserError, match="hold no usable sample"):
        keys(stream(shards, problems=Problems(30, 1.0)), 1)


def test_negatives_that_the_first_samples_lack_are_counted(shards: list[str]) -> None:
    """Else a column of negatives is left unused in silence."""
    batches = stream(shards, negatives=0)
    batch = next(batches.from_step(0))
    assert batch.negative is None and batches.unused_negatives >= 8
    assert next(stream(shards).from_step(0)).negative is not None
    assert Sample(0, "", b"", "", []).negatives == []


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_shard_that_is_lost_is_named_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                damage: str) -> None:
    """One file deleted by hand would end a night's run; --max-bad decides how much may be lost."""
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    shards = wds_shards(tmp_path, "train", 30, 5)
    batches = stream(shards, problems=Problems(30, 0.2))
    whole = entries(shards)
    if damage == "gone":
        Path(shards[2]).unlink()
    else:
        os.truncate(shards[2], 700)
    batches = replace(batches, shards=whole)
    steps = keys(batches, 12)
    assert [len(step) for step in steps] == [8, 8, 8, 6] * 3
    lost = {f"train{number:05d}" for number in range(10, 15)}
    assert not lost & {key for step in steps for key in step}
    (entry,) = [entry for entry in batches.problems.entries.values()]
    assert entry["shard"] == shards[2] and dropped_rows([entry]) == 5
    require_lost_shards(whole, [entry])
    now = entries([path for path in shards if Path(path).exists()])
    with pytest.raises(UserError, match=f"{shards[2]}, which the run has lost, .* put it back"):  # what --resume says
        require_lost_shards(now, [entry])
    Path(shards[3]).unlink()
    with pytest.raises(UserError, match=r"10 of 30 rows cannot be used .*--max-bad"):
        keys(replace(batches, problems=Problems(30, 0.2), _lost=set()), 12)
