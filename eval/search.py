"""Nearest items of a gallery: embeddings in, ranked answers out, for programs and for a terminal.

Dimension key: Q queries, N gallery, V/T feature width, E embedding, K answers to a query, C one chunk of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import UserError

CHUNK = 65_536  # gallery rows at a time
QUERIES = 1024  # queries at a time


class Answer(NamedTuple):
    """One item found, named by the first row of the dataset that holds it."""

    rank: int  # from 1
    score: float  # cosine
    split: str
    row: int
    image: str  # path or URL, "" where the dataset holds bytes
    title: str

    def place(self, folder: str) -> str:
        """Where the image is to be found, as seen from `folder`."""
        return self.image.removeprefix(f"{folder}/") or f"{self.split} row {self.row}"


class QueryResult(NamedTuple):
    """A query and its answers, best first; an `image` query was given as a file or URL and finds titles."""

    query: str
    kind: str  # title | image
    answers: list[Answer]


def collect_results(titles: Sequence[str], image: str, scores_QK: Tensor, items_QK: Tensor,
          item: Callable[[int], tuple[Any, ...]]) -> list[QueryResult]:
    """What `top_k` found for these titles, or for one image: `item` begins with split, row, image and title."""
    return [QueryResult(query, "title" if titles else "image", [
                Answer(rank, score, *item(index)[:4])
                for rank, (score, index) in enumerate(zip(scores, indices, strict=True), 1)])
            for query, scores, indices in zip(titles or [image], scores_QK.tolist(), items_QK.tolist(), strict=True)]


def as_json(results: Sequence[QueryResult]) -> dict[str, Any]:
    """The answers for programs."""
    return {"queries": [{"query": found.query, "kind": found.kind,
                         "answers": [answer._asdict() for answer in found.answers]} for found in results]}


def as_text(results: Sequence[QueryResult], folder: str) -> str:
    """The answers for a terminal: rank, score, image (as seen from `folder`), title; nothing in them can steer it."""
    blocks = []
    for found in results:
        places = [answer.place(folder) if found.kind == "title" else "" for answer in found.answers]
        width = max(map(len, places), default=0)
        lines = [f"{answer.rank:4d}  {answer.score:6.3f}  {place.ljust(width)}{'  ' if width else ''}{answer.title}"
                 for answer, place in zip(found.answers, places, strict=True)]
        blocks.append("\n".join(map(printable, [found.query, *lines])))
    return "\n\n".join(blocks)


def printable(text: str) -> str:
    """One line without control characters, lone surrogates and direction marks, a space in place of each."""
    return "".join(char if char.isprintable() else " " for char in text)


def top_k(query_QE: Tensor, gallery: Callable[[int, int], Tensor], size: int, k: int,
          chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The K = min(k, N) best cosines of each query, falling, and which items have them (int64): [Q, K] on the CPU.

    `gallery(start, stop)` gives unit embeddings [stop - start, E] of these of its `size` items, on any device; it is
    asked for each chunk once. Items that score alike come in the gallery's order. Raises UserError for NaN or infinity.
    """
    best_QK = query_QE.new_empty(len(query_QE), 0)
    item_QK = torch.empty(len(query_QE), 0, dtype=torch.int64, device=query_QE.device)
    for start in range(0, size, chunk):
        item_CE = gallery(start, min(start + chunk, size)).to(query_QE.device)
        parts = [_best(part_QE @ item_CE.T, k) for part_QE in query_QE.split(QUERIES)]
        best_QK = torch.cat([best_QK, torch.cat([scores for scores, _ in parts])], 1)
        item_QK = torch.cat([item_QK, torch.cat([items for _, items in parts]) + start], 1)
        best_QK, order = best_QK.sort(stable=True, dim=1, descending=True)
        best_QK, item_QK = best_QK[:, :k], item_QK.gather(1, order)[:, :k]
    if not bool(best_QK.isfinite().all()):
        raise UserError("the model's embeddings hold NaN or infinity; use another --model")
    return best_QK.cpu(), item_QK.cpu()


def _best(scores_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, falling, the first ones where scores are equal, also at the end of the list."""
    k = min(k, scores_QC.shape[1])
    worst_Q1 = scores_QC.topk(k).values[:, -1:]
    enough = max(k, int((scores_QC >= worst_Q1).sum(1).max()))  # more than k where the last place is shared
    scores, items = scores_QC.topk(enough)
    items, order = items.sort(1)
    scores, order = scores.gather(1, order).sort(stable=True, dim=1, descending=True)
    return scores[:, :k], items.gather(1, order)[:, :k]
