"""Settings and versions that all ranks must have in common, compared when they have joined."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.agreement import require_agreement
from engine.config.fields import Config, as_dict, flag_of
from engine.ranks.world import World

PROGRAM = Path(__file__).resolve().parents[2]
ROOMS = ("engine", "data", "eval")
# Settings that may differ: of the machine; or whose content is compared later, wherever it lies.
OF_THE_RANK = ("cache_dir", "workers", "quiet", "proxy", "dataset", "model", "probe", "image_root")


def require_same_settings(world: World, command: str, cfg: Config) -> None:
    """Raise AgreedError on all ranks where two of them run other commands, settings or versions."""
    if world.size == 1:
        return
    things: dict[str, object] = {"the command": command, "the program's files": _digest_of_program(),
                                 "torch's version": torch.__version__}
    try:
        things["transformers' version"] = version("transformers")
    except PackageNotFoundError:  # said where it is needed
        pass
    things |= {flag_of(name): value for name, value in as_dict(cfg, command).items() if name not in OF_THE_RANK}
    require_agreement(world.team, things)


def _digest_of_program() -> str:
    """Return a digest of this program's modules."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (PROGRAM / room).rglob("*.py")):
        digest.update(path.relative_to(PROGRAM).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
