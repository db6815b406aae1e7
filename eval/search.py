"""The nearest items of a gallery by cosine, and their output as JSON or text.

Dimension key: Q queries, N gallery, E embedding, K answers to a query, C a chunk of the gallery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batch import UserError
from data.gallery import Item
from data.text import printable

CHUNK = 65_536  # gallery rows at a time
QUERIES = 1024  # queries at a time
LONGEST = 300  # characters of a title on the terminal; --json has all


class Answer(NamedTuple):
    """One item of the gallery, named by the first row of the dataset that holds it."""

    rank: int  # from 1
    score: float  # cosine
    split: str
    row: int
    image: str  # path or URL, "" where the dataset holds bytes
    title: str

    def place(self, folder: str) -> str:
        """Return the image's path relative to `folder`, its URL, or split and row where the dataset holds its bytes."""
        return self.image.removeprefix(f"{folder}/") or f"{self.split} row {self.row}"


class QueryResult(NamedTuple):
    """A query and its answers, best first; an `image` query was given as a file or URL and has titles as answers."""

    query: str
    kind: str  # title | image
    answers: list[Answer]


def collect_results(titles: Sequence[str], image: str, scores_QK: Tensor, items_QK: Tensor,
                    item: Callable[[int], Item]) -> list[QueryResult]:
    """Return the answers to these titles, or to one image: scores and items of `top_k` with the dataset's rows."""
    results = []
    for query, scores, indices in zip(titles or [image], scores_QK.tolist(), items_QK.tolist(), strict=True):
        answers = []
        for rank, (score, index) in enumerate(zip(scores, indices, strict=True), 1):
            row = item(index)
            answers.append(Answer(rank, score, row.split, row.row, row.image, row.title))
        results.append(QueryResult(query, "title" if titles else "image", answers))
    return results


def as_json(results: Sequence[QueryResult]) -> dict[str, Any]:
    """Return the answers for programs (`--json`)."""
    queries = []
    for result in results:
        answers = [answer._asdict() for answer in result.answers]
        queries.append({"query": result.query, "kind": result.kind, "answers": answers})
    return {"queries": queries}


def as_text(results: Sequence[QueryResult], folder: str) -> str:
    """Return the answers for a terminal: rank, score, image (relative to `folder`), title; no control characters."""
    blocks = []
    for result in results:
        places = [answer.place(folder) if result.kind == "title" else "" for answer in result.answers]
        width = max(map(len, places), default=0)
        lines = [result.query]
        for answer, place in zip(result.answers, places, strict=True):
            column = f"{place.ljust(width)}  " if width else ""
            lines.append(f"{answer.rank:4d}  {answer.score:6.3f}  {column}{answer.title[:LONGEST]}")
        blocks.append("\n".join(map(printable, lines)))
    return "\n\n".join(blocks)


def top_k(query_QE: Tensor, gallery: Callable[[int, int], Tensor], size: int, k: int,
          chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Return the K = min(k, N) best cosines of each query, descending, and their items (int64): [Q, K], on the CPU.

    `gallery(start, stop)` returns the unit embeddings [stop - start, E] of items `start` to `stop` of `size`, on any
    device; it is called once for each chunk. Items of equal score keep the gallery's order. Raises UserError for NaN
    or infinity.
    """
    best_QK = query_QE.new_empty(len(query_QE), 0)
    item_QK = torch.empty(len(query_QE), 0, dtype=torch.int64, device=query_QE.device)
    for start in range(0, size, chunk):
        item_CE = gallery(start, min(start + chunk, size)).to(query_QE.device)
        parts = [_best(part_QE @ item_CE.T, k) for part_QE in query_QE.split(QUERIES)]
        score_QK, index_QK = map(torch.cat, zip(*parts, strict=True))
        best_QK = torch.cat([best_QK, score_QK], 1)
        item_QK = torch.cat([item_QK, index_QK + start], 1)
        # Earlier chunks stand first and the sort is stable, so equal scores keep the gallery's order.
        best_QK, order = best_QK.sort(stable=True, dim=1, descending=True)
        best_QK, item_QK = best_QK[:, :k], item_QK.gather(1, order)[:, :k]
    if not bool(best_QK.isfinite().all()):
        raise UserError("the model's embeddings hold NaN or infinity; use another --model")
    return best_QK.cpu(), item_QK.cpu()


def _best(scores_QC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best scores of each row, descending, and their columns; of equal scores the first columns are kept.
    """
    k = min(k, scores_QC.shape[1])
    worst_Q1 = scores_QC.topk(k).values[:, -1:]
    enough = max(k, int((scores_QC >= worst_Q1).sum(1).max()))  # more than k where scores tie with the k-th
    scores, items = scores_QC.topk(enough)
    items, order = items.sort(1)
    scores, order = scores.gather(1, order).sort(stable=True, dim=1, descending=True)
    return scores[:, :k], items.gather(1, order)[:, :k]
