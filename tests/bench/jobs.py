"""P1, P11 to P14, P18 to P20: whole processes. They cost the CPU time of all of them, one thread each."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path

import torch

from data.demo.demo import write_demo
from engine.config.cli import DEMO_MODEL
from engine.device import pick_precision
from engine.publish.export import write_model

from .harness import Bench, Figure, NotMeasured, Race, amount, children_cpu, timed
from .inputs import CPU, vit_b32, write_pairs

HOME = Path(__file__).resolve().parents[2]
RUN = [sys.executable, str(HOME / "run.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
              "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
ON_CPU = ["--workers", "1", "--device", "cpu"]
IMPORT_CLIP = "import transformers.models.clip.modeling_clip"
IMPORT_TORCH = "import torch"
EPOCHS = {2: (">= 6", ">= 9"), 20: (">= 38", "")}  # of the reference job: goals in fp32 and in bf16
COUNT_DECODES = """
import data.images.worker, data.inputs, engine.commands.train as train, json, run
decode, encode, evaluate = data.images.worker.decode_image, data.inputs.encode_images, train.Evaluator.__call__
decodes, opening, encoded = [], [], []
def counted_decode(*args, **options):
    decodes.append(1)
    return decode(*args, **options)
def counted_encode(*args):
    features = encode(*args)
    encoded.append(len(features))
    return features
def noted_evaluation(self, *args):
    evaluate(self, *args)
    opening.append(len(decodes))
data.images.worker.decode_image, data.inputs.encode_images = counted_decode, counted_encode
train.Evaluator.__call__ = noted_evaluation
run.main({args!r})
print(json.dumps([opening[0], encoded[-1]]))
"""
LOAD_ROWS = """
import json, re, time
from data.catalogue import build_catalogue
from data.sources.source import load_splits
start = time.process_time()
rows = load_splits({file!r})
loaded = time.process_time()
build_catalogue(rows)
# Of this process alone: ru_maxrss also holds the peak of the process that started it.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([loaded - start, time.process_time() - loaded, peak]))
"""
# Parts of a warm train and the functions that do them; a function inside another counts for its own part alone.
PARTS = {
    "rows of the dataset": ["engine.commands.train.open_source"],
    "model": ["engine.commands.train.load_model"],
    "identity of images and titles, stored features": ["engine.commands.train.open_data"],
    "opening TensorBoard and logs": ["engine.commands.train.Log"],
    "evaluations, intervals and tests": ["engine.commands.train.evaluate_splits", "engine.commands.train.summaries",
                                         "engine.commands.train.differences"],
    "answers, pictures and projector": ["eval.report.show.AnswerLog.record"],
    "checkpoints": ["engine.run_folder.checkpoint.Saver.save"],
    "steps and their log": ["engine.commands.train.fit"],
    "exported model and card": ["engine.commands.train.export", "engine.publish.export.Origin.of"],
    "report page": ["engine.commands.train.write_run_report"],
}
TIME_PARTS = """
import atexit, gc, time
gc.set_threshold(100_000)  # as run.py does
atexit.register(gc.freeze)
import torch
seconds = {{"import torch": time.process_time()}}
import json, sys, run
from functools import wraps
from pkgutil import resolve_name
import engine.commands.train
seconds["our own modules"] = time.process_time() - seconds["import torch"]
inner = [0.0]
def count(part, function):
    @wraps(function)
    def counted(*args, **options):
        start = time.process_time()
        inner.append(0.0)
        try:
            return function(*args, **options)
        finally:
            taken = time.process_time() - start
            seconds[part] = seconds.get(part, 0.0) + taken - inner.pop()
            inner[-1] += taken
    return counted
for part, names in {parts!r}.items():
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(resolve_name(owner), attribute, count(part, getattr(resolve_name(owner), attribute)))
before = time.process_time()
code = run.main({args!r})
seconds["the rest of the run"] = time.process_time() - before - inner[0]
print(json.dumps(seconds))
"""
SPACE = "lr=1e-3,3e-3,1e-2 epochs=2,5 loss=image-to-text,symmetric"


def process(*command: str | Path) -> tuple[str, str]:
    """Run a process to its end: stdout, stderr. Raises RuntimeError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}, cwd=HOME,
                          check=False, timeout=1800)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{' '.join(map(str, command))[:200]} ended with {done.returncode}: {last}")
    return done.stdout, done.stderr


def python(code: str) -> tuple[str, str]:
    """`python -c CODE`."""
    return process(sys.executable, "-c", code)


def save_model(bench: Bench) -> Path:
    """ViT-B/32 with random weights as a folder that transformers and sentence-transformers load."""
    folder = bench.scratch / "model"
    if not folder.exists():
        folder.mkdir()
        write_model(vit_b32().parts.clip, {}, folder, "fp32")
    return folder


def command_help(bench: Bench) -> None:
    """P11: run.py --help, seconds by the clock."""
    arm = partial(process, *RUN, "--help")
    arm()
    taken = [timed(arm) for _ in range(2 if bench.quick else 5)]
    clip = "" if bench.quick else amount(timed(partial(python, IMPORT_CLIP)))
    bench.add(Figure("P11", "run.py --help, against importing CLIP from transformers: s by the clock", "<= 0.15", taken,
                     "", clip))


def reference_job(bench: Bench) -> None:
    """P1: 76 pairs, every evaluation the original does, ours against sentence-transformers.

    Ours runs before and after theirs, from an empty store each time. Theirs runs 2 epochs in fp32; 20 are reckoned from
    what an epoch took.
    """
    if bench.quick or importlib.util.find_spec("sentence_transformers") is None:
        raise NotMeasured("left out by --quick" if bench.quick else "sentence-transformers is not installed")
    model, dataset = save_model(bench), write_pairs(bench.scratch / "76", {"train": 53, "valid": 11, "test": 12})
    precisions = ["fp32", "bf16"] if pick_precision("auto", CPU) is torch.bfloat16 else ["fp32"]
    jobs = [(epochs, precision) for epochs in EPOCHS for precision in precisions if precision == "fp32" or epochs == 2]

    def ours(turn: int, epochs: int, precision: str) -> float:
        out = bench.scratch / f"job-{turn}-{epochs}-{precision}"
        return timed(partial(process, *RUN, "--model", model, "--dataset", dataset, "--out", out, "--cache-dir",
                             f"{out}-cache", "--epochs", str(epochs), "--precision", precision, "--quiet", *ON_CPU),
                     children_cpu)

    before = [ours(0, *job) for job in jobs]
    said = process(sys.executable, HOME / "tests" / "peer_job.py", model, dataset, bench.scratch / "peer", "2")[0]
    theirs = json.loads(said.strip().splitlines()[-1])
    after = [ours(1, *job) for job in jobs]
    for (epochs, precision), *taken in zip(jobs, before, after, strict=True):
        other = theirs["cpu_s"] + (epochs - 2) * theirs["epoch_cpu_s"]
        what = f"the whole reference job, 76 pairs, {epochs} epochs, {precision}, against sentence-transformers in fp32"
        bench.add(Figure("P1", what, EPOCHS[epochs][precision == "bf16"], [other / each for each in taken],
                         amount(sum(taken) / 2), amount(other) + (" (reckoned)" if epochs > 2 else "")))
    if len(precisions) == 1:
        bench.add(Figure("P1", "the same, 2 epochs in bf16", EPOCHS[2][1], not_measured="the CPU has no bf16 units"))


def two_ranks(bench: Bench) -> None:
    """P12: the cold pass as the run itself times it, one rank against two under torchrun, one thread a rank."""
    require_two_cores(bench)
    model, dataset = save_model(bench), write_pairs(bench.scratch / "ranks", {"train": 128}, negatives=False)
    taken = []
    for ranks in ("1", "2"):
        said = process(*TORCHRUN, ranks, RUN[1], "eval", "--model", model, "--dataset", dataset, "--cache-dir",
                       bench.scratch / f"ranks-{ranks}", "--split", "train", "--precision", "fp32", *ON_CPU)[1]
        taken.append(number_in(r"titles encoded, ([\d.]+) s", said))
    bench.add(Figure("P12", "cold pass, two ranks against one, one thread each: by the clock", ">= 1.85",
                     [taken[0] / taken[1]], amount(taken[1]), amount(taken[0])))


def number_in(pattern: str, text: str) -> float:
    """The last number a run says in these words. Raises NotMeasured where it says none."""
    numbers = re.findall(pattern, text)
    if not numbers:
        raise NotMeasured(f"the run's output has nothing like {pattern!r}")
    return float(numbers[-1].replace(",", ""))


@dataclass
class WarmJobs:
    """Commands over pairs whose features a first run has stored."""

    model: Path
    dataset: Path
    scratch: Path
    numbers: count[int] = field(default_factory=count)

    @cached_property
    def data(self) -> list[str]:
        """Flags that all commands share."""
        return ["--dataset", str(self.dataset), "--cache-dir", str(self.scratch / "warm-cache"), *ON_CPU]

    def train(self) -> None:
        """Two epochs into a new run folder."""
        out = self.scratch / f"warm-{next(self.numbers)}"
        process(*RUN, "train", "--model", self.model, "--epochs", "2", "--out", out, "--quiet", *self.data)

    def evaluate(self) -> None:
        """The metrics of the test split."""
        process(*RUN, "eval", "--model", self.model, "--split", "test", *self.data)

    def search(self) -> None:
        """A title that was never searched for before."""
        process(*RUN, "search", f"title number {next(self.numbers)}", "--model", self.model, *self.data)

    def sweep(self) -> float:
        """Runs a minute by two ranks."""
        said = process(*TORCHRUN, "2", RUN[1], "sweep", "--model", self.model, "--precision", "fp32", "--batch-size",
                       "128", "--space", SPACE, "--folds", "5", "--seeds", "3", "--out", self.scratch / "sweep",
                       *self.data)[1]
        return number_in(r"([\d,]+) runs/min", said)


def stored_jobs(bench: Bench) -> WarmJobs:
    """The jobs on --model and --dataset; without them, on the demo's model and 1,447 drawn pairs (260 if quick)."""
    folder = Path(bench.dataset or bench.scratch / "drawn").absolute()
    if not folder.exists():
        counts = (200, 30, 30) if bench.quick else (1012, 217, 218)
        write_demo(folder, dict(zip(("train", "valid", "test"), counts, strict=True)))
    return WarmJobs(Path(bench.model or DEMO_MODEL).absolute(), folder, bench.scratch)


def warm_jobs(bench: Bench) -> None:
    """P13, P14: train, eval and search with everything in the store, against python -c "import torch"."""
    jobs = stored_jobs(bench)
    for row, what, goal, arm in (("P13", "warm train, 2 epochs", "<= 2.5", jobs.train),
                                 ("P14", "warm eval", "<= 2", jobs.evaluate),
                                 ("P14", "warm search of a new title", "<= 4", jobs.search)):
        what = f"{what} ({jobs.model.name}, {jobs.dataset.name} pairs), against python -c 'import torch'"
        bench.race(Race(row, what, goal, arm, partial(python, IMPORT_TORCH), cost=True, rounds=3, clock=children_cpu))


def warm_parts(bench: Bench) -> None:
    """Parts of P13: CPU seconds of a warm train by what they are spent on; median of three runs."""
    jobs = stored_jobs(bench)
    jobs.train()
    runs = []
    for _ in range(1 if bench.quick else 3):
        out = str(bench.scratch / f"parts-{next(jobs.numbers)}")
        args = ["train", "--model", str(jobs.model), "--epochs", "2", "--out", out, "--quiet", *jobs.data]
        start = children_cpu()
        seconds = json.loads(python(TIME_PARTS.format(parts=PARTS, args=args))[0].splitlines()[-1])
        seconds["start and end of Python"] = children_cpu() - start - sum(seconds.values())
        runs.append(seconds)
    for part in runs[0]:
        bench.add(Figure("parts", f"of a warm train: {part}: CPU s", values=[seconds[part] for seconds in runs]))


def sweep(bench: Bench) -> None:
    """P18: runs a minute of a sweep over two ranks, as the command says: 12 settings, 5 folds, 3 seeds."""
    require_two_cores(bench)
    jobs = stored_jobs(bench)
    what = f"sweep, two ranks ({jobs.model.name}, {jobs.dataset.name} pairs): runs a minute"
    bench.add(Figure("P18", what, ">= 3,000", [jobs.sweep()]))


def require_two_cores(bench: Bench) -> None:
    """Raises NotMeasured where there is one core, or --quick."""
    if bench.quick or len(os.sched_getaffinity(0)) < 2:
        raise NotMeasured("left out by --quick" if bench.quick else "there is one core")


def streaming(bench: Bench) -> None:
    """P19: streaming mode, images decoded for the opening and the base evaluation, and for an evaluation of valid."""
    rows = {"train": 48, "valid": 8, "test": 8}
    dataset, out = write_pairs(bench.scratch / "streaming", rows), bench.scratch / "streaming-run"
    args = ["--model", str(DEMO_MODEL), "--dataset", str(dataset), "--out", str(out), "--cache-dir", f"{out}-cache",
            "--trainable", "all", "--eval-splits", "valid", "--epochs", "1", "--quiet", *ON_CPU]
    opening, evaluation = json.loads(python(COUNT_DECODES.format(args=args))[0].splitlines()[-1])
    bench.add(Figure("P19", "streaming mode: decodes of an image up to the end of the base evaluation of valid", "<= 1",
                     [opening / sum(rows.values())]))
    bench.add(Figure("P19", "streaming mode: images encoded by an evaluation of valid, of those in valid", "<= 1",
                     [evaluation / rows["valid"]]))


def million_rows(bench: Bench) -> None:
    """P20: 1,000,000 rows with a title each (100,000 if quick), read and their distinct images and titles found."""
    rows = 100_000 if bench.quick else 1_000_000
    file = bench.scratch / "rows.csv"
    with file.open("w") as table:
        table.write("image,title\n")
        table.writelines(f"images/{row:07d}.jpg,a title of six words {row}\n" for row in range(rows))
    load, catalogue, peak = json.loads(python(LOAD_ROWS.format(file=str(file)))[0])
    bench.add(Figure("P20", f"{rows:,} rows of a CSV read: CPU s", "<= 2", [load]))
    bench.add(Figure("P20", "their distinct images and titles found, titles tokenized: CPU s", "<= 60", [catalogue]))
    bench.add(Figure("P20", "peak memory of both, libraries included: MB", "<= 1,000", [peak]))
