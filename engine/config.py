"""One frozen dataclass holds every setting; flags, TOML keys and `--help` derive from it. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_type_hints


def setting(default: Any, group: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that also knows its `--help` group, line and choices."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the reference recipe."""

    # What to tune, on what, and where results go.
    model: str = setting("sentence-transformers/clip-ViT-L-14", "model", "hub name or folder of a CLIPModel")
    dataset: str = setting("shawhin/yt-title-thumbnail-pairs", "data", "hub name, folder or file of pairs")
    out: str = setting("", "output", "run folder (default: runs/DATE-DATASET)")
    cache_dir: str = setting("~/.cache/thumbtune", "output", "feature store and fetched images")
    # Columns are detected by name; these override the detection.
    image_column: str = setting("", "data", "column with the image or its URL (default: detected)")
    title_column: str = setting("", "data", "column with the title (default: detected)")
    negative_column: str = setting("", "data", "column with the hard negative title (default: detected)")
    split: str = setting("test", "data", "split that `eval` measures")
    # What trains: substrings of parameter names.
    trainable: tuple[str, ...] = setting(("projection",), "recipe",
                                         "train parameters whose name holds one of these, or all")
    mode: str = setting("auto", "recipe", "cached: features once; streaming: towers every step; auto: cached if it can",
                        ("auto", "cached", "streaming"))
    # Optimisation, as the reference does it.
    epochs: int = setting(2, "recipe", "passes over the training pairs")
    batch_size: int = setting(16, "recipe", "pairs a step, over all ranks together")
    lr: float = setting(1e-4, "recipe", "peak learning rate")
    schedule: str = setting("linear", "recipe", "decay of the learning rate", ("linear", "cosine", "constant"))
    warmup: float = setting(0.0, "recipe", "share of all steps spent warming the learning rate up")
    weight_decay: float = setting(0.0, "recipe", "AdamW weight decay")
    clip_norm: float = setting(1.0, "recipe", "gradient norm is clipped at this; 0 turns clipping off")
    scale: float = setting(20.0, "recipe", "inverse temperature of the loss")
    seed: int = setting(42, "recipe", "seeds the order of the pairs")
    # When to look and to save.
    log_every: int = setting(10, "loop", "steps between flushes of the log (the only host sync)")
    eval_every: int = setting(0, "loop", "steps between evaluations; 0: every epoch")
    save_every: int = setting(0, "loop", "steps between checkpoints; 0: every epoch")
    keep: int = setting(3, "loop", "checkpoints kept beside `last` and `best`")
    resume: bool = setting(False, "loop", "carry on from the newest valid checkpoint in --out")
    # The machine.
    device: str = setting("auto", "machine", "where to compute", ("auto", "cpu", "cuda"))
    precision: str = setting("auto", "machine", "auto: bf16 where it is faster", ("auto", "bf16", "fp32"))
    workers: int = setting(2, "machine", "threads a rank that decode images")
    profile: bool = setting(False, "machine", "write a trace of a few steps to the run folder")
    dist_timeout: float = setting(600.0, "machine", "seconds after which a stalled rank is an error")
    # Reading.
    allow_host: tuple[str, ...] = setting((), "data", "private hosts that images may be fetched from")
    max_bad: float = setting(0.05, "data", "stop when a larger share of the rows is unusable")
    max_pixels: int = setting(25_000_000, "data", "refuse images with more pixels than this")


def config_fields() -> dict[str, Field[Any]]:
    """The settings by name, in order."""
    return {f.name: f for f in fields(Config)}


# What may differ between a run and its resumption: it changes where and how fast, not what is computed.
FREE_ON_RESUME = {"out", "resume", "cache_dir", "log_every", "eval_every", "save_every", "keep", "device", "workers",
                  "profile", "dist_timeout", "allow_host", "max_bad", "dataset", "model"}


class Parser(argparse.ArgumentParser):
    """Flags of one command, derived from Config; a mistake is answered in two lines that name the fix."""

    def __init__(self, prog: str, description: str, listing: str, names: Sequence[str]) -> None:
        super().__init__(prog=prog, description=description, epilog=listing, allow_abbrev=False,
                         usage=f"{prog} [flags]",
                         formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120))
        self.add_argument("--config", metavar="FILE", help="TOML file with the same settings; flags win")
        groups: dict[str, Any] = {}
        for name in names:
            spec = config_fields()[name]
            title = spec.metadata["group"]
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            groups[title].add_argument("--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS,
                                       **_options(spec))

    def error(self, message: str) -> NoReturn:
        """Two lines on stderr, exit 2."""
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            message = unknown("argument", flag, [o for action in self._actions for o in action.option_strings])
        self.exit(2, f"{self.prog}: {message}\nsee {self.prog} --help\n")

    def settings(self, arguments: Sequence[str], preset: dict[str, Any]) -> Config:
        """The Config of these arguments: preset, then the resumed run's or TOML's settings, then flags."""
        flags = vars(self.parse_args(arguments))
        toml = flags.pop("config")
        try:
            if flags.get("resume"):
                preset = _resumed(Path(flags.get("out", "")), flags)
            chosen = {**preset, **(_read_toml(Path(toml)) if toml else {}), **flags}
            config = replace(Config(), **chosen)
            _check(config)
        except ValueError as error:
            self.error(str(error))
        return config


def parse(program: str, arguments: Sequence[str], commands: Mapping[str, tuple[str, Sequence[str], dict[str, Any]]],
          default: str) -> tuple[str, Config]:
    """Command and settings of a command line; exits 2 on a mistake and 0 after --help.

    `commands`: name -> (what it does, the settings it has, the defaults that differ for it).
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else default
    if name not in commands:
        print(f"{program}: {unknown('command', name, list(commands))}\nsee {program} --help", file=sys.stderr)
        sys.exit(2)
    text, names, preset = commands[name]
    listing = "commands:\n" + "\n".join(f"  {key:9}{value[0]}" for key, value in commands.items())
    parser = Parser(f"{program} {name}", text, listing, names)
    return name, parser.settings(arguments[1:] if named else arguments, preset)


def unknown(what: str, word: str, known: Sequence[str]) -> str:
    """A sentence that names the word nobody knows and the nearest one somebody does."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"unknown {what} {word}" + (f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known)}"
                                       if len(known) < 12 else "")


def _options(spec: Field[Any]) -> dict[str, Any]:
    """argparse options of one setting, its default shown in the help line."""
    default, choices = spec.default, spec.metadata["choices"]
    shown = ",".join(default) if isinstance(default, tuple) else default
    text = spec.metadata["help"] + (f" [{shown}]" if shown not in ("", False) else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return {**options, "action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {**options, "type": _comma_list, "metavar": "A,B"}
    if choices:
        return {**options, "choices": choices, "metavar": "|".join(choices)}
    return {**options, "type": type(default), "metavar": {int: "N", float: "X", str: "TEXT"}[type(default)]}


def _resumed(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in `folder`; a flag that would change what it computes is refused."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--resume: --out {folder} holds no run with a readable config.json") from None
    saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()
             if key in config_fields()}
    for name, value in flags.items():
        if name not in FREE_ON_RESUME and value != saved.get(name):
            raise ValueError(f"--resume: the run was started with --{name.replace('_', '-')} {saved.get(name)}, "
                             f"not {value}; leave the flag out or start a new run with another --out")
    return saved


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    hints, values = get_type_hints(Config), {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise ValueError(f"--config {path}: " + unknown("key", name, list(hints)))
        default = config_fields()[name].default
        if isinstance(default, tuple) and isinstance(value, (list, str)):
            value = tuple(value) if isinstance(value, list) else _comma_list(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(f"--config {path}: {key} must be {type(default).__name__}, not {type(value).__name__}")
        values[name] = value
    return values


def _check(config: Config) -> None:
    """Raises ValueError with one sentence for a value that cannot work."""
    at_least = {"epochs": 1, "batch_size": 1, "log_every": 1, "eval_every": 0, "save_every": 0, "keep": 1, "workers": 1,
                "lr": 0, "weight_decay": 0, "clip_norm": 0, "max_bad": 0, "max_pixels": 1, "scale": 1e-9,
                "dist_timeout": 1}
    for name, low in at_least.items():
        value = getattr(config, name)
        if not value >= low:  # `not >=` refuses NaN as well
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low:g}, not {value:g}")
    if not 0 <= config.warmup < 1:
        raise ValueError(f"--warmup is a share of all steps between 0 and 1, not {config.warmup:g}")
    for name, spec in config_fields().items():
        allowed = spec.metadata["choices"]
        if allowed and getattr(config, name) not in allowed:
            raise ValueError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, "
                             f"not {getattr(config, name)!r}")
    if not config.trainable:
        raise ValueError("--trainable names nothing; try --trainable projection")


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}

