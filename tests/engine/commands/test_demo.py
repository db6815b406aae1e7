"""The demo's pairs are deterministic and leak nothing; tuning on them shows on pairs never seen, on two ranks."""

import csv
import json
from pathlib import Path

from helpers import run
from make_demo_model import BACKDROPS, CAPTIONS, new_demo_model, write_pretraining
from PIL import Image

from data.demo.demo import TITLES, write_demo

COUNTS = {"train": 60, "valid": 20, "test": 20}


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        write_demo(tmp_path / name, COUNTS, seed)
    for split in COUNTS:
        assert rows(tmp_path / "one", split) == rows(tmp_path / "two", split) != rows(tmp_path / "other", split)
    for row in rows(tmp_path / "one", "test"):
        one, two = (Image.open(tmp_path / name / row["image"]) for name in ("one", "two"))
        assert one.tobytes() == two.tobytes()


def test_no_title_leaks_and_negatives_are_wrong(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", {"train": 300, "valid": 60, "test": 60})
    titles = {split: {row["title"] for row in rows(tmp_path / "demo", split)} for split in COUNTS}
    assert not titles["train"] & (titles["valid"] | titles["test"]) and not titles["valid"] & titles["test"]
    assert len(titles["train"]) < 300  # some repeat, as in real uploads
    for split in COUNTS:
        assert all(row["title_neg"] != row["title"] and row["title_neg"] in titles[split]
                   for row in rows(tmp_path / "demo", split))


def test_pretraining_can_be_written_again(tmp_path: Path) -> None:
    write_pretraining(tmp_path / "mixed", 40, (CAPTIONS, TITLES))
    write_pretraining(tmp_path / "backdrops", 40, (BACKDROPS,), seed=1)
    assert len(rows(tmp_path / "mixed", "train")) == len(rows(tmp_path / "backdrops", "train")) == 40
    new_demo_model(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 4_000_000


def test_the_demo_learns_on_two_ranks(tmp_path: Path) -> None:
    done = run(["demo", "--cache-dir", tmp_path / "cache", "--out", tmp_path / "run"], ranks=2)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    base, tuned = metrics["base"]["test"], metrics["tuned"]["test"]
    for name in ("image_to_text_R@10", "text_to_image_R@10", "triplet_accuracy"):
        assert tuned[f"{name}_ci95"][0] > base[f"{name}_ci95"][1], (name, base[name], tuned[name])
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
