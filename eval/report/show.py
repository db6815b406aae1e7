"""Answers and pictures of a run before its first step and after its last, written by the main rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from eval.metrics import Retrieval
from eval.report.answers import AnswersByDirection, answer_queries, load_answers, save_answers
from eval.report.pictures import draw_image_to_text, draw_text_to_image, heat_map, sprite_sheet
from eval.retrieval import SplitEmbeddings

SHEET = 8  # queries in a picture of answers
MAP = 40  # pairs in the heat map
POINTS = 120  # pairs in the projector


class Board(Protocol):
    """The part of the TensorBoard writer that is used here."""

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Write a uint8 RGB picture."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Write the distribution of values."""

    def embedding(self, name: str, vectors: Tensor, labels: Sequence[Sequence[str]], sprites_HHC: np.ndarray,
                  step: int) -> None:
        """Write points for the projector, with a square sheet of their pictures, as many across as down."""


def shown_split(names: Collection[str]) -> str:
    """Return the split whose answers are shown: test, else valid, else the first."""
    return next(name for name in ("test", "valid", *names) if name in names)


class AnswerLog:
    """Keeps the answers of base and tuned model on one split in `answers.npz`, and draws them.

    With `log`, which a resumed run gives, it begins with those in the file.
    """

    def __init__(self, out: Path, split: str, title: Callable[[str, int], str],
                 picture: Callable[[str, int], bytes], log: Callable[[str], None] | None = None) -> None:
        self.path = out / "answers.npz"
        self.split = split
        self.title = partial(title, split)
        self.picture = cache(partial(picture, split))
        self.answers: dict[str, AnswersByDirection] = {}
        self._sprites: dict[tuple[int, ...], np.ndarray] = {}  # the sheet of the rows drawn last
        if log:
            self._load(log)

    def _load(self, log: Callable[[str], None]) -> None:
        """Take the answers of an earlier process, as far as its file is whole; log that it is not."""
        try:
            kept_split, answers = load_answers(self.path)
        except UserError as error:
            log(f"{error}: it is made again")
            return
        if kept_split == self.split:
            self.answers |= answers

    def lacks(self, when: str) -> bool:
        """Return whether there are no answers of the model `when`, base or tuned."""
        return set(self.answers.get(when, {})) != {"image_to_text", "text_to_image"}

    def add(self, when: str, embeddings: SplitEmbeddings, result: Retrieval) -> AnswersByDirection:
        """Take and save answers without drawing them, and return them."""
        self.answers[when] = answer_queries(embeddings, result)
        save_answers(self.path, self.split, self.answers)
        return self.answers[when]

    def record(self, when: str, embeddings: SplitEmbeddings, result: Retrieval, board: Board, step: int) -> None:
        """Save and draw the answers; `when` is base or tuned, `result` was measured on these embeddings."""
        by_direction = self.add(when, embeddings, result)
        for way, draw in (("image_to_text", draw_image_to_text), ("text_to_image", draw_text_to_image)):
            answers = by_direction[way]
            count = len(answers.query_Q)
            places = torch.linspace(0, count - 1, min(SHEET, count)).long().tolist()
            board.picture(f"retrieval/{self.split} {way}", draw(answers, places, self.title, self.picture), step)
            board.histogram(f"margin/{self.split} {way}", answers.margin_Q, step)
        row_Q = by_direction["image_to_text"].query_Q[:POINTS]
        self._draw_embeddings(when, embeddings, row_Q, board, step)

    def _draw_embeddings(self, when: str, embeddings: SplitEmbeddings, row_Q: Tensor, board: Board, step: int) -> None:
        """Write the heat map and the projector for images, given by their first rows, with one title each."""
        distinct = embeddings.distinct
        image_Q = torch.searchsorted(distinct.image_row_U, row_Q.to(distinct.image_row_U.device))
        title_Q = distinct.title_P[torch.searchsorted(distinct.image_P, image_Q)]
        image_QE = embeddings.image_UE[image_Q].float()
        title_QE = embeddings.title_WE[title_Q].float()
        board.picture(f"similarity/{self.split}", heat_map(image_QE[:MAP], title_QE[:MAP]), step)
        if len(row_Q) < 2:  # the projector needs two points
            return
        title_row_Q = distinct.title_row_W[title_Q]
        titles = list(map(self.title, title_row_Q.tolist()))
        lines = [" ".join(text.split())[:120] for text in titles]  # a tab would start a new column
        labels = [(line, "image") for line in lines] + [(line, "title") for line in lines]
        vectors = torch.cat([image_QE, title_QE]).cpu()
        rows = (*row_Q.tolist(), *title_row_Q.tolist())
        if rows not in self._sprites:  # base and tuned model show the same points
            self._sprites = {rows: sprite_sheet(list(map(self.picture, row_Q.tolist())), titles)}
        board.embedding(when, vectors, labels, self._sprites[rows], step)
