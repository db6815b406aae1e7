"""Answers one by one: the best titles of an image and the best images of a title, before and after training.

What TensorBoard's pictures and the report page show. At most LOOKED_AT queries of a split are asked, each against the
whole gallery, so a split of a million rows costs a thousandth of its Recall.
Dimension key: Q queries asked, A all queries, C candidates, P distinct pairs, K answers listed, E embedding.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from data.files import open_regular
from eval.metrics import Ranks, Retrieval
from eval.retrieval import Space

LOOKED_AT = 1_000  # queries asked, drawn at random from a longer split
LISTED = 5
TILE = 2**24  # scores held at once


@dataclass(frozen=True)
class Answers:
    """What one model answers to some queries. Queries and candidates are named by the first row that holds them."""

    query_Q: Tensor  # int64
    best_QK: Tensor  # int64: the best distinct candidates, best first
    score_QK: Tensor  # their cosines
    right_QK: Tensor  # bool: is it a right answer?
    rank_Q: Tensor  # int64: 0-based place of the best right answer, as the metrics have it
    margin_Q: Tensor  # best right score minus best wrong one


Both = Mapping[str, Answers]  # "image_to_text", "text_to_image"


@torch.inference_mode()
def answer_queries(space: Space, found: Retrieval, count: int = LOOKED_AT, seed: int = 0) -> dict[str, Answers]:
    """Ask `count` distinct images and `count` titles; the same ones whenever the split has the same rows.

    `collect_results` is what was measured on this space: its ranks are the places that are shown.
    """
    image_UE, title_WE, distinct = space.image_UE, space.title_WE, space.distinct
    image_P, title_P = distinct.image_P, distinct.title_P
    asked_U, asked_W = (_draw(len(x_AE), count, seed).to(x_AE.device) for x_AE in (image_UE, title_WE))
    return {"image_to_text": _ask(asked_U, found.image_to_text, (image_UE, title_WE), (image_P, title_P),
                                  distinct.title_row_W),
            "text_to_image": _ask(asked_W, found.text_to_image, (title_WE, image_UE), (title_P, image_P),
                                  distinct.image_row_U)}


def _draw(size: int, count: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort()[0]


def _ask(asked_Q: Tensor, ranks: Ranks, vectors: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor],
         candidate_row_C: Tensor) -> Answers:
    """`vectors` are the embeddings of all queries and candidates, `pairs` their right pairs, [P] each."""
    query_AE, candidate_CE = (x.float() for x in vectors)
    place_A = torch.full((len(query_AE),), -1, device=asked_Q.device)
    parts = []
    for query_Q in asked_Q.split(max(1, TILE // len(candidate_CE))):
        scores_QC = query_AE[query_Q] @ candidate_CE.T
        here_P = place_A.scatter(0, query_Q, torch.arange(len(query_Q), device=query_Q.device))[pairs[0]]
        right_QC = torch.zeros_like(scores_QC, dtype=torch.bool)
        right_QC[here_P[here_P >= 0], pairs[1][here_P >= 0]] = True
        rank_Q = ranks.rank_Q[query_Q]
        item_QK, score_QK, is_right_QK, margin_Q = _list(scores_QC, right_QC, rank_Q)
        parts.append((ranks.row_Q[query_Q], candidate_row_C[item_QK], score_QK, is_right_QK, rank_Q, margin_Q))
    return Answers(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _list(scores_QC: Tensor, right_QC: Tensor, rank_Q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates, their scores, whether they are right [Q, K] each, and the margins [Q].

    The best right answer stands at its rank, whatever the rounding of this product and among equal scores.
    """
    listed = min(LISTED, scores_QC.shape[1])
    wrong, right = (scores_QC.masked_fill(mask, -torch.inf).topk(listed) for mask in (right_QC, ~right_QC))
    score_QL = torch.cat([wrong.values, right.values], 1)
    item_QL = torch.cat([wrong.indices, right.indices], 1)
    # Groups: the wrong ones before the best right answer, that answer, the rest (of equal ones the wrong first).
    group_QL = torch.full_like(item_QL, 2)
    group_QL[:, :listed] -= 2 * (torch.arange(listed, device=rank_Q.device) < rank_Q[:, None]).long()
    group_QL[:, listed] = 1
    by_score = score_QL.sort(dim=1, descending=True, stable=True).indices
    by_group = group_QL.gather(1, by_score).sort(dim=1, stable=True).indices
    best_QK = by_score.gather(1, by_group)[:, :listed]
    items = item_QL.gather(1, best_QK), score_QL.gather(1, best_QK), best_QK >= listed
    return *items, right.values[:, 0] - wrong.values[:, 0]


def save_answers(path: Path, split: str, answers: Mapping[str, Both]) -> None:
    """Write what each of the models ("base", "tuned") answered; replaces the file in one step."""
    arrays = {f"{when}/{way}/{field.name}": getattr(one, field.name).numpy()
              for when, both in answers.items() for way, one in both.items() for field in fields(one)}
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, split=np.array(split), **arrays)
    temporary.replace(path)


def load_answers(path: Path) -> tuple[str, dict[str, dict[str, Answers]]]:
    """What `save_answers` wrote: the split and the answers by model; ("", {}) where there is no such file."""
    if not path.exists():
        return "", {}
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    try:
        with open_regular(path) as npz, np.load(npz) as arrays:
            split = str(arrays["split"])
            for key in arrays.files:
                if key.count("/") == 2:
                    when, way, field = key.split("/")
                    found.setdefault(when, {}).setdefault(way, {})[field] = torch.from_numpy(arrays[key])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away") from None
    return split, {when: {way: Answers(**one) for way, one in both.items()} for when, both in found.items()}


def improved(base: Answers, tuned: Answers, count: int) -> list[int]:
    """Queries (places in `query_Q`) that training helped most, by reciprocal rank, best first."""
    return _most(1 / (tuned.rank_Q + 1) - 1 / (base.rank_Q + 1), base.rank_Q - tuned.rank_Q, count)


def worsened(base: Answers, tuned: Answers, count: int) -> list[int]:
    """Queries that training hurt most, by reciprocal rank, worst first."""
    return improved(tuned, base, count)


def hardest(tuned: Answers, count: int) -> list[int]:
    """Queries whose right answer is farthest down now, worst first."""
    return _most(tuned.rank_Q.double(), -tuned.margin_Q, count)


def _most(value_Q: Tensor, then_Q: Tensor, count: int) -> list[int]:
    """Places of the largest positive values, ties by the second."""
    order = sorted(range(len(value_Q)), key=lambda q: (float(value_Q[q]), float(then_Q[q])), reverse=True)
    return [q for q in order[:count] if value_Q[q] > 0]
