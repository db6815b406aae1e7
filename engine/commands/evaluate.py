"""`run.py eval`: the metrics of any CLIPModel on one split, or on all."""

from __future__ import annotations

import json

from engine.commands.common import evaluate_splits, load_model, open_data, open_source
from engine.config.fields import Config
from engine.ranks.signals import StopSignal
from engine.ranks.world import World
from engine.run_folder import folder
from engine.run_folder.crash import say_error
from engine.run_folder.ownership import open_evaluation
from eval.report.table import metrics_table


def evaluate(cfg: Config, world: World, stop: StopSignal) -> int:
    """Print the metrics of a model, and write them to --out; the exit code is 1 for a model that has collapsed."""
    out = open_evaluation(cfg.out, cfg.dataset) if cfg.out and world.is_main else None
    source = open_source(cfg, world, cfg.split)
    model = load_model(cfg, world)
    pairs = open_data(cfg, world, model, source, only=cfg.split)
    results = evaluate_splits(pairs.feature_splits(list(pairs.splits)), model.head, world)
    scores = {name: retrieval.summarise() for name, retrieval in results.items()}
    collapsed = {name: retrieval.collapsed for name, retrieval in results.items() if retrieval.collapsed}
    if world.is_main:
        if out:  # before anything is printed: printing fails where a pager has closed stdout
            folder.write_json(out / "metrics.json", scores)
            folder.write_ledger(out / "ledger.jsonl", pairs.all_dropped())
        world.say(metrics_table({model.clip.name: scores}, pairs.classes))
        world.show(json.dumps(scores, indent=2), str(out / "metrics.json") if out else "")
        for name, problem in collapsed.items():
            say_error(f"run.py eval: {name}: {problem}")
    return 1 if collapsed else 0
