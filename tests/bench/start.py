"""P20: the start of a run over a million rows whose features are all stored, up to its first step."""

from __future__ import annotations

import json
from pathlib import Path

from engine.publish.export import write_model

from .harness import Bench, Figure
from .inputs import photograph, random_clip
from .jobs import ON_CPU, python

PICTURES, HELD_OUT = 2_000, 1_000  # files that the rows share; rows of valid and of test
# Opens the data as a run does, but stores random features for the keys that its towers would be asked for.
FILL_STORE = """
import os, torch, run, data.pairs, engine.commands.train as train
from data.catalogue import DecodeResults, as_keys
from data.store.segments import key_of
def add_images(catalogue, reader, references, store, encode, log):
    results = DecodeResults()
    keys = as_keys([key_of(reader.read(catalogue.references[reference].as_py())) for reference in references])
    results.add_known(references, keys)
    store.append(keys, torch.randn(len(keys), store.width))
    return results
def add_titles(tokens, keys, store, pad_id, encode, log):
    for start in range(0, len(keys), 65536):
        part = keys[start : start + 65536]
        store.append(part, torch.randn(len(part), store.width))
data.pairs.encode_missing_images, data.pairs.encode_missing_titles = add_images, add_titles
open_data = train.open_data
def open_and_leave(*args):
    open_data(*args)
    os._exit(0)
train.open_data = open_and_leave
run.main({args!r})
"""
# Ends the process when the loop asks for the inputs of its second step.
FIRST_STEP = """
import gc, time
gc.set_threshold(100_000)  # as run.py does
import json, os, re, run, engine.commands.train as train
evaluate, fit, evaluations = train.Evaluator.__call__, train.fit, [0.0]
def timed_evaluation(self, *args):
    start = time.process_time()
    evaluate(self, *args)
    evaluations[0] += time.process_time() - start
class OneStep:
    def __init__(self, batches):
        self.batches = batches
    def from_step(self, step):
        yield next(self.batches.from_step(step))
        seconds = time.process_time()
        peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        print(json.dumps([seconds, evaluations[0], peak]), flush=True)
        os._exit(0)
train.Evaluator.__call__ = timed_evaluation
train.fit = lambda replica, batches, *rest: fit(replica, OneStep(batches), *rest)
run.main({args!r})
"""


def warm_start(bench: Bench) -> None:
    """P20: from the start of the process to the first step, 1,000,000 rows (50,000 if quick), everything in the store.
    """
    rows = 50_000 if bench.quick else 1_000_000
    model, dataset = bench.scratch / "tiny-model", bench.scratch / "many-rows"
    model.mkdir()
    write_model(random_clip("tiny"), {}, model, "fp32")
    write_rows(dataset, {"train": rows, "valid": HELD_OUT, "test": HELD_OUT})
    args = ["train", "--model", str(model), "--dataset", str(dataset), "--cache-dir", f"{dataset}-cache",
            "--eval-splits", "valid", "--batch-size", "1024", "--quiet", *ON_CPU]
    python(FILL_STORE.format(args=[*args, "--out", f"{dataset}-fill"]))
    said, _ = python(FIRST_STEP.format(args=[*args, "--out", f"{dataset}-run"]))
    seconds, evaluation, peak = json.loads(said.strip().splitlines()[-1])
    what = f"a warm train of {rows:,} rows of a CSV on {PICTURES:,} pictures, start to first step"
    bench.add(Figure("P20", f"{what}: CPU s", "<= 20", [seconds]))
    bench.add(Figure("P20", f"of which the base evaluation of {HELD_OUT:,} rows: CPU s", "", [evaluation]))
    bench.add(Figure("P20", "its peak memory, libraries and feature tables of 32 numbers included: MB", "<= 1,000",
                     [peak]))


def write_rows(folder: Path, counts: dict[str, int]) -> None:
    """A dataset folder of rows with a title each, no two alike, and the title of the next row as negative."""
    (folder / "images").mkdir(parents=True)
    picture = photograph(64, 48)
    for number in range(PICTURES):  # bytes behind the end marker make it another image to the store
        (folder / "images" / f"{number}.jpg").write_bytes(picture + number.to_bytes(4, "big"))
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8") as table:
            table.write("image,title,title_neg\n")
            table.writelines(f"images/{row % PICTURES}.jpg,a {split} title of words {row},a {split} title of words "
                             f"{(row + 1) % count}\n" for row in range(count))
