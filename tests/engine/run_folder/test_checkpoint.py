"""Checkpoints: whole or absent under SIGKILL and full disks, every damage noticed, decisions alike after a resume."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT, full, noting, on_ranks
from torch import nn

from data import files as durable
from data.batch import RunFailed, UserError
from data.locks import lock_folder
from data.prefetch import EpochBatches, OrderDigest, epoch_order
from engine.config.fields import Config, as_dict
from engine.optim import adamw
from engine.publish.export import Origin
from engine.ranks.world import World
from engine.run_folder import checkpoint, folder
from engine.run_folder.checkpoint import DamagedCheckpoint, Saver, State, load, newest_valid, save
from engine.run_folder.folder import manifest_problems, write_manifest

ALONE = World(0, 0, 1, torch.device("cpu"))


def run_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    return folder


def write(run: Path, step: int, keep: int = 2, size: int = 2000) -> None:
    """A checkpoint whose every value is its step."""
    tensors = {"w": torch.full((size,), float(step))}
    save(run, step, tensors, {"w.exp_avg": tensors["w"]}, {"state": {"step": step}}, keep)


def saver(run: Path, **changes: object) -> Saver:
    layer = nn.Linear(3, 2)
    settings: dict[str, Any] = {
        "identity": {"data": "abc"}, "recipe": {"lr": 0.1, "trainable": ["projection"]}, "keep": 9,
        "order": OrderDigest(10, 4, 0), "metric": "mrr", "patience": 0, "world": ALONE, **changes}
    optimizer = adamw(list(layer.parameters()), 1e-3, 0.01)
    return Saver(run, dict(layer.named_parameters()), optimizer, **settings)


def test_sigkill_while_saving_loses_no_checkpoint_that_was_acknowledged(tmp_path: Path) -> None:
    run, chance, acknowledged = run_folder(tmp_path), random.Random(0), 0
    for _ in range(full(12, 100)):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            for step in range(acknowledged + 1, 10_000):
                write(run, step)
                os.write(writer, step.to_bytes(8, "little"))
        os.close(writer)
        assert os.read(reader, 8)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while told := os.read(reader, 8):
            acknowledged = int.from_bytes(told, "little")
        os.close(reader)
        newest = newest_valid(run, pytest.fail)
        assert newest is not None
        folder, (tensors, moments, state) = newest
        step = state["state"]["step"]
        assert step >= acknowledged and (tensors["w"] == step).all() and (moments["w.exp_avg"] == step).all()
        assert (run / "checkpoints" / "last").resolve() in (folder, folder.with_name(f"step-{step - 1:08d}"))
        acknowledged = step
    write(run, acknowledged + 1)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {f"step-{acknowledged:08d}", f"step-{acknowledged + 1:08d}", "last"}  # nothing half done


def damages(path: Path, chance: random.Random) -> dict[str, Callable[[], object]]:
    data = path.read_bytes()
    at, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    return {
        "truncated": lambda: path.write_bytes(data[:at]),
        "bit flipped": lambda: path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:]),
        "zeroed": lambda: path.write_bytes(data[:at] + b"\0" * len(data[at:])),
        "missing": path.unlink,
        "longer": lambda: path.write_bytes(data + b"\0"),
    }


def test_every_damage_is_noticed_named_and_stepped_over(tmp_path: Path) -> None:
    run, chance, seen = run_folder(tmp_path / "run"), random.Random(1), 0
    write(run, 1)
    write(run, 2)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole, symlinks=True)
    for _ in range(full(3, 30)):
        for name in (*checkpoint.FILES, checkpoint.MANIFEST):
            for damage in damages(run / "checkpoints/step-00000002" / name, chance):
                shutil.rmtree(run)
                shutil.copytree(whole, run, symlinks=True)
                path = run / "checkpoints/step-00000002" / name
                before = path.read_bytes()
                damages(path, chance)[damage]()
                if path.exists() and path.read_bytes() == before:
                    continue  # zeros were zero already
                said: list[str] = []
                found = newest_valid(run, said.append)
                assert found is not None
                if name == checkpoint.MANIFEST and found[0].name == "step-00000002":
                    # white space of the manifest itself may change; what it says may not
                    assert json.loads(path.read_text()) == json.loads(before)
                    continue
                assert found[0].name == "step-00000001" and "step-00000002" in said[0], (name, damage)
                seen += 1
    assert seen >= full(3, 30) * 15


def test_a_pickle_dressed_as_a_checkpoint_is_damage_and_runs_nothing(tmp_path: Path) -> None:
    run, marker = run_folder(tmp_path), tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {marker}",)

    write(run, 3)
    folder = run / "checkpoints" / "step-00000003"
    for name in checkpoint.FILES:
        shutil.copytree(folder, run / "checkpoints" / "good")
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        digests = {file: durable.sha256(folder / file) for file in checkpoint.FILES}
        (folder / checkpoint.MANIFEST).write_text(json.dumps({**digests, "../../../marker": "0" * 64}))
        with pytest.raises(DamagedCheckpoint):
            load(folder)
        shutil.rmtree(folder)
        (run / "checkpoints" / "good").rename(folder)
    assert not marker.exists()


@pytest.mark.parametrize("refused", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(refused: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path)
    saves = saver(run)
    saves.save(State(step=1))
    before = load(run / "checkpoints" / "step-00000001")[2]

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(run))

    target = {"write": (checkpoint, "save_file"), "fsync": (durable.os, "fsync"), "rename": (Path, "replace")}[refused]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full_disk)
        with pytest.raises(RunFailed, match="No space left on device"):
            saves.save(State(step=2))
    newest = newest_valid(run, pytest.fail)
    assert newest is not None and newest[1][2] == before
    saves.save(State(step=3))  # once there is room again, no trace is left
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("limit", "name"), [(16, "step-00000001"), (150, checkpoint.FILES[0])])
def test_a_quota_reached_while_writing_names_the_path(limit: int, name: str, tmp_path: Path) -> None:
    """Neither Python's `[Errno 27] File too large` nor that of safetensors says which of a user's disks is full."""
    run, (soft, hard) = run_folder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = saver(run)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(RunFailed, match=f"File too large.*{name}"):
            saves.save(State(step=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saves.save(State(step=1))
    assert newest_valid(run, pytest.fail)


def test_what_is_saved_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = run_folder(tmp_path), list[str]()
    monkeypatch.setattr(durable.os, "fsync", noting(os.fsync, lambda fd: done.append(
        Path(os.readlink(f"/proc/self/fd/{fd}")).name)))
    monkeypatch.setattr(Path, "replace", noting(Path.replace, lambda old, new: done.append(f"rename {Path(new).name}")))
    write(run, 4)
    at = done.index("rename step-00000004")
    assert {*checkpoint.FILES, checkpoint.MANIFEST} <= set(done[:at])
    assert done[at - 1].startswith(".step-00000004-")
    assert done[at + 1] == "checkpoints" and done[at + 2] == "rename last"


def test_a_deleted_run_folder_is_not_made_anew(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    saves = saver(run)
    shutil.rmtree(run)
    with pytest.raises(RunFailed, match="deleted"):
        saves.save(State(step=1))
    assert not run.exists()


def test_resume_takes_back_everything_and_sets_damaged_ones_aside(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    ours = saver(run, patience=2)
    state = State()
    for state.step in (1, 2, 3):
        for parameter in ours.named.values():
            parameter.grad = torch.ones_like(parameter) * state.step
        ours.optimizer.step()
        ours.save(state)
        ours.record_evaluation(state, {"valid": {"mrr": [0.5, 0.6, 0.4][state.step - 1]}})
    assert (state.best_step, state.worse) == (2, 1)
    (run / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    again, said = saver(run, patience=2), list[str]()
    state = again.resume(said.append)
    assert "step-00000003/state.json is not what was written" in said[0]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-00000001", "step-00000002", "damaged-step-00000003", "last", "best"}
    assert (run / "checkpoints" / "last").resolve().name == "step-00000002"
    kept = load(run / "checkpoints" / "step-00000002")
    assert all(torch.equal(kept[0][name], value) for name, value in again.named.items())
    assert all(torch.equal(kept[1][f"{name}.exp_avg"], again.optimizer.state[value]["exp_avg"])
               for name, value in again.named.items())
    # step 2 was saved before it was measured: measured again it decides as it did
    for state.step, mrr in ((2, 0.6), (3, 0.4), (4, 0.3)):
        again.record_evaluation(state, {"valid": {"mrr": mrr}})
    assert (state.best_step, state.worse, state.enough) == (2, 2, True)
    assert again.load_best_weights(state, said.append) == 2


@pytest.mark.parametrize("name, changes", {
    "--lr changed from 0.1 to 0.2": {"recipe": {"lr": 0.2}},
    "data changed": {"identity": {"data": "abd"}},
    "the order of the pairs changed": {"order": OrderDigest(10, 4, 1)},
}.items())
def test_what_changed_since_is_named(name: str, changes: dict, tmp_path: Path) -> None:
    saver(run_folder(tmp_path)).save(State(step=2))
    assert saver(tmp_path).resume(lambda _: None).step == 2
    with pytest.raises(UserError, match=name):
        saver(tmp_path, **changes).resume(lambda _: None)


def test_best_means_what_was_asked_for(tmp_path: Path) -> None:
    ranks = saver(run_folder(tmp_path), metric="median_rank")
    state = State()
    for state.step, value in ((1, 9.0), (2, 4.0), (3, 4.0), (4, 7.0)):  # small is good, a tie is no gain
        ranks.record_evaluation(state, {"valid": {"median_rank": value, "mrr": 0.1}})
    state.step = 5
    ranks.record_evaluation(state, {"valid": {"median_rank": 1.0, "collapsed": True}})  # its figures mean nothing
    assert state.best_step == 2 and (tmp_path / "checkpoints" / "best").resolve().name == "step-00000002"
    with pytest.raises(UserError, match="--best-metric rank is not measured here; there is mrr"):
        saver(tmp_path, metric="rank").record_evaluation(state, {"valid": {"mrr": 0.1, "mrr_ci95": [0, 1], "pairs": 9}})


def test_the_digest_follows_what_ranks_are_given() -> None:
    digest, again = OrderDigest(10, 4, 7), OrderDigest(10, 4, 7)
    streams = [EpochBatches(10, 4, 7, rank, 3).from_step(0) for rank in range(3)]
    seen, chain = [], b""
    for step in range(1, 8):
        seen += torch.cat([next(stream) for stream in streams]).tolist()
        whole, part = divmod(len(seen), 10)
        assert seen[whole * 10:] == epoch_order(10, 7, whole)[:part].tolist()
        chain = b""
        for epoch in range(whole + 1):
            rows = torch.tensor(seen[epoch * 10:(epoch + 1) * 10], dtype=torch.int64)
            chain = hashlib.sha256(chain + rows.numpy().tobytes()).digest()
        assert digest.at_step(step) == chain.hex()
    assert again.at_step(7) == digest.at_step(7) != OrderDigest(10, 4, 8).at_step(7)


def test_one_run_has_one_writer(tmp_path: Path) -> None:
    assert lock_folder(tmp_path)
    code = f"from pathlib import Path; from data.locks import lock_folder; print(lock_folder(Path({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_file_of_a_run_holds_what_an_address_is_signed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that is shared, or its card on the hub, would let anyone fetch until the signature ends."""
    address = "https://me:SECRET@host/pairs.csv?X-Amz-Signature=SECRET"
    monkeypatch.setattr(sys, "argv", ["run.py", "--dataset", address, f"--probe={address}"])
    cfg = Config(dataset=address, probe=address)
    world = World(0, 0, 1, torch.device("cpu"))
    folder.write_run_header(tmp_path, as_dict(cfg, "train"), world, torch.float32, [{"row": 3, "image": address}])
    clip: Any = SimpleNamespace(name="owner/clip", commit="abc", facts=SimpleNamespace(shapes={}, digests={}))
    origin = Origin.of(cfg, clip, [], {})
    (tmp_path / "header").write_text(str(origin))
    for name in ("config.json", "ledger.jsonl", "header"):
        text = (tmp_path / name).read_text()
        assert "SECRET" not in text and "pairs.csv" in text, name


def test_a_launch_is_told_from_that_of_another_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two containers with one host name and one process id, the second took the first one's run for its own."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    first = folder._launch_id()
    assert first and folder._launch_id() == first
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[4026532999]")
        assert folder._launch_id() != first
    assert [each for each in first.split() if each.isdecimal()][-1] != str(os.getppid())  # when it was started


def test_a_seal_names_what_was_altered(tmp_path: Path) -> None:
    for name in ("config.json", "ledger.jsonl", "metrics.json", "steps.jsonl", "model/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert manifest_problems(tmp_path) is None
    write_manifest(tmp_path)
    assert manifest_problems(tmp_path) == []
    (tmp_path / "metrics.json").write_text('{"better": 1}')
    (tmp_path / "model/model.safetensors").unlink()
    assert manifest_problems(tmp_path) == ["metrics.json changed", "model/model.safetensors: No such file or directory"]


def _refusals(folder: str) -> list[str]:
    """What each rank says where rank 0's disk is full, and where rank 1's weights have lost their last bit."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank, 0, size, torch.device("cpu"))
    torch.manual_seed(0)
    ours, said = saver(Path(folder), world=world), []

    def full_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", folder)

    ours.require_equal_weights(0)
    for action in (lambda: world.on_main(full_disk), lambda: ours.save(State(step=7))):
        try:
            action()
        except RunFailed as error:
            said.append(str(error))
        if rank == 1:
            weight = ours.named["weight"].detach()
            weight.view(torch.int32)[1, 2] ^= 1
    return said


def test_all_ranks_hear_of_a_full_disk_and_of_weights_that_are_not_equal(tmp_path: Path) -> None:
    """Else ranks that compute steps on their own would train models apart, and rank 0's would be exported."""
    disk = f"[Errno 28] No space left on device: {str(tmp_path)!r}"
    for said in on_ranks(2, _refusals, str(run_folder(tmp_path))):
        assert said[0] == disk and said[1].startswith("after step 7 rank 1 holds other weights than rank 0")
    assert not (tmp_path / "checkpoints").exists()
