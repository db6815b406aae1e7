"""The tuned model as a Hugging Face folder that transformers and sentence-transformers load, with a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine.config import Config
from engine.towers import Clip

CARD = """---
library_name: sentence-transformers
pipeline_tag: zero-shot-image-classification
base_model: {base}
tags: [clip, sentence-transformers, thumbtune]
---

# {base}, tuned on {dataset}

A CLIPModel whose parameters named like `{trainable}` were tuned with thumbtune so that thumbnails and titles of
`{dataset}` find each other. Everything else is the base model's.

## Before and after
{table}

Square brackets: 95 % interval over the rows of the split.

## Recipe
MultipleNegativesRankingLoss, image to text, scale {scale:g}; AdamW, {epochs} epochs, batch {batch_size}, learning rate
{lr:g} ({schedule}), seed {seed}.

## How to load
```python
from transformers import CLIPModel, CLIPProcessor
model, processor = CLIPModel.from_pretrained("THIS_FOLDER"), CLIPProcessor.from_pretrained("THIS_FOLDER")
```
```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("THIS_FOLDER")   # model.encode([PIL image, ...]) and model.encode(["a title", ...])
```

## Limits
The licence and limits of the base model and of the data apply. The figures hold for pairs like the ones above.
"""


def export(clip: Clip, folder: Path, cfg: Config, table: str, trained: Mapping[str, Any]) -> None:
    """Write model, processor, card, and the trained tensors alone as `projections.safetensors`; whole or not at all."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        clip.model.save_pretrained(temporary)
        clip.processor.save_pretrained(temporary)
        save_file({name: value.detach().cpu().contiguous() for name, value in trained.items()},
                  temporary / "projections.safetensors", metadata={"base": clip.name, "commit": clip.commit or ""})
        card = CARD.format(base=clip.name, dataset=cfg.dataset, trainable=", ".join(cfg.trainable), table=table,
                           scale=cfg.scale, epochs=cfg.epochs, batch_size=cfg.batch_size, lr=cfg.lr,
                           schedule=cfg.schedule, seed=cfg.seed)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
