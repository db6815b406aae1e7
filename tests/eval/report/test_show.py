"""Pictures for people: drawn from any titles and images, none needed to be there; small JPEGs of our own making."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_answers import found_in, space_of
from test_report import HOSTILE, noise

from data.batch import BadSample
from data.images.album import small_jpeg
from eval.report.answers import load_answers
from eval.report.show import AnswerLog, shown_split


class Recorder:
    """A board that keeps what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        assert pixels_HWC.dtype == np.uint8 and pixels_HWC.ndim == 3
        self.given[name] = pixels_HWC

    def histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.given[name] = values

    def embedding(self, name: str, vectors: torch.Tensor, labels: Any, sprites_HHC: np.ndarray, step: int) -> None:
        assert len(vectors) == len(labels)
        assert sprites_HHC.shape[0] == sprites_HHC.shape[1]
        assert not [label for label in labels if set("\t\n\r") & set("".join(label))]  # it would break the table
        self.given[name] = vectors


@pytest.mark.parametrize(("rows", "titles"), [(1, 1), (2, 2), (30, 1), (30, 4), (83, 63)])
def test_any_titles_and_missing_pictures_are_drawn(rows: int, titles: int, tmp_path: Path) -> None:
    """One row, one title for all images, fewer titles than a sheet has places: no traceback after a run."""
    drawn = torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(0))
    image, title = torch.nn.functional.normalize(drawn, dim=-1)
    here = space_of(image, title, torch.arange(rows), torch.arange(rows) % titles)
    board, asked = Recorder(), []

    def picture(split: str, row: int) -> bytes:
        asked.append(row)
        return noise(row)

    show = AnswerLog(tmp_path, "test", lambda split, row: HOSTILE[row % 13] + "\t\n", picture)
    show.record("base", here, found_in(here), board, 0)
    show.record("tuned", here, found_in(here), board, 9)
    assert len(asked) == len(set(asked))  # no picture is made twice
    assert {name.split("/")[0] for name in board.given} >= {"retrieval", "margin", "similarity"}
    assert ("tuned" in board.given) == (rows > 1)
    split, kept = load_answers(tmp_path / "answers.npz")
    assert split == "test" and set(kept) == {"base", "tuned"}
    again = AnswerLog(tmp_path, "test", lambda split, row: "", picture, print)
    assert torch.equal(again.answers["base"]["image_to_text"].best_QK, kept["base"]["image_to_text"].best_QK)


def test_the_right_answer_is_marked(tmp_path: Path) -> None:
    board = Recorder()
    one_hot = torch.eye(4)
    right = space_of(one_hot, one_hot, torch.arange(4), torch.arange(4))
    wrong = space_of(one_hot, one_hot.roll(1, 0), torch.arange(4), torch.arange(4))
    for when, here in (("base", right), ("tuned", wrong)):
        AnswerLog(tmp_path, "test", lambda split, row: "title", lambda split, row: b"").record(
            when, here, found_in(here), board, 0)
        sheet = board.given["retrieval/test image_to_text"]
        green = (sheet == (218, 251, 225)).all(-1).any(1)  # the marked line's paper
        marked = np.flatnonzero(green & ~np.roll(green, 1))
        first = len(sheet) // 4  # a block for each of the four
        assert len(marked) == 4 and (marked[0] % first < 12) == (when == "base")
    assert shown_split(["train", "valid", "test"]) == "test" and shown_split(["train"]) == "train"


def test_small_pictures_keep_their_proportion_and_refuse_what_the_decoder_refuses() -> None:
    def written(image: Image.Image, kind: str = "PNG") -> bytes:
        out = io.BytesIO()
        image.save(out, kind)
        return out.getvalue()

    for size, expected in (((640, 360), (160, 90)), ((1, 5000), (1, 160)), ((30, 20), (30, 20))):
        small = Image.open(io.BytesIO(small_jpeg(written(Image.new("RGB", size, "red")), 160, 10**7)))
        assert small.format == "JPEG" and small.size == expected and np.asarray(small)[0, 0, 0] > 240
    clear = small_jpeg(written(Image.new("RGBA", (50, 50), (255, 0, 0, 0))), 160, 10**7)
    assert np.asarray(Image.open(io.BytesIO(clear)))[20, 20].min() > 250  # what is transparent lies on white
    for bad in (b"", b"<svg/>", noise(1)[:900], written(Image.new("L", (400, 400)))):
        with pytest.raises(BadSample):
            small_jpeg(bad, 160, 100_000)
