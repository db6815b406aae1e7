"""Checkpoints that are whole or absent: written beside, manifest with sha256 last, synced, renamed. No pickle.

There is no random state to keep: the order of pairs is a function of (seed, epoch), and the loop draws no other number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.batch import UserError
from data.files import delete_folder, read_text, recover_folders, replace_link, replaced_folder, sha256
from engine.optim import AdamWL2SP
from engine.ranks.world import World
from engine.run_folder.folder import require_run_dir
from engine.run_folder.ownership import FILES, MANIFEST

Content = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]  # weights, moments, state.json


@dataclass
class State:
    """What a checkpoint remembers beside the tensors."""

    step: int = 0
    evaluated: int = 0  # the last step whose evaluation has counted
    best: float | None = None  # value of the watched metric
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    enough: bool = False  # patience ran out: no further step
    stopped: int = 0  # the signal that ended the run early, else 0


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files are not what its manifest says."""


def save(run: Path, step: int, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
         state: Mapping[str, Any], keep: int) -> None:
    """Write `checkpoints/step-N`, point `last` at it, delete what is over `keep`; a step saved already stays as it is.

    Raises OSError when the disk refuses; what was saved before is then untouched.
    """
    root = require_run_dir(run) / "checkpoints"
    root.mkdir(exist_ok=True)
    name = f"step-{step:08d}"
    if not (root / name).exists():
        remove_stale(root)
        with replaced_folder(root / name, "checkpoint") as folder:
            for file, named in zip(FILES, (tensors, optimizer), strict=False):
                save_file({key: value.detach().cpu().contiguous() for key, value in named.items()}, folder / file)
            (folder / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")
            digests = {file: sha256(folder / file) for file in FILES}
            (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    replace_link(root / "last", name)
    delete_old(root, keep)


def remove_stale(root: Path) -> None:
    """Delete what killed writers left half written or half deleted; a run folder has one writer at a time."""
    recover_folders(root, locked=True)
    for link in root.glob(".*-link"):
        if link.is_symlink():
            link.unlink()


def load(folder: Path) -> Content:
    """Read one checkpoint after checking every file against the manifest.

    Raises DamagedCheckpoint naming the file that is missing or changed.
    """
    try:
        digests = json.loads(read_text(folder / MANIFEST))
        for name in FILES:
            if sha256(folder / name) != digests[name]:
                raise DamagedCheckpoint(f"{folder.name}/{name} is not what was written (sha256 differs)")
        state = json.loads(read_text(folder / "state.json"))
        if folder.name != f"step-{state['state']['step']:08d}":
            raise DamagedCheckpoint(f"{folder.name} holds step {state['state']['step']}")
        return load_file(folder / FILES[0]), load_file(folder / FILES[1]), state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder.name} is incomplete: {error}") from error


def newest_valid(run: Path, tell: Callable[[str], None]) -> tuple[Path, Content] | None:
    """The newest checkpoint that verifies, with its content; `tell` hears of each newer one that does not."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return folder, load(folder)
        except DamagedCheckpoint as error:
            tell(f"damaged checkpoint: {error}")
    return None


@dataclass(frozen=True)
class Saver:
    """Saves, resumes and watches one run; `identity` and `recipe` are what its state belongs to."""

    run: Path
    named: Mapping[str, nn.Parameter]
    optimizer: AdamWL2SP
    identity: Mapping[str, str]  # digests of the data and of the towers
    recipe: Mapping[str, Any]  # the settings that say what is computed
    order: Callable[[int], str]  # step -> digest of the order of all rows up to there
    keep: int
    metric: str  # what `best` means
    patience: int  # evaluations without a better one before the run has had enough; 0: no limit
    world: World

    def note(self, state: State, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Count an evaluation, on all ranks alike; the best one (valid split, else train) has a checkpoint.

        One in which the model has collapsed on any split is never the best. Raises UserError when the metric is not
        among what is measured.
        """
        values = next(scores[name] for name in ("valid", "train", *scores) if name in scores)
        if not isinstance(values.get(self.metric), float):
            names = [name for name, value in values.items() if isinstance(value, float)]
            raise UserError(f"--best-metric {self.metric} is not measured here; there is {', '.join(names)}")
        value = self.world.exchange(float(values[self.metric]))[0]
        if state.step <= state.evaluated:
            return
        sign = -1 if self.metric.endswith("_rank") else 1  # a small rank is a good one
        state.evaluated, state.worse = state.step, state.worse + 1
        collapsed = any(one.get("collapsed") for one in scores.values())
        if not collapsed and (state.best is None or sign * value > sign * state.best):
            state.best, state.best_step, state.worse = value, state.step, 0
            self.save(state)
            self.world.on_main(lambda: replace_link(self.run / "checkpoints" / "best", f"step-{state.step:08d}"))
        state.enough = 0 < self.patience <= state.worse

    def save(self, state: State) -> None:
        """Checkpoint now; rank 0 writes, all wait. Raises RunFailed on all ranks when the disk refuses."""
        def write() -> None:
            moments = {f"{name}.{field}": value for name, parameter in self.named.items()
                       for field, value in self.optimizer.state[parameter].items()}
            content = {"state": asdict(state), "identity": dict(self.identity), "recipe": dict(self.recipe),
                       "order": self.order(state.step)}
            save(self.run, state.step, self.named, moments, content, self.keep)
        self.world.on_main(write)

    def resume(self, tell: Callable[[str], None]) -> State:
        """Go on from the newest valid checkpoint, telling which newer ones were damaged; UserError names a change."""
        found = newest_valid(self.run, tell)
        self.world.on_main(lambda: _set_aside(self.run / "checkpoints", found[0].name if found else ""))
        if found is None:
            tell("no checkpoint to resume from: starting at step 0")
            return State()
        if missing := unrecorded(found[1][2], self.identity):
            raise UserError(f"--resume: {found[0]} does not record {', '.join(missing)} (an older version wrote it, or "
                            "that split was not measured then); start a new run with another --out")
        if changed := self.restore(found[1]):
            raise UserError(f"--resume: {'; '.join(changed)} since {found[0]}; start a new run with another --out")
        tell(f"resumed from {found[0]}")
        return state_of(found[1][2])

    def restore(self, content: Content) -> list[str]:
        """Put the weights and moments of a checkpoint back; or, and then do nothing, say what is not as it was."""
        tensors, moments, saved = content
        changed = differences(saved, self.identity, self.recipe)
        if not changed and saved.get("order") != self.order(state_of(saved).step):
            changed = ["the order of the pairs changed"]
        if _shapes(tensors) != _shapes(self.named):
            changed.append("the trainable parameters changed")
        if not changed:
            _restore(tensors, self.named)
            for name, parameter in self.named.items():
                self.optimizer.state[parameter] = {
                    key.removeprefix(f"{name}."): value.to(parameter.device)
                    for key, value in moments.items() if key.rpartition(".")[0] == name}
        return changed

    def take_best(self, state: State, tell: Callable[[str], None]) -> int:
        """With patience, put the weights of the best evaluation in place of later ones; its step, 0 if nothing changed.

        Tells when they are damaged.
        """
        if not self.patience or state.best_step in (0, state.step) or state.stopped:
            return 0
        try:
            _restore(load(self.run / "checkpoints" / f"step-{state.best_step:08d}")[0], self.named)
        except DamagedCheckpoint as error:
            tell(f"damaged checkpoint: {error}; the exported model is that of the last step")
            return 0
        return state.best_step


def state_of(content: Mapping[str, Any]) -> State:
    """The State in a state.json, ready to go on from."""
    known = {field.name for field in fields(State)}
    return State(**{**{key: value for key, value in content["state"].items() if key in known}, "stopped": 0})


def differences(content: Mapping[str, Any], identity: Mapping[str, str], recipe: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a checkpoint was written, one phrase each."""
    saved = {key: tuple(value) if isinstance(value, list) else value for key, value in content["recipe"].items()}
    changed = [f"--{key.replace('_', '-')} changed from {saved[key]} to {value}" for key, value in recipe.items()
               if key in saved and saved[key] != (tuple(value) if isinstance(value, list) else value)]
    changed += [f"{key} changed" for key, value in identity.items() if content["identity"].get(key, value) != value]
    return changed + [f"{key} is gone" for key in content["identity"] if key not in identity]


def unrecorded(content: Mapping[str, Any], identity: Mapping[str, str]) -> list[str]:
    """What of the identity a checkpoint says nothing of, written by an older version or before it was measured."""
    return [key for key in identity if key not in content["identity"]]


def delete_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, those that `last` and `best` point to, and what is not ours."""
    pointed = {(root / name).resolve().name for name in ("last", "best") if (root / name).is_symlink()}
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        if folder.name not in pointed:
            delete_folder(folder)


def _restore(tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _free_name(path: Path) -> Path:
    """`path`, or with the first number behind it that makes it a name not in use."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


def _set_aside(root: Path, newest_valid: str) -> None:
    """Rename what is newer than the checkpoint gone on from: damaged, but somebody may want to look at it."""
    remove_stale(root)
    for folder in root.glob("step-*"):
        if folder.name > newest_valid:
            folder.replace(_free_name(folder.with_name(f"damaged-{folder.name}")))
    with suppress(FileNotFoundError):
        if not (root / "best").exists():
            (root / "best").unlink()  # it pointed at one of these
    if newest_valid:
        replace_link(root / "last", newest_valid)
