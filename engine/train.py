"""The loop. Cached or streamed, one rank or many, it is these lines; edit them.

Dimension key: B rows of this rank, C candidates of all ranks, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from data.batch import UserError, share
from engine.checkpoint import State
from engine.config import Config
from engine.dist import World
from engine.log import Log
from engine.loss import ranking_loss
from engine.model import Embeddings
from engine.optim import learning_rate, update
from engine.profiler import Profiler


@dataclass(frozen=True)
class Plan:
    """How many steps there are and which rows each one takes; the last batch of an epoch may be short.

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
        """Is it time after `step` steps? `every` 0 means each epoch; the last step is always due."""
        return step % (every or self.steps_per_epoch) == 0 or step == self.steps


def candidates(world: World, out: Embeddings, negative_id_B: torch.Tensor | None,
               sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All ranks' titles, then all their negatives, [C, E]; and which of them stand for a missing negative, [C]."""
    if out.negative_BE is None or negative_id_B is None:
        return world.gather(out.title_BE, sizes), None
    pair_G2E = world.gather(torch.stack([out.title_BE, out.negative_BE], 1), sizes)
    absent_G = world.gather(negative_id_B, sizes) < 0
    return pair_G2E.transpose(0, 1).flatten(0, 1), torch.cat([torch.zeros_like(absent_G), absent_G])


def fit(model: nn.Module, batches: Callable[[int], Iterator[Any]], optimizer: torch.optim.AdamW, plan: Plan,
        state: State, world: World, cfg: Config, precision: torch.dtype, *, log: Log, profiler: Profiler,
        evaluate: Callable[[], None], checkpoint: Callable[[State], None],
        stop: Callable[[int], int]) -> None:
    """Train from `state.step` to the end of the plan, or until a signal asks all ranks to stop."""
    stream = batches(state.step)  # this rank's slice of every remaining step
    while state.step < plan.steps and not state.stopped and not state.enough:
        with log.waiting():
            inputs = next(stream)
        rows = plan.rows_at(state.step)
        parts = [share(rows, rank, world.size) for rank in range(world.size)]
        with record_function("project"), torch.autocast(world.device.type, precision, enabled=precision.itemsize < 4):
            out = model(inputs)
        with record_function("loss"):
            titles_CE, absent_C = candidates(world, out, inputs.negative_id_B, [b - a for a, b in parts])
            loss = ranking_loss(out.image_BE, titles_CE, out.scale, parts[world.rank][0], rows, absent_C)
        with record_function("backward"):
            (loss * world.size).backward()  # DDP averages over ranks what is to be added up
        with record_function("optim"):
            lr = learning_rate(state.step, plan.steps, cfg.lr, cfg.schedule, cfg.warmup)
            grad_norm = update(optimizer, lr, cfg.clip_norm)
        state.step += 1
        log.step(state.step, loss.detach(), grad_norm, lr, rows)
        profiler.step()
        state.stopped = stop(state.step)
        save = plan.due(state.step, cfg.save_every) or state.stopped
        look = plan.due(state.step, cfg.eval_every) and not state.stopped
        if plan.due(state.step, cfg.log_every) or save or look:
            log.flush(plan.steps)  # the only host sync, but for `stop` about once a second
        if save:  # before the evaluation, which may then be cut off
            with log.aside("checkpoint"):
                checkpoint(state)
        if look:
            with log.aside("evaluate"):
                evaluate()
