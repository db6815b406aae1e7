"""Several configurations trained together on the same pairs: one matrix product for all of them.

They see the same rows in the same order, so their batches are one, their weights lie side by side, and each has its own
learning rate, schedule, scale, clipping and penalty. The results are those of `fit`, run by run, up to rounding.
Dimension key: K configurations, B rows of a step, H hard negatives of a row, X = B * (1 + H) texts (titles, negative 1
of all rows, …), C = X candidates, E embedding, V/T image/text feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from data.batch import Features
from data.prefetch import EpochBatches
from data.store.feature_split import FeatureSplit
from engine.config.fields import Config
from engine.loss import IGNORED_LOGIT, LOSSES, MAX_LOGITS, Candidates, Objective, info_nce
from engine.optim import Plan, learning_rate, weight_unit

PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


class Projections(NamedTuple):
    """The weights of K configurations, or of one without the first dimension."""

    image_KEV: Tensor
    text_KET: Tensor


def group_configurations(configs: Sequence[Config], pairs: FeatureSplit) -> list[list[int]]:
    """Return the places of configurations that can be trained together: one batch size, seed and loss.

    A group's logits are at most `MAX_LOGITS`; a configuration whose own are more is left out, for `fit` to train.
    """
    texts = 1 if pairs.negative_row_NH is None else 1 + pairs.negative_row_NH.shape[1]
    limit = MAX_LOGITS[pairs.device.type]
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for place, cfg in enumerate(configs):
        most = limit // (cfg.batch_size**2 * texts)
        if not most:
            continue
        key = (cfg.batch_size, cfg.seed, cfg.loss, cfg.duplicates, cfg.hardness)
        parts = groups.setdefault(key, [[]])
        if len(parts[-1]) == most:
            parts.append([])
        parts[-1].append(place)
    return [part for parts in groups.values() for part in parts]


def do_nothing() -> None:
    """Take no notice of a step."""


def train_together(base: Projections, pairs: FeatureSplit, configs: Sequence[Config],
                   precision: torch.dtype, on_step: Callable[[], object] = do_nothing) -> Projections:
    """Return the weights [K, …] after training each of `configs`, which form a group, from `base` on `pairs`.

    `on_step` is called after each step, which all of them take together.
    """
    order = sorted(range(len(configs)), key=lambda place: -configs[place].epochs)
    sorted_configs = [configs[place] for place in order]
    trained = _train_sorted(base, pairs, sorted_configs, precision, on_step)
    back_K = torch.tensor(order, device=trained.image_KEV.device).argsort()
    return Projections(*(weight_K[back_K] for weight_K in trained))


def _train_sorted(base: Projections, pairs: FeatureSplit, configs: Sequence[Config],
                  precision: torch.dtype, on_step: Callable[[], object]) -> Projections:
    """Do `train_together` for configurations by descending epochs: those that train on are always the first ones."""
    first = configs[0]
    objective = Objective(first.loss, first.duplicates, first.hardness)
    weights = Projections(*(weight.expand(len(configs), *weight.shape).clone() for weight in base))
    optimizer = _BatchedAdamW(base, weights, configs)
    plans = [Plan(len(pairs), cfg.batch_size, cfg.epochs) for cfg in configs]
    scale_K = torch.tensor([cfg.scale for cfg in configs], device=pairs.device)
    rows = EpochBatches(len(pairs), first.batch_size, first.seed, device=pairs.image_row_N.device).from_step(0)
    for step in range(plans[0].steps):
        active = sum(plan.steps > step for plan in plans)
        features = pairs.training_features(next(rows))
        training = Projections(*(weight_K[:active] for weight_K in weights))
        grads = gradients(objective, training, features, scale_K[:active], precision, optimizer.penalties(training))
        rates = [learning_rate(step, plan.steps, cfg.lr, cfg.schedule, cfg.warmup)
                 for plan, cfg in zip(plans[:active], configs, strict=False)]
        optimizer.step(grads, rates)
        on_step()
    return weights


class _Embeddings:
    """Embeddings [K, B, E] of features [B, V], of length `scale_K`, and their gradient back to the weights.

    Written out, as autograd would take more passes over them and another for every scale. Products are in `precision`.
    """

    def __init__(self, weight_KEV: Tensor, features_BV: Tensor, scale_K: Tensor, precision: torch.dtype) -> None:
        self.features_KBV = features_BV.to(precision).expand(len(weight_KEV), *features_BV.shape)
        projected_KBE = torch.bmm(self.features_KBV, weight_KEV.to(precision).transpose(1, 2)).float()
        self.scale_K11 = scale_K[:, None, None]
        length_KB1 = torch.linalg.vector_norm(projected_KBE, dim=-1, keepdim=True).clamp_(min=1e-12)
        self.factor_KB1 = self.scale_K11 / length_KB1
        self.scaled_KBE = projected_KBE.mul_(self.factor_KB1)

    def weight_gradient(self, grad_KBE: Tensor, penalty_KEV: Tensor | None) -> Tensor:
        """Return the gradient of the weights [K, E, V] plus `penalty_KEV`, which is overwritten as is `grad_KBE`."""
        along_KB1 = torch.linalg.vecdot(self.scaled_KBE, grad_KBE)[..., None] / self.scale_K11.square()
        grad_KBE.addcmul_(self.scaled_KBE, along_KB1, value=-1).mul_(self.factor_KB1)
        grad_KEB = grad_KBE.to(self.features_KBV.dtype).transpose(1, 2)
        if penalty_KEV is None:
            return torch.bmm(grad_KEB, self.features_KBV).float()
        if self.features_KBV.dtype == penalty_KEV.dtype:
            return penalty_KEV.baddbmm_(grad_KEB, self.features_KBV)
        return penalty_KEV.add_(torch.bmm(grad_KEB, self.features_KBV))


def project(weight_KEV: Tensor, features_BV: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return unit embeddings [K, B, E], in fp32; the products are in `precision`."""
    return _Embeddings(weight_KEV, features_BV, torch.ones(len(weight_KEV)).to(weight_KEV.device), precision).scaled_KBE


@torch.no_grad()
def gradients(objective: Objective, weights: Projections, features: Features, scale_K: Tensor, precision: torch.dtype,
              penalties: Sequence[Tensor | None]) -> list[Tensor]:
    """Return for images and texts the gradient of the loss that `global_batch_loss` gives, plus that of the penalties.
    """
    text_XT = features.title_BT
    title_ids, image_ids = [features.title_id_B], [features.image_id_B]
    if features.negative_BHT is not None and features.negative_id_BH is not None:
        text_XT = torch.cat([text_XT, *features.negative_BHT.unbind(1)])
        title_ids += features.negative_id_BH.unbind(1)
        image_ids += [torch.full_like(features.image_id_B, -1)] * features.negative_id_BH.shape[1]
    image = _Embeddings(weights.image_KEV, features.image_BV, scale_K, precision)
    text = _Embeddings(weights.text_KET, text_XT, torch.ones_like(scale_K), precision)
    titles = Candidates(text.scaled_KBE, torch.cat(title_ids), torch.cat(image_ids))
    rows = len(features.image_id_B)
    logits_KBC = torch.bmm(image.scaled_KBE, text.scaled_KBE.transpose(1, 2))
    if objective.loss == "symmetric":
        images = Candidates(image.scaled_KBE, titles.title_id_C[:rows], titles.image_id_C[:rows])
        back_KBB = logits_KBC[:, :, :rows].transpose(1, 2).clone()
        back_KBB = logit_gradient(replace(objective, hardness=0.0), back_KBB, images, image.scale_K11)
        logits_KBC = logit_gradient(objective, logits_KBC, titles, image.scale_K11)
        logits_KBC[:, :, :rows] += back_KBB.transpose(1, 2)
        logits_KBC /= 2 * rows
    else:
        logits_KBC = logit_gradient(objective, logits_KBC, titles, image.scale_K11).div_(rows)
    return [image.weight_gradient(torch.bmm(logits_KBC, text.scaled_KBE), penalties[0]),
            text.weight_gradient(torch.bmm(logits_KBC.transpose(1, 2), image.scaled_KBE), penalties[1])]


def logit_gradient(objective: Objective, logits_KBC: Tensor, candidates: Candidates, scale_K11: Tensor) -> Tensor:
    """Return the gradient of `Objective.sum_over_rows` by the logits, which are overwritten."""
    count, rows, _ = logits_KBC.shape
    target_BC, ignored_BC = objective.targets(candidates, 0, rows)
    objective.harden(logits_KBC, target_BC, scale_K11)
    logits_KBC += ignored_BC * IGNORED_LOGIT  # costs a fifth of masked_fill_
    loss = LOSSES[objective.loss]
    if loss is info_nce:
        return torch.softmax(logits_KBC, -1).sub_(target_BC)
    targets, ignored = (part_BC.expand(count, *part_BC.shape).flatten(0, 1) for part_BC in (target_BC, ignored_BC))
    logits = logits_KBC.flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(logits, targets, ignored), logits)[0].view_as(logits_KBC)


@dataclass
class _RunState:
    """The weights of one configuration and their moments, views of no other's."""

    cfg: Config
    units: list[float]  # of the learning rates
    weights: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]


class _BatchedAdamW:
    """AdamW with L2-SP, clipping and skipped updates as in `engine/optim.py`, for K configurations."""

    def __init__(self, base: Projections, weights: Projections, configs: Sequence[Config]) -> None:
        self.runs: list[_RunState] = []
        base_units = [weight_unit(weight) for weight in base] if any(cfg.relative for cfg in configs) else []
        for run, cfg in enumerate(configs):
            own = [weight_K[run] for weight_K in weights]
            means, squares = ([torch.zeros_like(weight) for weight in own] for _ in range(2))
            steps = [torch.zeros((), device=weight.device) for weight in own]
            units = base_units if cfg.relative else [1.0] * len(own)
            self.runs.append(_RunState(cfg, units, own, means, squares, steps))
        self.strengths: list[Tensor] = []  # [K, 1, 1], of the gradient of L2-SP; empty where all are 0
        self.pulls: list[Tensor] = []  # [K, E, V] or [K, E, T]: the base's weights times -strength
        for place, weight in enumerate(base if any(cfg.l2_sp for cfg in configs) else ()):
            strengths = [2 * run.cfg.l2_sp / run.units[place]**2 for run in self.runs]
            self.strengths.append(torch.tensor(strengths, device=weight.device)[:, None, None])
            self.pulls.append(weight * -self.strengths[-1])
        self.buffers = list(map(torch.empty_like, self.pulls))  # pages of new ones would cost as much as the sums

    def penalties(self, weights: Projections) -> list[Tensor | None]:
        """Return the gradients of L2-SP at the weights of the first configurations."""
        if not self.pulls:
            return [None] * len(weights)
        penalties: list[Tensor | None] = []
        for weight_K, pull_K, strength_K11, buffer_K in zip(weights, self.pulls, self.strengths, self.buffers,
                                                            strict=True):
            active = len(weight_K)
            torch.addcmul(pull_K[:active], weight_K, strength_K11[:active], out=buffer_K[:active])
            penalties.append(buffer_K[:active])
        return penalties

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rates: Sequence[float]) -> None:
        """Update the first configurations by their gradients, each with its learning rate."""
        norm_K = torch.stack([grad_K.flatten(1).norm(dim=1) for grad_K in grads]).norm(dim=0)
        skipped_K = (~norm_K.isfinite()).float()
        for number, (run, rate) in enumerate(zip(self.runs, rates, strict=False)):
            clip_norm = run.cfg.clip_norm
            shrink = ((norm_K[number] + 1e-6) / clip_norm).clamp(min=1) if clip_norm else None
            own = [grad_K[number] for grad_K in grads]
            for unit in set(run.units):  # one call for all weights of one unit
                at = [place for place, other in enumerate(run.units) if other == unit]
                weights, grad, means, squares, steps = ([part[place] for place in at] for part in (
                    run.weights, own, run.means, run.squares, run.steps))
                adamw(weights, grad, means, squares, [], steps, fused=True, grad_scale=shrink,
                      found_inf=skipped_K[number], amsgrad=False, beta1=0.9, beta2=0.999, lr=rate * unit,
                      weight_decay=run.cfg.weight_decay, eps=1e-8, maximize=False)
