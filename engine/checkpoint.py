"""Checkpoints that are whole or absent: temporary folder, fsync, manifest with sha256 last, rename. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.batch import UserError
from engine.dist import World

MANIFEST = "manifest.json"
Content = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]  # weights, moments, state.json
BEST_METRIC = "image_to_text_mrr"  # moves with every rank, so it tells small gains apart where R@1 cannot


@dataclass
class State:
    """What a checkpoint remembers beside the tensors."""

    step: int = 0
    best: float = 0.0  # of BEST_METRIC, which is positive
    best_step: int = 0
    stopped: int = 0  # the signal that ended the run early, else 0


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files are not what its manifest says."""


def save(run: Path, step: int, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
         state: Mapping[str, Any], keep: int, best_step: int) -> Path:
    """Write `checkpoints/step-N`, point `last` (and `best`) at it, delete what is over `keep`.

    Raises OSError when the disk refuses; what was saved before is then untouched.
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    name = f"step-{step:08d}"
    temporary = root / f".writing-{name}-{os.getpid()}"
    for stale in root.glob(".*-step-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                  temporary / "trainable.safetensors")
        save_file({key: value.detach().cpu().contiguous() for key, value in optimizer.items()},
                  temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")
        digests = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        old = root / f".replaced-{name}-{os.getpid()}"
        if (root / name).exists():  # the same step again, after a resume
            (root / name).replace(old)
        temporary.replace(root / name)
        _fsync(root)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _point(root / "last", name)
    if best_step == step:
        _point(root / "best", name)
    _prune(root, keep)
    return root / name


def load(folder: Path) -> Content:
    """Read one checkpoint after checking every file against the manifest.

    Raises DamagedCheckpoint naming the file that is missing or changed.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in ("trainable.safetensors", "optimizer.safetensors", "state.json"):
            if _sha256(folder / name) != digests[name]:
                raise DamagedCheckpoint(f"{folder.name}/{name} is not what was written (sha256 differs)")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder.name} is incomplete: {error}") from error
    return load_file(folder / "trainable.safetensors"), load_file(folder / "optimizer.safetensors"), state


def newest(run: Path, tell: Callable[[str], None]) -> tuple[Path, Content] | None:
    """The newest checkpoint that verifies, with its content; `tell` hears of each newer one that does not."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return folder, load(folder)
        except DamagedCheckpoint as error:
            tell(f"damaged checkpoint: {error}")
    return None


@dataclass(frozen=True)
class Saver:
    """Saves and resumes one run; `identity` names the data and towers that its state belongs to."""

    run: Path
    named: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: Mapping[str, str]
    keep: int
    world: World

    def note(self, state: State, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember `state.step` as the best one if its valid (else train) split scores higher than any before."""
        value = scores.get("valid", scores["train"])[BEST_METRIC]
        if state.step and value > state.best:
            state.best, state.best_step = value, state.step

    def save(self, state: State) -> None:
        """Checkpoint now; rank 0 writes, all wait."""
        if self.world.is_main:
            moments = {f"{name}.{field}": value for name, parameter in self.named.items()
                       for field, value in self.optimizer.state[parameter].items()}
            content = {"state": asdict(state), "identity": dict(self.identity)}
            save(self.run, state.step, self.named, moments, content, self.keep, state.best_step)
        self.world.barrier()

    def resume(self, tell: Callable[[str], None]) -> State:
        """Put weights and moments of the newest valid checkpoint back; its state. Tells which newer ones were damaged.

        Raises UserError when data or trained parameters are not those of the checkpoint.
        """
        found = newest(self.run, tell)
        if found is None:
            tell("no checkpoint to resume from: starting at step 0")
            return State()
        folder, (tensors, moments, content) = found
        changed = [key for key, value in self.identity.items() if content["identity"].get(key) != value]
        changed += ["the trainable parameters"] if tensors.keys() != self.named.keys() else []
        if changed:
            raise UserError(f"--resume: {' and '.join(changed)} changed since {folder}; start a new run")
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[name])
                self.optimizer.state[parameter] = {
                    key.removeprefix(f"{name}."): value.to(parameter.device)
                    for key, value in moments.items() if key.rpartition(".")[0] == name}
        tell(f"resumed from {folder}")
        return State(**{**content["state"], "stopped": 0})


def _prune(root: Path, keep: int) -> None:
    pointed = {(root / name).resolve().name for name in ("last", "best") if (root / name).is_symlink()}
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        if folder.name not in pointed:
            shutil.rmtree(folder, ignore_errors=True)


def _point(link: Path, target: str) -> None:
    """Replace a relative symlink atomically."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
