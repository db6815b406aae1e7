"""Who a process is among those that one launcher started: torchrun, srun, mpirun, or nobody."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers import HANGS_S, ROOT, kill

from data.batch import UserError
from engine.device import pick_device
from engine.ranks import launch, rendezvous
from engine.ranks.launch import Launch, choose_interface, first_host, interface_towards, read_launch
from engine.ranks.watchdog import AwakeClock

LAUNCHER = re.compile("(local_)?(rank|world_size)|master_(addr|port)|gloo_socket_ifname|(slurm|ompi|pmi|mpi)_.*", re.I)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables, and none left behind."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items()
                                        if not LAUNCHER.fullmatch(name)})
    return monkeypatch


@pytest.mark.parametrize("nodes, host", [
    ("node[01-03,7],gpu-a", "node01"), ("gpu-a,node[1-2]", "gpu-a"), ("rack[1-2]n[10-14],x", "rack1n10"), ("n1", "n1"),
    ("node[007]", "node007"), ("", "")])
def test_rank_0_is_on_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70012",
         "SLURM_JOB_NODELIST": "n[4-7]"}
BATCH = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "m",
            "MASTER_PORT": "1"}


@pytest.mark.parametrize("variables, expected, master", [
    ({}, Launch(), None),
    (SLURM, Launch(3, 1, 8, 0, "SLURM"), "n4:25012"),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n6"}, Launch(3, 1, 4, 0, "SLURM"), "n6:25012"),
    ({**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "77"}, Launch(3, 1, 8, 0, "SLURM"), "here:77"),
    ({**BATCH, "SLURM_STEP_ID": "0"}, Launch(0, 0, 8, 0, "SLURM"), "n4:25012"),
    (BATCH, Launch(0, 0, 8, 0, "SLURM", certain=False), "n4:25012"),
    ({**SLURM, **TORCHRUN}, Launch(5, 1, 16, 4, "torchrun"), "m:1"),
    ({**SLURM, **OPEN_MPI}, Launch(1, 1, 2, 2, "Open MPI"), "n4:25012"),
    (OPEN_MPI, Launch(1, 1, 2, 2, "Open MPI"), "127.0.0.1:29500"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "m"}, Launch(1, 0, 2, 0, "PMI"), "m:29500"),
])
def test_each_launcher_says_who_this_is(variables: dict[str, str], expected: Launch, master: str | None,
                                        environment: pytest.MonkeyPatch) -> None:
    os.environ |= variables
    assert read_launch() == expected
    if master:
        assert f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}" == master
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == (str(expected.rank), str(expected.size))


def test_python_in_an_sbatch_script_is_one_process_and_says_so(environment: pytest.MonkeyPatch) -> None:
    """It would wait for tasks that nobody has started."""
    os.environ |= {**BATCH, "SLURM_TASK_PID": "99"}
    found = read_launch()
    assert (found.size, found.certain) == (1, True) and "srun python run.py" in found.remark


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "abc"}, "RANK is 'abc', which is no number"), ({"RANK": "3"}, "rank 3 of 1"),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"), ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
    ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT is 99999, which is no port"),
    ({**SLURM, "SLURM_NTASKS": "-1"}, "SLURM_NTASKS is '-1', which is no number; SLURM sets it"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR"),
])
def test_a_damaged_environment_is_one_sentence(variables: dict[str, str], words: str,
                                               environment: pytest.MonkeyPatch) -> None:
    os.environ |= variables
    with pytest.raises(UserError, match=re.escape(words)):
        read_launch()


def test_gloo_takes_the_interface_that_reaches_rank_0(environment: pytest.MonkeyPatch) -> None:
    """By itself it takes the address of the host's name: 127.0.1.1 on Debian, which no other node reaches."""
    here = interface_towards("127.0.0.1")
    assert here and interface_towards("no-such-host.invalid") == ""
    choose_interface(Launch(0, 0, 2, 2, "torchrun"))
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == here
    environment.setattr(launch, "interface_towards", {"127.0.0.1": "lo", "n4": "ib0", launch.ELSEWHERE: "eth0",
                                                      "debian": "lo"}.get)
    for master, expected in (("n4", "ib0"), ("debian", "eth0"), ("127.0.0.1", "lo")):
        os.environ["MASTER_ADDR"] = master
        choose_interface(Launch(0, 0, 8, 4, "torchrun"))
        assert os.environ["GLOO_SOCKET_IFNAME"] == expected
        choose_interface(Launch(0, 0, 8, 8, "torchrun"))  # what is set stays
        assert os.environ.pop("GLOO_SOCKET_IFNAME") == expected


def refusals(environment: pytest.MonkeyPatch, *launches: Launch) -> list[str]:
    """What ranks of these launches say that meet at one store; a launch without a device ends before it joins."""
    environment.setattr(rendezvous, "REFUSAL_S", 1.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}

    def join(launch: Launch) -> str:
        try:
            if launch.local_rank < 0:
                with rendezvous.end_announced(launch):
                    raise UserError("no such flag")
            _, store = rendezvous.meet(launch, timedelta(seconds=HANGS_S))
            assert store is not None
            return rendezvous.agree_session_id(store, launch.rank, launch.size, HANGS_S)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(launches)) as threads:
        return list(threads.map(join, launches))


def test_ranks_that_cannot_join_do_not_keep_the_others_waiting(environment: pytest.MonkeyPatch) -> None:
    """They would wait for --dist-timeout, ten minutes, and then name no cause."""
    first, second = refusals(environment, Launch(0, 0, 2), Launch(1, 0, 3))
    assert first == second and "WORLD_SIZE is 3 for rank 1 and 2 for rank 0" in first
    said = refusals(environment, Launch(0, 0, 3), Launch(1, 0, 3), Launch(1, 0, 3))
    assert "two processes were started as rank 1" in said[0]
    for ended, waiting in ((0, 1), (1, 0)):
        launches = {ended: Launch(ended, -1, 2), waiting: Launch(waiting, 0, 2)}
        said = refusals(environment, launches[0], launches[1])
        assert said[ended] == "no such flag" and f"rank {ended} has ended before it joined" in said[waiting]
    os.environ["MASTER_ADDR"] = "no.such.host.invalid"
    with pytest.raises(UserError, match="MASTER_ADDR is no.such.host.invalid, a name that is not known here"):
        rendezvous.meet(Launch(1, 0, 2), timedelta(0))


def test_the_one_gpu_that_a_rank_sees_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --gpus-per-task=1 shows local rank 3 one device, number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("engine.device._refuse_missing_kernels", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto", 3) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        pick_device("auto", 3)


def test_time_in_which_a_process_is_stopped_is_no_waiting() -> None:
    code = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from engine.ranks.watchdog import AwakeClock\nclock, began = AwakeClock(), time.monotonic()\n"
            "print('started', flush=True)\n"
            "while time.monotonic() - began < 5: time.sleep(0.05); awake = clock.read()\nprint(awake)")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    awake = float(process.communicate(timeout=60)[0])
    assert awake < 4 and AwakeClock().read() < 1


STAND_INS = {
    "srun": """#!/bin/bash
# A stand-in for SLURM's: two tasks as on two nodes, each with a home of its own; at the first start USR1 to both.
for task in 0 1; do
    HOME=$HOMES/$task SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=0 "$@" &
    pids="$pids $!"
done
if [ ! -e $HOMES/requeued ]; then
    until [ -s $HOMES/run/steps.jsonl ]; do kill -0 $pids || break; sleep 0.1; done
    kill -USR1 $pids
fi
code=0
for pid in $pids; do wait $pid; last=$?; [ $last -gt $code ] && code=$last; done
exit $code
""",
    "scontrol": """#!/bin/bash
echo "$@" > $HOMES/requeued
""",
}


def test_the_sbatch_file_of_the_readme_saves_is_requeued_and_goes_on(tiny_model: Path, pairs: Path,
                                                                     tmp_path: Path) -> None:
    """And its two tasks, whose cache folders are not one, train on each other's features."""
    readme = (ROOT / "engine/README.md").read_text(encoding="utf-8")
    script = readme.partition("<!-- sbatch -->\n```bash\n")[2].partition("```")[0]
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for task in "01":
        (tmp_path / task).mkdir()
    (tmp_path / "big.toml").write_text(f'model = "{tiny_model}"\ndataset = "{pairs}"\nprecision = "fp32"\n'
                                       "epochs = 200\nlog-every = 1\neval-every = 100000\nsave-every = 100000\n")
    script = script.replace("big.toml", str(tmp_path / "big.toml")).replace("/shared/cache", "'~/cache'")
    (tmp_path / "job.sh").write_text(script.replace("/shared/runs/big", str(tmp_path / "run")))
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "HOMES": str(tmp_path), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": str(os.getpid()),
                 "SLURM_JOB_NODELIST": "localhost", "GLOO_SOCKET_IFNAME": ""}
    said = []
    for code in (143, 0):
        job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], cwd=ROOT, env={**os.environ, **variables}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            said.append(job.communicate(timeout=HANGS_S)[1])
        finally:
            kill(job.pid)
        assert job.returncode == code, said[-1]
    steps = [line.split(",")[0] for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {number}' for number in range(1, 601)]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert "joined 2 ranks that SLURM started, rank 0 at localhost:" in said[0]
    assert "2 cache folders for 2 ranks" in said[0] and "resumed from" in said[1]
    assert "Traceback" not in "".join(said)
