"""Whatever becomes of one file of a run folder, the run goes on as if nothing had happened, or says what it lacks.

A traceback, weights of another run or a result that differs in silence would each cost a user the run.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from helpers import StopAt, full, inside, make_pairs
from safetensors.torch import load_file

from data import files as durable
from data import locks
from engine.commands.train import train
from engine.config.cli import parse
from engine.ranks.world import World
from engine.run_folder import verification
from engine.run_folder.checkpoint import load
from engine.run_folder.repair import pointed_name
from eval.report.answers import load_answers

R = TypeVar("R")

FLAGS = ["--precision", "fp32", "--lr", "1e-2", "--batch-size", "4", "--epochs", "2", "--eval-every", "3",
         "--save-every", "4", "--keep", "9"]
LOGS = ("steps.jsonl", "evaluations.jsonl")  # lines that are lost are not made again
RESULTS = ("metrics.json", "steps.jsonl", "evaluations.jsonl", "ledger.jsonl", "model/model.safetensors",
           "checkpoints/last/trainable.safetensors", "checkpoints/last/optimizer.safetensors")
SHOWN = [(name, kind) for name in ("answers.npz", "metrics.json", "steps.jsonl", "evaluations.jsonl", "ledger.jsonl")
         for kind in ("missing", "empty", "cut", "rubbish", "folder", "other JSON")]
SHOWN += [("steps.jsonl", "twice"), ("steps.jsonl", "reversed"), ("metrics.json", "NaN"), ("metrics.json", "deep")]
SHOWN += [("tensorboard", "a file"), ("tensorboard/base", "a file"), ("tensorboard/projector_config.pbtxt", "folder"),
          ("tensorboard", "missing")]
CHECKPOINTS = [(f"checkpoints/step-00000007/{name}", kind)
               for name in ("manifest.json", "trainable.safetensors", "optimizer.safetensors", "state.json")
               for kind in ("missing", "cut", "folder")]
CHECKPOINTS += [("checkpoints/step-00000007", "empty folder"), ("checkpoints/step-00000007/state.json", "other JSON"),
                ("checkpoints", "missing")]
CHECKPOINTS += [(f"checkpoints/{link}", kind) for link in ("last", "best")
                for kind in ("missing", "rubbish", "folder", "as cp -L", "as text")]
NEEDED = [("config.json", kind) for kind in ("missing", "empty", "cut", "rubbish", "folder", "other JSON", "deep")]
NEEDED += [("checkpoints", "a file")]
FINISHED = [("answers.npz", "cut"), ("metrics.json", "missing"), ("metrics.json", "other JSON"),
            ("report.html", "empty"), ("manifest.json", "rubbish"), ("model", "missing"),
            ("model/model.safetensors", "cut"), ("model/projections.safetensors", "empty"), ("steps.jsonl", "rubbish")]


def damage(path: Path, kind: str) -> None:
    before = path.read_bytes() if path.is_file() else b""
    target = path.resolve()
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind in ("folder", "empty folder"):
        path.mkdir()
        if kind == "folder":
            (path / "notes").write_text("somebody's")
    elif kind == "as cp -L":
        shutil.copytree(target, path)
    elif kind != "missing":
        other = '{"config": [], "base": 3, "tuned": [], "state": 1, "step": "x"}'
        path.write_bytes({"empty": b"", "cut": before[: len(before) * 2 // 3], "a file": b"a file\n",
                          "rubbish": random.Random(0).randbytes(3000), "other JSON": other.encode(),
                          "twice": before * 2, "reversed": b"".join(before.splitlines(keepends=True)[::-1]),
                          "NaN": re.sub(rb"(?<=: )[\d.]+", b"NaN", before), "deep": b"[" * 100_000,
                          "as text": target.name.encode()}[kind])


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended, and an equal one that was stopped after 7 of its 10 steps."""
    home = tmp_path_factory.mktemp("damage")
    make_pairs(home / "pairs", 20, 5, 5)
    places = ["--model", str(tiny_model), "--dataset", str(home / "pairs"), "--cache-dir", str(home / "cache")]
    assert inside([*places, "--out", home / "whole", *FLAGS]).returncode == 0
    cfg = parse("run.py", [*places, "--out", str(home / "cut"), *FLAGS])[1]
    with pytest.raises(SystemExit):
        train(cfg, World(0, 0, 1, torch.device("cpu"), quiet=True), StopAt(7))
    return home


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    """A run folder is locked as long as its process lives, and all runs here are this process's."""
    yield
    while locks._locks:
        os.close(locks._locks.popitem()[1])


def said(home: Path, *command: object) -> tuple[int, str]:
    process = inside([*command, "--cache-dir", home / "cache"])
    text = process.stdout + process.stderr
    assert "not foreseen" not in text and "Traceback" not in text
    return process.returncode, text


def assert_equal_results(out: Path, whole: Path, but: str = "") -> None:
    for name in RESULTS:
        if name != but or name not in LOGS:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert pointed_name(out / "checkpoints/best") == pointed_name(whole / "checkpoints/best")
    page = (out / "report.html").read_text()
    assert "Row by row" in page and "Not kept." not in page


@pytest.mark.parametrize(("name", "kind"), [*SHOWN, *CHECKPOINTS])
def test_a_stopped_run_goes_on_past_damage(name: str, kind: str, home: Path, tmp_path: Path) -> None:
    """Logs, answers and metrics are put aside or made again, a damaged checkpoint gives way to an older one."""
    out = tmp_path / "run"
    shutil.copytree(home / "cut", out, symlinks=True)
    damage(out / name, kind)
    code, text = said(home, "--resume", "--out", out)
    assert code == 0, text
    assert_equal_results(out, home / "whole", but=name)
    if kind == "twice":
        assert_equal_results(out, home / "whole")
    elif name in LOGS:
        assert name in text and "damaged" in text
    if kind == "folder" and not name.startswith("checkpoints"):
        assert list(out.glob("damaged-*/notes"))


@pytest.mark.parametrize(("name", "kind"), NEEDED)
def test_what_a_run_cannot_do_without_is_named(name: str, kind: str, home: Path, tmp_path: Path) -> None:
    """And with checkpoints there, no new run begins in its place: it would take them for its own."""
    out = tmp_path / "run"
    shutil.copytree(home / "cut", out, symlinks=True)
    damage(out / name, kind)
    fresh = ["--model", home / "none", "--dataset", home / "pairs", "--out", out]
    for command in (["--resume", "--out", out], [*fresh, "--resume", "auto"], fresh, ["verify", "--run", out]):
        code, text = said(home, *command)
        assert name in text and code == 2 or name == "checkpoints" and "--resume" not in command, text
    assert said(home, "export", "--run", out, "--to", tmp_path / "model")[0] == 2


@pytest.mark.parametrize(("name", "kind"), FINISHED)
def test_a_finished_run_is_made_whole_again(name: str, kind: str, home: Path, tmp_path: Path) -> None:
    """`verify` names the file; --resume measures, exports and reports again."""
    out = tmp_path / "run"
    shutil.copytree(home / "whole", out, symlinks=True)
    damage(out / name, kind)
    code, text = said(home, "verify", "--run", out)
    assert code == 1 and name.split("/")[-1] in text, text
    assert said(home, "--resume", "--out", out)[0] == 0
    assert_equal_results(out, home / "whole", but=name)
    if name not in LOGS:
        assert said(home, "verify", "--run", out)[0] == 0


@pytest.mark.parametrize(("name", "kind"), [("metrics.json", "cut"), ("evaluations.jsonl", "other JSON"),
                                            ("answers.npz", "cut"), ("checkpoints", "a file"),
                                            ("checkpoints/last", "rubbish"), ("checkpoints/best", "empty")])
def test_damage_of_a_run_that_has_not_ended_is_found(name: str, kind: str, home: Path, tmp_path: Path) -> None:
    """It has no manifest yet: a user who asks `verify` after a crash of the disk must not hear that all is well."""
    shutil.copytree(home / "cut", tmp_path / "run", symlinks=True)
    assert verification.check_files(tmp_path / "run")[0][-1].verdict == verification.UNCHECKED
    if kind == "other JSON":
        (tmp_path / "run" / name).write_text("[]\n")
    else:
        damage(tmp_path / "run" / name, kind)
    failed = [finding for finding in verification.check_files(tmp_path / "run")[0]
              if finding.verdict == verification.FAILED]
    assert len(failed) == 1 and name.split("/")[-1] in failed[0].subject, failed


@pytest.mark.parametrize("kind", ["as cp -L", "as text"])
def test_a_copied_run_exports_its_best_checkpoint(kind: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(home / "cut", out, symlinks=True)
    damage(out / "checkpoints/best", kind)
    (out / "metrics.json").write_text(json.dumps([]))  # only shown in the card
    code, text = said(home, "export", "--run", out, "--checkpoint", "best", "--to", tmp_path / "model")
    assert code == 0 and "metrics.json is damaged" in text, text
    best = load_file(home / "cut/checkpoints/best/trainable.safetensors")
    exported = load_file(tmp_path / "model/projections.safetensors")
    assert best.keys() == exported.keys() and all(torch.equal(best[key], exported[key]) for key in best)


def killed_at(rename: int, *command: object) -> bool:
    """Run a command in a process of its own that dies, as by SIGKILL, before or after a rename (from 0); if it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(real: Callable[..., R]) -> Callable[..., R]:
            def call(*args: object) -> R:
                nonlocal count
                count += 2
                if count - 2 == rename:
                    os._exit(137)
                result = real(*args)
                if count - 1 == rename:
                    os._exit(137)
                return result
            return call

        os.replace, durable._exchange = dying(os.replace), dying(durable._exchange)
        os._exit(inside(command).returncode)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137


@pytest.mark.parametrize("begin", ["cut", "whole"])
def test_a_kill_at_any_rename_leaves_each_file_whole(begin: str, home: Path, tmp_path: Path) -> None:
    """Settings, logs, answers, checkpoints and model are the old ones or the new ones; nothing stays beside them."""
    chosen = iter(sorted(random.Random(0).sample(range(40 if begin == "cut" else 20), full(3, 20))))
    for rename in count() if full(0, 1) else chosen:
        out = tmp_path / str(rename)
        shutil.copytree(home / begin, out, symlinks=True)
        if begin == "whole":
            (out / "report.html").unlink()  # so that all is written again
        if not killed_at(rename, "--resume", "--out", out, "--cache-dir", home / "cache"):
            assert rename > 12
            break
        for path in (*out.glob("*.json"), *out.glob("*.jsonl")):
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                json.loads(text)
        assert "base" in load_answers(out / "answers.npz")[1]
        for folder in (out / "checkpoints").glob("step-*"):
            load(folder)
        assert durable.is_whole(out / "model", "model") or begin == "cut" and not (out / "model").exists()
        assert said(home, "--resume", "--out", out)[0] == 0
        assert_equal_results(out, home / "whole")
        assert [path.name for path in out.rglob(".*") if path.name != durable.MARK] == []
        shutil.rmtree(out)
