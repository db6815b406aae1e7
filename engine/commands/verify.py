"""`run.py verify`: compute parts of a run again and compare, or check the feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.batch import UserError
from data.cold import EarlierRun
from data.ledger import read_ledger
from data.store.upkeep import delete_spaces, describe_spaces, verify_spaces
from engine.commands import auto
from engine.commands.common import (
    Source,
    cache_folder,
    evaluate_splits,
    load_model,
    make_encoders,
    model_records,
    open_data,
    open_probe,
    open_source,
    with_probe,
)
from engine.commands.train import evaluated_splits, make_saver
from engine.commands.training import RowTraining, split_dataset
from engine.config.fields import Config
from engine.optim import Plan
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import verification
from engine.run_folder.checkpoint import State
from engine.run_folder.folder import read_metrics, settings_of
from engine.run_folder.replay import ReopenedRun, replay_steps
from engine.run_folder.verification import Finding

# Settings that belong to the machine that verifies: they replace those with which the run was started.
MACHINE = ("cache_dir", "device", "workers", "allow_host", "proxy", "max_pixels")


def verify(cfg: Config, world: World, stop: StopSignal) -> int:
    """Print every difference from what was written, in a run folder or the feature store; exit code 1 if any."""
    if not cfg.run:
        return verify_store(cfg, world)
    run = Path(cfg.run).expanduser()
    if (run / "sweep.jsonl").exists():
        raise UserError(f"--run {run} is a sweep's folder and has no steps; train with --config {run}/recipe.toml and "
                        "verify that run")
    settings = {name: getattr(cfg, name) for name in MACHINE}
    for name in ("dataset", "model"):
        if getattr(cfg, name):  # it has moved since
            settings[name] = getattr(cfg, name)
    run_cfg = replace(settings_of(run), **settings)
    findings, checkpoints = verification.check_files(run)
    findings.append(verification.check_exported_weights(run, checkpoints))
    try:
        findings += rerun(run_cfg, world, run, checkpoints)
    except UserError as error:  # data or base model gone
        findings.append(Finding("replay and metrics", verification.UNCHECKED, str(error)))
    world.show(verification.format_findings(findings))
    return int(any(finding.verdict == verification.FAILED for finding in findings))


def rerun(cfg: Config, world: World, run: Path, checkpoints: Sequence[Path]) -> list[Finding]:
    """Train some steps of the run in `run` again, and measure its exported model again. Raises UserError."""
    cfg, shards = split_dataset(cfg, world.say)
    ledger = read_ledger(run / "ledger.jsonl")
    source = open_source(cfg, world, shards=shards.measured, run=EarlierRun(ledger, replays=True))
    if shards.train:
        findings = [Finding("replay", verification.UNCHECKED, "resuming changes the order of a stream of shards")]
    elif cfg.recipe == "auto":
        model = load_model(cfg, world, reread=True)
        findings = [auto.recompute(cfg, world, run, model, open_data(cfg, world, model, source))]
    else:
        findings = replay(cfg, world, run, checkpoints, source)
    if not (run / "model").exists():
        return findings

    # Open the same pairs with the exported model.
    tuned_cfg = replace(cfg, model=str(run / "model"))
    tuned = load_model(tuned_cfg, world, reread=True)
    probe = open_probe(tuned_cfg, world)
    pairs = open_data(tuned_cfg, world, tuned, source)
    pairs = with_probe(tuned_cfg, world, tuned, pairs, probe)
    recorded = read_metrics(run).get("tuned", {})
    retrieval = evaluate_splits(pairs.feature_splits(recorded), tuned.head)
    scores = {name: split.summarise() for name, split in retrieval.items()}
    exact = verification.same_machine(run, world) and not any(finding.difference for finding in findings)
    return [*findings, verification.check_metrics(scores, recorded, exact)]


def replay(cfg: Config, world: World, run: Path, checkpoints: Sequence[Path], source: Source) -> list[Finding]:
    """Train some steps of a run again."""
    # Open the run as `train` does, from the base model.
    model = load_model(cfg, world, reread=True)
    pairs = open_data(cfg, world, model, source)
    pairs = with_probe(cfg, world, model, pairs, open_probe(cfg, world))
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    training = RowTraining(pairs, world, run)
    saver = make_saver(cfg, world, run, model, training, evaluated_splits(cfg, pairs))
    step_world = training.step_world(cfg, world, model)
    batches = training.batches(cfg, State(), step_world)
    ledger = training.ledger()
    return replay_steps(cfg, step_world, ReopenedRun(run, checkpoints, model, saver, plan, ledger, batches,
                                                     training.lost))


def verify_store(cfg: Config, world: World) -> int:
    """Print which stored features are damaged; with --prune, delete those of all models but --model."""
    if not world.is_main:
        return 0
    cache = cache_folder(cfg)
    spaces = verify_spaces(cache)
    world.show(describe_spaces(spaces))
    if cfg.prune:
        keep: set[str] = set()
        if cfg.model:
            encoders = make_encoders(load_model(cfg, world, reread=True))
            keep = {encoders.image_space, encoders.text_space}
        kept = sorted(keep & {space.name for space in spaces})
        pruned = delete_spaces(cache, keep)
        freed = pruned.freed + model_records(cfg, world).prune(cfg.model)
        for name, reason in pruned.kept.items():
            world.show(f"{name} stays: {reason}")
        for path in pruned.odd:
            world.show(f"{path} stays: it is no regular file")
        world.show(f"pruned {freed / 1e6:,.1f} MB; kept {', '.join([*kept, *pruned.kept]) or 'nothing'}")
    return int(any(space.damaged for space in spaces))
