"""Settings as text: read from TOML and from the run that goes on, written as TOML, and checked."""

from __future__ import annotations

import difflib
import json
import math
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.reading import read_text
from engine.config.fields import Config, Setting, config_fields, flag_of

MAX_PROFILED = 1_000  # steps in a trace: a viewer does not open larger ones
MAX_TOML = 1 << 20  # bytes of a --config file
Settings = dict[str, Any]  # values of Config by name
DIRECTIONS = ("image_to_text", "text_to_image")
RETRIEVAL_METRICS = ("R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr")
METRICS = [*(f"{direction}_{name}" for direction in DIRECTIONS for name in RETRIEVAL_METRICS), "triplet_accuracy"]


# The settings that --recipe auto chooses, and those without a meaning for it: it tunes both projections in one go,
# without checkpoints and evaluations on the way.
CHOSEN_BY_AUTO = ("epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "clip_norm", "scale", "loss",
                  "hardness", "l2_sp", "relative", "interpolate")
UNUSED_BY_AUTO = ("trainable", "lr_tower", "lr_text", "micro_batch", "augment", "shuffle_buffer", "train_samples",
                  "patience", "eval_splits", "eval_every", "save_every", "keep", "best_metric", "profile",
                  "gradient_checkpointing")


def group_settings(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings `names` under the group each belongs to, in the order of Config."""
    groups: dict[str, list[str]] = {}
    for name, spec in config_fields().items():
        if name in names:
            groups.setdefault(spec.group, []).append(name)
    return groups


def metric_sign(metric: str) -> int:
    """Return 1 for a metric whose highest value is the best, -1 for a rank, whose lowest value is."""
    return -1 if metric.endswith("_rank") else 1


def suggest(kind: str, word: str, known: Sequence[str]) -> str:
    """Return a sentence that names the unknown word and the nearest known one."""
    names = {name.strip("-"): name for name in known}  # the dashes of flags would make all of them alike
    near = difflib.get_close_matches(word.strip("-"), names, n=1)
    if near:
        return f"unknown {kind} {word}; did you mean {names[near[0]]}?"
    choices = f"; there is {', '.join(known)}" if len(known) < 12 else ""
    return f"unknown {kind} {word}{choices}"


def comma_list(text: str) -> tuple[str, ...]:
    """Return the parts of `a,b` without blanks around them and without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_number(text: str) -> float:
    """Return a number, `5%` as 0.05. Raises ValueError."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def read_toml(path: Path) -> Settings:
    """Return the settings in a TOML file. Raises ValueError with one sentence for an unknown key or a wrong type."""
    try:
        table = tomllib.loads(read_text(path, MAX_TOML).removeprefix("\ufeff"))  # as Windows' editors write it
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:  # no TOML, no UTF-8, no file, or nested without end
        raise ValueError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    known = config_fields()
    values: Settings = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"--config {path}: " + suggest("key", name, list(known)))
        values[name] = _as_setting(value, known[name])
        if not _has_type_of(values[name], known[name].default):
            expected, given = type(known[name].default).__name__, type(values[name]).__name__
            raise ValueError(f"--config {path}: {key} must be {expected}, not {given}")
    return values


def _as_setting(value: object, spec: Setting) -> object:
    """Return a value of TOML or JSON as the setting holds it: lists as tuples, `5%` as number, true as bare flag."""
    default = spec.default
    if spec.bare and isinstance(value, bool):
        return spec.bare if value else default
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, tuple) and isinstance(value, str):
        return comma_list(value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, float) and isinstance(value, str):
        with suppress(ValueError):
            return parse_number(value)
    return value


def _has_type_of(value: object, default: object) -> bool:
    """Return whether a value has the type of the default; the items of a tuple have to be text."""
    if type(value) is not type(default):
        return False
    return not isinstance(value, tuple) or all(type(item) is str for item in value)


def to_toml(config: Config, names: Sequence[str]) -> str:
    """Return a TOML file of the settings `names`, each below its help line, grouped as in `--help`."""
    lines = ["# Settings of run.py: pass this file with --config; flags win."]
    for group, members in group_settings(names).items():
        lines += ["", f"# ---- {group} ----"]
        for name in members:
            spec = config_fields()[name]
            choices = f" ({'|'.join(spec.choices)})" if spec.choices else ""
            lines.append(f"# {spec.help}{choices}")
            lines.append(f"{name.replace('_', '-')} = {toml_value(getattr(config, name))}")
    return "\n".join(lines) + "\n"


def toml_value(value: object) -> str:
    """Return one setting's value as TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):  # JSON's escapes are valid in TOML, except that TOML also wants DEL escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()  # true, 0.0001, 1e-05


def resumed_settings(flags: Settings) -> Settings:
    """Return the settings of the run that --resume continues, {} if there is none.

    Raises ValueError for a flag that would change what the run computes.
    """
    mode = flags.get("resume", "off")
    folder = Path(flags.get("out", "")).expanduser()
    if mode == "auto" and not flags.get("out"):
        raise ValueError("--resume auto needs the folder to go on in: --out DIR")
    if mode == "off" or (mode == "auto" and not (folder / "config.json").exists()):
        return {}
    try:
        saved = known_settings(json.loads(read_text(folder / "config.json"))["config"])
    except FileNotFoundError:
        if (folder / "checkpoints").exists():
            raise ValueError(f"--resume: --out {folder} holds checkpoints and no config.json, and a run cannot go on "
                             "without its settings; put a copy of that file back") from None
        raise ValueError(f"--resume: --out {folder} holds no run with a readable config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"--resume: --out {folder} holds no run with a readable config.json: that file is damaged, "
                         "and a run cannot go on without its settings; put a copy of it back") from None
    known = config_fields()
    for name, value in flags.items():
        before = saved.get(name, known[name].default)
        if value != before and not known[name].resumable:
            raise ValueError(f"--resume: the run was started with {flag_of(name)} {before}, not {value}; leave the "
                             "flag out or start a new run with another --out")
    return saved


def known_settings(saved: Settings) -> Settings:
    """Return the settings in a run's config.json as Config holds them; those of other versions are left out."""
    settings = {}
    for name in config_fields().keys() & saved.keys():
        settings[name] = _as_setting(saved[name], config_fields()[name])
    return settings


def profiled_steps(text: str) -> range | None:
    """Return the steps (from 0) that --profile names as FIRST:END, None for on and off. Raises ValueError."""
    if text in ("on", "off"):
        return None
    first, colon, end = text.partition(":")
    steps = range(int(first), int(end)) if colon and first.isdecimal() and end.isdecimal() else range(0)
    if not 0 < len(steps) <= MAX_PROFILED:
        raise ValueError(f"--profile {text} is no range of steps; write FIRST:END, such as 100:110 for ten steps, at "
                         f"most {MAX_PROFILED:,}, or --profile alone for a few of the first")
    return steps


def check(config: Config) -> None:
    """Raise ValueError with one sentence for a value that cannot work."""
    for name, spec in config_fields().items():
        check_value(flag_of(name), getattr(config, name), spec)
    profiled_steps(config.profile)
    if config.recipe == "auto":
        check_auto(config)
    if config.loss == "sigmoid" and config.hardness:
        raise ValueError("--loss sigmoid judges each pair alone, --hardness needs a softmax; leave it out or use "
                         "--loss symmetric")
    if (config.lr_tower or config.lr_text) and not config.lr:
        raise ValueError("--lr-tower and --lr-text follow the schedule of --lr; give an --lr above 0")
    if config.train_samples and not config.shuffle_buffer:
        raise ValueError("--train-samples counts the samples of a stream; leave it out or add --shuffle-buffer N")
    if config.shuffle_buffer and config.mine_negatives != "off":
        raise ValueError("--mine-negatives looks at all titles of train, --shuffle-buffer knows none before it reads "
                         "it; leave one out")
    if config.interpolate not in ("", "auto") and not 0 <= _number(config.interpolate) <= 1:
        raise ValueError(f"--interpolate is a share of tuned within 0 and 1, or auto; not {config.interpolate}")
    if config.html and Path(config.html).expanduser().is_dir():
        raise ValueError(f"--html {config.html} is a folder; give a file, such as {config.html}/search.html")
    if config.best_metric not in METRICS:
        raise ValueError(f"--best-metric {config.best_metric} is not measured; there is {', '.join(METRICS)}")
    if not config.trainable:
        raise ValueError("--trainable names nothing; try --trainable projection")


def check_auto(config: Config, given: Collection[str] = ()) -> None:
    """Raise ValueError for a setting that --recipe auto would ignore: changed, or named on the command line."""
    for names, reason in ((CHOSEN_BY_AUTO, "is chosen by --recipe auto"),
                          (UNUSED_BY_AUTO, "has no meaning with --recipe auto, which tunes both projections in "
                                           "seconds, without checkpoints")):
        for name in names:
            if name in given or getattr(config, name) != config_fields()[name].default:
                raise ValueError(f"{flag_of(name)} {reason}; leave it out, or use --recipe reference")
    if config.mode == "streaming":
        raise ValueError("--mode streaming runs the towers every step, and --recipe auto tunes from stored features; "
                         "leave one out")


def check_value(flag: str, value: object, spec: Setting) -> None:
    """Raise ValueError for a value that is outside its setting's bounds or not among its choices."""
    if spec.choices and value not in spec.choices:
        raise ValueError(f"{flag} must be one of {', '.join(spec.choices)}, not {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    above_low = spec.low <= value < math.inf  # False for NaN as well
    if spec.range_text and not (above_low and value <= spec.high):
        raise ValueError(f"{flag} must be {spec.range_text}, not {value:g}")
    if not above_low:
        raise ValueError(f"{flag} must be at least {spec.low:g}, not {value:g}")
    if value > spec.high:
        raise ValueError(f"{flag} must be at most {spec.high:g}, not {value:g}")


def check_paths(settings: Mapping[str, object]) -> None:
    """Raise ValueError for a text that no file name can hold, and for ~ or ~NAME where there is no such home."""
    for name, value in settings.items():
        flag = flag_of(name)
        if not isinstance(value, str):
            continue
        if "\0" in value:
            raise ValueError(f"{flag} {value!r} holds a NUL character; leave it out")
        # Surrogates are bytes of a name that are not text in this locale; TensorBoard cannot write such a path.
        if name == "out" and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{flag} {value} is no text here; choose another name, or a locale with UTF-8, such as "
                             "LC_ALL=C.UTF-8")
        if value.startswith("~") and os.path.expanduser(value).startswith("~"):
            home = Path(value).parts[0]
            fault = "there is no home folder here (HOME is not set)" if home == "~" else f"{home} is nobody's home"
            raise ValueError(f"{flag} {value}: {fault}; write the path in full")


def _number(text: str) -> float:
    """Return a text as a number, NaN where it is not one."""
    try:
        return float(text)
    except ValueError:
        return math.nan
