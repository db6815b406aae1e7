"""Pixels and tokens of a batch are the inputs of the features that the cached mode looks up for the same rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_pairs, tiny_tokenizer
from torch import Tensor

from data import lost
from data.batch import ALONE, Tokens, UserError
from data.catalogue import build_catalogue
from data.cold import Encoders, Pipeline, Reader
from data.images.decode import ImageSpec
from data.inputs import StreamedBatches, StreamedPairs
from data.pairs import open_pairs
from data.prefetch import EpochBatches
from data.sources.source import load_splits
from data.web import storage
from data.web.fetch import FetchPolicy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for Pillow's


def encode_text(tokens: Tokens) -> Tensor:
    """Two numbers that tell titles apart, whatever they are padded to."""
    ids_BL = tokens.ids_BL * tokens.mask_BL
    return torch.stack([ids_BL.sum(1), (ids_BL * torch.arange(ids_BL.shape[1])).sum(1)], 1).float()


def open_streamed(folder: Path, cache: Path) -> StreamedPairs:
    """37 pairs whose titles form classes of three, with up to two negatives each."""
    encoders = Encoders(lambda pixels: pixels.float().mean((2, 3)), encode_text, 3, 2, "images-" + "0" * 8,
                        "titles-" + "0" * 8, False, tiny_tokenizer(), 77)
    reader = Reader(cache / "fetched", ImageSpec.clip(32), FetchPolicy(), 25_000_000, 2)
    pipeline = Pipeline(reader, encoders, ALONE, cache, torch.device("cpu"), print)
    streamed = open_pairs(load_splits(str(folder)), [], pipeline, 0.5, "off").inputs
    assert isinstance(streamed, StreamedPairs)
    split, titles = streamed.splits["train"], len(streamed.catalogue.titles)
    assert split.negative_N is not None
    second_N = torch.where(torch.arange(len(split)) % 4 == 0, -1, split.title_N.flip(0))
    ragged = replace(split, negative_N=torch.stack([split.negative_N[:, 0], second_N], 1))
    classes = replace(streamed.catalogue, title_group_P=torch.arange(titles) // 3 * 3)
    return replace(streamed, splits={**streamed.splits, "train": ragged}, catalogue=classes)


def test_streamed_batches_with_several_negatives_are_the_cached_ones(tmp_path: Path) -> None:
    """A negative encoded for another row than its id trains on a pair that the data does not hold."""
    streamed = open_streamed(make_pairs(tmp_path / "pairs", 37, 3, 3), tmp_path / "cache")
    split = streamed.feature_splits(["train"])["train"]
    for rank, size in ((0, 1), (0, 2), (1, 2)):  # the last batch has one row, so the second rank gets none
        batches = StreamedBatches(streamed, streamed.splits["train"], EpochBatches(37, 12, 5, rank, size))
        features = split.batches(12, 5, rank, size).from_step(1)
        for batch, wanted, _ in zip(batches.from_step(1), features, range(4), strict=False):
            assert batch.image_id_B.equal(wanted.image_id_B) and batch.title_id_B.equal(wanted.title_id_B)
            assert streamed.pipeline.encoders.image(batch.pixels_BCSS).equal(wanted.image_BV)
            assert encode_text(batch.title).equal(wanted.title_BT)
            assert batch.negative is not None and batch.negative_id_BH is not None
            assert wanted.negative_BHT is not None and wanted.negative_id_BH is not None
            assert batch.negative_id_BH.equal(wanted.negative_id_BH)
            assert encode_text(batch.negative).equal(torch.cat(wanted.negative_BHT.unbind(1)))


def test_classes_of_titles_are_met_in_training_and_not_in_an_evaluation(tmp_path: Path) -> None:
    """An evaluation by class would count every prompt of a class as one title."""
    streamed = open_streamed(make_pairs(tmp_path / "pairs", 37, 3, 3), tmp_path / "cache")
    split = streamed.feature_splits(["train"])["train"]
    group_P = split.title_group_P
    (measured,), trained = split.parts(), next(split.batches(37, 0).from_step(0))
    assert group_P is not None and measured.title_id_B.equal(split.title_row_N)
    assert measured.negative_id_BH is not None and split.negative_row_NH is not None
    assert measured.negative_id_BH.equal(split.negative_row_NH)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert trained.title_id_B.equal(group_P[split.title_row_N[order]])
    assert trained.negative_id_BH is not None
    negative_BH = split.negative_row_NH[order]
    assert trained.negative_id_BH.equal(torch.where(negative_BH < 0, -1, group_P[negative_BH]))


def test_a_picture_that_fails_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hiccup of a network disk must cost no row."""
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    streamed = open_streamed(make_pairs(tmp_path / "pairs", 12, 3, 3), tmp_path / "cache")
    picture = Path(streamed.catalogue.references[0].as_py())
    picture.rename(tmp_path / "away")
    monkeypatch.setattr(lost.time, "sleep", lambda seconds: picture.exists() or (tmp_path / "away").rename(picture))
    next(StreamedBatches(streamed, streamed.splits["train"], EpochBatches(12, 12, 5, 0, 1)).from_step(0))
    assert picture.exists() and streamed.lost.ledger() == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_picture_that_vanishes_is_named_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              size: int) -> None:
    """A file deleted by hand, or a hiccup of a network disk, would end a night's run."""
    monkeypatch.setattr(storage, "BACKOFF", 0.0)
    streamed = open_streamed(make_pairs(tmp_path / "pairs", 37, 3, 3), tmp_path / "cache")
    split = streamed.splits["train"]
    whole = StreamedBatches(streamed, split, EpochBatches(37, 12, 5, 0, size))
    before = next(whole.from_step(0))
    before = before._replace(pixels_BCSS=before.pixels_BCSS.clone())
    gone, cut = (Path(streamed.catalogue.references[int(streamed.example_D[split.image_N[row]])].as_py())
                 for row in EpochBatches(37, 12, 5, 0, size).from_step(0).__next__()[:2].tolist())
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    batches = StreamedBatches(streamed, split, EpochBatches(37, 12, 5, 0, size)).from_step(0)
    first, after = next(batches), (int(gone.stem.split("-")[-1]) + 1) % 37  # the row that stands in
    assert len(first.title_id_B) == len(before.title_id_B)  # the sizes of all ranks' parts are known beforehand
    assert first.title_id_B[2:].equal(before.title_id_B[2:]) and first.image_id_B[2:].equal(before.image_id_B[2:])
    assert first.image_id_B[0] == split.image_N[after] and first.title_id_B[0] == split.title_N[after] // 3 * 3
    stand_in = streamed.pipeline.reader.pixels(streamed.catalogue.references[
        int(streamed.example_D[split.image_N[after]])].as_py())
    assert (first.pixels_BCSS[0].numpy() == stand_in).all() and first.pixels_BCSS[2:].equal(before.pixels_BCSS[2:])
    assert {(entry["row"], entry["reason"], entry["step"]) for entry in streamed.lost.ledger()} == {
        (int(gone.stem.split("-")[-1]), "missing-file", 1), (int(cut.stem.split("-")[-1]), "truncated", 1)}
    features = streamed.feature_splits(["train"])["train"]
    assert len(features) == 37 and features.lost == 2  # measured without: copies of other rows count once
    assert len(features.image_row_N.unique()) == 35
    assert streamed.feature_splits(["probe"]) == {}  # a probe alone is measured again after a loss
    for path in (tmp_path / "pairs").rglob("train-*.jpg"):
        path.unlink()
    asked = list[int]()
    streamed.lost.stop = lambda: asked.append(streamed.lost.step)
    for _ in zip(batches, range(40), strict=False):  # the loop ends at the first step that asks for it
        if asked:
            break
    with pytest.raises(UserError, match="max-bad"):
        streamed.lost.share(ALONE)


def test_a_lost_picture_whose_row_is_gone_is_named_with_what_to_do(tmp_path: Path) -> None:
    """`The data of train changed` would send a user who lost one file to a new run."""
    splits = load_splits(str(make_pairs(tmp_path / "pairs", 8, 3, 3)))
    entry = {"split": "train", "row": 3, "image": splits["train"].image[3].as_py(), "step": 7, "content": "00" * 16}
    whole, shorter = build_catalogue(splits), splits["train"].take(np.array([0, 1, 2, 4, 5, 6, 7]))
    lost.require_rows(whole, [entry, {**entry, "image": "/moved/to/" + Path(entry["image"]).name}, {"reason": "odd"}])
    with pytest.raises(UserError, match="train-0003.jpg, which the run lost at step 7, .* an empty file in its place"):
        lost.require_rows(build_catalogue({**splits, "train": shorter}), [entry])
