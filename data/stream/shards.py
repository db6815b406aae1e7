"""The shards of a stream: finding those of train, how many samples they hold, their order in an epoch, who reads which.

A shard is known by its number in the sorted list of all shards of train.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from data.batch import UserError
from data.shards.index import expand_braces, indexed
from data.shards.tar import open_tar

TRAIN = re.compile(r"train(-.*)?\.tar", re.IGNORECASE)
PASS_STRIDE = 1_000_003  # seeds of the passes of one epoch; a prime, so that they do not meet those of other epochs


def divide_shards(dataset: str) -> tuple[list[str], str]:
    """Return the shards of train in a folder or pattern, and a pattern of the other shards, which are only measured.

    Raises UserError where there are none of either.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        names = sorted(str(entry) for entry in path.iterdir() if entry.suffix.lower() == ".tar")
    else:
        names = [name for part in expand_braces(str(path)) for name in (sorted(glob.glob(part)) or [part])]
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise UserError(f"{missing[0]}: no such file; --shuffle-buffer reads shards on this machine")
    train = [name for name in names if TRAIN.fullmatch(os.path.basename(name))]
    others = [name for name in names if name not in set(train)]
    if not train:
        raise UserError(f"--shuffle-buffer streams tar shards, and --dataset {dataset} has none called train-*.tar; "
                        "`run.py shards` writes them")
    if not others:
        raise UserError(f"--dataset {dataset} has no shards but train's, and a stream is measured on others; add "
                        "valid-*.tar (run.py shards divides a lone split)")
    if any(set(name) & set("{},*") for name in others):
        raise UserError(f"{others[0]}: rename the files or folders that have one of {{ }} , * in their names")
    return train, others[0] if len(others) == 1 else f"{{{','.join(others)}}}"


def count_samples(shards: Sequence[str]) -> int | None:
    """Return how many titles the indexes beside the shards hold; None where one has no index that fits."""
    import pyarrow.compute as pc

    total = 0
    for shard in shards:
        try:
            with open_tar(shard) as file:
                index = indexed(Path(shard), file)
        except OSError as error:
            raise UserError(f"{shard}: {error.strerror}") from None
        if index is None:
            return None
        total += pc.sum(pc.list_value_length(index["title"])).as_py() or 0
    return total


def shards_digest(shards: Sequence[str]) -> str:
    """Return a digest of the names and sizes of the shards, in order: a resumed run must have the same."""
    stated = [f"{os.path.basename(shard)} {os.path.getsize(shard)}" for shard in shards]
    return hashlib.sha256("\n".join(stated).encode("utf-8", "surrogateescape")).hexdigest()


def shard_order(shards: int, seed: int, epoch: int, repeat: int = 0) -> list[int]:
    """Return the order of an epoch's shards, the same on all ranks; `repeat` counts further passes of one epoch."""
    generator = torch.Generator().manual_seed(seed + epoch + PASS_STRIDE * repeat)
    return torch.randperm(shards, generator=generator).tolist()


def split_by_rank(order: Sequence[int], rank: int, size: int, finished: Collection[int] = ()) -> list[int]:
    """Return the shards that `rank` of `size` ranks (of all nodes) reads, in order; none of those `finished`.

    The parts of all ranks are disjoint, and together they are the whole.
    """
    remaining = [shard for shard in order if shard not in finished]
    return remaining[rank::size]
