"""What a run shows of its model at its two ends: before the first step and after the last. One rank does this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from eval.report.answers import Both, Space, answer, first_rows, load_answers, save_answers
from eval.report.pictures import heat_map, images_of_titles, sprites, titles_of_images

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


class Show:
    """Asks the model of one split at both ends, keeps the answers in `answers.npz`, and draws them."""

    def __init__(self, out: Path, split: str, title: Callable[[str, int], str],
                 picture: Callable[[str, int], bytes], resumed: bool) -> None:
        self.path, self.split = out / "answers.npz", split
        self.title = partial(title, split)
        self.picture = cache(partial(picture, split))
        self.answers: dict[str, Both] = dict(load_answers(self.path)[1]) if resumed else {}

    def look(self, when: str, space: Space, board: Board, step: int) -> None:
        """Ask, keep and draw; `when` is base or tuned."""
        self.answers[when] = both = answer(space)
        save_answers(self.path, self.split, self.answers)
        count = len(both["image_to_text"].query_Q)
        some = torch.linspace(0, count - 1, min(SHEET, count)).long().tolist()
        for way, draw in (("image_to_text", titles_of_images), ("text_to_image", images_of_titles)):
            board.picture(f"retrieval/{self.split} {way}", draw(both[way], some, self.title, self.picture), step)
            board.histogram(f"margin/{self.split} {way}", both[way].margin_Q, step)
        rows = both["image_to_text"].query_Q
        board.picture(f"similarity/{self.split}", heat_map(space, rows[:MAP]), step)
        self._project(when, space, rows, board, step)

    def _project(self, when: str, space: Space, rows: Tensor, board: Board, step: int) -> None:
        """Images and titles in one space; a projector without a second point is of no use."""
        rows = rows[first_rows(space.image_id_N.cpu()[rows])][:POINTS]
        if len(rows) < 2:
            return
        titles = [self.title(row) for row in rows.tolist()]
        tidy = [" ".join(text.split())[:120] for text in titles]  # a tab would start a new column
        labels = [(text, kind) for kind in ("image", "title") for text in tidy]
        at = rows.to(space.image_NE.device)
        board.embedding(when, torch.cat([space.image_NE[at], space.title_NE[at]]).float().cpu(), labels,
                        sprites([self.picture(row) for row in rows.tolist()], titles), step)
