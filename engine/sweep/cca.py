"""Regularised canonical correlation of stored features, in closed form, joined to the base's projections.

Canonical correlation finds the directions of image and text features that agree on the given pairs. Its maps are
concatenated with the base's projections, and the result is reduced to the base's width by principal components: two
ordinary projections again.
Sources: Hotelling 1936, "Relations between two sets of variates"; Li et al. 2024, "CSA" (arXiv 2410.07610), which
weights each direction by its correlation.
Dimension key: N pairs, V/T image/text feature width (D for either), E embedding, R directions with variance, Q
canonical directions, F = E + Q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.store.feature_split import FeatureSplit
from engine.sweep.batched import Projections

RIDGE = 10.0  # times the mean variance of a feature; with little data only the strongest directions count
DIRECTIONS = 64  # canonical directions, at most
MAX_PAIRS = 32_768  # a larger split is sampled, evenly spaced
FLOOR = 0.1  # share of the mean variance added to all directions: few pairs tell nothing about most of them


def cca_projections(base: Projections, pairs: FeatureSplit, weight: float) -> Projections:
    """Return the base's projections joined to the canonical directions of `pairs`, which have the share `weight`."""
    return joined_sides(base, pairs).projections(weight)


def joined_sides(base: Projections, pairs: FeatureSplit) -> JoinedSides:
    """Return the base's projections beside the canonical directions of `pairs`."""
    features = pairs.features(torch.linspace(0, len(pairs) - 1, min(len(pairs), MAX_PAIRS)).long())
    image_ND, text_ND = features.image_BV.float(), features.title_BT.float()
    image_DQ, text_DQ = canonical_directions(image_ND, text_ND)
    return JoinedSides(_Side.of(base.image_KEV, image_DQ, image_ND), _Side.of(base.text_KET, text_DQ, text_ND),
                       len(base.image_KEV))


def canonical_directions(image_NV: Tensor, text_NT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps [V, Q] and [T, Q] of the canonical directions, each times the root of its correlation.

    A projection has no bias to centre features with, so the direction of their mean is projected out instead.
    """
    image_DR, image_NR = _whiten(_project_out_mean(image_NV))
    text_DR, text_NR = _whiten(_project_out_mean(text_NT))
    left_RQ, correlation_Q, right_QR = torch.linalg.svd(image_NR.T @ text_NR / len(image_NV), full_matrices=False)
    count = min(DIRECTIONS, len(correlation_Q))
    root_Q = correlation_Q[:count].clamp(min=0).sqrt()
    image_map_VQ = image_DR @ left_RQ[:, :count] * root_Q
    text_map_TQ = text_DR @ right_QR[:count].T * root_Q
    return _map_mean_to_zero(image_map_VQ, image_NV), _map_mean_to_zero(text_map_TQ, text_NT)


def _project_out_mean(features_ND: Tensor) -> Tensor:
    """Return the features without their part along their mean; their mean is then 0."""
    mean_D = features_ND.mean(0)
    along_N = features_ND @ mean_D / mean_D.square().sum().clamp(min=1e-20)
    return features_ND - along_N[:, None] * mean_D


def _map_mean_to_zero(map_DQ: Tensor, features_ND: Tensor) -> Tensor:
    """Return the map without its part along the mean of the features, which is then mapped to 0."""
    unit_D = torch.nn.functional.normalize(features_ND.mean(0), dim=0)
    return map_DQ - torch.outer(unit_D, unit_D @ map_DQ)


def _whiten(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the map [D, R] that whitens centred features up to the ridge, and the whitened features [N, R]."""
    rows, width = features_ND.shape
    is_wide = rows < width  # then [N, N] has the same eigenvalues as [D, D] and is smaller
    moments = features_ND @ features_ND.T if is_wide else features_ND.T @ features_ND
    variance_R, vector = torch.linalg.eigh(moments.double() / rows)
    keep = variance_R > variance_R[-1] * 1e-6
    variance_R, vector = variance_R[keep], vector[:, keep]
    if is_wide:  # eigenvectors of [D, D] from those of [N, N]
        vector = features_ND.T.double() @ vector / (variance_R * rows).sqrt()
    ridge = RIDGE * float(features_ND.square().mean())
    map_DR = (vector / (variance_R + ridge).sqrt()).float()
    return map_DR, features_ND @ map_DR


class _Side(NamedTuple):
    """The base's projection and the canonical map of one side, both scaled to outputs of mean squared length 1."""

    joined_FD: Tensor  # the base's E rows, then the Q canonical ones
    output_NF: Tensor
    inner_FF: Tensor  # products of the rows
    floor: float
    std: float  # of the base's values

    @classmethod
    def of(cls, base_ED: Tensor, map_DQ: Tensor, features_ND: Tensor) -> _Side:
        """Return a side from the base's projection, the canonical map and the features of the pairs."""
        parts, outputs = [], []
        for part_FD in (base_ED, map_DQ.T):
            output_NF = features_ND @ part_FD.T
            length = output_NF.square().sum(1).mean().sqrt()
            parts.append(part_FD / length)
            outputs.append(output_NF / length)
        joined_FD = torch.cat(parts)
        floor = FLOOR * float(features_ND.square().mean())
        return cls(joined_FD, torch.cat(outputs, 1), joined_FD @ joined_FD.T, floor, float(base_ED.std()))


class JoinedSides(NamedTuple):
    """The joined maps of images and titles, to be reduced to the base's width for some `weight`.

    `weight` is the share of the canonical directions in an embedding's squared length. The reduction keeps the
    principal directions of the outputs of both sides together.
    """

    image: _Side
    text: _Side
    width: int  # of the base, E

    def projections(self, weight: float) -> Projections:
        """Return two projections of the base's width, with the standard deviations of the base's."""
        share_F, trailing_FQ = self._reduction(weight)
        principal_FE = torch.linalg.qr(trailing_FQ, mode="complete")[0][:, trailing_FQ.shape[1]:]
        reduced = []
        for side in (self.image, self.text):
            tuned_ED = principal_FE.T @ (share_F[:, None] * side.joined_FD)
            reduced.append(tuned_ED * (side.std / tuned_ED.std()))
        return Projections(*reduced)

    def embed(self, weights: Sequence[float], image_NV: Tensor, text_NT: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each weight embeddings [N, F] with the cosines that `projections` give, without computing these.

        Instead of a change to the base's width, the directions that are left out are projected out.
        """
        outputs = [image_NV @ self.image.joined_FD.T, text_NT @ self.text.joined_FD.T]
        embedded = []
        for weight in weights:
            share_F, trailing_FQ = self._reduction(weight)
            image_NF, text_NF = (output_NF * share_F for output_NF in outputs)
            image_NF = image_NF - image_NF @ trailing_FQ @ trailing_FQ.T
            text_NF = text_NF - text_NF @ trailing_FQ @ trailing_FQ.T
            embedded.append((image_NF, text_NF))
        return embedded

    def _reduction(self, weight: float) -> tuple[Tensor, Tensor]:
        """Return the factors of the joined outputs [F], and the directions to leave out of them [F, F - E]."""
        share_F = torch.full((len(self.image.joined_FD),), (1 - weight) ** 0.5, device=self.image.joined_FD.device)
        share_F[self.width:] = weight**0.5
        moment_FF = torch.zeros_like(self.image.inner_FF)
        for side in (self.image, self.text):
            output_NF = torch.nn.functional.normalize(side.output_NF * share_F, dim=1)
            moment_FF.addmm_(output_NF.T, output_NF, alpha=1 / len(output_NF))
            moment_FF.addcmul_(side.inner_FF, torch.outer(share_F, share_F), value=side.floor)
        return share_F, trailing_subspace(moment_FF, self.width)


def trailing_subspace(moment_FF: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis [F, F - width] of (nearly) all but the `width` leading eigenvectors.

    `moment_FF` is symmetric and positive. Few directions are left out, so inverse iteration for these takes a tenth of
    the time of all eigenvectors.
    """
    outer = len(moment_FF)
    jitter = 1e-6 * moment_FF.diagonal().mean()
    factor_FF = torch.linalg.cholesky(moment_FF + jitter * torch.eye(outer).to(moment_FF))
    trailing_FQ = torch.eye(outer).to(moment_FF)[:, width:]
    for _ in range(8):
        trailing_FQ = torch.linalg.qr(torch.cholesky_solve(trailing_FQ, factor_FF))[0]
    return trailing_FQ
