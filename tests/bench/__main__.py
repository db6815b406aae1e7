"""Measure P1 to P20 on this machine and print a table: a quarter of an hour on two quiet cores."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before transformers is imported

import torch

from data.batch import RunFailed, UserError

from . import decoding, fetching, gpu, jobs, loss, recall, start, store, towers
from .harness import Bench, Figure, NotMeasured, machine

QUICK = "--quick: inputs are smaller; the goals are those of the full sizes"
# What is measured, cheap things first, by the figures it gives; the first line of a docstring says what that is.
MEASUREMENTS: dict[str, Callable[[Bench], None]] = {
    "P11": jobs.command_help, "P3": towers.image_tower, "P4": towers.text_tower, "P2": towers.warm_epoch,
    "P5": decoding.jpeg, "P16": decoding.feed, "P6": store.cold_pass, "P7": recall.ranks, "P15": recall.intervals,
    "P8": loss.large_batch, "P9": store.million_pairs, "P10": fetching.thumbnails, "P17,shards": decoding.shards,
    "P13,P14": jobs.warm_jobs, "parts": jobs.warm_parts, "P18": jobs.sweep, "P1": jobs.reference_job,
    "P12": jobs.two_ranks, "P19": jobs.streaming, "P20": jobs.million_rows, "P20,start": start.warm_start,
    "GPU,machine": gpu.machine, "GPU,towers": gpu.towers, "GPU,cold": gpu.cold_passes, "GPU,epochs": gpu.warm_epochs,
    "GPU,recall": gpu.recall}


def measure(bench: Bench, names: str) -> None:
    """Run one measurement; what cannot be measured is a line with the reason."""
    try:
        MEASUREMENTS[names](bench)
    except (NotMeasured, UserError, RunFailed, RuntimeError, OSError, ImportError) as error:
        what = str(MEASUREMENTS[names].__doc__).split("\n")[0].partition(": ")[2]
        kind = "" if isinstance(error, NotMeasured) else f"{type(error).__name__}: "
        bench.add(Figure(names.replace(",", " "), what, not_measured=f"{kind}{error}"))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller inputs")
    parser.add_argument("--json", action="store_true", help="print JSON, with every round's value")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), metavar="P5,P9", help="figures to measure")
    parser.add_argument("--model", default="", help="CLIPModel folder of the warm jobs; default: the demo's")
    parser.add_argument("--dataset", default="", help="pairs of the warm jobs; default: drawn ones")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    header = machine()
    described = ", ".join(f"{name} {value}" for name, value in header.items()) + (f"\n{QUICK}" if flags.quick else "")
    print(described, file=sys.stderr, flush=True)
    with TemporaryDirectory(prefix="thumbtune-bench-") as scratch:
        bench = Bench(flags.quick, Path(scratch), flags.model, flags.dataset)
        for names in MEASUREMENTS:
            if {*names.split(",")} & {*flags.only.split(",")}:
                measure(bench, names)
    found = {"machine": header, "quick": flags.quick, "figures": bench.as_json()}
    print(json.dumps(found, indent=2) if flags.json else f"{described}\n\n{bench.table()}")


if __name__ == "__main__":
    main()
