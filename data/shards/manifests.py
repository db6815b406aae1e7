"""Manifests of shards in a store that were streamed once: their samples, content keys and problems.

A manifest is an Arrow file in `--cache-dir/remote-shards/`, written when all features of the shard are in the store.
Rows and content keys come from it afterwards; the shard is read again only if its size or version changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.batch import BadSample
from data.files import replaced_file
from data.reading import parse_json
from data.shards.index import parse_reference, table_of
from data.store.segments import KEY
from data.web.storage import Entry, is_stored

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "thumbtune remote shard 2"
FOLDER = "remote-shards"  # in --cache-dir
CONTENT = "content"  # the column of content keys; null where the picture cannot be used


class ShardManifest(NamedTuple):
    """A shard that was streamed."""

    entry: Entry
    max_pixels: int  # the limit that its pictures were decoded under
    problems: Sequence[dict[str, Any]]  # ledger entries of samples and damage
    table: pa.Table  # COLUMNS and CONTENT
    classes: Sequence[str]  # the names of the classes then, from a file beside the shard

    def keys(self) -> np.ndarray:
        """Return the content keys [n, 16] of its usable pictures."""
        import pyarrow.compute as pc

        content = pc.drop_null(self.table[CONTENT]).combine_chunks()
        return np.frombuffer(b"".join(content.to_pylist()), np.uint8).reshape(-1, KEY)


def manifest_path(cache: Path, address: str) -> Path:
    """Return the path of the manifest of a shard."""
    return cache / FOLDER / f"{hashlib.blake2b(address.encode(), digest_size=16).hexdigest()}.arrow"


def make_manifest(entry: Entry, max_pixels: int, problems: Sequence[dict[str, Any]], rows: Sequence[tuple[Any, ...]],
                  keys: Sequence[bytes], classes: Sequence[str]) -> ShardManifest:
    """Return the manifest of samples: their values of COLUMNS and content keys, b"" for a picture that is unusable."""
    import pyarrow as pa

    content = pa.array([key or None for key in keys], pa.binary(KEY))
    return ShardManifest(entry, max_pixels, problems, table_of(rows).append_column(CONTENT, content), classes)


def write_manifest(cache: Path, manifest: ShardManifest) -> None:
    """Write a manifest, whole or not at all. Raises OSError."""
    import pyarrow as pa

    path = manifest_path(cache, manifest.entry.address)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT, "entry": manifest.entry[:3], "max_pixels": manifest.max_pixels,
             "problems": list(manifest.problems), "classes": list(manifest.classes)}
    table = manifest.table.replace_schema_metadata({"facts": json.dumps(facts)})
    with replaced_file(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def read_manifest(path: Path) -> ShardManifest | None:
    """Return the manifest at a path; None if there is none or it is damaged."""
    import pyarrow as pa

    with suppress(OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        facts = parse_json(table.schema.metadata[b"facts"])
        if facts["format"] == FORMAT:
            return ShardManifest(Entry(*facts["entry"]), facts["max_pixels"], facts["problems"],
                               table.replace_schema_metadata(None), facts["classes"])
    return None


def manifest_keys(cache: Path, references: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the content keys [M, 16] of references to members of streamed shards, and which [M] are known."""
    key_MK, known_M = np.zeros((len(references), KEY), np.uint8), np.zeros(len(references), bool)
    members: dict[str, list[tuple[int, int]]] = {}  # shard -> number of the reference, offset of the picture
    for number, reference in enumerate(references):
        if reference and "#" in reference and is_stored(reference):
            with suppress(BadSample):
                shard, offset, _ = parse_reference(reference)
                members.setdefault(shard, []).append((number, offset))
    for shard, pictures in members.items():
        manifest = read_manifest(manifest_path(cache, shard))
        if manifest is None:
            continue
        offsets, keys = (manifest.table[name].to_pylist() for name in ("image_offset", CONTENT))
        key_of_offset = dict(zip(offsets, keys, strict=True))
        for number, offset in pictures:
            if key := key_of_offset.get(offset):
                key_MK[number], known_M[number] = np.frombuffer(key, np.uint8), True
    return key_MK, known_M
