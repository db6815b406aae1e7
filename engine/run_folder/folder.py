"""The run folder: opened by one run at a time, with its settings, versions, dropped rows and manifest in JSON files."""

from __future__ import annotations

import datetime
import errno
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from data.batch import AgreedError, UserError
from data.files import changed_files, recover_folders, replace_text, sha256
from data.locks import lock_folder
from data.reading import parse_json, read_text
from data.text import hide_secrets, json_text, public_arguments
from engine.config.fields import Config
from engine.config.settings import known_settings
from engine.ranks.world import World
from engine.run_folder.crash import CURRENT_RUN
from engine.run_folder.ownership import RUN_FILES, is_run, refuse_foreign_parts, refuse_out
from engine.run_folder.repair import remove_unfinished, require_folder, set_aside_obstacles

RUN_MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "datasets", "pillow", "aiohttp", "numpy", "tensorboard")


def open_folder(cfg: Config, world: World) -> tuple[Path, bool]:
    """Return the run folder, the same on every rank, and whether it holds a run to resume.

    It is `--out`, or a new one named after the time and the dataset; after a restart by torchrun, the one used before.
    Raises UserError when it holds a run already or another program's files that a run would replace, cannot be made,
    is in use, or holds nothing to resume.
    """
    # Rank 0 opens it, and its error reaches all ranks: one that raised alone would leave the others waiting.
    problem, opened = "", None
    if world.is_main:
        try:
            opened = _open(cfg, world.warn)
        except UserError as error:
            problem = str(error)
    problem, opened = world.exchange((problem, opened))[0]
    if problem or opened is None:
        raise AgreedError(problem)
    CURRENT_RUN.folder = opened[0]
    return opened


def _open(cfg: Config, log: Callable[[str], None]) -> tuple[Path, bool]:
    dataset = re.sub(r"[^\w.-]+", "-", Path(cfg.dataset.rstrip("/")).name) or "pairs"
    named = [Path(cfg.out).expanduser()] if cfg.out else []
    restarted = _folder_before_restart(named or sorted(Path("runs").glob("*"), reverse=True))
    new_name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{dataset}"
    folder = restarted or (named[0] if named else Path("runs", new_name))
    holds_run = bool(restarted or named) and is_run(folder)
    if holds_run and cfg.resume == "off" and not restarted:
        raise UserError(f"--out {folder} already holds a run; choose another folder or carry on with --resume")
    if named and not holds_run and os.path.lexists(folder / "checkpoints"):
        raise UserError(f"--out {folder} holds checkpoints and no config.json that can be read, and a run cannot go on "
                        "without its settings; put a copy of that file back, or choose another folder")
    if cfg.resume == "on" and not holds_run:
        raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
    if named and not holds_run:
        refuse_out(folder, RUN_FILES, cfg.dataset)
    try:
        if restarted or named:
            CURRENT_RUN.make(folder, holds_run)
        else:
            folder = _make_new_folder(folder.name)
        locked = lock_folder(folder)
    except OSError as error:
        raise UserError(f"--out {error.filename or folder} cannot be made: {error.strerror}") from None
    if not locked:
        raise UserError(f"--out {folder} is being written by another run; wait for its end or choose another folder")
    # Only now, under the lock: before it these might be files that another process is writing.
    recover_folders(folder, locked=True)
    remove_unfinished(folder)
    if holds_run:
        refuse_foreign_parts(folder)
        require_folder(folder / "checkpoints")
        set_aside_obstacles(folder, log)
    return folder, holds_run


def _make_new_folder(name: str) -> Path:
    """Make a folder in runs/ that no other run has, also not one that starts in the same second. Raises OSError."""
    folder = Path("runs", name)
    for number in count(2):
        with suppress(FileExistsError):
            CURRENT_RUN.make(folder, holds_run=False, is_new=True)
            break
        folder = Path("runs", f"{name}-{number}")
    return folder


def _folder_before_restart(folders: Iterable[Path]) -> Path | None:
    """Return the folder that this launch of torchrun used before it restarted its ranks; None if it did not restart.

    TORCHELASTIC_RESTART_COUNT is no help: it counts per node, and stays 0 where the lost rank was on another node.
    """
    for folder in folders:
        with suppress(OSError, ValueError, AttributeError):  # no run there, or a damaged config.json
            launch = parse_json(read_text(folder / "config.json")).get("launch")
            if launch and launch == _launch_id():
                return folder
    return None


def _launch_id() -> str | None:
    """Return an id of the launch by torchrun, the same after it restarts its ranks; None without torchrun.

    Two containers may have the same host name, and torchrun the same process id in both: the time at which it was
    started, and the namespace that its process id is of, tell them apart.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if not run_id:
        return None
    started = namespace = ""
    with suppress(OSError, IndexError):  # no /proc
        fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        started = fields[19]  # clock ticks since the machine was started
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{run_id} {platform.node()} {os.getppid()} {started} {namespace}".rstrip()


def settings_of(folder: Path) -> Config:
    """Return the Config that the run in `folder` was started with. Raises UserError when there is none."""
    saved = read_json(folder / "config.json").get("config")
    if not isinstance(saved, dict):
        raise UserError(f"--run {folder} holds no run with a readable config.json")
    try:
        return replace(Config(), **known_settings(saved))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--run {folder}: its config.json is damaged ({error}); put a copy of it back") from None


def require_run_dir(folder: Path) -> Path:
    """Return `folder`. Raises FileNotFoundError when the run was deleted meanwhile, so that it is not created again."""
    if not (folder / "config.json").exists():
        raise FileNotFoundError(errno.ENOENT, "the run folder or its config.json was deleted or renamed", str(folder))
    return folder


def write_run_header(folder: Path, settings: Mapping[str, object], world: World, precision: torch.dtype,
                     ledger: Iterable[Mapping[str, object]]) -> None:
    """Write config.json and ledger.jsonl, from rank 0."""
    def write() -> None:
        write_json(folder / "config.json", _provenance(settings, world, precision))
        write_ledger(folder / "ledger.jsonl", ledger)
    world.on_main(write)


def _provenance(settings: Mapping[str, object], world: World, precision: torch.dtype) -> dict[str, object]:
    """Return the content of config.json: resolved settings, versions, commit, host, devices."""
    device = world.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "config": settings,
        "precision": str(precision).removeprefix("torch."),
        "command": " ".join(public_arguments(sys.argv)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": _commit(),
        "host": platform.node(),
        "devices": {"kind": device.type, "name": name, "ranks": world.size},
        "launch": _launch_id(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, {} when there is none. Raises UserError when it is damaged."""
    try:
        content = parse_json(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); put a copy of it back, if there is one") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); put a copy of it back, if there is one")
    return content


def read_metrics(run: Path) -> dict[str, Any]:
    """Return the content of a run's metrics.json, {} when there is none. Raises UserError when it is damaged."""
    metrics = read_json(run / "metrics.json")
    for name in ("base", "tuned", "difference"):
        splits = metrics.get(name, {})
        if not isinstance(splits, dict) or not all(isinstance(values, dict) for values in splits.values()):
            raise UserError(f"{run / 'metrics.json'} is damaged ({name}); put a copy of it back, if there is one")
    return metrics


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json_text(value, 2) + "\n")


def write_metrics(folder: Path, metrics: Mapping[str, object], world: World) -> None:
    """Write metrics.json from rank 0. Raises RunFailed on every rank when writing fails."""
    world.on_main(lambda: write_json(require_run_dir(folder) / "metrics.json", metrics))


def write_ledger(path: Path, entries: Iterable[Mapping[str, object]]) -> None:
    """Write ledger.jsonl, one line for every dropped row; of addresses what `hide_secrets` leaves."""
    write_text(path, "".join(ledger_lines(entries)))


def append_to_ledger(path: Path, entries: Iterable[Mapping[str, object]]) -> None:
    """Add lines to an existing ledger.jsonl, which the next checkpoint writes again; does nothing where that fails."""
    # "r+", not "a": on another node the run folder may not exist, and no file may be made there.
    with suppress(OSError), open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write("".join(ledger_lines(entries)).encode())


def ledger_lines(entries: Iterable[Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of ledger.jsonl, each with its end."""
    for entry in entries:
        shown: dict[str, object] = {}
        for name, value in entry.items():
            shown[name] = hide_secrets(value) if isinstance(value, str) else value
        yield json_text(shown) + "\n"


def write_manifest(folder: Path) -> None:
    """Write manifest.json: the sha256 of every file of a finished run. Raises OSError."""
    names = ["answers.npz", "config.json", "evaluations.jsonl", "ledger.jsonl", "metrics.json", "report.html",
             "steps.jsonl", "sweep.jsonl"]
    paths = [folder / name for name in names if (folder / name).exists()]
    paths += sorted(path for path in (folder / "model").rglob("*") if path.is_file())
    write_json(folder / RUN_MANIFEST, {str(path.relative_to(folder)): sha256(path) for path in paths})


def manifest_problems(folder: Path) -> list[str] | None:
    """Return what changed since `write_manifest`; None without manifest.json. Raises UserError if that is damaged."""
    digests = read_json(folder / RUN_MANIFEST)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise UserError(f"{folder / RUN_MANIFEST} is damaged (it holds no digests); put a copy of it back, if there is "
                        "one")
    return changed_files(folder, digests) if digests else None


def is_complete(folder: Path, settings: Mapping[str, object], world: World) -> bool:
    """Return whether a run with these settings has ended in this folder and none of its files has changed."""
    def check() -> bool:
        try:
            saved = read_json(folder / "config.json").get("config", {})
            unchanged = manifest_problems(folder) == [] and (folder / "report.html").exists()
        except UserError:  # a damaged file
            return False
        if not isinstance(saved, dict):
            return False
        names = (saved.keys() | settings.keys()) - {"resume", "quiet", "out"}  # these do not change a result
        return unchanged and all(saved.get(name) == settings.get(name) for name in names)

    return world.exchange(world.is_main and check())[0]


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, with `+` when its files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True,
                              timeout=10).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
