"""`--recipe auto`: choose by cross-validation how to tune the projections, or that they stay as they are.

Candidates are the base itself, two training runs at several shares between base and tuned, and canonical correlation at
several weights. Each is scored by the held-out likelihood of the right partner; of all that are as good as the best up
to chance, the one nearest to the base is taken.
Dimension key: C candidates, K runs, N pairs, H held-out pairs, S scales, E embedding, V/T image/text feature width
(D for either).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import UserError
from data.progress import Progress
from data.sources.folds import Fold, folds, hold_out, take_rows
from data.sources.split import components
from data.store.feature_split import FeatureSplit
from engine.config.fields import Config
from engine.optim import Plan
from engine.ranks.world import World
from engine.sweep.batched import Projections, do_nothing, project, train_together
from engine.sweep.cca import cca_projections, joined_sides

RATES = (0.00375, 0.0375)  # learning rates, in standard deviations of a pretrained projection
SHARES = (0.25, 0.5, 0.75, 1.0)  # between base and tuned
CCA_WEIGHTS = (0.1, 0.25, 0.5, 0.75)
L2_SP = 6.4e-5  # in the same unit: .01 where the weights' standard deviation is .08
BATCH, EPOCHS, STEPS = 128, 40, 640
SHARP, SCALES = 20.0, (10.0, 30.0)  # the loss's scale: the second where the base's own best one is above SHARP
SCALE_GRID = tuple(0.05 * 1.4**step for step in range(25))  # the smallest makes every model's answer a guess
RUN_SETTINGS = ("lr", "relative", "l2_sp", "scale", "loss", "batch_size", "epochs", "schedule", "interpolate")
LARGE, HELD_OUT = 3_000, 2_000  # above LARGE pairs, one part of at most HELD_OUT is held out


class Candidate(NamedTuple):
    """A way to tune: kind "base", "run" (`rate`, and `share` of tuned) or "cca" (`share`: its weight)."""

    kind: str
    rate: float = 0.0
    share: float = 0.0

    def describe(self) -> str:
        """Return a few words for tables."""
        if self.kind == "run":
            return f"training at rate {self.rate:g}, {self.share:.0%} of the way"
        return f"canonical correlation, weight {self.share:g}" if self.kind == "cca" else "base model"


BASE = Candidate("base")
LEAVE_BASE = 2.0  # standard errors by which a candidate has to beat the base
CANDIDATES = (BASE, *(Candidate("run", rate, share) for rate in RATES for share in SHARES),
              *(Candidate("cca", 0.0, weight) for weight in CCA_WEIGHTS))


@dataclass(frozen=True)
class Choice:
    """The candidate that was chosen, and for each candidate what the choice rests on."""

    candidate: Candidate
    curve: list[dict[str, Any]]  # one entry a candidate, as in metrics.json
    best: Candidate

    def describe(self) -> str:
        """Return one line: what was chosen and why."""
        if self.candidate.kind == "base":
            return "left as it is: nothing was better by more than chance"
        line = f"{self.candidate.describe()}: better than the base by more than chance"
        if self.candidate == self.best:
            return f"{line}, and the best on held-out pairs"
        return f"{line}, as good as the best ({self.best.describe()}) up to chance, and nearer to the base"

    def as_json(self, settings: Config) -> dict[str, Any]:
        """Return the entry of metrics.json; `settings` are those of the run on all pairs."""
        run = {}
        if self.candidate.kind == "run":
            run = {"settings": {name: getattr(settings, name) for name in RUN_SETTINGS}}
        return {"chosen": self.candidate.describe(), "why": self.describe(), "kind": self.candidate.kind, **run,
                "held_out": self.curve}


class HeldOutScores(NamedTuple):
    """The losses of the candidates on one fold."""

    row_N: Tensor  # row numbers of the held-out pairs, [H]
    loss_CSH: Tensor  # negative log likelihood of the right partner, mean of both ways, at each scale
    change_C: Tensor  # mean absolute change of a cosine against the base


def choose(base: Projections, pairs: FeatureSplit, cfg: Config, precision: torch.dtype, world: World) -> Choice:
    """Return the choice for `pairs`. The ranks of `world` share the folds; their number changes no result."""
    parts = split_pairs(pairs, cfg.seed)
    own = {}
    numbers = range(world.rank, len(parts), world.size)
    steps = sum(_steps(cfg, len(parts[number][1].train)) for number in numbers)
    progress = Progress("auto: steps of the candidates", steps, world.live)
    for number in numbers:
        seed, fold = parts[number]
        own[number] = score_fold(base, fold, replace(cfg, seed=seed), precision, progress)
    results: dict[int, HeldOutScores] = {}
    for results_of_rank in world.exchange(own):
        results |= results_of_rank
    unit_N = torch.from_numpy(components(pairs.title_row_N.cpu().numpy(), pairs.image_row_N.cpu().numpy()))
    return pick([results[number] for number in range(len(parts))], unit_N)


def split_pairs(pairs: FeatureSplit, seed: int) -> list[tuple[int, Fold]]:
    """Return seeds and folds: 5 folds twice up to 150 pairs, 5 below 300, 3 up to 3,000, above that one held-out part.

    Raises UserError for too few pairs.
    """
    rows = len(pairs)
    try:
        if rows > LARGE:
            fold = hold_out(pairs, -(-rows // HELD_OUT), seed)
            drawn_N = torch.randperm(len(fold.train), generator=torch.Generator().manual_seed(seed))[:BATCH * STEPS]
            return [(seed, fold._replace(train=take_rows(fold.train, drawn_N.sort()[0])))]
        seeds = [seed, seed + 1_000] if rows <= 150 else [seed]
        return [(each, fold) for each in seeds for fold in folds(pairs, 5 if rows < 300 else 3, each)]
    except UserError:
        raise UserError(f"--recipe auto holds out a fifth of the pairs in turn, and these {rows} are too few that "
                        "share no title and no image; use --recipe reference or give more pairs") from None


def run_settings(cfg: Config, rate: float, rows: int, scale: float) -> Config:
    """Return the settings of a training run on so many pairs; its steps are at most STEPS, however many there are."""
    batch = min(max(BATCH, -(-rows // STEPS)), rows)
    epochs = max(1, min(EPOCHS, STEPS // -(-rows // batch)))
    return replace(cfg, lr=rate, relative=True, l2_sp=L2_SP, scale=scale, loss="symmetric", batch_size=batch,
                   epochs=epochs, schedule="linear", warmup=0.0)


def _steps(cfg: Config, rows: int) -> int:
    """Return the number of steps of a training run on so many pairs."""
    settings = run_settings(cfg, RATES[0], rows, SCALES[0])
    return Plan(rows, settings.batch_size, settings.epochs).steps


def loss_scale(base: Projections, pairs: FeatureSplit) -> float:
    """Return the scale of the loss for a base model, by the scale at which it gives these pairs the best likelihood."""
    some = take_rows(pairs, torch.arange(min(len(pairs), HELD_OUT)))
    loss_SH = partner_losses(similarities(base, some), repeats(some))
    return SCALES[SCALE_GRID[int(loss_SH.mean(1).argmin())] > SHARP]


@torch.no_grad()
def score_fold(base: Projections, fold: Fold, cfg: Config, precision: torch.dtype,
               on_step: Callable[[], object]) -> HeldOutScores:
    """Train every candidate on a fold's training pairs and score it on those held out."""
    repeat_HH = repeats(fold.held)
    losses, changes = [], []
    base_HH = similarities(base, fold.held)
    for image_HE, title_HE in held_out_embeddings(base, fold, cfg, precision, on_step):
        cosine_HH = F.normalize(image_HE, dim=1) @ F.normalize(title_HE, dim=1).T
        losses.append(partner_losses(cosine_HH, repeat_HH))
        changes.append((cosine_HH - base_HH).abs().mean())
    return HeldOutScores(fold.row_N.cpu(), torch.stack(losses).cpu(), torch.stack(changes).cpu())


def held_out_embeddings(base: Projections, fold: Fold, cfg: Config, precision: torch.dtype,
                        on_step: Callable[[], object] = do_nothing) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each of CANDIDATES, in order, the embeddings of a fold's held-out images and titles, of any length.

    They are those of `candidate_weights`, whose weights are not made: a mixture's outputs are the mixture of outputs.
    """
    features = fold.held.features(torch.arange(len(fold.held)))
    inputs = features.image_BV.float(), features.title_BT.float()
    before = [input_HD @ weight.T for input_HD, weight in zip(inputs, base, strict=True)]
    yield before[0], before[1]
    runs = train_runs(base, fold.train, RATES, cfg, precision, on_step)
    for place in range(len(RATES)):
        after = [input_HD @ weight_K[place].T for input_HD, weight_K in zip(inputs, runs, strict=True)]
        for share in SHARES:
            image_HE, title_HE = map(partial(torch.lerp, weight=share), before, after)
            yield image_HE, title_HE
    yield from joined_sides(base, fold.train).embed(CCA_WEIGHTS, *inputs)


def train_runs(base: Projections, pairs: FeatureSplit, rates: Sequence[float], cfg: Config,
               precision: torch.dtype, on_step: Callable[[], object] = do_nothing) -> Projections:
    """Return the weights [K, …] of a run on `pairs` at each rate."""
    scale = loss_scale(base, pairs)
    return train_together(base, pairs, [run_settings(cfg, rate, len(pairs), scale) for rate in rates], precision,
                          on_step)


def candidate_weights(base: Projections, pairs: FeatureSplit, cfg: Config, precision: torch.dtype,
                      candidate: Candidate) -> Projections:
    """Return the projections of a candidate, tuned on `pairs`."""
    if candidate.kind == "base":
        return base
    if candidate.kind == "cca":
        return cca_projections(base, pairs, candidate.share)
    runs = train_runs(base, pairs, [candidate.rate], cfg, precision)
    return Projections(*(torch.lerp(before, tuned_K[0], candidate.share)
                         for before, tuned_K in zip(base, runs, strict=True)))


@torch.no_grad()
def similarities(weights: Projections, pairs: FeatureSplit) -> Tensor:
    """Return the cosines of the images and titles of pairs, [N, N]."""
    features = pairs.features(torch.arange(len(pairs)))
    image_NE = project(weights.image_KEV[None], features.image_BV.float())[0]
    title_NE = project(weights.text_KET[None], features.title_BT.float())[0]
    return image_NE @ title_NE.T


def repeats(pairs: FeatureSplit) -> Tensor:
    """Return which other rows have a row's own image or title, bool [N, N]: they are no wrong answers."""
    features = pairs.training_features(torch.arange(len(pairs)))
    image_N, title_N = features.image_id_B, features.title_id_B
    same_NN = (image_N[:, None] == image_N) | (title_N[:, None] == title_N)
    return same_NN.fill_diagonal_(False)


def partner_losses(cosine_HH: Tensor, repeat_HH: Tensor) -> Tensor:
    """Return the negative log likelihood of each row's right partner, mean of both ways, at each scale [S, H]."""
    own_H = cosine_HH.diagonal()
    cosine_HH = cosine_HH.masked_fill(repeat_HH, -1e4)  # no part of a sum at any scale
    losses = []
    for scale in SCALE_GRID:
        logits_HH = cosine_HH * scale
        both = logits_HH.logsumexp(1) + logits_HH.logsumexp(0)
        losses.append(both / 2 - own_H * scale)
    return torch.stack(losses)


def pick(scores: Sequence[HeldOutScores], unit_N: Tensor) -> Choice:
    """Return the choice by the scores of all folds; rows with equal numbers in `unit_N` are not independent.

    The scale of each candidate is the one with the best likelihood over all held-out rows. A candidate is as good as
    the best if it is worse by at most one standard error of the paired difference (Breiman et al. 1984,
    "Classification and Regression Trees", section 3.4.3); of those the nearest to the base is taken, and it has to beat
    the base itself by two, as the best of twelve is partly luck.
    """
    row_H = torch.cat([part.row_N for part in scores])
    loss_CSH = torch.cat([part.loss_CSH for part in scores], 2).double()
    scales, losses = zip(*map(at_best_scale, loss_CSH), strict=True)
    loss_CH = torch.stack(losses)
    weight = torch.tensor([len(part.row_N) for part in scores], dtype=torch.float64)
    change_C = torch.stack([part.change_C for part in scores], 1).double() @ weight / weight.sum()
    mean_C = loss_CH.mean(1)
    best = int(mean_C.argmin())
    error_C = standard_error(loss_CH - loss_CH[best], unit_N[row_H])
    good = [place for place in range(1, len(CANDIDATES)) if mean_C[place] - mean_C[best] <= error_C[place]]
    chosen = min(good, key=lambda place: float(change_C[place]), default=0)
    gain_H = loss_CH[0] - loss_CH[chosen]  # of the chosen one over the base, which is the first candidate
    if gain_H.mean() <= LEAVE_BASE * standard_error(gain_H[None], unit_N[row_H])[0]:
        chosen = 0
    curve = []
    for place, candidate in enumerate(CANDIDATES):
        curve.append({"candidate": candidate.describe(), "held_out_loss": float(mean_C[place]),
                      "worse_than_best": float(mean_C[place] - mean_C[best]), "standard_error": float(error_C[place]),
                      "scale": scales[place], "change": float(change_C[place])})
    return Choice(CANDIDATES[chosen], curve, CANDIDATES[best])


def at_best_scale(loss_SH: Tensor) -> tuple[float, Tensor]:
    """Return the scale with the smallest mean loss and the losses at it, by a parabola through three of the grid."""
    mean_S = loss_SH.mean(1)
    place = int(mean_S.argmin())
    if place in (0, len(mean_S) - 1):
        return SCALE_GRID[place], loss_SH[place]
    before, here, after = mean_S[place - 1:place + 2].tolist()
    bend = before - 2 * here + after
    offset = (before - after) / (2 * bend) if bend > 0 else 0.0
    weights = (offset * (offset - 1) / 2, 1 - offset**2, offset * (offset + 1) / 2)
    mixed_H = sum(weight * loss_SH[place - 1 + step] for step, weight in enumerate(weights))
    return SCALE_GRID[place] * (SCALE_GRID[1] / SCALE_GRID[0])**offset, torch.as_tensor(mixed_H)


def standard_error(value_CH: Tensor, unit_H: Tensor) -> Tensor:
    """Return the standard error of the mean of each row of values, whose columns are independent between units."""
    residual_CH = value_CH - value_CH.mean(1, keepdim=True)
    sums_CU = torch.zeros(len(value_CH), int(unit_H.max()) + 1, dtype=value_CH.dtype).index_add_(1, unit_H, residual_CH)
    units = len(unit_H.unique())
    return sums_CU.square().sum(1).sqrt() / value_CH.shape[1] * (units / max(1, units - 1)) ** 0.5
