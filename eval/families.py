"""Pairs that share a title or an image, directly or through others.

Dimension key: N pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def families(title_id_N: Tensor, image_id_N: Tensor | None) -> Tensor:
    """Label [N]: rows that share a title or an image, directly or through other rows, share a label.

    Connected components by the FastSV algorithm (Zhang, Azad, Hu, 2020): about log2(N) rounds, also on long chains.
    """
    groups = [id_N.unique(return_inverse=True)[1] for id_N in (title_id_N, image_id_N) if id_N is not None]
    family_N = torch.arange(len(title_id_N), device=title_id_N.device)
    while True:
        before_N = family_N
        for group_N in groups:
            least_N = torch.full_like(family_N, len(family_N)).scatter_reduce(0, group_N, family_N, "amin")[group_N]
            family_N = torch.minimum(family_N.scatter_reduce(0, family_N, least_N, "amin"), least_N)
        family_N = family_N[family_N]
        if torch.equal(family_N, before_N):
            return family_N
