"""Checks of a finished run for `run.py verify`; each returns a Finding for its table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.batch import UserError
from data.reading import open_regular, parse_json, read_text
from data.text import DIGEST
from engine.ranks.world import World
from engine.run_folder.board import Metrics
from engine.run_folder.checkpoint import LINKS, DamagedCheckpoint, Order, load
from engine.run_folder.folder import ledger_lines, manifest_problems, read_json
from engine.run_folder.repair import pointed_name

OK, FAILED, UNCHECKED = "ok", "FAILED", "not checked"


class Finding(NamedTuple):
    """The result of one check: a verdict (OK, FAILED or UNCHECKED) and one phrase of detail."""

    subject: str
    verdict: str
    detail: str
    difference: float = 0.0  # of losses computed again from those written


def check_files(run: Path) -> tuple[list[Finding], list[Path]]:
    """Compare every file with its manifest; return the undamaged checkpoints too, oldest first."""
    findings: list[Finding] = []
    whole: list[Path] = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        try:
            load(folder)
            whole.append(folder)
            findings.append(Finding(f"checkpoint {folder.name}", OK, "every file is what was written"))
        except DamagedCheckpoint as error:
            findings.append(Finding(f"checkpoint {folder.name}", FAILED, str(error)))
    for folder in sorted((run / "checkpoints").glob("damaged-*")):
        findings.append(Finding(folder.name, UNCHECKED, "damaged; set aside by an earlier --resume"))
    if (run / "checkpoints").is_dir():
        findings += _check_links(run / "checkpoints")
    elif os.path.lexists(run / "checkpoints"):
        findings.append(Finding("checkpoints", FAILED, "no folder"))
    try:
        broken = manifest_problems(run)
    except UserError as error:
        broken = [str(error)]
    if broken is None:
        findings.append(Finding("model, metrics, steps", UNCHECKED, "no manifest.json: the run has not finished"))
        findings += _check_unfinished(run)
    elif broken:
        findings += [Finding("finished run", FAILED, problem) for problem in broken]
    else:
        detail = "model, metrics, logs, ledger, settings, answers and page are what was written"
        findings.append(Finding("finished run", OK, detail))
    return findings, whole


def _check_links(root: Path) -> list[Finding]:
    """Return a finding for each of `last` and `best` that is there and leads to no checkpoint."""
    findings = []
    for name in LINKS:
        link = root / name
        is_checkpoint = link.is_dir() or (root / (pointed_name(link) or "none")).is_dir()
        if os.path.lexists(link) and not is_checkpoint:
            findings.append(Finding(f"checkpoint {name}", FAILED, "points at a checkpoint that is not there"))
    return findings


def _check_unfinished(run: Path) -> list[Finding]:
    """Return a finding for each file of a run without a manifest that cannot be read."""
    findings = []
    for name in ("metrics.json", "evaluations.jsonl", "answers.npz"):
        try:
            if name == "answers.npz":
                with open_regular(run / name) as file, ZipFile(file) as archive:
                    problem = archive.testzip() and "an entry is damaged"
            else:
                text = read_text(run / name)
                values = text.splitlines() if name.endswith(".jsonl") else [text]
                problem = "" if all(isinstance(parse_json(value), dict) for value in values) else "no JSON object"
        except FileNotFoundError:
            problem = "" if not os.path.lexists(run / name) else "a link to nothing"
        except (OSError, ValueError, BadZipFile) as error:
            problem = str(error)
        if problem:
            findings.append(Finding(name, FAILED, problem))
    return findings


class StepLine(NamedTuple):
    """A line of steps.jsonl."""

    rows: int
    loss: float | None  # null for NaN


def read_steps(run: Path) -> dict[int, StepLine]:
    """Return the lines of steps.jsonl by step, in their order; {} when one is damaged."""
    steps = {}
    try:
        for text in read_text(run / "steps.jsonl").splitlines():
            line = parse_json(text)
            steps[int(line["step"])] = StepLine(line["rows"], line["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return steps


def check_steps(logged: Mapping[int, StepLine], rows_at: Callable[[int], int]) -> Finding:
    """Check that steps.jsonl has one line for every step, in order, with the rows of its batch."""
    if not logged or list(logged) != list(range(1, len(logged) + 1)):
        return Finding("steps.jsonl", FAILED, "it cannot be read, or steps are missing or out of order")
    for step, line in logged.items():
        if line.rows != rows_at(step - 1):
            return Finding("steps.jsonl", FAILED, f"step {step} has another number of rows")
    return Finding("steps.jsonl", OK, f"steps 1 to {len(logged)}, none missing")


def replay_name(start: int) -> str:
    """Return the name of the check that trains again from a step on."""
    return f"replay from step {start}" if start else "replay from the base model"


def compare_losses(start: int, losses: Mapping[int, float], logged: Mapping[int, StepLine],
                   precision: torch.dtype) -> Finding:
    """Compare the losses of steps trained again from step `start` on with those logged."""
    shared = [step for step in losses if step in logged]
    subject = replay_name(start)
    if not shared:
        return Finding(subject, UNCHECKED, f"steps.jsonl has no step after {start}")
    difference = max(_difference(losses[step], logged[step].loss) for step in shared)
    # In fp32 other batches or thread counts change the last bits of a loss; bf16 keeps 8 bits, 4e-3 of a value.
    tolerance = 1e-5 if precision == torch.float32 else 1e-2
    detail = f"losses of steps {shared[0]} to {shared[-1]}: largest difference {difference:.2g}"
    return Finding(subject, OK if difference <= tolerance else FAILED, detail, difference)


def check_ledger(run: Path, dropped: Sequence[Mapping[str, object]]) -> Finding:
    """Compare the rows dropped now with those in ledger.jsonl; what addresses are signed with differs every day."""
    try:
        text = read_text(run / "ledger.jsonl").removesuffix("\n")
        lines = [parse_json(DIGEST.sub("", line)) for line in text.split("\n")] if text else []
        lines.sort(key=json.dumps)
    except (OSError, ValueError) as error:
        return Finding("ledger.jsonl", FAILED, str(error))
    now = [json.loads(DIGEST.sub("", line)) for line in ledger_lines(dropped)]
    if lines == sorted(now, key=json.dumps):
        return Finding("ledger.jsonl", OK, f"{len(lines)} rows dropped, the same ones")
    return Finding("ledger.jsonl", FAILED, f"{len(lines)} rows were dropped, {len(dropped)} are now")


def same_machine(run: Path, world: World) -> bool:
    """Return whether the run used this version of torch and a CPU, as this process does: results are then exact."""
    saved = read_json(run / "config.json")
    device, version = saved.get("devices", {}).get("kind"), saved.get("versions", {}).get("torch")
    return device == world.device.type == "cpu" and version == torch.__version__


def check_order(whole: Sequence[Path], digest: Order) -> Finding:
    """Compare the order of pairs up to each checkpoint, computed again, with the digest stored in it."""
    wrong = []
    for folder in whole:
        saved = load(folder).saved
        if saved.get("order") != digest.at_step(saved["state"]["step"]):
            wrong.append(folder.name)
    if wrong:
        return Finding("order of pairs", FAILED, f"differs in {', '.join(wrong)}")
    return Finding("order of pairs", OK, f"{len(whole)} digests computed again are the same")


def check_exported_weights(run: Path, whole: Sequence[Path]) -> Finding:
    """Check that the exported weights equal those of a checkpoint, to the bit."""
    try:
        exported = load_file(run / "model" / "projections.safetensors")
    except (OSError, SafetensorError) as error:
        return Finding("exported weights", UNCHECKED, str(error))
    for folder in reversed(whole):
        weights = load(folder).weights
        same_names = weights.keys() == exported.keys()
        if same_names and all(torch.equal(weights[name], exported[name]) for name in weights):
            return Finding("exported weights", OK, f"equal those of {folder.name}")
    metrics: Mapping[str, object] = {}
    with suppress(UserError):  # damaged: the manifest says so
        metrics = read_json(run / "metrics.json")
    if "auto" in metrics:
        return Finding("exported weights", UNCHECKED, "--recipe auto keeps no checkpoints; see choice and weights")
    if "interpolation" in metrics:
        return Finding("exported weights", UNCHECKED, "they lie between the base model and a checkpoint")
    return Finding("exported weights", FAILED, "those of no checkpoint that is whole")


def check_metrics(measured: Metrics, written: Metrics, exact: bool) -> Finding:
    """Compare metrics of the exported model, measured again, with those in metrics.json; both by split.

    Without `exact` (other hardware, or features encoded in other batches) close calls may be ranked differently.
    """
    differences = []
    for split, values in written.items():
        for name, before in values.items():
            if isinstance(before, (int, float)):
                now = measured.get(split, {}).get(name, math.inf)
                relative = abs(before - now) / max(1.0, abs(before))
                differences.append(math.inf if math.isnan(relative) else relative)
    if not differences:
        return Finding("metrics.json", UNCHECKED, "it holds no metrics of a tuned model yet")
    largest = max(differences)
    tolerance = 1e-6 if exact else 0.02
    detail = f"{len(differences)} figures measured again: largest relative difference {largest:.2g}"
    return Finding("metrics.json", OK if largest <= tolerance else FAILED, detail)


def format_findings(findings: Sequence[Finding]) -> str:
    """Return the findings as a table in plain text, with the number of each verdict below."""
    subject_width = max(len(finding.subject) for finding in findings)
    verdict_width = max(len(finding.verdict) for finding in findings)
    lines = []
    for subject, verdict, detail, _ in findings:
        lines.append(f"{subject:{subject_width}}  {verdict:{verdict_width}}  {detail}")
    verdicts = [finding.verdict for finding in findings]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in (OK, FAILED, UNCHECKED)]
    return "\n".join([*lines, ", ".join(counts)])


def _difference(loss: float, logged: float | None) -> float:
    """Return the absolute difference; 0 where both are NaN (written as null or NaN), infinity where one is."""
    if logged is None or math.isnan(logged):
        return 0.0 if math.isnan(loss) else math.inf
    return math.inf if math.isnan(loss) else abs(loss - logged)
