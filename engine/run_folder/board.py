"""TensorBoard: the scalars, pictures and layout of a run, and their tags.

Tags sort in reading order: `eval` (the main metrics of train and valid), `fit` (the loop), `machine`, then pictures and
all other metrics by split. The base model's metrics are a run of their own, `base`, so that each chart shows them as a
second, level line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn

from data.images.album import png
from data.text import hide_secrets, printable
from engine.clip.families import HEAD
from engine.config.fields import Config, as_dict, config_fields

Metrics = Mapping[str, Mapping[str, Any]]  # split -> name -> value or [lo, hi]
POINTS = 5_000  # of any curve at most; steps.jsonl has every step
HEADLINE = ("image_to_text_R@10", "text_to_image_R@10", "triplet_accuracy")
WATCHED = ("train", "valid")  # splits evaluated during training too, not only before and after
LAYOUT = {"at a glance": {
    "loss": ["Multiline", ["fit/loss"]],
    "Recall@10, thumbnail to title": ["Multiline", ["eval/image_to_text_R@10.*"]],
    "Recall@10, title to thumbnail": ["Multiline", ["eval/text_to_image_R@10.*"]],
    "triplet accuracy": ["Multiline", ["eval/triplet_accuracy.*"]],
    "test: Recall@10 at both ends": ["Multiline", ["test/.*R@10"]],
    "drift of the projections from the base": ["Multiline", ["fit/drift.*"]],
    "share of time waiting for data": ["Multiline", ["machine/data_wait_share"]],
}}


PROJECTOR_ENTRY = """embeddings {{
  tensor_name: "{name}:{step:05}"
  tensor_path: "{place}/tensors.tsv"
  metadata_path: "{place}/metadata.tsv"
  sprite {{
    image_path: "{place}/sprite.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""


Arguments = ParamSpec("Arguments")


def shown_only(write: Callable[Concatenate[TensorBoardWriter, Arguments], None]
               ) -> Callable[Concatenate[TensorBoardWriter, Arguments], None]:
    """Return a method that does nothing without a folder, and gives up at the first error of the disk.

    A run does not end because its curves cannot be written.
    """
    @wraps(write)
    def write_or_give_up(board: TensorBoardWriter, *args: Arguments.args, **named: Arguments.kwargs) -> None:
        if board.folder is None:
            return
        try:
            write(board, *args, **named)
        except OSError as error:
            board.say(f"TensorBoard: nothing more is written to {board.folder} ({error}); the run goes on")
            board.folder = None

    return write_or_give_up


class TensorBoardWriter:
    """The event files of one run; `folder` None, on all ranks but the first, writes nothing."""

    def __init__(self, folder: Path | None, first_step: int, steps: int,
                 say: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.steps, self.stride, self.say = folder, steps, max(1, steps // POINTS), say
        self._projector: dict[str, str] = {}  # its configuration, an entry for each folder of points
        self._main: Any
        self._base: Any
        self._open(first_step)
        self._last_step: dict[str, int] = {}  # kind -> step it was last written at

    @shown_only
    def _open(self, first_step: int) -> None:
        """Start the event files; a resumed run hides later steps of an earlier process."""
        from torch.utils.tensorboard import SummaryWriter

        assert self.folder is not None
        purge = first_step + 1 if first_step else None
        self._main = SummaryWriter(str(self.folder), purge_step=purge)
        self._base = SummaryWriter(str(self.folder / "base"), purge_step=purge)
        if not first_step:
            self._main.add_custom_scalars(LAYOUT)

    def due(self, kind: str, step: int) -> bool:
        """Return whether to write `kind` now: every step of a short run, every `stride` steps of a long one.

        Never for a step before the last one written, as when the best weights are loaded and evaluated at the end.
        """
        last = self._last_step.get(kind, -self.stride)
        if step < last + self.stride and not step == self.steps > last:
            return False
        self._last_step[kind] = step
        return True

    @shown_only
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one point for each tag."""
        for tag, value in values.items():
            self._main.add_scalar(tag, value, step)

    @shown_only
    def metrics(self, scores: Metrics, base: Metrics, step: int) -> None:
        """Write the metrics of an evaluation, and those of the base model as a level line beside them."""
        splits = [split for split in scores if self.due(f"metrics of {split}", step)]
        for writer, source in ((self._main, scores), (self._base, base)):
            for split in splits:
                for name, value in source.get(split, {}).items():
                    if isinstance(value, float):
                        writer.add_scalar(tag(split, name), value, step)

    @shown_only
    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Write a uint8 RGB picture. `add_image` takes longer: it resizes to the same size and compresses hard."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(height=pixels_HWC.shape[0], width=pixels_HWC.shape[1], colorspace=3,
                              encoded_image_string=png(pixels_HWC))
        self._main.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    @shown_only
    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write a histogram of the finite values; a split with a single title has none, as it has no wrong answer."""
        finite = values[values.isfinite()]
        if len(finite):
            self._main.add_histogram(name, finite, step)

    @shown_only
    def embedding(self, name: str, vectors: Tensor, labels: Sequence[Sequence[str]], sprites_HHC: np.ndarray,
                  step: int) -> None:
        """Write points for the projector, each with its title, its kind and a small picture.

        The files are those of `add_embedding`, which takes ten times as long over them. `sprites_HHC` is a square sheet
        of the pictures, as many across as down.
        """
        assert self.folder is not None
        place = f"{step:05}/{name}"
        side = len(sprites_HHC) // math.ceil(math.sqrt(len(vectors)))
        folder = self.folder / place
        folder.mkdir(parents=True, exist_ok=True)
        table = [("title", "kind"), *labels]
        (folder / "tensors.tsv").write_text(_tab_separated(vectors.tolist()))
        (folder / "metadata.tsv").write_text(_tab_separated(table), encoding="utf-8", errors="replace")
        (folder / "sprite.png").write_bytes(png(sprites_HHC))
        self._projector[place] = PROJECTOR_ENTRY.format(name=name, step=step, place=place, side=side)
        (self.folder / "projector_config.pbtxt").write_text("".join(self._projector.values()))

    @shown_only
    def hparams(self, recipe: Mapping[str, object], splits: Sequence[str], done: bool) -> None:
        """Write the recipe and its results to this run's event file (`add_hparams` would open another run)."""
        from torch.utils.tensorboard.summary import hparams

        plain = {}
        for key, value in recipe.items():
            plain[key] = value if isinstance(value, (bool, int, float)) else str(value)
        measured = [split for split in splits if split != "train"]
        # Only their names count here; the values are the scalars of the same tags.
        results = {tag(split, name): 0.0 for split in measured for name in HEADLINE}
        experiment, begin, end = hparams(plain, results)
        for summary in (end,) if done else (experiment, begin):
            self._main.file_writer.add_summary(summary)

    @shown_only
    def flush(self) -> None:
        """Flush the event files to disk."""
        self._main.flush()
        self._base.flush()

    @shown_only
    def close(self) -> None:
        """Flush and close."""
        self._main.close()
        self._base.close()


def _tab_separated(rows: Iterable[Sequence[object]]) -> str:
    """Return the rows as the projector reads them; a cell is one line without tabs."""
    lines = []
    for row in rows:
        cells = [hide_secrets(printable(str(cell))) for cell in row]
        lines.append("\t".join(cells) + "\n")
    return "".join(lines)


def tag(split: str, name: str) -> str:
    """Return the tag of a metric of a split."""
    return f"eval/{name} {split}" if name in HEADLINE and split in WATCHED else f"{split}/{name}"


def comparable_settings(cfg: Config) -> dict[str, object]:
    """Return the settings to compare runs by: model, dataset and recipe."""
    comparable = {}
    for name, value in as_dict(cfg, "train").items():
        if name in ("model", "dataset") or config_fields()[name].group == "recipe":
            comparable[name] = value
    return comparable


class WeightDrift:
    """Relative change of the projections since the start: ||W - W0|| / ||W0||, for each by name."""

    def __init__(self, trainable: Mapping[str, nn.Parameter]) -> None:
        self.now: dict[str, Tensor] = {}
        self.base: dict[str, Tensor] = {}
        for name, weight in trainable.items():
            if name in HEAD and weight.dim() > 1:
                projection = name.split(".")[-2]
                self.now[projection], self.base[projection] = weight, weight.detach().clone()

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the changes; a host sync, so call it at an evaluation, which syncs anyway."""
        drift = {}
        for name, base in self.base.items():
            drift[f"fit/drift {name}"] = float((self.now[name] - base).norm() / base.norm())
        return drift


def memory(device: torch.device) -> dict[str, float]:
    """Return GiB of host memory in use and the peak of GPU memory, without a host sync."""
    scalars = {}
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        scalars["machine/host_GiB"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    if device.type == "cuda":
        scalars["machine/gpu_peak_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return scalars
