"""The figures of `run.py bench` that take whole processes: the reference job, `--help`, two ranks against one.

A child's cost is its CPU time and that of all its children, with one thread each, where a row does not say otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.batch import RunFailed
from eval.bench import Bench

HOME = Path(__file__).resolve().parents[1]
RUN = [sys.executable, str(HOME / "run.py")]
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
         "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
CLIP = "transformers.models.clip.modeling_clip"
EPOCHS = 2, 20


def measure_help(bench: Bench) -> None:
    """P11: `run.py --help`, seconds by the clock, and, unless quick, an import of transformers for comparison."""
    took = [_job([*RUN, "--help"])[1] for _ in range(2 if bench.quick else 5)]
    theirs = "" if bench.quick else f"{_job([sys.executable, '-c', f'import {CLIP}'])[1]:.2f} s"
    bench.note("P11", "run.py --help, against importing CLIP from transformers: seconds by the clock",
               f"{sorted(took)[len(took) // 2]:.2f} s", theirs, took, "<= 0.3")


def measure_reference_job(bench: Bench, model: Path, dataset: Path, scratch: Path) -> None:
    """P1: 76 pairs, every evaluation the original does, ours against sentence-transformers: CPU seconds of all of it.

    Ours runs before and after theirs, from an empty store each time. Theirs runs 2 epochs; 20 are reckoned from what an
    epoch took.
    """
    what = "the whole reference job, 76 pairs, {} epochs, against sentence-transformers: CPU time"
    peer = HOME / "tests" / "peer_job.py"
    if bench.quick or not importlib.util.find_spec("sentence_transformers") or not peer.exists():
        bench.note("P1", what.format("2 and 20"), "not measured",
                   "--quick" if bench.quick else "sentence-transformers is not installed")
        return

    def ours(turn: int) -> list[float]:
        outs = [scratch / f"job-{epochs}-{turn}" for epochs in EPOCHS]
        return [_job([*RUN, "--model", str(model), "--dataset", str(dataset), "--out", str(out), "--cache-dir",
                      f"{out}-cache", "--epochs", str(epochs), "--workers", "1", "--precision", "fp32", "--device",
                      "cpu", "--quiet"])[0] for epochs, out in zip(EPOCHS, outs, strict=True)]

    before = ours(0)
    said = json.loads(_job([sys.executable, str(peer), str(model), str(dataset), str(scratch / "peer"),
                            str(EPOCHS[0])])[2].strip().splitlines()[-1])
    theirs = [said["cpu_s"] + (epochs - EPOCHS[0]) * said["epoch_cpu_s"] for epochs in EPOCHS]
    goals = (">= 8", ">= 30")
    for epochs, *mine, other, goal in zip(EPOCHS, before, ours(1), theirs, goals, strict=True):
        reckoned = "" if epochs == EPOCHS[0] else " (reckoned)"
        bench.note("P1", what.format(epochs), f"{sum(mine) / 2:.1f} s", f"{other:.1f} s{reckoned}",
                   [other / took for took in mine], goal)


def measure_ranks(bench: Bench, model: Path, dataset: Path, scratch: Path) -> None:
    """P12: the cold pass as the run itself times it, one rank against two under torchrun, one thread a rank."""
    what = "cold pass, one rank against two ranks with one thread each: seconds by the clock"
    cores = len(os.sched_getaffinity(0))
    if bench.quick or cores < 2:
        bench.note("P12", what, "not measured", "--quick" if bench.quick else "one core")
        return
    took = []
    for ranks in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        said = _job([*launcher, *RUN[1:], "eval", "--model", str(model), "--dataset", str(dataset), "--cache-dir",
                     str(scratch / f"ranks-{ranks}"), "--split", "train", "--workers", "1", "--precision", "fp32",
                     "--device", "cpu"])[3]
        took.append(float(re.search(r"titles encoded, ([\d.]+) s", said)[1]))  # type: ignore[index]
    bench.note("P12", what, f"{took[1]:.1f} s", f"{took[0]:.1f} s", [took[0] / took[1]], ">= 1.8")


def _job(command: Sequence[str]) -> tuple[float, float, str, str]:
    """Run a process to its end: CPU seconds, seconds by the clock, stdout, stderr. Raises RunFailed if it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALONE}, cwd=HOME, check=False)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunFailed(f"{Path(command[1]).name} ended with {done.returncode}: {last}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, seconds, done.stdout, done.stderr
