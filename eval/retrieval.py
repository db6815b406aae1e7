"""Project held-out features and measure how pairs find each other.

Dimension key: N pairs of the split, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from data.batch import Features
from eval.metrics import Retrieval, compare, retrieval_ranks, triplet_correct

Project = Callable[[Tensor], Tensor]  # features [n, V or T] -> unit embeddings [n, E]


@torch.inference_mode()
def measure_split(project_image: Project, project_text: Project, parts: Iterable[Features],
                  part: tuple[int, int] = (0, 1),
                  total: Callable[[Tensor], Tensor] = lambda counts: counts) -> Retrieval:
    """Ranks in both directions and, for rows with a negative, whether their own title beats it.

    `parts` are the features of the split, some pairs at a time, of which only the embeddings stay. `part` (rank, ranks)
    and `total` (the sum over ranks) share the score tiles among ranks; all get the same numbers.
    """
    seen, triplets = [], []
    for some in parts:
        image_BE, title_BE = project_image(some.image_BV), project_text(some.title_BT)
        seen.append((image_BE, title_BE, some.title_id_B, some.image_id_B))
        if some.negative_BT is not None and some.negative_id_B is not None:
            given = (some.negative_id_B >= 0).nonzero()[:, 0]
            triplets.append(triplet_correct(image_BE[given], title_BE[given], project_text(some.negative_BT[given])))
    image_NE, title_NE, title_id_N, image_id_N = map(torch.cat, zip(*seen, strict=True))
    forward_N, backward_N = retrieval_ranks(image_NE, title_NE, title_id_N, image_id_N, None, part, total)
    return Retrieval(forward_N, backward_N, torch.cat(triplets) if triplets else None)


def differences(before: Mapping[str, Retrieval], after: Mapping[str, Retrieval]) -> dict[str, dict[str, Any]]:
    """After minus before on the same rows, as it stands in metrics.json: split -> metric -> value, ci95, p."""
    return {split: {name: test.as_json() for name, test in compare(before[split], found).items()}
            for split, found in after.items()}
