"""`run.py bench`: figures of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from data import bench as data_bench
from data import bench_store
from data.bench_store import warm_batches
from engine import bench as engine_bench
from engine.bench_gpu import measure_gpu
from engine.clip.model import open_model
from engine.commands.common import encoders
from engine.config.fields import Config
from engine.ranks.signals import Stop
from engine.ranks.world import World
from eval.bench import Bench, measure_recall, measure_recall_on, versions
from eval.bench_jobs import measure_help, measure_ranks, measure_reference_job


def bench(cfg: Config, world: World, stop: Stop) -> int:
    """What this machine can do, and how near we are to it: one process, on inputs of its own making."""
    if not world.is_main:
        return 0
    figures, threads = Bench(cfg.quick, world.say), torch.get_num_threads()
    torch.set_num_threads(1)
    world.say(versions())
    try:
        with TemporaryDirectory(prefix="thumbtune-bench-") as scratch:
            bench_rooms(figures, Path(scratch))
            bench_device(figures, Path(scratch))
    finally:
        torch.set_num_threads(threads)
    print(json.dumps({"machine": versions(), "figures": figures.as_json()}, indent=2) if cfg.json
          else f"{versions()}\n\n{figures.table()}")
    return 0


def bench_rooms(figures: Bench, scratch: Path) -> None:
    """Every figure that needs no GPU, cheap ones first; ViT-B/32's shape with random weights."""
    quick, race, note, cpu = figures.quick, figures.race, figures.note, torch.device("cpu")
    model, widths = scratch / "model", (768, 512)
    measure_help(figures)
    engine_bench.new_model(model, "ViT-B/32")
    parts = open_model(str(model), ("projection",), "auto", 20.0, "fp32", cpu)
    lent, tokenizer = encoders(parts, "", cpu), parts.clip.tokenizer
    engine_bench.measure_image_tower(race, parts, lent.image, 32 if quick else 64)
    tokens = bench_store.measure_titles(race, note, lent.text, engine_bench.plain_text(parts), widths[1], tokenizer,
                                        64 if quick else 512)
    for batch, goal in ((32, ">= 1200"), (256, ">= 2000"))[:1 if quick else 2]:
        rows = 50 * batch
        warm = bench_store.warm_batches(rows, widths, batch)
        engine_bench.measure_warm_epoch(race, parts, warm, rows, tokens, batch, goal, scratch)
    figures.fold("P5", data_bench.measure_decode(quick), "ours", "transformers",
                 {"decode 1280": ">= 2.7", "decode 480": ">= 1.7"})
    bench_store.measure_cold(race, lent, scratch / "cold", 8 if quick else 64)
    measure_recall(figures)
    engine_bench.measure_loss(race, note, 2048 if quick else 8192)
    bench_store.measure_store(race, note, scratch / "store", 50_000 if quick else 1_000_000, widths)
    figures.fold("P10", data_bench.measure_fetch(quick), "ours", "one by one", {"fetch": ">= 40"})
    figures.fold("shards", data_bench.measure_shards(quick), "ours", "webdataset", {})
    bench_store.write_pairs(scratch / "76", {"train": 53, "valid": 11, "test": 12})
    measure_reference_job(figures, model, scratch / "76", scratch)
    bench_store.write_pairs(scratch / "ranks", {"train": 128}, negatives=False)
    measure_ranks(figures, model, scratch / "ranks", scratch)


def bench_device(figures: Bench, scratch: Path) -> None:
    """The figures of a GPU, where there is one."""
    if not torch.cuda.is_available():
        figures.note("GPU", "tower MFU, warm epoch of 1M pairs, Recall 1M x 1M, no sync in a step", "not measured",
                     "no CUDA device")
        return
    measure_gpu(figures.note, warm_batches, torch.device("cuda"), scratch, figures.quick)
    measure_recall_on(figures, torch.device("cuda"))
