"""The command line: commands, flags, `--help` and `--help-all`, and one sentence for every mistake."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from data.text import printable, show
from engine.config.fields import Config, Setting, command_settings, config_fields, flag_of
from engine.config.recipes import RECIPES
from engine.config.settings import (
    Settings,
    check,
    check_auto,
    check_paths,
    comma_list,
    group_settings,
    parse_number,
    read_toml,
    resumed_settings,
    suggest,
    to_toml,
)
from engine.console import mute_stdout
from engine.run_folder.crash import say_error

HOME = Path(__file__).resolve().parents[2]
DEMO_MODEL = HOME / "data" / "demo_model"
POSITIONAL = "query"  # the one setting that needs no flag


@dataclass(frozen=True)
class Command:
    """The help line of a command, and the defaults that differ for it."""

    text: str
    preset: Settings = field(default_factory=dict)


COMMANDS = {
    "train": Command("tune a model on pairs; the default"),
    "demo": Command("tune a small model on drawn thumbnails: offline, under two minutes",
                    {"model": str(DEMO_MODEL), "epochs": 10, "batch_size": 64, "lr": 1e-3, "log_every": 50}),
    "sweep": Command("try many settings by cross-validation, retrain the best, measure it once on test"),
    "eval": Command("the metrics of any CLIPModel on one split: a table on stderr, JSON on stdout"),
    "shards": Command("write any dataset as WebDataset tar shards into --out; goes on after a kill"),
    "check": Command("what is wrong with a dataset: dead links, bad images and titles, repeats, leaks between splits"),
    "search": Command("the best thumbnails for a title, or the best titles for a picture", {"split": "all"}),
    "embed": Command("write the embeddings of all images and titles into --out, for faiss, databases, clip-retrieval",
                     {"split": "all"}),
    "export": Command("a run, or its projections alone, as a folder for transformers or open_clip; or push it",
                      {"model": ""}),
    "verify": Command("prove a run: checksums, some steps trained again, the exported model measured again; without "
                      "--run, check the stored features", {"model": "", "dataset": ""}),
}


class Parser(argparse.ArgumentParser):
    """The flags of one command, derived from Config; a mistake is answered in two lines that name the fix."""

    def __init__(self, program: str, command: str, show_all: bool = False) -> None:
        self.command, self.names = COMMANDS[command], command_settings(command)
        prog = f"{program} {command}"
        words = f" [{POSITIONAL} ...]" if POSITIONAL in self.names else ""
        listing = "commands:\n" + "\n".join(f"  {name:9}{each.text}" for name, each in COMMANDS.items())
        super().__init__(prog=prog, description=self.command.text, epilog=listing, allow_abbrev=False,
                         usage=f"{prog}{words} [flags]", formatter_class=OneLineFormatter)
        self.add_argument("--help-all", action="help", help="show all flags, also the rarely needed ones, and exit")
        self.add_argument("--version", action="version", version=f"thumbtune {version()}",
                          help="show the version and exit")
        self.add_argument("--config", metavar="FILE", help="TOML file with the same settings; flags win")
        self.add_argument("--write-config", metavar="FILE",
                          help="write all settings, with these flags applied, as commented TOML to FILE, and exit")
        for group, names in group_settings(self.names).items():
            section = self.add_argument_group(group)
            for name in names:
                spec = config_fields()[name]
                options = _argparse_options(spec, self.command.preset.get(name, spec.default))
                if spec.advanced and not show_all:
                    options["help"] = argparse.SUPPRESS
                if name == POSITIONAL:
                    section.add_argument(name, nargs="*", default=argparse.SUPPRESS, help=options["help"])
                else:
                    section.add_argument(flag_of(name), dest=name, default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        """Print two lines on stderr and exit 2."""
        say_error(f"{self.prog}: {printable(message)}\nsee {self.prog} --help")
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help as everything else is printed: it repeats what was on the command line."""
        try:
            show(message, end="")
        except OSError as error:
            mute_stdout()
            if isinstance(error, BrokenPipeError):  # as by `| head`
                sys.exit(141)
            say_error(f"{self.prog}: the help could not be printed ({error.strerror})")
            sys.exit(1)

    def settings(self, arguments: Sequence[str]) -> Config:
        """Return the Config of these arguments: preset, then the resumed run's or TOML's settings, then flags."""
        self._refuse_repeats(arguments)
        known, rest = self.parse_known_args(arguments)
        try:
            os.getcwd()
        except OSError as error:  # MKL would end the process
            self.error(f"the current folder cannot be used: {error.strerror}; change to another one")
        flags = vars(known)
        given = [*flags]
        for name, value in flags.items():
            if value == [] and name != POSITIONAL:  # argparse takes "--" out, also of --patience=--
                self.error(f"{flag_of(name)} needs a value, and -- is none")
        toml = flags.pop("config")
        written = flags.pop("write_config")
        unknown = [word for word in rest if word.startswith("-") or POSITIONAL not in self.names]
        if unknown:
            self.error(suggest("argument", unknown[0].split("=")[0], [*self._option_string_actions]))
        if words := [*flags.get(POSITIONAL, ()), *rest]:  # argparse leaves words between flags in `rest`
            flags[POSITIONAL] = tuple(words)
        try:
            if toml:
                flags = {**read_toml(Path(toml)), **flags}
            config = self._resolve(flags)
            if config.recipe == "auto":
                check_auto(config, given)
            if written:
                _write_new(Path(written), to_toml(config, self.names))
        except ValueError as error:
            self.error(str(error))
        if written:
            self.exit(0, f"{written} written; use it with {self.prog} --config {written}\n")
        return config

    def _resolve(self, flags: Settings) -> Config:
        """Return the Config in which `flags` win over recipe, resumed run and preset. Raises ValueError."""
        check_paths(flags)
        resumed = resumed_settings(flags)
        recipe = {} if resumed else RECIPES.get(flags.get("recipe", ""), {})
        config = replace(Config(), **{**self.command.preset, **resumed, **recipe, **flags})
        check_paths({name: getattr(config, name) for name in self.names})
        check(config)
        return config

    def _refuse_repeats(self, arguments: Sequence[str]) -> None:
        """Exit 2 for a flag that is given twice, of which argparse would take the last."""
        given: dict[str, str] = {}
        for word in takewhile(lambda word: word != "--", arguments):
            flag = word.split("=")[0]
            action = self._option_string_actions.get(flag)
            if action is None or not flag.startswith("--"):
                continue
            before = given.get(action.dest)
            if before == flag:
                several = ", with its values as A,B" if action.metavar == "A,B" else ""
                self.error(f"{flag} is given twice; give it once{several}")
            if before is not None:
                self.error(f"{before} and {flag} are given together; give one of them")
            given[action.dest] = flag


class OneLineFormatter(argparse.RawDescriptionHelpFormatter):
    """One line a flag, however long; a switch is shown as --[no-]NAME."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=80, width=1000)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def version() -> str:
    """Return the version in setup.cfg: the project runs from its checkout, installed or not."""
    text = (HOME / "setup.cfg").read_text(encoding="utf-8")
    match = re.search(r"^version = (\S+)$", text, re.MULTILINE)
    return match[1] if match else "unknown"


def _write_new(path: Path, text: str) -> None:
    """Write a file. Raises ValueError where one would be overwritten or none can be made."""
    try:
        with path.expanduser().open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"--write-config {path}: it is there already; choose another name") from None
    except OSError as error:
        raise ValueError(f"--write-config {path}: {error.strerror}") from None


def _argparse_options(spec: Setting, default: Any) -> dict[str, Any]:
    """Return the argparse options of one setting, its default shown in the help line."""
    shown = ",".join(default) if isinstance(default, tuple) else str(default)
    if default is False:
        shown = "off"
    text = f"{spec.help} [{shown}]" if shown else spec.help
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if isinstance(default, bool):
        return {**options, "action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {**options, "type": comma_list, "metavar": "A,B"}
    if spec.bare:
        options |= {"nargs": "?", "const": spec.bare}
    if spec.choices:
        return {**options, "choices": spec.choices, "metavar": "|".join(spec.choices)}
    kind = type(default)
    metavar = {int: "N", float: "X", str: "TEXT"}[kind]
    return {**options, "type": parse_number if kind is float else kind, "metavar": metavar}


def parse(program: str, arguments: Sequence[str]) -> tuple[str, Config]:
    """Return command (`train` when none is named) and settings of a command line; exit 2 on a mistake, 0 after help."""
    named = bool(arguments) and not arguments[0].startswith("-")
    command = arguments[0] if named else "train"
    if command not in COMMANDS:
        say_error(f"{program}: {printable(suggest('command', command, list(COMMANDS)))}\nsee {program} --help")
        sys.exit(2)
    parser = Parser(program, command, show_all="--help-all" in arguments)
    return command, parser.settings(arguments[1:] if named else arguments)
