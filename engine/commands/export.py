"""`run.py export`: write a run as a Hugging Face folder, or push it to the hub."""

from __future__ import annotations

from engine.config.fields import Config
from engine.publish.run_export import export_run
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from eval.report.table import metrics_table


def export(cfg: Config, world: World, stop: StopSignal) -> int:
    """Write a run, or its projections alone, as a Hugging Face folder, or push it to the hub. One process does it."""
    if world.is_main:
        export_run(cfg, metrics_table, world.say)
    return 0
