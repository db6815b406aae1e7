"""Export the trained tensors of a run, in its base model, to a folder or to the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.batch import UserError
from engine.clip.loading import load_clip
from engine.config.fields import Config
from engine.publish.export import export, finished_model, new_folder, read_tuned, restore
from engine.publish.hub import check_push, push

# Settings that the command of a later push repeats.
PUSH_SETTINGS = ["push_to_hub", "private", "checkpoint", "model", "dtype", "license"]


def export_run(cfg: Config, table: Callable[[Mapping[str, Any]], str], log: Callable[[str], None]) -> None:
    """Write --run to the folder --to, push it, or both; a finished model that no setting changes is pushed as it is.

    `table` formats metrics for the model card. Raises UserError, or RunFailed for a push that failed.
    """
    if not cfg.run or not (cfg.to or cfg.push_to_hub):
        raise UserError("export what and where? --run DIR, and --to DIR or --push-to-hub NAME or both")
    if cfg.push_to_hub:
        check_push(cfg.push_to_hub, log)
    with TemporaryDirectory() as scratch:
        unchanged = not (cfg.to or cfg.checkpoint or cfg.model or cfg.dtype != "fp32")
        folder = finished_model(cfg.run) if unchanged else None
        if folder is None:
            folder = new_folder(cfg.to) if cfg.to else Path(scratch) / "model"
            rebuild(cfg, folder, table)
            log(f"model {folder}")
        if cfg.push_to_hub:
            push(folder, cfg, cfg.run, PUSH_SETTINGS, log)


def rebuild(cfg: Config, folder: Path, table: Callable[[Mapping[str, Any]], str]) -> None:
    """Write a whole Hugging Face folder: the base model with the trained tensors of --run."""
    tuned = read_tuned(cfg.run, cfg.checkpoint)
    clip = load_clip(cfg.model or tuned.origin.base, None if cfg.model else tuned.origin.commit or None)
    restore(clip, tuned)
    metrics = tuned.origin.metrics
    export(clip, folder, tuned, table(metrics) if metrics else "", cfg.license, cfg.dtype)
