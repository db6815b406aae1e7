"""AdamW, learning-rate schedules as pure functions of the step, and one guarded update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(step: int, steps: int, peak: float, schedule: str = "linear", warmup: float = 0.0) -> float:
    """The rate used at `step` (from 0) of `steps`: a linear rise over the warm-up share, then the schedule to 0.

    Linear is peak * (steps - step) / steps without warm-up, as transformers' `get_linear_schedule_with_warmup`.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * step / rise
    progress = (step - rise) / max(1, steps - rise)
    return peak * {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[schedule]


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the reference's betas .9/.999 and eps 1e-8; the fused kernel, one pass over the parameters."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)


def update(optimizer: torch.optim.AdamW, lr: float, clip_norm: float) -> Tensor:
    """Clip, step, clear; returns the gradient norm before clipping, on the device.

    A norm that is not finite skips the update without a host sync: the fused kernel leaves weights and moments as they
    are where `found_inf` is set. The gradients are the same on every rank, so all ranks skip together.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm:  # the kernel divides gradients by this while it reads them, which saves a pass over them
        optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp_(min=1)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
