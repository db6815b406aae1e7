"""`run.py export`: a run as a Hugging Face folder, or pushed to the hub."""

from __future__ import annotations

from engine.config.fields import Config
from engine.publish.handing import hand_on
from engine.ranks.signals import Stop
from engine.ranks.world import World
from eval.report.report import table


def export(cfg: Config, world: World, stop: Stop) -> int:
    """A run, or its projections alone, as a Hugging Face folder, and to the hub: one process."""
    if world.is_main:
        hand_on(cfg, table, world.say)
    return 0
