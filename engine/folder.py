"""The run folder: made once, never mixed with another run, and able to say how it came to be."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data.batch import UserError
from engine.config import Config, as_dict
from engine.dist import World

PACKAGES = ("torch", "transformers", "datasets", "pillow", "aiohttp", "numpy", "tensorboard")


def open_folder(cfg: Config, world: World) -> Path:
    """The run folder, the same on every rank: `--out`, or one named after the time and the dataset.

    Raises UserError when it holds a run already, cannot be made, or holds nothing to resume.
    """
    return world.exchange(_open(cfg) if world.is_main else None)[0]


def _open(cfg: Config) -> Path:
    dataset = re.sub(r"[^\w.-]+", "-", Path(cfg.dataset.rstrip("/")).name) or "pairs"
    folder = Path(cfg.out or f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}-{dataset}").expanduser()
    holds_run = (folder / "config.json").exists()
    if holds_run and not cfg.resume:
        raise UserError(f"--out {folder} already holds a run; choose another folder or carry on with --resume")
    if cfg.resume and not holds_run:
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made: {error.strerror}") from None
    return folder


def begin(folder: Path, cfg: Config, world: World, precision: torch.dtype,
          ledger: Iterable[Mapping[str, Any]]) -> None:
    """Write config.json and ledger.jsonl, from rank 0."""
    if world.is_main:
        write_json(folder / "config.json", _provenance(cfg, world, precision))
        write_ledger(folder / "ledger.jsonl", ledger)


def _provenance(cfg: Config, world: World, precision: torch.dtype) -> dict[str, Any]:
    """The content of config.json: resolved settings, versions, commit, host, devices."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "config": as_dict(cfg),
        "precision": str(precision).removeprefix("torch."),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": _commit(),
        "host": platform.node(),
        "devices": {"kind": device.type, "name": name, "ranks": world.size},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, {} when there is none. Raises UserError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away to start afresh") from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step, so that a reader sees the old or the new one."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_metrics(folder: Path, metrics: Mapping[str, Any], world: World) -> None:
    """metrics.json, from rank 0."""
    if world.is_main:
        write_json(folder / "metrics.json", metrics)


def write_ledger(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """One line for every dropped row."""
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with `+` when its files differ from it."""
    here = Path(__file__).resolve().parent
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
