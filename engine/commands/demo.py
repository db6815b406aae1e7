"""`run.py demo`: draw thumbnails and titles, then tune the small model that ships with the project on them."""

from __future__ import annotations

from dataclasses import replace

from data.batch import UserError
from data.demo.demo import write_demo
from data.files import first_foreign, is_whole, replaced_folder
from engine.commands.common import cache_folder, mark_cache
from engine.commands.train import train
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World


def demo(cfg: Config, world: World, stop: StopSignal) -> int:
    """Draw the dataset once, then train on it; the preset of `demo` names the model."""
    folder = cache_folder(cfg) / "demo"
    if world.is_main and not is_whole(folder, "demo"):
        if obstacle := first_foreign(folder):
            raise UserError(f"--cache-dir {cfg.cache_dir}: {obstacle} was not made by thumbtune; move it away or "
                            "choose another folder")
        mark_cache(cfg)
        world.say(f"drawing thumbnails into {folder}")
        with replaced_folder(folder, "demo", durable=False) as new:
            write_demo(new)
    world.barrier()
    return train(replace(cfg, dataset=str(folder)), world, stop)
