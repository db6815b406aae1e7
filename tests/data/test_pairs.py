"""A dataset is opened again without reading what has not changed, and what has changed is seen."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import make_pairs, noting, tiny_clip

from data.batch import ALONE
from data.cold import Encoders, Pipeline, Reader
from data.identity import overlap
from data.images.decode import ImageSpec
from data.pairs import Pairs, open_pairs
from data.sources.source import load_splits
from data.web.fetched import Fetched
from data.web.limits import FetchPolicy
from engine.loss import Candidates, Objective

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for Pillow's


def opened(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, stored: bool = True) -> tuple[Pairs, set[str]]:
    """The pairs of a folder, and which files were read for them; without `stored` features they stream."""
    from transformers import CLIPProcessor

    taken = set[str]()
    with monkeypatch.context() as patch:
        note = noting(Reader.read, lambda self, reference: taken.add(Path(reference).name))
        patch.setattr(Reader, "read", note)
        tokenizer = CLIPProcessor.from_pretrained(folder.parent / "cache/model").tokenizer
        encoders = Encoders(lambda pixels: pixels.float().mean((2, 3)), lambda tokens: tokens.ids_BL[:, :1].float(),
                            3, 1, "images-" + "0" * 8, "titles-" + "0" * 8, stored, tokenizer, 77)
        reader = Reader(cache / "fetched", ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2)
        pipeline = Pipeline(reader, encoders, ALONE, cache, torch.device("cpu"), print)
        pairs = open_pairs(load_splits(str(folder)), [], pipeline, 0.5, "off", ["valid"])
    return pairs, taken


def test_captions_of_one_picture_are_no_negatives_of_each_other(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else training pushes a picture away from four of its five right captions."""
    cache, folder = tmp_path / "cache", make_pairs(tmp_path / "pairs", 4, 3, 3, negatives=False)
    tiny_clip(cache / "model")
    rows = [{"image": f"images/train-000{n}.jpg", "caption": [f"caption {k} of {n}" for k in range(5)]}
            for n in range(4)]
    (folder / "train.csv").unlink()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, _ = opened(folder, cache, monkeypatch)
    assert pairs.splits["train"].image_N.tolist() == [n for n in range(4) for _ in range(5)]
    features = pairs.feature_splits(["train"])["train"].features(torch.arange(20))
    vectors = torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)
    candidates = Candidates(vectors, features.title_id_B, features.image_id_B)
    target_RC, ignored_RC = Objective().targets(candidates, 0, 20)
    sibling_RC = torch.arange(20)[:, None] // 5 == torch.arange(20) // 5
    assert torch.equal(target_RC, torch.eye(20)) and torch.equal(ignored_RC, sibling_RC ^ torch.eye(20).bool())


def test_equal_titles_and_pictures_have_one_number_and_one_feature(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a title in capitals, which has the same embedding, is a negative in the loss and a rival in the figures."""
    cache, folder = tmp_path / "cache", make_pairs(tmp_path / "pairs", 6, 3, 3, negatives=False)
    tiny_clip(cache / "model")
    image, title = (folder / "train.csv").read_text().splitlines()[1].split(",")
    (folder / "images/copy.png").write_bytes((folder / image).read_bytes())
    lines = ["image,title,title_neg", f"{image},{title},a", f"images/copy.png,{title.upper()}  ,{title.title()}",
             f"images/train-0001.jpg,A,  {title}"]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    (folder / "test.csv").write_text(f"image,title\nimages/copy.png,{title.swapcase()}\nimages/test-0001.jpg, a\n")
    pairs, _ = opened(folder, cache, monkeypatch)
    train, test = pairs.splits["train"], pairs.splits["test"]
    assert train.image_N.tolist() == [0, 0, 1] and train.negative_N is not None
    assert train.title_N[0] == train.title_N[1] == train.negative_N[1] == train.negative_N[2] == test.title_N[0]
    assert train.negative_N[0] == train.title_N[2] == test.title_N[1]
    assert overlap(pairs.contents) == {"test": {"train": {"images": 1, "titles": 2, "rows": 1}}}
    assert pairs.album.title("train", 1) == f"{title.upper()}  "  # shown as the row spells it
    assert "5 titles encoded" in pairs.store_report


def test_only_new_and_changed_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, folder = tmp_path / "cache", make_pairs(tmp_path / "pairs", 20, 5, 5)
    tiny_clip(cache / "model")
    (folder / "images" / "train-0003.jpg").write_bytes(b"<html>")
    for file in folder.rglob("*.jpg"):
        os.utime(file, (1, 1))
    monkeypatch.setattr("data.store.stat_cache.SETTLED", -60.0)  # change times cannot be set back
    first, taken = opened(folder, cache, monkeypatch)
    assert len(taken) == 30 and len(first.ledger) == 1
    again, taken = opened(folder, cache, monkeypatch)
    assert taken == {"train-0003.jpg"} and again.identity == first.identity and again.ledger == first.ledger
    for name in first.splits:
        new, old = (pairs.feature_splits([name])[name].image_MV for pairs in (again, first))
        assert isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor) and torch.equal(new, old)
        assert torch.equal(again.splits[name].image_N, first.splits[name].image_N)
    time.sleep(0.02)
    (folder / "images" / "train-0004.jpg").write_bytes((folder / "images" / "train-0005.jpg").read_bytes())
    (folder / "images" / "test-0001.jpg").unlink()
    changed, taken = opened(folder, cache, monkeypatch)
    assert taken == {"train-0003.jpg", "train-0004.jpg", "test-0001.jpg"}
    assert changed.identity != first.identity and len(changed.ledger) == 2
    train = changed.splits["train"]
    assert train.image_N[train.row_N.tolist().index(4)] == train.image_N[train.row_N.tolist().index(5)]


def features_of(pairs: Pairs, name: str) -> list[torch.Tensor]:
    """The features of a split, row by row."""
    (rows,) = pairs.feature_splits([name])[name].parts()
    return [rows.image_BV, rows.title_BT, torch.zeros(0) if rows.negative_BHT is None else rows.negative_BHT]


def test_streaming_decodes_an_image_once_to_open_and_encodes_only_what_is_measured(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all images of a large train split are decoded three times before the first step, and at every evaluation."""
    cache, folder = tmp_path / "cache", make_pairs(tmp_path / "pairs", 20, 5, 6)
    tiny_clip(cache / "model")
    for file in folder.rglob("*.jpg"):
        os.utime(file, (1, 1))
    monkeypatch.setattr("data.store.stat_cache.SETTLED", -60.0)  # change times cannot be set back
    read: list[str] = []
    monkeypatch.setattr(Reader, "read", noting(Reader.read, lambda self, reference: read.append(reference)))
    first, _ = opened(folder, cache, monkeypatch, stored=False)
    assert len(read) == len(set(read)) == 31
    valid = features_of(first, "valid")
    assert len(read) == 31  # kept from the opening
    assert first.feature_splits(["valid"]).keys() == {"valid"} and len(read) == 31 + 5
    read.clear()
    again, _ = opened(folder, cache, monkeypatch, stored=False)
    assert not read and again.identity == first.identity
    stored, _ = opened(folder, cache, monkeypatch)
    for name in ("valid", "train", "test"):
        mine, theirs = features_of(again, name), features_of(stored, name)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(valid, features_of(again, "valid"), strict=True))


def test_more_decoded_images_than_there_is_room_for_are_decoded_again(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, whatever a split holds, and the features are the same."""
    cache, folder = tmp_path / "cache", make_pairs(tmp_path / "pairs", 4, 5, 6)
    tiny_clip(cache / "model")
    whole = features_of(opened(folder, cache, monkeypatch, stored=False)[0], "valid")
    monkeypatch.setattr("data.cold.PIXELS", 2 * 3 * 32 * 32)
    pairs, _ = opened(folder, tmp_path / "other", monkeypatch, stored=False)
    read: list[str] = []
    monkeypatch.setattr(Reader, "read", noting(Reader.read, lambda self, reference: read.append(reference)))
    assert all(torch.equal(a, b) for a, b in zip(whole, features_of(pairs, "valid"), strict=True))
    assert len(read) == 3


@pytest.mark.parametrize("reason", ["not-image", "empty"])
def test_a_page_in_place_of_a_picture_is_a_dropped_row(reason: str, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers 200 with a login page, or with nothing, ended the whole run."""
    folder, address = make_pairs(tmp_path / "pairs", 3, 3, 3, negatives=False), "http://images.example/1.jpg"
    tiny_clip(tmp_path / "cache/model")
    with (folder / "train.csv").open("a") as file:
        file.write(f"{address},a title\n")
    monkeypatch.setattr("data.web.fetch.fetch", lambda urls, *_: iter([Fetched(url, None, reason, "") for url in urls]))
    pairs, _ = opened(folder, tmp_path / "cache", monkeypatch)
    assert [(entry["image"], entry["reason"]) for entry in pairs.ledger] == [(address, reason)]
    assert len(pairs.splits["train"]) == 3
