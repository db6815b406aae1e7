"""P2 to P4: the towers against a matrix product and transformers' padded pass; a warm epoch against the towers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.batch import Batch, Batches, Tokens
from data.cold import encode_titles
from data.images.decode import collate_tokens, tokenize
from engine.clip.model import Head, LoadedModel, StreamingModel
from engine.config.fields import Config
from engine.optim import Plan, adamw
from engine.ranks.world import World
from engine.run_folder.board import WeightDrift
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log
from engine.train import Callbacks, Replica, fit

from .harness import Bench, Figure, Race
from .inputs import CPU, image_flops, noise_pixels, some_titles, vit_b32, warm_batches

SGEMM = 2048


def image_tower(bench: Bench) -> None:
    """P3: floating point operations a second in the image tower against a plain matrix product's."""
    model, batch = vit_b32(), 32 if bench.quick else 64
    a, b, out = (torch.randn(SGEMM, SGEMM) for _ in range(3))
    pixels, flops = noise_pixels(batch), batch * image_flops(model.parts.clip.vision_model.config)
    bench.race(Race("P3", f"image tower, {batch} images: share of the rate of a matrix product of {SGEMM}", ">= 0.9",
                    lambda: model.image(pixels), lambda: [torch.mm(a, b, out=out) for _ in range(8)],
                    work=(flops / 1e9, 8 * 2 * SGEMM**3 / 1e9), unit="GFLOP"))


def text_tower(bench: Bench) -> None:
    """P4: titles a second without padding against transformers' own pass with all padded to 77."""
    model, count = vit_b32(), 64 if bench.quick else 512
    ids = tokenize(model.parts.clip.tokenizer, some_titles(count), 77)
    some = ids[:16]  # padded to 77 a title costs the same whatever its company
    whole = collate_tokens([*some, [0] * 77], 0)
    padded, width = Tokens(whole.ids_BL[:-1].clone(), whole.mask_BL[:-1].clone()), model.widths[1]
    bench.race(Race("P4", f"{count} titles of {sum(map(len, ids)) / count:.0f} tokens on average, against "
                          "transformers' pass padded to 77", ">= 5",
                    lambda: encode_titles(ids, 0, model.text, width), lambda: by_transformers(model.parts, padded),
                    work=(count, len(some)), unit="titles"))
    difference_BT = by_transformers(model.parts, padded) - encode_titles(some, 0, model.text, width)
    bench.add(Figure("P4", "largest difference to that", "<= 5e-6", [difference_BT.abs().max().item()]))


@torch.no_grad()
def by_transformers(parts: LoadedModel, tokens: Tokens) -> Tensor:
    """Text features as transformers computes them: every layer for every token, padding included."""
    return parts.clip.text_model(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL).pooler_output


@dataclass
class TrainingRun:
    """A call runs the real loop over `batches`, its log included, without evaluation and saving."""

    parts: LoadedModel
    batches: Batches
    rows: int
    batch: int
    folder: Path
    device: torch.device = CPU
    graph: str = "auto"
    epochs: int = 1
    streamed: bool = False

    def __call__(self) -> None:
        """Train for `epochs` from where the weights stand."""
        config = Config(epochs=self.epochs, batch_size=self.batch, log_every=50, cuda_graph=self.graph)
        plan, world = Plan(self.rows, self.batch, self.epochs), World(0, 0, 1, self.device)
        head = Head(self.parts.clip, config.scale).to(self.device)
        model = StreamingModel(self.parts.towers, head) if self.streamed else head
        log = Log(self.folder, replace(world, quiet=True), plan, State(), WeightDrift({}))
        replica = Replica(model, adamw(self.parts.trainable.values(), 1e-6, 0.0), world, self.parts.precision)
        with closing(log):
            fit(replica, self.batches, plan, State(), config, Callbacks(log))


@dataclass(frozen=True)
class OneStep:
    """Batches of a run of one step."""

    inputs: Batch

    def from_step(self, step: int) -> Iterator[Batch]:
        """Yield the inputs."""
        yield self.inputs


def warm_epoch(bench: Bench) -> None:
    """P2: pairs a second of an epoch from features against steps that run both towers on ready pixels and tokens.

    The other arm's batch is 32 also where ours is larger: its time a pair is the towers', constant from there on.
    """
    model, small = vit_b32(), 32
    title = collate_tokens(tokenize(model.parts.clip.tokenizer, some_titles(small), 77), 0)
    ids = torch.arange(small)
    step = Batch(noise_pixels(small), title, title, ids, ids, (ids + small)[:, None])
    cold = TrainingRun(model.parts, OneStep(step), small, small, bench.scratch, streamed=True)
    for batch, goal in ((32, ">= 1,200"), (256, ">= 2,000"))[: 1 if bench.quick else 2]:
        rows = 50 * batch
        warm = TrainingRun(model.parts, warm_batches(rows, model.widths, batch), rows, batch, bench.scratch)
        bench.race(Race("P2", f"a warm epoch of {rows:,} pairs at batch {batch} against both towers every step", goal,
                        warm, cold, work=(rows, small), unit="pairs", rounds=3))
