"""Answers query by query: the best titles of an image and the best images of a title, before and after training.

TensorBoard's pictures and the report page show them. At most MAX_QUERIES queries of a split are taken, each against the
whole gallery, so a split of a million rows costs a thousandth of its Recall.
Dimension key: Q queries taken, A all queries, C candidates, P distinct pairs, K answers of a query, L 2 K of them,
E embedding.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from data.files import replaced_file
from data.reading import open_regular
from eval.metrics import Ranks, Retrieval
from eval.retrieval import SplitEmbeddings

MAX_QUERIES = 1_000  # queries of a split, drawn at random from a longer one
TOP_K = 5
TILE = 2**24  # scores in memory at once


@dataclass(frozen=True)
class Answers:
    """The answers of one model to some queries. Queries and candidates are named by the first row that holds them."""

    query_Q: Tensor  # int64
    best_QK: Tensor  # int64: the best distinct candidates, best first
    score_QK: Tensor  # their cosines
    right_QK: Tensor  # bool: whether a row of the split pairs it with the query
    rank_Q: Tensor  # int64: 0-based rank of the best right answer, that of the metrics
    margin_Q: Tensor  # best right score minus best wrong one

    def of(self, query: int) -> list[tuple[int, float, bool]]:
        """Candidate, score and whether it is right, for each answer to the query with this index."""
        columns = (self.best_QK[query], self.score_QK[query], self.right_QK[query])
        return list(zip(*(column.tolist() for column in columns), strict=True))


AnswersByDirection = Mapping[str, Answers]  # "image_to_text", "text_to_image"


@torch.inference_mode()
def answer_queries(embeddings: SplitEmbeddings, result: Retrieval, count: int = MAX_QUERIES) -> dict[str, Answers]:
    """Return the answers to `count` distinct images and `count` titles, the same ones for the same rows.

    `result` was measured on these embeddings; its ranks are those of the answers.
    """
    image_UE, title_WE, distinct = embeddings.image_UE, embeddings.title_WE, embeddings.distinct
    image_P, title_P = distinct.image_P, distinct.title_P
    query_U = _draw(len(image_UE), count).to(image_UE.device)
    query_W = _draw(len(title_WE), count).to(title_WE.device)
    return {"image_to_text": _answers(query_U, result.image_to_text, (image_UE, title_WE), (image_P, title_P),
                                      distinct.title_row_W),
            "text_to_image": _answers(query_W, result.text_to_image, (title_WE, image_UE), (title_P, image_P),
                                      distinct.image_row_U)}


def _draw(size: int, count: int) -> Tensor:
    # A seed of its own: before and after training, and whatever --seed, the same rows are shown.
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(size, generator=generator)[:count].sort()[0]


def _answers(selected_Q: Tensor, ranks: Ranks, vectors: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor],
             candidate_row_C: Tensor) -> Answers:
    """`vectors` are the embeddings of all queries and all candidates, `pairs` the indices of right pairs, [P] each."""
    query_AE, candidate_CE = (x.float() for x in vectors)
    place_A = torch.full((len(query_AE),), -1, device=selected_Q.device)
    parts = []
    for query_Q in selected_Q.split(max(1, TILE // len(candidate_CE))):
        scores_QC = query_AE[query_Q] @ candidate_CE.T
        here_P = place_A.scatter(0, query_Q, torch.arange(len(query_Q), device=query_Q.device))[pairs[0]]
        right_QC = torch.zeros_like(scores_QC, dtype=torch.bool)
        right_QC[here_P[here_P >= 0], pairs[1][here_P >= 0]] = True
        rank_Q = ranks.rank_Q[query_Q]
        item_QK, score_QK, is_right_QK, margin_Q = _top_answers(scores_QC, right_QC, rank_Q)
        parts.append((ranks.row_Q[query_Q], candidate_row_C[item_QK], score_QK, is_right_QK, rank_Q, margin_Q))
    return Answers(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _top_answers(scores_QC: Tensor, right_QC: Tensor, rank_Q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates, their scores, whether they are right [Q, K] each, and the margins [Q].

    The best right answer is put at its rank, even where this product rounds differently or scores are equal.
    """
    k = min(TOP_K, scores_QC.shape[1])
    wrong, right = (scores_QC.masked_fill(mask, -torch.inf).topk(k) for mask in (right_QC, ~right_QC))
    score_QL = torch.cat([wrong.values, right.values], 1)
    item_QL = torch.cat([wrong.indices, right.indices], 1)
    # Groups: the wrong ones before the best right answer, that answer, the rest (of equal ones the wrong first).
    group_QL = torch.full_like(item_QL, 2)
    group_QL[:, :k] -= 2 * (torch.arange(k, device=rank_Q.device) < rank_Q[:, None]).long()
    group_QL[:, k] = 1
    by_score = score_QL.sort(dim=1, descending=True, stable=True).indices
    by_group = group_QL.gather(1, by_score).sort(dim=1, stable=True).indices
    best_QK = by_score.gather(1, by_group)[:, :k]
    items = item_QL.gather(1, best_QK), score_QL.gather(1, best_QK), best_QK >= k
    return *items, right.values[:, 0] - wrong.values[:, 0]


def save_answers(path: Path, split: str, answers: Mapping[str, AnswersByDirection]) -> None:
    """Write the answers of each model ("base", "tuned"); replaces the file atomically."""
    arrays = {}
    for when, by_direction in answers.items():
        for way, listed in by_direction.items():
            for name, tensor in vars(listed).items():
                arrays[f"{when}/{way}/{name}"] = tensor.numpy()
    with replaced_file(path) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, split=np.array(split), **arrays)


def load_answers(path: Path) -> tuple[str, dict[str, dict[str, Answers]]]:
    """Read the split and the answers of each model from a file of `save_answers`; ("", {}) for a missing file."""
    if not path.exists():
        return "", {}
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
    try:
        with open_regular(path) as npz, np.load(npz) as arrays:
            split = str(arrays["split"])
            for key in arrays.files:
                if key.count("/") == 2:
                    when, way, field = key.split("/")
                    tensors.setdefault(when, {}).setdefault(way, {})[field] = torch.from_numpy(arrays[key])
        answers = {}
        for when, by_direction in tensors.items():
            answers[when] = {way: Answers(**columns) for way, columns in by_direction.items()}
        return split, answers
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile,
            zlib.error) as error:
        raise UserError(f"{path} is damaged ({error})") from None


def improved(base: Answers, tuned: Answers, count: int) -> list[int]:
    """Indices into `query_Q` of the queries whose reciprocal rank rose most in training, best first."""
    return _largest(1 / (tuned.rank_Q + 1) - 1 / (base.rank_Q + 1), base.rank_Q - tuned.rank_Q, count)


def worsened(base: Answers, tuned: Answers, count: int) -> list[int]:
    """Indices of the queries whose reciprocal rank fell most in training, worst first."""
    return improved(tuned, base, count)


def hardest(tuned: Answers, count: int) -> list[int]:
    """Indices of the queries whose right answer has the lowest rank after training, worst first."""
    return _largest(tuned.rank_Q.double(), -tuned.margin_Q, count)


def _largest(value_Q: Tensor, tie_break_Q: Tensor, count: int) -> list[int]:
    """Indices of the largest positive values, ties by the second tensor."""
    order = sorted(range(len(value_Q)), key=lambda q: (float(value_Q[q]), float(tie_break_Q[q])), reverse=True)
    return [q for q in order[:count] if value_Q[q] > 0]
