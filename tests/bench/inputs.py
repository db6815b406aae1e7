"""What is measured over: pictures, pairs, a CLIPModel of ViT-B/32's shape with random weights, feature tables."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data.batch import CachedBatches
from data.demo.demo import scene_rows
from data.store.feature_split import FeatureSplit
from engine.clip.encoder import CPU_TITLES, BatchedEncoder
from engine.clip.loading import Clip
from engine.clip.model import LoadedModel, ModelOptions, build_model
from engine.clip.whole import WholeModel
from engine.config.cli import DEMO_MODEL

# Shapes by name: vision (width, layers, heads, patch), text (width, layers, heads), embedding; the rest as OpenAI's.
SHAPES = {"ViT-B/32": ((768, 12, 12, 32), (512, 12, 8), 512), "ViT-L/14": ((1024, 24, 16, 14), (768, 12, 12), 768),
          "tiny": ((32, 1, 2, 32), (32, 1, 2), 32)}
CPU = torch.device("cpu")


def some_titles(count: int) -> list[str]:
    """Return titles like those of the demo, a few of them repeated."""
    return [title.text for _, title in scene_rows(random.Random(0), "train", count, set())]


@dataclass(frozen=True)
class Model:
    """A model taken apart, and its frozen towers as a run calls them."""

    parts: LoadedModel
    image: BatchedEncoder
    text: BatchedEncoder
    widths: tuple[int, int]  # of image and text features

    @classmethod
    def of(cls, parts: LoadedModel, device: torch.device = CPU) -> Model:
        """Both towers in the model's precision on this device."""
        widths = parts.clip.facts.widths
        return cls(parts, BatchedEncoder(parts.towers.image, device, parts.precision),
                   BatchedEncoder(parts.towers.text, device, parts.precision, cpu_batch=CPU_TITLES),
                   (widths["vision_model"], widths["text_model"]))


def random_clip(shape: str, seed: int = 0) -> Clip:
    """A CLIPModel of this shape with random weights, CLIP's preprocessing and the demo's tokenizer."""
    (width, layers, heads, patch), (text_width, text_layers, text_heads), embedding = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
              "num_attention_heads": heads, "patch_size": patch, "projection_dim": embedding}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads, "projection_dim": embedding, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=embedding)).eval()
    return Clip(shape, WholeModel(model, CLIPProcessor(CLIPImageProcessorPil(), tokenizer)))


@cache
def vit_b32() -> Model:
    """ViT-B/32's shape on the CPU in fp32, made once."""
    return Model.of(build_model(random_clip("ViT-B/32"), ModelOptions(precision="fp32"), CPU))


def image_flops(config: CLIPVisionConfig) -> float:
    """Multiplications and additions of the matrix products for one image in our tower (engine.clip.pooled)."""
    width, inner = config.hidden_size, config.intermediate_size
    side, patch = cast(int, config.image_size), cast(int, config.patch_size)
    patches = (side // patch) ** 2
    tokens = patches + 1
    layer = 2 * tokens * width * (4 * width + 2 * inner) + 4 * tokens**2 * width
    last = 2 * width * (tokens * 2 * width + 2 * width + 2 * inner) + 4 * tokens * width  # of one token beyond its keys
    return (config.num_hidden_layers - 1) * layer + last + 2 * patches * 3 * patch**2 * width


def noise_pixels(count: int, side: int = 224) -> Tensor:
    """uint8 [count, 3, side, side]: towers take the same time over noise as over thumbnails."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with about the detail, and so the bytes, of a video's thumbnail: noise of several scales, most coarse."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cell, weight in ((160, 70), (40, 35), (8, 14), (2, 7)):
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += weight * np.asarray(plane)
    file = io.BytesIO()
    Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_pairs(folder: Path, counts: Mapping[str, int], negatives: bool = True) -> Path:
    """A dataset folder of 480x360 JPEGs, every one different, with the demo's titles."""
    total = sum(counts.values())
    pictures, titles = [photograph(480, 360, seed) for seed in range(min(16, total))], iter(some_titles(2 * total))
    (folder / "images").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "title", *(["title_neg"] if negatives else [])])
            for _ in range(count):
                # Bytes behind the end marker make it another image to the store, and the same work to the decoder.
                (folder / "images" / f"{number}.jpg").write_bytes(
                    pictures[number % len(pictures)] + number.to_bytes(4, "big"))
                writer.writerow([f"images/{number}.jpg", next(titles), *([next(titles)] if negatives else [])])
                number += 1
    return folder


def warm_batches(rows: int, widths: tuple[int, int], batch: int, device: torch.device = CPU) -> CachedBatches:
    """What the loop trains on after a cold pass: batches of `rows` pairs with negatives from tables on the device."""
    ids = torch.arange(rows, device=device)
    image_MV, title_PT = (torch.randn(rows, width, device=device) for width in widths)
    split = FeatureSplit(image_MV, title_PT, ids, ids, ids.roll(1)[:, None], device)
    return split.batches(batch, 0)
