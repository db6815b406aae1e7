"""Single tensors out of the weight files of a CLIPModel, without loading the others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError)


class WeightFile(Protocol):
    """An open weight file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises one of UNREADABLE where there is none."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, which may be a view of the file."""


class SafetensorsFile:
    """A safetensors file: its header says where each tensor lies."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._file.get_tensor(name)


class PickledFile:
    """A file of torch.save, mapped into memory; none of its code runs."""

    def __init__(self, path: Path) -> None:
        self._tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name]


def open_weights(path: Path) -> WeightFile:
    """Open a weight file. Raises one of UNREADABLE."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


def locate_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return which file of a folder holds each parameter under its own name and shape.

    Raises one of UNREADABLE where a parameter is not to be found so, as in files that transformers converts.
    """
    first = next(name for name in (*WEIGHTS, "") if not name or (folder / name).is_file())
    if not first:
        raise FileNotFoundError(f"{folder} holds no weights")
    files = dict.fromkeys(shapes, first)
    if first.endswith(".index.json"):
        weight_map = json.loads((folder / first).read_text(encoding="utf-8"))["weight_map"]
        files = {name: weight_map[name] for name in shapes}
    opened = {file: open_weights(folder / file) for file in sorted(set(files.values()))}
    for name, shape in shapes.items():
        if opened[files[name]].shape(name) != shape:
            raise ValueError(f"{files[name]} holds {name} in another shape")
    return files


def read_weights(folder: Path, files: Mapping[str, str], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield some of the parameters in fp32 by name; they may be views of their file. Raises one of UNREADABLE."""
    opened: dict[str, WeightFile] = {}
    for name in names:
        file = files[name]
        if file not in opened:
            opened[file] = open_weights(folder / file)
        yield name, opened[file].tensor(name).float()
