"""How processes end: signals, stalls, lost launchers, full disks. Real processes, real signals, nobody left behind."""

import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, Loopback, family, full, kill, on_ranks, start

import run
from data.batch import RunFailed
from engine.checkpoint import newest
from engine.dist import World
from engine.stop import Stop

TERM, INT = signal.SIGTERM, signal.SIGINT
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
    "evaluation": ("engine.checkpoint", "Saver.note", 60, 1),  # the base model has been measured
    "saving": ("engine.checkpoint", "save_file", 1, 0),
    "decoding": ("data.cold", "decode_image", 1, 0),
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
    job = Started(start(["--model", model, "--dataset", pairs, "--out", home / "run", "--cache-dir", home / "cache",
                         "--precision", "fp32", "--epochs", "1000", "--eval-every", "3", "--save-every", "1000",
                         "--log-every", "100", *flags], ranks, program=script))
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


ALL = [*product(PHASES, [1, 2], [[TERM], [INT], [INT, INT]])]
FEW = [("training", 2, [TERM]), ("evaluation", 1, [INT]), ("saving", 1, [TERM])]
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
            assert code == 128 + signals[-1]
        elif len(signals) == 1:
            assert f"exitcode  : {128 + signals[0]}" in job.said or code != 0  # torchrun's own code says nothing
        found = newest(tmp_path / "run", pytest.fail)
        if phase == "decoding" or len(signals) == 2:
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
    assert newest(small_disk / "run", pytest.fail) is not None


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

    with Loopback(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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


def _late() -> list[Any]:
    """Rank 1 comes late to a meeting, telling how far it is; then a signal reaches it alone; then it stays silent."""
    rank, store = dist.get_rank(), dist.PrefixStore("meeting", dist.distributed_c10d._get_default_store())
    world = World(rank, rank, 2, torch.device("cpu"), timeout_s=4.0, store=store)
    for _ in range(30 * rank):  # all in all longer than the silence that is borne, each time a twentieth of it
        time.sleep(0.2)
        world.say("on the way")
    answers: list[Any] = [world.meet(rank)]
    stop, step = Stop(), 0
    with stop.gracefully():
        while not (number := stop.agreed(world, step := step + 1)) and step < 400:
            time.sleep(0.01)
            if rank == 1 and step == 150:
                os.kill(os.getpid(), TERM)
        answers.append((number, step))
        stop._received = 0
    if rank == 0:
        with pytest.raises(RunFailed) as silence:
            world.meet(rank)
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
