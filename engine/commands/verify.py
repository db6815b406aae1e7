"""`run.py verify`: prove a run again, or check the feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.batch import UserError
from data.images.decode import ImageSpec
from data.store.upkeep import delete_spaces, describe_spaces, verify_spaces
from engine.commands.common import (
    evaluate_splits,
    load_model,
    make_encoders,
    open_data,
    open_probe,
    open_source,
    with_probe,
)
from engine.commands.train import evaluated_splits, make_saver
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import verification as again
from engine.run_folder.folder import read_json, settings_of
from engine.run_folder.replay import ReopenedRun, replay_steps
from engine.run_folder.verification import Finding
from engine.train import Plan


def verify(cfg: Config, world: World, stop: StopSignal) -> int:
    """Check a run folder again, or the feature store; exit 1 when something is not what it was."""
    if not cfg.run:
        return verify_store(cfg, world)
    run = Path(cfg.run).expanduser()
    if (run / "sweep.jsonl").exists():
        raise UserError(f"--run {run} is a sweep's folder and has no steps; train with --config {run}/recipe.toml and "
                        "verify that run")
    machine = ("device", "workers", "allow_host", "proxy", "max_pixels")  # of this machine, not of the run's
    mine = {name: getattr(cfg, name) for name in machine}
    given = {name: getattr(cfg, name) for name in ("dataset", "model") if getattr(cfg, name)}
    old = replace(settings_of(run), cache_dir=cfg.cache_dir, **mine, **given)
    findings, whole = again.check_files(run)
    findings.append(again.check_exported_weights(run, whole))
    try:
        findings += rerun(old, world, run, whole)
    except UserError as error:  # data or base model gone
        findings.append(again.Finding("replay and metrics", again.UNCHECKED, str(error)))
    if world.is_main:
        print(again.format_findings(findings), flush=True)
    return int(again.any_failed(findings))


def rerun(cfg: Config, world: World, run: Path, whole: Sequence[Path]) -> list[Finding]:
    """Train a few steps again, and measure the exported model again."""
    source = open_source(cfg, world)
    parts = load_model(cfg, world)
    pairs = with_probe(cfg, world, parts, open_data(cfg, world, parts, source), open_probe(cfg, world))
    plan = Plan(len(pairs.splits["train"]), cfg.batch_size, cfg.epochs)
    saved = make_saver(cfg, world, run, parts, pairs, evaluated_splits(cfg, pairs))
    batches = pairs.batches("train", cfg.batch_size, cfg.seed, world.device)
    findings = replay_steps(cfg, world, ReopenedRun(run, whole, parts, saved, plan, pairs.ledger, batches))
    if not (run / "model").exists():
        return findings
    written, tuned = read_json(run / "metrics.json").get("tuned", {}), replace(cfg, model=str(run / "model"))
    parts, probe = load_model(tuned, world), open_probe(tuned, world)
    again_pairs = with_probe(tuned, world, parts, open_data(tuned, world, parts, source), probe)
    found = evaluate_splits(again_pairs.residents(), parts.head, written)
    scores = {name: one.summarise() for name, one in found.items()}
    exact = again.same_machine(run, world) and not any(finding.difference for finding in findings)
    return [*findings, again.check_metrics(scores, written, exact)]


def verify_store(cfg: Config, world: World) -> int:
    """Read the feature store again; with --prune, delete what is not --model's."""
    if not world.is_main:
        return 0
    cache, keep = Path(cfg.cache_dir).expanduser(), set[str]()
    found = verify_spaces(cache)
    print(describe_spaces(found))
    if cfg.prune and cfg.model:
        parts = load_model(cfg, world)
        towers = make_encoders(parts, ImageSpec.from_processor(parts.clip.image_processor).fingerprint(), world.device)
        keep = {towers.image_space, towers.text_space}
    if cfg.prune:
        kept = sorted(keep & {space.name for space in found})
        print(f"pruned {delete_spaces(cache, keep) / 1e6:,.1f} MB; kept {', '.join(kept) or 'nothing'}")
    return int(any(space.damaged for space in found))
