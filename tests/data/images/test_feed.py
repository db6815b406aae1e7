"""Pictures come out of worker processes as out of threads, and a decoder that dies takes one picture along."""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty_jobs import FirstBytes
from helpers import HANGS_S, ROOT, family, full
from PIL import Image

from data.batch import BadSample
from data.catalogue import Catalogue, DecodeResults, build_catalogue
from data.cold import FeatureWriter, encode_missing_images
from data.identity import clip_words
from data.images import feed, processes
from data.images.decode import ImageSpec
from data.images.feed import Feed, grouped
from data.images.processes import Server
from data.images.reader import Reader
from data.images.worker import KnownKeys, Outcome, Task, ToPixels
from data.sources.source import load_splits
from data.store.features import FeatureStore
from data.store.segments import SUFFIX, key_of
from data.web.limits import FetchPolicy

SPEC = ImageSpec.clip(32)
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy:UserWarning")  # pytest sets aside decode.py's filter


def reader_of(folder: Path, workers: int) -> Reader:
    return Reader(folder / "fetched", SPEC, FetchPolicy(), 25_000_000, workers)


@pytest.fixture
def by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes alone decode, however few pictures and cores there are."""
    with_processes(monkeypatch)
    monkeypatch.setattr(Server, "can_fork_now", lambda: True)


def with_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MIN_PICTURES", 0)
    monkeypatch.setattr(feed, "cores_of_rank", lambda: 4)
    monkeypatch.setattr(processes, "LOOK_S", 0.2)


def decoded(contents: list[bytes], tmp_path: Path, seconds: float = 0.0, workers: int = 2,
            note: Callable[[int], None] = lambda lots: None, log: Callable[[str], None] = print,
            ) -> list[tuple[int, Outcome, bytes]]:
    """Number, outcome and record of each content, in the order in which they came."""
    pictures = Feed(FirstBytes(seconds), reader_of(tmp_path, workers), len(contents), log)
    tasks = ((number, Task(content)) for number, content in enumerate(contents))
    results: list[tuple[int, Outcome, bytes]] = []
    for lots, lot in enumerate(pictures.lots(grouped(tasks, pictures.lot))):
        note(lots)
        results += zip(lot.tags, lot.outcomes, map(np.ndarray.tobytes, lot.records), strict=True)
    return results


def some_contents(count: int) -> list[bytes]:
    return [b"%04d" % number for number in range(count)]


def require_all_but(bad: dict[int, str], results: list[tuple[int, Outcome, bytes]], contents: list[bytes]) -> None:
    """Each content comes once, in order, and right, but those that are bad, which have this reason."""
    assert [number for number, _, _ in results] == list(range(len(contents)))
    for number, outcome, record in results:
        if number in bad:
            assert outcome.problem is not None and outcome.problem[0] == bad[number] and not outcome.is_filled
        else:
            assert outcome == Outcome(key_of(contents[number]), None, True) and record == contents[number]


@pytest.mark.usefixtures("by_processes")
def test_a_decoder_that_dies_costs_one_picture_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one hostile file ends a run of a million pictures, or takes its neighbours along unnamed."""
    monkeypatch.setattr(processes, "HANG_S", 1)
    contents = some_contents(150)
    faults = {3: b"SIGSEGV", 4: b"SIGSEGV", 17: b"exit", 60: b"SIGKILL", 100: b"hang", 149: b"SIGABRT", 30: b"bad"}
    for place, content in faults.items():
        contents[place] = content
    results = decoded(contents, tmp_path)
    reasons = dict.fromkeys(faults, "decoder-crashed") | {30: "undecodable"}
    require_all_but(reasons, results, contents)
    details = {number: outcome.problem[1] for number, outcome, _ in results if outcome.problem}
    assert "SIGSEGV" in details[3] and "SIGKILL" in details[60] and "exited with 3" in details[17]
    assert "1 s" in details[100]


@pytest.mark.usefixtures("by_processes")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("is_idle", [False, True])
def test_a_worker_that_is_killed_or_stopped_loses_no_picture(number: int, is_idle: bool, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel, which kills processes when memory runs out, decides about rows, or a run waits for ever."""
    monkeypatch.setattr(processes, "HANG_S", 1)
    contents, signalled = some_contents(600), list[int]()

    def signal_one(lots: int) -> None:
        if lots == 0:
            time.sleep(is_idle * 1.0)  # meanwhile all of the ring is decoded
            signalled.append(family(Server.get().process.pid)[-1])
            os.kill(signalled[0], number)

    results = decoded(contents, tmp_path, 0.005, note=signal_one)
    assert signalled
    require_all_but({}, results, contents)


class _Stalling:
    """A worker's socket that passes on so many bytes to the main process, or from it, and then nothing more."""

    def __init__(self, to_main: int, from_main: int) -> None:
        self.room, self.passed = {"to": to_main, "from": from_main}, {"to": 0, "from": 0}

    def between(self, worker: Connection) -> Connection:
        """Return the other end of a new socket that is joined to the worker's."""
        own_end, main_end = socket.socketpair()
        own_end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        inner = socket.socket(fileno=os.dup(worker.fileno()))
        worker.close()
        for way, source, target in (("to", inner, own_end), ("from", own_end, inner)):
            threading.Thread(target=self._pass, args=(way, source, target), daemon=True).start()
        return Connection(main_end.detach())

    def _pass(self, way: str, source: socket.socket, target: socket.socket) -> None:
        while self.passed[way] < self.room[way]:
            data = source.recv(min(4096, self.room[way] - self.passed[way]))
            if not data:
                break
            self.passed[way] += len(data)
            target.sendall(data)
        while way == "to" and source.recv(4096):  # until the worker is killed
            pass
        if way == "to":
            target.shutdown(socket.SHUT_RDWR)
            source.shutdown(socket.SHUT_RDWR)


@pytest.mark.usefixtures("by_processes")
@pytest.mark.parametrize(("to_main", "from_main"), [
    *((200 + 11 * number, 1 << 30) for number in range(full(1, 36))),
    *((1 << 30, 9000 + 3001 * number) for number in range(full(1, 20)))])
def test_a_worker_that_stops_within_a_message_is_replaced(to_main: int, from_main: int, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a worker that is stopped while it sends or is sent pictures stops the run for ever."""
    monkeypatch.setattr(processes, "HANG_S", 1)
    contents, start, stalled = [content * 5000 for content in some_contents(200)], Server.start, list[_Stalling]()

    def start_stalling(self: Server, feed: int, number: int) -> Connection:
        connection = start(self, feed, number)
        if stalled:
            return connection
        stalled.append(_Stalling(to_main, from_main))
        return stalled[0].between(connection)

    monkeypatch.setattr(Server, "start", start_stalling)
    results = decoded(contents, tmp_path)
    assert stalled[0].passed["to"] >= min(to_main, 15)
    assert [(number, record) for number, _, record in results] == [(n, c[:4]) for n, c in enumerate(contents)]


def test_where_processes_cannot_be_had_threads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run ends, or waits for ever, when the system kills the program that starts the decoders."""
    with_processes(monkeypatch)
    contents, said = some_contents(600), list[str]()

    def kill_server(lots: int) -> None:
        if lots == 1:
            deadline = time.monotonic() + 60
            while len(family(Server.get().process.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            Server.get().process.kill()

    require_all_but({}, decoded(contents, tmp_path, 0.002, note=kill_server, log=said.append), contents)
    assert [line for line in said if "threads decode" in line]
    monkeypatch.setattr(processes, "START", "raise SystemExit(1)")  # nor where it does not even start
    require_all_but({}, decoded(contents, tmp_path, log=said.append), contents)
    Server.stop()  # else the next test may meet it before it has ended


def test_where_memory_cannot_be_shared_threads_decode() -> None:
    """`ulimit -f`, a container without room for shared memory: the run says so and goes on."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from faulty_jobs import FirstBytes
        from data.images import feed
        from data.images.decode import ImageSpec
        from data.images.reader import Reader
        from data.images.worker import Task
        from data.web.limits import FetchPolicy
        feed.MIN_PICTURES, feed.cores_of_rank = 0, lambda: 4
        pictures = feed.Feed(FirstBytes(), Reader(Path(), ImageSpec.clip(32), FetchPolicy(), 1000, 2), 40, print)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        for lot in pictures.lots([[(number, Task(b"%04d" % number)) for number in range(40)]]):
            print(lot.records.tobytes().decode())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS_S, check=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    said, pixels = done.stdout.splitlines()
    assert "cannot be shared" in said and "threads decode" in said
    assert pixels == "".join(f"{number:04d}" for number in range(40))


@pytest.mark.usefixtures("by_processes")
def test_what_is_not_a_pictures_fault_is_raised(tmp_path: Path) -> None:
    contents = some_contents(60)
    contents[40] = b"memory"
    with pytest.raises(MemoryError):
        decoded(contents, tmp_path)
    assert decoded([], tmp_path) == []
    (tmp_path / "picture.jpg").write_bytes(b"0000")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:  # whose number shows how many files are open
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                reader_of(tmp_path, 1).read(str(tmp_path / "picture.jpg"))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


PARENT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from faulty_jobs import FirstBytes
from data.images import feed
from data.images.feed import Feed, grouped
from data.images.processes import Server
from data.images.reader import Reader
from data.images.decode import ImageSpec
from data.images.worker import Task
from data.web.limits import FetchPolicy
feed.MIN_PICTURES, feed.cores_of_rank, Server.can_fork_now = 0, lambda: 4, lambda: True
pictures = Feed(FirstBytes(0.01), Reader(Path("."), ImageSpec.clip(32), FetchPolicy(), 10**7, 3), 10**6)
tasks = ((number, Task(b"%08d" % number)) for number in range(10**6))
try:
    for lot in pictures.lots(grouped(tasks, pictures.lot)):
        print("NOW", flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number, to_group", [(signal.SIGKILL, False), (signal.SIGINT, True)])
def test_workers_end_with_their_parent_and_say_nothing(number: int, to_group: bool, tmp_path: Path) -> None:
    """Else a killed run leaves processes that hold its memory, or Ctrl-C prints a traceback of each worker."""
    script = PARENT.format(path=[str(ROOT), str(ROOT / "tests")])
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True, cwd=tmp_path) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "NOW\n"
        members = family(parent.pid)
        assert len(members) == 1 + 1 + 3
        (os.killpg if to_group else os.kill)(parent.pid, number)
        _, errors = parent.communicate(timeout=60)
        assert errors == "" and parent.returncode == (130 if number == signal.SIGINT else -number)
        deadline = time.monotonic() + 20
        while running(members) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not running(members)


def running(members: list[int]) -> list[int]:
    """Which of these processes run; zombies do not."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in members}
    return [pid for pid, stat in states.items() if stat.exists() and stat.read_text().rpartition(")")[2][1] != "Z"]


def write_pictures(folder: Path, count: int) -> Catalogue:
    """JPEGs of many sizes and kinds; of every ten, one is cut off, one is empty, one is a copy, and one is missing."""
    rng = np.random.default_rng(0)
    lines = ["image,title"]
    for number in range(count):
        height, width = rng.integers(20, 200, 2)
        buffer = io.BytesIO()
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        (image.convert("L") if number % 3 == 0 else image).save(buffer, ("JPEG", "PNG", "WEBP")[number % 3])
        data = {4: buffer.getvalue()[:-200], 5: b"", 6: b"<html>"}.get(number % 10, buffer.getvalue())
        path = folder / f"{number}.img"
        if number % 10 == 7:
            data = (folder / f"{number - 4}.img").read_bytes()
        if number % 10 != 8:
            path.write_bytes(data)
        lines.append(f"{path.name},title {number}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return build_catalogue(load_splits(str(folder)), clip_words())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Catalogue]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, write_pictures(folder, 170)


def encoded(folder: Path, catalogue: Catalogue, store: FeatureStore, workers: int) -> DecodeResults:
    """What the cold pass finds; features are the means of all pixels, and depend on them all."""
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.double().mean((2, 3)).float()

    references = range(len(catalogue.references))
    return encode_missing_images(catalogue, reader_of(folder, workers), references, store, encode, lambda text: None)


def test_threads_and_processes_give_the_same_run(pictures: tuple[Path, Catalogue], tmp_path: Path) -> None:
    """Else features, ledger or the order of both depend on the number of cores."""
    folder, catalogue = pictures
    runs = []
    for workers, is_forced in ((1, False), (3, False), (2, True), (3, True)):
        store = FeatureStore(tmp_path / f"{workers}{is_forced}" / "s", 3)
        with pytest.MonkeyPatch.context() as patch:
            if is_forced:
                with_processes(patch)
                patch.setattr(Server, "can_fork_now", lambda: True)
            results = encoded(folder, catalogue, store, workers)
        found = [(each.reference, each.key, str(each.problem)) for each in results]
        keys = results.good()[1]
        runs.append((found, store.gather(store.locate(keys)).numpy().tobytes(), len(store)))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert runs[0][2] == 85 and sum(problem != "None" for _, _, problem in runs[0][0]) == 68


@pytest.mark.usefixtures("by_processes")
def test_what_is_stored_is_not_decoded_again_unless_it_is_damaged(
        pictures: tuple[Path, Catalogue], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were only touched cost their reading; a damaged feature is computed again in the same run."""
    folder, catalogue = pictures
    store = FeatureStore(tmp_path / "s", 3)
    encoded(folder, catalogue, store, 2)
    filled: list[bool] = []
    add = FeatureWriter.add

    def noted(self: FeatureWriter, lot: feed.Lot[int]) -> list[int]:
        filled.extend(outcome.is_filled for outcome in lot.outcomes)
        return add(self, lot)

    monkeypatch.setattr(FeatureWriter, "add", noted)
    again = encoded(folder, catalogue, FeatureStore(tmp_path / "s", 3), 2)
    assert len(filled) == 170 and not any(filled)
    (segment,) = (tmp_path / "s").glob(f"*{SUFFIX}")
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    store = FeatureStore(tmp_path / "s", 3)
    with pytest.warns(UserWarning, match="damaged"):
        mended = encoded(folder, catalogue, store, 2)
    assert sorted(map(str, mended)) == sorted(map(str, again)) and (store.locate(mended.good()[1]) >= 0).all()


@pytest.mark.usefixtures("by_processes")
def test_crops_and_bytes_of_streams_come_in_order_and_as_threads_make_them(
        pictures: tuple[Path, Catalogue], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a streamed run depends on the number of workers, or trains a picture on another's title."""
    folder, catalogue = pictures

    def lots() -> Iterator[list[tuple[int, Task | BadSample | np.ndarray]]]:
        paths = [folder / f"{number}.img" for number in range(60)]
        for size in (7, 0, 20, 1, 32):
            group: list[tuple[int, Task | BadSample | np.ndarray]] = []
            for number, path in enumerate(paths[:size]):
                source = path.read_bytes() if number % 2 and path.exists() else str(path)
                group.append((number, Task(source, (1, 2, None if number % 4 else 5))))
            yield group

    def results() -> list[tuple[list[int], list[Outcome], list[bytes]]]:
        found = []
        reader = reader_of(folder, 3)
        for lot in Feed(ToPixels(SPEC, 10**7), reader, 60, lot=32).lots(lots()):
            pixels = [record.tobytes() if outcome.is_filled else b""
                      for record, outcome in zip(lot.records, lot.outcomes, strict=True)]
            found.append((lot.tags, lot.outcomes, pixels))
        return found

    by_processes = results()
    monkeypatch.undo()
    assert results() == by_processes and [len(tags) for tags, _, _ in by_processes] == [7, 0, 20, 1, 32]


def test_known_keys_are_those_of_the_store() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (1000, 16), np.uint8)
    stored = [np.sort(part.reshape(-1).view("S16")) for part in (keys[:700], keys[700:900], keys[:0])]
    known = KnownKeys(*stored)
    assert [key.tobytes() in known for key in keys] == [True] * 900 + [False] * 100
    assert key_of(b"") not in KnownKeys()


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else eight ranks start eight times as many decoders as there are cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(feed, "CPU_LIMIT", Path("/nowhere"))
    for ranks, cores in (("", 16), ("4", 4), ("32", 1), ("x", 16)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert feed.cores_of_rank() == cores
