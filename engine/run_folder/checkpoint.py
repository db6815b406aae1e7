"""Checkpoints are complete or absent: written to a temporary folder, synced with a manifest of sha256, then renamed.

No file is a pickle. There is no random state to keep: the order of pairs is a function of (seed, epoch), and the loop
draws no other number.

The order of events when `run.py train --resume` continues a run:
1. Every rank reads the settings in config.json (engine/config/settings.py); a flag that may not change is refused.
2. Rank 0 locks the run folder (`open_folder` in folder.py), and puts back or deletes a model folder left half replaced.
3. `train` (engine/commands/train.py) opens data and base model and measures the base model, while its weights are still
   the base model's; the optimizer is made from them too, as L2-SP needs the pretrained weights.
4. `Saver.resume` (here) finds the newest undamaged checkpoint, renames damaged newer ones, refuses changed data or
   settings, and loads weights and moments.
5. Rank 0 replaces config.json and ledger.jsonl, and the metrics of the base model are read from metrics.json; where
   that file is damaged (repair.py), those measured by 3 are taken.
6. `Log` (log.py) cuts steps.jsonl and evaluations.jsonl back to the step of that checkpoint; TensorBoard hides later
   steps (`purge_step`).
7. `train` repeats the evaluation of that step unless the checkpoint records it; `fit` continues with the next step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.batch import UnsoundWeights, UserError
from data.files import delete_folder, recover_folders, replaced_folder, sha256
from data.reading import parse_json, read_text
from engine.clip.weights import save_file
from engine.config.settings import metric_sign
from engine.optim import AdamWL2SP
from engine.ranks.world import World
from engine.run_folder.board import Metrics
from engine.run_folder.folder import require_run_dir
from engine.run_folder.ownership import FILES, MANIFEST
from engine.run_folder.repair import pointed_name, replace_link, unused_name

LINKS = ("last", "best")
SavedState = Mapping[str, Any]  # state.json: the State, identity, recipe and order of pairs of a checkpoint


class Content(NamedTuple):
    """A checkpoint as it is read."""

    weights: dict[str, Tensor]  # by parameter name
    moments: dict[str, Tensor]  # the optimizer's state, by parameter name and field
    saved: SavedState


@dataclass
class State:
    """Progress of a run; checkpoints keep it beside the tensors."""

    step: int = 0
    evaluated: int = 0  # the last step whose evaluation was recorded; a checkpoint is saved before its own evaluation
    best: float | None = None  # value of --best-metric
    best_step: int = 0
    worse: int = 0  # evaluations since the best one
    enough: bool = False  # patience ran out: no further step
    stopped: int = 0  # the signal that ended the run early, else 0
    shards: list[int] = field(default_factory=list)  # of a stream: those that are finished in the current epoch


class Order(Protocol):
    """The order of the training rows."""

    def at_step(self, step: int) -> str:
        """Return a digest of it up to a step."""


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files do not match its manifest."""


def save(run: Path, step: int, tensors: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
         state: Mapping[str, object], keep: int) -> None:
    """Write `checkpoints/step-N` unless it exists, point `last` at it, delete all but the newest `keep`.

    Raises OSError when writing fails; earlier checkpoints are then untouched.
    """
    root = require_run_dir(run) / "checkpoints"
    root.mkdir(exist_ok=True)
    name = f"step-{step:08d}"
    if not (root / name).exists():
        remove_stale(root)
        with replaced_folder(root / name, "checkpoint") as folder:
            save_file(_on_host(tensors), folder / FILES[0])
            save_file(_on_host(optimizer), folder / FILES[1])
            (folder / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n", encoding="utf-8")
            digests = {file: sha256(folder / file) for file in FILES}
            (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    # `last` first: `delete_old` spares the checkpoint that it points at.
    replace_link(root / "last", name)
    delete_old(root, keep)


def weights_digest(named: Mapping[str, Tensor]) -> str:
    """Return a digest of fp32 weights by which ranks are compared: of the sums of each row's bits, taken as integers.

    Integers add up to the same in any order, on any device; only the sums are copied to the host.
    """
    digest = hashlib.sha256()
    for tensor in named.values():
        rows = tensor.detach().reshape(len(tensor) if tensor.dim() else 1, -1).view(torch.int32).sum(1)
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def remove_stale(root: Path) -> None:
    """Delete what killed processes left half written or half deleted; a run folder has one writer at a time."""
    recover_folders(root, locked=True)
    for link in root.glob(".*-link"):
        if link.is_symlink():
            link.unlink()


def load(folder: Path) -> Content:
    """Read one checkpoint after checking every file against the manifest.

    Raises DamagedCheckpoint naming the file that is missing or changed.
    """
    try:
        digests = parse_json(read_text(folder / MANIFEST))
        for name in FILES:
            if sha256(folder / name) != digests[name]:
                raise DamagedCheckpoint(f"{folder.name}/{name} is not what was written (sha256 differs)")
        state = parse_json(read_text(folder / "state.json"))
        if folder.name not in (f"step-{parse_state(state).step:08d}", *LINKS):
            raise DamagedCheckpoint(f"{folder.name} holds step {state['state']['step']}")
        return Content(load_file(folder / FILES[0]), load_file(folder / FILES[1]), state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder.name} is incomplete: {error}") from error


def newest_valid(run: Path, log: Callable[[str], None]) -> tuple[Path, Content] | None:
    """Return the newest undamaged checkpoint and its content; `log` gets one line for each newer, damaged one."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return folder, load(folder)
        except DamagedCheckpoint as error:
            log(f"damaged checkpoint: {error}")
    return None


@dataclass(frozen=True)
class Saver:
    """Saves and resumes one run, and keeps its best checkpoint.

    A checkpoint is resumed only with the same `identity`, `recipe` and order of pairs.
    """

    run: Path
    named: Mapping[str, nn.Parameter]  # the trainable parameters
    optimizer: AdamWL2SP
    identity: Mapping[str, str]  # digests of the data and of the towers
    recipe: Mapping[str, object]  # the settings that determine the result
    order: Order
    keep: int  # checkpoints
    metric: str  # what `best` means
    patience: int  # evaluations without a better one before the run ends; 0: no limit
    world: World

    def record_evaluation(self, state: State, scores: Metrics) -> None:
        """Update `state` on all ranks; point `best` at the checkpoint of this step if --best-metric improved.

        It is measured on valid, else on train. An evaluation in which the model has collapsed on any split
        is never the best. Raises UserError when the metric is not among the scores.
        """
        values = next(scores[name] for name in ("valid", "train", *scores) if name in scores)
        if not isinstance(values.get(self.metric), float):
            names = [name for name, value in values.items() if isinstance(value, float)]
            raise UserError(f"--best-metric {self.metric} is not measured here; there is {', '.join(names)}")
        # Rank 0's value on all ranks: a difference in the last bit must not make them save different checkpoints.
        value = self.world.exchange(float(values[self.metric]))[0]
        if state.step <= state.evaluated:
            return
        sign = metric_sign(self.metric)
        state.evaluated = state.step
        state.worse += 1
        collapsed = any(values.get("collapsed") for values in scores.values())
        if not collapsed and (state.best is None or sign * value > sign * state.best):
            state.best, state.best_step, state.worse = value, state.step, 0
            self.save(state)  # before `best` points there
            self.world.on_main(lambda: replace_link(self.run / "checkpoints" / "best", f"step-{state.step:08d}"))
        state.enough = 0 < self.patience <= state.worse

    def save(self, state: State) -> None:
        """Write a checkpoint from rank 0 while the others wait. Raises RunFailed on all ranks when writing fails.

        It is refused where the ranks hold different weights.
        """
        self.require_equal_weights(state.step)

        def write() -> None:
            content = {"state": asdict(state), "identity": dict(self.identity), "recipe": dict(self.recipe),
                       "order": self.order.at_step(state.step)}
            save(self.run, state.step, self.named, self._moments(), content, self.keep)
        self.world.on_main(write)

    def require_equal_weights(self, step: int) -> None:
        """Raise UnsoundWeights on all ranks where a rank holds other weights than rank 0."""
        digests = self.world.exchange(weights_digest(self.named))
        apart = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if apart:
            names = f"rank {apart[0]} holds" if len(apart) == 1 else f"ranks {', '.join(map(str, apart))} hold"
            raise UnsoundWeights(f"after step {step} {names} other weights than rank 0: the ranks differ in base "
                                 "model, processor or library versions; start all of them from one environment on "
                                 "equal machines")

    def _moments(self) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for name, parameter in self.named.items():
            for kind, value in self.optimizer.state[parameter].items():
                moments[f"{name}.{kind}"] = value
        return moments

    def resume(self, log: Callable[[str], None]) -> State:
        """Continue from the newest undamaged checkpoint, logging damaged ones; UserError names what has changed.

        This is the fourth event of a resumed run; the docstring of this module lists them all.
        """
        # a) The newest checkpoint whose files match its manifest.
        newest = newest_valid(self.run, log)
        # b) Rename damaged newer ones, point `last` at the newest undamaged one, delete `best` if its target is gone.
        self.world.on_main(lambda: _rename_newer(self.run / "checkpoints", newest[0].name if newest else ""))
        if newest is None:
            log("no checkpoint to resume from: starting at step 0")
            return State()
        folder, content = newest
        # c) Refuse a checkpoint that does not record all of this run's identity.
        if missing := missing_identity(content.saved, self.identity):
            raise UserError(f"--resume: {folder} does not record {', '.join(missing)} (an older version wrote it, or "
                            "that split was not measured then); start a new run with another --out")
        # d) Weights into the model, moments into the optimizer, unless data, settings or order have changed.
        if changed := self.restore(content):
            raise UserError(f"--resume: {'; '.join(changed)} since {folder}; start a new run with another --out")
        log(f"resumed from {folder}")
        # e) Step number and best evaluation so far; `best` points there, whatever became of that link.
        state = parse_state(content.saved)
        best = self.run / "checkpoints" / f"step-{state.best_step:08d}"
        if state.best_step and best.is_dir() and pointed_name(best.with_name("best")) != best.name:
            self.world.on_main(lambda: replace_link(best.with_name("best"), best.name))
        return state

    def restore(self, content: Content) -> list[str]:
        """Load weights and moments of a checkpoint and return []; or change nothing and return what differs from it."""
        changed = changes_since(content.saved, self.identity, self.recipe)
        if not changed and content.saved.get("order") != self.order.at_step(parse_state(content.saved).step):
            changed = ["the order of the pairs changed"]
        if _shapes(content.weights) != _shapes(self.named):
            changed.append("the trainable parameters changed")
        if changed:
            return changed
        _copy_weights(content.weights, self.named)
        # Moments of another checkpoint may be there: those that this one lacks must not stay.
        for parameter in self.named.values():
            self.optimizer.state[parameter] = {}
        for key, value in content.moments.items():
            name, _, field = key.rpartition(".")
            if name in self.named:
                parameter = self.named[name]
                self.optimizer.state[parameter][field] = value.to(parameter.device)
        return []

    def load_best_weights(self, state: State, log: Callable[[str], None]) -> int:
        """With --patience, replace the weights by those of the best evaluation; return its step, 0 if nothing changed.

        Logs when that checkpoint is damaged.
        """
        if not self.patience or state.best_step in (0, state.step) or state.stopped:
            return 0
        try:
            best = load(self.run / "checkpoints" / f"step-{state.best_step:08d}")
        except DamagedCheckpoint as error:
            log(f"damaged checkpoint: {error}; the exported model is that of the last step")
            return 0
        _copy_weights(best.weights, self.named)
        return state.best_step


def parse_state(saved: SavedState) -> State:
    """Return the State in a state.json, ready to continue from; fields of other versions are left out."""
    known = {field.name for field in fields(State)}
    values = {key: value for key, value in saved["state"].items() if key in known}
    return State(**{**values, "stopped": 0})


def changes_since(saved: SavedState, identity: Mapping[str, str], recipe: Mapping[str, object]) -> list[str]:
    """Return what differs from the time a checkpoint was written, one phrase each; `saved` is its state.json."""
    changed = []
    for key, value in recipe.items():
        before = saved["recipe"].get(key, value)
        before = tuple(before) if isinstance(before, list) else before  # JSON has no tuples
        if before != (tuple(value) if isinstance(value, list) else value):
            changed.append(f"--{key.replace('_', '-')} changed from {before} to {value}")
    for key, digest in identity.items():
        if saved["identity"].get(key, digest) != digest:
            changed.append(f"{key} changed")
    changed += [f"{key} is gone" for key in saved["identity"] if key not in identity]
    return changed


def missing_identity(saved: SavedState, identity: Mapping[str, str]) -> list[str]:
    """Return the keys of `identity` that a state.json lacks.

    An older version wrote it, or the split that a key is of was not measured then.
    """
    return [key for key in identity if key not in saved["identity"]]


def delete_old(root: Path, keep: int) -> None:
    """Delete checkpoints except the newest `keep`, the targets of `last` and `best`, and other programs' folders."""
    pointed = {pointed_name(root / name) for name in LINKS}
    for folder in sorted(root.glob("step-*"), reverse=True)[keep:]:
        if folder.name not in pointed:
            delete_folder(folder)


def _copy_weights(tensors: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _rename_newer(root: Path, newest_valid: str) -> None:
    """Rename checkpoints newer than `newest_valid` to damaged-*, kept for inspection.

    `last` then points at `newest_valid`; `best` is deleted if its target is gone.
    """
    remove_stale(root)
    for folder in root.glob("step-*"):
        if folder.name > newest_valid:
            folder.replace(unused_name(folder.with_name(f"damaged-{folder.name}")))
    best = root / "best"
    if not best.is_dir() and not (root / (pointed_name(best) or "none")).is_dir():
        best.unlink(missing_ok=True)  # its target was renamed just now
    if newest_valid:
        replace_link(root / "last", newest_valid)
