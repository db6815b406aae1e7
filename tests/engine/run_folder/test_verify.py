"""`run.py verify` finds what somebody altered, also where the manifest was altered too."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import call, make_pairs
from safetensors.torch import load_file, save_file

import run
from engine.run_folder.folder import write_manifest


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a run on it."""
    home = tmp_path_factory.mktemp("verify")
    make_pairs(home / "pairs", 20, 6, 6)
    assert run.main(["--model", str(tiny_model), "--dataset", str(home / "pairs"), "--cache-dir", str(home / "cache"),
                     "--out", str(home / "run"), "--precision", "fp32", "--lr", "1e-2", "--save-every", "3",
                     "--batch-size", "4"]) == 0
    return home


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert re.search(old, text)
    path.write_text(re.sub(old, new, text, count=1))


def boast(path: Path) -> None:
    metrics = json.loads(path.read_text())
    metrics["tuned"]["test"]["image_to_text_mrr"] = 0.99
    path.write_text(json.dumps(metrics))


def round_off(home: Path, losses: bool) -> None:
    """A metric off by little; where features were encoded anew losses are, too."""
    metrics = json.loads((home / "run/metrics.json").read_text())
    metrics["tuned"]["test"]["image_to_text_mrr"] += 1e-4
    (home / "run/metrics.json").write_text(json.dumps(metrics))
    if losses:
        edit(home / "run/steps.jsonl", r'("loss": \d+\.\d{5})\d*', r"\g<1>")


def shift(path: Path) -> None:
    save_file({name: value + 0.5 * torch.randn(value.shape) for name, value in load_file(path).items()}, path)


ALTERED: dict[str, tuple[Callable[[Path], object], str]] = {  # what somebody does -> what verify says of it
    "nothing": (lambda home: None, r"\d+ ok, 0 FAILED, 0 not checked"),
    "a loss": (lambda home: edit(home / "run/steps.jsonl", r'"loss": \d', '"loss": 9'),
               r"replay from the base model +FAILED"),
    "a step": (lambda home: edit(home / "run/steps.jsonl", r'"step": 4', '"step": 5'), r"steps.jsonl +FAILED"),
    "a metric": (lambda home: boast(home / "run/metrics.json"), r"metrics.json +FAILED"),
    "a metric a little": (lambda home: round_off(home, losses=False), r"metrics.json +FAILED"),
    "features in their last bits": (lambda home: round_off(home, losses=True), r"\d+ ok, 0 FAILED, 0 not checked"),
    "the weights": (lambda home: shift(home / "run/model/projections.safetensors"), r"exported weights +FAILED"),
    "the data": (lambda home: edit(home / "pairs/train.csv", r"(\n[^,]+),[^,]+,", r"\1,other,"),
                 r"FAILED +the data of train changed"),
    "no data": (lambda home: shutil.rmtree(home / "pairs"), r"replay and metrics +not checked +.*no such file"),
}


def test_a_finished_run_that_is_resumed_changes_nothing(finished: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is requeued after its end must not write its model, log and manifest again; a lost page is made."""
    out = tmp_path / "run"
    shutil.copytree(finished / "run", out, symlinks=True)
    flags = ["--resume", "--out", str(out), "--cache-dir", str(finished / "cache")]

    def state() -> dict[str, tuple[int, bytes]]:
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}

    before = state()
    assert run.main(flags) == 0 and state() == before
    said = capsys.readouterr()
    assert "this run had ended" in said.err and "| test  | triplet accuracy  |" in said.out
    (out / "report.html").unlink()
    assert run.main(flags) == 0 and (out / "report.html").exists()
    assert run.main(["verify", "--run", str(out), "--cache-dir", str(finished / "cache")]) == 0
    lines = (out / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5, 10]


@pytest.mark.parametrize("what", ALTERED)
def test_what_was_altered_is_found(what: str, finished: Path, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    home, (alter, said) = tmp_path / "home", ALTERED[what]
    shutil.copytree(finished, home, symlinks=True)
    alter(home)
    write_manifest(home / "run")  # so that only looking again can tell
    code = run.main(["verify", "--run", str(home / "run"), "--dataset", str(home / "pairs"), "--cache-dir",
                     str(home / "cache")])
    out = capsys.readouterr().out
    assert re.search(said, out), out
    assert code == (0 if what in ("nothing", "no data", "features in their last bits") else 1)


def test_the_store_is_read_again_and_pruned(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished / "cache", cache)
    assert run.main(["verify", "--cache-dir", str(cache)]) == 0
    assert "2 spaces" in capsys.readouterr().out
    segment = next((cache / "features").glob("*/*.safetensors"))
    data = bytearray(segment.read_bytes())
    data[-5] ^= 4
    segment.write_bytes(data)
    assert run.main(["verify", "--cache-dir", str(cache)]) == 1
    assert f"{segment.name} is damaged" in capsys.readouterr().out
    assert run.main(["verify", "--cache-dir", str(cache), "--prune"]) == 1  # what is pruned now was damaged
    assert "kept nothing" in capsys.readouterr().out and not list((cache / "features").glob("*/*"))
    assert run.main(["verify", "--cache-dir", str(cache)]) == 0


def test_prune_in_somebody_elses_folder_deletes_nothing(tmp_path: Path) -> None:
    """A typo in --cache-dir with --prune must not cost the files of another program, whatever they are called."""
    theirs = tmp_path / "features" / "mine" / "face.features.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"years of work" * 200)
    assert call("verify", "--prune", "--cache-dir", tmp_path) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
