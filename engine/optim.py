"""AdamW, learning-rate schedules as pure functions of the step, and one guarded update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

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


class Anchored(torch.optim.AdamW):
    """AdamW that knows the weights it was made with, the pretrained ones: for L2-SP, l2_sp * ||W - W_pretrained||_F^2.

    Li et al. 2018 (arXiv 1802.01483); ProLIP (Fahes et al. 2024, arXiv 2410.05270) shows what it does for tuning CLIP's
    projection on few pairs. To be made before weights come back from a checkpoint.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], l2_sp: float, **options: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, **options)
        self.l2_sp = l2_sp
        self.pretrained = [(p, p.detach().clone()) for p in parameters] if l2_sp else []

    @torch.no_grad()
    def pull(self, loss: Tensor, ranks: int) -> Tensor:
        """Add the term to a loss after backward, when ranks have added their gradients up; this rank's part of the sum.

        Without L2-SP it is the loss as it came.
        """
        for parameter, pretrained in self.pretrained:
            away = parameter - pretrained
            parameter.grad = torch.zeros_like(away) if parameter.grad is None else parameter.grad
            parameter.grad.add_(away, alpha=2 * self.l2_sp)
            loss = loss + away.square().sum() * (self.l2_sp / ranks)
        return loss


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, l2_sp: float = 0.0) -> Anchored:
    """AdamW with the reference's betas .9/.999 and eps 1e-8; the fused kernel, one pass over the parameters.

    On a GPU its step can be captured in a CUDA graph.
    """
    parameters = list(parameters)
    return Anchored(parameters, l2_sp, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True,
                    capturable=parameters[0].is_cuda)


def update(optimizer: torch.optim.AdamW, lr: float | Tensor, clip_norm: float) -> Tensor:
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
