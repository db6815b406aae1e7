"""The settings that `--recipe` names."""

from __future__ import annotations

from engine.config.fields import Config
from engine.config.settings import CHOSEN_BY_AUTO, Settings

RECIPES: dict[str, Settings] = {
    "reference": {},
    # Chosen on the pairs themselves; what a command presets does not apply. See engine/sweep/choose.py.
    "auto": {name: getattr(Config, name) for name in CHOSEN_BY_AUTO},
}
