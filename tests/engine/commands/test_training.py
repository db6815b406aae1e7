"""A run that streams shards with a shuffle buffer: trained, cut off, resumed, on one rank and on two; its refusals."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from helpers import StopAt, inside, on_ranks
from scenes import make_pairs, wds_shards

from data import locks
from data.stream import batches as stream_batches
from data.stream.stages import Sample
from engine.commands.train import train as run_train
from engine.config.cli import parse
from engine.ranks.world import World

FLAGS = ["--trainable", "all", "--shuffle-buffer", "4", "--train-samples", "32", "--batch-size", "8", "--epochs", "2",
         "--precision", "fp32", "--lr", "1e-3", "--save-every", "1"]


def of_samples(count: int) -> list[str]:
    """FLAGS for shards of train that hold `count` samples."""
    return [str(count) if flag == "32" else flag for flag in FLAGS]


def train(home: Path, out: str, *flags: str, stop: int = 0) -> tuple[int, list[str]]:
    """One run in this process, on all ranks there are; its exit code, and the shards it read, in order."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    places = {"model": "tiny", "dataset": "shards", "cache-dir": "cache", "out": out}
    cfg = parse("run.py", [*(f"--{name}={home / place}" for name, place in places.items()), *flags])[1]
    world, read = World(rank, rank, size, torch.device("cpu")), list[str]()
    original = stream_batches.read_shard

    def noted(*args: Any) -> Iterator[Sample]:
        read.append(args[1].name)
        return original(*args)  # type: ignore[arg-type]

    try:
        stream_batches.read_shard = noted  # type: ignore[assignment]
        code = run_train(cfg, world, StopAt(stop))
    except SystemExit as exit:
        code = int(exit.code or 0)
    finally:
        stream_batches.read_shard = original
        world.barrier()  # rank 0 has exported
        while locks._locks:  # other ranks go on in this folder while this process lives
            os.close(locks._locks.popitem()[1])
    return code, read


def steps(out: Path) -> list[dict[str, float]]:
    """The lines of steps.jsonl."""
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def state(out: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    saved: dict[str, Any] = json.loads((out / "checkpoints/last/state.json").read_text())["state"]
    return saved


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and eight shards of four samples to train on, beside valid and test."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny").symlink_to(tiny_model)
    for split, samples, size in (("train", 32, 4), ("valid", 8, 8), ("test", 8, 8)):
        wds_shards(home / "shards", split, samples, size)
    return home


def cut_and_resumed(home: Path) -> tuple[list[str], list[str]]:
    """Cut a run off in its first epoch and resume it; the shards finished before, and those that are read after."""
    name = f"cut-{dist.get_world_size() if dist.is_initialized() else 1}"
    assert train(home, name, *FLAGS, stop=3)[0] == 143
    finished = [f"train-{shard:06d}.tar" for shard in state(home / name)["shards"]]
    code, read = train(home, name, "--resume")
    assert code == 0
    return finished, read


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_cut_off_goes_on_with_the_shards_that_are_left(ranks: int, home: Path) -> None:
    """Else whoever trains for days on a stream that does not fit the disk begins the epoch anew after each kill."""
    out = home / f"cut-{ranks}"
    results = [cut_and_resumed(home)] if ranks == 1 else on_ranks(ranks, cut_and_resumed, home)
    for rank, (finished, read) in enumerate(results):
        left = range(8 - len(finished))[rank::ranks]
        assert finished
        assert not set(read[: len(left)]) & set(finished)
    lines = steps(out)
    assert [(line["step"], line["rows"]) for line in lines] == [(step, 8) for step in range(1, 9)]
    assert state(out)["step"] == 8 and state(out)["shards"] == []
    if ranks == 1:
        done = inside(["verify", "--run", out, "--cache-dir", home / "cache"])
        assert done.returncode == 0 and "resuming changes the order" in done.stdout, done.stdout + done.stderr
        assert any(line.startswith("metrics") and " ok " in line for line in done.stdout.splitlines()), done.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["base"].keys() == metrics["tuned"].keys() == {"valid", "test"}


def test_the_same_command_gives_the_same_run(home: Path) -> None:
    """Same seed, same ranks: the same losses to the bit; another seed: others. And the loss falls."""
    for name in ("one", "two"):
        assert train(home, name, *FLAGS)[0] == 0
    assert steps(home / "one") == steps(home / "two")
    assert train(home, "three", *FLAGS, "--seed", "7")[0] == 0
    assert steps(home / "one") != steps(home / "three")
    assert steps(home / "one")[-1]["loss"] < steps(home / "one")[0]["loss"]


def test_a_stream_is_refused_where_it_cannot_be(home: Path, tmp_path: Path) -> None:
    """Each answer names the flag that makes it work; nothing is trained on by other rules in silence."""
    make_pairs(tmp_path / "pairs", 8, 4, 4)
    base = ["--model", home / "tiny", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "out", "--batch-size", "4"]
    buffer, shards = ["--shuffle-buffer", "4", "--trainable", "all"], ["--dataset", home / "shards"]
    for flags, said in (([*shards, "--shuffle-buffer", "4"], "--trainable all"),
                        ([*shards, *buffer], "--train-samples N"),
                        ([*shards, *buffer, "--mine-negatives", "hard"], "leave one out"),
                        ([*shards, "--train-samples", "9"], "add --shuffle-buffer N"),
                        ([*shards, *buffer, "--eval-splits", "train"], "--eval-splits train: there is valid, test"),
                        (["--dataset", tmp_path / "pairs", *buffer], "`run.py shards` writes them")):
        done = inside([*base, *flags])
        lines = done.stderr.splitlines()  # those before it say device, model and pairs
        assert done.returncode == 2 and said in done.stderr and len(lines) <= 4, done.stderr


def test_a_stream_from_a_store_is_the_stream_of_the_same_files_here(home: Path, tmp_path: Path) -> None:
    """Else training from s3:// trains on other batches, or needs a copy of the dataset; --splits is the same too."""
    store = MemoryFileSystem()
    for path in (home / "shards").glob("*.tar"):
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    base = ["--model", home / "tiny", "--cache-dir", home / "cache"]
    for splits in ([], ["--splits", "train=test,valid=train"]):
        name = "".join(splits[:1])
        for dataset in (home / "shards", "memory://bucket/{train,valid,test}-*.tar"):
            out = tmp_path / f"{name}{'memory' in str(dataset)}"
            flags = of_samples(8) if splits else FLAGS
            done = inside([*base, *splits, "--dataset", dataset, "--out", out, *flags])
            assert done.returncode == 0, done.stderr
            assert bool(splits) == ("--splits leaves out valid" in done.stderr)
        here, there = tmp_path / f"{name}False", tmp_path / f"{name}True"
        assert steps(here) == steps(there) and len(steps(here)) == (2 if splits else 8)
        assert (here / "metrics.json").read_text() == (there / "metrics.json").read_text()
    assert not list((home / "cache").rglob("*.tar"))
    alone = inside([*base, *FLAGS, "--dataset", "memory://bucket/test-*.tar", "--out", tmp_path / "alone"])
    assert alone.returncode == 2 and "no shards but test's" in alone.stderr, alone.stderr
    MemoryFileSystem.store.clear()


def test_a_run_that_bad_samples_end_has_them_in_its_ledger(home: Path, tmp_path: Path) -> None:
    """Else the run stops for its bad samples and does not say which they were."""
    folder = tmp_path / "shards"
    for split, samples in (("train", 16), ("valid", 8)):
        wds_shards(folder, split, samples, 8)
    with tarfile.open(folder / "train-000000.tar") as tar:
        places = [(member.offset_data, member.size) for member in tar if member.name.endswith(".jpg")]
    with open(folder / "train-000000.tar", "r+b") as file:
        for offset, size in places[:3]:
            file.seek(offset)
            file.write(bytes(size))
    done = inside(["--dataset", folder, "--model", home / "tiny", "--cache-dir", home / "cache", "--out",
                   tmp_path / "run", *of_samples(16)])
    assert done.returncode == 2 and "cannot be used" in done.stderr and "--max-bad" in done.stderr, done.stderr
    ledger = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert {entry["split"] for entry in ledger} == {"train"} and 1 <= len(ledger) <= 3
    assert all(entry["key"] in ("train00000", "train00001", "train00002") for entry in ledger)
