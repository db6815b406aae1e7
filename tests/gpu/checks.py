"""The checks of check.sh: `python tests/gpu/checks.py NAME[:VARIANT] FLAG...` prints lines VERDICT|status|detail."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from bench.gpu import Watched, seconds
from bench.inputs import Model, noise_pixels, random_clip, warm_batches

from data.batch import Features
from data.demo.demo import write_demo
from engine.clip.encoder import BatchedEncoder
from engine.clip.loading import load_clip
from engine.clip.model import LoadedModel, ModelOptions, build_model, distribute
from engine.config.cli import DEMO_MODEL
from engine.config.fields import Config
from engine.cuda_graph import MIN_STEPS
from engine.device import open_device
from engine.loss import Objective
from engine.optim import Plan, adamw
from engine.ranks.world import World, _Gather, close
from engine.run_folder.board import WeightDrift
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log, NullLog
from engine.run_folder.profiler import Profiler
from engine.train import Callbacks, Replica, Step, fit

ROOT, WORK, OUT = Path.cwd(), Path(os.environ["WORK"]), Path(os.environ["OUT"])
KIND = os.environ["CHECK_DEVICE"]
GPU = KIND == "cuda"
PRECISION = "auto" if GPU else "fp32"
ON_DEVICE = ["--device", KIND, "--precision", PRECISION]
CORES = len(os.sched_getaffinity(0))
DEFAULTS = Config()
DEMO, RUNS = WORK / "cache" / "demo", WORK / "runs"


def verdict(passed: bool | None, text: str) -> None:
    """One line of the result; None is a number without a goal."""
    status = "INFO" if passed is None else "PASS" if passed else "FAIL"
    print(f"VERDICT|{status}|{text.replace('|', '!')}", flush=True)


def device() -> torch.device:
    """Where the checks run, opened as a run opens it: fp32 products are fp32."""
    return open_device("cuda" if GPU else "cpu", 0)


def run_py(*arguments: str | Path, ranks: int = 1, threads: int = 0) -> subprocess.CompletedProcess[str]:
    """run.py in a process of its own, under torchrun for several ranks; what it prints goes to the check's log.

    `threads` is for a run on the CPU, beside others.
    """
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)} if threads else {})}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    print(done.stdout[-3000:], done.stderr[-3000:])
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing a process said."""
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def losses(name: str) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (RUNS / name / "steps.jsonl").read_text().splitlines()]


def training(name: str, epochs: int, *flags: str | Path) -> list[str | Path]:
    """Arguments of a run on the demo's pairs at a constant rate, so that runs of unlike length share their steps."""
    return ["train", "--model", DEMO_MODEL, "--dataset", DEMO, "--out", RUNS / name, "--cache-dir",
            WORK / f"cache-{name}", "--epochs", str(epochs), "--batch-size", "64", "--lr", "1e-3", "--schedule",
            "constant", "--eval-every", "1000000", "--save-every", "1000000", "--eval-splits", "valid", "--workers",
            str(min(CORES, 8)), *flags]


# Is it right?


def draw(variant: str, flags: list[str]) -> None:
    """The demo's pictures, for all runs below."""
    write_demo(DEMO, {"train": 3000, "valid": 400, "test": 400} if GPU else {"train": 320, "valid": 64, "test": 64})
    verdict(None, "thumbnails drawn")


def cuda_tests(variant: str, flags: list[str]) -> None:
    """The tests that only a GPU can run."""
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    chosen = ["tests/engine/test_graph.py", "tests/data/store/test_features.py"]
    done = subprocess.run([*pytest, *chosen], capture_output=True, text=True, timeout=150, check=False)
    print(done.stdout, done.stderr)
    line = last_line(done)
    verdict(done.returncode == 0 and "passed" in line and "skipped" not in line if GPU else None, line)


def demo(variant: str, flags: list[str]) -> None:
    """From nothing to a report, long enough for a CUDA graph (500 steps)."""
    done = run_py("demo", "--out", RUNS / "demo", "--cache-dir", WORK / "demo-cache", "--epochs", "12" if GPU else "2",
                  "--workers", str(min(CORES, 16)), *ON_DEVICE)
    if done.returncode:
        return verdict(False, f"exit {done.returncode}: {last_line(done)}")
    metrics = json.loads((RUNS / "demo" / "metrics.json").read_text())
    before, after = (metrics[when]["test"]["image_to_text_R@10"] for when in ("base", "tuned"))
    refused = re.search(r"no CUDA graph[^\n]*", done.stderr)
    verdict(after > before and not refused and (RUNS / "demo" / "report.html").exists(),
            f"R@10 {before:.3f} -> {after:.3f}" + (f"; {refused[0]}" if refused else ""))


def run(variant: str, flags: list[str]) -> None:
    """One of the runs that `losses` compares."""
    epochs, threads = 12 if variant == "graph" and GPU else 1, max(1, CORES // 2) if "cpu" in flags else 0
    done = run_py(*training(variant, epochs, *flags), threads=threads)
    refused = re.search(r"no CUDA graph[^\n]*", done.stderr)
    right = done.returncode == 0 and not refused
    verdict(None if right else False, f"exit {done.returncode}, {refused[0] if refused else last_line(done)}")


def compare_losses(variant: str, flags: list[str]) -> None:
    """Losses of runs that differ in device, precision, mode or graph, over the steps that they share."""
    for one, other, limit, what in (("graph", "eager", 1e-3, "bf16, CUDA graph against eager"),
                                    ("eager", "streaming", 2e-2, "bf16, cached against streaming"),
                                    ("eager", "cpu32", 5e-2, "bf16 against fp32 on the CPU"),
                                    ("gpu32", "cpu32", 2e-3, "fp32 against fp32 on the CPU")):
        pairs = list(zip(losses(one), losses(other), strict=False))
        apart = max(abs(a - b) for a, b in pairs)
        verdict(apart <= limit, f"{what}: losses differ by at most {apart:.1e} over {len(pairs)} steps ({limit:g})")


def signals(variant: str, flags: list[str]) -> None:
    """SIGTERM in the middle of a run, on the graph; resumed to its end, against a run that nobody stopped."""
    epochs, wanted = (120, 1000) if GPU else (12, 15)
    whole = run_py(*training("whole", epochs, "--quiet", *ON_DEVICE))
    command = [sys.executable, str(ROOT / "run.py"), *map(str, training("cut", epochs, "--quiet", *ON_DEVICE))]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps, end = RUNS / "cut" / "steps.jsonl", time.monotonic() + (90 if GPU else 300)
    while job.poll() is None and time.monotonic() < end:
        if steps.exists() and steps.read_bytes().count(b"\n") > wanted:
            job.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    code = job.wait(120)
    resumed = run_py("train", "--resume", "--out", RUNS / "cut")
    pairs = list(zip(losses("whole"), losses("cut"), strict=False))
    apart = max(abs(a - b) for a, b in pairs)
    verdict(code == 143 and whole.returncode == resumed.returncode == 0 and apart <= 1e-2,
            f"SIGTERM: exit {code}; resumed: exit {resumed.returncode}, {len(pairs)} losses differ by {apart:.1e}")


def two_ranks(variant: str, flags: list[str]) -> None:
    """Two ranks run, or where there is one GPU are refused by name."""
    done = run_py(*training("two", 1, *ON_DEVICE), ranks=2)
    if not GPU or torch.cuda.device_count() > 1:
        return verdict(done.returncode == 0, f"two ranks: exit {done.returncode}, {last_line(done)}")
    verdict(done.returncode != 0 and "has no GPU of its own" in done.stderr,
            f"two ranks on one GPU: exit {done.returncode}, {last_line(done)}")


def nccl(variant: str, flags: list[str]) -> None:
    """What several ranks call, with a group of one: gather with gradient, objects, barrier, DDP, a graph beside it."""
    here = device()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871", "RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", rank=0, world_size=1,
                                         timeout=datetime.timedelta(seconds=60))
    rows, ids = torch.randn(5, 4, device=here, requires_grad=True), torch.arange(10, device=here).view(5, 2)
    gathered, gathered_ids = _Gather.apply(rows, ids, (5,), 0)
    (gathered * 2).sum().backward()
    answers: list[object] = [None]
    torch.distributed.all_gather_object(answers, {"rows": 5})
    torch.distributed.barrier()
    right = gathered.equal(rows) and gathered_ids.equal(ids)
    right = right and rows.grad is not None and bool((rows.grad == 2).all()) and answers == [{"rows": 5}]
    results, took = [], []
    for size in (1, 2):  # 2: wrapped in DistributedDataParallel
        parts = demo_parts()
        optimizer = adamw(parts.trainable.values(), 1e-3, 0.0)
        replica = Replica(distribute(parts.head, size), optimizer, World(0, 0, 1, here), parts.precision)
        step = Step(replica, Objective(), 1.0, Profiler())
        torch.manual_seed(0)
        inputs = random_features(parts, 256)
        for _ in range(20):
            loss, _ = step(inputs, 256, 1e-3)
        results.append(float(loss))
        took.append(seconds(lambda: [step(inputs, 256, 1e-3) for _ in range(50)], here) / 50)  # noqa: B023
    log = Heard()
    train(parts, 256 * MIN_STEPS, 256, log)
    verdict(right and abs(results[0] - results[1]) < 1e-3 and not log.said,
            f"loss {results[0]:.4f}, in DDP {results[1]:.4f}" + "".join(f"; {text}" for text in log.said))
    exchanged = seconds(lambda: exchange_rows(here), here) / 50
    verdict(None, f"for MAX_REPLICATED_FLOP: an eager step of 256 rows {took[0] * 1e3:.2f} ms, in DDP "
                  f"{took[1] * 1e3:.2f} ms, gather and reduce-scatter of a group of one {exchanged * 1e3:.2f} ms")
    close()


def exchange_rows(here: torch.device) -> None:
    """Fifty times what ranks exchange of 512 rows of 768, forward and backward."""
    rows, ids = torch.randn(512, 768, device=here, requires_grad=True), torch.arange(1024, device=here).view(512, 2)
    for _ in range(50):
        _Gather.apply(rows, ids, (512,), 0)[0].sum().backward()


def profile(variant: str, flags: list[str]) -> None:
    """A trace of a range of steps with the step's regions; on a GPU kernels, the graph and a memory snapshot."""
    steps = "510:520" if GPU else "2:4"
    done = run_py(*training("profiled", 12 if GPU else 1, "--profile", steps, *ON_DEVICE))
    folder = RUNS / "profiled" / "profile"
    traces, snapshots = sorted(folder.glob("rank0.*.json")), sorted(folder.glob("rank0.*.memory.pickle"))
    if done.returncode or not traces or (GPU and not snapshots):
        return verdict(False, f"exit {done.returncode}, {len(traces)} traces: {last_line(done)}")
    (OUT / "trace.json.gz").write_bytes(gzip.compress(traces[0].read_bytes()))
    events = json.loads(traces[0].read_text())["traceEvents"]
    kernels = sum(event.get("cat") == "kernel" for event in events)
    regions = {event.get("name") for event in events} & {"load", "project", "loss", "backward", "optim", "graph"}
    shares = re.search(r"time of [^\n]*recorded steps[^\n]*", done.stderr)
    verdict(bool(regions and shares) and (not GPU or (kernels > 0 and "graph" in regions)),
            f"{kernels} kernels, regions {', '.join(sorted(regions))}; {shares[0] if shares else 'no shares'}")


def out_of_memory(variant: str, flags: list[str]) -> None:
    """With 250 MiB to spare the tower halves its batch and gives the same features."""
    if not GPU:
        return verdict(None, "needs a GPU")
    parts = b32("auto", device())
    pixels, small = noise_pixels(512), BatchedEncoder(parts.towers.image, device(), parts.precision)
    small.batch = 16
    expected = small(pixels)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 250 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    tower = BatchedEncoder(parts.towers.image, device(), parts.precision)
    near = F.cosine_similarity(tower(pixels), expected).min().item()
    verdict(tower.batch < 512 and near > 0.999, f"batch 512 -> {tower.batch}, cosine to those by sixteens {near:.5f}")


def fp32(variant: str, flags: list[str]) -> None:
    """--precision fp32 is fp32 on a GPU too: cuDNN's convolution is TF32 unless told otherwise."""
    pixels = noise_pixels(8)
    features = [BatchedEncoder(b32("fp32", where).towers.image, where, torch.float32)(pixels).cpu()
                for where in (torch.device("cpu"), device())]
    apart = ((features[1] - features[0]).abs().max() / features[0].abs().max()).item()
    verdict(apart <= 1e-5, f"fp32 image features against the CPU's: {apart:.1e} of the largest")


def after_the_run(variant: str, flags: list[str]) -> None:
    """verify, search and a small sweep with what `demo` has left."""
    cache, pairs = WORK / "demo-cache", WORK / "demo-cache" / "demo"
    shared: list[str | Path] = ["--dataset", pairs, "--cache-dir", cache, *ON_DEVICE]
    commands: list[list[str | Path]] = [
        ["verify", "--run", RUNS / "demo", "--cache-dir", cache, "--device", KIND],
        ["search", "three red balls", "--model", RUNS / "demo" / "model", *shared],
        ["sweep", "--model", DEMO_MODEL, "--out", RUNS / "sweep", "--space", "lr=1e-3,3e-3", "--folds", "3", "--epochs",
         "16" if GPU else "2", "--batch-size", "64", *shared]]
    for command in commands:
        done = run_py(*command)
        speed = re.findall(r"[\d,]+ runs/min", done.stderr)
        verdict(done.returncode == 0, f"{command[0]}: exit {done.returncode}, {(speed or [last_line(done)])[-1]}")


# Is it fast?


class Heard(NullLog):
    """A log that keeps what it is told to say, such as why there is no CUDA graph."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)


@dataclass(frozen=True)
class Recipe:
    """Settings of a loop in which no step may wait for the device."""

    name: str
    config: Config = DEFAULTS
    trainable: tuple[str, ...] = ("projection",)
    precision: str = PRECISION


RECIPES = [Recipe("default"), Recipe("symmetric, L2-SP", Config(loss="symmetric", l2_sp=0.01)),
           Recipe("sigmoid", Config(loss="sigmoid")), Recipe("multi", Config(duplicates="multi")),
           Recipe("keep", Config(duplicates="keep")), Recipe("hardness", Config(hardness=5.0)),
           Recipe("no clipping", Config(clip_norm=0.0)), Recipe("fp32", precision="fp32"),
           Recipe("learned scale", trainable=("projection", "logit_scale"))]


def no_sync(variant: str, flags: list[str]) -> None:
    """No step of any recipe waits for the device, with the graph and without."""
    if not GPU:
        return verdict(None, "needs a GPU")
    waited = 0
    for recipe in RECIPES:
        for graph in ("auto", "off"):
            log, problem = Heard(), ""
            parts = demo_parts(recipe.trainable, recipe.precision)
            try:
                train(parts, 256 * MIN_STEPS, 256, log, replace(recipe.config, cuda_graph=graph), watched=True)
            except RuntimeError as error:
                problem = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if problem or log.said:
                waited += 1
                verdict(False, f"{recipe.name}, --cuda-graph {graph}: {problem or log.said[0]}")
    verdict(not waited, f"{len(RECIPES)} recipes, with the graph and without")


def log_and_memory(variant: str, flags: list[str]) -> None:
    """An epoch with a real run's log against one with a silent log; graphs one after another hold no memory."""
    rows = 1_000_000 if GPU else 20_000
    parts = b32(PRECISION, device())
    took, held = {}, []
    for name in ("silent", "written"):
        for turn in range(2):  # the first warms up
            folder = WORK / f"log-{name}-{turn}"
            folder.mkdir()
            world = World(0 if name == "written" else 1, 0, 1, device(), quiet=True)
            log = Log(folder, world, Plan(rows, 1024, 1), State(), WeightDrift({}))
            with contextlib.redirect_stderr(io.StringIO()):
                took[name] = seconds(lambda: train(parts, rows, 1024, log), device())  # noqa: B023
            log.close()
            held.append(torch.cuda.memory_allocated() if GPU else 0)
    verdict(took["written"] <= 1.3 * took["silent"] if GPU else None,
            f"warm epoch of {rows:,} with the log {took['written']:.3f} s, without {took['silent']:.3f} s (1.3x)")
    verdict(held[-1] - held[1] < 2**20, f"memory held after each of four epochs: {[x // 2**20 for x in held]} MiB")


def bench(variant: str, flags: list[str]) -> None:
    """The GPU's figures of the bench."""
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--json", "--only", variant], capture_output=True,
                          text=True, check=False)
    print(done.stdout, done.stderr)
    (OUT / f"bench-{variant}.json").write_text(done.stdout)
    for figure in json.loads(done.stdout)["figures"]:
        value = " ".join(f"{value:.4g}" for value in figure["values"])
        shown = f"{value} (goal {figure['goal']})" if figure["goal"] else value
        failed = False if figure["not_measured"] and GPU else figure["reached"]
        verdict(failed, f"{figure['what']}: {shown or figure['ours']}{figure['not_measured']}")


def demo_parts(trainable: tuple[str, ...] = ("projection",), precision: str = PRECISION) -> LoadedModel:
    """The demo's model on the device."""
    return build_model(load_clip(str(DEMO_MODEL)), ModelOptions(trainable, precision=precision), device())


def b32(precision: str, where: torch.device) -> LoadedModel:
    """ViT-B/32's shape, always with the same random weights."""
    return build_model(random_clip("ViT-B/32"), ModelOptions(precision=precision), where)


def random_features(parts: LoadedModel, rows: int) -> Features:
    """A batch of features with negatives on the device."""
    image, text = Model.of(parts, device()).widths
    ids = torch.arange(rows, device=device())
    image_BV, title_BT, negative_BT = (torch.randn(rows, width, device=device()) for width in (image, text, text))
    return Features(image_BV, title_BT, negative_BT[:, None], ids, ids, ids.roll(1)[:, None])


def train(parts: LoadedModel, rows: int, batch: int, log: Log, config: Config = DEFAULTS,
          watched: bool = False) -> None:
    """One epoch of the real loop; `watched` makes a sync within its steps an error."""
    config = replace(config, epochs=1, batch_size=batch, log_every=10)
    batches = warm_batches(rows, Model.of(parts, device()).widths, batch, device())
    optimizer = adamw(parts.trainable.values(), 1e-6, config.weight_decay, config.l2_sp)
    if watched:
        batches = replace(batches, rows=Watched(batches))
    replica = Replica(parts.head, optimizer, World(0, 0, 1, device()), parts.precision)
    fit(replica, batches, Plan(rows, batch, 1), State(), config, Callbacks(log))


CHECKS: dict[str, Callable[[str, list[str]], None]] = {
    "draw": draw, "cuda_tests": cuda_tests, "demo": demo, "run": run, "losses": compare_losses, "signals": signals,
    "two_ranks": two_ranks, "nccl": nccl, "profile": profile, "out_of_memory": out_of_memory, "fp32": fp32,
    "after_the_run": after_the_run, "no_sync": no_sync, "log_and_memory": log_and_memory,
    "bench": bench}

if __name__ == "__main__":
    check, _, kind = sys.argv[1].partition(":")
    CHECKS[check](kind, sys.argv[2:])
