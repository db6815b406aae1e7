"""Ranks that differ are refused before they train: each kind trained on in silence, or ended in misleading words."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import HANGS_S, ROOT, as_ranks, kill, make_pairs, start, tiny_clip
from scenes import wds_shards

from data import agreement
from data.agreement import require_agreement, require_same_images, require_same_rows, require_same_shards
from data.batch import AgreedError, Team
from data.catalogue import build_catalogue
from data.cold import Reader
from data.images.decode import ImageSpec
from data.sources.source import load_splits
from data.store.stat_cache import StatCache
from data.stream.shards import find_local_shards
from data.web.limits import FetchPolicy
from engine.clip.model import ModelOptions, open_model
from engine.commands.common import make_encoders, model_to_compare, open_pipeline
from engine.commands.train import first_state
from engine.config.fields import Config
from engine.optim import Plan
from engine.ranks.agreement import require_same_settings
from engine.ranks.world import World
from engine.run_folder.checkpoint import State

CPU = torch.device("cpu")


def refusals(differences: Sequence[Callable[[Team], object]]) -> list[str]:
    """What each rank says; all have to be refused."""
    said = as_ranks(len(differences), lambda team: differences[team.rank](team))
    assert all(type(each) is AgreedError for each in said), said
    return [str(each) for each in said]


def compare_data(folder: Path) -> Callable[[Team], None]:
    """The comparisons of a rank that reads `folder`, in the order of a run."""
    def compare(team: Team) -> None:
        splits = load_splits(str(folder))
        require_same_rows(team, splits)
        references = build_catalogue(splits).references
        reader = Reader(folder / "fetched", ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2)
        require_same_images(StatCache(folder / "seen", references, folder / "fetched"), reader, team)

    return compare


def edit(folder: Path, old: str, new: str) -> None:
    table = folder / "train.csv"
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new, 1), encoding="utf-8")


def reorder(folder: Path) -> None:
    head, *rows = (folder / "train.csv").read_text(encoding="utf-8").splitlines()
    (folder / "train.csv").write_text("\n".join([head, *rows[::-1], ""]), encoding="utf-8")


def swap_pictures(folder: Path) -> None:
    """Other pictures of the same sizes under the names of old ones."""
    first, second = folder / "images/train-0000.jpg", folder / "images/train-0001.jpg"
    data = bytearray(first.read_bytes())
    data[-20] ^= 1
    first.write_bytes(data)
    assert second.exists()


def first_row(folder: Path) -> list[str]:
    return (folder / "train.csv").read_text(encoding="utf-8").splitlines()[1].split(",")


OTHER_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "order of rows": (reorder, "the titles of train or their order"),
    "a title": (lambda folder: edit(folder, first_row(folder)[1], "another"), "the titles of train"),
    "a negative": (lambda folder: edit(folder, first_row(folder)[2], "another"), "the negatives of train"),
    "a picture's name": (lambda folder: edit(folder, "train-0000.jpg", "train-0001.jpg"), "the image names of train"),
    "a row less": (lambda folder: edit(folder, ",".join(first_row(folder)) + "\n", ""), "the splits"),
    "no valid split": (lambda folder: (folder / "valid.csv").unlink(), "the splits"),
    "a picture of another size": (lambda folder: shutil.copy(folder / "images/train-0002.jpg",
                                                             folder / "images/train-0000.jpg"), "train-0000.jpg"),
    "a picture of equal size": (swap_pictures, "image 0 (train-0000.jpg)"),
    "a picture that is not there": (lambda folder: (folder / "images/train-0003.jpg").unlink(), "train-0003.jpg"),
}


@pytest.mark.parametrize("kind", OTHER_DATA)
def test_other_data_on_one_rank_is_refused_on_all(kind: str, tmp_path: Path) -> None:
    change, words = OTHER_DATA[kind]
    for name in ("a", "b"):
        make_pairs(tmp_path / name, 6, 3, 3)
    assert as_ranks(3, lambda team: compare_data(tmp_path / ("b" if team.rank == 2 else "a"))(team)) == [None] * 3
    change(tmp_path / "b")
    same, other = compare_data(tmp_path / "a"), compare_data(tmp_path / "b")
    said = refusals([same, same, other])
    assert len({*said}) == 1 and said[0].startswith("rank 2 on ") and words in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("number, refused", [(None, ""), (1, "shard train-000001.tar"), (2, "shard train-000002.tar")])
def test_other_shards_under_the_same_names_are_refused_on_all(number: int | None, refused: str, tmp_path: Path) -> None:
    """Each rank streams other shards, so copies on two nodes that differ were trained on in silence."""
    (tmp_path / "0").mkdir()
    wds_shards(tmp_path / "0", "train", 4, 2)
    shutil.copytree(tmp_path / "0", tmp_path / "1", copy_function=shutil.copyfile)
    if number is not None:  # other titles, or a shard more
        changed = tmp_path / f"1/train-{number:06d}.tar"
        data = (tmp_path / "0/train-000001.tar").read_bytes()
        changed.write_bytes(data.replace(b" ", b"_") if number == 1 else data)

    def compare(team: Team) -> None:
        require_same_shards(find_local_shards(str(tmp_path / str(team.rank)))["train"], team)

    if number is None:
        assert as_ranks(2, compare) == [None, None]
    else:
        assert f" in {refused};" in refusals([compare, compare])[0]


class Joined(World):
    """One of several ranks, joined in threads."""

    def __init__(self, team: Team) -> None:
        super().__init__(team.rank, team.rank, team.size, CPU)
        object.__setattr__(self, "joined", team)

    @property
    def team(self) -> Team:
        return self.joined  # type: ignore[attr-defined]


@pytest.mark.parametrize("setting, value", [
    ("lr", 0.1), ("seed", 43), ("scale", 1.0), ("epochs", 3), ("batch_size", 8), ("precision", "fp32"),
    ("trainable", ("all",)), ("loss", "symmetric"), ("eval_splits", ("test",)), ("save_every", 5),
    ("dist_timeout", 9.0), ("resume", "auto"), ("command", "sweep")])
def test_other_settings_on_one_rank_are_refused_on_all(setting: str, value: Any) -> None:
    def compare(team: Team) -> None:
        cfg, command = Config(cache_dir=f"/scratch/{team.rank}", workers=1 + team.rank, quiet=team.rank > 0), "train"
        if team.rank == 1 and setting == "command":
            command = str(value)
        elif team.rank == 1:
            cfg = replace(cfg, **{setting: value})
        require_same_settings(Joined(team), command, cfg)

    said = refusals([compare, compare])
    name = "the command" if setting == "command" else f"--{setting.replace('_', '-')} ("
    assert said[0] == said[1] and said[0].startswith("rank 1 on ") and f" in {name}" in said[0]


def test_other_models_on_one_rank_are_refused_on_all(tiny_model: Path, tmp_path: Path) -> None:
    """DistributedDataParallel would hand out rank 0's projections in silence."""
    from safetensors.torch import load_file, save_file

    names = {"visual_projection.weight": "the base weights of the projections",
             "vision_model.post_layernorm.weight": "the image tower",
             "text_model.final_layer_norm.weight": "the text tower"}
    folders = {name: tiny_clip(tmp_path / name) for name in names}
    for name, folder in folders.items():
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] * 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def things(folder: Path) -> dict[str, object]:
        model = open_model(str(folder), ModelOptions(precision="fp32"), CPU)
        return model_to_compare(model, make_encoders(model))

    base = things(tiny_model)
    for name, words in names.items():
        other = things(folders[name])
        said = refusals([partial(require_agreement, things=base), partial(require_agreement, things=other)])
        assert f" in {words};" in said[0]


def test_a_picture_of_another_size_is_noticed_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many pictures only some are read; a copy of a data set that was cut off differs in sizes anywhere."""
    monkeypatch.setattr(agreement, "SAMPLED", 1)
    for name in ("a", "b"):
        make_pairs(tmp_path / name, 6, 3, 3)
    shutil.copy(tmp_path / "b/images/train-0002.jpg", tmp_path / "b/images/train-0003.jpg")
    said = refusals([compare_data(tmp_path / "a"), compare_data(tmp_path / "b")])
    assert "(train-0003.jpg)" in said[0]


def test_ranks_with_other_towers_stop_before_the_store(tiny_model: Path, tmp_path: Path) -> None:
    """Each would encode its share into a space of its own, and miss the others' rows."""
    folders = [tiny_model, tiny_clip(tmp_path / "other", seed=1)]

    def open_rank(team: Team) -> None:
        cfg = Config(model=str(folders[team.rank]), cache_dir=str(tmp_path / "cache"), precision="fp32", workers=1)
        open_pipeline(cfg, Joined(team), open_model(cfg.model, ModelOptions(precision="fp32"), CPU))

    said = refusals([open_rank, open_rank])
    assert "the image tower" in said[0] and "the text tower" in said[0]


def test_ranks_go_on_from_one_checkpoint(tmp_path: Path) -> None:
    """A folder that is no shared one holds another step on each node: they would train apart, or wait for ever."""
    def first(team: Team) -> None:
        saver: Any = SimpleNamespace(identity={}, resume=lambda log: State(step=3 + team.rank))
        first_state(saver, Joined(team), Plan(20, 4, 2), resuming=True)

    assert "the checkpoint to go on from" in refusals([first, first])[0]


def test_a_difference_ends_all_ranks_with_one_line(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """As two nodes with unlike copies of a script: real processes, exit code 2, no folder left."""
    program = tmp_path / "differ.py"
    program.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport run\n"
                       "sys.exit(run.main([*sys.argv[1:], '--lr', ['1e-3', '1e-1'][int(os.environ['RANK'])]]))\n")
    job = start(["--model", tiny_model, "--dataset", pairs, "--out", tmp_path / "run", "--cache-dir",
                 tmp_path / "cache"], ranks=2, program=program)
    try:
        said = job.communicate(timeout=HANGS_S)[1]
    finally:
        kill(job.pid)
    lines = [line for line in said.splitlines() if line.startswith("run.py")]
    assert len(lines) == 1 and "--lr (0.1, not 0.001)" in lines[0], said
    assert "exitcode  : 2" in said and not (tmp_path / "run").exists()
