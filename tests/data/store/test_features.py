"""The feature store against a dict, real processes and damage of every kind; the training view and plain indices."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.batch import UserError, share
from data.files import write_mark
from data.prefetch import EpochBatches, epoch_order
from data.store import features as module
from data.store import segments
from data.store.feature_split import FeatureSplit, StoredTable
from data.store.features import FeatureStore
from data.store.segments import HEADER, key_of, prune, spaces
from data.store.upkeep import verify_spaces

KILLS = int(os.environ.get("THUMBTUNE_FAULTS", "20"))
WIDTH = 5
fork = multiprocessing.get_context("fork")


def keys_of(numbers: range | list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(key_of(str(i).encode()) for i in numbers), np.uint8).reshape(-1, 16)


def values_of(numbers: range | list[int], width: int = WIDTH) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None] + torch.arange(width) / 16


def files(folder: Path, ending: str = "") -> list[Path]:
    return sorted(folder.glob("*.features.safetensors" + ending))


@contextmanager
def child(target: Callable[..., None], *args: object) -> Iterator[tuple[BaseProcess, Connection]]:
    """A forked process running target(connection, *args); killed at the end if it still lives."""
    ours, theirs = fork.Pipe()
    process = fork.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_equals_a_dict(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    # few distinct bytes, many NULs: keys that share long beginnings or differ only in trailing zeros
    pool = np.unique(rng.choice([0, 0, 0, 1, 255], (3000, 16)).astype(np.uint8), axis=0)
    expected: dict[bytes, torch.Tensor] = {}
    store = FeatureStore(tmp_path / "space", WIDTH, dtype)
    for count in (1, 256, 257, 0, 700, 3, 100):
        fresh = np.array([key for key in pool if key.tobytes() not in expected])[:count].reshape(-1, 16)
        values = torch.randn(count, WIDTH)
        store.append(fresh, values)
        expected |= {key.tobytes(): value.to(dtype) for key, value in zip(fresh, values, strict=True)}
        for held in (store, FeatureStore(tmp_path / "space", WIDTH, dtype)):
            asked = rng.permutation(np.concatenate([pool, pool[:50]]))
            rows = held.locate(asked)
            hits = np.array([key.tobytes() in expected for key in asked])
            assert ((rows >= 0) == hits).all()
            want = torch.stack([expected[key.tobytes()] for key in asked[hits]])
            assert held.gather(rows[hits]).equal(want) and len(held) == len(expected)
    assert store.nbytes == sum(path.stat().st_size for path in files(tmp_path / "space"))
    assert store.verify() == [] and store.locate(pool[:0]).shape == (0,)
    for row in (-1, int(store.locate(pool).max()) + 1, 10**6):
        with pytest.raises(IndexError):
            store.gather(np.array([0, row]))


def test_gather_crosses_chunks_and_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    store = FeatureStore(tmp_path, WIDTH)
    for low in range(0, 1000, 300):
        store.append(keys_of(range(low, low + 300)), values_of(range(low, low + 300)))
    wanted = random.Random(0).choices(range(1000), k=400)
    rows = store.locate(keys_of(wanted))
    assert store.gather(rows).equal(values_of(wanted))
    assert StoredTable(store, rows).to(torch.device("cpu")).equal(values_of(wanted))


def test_any_safetensors_reader_opens_a_segment(tmp_path: Path) -> None:
    FeatureStore(tmp_path / "space", WIDTH).append(keys_of(range(300)), values_of(range(300)))
    found = load_file(files(tmp_path / "space")[0])
    assert found["values"].equal(values_of(range(300))) and (found["keys"].numpy() == keys_of(range(300))).all()
    assert found["sums"].shape == (3,)


def append_many(ready: Connection, folder: Path, rank: int) -> None:
    store = FeatureStore(folder, WIDTH)
    ready.recv()
    for low in range(0, 400, 20):
        mine = range(low, low + 20 + rank)  # neighbours overlap, and all ranks write the same keys
        store.append(keys_of(mine), values_of(mine) + rank / 1024)
    store.refresh()
    ready.send(store.locate(keys_of(range(400))).min() >= 0)


def test_ranks_append_at_once_and_agree_on_copies(tmp_path: Path) -> None:
    with child(append_many, tmp_path, 1) as (_, one), child(append_many, tmp_path, 2) as (_, two):
        mine = FeatureStore(tmp_path, WIDTH)
        for pipe in (one, two):
            pipe.send("go")
        for low in range(0, 400, 20):
            mine.append(keys_of(range(low, low + 20)), values_of(range(low, low + 20)))
        assert one.recv() and two.recv()
    mine.refresh()
    other = FeatureStore(tmp_path, WIDTH)
    got = mine.gather(mine.locate(keys_of(range(400))))
    assert got.equal(other.gather(other.locate(keys_of(range(400)))))  # the same of three copies in every process
    assert ((got - values_of(range(400))).abs() < 3 / 1024).all()
    assert len(mine) == len(other) == 400 + 420 + 440 and other.verify() == []


def append_forever(acknowledge: Connection, folder: Path, first: int) -> None:
    store = FeatureStore(folder, 512)
    for number in range(first, first + 1_000_000, 300):
        store.append(keys_of(range(number, number + 300)), values_of(range(number, number + 300), 512))
        acknowledge.send(number + 300)


def test_a_kill_loses_nothing_acknowledged(tmp_path: Path) -> None:
    rng, first = random.Random(0), 0
    for _ in range(KILLS):
        with child(append_forever, tmp_path, first) as (process, pipe):
            done = pipe.recv()
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.join()
            with pytest.raises(EOFError):
                while True:
                    done = pipe.recv()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = FeatureStore(tmp_path, 512)
            rows = store.locate(keys_of(range(done)))
        assert store.gather(rows).equal(values_of(range(done), 512)) and not files(tmp_path, ".tmp")
        first = done
    assert store.verify() == []


def append_and_die(_: Connection, folder: Path) -> None:
    write_mark(folder, "features")
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    FeatureStore(folder, WIDTH).append(keys_of(range(9)), values_of(range(9)))


def append_slowly(pipe: Connection, folder: Path) -> None:
    store, fsync = FeatureStore(folder, WIDTH), os.fsync

    def slow(descriptor: int) -> None:
        pipe.send("writing")
        pipe.recv()
        fsync(descriptor)

    os.fsync = slow  # type: ignore[assignment]
    store.append(keys_of(range(9)), values_of(range(9)))
    pipe.send("done")


def test_only_stale_temporary_files_are_removed(tmp_path: Path) -> None:
    write_mark(tmp_path, "features")  # so that the first fsync is the segment's
    with child(append_and_die, tmp_path) as (process, _):
        process.join(300)
        assert len(files(tmp_path, ".tmp")) == 1
    assert len(FeatureStore(tmp_path, WIDTH)) == 0 and not files(tmp_path, ".tmp")
    with child(append_slowly, tmp_path) as (_, pipe):
        assert pipe.recv() == "writing"
        assert len(FeatureStore(tmp_path, WIDTH)) == 0 and len(files(tmp_path, ".tmp")) == 1
        pipe.send("go on")
        assert pipe.recv() == "writing"  # the folder's own fsync
        pipe.send("go on")
        assert pipe.recv() == "done"
    assert len(FeatureStore(tmp_path, WIDTH)) == 9


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_answer(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mark(tmp_path, "features")
    calls: list[object] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).suffix or "folder")
        assert calls[-1] == "folder" or os.fstat(descriptor).st_size > HEADER  # nothing is left in Python's buffer
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    write_mark(tmp_path, "features")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    FeatureStore(tmp_path, WIDTH).append(keys_of(range(9)), values_of(range(9)))
    assert calls == [".tmp", "rename", "folder"]


@pytest.fixture
def healthy(tmp_path: Path) -> tuple[Path, bytes]:
    """A space with a good segment, and the bytes of another that a test damages: rows 0-299, 2 blocks."""
    folder = tmp_path / "space"
    FeatureStore(folder, WIDTH).append(keys_of(range(300)), values_of(range(300)))
    content = files(folder)[0].read_bytes()
    files(folder)[0].unlink()
    FeatureStore(folder, WIDTH).append(keys_of(range(300, 350)), values_of(range(300, 350)))
    return folder, content


def assert_noticed(folder: Path, content: bytes) -> None:
    """Put `content` into the space as a segment: it is set aside by name, and what is not damaged stays usable."""
    bad = folder / "bad.features.safetensors"
    bad.write_bytes(content)
    with pytest.warns(UserWarning, match=bad.name):
        store = FeatureStore(folder, WIDTH)
        rows = store.locate(keys_of(range(350)))
    assert store.damaged == [bad.name] and (rows[:300] == -1).all()
    assert store.gather(rows[300:]).equal(values_of(range(300, 350)))
    assert not bad.exists() and files(folder, ".damaged") == [folder / f"{bad.name}.damaged"]


def test_a_named_pipe_is_no_segment(healthy: tuple[Path, bytes]) -> None:
    """Waited for, it would hang every run that shares the cache."""
    bad = healthy[0] / "pipe.features.safetensors"
    os.mkfifo(bad)
    with pytest.warns(UserWarning, match="a named pipe"):
        store = FeatureStore(healthy[0], WIDTH)
    assert store.damaged == [bad.name] and (store.locate(keys_of(range(300, 350))) >= 0).all()


def test_every_flipped_bit_is_noticed(healthy: tuple[Path, bytes]) -> None:
    folder, content = healthy
    rng = random.Random(0)
    regions = [range(8), range(8, HEADER), range(HEADER, HEADER + 4800),
               range(HEADER + 4800, HEADER + 4812), range(HEADER + 4812, len(content))]
    assert len(regions[-1]) == 300 * WIDTH * 4
    for region in regions:
        for at in rng.sample(region, min(len(region), 150)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << rng.randrange(8)
            assert_noticed(folder, bytes(damaged))


def test_truncated_zeroed_and_foreign_segments_are_noticed(healthy: tuple[Path, bytes], tmp_path: Path) -> None:
    folder, content = healthy
    rng = random.Random(0)
    for length in [0, 1, 8, HEADER, len(content) - 1, *rng.sample(range(len(content)), 60)]:
        assert_noticed(folder, content[:length])
    for _ in range(60):
        low = rng.randrange(HEADER, len(content) - 64)
        high = rng.randrange(low + 64, len(content) + 1)
        assert_noticed(folder, content[:low] + bytes(high - low) + content[high:])
    assert_noticed(folder, bytes(len(content)))
    assert_noticed(folder, content + b"\0")
    assert_noticed(folder, content + content)
    assert_noticed(folder, rng.randbytes(len(content)))
    for space, width, dtype in [("other", WIDTH, torch.float32), ("space", WIDTH + 1, torch.float32),
                                ("space", 2 * WIDTH, torch.float16)]:
        foreign = tmp_path / "foreign" / str(width) / space
        FeatureStore(foreign, width, dtype).append(keys_of(range(300)), values_of(range(300), width))
        assert_noticed(folder, files(foreign)[0].read_bytes())


def test_damaged_rows_are_written_again_and_earlier_row_numbers_stay_good(healthy: tuple[Path, bytes]) -> None:
    folder, content = healthy
    (folder / "bad.features.safetensors").write_bytes(content[:-1] + b"\x7f")  # in the second block of values
    store = FeatureStore(folder, WIDTH)
    early = store.locate(keys_of(range(100)))
    with pytest.warns(UserWarning, match="bad.features"):
        assert store.locate(keys_of([299])) == -1
    assert store.gather(early).equal(values_of(range(100)))
    missing = np.flatnonzero(store.locate(keys_of(range(350))) < 0).tolist()
    assert missing == list(range(300))
    store.append(keys_of(missing), values_of(missing))
    assert store.gather(store.locate(keys_of(range(350)))).equal(values_of(range(350)))


def test_verify_names_what_was_damaged_or_lost_since_opening(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, WIDTH)
    for low in range(0, 80, 20):
        store.append(keys_of(range(low, low + 20)), values_of(range(low, low + 20)))
    assert (store.locate(keys_of(range(80))) >= 0).all() and store.verify() == []
    gone, header, values, good = files(tmp_path)
    gone.unlink()
    for path, at in ((header, 100), (values, values.stat().st_size - 1)):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"\x7f")
    with pytest.warns(UserWarning):
        assert sorted(store.verify()) == [gone.name, header.name, values.name]
    assert files(tmp_path) == [good] and (store.locate(keys_of(range(80))) >= 0).sum() == 20


def append_on_a_full_disk(pipe: Connection, folder: Path) -> None:
    store = FeatureStore(folder, WIDTH)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        store.append(keys_of(range(1000)), values_of(range(1000)))
    except UserError as error:
        store.append(keys_of([5000]), values_of([5000]))  # what fits still goes
        pipe.send((str(error), (store.locate(keys_of([1, 4000, 5000])) >= 0).tolist()))


def append_without_rights(pipe: Connection, folder: Path) -> None:
    folder.parent.chmod(0o755)
    os.chdir(folder.parent)  # so that another user needs no rights above it
    if os.getuid() == 0:
        os.setuid(65534)
    with pytest.raises(UserError, match="cannot read features in secret"):
        FeatureStore(Path("secret"), WIDTH)
    store = FeatureStore(Path(folder.name), WIDTH)
    try:
        store.append(keys_of([1]), values_of([1]))
    except UserError as error:
        pipe.send((str(error), (store.locate(keys_of([1, 4000, 5000])) >= 0).tolist()))


@pytest.mark.parametrize(("target", "reason", "held"), [
    (append_on_a_full_disk, "File too large", [False, True, True]),
    (append_without_rights, "Permission denied", [False, True, False])])
def test_a_folder_that_cannot_be_written_is_one_line_and_stays_as_it_was(
        tmp_path: Path, target: Callable[..., None], reason: str, held: list[bool]) -> None:
    folder = tmp_path / "space"
    FeatureStore(folder, WIDTH).append(keys_of([4000]), values_of([4000]))
    before = files(folder)[0].read_bytes()
    (tmp_path / "secret").mkdir(0)
    folder.chmod(0o555 if target is append_without_rights else 0o755)
    with child(target, folder) as (_, pipe):
        assert pipe.poll(20)
        message, found = pipe.recv()
    folder.chmod(0o755)
    assert "space" in message and reason in message and "--cache-dir" in message and "\n" not in message
    assert found == held and not files(folder, ".tmp")
    assert before in [path.read_bytes() for path in files(folder)]


def test_spaces_and_prune(tmp_path: Path) -> None:
    for name in ("old", "kept", "shared"):
        FeatureStore(tmp_path / name, WIDTH).append(keys_of(range(9)), values_of(range(9)))
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    (tmp_path / "kept" / "x.features.safetensors.damaged").write_bytes(bytes(77))
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "model.safetensors").write_bytes(bytes(5))
    size = files(tmp_path / "old")[0].stat().st_size
    mapped = FeatureStore(tmp_path / "old", WIDTH)
    assert spaces(tmp_path) == {"old": size, "kept": size + 77, "shared": size}
    # A running job keeps what it has open.
    assert prune(tmp_path, keep=["kept"]) == (size + 77, {"old": "another process is using it"}, [])
    assert mapped.gather(mapped.locate(keys_of([3]))).equal(values_of([3]))
    del mapped
    assert prune(tmp_path, keep=["kept"]) == (size, {}, [])
    assert spaces(tmp_path) == {"kept": size} and len(FeatureStore(tmp_path / "kept", WIDTH)) == 9
    assert (tmp_path / "shared" / "notes.txt").exists() and (tmp_path / "stranger" / "model.safetensors").exists()
    assert not (tmp_path / "old").exists() and spaces(tmp_path / "absent") == {}


def test_odd_files_under_a_segments_name_are_skipped_and_stay(tmp_path: Path) -> None:
    """A folder or a dead link of that name must neither end a run nor a prune, nor be renamed or deleted."""
    folder = tmp_path / "features" / "space"
    FeatureStore(folder, WIDTH).append(keys_of(range(9)), values_of(range(9)))
    odd = [folder / f"{digit * 32}.features.safetensors" for digit in "abc"]
    odd[0].mkdir()
    odd[1].symlink_to(tmp_path / "nowhere")
    os.mkfifo(odd[2])
    with pytest.warns(UserWarning, match="is skipped") as warned:
        store = FeatureStore(folder, WIDTH)
    assert len(warned) == 3 and store.damaged == [path.name for path in odd]
    assert (store.locate(keys_of(range(9))) >= 0).all()
    del store
    assert verify_spaces(tmp_path)[0].damaged == [path.name for path in odd]
    theirs = folder / "mine.features.safetensors"
    theirs.write_bytes(b"years of work" * 200)
    assert sorted(prune(folder.parent, []).odd) == odd and all(os.path.lexists(path) for path in (*odd, theirs))


def prune_elsewhere(pipe: Connection, folder: Path) -> None:
    pipe.send([*prune(folder, []).kept])


def test_a_space_is_not_pruned_beside_the_process_that_uses_it(tmp_path: Path) -> None:
    """A colleague's `verify --prune` during a cold pass would end the run when the pass is over."""
    store = FeatureStore(tmp_path / "space", WIDTH)  # a new one, so there is no folder yet
    store.append(keys_of(range(9)), values_of(range(9)))
    with child(prune_elsewhere, tmp_path) as (_, pipe):
        assert pipe.recv() == ["space"]
    assert (FeatureStore(tmp_path / "space", WIDTH).locate(keys_of(range(9))) >= 0).all()


@pytest.mark.parametrize("number, stays", [(errno.ENOLCK, "no locks"), (errno.EROFS, "cannot be locked"),
                                           (errno.ENOSPC, "")])
def test_what_cannot_be_locked_is_not_pruned(number: int, stays: str, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network disk without locks nothing says whether a run uses a space; a full disk must still be cleared."""
    FeatureStore(tmp_path / "space", WIDTH).append(keys_of(range(9)), values_of(range(9)))
    real = os.open

    def failing(path: Path, flags: int, *rest: int) -> int:
        if Path(path).name == "in-use" and number != errno.ENOLCK:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest)

    def locking(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(segments.os, "open", failing)
    if number == errno.ENOLCK:
        monkeypatch.setattr(segments.fcntl, "flock", locking)
    pruned = prune(tmp_path, [])
    assert (pruned.freed > 0) == (not stays) and ("space" in pruned.kept) == bool(stays)
    assert stays in pruned.kept.get("space", "") and bool(files(tmp_path / "space")) == bool(stays)


def make_split(folder: Path, mapped: bool, negatives: bool) -> FeatureSplit:
    """101 pairs over 40 images and 60 titles, with up to two negatives, every seventh without any."""
    draw = torch.Generator().manual_seed(0)
    image_row, title_row = (torch.randint(0, n, (101,), generator=draw) for n in (40, 60))
    negative = torch.randint(0, 60, (101, 2), generator=draw)
    negative[::7] = -1
    negative[::2, 1] = -1
    tables: list[torch.Tensor | StoredTable] = []
    for name, rows, width in (("images", 40, 3), ("titles", 60, 2)):
        store = FeatureStore(folder / name, width)
        keys, values = keys_of(range(rows)), values_of(range(rows), width)
        store.append(keys, values)
        tables.append(StoredTable(store, store.locate(keys)) if mapped else values)
    return FeatureSplit(tables[0], tables[1], image_row, title_row, negative if negatives else None)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("negatives", [False, True])
def test_ranks_share_each_global_batch_in_order(tmp_path: Path, mapped: bool, negatives: bool) -> None:
    split = make_split(tmp_path, mapped, negatives).to("cpu", room=0)
    assert isinstance(split.image_MV, StoredTable) == mapped
    image_MV, title_PT = values_of(range(40), 3), values_of(range(60), 2)
    for size, batch, epoch, first in [(1, 16, 0, 0), (2, 16, 1, 3), (3, 7, 2, 0), (4, 2, 0, 49), (5, 200, 7, 0)]:
        order = torch.randperm(101, generator=torch.Generator().manual_seed(42 + epoch))
        steps = -(-101 // batch)
        ranks = [[split.features(rows) for rows in islice(
            EpochBatches(101, batch, 42, rank, size).from_step(epoch * steps + first),
            steps - first)] for rank in range(size)]
        for step, parts in enumerate(zip(*ranks, strict=True), first):
            rows = order[step * batch : (step + 1) * batch]
            image, title, negative, image_id, title_id, negative_id = (
                torch.cat(values) if values[0] is not None else None for values in zip(*parts, strict=True))
            assert image is not None and image_id is not None and title is not None and title_id is not None
            assert image.equal(image_MV[split.image_row_N[rows]]) and title.equal(title_PT[split.title_row_N[rows]])
            assert image_id.equal(split.image_row_N[rows]) and title_id.equal(split.title_row_N[rows])
            assert (negative_id is not None) == negatives
            if split.negative_row_NH is not None:
                wanted = split.negative_row_NH[rows]
                assert negative_id is not None and negative_id.equal(wanted)
                assert negative is not None and negative[wanted >= 0].equal(title_PT[wanted[wanted >= 0]])


def test_tables_move_only_where_there_is_room(tmp_path: Path) -> None:
    split = make_split(tmp_path, mapped=True, negatives=True)
    size = 40 * 3 * 4 + 60 * 2 * 4
    assert isinstance(split.to("cpu", room=size - 1).image_MV, StoredTable)
    moved = split.to("cpu", room=size)
    assert isinstance(moved.image_MV, torch.Tensor) and isinstance(split.to("cpu").title_PT, torch.Tensor)
    assert moved.to("cpu", room=0).image_MV is moved.image_MV  # already there
    rows = torch.tensor([100, 0, 0, 50])
    for one, other in zip(moved.features(rows), split.features(rows), strict=True):
        assert one is not None and other is not None and one.equal(other)


def test_shares_are_even_and_cover_the_batch() -> None:
    for rows, size in [(16, 1), (16, 3), (5, 8), (0, 2), (4, 4)]:
        cuts = [share(rows, rank, size) for rank in range(size)]
        assert [row for low, high in cuts for row in range(low, high)] == list(range(rows))
        counts = [high - low for low, high in cuts]
        assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
    assert not epoch_order(50, 1, 2).equal(epoch_order(50, 1, 1)) and epoch_order(50, 1, 2).equal(epoch_order(50, 2, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0, None])
def test_gpu_features_equal_the_host_and_never_wait(tmp_path: Path, room: int | None) -> None:
    host = make_split(tmp_path, mapped=True, negatives=True)
    split = host.to("cuda", room=room)
    wanted = [host.features(rows) for rows in islice(EpochBatches(len(host), 8, 0).from_step(0), 13)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [split.features(rows) for rows in islice(
            EpochBatches(len(split), 8, 0, device=split.device).from_step(0), 13)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a is not None and b is not None and a.device.type == "cuda" and a.cpu().equal(b)
