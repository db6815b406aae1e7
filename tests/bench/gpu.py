"""The figures of a GPU: towers against its matrix product, a warm epoch of a million pairs, Recall, no sync in a step.

Seconds are by the clock, the device waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import CachedBatches
from data.cold import encode_missing_images
from data.store.features import FeatureStore
from engine.clip.encoder import GRAPH_AFTER, BatchedEncoder
from engine.clip.model import ModelOptions, build_model
from engine.cuda_graph import MIN_STEPS, WARMUP_STEPS
from eval.distinct import Distinct
from eval.metrics import retrieval_ranks

from .harness import Arm, Bench, Figure, NotMeasured, amount, timed
from .inputs import Model, image_flops, noise_pixels, random_clip, warm_batches
from .store import read_pairs
from .towers import TrainingRun

SHAPES = {"ViT-B/32": (">= 0.5", ">= 8,000"), "ViT-L/14": (">= 0.6", ">= 2,500")}  # share of a product, images/s
EPOCHS = {1024: "<= 0.1", 32_768: "<= 0.6"}  # seconds for a million pairs, by batch
STEPS = 20


def cuda_device() -> torch.device:
    """Raises NotMeasured where there is none."""
    if not torch.cuda.is_available():
        raise NotMeasured("no CUDA device")
    return torch.device("cuda")


def open_random(shape: str, device: torch.device) -> Model:
    """A model of this shape in the precision that a run would take."""
    return Model.of(build_model(random_clip(shape), ModelOptions(), device), device)


def machine(bench: Bench) -> None:
    """GPU: rates of the matrix product by precision, and of copies of pixels to the device."""
    device, size = cuda_device(), 4096 if bench.quick else 8192
    for name, precision, products in (("bf16", torch.bfloat16, "highest"), ("TF32", torch.float32, "high"),
                                      ("fp32", torch.float32, "highest")):
        torch.set_float32_matmul_precision(products)
        bench.add(Figure("GPU", f"product of {size}, {name}: TFLOP/s", "",
                         [product_rate(size, precision, device) / 1e12]))
    pixels = noise_pixels(64)
    for name, source in (("pageable", pixels), ("pinned", pixels.pin_memory())):
        taken = median(seconds(partial(source.to, device, non_blocking=True), device) for _ in range(20))
        bench.add(Figure("GPU", f"64 images to the device, {name}: GB/s", "", [pixels.nbytes / taken / 1e9]))


def towers(bench: Bench) -> None:
    """GPU: image towers, eager and compiled, as a share of the matrix product's rate."""
    device = cuda_device()
    for shape, (goal, _) in SHAPES.items():
        model = open_random(shape, device)
        precision = model.parts.precision
        peak = product_rate(4096 if bench.quick else 8192, precision, device)
        for how, wanted in (("off", ""), ("on", goal)):
            rate = tower_rate(model, device, how, 4 if bench.quick else 16)
            what = f"image tower {shape}, {str(precision)[6:]}, --compile {how}: share of the matrix product's rate"
            bench.add(Figure("GPU", what, wanted, [rate / peak], f"{rate / 1e12:.0f} TFLOP/s",
                             f"{peak / 1e12:.0f} TFLOP/s"))


def product_rate(size: int, precision: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(precision) for _ in range(2))
    return 2 * size**3 / median(seconds(lambda: a @ b, device) for _ in range(10))


def tower_rate(model: Model, device: torch.device, compiled: str, calls: int) -> float:
    """The same of the image tower, in batches as `BatchedEncoder` takes them."""
    encode = BatchedEncoder(model.parts.towers.image, device, model.parts.precision, compiled)
    pixels = noise_pixels(encode.batch).to(device)
    for _ in range(GRAPH_AFTER + 1):  # eager at first, then compiles or captures
        encode(pixels)
    taken = median(seconds(partial(encode, pixels), device) for _ in range(calls))
    return len(pixels) * image_flops(model.parts.clip.vision_model.config) / taken


def cold_passes(bench: Bench) -> None:
    """GPU: images a second of the cold pass over files of 480x360, all cores decoding."""
    device, cores = cuda_device(), len(os.sched_getaffinity(0))
    images = 500 if bench.quick else 5000
    catalogue, reader = read_pairs(bench.scratch / "gpu-pairs", images, cores)
    for shape, (_, goal) in SHAPES.items():
        model = open_random(shape, device)
        model.image(noise_pixels(64))
        store = FeatureStore(bench.scratch / f"gpu-{shape[-2:]}", model.widths[0])
        arm = partial(encode_missing_images, catalogue, reader, range(images), store, model.image, lambda text: None)
        taken = seconds(arm, device)
        bench.add(Figure("GPU", f"cold pass {shape}, 480x360, {cores} workers: images/s", goal, [images / taken]))


def warm_epochs(bench: Bench) -> None:
    """GPU: a warm epoch of a million pairs with the CUDA graph and without; no step waits for the device."""
    model, device = open_random("ViT-B/32", cuda_device()), cuda_device()
    rows = 100_000 if bench.quick else 1_000_000
    for batch, goal in EPOCHS.items():
        graph, eager = (epoch_seconds(bench, model, rows, batch, device, how) for how in ("auto", "off"))
        bench.add(Figure("GPU", f"a warm epoch of {rows:,} pairs at batch {batch:,}: s, against --cuda-graph off",
                         "" if bench.quick else goal, [graph], amount(graph), amount(eager)))
    for how in ("auto", "off"):
        steps_without_sync(bench, model, device, how)
        what = f"{STEPS} steps under set_sync_debug_mode('error'), --cuda-graph {how}"
        bench.add(Figure("GPU", what, ours="no sync"))


def epoch_seconds(bench: Bench, model: Model, rows: int, batch: int, device: torch.device, graph: str) -> float:
    """A fifth of five epochs, the capture of a graph included; the best of three times."""
    batches = warm_batches(rows, model.widths, batch, device)
    run = TrainingRun(model.parts, batches, rows, batch, bench.scratch, device, graph, epochs=5)
    return min(seconds(run, device) for _ in range(3)) / run.epochs


@dataclass(frozen=True)
class Watched:
    """Row numbers of the steps; during STEPS of them, between two flushes of the log, a sync is an error.

    The loop begins with those before the graph, if there is one, is captured and compared, which does wait.
    """

    batches: CachedBatches
    first: int = WARMUP_STEPS + 1

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Yield the rows of `batches`."""
        for taken, index_B in enumerate(self.batches.rows.from_step(step)):
            watched = self.first <= taken < self.first + STEPS
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            yield index_B


def steps_without_sync(bench: Bench, model: Model, device: torch.device, graph: str) -> None:
    """Raises RuntimeError where a step waits for the device."""
    rows, batch = 256 * MIN_STEPS, 256
    batches = warm_batches(rows, model.widths, batch, device)
    try:
        TrainingRun(model.parts, replace(batches, rows=Watched(batches)), rows, batch, bench.scratch, device, graph)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recall(bench: Bench) -> None:
    """GPU: exact ranks both ways of a million pairs."""
    n, device = 100_000 if bench.quick else 1_000_000, cuda_device()
    image_NE, title_NE = (F.normalize(torch.randn(n, 512, device=device), dim=-1) for _ in range(2))
    arm = partial(retrieval_ranks, image_NE, title_NE, Distinct.from_ids(None, torch.arange(n, device=device)))
    seconds(arm, device)  # warms up
    goal = "" if bench.quick else "<= 5"
    bench.add(Figure("GPU", f"exact Recall both ways, {n:,} x {n:,} x 512: s", goal, [seconds(arm, device)]))


def seconds(arm: Arm, device: torch.device) -> float:
    """By the clock, the device waited for before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    return timed(lambda: (arm(), wait()))
