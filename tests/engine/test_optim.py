"""Schedules against transformers'; the guarded update against plain AdamW with clipping."""

import math

import pytest
import torch
from helpers import gradient, on_ranks
from torch import Tensor, nn

from data.batch import UserError
from engine.optim import Rates, adamw, adamw_by_name, learning_rate, update, weight_unit


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0.0), ("linear", 0.3), ("cosine", 0.0), ("cosine", 0.2),
                                                   ("constant", 0.2)])
def test_schedules_equal_those_of_transformers(schedule: str, warmup: float) -> None:
    from transformers.optimization import get_scheduler

    steps, peak = 20, 1e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, math.ceil(warmup * steps), steps)
    for step in range(steps):
        assert learning_rate(step, steps, peak, schedule, warmup) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_update_equals_plain_adamw(clip_norm: float) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    optimizer, plain = adamw([ours], 1e-2, 0.1), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        slope = torch.randn(2, 3)
        ours.grad, theirs.grad = slope.clone(), slope.clone()
        norm = update(optimizer, 1e-2 / (step + 1), clip_norm)
        assert norm.item() == pytest.approx(slope.norm().item())
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([theirs], clip_norm)
        plain.param_groups[0]["lr"] = 1e-2 / (step + 1)
        plain.step()
        torch.testing.assert_close(ours, theirs)


def test_towers_have_rates_of_their_own_and_only_matrices_decay() -> None:
    """Else unfrozen layers are torn apart by a projection's rate, and norms and biases shrink towards 0."""
    names = {"visual_projection.weight": (2, 3), "logit_scale": (), "vision_model.post_layernorm.weight": (3,),
             "vision_model.layers.1.weight": (3, 2), "text_model.layers.1.weight": (2, 2),
             "text_model.layers.1.bias": (2,)}
    torch.manual_seed(0)
    ours, theirs = ({name: torch.nn.Parameter(torch.ones(shape)) for name, shape in names.items()} for _ in range(2))
    optimizer = adamw_by_name(ours, 1e-2, 0.5, 0.0, Rates(tower=1e-3, text=2e-3))
    rates = dict.fromkeys(names, 1e-2) | dict.fromkeys([name for name in names if "vision_model" in name], 1e-3)
    rates |= dict.fromkeys([name for name in names if "text_model" in name], 2e-3)
    plain = torch.optim.AdamW([{"params": [theirs[name]], "lr": rates[name], "weight_decay": 0.5 * (len(shape) > 1)}
                               for name, shape in names.items()])
    for factor in (1.0, 0.5, 0.25):  # a schedule
        for name, shape in names.items():
            ours[name].grad = torch.randn(shape)
            theirs[name].grad = gradient(ours[name]).clone()
        update(optimizer, 1e-2 * factor, 0.0)
        for group, name in zip(plain.param_groups, names, strict=True):
            group["lr"] = rates[name] * factor
        plain.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name])


def test_rates_of_layers_that_do_not_train_are_refused_and_projections_are_one_group() -> None:
    names = ("visual_projection.weight", "text_projection.weight")
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in names}
    assert len(adamw_by_name(parameters, 1e-2, 0.5, 0.1, Rates()).param_groups) == 1  # one kernel, as ever
    vision = {**parameters, "vision_model.layers.1.weight": torch.nn.Parameter(torch.ones(2, 2))}
    for named, rates, flag in ((parameters, Rates(tower=1.0), "--lr-tower"),
                               (vision, Rates(text=1.0), "--lr-text")):
        with pytest.raises(UserError, match=flag):
            adamw_by_name(named, 1e-2, 0.0, 0.0, rates)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([parameter], 1e-2, 0.0)
    parameter.grad = torch.ones(3)
    update(optimizer, 1e-2, 1.0)
    before = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    parameter.grad = torch.tensor([1.0, bad, 1.0])
    assert not update(optimizer, 1e-2, 1.0).isfinite()
    torch.testing.assert_close(parameter.detach(), before[0])
    for key, value in before[1].items():
        torch.testing.assert_close(optimizer.state[parameter][key], value)


def l2_sp_steps(ranks: int) -> tuple[float, Tensor]:
    """Three steps on a loss of which each rank computes a part; the sum of the last loss's parts, the weights."""
    parameter = torch.nn.Parameter(torch.arange(4.0))
    optimizer = adamw([parameter], 1e-2, 0.0, l2_sp=0.3)
    with torch.no_grad():
        parameter.add_(1)  # as a checkpoint's weights do
    for _ in range(3):
        loss = (parameter ** 3).sum() / ranks
        loss.backward()
        if ranks > 1:
            torch.distributed.all_reduce(parameter.grad)
        loss = optimizer.add_penalty(loss.detach(), ranks)
        update(optimizer, 1e-2, 0.0)
    if ranks > 1:
        torch.distributed.all_reduce(loss)
    return loss.item(), parameter.detach()


def test_l2_sp_is_the_distance_to_the_pretrained_weights_on_any_number_of_ranks() -> None:
    start, naive = torch.arange(4.0), torch.nn.Parameter(torch.arange(4.0) + 1)
    plain = torch.optim.AdamW([naive], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        plain.zero_grad()
        expected = (naive ** 3).sum() + 0.3 * torch.linalg.vector_norm(naive - start) ** 2
        expected.backward()
        plain.step()
    for loss, weights in [l2_sp_steps(1), *on_ranks(2, l2_sp_steps, 2)]:
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(weights, naive.detach(), atol=1e-6, rtol=0)


def test_relative_rates_move_every_tensor_by_the_same_share_of_itself() -> None:
    """A rate that is right for one model took another one apart."""
    generator = torch.Generator().manual_seed(0)
    small, large = (nn.Parameter(torch.randn(8, 6, generator=generator) * size) for size in (0.02, 3.0))
    before = [weight.detach().clone() for weight in (small, large)]
    optimizer = adamw([small, large], 0.1, 0.0, l2_sp=0.5, relative=True)
    for weight in (small, large):
        weight.grad = torch.ones_like(weight) / weight_unit(weight)
    assert optimizer.add_penalty(torch.zeros(()), 1) == 0
    update(optimizer, 0.1, 0.0)
    for weight, old in zip((small, large), before, strict=True):
        unit = float(old.double().std(correction=0))
        torch.testing.assert_close(old - weight.detach(), torch.full_like(old, 0.1 * unit), rtol=1e-3, atol=0.0)
    penalty = optimizer.add_penalty(torch.zeros(()), 1)  # each of 96 values is .1 of its unit away
    torch.testing.assert_close(penalty, torch.tensor(0.5 * 96 * 0.01), rtol=1e-2, atol=0.0)
    with pytest.raises(UserError, match="standard deviations"):
        adamw([nn.Parameter(torch.ones(3))], 0.1, 0.0, relative=True)
