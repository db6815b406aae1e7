"""`run.py export`: what a run has trained, put back on its base model, in a folder or on the hub."""

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

PUSH_SETTINGS = ["push_to_hub", "private", "checkpoint", "model", "dtype", "license"]  # what a later push has to be told


def export_run(cfg: Config, table: Callable[[Mapping[str, Any]], str], tell: Callable[[str], None]) -> None:
    """Write --run to the folder --to, or push it, or both; a finished model that nothing changes is pushed as it is.

    `table` makes the card's table of metrics. Raises UserError, or RunFailed for a push that failed.
    """
    if not cfg.run or not (cfg.to or cfg.push_to_hub):
        raise UserError("export what and where? --run DIR, and --to DIR or --push-to-hub NAME or both")
    if cfg.push_to_hub:
        check_push(cfg.push_to_hub, tell)
    with TemporaryDirectory() as scratch:
        ready = None if cfg.to or cfg.checkpoint or cfg.model or cfg.dtype != "fp32" else finished_model(cfg.run)
        folder = ready or (new_folder(cfg.to) if cfg.to else Path(scratch) / "model")
        if ready is None:
            rebuild(cfg, folder, table)
            tell(f"model {folder}")
        if cfg.push_to_hub:
            push(folder, cfg, cfg.run, PUSH_SETTINGS, tell)


def rebuild(cfg: Config, folder: Path, table: Callable[[Mapping[str, Any]], str]) -> None:
    """Put what --run has trained back on its base model; the whole Hugging Face folder."""
    tuned = read_tuned(cfg.run, cfg.checkpoint)
    clip = load_clip(cfg.model or tuned.origin.base, None if cfg.model else tuned.origin.commit or None)
    restore(clip, tuned)
    metrics = tuned.origin.metrics
    export(clip, folder, tuned, table(metrics) if metrics else "", cfg.license, cfg.dtype)
