"""`run.py export`: write a run as a Hugging Face folder, or push it to the hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from data.batch import UserError
from engine.clip.loading import load_clip
from engine.commands.common import model_records
from engine.config.fields import Config
from engine.publish import export as publish
from engine.publish import open_clip
from engine.publish.hub import check_push, push
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from eval.report.table import metrics_table

# Settings that the command of a later push repeats.
PUSH_SETTINGS = ["push_to_hub", "private", "checkpoint", "model", "dtype", "license"]


def export(cfg: Config, world: World, stop: StopSignal) -> int:
    """Write --run to the folder --to, push it, or both. One process does it.

    A finished model that no setting changes is pushed as it is. Raises UserError, or RunFailed for a push that failed.
    """
    if not world.is_main:
        return 0
    if not cfg.run or not (cfg.to or cfg.push_to_hub):
        raise UserError("export what and where? --run DIR, and --to DIR or --push-to-hub NAME or both")
    if cfg.push_to_hub and cfg.format != "transformers":
        raise UserError(f"--push-to-hub pushes a folder of transformers, not of {cfg.format}; write it with --to and "
                        "push it with `hf upload`")
    if cfg.push_to_hub:
        check_push(cfg.push_to_hub, world.say)
    with TemporaryDirectory() as scratch:
        # A push without settings takes the files of the run as they are: their digests stay those of its manifest.
        unchanged = not (cfg.to or cfg.checkpoint or cfg.model or cfg.dtype != "fp32")
        folder = publish.finished_model(cfg.run) if unchanged else None
        if folder is None:
            folder = publish.new_folder(cfg.to) if cfg.to else Path(scratch) / "model"
            rebuild(cfg, world, folder)
            world.say(f"model {folder}")
        if cfg.push_to_hub:
            push(folder, cfg, cfg.run, PUSH_SETTINGS, world.say)
    return 0


def rebuild(cfg: Config, world: World, folder: Path) -> None:
    """Write a whole folder of transformers or open_clip: the base model with the trained tensors of --run."""
    tuned = publish.read_tuned(cfg.run, cfg.checkpoint, world.say)
    commit = None if cfg.model else tuned.origin.commit or None  # of another --model it would name nothing
    clip = load_clip(cfg.model or tuned.origin.base, commit, model_records(cfg, world))
    publish.require_base(clip, tuned)
    try:
        table = metrics_table(tuned.origin.metrics) if tuned.origin.metrics else ""
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"--run {cfg.run}: its metrics are not those of a run ({type(error).__name__})") from error
    if cfg.format == "open_clip":
        open_clip.export(clip, folder, tuned, table, cfg, world.say)
        return
    publish.export(clip, folder, tuned, table, cfg.license, cfg.dtype)
