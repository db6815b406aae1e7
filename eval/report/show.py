"""What a run shows of its model at its two ends: before the first step and after the last. One rank does this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eval.metrics import Retrieval
from eval.report.answers import Both, answer_queries, load_answers, save_answers
from eval.report.pictures import heat_map, images_of_titles, sprites, titles_of_images
from eval.retrieval import Space

SHEET = 8  # rows of a sheet of answers
MAP = 40  # pairs of the heat map
POINTS = 120  # pairs in the projector


class Board(Protocol):
    """Where pictures go."""

    def picture(self, name: str, pixels_HWC: np.ndarray, step: int) -> None:
        """A uint8 RGB picture."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """How values are spread."""

    def embedding(self, name: str, vectors: Tensor, labels: Sequence[Sequence[str]], sprite_NCSS: Tensor,
                  step: int) -> None:
        """Points in a space."""


def shown_split(names: Collection[str]) -> str:
    """The split whose answers are shown: test, else valid, else the first there is."""
    return next((name for name in ("test", "valid") if name in names), next(iter(names)))


class AnswerLog:
    """Asks the model of one split at both ends, keeps the answers in `answers.npz`, and draws them."""

    def __init__(self, out: Path, split: str, title: Callable[[str, int], str],
                 picture: Callable[[str, int], bytes], resumed: bool) -> None:
        self.path, self.split = out / "answers.npz", split
        self.title = partial(title, split)
        self.picture = cache(partial(picture, split))
        self.answers: dict[str, Both] = dict(load_answers(self.path)[1]) if resumed else {}

    def look(self, when: str, space: Space, found: Retrieval, board: Board, step: int) -> None:
        """Ask, keep and draw; `when` is base or tuned, `collect_results` what was measured on this space."""
        self.answers[when] = both = answer_queries(space, found)
        save_answers(self.path, self.split, self.answers)
        for way, draw in (("image_to_text", titles_of_images), ("text_to_image", images_of_titles)):
            count = len(both[way].query_Q)
            some = torch.linspace(0, count - 1, min(SHEET, count)).long().tolist()
            board.picture(f"retrieval/{self.split} {way}", draw(both[way], some, self.title, self.picture), step)
            board.histogram(f"margin/{self.split} {way}", both[way].margin_Q, step)
        self._space(when, space, both["image_to_text"].query_Q[:POINTS], board, step)

    def _space(self, when: str, space: Space, row_Q: Tensor, board: Board, step: int) -> None:
        """Some images, by their first rows, with a title each: their cosines, and where they lie in the projector."""
        distinct = space.distinct
        image_Q = torch.searchsorted(distinct.image_row_U, row_Q.to(distinct.image_row_U.device))
        title_Q = distinct.title_P[torch.searchsorted(distinct.image_P, image_Q)]
        image_QE, title_QE = space.image_UE[image_Q].float(), space.title_WE[title_Q].float()
        board.picture(f"similarity/{self.split}", heat_map(image_QE[:MAP], title_QE[:MAP]), step)
        if len(row_Q) < 2:  # a projector without a second point is of no use
            return
        titles = [self.title(row) for row in distinct.title_row_W[title_Q].tolist()]
        tidy = [" ".join(text.split())[:120] for text in titles]  # a tab would start a new column
        labels = [(text, kind) for kind in ("image", "title") for text in tidy]
        board.embedding(when, torch.cat([image_QE, title_QE]).cpu(), labels,
                        sprites([self.picture(row) for row in row_Q.tolist()], titles), step)
