"""Scores of a sweep: cross-validated runs combined, each query (a distinct image or title) held out once a repeat.

Dimension key: N rows of the whole, Q queries (distinct images or titles, or triplets).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from data.batch import UserError
from data.text import markdown_table
from eval.intervals import Units, mean_interval, paired_test
from eval.metrics import Ranks, Retrieval, Triplets

NOT_FINITE = "the model has collapsed: its embeddings hold NaN or infinity"
HeldOut = Sequence[tuple[Tensor, Retrieval | None]]  # per run: its held-out rows and their ranks; None: not finite


def to_host(result: Retrieval | None) -> Retrieval | None:
    """Return a copy in main memory, which can be sent to other ranks."""
    def ranks_to_host(ranks: Ranks) -> Ranks:
        return Ranks(ranks.rank_Q.cpu(), ranks.row_Q.cpu(), ranks.unit_Q.cpu(), ranks.candidates)

    if result is None:
        return None
    triplets = result.triplets
    if triplets is not None:
        triplets = Triplets(triplets.correct_M.cpu(), triplets.row_M.cpu(), triplets.unit_M.cpu())
    return replace(result, image_to_text=ranks_to_host(result.image_to_text),
                   text_to_image=ranks_to_host(result.text_to_image), triplets=triplets)


def average_over_runs(runs: Sequence[tuple[Tensor, Retrieval]], rows: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return each query's `metric`, averaged over the runs that held it out (float64), and its unit: [Q] each.

    A fold holds all rows of a unit or none, so a query and its unit have the same first row in all runs, and a row has
    the same hard negatives in all: the j-th triplet of a row is one query. The order of queries depends on the rows
    alone. Runs without the metric (no hard negative held out) are left out; raises UserError if all runs lack it.
    """
    values, queries, units = [], [], []
    known: dict[str, None] = {}
    for row_N, result in runs:
        means = {name: columns for name, *columns in result.means()}
        known |= dict.fromkeys(means)
        if metric not in means:
            continue
        value_Q, row_Q, unit_Q = (column.cpu() for column in means[metric])
        values.append(value_Q.double())
        queries.append(row_N[row_Q] + rows * _occurrence(row_Q))
        units.append(row_N[unit_Q])
    if metric not in known:
        raise UserError(f"sweep cannot compare runs by {metric}; choose one of {', '.join(known)}")
    number_Q, query = torch.cat(queries).unique(return_inverse=True)
    sum_Q, runs_Q = torch.zeros(2, len(number_Q), dtype=torch.float64)
    sum_Q.index_add_(0, query, torch.cat(values))
    runs_Q.index_add_(0, query, torch.ones(len(query), dtype=torch.float64))
    unit_Q = torch.zeros_like(number_Q).index_copy_(0, query, torch.cat(units))
    return sum_Q / runs_Q, unit_Q


def _occurrence(row_Q: Tensor) -> Tensor:
    """Return how often each row occurred before: [4, 4, 7, 4] -> [0, 1, 0, 2]."""
    sorted_Q, order_Q = row_Q.sort(stable=True)
    earlier_Q = torch.arange(len(row_Q)) - torch.searchsorted(sorted_Q, sorted_Q)
    return torch.empty_like(row_Q).index_copy_(0, order_Q, earlier_Q)


def score_configuration(tuned: HeldOut, base: HeldOut, rows: int, metric: str) -> dict[str, Any]:
    """Return one configuration's metrics, averaged over runs; for `metric` also the interval and the test against base.

    A configuration that has collapsed in any run scores 0, with the reason under "collapsed". Raises UserError for a
    base model whose embeddings are not finite.
    """
    if any(result is None for _, result in base):
        raise UserError(f"{NOT_FINITE}; choose another --model")
    base_Q, unit_Q = average_over_runs([(row_N, result) for row_N, result in base if result], rows, metric)
    reasons = [NOT_FINITE if result is None else result.collapsed for _, result in tuned]
    if collapsed := next(filter(None, reasons), ""):
        return {"scores": {metric: 0.0}, "collapsed": collapsed}
    finite = [(row_N, result) for row_N, result in tuned if result]
    value_Q, _ = average_over_runs(finite, rows, metric)
    values = [result.values() for _, result in finite]
    common = set.intersection(*map(set, values)) - {"collapsed"}
    scores = {name: fmean(run[name] for run in values) for name in values[0] if name in common}
    scores[metric] = value_Q.mean().item()
    units = Units(unit_Q)
    return {"scores": scores, "ci95": mean_interval(value_Q, 0, 1, units),
            "difference": paired_test(base_Q, value_Q, units).as_json()}


def leaderboard(scored: Iterable[Mapping[str, Any]], names: Iterable[str], metric: str) -> str:
    """Return a Markdown table: configuration, `metric` with its interval, its difference from the base model.

    `scored` are lines of a sweep's journal, best first.
    """
    rows = [["", "configuration", metric, "over base", "p"]]
    for position, (line, name) in enumerate(zip(scored, names, strict=True), start=1):
        if "collapsed" in line:
            rows.append(["-", name, "collapsed", "-", "-"])
            continue
        (low, high), difference = line["ci95"], line["difference"]
        change, (change_low, change_high) = difference["value"], difference["ci95"]
        rows.append([str(position), name, f"{line['scores'][metric]:.4f} [{low:.4f}, {high:.4f}]",
                     f"{change:+.4f} [{change_low:+.4f}, {change_high:+.4f}]", f"{difference['p']:.4f}"])
    return markdown_table(rows)
