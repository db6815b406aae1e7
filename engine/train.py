"""The training loop: `fit` picks the step, `loop` runs it, for cached or streamed inputs and any number of ranks.

Dimension key: B rows of this rank, G rows of all ranks, H hard negatives of a row, K = 1 + H texts of a row, X = K * B
texts (titles, negative 1 of all rows, negative 2 of all rows, …), C candidates, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from data.batch import Batch, Batches, Features, share
from engine.clip.model import Embeddings
from engine.config.fields import Config
from engine.cuda_graph import GraphedStep, Outputs, should_capture
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
    precision: torch.dtype  # of the towers, and of autocast in what trains where it is bf16; the loss is fp32


@dataclass(frozen=True)
class Callbacks:
    """Functions and objects that the loop calls; the defaults do nothing."""

    log: Log = field(default_factory=NullLog)
    profiler: Profiler = field(default_factory=Profiler)
    evaluate: Callable[[], None] = lambda: None
    save_checkpoint: Callable[[State], None] = lambda state: None
    stop_signal: Callable[[int], int] = lambda step: 0  # number of the signal that ends the run after `step`, or 0
    check_gradients: Callable[[Mapping[int, float]], None] = lambda norms: None  # gradient norms by step


def fit(replica: Replica, batches: Batches, plan: Plan, state: State, cfg: Config, callbacks: Callbacks) -> None:
    """Train from `state.step` to the end of the plan, or until a rank receives a signal."""
    # On a GPU products of bf16 factors take half the time of TF32's. They lose no precision that is not lost already:
    # the projection computes the embeddings in bf16.
    in_bf16 = replica.precision is torch.bfloat16 and replica.world.device.type == "cuda"
    objective = Objective(cfg.loss, cfg.duplicates, cfg.hardness, torch.bfloat16 if in_bf16 else None)
    step = Step(replica, objective, cfg.clip_norm, callbacks.profiler)
    if cfg.cuda_graph == "auto" and should_capture(batches, plan.steps - state.step, replica.world):
        graphed = GraphedStep(step, batches.features, replica.optimizer, plan.batch_size, callbacks.log.say,
                              callbacks.profiler.region)
        loop(graphed, batches.rows.from_step(state.step), plan, state, cfg, callbacks)
    else:
        loop(step, batches.from_step(state.step), plan, state, cfg, callbacks)


def loop(step: Callable[[Inputs, int, float], Outputs], stream: Iterator[Inputs], plan: Plan, state: State,
         cfg: Config, callbacks: Callbacks) -> None:
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
        save_now = plan.due(state.step, cfg.save_every) or evaluate_now or bool(state.stopped)
        if plan.due(state.step, cfg.log_every) or save_now:
            # The host waits for the device here before a checkpoint, in stop_signal about once a second, and nowhere
            # else in the loop.
            callbacks.check_gradients(log.flush(wait=bool(save_now)))
        if save_now:  # before the evaluation, which a signal may interrupt
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

    def __call__(self, inputs: Batch | Features, rows: int, lr: float | Tensor) -> Outputs:
        """Return this rank's part of the loss of a global batch of `rows` rows, and the norm of the whole gradient.

        Both are tensors on the device.
        """
        world, optimizer, precision = self.replica.world, self.replica.optimizer, self.replica.precision
        region = self.profiler.region
        # With fp16 towers the projections train in fp32: gradients below 6e-8 would be 0 in fp16.
        mixed = precision is torch.bfloat16
        with region("project"), torch.autocast(world.device.type, precision, enabled=mixed):
            out = self.replica.model(inputs)
        with region("loss"):
            loss = global_batch_loss(self.objective, world, out, inputs, rows)
        with region("backward"), explain_collective_errors("averaging gradients"):
            # DDP averages gradients over ranks, and here the ranks' parts of the loss have to add up: hence the factor.
            # Passed to backward() as a gradient, it would make torch import sympy to compare shapes, .3 s.
            (loss if world.size == 1 else loss * world.size).backward()
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
    symmetric = objective.loss == "symmetric"
    titles, images = gather_candidates(world, out, inputs, sizes, symmetric)
    image_to_text = objective.sum_over_rows(image_BE, titles, scale, first_row)
    if not symmetric:
        return image_to_text / rows
    title_BE = text_XE[: len(image_BE)]
    without_hardness = replace(objective, hardness=0.0)  # hardness is defined for images that choose a title
    text_to_image = without_hardness.sum_over_rows(title_BE, images, scale, first_row)
    return (image_to_text + text_to_image) / (2 * rows)


def gather_candidates(world: World, out: Embeddings, inputs: Batch | Features, sizes: Sequence[int],
                      with_images: bool) -> tuple[Candidates, Candidates]:
    """Return the texts and the images of all ranks as candidates, with gradient; rank r holds sizes[r] rows.

    The texts are the titles, then negative 1 of all rows, …. Without `with_images`, images are not gathered. Several
    ranks exchange everything in one collective, since the time of a small one is its launch.
    """
    image_BE, text_XE, _ = out
    ids = [inputs.image_id_B, inputs.title_id_B]
    if inputs.negative_id_BH is not None:
        ids += inputs.negative_id_BH.unbind(1)
    if world.size > 1:
        image_BE = image_BE if with_images else image_BE[:, :0]
        texts, width = len(ids) - 1, text_XE.shape[1]
        # One line of floats a row, F = K * E (+ E with images), so that one all-gather carries texts and images.
        text_BF = text_XE.unflatten(0, (texts, len(inputs.title_id_B))).transpose(0, 1).flatten(1)
        rows_GF, ids_GN = world.gather(torch.cat([text_BF, image_BE], 1), torch.stack(ids, 1), sizes)
        text_XE = rows_GF[:, : texts * width].unflatten(1, (texts, width)).transpose(0, 1).flatten(0, 1)
        image_BE = rows_GF[:, texts * width :]
        ids = list(ids_GN.unbind(1))
    image_id_G, title_id_G, *negative_ids = ids
    images = Candidates(image_BE, title_id_G, image_id_G)
    if not negative_ids:
        return Candidates(text_XE, title_id_G, image_id_G), images
    no_images = [torch.full_like(image_id_G, -1)] * len(negative_ids)
    texts_of_all = Candidates(text_XE, torch.cat([title_id_G, *negative_ids]), torch.cat([image_id_G, *no_images]))
    return texts_of_all, images
