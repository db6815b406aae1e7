"""Cross-validated runs put together: every query (a distinct image or title) was held out once in each repeat.

Dimension key: N rows of the whole, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from data.batch import UserError
from eval.intervals import Units, mean_interval, paired_test
from eval.metrics import Ranks, Retrieval, Triplets

NOT_FINITE = "the model has collapsed: its embeddings hold NaN or infinity"
Held = Sequence[tuple[Tensor, Retrieval | None]]  # a run's held-out rows and what was found on them; None: not finite


def to_host(found: Retrieval | None) -> Retrieval | None:
    """The same in main memory, to be handed to other ranks."""
    def moved(ranks: Ranks) -> Ranks:
        return Ranks(ranks.rank_Q.cpu(), ranks.row_Q.cpu(), ranks.unit_Q.cpu(), ranks.candidates)

    if found is None:
        return None
    some = found.triplets
    return replace(found, image_to_text=moved(found.image_to_text), text_to_image=moved(found.text_to_image),
                   triplets=some and Triplets(some.correct_M.cpu(), some.row_M.cpu(), some.unit_M.cpu()))


def average_over_runs(held: Sequence[tuple[Tensor, Retrieval]], rows: int, metric: str) -> tuple[Tensor, Tensor]:
    """Each query's `metric` averaged over the runs that held it out (float64) and its unit, [Q], by first row.

    A fold holds all rows of a unit or none, so a query and its unit have the same first row in all runs. Raises
    UserError for no such metric.
    """
    sum_N, runs_N = torch.zeros(2, rows, dtype=torch.float64)
    unit_N = torch.zeros(rows, dtype=torch.int64)
    for row_N, found in held:
        means = {name: parts for name, *parts in found.means()}
        if metric not in means:
            raise UserError(f"sweep cannot compare runs by {metric}; choose one of {', '.join(means)}")
        value_Q, row_Q, unit_Q = (part.cpu() for part in means[metric])
        sum_N[row_N[row_Q]] += value_Q.double()
        runs_N[row_N[row_Q]] += 1
        unit_N[row_N[row_Q]] = row_N[unit_Q]
    asked_Q = runs_N.nonzero()[:, 0]
    return sum_N[asked_Q] / runs_N[asked_Q], unit_N[asked_Q]


def score_configuration(held: Held, base: Held, rows: int, metric: str) -> dict[str, Any]:
    """Scores of one configuration: every metric averaged over runs, and `metric` with its interval and against base.

    A configuration that has collapsed in a run says so, and scores 0. Raises UserError for a base model that is not
    finite.
    """
    if any(found is None for _, found in base):
        raise UserError(f"{NOT_FINITE}; choose another --model")
    base_Q, unit_Q = average_over_runs([(row_N, found) for row_N, found in base if found], rows, metric)
    sentences = [NOT_FINITE if found is None else found.collapsed for _, found in held]
    if collapsed := next(filter(None, sentences), ""):
        return {"scores": {metric: 0.0}, "collapsed": collapsed}
    finite = [(row_N, found) for row_N, found in held if found]
    value_Q, _ = average_over_runs(finite, rows, metric)
    values = [found.values() for _, found in finite]
    scores = {name: fmean(one[name] for one in values) for name in values[0] if all(name in one for one in values)}
    scores[metric] = value_Q.mean().item()
    del scores["collapsed"]
    units = Units(unit_Q)
    return {"scores": scores, "ci95": mean_interval(value_Q, 0, 1, units),
            "difference": paired_test(base_Q, value_Q, units).as_json()}


def leaderboard(found: Iterable[Mapping[str, Any]], names: Iterable[str], metric: str) -> str:
    """A Markdown table, best first: configuration, `metric` with its interval, what it adds to the base model's."""
    rows = [["", "configuration", metric, "over base", "p"]]
    for place, (line, name) in enumerate(zip(found, names, strict=True), start=1):
        if "collapsed" in line:
            rows.append(["-", name, "collapsed", "-", "-"])
            continue
        (low, high), gain = line["ci95"], line["difference"]
        rows.append([str(place), name, f"{line['scores'][metric]:.4f} [{low:.4f}, {high:.4f}]",
                     f"{gain['value']:+.4f} [{gain['ci95'][0]:+.4f}, {gain['ci95'][1]:+.4f}]", f"{gain['p']:.4f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
