"""The steps of a run, learning-rate schedules, AdamW with L2-SP, and an update that skips non-finite gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import UserError
from engine.clip.families import is_inside_tower


@dataclass(frozen=True)
class Plan:
    """How many steps a run takes, and how many rows each step has; the last batch of an epoch may be short.

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
        """Number of batches of an epoch, ceil(rows / batch_size)."""
        return -(-self.rows // self.batch_size)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def rows_at(self, step: int) -> int:
        """Return the rows of the global batch at `step` (from 0)."""
        return min(self.batch_size, self.rows - step % self.steps_per_epoch * self.batch_size)

    def due(self, step: int, every: int) -> bool:
        """Return whether something done every `every` steps (0: every epoch) is due after `step` steps.

        After the last step it always is.
        """
        return step % (every or self.steps_per_epoch) == 0 or step == self.steps


def learning_rate(step: int, steps: int, peak: float, schedule: str = "linear", warmup: float = 0.0) -> float:
    """Return the learning rate of `step` (from 0) of `steps`.

    It rises linearly to `peak` over the share `warmup` of all steps, then follows the schedule: linear and cosine end
    at 0. Linear without warm-up is peak * (steps - step) / steps, as transformers' `get_linear_schedule_with_warmup`.
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


class Rates(NamedTuple):
    """Peak learning rates of layers inside the towers, where they differ from --lr."""

    tower: float = 0.0  # 0: --lr
    text: float = 0.0  # of the text tower; 0: `tower`
    relative: bool = False  # rates and L2-SP of a tensor in units of the standard deviation of its pretrained values

    def of(self, name: str) -> float:
        """Return the rate of a parameter by its name in the model, 0 where it is --lr."""
        if is_inside_tower(name, "text_model"):
            return self.text or self.tower
        return self.tower if is_inside_tower(name) else 0.0


class AdamWL2SP(torch.optim.AdamW):
    """AdamW with the L2-SP penalty l2_sp * ||W - W_pretrained||_F^2 (Li et al. 2018, arXiv 1802.01483).

    The weights at construction are the pretrained ones, so construct it before a checkpoint's weights are loaded.
    ProLIP (Fahes et al. 2024, arXiv 2410.05270) uses the penalty to tune CLIP's projection on few pairs.
    The learning rate of a group is that of the step times the group's `lr_scale`. `strengths` holds the l2_sp of each
    parameter and is empty where all are 0.
    """

    # torch wraps these so that its compiler does not trace them, and the wrappers import the compiler: a second of CPU
    # time in a process that compiles nothing. The plain methods do the same; `step` alone needs its no_grad back.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)

    def __init__(self, groups: Sequence[dict[str, Any]], parameters: Sequence[nn.Parameter], lr: float,
                 strengths: Sequence[float]) -> None:
        # fused: one pass over the parameters; capturable: a CUDA graph can replay the step.
        super().__init__(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=parameters[0].is_cuda)
        self.parameters = parameters  # in the model's order: grouping must not change the sum of the gradient norm
        self.is_whole = True  # False while weights and moments change: after an error then they are of no step
        self.pretrained = []
        for parameter, strength in zip(parameters, strengths, strict=False):
            self.pretrained.append((parameter, parameter.detach().clone(), strength))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside, weights and moments change; `is_whole` says afterwards whether that was finished."""
        self.is_whole = False
        yield
        self.is_whole = True

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
    """Return AdamW with one learning rate for all parameters."""
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    return adamw_by_name(named, lr, weight_decay, l2_sp, Rates(relative=relative))


def adamw_by_name(named: Mapping[str, nn.Parameter], lr: float, weight_decay: float, l2_sp: float,
                  rates: Rates) -> AdamWL2SP:
    """Return AdamW with the learning rates of `rates` by parameter name.

    Only matrices have weight decay: biases, norms and logit_scale have none, as in open_clip's and transformers'
    trainers. Raises UserError for a rate of layers that do not train.
    """
    _refuse_unused_rates(named, rates)
    members: dict[tuple[float, float], list[nn.Parameter]] = {}  # by learning-rate scale and weight decay
    strengths = []
    for name, parameter in named.items():
        unit = weight_unit(parameter) if rates.relative else 1.0
        rate = rates.of(name)
        # A group's rate is its share of --lr, so that one schedule, and one tensor in a CUDA graph, drives all groups.
        scale = (rate / lr if rate else 1.0) * unit
        decay = weight_decay if parameter.dim() > 1 else 0.0
        members.setdefault((scale, decay), []).append(parameter)
        strengths.append(l2_sp / unit**2)
    groups: list[dict[str, Any]] = []
    for (scale, decay), parameters in members.items():
        groups.append({"params": parameters, "lr_scale": scale, "weight_decay": decay})
    return AdamWL2SP(groups, list(named.values()), lr, strengths if l2_sp else [])


def _refuse_unused_rates(names: Collection[str], rates: Rates) -> None:
    """Raise UserError for a learning rate of layers of which none trains."""
    if rates.tower and not any(is_inside_tower(name) for name in names):
        flag, where, tower = "--lr-tower", "the towers", "vision_model"
    elif rates.text and not any(is_inside_tower(name, "text_model") for name in names):
        flag, where, tower = "--lr-text", "the text tower", "text_model"
    else:
        return
    raise UserError(f"{flag} is the rate of layers inside {where}, and none of them trains; leave it out or "
                    f"unfreeze some, such as --trainable projection,{tower}.encoder.layers.11")


def update(optimizer: AdamWL2SP, lr: float | Tensor, clip_norm: float) -> Tensor:
    """Clip the gradients, step, clear them; return the gradient norm before clipping, on the device.

    `lr` is the rate of groups whose `lr_scale` is 1. A norm that is not finite skips the update without a host sync:
    where `found_inf` is set, the fused kernel changes neither weights nor moments. The gradients are the same on every
    rank, so all ranks skip the same steps.
    """
    norm = nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    if clip_norm:  # the fused kernel divides gradients by grad_scale while it reads them, which saves a pass over them
        optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp_(min=1)  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = lr if group["lr_scale"] == 1 else lr * group["lr_scale"]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    with optimizer.changing():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
