"""Search: read the space of settings, choose what to try, tune the head again and again from stored features.

A run costs milliseconds because features are constants, so every configuration is cross-validated and repeated.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batch import UserError
from engine.config import Config, check, config_fields, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from engine.dist import World
    from engine.model import Parts

FIXED = ("mode", "trainable", "seed", "recipe")  # of the recipe, but not to be searched
RECIPE = [name for name, spec in config_fields().items() if spec.metadata["group"] == "recipe" and name != "recipe"]
REPEAT = 1_000  # between the seeds of repeats, so that their epochs share no order
PATIENCE = 1_000  # draws in a row that bring nothing new: the space is exhausted

Settings = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, evenly spread or evenly in the logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, rng: random.Random) -> float | int:
        """One number, of three digits so that a recipe can be read."""
        value = (math.exp(rng.uniform(math.log(self.low), math.log(self.high))) if self.log
                 else rng.uniform(self.low, self.high))
        return round(value) if self.whole else float(f"{value:.3g}")


def read_space(text: str) -> dict[str, Range | list[Any]]:
    """`lr=1e-4..1e-2:log epochs=2,10` -> for each setting its range or its values. Raises UserError."""
    known = {name: spec for name, spec in config_fields().items()
             if spec.metadata["group"] == "recipe" and name not in FIXED}
    space: dict[str, Range | list[Any]] = {}
    for part in text.split():
        key, given, values = part.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if not given or not values:
            raise UserError(f"--space: {part} is no setting with values; write lr=1e-4,1e-3 or lr=1e-4..1e-2:log")
        if name not in known:
            raise UserError("--space: " + unknown("setting", name, list(known)))
        try:
            space[name] = _values(values, type(known[name].default))
        except ValueError as error:
            raise UserError(f"--space: {part}: {error}") from None
    if not space:
        raise UserError('sweep needs something to try, such as --space "lr=1e-4,3e-4,1e-3 epochs=2,10"')
    return space


def _values(text: str, kind: type) -> Range | list[Any]:
    low, dots, high = text.partition("..")
    if not dots:
        return [kind(value) for value in text.split(",")]
    high, colon, scale = high.partition(":")
    if kind not in (int, float):
        raise ValueError("only numbers have a range; list the values")
    found = Range(kind(low), kind(high), scale == "log", kind is int)
    if (colon and scale != "log") or not found.low < found.high or (found.log and found.low <= 0):
        raise ValueError("a range is LOW..HIGH or LOW..HIGH:log with LOW below HIGH, above 0 for log")
    return found


def configurations(cfg: Config) -> list[Settings]:
    """What to try: {} (the settings as given) first, then every combination, or --trials drawn by --seed.

    More --trials extend fewer ones. Raises UserError for a combination that cannot work.
    """
    space = read_space(cfg.space)
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if ranges and not cfg.trials:
        raise UserError(f"--space: {ranges[0]} is a range; say how many configurations to draw with --trials N")
    grid = (dict(zip(space, values, strict=True)) for values in itertools.product(
        *(values for values in space.values() if isinstance(values, list)))) if not ranges else iter(())
    found: list[Settings] = [{}]
    seen = {cfg}
    for settings in _drawn(space, cfg.trials, cfg.seed) if cfg.trials else grid:
        try:
            tried = replace(cfg, **settings)
            check(tried)
        except ValueError as error:
            raise UserError(f"--space: {named(settings)}: {error}") from None
        if tried.interpolate == "auto":
            raise UserError("sweep holds out no split to choose alpha on; try some: --space interpolate=0.5,0.7,1")
        if tried not in seen:
            seen.add(tried)
            found.append(settings)
    return found


def _drawn(space: Mapping[str, Range | list[Any]], trials: int, seed: int) -> Iterator[Settings]:
    """`trials` distinct combinations, fewer when the space has fewer."""
    rng, seen, stale = random.Random(seed), set(), 0
    while len(seen) < trials and stale < PATIENCE:
        settings = {name: values.draw(rng) if isinstance(values, Range) else rng.choice(values)
                    for name, values in space.items()}
        key = tuple(settings.values())
        stale = stale + 1 if key in seen else 0
        if key not in seen:
            seen.add(key)
            yield settings


def named(settings: Mapping[str, Any]) -> str:
    """`lr 0.001, epochs 10`; what is as given by flags and defaults says so."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in settings.items()) or "as given"


class Tuner:
    """Tunes the head over and over, from the base weights each time, in this process alone."""

    def __init__(self, parts: Parts) -> None:
        from engine.dist import World
        from engine.interpolate import snapshot

        self.parts, self.base = parts, snapshot(parts.trainable)
        device = next(parts.head.parameters()).device
        self.world = World(0, 0, 1, device)

    def reset(self) -> None:
        """Back to the base model."""
        from engine.interpolate import blend

        blend(self.parts.trainable, self.base, self.base, 0.0)

    def tune(self, cfg: Config, rows: int, batches: Callable[[int, int, int], Iterator[Any]]) -> None:
        """The head as `cfg` trains it on `rows` pairs: the loop of a run, without log, evaluation and checkpoints.

        `batches(batch size, seed, first step)` are the Features of every step from there on.
        """
        from engine.checkpoint import State
        from engine.interpolate import blend, snapshot
        from engine.optim import adamw
        from engine.profiler import Profiler
        from engine.train import Plan, fit

        self.reset()
        self.parts.head.fixed_scale.fill_(cfg.scale)
        optimizer = adamw(self.parts.trainable.values(), cfg.lr, cfg.weight_decay)
        stream = partial(batches, cfg.batch_size, cfg.seed)
        fit(self.parts.head, stream, optimizer, Plan(rows, cfg.batch_size, cfg.epochs), State(), self.world, cfg,
            self.parts.precision, log=silent(), profiler=Profiler(), evaluate=lambda: None,
            checkpoint=lambda state: None, stop=lambda: 0)
        if cfg.interpolate:
            blend(self.parts.trainable, self.base, snapshot(self.parts.trainable), float(cfg.interpolate))


def silent() -> Any:
    """A log that says and keeps nothing."""
    from engine.log import Log

    class Silent(Log):
        def __init__(self) -> None:
            pass

        @contextmanager
        def waiting(self) -> Iterator[None]:
            yield

        @contextmanager
        def aside(self, name: str) -> Iterator[None]:
            yield

        def step(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float, rows: int) -> None:
            pass

        def flush(self, total_steps: int) -> None:
            pass

    return Silent()


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
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return [line for line in lines if line["identity"] == self.identity]

    def known(self, settings: Settings) -> bool:
        """Was this configuration finished before, on the same data and base model?"""
        return any(line["settings"] == settings for line in self.lines)

    def add(self, settings: Settings, result: Mapping[str, Any]) -> None:
        """Write one line."""
        line = {"settings": settings, **result, "identity": self.identity}
        if self.world.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def ranked(self) -> list[dict[str, Any]]:
        """The lines, best first; of equal ones the earlier."""
        return sorted(self.lines, key=lambda line: -line["scores"][self.metric])

    def hparams(self, folder: Path, cfg: Config) -> None:
        """Every configuration with its scores, for TensorBoard's hparams tab."""
        from torch.utils.tensorboard import SummaryWriter

        names: Sequence[str] = list(dict.fromkeys(name for line in self.lines for name in line["settings"]))
        with SummaryWriter(str(folder)) as writer:
            for number, line in enumerate(self.lines):
                settings = {name: line["settings"].get(name, getattr(cfg, name)) for name in names}
                writer.add_hparams(settings, {f"folds/{name}": value for name, value in line["scores"].items()},
                                   run_name=f"{number:04d}")
