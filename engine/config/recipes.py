"""The settings that `--recipe` names, as far as they differ from the reference's."""

from __future__ import annotations

from dataclasses import replace

from engine.config.fields import Config
from engine.config.settings import Settings

RECIPES: dict[str, Settings] = {
    "reference": {},
    # Chosen by grouped cross-validation on 100 to 1,000 pairs of two data sets; see the README.
    "best": {"epochs": 40, "batch_size": 128, "lr": 3e-3, "loss": "symmetric", "scale": 10.0, "l2_sp": 0.01},
}


def fit_to_data(config: Config, rows: int) -> Config:
    """The settings for so many training pairs: where a recipe's own batch is larger, all pairs are one batch."""
    whole = config.batch_size > rows and config.batch_size == RECIPES[config.recipe].get("batch_size")
    return replace(config, batch_size=rows) if whole else config
