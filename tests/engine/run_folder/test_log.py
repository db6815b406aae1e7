"""What a run says: events and files that line up, bounded whatever the length, one live line on a terminal, --quiet."""

import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from helpers import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import nn

import run as command_line
from engine.console import CLEAR, whole_fields
from engine.optim import Plan
from engine.ranks.world import World
from engine.run_folder import crash
from engine.run_folder.board import POINTS, TensorBoardWriter, WeightDrift
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log

WORLD = World(0, 0, 1, torch.device("cpu"), quiet=True)
GROUPS = {"eval", "fit", "machine", "train", "valid", "test"}


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    found.Reload()
    return found


def curve(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def on_terminal(args: list[Any]) -> tuple[int, str]:
    """Run run.py with a pseudo-terminal of 80 columns as its stderr; its exit code and what the terminal was sent."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *map(str, args)], stderr=theirs, cwd=ROOT,
                               stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "80", "TERM": "xterm",
                                                               "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode()


def on_screen(said: str) -> list[str]:
    """The lines a terminal shows after this: \\r goes back, the clearing code empties the line."""
    lines = []
    for line in said.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part.rpartition(CLEAR)[2] if CLEAR in part else part + shown[len(part):]
        lines.append(shown)
    return lines


@pytest.fixture(scope="module")
def finished(pairs: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run on a terminal, and what the terminal was sent."""
    out = tmp_path_factory.mktemp("log") / "run"
    code, said = on_terminal(["--model", tiny_model, "--dataset", pairs, "--out", out, "--cache-dir",
                              out.parent / "cache", "--lr", "1e-2", "--log-every", "1", "--precision", "fp32"])
    assert code == 0, said
    return out, said


def test_quiet_leaves_the_table_alone(finished: tuple[Path, str], pairs: Path, tiny_model: Path, tmp_path: Path,
                                      capfd: pytest.CaptureFixture[str]) -> None:
    cache = finished[0].parent / "cache"
    assert command_line.main(["--model", str(tiny_model), "--dataset", str(pairs), "--out", str(tmp_path / "run"),
                              "--cache-dir", str(cache), "--epochs", "1", "--quiet"]) == 0
    said = capfd.readouterr()
    assert said.err == "" and said.out.startswith("| split | metric")
    notes = ("train: ", "valid: ", "test: ")  # how much each split's figures rest on
    assert all(line.startswith(("|", *notes)) for line in said.out.splitlines() if line)


def test_curves_pictures_and_hparams_are_where_people_look(finished: tuple[Path, str]) -> None:
    out, _ = finished
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    metrics = json.loads((out / "metrics.json").read_text())
    main, base = events(out / "tensorboard"), events(out / "tensorboard" / "base")
    assert {tag.split("/")[0] for tag in main.Tags()["scalars"]} == GROUPS
    for name in ("loss", "lr", "grad_norm"):
        assert curve(main, f"fit/{name}") == [(line["step"], pytest.approx(line[name])) for line in steps]
    assert [step for step, _ in curve(main, "eval/image_to_text_R@10 valid")] == [0, 3, 6]
    assert curve(main, "test/image_to_text_R@10") == [
        (0, pytest.approx(metrics["base"]["test"]["image_to_text_R@10"])),
        (6, pytest.approx(metrics["tuned"]["test"]["image_to_text_R@10"]))]
    for split in ("train", "valid"):  # the base model is a level line beside every metric
        value = metrics["base"][split]["triplet_accuracy"]
        assert curve(base, f"eval/triplet_accuracy {split}") == [(step, pytest.approx(value)) for step in (0, 3, 6)]
    for name in ("visual_projection", "text_projection"):
        drift = [value for _, value in curve(main, f"fit/drift {name}")]
        assert drift[0] == 0 < drift[1] < drift[2]
    assert all(0 <= value <= 1 for _, value in curve(main, "machine/data_wait_share"))
    assert set(main.Tags()["images"]) == {"retrieval/test image_to_text", "retrieval/test text_to_image",
                                          "similarity/test"}
    assert {tag.split("/")[0] for tag in main.Tags()["histograms"]} == {"margin"}
    projector = text_format.Parse((out / "tensorboard" / "projector_config.pbtxt").read_text(), ProjectorConfig())
    assert [points.tensor_name for points in projector.embeddings] == ["base:00000", "tuned:00006"]
    for points in projector.embeddings:
        tensors, metadata = (len((out / "tensorboard" / path).read_text().splitlines())
                             for path in (points.tensor_path, points.metadata_path))
        assert metadata == tensors + 1  # a header
        with Image.open(out / "tensorboard" / points.sprite.image_path) as sprites:
            tiles = sprites.width // points.sprite.single_image_dim[0]
            assert sprites.width == sprites.height and (tiles - 1) ** 2 < tensors <= tiles**2
    assert len(list((out / "tensorboard").rglob("events.*"))) == 2  # hparams opened no run of their own
    plugins = main.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(plugins)
    assert b"batch_size" in plugins["_hparams_/session_start_info"].plugin_data.content


def test_evaluations_are_kept_line_by_line(finished: tuple[Path, str]) -> None:
    out, _ = finished
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(0, 0), (3, 1), (6, 2)]
    assert set(lines[1]) == {"step", "epoch", "train", "valid"} and "test" in lines[2]


def test_an_evaluation_that_is_repeated_has_one_line(tmp_path: Path) -> None:
    """A run that has lost its results measures its last step again; a plot would have two points there."""
    scores = {"valid": {"image_to_text_R@10": 0.5}}
    world = World(0, 0, 1, torch.device("cpu"), quiet=True)
    for _ in range(2):
        log = Log(tmp_path, world, Plan(10, 2, 2), State(step=5, evaluated=5), WeightDrift({}))
        log.metrics(scores, 5)
        log.close()
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1


def test_a_long_run_writes_a_bounded_number_of_points(tmp_path: Path) -> None:
    steps = 30 * POINTS
    board = TensorBoardWriter(tmp_path, 0, steps)
    written = [step for step in range(1, steps + 1) if board.due("steps", step)]
    assert POINTS <= len(written) <= POINTS + 1 and written[-1] == steps
    short = TensorBoardWriter(tmp_path / "short", 0, 7)
    assert [step for step in range(1, 8) if short.due("steps", step)] == list(range(1, 8))
    assert not short.due("steps", 4)  # best weights taken back: no curve runs backwards
    log = Log(tmp_path / "run", World(1, 1, 2, torch.device("cpu")), Plan(10, 2, 2), State(), WeightDrift({}))
    log.metrics({"valid": {"image_to_text_R@10": 0.5}}, 0)  # another rank: nothing is written
    log.close()
    assert not (tmp_path / "run").exists()


def test_drift_is_relative_to_where_training_began() -> None:
    weight = nn.Parameter(torch.full((2, 2), 2.0))
    drift = WeightDrift({"visual_projection.weight": weight, "logit_scale": nn.Parameter(torch.ones(()))})
    with torch.no_grad():
        weight.add_(0.5)
    assert drift() == {"fit/drift visual_projection": pytest.approx(0.25)}


def test_a_live_line_is_cut_between_its_fields() -> None:
    line = "step 2/6  loss 2.7712  1,234,567 pairs/s"
    assert [whole_fields(line, width) for width in (99, len(line), len(line) - 1, 21, 20, 8, 4)] == [
        line, line, "step 2/6  loss 2.7712", "step 2/6  loss 2.7712", "step 2/6", "step 2/6", "step"]


def test_a_terminal_has_one_live_line(finished: tuple[Path, str]) -> None:
    out, said = finished
    live = re.findall(r"\x1b\[2K(step [^\r\n]*)\r(?!\n)", said)
    assert len(live) == 5 and all(len(line) < 80 for line in live)
    fields = [r"step 2/6", r"epoch 0\.67", r"loss \d+\.\d{4}", r"valid R@10 \d\.\d{3}", r"lr \d\.\d\de-\d\d",
              r"[\d,]+ pairs/s", r"wait \d+%", r"eta [\d:]+( s)?"]
    shown = live[1].split("  ")  # a fast machine has longer numbers and fewer fields, none of them cut
    assert 5 <= len(shown) and all(re.fullmatch(field, text) for field, text in zip(fields, shown, strict=False)), shown
    shown = on_screen(said)
    assert [line for line in shown if re.match(r"step \d/6 ", line)] == [
        line for line in shown if line.startswith("step 6/6")]  # the last one stays, the others are gone
    assert any(line.startswith(f"report      {out / 'report.html'}") for line in shown)
    assert any(line.startswith("TensorBoard tensorboard --logdir") for line in shown)


def test_quiet_keeps_what_was_damaged(capsys: pytest.CaptureFixture[str]) -> None:
    """A run of a job queue that is --quiet would train on without a word after half of its log was lost."""
    WORLD.say("progress")
    WORLD.warn("steps.jsonl was damaged")
    assert capsys.readouterr().err.strip(CLEAR + "\n") == "steps.jsonl was damaged"


def test_points_of_the_projector_have_one_line_each_that_no_terminal_obeys(tmp_path: Path) -> None:
    """A title with a tab or a line end would shift all labels after it to other points."""
    writer = TensorBoardWriter(tmp_path, 0, 1)
    titles = ["a\tb\nc", "\x1b]0;title\x07", "https://h/x?sig=SECRET"]
    sprites = np.zeros((4, 4, 3), np.uint8)
    writer.embedding("base", torch.zeros(3, 2), [(title, "image") for title in titles], sprites, 0)
    writer.close()
    lines = (tmp_path / "00000" / "base" / "metadata.tsv").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5 and all(line.count("\t") == 1 for line in lines[:4])
    assert "\x1b" not in "".join(lines) and "SECRET" not in "".join(lines)


def test_a_folder_deleted_under_a_shell_and_full_disks_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capfd: pytest.CaptureFixture[str]) -> None:
    """A shell in a deleted folder: MKL ended the process; a crash on full disks: a second traceback in its place."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", list)
        assert "the traceback could not be written" in crash.explain_crash("train", ValueError("odd"), 0)
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["check", "--dataset", str(tmp_path)])
    assert "current folder cannot be used: No such file or directory" in capfd.readouterr().err
