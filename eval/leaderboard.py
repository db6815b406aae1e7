"""Cross-validated runs put together: every pair was held out once in each repeat, so pairs are the rows.

Dimension key: N rows of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from data.batch import UserError
from eval.intervals import mean_interval, paired_test
from eval.metrics import Retrieval

RESAMPLES = 999  # enough to tell configurations apart, in a fraction of the time that their runs take


def on_host(found: Retrieval) -> Retrieval:
    """The same in main memory, to be handed to other ranks."""
    triplet_M = None if found.triplet_M is None else found.triplet_M.cpu()
    return Retrieval(found.image_to_text_rank_N.cpu(), found.text_to_image_rank_N.cpu(), triplet_M)


def pooled(held: Sequence[tuple[Tensor, Retrieval]], rows: int, metric: str) -> Tensor:
    """Each row's `metric` averaged over the runs that held it out, float64 [N]. Raises UserError for no such metric."""
    sum_N, runs_N = torch.zeros(2, rows, dtype=torch.float64)
    for row_N, found in held:
        values = found.rows()
        if metric not in values or len(values[metric]) != len(row_N):
            raise UserError(f"sweep cannot compare runs by {metric}; choose one of {', '.join(values)}")
        sum_N[row_N] += values[metric].double().cpu()
        runs_N[row_N] += 1
    return sum_N / runs_N


def judge(held: Sequence[tuple[Tensor, Retrieval]], base: Sequence[tuple[Tensor, Retrieval]], rows: int,
          metric: str) -> dict[str, Any]:
    """Scores of one configuration: every metric averaged over runs, and `metric` with its interval and against base."""
    value_N, base_N = (pooled(runs, rows, metric) for runs in (held, base))
    values = [found.values() for _, found in held]
    scores = {name: fmean(one[name] for one in values) for name in values[0] if all(name in one for one in values)}
    scores[metric] = value_N.mean().item()
    return {"scores": scores, "ci95": mean_interval(value_N, 0, 1, 0, RESAMPLES),
            "difference": paired_test(base_N, value_N, 0, RESAMPLES, RESAMPLES).as_json()}


def leaderboard(found: Iterable[Mapping[str, Any]], names: Iterable[str], metric: str) -> str:
    """A Markdown table, best first: configuration, `metric` with its interval, what it adds to the base model's."""
    rows = [["", "configuration", metric, "over base", "p"]]
    for place, (line, name) in enumerate(zip(found, names, strict=True), start=1):
        (low, high), gain = line["ci95"], line["difference"]
        rows.append([str(place), name, f"{line['scores'][metric]:.4f} [{low:.4f}, {high:.4f}]",
                     f"{gain['value']:+.4f} [{gain['ci95'][0]:+.4f}, {gain['ci95'][1]:+.4f}]", f"{gain['p']:.4f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
