"""Recipes: known by name, beaten by flags, and good for any number of pairs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import run as command_line
from engine.config.cli import parse
from engine.config.fields import Config, config_fields
from engine.config.recipes import RECIPES, fit_to_data
from engine.config.settings import check


def test_every_recipe_is_a_choice_and_can_work() -> None:
    assert tuple(RECIPES) == config_fields()["recipe"].choices
    for name, settings in RECIPES.items():
        assert all(config_fields()[key].group == "recipe" for key in settings)
        check(replace(Config(), recipe=name, **settings))


@pytest.mark.parametrize("command", ["train", "demo", "sweep"])
def test_flags_win_over_the_recipe_and_the_recipe_over_presets(command: str, tmp_path: Path) -> None:
    best = RECIPES["best"]
    (tmp_path / "recipe.toml").write_text('recipe = "best"\nscale = 3.0\n')
    for arguments in (["--recipe", "best", "--scale", "3"], ["--config", str(tmp_path / "recipe.toml")]):
        cfg = parse("run.py", [command, *arguments, "--lr", "0.5"])[1]
        assert (cfg.lr, cfg.scale, cfg.epochs, cfg.batch_size) == (0.5, 3.0, best["epochs"], best["batch_size"])
    assert parse("run.py", [command])[1].recipe == "reference"


def test_a_recipes_batch_is_all_pairs_where_there_are_fewer() -> None:
    cfg = replace(Config(), recipe="best", **RECIPES["best"])
    assert fit_to_data(cfg, 53) == replace(cfg, batch_size=53) and fit_to_data(cfg, 1000) == cfg
    asked = replace(cfg, batch_size=64)
    assert fit_to_data(asked, 53) == asked  # what was asked for is refused later, with the fix
    assert fit_to_data(Config(), 5) == Config()


def test_the_best_recipe_runs_on_few_pairs_and_resumes(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--precision", "fp32"]
    assert command_line.main(["--recipe", "best", "--model", str(tiny_model), "--dataset", str(pairs), "--epochs", "2",
                              *flags]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert {**RECIPES["best"], "epochs": 2, "batch_size": 37}.items() <= config.items()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert command_line.main(["--resume", "--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
