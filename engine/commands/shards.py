"""`run.py shards`: any dataset as tar shards."""

from __future__ import annotations

from data.batch import UserError
from data.catalogue import check_bad_share
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from data.shards.pack import pack
from engine.commands.common import divide_source, make_reader, read_rows
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import folder
from engine.run_folder.ownership import open_shards, refuse_foreign_shards


def shards(cfg: Config, world: World, stop: StopSignal) -> int:
    """Any dataset as tar shards: one process, resumable."""
    if not world.is_main:
        return 0
    if not cfg.out:
        raise UserError("shards needs a folder to write to: --out DIR")
    refuse_foreign_shards(cfg.out, cfg.dataset)
    rows, lost = read_rows(cfg, world.say)
    look, out = make_reader(cfg, ImageSpec.clip()), open_shards(cfg.out)
    rows = divide_source(cfg, world, rows, look)
    ledger = lost + pack(rows, look, out, cfg.resize, world.say)
    folder.write_ledger(out / "ledger.jsonl", ledger)
    check_bad_share(sum(map(len, rows.values())) + dropped_rows(lost), ledger, cfg.max_bad)
    return 0
