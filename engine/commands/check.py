"""`run.py check`: examine all images and titles before any GPU time."""

from __future__ import annotations

import json

from data.check.checks import check as find_problems
from data.check.findings import as_json, table
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from engine.commands.common import divide_source, make_reader, read_rows
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World


def check(cfg: Config, world: World, stop: StopSignal) -> int:
    """Print the problems of a dataset; the exit code is 1 for errors with --strict. One process does it."""
    if not world.is_main:
        return 0
    source = read_rows(cfg, world.say)
    reader, rows, unreadable = make_reader(cfg, ImageSpec.clip()), source.rows, source.unreadable
    del source  # an undivided split is freed when it is divided
    rows = divide_source(cfg, world, rows, reader)
    findings, usable = find_problems(rows, reader, world.say, unreadable)
    counts = {name: len(split) for name, split in rows.items()}
    if cfg.json:
        world.show(json.dumps(as_json(findings, counts, usable), indent=2))
    else:
        world.show(table(findings, counts, usable, dropped_rows(unreadable)))
    has_errors = any(finding.severity == "error" for finding in findings)
    return int(cfg.strict and has_errors)
