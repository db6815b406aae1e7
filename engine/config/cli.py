"""The command line: which command has which settings, `--help`, and one helpful sentence for every mistake."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from data.files import read_text
from engine.config.fields import Config, config_fields
from engine.config.recipes import RECIPES
from engine.config.settings import check, comma_list, group_settings, parse_number, read_toml, suggest, to_toml

HOME = Path(__file__).resolve().parents[2]
DEMO_MODEL = HOME / "data" / "demo_model"
COLUMNS = ["dataset", "image_column", "title_column", "negative_column"]
READING = ["allow_host", "proxy", "retry_failed", "variants", "max_bad", "max_pixels", "workers", "cache_dir"]
MACHINE = ["device", "precision", "compile", "dist_timeout", "quiet"]
SEARCH = ["query", "queries", "image", "top", "html"]
EXPORT = ["run", "to", "checkpoint", "dtype"]
PUSH = ["push_to_hub", "private", "license"]
SWEEP = ["space", "trials", "folds", "seeds"]
TRAIN = [name for name in config_fields()
         if name not in ["split", "resize", "strict", "json", "prune", *SEARCH, *EXPORT, *SWEEP]]
ONE_RUN = ["eval_every", "eval_splits", "save_every", "keep", "profile", "probe", "augment",
           "gradient_checkpointing"]  # what only a single run of training has
POSITIONAL = "query"  # the one setting that needs no flag


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
    "sweep": Command("try many settings by cross-validation, retrain the best, measure it once on test",
                     [*SWEEP, *(name for name in TRAIN if name not in ONE_RUN)], {}),
    "eval": Command("the metrics of any CLIPModel on one split: a table on stderr, JSON on stdout",
                    ["model", "split", "out", *COLUMNS, *READING, *MACHINE], {}),
    "shards": Command("write any dataset as WebDataset tar shards into --out; goes on after a kill",
                      ["out", "resize", *COLUMNS, *READING, "quiet"], {}),
    "check": Command("what is wrong with a dataset: dead links, bad images and titles, repeats, leaks between splits",
                     [*COLUMNS, *(name for name in READING if name != "max_bad"), "seed", "strict", "json",
                      "quiet"], {}),
    "search": Command("the best thumbnails for a title, or the best titles for a picture",
                      ["model", *SEARCH, "json", "split", *COLUMNS, *(name for name in READING if name != "max_bad"),
                       "seed", *MACHINE], {"split": "all"}),
    "export": Command("a run, or its projections alone, as a Hugging Face folder; or push it to the hub",
                      ["model", *EXPORT, *PUSH], {"model": ""}),
    "verify": Command("prove a run: checksums, some steps trained again, the exported model measured again; without "
                      "--run, check the stored features",
                      ["run", "prune", "model", "dataset", "cache_dir", "allow_host", "proxy", "max_pixels", "workers",
                       *MACHINE], {"model": "", "dataset": ""}),
}


# What may differ between a run and its resumption: it changes where and how fast, not what is computed.
FREE_ON_RESUME = {"out", "resume", "cache_dir", "log_every", "eval_every", "save_every", "keep", "device", "workers",
                  "profile", "compile", "cuda_graph", "gradient_checkpointing", "dist_timeout", "quiet", "allow_host",
                  "proxy", "max_bad", "dataset", "model", "patience", "space", "trials", *PUSH}


class Parser(argparse.ArgumentParser):
    """Flags of one command, derived from Config; a mistake is answered in two lines that name the fix."""

    def __init__(self, prog: str, listing: str, command: Command) -> None:
        takes = f" [{POSITIONAL} ...]" if POSITIONAL in command.names else ""
        super().__init__(prog=prog, description=command.text, epilog=listing, allow_abbrev=False,
                         usage=f"{prog}{takes} [flags]", formatter_class=Lines)
        self.command = command
        self.add_argument("--version", action="version", version=f"thumbtune {version()}",
                          help="show the version and exit")
        self.add_argument("--config", metavar="FILE", help="TOML file with the same settings; flags win")
        self.add_argument("--write-config", metavar="FILE",
                          help="write all settings, with these flags applied, as commented TOML to FILE, and exit")
        for group, names in group_settings(command.names).items():
            shelf: Any = self.add_argument_group(group)
            for name in names:
                spec = config_fields()[name]
                if name == POSITIONAL:
                    shelf.add_argument(name, nargs="*", default=argparse.SUPPRESS, help=spec.metadata["help"])
                else:
                    shelf.add_argument("--" + name.replace("_", "-"), dest=name, default=argparse.SUPPRESS,
                                       **_options(spec, command.preset.get(name, spec.default)))

    def error(self, message: str) -> NoReturn:
        """Two lines on stderr, exit 2."""
        self.exit(2, f"{self.prog}: {message}\nsee {self.prog} --help\n")

    def settings(self, arguments: Sequence[str]) -> Config:
        """The Config of these arguments: preset, then the resumed run's or TOML's settings, then flags."""
        self._refuse_repeats(arguments)
        known, rest = self.parse_known_args(arguments)
        flags, preset = vars(known), self.command.preset
        toml, written = flags.pop("config"), flags.pop("write_config")
        odd = [word for word in rest if word.startswith("-") or POSITIONAL not in self.command.names]
        if odd:
            self.error(suggest("argument", odd[0].split("=")[0], [*self._option_string_actions]))
        if words := [*flags.get(POSITIONAL, ()), *rest]:  # what stands between flags is in the rest
            flags[POSITIONAL] = tuple(words)
        try:
            flags = {**(read_toml(Path(toml)) if toml else {}), **flags}
            _check_paths(flags)
            resumed = _resumed(flags)
            recipe = {} if resumed else RECIPES.get(flags.get("recipe", ""), {})
            config = replace(Config(), **{**preset, **resumed, **recipe, **flags})
            _check_paths({name: getattr(config, name) for name in self.command.names})
            check(config)
            if written:
                _write_new(Path(written), to_toml(config, self.command.names))
        except ValueError as error:
            self.error(str(error))
        if written:
            self.exit(0, f"{written} written; use it with {self.prog} --config {written}\n")
        return config


    def _refuse_repeats(self, arguments: Sequence[str]) -> None:
        """One line and exit 2 for a flag that is given twice, of which argparse would take the last."""
        given: dict[str, str] = {}
        for word in takewhile(lambda word: word != "--", arguments):
            flag = word.split("=")[0]
            action = self._option_string_actions.get(flag)
            if action is None or not flag.startswith("--"):
                continue
            if action.dest in given:
                several = ", with its values as A,B" if action.metavar == "A,B" else ""
                before = given[action.dest]
                self.error(f"{flag} is given twice; give it once{several}" if flag == before else
                           f"{before} and {flag} are given together; give one of them")
            given[action.dest] = flag


class Lines(argparse.RawDescriptionHelpFormatter):
    """One line a flag, however long; a switch shows its other end without a second name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=80, width=1000)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def _check_paths(settings: dict[str, Any]) -> None:
    """Raises ValueError for a text that no file name can hold, and for ~ or ~NAME where there is no such home."""
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if not isinstance(value, str):
            continue
        if "\0" in value:
            raise ValueError(f"{flag} {value!r} holds a NUL character; leave it out")
        if name == "out" and any("\ud800" <= letter <= "\udfff" for letter in value):  # TensorBoard writes none such
            raise ValueError(f"{flag} {value} is no text here; choose another name, or a locale with UTF-8, such as "
                             "LC_ALL=C.UTF-8")
        if value.startswith("~") and os.path.expanduser(value).startswith("~"):
            home = Path(value).parts[0]
            fault = "there is no home folder here (HOME is not set)" if home == "~" else f"{home} is nobody's home"
            raise ValueError(f"{flag} {value}: {fault}; write the path in full")


def version() -> str:
    """The version in setup.cfg: the project runs from its checkout, installed or not."""
    found = re.search(r"^version = (\S+)$", (HOME / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def _write_new(path: Path, text: str) -> None:
    """Raises ValueError where a file would be overwritten or cannot be made."""
    try:
        with path.expanduser().open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"--write-config {path}: it is there already; choose another name") from None
    except OSError as error:
        raise ValueError(f"--write-config {path}: {error.strerror}") from None


def _options(spec: Field[Any], default: Any) -> dict[str, Any]:
    """argparse options of one setting, its default shown in the help line."""
    choices = spec.metadata["choices"]
    shown = ",".join(default) if isinstance(default, tuple) else "off" if default is False else default
    text = spec.metadata["help"] + (f" [{shown}]" if shown != "" else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return {**options, "action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {**options, "type": comma_list, "metavar": "A,B"}
    if spec.metadata["bare"]:
        options |= {"nargs": "?", "const": spec.metadata["bare"]}
    if choices:
        return {**options, "choices": choices, "metavar": "|".join(choices)}
    return {**options, "type": parse_number if type(default) is float else type(default),
            "metavar": {int: "N", float: "X", str: "TEXT"}[type(default)]}


def _resumed(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that is to be resumed, {} if none is; a flag that would change its result is refused."""
    wanted, folder = flags.get("resume", "off"), Path(flags.get("out", "")).expanduser()
    if wanted == "auto" and not flags.get("out"):
        raise ValueError("--resume auto needs the folder to go on in: --out DIR")
    if wanted == "off" or (wanted == "auto" and not (folder / "config.json").exists()):
        return {}
    try:
        saved = json.loads(read_text(folder / "config.json"))["config"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
        print(f"{program}: {suggest('command', name, list(COMMANDS))}\nsee {program} --help", file=sys.stderr)
        sys.exit(2)
    listing = "commands:\n" + "\n".join(f"  {key:9}{value.text}" for key, value in COMMANDS.items())
    parser = Parser(f"{program} {name}", listing, COMMANDS[name])
    return name, parser.settings(arguments[1:] if named else arguments)


