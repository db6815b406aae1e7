"""run.py as a user starts it: real processes, real torchrun, a loopback hub, and the folder a run leaves behind."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import inside, last_flags, make_pairs, run
from hub import Hub
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parents[4] / "shared"
METRICS = {f"{way}_{name}" for way in ("image_to_text", "text_to_image")
           for name in ("R@1", "R@5", "R@10", "median_rank", "mean_rank", "mrr")} | {"triplet_accuracy"}
SIZES = {"pairs", "units", *(f"{way}_{kind}" for way in ("image_to_text", "text_to_image")
                             for kind in ("queries", "candidates"))}


def read_steps(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def train(pairs: Path, model: Path, out: Path, *flags: str, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Run in fp32 with a cache of its own beside `out`; the exported weights."""
    args = last_flags(["--model", model, "--dataset", pairs, "--out", out, "--cache-dir", out.parent / "cache",
                       "--precision", "fp32", "--lr", "1e-3", *flags])
    done = inside(args) if ranks == 1 else run(args, ranks)
    assert done.returncode == 0, done.stderr
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_run_is_the_reference_recipe(ranks: int, hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    done = run(["--allow-host", "127.0.0.1", "--cache-dir", tmp_path / "cache"], ranks, hub.env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    thumbs = [asked.path for asked in hub.requests if asked.path.startswith("/thumbs/") and asked.method == "GET"]
    assert len(thumbs) == len(set(thumbs)) == 53 + 11 + 12  # no URL twice, whatever the number of ranks
    (out,) = (tmp_path / "runs").iterdir()
    written = {path.name for path in out.iterdir()}
    assert {"config.json", "steps.jsonl", "metrics.json", "ledger.jsonl", "tensorboard", "checkpoints",
            "model"} <= written
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["epochs"] == 2 and config["devices"]["ranks"] == ranks
    steps = read_steps(out)
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert [step["rows"] for step in steps] == [16, 16, 16, 5] * 2
    assert [step["lr"] for step in steps] == pytest.approx([1e-4 * (8 - k) / 8 for k in range(8)])
    metrics = json.loads((out / "metrics.json").read_text())
    for when in ("base", "tuned"):
        assert list(metrics[when]) == ["train", "valid", "test"]
        for scores in metrics[when].values():
            assert set(scores) == METRICS | {f"{name}_ci95" for name in METRICS} | SIZES | {"collapsed"}
            assert scores["collapsed"] is False and scores["units"] <= scores["pairs"]
            assert all(scores[f"{n}_ci95"][0] <= scores[n] <= scores[f"{n}_ci95"][1] for n in METRICS)
    assert (out / "checkpoints" / "last").resolve().name == "step-00000008"
    assert "| test  | triplet accuracy" in done.stdout
    assert re.search(r"parameters train \(\d+\.\d\d %\): visual_projection.weight, text_projection.weight", done.stderr)


def test_layers_inside_a_tower_train_alike_on_any_number_of_ranks(pairs: Path, tiny_model: Path,
                                                                  tmp_path: Path) -> None:
    flags = "--trainable", "projection,vision_model.post_layernorm", "--epochs", "1"
    one = train(pairs, tiny_model, tmp_path / "one", *flags)
    base = load_file(tiny_model / "model.safetensors")
    changed = {name for name in one if not torch.equal(one[name], base[name])}
    assert changed == {"visual_projection.weight", "text_projection.weight", "vision_model.post_layernorm.weight",
                       "vision_model.post_layernorm.bias"}
    two = train(pairs, tiny_model, tmp_path / "two", *flags, ranks=2)
    for name in changed:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)


def test_everything_trains(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    tuned = train(pairs, tiny_model, tmp_path / "run", "--trainable", "all,logit_scale", "--epochs", "1",
                  "--batch-size", "37")  # the whole split: one step an epoch
    base = load_file(tiny_model / "model.safetensors")
    assert not any(torch.equal(tuned[name], base[name]) for name in base if "position_ids" not in name)
    assert [step["rows"] for step in read_steps(tmp_path / "run")] == [37]


def test_resume_equals_uninterrupted(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = "--save-every", "2", "--keep", "9"
    whole = train(pairs, tiny_model, tmp_path / "whole", *flags)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, symlinks=True)
    for late in ("model", "checkpoints/last", "checkpoints/best"):
        shutil.rmtree(cut / late) if (cut / late).is_dir() and late == "model" else (cut / late).unlink(missing_ok=True)
    checkpoints = sorted((cut / "checkpoints").iterdir())
    assert [int(path.name[-2:]) for path in checkpoints] == [2, 3, 4, 6]  # 3, where an epoch ends, was the best
    shutil.rmtree(checkpoints[3])
    shutil.rmtree(checkpoints[1])
    weights = checkpoints[2] / "trainable.safetensors"  # damaged: step 2, in mid-epoch, is the newest valid one
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with (cut / "steps.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    done = run(["--resume", "--out", cut, "--model", tiny_model, "--dataset", pairs])
    assert done.returncode == 0, done.stderr
    assert "step-00000004/trainable.safetensors is not what was written" in done.stderr
    again = load_file(cut / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert read_steps(cut) == read_steps(tmp_path / "whole")
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((tmp_path / "whole/metrics.json").read_text())
    (cut / "metrics.json").write_text(json.dumps({"base": json.loads((cut / "metrics.json").read_text())["base"]}))
    assert run(["--resume", "--out", cut]).returncode == 0  # nothing left to train, the last evaluation was cut off
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((tmp_path / "whole/metrics.json").read_text())
    refused = run(["--resume", "--out", cut, "--lr", "5"])
    assert refused.returncode == 2 and "--lr 0.001" in refused.stderr


def test_bad_rows_are_dropped_and_accounted_for(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 40, 8, 8)
    path = pairs / "train.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (pairs / rows[3]["image"]).write_bytes(b"<html>not found</html>")
    (pairs / rows[5]["image"]).unlink()
    rows[8]["title"] = " "
    rows[9]["title_neg"] = ""  # no negative: the row stays
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"]
    strict = inside(flags)
    assert strict.returncode == 2 and "3 of 56 rows cannot be used" in strict.stderr and "--max-bad" in strict.stderr
    assert not (tmp_path / "run").exists()
    for ranks in (1, 2):
        done = run([*flags, "--max-bad", "0.1"], ranks)
        assert done.returncode == 0, done.stderr
        ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
        assert [(entry["row"], entry["reason"]) for entry in ledger] == [
            (3, "not-image"), (5, "missing-file"), (8, "no-title")]
        assert sum(step["rows"] for step in read_steps(tmp_path / "run")) == 2 * (40 - len(ledger))
        shutil.rmtree(tmp_path / "run")


def test_a_collapse_fails_eval_and_is_named_by_a_run(pairs: Path, tiny_model: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Every title the same used to read Recall@1 = 1.000, and such a checkpoint became `best`."""
    monkeypatch.setattr("eval.retrieval.equal_rows", lambda *_: True)
    flags: list[str | Path] = ["--dataset", pairs]
    flags += ["--model", tiny_model, "--cache-dir", tmp_path / "cache", "--precision", "fp32"]
    done = inside(["eval", *flags])
    assert done.returncode == 1 and json.loads(done.stdout)["test"]["collapsed"] is True
    assert "run.py eval: test: the model has collapsed: all" in done.stderr
    done = inside([*flags, "--out", tmp_path / "run", "--epochs", "1"])
    assert done.returncode == 0, done.stderr
    assert "warning: valid: the model has collapsed" in done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["base"]["test"]["collapsed"]
    assert "base has collapsed on test" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_eval_prints_what_a_run_measures(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    train(pairs, tiny_model, tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for model, when in ((tiny_model, "base"), (tmp_path / "run" / "model", "tuned")):
        done = inside(["eval", "--model", model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--precision",
                       "fp32"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"test": metrics[when]["test"]}
        assert "triplet accuracy" in done.stderr
    done = inside(["eval", "--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--precision",
                   "fp32", "--split", "all"])
    assert json.loads(done.stdout) == metrics["base"]


def test_profile_names_the_regions(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    train(pairs, tiny_model, tmp_path / "run", "--profile")
    (trace,) = (tmp_path / "run" / "profile").glob("*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"load", "project", "loss", "backward", "optim"} <= names


def test_settings_come_from_toml_and_flags_win(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('epochs = 3\nbatch-size = 10\nlr = 1\ntrainable = ["visual_projection"]\n')
    train(pairs, tiny_model, tmp_path / "run", "--config", str(recipe), "--epochs", "1")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["epochs"], config["batch_size"], config["lr"]) == (1, 10, 1e-3)
    recipe.write_text("epoch = 3\n")
    done = inside(["--config", recipe])
    assert done.returncode == 2 and "did you mean epochs" in done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="the real data is not here")
def test_real_pairs_are_learned(tmp_path: Path) -> None:
    done = run(["--model", SHARED / "models/clip-small", "--dataset", SHARED / "data/openstax-titles", "--out",
                tmp_path / "run", "--cache-dir", tmp_path / "cache", "--epochs", "50", "--batch-size", "128", "--lr",
                "1e-3", "--log-every", "100"], ranks=2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for split in ("train", "test"):
        base, tuned = (metrics[when][split]["image_to_text_median_rank"] for when in ("base", "tuned"))
        assert tuned < base


def test_shards_hold_what_the_folder_held(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--max-bad", "0.1", "--dataset", pairs, "--cache-dir", tmp_path / "cache"]
    for out, resize in ((tmp_path / "shards", []), (tmp_path / "small", ["--resize", "64"])):
        for _ in range(2):  # the second time there is nothing left to do
            done = inside(["shards", *flags, "--out", out, *resize])
            assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in out.glob("*.tar")) == [
            "test-000000.tar", "train-000000.tar", "valid-000000.tar"]
        assert (out / "ledger.jsonl").read_text() == ""
    from_folder = train(pairs, tiny_model, tmp_path / "one")
    from_shards = train(tmp_path / "shards", tiny_model, tmp_path / "two")
    assert all(torch.equal(from_folder[name], from_shards[name]) for name in from_folder)


def test_mined_negatives_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 40, 8, 8, negatives=False)
    plain = train(pairs, tiny_model, tmp_path / "plain")
    mined = [train(pairs, tiny_model, tmp_path / mode, "--mine-negatives", "hard", "--mode", mode)
             for mode in ("cached", "streaming")]
    name = "text_projection.weight"
    assert not torch.equal(plain[name], mined[0][name])
    torch.testing.assert_close(mined[0][name], mined[1][name], atol=1e-5, rtol=0)
    scores = {out: json.loads((tmp_path / out / "metrics.json").read_text())["tuned"]["test"]
              for out in ("plain", "cached")}
    assert "triplet_accuracy" not in scores["plain"] and "triplet_accuracy" in scores["cached"]


def test_a_lone_split_is_the_same_three_in_every_command(tiny_model: Path, tmp_path: Path) -> None:
    """Else `eval` or `search` answer from rows that the model was trained on, and `check` checks another split."""
    pairs = make_pairs(tmp_path / "pairs", 40, 1, 1, negatives=False)
    (pairs / "valid.csv").unlink()
    (pairs / "test.csv").unlink()
    rows = list(csv.reader((pairs / "train.csv").open(newline="")))[1:]
    for row in range(20, 40):  # the first 20 pictures again, under another name and in other letters
        shutil.copy(pairs / rows[row - 20][0], pairs / rows[row][0])
        rows[row][1] = rows[row - 20][1].upper() if row % 2 else rows[row][1]
    (pairs / "images/train-0005.jpg").write_bytes(b"not a picture")
    with (pairs / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "title"), *rows])
    flags: list[str | Path] = ["--dataset", pairs, "--cache-dir", tmp_path / "cache"]
    model: list[str | Path] = ["--model", tiny_model, "--precision", "fp32"]
    checked = inside(["check", *flags, "--json"])
    found = json.loads(checked.stdout)
    assert found["rows"] == {"train": 28, "valid": 6, "test": 6}
    assert not [one for one in found["findings"] if "-in-" in one["kind"] and "similar" not in one["kind"]]
    trained = inside([*flags, *model, "--epochs", "1", "--batch-size", "4", "--out", tmp_path / "run"])
    assert trained.returncode == 0, trained.stderr
    kept = ", ".join(f"{name} {count}" for name, count in found["usable"].items())
    assert f"pairs: {kept}; 1 rows dropped" in trained.stderr and "overlap:" not in trained.stderr
    measured = json.loads((tmp_path / "run/metrics.json").read_text())["base"]["test"]
    evaluated = inside(["eval", *flags, *model, "--split", "test"])
    assert json.loads(evaluated.stdout)["test"] == measured
    assert inside(["shards", *flags, "--out", tmp_path / "tar"]).returncode == 0
    packed = inside(["eval", *flags[2:], *model, "--dataset", tmp_path / "tar", "--split", "test"])
    assert json.loads(packed.stdout)["test"] == measured
    searched = inside(["search", *flags, *model, "--split", "test", "--json", "--top", "99", "words"])
    answers = json.loads(searched.stdout)["queries"][0]["answers"]
    assert {answer["split"] for answer in answers} == {"test"}
    names = {Path(answer["image"]).name for answer in answers}
    assert names <= {Path(row[0]).name for row in rows} and 3 <= len(answers) <= 6


def test_splits_that_overlap_are_said_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """Else figures of test rows that were trained on pass for figures of new ones."""
    pairs = make_pairs(tmp_path / "pairs", 12, 4, 6, negatives=False)
    train_rows, test_rows = (list(csv.reader((pairs / f"{name}.csv").open(newline=""))) for name in ("train", "test"))
    test_rows[1][1] = train_rows[3][1].upper()
    shutil.copy(pairs / train_rows[4][0], pairs / test_rows[2][0])
    test_rows[3] = [train_rows[5][0], f" {train_rows[5][1]}"]
    with (pairs / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(test_rows)
    flags: list[str | Path] = ["--dataset", pairs, "--model", tiny_model, "--cache-dir", tmp_path / "cache"]
    done = inside([*flags, "--out", tmp_path / "run", "--epochs", "1", "--batch-size", "4", "--precision", "fp32"])
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("overlap: ")]
    assert line == "overlap: of 6 test rows 2 have an image of train, 2 a title, 1 are whole rows of it"
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["overlap"] == {"test": {"train": {"images": 2, "titles": 2, "rows": 1}}}
    page = re.sub("<[^>]+>", "", (tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert "of 6 test rows 2 have an image of train, 2 a title, 1 are whole rows of it" in page
    found = json.loads(inside(["check", *flags[:2], *flags[4:6], "--json"]).stdout)["findings"]
    counts = {one["kind"]: one["count"] for one in found if one["split"] == "test"}
    assert counts["image-in-train"] == counts["title-in-train"] == 2


def test_a_lone_test_split_is_measured_and_trained_on_where_it_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Else training on a test split needs files to be renamed, or a test split is trained on without a word."""
    pairs = make_pairs(tmp_path / "pairs", 1, 1, 20, negatives=False)
    (pairs / "train.csv").unlink()
    (pairs / "valid.csv").unlink()
    flags: list[str | Path] = ["--dataset", pairs, "--model", tiny_model, "--cache-dir", tmp_path / "cache",
                               "--precision", "fp32"]
    assert inside(["eval", *flags]).returncode == 0
    more: list[str | Path] = ["--epochs", "1", "--batch-size", "4", "--out", tmp_path / "run"]
    refused = inside([*flags, *more])
    assert refused.returncode == 2 and "it has test; --splits train=test trains on it" in refused.stderr
    done = inside([*flags, *more, "--splits", "train=test"])
    assert done.returncode == 0 and "one split of 20 rows, made three" in done.stderr


def test_class_names_are_trained_on_and_the_table_says_zero_shot(tiny_model: Path, tmp_path: Path) -> None:
    """Else an accuracy over classes passes for retrieval among captions, and `check` calls every title a repeat."""
    pairs = make_pairs(tmp_path / "pairs", 24, 1, 1, negatives=False)
    rows = list(csv.reader((pairs / "train.csv").open(newline="")))[1:]
    for name in ("train", "valid", "test"):
        (pairs / f"{name}.csv").unlink()
    with (pairs / "classes.csv").open("w", newline="") as file:
        labels = [("big_cat", "dog", "Red Fox")[row % 3] for row in range(len(rows))]
        csv.writer(file).writerows([("image", "label"), *zip([row[0] for row in rows], labels, strict=True)])
    flags: list[str | Path] = ["--dataset", pairs / "classes.csv", "--cache-dir", tmp_path / "cache", "--template",
                               "a photo of a {},a {}."]
    done = inside([*flags, "--model", tiny_model, "--precision", "fp32", "--epochs", "1", "--batch-size", "8",
                   "--out", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    assert "the images of each of 3 classes apart: train 36, valid 6, test 6" in done.stderr
    line = "class names in train (3 classes), valid (3 classes), test (3 classes): image to text R@1 is the zero-shot"
    assert line in done.stdout and line in (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    found = json.loads(inside(["check", *flags, "--json"]).stdout)
    assert not [one for one in found["findings"] if one["kind"].startswith(("repeated-title", "title-in"))]


def test_shards_of_several_templates_are_refused(tmp_path: Path) -> None:
    """Shards do not say which titles are of one class: these became negatives of each other."""
    done = inside(["shards", "--dataset", tmp_path, "--out", tmp_path / "tar", "--template", "a {},the {}"])
    assert done.returncode == 2 and "give it to train" in done.stderr
