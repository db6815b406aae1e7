"""The settings that `--recipe` names."""

from __future__ import annotations

from engine.config.fields import Config
from engine.config.settings import CHOSEN_BY_AUTO, Settings

RECIPES: dict[str, Settings] = {
    "reference": {},
    # engine/sweep/choose.py chooses these on the pairs. Config's defaults stand here so that the presets of a command
    # (the demo's epochs and rate) do not count as settings that somebody gave.
    "auto": {name: getattr(Config, name) for name in CHOSEN_BY_AUTO},
}
