"""What this room shows in `run.py bench`: a model of CLIP's shape with random weights, towers against the machine's
matrix product, a warm epoch against the towers every step, the loss in chunks.

Each `measure_*` gets `race`, which times two arms in turn and takes the figure down (eval.bench.Bench.race).
Dimension key: B batch, G global batch, C candidates, E embedding, N pairs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Batch, Features, Tokens
from engine.clip.loading import Clip
from engine.clip.model import Head, Parts, Streamed
from engine.config.cli import DEMO_MODEL
from engine.config.fields import Config
from engine.loss import Candidates, Objective
from engine.optim import adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Drift, Log
from engine.run_folder.profiler import Profiler
from engine.train import Plan, fit

Race = Callable[..., None]
# Shapes by name: vision (width, layers, heads, patch), text (width, layers, heads), embedding; the rest as OpenAI's.
SHAPES = {"ViT-B/32": ((768, 12, 12, 32), (512, 12, 8), 512), "ViT-L/14": ((1024, 24, 16, 14), (768, 12, 12), 768)}


def random_clip(shape: str, seed: int = 0) -> Clip:
    """A CLIPModel of this shape with random weights, CLIP's preprocessing and the demo's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    (width, layers, heads, patch), (text_width, text_layers, text_heads), embedding = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = CLIPConfig(
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                       "num_attention_heads": heads, "patch_size": patch, "projection_dim": embedding},
        text_config={"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
                     "num_attention_heads": text_heads, "projection_dim": embedding,
                     "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        projection_dim=embedding)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
    return Clip(shape, model, CLIPProcessor(CLIPImageProcessorPil(), tokenizer), None)


def new_model(folder: Path, shape: str) -> None:
    """Write such a model as a folder that any of us loads."""
    clip = random_clip(shape)
    clip.model.save_pretrained(folder)
    clip.processor.save_pretrained(folder)


def image_flops(config: Any) -> float:
    """Multiplications and additions for one image in our tower (engine.clip.pooled) of this config: matrices only."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    patches = (config.image_size // patch) ** 2
    tokens = patches + 1
    layer = 2 * tokens * width * (4 * width + 2 * inner) + 4 * tokens**2 * width
    last = 2 * width * (tokens * 2 * width + 2 * width + 2 * inner) + 4 * tokens * width  # of one token beyond its keys
    return (config.num_hidden_layers - 1) * layer + last + 2 * patches * 3 * patch**2 * width


def plain_text(parts: Parts) -> Callable[[Tokens], Tensor]:
    """The text tower as transformers runs it, every layer for every token and padding."""
    @torch.no_grad()
    def encode(tokens: Tokens) -> Tensor:
        return parts.towers.text_model(input_ids=tokens.ids_BL, attention_mask=tokens.mask_BL).pooler_output
    return encode


def pixels_like(parts: Parts, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Noise, uint8 [count, 3, S, S]: towers take the same time over it as over thumbnails."""
    side = parts.clip.config.vision_config.image_size
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8).to(device)


def measure_image_tower(race: Race, parts: Parts, encode: Callable[[Tensor], Tensor], batch: int) -> None:
    """P3: floating point operations a second in the image tower against a plain matrix product's."""
    size = 2048
    a, b, out = (torch.randn(size, size) for _ in range(3))
    pixels, flops = pixels_like(parts, batch), batch * image_flops(parts.clip.config.vision_config)
    race("P3", f"image tower, {batch} images, against sgemm {size}: share of its rate", lambda: encode(pixels),
         lambda: [torch.mm(a, b, out=out) for _ in range(8)], ">= 0.8", work=(flops / 1e9, 8 * 2 * size**3 / 1e9),
         unit="GFLOP")


def loop(parts: Parts, streamed: bool, batches: Callable[[int], Iterator[Any]], rows: int, batch: int,
         folder: Path, device: torch.device, graph: str = "auto", epochs: int = 1) -> Callable[[], None]:
    """A run of the real loop over `batches`, its log included, without evaluation and saving."""
    world, cfg = World(0, 0, 1, device), Config(epochs=epochs, batch_size=batch, log_every=50, cuda_graph=graph)
    plan = Plan(rows, batch, epochs)
    head = Head(parts.clip, cfg.scale).to(device)
    model = Streamed(parts.towers, head) if streamed else head
    optimizer = adamw(parts.trainable.values(), 1e-6, 0.0)
    quiet = World(1, 0, 1, device)  # a log that writes nothing: the disk is not what is measured

    def run() -> None:
        fit(model, batches, optimizer, plan, State(), world, cfg, parts.precision,
            log=Log(folder, quiet, plan.steps_per_epoch, plan.steps, 0, Drift({}), {}), profiler=Profiler(),
            evaluate=lambda: None, checkpoint=lambda _: None, stop=lambda _: 0)
    return run


def measure_warm_epoch(race: Race, parts: Parts, warm: Callable[[int], Iterator[Features]], rows: int, tokens: Tokens,
                       batch: int, goal: str, folder: Path) -> None:
    """P2: pairs a second of an epoch from features against steps that run both towers on ready pixels and tokens.

    `tokens` are at least 32 titles, padded to the longest of them. The other arm's batch is 32 also where ours is
    larger: its time a pair is the towers', and those have it constant from there on.
    """
    small = min(batch, 32)
    pixels, ids = pixels_like(parts, small), torch.arange(small)
    title = Tokens(tokens.ids_BL[:small], tokens.mask_BL[:small])
    step = Batch(*(value for value in _fill(Batch, pixels_BCSS=pixels, title=title, negative=title, title_id_B=ids,
                                           negative_id_B=ids + small)))
    cold = loop(parts, True, lambda _: iter([step]), small, small, folder, torch.device("cpu"))
    race("P2", f"a warm epoch of {rows:,} pairs at batch {batch} against both towers every step",
         loop(parts, False, warm, rows, batch, folder, torch.device("cpu")), cold, goal, work=(rows, small),
         unit="pairs", rounds=3)


def _fill(kind: type[Any], **known: Any) -> Iterator[Any]:
    """Values in the order of a NamedTuple's fields; identities it has beyond `known` ones count the rows."""
    rows = len(known["title_id_B"])
    return (known.get(name, torch.arange(rows)) for name in kind._fields)


def measure_loss(race: Race, note: Callable[..., None], rows: int) -> None:
    """P8: forward and backward of the loss at a large batch, against the whole matrix at once: time and peak memory."""
    generator = torch.Generator().manual_seed(0)
    image_GE, title_CE = (F.normalize(torch.randn(n, 512, generator=generator), dim=-1).requires_grad_()
                          for n in (rows, 2 * rows))
    scale, ids_G = torch.tensor(20.0), torch.arange(rows)
    candidates = Candidates(title_CE, torch.arange(2 * rows), torch.cat([ids_G, torch.full_like(ids_G, -1)]))

    def ours() -> None:
        Objective()(image_GE, candidates, scale, 0, rows).backward()

    def whole() -> None:
        F.cross_entropy(scale * (image_GE @ title_CE.T), torch.arange(rows)).backward()

    memory = [_peak_bytes(arm) for arm in (ours, whole)]
    note("P8", f"loss at batch {rows:,}: peak memory against the whole matrix", f"{memory[0] / 2**20:,.0f} MiB",
         f"{memory[1] / 2**20:,.0f} MiB", [memory[0] / memory[1]], "<= 0.125")
    race("P8", f"loss at batch {rows:,}, forward and backward: times faster", ours, whole, ">= 1", rounds=3)


def _peak_bytes(function: Callable[[], object]) -> int:
    """How far the resident memory of this process rises while `function` runs (Linux keeps the mark)."""
    function()  # what it allocates once
    ctypes.CDLL(None).malloc_trim(0)  # or what that freed, kept by the allocator, would hide what comes
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
