"""Sweep: what is tried, the same results whatever happens around them, and a test split that is not looked at."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_pairs, run
from safetensors.torch import load_file

import run as command_line
from data.batch import UserError
from engine.config.fields import Config
from engine.config.settings import read_toml
from engine.ranks.world import World
from engine.sweep.space import Range, configurations, read_space
from engine.sweep.trials import Journal
from eval.leaderboard import average_over_runs, leaderboard, score_configuration
from eval.metrics import Ranks, Retrieval, Triplets

SPACE = "lr=1e-3,1e-2 epochs=1,3"


def tried(**settings: Any) -> list[dict[str, Any]]:
    return configurations(replace(Config(), **settings))


def test_the_space_is_read_by_the_kind_of_each_setting() -> None:
    found = read_space("--lr=1e-4..1e-2:log batch-size=8..64 schedule=linear,cosine warmup=0,0.1")
    assert found == {"lr": Range(1e-4, 1e-2, True, False), "batch_size": Range(8, 64, False, True),
                     "schedule": ["linear", "cosine"], "warmup": [0.0, 0.1]}


@pytest.mark.parametrize(("space", "trials", "answer"), [
    ("", 0, "--space"), ("lr", 0, "lr is no setting with values"), ("lr=", 0, "no setting with values"),
    ("epoch=1,2", 0, "did you mean epochs"), ("out=a,b", 0, "unknown setting out"), ("epochs=1,two", 0, "epochs=1,two"),
    ("lr=1e-2..1e-4", 9, "LOW below HIGH"), ("lr=0..1:log", 9, "above 0 for log"), ("lr=0..1:lin", 9, ":log"),
    ("schedule=a..b", 9, "list the values"), ("lr=1e-4..1e-2:log", 0, "--trials N"),
    ("schedule=linear,cubic", 0, "cubic"), ("epochs=0,1", 0, "epochs 0"), ("interpolate=auto", 0, "interpolate=0.5"),
])
def test_a_space_that_cannot_be_is_answered_with_the_fix(space: str, trials: int, answer: str) -> None:
    with pytest.raises(UserError, match=answer.replace("(", r"\(")):
        tried(space=space, trials=trials)


def test_auto_is_not_swept() -> None:
    """Its settings would have been the reference's, under another name."""
    with pytest.raises(UserError, match="searches by itself"):
        tried(space="duplicates=mask,keep", recipe="auto")


def test_a_grid_is_every_combination_after_the_settings_as_given() -> None:
    found = tried(space="lr=1e-3,1e-4 epochs=2,10")  # the reference's own lr and epochs are not tried twice
    assert found == [{}, {"lr": 1e-3, "epochs": 2}, {"lr": 1e-3, "epochs": 10}, {"lr": 1e-4, "epochs": 10}]


def test_draws_are_seeded_distinct_and_extended_by_more_trials() -> None:
    wide = {"space": "lr=1e-4..1e-2:log epochs=1..9 scale=10,20", "trials": 40}
    found = tried(**wide)
    assert found == tried(**wide) != tried(**wide, seed=1) and tried(**{**wide, "trials": 9}) == found[:10]
    assert len({json.dumps(settings) for settings in found}) == 41
    for settings in found[1:]:
        assert 1e-4 <= settings["lr"] <= 1e-2 and settings["epochs"] in range(1, 10)
    assert sum(settings["lr"] < 1e-3 for settings in found[1:]) in range(10, 31)
    assert len(tried(space="epochs=1..3", trials=50)) == 3  # there are no more; 2, as given, is tried once


def held_out(image_rank: list[int], title_row: list[int], title_rank: list[int]) -> Retrieval:
    """What is found on a fold whose images all differ; images that share a title are one unit."""
    row_U, row_W = torch.arange(len(image_rank)), torch.tensor(title_row)
    unit_U = row_W[torch.searchsorted(row_W, row_U, right=True) - 1]
    return Retrieval(Ranks(torch.tensor(image_rank), row_U, unit_U, len(row_W)),
                     Ranks(torch.tensor(title_rank), row_W, row_W, len(row_U)), None, len(row_U), len(row_W))


def test_queries_are_averaged_over_the_runs_that_held_them_out() -> None:
    """Rows 0 and 3 share a title, so it is one query and they are one unit; row 1 is in the other fold."""
    first, second = torch.tensor([0, 3]), torch.tensor([1, 2])
    runs = [(first, held_out([0, 1], [0], [0])), (second, held_out([0, 2], [0, 1], [1, 0])),
            (first, held_out([3, 1], [0], [0])), (second, held_out([1, 2], [0, 1], [1, 3]))]
    value_Q, unit_Q = average_over_runs(runs, 4, "image_to_text_mrr")
    want = [(1 + 1 / 4) / 2, (1 + 1 / 2) / 2, 1 / 3, 1 / 2]
    torch.testing.assert_close(value_Q, torch.tensor(want, dtype=torch.float64))
    assert unit_Q.tolist() == [0, 1, 2, 0]
    value_Q, unit_Q = average_over_runs(runs, 4, "text_to_image_mrr")
    torch.testing.assert_close(value_Q, torch.tensor([1, 1 / 2, (1 + 1 / 4) / 2], dtype=torch.float64))
    assert unit_Q.tolist() == [0, 1, 2]
    found = score_configuration(runs, runs, 4, "image_to_text_mrr")
    assert found["scores"]["image_to_text_mrr"] == pytest.approx(sum(want) / 4)
    assert found["scores"]["image_to_text_median_rank"] == pytest.approx((1.5 + 2 + 3 + 2.5) / 4)
    assert found["difference"]["value"] == 0 and found["difference"]["p"] == 1
    with pytest.raises(UserError, match="median_rank; choose one of image_to_text_R@1"):
        average_over_runs(runs, 4, "image_to_text_median_rank")


def test_a_fold_without_hard_negatives_does_not_stop_a_sweep_by_triplet_accuracy() -> None:
    """With few negatives in the data some folds hold none; the sweep was refused after its first configuration."""
    given = Triplets(torch.tensor([True, False]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with_negatives = replace(held_out([0, 1], [0, 1], [0, 1]), triplets=given)
    runs = [(torch.tensor([0, 3]), held_out([0, 1], [0, 1], [0, 1])), (torch.tensor([1, 2]), with_negatives)]
    value_Q, unit_Q = average_over_runs(runs, 4, "triplet_accuracy")
    assert value_Q.tolist() == [1, 0] and unit_Q.tolist() == [1, 2]
    assert score_configuration(runs, runs, 4, "triplet_accuracy")["scores"]["triplet_accuracy"] == 0.5
    with pytest.raises(UserError, match="cannot compare runs by triplet_accuracy"):
        average_over_runs(runs[:1], 4, "triplet_accuracy")


def test_every_negative_of_a_row_counts_in_a_sweep_by_triplet_accuracy() -> None:
    """A row with two negatives was counted by the second one alone."""
    def result(correct: list[bool], rows: list[int]) -> Retrieval:
        triplets = Triplets(torch.tensor(correct), torch.tensor(rows), torch.tensor(rows))
        return replace(held_out([0, 1], [0, 1], [0, 1]), triplets=triplets)

    first, second = torch.tensor([0, 3]), torch.tensor([1, 2])
    runs = [(first, result([True, False, True], [0, 0, 1])), (second, result([False, False, True], [0, 1, 1])),
            (first, result([True, True, True], [0, 0, 1])), (second, result([True, False, False], [0, 1, 1]))]
    value_Q, unit_Q = average_over_runs(runs, 4, "triplet_accuracy")
    wanted = {0: [0.5, 1.0], 1: [0.5], 2: [0.0, 0.5], 3: [1.0]}
    for row, values in wanted.items():
        assert sorted(value_Q[unit_Q == row].tolist()) == values
    assert len(value_Q) == 6


def test_a_configuration_that_collapsed_in_a_run_is_listed_and_never_first(tmp_path: Path) -> None:
    """A sweep that crowns it exports a model that answers everything alike."""
    rows, good = torch.tensor([0, 1]), held_out([1, 1], [0, 1], [1, 1])
    flat = replace(held_out([0, 0], [0, 1], [0, 0]), collapsed="the model has collapsed: all alike")
    journal = Journal(tmp_path, World(0, 0, 1, torch.device("cpu")), {}, "image_to_text_mrr", False)
    runs: dict[float, list[tuple[torch.Tensor, Retrieval | None]]] = {
        1.0: [(rows, good), (rows, flat)], 2.0: [(rows, good), (rows, None)], 3.0: [(rows, good), (rows, good)]}
    for lr, held in runs.items():
        journal.add({"lr": lr}, score_configuration(held, runs[3.0], 2, "image_to_text_mrr"))
    lines = journal.best_first()
    assert [line["settings"]["lr"] for line in lines] == [3.0, 1.0, 2.0]
    assert "all alike" in lines[1]["collapsed"] and "NaN" in lines[2]["collapsed"]
    table = leaderboard(lines, ["c", "a", "b"], "image_to_text_mrr")
    assert table.count("collapsed") == 2 and table.splitlines()[2].startswith("| 1 | c ")
    with pytest.raises(UserError, match="NaN or infinity; choose another --model"):
        score_configuration(runs[3.0], runs[2.0], 2, "image_to_text_mrr")


def sweep(pairs: Path, model: Path, out: Path, *flags: str) -> dict[str, Any]:
    """Sweep in this process; sweep.json and the metrics on test."""
    code = command_line.main(["sweep", "--model", str(model), "--dataset", str(pairs), "--precision", "fp32",
                              "--cache-dir", str(out.parent / "cache"), "--out", str(out), "--space", SPACE,
                              "--folds", "3", "--seeds", "2", *flags])
    assert code == 0
    return {name: json.loads((out / f"{name}.json").read_text()) for name in ("sweep", "metrics")}


@pytest.fixture(scope="module")
def swept(pairs: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("sweep") / "one"
    return out, sweep(pairs, tiny_model, out)


def test_a_sweep_leaves_a_leaderboard_a_recipe_and_a_model(swept: tuple[Path, dict[str, Any]], pairs: Path,
                                                           tiny_model: Path, tmp_path: Path) -> None:
    out, found = swept
    lines = found["sweep"]["configurations"]
    scores = [line["scores"]["image_to_text_mrr"] for line in lines]
    assert len(lines) == 5 and scores == sorted(scores, reverse=True) and {} in [line["settings"] for line in lines]
    recipe = read_toml(out / "recipe.toml")
    assert {**recipe, **lines[0]["settings"]} == recipe
    assert list(found["metrics"]["tuned"]) == ["test"] and set(found["metrics"]) == {"base", "tuned", "difference"}
    assert len(list((out / "tensorboard").glob("0*"))) == 5
    # the recipe, run on all rows but test's, is the model that the sweep has left
    both = tmp_path / "both"
    shutil.copytree(pairs, both)
    texts = [(both / f"{split}.csv").read_text() for split in ("train", "valid")]
    (both / "train.csv").write_text(texts[0] + texts[1].split("\n", 1)[1])
    (both / "valid.csv").unlink()
    assert command_line.main(["--config", str(out / "recipe.toml"), "--model", str(tiny_model), "--dataset", str(both),
                              "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--precision",
                              "fp32"]) == 0
    ours, again = (load_file(folder / "model" / "projections.safetensors") for folder in (out, tmp_path / "run"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["tuned"]["test"] == found["metrics"]["tuned"]["test"]


def test_what_is_found_does_not_depend_on_the_test_split(swept: tuple[Path, dict[str, Any]], pairs: Path,
                                                         tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pairs, other)
    with (other / "test.csv").open("w", newline="", encoding="utf-8") as file:
        image = next((other / "images").glob("test-*")).relative_to(other)
        csv.writer(file).writerows([["image", "title", "title_neg"], [image, "something else", "and not this"]])
    found = sweep(other, tiny_model, tmp_path / "out")
    assert found["sweep"] == swept[1]["sweep"] and found["metrics"] != swept[1]["metrics"]


def test_ranks_share_the_runs_and_a_cut_off_sweep_goes_on(swept: tuple[Path, dict[str, Any]], pairs: Path,
                                                         tiny_model: Path, tmp_path: Path) -> None:
    out, found = swept
    lines = (out / "sweep.jsonl").read_text()
    flags = ["sweep", "--model", tiny_model, "--dataset", pairs, "--precision", "fp32", "--cache-dir",
             tmp_path / "cache", "--out", tmp_path / "two", "--space", SPACE, "--folds", "3", "--seeds", "2"]
    done = run(flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "sweep.jsonl").read_text() == lines
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(out / "config.json", cut)
    kept = lines.splitlines(keepends=True)[:3]
    (cut / "sweep.jsonl").write_text("".join(kept) + lines.splitlines()[3][:50])
    assert command_line.main(["sweep", "--resume", "--out", str(cut), "--cache-dir", str(tmp_path / "cache")]) == 0
    assert (cut / "sweep.jsonl").read_text() == lines
    assert json.loads((cut / "metrics.json").read_text()) == found["metrics"]


def test_a_sweep_resumed_with_other_data_is_refused_and_keeps_its_journal(
        swept: tuple[Path, dict[str, Any]], pairs: Path, tiny_model: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped --dataset deleted the results of a night."""
    folder, other = tmp_path / "sweep", tmp_path / "other"
    folder.mkdir()
    shutil.copytree(pairs, other)
    first, second, *_ = sorted((other / "images").glob("train-*"))
    shutil.copy(first, second)
    for name in ("config.json", "sweep.jsonl"):
        shutil.copy(swept[0] / name, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert command_line.main(["sweep", "--resume", "--out", str(folder), "--dataset", str(other), "--cache-dir",
                              str(tmp_path / "cache")]) == 2
    assert "other values of the data of train; resume it with" in capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_batch_too_large_for_a_fold_is_known_before_any_run(tiny_model: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    pairs = make_pairs(tmp_path / "pairs", 20, 6, 6)
    assert command_line.main(["sweep", "--model", str(tiny_model), "--dataset", str(pairs), "--cache-dir",
                              str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--folds", "2", "--space",
                              "batch_size=8,16"]) == 2
    assert "at most --batch-size 13" in capsys.readouterr().err and not (tmp_path / "out" / "sweep.jsonl").exists()
