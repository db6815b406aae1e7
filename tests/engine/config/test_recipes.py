"""Recipes: known by name; `auto` is never given anything that it would ignore."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config.cli import parse
from engine.config.fields import Config, config_fields
from engine.config.recipes import RECIPES
from engine.config.settings import CHOSEN_BY_AUTO, UNUSED_BY_AUTO, check


def test_every_recipe_is_a_choice_and_can_work() -> None:
    assert tuple(RECIPES) == config_fields()["recipe"].choices
    for name, settings in RECIPES.items():
        assert all(config_fields()[key].group == "recipe" for key in settings)
        check(replace(Config(), recipe=name, **settings))


@pytest.mark.parametrize("command", ["train", "demo"])
def test_auto_replaces_what_a_command_presets(command: str) -> None:
    cfg = parse("run.py", [command, "--recipe", "auto", "--seed", "7"])[1]
    assert all(getattr(cfg, name) == getattr(Config, name) for name in CHOSEN_BY_AUTO) and cfg.seed == 7
    assert parse("run.py", [command])[1].recipe == "reference"


@pytest.mark.parametrize(("flags", "answer"), [
    (["--lr", "1e-4"], "--lr is chosen by --recipe auto"),  # the default, but named: it would be ignored
    (["--epochs", "7"], "--epochs is chosen"), (["--interpolate", "auto"], "--interpolate is chosen"),
    (["--augment"], "--augment has no meaning"), (["--trainable", "all"], "--trainable has no meaning"),
    (["--patience", "3"], "--patience has no meaning"), (["--mode", "streaming"], "--mode streaming runs the towers"),
])
def test_a_flag_that_auto_would_ignore_is_refused(flags: list[str], answer: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """People would believe that their learning rate was used."""
    with pytest.raises(SystemExit) as end:
        parse("run.py", ["--recipe", "auto", *flags])
    assert end.value.code == 2 and answer in capsys.readouterr().err


def test_a_file_of_settings_for_auto_is_held_to_the_same(tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "recipe.toml"
    toml.write_text('recipe = "auto"\nscale = 3.0\n')
    with pytest.raises(SystemExit):
        parse("run.py", ["--config", str(toml)])
    assert "--scale is chosen" in capsys.readouterr().err
    toml.write_text('recipe = "auto"\nlr = 0.0001\n')  # --write-config writes all settings, with their defaults
    assert parse("run.py", ["--config", str(toml)])[1].recipe == "auto"


def test_what_auto_leaves_alone_goes_with_it() -> None:
    free = [name for name, spec in config_fields().items() if spec.group == "recipe"]
    free = [name for name in free if name not in (*CHOSEN_BY_AUTO, *UNUSED_BY_AUTO)]
    assert free == ["mode", "duplicates", "seed", "recipe"]
