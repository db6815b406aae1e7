"""Facts of a model that a run needs before it loads a tower, and the record of them in the cache folder.

The first run loads the whole model, with every check of engine/clip/whole.py, and rank 0 leaves a record. Later runs
open the record instead, as long as no file of the model and no version of a library has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.batch import UserError
from data.files import replaced_file
from data.images.decode import TOKENS_VERSION, ImageSpec, tokenizer_fingerprint
from data.reading import read_regular
from engine.clip.families import CLIP, feature_width
from engine.clip.tokenizer import longest_title
from engine.clip.weights import Place

if TYPE_CHECKING:
    from engine.clip.whole import WholeModel

RECORD_VERSION = 2  # raise it whenever ModelFacts, or a check of a whole model, changes
Stamp = list[str | int]  # of one file: name, and what changes when its content does
Stamps = list[Stamp]


@dataclass(frozen=True)
class ModelFacts:
    """Everything about a model but its tensors, in plain values: settings, names, shapes, digests."""

    family: str  # its model_type
    commit: str | None  # of a hub repository
    subfolder: str  # of the CLIPModel in a sentence-transformers folder
    configs: Mapping[str, str]  # by tower: its config as JSON, as transformers writes it
    widths: Mapping[str, int]  # by tower: of its features
    max_tokens: int  # the longest title that the text tower has positions for, special tokens included
    pad_id: int
    tokenizer_fingerprint: str
    spec: ImageSpec
    shapes: Mapping[str, tuple[int, ...]]  # of all parameters, in the model's order
    saved_names: Mapping[str, str]  # in weight files, where transformers renames a parameter as it loads and saves
    digests: Mapping[str, str]  # BLAKE2b of every tensor in fp32
    files: Mapping[str, str]  # the small files that transformers saves with a model and its processor

    @classmethod
    def of(cls, whole: WholeModel) -> ModelFacts:
        """Return the facts of a model that has been loaded."""
        model, tokenizer, family = whole.model, whole.processor.tokenizer, whole.family
        config: Any = model.config
        head = family.head_of(model)
        parts = {"vision_model": config.vision_config, "text_model": config.text_config}
        max_tokens = longest_title(family, config.text_config, tokenizer)
        return cls(
            family=family.model_type,
            commit=whole.commit,
            subfolder=whole.subfolder,
            configs={name: part.to_json_string() for name, part in parts.items()},
            widths={"vision_model": feature_width(head.visual_projection, family.has_pooling_head),
                    "text_model": feature_width(head.text_projection)},
            max_tokens=max_tokens,
            pad_id=tokenizer.pad_token_id,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer, max_tokens),
            spec=ImageSpec.from_processor(whole.processor.image_processor),
            shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            saved_names={} if family is CLIP else renamed_parameters(model),
            digests={name: tensor_digest(tensor) for name, tensor in model.state_dict().items()},
            files=saved_files(whole))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelFacts:
        """Return the facts that `asdict` and JSON have made `values` of."""
        spec: dict[str, Any] = {}
        for name, value in values["spec"].items():
            spec[name] = tuple(value) if isinstance(value, list) else value
        shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        return cls(**{**values, "spec": ImageSpec(**spec), "shapes": shapes})

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def tensor_digest(tensor: Tensor) -> str:
    """Return the BLAKE2b of a tensor's shape and values."""
    shape = str(tuple(tensor.shape)).encode()[:16]
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=32, person=shape).hexdigest()


def renamed_parameters(model: Any) -> dict[str, str]:
    """Return the names that `save_pretrained` gives those parameters which it renames."""
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters())
    reverted: Mapping[str, Tensor] = revert_weight_conversion(model, parameters)
    saved = {id(value): name for name, value in reverted.items()}
    renamed: dict[str, str] = {}
    for name, value in parameters.items():
        saved_name = saved.get(id(value))
        if saved_name and saved_name != name:
            renamed[name] = saved_name
    return renamed


def saved_files(whole: WholeModel) -> dict[str, str]:
    """Return the files that `save_pretrained` of the model, in fp32, and of its processor write beside the weights."""
    config = whole.model.config
    config.architectures, config.dtype = [whole.family.model_class], "float32"
    with TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
            whole.processor.save_pretrained(folder)
        except Exception as error:  # the tokenizers package raises a plain Exception where the disk is full
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise UserError(f"cannot write to {folder}: {os.strerror(int(number[1]))}; free space there or set TMPDIR "
                            "to another folder") from None
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


class ModelRecord(NamedTuple):
    """Facts of a model, the folder of its files, and which weight file holds each parameter."""

    facts: ModelFacts
    folder: Path
    stamps: Stamps
    weights: Mapping[str, Place]  # of each parameter that is loaded as it lies in its file


@dataclass(frozen=True)
class ModelRecords:
    """The records of a cache folder. A record that is damaged, or of other files or libraries, counts as absent."""

    folder: Path
    writes: bool = True  # on one rank

    def find(self, name: str, commit: str | None = None) -> ModelRecord | None:
        """Return the record of a model whose files have not changed since; None where there is none."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            folder = find_folder(name, commit)
            content = _read_checked(self._path(name, commit))
            if content["versions"] != _versions() or content["folder"] != str(folder):
                return None
            facts = ModelFacts.from_json(content["facts"])
            if folder is not None and content["stamps"] == stamp_files(folder):
                weights = {name: Place(*place) for name, place in content["weights"].items()}
                return ModelRecord(facts, folder, content["stamps"], weights)
        return None

    def write(self, name: str, record: ModelRecord) -> None:
        """Write a record, unless files have changed since their stamps were taken.

        Failing to write is no error: the next run then loads the whole model again.
        """
        with suppress(OSError):
            if not self.writes or stamp_files(record.folder) != record.stamps:
                return
            content = {"versions": _versions(), "folder": str(record.folder), "stamps": record.stamps,
                       "weights": record.weights, "facts": asdict(record.facts)}
            text = json.dumps(content).encode()
            path = self._path(name, None)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path, durable=False) as temporary:
                temporary.write_bytes(_checksum(text) + b"\n" + text)

    def prune(self, keep: str) -> int:
        """Delete the undamaged records of all models but `keep`, "" for none; return the bytes freed."""
        freed = 0
        for path in sorted(self.folder.glob("*.json")):
            if keep and path == self._path(keep, None):
                continue
            with suppress(OSError, ValueError):  # a file that is not ours has no checksum and stays
                _read_checked(path)
                freed += path.stat().st_size
                path.unlink()
        return freed

    def _path(self, name: str, commit: str | None) -> Path:
        path = Path(name).expanduser()
        source = str(path.resolve()) if path.is_dir() else f"{name}@{commit or 'main'}"
        return self.folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"


def _versions() -> dict[str, str | int]:
    return {"record": RECORD_VERSION, "tokens": TOKENS_VERSION, "torch": torch.__version__,
            **{package: version(package) for package in ("transformers", "tokenizers")}}


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=32).hexdigest().encode()


def _read_checked(path: Path) -> dict[str, Any]:
    """Return the content of a record. Raises OSError, or ValueError for a damaged one."""
    checksum, _, text = read_regular(path).partition(b"\n")
    if _checksum(text) != checksum:
        raise ValueError(f"{path} is damaged")
    return json.loads(text)


def find_folder(name: str, commit: str | None = None) -> Path | None:
    """Return a model's folder, or its snapshot in the hub's cache; None where it is not on this machine.

    Without a `commit` it is the snapshot of the branch main when that was last fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    with suppress(OSError):
        commit = commit or (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshot = repository / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None
    return None


class StampedFolder(NamedTuple):
    """A model's folder, or its snapshot, and the stamps of its files at one time."""

    folder: Path
    stamps: Stamps


def stamped_folder(name: str, commit: str | None = None) -> StampedFolder | None:
    """Return a model's folder with the stamps of its files now; None where it cannot be read."""
    with suppress(OSError):
        folder = find_folder(name, commit)
        return StampedFolder(folder, stamp_files(folder)) if folder else None
    return None


def stamp_files(folder: Path) -> Stamps:
    """Return a stamp of every file in a model's folder and in its subfolders, which sentence-transformers' have.

    The files of a hub snapshot are links to files named by the digest of their content; their stamp is that name, and
    the time of the last write, which shows writes through the link. The stamp of other files is size, inode, device and
    both times of the last change: the content's can be set back, the inode's cannot. Raises OSError.
    """
    stamps = []
    folders = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    files = chain.from_iterable(sorted(each.iterdir()) for each in folders)
    for path in files:
        if not path.is_file():
            continue
        status = path.stat()
        stamp: Stamp = [str(path.relative_to(folder)), status.st_size]
        target = path.readlink() if path.is_symlink() else path
        if target.parent.name == "blobs":
            stamp += [target.name, status.st_mtime_ns]
        else:
            stamp += [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
        stamps.append(stamp)
    return stamps


def refuse_changed(record: ModelRecord, name: str) -> None:
    """Raise UserError where files have changed since the record was opened."""
    try:
        changed = stamp_files(record.folder) != record.stamps
    except OSError:
        changed = True
    if changed:
        raise UserError(f"--model {name}: its files have changed since this run began; put them back, and "
                        "`run.py export --run DIR --to NEW` writes the model from the last checkpoint")
