"""`run.py shards`: any dataset as tar shards."""

from __future__ import annotations

from pathlib import Path

from data.batch import UserError
from data.catalogue import refuse_if_too_bad
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from data.shards.pack import pack
from engine.commands.common import divided, read_rows, reader
from engine.config.fields import Config
from engine.ranks.signals import Stop
from engine.ranks.world import World
from engine.run_folder import folder


def shards(cfg: Config, world: World, stop: Stop) -> int:
    """Any dataset as tar shards: one process, resumable."""
    if not world.is_main:
        return 0
    if not cfg.out:
        raise UserError("shards needs a folder to write to: --out DIR")
    (rows, lost), out = read_rows(cfg, world.say), Path(cfg.out).expanduser()
    look = reader(cfg, ImageSpec.clip())
    rows = divided(cfg, world, rows, look)
    ledger = lost + pack(rows, look, out, cfg.resize, world.say)
    folder.write_ledger(out / "ledger.jsonl", ledger)
    refuse_if_too_bad(sum(map(len, rows.values())) + dropped_rows(lost), ledger, cfg.max_bad)
    return 0
