"""The training runs of a sweep, which start from stored features, and the journal of their scores.

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
from data.files import keep_lines
from data.progress import Progress
from data.reading import parse_json, read_text
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
Result = TypeVar("Result")
Trial = dict[str, Any]  # a line of sweep.jsonl: settings, identity, what `eval.leaderboard` returns of the scores


class Run(NamedTuple):
    """One run of a cross-validation."""

    seed: int
    train: FeatureSplit
    held_out: FeatureSplit
    row_N: Tensor  # row numbers of the held-out pairs


def divide_among_ranks(world: World, count: int, compute: Callable[[int], Result]) -> list[Result]:
    """Return [compute(0), …, compute(count - 1)] on every rank; each item is computed by one rank alone.

    So the number of ranks changes no result.
    """
    own = {}
    numbers = range(world.rank, count, world.size)
    progress = Progress("folds trained and measured", len(numbers), world.live)
    for number in numbers:
        own[number] = compute(number)
        progress()
    results: dict[int, Result] = {}
    for results_of_rank in world.exchange(own):
        results |= results_of_rank
    return [results[number] for number in range(count)]


class Tuner:
    """Trains the head any number of times, each time from the base weights and without other ranks.

    `batches(pairs, batch size, seed)` makes the batches of a run.
    """

    def __init__(self, model: LoadedModel, batches: Callable[[FeatureSplit, int, int], Batches]) -> None:
        self.model, self.batches, self.base = model, batches, snapshot(model.trainable)
        self.world = World(0, 0, 1, next(model.head.parameters()).device)

    def reset(self) -> None:
        """Restore the base weights."""
        blend(self.model.trainable, self.base, self.base, 0.0)

    def tune(self, cfg: Config, pairs: FeatureSplit, log: Log | None = None) -> None:
        """Train the head on `pairs` with the settings `cfg`, without evaluation and checkpoints."""
        self.reset()
        model = self.model
        model.head.fixed_scale.fill_(cfg.scale)
        optimizer = adamw(model.trainable.values(), cfg.lr, cfg.weight_decay, cfg.l2_sp, cfg.relative)
        replica = Replica(model.head, optimizer, self.world, model.precision)
        plan = Plan(len(pairs), cfg.batch_size, cfg.epochs)
        fit(replica, self.batches(pairs, cfg.batch_size, cfg.seed), plan, State(), cfg, Callbacks(log or NullLog()))
        if cfg.interpolate:
            blend(model.trainable, self.base, snapshot(model.trainable), float(cfg.interpolate))

    def cross_validate(self, configs: Sequence[Config | None], runs: Sequence[Run],
                       measure: Callable[[FeatureSplit], Measured],
                       world: World) -> list[list[tuple[Tensor, Measured]]]:
        """Return for each configuration and run the row numbers held out and what `measure` returns for these pairs.

        The configuration None is the base model. Configurations of one run train together where they can; see
        `batched.py`. The runs are divided among the ranks of `world`.
        """
        def measure_run(number: int) -> list[Measured]:
            return self._measure_all(configs, runs[number], measure)

        measured = divide_among_ranks(world, len(runs), measure_run)
        by_config: list[list[tuple[Tensor, Measured]]] = []
        for index in range(len(configs)):
            by_config.append([(run.row_N, results[index]) for run, results in zip(runs, measured, strict=True)])
        return by_config

    def _measure_all(self, configs: Sequence[Config | None], run: Run,
                     measure: Callable[[FeatureSplit], Measured]) -> list[Measured]:
        """Return for each configuration what `measure` returns of the held-out pairs once it has been trained."""
        measured: dict[int, Measured] = {}
        seeded = {index: replace(cfg, seed=run.seed) for index, cfg in enumerate(configs) if cfg is not None}
        for group in self._groups(seeded, run.train):
            members = [seeded[index] for index in group]
            weights = train_together(self.base_projections(), run.train, members, self.model.precision)
            for index, cfg, image_EV, text_ET in zip(group, members, *weights, strict=True):
                self._load(Projections(image_EV, text_ET), cfg)
                measured[index] = measure(run.held_out)
        for index in range(len(configs)):
            if index in measured:
                continue
            if index in seeded:
                self.tune(seeded[index], run.train)
            else:
                self.reset()
            measured[index] = measure(run.held_out)
        return [measured[index] for index in range(len(configs))]

    def _groups(self, seeded: Mapping[int, Config], pairs: FeatureSplit) -> list[list[int]]:
        """Return groups of indices of configurations that train together, two or more each.

        There are none unless exactly the two projections train.
        """
        if {*self.model.trainable} != {*PROJECTIONS}:
            return []
        indices = [*seeded]
        groups = []
        for group in group_configurations([*seeded.values()], pairs):
            if len(group) > 1:
                groups.append([indices[member] for member in group])
        return groups

    def base_projections(self) -> Projections:
        """Return both projections of the base model."""
        return Projections(*(self.base[name] for name in PROJECTIONS))

    def _load(self, weights: Projections, cfg: Config) -> None:
        """Give the head trained weights, at the configuration's share between base and tuned."""
        tuned = dict(zip(PROJECTIONS, weights, strict=True))
        blend(self.model.trainable, self.base, tuned, float(cfg.interpolate or 1))


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
            lines = list(map(parse_json, read_text(self.path).splitlines()))
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
            line = parse_json(text)
            return line if {"settings", "scores", "identity"} <= line.keys() else None
        except (ValueError, AttributeError):
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
