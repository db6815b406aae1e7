"""`run.py embed`: the embeddings of all distinct images and titles of a dataset as .npy and Parquet files."""

from __future__ import annotations

import hashlib
import json

import torch

from data.agreement import require_same_rows
from data.batch import UserError
from data.cold import Encoders
from data.embedding_tables import EmbeddingTables, open_tables
from data.ledger import dropped_rows
from data.text import without_secrets
from engine.clip.model import LoadedModel, ModelOptions
from engine.commands.common import divide_source, open_pipeline, open_recorded, open_source, stream_shards
from engine.config.fields import Config
from engine.publish.embeddings import DTYPES, LAYOUT, PART, SUMMARY, EmbeddingWriter, begin_folder, check_folder
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder.folder import write_json, write_ledger


def embed(cfg: Config, world: World, stop: StopSignal) -> int:
    """Write the embeddings of --dataset to --out. Ranks share reading and encoding; rank 0 projects and writes."""
    if not cfg.out:
        raise UserError("embed needs a folder to write to: --out DIR")
    if cfg.dtype not in DTYPES:
        raise UserError(f"--dtype {cfg.dtype} cannot be stored in .npy files; use fp32 or fp16")
    folder = check_folder(cfg.out, cfg.dataset)
    source = open_source(cfg, world, cfg.split)
    model = open_recorded(cfg, world, ModelOptions(cfg.trainable, "cached", cfg.scale, cfg.precision))

    pipeline = open_pipeline(cfg, world, model)
    encoders = pipeline.encoders
    source = stream_shards(cfg, world, source, pipeline, cfg.split)
    require_same_rows(pipeline.team, source.rows)
    rows, unreadable = source.rows, source.unreadable
    if cfg.split != "all":  # with all, a lone split stays whole, so that rows keep their numbers
        rows = {cfg.split: divide_source(cfg, world, rows, pipeline.reader, encoders, pipeline.team)[cfg.split]}
        unreadable = [entry for entry in unreadable if entry.get("split", cfg.split) == cfg.split]
    tables = open_tables(rows, unreadable, pipeline, cfg.max_bad)
    if not world.is_main:
        return 0

    summary = describe(cfg, model, encoders, tables)
    begin_folder(folder, summary)
    write_ledger(folder / "ledger.jsonl", tables.ledger)
    writer = EmbeddingWriter(folder, DTYPES[cfg.dtype], cfg.vectors, world.live, world.say)
    head, device = model.head, world.device
    with torch.no_grad():
        kept = writer.write(tables, lambda part: head.image(part.to(device)), lambda part: head.text(part.to(device)))
    write_json(folder / SUMMARY, {**summary, "finished": True})
    parts = f"; {kept:,} files were there already" if kept else ""
    world.say(f"{folder}: {len(tables.images):,} images, {len(tables.titles):,} titles, {len(tables.rows):,} rows; "
              f"{dropped_rows(tables.ledger):,} rows dropped{' (see ledger.jsonl)' if tables.ledger else ''}{parts}")
    return 0


def describe(cfg: Config, model: LoadedModel, encoders: Encoders, tables: EmbeddingTables) -> dict[str, object]:
    """Return what embeddings.json says; its identity is a digest of everything that decides a byte of the files."""
    projections = [model.clip.facts.digests[name] for name in model.clip.family.projections]
    settings = [LAYOUT, PART, cfg.dtype, cfg.vectors, encoders.image_space, encoders.text_space, *projections]
    identity = hashlib.sha256(json.dumps([*settings, tables.digest()]).encode()).hexdigest()
    return {"model": cfg.model, "dataset": without_secrets(cfg.dataset), "split": cfg.split, "dtype": cfg.dtype,
            "vectors": cfg.vectors, "dimension": model.head.visual_projection.out_features,
            "images": len(tables.images), "titles": len(tables.titles), "rows": len(tables.rows),
            "identity": identity, "finished": False}
