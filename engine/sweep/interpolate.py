"""Weights between base and tuned: what tuning has won is often kept half-way, and less of the rest is forgotten.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ALPHAS = tuple(step / 10 for step in range(11))  # 0 is the base, 1 is tuned

Scores = Mapping[str, Mapping[str, Any]]  # split -> metric -> value


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values as they are now."""
    return {name: value.detach().clone() for name, value in parameters.items()}


@torch.no_grad()
def blend(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor],
          alpha: float) -> None:
    """Set every parameter to (1 - alpha) * base + alpha * tuned; 0 and 1 give base and tuned to the bit."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(base[name], tuned[name], alpha))


def interpolate(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], wanted: str,
                score: Callable[[], Scores], metric: str) -> dict[str, Any]:
    """Measure the way from base to tuned, and leave `parameters` at `wanted`: a number, or `auto`.

    `auto` takes the alpha whose first split of `score()` has the highest `metric`; of equal ones the nearest to base.
    Returns {"alpha": the one taken, "chosen_on": split or None, "curve": [{"alpha": a, split: {metric: value}}]}.
    """
    tuned, auto = snapshot(parameters), wanted == "auto"
    alphas = ALPHAS if auto else sorted({*ALPHAS, float(wanted)})
    curve: list[dict[str, Any]] = []
    for alpha in alphas:
        blend(parameters, base, tuned, alpha)
        curve.append({"alpha": alpha, **score()})
    split = next(name for name in curve[0] if name != "alpha")
    best = max(curve, key=lambda point: point[split][metric])
    alpha = best["alpha"] if auto else float(wanted)
    blend(parameters, base, tuned, alpha)
    return {"alpha": alpha, "chosen_on": split if auto else None, "curve": curve}
