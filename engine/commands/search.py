"""`run.py search`: the best thumbnails for titles, or the best titles for a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data import gallery
from data.cold import Reader
from data.images.decode import ImageSpec
from data.sources.source import Rows
from engine.clip.model import open_model
from engine.commands.common import divide_source, make_encoders, make_reader, read_rows
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder.folder import write_text
from engine.run_folder.ownership import refuse_foreign_page
from eval.report.search_page import page
from eval.search import QueryResult, as_json, as_text, collect_results, top_k


def search(cfg: Config, world: World, stop: StopSignal) -> int:
    """The best thumbnails for titles, or the best titles for a picture: one process, from stored features."""
    if not world.is_main:
        return 0
    if cfg.html:
        refuse_foreign_page(cfg.html)
    titles = gallery.read_queries(cfg.query, cfg.queries, cfg.image)
    splits, results, look = find_answers(cfg, world, titles)
    place = os.path.abspath(cfg.dataset)
    if cfg.html:
        shown = {(answer.split, answer.row) for found in results for answer in found.answers}
        previews = gallery.preview_pictures(splits, shown, cfg.image, look)
        write_text(Path(cfg.html).expanduser(), page(place, results, previews))
    print(json.dumps(as_json(results), indent=2) if cfg.json else as_text(results, place), flush=True)
    return 0


def find_answers(cfg: Config, world: World, titles: Sequence[str]) -> tuple[dict[str, Rows], list[QueryResult], Reader]:
    """Answers to `titles`, or to --image where there are none."""
    rows, _ = read_rows(cfg, world.say)
    parts = open_model(cfg.model, cfg.trainable, "cached", cfg.scale, cfg.precision, world.device)
    spec, cache, head = ImageSpec.from_processor(parts.clip.image_processor), Path(cfg.cache_dir), parts.head
    look, towers = make_reader(cfg, spec), make_encoders(parts, spec.fingerprint(), world.device)
    splits = gallery.select_splits(divide_source(cfg, world, rows, look, towers), cfg.split, cfg.dataset)
    project: Callable[[torch.Tensor], torch.Tensor]
    with torch.no_grad():
        if titles:
            asked = head.text(gallery.title_features(titles, towers).to(world.device))
            shelf, project = gallery.open_images(splits, look, towers, cache.expanduser(), world.say), head.image
        else:
            asked = head.image(gallery.image_features(cfg.image, look, towers).to(world.device))
            shelf, project = gallery.open_titles(splits, towers, cache.expanduser()), head.text
        best = top_k(asked, lambda start, stop: project(shelf.chunk(start, stop).to(world.device)), len(shelf), cfg.top)
    return splits, collect_results(titles, cfg.image, *best, shelf.item), look
