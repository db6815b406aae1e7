"""The search space of a sweep: read from --space, enumerated or drawn from at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.batch import UserError
from engine.config.fields import Config, config_fields
from engine.config.settings import Settings, check, suggest

RECIPE = [name for name, spec in config_fields().items() if spec.group == "recipe" and name not in ("recipe", "mode")]
SEARCHABLE = [name for name in RECIPE
              if name not in ("trainable", "seed") and "sweep" in config_fields()[name].commands]
PATIENCE = 1_000  # draws in a row without a new combination: the space counts as exhausted

Choices = list[Any]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, uniform or log-uniform."""

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, rng: random.Random) -> float | int:
        """Return one number; three significant digits keep a recipe readable."""
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return round(value) if self.whole else float(f"{value:.3g}")


def read_space(text: str) -> dict[str, Range | Choices]:
    """Parse `lr=1e-4..1e-2:log epochs=2,10`; return for each setting its range or its values. Raises UserError."""
    space: dict[str, Range | Choices] = {}
    for part in text.split():
        key, given, values = part.partition("=")
        name = key.lstrip("-").replace("-", "_")
        if not given or not values:
            raise UserError(f"--space: {part} is no setting with values; write lr=1e-4,1e-3 or lr=1e-4..1e-2:log")
        if name not in SEARCHABLE:
            raise UserError("--space: " + suggest("setting", name, SEARCHABLE))
        try:
            space[name] = _values(values, type(config_fields()[name].default))
        except ValueError as error:
            raise UserError(f"--space: {part}: {error}") from None
    if not space:
        raise UserError('sweep needs something to try, such as --space "lr=1e-4,3e-4,1e-3 epochs=2,10"')
    return space


def _values(text: str, kind: type) -> Range | Choices:
    low, dots, high = text.partition("..")
    if not dots:
        return [kind(value) for value in text.split(",")]
    high, colon, scale = high.partition(":")
    if kind not in (int, float):
        raise ValueError("only numbers have a range; list the values")
    parsed = Range(kind(low), kind(high), scale == "log", kind is int)
    if (colon and scale != "log") or not parsed.low < parsed.high or (parsed.log and parsed.low <= 0):
        raise ValueError("a range is LOW..HIGH or LOW..HIGH:log with LOW below HIGH, above 0 for log")
    return parsed


def configurations(cfg: Config) -> list[Settings]:
    """Return {} (the settings as given), then every combination of --space, or --trials of them, drawn by --seed.

    The first N of a larger --trials are those of --trials N. Raises UserError for a combination that cannot work.
    """
    if cfg.recipe == "auto":
        raise UserError("--recipe auto searches by itself; use it with train, or leave it out of the sweep")
    space = read_space(cfg.space)
    ranges = [name for name, values in space.items() if isinstance(values, Range)]
    if ranges and not cfg.trials:
        raise UserError(f"--space: {ranges[0]} is a range; say how many configurations to draw with --trials N")
    accepted: list[Settings] = [{}]
    seen = {cfg}
    for settings in _drawn(space, cfg.trials, cfg.seed) if cfg.trials else _grid(space):
        try:
            tried = replace(cfg, **settings)
            check(tried)
        except ValueError as error:
            raise UserError(f"--space: {describe_settings(settings)}: {error}") from None
        if tried.interpolate == "auto":
            raise UserError("sweep holds out no split to choose alpha on; try some: --space interpolate=0.5,0.7,1")
        if tried not in seen:
            seen.add(tried)
            accepted.append(settings)
    return accepted


def _grid(space: Mapping[str, Range | Choices]) -> Iterator[Settings]:
    """Yield every combination; the space holds no range."""
    values = [choices for choices in space.values() if isinstance(choices, list)]
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))


def _drawn(space: Mapping[str, Range | Choices], trials: int, seed: int) -> Iterator[Settings]:
    """Yield `trials` distinct combinations, fewer when the space has fewer."""
    rng = random.Random(seed)
    repeats = 0
    seen: set[tuple[object, ...]] = set()
    while len(seen) < trials and repeats < PATIENCE:
        settings = {}
        for name, values in space.items():
            settings[name] = values.draw(rng) if isinstance(values, Range) else rng.choice(values)
        key = tuple(settings.values())
        if key in seen:
            repeats += 1
            continue
        repeats = 0
        seen.add(key)
        yield settings


def describe_settings(settings: Mapping[str, object]) -> str:
    """Return `lr 0.001, epochs 10`, or `as given` for no settings besides flags and defaults."""
    parts = []
    for name, value in settings.items():
        parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts) or "as given"
