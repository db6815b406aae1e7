"""The command line: every command's help, settings as TOML and back, and one sentence for every mistake."""

from __future__ import annotations

import json
import random
import re
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.config.cli import COMMANDS, Parser, parse
from engine.config.fields import Config, as_dict, command_settings, config_fields, flag_of
from engine.config.settings import check, read_toml


def options(command: str, capsys: pytest.CaptureFixture[str], flag: str = "--help-all") -> dict[str, str]:
    """The lines of a command's help below a heading, by their first word."""
    with pytest.raises(SystemExit) as exit:
        parse("run.py", [command, flag])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if line.startswith("  ")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_line_for_each_setting_with_the_default_of_this_command(
        command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = options(command, capsys)
    for name in command_settings(command):
        spec = config_fields()[name]
        default = COMMANDS[command].preset.get(name, spec.default)
        flag = "--" + name.replace("_", "-")
        line = shown["query" if name == "query" else f"--[no-]{flag[2:]}" if isinstance(default, bool) else flag]
        assert spec.help in line
        if default not in ("", ()) and not isinstance(default, bool):
            value = ",".join(default) if isinstance(default, tuple) else str(default)
            assert line.endswith(f"[{value}]"), line
    assert set(COMMANDS) < set(shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_plain_help_leaves_out_the_advanced_flags_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A newcomer finds the flags that matter on one screen; none is lost, as --help-all has every one."""
    shown = options(command, capsys, "--help")
    hidden = set(options(command, capsys)) - set(shown)
    advanced = [name for name in command_settings(command) if config_fields()[name].advanced]
    assert len(hidden) == len(advanced) and "--help-all" in shown
    assert {flag.replace("[no-]", "") for flag in hidden} == {flag_of(name) for name in advanced}


def any_value(name: str, rng: random.Random) -> Any:
    """Some value that `check` may or may not like."""
    spec = config_fields()[name]
    text = "".join(rng.choice(string.printable + "é🎬\x7f\u2028\\\"'#=[]") for _ in range(rng.randrange(9)))
    if spec.choices:
        return rng.choice(spec.choices)
    text = text.lstrip("~")  # a home, which has to be there
    return {bool: lambda: rng.random() < 0.5, int: lambda: rng.randrange(1, 10**6), str: lambda: text,
            float: lambda: rng.choice([rng.random(), 10.0 ** rng.randrange(-9, 9), 1.0]),
            tuple: lambda: tuple(text + str(i) for i in range(rng.randrange(1, 4)))}[type(spec.default)]()


def any_settings(command: str, rng: random.Random) -> dict[str, Any]:
    """A value that `check` allows for most settings of a command."""
    values: dict[str, Any] = {}
    for name in command_settings(command):
        tried = {**values, name: any_value(name, rng)}
        with suppress(ValueError):
            check(Config(**{**COMMANDS[command].preset, **tried}))
            values = tried
    return {name: value for name, value in values.items() if name != "resume"}  # which reads the run's own settings


def as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif name != "query":
            flags.append(f"{flag}={','.join(value) if isinstance(value, tuple) else value}")
    return [*flags, *(["--", *values["query"]] if "query" in values else [])]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("seed", range(12))
def test_settings_written_as_toml_read_back_as_they_were(command: str, seed: int, tmp_path: Path) -> None:
    flags = as_flags(any_settings(command, random.Random(f"{command}{seed}")))
    _, meant = parse("run.py", [command, *flags])
    with pytest.raises(SystemExit) as exit:
        parse("run.py", [command, "--write-config", str(tmp_path / "recipe.toml"), *flags])
    assert exit.value.code == 0
    assert parse("run.py", [command, "--config", str(tmp_path / "recipe.toml")]) == (command, meant)
    text = (tmp_path / "recipe.toml").read_text(encoding="utf-8")
    assert all(f"# {config_fields()[name].help}" in text for name in command_settings(command))


def test_a_written_config_never_replaces_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text("lr = 1")
    with pytest.raises(SystemExit) as exit:
        parse("run.py", ["--write-config", str(tmp_path / "recipe.toml")])
    assert exit.value.code == 2 and "choose another name" in capsys.readouterr().err
    assert (tmp_path / "recipe.toml").read_text() == "lr = 1"


CHANGES = [("retry_failed", True, True), ("max_pixels", 9, True), ("variants", True, True), ("workers", 5, True),
           ("proxy", "http://127.0.0.1:3128", True), ("lr", 5.0, False), ("probe", "other", False), ("seed", 1, False)]


@pytest.mark.parametrize("name, value, allowed", CHANGES)
def test_what_may_change_on_resume(name: str, value: Any, allowed: bool, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    """Half the images were refused: the run goes on with other limits, but never with another recipe."""
    (tmp_path / "config.json").write_text(json.dumps({"config": as_dict(Config(epochs=7), "train")}))
    arguments = ["--resume", "--out", str(tmp_path), *as_flags({name: value})]
    if allowed:
        _, cfg = parse("run.py", arguments)
        assert (cfg.epochs, getattr(cfg, name)) == (7, value)
        return
    with pytest.raises(SystemExit) as exit:
        parse("run.py", arguments)
    assert exit.value.code == 2 and f"was started with {flag_of(name)}" in capsys.readouterr().err


def test_a_run_records_the_settings_of_its_command_alone() -> None:
    """config.json is read by people: a training run has no `top` or `strict`, and never a proxy's password."""
    settings = as_dict(Config(proxy="http://me:secret@proxy"), "train")
    assert list(settings) == command_settings("train") and settings["proxy"] == ""
    assert not {"top", "strict", "split", "space"} & set(settings)
    assert "proxy" not in as_dict(Config(proxy="http://me:secret@proxy"), "export")


def test_titles_stand_before_between_and_after_flags() -> None:
    _, cfg = parse("run.py", ["search", "one, two", "--top", "3", "three", "--json", "four"])
    assert cfg.query == ("one, two", "three", "four") and cfg.top == 3 and cfg.json


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["search", "--version"]):
        with pytest.raises(SystemExit) as exit:
            parse("run.py", arguments)
        assert exit.value.code == 0 and re.fullmatch(r"thumbtune \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_flag_of_a_command_is_a_setting() -> None:
    """A command misspelt beside a field would silently take the flag from that command."""
    for name, spec in config_fields().items():
        assert spec.commands and set(spec.commands) <= set(COMMANDS), name
    for command in COMMANDS:
        assert Parser("run.py", command)


def test_recipes_in_the_readme_are_settings(tmp_path: Path) -> None:
    readme = (Path(__file__).resolve().parents[3] / "engine" / "README.md").read_text(encoding="utf-8")
    for recipe in re.findall(r"```toml\n(.*?)```", readme, re.DOTALL):
        (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
        assert parse("run.py", ["--config", str(tmp_path / "recipe.toml")])[0] == "train"


def test_a_recipe_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    """It begins with a byte order mark, which TOML does not allow: "Invalid statement" on a line that looks right."""
    (tmp_path / "recipe.toml").write_text("epochs = 5\r\n", encoding="utf-8-sig", newline="")
    assert read_toml(tmp_path / "recipe.toml") == {"epochs": 5}
