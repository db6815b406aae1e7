"""Project held-out features and measure how pairs find each other.

Dimension key: N pairs of the split, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from data.batch import Features
from eval.metrics import Retrieval, compare, retrieval_ranks, triplet_correct

Project = Callable[[Tensor], Tensor]  # features [n, V or T] -> unit embeddings [n, E]
CHUNK = 65_536


@torch.inference_mode()
def measure_split(project_image: Project, project_text: Project, pairs: Features, image_id_N: Tensor,
                  part: tuple[int, int] = (0, 1),
                  total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Retrieval:
    """Ranks in both directions and, for rows with a negative, whether their own title beats it.

    `image_id_N` are int64 identities of the images: equal id means identical image. `part` (rank, ranks) and `total`
    (the sum over ranks) share the score tiles among ranks; all get the same numbers.
    """
    image_NE, title_NE = _embed(project_image, pairs.image_BV), _embed(project_text, pairs.title_BT)
    forward_N, backward_N = retrieval_ranks(image_NE, title_NE, pairs.title_id_B, image_id_N, None, part, total)
    triplet_N = None
    if pairs.negative_BT is not None and pairs.negative_id_B is not None:
        given = pairs.negative_id_B >= 0
        negative_NE = _embed(project_text, pairs.negative_BT[given])
        triplet_N = triplet_correct(image_NE[given], title_NE[given], negative_NE)
    return Retrieval(forward_N, backward_N, triplet_N)


def _embed(project: Project, features: Tensor) -> Tensor:
    return torch.cat([project(chunk) for chunk in features.split(CHUNK)])


def differences(before: Mapping[str, Retrieval], after: Mapping[str, Retrieval]) -> dict[str, dict[str, Any]]:
    """After minus before on the same rows, as it stands in metrics.json: split -> metric -> value, ci95, p."""
    return {split: {name: test.as_json() for name, test in compare(before[split], found).items()}
            for split, found in after.items()}
