"""Several configurations trained together on the same pairs: one matrix product for all of them.

They see the same rows in the same order, so their batches are one, their weights lie side by side, and each has its own
learning rate, schedule, scale, clipping and penalty. The results are those of `fit`, run by run, up to rounding.
Dimension key: K configurations, B rows of a step, H hard negatives of a row, X = B * (1 + H) texts (titles, negative 1
of all rows, …), C = X candidates, E embedding, V/T image/text feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable
from torch.optim.adamw import adamw

from data.batch import Features
from data.prefetch import EpochBatches
from data.store.feature_split import FeatureSplit
from engine.config.fields import Config
from engine.loss import IGNORED_LOGIT, LOSSES, MAX_LOGITS, Candidates, Objective
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


def train_together(base: Projections, pairs: FeatureSplit, configs: Sequence[Config],
                   precision: torch.dtype) -> Projections:
    """Return the weights [K, …] after training each of `configs`, which form a group, from `base` on `pairs`."""
    order = sorted(range(len(configs)), key=lambda place: -configs[place].epochs)
    sorted_configs = [configs[place] for place in order]
    trained = _train_sorted(base, pairs, sorted_configs, precision)
    back_K = torch.tensor(order, device=trained.image_KEV.device).argsort()
    return Projections(*(weight_K[back_K] for weight_K in trained))


def _train_sorted(base: Projections, pairs: FeatureSplit, configs: Sequence[Config],
                  precision: torch.dtype) -> Projections:
    """The same for configurations by descending epochs: those that train on are always the first ones."""
    first = configs[0]
    objective = Objective(first.loss, first.duplicates, first.hardness)
    weights = Projections(*(weight.expand(len(configs), *weight.shape).clone() for weight in base))
    optimizer = _BatchedAdamW(weights, configs)
    plans = [Plan(len(pairs), cfg.batch_size, cfg.epochs) for cfg in configs]
    scale_K = torch.tensor([cfg.scale for cfg in configs], device=pairs.device)
    rows = EpochBatches(len(pairs), first.batch_size, first.seed, device=pairs.image_row_N.device).from_step(0)
    for step in range(plans[0].steps):
        active = sum(plan.steps > step for plan in plans)
        features = pairs.training_features(next(rows))
        leaves = Projections(*(weight_K[:active].detach().requires_grad_() for weight_K in weights))
        batched_loss(objective, leaves, features, scale_K[:active], precision).backward()
        rates = [learning_rate(step, plan.steps, cfg.lr, cfg.schedule, cfg.warmup)
                 for plan, cfg in zip(plans[:active], configs, strict=False)]
        optimizer.step(leaves, rates)
    return weights


class _UnitProjection(torch.autograd.Function):
    """[K, E, V] and [B, V] -> unit embeddings [K, B, E]: one product for all K, and few passes over its result."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight_KEV: Tensor, features_BV: Tensor, precision: torch.dtype) -> Tensor:
        count, width, _ = weight_KEV.shape
        features_BV = features_BV.to(precision)
        projected_BX = features_BV @ weight_KEV.flatten(0, 1).to(precision).T
        unit_KBE = projected_BX.float().unflatten(1, (count, width)).transpose(0, 1).contiguous()
        length_KB1 = torch.linalg.vector_norm(unit_KBE, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit_KBE /= length_KB1
        ctx.save_for_backward(unit_KBE, length_KB1, features_BV)
        return unit_KBE

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad_KBE: Tensor) -> tuple[Tensor, None, None]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        unit_KBE, length_KB1, features_BV = saved
        along_KB1 = torch.linalg.vecdot(unit_KBE, grad_KBE)[..., None]
        across_KBE = torch.addcmul(grad_KBE, unit_KBE, along_KB1, value=-1)
        count, rows, width = unit_KBE.shape
        grad_BKE = features_BV.new_empty(rows, count, width)
        grad_BKE.transpose(0, 1).copy_(across_KBE.div_(length_KB1))
        weight_grad = grad_BKE.flatten(1).T @ features_BV
        return weight_grad.unflatten(0, (count, width)).to(grad_KBE.dtype), None, None


def project(weight_KEV: Tensor, features_BV: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return unit embeddings [K, B, E], in fp32; the products are in `precision`."""
    unit_KBE: Tensor = _UnitProjection.apply(weight_KEV, features_BV, precision)
    return unit_KBE


def batched_loss(objective: Objective, weights: Projections, features: Features, scale_K: Tensor,
                 precision: torch.dtype) -> Tensor:
    """Return the sum over configurations of the loss that `global_batch_loss` gives each of them alone."""
    text_XT = features.title_BT
    title_ids, image_ids = [features.title_id_B], [features.image_id_B]
    if features.negative_BHT is not None and features.negative_id_BH is not None:
        text_XT = torch.cat([text_XT, *features.negative_BHT.unbind(1)])
        title_ids += features.negative_id_BH.unbind(1)
        image_ids += [torch.full_like(features.image_id_B, -1)] * features.negative_id_BH.shape[1]
    image_KBE = project(weights.image_KEV, features.image_BV, precision)
    text_KXE = project(weights.text_KET, text_XT, precision)
    titles = Candidates(text_KXE, torch.cat(title_ids), torch.cat(image_ids))
    rows, scale_K11 = len(features.image_id_B), scale_K[:, None, None]
    logits_KBC = torch.bmm(scale_K11 * image_KBE, text_KXE.transpose(1, 2))
    if objective.loss != "symmetric":
        return _sum_of_losses(objective, logits_KBC, titles, scale_K11) / rows
    back_KBB = logits_KBC[:, :, :rows].transpose(1, 2).contiguous()
    images = Candidates(image_KBE, titles.title_id_C[:rows], titles.image_id_C[:rows])
    to_text = _sum_of_losses(objective, logits_KBC, titles, scale_K11)
    to_image = _sum_of_losses(replace(objective, hardness=0.0), back_KBB, images, scale_K11)
    return (to_text + to_image) / (2 * rows)


def _sum_of_losses(objective: Objective, logits_KBC: Tensor, candidates: Candidates, scale_K11: Tensor) -> Tensor:
    """Return the losses of all rows of all configurations, as `Objective.sum_over_rows` computes them."""
    count, rows, _ = logits_KBC.shape
    target_BC, ignored_BC = objective.targets(candidates, 0, rows)
    with torch.no_grad():
        if objective.hardness:
            logits_KBC += logits_KBC * (target_BC == 0) * (objective.hardness / scale_K11)
        logits_KBC.masked_fill_(ignored_BC, IGNORED_LOGIT)
    targets, ignored = (part_BC.expand(count, *part_BC.shape).flatten(0, 1) for part_BC in (target_BC, ignored_BC))
    return LOSSES[objective.loss](logits_KBC.flatten(0, 1), targets, ignored)


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

    def __init__(self, weights: Projections, configs: Sequence[Config]) -> None:
        self.base = [weight_K[0].clone() for weight_K in weights]
        self.runs: list[_RunState] = []
        for run, cfg in enumerate(configs):
            own = [weight_K[run] for weight_K in weights]
            units = [weight_unit(weight) if cfg.relative else 1.0 for weight in own]
            means, squares = ([torch.zeros_like(weight) for weight in own] for _ in range(2))
            steps = [torch.zeros((), device=weight.device) for weight in own]
            self.runs.append(_RunState(cfg, units, own, means, squares, steps))
        penalties = [[cfg.l2_sp / unit**2 for unit in run.units] for cfg, run in zip(configs, self.runs, strict=True)]
        self.penalty_KW = torch.tensor(penalties, device=self.base[0].device)
        self.has_penalty = any(cfg.l2_sp for cfg in configs)

    @torch.no_grad()
    def step(self, leaves: Projections, rates: Sequence[float]) -> None:
        """Update the configurations of `leaves`, the first ones, each with its learning rate."""
        grads_K = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if self.has_penalty:
            for number, (leaf, grad_K, base) in enumerate(zip(leaves, grads_K, self.base, strict=True)):
                strength_K11 = 2 * self.penalty_KW[:len(leaf), number, None, None]
                grad_K.addcmul_(leaf, strength_K11).addcmul_(base, strength_K11, value=-1)
        norm_K = torch.stack([grad_K.flatten(1).norm(dim=1) for grad_K in grads_K]).norm(dim=0)
        skipped_K = (~norm_K.isfinite()).float()
        for number, (run, rate) in enumerate(zip(self.runs, rates, strict=False)):
            clip_norm = run.cfg.clip_norm
            shrink = ((norm_K[number] + 1e-6) / clip_norm).clamp(min=1) if clip_norm else None
            for place, unit in enumerate(run.units):
                adamw([run.weights[place]], [grads_K[place][number]], [run.means[place]], [run.squares[place]], [],
                      [run.steps[place]], fused=True, grad_scale=shrink, found_inf=skipped_K[number], amsgrad=False,
                      beta1=0.9, beta2=0.999, lr=rate * unit, weight_decay=run.cfg.weight_decay, eps=1e-8,
                      maximize=False)
