"""A dataset is opened again without reading what has not changed, and what has changed is seen."""

from __future__ import annotations

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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for Pillow's


def opened(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pairs, set[str]]:
    """The pairs of a folder, and which files were read for them."""
    from transformers import CLIPProcessor

    taken = set[str]()
    with monkeypatch.context() as patch:
        note = noting(Reader.read, lambda self, reference: taken.add(Path(reference["path"]).name))
        patch.setattr(Reader, "read", note)
        tokenizer = CLIPProcessor.from_pretrained(cache / "model").tokenizer
        encoders = Encoders(lambda pixels: pixels.float().mean((2, 3)), lambda tokens: tokens.ids_BL[:, :1].float(),
                            3, 1, "images-" + "0" * 8, "titles-" + "0" * 8, True, tokenizer, 77)
        reader = Reader(cache / "fetched", ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2)
        pipeline = Pipeline(reader, encoders, ALONE, cache, torch.device("cpu"), print)
        pairs = open_pairs(load_splits(str(folder)), [], pipeline, 0.5, "off")
    return pairs, taken


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
        new, old = again.feature_splits()[name].image_MV, first.feature_splits()[name].image_MV
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
