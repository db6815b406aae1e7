"""Some steps of a run trained again, from the base model and from a checkpoint: what `run.py verify` compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batch import Batches
from engine.clip.model import LoadedModel, distribute
from engine.config.fields import Config
from engine.ranks.world import World
from engine.run_folder.checkpoint import Saver, State, differences, load, state_of, unrecorded
from engine.run_folder.log import Silent
from engine.run_folder.verification import FAILED, UNCHECKED, Finding, ledger, orders, read_steps, replay, steps
from engine.train import Callbacks, Plan, Replica, fit

REPLAYED = 5  # steps trained again from each place


def replay_steps(cfg: Config, world: World, run: Path, whole: Sequence[Path], parts: LoadedModel, saved: Saver, plan: Plan,
            dropped: Sequence[Mapping[str, Any]], batches: Batches) -> list[Finding]:
    """Steps, ledger, order and losses of the run in `run` against the same computed again; nothing is written.

    `whole` are its undamaged checkpoints, oldest first; the other arguments are the run opened again: model, optimizer
    at the base model, plan, ledger, batches.
    """
    def again(state: State) -> Finding:
        recorder, start, end = Recorder(world), state.step, state.step + REPLAYED
        callbacks = Callbacks(log=recorder, stop_signal=lambda step: int(step >= end))
        fit(Replica(model, saved.optimizer, world, parts.precision), batches, plan, state, cfg, callbacks)
        return replay(start, recorder.losses, logged, parts.precision)

    model, logged = distribute(parts.trained_model(cfg.micro_batch), world.size), read_steps(run)
    findings = [steps(logged, plan.rows_at), ledger(run, dropped), orders(whole, saved.order), again(State())]
    remembered = load(whole[-1])[2] if whole else {"identity": saved.identity, "recipe": saved.recipe}
    if missing := unrecorded(remembered, saved.identity):
        findings.append(Finding("data, model, recipe", UNCHECKED, f"not recorded: {', '.join(missing)}"))
    earlier = [folder for folder in whole if int(folder.name[5:]) < max(logged, default=0)]
    changed, state = differences(remembered, saved.identity, saved.recipe), State()
    if not changed and earlier:
        content = load(earlier[-1])
        changed, state = saved.restore(content), state_of(content[2])
    if changed:
        findings.append(Finding("data, model, recipe", FAILED, "; ".join(changed)))
    elif earlier:
        findings.append(again(state))
    return findings


class Recorder(Silent):
    """Takes the place of the Log in a replay: keeps the losses, writes nothing."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.losses = world, dict[int, float]()

    def step(self, step: int, loss: Tensor, *_: Any) -> None:
        """Note the loss of a step, summed over ranks."""
        self.losses[step] = float(self.world.sum(loss))
