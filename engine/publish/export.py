"""The tuned model as a Hugging Face folder that transformers and sentence-transformers load; back from its projections.

`projections.safetensors` holds what was trained and, in its header, where that came from (`Origin`): megabytes that,
put back on the base model, give the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from data.batch import UserError
from data.files import recover_folders, replaced_folder
from engine.clip.loading import Clip, non_finite
from engine.config.fields import Config, config_fields
from engine.publish.card import write_card
from engine.run_folder import checkpoint
from engine.run_folder.folder import read_json

PROJECTIONS_FILE = "projections.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """Where trained tensors come from; of local paths only the base's is kept whole."""

    base: str  # hub name, or the full path of a local base
    commit: str  # of the base on the hub, "" for a folder
    frozen: str  # digest of the base's tensors that did not train; "": unknown
    dataset: str
    recipe: Mapping[str, Any] = field(default_factory=dict)  # settings of the group `recipe`
    metrics: Mapping[str, Any] = field(default_factory=dict)  # as metrics.json has them

    @classmethod
    def of(cls, cfg: Config, clip: Clip, trained: Collection[str], metrics: Mapping[str, Any]) -> Origin:
        """The origin of what this run has trained."""
        base = clip.name if clip.commit else str(Path(clip.name).expanduser().absolute())
        return cls(base, clip.commit or "", frozen_digest(clip, trained), _public(cfg.dataset), recipe_of(cfg),
                   metrics)


@dataclass(frozen=True)
class Tuned:
    """Trained tensors by parameter name, and their origin."""

    tensors: Mapping[str, Tensor]
    origin: Origin


def _public(dataset: str) -> str:
    """A hub name as it is, of a path the last part."""
    path = Path(dataset).expanduser()
    return path.absolute().name if path.exists() or path.is_absolute() else dataset


def recipe_of(cfg: Config) -> dict[str, Any]:
    """The settings that decide what is learned, as plain JSON values."""
    plain = asdict(cfg)
    return {name: list(plain[name]) if isinstance(plain[name], tuple) else plain[name]
            for name, spec in config_fields().items() if spec.metadata["group"] == "recipe"}


def frozen_digest(clip: Clip, trained: Collection[str]) -> str:
    """SHA-256 of all parameters but the `trained` ones: equal for the base and for what was tuned from it."""
    frozen = sorted(name for name, _ in clip.model.named_parameters() if name not in trained)
    return hashlib.sha256("".join(f"{name}={clip.digests[name]}\n" for name in frozen).encode()).hexdigest()


def export(clip: Clip, folder: Path, tuned: Tuned, table: str, licence: str = "other", dtype: str = "fp32") -> None:
    """Write model, processor, card, and the trained tensors alone, as `replaced_folder` replaces a folder.

    `dtype` is how the model's weights are stored; the tensors alone stay fp32. Raises UserError where it overflows,
    OSError.
    """
    with replaced_folder(folder, "model") as new:
        save_file({name: value.detach().cpu().float().contiguous() for name, value in tuned.tensors.items()},
                  new / PROJECTIONS_FILE, metadata={"thumbtune": json.dumps(asdict(tuned.origin))})
        nn.Module.to(clip.model, DTYPES[dtype])
        if overflown := non_finite(clip.model):
            raise UserError(f"--dtype {dtype} cannot hold {overflown}; use --dtype bf16 or fp32")
        clip.model.save_pretrained(new)
        clip.processor.save_pretrained(new)
        write_card(new / "README.md", asdict(tuned.origin), table, licence)


def finished_model(run: str) -> Path | None:
    """The whole model folder in a run, or `run` itself where it is one; None: there is none."""
    path = Path(run).expanduser()
    return next((place for place in (path / "model", path) if (place / PROJECTIONS_FILE).is_file()
                 and any(place.glob("model*.safetensors*"))), None)


def new_folder(wanted: str) -> Path:
    """The folder `--to`, in which there must be nothing yet. Raises UserError."""
    folder = Path(wanted).expanduser()
    try:
        if folder.parent.is_dir():
            recover_folders(folder.parent)
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--to {wanted} is there already; choose a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {wanted} cannot be made: {error.strerror}") from None
    return folder


def read_tuned(run: str, which: str = "") -> Tuned:
    """What was trained: of a file or folder with projections.safetensors, or of a run folder's checkpoint `which`.

    Without `which`, a run's finished model, or else its newest checkpoint that verifies. Raises UserError.
    """
    path = Path(run).expanduser()
    alone = next((place for place in (path, path / PROJECTIONS_FILE, path / "model" / PROJECTIONS_FILE) if place.is_file()), None)
    if alone is not None and not which:
        return _read_alone(alone)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"--run {run} holds no {'checkpoints' if which else 'trained model'}; give a run folder"
                        + ("" if which else f", or a folder or file with {PROJECTIONS_FILE}"))
    found = _checkpoint(path, which)
    origin = _origin_of_unfinished(path) if alone is None else _read_alone(alone).origin
    measured = {when: scores for when, scores in origin.metrics.items() if when == "base"}  # not what is exported here
    return Tuned(found, replace(origin, metrics=measured))


def _checkpoint(path: Path, which: str) -> Mapping[str, Tensor]:
    if not which:
        newest = checkpoint.newest_valid(path, lambda line: None)
        if newest is None:
            raise UserError(f"--run {path} has no checkpoint that is whole; nothing of it can be exported")
        return newest[1].weights
    folders = sorted(folder.name for folder in (path / "checkpoints").glob("step-*"))
    number = which.removeprefix("step-")
    name = f"step-{int(number):08d}" if number.isdecimal() and number.isascii() else which
    if name not in [*folders, "last", "best"] or not (path / "checkpoints" / name).is_dir():
        raise UserError(f"--checkpoint {which}: {path} has {', '.join(folders) or 'none'}, last and best")
    try:
        return checkpoint.load((path / "checkpoints" / name).resolve()).weights
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"--checkpoint {which}: {error}; choose another one") from None


def _origin_of_unfinished(path: Path) -> Origin:
    """What config.json says; the base's weights were not digested yet."""
    known = read_json(path / "config.json").get("config", {})
    if not isinstance(known, dict) or not isinstance(known.get("model"), str):
        raise UserError(f"--run {path}: its config.json does not name the base model; this is no run of thumbtune")
    recipe = {name: known[name] for name, spec in config_fields().items()
              if spec.metadata["group"] == "recipe" and name in known}
    return Origin(known["model"], "", "", _public(str(known.get("dataset", ""))), recipe,
                  read_json(path / "metrics.json"))


def _read_alone(path: Path) -> Tuned:
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["thumbtune"])
            origin = Origin(**{name: told[name] for name in Origin.__dataclass_fields__})
            if not all(isinstance(value, str) for value in (origin.base, origin.commit, origin.frozen, origin.dataset)):
                raise TypeError("its origin is not text")
            return Tuned({name: file.get_tensor(name) for name in file.keys()}, origin)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run {path} is no {PROJECTIONS_FILE} of thumbtune's ({error or type(error).__name__})") from None


def portable(path: Path) -> bytes:
    """The content of a projections.safetensors for others: of a local base's path the last part."""
    tuned = _read_alone(path)
    origin = tuned.origin if tuned.origin.commit else replace(tuned.origin, base=Path(tuned.origin.base).name)
    return save(dict(tuned.tensors), {"thumbtune": json.dumps(asdict(origin))})


def restore(clip: Clip, tuned: Tuned) -> None:
    """Put trained tensors into the base model. Raises UserError when it is not the base they were trained on."""
    named = dict(clip.model.named_parameters())
    wrong = [name for name, value in tuned.tensors.items() if name not in named or named[name].shape != value.shape]
    if wrong:
        raise UserError(f"--model {clip.name} is not the base of these tensors: {wrong[0]} does not fit; "
                        f"they were trained on {tuned.origin.base}")
    if tuned.origin.frozen and frozen_digest(clip, tuned.tensors.keys()) != tuned.origin.frozen:
        at = f" at commit {tuned.origin.commit}" if tuned.origin.commit else ""
        raise UserError(f"--model {clip.name} is not the base of these tensors: its frozen weights differ; "
                        f"they were trained on {tuned.origin.base}{at}")
    with torch.no_grad():
        for name, value in tuned.tensors.items():
            named[name].copy_(value)
