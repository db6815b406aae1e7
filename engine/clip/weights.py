"""Read single tensors from the weight files of a model, without loading the others."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
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
    """A file written by torch.save, mapped into memory; none of its code runs."""

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


class Place(NamedTuple):
    """The weight file that holds a parameter, and its name there."""

    file: str
    name: str


def locate_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]],
                   saved_names: Mapping[str, str]) -> dict[str, Place]:
    """Return which file of a folder holds each parameter; `shapes` are those of the parameters.

    `saved_names` holds the names of parameters that have another name in the files. Raises one of UNREADABLE where
    a parameter is missing or has another shape, as in files that transformers converts while it loads.
    """
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"{folder} holds no weights")
    weight_map: Mapping[str, str] | None = None  # name -> file, of a model in several files
    if first.endswith(".index.json"):
        weight_map = json.loads((folder / first).read_text(encoding="utf-8"))["weight_map"]
    places: dict[str, Place] = {}
    opened: dict[str, WeightFile] = {}
    for name, shape in shapes.items():
        saved = saved_names.get(name, name)
        file = first if weight_map is None else weight_map[saved]
        if file not in opened:
            opened[file] = open_weights(folder / file)
        if opened[file].shape(saved) != shape:
            raise ValueError(f"{file} holds {name} in another shape")
        places[name] = Place(file, saved)
    return places


def read_weights(folder: Path, places: Mapping[str, Place], names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield some of the parameters in fp32 by name; they may be views of their file. Raises one of UNREADABLE."""
    opened: dict[str, WeightFile] = {}
    for name in names:
        place = places[name]
        if place.file not in opened:
            opened[place.file] = open_weights(folder / place.file)
        yield name, opened[place.file].tensor(place.name).float()


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError: the library's own error of a full disk does not name the file."""
    try:
        safetensors.save_file(dict(tensors), path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
