"""Steps of a run, learning-rate schedules, AdamW with L2-SP, an update that skips gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.batch import UserError


@dataclass(frozen=True)
class Plan:
    """Numbers of steps, and of rows in each; the last batch of an epoch may be short.

    Raises UserError for a batch larger than the data: each epoch would be one short step.
    """

    rows: int
    batch_size: int
    epochs: int

    def __post_init__(self) -> None:
        if self.batch_size > self.rows:
            raise UserError(f"--batch-size {self.batch_size} is larger than the {self.rows} training pairs; "
                            f"use at most --batch-size {self.rows}")

    @property
    def steps_per_epoch(self) -> int:
        """ceil(rows / batch_size)."""
        return -(-self.rows // self.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def rows_at(self, step: int) -> int:
        """Rows of the global batch at `step` (from 0)."""
        return min(self.batch_size, self.rows - step % self.steps_per_epoch * self.batch_size)

    def due(self, step: int, every: int) -> bool:
        """Return whether it is time after `step` steps. `every` 0 means each epoch; the last step is always due."""
        return step % (every or self.steps_per_epoch) == 0 or step == self.steps


def learning_rate(step: int, steps: int, peak: float, schedule: str = "linear", warmup: float = 0.0) -> float:
    """Return the rate of `step` (from 0) of `steps`: a linear rise over the warm-up share, then the schedule to 0.

    Linear is peak * (steps - step) / steps without warm-up, as transformers' `get_linear_schedule_with_warmup`.
    """
    warmup_steps = math.ceil(warmup * steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[schedule]


class AdamWL2SP(torch.optim.AdamW):
    """AdamW with the L2-SP penalty l2_sp * ||W - W_pretrained||_F^2 (Li et al. 2018, arXiv 1802.01483).

    The weights at construction are the pretrained ones, so construct it before a checkpoint's weights are loaded.
    ProLIP (Fahes et al. 2024, arXiv 2410.05270) uses the penalty to tune CLIP's projection on few pairs.
    `relative`: rate and penalty of each tensor are in units of the standard deviation of its pretrained values.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, l2_sp: float,
                 relative: bool = False) -> None:
        parameters = list(parameters)
        groups = [{"params": [p], "unit": weight_unit(p)} for p in parameters] if relative else parameters
        # fused: one pass over the parameters; capturable: a CUDA graph can replay the step.
        super().__init__(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True,
                         capturable=parameters[0].is_cuda)
        self.pretrained = []
        for parameter in parameters if l2_sp else ():
            strength = l2_sp / weight_unit(parameter) ** 2 if relative else l2_sp
            self.pretrained.append((parameter, parameter.detach().clone(), strength))

    @torch.no_grad()
    def add_penalty(self, loss: Tensor, world_size: int) -> Tensor:
        """Add the penalty's gradient to the gradients, which all ranks have summed; return loss + penalty / world_size.

        `loss` is this rank's part of the loss; without L2-SP it is returned as it is.
        """
        for parameter, pretrained, strength in self.pretrained:
            difference = parameter - pretrained
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(difference)
            parameter.grad.add_(difference, alpha=2 * strength)
            loss = loss + difference.square().sum() * (strength / world_size)
        return loss


def weight_unit(weight: Tensor) -> float:
    """Return the standard deviation of a tensor's values: the unit of a relative learning rate. Raises UserError."""
    unit = float(weight.detach().double().std(correction=0))
    if not unit > 0:
        raise UserError("--relative measures rates in standard deviations of pretrained weights, and a trained tensor "
                        "has none (its values are equal, or NaN); leave it out of --trainable")
    return unit


def adamw(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, l2_sp: float = 0.0,
          relative: bool = False) -> AdamWL2SP:
    """Return AdamW with the reference's betas .9/.999 and eps 1e-8."""
    return AdamWL2SP(parameters, lr, weight_decay, l2_sp, relative)


def update(optimizer: torch.optim.AdamW, lr: float | Tensor, clip_norm: float) -> Tensor:
    """Clip the gradients, step, clear them; return the gradient norm before clipping, on the device.

    A norm that is not finite skips the update without a host sync: where `found_inf` is set, the fused kernel changes
    neither weights nor moments. The gradients are the same on every rank, so all ranks skip together.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm:  # the fused kernel divides the gradients by grad_scale as it reads them: no extra pass over them
        optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp_(min=1)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr * group["unit"] if "unit" in group else lr
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
