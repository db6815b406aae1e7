"""Settings as text: read from flags and TOML, written as TOML, and checked; one sentence for every mistake."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

from engine.config.fields import Config, config_fields

METRICS = [*(f"{way}_{name}" for way in ("image_to_text", "text_to_image")
             for name in ("R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr")), "triplet_accuracy"]
# As `--help` and written TOML order them.
GROUPS = ("query", "model", "data", "recipe", "sweep", "loop", "output", "machine")


def group_settings(names: Sequence[str]) -> dict[str, list[str]]:
    """The settings `names` under the group each belongs to."""
    group_of = {name: spec.metadata["group"] for name, spec in config_fields().items()}
    grouped = {group: [name for name in names if group_of[name] == group] for group in GROUPS}
    return {group: members for group, members in grouped.items() if members}


def suggest(what: str, word: str, known: Sequence[str]) -> str:
    """A sentence that names the word nobody knows and the nearest one somebody does."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown {what} {word}" + (f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known)}"
                                       if len(known) < 12 else "")


def comma_list(text: str) -> tuple[str, ...]:
    """The parts of `a,b`, blanks and empty parts left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_number(text: str) -> float:
    """A number, also as `5%`. Raises ValueError."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ValueError with one sentence for an unknown key or a wrong type."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:  # no TOML, no UTF-8, no file, or nested without end
        raise ValueError(f"--config {path}: {error}") from None
    hints, values = get_type_hints(Config), {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise ValueError(f"--config {path}: " + suggest("key", name, list(hints)))
        default = config_fields()[name].default
        if isinstance(default, tuple) and isinstance(value, (list, str)):
            value = tuple(value) if isinstance(value, list) else comma_list(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        elif isinstance(default, float) and isinstance(value, str):
            with suppress(ValueError):
                value = parse_number(value)
        if type(value) is not type(default) or (value and isinstance(value, tuple) and
                                                any(type(part) is not str for part in value)):
            raise ValueError(f"--config {path}: {key} must be {type(default).__name__}, not {type(value).__name__}")
        values[name] = value
    return values


def to_toml(config: Config, names: Sequence[str]) -> str:
    """A TOML file of the settings `names`, each below what it means, in their `--help` groups; `read_toml` reads it."""
    known, lines = config_fields(), ["# Settings of run.py: pass this file with --config; flags win."]
    for group, members in group_settings(names).items():
        lines += ["", f"# ---- {group} ----"]
        for name in members:
            choices = "|".join(known[name].metadata["choices"])
            lines.append(f"# {known[name].metadata['help']}" + (f" ({choices})" if choices else ""))
            lines.append(f"{name.replace('_', '-')} = {toml_value(getattr(config, name))}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """One setting's value as TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for this one
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()  # true, 0.0001, 1e-05


def check(config: Config) -> None:
    """Raises ValueError with one sentence for a value that cannot work."""
    at_least = {"epochs": 1, "batch_size": 1, "log_every": 1, "eval_every": 0, "save_every": 0, "keep": 1,
                "patience": 0, "workers": 1, "resize": 0, "lr": 0,
                "weight_decay": 0, "clip_norm": 0, "max_bad": 0, "max_pixels": 1, "scale": 1e-9,
                "dist_timeout": 1, "hardness": 0, "l2_sp": 0, "micro_batch": 0, "top": 1,
                "seed": 0, "trials": 0, "folds": 2, "seeds": 1}
    for name, low in at_least.items():
        value = getattr(config, name)
        if not low <= value < math.inf:  # NaN as well
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low:g}, not {value:g}")
    if config.max_bad > 1:
        raise ValueError(f"--max-bad is a share of the rows, such as 5% or 0.05, not {config.max_bad:g}")
    for name, high in {"seed": 2**32, "dist_timeout": 1e7}.items():
        if getattr(config, name) > high:
            raise ValueError(f"--{name.replace('_', '-')} must be at most {high:g}, not {getattr(config, name):g}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"--warmup is a share of all steps between 0 and 1, not {config.warmup:g}")
    if config.loss == "sigmoid" and config.hardness:
        raise ValueError("--loss sigmoid judges each pair alone, --hardness needs a softmax; leave it out or use "
                         "--loss symmetric")
    for name, spec in config_fields().items():
        allowed = spec.metadata["choices"]
        if allowed and getattr(config, name) not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, "
                             f"not {getattr(config, name)!r}")
    if config.interpolate not in ("", "auto") and not 0 <= _number(config.interpolate) <= 1:
        raise ValueError(f"--interpolate is a share of tuned within 0 and 1, or auto; not {config.interpolate}")
    if config.html and Path(config.html).expanduser().is_dir():
        raise ValueError(f"--html {config.html} is a folder; give a file, such as {config.html}/search.html")
    if config.best_metric not in METRICS:
        raise ValueError(f"--best-metric {config.best_metric} is not measured; there is {', '.join(METRICS)}")
    if not config.trainable:
        raise ValueError("--trainable names nothing; try --trainable projection")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
