"""`run.py shards`: write any dataset as tar shards."""

from __future__ import annotations

from pathlib import Path

from data.batch import UserError
from data.catalogue import check_bad_share
from data.images.decode import ImageSpec
from data.ledger import dropped_rows
from data.shards.pack import links_out, pack
from engine.commands.common import divide_source, make_reader, read_rows
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import folder
from engine.run_folder.ownership import open_shards, refuse_foreign_shards


def shards(cfg: Config, world: World, stop: StopSignal) -> int:
    """Write the dataset as tar shards into --out; shards that are there already are kept. One process does it."""
    if not world.is_main:
        return 0
    if not cfg.out:
        raise UserError("shards needs a folder to write to: --out DIR")
    if len(cfg.template) > 1:
        raise UserError("shards keep titles, not which of them are of one class, so that the titles of several "
                        "--template would be negatives of each other; leave it out here and give it to train")
    refuse_foreign_shards(cfg.out, cfg.dataset)
    source = read_rows(cfg, world.say)
    reader = make_reader(cfg, ImageSpec.clip())
    out = open_shards(cfg.out)
    rows = divide_source(cfg, world, source.rows, reader)
    outside = links_out(rows, Path(cfg.dataset)) if Path(cfg.dataset).is_dir() else []
    if outside:
        world.say(f"{len(outside):,} images or texts are packed that lie outside {cfg.dataset}, behind links such as "
                  f"{outside[0]}; look at them before the shards leave this machine")
    ledger = source.unreadable + pack(rows, reader, out, cfg.resize, world.say)
    folder.write_ledger(out / "ledger.jsonl", ledger)
    row_count = sum(len(split) for split in rows.values()) + dropped_rows(source.unreadable)
    check_bad_share(row_count, ledger, cfg.max_bad)
    return 0
