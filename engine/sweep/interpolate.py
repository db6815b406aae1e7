"""Weights between base and tuned, which often keep the gain of tuning and forget less of what the base model could do.

Source: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.config.settings import metric_sign
from engine.run_folder.board import Metrics

ALPHAS = tuple(step / 10 for step in range(11))  # 0 is the base, 1 is tuned


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a copy of the values."""
    return {name: value.detach().clone() for name, value in parameters.items()}


@torch.no_grad()
def replace_values(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Set every parameter to its value."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@torch.no_grad()
def blend(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor],
          alpha: float) -> None:
    """Set every parameter to (1 - alpha) * base + alpha * tuned; 0 and 1 give base and tuned to the bit."""
    for name, parameter in parameters.items():
        parameter.copy_(torch.lerp(base[name], tuned[name], alpha))


def interpolate(parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], wanted: str,
                score: Callable[[], Metrics], metric: str) -> dict[str, Any]:
    """Measure points between base and tuned, and leave `parameters` at the alpha `wanted`: a number, or `auto`.

    `auto` takes the alpha with the best `metric` on the first split of `score()`; of equal ones the smallest.
    Returns {"alpha": final alpha, "chosen_on": split or None, "curve": [{"alpha": a, split: {metric: value}}]}.
    """
    tuned = snapshot(parameters)
    scores = {}
    for alpha in ALPHAS if wanted == "auto" else sorted({*ALPHAS, float(wanted)}):
        blend(parameters, base, tuned, alpha)
        scores[alpha] = score()
    chosen_on = None
    if wanted == "auto":
        chosen_on = next(iter(scores[0]))
        chosen = max(scores, key=lambda alpha: metric_sign(metric) * scores[alpha][chosen_on][metric])
    else:
        chosen = float(wanted)
    blend(parameters, base, tuned, chosen)
    curve = [{"alpha": alpha, **splits} for alpha, splits in scores.items()]
    return {"alpha": chosen, "chosen_on": chosen_on, "curve": curve}
