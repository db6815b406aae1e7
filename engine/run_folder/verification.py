"""What a run folder claims, checked again: each finding says what was compared, or why it could not be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data.files import read_text
from engine.ranks.world import World
from engine.run_folder.checkpoint import DamagedCheckpoint, load
from engine.run_folder.folder import manifest_problems, read_json

OK, FAILED, UNCHECKED = "ok", "FAILED", "not checked"


class Finding(NamedTuple):
    """One thing looked at: a verdict (OK, FAILED or UNCHECKED) and one phrase for people."""

    what: str
    verdict: str
    detail: str
    apart: float = 0.0  # how far figures computed again are from those written


def files(run: Path) -> tuple[list[Finding], list[Path]]:
    """Every manifest in the folder against the bytes; and the checkpoints that are whole, oldest first."""
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
    for name in ("last", "best"):
        link = run / "checkpoints" / name
        if link.is_symlink() and not link.exists():
            findings.append(Finding(f"checkpoint {name}", FAILED, "points at a checkpoint that is not there"))
    broken = manifest_problems(run)
    if broken is None:
        findings.append(Finding("model, metrics, steps", UNCHECKED, "no manifest.json: the run has not finished"))
    else:
        findings += [Finding("finished run", FAILED, one) for one in broken] or [
            Finding("finished run", OK, "model, metrics, steps, ledger and settings are what was written")]
    return findings, whole


def read_steps(run: Path) -> dict[int, dict[str, Any]]:
    """The lines of steps.jsonl by step, in the order they stand there; {} when one is damaged."""
    try:
        lines = read_text(run / "steps.jsonl").splitlines()
        return {int(line["step"]): {"rows": line["rows"], "loss": line["loss"]} for line in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def steps(logged: Mapping[int, Mapping[str, Any]], rows_at: Callable[[int], int]) -> Finding:
    """Is there one line for every step, in order, with the rows its batch has?"""
    if not logged or list(logged) != list(range(1, len(logged) + 1)):
        return Finding("steps.jsonl", FAILED, "it cannot be read, or steps are missing or out of order")
    wrong = [step for step, line in logged.items() if line["rows"] != rows_at(step - 1)]
    return Finding("steps.jsonl", FAILED if wrong else OK, f"step {wrong[0]} has another number of rows" if wrong else
                   f"steps 1 to {len(logged)}, none missing")


def replay(start: int, losses: Mapping[int, float], logged: Mapping[int, Mapping[str, Any]],
           precision: torch.dtype) -> Finding:
    """Losses of steps trained again from step `start` against those logged then."""
    shared = [step for step in losses if step in logged]
    what = f"replay from {f'step {start}' if start else 'the base model'}"
    if not shared:
        return Finding(what, UNCHECKED, f"steps.jsonl has no step after {start}")
    apart = max(_apart(losses[step], logged[step]["loss"]) for step in shared)
    close = apart <= (1e-5 if precision == torch.float32 else 1e-2)
    return Finding(what, OK if close else FAILED,
                   f"losses of steps {shared[0]} to {shared[-1]}: largest difference {apart:.2g}", apart)


def ledger(run: Path, dropped: Sequence[Mapping[str, Any]]) -> Finding:
    """The rows dropped now against those dropped then."""
    try:
        lines = [json.loads(line) for line in read_text(run / "ledger.jsonl").splitlines()]
    except (OSError, ValueError) as error:
        return Finding("ledger.jsonl", FAILED, str(error))
    same = lines == json.loads(json.dumps(list(dropped)))
    return Finding("ledger.jsonl", OK if same else FAILED,
                   f"{len(lines)} rows dropped, the same ones" if same else
                   f"{len(lines)} rows were dropped, {len(dropped)} are now")


def same_machine(run: Path, world: World) -> bool:
    """Is this the kind of device and the torch that the run had?"""
    then = read_json(run / "config.json")
    return (then.get("devices", {}).get("kind") == world.device.type == "cpu"
            and then.get("versions", {}).get("torch") == torch.__version__)


def orders(whole: Sequence[Path], digest: Callable[[int], str]) -> Finding:
    """The order of pairs up to each checkpoint, computed again, against the digest in it."""
    states = {folder.name: load(folder)[2] for folder in whole}
    wrong = [name for name, state in states.items() if state.get("order") != digest(state["state"]["step"])]
    return Finding("order of pairs", FAILED if wrong else OK,
                   f"differs in {', '.join(wrong)}" if wrong else f"{len(whole)} digests computed again are the same")


def exported(run: Path, whole: Sequence[Path]) -> Finding:
    """Are the exported weights those of a checkpoint, to the bit?"""
    try:
        ours = load_file(run / "model" / "projections.safetensors")
    except (OSError, SafetensorError) as error:
        return Finding("exported weights", UNCHECKED, str(error))
    for folder in reversed(whole):
        theirs = load(folder)[0]
        if theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours):
            return Finding("exported weights", OK, f"equal those of {folder.name}")
    if "interpolation" in read_json(run / "metrics.json"):
        return Finding("exported weights", UNCHECKED, "they lie between the base model and a checkpoint")
    return Finding("exported weights", FAILED, "those of no checkpoint that is whole")


def metrics(found: Mapping[str, Mapping[str, Any]], written: Mapping[str, Mapping[str, Any]],
            exact: bool) -> Finding:
    """The exported model measured again against metrics.json; where losses are not `exact` to the bit (other hardware,
    features encoded anew in other company) close calls may fall otherwise.
    """
    pairs = [(value, found.get(split, {}).get(name, math.nan)) for split, values in written.items()
             for name, value in values.items() if isinstance(value, (int, float))]
    if not pairs:
        return Finding("metrics.json", UNCHECKED, "it holds no metrics of a tuned model yet")
    apart = max(abs(then - now) / max(1.0, abs(then)) if now == now else math.inf for then, now in pairs)
    return Finding("metrics.json", OK if apart <= (1e-6 if exact else 0.02) else FAILED,
                   f"{len(pairs)} figures measured again: largest relative difference {apart:.2g}")


def table(findings: Sequence[Finding]) -> str:
    """The findings for people, the failed ones counted below."""
    wide = [max(len(finding[i]) for finding in findings) for i in (0, 1)]
    lines = [f"{one.what:{wide[0]}}  {one.verdict:{wide[1]}}  {one.detail}" for one in findings]
    counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in (OK, FAILED, UNCHECKED)}
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])


def failed(findings: Sequence[Finding]) -> bool:
    """Did any check fail?"""
    return any(finding.verdict == FAILED for finding in findings)


def _apart(one: float, other: float | None) -> float:
    if other is None or one != one or other != other:
        return 0.0 if (other is None or other != other) and one != one else math.inf
    return abs(one - other)
