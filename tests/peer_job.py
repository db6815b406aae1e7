"""The reference job by sentence-transformers, as the original notebook does it: the peer of `python -m tests.bench`.

`python tests/peer_job.py MODEL DATASET OUT EPOCHS`: one line of JSON with the CPU seconds of the whole process and of
one epoch with its evaluations, so that more epochs can be reckoned. The product itself never imports this.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import (
    SentenceEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

Rows = list[dict[str, str]]


class Recall(SentenceEvaluator):
    """The notebook's ImageTextRetrievalEvaluator: the share of images whose own title is nearest."""

    def __init__(self, images: list[Image.Image], titles: list[str], name: str) -> None:
        super().__init__()
        self.images, self.titles, self.name, self.primary_metric = images, titles, name, f"{name}_recall"

    def __call__(self, model: Any, output_path: str | None = None, epoch: int = -1,
                 steps: int = -1) -> dict[str, float]:
        """Encode both sides anew, rank by cosine."""
        image = model.encode(self.images, convert_to_tensor=True)
        title = model.encode(self.titles, convert_to_tensor=True)
        scores = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(title, dim=-1).T
        return {self.primary_metric: (scores.argmax(1) == torch.arange(len(scores))).float().mean().item()}


class Clock(TrainerCallback):
    """CPU seconds at the beginning of every epoch and at the end."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """An epoch begins: what the last one cost ends here, its evaluations included."""
        self.at.append(time.process_time())

    on_train_end = on_epoch_begin


def read(folder: Path, split: str) -> Rows:
    """The rows of a split, image paths made absolute."""
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return [{**row, "image": str(folder / row["image"])} for row in csv.DictReader(file)]


def table(rows: Rows) -> Dataset:
    """Anchor, positive and negative, images opened by the library when they are asked for."""
    columns = {"anchor": "image", "positive": "title", "negative": "title_neg"}
    return Dataset.from_dict({new: [row[old] for row in rows] for new, old in columns.items()}).cast_column(
        "anchor", ImageFeature())


def evaluators(rows: Rows, name: str) -> list[SentenceEvaluator]:
    """Both evaluators of one split, as the notebook builds them."""
    images: list[Image.Image] = [Image.open(row["image"]) for row in rows]
    titles = [row["title"] for row in rows]
    return [TripletEvaluator(images, titles, [row["title_neg"] for row in rows], name=name),
            Recall(images, titles, name)]


def main(base: str, dataset: str, out: str, epochs: int) -> None:
    """Evaluate, train with an evaluation after every epoch, evaluate on test."""
    folder = Path(dataset)
    train, valid, test = (read(folder, split) for split in ("train", "valid", "test"))
    model = SentenceTransformer(base, device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projection" in name)
    watched = SequentialEvaluator([*evaluators(train, "train"), *evaluators(valid, "valid")])
    watched(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=out, num_train_epochs=epochs, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        learning_rate=1e-4, report_to=[], save_strategy="no", eval_strategy="epoch", use_cpu=True, disable_tqdm=True)
    clock = Clock()
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=table(train), eval_dataset=table(valid),
                               loss=MultipleNegativesRankingLoss(model), evaluator=watched, callbacks=[clock]).train()
    for evaluator in evaluators(test, "test"):
        evaluator(model)
    model.save_pretrained(f"{out}/model")
    spent = time.process_time()
    print(json.dumps({"cpu_s": spent, "epoch_cpu_s": (clock.at[-1] - clock.at[0]) / epochs}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
