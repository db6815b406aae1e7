"""How processes end: signals, stalls, lost launchers, full disks. Real processes, real signals, nobody left behind."""

import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from helpers import HANGS_S, ROOT, as_ranks, family, full, kill, last_flags, on_ranks, served, start

import run
from data.batch import AgreedError, RunFailed, Team
from engine.ranks.signals import GRACE_S, HANDLED_SIGNALS, StopSignal
from engine.ranks.watchdog import Watchdog
from engine.ranks.world import World
from engine.run_folder.checkpoint import newest_valid

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1
SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import run
def slowed(module, name, seconds, skip):
    whole, calls = getattr(module, name), []
    def slow(*args, **named):
        calls.append(1)
        if len(calls) > skip:
            print("NOW", flush=True)
            time.sleep(seconds)
        return whole(*args, **named)
    setattr(module, name, slow)
import {module}
slowed({owner}, {name!r}, {seconds}, {skip})
sys.exit(run.main(sys.argv[1:]))
"""
PHASES = {  # what is made slow, how slow, and from which call on; when it says NOW, it is time for the signal
    "training": ("engine.train", "learning_rate", 0.05, 20),
    "evaluation": ("engine.run_folder.checkpoint", "Saver.record_evaluation", 60, 1),  # after the base model's
    "saving": ("engine.run_folder.checkpoint", "save_file", 1, 0),
    "decoding": ("data.images.worker", "decode_image", 1, 0),
}


class Started:
    """A run in progress, what it says, and all processes that belong to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.said = process, ""
        self._readers = [threading.Thread(target=self._read, args=(stream,), daemon=True)
                         for stream in (process.stdout, process.stderr)]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self.said += line

    def wait_for(self, true: Callable[[], object], seconds: float = 100) -> float:
        """Seconds until something is true; AssertionError with all that was said if it does not come true."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < seconds and (self.process.poll() is None or true()), self.said
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self, seconds: float) -> int:
        """The exit code, at most so many seconds from now."""
        self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return self.process.returncode


@contextmanager
def started(phase: str, model: Path, pairs: Path, home: Path, *flags: str, ranks: int = 1) -> Iterator[Started]:
    module, name, seconds, skip = PHASES[phase]
    script = home / "slow.py"
    *inner, name = name.split(".")
    owner = ".".join([module, *inner])
    script.write_text(SLOW.format(root=str(ROOT), module=module, owner=owner, name=name, seconds=seconds, skip=skip))
    args = last_flags(["--model", model, "--dataset", pairs, "--out", home / "run", "--cache-dir", home / "cache",
                       "--precision", "fp32", "--epochs", "1000", "--eval-every", "3", "--save-every", "1000",
                       "--log-every", "100", *flags])
    job = Started(start(args, ranks, program=script))
    members = []
    try:
        yield job
        members = family(job.process.pid)
    finally:
        kill(job.process.pid)
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)


def alive(pids: list[int]) -> list[int]:
    """Which of these run; zombies do not."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


ALL = [*product(PHASES, [1, 2], [[TERM], [INT], [INT, INT], [HUP], [USR1], [TERM, TERM]])]
FEW = [("training", 2, [TERM]), ("evaluation", 1, [INT]), ("saving", 1, [HUP, TERM])]
SLOWLY = pytest.mark.skipif(not full(0, 1), reason="only with THUMBTUNE_FULL=1")


@pytest.mark.parametrize("phase, ranks, signals", ALL if full(0, 1) else FEW)
def test_a_signal_saves_what_there_is_and_leaves_nobody(phase: str, ranks: int, signals: list[int], tiny_model: Path,
                                                        pairs: Path, tmp_path: Path) -> None:
    with started(phase, tiny_model, pairs, tmp_path, ranks=ranks) as job:
        job.wait_for(lambda: "NOW" in job.said)
        members = family(job.process.pid)
        for number in signals:
            os.kill(job.process.pid, number)
            time.sleep(0.3)
        code = job.end(40 if ranks == 1 else 80)  # what is slow here takes 60 s or 150 s by itself
        job.wait_for(lambda: not alive(members), 20)
        assert "Traceback (most recent call last)" not in job.said or ranks > 1, job.said
        if ranks == 1:
            assert code == (130 if signals[-1] == INT else 143)
        elif len(signals) == 1:
            assert f"exitcode  : {128 + signals[0]}" in job.said or code != 0  # torchrun's own code says nothing
        found = newest_valid(tmp_path / "run", pytest.fail)
        if phase == "decoding" or signals == [INT, INT]:
            return
        assert found is not None
        steps = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
        assert len(steps) == found[1][2]["state"]["step"]  # saved at the step it had reached, each step logged
        assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@SLOWLY
def test_no_stall_outlives_its_timeout(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    with started("training", tiny_model, pairs, tmp_path, "--dist-timeout", "4", ranks=2) as job:
        job.wait_for(lambda: "NOW" in job.said)
        launcher, *ranks = family(job.process.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        job.wait_for(lambda: "a rank did not answer in time (--dist-timeout)" in job.said, 60)
        assert "run.py train failed: rank 0, " in job.said


def test_no_rank_outlives_its_launcher(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    with started("training", tiny_model, pairs, tmp_path, "--resume", "auto", ranks=2) as job:
        job.wait_for(lambda: "NOW" in job.said)
        launcher, *ranks = family(job.process.pid)
        assert len(alive(ranks)) >= 2
        os.kill(launcher, signal.SIGKILL)
        began = time.monotonic()
        while alive(ranks) and time.monotonic() - began < 60:  # left alone they train for 150 s
            time.sleep(0.1)
        assert not alive(ranks)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_fills_up_ends_the_run_in_a_line(small_disk: Path, tiny_model: Path, pairs: Path,
                                                     tmp_path: Path) -> None:
    with started("training", tiny_model, pairs, tmp_path, "--out", str(small_disk / "run"), "--save-every", "5",
                 "--keep", "2") as job:
        job.wait_for(lambda: (small_disk / "run/checkpoints/last").exists())
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        assert job.end(60) == 1
        lines = [line for line in job.said.splitlines() if "failed" in line or "Error" in line or "File " in line]
        assert len(lines) == 1 and "No space left on device" in lines[0], job.said
    (small_disk / "filler").unlink()
    assert newest_valid(small_disk / "run", pytest.fail) is not None


@SLOWLY
def test_a_deleted_run_folder_ends_the_run_in_a_line(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    with started("training", tiny_model, pairs, tmp_path, "--save-every", "5") as job:
        job.wait_for(lambda: (tmp_path / "run/checkpoints/last").exists())
        (tmp_path / "run").rename(tmp_path / "gone")
        assert job.end(60) == 1
        assert "run.py train failed: [Errno 2]" in job.said and "Traceback" not in job.said, job.said
    assert not (tmp_path / "run").exists()


@contextmanager
def dripping_server() -> Iterator[str]:
    """Answers with a byte a second."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"\xff")
                    time.sleep(1)

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        yield url


def test_a_signal_while_fetching_waits_for_no_server(tiny_model: Path, tmp_path: Path) -> None:
    with dripping_server() as url:
        table = "".join(f"{url}/{i}.jpg,a title {i}\n" for i in range(20))
        (tmp_path / "train.csv").write_text("thumbnail_url,title\n" + table)
        process = start(["--model", tiny_model, "--dataset", tmp_path, "--allow-host", "127.0.0.1", "--out",
                         tmp_path / "run", "--cache-dir", tmp_path / "cache"])
        try:
            while not (tmp_path / "cache/fetched/partial").exists() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1)
            process.send_signal(TERM)
            said = process.communicate(timeout=25)[1]  # the server would have held it for 30 s, and then again
            assert process.returncode == 143, said
            assert "Traceback" not in said
        finally:
            kill(process.pid)


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers of before."""
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_repeated_request_to_end_is_no_second_wish(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM and torchrun both send SIGTERM, and a terminal that closes sends SIGHUP: what is being saved is saved.

    Only a second Ctrl-C, or asking again when the time for saving is over, leaves at once.
    """
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = StopSignal()
    with pytest.raises(SystemExit) as end, stop.graceful_exit():
        for number in (HUP, TERM, TERM, USR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert not ended
        os.kill(os.getpid(), INT)
        stop._received_at -= GRACE_S + 1
        os.kill(os.getpid(), TERM)
        assert ended == [130, 143]
    assert end.value.code == 143


def test_nohup_is_obeyed(handlers: None) -> None:
    """A run started under nohup goes on when its terminal closes."""
    signal.signal(HUP, signal.SIG_IGN)
    StopSignal()
    assert signal.getsignal(HUP) == signal.SIG_IGN


def test_a_closed_terminal_takes_the_line_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGHUP every write to the terminal fails; progress must not keep the run from saving."""
    reader, writer = os.pipe()
    os.close(reader)
    world = World(0, 0, 1, torch.device("cpu"))
    for stream in (open(writer, "w", buffering=1), None):
        monkeypatch.setattr("sys.stderr", stream)
        world.say("a line")
        world.live("progress")
        monkeypatch.undo()
        with suppress(OSError):
            if stream is not None:
                stream.close()


def test_lines_that_nobody_reads_hold_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal stopped by Ctrl-S, a pager that waits: training goes on, and other ranks meet no timeout."""
    monkeypatch.setattr("engine.console.PATIENCE_S", 0.01)
    reader, writer = os.pipe()
    world = World(0, 0, 1, torch.device("cpu"))
    with open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 512)
        os.set_blocking(writer, True)
        for step in range(100):
            world.say(f"step {step}")
        room = 1 << 20
        assert set(os.read(reader, room)) == {ord("x")}
        world.say("somebody reads")
        assert os.read(reader, room) == b"(100 lines are left out here: nobody read them)\nsomebody reads\n"
    os.close(reader)


def test_ranks_save_together_only_where_all_failed_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that saves while another still trains would mix up their collectives."""
    monkeypatch.setattr("engine.ranks.world.MEET_S", 0.3)

    def answers(*steps: int) -> list[bool | Exception]:
        store = dist.HashStore()

        def come(team: Team) -> bool:
            world = World(team.rank, team.rank, 2, torch.device("cpu"), store=store)
            return bool(steps[team.rank]) and world.have_all_failed(steps[team.rank])

        return as_ranks(2, come)

    assert answers(7, 7) == [True, True]
    assert answers(7, 8) == [False, False]
    assert answers(7, 0) == [False, False]  # the second goes on


@pytest.mark.parametrize("code, error", [(2, AgreedError), (1, RunFailed), (143, RunFailed)])
def test_a_rank_that_has_ended_is_not_waited_for(code: int, error: type[Exception]) -> None:
    """srun lets the others run on: they would wait for --dist-timeout, ten minutes, and blame the network."""
    store = dist.HashStore()
    store.set("ended/1", str(code))
    with pytest.raises(error, match=f"rank 1 has ended with exit code {code}"):
        World(0, 0, 2, torch.device("cpu"), store=store).monitored_exchange(None)


def test_a_store_that_does_not_answer_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under srun rank 0 holds the store: while it was stopped, as in export, the others waited without end."""
    given_up: list[str] = []

    class Stopped(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            began = time.monotonic()
            while not given_up and time.monotonic() - began < 60:
                time.sleep(0.01)
            raise dist.DistError("the process has ended meanwhile")

    monkeypatch.setattr(Watchdog, "_give_up", lambda watchdog, operation: given_up.append(operation))
    monkeypatch.setattr("engine.ranks.world._store_watchdogs", [Watchdog("train", 1, 0.3)])
    with pytest.raises(RunFailed):
        World(1, 1, 2, torch.device("cpu"), store=Stopped()).monitored_exchange(None)
    assert given_up[0] == "asking the store of rank 0"


@pytest.mark.parametrize("stdout", ["full", "closed", "left"])
def test_a_result_that_cannot_be_printed_is_in_a_file_or_an_error(
        stdout: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run whose terminal is gone would be started again by its scheduler; a lost answer would pass for one.
    """
    def broken(*_: object) -> NoReturn:
        raise {"full": OSError(errno.ENOSPC, "full"), "left": BrokenPipeError(errno.EPIPE, "left")}[stdout]

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "write", broken)
    monkeypatch.setattr("sys.stdout", None if stdout == "closed" else terminal)
    world = World(0, 0, 1, torch.device("cpu"), quiet=True)
    world.show("a table", "run/metrics.json")
    assert f"{stdout}); it is in run/metrics.json" in capsys.readouterr().err
    with pytest.raises(BrokenPipeError if stdout == "left" else OSError):
        world.show("a table")


def test_a_closed_standard_stream_is_no_place_for_a_file(tmp_path: Path) -> None:
    """With `2>&-`, the next file that is opened would get what a library in C prints on stderr."""
    script = ("import os; from engine.console import hold_standard_descriptors as hold; hold(); "
              f"file = open({str(tmp_path / 'log')!r}, 'w'); file.write('a line'); os.write(2, b'warning')")
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script]
    assert subprocess.run(command, cwd=ROOT, timeout=HANGS_S).returncode == 0
    assert (tmp_path / "log").read_text() == "a line"


def test_what_nobody_foresaw_is_one_line_and_a_file_with_the_traceback(
        tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """A fault of ours ends in a line, and there is something to put into a bug report."""
    def fault(*_: object, **__: object) -> None:
        raise IndexError("index 7\nis out of range")

    flags = ["--model", str(tiny_model), "--dataset", str(pairs), "--cache-dir", str(tmp_path / "cache"), "--quiet"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for module, folder, command in (("engine.commands.train.fit", "run", "train"), ("engine.commands.check.read_rows",
                                    ".", "check")):
        capsys.readouterr()
        monkeypatch.setattr(module, fault)
        arguments = ["train", *flags, "--out", str(tmp_path / "run")] if command == "train" else ["check", *flags[2:]]
        assert run.main(arguments) == 1
        said = capsys.readouterr().err.splitlines()
        (report,) = (tmp_path / folder).glob("*error-rank-0-*.txt")
        assert said == [f"run.py {command} failed: IndexError: index 7 is out of range (not foreseen; the traceback "
                        f"is in {report})"]
        assert "line" in report.read_text() and "in fault" in report.read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_title_can_be_printed_on_any_terminal(encoding: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """LC_ALL=C, PYTHONIOENCODING=latin-1: a title that such a terminal has no letters for ends no command."""
    written = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    for stream, buffer in written.items():
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(buffer, encoding=encoding))
    assert run.main(["check", "--dataset", "日本 🎬.csv", "--cache-dir", str(tmp_path)]) == 2
    print("日本")
    for stream, buffer in written.items():
        getattr(sys, stream).flush()
        assert b"\\u65e5\\u672c" in buffer.getvalue()


def _late() -> list[Any]:
    """Rank 1 comes late to a meeting, telling how far it is; then a signal reaches it alone; then it stays silent."""
    rank, store = dist.get_rank(), dist.PrefixStore("meeting", dist.distributed_c10d._get_default_store())
    world = World(rank, rank, 2, torch.device("cpu"), timeout_s=4.0, store=store)
    for _ in range(30 * rank):  # all in all longer than the silence that is borne, each time a twentieth of it
        time.sleep(0.2)
        world.say("on the way")
    answers: list[Any] = [world.monitored_exchange(rank)]
    stop, step = StopSignal(), 0
    with stop.graceful_exit():
        while not (number := stop.agreed_signal(world, step := step + 1)) and step < 400:
            time.sleep(0.01)
            if rank == 1 and step == 150:
                os.kill(os.getpid(), TERM)
        answers.append((number, step))
        stop._received = 0
    if rank == 0:
        with pytest.raises(RunFailed) as silence:
            world.monitored_exchange(rank)
        answers.append(str(silence.value))
    return answers


def test_ranks_wait_for_the_slow_name_the_silent_and_stop_together() -> None:
    first, second = on_ranks(2, _late)
    assert first[0] == second[0] == [0, 1]
    assert first[1] == second[1] and first[1][0] == TERM and 150 <= first[1][1] < 400
    assert "rank 0 has heard nothing of rank 1 for 4 s" in first[2]


def test_nothing_in_a_hostile_model_folder_runs(tiny_model: Path, pairs: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    for name in ("pytorch_model.bin", "model.safetensors"):
        model = tmp_path / name.split(".")[0]
        shutil.copytree(tiny_model, model)
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(Bomb()))
        (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
        capsys.readouterr()
        assert run.main(["--model", str(model), "--dataset", str(pairs), "--out", str(tmp_path / "run")]) == 2
        assert "run.py train: --model" in capsys.readouterr().err
    assert not marker.exists()
