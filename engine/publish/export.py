"""The tuned model as a Hugging Face folder that transformers and sentence-transformers load.

Its projections.safetensors holds the trained tensors alone, a few megabytes, and in its header their `Origin`: with the
base model they give the same folder again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.batch import UserError
from data.files import recover_folders, replaced_folder
from data.web.storage import public_name, scheme_of
from engine.clip.loading import Clip
from engine.clip.weights import save_file
from engine.clip.whole import is_finite
from engine.config.fields import Config, as_dict, config_fields
from engine.config.settings import CHOSEN_BY_AUTO
from engine.publish.card import plain, write_card
from engine.run_folder import checkpoint
from engine.run_folder.folder import read_json, read_metrics
from engine.run_folder.repair import pointed_name

PROJECTIONS_FILE = "projections.safetensors"
HUB_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """Base model, dataset and recipe of trained tensors; of a dataset's local path only the last part is kept."""

    base: str  # hub name, or the full path of a local base
    commit: str  # of the base on the hub, "" for a folder
    frozen: str  # digest of the base's tensors that did not train; "": unknown
    dataset: str
    recipe: Mapping[str, Any] = field(default_factory=dict)  # settings of the group `recipe`
    metrics: Mapping[str, Any] = field(default_factory=dict)  # as metrics.json has them

    @classmethod
    def of(cls, cfg: Config, clip: Clip, trained: Collection[str], metrics: Mapping[str, Any]) -> Origin:
        """Return the origin of the tensors that this run has trained."""
        base = clip.name if clip.commit else str(Path(clip.name).expanduser().absolute())
        recipe = recipe_of(as_dict(cfg, "train"))
        names = _plain_names(metrics)  # a split may be called anything, and a card shows it
        return cls(base, clip.commit or "", frozen_digest(clip, trained), _public(cfg.dataset), recipe, names)


@dataclass(frozen=True)
class Tuned:
    """Trained tensors by parameter name, and their origin."""

    tensors: Mapping[str, Tensor]
    origin: Origin


def _public(dataset: str) -> str:
    """Return a hub name as it is, the last part of a path or an address: a query may hold a signature."""
    if scheme_of(dataset):
        return public_name(dataset).rstrip("/").rpartition("/")[2]
    path = Path(dataset).expanduser()
    return path.absolute().name if path.exists() or path.is_absolute() else dataset


def recipe_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the group `recipe`, in the order of Config."""
    names = [name for name, spec in config_fields().items() if spec.group == "recipe"]
    if settings.get("recipe") == "auto":  # metrics.json has what it chose
        names = [name for name in names if name not in CHOSEN_BY_AUTO]
    return {name: settings[name] for name in names if name in settings}


def frozen_digest(clip: Clip, trained: Collection[str]) -> str:
    """Return the SHA-256 of all parameters but the `trained` ones: equal for a base and the models tuned from it."""
    digest = hashlib.sha256()
    for name in sorted(clip.facts.shapes.keys() - set(trained)):
        digest.update(f"{name}={clip.facts.digests[name]}\n".encode())
    return digest.hexdigest()


def export(clip: Clip, folder: Path, tuned: Tuned, table: str, licence: str = "other", dtype: str = "fp32") -> None:
    """Write model, processor, model card and projections.safetensors, replacing the folder as a whole.

    `dtype` is that of the model's weights; projections.safetensors stays fp32. Raises UserError where `dtype`
    overflows, OSError.
    """
    with replaced_folder(folder, "model") as new:
        tensors = {name: value.detach().cpu().float().contiguous() for name, value in tuned.tensors.items()}
        save_file(tensors, new / PROJECTIONS_FILE, _header(tuned.origin))
        write_model(clip, tensors, new, dtype)
        write_card(new / "README.md", tuned.origin, table, licence, family=clip.family)


def write_model(clip: Clip, trained: Mapping[str, Tensor], folder: Path, dtype: str) -> None:
    """Write the base model's weights, the `trained` ones in their place, and the small files beside them.

    The weights come from the base's own files where the model is not in memory, and the folder is the same to the byte.
    """
    names = clip.facts.saved_names
    weights = {names.get(name, name): value for name, value in weights_of(clip, trained, dtype).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name, text in clip.facts.files.items():
        if name == "config.json":
            config = json.loads(text) | {"dtype": str(DTYPES[dtype])[6:]}
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def weights_of(clip: Clip, trained: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return all weights, the `trained` ones in place of the base's. Raises UserError where `dtype` overflows."""
    weights = {name: value.to(DTYPES[dtype]) for name, value in (*clip.frozen_weights(trained), *trained.items())}
    if overflown := next((name for name, value in weights.items() if not is_finite(value)), None):
        raise UserError(f"--dtype {dtype} cannot hold {overflown}; use --dtype bf16 or fp32")
    return weights


def finished_model(run: str) -> Path | None:
    """Return the complete model folder in a run, or `run` itself where it is one; None where there is none."""
    path = Path(run).expanduser()
    for folder in (path / "model", path):
        if (folder / PROJECTIONS_FILE).is_file() and any(folder.glob("model*.safetensors*")):
            return folder
    return None


def new_folder(wanted: str) -> Path:
    """Return the folder `--to`, which must be new or empty. Raises UserError."""
    folder = Path(wanted).expanduser()
    try:
        if folder.parent.is_dir():
            recover_folders(folder.parent)
        is_new = not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))
        if not is_new:
            raise UserError(f"--to {wanted} is there already; choose a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {wanted} cannot be made: {error.strerror}") from None
    return folder


def read_tuned(run: str, which: str = "", log: Callable[[str], None] = print) -> Tuned:
    """Read trained tensors from a file or folder with projections.safetensors, or from a run's checkpoint `which`.

    Without `which`, from a run's finished model, or else its newest undamaged checkpoint. Raises UserError.
    """
    path = Path(run).expanduser()
    finished = None
    for file in (path, path / PROJECTIONS_FILE, path / "model" / PROJECTIONS_FILE):
        if file.is_file() and not (which and file.parent.name == "model" and _is_damaged(file)):
            finished = _read_projections(file)
            break
    if finished and not which:
        return finished
    if not (path / "checkpoints").is_dir():
        if which:
            raise UserError(f"--run {run} holds no checkpoints; give a run folder")
        raise UserError(f"--run {run} holds no trained model; give a run folder, or a folder or file with "
                        f"{PROJECTIONS_FILE}")
    tensors = _checkpoint(path, which, log)
    origin = finished.origin if finished else _origin_of_unfinished(path, log)
    base = {"base": origin.metrics["base"]} if "base" in origin.metrics else {}  # this checkpoint has no others
    return Tuned(tensors, replace(origin, metrics=base))


def _checkpoint(path: Path, which: str, log: Callable[[str], None]) -> Mapping[str, Tensor]:
    """Return the weights of the checkpoint `which` (a step, a folder's name, last or best), or of the newest."""
    if not which:
        newest = checkpoint.newest_valid(path, log)
        if newest is None:
            raise UserError(f"--run {path} has no checkpoint that is whole; nothing of it can be exported")
        log(f"{path} holds no finished model: {newest[0].name} is exported, its newest checkpoint")
        return newest[1].weights
    folders = sorted(folder.name for folder in (path / "checkpoints").glob("step-*"))
    number = which.removeprefix("step-")
    name = f"step-{int(number):08d}" if number.isdecimal() and number.isascii() else which
    if name in checkpoint.LINKS and not (path / "checkpoints" / name).is_dir():
        name = pointed_name(path / "checkpoints" / name)
    if name not in [*folders, *checkpoint.LINKS] or not (path / "checkpoints" / name).is_dir():
        raise UserError(f"--checkpoint {which}: {path} has {', '.join(folders) or 'none'}, last and best")
    try:
        return checkpoint.load((path / "checkpoints" / name).resolve()).weights
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"--checkpoint {which}: {error}; choose another one") from None


def _origin_of_unfinished(path: Path, log: Callable[[str], None]) -> Origin:
    """Return the origin from config.json, without digest and commit of the base model."""
    known = read_json(path / "config.json").get("config", {})
    if not isinstance(known, dict) or not isinstance(known.get("model"), str):
        raise UserError(f"--run {path}: its config.json does not name the base model; this is no run of thumbtune")
    dataset = _public(str(known.get("dataset", "")))
    return Origin(known["model"], "", "", dataset, recipe_of(known), _shown_metrics(path, log))


def _shown_metrics(run: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Return a run's metrics for its model card; {} where they are damaged, which is logged."""
    try:
        return read_metrics(run)
    except UserError as error:
        log(f"{error}; the model card is written without metrics")
        return {}


def _read_projections(path: Path) -> Tuned:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["thumbtune"])
            origin = Origin(**{name: header[name] for name in Origin.__dataclass_fields__})
            origin = _checked(origin)
            return Tuned({name: file.get_tensor(name) for name in file.keys()}, origin)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error or type(error).__name__
        raise UserError(f"--run {path} is no {PROJECTIONS_FILE} of thumbtune's ({reason})") from None


def _is_damaged(path: Path) -> bool:
    """Return whether a run's own projections.safetensors cannot be read: a checkpoint of it may be whole."""
    try:
        _read_projections(path)
    except UserError:
        return True
    return False


def _checked(origin: Origin) -> Origin:
    """Return an origin from a file of others, which a card will show, with names that Markdown cannot interpret.

    Raises TypeError for values of other types, ValueError for a base on the hub that is no hub name.
    """
    for value in (origin.base, origin.commit, origin.frozen, origin.dataset):
        if not isinstance(value, str):
            raise TypeError("its origin is not text")
    if origin.commit and not (HUB_MODEL.fullmatch(origin.base) and re.fullmatch(r"\w{1,64}", origin.commit, re.ASCII)):
        raise ValueError("its base model is no model of the hub")
    if not isinstance(origin.recipe, dict) or not isinstance(origin.metrics, dict):
        raise TypeError("its recipe and metrics are not tables")
    settings = config_fields()
    for name, setting in origin.recipe.items():
        values = setting if isinstance(setting, list) else [setting]
        if not re.fullmatch("[a-z0-9_]+", name) or not all(isinstance(each, str | int | float) for each in values):
            raise TypeError("its recipe holds other things than settings")
        if name in settings and isinstance(settings[name].default, tuple) != isinstance(setting, list):
            raise TypeError(f"its recipe holds a {name} of another type")
    for kind in ("base", "tuned", "difference"):
        by_split = origin.metrics.get(kind, {})
        if not isinstance(by_split, dict) or not all(isinstance(values, dict) for values in by_split.values()):
            raise TypeError("its metrics are not tables")
    return replace(origin, metrics=_plain_names(origin.metrics))  # a base's path stays as it is, or it is not found


def _plain_names(value: Any) -> Any:
    """Return JSON values with all names and texts `plain`."""
    if isinstance(value, dict):
        return {plain(name): _plain_names(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain_names(each) for each in value]
    return plain(value) if isinstance(value, str) else value


def portable(path: Path) -> bytes:
    """Return the content of a projections.safetensors to publish: of a local base's path only the last part."""
    tuned = _read_projections(path)
    origin = tuned.origin if tuned.origin.commit else replace(tuned.origin, base=Path(tuned.origin.base).name)
    return save(dict(tuned.tensors), _header(origin))


def _header(origin: Origin) -> dict[str, str]:
    return {"thumbtune": json.dumps(asdict(origin))}


def require_base(clip: Clip, tuned: Tuned) -> None:
    """Raise UserError when these tensors were trained on another base model."""
    for name, value in tuned.tensors.items():
        if clip.facts.shapes.get(name) != tuple(value.shape):
            raise UserError(f"--model {clip.name} is not the base of these tensors: {name} does not fit; "
                            f"they were trained on {tuned.origin.base}")
    if tuned.origin.frozen and frozen_digest(clip, tuned.tensors.keys()) != tuned.origin.frozen:
        at = f" at commit {tuned.origin.commit}" if tuned.origin.commit else ""
        raise UserError(f"--model {clip.name} is not the base of these tensors: its frozen weights differ; "
                        f"they were trained on {tuned.origin.base}{at}")
