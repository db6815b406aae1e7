"""The training loop: `fit` picks the step, `loop` runs it, for cached or streamed inputs and any number of ranks.

Dimension key: B rows of this rank, G rows of all ranks, H hard negatives of a row, K = 1 + H texts of a row, X = K * B
texts (titles, negative 1 of all rows, negative 2 of all rows, …), C candidates, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from data.batch import Batch, Batches, Features, share
from engine.clip.model import Embeddings
from engine.config.fields import Config
from engine.cuda_graph import GraphedStep, should_capture
from engine.loss import Candidates, Objective
from engine.optim import AdamWL2SP, Plan, learning_rate, update
from engine.ranks.world import World, explain_collective_errors
from engine.run_folder.checkpoint import State
from engine.run_folder.log import Log, NullLog
from engine.run_folder.profiler import Profiler

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Replica:
    """This rank's copy of what trains, and how it computes."""

    model: nn.Module  # Batch or Features -> Embeddings; several ranks: wrapped in DistributedDataParallel
    optimizer: AdamWL2SP
    world: World
    precision: torch.dtype  # of autocast in the model; the loss is fp32


@dataclass(frozen=True)
class Callbacks:
    """Functions and objects that the loop calls; the defaults do nothing."""

    log: Log = field(default_factory=NullLog)
    profiler: Profiler = field(default_factory=Profiler)
    evaluate: Callable[[], None] = lambda: None
    save_checkpoint: Callable[[State], None] = lambda state: None
    stop_signal: Callable[[int], int] = lambda step: 0  # number of the signal that ends the run after `step`, or 0
    check_gradients: Callable[[int, list[float]], None] = lambda step, norms: None  # norms of the steps before `step`


def fit(replica: Replica, batches: Batches, plan: Plan, state: State, cfg: Config, callbacks: Callbacks) -> None:
    """Train from `state.step` to the end of the plan, or until a rank receives a signal."""
    objective = Objective(cfg.loss, cfg.duplicates, cfg.hardness)
    step = Step(replica, objective, cfg.clip_norm, callbacks.profiler)
    if cfg.cuda_graph == "auto" and should_capture(batches, plan.steps - state.step, replica.world):
        graphed = GraphedStep(step, batches.features, replica.optimizer, plan.batch_size, callbacks.log.say,
                              callbacks.profiler.region)
        loop(graphed, batches.rows.from_step(state.step), plan, state, cfg, callbacks)
    else:
        loop(step, batches.from_step(state.step), plan, state, cfg, callbacks)


def loop(step: Callable[[Inputs, int, float], tuple[Tensor, Tensor]], stream: Iterator[Inputs], plan: Plan,
         state: State, cfg: Config, callbacks: Callbacks) -> None:
    """Take a step for each item of the stream; log, save and evaluate when it is time."""
    log = callbacks.log
    while state.step < plan.steps and not state.stopped and not state.enough:
        with log.waiting():
            inputs = next(stream)
        rows = plan.rows_at(state.step)
        lr = learning_rate(state.step, plan.steps, cfg.lr, cfg.schedule, cfg.warmup)
        loss, grad_norm = step(inputs, rows, lr)
        state.step += 1
        log.step(state.step, loss, grad_norm, lr, rows)
        callbacks.profiler.step()
        state.stopped = callbacks.stop_signal(state.step)

        evaluate_now = plan.due(state.step, cfg.eval_every) and not state.stopped
        save_now = plan.due(state.step, cfg.save_every) or evaluate_now or state.stopped
        if plan.due(state.step, cfg.log_every) or save_now:
            grad_norms = log.flush()  # the only host sync, besides stop_signal's about once a second
            callbacks.check_gradients(state.step, grad_norms)
        if save_now:  # before the evaluation, which a signal may cut off
            with log.pause_step_clock("checkpoint"):
                callbacks.save_checkpoint(state)
        if evaluate_now:
            with log.pause_step_clock("evaluate"):
                callbacks.evaluate()


@dataclass(frozen=True)
class Step:
    """One update of what trains, from this rank's part of a global batch."""

    replica: Replica
    objective: Objective
    clip_norm: float
    profiler: Profiler

    def __call__(self, inputs: Batch | Features, rows: int, lr: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the loss of `rows` rows, and the gradient norm of all; both on the device."""
        world, optimizer, precision = self.replica.world, self.replica.optimizer, self.replica.precision
        region, device, mixed = self.profiler.region, world.device.type, precision.itemsize < 4
        with region("project"), torch.autocast(device, precision, enabled=mixed):
            out = self.replica.model(inputs)
        with region("loss"), tf32_products() if mixed and device == "cuda" else nullcontext():
            loss = global_batch_loss(self.objective, world, out, inputs, rows)
        with region("backward"), explain_collective_errors("averaging gradients"):
            loss.backward(torch.full_like(loss, world.size))  # DDP averages over ranks, the parts of the loss add up
            loss = optimizer.add_penalty(loss.detach(), world.size)
        with region("optim"):
            grad_norm = update(optimizer, lr, self.clip_norm)
        return loss, grad_norm


def global_batch_loss(objective: Objective, world: World, out: Embeddings, inputs: Batch | Features,
                      rows: int) -> Tensor:
    """Return this rank's part of the mean loss of a global batch of `rows`, against the candidates of all ranks.

    The parts of all ranks add up to the mean. Symmetric: half image to text, half text to image over the positives
    (Radford et al. 2021, arXiv 2103.00020, figure 3; equals sentence-transformers' directions query_to_doc and
    doc_to_query with partition_mode "per_direction").
    """
    shares = [share(rows, rank, world.size) for rank in range(world.size)]
    sizes, first_row = [stop - start for start, stop in shares], shares[world.rank][0]
    image_BE, text_XE, scale = out
    titles = gather_titles(world, text_XE, inputs, sizes)
    image_to_text = objective.sum_over_rows(image_BE, titles, scale, first_row)
    if objective.loss != "symmetric":
        return image_to_text / rows
    images = Candidates(world.gather(image_BE, sizes), titles.title_id_C[:rows], titles.image_id_C[:rows])
    text_to_image = replace(objective, hardness=0.0).sum_over_rows(text_XE[: len(image_BE)], images, scale, first_row)
    return (image_to_text + text_to_image) / (2 * rows)


def gather_titles(world: World, text_XE: Tensor, inputs: Batch | Features, sizes: Sequence[int]) -> Candidates:
    """Return the titles of all ranks, then negative 1 of all rows, …, with gradient; rank r holds sizes[r] rows."""
    ids = [inputs.image_id_B, inputs.title_id_B]
    if inputs.negative_id_BH is not None:
        ids += inputs.negative_id_BH.unbind(1)
    if world.size > 1:
        ids = list(world.gather(torch.stack(ids, 1), sizes).unbind(1))
        text_BKE = text_XE.unflatten(0, (len(ids) - 1, len(inputs.title_id_B))).transpose(0, 1)
        text_XE = world.gather(text_BKE, sizes).transpose(0, 1).flatten(0, 1)
    image_id_G, title_id_G, *negative_ids = ids
    if not negative_ids:
        return Candidates(text_XE, title_id_G, image_id_G)
    no_images = [torch.full_like(image_id_G, -1)] * len(negative_ids)
    return Candidates(text_XE, torch.cat([title_id_G, *negative_ids]), torch.cat([image_id_G, *no_images]))


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside, fp32 matrix products use TF32: faster where a GPU has it, and finer than the bf16 of the embeddings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
