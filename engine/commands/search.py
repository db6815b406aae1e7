"""`run.py search`: the best thumbnails for titles, or the best titles for a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data import gallery
from data.batch import ALONE
from data.cold import Pipeline
from data.text import without_secrets
from data.web.storage import scheme_of
from engine.clip.model import ModelOptions
from engine.commands.common import (
    cache_folder,
    divide_source,
    make_encoders,
    make_reader,
    open_recorded,
    read_rows,
    stream_shards,
)
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder.folder import write_text
from engine.run_folder.ownership import refuse_foreign_page
from eval.report.search_page import page
from eval.search import QueryResult, as_json, as_text, collect_results, top_k


def search(cfg: Config, world: World, stop: StopSignal) -> int:
    """Print the best answers to each query, and write them as a page to --html. One process does it."""
    if not world.is_main:
        return 0
    if cfg.html:
        refuse_foreign_page(cfg.html)
    titles = gallery.read_queries(cfg.query, cfg.queries, cfg.image)

    # Without titles the query is --image; read_queries has seen to it that there is one of the two.
    source = read_rows(cfg, world.say, stream=True)
    model = open_recorded(cfg, world, ModelOptions(cfg.trainable, "cached", cfg.scale, cfg.precision))
    reader = make_reader(cfg, model.clip.spec)
    encoders = make_encoders(model)
    cache = cache_folder(cfg)
    pipeline = Pipeline(reader, encoders, ALONE, cache, world.device, world.live)
    rows = stream_shards(cfg, world, source, pipeline).rows
    splits = gallery.select_splits(divide_source(cfg, world, rows, reader, encoders), cfg.split,
                                   without_secrets(cfg.dataset))
    head = model.head
    with torch.no_grad():
        if titles:
            query_QE = head.text(gallery.title_features(titles, encoders, cache).to(world.device))
            images = gallery.open_images(splits, reader, encoders, cache, world.say)
            results = rank_items(cfg, titles, query_QE, images, head.image)
        else:
            query_QE = head.image(gallery.image_features(cfg.image, reader, encoders).to(world.device))
            results = rank_items(cfg, titles, query_QE, gallery.open_titles(splits, encoders, cache), head.text)

    dataset = cfg.dataset.rstrip("/") if scheme_of(cfg.dataset) else os.path.abspath(cfg.dataset)
    if cfg.html:
        shown: set[tuple[str, int]] = set()  # an answer to several queries is read once
        for result in results:
            shown.update((answer.split, answer.row) for answer in result.answers)
        previews = gallery.preview_pictures(splits, shown, cfg.image, reader)
        write_text(Path(cfg.html).expanduser(), page(dataset, results, previews))
    world.show(json.dumps(as_json(results), indent=2) if cfg.json else as_text(results, dataset), cfg.html)
    return 0


def rank_items(cfg: Config, titles: Sequence[str], query_QE: Tensor, items: gallery.Gallery,
               project: Callable[[Tensor], Tensor]) -> list[QueryResult]:
    """Return the --top items for each query; `project` takes their features to embeddings."""
    def embed(start: int, stop: int) -> Tensor:
        return project(items.chunk(start, stop).to(query_QE.device))

    scores_QK, items_QK = top_k(query_QE, embed, len(items), cfg.top)
    return collect_results(titles, cfg.image, scores_QK, items_QK, items.item)
