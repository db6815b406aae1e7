"""Row by row: the best titles of an image and the best images of a title, before and after training.

What TensorBoard's pictures and the report page show. At most LOOKED_AT rows of a split are asked, each against the
whole gallery, so a split of a million rows costs a thousandth of its Recall.
Dimension key: Q queries, N gallery (rows of the split), U distinct candidates, K answers listed, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import Features
from eval.retrieval import Project

LOOKED_AT = 1_000  # rows asked, drawn at random from a longer split
LISTED = 5
TILE = 2**24  # scores held at once


@dataclass(frozen=True)
class Answers:
    """What one model answers to some queries, by row numbers of the split."""

    query_Q: Tensor  # int64
    best_QK: Tensor  # int64: a row of each of the best distinct candidates, best first
    score_QK: Tensor  # their cosines
    right_QK: Tensor  # bool: is it a right answer?
    rank_Q: Tensor  # int64: candidates that score better than the best right one, as `retrieval_ranks` counts
    margin_Q: Tensor  # best right score minus best wrong one


Both = Mapping[str, Answers]  # "image_to_text", "text_to_image"


@dataclass(frozen=True)
class Space:
    """Embeddings of a split and who is who: equal title or image id means the same title or image."""

    image_NE: Tensor
    title_NE: Tensor
    title_id_N: Tensor
    image_id_N: Tensor


@torch.inference_mode()
def embed(project_image: Project, project_text: Project, parts: Iterable[Features]) -> Space:
    """Project the features of a split, some pairs at a time."""
    return Space(*map(torch.cat, zip(*((project_image(part.image_BV), project_text(part.title_BT), part.title_id_B,
                                        part.image_id_B) for part in parts), strict=True)))


@torch.inference_mode()
def answer(space: Space, count: int = LOOKED_AT, seed: int = 0) -> dict[str, Answers]:
    """Ask `count` rows both ways; the same rows whenever the split has the same length."""
    n = len(space.image_NE)
    query_Q = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort()[0]
    query_Q = query_Q.to(space.image_NE.device)
    return {"image_to_text": _ask(query_Q, space.image_NE, space.title_NE, space.title_id_N, space),
            "text_to_image": _ask(query_Q, space.title_NE, space.image_NE, space.image_id_N, space)}


def _ask(query_Q: Tensor, query_NE: Tensor, gallery_NE: Tensor, candidate_id_N: Tensor, space: Space) -> Answers:
    distinct_U = first_rows(candidate_id_N)
    listed, parts = min(LISTED, len(distinct_U)), []
    for rows in query_Q.split(max(1, TILE // len(gallery_NE))):
        scores = query_NE[rows].float() @ gallery_NE.float().T
        right = space.title_id_N[rows, None] == space.title_id_N
        right |= space.image_id_N[rows, None] == space.image_id_N
        best_right = scores.masked_fill(~right, -torch.inf).amax(1)
        wrong = scores.masked_fill(right, -torch.inf)
        score, place = scores[:, distinct_U].topk(listed)
        best = distinct_U[place]
        parts.append((rows, best, score, right.gather(1, best), (wrong > best_right[:, None]).sum(1),
                      best_right - wrong.amax(1)))
    return Answers(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def first_rows(id_N: Tensor) -> Tensor:
    """The first row of each distinct id, in row order [U]."""
    order_N = id_N.argsort(stable=True)
    sorted_N = id_N[order_N]
    new_N = torch.cat([sorted_N.new_ones(1, dtype=torch.bool), sorted_N[1:] != sorted_N[:-1]])
    return order_N[new_N].sort()[0]


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
    with np.load(path, allow_pickle=False) as arrays:
        split = str(arrays["split"])
        for key in arrays.files:
            if key.count("/") == 2:
                when, way, field = key.split("/")
                found.setdefault(when, {}).setdefault(way, {})[field] = torch.from_numpy(arrays[key])
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
