"""The shards of a stream: finding those of train, how many samples they hold, their order in an epoch, who reads which.

A shard is known by its number in the sorted list of all shards of train.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from data.batch import AgreedError, BadSample, UserError
from data.prefetch import threaded_map
from data.reading import open_regular, parse_json
from data.shards.index import FORMAT, MAX_INDEX, indexed
from data.shards.tar import open_tar
from data.sources.parts import expand_pattern, files_by_split, pattern_by_split
from data.sources.split_names import UNSPLIT
from data.stream.titles import AS_THEY_ARE, TitleRules
from data.web.storage import Changed, Entry, is_stored, open_stream, public_name, read_if_there, stat

ASKED_AT_ONCE = 16  # shards in a store whose size or index is asked for at the same time
PASS_STRIDE = 1_000_003  # seeds of the passes of one epoch; a prime, so that they do not meet those of other epochs


class Divided(NamedTuple):
    """Shards to be streamed, and by split the other ones, which are only measured."""

    train: list[Entry]
    measured: dict[str, list[Entry]]


def find_local_shards(dataset: str) -> dict[str, list[Entry]]:
    """Return the shards of each split in a folder or pattern on this machine. Raises UserError."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = files_by_split([entry for entry in sorted(path.iterdir()) if entry.suffix.lower() == ".tar"])
    else:
        files = pattern_by_split(list(expand_pattern(str(path))))
    entries: dict[str, list[Entry]] = {}
    for split, shards in files.items():
        entries[split] = [Entry(str(file), 0, "") for file in shards]  # `divide_shards` adds sizes, of train alone
    return entries


def divide_shards(splits: Mapping[str, Sequence[Entry]], dataset: str) -> Divided:
    """Return the shards of train with their sizes, and the others. Raises UserError where there are none of either."""
    shown = public_name(dataset)
    others = {name: list(shards) for name, shards in splits.items() if name != "train"}
    shards_of_all_splits = chain.from_iterable(splits.values())
    is_sharded = bool(splits) and all(shard.name.lower().endswith(".tar") for shard in shards_of_all_splits)
    if not is_sharded or [*splits] == [UNSPLIT]:
        raise UserError(f"--shuffle-buffer streams tar shards, and --dataset {shown} has none called train-*.tar; "
                        "`run.py shards` writes them")
    if len(splits) == 1:
        raise UserError(f"--dataset {shown} has no shards but {next(iter(splits))}'s, and a stream is trained on some "
                        "and measured on others; add valid-*.tar (run.py shards divides a lone split)")
    if "train" not in splits:
        raise UserError(f"--shuffle-buffer streams the shards of train, and --dataset {shown} has {', '.join(splits)}; "
                        "--splits train=NAME,valid=NAME says which to use")
    train = sorted(splits["train"], key=lambda shard: shard.address)
    return Divided(list(threaded_map(_stat, train, ASKED_AT_ONCE, ASKED_AT_ONCE)), others)


def _stat(shard: Entry) -> Entry:
    """Return size and version of a shard now. Raises UserError."""
    if is_stored(shard.address):
        return stat(shard.address)
    try:
        return Entry(shard.address, os.path.getsize(shard.address), "")
    except OSError as error:
        raise UserError(f"{shard.address}: {error.strerror}") from None


def local_pattern(splits: Mapping[str, Sequence[Entry]]) -> str:
    """Return a pattern that names these local files. Raises UserError where a name does not fit into one."""
    names = [shard.address for shard in chain.from_iterable(splits.values())]
    for name in names:
        if set(name) & set("{},*"):
            raise UserError(f"{name}: rename the files or folders that have one of {{ }} , * in their names")
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"


def open_shard(shard: Entry) -> BinaryIO:
    """Open a shard to be read once in sequence. Raises UserError, OSError."""
    if is_stored(shard.address):
        return open_stream(shard.address, shard)
    file = open_regular(shard.address)
    if os.fstat(file.fileno()).st_size != shard.size:
        file.close()
        raise Changed(f"{shard.address} has changed; run again")
    return file


def count_samples(shards: Sequence[Entry], rules: TitleRules = AS_THEY_ARE) -> int | None:
    """Return how many titles the indexes beside the shards hold; None where one has no index that fits.

    Raises UserError.
    """
    total = 0
    for shard, titles in zip(shards, threaded_map(_titles, shards, ASKED_AT_ONCE, ASKED_AT_ONCE), strict=True):
        if titles is None:
            return None
        known = rules.known_names(shard)
        total += sum(len(rules.titles(texts, known)) for texts in titles)
    return total


def _titles(shard: Entry) -> list[list[str]] | None:
    """Return the titles of each sample by the index beside a shard, None without one that fits. Raises UserError."""
    if is_stored(shard.address):
        return _stored_titles(shard)
    try:
        with open_tar(shard.address) as file:
            index = indexed(Path(shard.address), file)
    except OSError as error:
        raise UserError(f"{shard.address}: {error.strerror}") from None
    return None if index is None else index["title"].to_pylist()


def _stored_titles(shard: Entry) -> list[list[str]] | None:
    """Return `_titles` by an index in a store, which must be whole, and of a shard of this size."""
    address, mark, query = shard.address.partition("?")
    try:
        content = read_if_there(f"{address}.index.json{mark}{query}", MAX_INDEX)
        claim, _, body = (content or b"").partition(b"\n")
        stated = parse_json(claim)
        digest = hashlib.sha256(body).hexdigest()
        if (stated["format"], stated["tar_bytes"], stated["index_sha256"]) != (FORMAT, shard.size, digest):
            return None
        return list(parse_json(body)["title"])
    except BadSample as problem:
        raise UserError(problem.detail) from problem
    except (ValueError, KeyError, TypeError):
        return None


def require_lost_shards(shards: Sequence[Entry], ledger: Sequence[Mapping[str, Any]]) -> None:
    """Raise AgreedError, which names it, where a shard that the run has lost is not there again as it was."""
    size_now = {public_name(shard.address): shard.size for shard in shards}
    for entry in ledger:
        name, size = entry.get("shard"), entry.get("bytes")
        if size is not None and size_now.get(str(name)) != size:
            now = f"has {size_now[name]:,} bytes now" if name in size_now else "is not there"
            raise AgreedError(f"--resume: {name}, which the run has lost, {now} and had {size:,} bytes when the run "
                              "began; put it back as it was")


def shards_digest(shards: Sequence[Entry]) -> str:
    """Return a digest of names, sizes and versions of the shards, in order: a resumed run must have the same."""
    stated = [f"{shard.name} {shard.size} {shard.version}".rstrip() for shard in shards]
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
