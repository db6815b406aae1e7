"""Weights between base and tuned, which often keep the gain of tuning and lose less of the base model's abilities.

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
    """Return a copy of the values."""
    return {name: value.detach().clone() for name, value in parameters.items()}


@torch.no_grad()
def blend(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor],
          alpha: float) -> None:
    """Set every parameter to (1 - alpha) * base + alpha * tuned; 0 and 1 give base and tuned to the bit."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(base[name], tuned[name], alpha))


def interpolate(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], wanted: str,
                score: Callable[[], Scores], metric: str) -> dict[str, Any]:
    """Measure points between base and tuned, and leave `parameters` at `wanted`: a number, or `auto`.

    `auto` takes the alpha with the highest `metric` on the first split of `score()`; of equal ones the smallest.
    Returns {"alpha": the one taken, "chosen_on": split or None, "curve": [{"alpha": a, split: {metric: value}}]}.
    """
    tuned = snapshot(parameters)
    auto = wanted == "auto"
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
