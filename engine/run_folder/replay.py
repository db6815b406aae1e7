"""Some steps of a run trained again, from the base model and from a checkpoint, for `run.py verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data.batch import Batches
from data.lost import LostPictures
from engine.clip.model import LoadedModel, distribute
from engine.config.fields import Config
from engine.optim import Plan
from engine.ranks.world import World
from engine.run_folder.checkpoint import (
    SavedState,
    Saver,
    State,
    changes_since,
    load,
    missing_identity,
    parse_state,
)
from engine.run_folder.log import NullLog
from engine.run_folder.verification import (
    FAILED,
    UNCHECKED,
    Finding,
    check_ledger,
    check_order,
    check_steps,
    compare_losses,
    read_steps,
    replay_name,
)
from engine.train import Callbacks, Replica, fit

REPLAYED = 5  # steps trained again from each place


@dataclass(frozen=True)
class ReopenedRun:
    """A run folder, and the run opened again from its settings: nothing in it is written."""

    folder: Path
    checkpoints: Sequence[Path]  # the undamaged ones, oldest first
    model: LoadedModel
    saver: Saver  # its optimizer is at the base model
    plan: Plan
    ledger: Sequence[Mapping[str, object]]  # the rows dropped now
    batches: Batches
    lost: LostPictures | None  # pictures that the run has lost while it streamed


def replay_steps(cfg: Config, world: World, run: ReopenedRun) -> list[Finding]:
    """Compare steps, ledger, order and losses of the run with the same computed again."""
    saver, logged = run.saver, read_steps(run.folder)
    model = distribute(run.model.trained_model(cfg.micro_batch), world.size)
    findings = [check_steps(logged, run.plan.rows_at), check_ledger(run.folder, run.ledger),
                check_order(run.checkpoints, saver.order), _replay_from(State(), cfg, world, run, model)]
    newest: SavedState = {"identity": saver.identity, "recipe": saver.recipe}
    if run.checkpoints:
        newest = load(run.checkpoints[-1]).saved
    if missing := missing_identity(newest, saver.identity):
        findings.append(Finding("data, model, recipe", UNCHECKED, f"not recorded: {', '.join(missing)}"))
    last_step = max(logged, default=0)
    # That of the last step has no steps behind it to train again.
    earlier = [folder for folder in run.checkpoints if int(folder.name.removeprefix("step-")) < last_step]
    changed = changes_since(newest, saver.identity, saver.recipe)
    if not changed and earlier:
        content = load(earlier[-1])
        changed = saver.restore(content)
        if not changed:
            findings.append(_replay_from(parse_state(content.saved), cfg, world, run, model))
    if changed:
        findings.append(Finding("data, model, recipe", FAILED, "; ".join(changed)))
    return findings


def _replay_from(state: State, cfg: Config, world: World, run: ReopenedRun, model: nn.Module) -> Finding:
    """Train REPLAYED steps from `state` on and compare their losses with those in steps.jsonl."""
    recorder = Recorder(world)
    start, end = state.step, state.step + REPLAYED
    callbacks = Callbacks(log=recorder, stop_signal=lambda step: int(step >= end))
    replica = Replica(model, run.saver.optimizer, world, run.model.precision)
    fit(replica, run.batches, run.plan, state, cfg, callbacks)
    losses = recorder.losses
    if run.lost is not None:
        # From the first step on at which this replay has found a picture lost, its batches are not those of the run.
        gone_at = min((step for step in run.lost.met if step > start), default=end + 1)
        losses = {step: loss for step, loss in losses.items() if step < gone_at}
        if not losses and recorder.losses:
            return Finding(replay_name(start), UNCHECKED, f"step {gone_at} needs pictures that were lost after it")
    return compare_losses(start, losses, read_steps(run.folder), run.model.precision)


class Recorder(NullLog):
    """A log that keeps the losses and writes nothing."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.losses: dict[int, float] = {}

    def step(self, step: int, loss: Tensor, *_: object) -> None:
        """Keep the loss of a step, summed over ranks."""
        self.losses[step] = float(self.world.sum(loss))
