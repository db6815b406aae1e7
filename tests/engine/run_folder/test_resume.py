"""However often a run is cut off, on however many ranks, it ends as if nothing had happened."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from itertools import count
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import HANGS_S, ROOT, StopAt, full, make_pairs, on_ranks, start
from safetensors.torch import load_file

import engine.train as loop
from data import locks
from data.batch import UserError
from data.images import feed
from data.prefetch import epoch_order
from data.web import storage
from engine.commands.train import train as run_train
from engine.config.cli import parse
from engine.ranks import sharing
from engine.ranks.world import World
from engine.run_folder.log import Log

FLAGS = ["--precision", "fp32", "--lr", "1e-3", "--batch-size", "4", "--eval-every", "15", "--log-every", "7"]
NUMBERS = count()  # of the runs of this process
RUN = [*FLAGS, "--epochs", "4", "--keep", "1"]  # of 37 pairs: 40 steps
ROWS = range(4, 18) if full(0, 1) else (4, 5, 9, 17)  # 1 to 4 batches and a row
MODES_OF_TWO = ("cached", "streaming") if full(0, 1) else ("cached",)


def train(home: Path, out: str, *flags: str, stop: int = 0, data: str = "pairs") -> int:
    """One run in this process, on all ranks there are; its exit code."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    places = {"model": "tiny", "dataset": data, "cache-dir": "cache", "out": out}
    cfg = parse("run.py", [*(f"--{name}={home / place}" for name, place in places.items()), *flags])[1]
    store = dist.PrefixStore(f"run {next(NUMBERS)}", dist.distributed_c10d._get_default_store()) if size > 1 else None
    world = World(rank, rank, size, torch.device("cpu"), store=store)
    try:
        return run_train(cfg, world, StopAt(stop))
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code
    finally:
        world.barrier()  # rank 0 has exported
        while locks._locks:  # other ranks go on in this folder while this process lives
            os.close(locks._locks.popitem()[1])


def result(out: Path) -> tuple[Any, ...]:
    """What two equal runs have in common to the bit."""
    last = out / "checkpoints" / "last"
    files = out / "model/model.safetensors", out / "steps.jsonl", out / "metrics.json"
    return (*(path.read_bytes() for path in (*files, last / "trainable.safetensors", last / "optimizer.safetensors")),
            json.loads((last / "state.json").read_text())["order"])


def stopped_everywhere(home: Path, ranks: int, mode: str) -> list[int]:
    """Cut a run off after each of some steps and resume it; the steps after which it did not end as the whole one."""
    flags, name = [*RUN, "--mode", mode], f"{mode}-{ranks}"
    assert train(home, name, *flags) == 0
    different = []
    for step in random.Random(ranks).sample(range(1, 41), full(2, 40)):
        out = f"{name}-{step}"
        assert train(home, out, *flags, stop=step) == (143 if step < 41 else 0)
        assert (home / out / "checkpoints" / "last").resolve().name == f"step-{step:08d}"
        assert train(home, out, "--resume") == 0
        different += [step] if result(home / out) != result(home / name) else []
    return different


def rows_of_all_sizes(home: Path) -> None:
    """Runs on all ranks there are: by steps that every rank computes whole, then by steps that ranks share."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    for kind, limit in (("whole", 1e12), ("shared", 0.0)):
        sharing.MAX_REPLICATED_FLOP["cpu"] = limit
        for rows in ROWS:
            flags = [*FLAGS, "--epochs", "2", "--loss", "symmetric"]
            assert train(home, f"{kind}-{rows}-{size}", *flags, data=f"rows-{rows}") == 0


def on_two(home: Path) -> list[int]:
    rows_of_all_sizes(home)  # from here on ranks share steps
    assert train(home, "sizes", *RUN, "--profile", "3:5", stop=13) == 143  # goes on alone
    different = [step for mode in MODES_OF_TWO for step in stopped_everywhere(home, 2, mode)]
    return different + failed_together(home, "cached-2")


def failed_together(home: Path, whole: str) -> list[int]:
    """An error on all ranks that share steps, resumed; the step in a list if it was not saved or ends otherwise."""
    step = 22
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="shapes"):
        patch.setattr(loop, "global_batch_loss", fail_at(step + 1, RuntimeError("shapes"), loop.global_batch_loss))
        train(home, "failed", *RUN)
    saved = (home / "failed/checkpoints/last").resolve().name
    assert train(home, "failed", "--resume") == 0
    return [] if saved == f"step-{step:08d}" and result(home / "failed") == result(home / whole) else [step]


def on_three(home: Path) -> None:
    rows_of_all_sizes(home)
    assert train(home, "sizes", "--resume") == 0


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, and everything that several ranks do in this file, done in two launches."""
    home = tmp_path_factory.mktemp("home")
    (home / "tiny").symlink_to(tiny_model)
    make_pairs(home / "pairs", 37, 11, 12)
    for rows in ROWS:
        make_pairs(home / f"rows-{rows}", rows, 3, 3)
    different = on_ranks(2, on_two, home, timeout=full(HANGS_S, 1200))
    (home / "different.json").write_text(json.dumps(different))
    assert train(home, "sizes", "--resume", stop=27) == 143
    on_ranks(3, on_three, home, timeout=full(HANGS_S, 600))
    return home


@pytest.mark.timeout(full(600, 3600))
def test_stopped_after_any_step_two_ranks_end_as_if_uninterrupted(home: Path) -> None:
    assert json.loads((home / "different.json").read_text()) == [[], []]


@pytest.mark.timeout(full(600, 3600))
@pytest.mark.parametrize("mode", ["cached", "streaming"])
def test_stopped_after_any_step_a_run_ends_as_if_uninterrupted(mode: str, home: Path) -> None:
    assert stopped_everywhere(home, 1, mode) == []


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_two_ranks_then_one_then_three_train_the_same_batches(home: Path) -> None:
    whole, changed = home / "cached-2", home / "sizes"
    assert losses(changed) == pytest.approx(losses(whole), abs=1e-5)
    assert result(changed)[-1] == result(whole)[-1]  # the order of all rows
    traces = sorted(path.name.split(".")[0] for path in (changed / "profile").iterdir())
    assert traces == ["rank0", "rank1"]  # steps 3 and 4 of both ranks; when the run went on they were over
    theirs, ours = (load_file(out / "model" / "model.safetensors") for out in (whole, changed))
    assert all((theirs[name] - ours[name]).abs().max() < 1e-5 for name in theirs)


def test_any_number_of_rows_and_ranks_gives_the_same_metrics(home: Path) -> None:
    rows_of_all_sizes(home)
    for rows in ROWS:
        one = home / f"whole-{rows}-1"
        for size in (2, 3):
            whole, shared = home / f"whole-{rows}-{size}", home / f"shared-{rows}-{size}"
            assert result(whole) == result(one)  # to the byte: steps, weights, moments, metrics
            assert losses(shared) == pytest.approx(losses(one), abs=1e-5)
            assert json.loads((shared / "metrics.json").read_text()) == json.loads((one / "metrics.json").read_text())


def change_title(home: Path, data: str, split: str) -> None:
    path = home / data / f"{split}.csv"
    path.write_text(path.read_text().replace(",1 ", ",7 ").replace(",2 ", ",7 ").replace(",3 ", ",8 "))


def drop_row(home: Path, data: str, split: str) -> None:
    path = home / data / f"{split}.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_picture(home: Path, data: str, split: str) -> None:
    file = home / data / "images" / f"{split}-0001.jpg"
    file.write_bytes(file.read_bytes() + b"\0")


def delete_split(home: Path, data: str, split: str) -> None:
    (home / data / f"{split}.csv").unlink()


def delete_metrics(home: Path, data: str, split: str) -> None:
    (home / "out/metrics.json").unlink()


def same_title_in_capitals(home: Path, data: str, split: str) -> None:
    path = home / data / f"{split}.csv"
    path.write_text(path.read_text().upper().replace("IMAGES/", "images/").replace(".JPG", ".jpg").replace(
        split.upper(), split).replace("IMAGE,TITLE", "image,title"))


@pytest.mark.parametrize(("data", "split", "change", "refused"), [
    ("pairs", "test", change_title, "the data of test changed since "),
    ("pairs", "valid", drop_row, "the data of valid changed since "),
    ("pairs", "test", change_picture, "the data of test changed since "),
    ("pairs", "test", delete_split, "the data of test is gone since "),
    ("probe", "test", change_picture, "the data of probe changed since "),
    ("probe", "train", drop_row, ""), ("pairs", "test", same_title_in_capitals, ""),
    ("pairs", "test", delete_metrics, "")])
def test_a_measured_split_that_changed_is_refused_by_name(
        data: str, split: str, change: Callable[[Path, str, str], None], refused: str, tiny_model: Path,
        tmp_path: Path) -> None:
    """Else one table holds base figures of one test split and tuned figures of another."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    make_pairs(tmp_path / "pairs", 8, 6, 6)
    make_pairs(tmp_path / "probe", 4, 4, 4, seed=1)
    assert train(tmp_path, "out", *FLAGS, "--epochs", "2", "--probe", str(tmp_path / "probe"), stop=3) == 143
    change(tmp_path, data, split)
    if not refused:
        assert train(tmp_path, "out", "--resume") == 0
        return
    names = ("metrics.json", "config.json", "ledger.jsonl", "steps.jsonl")
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    with pytest.raises(UserError, match=f"--resume: {refused}.*step-00000003; start a new run with another --out"):
        train(tmp_path, "out", "--resume")
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before


def test_a_checkpoint_that_does_not_say_what_was_measured_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """As versions wrote it that remembered the training rows alone."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    make_pairs(tmp_path / "pairs", 8, 6, 6)
    assert train(tmp_path, "out", *FLAGS, "--epochs", "2", stop=3) == 143
    folder = tmp_path / "out/checkpoints/step-00000003"
    state = json.loads((folder / "state.json").read_text())
    state["identity"] = {"data": "of train", "the base model": state["identity"]["the base model"]}
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({
        **manifest, **({"state.json": digest} if "state.json" in manifest else {})}))
    with pytest.raises(UserError, match="does not record the data of train, the data of valid, .*an older version"):
        train(tmp_path, "out", "--resume")


DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import run
from engine.ranks.sharing import MAX_REPLICATED_FLOP
from engine.run_folder.log import Log
MAX_REPLICATED_FLOP["cpu"] = 0.0  # ranks share steps, as those of the clean run
step, restart = Log.step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def dying(log, number, *rest):
    if restart < len({deaths}) and [int(os.environ["RANK"]), number] == {deaths}[restart]:
        os.kill(os.getpid(), signal.SIGKILL)
    step(log, number, *rest)
Log.step = dying
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.timeout(full(600, 1200))
@pytest.mark.parametrize("seed", range(full(1, 5)))
def test_killed_ranks_end_in_the_weights_of_a_clean_run(seed: int, home: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    deaths = [[chance.randrange(2), step] for step in sorted(chance.sample(range(5, 41), full(1, 4)))]
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(root=str(ROOT), deaths=deaths))
    flags = ["--model", home / "tiny", "--dataset", home / "pairs", "--cache-dir", home / "cache", *RUN]
    out = ["--out", tmp_path / "runs" / "named"] if seed % 2 else []  # the folder is found again by either way
    process = start([*flags, "--save-every", "3", *out], 2, cwd=tmp_path, program=script, restarts=len(deaths))
    _, said = process.communicate(timeout=full(HANGS_S, 1000))
    assert process.returncode == 0, said
    assert said.count("resumed from") == len(deaths) or deaths[0][1] < 4
    (folder,) = (tmp_path / "runs").iterdir()
    assert result(folder)[:2] == result(home / "cached-2")[:2]
    assert os.path.exists(folder / "manifest.json")


def fail_at(call: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises `error` in place of its call number `call` and of all later ones."""
    calls = []

    def failing(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) >= call:
            raise error
        return function(*args, **named)

    return failing


RUN_OF_8 = ["--precision", "fp32", "--lr", "1e-3", "--batch-size", "4", "--epochs", "2", "--log-every", "2",
            "--eval-every", "4"]
# where the error comes from, in which call of it, the error, the step that is saved then
FAILURES = {
    "a user's loss": ("engine.train.global_batch_loss", 6, RuntimeError("shapes"), 5),
    "the inputs": ("engine.train.learning_rate", 4, MemoryError(), 3),
    "an interrupt of a notebook": ("engine.train.learning_rate", 7, KeyboardInterrupt(), 6),
    "a library for display": ("engine.run_folder.log.TensorBoardWriter.scalars", 2, TypeError("protobuf"), 2),
    "an evaluation": ("engine.commands.train.evaluate_splits", 2, RuntimeError("metric"), 4),
    "an update, half of it done": ("engine.optim.AdamWL2SP.step", 6, MemoryError(), 4),  # saved at 4: no later step is
}


@pytest.fixture(scope="module")
def short(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, and a run of eight steps that nothing ended."""
    short = tmp_path_factory.mktemp("short")
    (short / "tiny").symlink_to(tiny_model)
    make_pairs(short / "pairs", 16, 3, 3)
    assert train(short, "whole", *RUN_OF_8) == 0
    return short


@pytest.mark.parametrize("place", FAILURES)
def test_whatever_ends_the_loop_the_last_whole_step_is_saved(
        place: str, short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Else an error in an edited loss, or of a library, costs all steps since the last evaluation."""
    target, call, error, saved = FAILURES[place]
    out = f"out-{list(FAILURES).index(place)}"
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(target, fail_at(call, error, resolve_name(target)))
        train(short, out, *RUN_OF_8)
    assert (short / out / "checkpoints/last").resolve().name == f"step-{saved:08d}"
    assert ("--resume goes on from there" in capsys.readouterr().err) == (not place.startswith("an update"))
    assert train(short, out, "--resume") == 0
    assert result(short / out) == result(short / "whole")


@pytest.mark.parametrize("flag", ["--mode=streaming", "--augment", "--trainable=all"][:full(1, 3)])
def test_a_run_that_has_lost_a_picture_is_resumed_as_if_uninterrupted(flag: str, tiny_model: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a file that vanishes at night makes the data other data, and the run can never be gone on with."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    picture = make_pairs(tmp_path / "pairs", 12, 4, 4) / "images" / f"train-{int(epoch_order(12, 42, 0)[1]):04d}.jpg"
    content, log_step = picture.read_bytes(), Log.step
    monkeypatch.setattr(storage, "BACKOFF", 0.0)

    def lose(log: Log, number: int, *rest: Any) -> None:
        log_step(log, number, *rest)
        if number == 1:
            picture.unlink(missing_ok=True)

    def one_ahead(pictures: feed.Feed, *rest: Any, **named: Any) -> None:
        feed_init(pictures, *rest, **named)
        pictures.slots = 2  # else pictures of later steps may be decoded before the loss

    feed_init = feed.Feed.__init__
    monkeypatch.setattr(feed.Feed, "__init__", one_ahead)
    monkeypatch.setattr(Log, "step", lose)
    flags = [*FLAGS, "--epochs", "4", "--max-bad", "0.2", flag]
    assert train(tmp_path, "whole", *flags) == 0
    wanted = (tmp_path / "whole/ledger.jsonl").read_text()
    (entry,) = map(json.loads, wanted.splitlines())
    assert entry["image"] == str(picture) and 4 <= entry["step"] <= 6 and entry["reason"] == "missing-file"
    metrics = json.loads((tmp_path / "whole/metrics.json").read_text())
    measured = 12 if flag == "--augment" else 11  # those of frozen towers by stored features
    assert metrics["base"]["train"]["pairs"] == metrics["tuned"]["train"]["pairs"] == measured
    for stop in (2, 8):  # before the run has met the loss, and after
        picture.write_bytes(content)
        assert train(tmp_path, f"cut-{stop}", *flags, stop=stop) == 143
        assert train(tmp_path, f"cut-{stop}", "--resume") == 0
        assert result(tmp_path / f"cut-{stop}") == result(tmp_path / "whole")
    assert (tmp_path / "cut-8/ledger.jsonl").read_text() == wanted
    picture.write_bytes(content)  # it is back: used again, and the ledger says for how long it was lost
    assert train(tmp_path, "back", *flags, stop=8) == 143
    picture.write_bytes(content)
    monkeypatch.setattr(Log, "step", log_step)
    assert train(tmp_path, "back", "--resume") == 0
    (entry,) = map(json.loads, (tmp_path / "back/ledger.jsonl").read_text().splitlines())
    assert (entry["rows"], entry["back"]) == (0, 9)
