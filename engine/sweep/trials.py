"""The runs of a sweep: the head tuned again and again from stored features, and the journal of what came out.

A run costs milliseconds because features are constants, so every configuration is cross-validated and repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from data.batch import Batches
from data.files import read_text
from engine.clip.model import LoadedModel
from engine.config.fields import Config
from engine.config.settings import to_toml
from engine.optim import adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.folder import write_json
from engine.sweep.interpolate import blend, snapshot
from engine.sweep.space import RECIPE, Settings
from engine.train import Callbacks, Plan, Replica, fit

REPEAT = 1_000  # between the seeds of repeats, so that their epochs share no order


class Run(NamedTuple):
    """One run of a cross-validation: its seed, the pairs it trains on, those it is measured on, and their row numbers.

    Both are the data room's and only handed on; `train` has a length.
    """

    seed: int
    train: Any
    held: Any
    row_N: Tensor


class Tuner:
    """Tunes the head over and over, each time from the base weights and in this process alone.

    `batches(pairs, batch size, seed)` is what a run of this seed trains on.
    """

    def __init__(self, parts: LoadedModel, batches: Callable[[Any, int, int], Batches]) -> None:
        self.parts, self.batches, self.base = parts, batches, snapshot(parts.trainable)
        self.world = World(0, 0, 1, next(parts.head.parameters()).device)

    def reset(self) -> None:
        """Back to the base model."""
        blend(self.parts.trainable, self.base, self.base, 0.0)

    def tune(self, cfg: Config, pairs: Any) -> None:
        """The head as `cfg` trains it on `pairs`: the loop of a run, without log, evaluation and checkpoints."""
        self.reset()
        self.parts.head.fixed_scale.fill_(cfg.scale)
        optimizer = adamw(self.parts.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp)
        replica = Replica(self.parts.head, optimizer, self.world, self.parts.precision)
        fit(replica, self.batches(pairs, cfg.batch_size, cfg.seed), Plan(len(pairs), cfg.batch_size, cfg.epochs),
            State(), cfg, Callbacks())
        if cfg.interpolate:
            blend(self.parts.trainable, self.base, snapshot(self.parts.trainable), float(cfg.interpolate))

    def cross_validate(self, cfg: Config | None, runs: Sequence[Run], measure: Callable[[Any], Any],
                       world: World) -> list[tuple[Tensor, Any]]:
        """The rows each run holds out and what `evaluate_splits` finds on them, in order, with `cfg` or (None) the base model.

        The ranks of `world` share the runs; each run is one process's, so their number changes no result.
        """
        mine = []
        for number in range(world.rank, len(runs), world.size):
            run = runs[number]
            if cfg is None:
                self.reset()
            else:
                self.tune(replace(cfg, seed=run.seed), run.train)
            mine.append((number, run.row_N, measure(run.held)))
        found = [run for part in world.exchange(mine) for run in part]
        return [run[1:] for run in sorted(found, key=lambda run: run[0])]


class Journal:
    """sweep.jsonl, one line a finished configuration, and its entry in TensorBoard's hparams; goes on after a kill."""

    def __init__(self, folder: Path, world: World, identity: Mapping[str, str], metric: str, keep: bool) -> None:
        self.path, self.world, self.identity, self.metric = folder / "sweep.jsonl", world, dict(identity), metric
        self.lines: list[dict[str, Any]] = world.exchange(self._read() if keep else [])[0]
        if world.is_main:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def _read(self) -> list[dict[str, Any]]:
        """The lines of before; without one that a kill cut off, or that is of other data or another base model."""
        lines = []
        for text in read_text(self.path).splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return [line for line in lines if line["identity"] == self.identity]

    def known(self, settings: Settings) -> bool:
        """Was this configuration finished before, on the same data and base model?"""
        return any(line["settings"] == settings for line in self.lines)

    def add(self, settings: Settings, result: Mapping[str, Any]) -> float:
        """Write one line; the score that decides."""
        line = {"settings": settings, **result, "identity": self.identity}
        if self.world.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return result["scores"][self.metric]

    def ranked(self) -> list[dict[str, Any]]:
        """The lines, best first, of equal ones the earlier; those that have collapsed last."""
        return sorted(self.lines, key=lambda line: ("collapsed" in line, -line["scores"][self.metric]))

    def conclude(self, folder: Path, cfg: Config) -> None:
        """sweep.json, the winner's recipe.toml, and all configurations with their scores for TensorBoard's hparams."""
        from torch.utils.tensorboard import SummaryWriter

        lines = self.ranked()
        write_json(folder / "sweep.json", {"metric": self.metric, "configurations": lines})
        recipe = to_toml(replace(cfg, **lines[0]["settings"]), RECIPE)
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
        names: Sequence[str] = list(dict.fromkeys(name for line in self.lines for name in line["settings"]))
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for number, line in enumerate(self.lines):
                settings = {name: line["settings"].get(name, getattr(cfg, name)) for name in names}
                writer.add_hparams(settings, {f"folds/{name}": value for name, value in line["scores"].items()},
                                   run_name=f"{number:04d}")
