"""Before and after, for people: the table on the console and in the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = {
    "image_to_text_R@1": "image to text R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
    "image_to_text_median_rank": "median rank", "image_to_text_mrr": "MRR",
    "text_to_image_R@1": "text to image R@1", "text_to_image_R@5": "R@5", "text_to_image_R@10": "R@10",
    "text_to_image_median_rank": "median rank", "text_to_image_mrr": "MRR",
    "triplet_accuracy": "triplet accuracy",
}

Scores = Mapping[str, Mapping[str, Any]]  # split -> metric -> value


def table(columns: Mapping[str, Scores]) -> str:
    """A Markdown table, one block of rows a split, one column for each of `columns`: base, tuned, difference."""
    names = list(columns)
    splits = list(dict.fromkeys(split for scores in columns.values() for split in scores))
    rows = [["split", "metric", *names]]
    for split in splits:
        known = {metric for scores in columns.values() for metric in scores.get(split, {})}
        rows += [[split, label, *(_cell(columns[name].get(split, {}), metric) for name in names)]
                 for metric, label in SHOWN.items() if metric in known]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(values: Mapping[str, Any], metric: str) -> str:
    if metric not in values:
        return "-"
    if isinstance(values[metric], Mapping):  # a paired test: +0.270 [+0.090, +0.450], p = 0.020
        (low, high), p = values[metric]["ci95"], values[metric]["p"]
        return f"{values[metric]['value']:+.3f} [{low:+.3f}, {high:+.3f}], p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    digits = 1 if metric.endswith("rank") else 3
    low, high = values[f"{metric}_ci95"]
    return f"{values[metric]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
