"""The GPU rows of `run.py bench`: towers against the device's matrix product, a warm epoch of a million pairs, no sync.

Seconds are by the clock, the device waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data.batch import Batches
from engine.bench import image_flops, loop, pixels_like, random_clip
from engine.clip.encoder import Frozen
from engine.clip.model import Parts, take_apart
from engine.clip.towers import pick_precision
from engine.cuda_graph import MIN_STEPS, WARMUP_STEPS

Note = Callable[..., None]
Warm = Callable[..., Batches]  # of: rows, widths, batch, device
GOALS = {"ViT-B/32": ">= 0.5", "ViT-L/14": ">= 0.6"}


def measure_gpu(note: Note, warm: Warm, device: torch.device, scratch: Path, quick: bool) -> None:
    """All GPU rows of this room; the sizes are smaller if `quick`."""
    precision = pick_precision("auto", device)
    size, rows = (4096, 100_000) if quick else (8192, 1_000_000)
    peak = product_rate(size, precision, device)
    for shape, goal in GOALS.items():
        parts = take_apart(random_clip(shape), ("projection",), "auto", 20.0, "auto", device)
        name = f"image tower {shape}, {str(precision)[6:]}, pixels on the device: share of the {size} product's rate"
        rate = tower_rate(parts, device, 4 if quick else 16)
        note("GPU", name, f"{rate / 1e12:.0f} TFLOP/s", f"{peak / 1e12:.0f} TFLOP/s", [rate / peak], goal)
        if shape == "ViT-B/32":
            for batch, limit in ((1024, "<= 0.1"), (32_768, "<= 0.35")):
                took, plain = (epoch_seconds(parts, warm, rows, batch, device, scratch, graph)
                               for graph in ("auto", "off"))
                note("GPU", f"a warm epoch of {rows:,} pairs at batch {batch:,}: seconds, against --cuda-graph off",
                     f"{took:.3f} s", f"{plain:.3f} s", [took], "" if quick else limit)
            for graph in ("auto", "off"):
                steps_without_sync(parts, warm, device, scratch, graph)
                note("GPU", f"20 steps under set_sync_debug_mode('error'), --cuda-graph {graph}", "no sync")


def product_rate(size: int, precision: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    return 2 * size**3 / median(seconds(lambda: a @ b, device) for _ in range(10))


def tower_rate(parts: Parts, device: torch.device, calls: int) -> float:
    """The same of the image tower, batches as `Frozen` takes them."""
    encode = Frozen(parts.towers.image, device, parts.precision, "off" if device.type == "cpu" else "on")
    pixels = pixels_like(parts, encode.batch, device)
    encode(pixels)  # compile, warm up
    took = median(seconds(lambda: encode(pixels), device) for _ in range(calls))
    return len(pixels) * image_flops(parts.clip.config.vision_config) / took


def epoch_seconds(parts: Parts, warm: Warm, rows: int, batch: int, device: torch.device, scratch: Path,
                  graph: str) -> float:
    """A fifth of five epochs from features on the device, the capture of a graph included; the best of three times."""
    batches, epochs = warm(rows, widths(parts), batch, device), 5
    run = loop(parts, False, batches, rows, batch, scratch, device, graph, epochs)
    return min(seconds(run, device) for _ in range(3)) / epochs


def steps_without_sync(parts: Parts, warm: Warm, device: torch.device, scratch: Path, graph: str,
                       steps: int = 20) -> None:
    """Steps between two flushes of the log; RuntimeError where one of them waits for the device.

    The loop begins with those before the graph, if there is one, is captured and compared, which does wait.
    """
    first, rows = WARMUP_STEPS + 1, 256 * MIN_STEPS
    batches = warm(rows, widths(parts), 256, device)

    def watched(start: int) -> Iterator[Any]:
        for step, index_B in enumerate(batches.rows(start)):
            torch.cuda.set_sync_debug_mode("error" if first <= step < first + steps else "default")
            yield index_B

    try:
        loop(parts, False, replace(batches, rows=watched), rows, 256, scratch, device, graph)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def widths(parts: Parts) -> tuple[int, int]:
    """Feature widths, image and text."""
    return parts.clip.config.vision_config.hidden_size, parts.clip.config.text_config.hidden_size


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """By the clock, the device waited for before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start
