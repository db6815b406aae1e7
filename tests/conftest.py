"""Session fixtures: small models, pairs and the hub's stand-in, each made once. This process itself stays offline."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import HAS_GPU, make_pairs, tiny_clip
from hub import Hub
from scenes import youtube_pairs

torch.set_num_threads(1)
# What a cluster's job, a proxy, a hub account or a terminal leave in the environment must not reach the runs of tests.
FOREIGN = re.compile("((local_)?(rank|world_size)|master_(addr|port)|columns|(https?|all|no)_proxy"
                     "|(torchelastic|slurm|hf|transformers)_.*)", re.IGNORECASE)
for name in filter(FOREIGN.fullmatch, os.environ.keys() - {"HF_HUB_OFFLINE"}):
    del os.environ[name]
if not torch.cuda.is_available():  # a GPU that torch cannot use is an error of `--device auto`, the default
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


GPUS, gpu_is_available = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests, and from the processes they start, but for those marked `gpu`.

    The same tests do the same on every machine, and those of two and three ranks run on the CPU of a machine with one
    GPU. xdist's own process, which runs no test, hands its environment on to its workers, so it leaves it alone.
    `helpers` has looked for a GPU before: the driver reads the variable once, so marked tests can still see it.
    """
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        setattr(torch.cuda, "is_available", lambda: False)  # noqa: B010  # mypy takes no assignment to a function


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def show_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test that is marked `gpu` see it."""
    if request.node.get_closest_marker("gpu") is None:
        return
    monkeypatch.setattr(torch.cuda, "is_available", gpu_is_available)
    if GPUS is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", GPUS)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPModel folder."""
    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_st_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPModel in the layout of sentence-transformers/clip-ViT-L-14."""
    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny-st", sentence_transformers=True)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder of 37 + 11 + 12 pairs with negatives; no split divides by 2, 3 and 16."""
    return make_pairs(tmp_path_factory.mktemp("data") / "pairs", 37, 11, 12)


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_st_model: Path) -> Iterator[Hub]:
    """The hub's stand-in with the model and the dataset of the reference recipe."""
    home = tmp_path_factory.mktemp("hub")
    with Hub(home / "cache") as stand_in:
        stand_in.add_model("sentence-transformers/clip-ViT-L-14", tiny_st_model)
        stand_in.add_dataset("shawhin/yt-title-thumbnail-pairs", youtube_pairs(home / "dataset", stand_in.url))
        yield stand_in
