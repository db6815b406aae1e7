"""`run.py check`: look at all images and titles before any GPU time."""

from __future__ import annotations

import json

from data.check.checks import check as look_over
from data.check.findings import as_json, table
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from engine.commands.common import divide_source, make_reader, read_rows
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World


def check(cfg: Config, world: World, stop: StopSignal) -> int:
    """A look at all images and titles before any GPU time: one process."""
    if not world.is_main:
        return 0
    (rows, lost), look = read_rows(cfg, world.say), make_reader(cfg, ImageSpec.clip())
    rows = divide_source(cfg, world, rows, look)
    findings, usable = look_over(rows, look, world.say, lost)
    counts = {name: len(split) for name, split in rows.items()}
    print(json.dumps(as_json(findings, counts, usable), indent=2) if cfg.json
          else table(findings, counts, usable, dropped_rows(lost)))
    return int(cfg.strict and any(finding.severity == "error" for finding in findings))
