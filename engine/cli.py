"""The command line: which command has which settings, `--help`, and one helpful sentence for every mistake."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import Field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine.config import Config, check, comma_list, config_fields, read_toml, unknown

DEMO_MODEL = Path(__file__).resolve().parents[1] / "data" / "demo_model"
COLUMNS = ["dataset", "image_column", "title_column", "negative_column"]
READING = ["allow_host", "retry_failed", "variants", "max_bad", "max_pixels", "workers", "cache_dir"]
MACHINE = ["device", "precision", "dist_timeout"]
TRAIN = [name for name in config_fields() if name not in ("split", "resize", "strict", "json", "run", "prune")]


class Command(NamedTuple):
    """What a command does, the settings it has, and the defaults that differ for it."""

    text: str
    names: Sequence[str]
    preset: dict[str, Any]


COMMANDS = {
    "train": Command("tune a model on pairs; the default", TRAIN, {}),
    "demo": Command("tune a small model on drawn thumbnails: offline, under two minutes",
                    [name for name in TRAIN if name not in [*COLUMNS, *READING, "model"] or name in MACHINE
                     or name in ("workers", "cache_dir")],
                    {"model": str(DEMO_MODEL), "epochs": 10, "batch_size": 64, "lr": 1e-3, "log_every": 50}),
    "eval": Command("the metrics of any CLIPModel on one split: a table on stderr, JSON on stdout",
                    ["model", "split", "out", *COLUMNS, *READING, *MACHINE], {}),
    "shards": Command("write any dataset as WebDataset tar shards into --out; goes on after a kill",
                      ["out", "resize", *COLUMNS, *READING], {}),
    "check": Command("what is wrong with a dataset: dead links, bad images and titles, repeats, leaks between splits",
                     [*COLUMNS, *(name for name in READING if name != "max_bad"), "seed", "strict", "json"], {}),
    "verify": Command("prove a run: checksums, some steps trained again, the exported model measured again; without "
                      "--run, check the stored features",
                      ["run", "prune", "model", "dataset", "cache_dir", "allow_host", "max_pixels", "workers",
                       *MACHINE], {"model": "", "dataset": ""}),
}


# What may differ between a run and its resumption: it changes where and how fast, not what is computed.
FREE_ON_RESUME = {"out", "resume", "cache_dir", "log_every", "eval_every", "save_every", "keep", "device", "workers",
                  "profile", "dist_timeout", "allow_host", "max_bad", "dataset", "model", "patience"}


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
            flags = {**(read_toml(Path(toml)) if toml else {}), **flags}
            config = replace(Config(), **{**preset, **_resumed(flags), **flags})
            check(config)
        except ValueError as error:
            self.error(str(error))
        return config


def _options(spec: Field[Any]) -> dict[str, Any]:
    """argparse options of one setting, its default shown in the help line."""
    default, choices = spec.default, spec.metadata["choices"]
    shown = ",".join(default) if isinstance(default, tuple) else default
    text = spec.metadata["help"] + (f" [{shown}]" if shown not in ("", False) else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return {**options, "action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {**options, "type": comma_list, "metavar": "A,B"}
    if spec.metadata["bare"]:
        options |= {"nargs": "?", "const": spec.metadata["bare"]}
    if choices:
        return {**options, "choices": choices, "metavar": "|".join(choices)}
    return {**options, "type": type(default), "metavar": {int: "N", float: "X", str: "TEXT"}[type(default)]}


def _resumed(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that is to be resumed, {} if none is; a flag that would change its result is refused."""
    wanted, folder = flags.get("resume", "off"), Path(flags.get("out", "")).expanduser()
    if wanted == "auto" and not flags.get("out"):
        raise ValueError("--resume auto needs the folder to go on in: --out DIR")
    if wanted == "off" or (wanted == "auto" and not (folder / "config.json").exists()):
        return {}
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


def parse(program: str, arguments: Sequence[str]) -> tuple[str, Config]:
    """Command (`train` when none is named) and settings of a command line; exits 2 on a mistake, 0 after --help."""
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else "train"
    if name not in COMMANDS:
        print(f"{program}: {unknown('command', name, list(COMMANDS))}\nsee {program} --help", file=sys.stderr)
        sys.exit(2)
    text, names, preset = COMMANDS[name]
    listing = "commands:\n" + "\n".join(f"  {key:9}{value.text}" for key, value in COMMANDS.items())
    parser = Parser(f"{program} {name}", text, listing, names)
    return name, parser.settings(arguments[1:] if named else arguments, preset)


