"""The runs of a sweep, which train the head from stored features, and the journal of their scores.

A run takes milliseconds because features are constants, so every configuration is cross-validated and repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from data.batch import Batches, UserError
from data.files import keep_lines, read_text
from data.progress import Progress
from data.store.feature_split import FeatureSplit
from engine.clip.model import LoadedModel
from engine.config.fields import Config
from engine.config.settings import Settings, to_toml
from engine.optim import Plan, adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.folder import write_json
from engine.run_folder.log import Log, NullLog
from engine.sweep.batched import PROJECTIONS, Projections, group_configurations, train_together
from engine.sweep.interpolate import blend, snapshot
from engine.sweep.space import RECIPE
from engine.train import Callbacks, Replica, fit

SEED_STRIDE = 1_000  # between the seeds of repeats, so that no two epochs share an order

Measured = TypeVar("Measured")
Trial = dict[str, Any]  # a line of sweep.jsonl: settings, identity, what `eval.leaderboard` returns of the scores


class Run(NamedTuple):
    """One run of a cross-validation."""

    seed: int
    train: FeatureSplit
    held_out: FeatureSplit
    row_N: Tensor  # row numbers of the held-out pairs


class Tuner:
    """Trains the head any number of times, each time from the base weights and without other ranks.

    `batches(pairs, batch size, seed)` makes the batches of a run.
    """

    def __init__(self, parts: LoadedModel, batches: Callable[[FeatureSplit, int, int], Batches]) -> None:
        self.parts, self.batches, self.base = parts, batches, snapshot(parts.trainable)
        self.world = World(0, 0, 1, next(parts.head.parameters()).device)

    def reset(self) -> None:
        """Restore the base weights."""
        blend(self.parts.trainable, self.base, self.base, 0.0)

    def tune(self, cfg: Config, pairs: FeatureSplit, log: Log | None = None) -> None:
        """Train the head on `pairs` with the settings `cfg`, without evaluation and checkpoints."""
        self.reset()
        self.parts.head.fixed_scale.fill_(cfg.scale)
        optimizer = adamw(self.parts.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp, cfg.relative)
        replica = Replica(self.parts.head, optimizer, self.world, self.parts.precision)
        plan = Plan(len(pairs), cfg.batch_size, cfg.epochs)
        fit(replica, self.batches(pairs, cfg.batch_size, cfg.seed), plan, State(), cfg, Callbacks(log or NullLog()))
        if cfg.interpolate:
            blend(self.parts.trainable, self.base, snapshot(self.parts.trainable), float(cfg.interpolate))

    def cross_validate(self, configs: Sequence[Config | None], runs: Sequence[Run],
                       measure: Callable[[FeatureSplit], Measured],
                       world: World) -> list[list[tuple[Tensor, Measured]]]:
        """Return for each configuration and run the row numbers held out and what `measure` returns for these pairs.

        None measures the base model. Configurations of one run train together where they can; see `batched.py`. The
        ranks of `world` share the runs; each run takes place in one process, so the number of ranks changes no result.
        """
        own_results: dict[int, list[Measured]] = {}
        numbers = range(world.rank, len(runs), world.size)
        progress = Progress("folds trained and measured", len(numbers), world.live)
        for number in numbers:
            own_results[number] = self._measure_all(configs, runs[number], measure)
            progress()
        results: dict[int, list[Measured]] = {}
        for results_of_rank in world.exchange(own_results):
            results |= results_of_rank
        return [[(run.row_N, results[number][place]) for number, run in enumerate(runs)]
                for place in range(len(configs))]

    def _measure_all(self, configs: Sequence[Config | None], run: Run,
                     measure: Callable[[FeatureSplit], Measured]) -> list[Measured]:
        """Return what `measure` returns of the held-out pairs after each configuration was trained."""
        measured: dict[int, Measured] = {}
        seeded = {place: replace(cfg, seed=run.seed) for place, cfg in enumerate(configs) if cfg is not None}
        for places in self._groups(seeded, run.train):
            weights = train_together(self._base_projections(), run.train, [seeded[place] for place in places],
                                     self.parts.precision)
            for member, place in enumerate(places):
                self._set(Projections(*(weight_K[member] for weight_K in weights)), seeded[place])
                measured[place] = measure(run.held_out)
        for place, cfg in enumerate(configs):
            if place in measured:
                continue
            if cfg is None:
                self.reset()
            else:
                self.tune(seeded[place], run.train)
            measured[place] = measure(run.held_out)
        return [measured[place] for place in range(len(configs))]

    def _groups(self, seeded: Mapping[int, Config], pairs: FeatureSplit) -> list[list[int]]:
        """Return the places of configurations that train together; none where other weights than both projections do.
        """
        if {*self.parts.trainable} != {*PROJECTIONS}:
            return []
        places = [*seeded]
        groups = group_configurations([seeded[place] for place in places], pairs)
        return [[places[member] for member in group] for group in groups if len(group) > 1]

    def _base_projections(self) -> Projections:
        return Projections(*(self.base[name] for name in PROJECTIONS))

    def _set(self, weights: Projections, cfg: Config) -> None:
        """Give the head trained weights, at the configuration's share between base and tuned."""
        tuned = dict(zip(PROJECTIONS, weights, strict=True))
        blend(self.parts.trainable, self.base, tuned, float(cfg.interpolate or 1))


class Journal:
    """sweep.jsonl: one line for each finished configuration; a resumed sweep continues after the last whole line.

    Raises UserError when the sweep to go on with had other data or another base model.
    """

    def __init__(self, folder: Path, world: World, identity: Mapping[str, str], metric: str, keep: bool) -> None:
        self.path, self.world = folder / "sweep.jsonl", world
        self.identity, self.metric = dict(identity), metric
        lines: list[Trial] = []
        if world.is_main:
            keep_lines(self.path, lambda line: keep and self._parse(line) is not None)
            lines = list(map(json.loads, read_text(self.path).splitlines()))
        self.lines = world.exchange(lines)[0]
        for line in self.lines:
            changed = [name for name, digest in self.identity.items() if line["identity"].get(name) != digest]
            if changed:
                raise UserError(f"{self.path} was written with other values of {', '.join(changed)}; resume it with "
                                "the same --dataset and --model, or start a new sweep with another --out")

    @staticmethod
    def _parse(text: str) -> Trial | None:
        """Return a line's configuration; None for a half-written or damaged line."""
        try:
            line = json.loads(text)
            return line if {"settings", "scores", "identity"} <= line.keys() else None
        except (ValueError, AttributeError, RecursionError):
            return None

    def is_finished(self, settings: Settings) -> bool:
        """Return whether this configuration is in the journal."""
        return any(line["settings"] == settings for line in self.lines)

    def add(self, settings: Settings, result: Mapping[str, Any]) -> float:
        """Append one line; return the value of the metric that configurations are compared by."""
        line = {"settings": settings, **result, "identity": self.identity}
        if self.world.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return result["scores"][self.metric]

    def best_first(self) -> list[Trial]:
        """Return the lines, best first, earlier ones first among equals; collapsed ones last."""
        return sorted(self.lines, key=lambda line: ("collapsed" in line, -line["scores"][self.metric]))

    def write_summary(self, folder: Path, cfg: Config) -> None:
        """Write sweep.json, the recipe.toml of the best configuration, and all of them to TensorBoard's hparams."""
        from torch.utils.tensorboard import SummaryWriter

        lines = self.best_first()
        write_json(folder / "sweep.json", {"metric": self.metric, "configurations": lines})
        recipe = to_toml(replace(cfg, **lines[0]["settings"]), RECIPE)
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
        names: dict[str, None] = {}  # of all settings that were tried, in order
        for line in self.lines:
            names |= dict.fromkeys(line["settings"])
        with SummaryWriter(str(folder / "tensorboard")) as writer:
            for number, line in enumerate(self.lines):
                settings = {name: line["settings"].get(name, getattr(cfg, name)) for name in names}
                scores = {f"folds/{name}": value for name, value in line["scores"].items()}
                writer.add_hparams(settings, scores, run_name=f"{number:04d}")
