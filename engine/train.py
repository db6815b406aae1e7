"""The loop. Cached or streamed, one rank or many, it is these lines; edit them.

Dimension key: B rows of this rank, G rows of all ranks, X texts (titles, then negatives), C candidates, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.batch import Batch, Features, UserError, share
from engine.clip.model import Embeddings
from engine.config.fields import Config
from engine.cuda_graph import Graphed, pays
from engine.loss import Candidates, Objective
from engine.optim import Anchored, learning_rate, update
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log
from engine.run_folder.profiler import Profiler


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


def ranked(objective: Objective, world: World, out: Embeddings, inputs: Batch | Features, rows: int) -> torch.Tensor:
    """This rank's part of the loss of a global batch of `rows`, ranked against the candidates of all ranks."""
    parts = [share(rows, rank, world.size) for rank in range(world.size)]
    sizes, first_row = [high - low for low, high in parts], parts[world.rank][0]
    image_BE, text_XE, scale = out
    kinds = [inputs.image_id_B, inputs.title_id_B, inputs.negative_id_B]
    ids = [ids_B for ids_B in kinds if ids_B is not None]
    if world.size > 1:
        ids = list(world.gather(torch.stack(ids, 1), sizes).unbind(1))
        text_BXE = text_XE.unflatten(0, (len(ids) - 1, len(image_BE))).transpose(0, 1)
        text_XE = world.gather(text_BXE, sizes).transpose(0, 1).flatten(0, 1)
    titles = Candidates(text_XE, ids[1], ids[0])
    if inputs.negative_id_B is not None:
        nobody_G = torch.full_like(ids[0], -1)
        titles = Candidates(text_XE, torch.cat(ids[1:]), torch.cat([ids[0], nobody_G]), torch.cat([ids[0], ids[2]]) < 0)
    if objective.loss != "symmetric":
        return objective(image_BE, titles, scale, first_row, rows)
    images = Candidates(world.gather(image_BE, sizes), ids[1], ids[0])
    return objective(image_BE, titles, scale, first_row, rows, out.text_XE[: len(image_BE)], images)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Inside, fp32 products are TF32: several times faster where a GPU has it, and finer than the bf16 behind it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Step:
    """One update of what trains, from this rank's part of a global batch."""

    model: nn.Module
    objective: Objective
    optimizer: Anchored
    world: World
    clip_norm: float
    precision: torch.dtype
    profiler: Profiler

    def __call__(self, inputs: Batch | Features, rows: int, lr: float | torch.Tensor) -> tuple[
            torch.Tensor, torch.Tensor]:
        """This rank's part of the loss of `rows` rows, and the gradient norm of all; both stay on the device."""
        region, kind, low = self.profiler.region, self.world.device.type, self.precision.itemsize < 4
        with region("project"), torch.autocast(kind, self.precision, enabled=low):
            out = self.model(inputs)
        with region("loss"), tensor_cores() if low and kind == "cuda" else nullcontext():
            loss = ranked(self.objective, self.world, out, inputs, rows)
        with region("backward"):
            loss.backward(torch.full_like(loss, self.world.size))  # DDP averages over ranks what is to be added up
            loss = self.optimizer.pull(loss.detach(), self.world.size)
        with region("optim"):
            return loss, update(self.optimizer, lr, self.clip_norm)


def fit(model: nn.Module, batches: Callable[[int], Iterator[Any]], optimizer: Anchored, plan: Plan,
        state: State, world: World, cfg: Config, precision: torch.dtype, *, log: Log, profiler: Profiler,
        evaluate: Callable[[], None], checkpoint: Callable[[State], None], stop: Callable[[int], int],
        watch: Callable[[int, list[float]], None] = lambda step, norms: None) -> None:
    """Train from `state.step` to the end of the plan, or until a signal asks all ranks to stop.

    `watch` sees the gradient norms of the steps before `state.step` at every flush, and may end the run.
    """
    objective = Objective(cfg.loss, cfg.duplicates, cfg.hardness)
    step: Any = Step(model, objective, optimizer, world, cfg.clip_norm, precision, profiler)
    stream = batches(state.step)  # this rank's slice of every remaining step
    if cfg.cuda_graph == "auto" and pays(batches, plan.steps - state.step, world):
        step = Graphed(step, batches.look, optimizer, plan.batch_size, log.say, profiler.region)
        stream = batches.rows(state.step)
    while state.step < plan.steps and not state.stopped and not state.enough:
        with log.waiting():
            inputs = next(stream)
        rows = plan.rows_at(state.step)
        lr = learning_rate(state.step, plan.steps, cfg.lr, cfg.schedule, cfg.warmup)
        loss, grad_norm = step(inputs, rows, lr)
        state.step += 1
        log.step(state.step, loss, grad_norm, lr, rows)
        profiler.step()
        state.stopped = stop(state.step)
        look = plan.due(state.step, cfg.eval_every) and not state.stopped
        save = plan.due(state.step, cfg.save_every) or look or state.stopped  # before a look, which may be cut off
        if plan.due(state.step, cfg.log_every) or save:
            watch(state.step, log.flush(plan.steps))  # the only host sync, but for `stop` about once a second
        if save:
            with log.aside("checkpoint"):
                checkpoint(state)
        if look:
            with log.aside("evaluate"):
                evaluate()
