"""Metrics before and after as a Markdown table, for the console and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from data.text import markdown_table
from eval.report.choice import choice_note

SHOWN = {
    "image_to_text_R@1": "image to text R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
    "image_to_text_median_rank": "median rank", "image_to_text_mrr": "MRR",
    "text_to_image_R@1": "text to image R@1", "text_to_image_R@5": "R@5", "text_to_image_R@10": "R@10",
    "text_to_image_median_rank": "median rank", "text_to_image_mrr": "MRR",
    "triplet_accuracy": "triplet accuracy",
}
WHEN = ("base", "tuned")


Scores = Mapping[str, Any]  # of a split in metrics.json: values, counts, flags; under "<metric>_ci95" [low, high]
Metrics = Mapping[str, Any]  # metrics.json: "base" and "tuned" hold Scores by split, "difference" Differences


class Difference(TypedDict):
    """The difference of a metric in metrics.json; `p` is missing for a metric without a test."""

    value: float
    ci95: Sequence[float]
    p: NotRequired[float | None]


def metrics_table(metrics: Metrics, classes: Mapping[str, int] | None = None) -> str:
    """Return a Markdown table with rows for each split: base and tuned (or any other models) and their difference.

    The rows of a split begin with its numbers of pairs and queries and, if a model has collapsed, with that. A line
    below says for which splits titles are names of `classes` (their numbers by split; default: those in `metrics`).
    """
    difference = metrics.get("difference", {})
    columns = {name: metrics[name] for name in WHEN if name in metrics} or metrics
    extra = ["difference", "p"] if difference else []
    rows = [["split", "metric", *columns, *extra]]
    splits: dict[str, None] = {}  # in order
    for values in columns.values():
        splits |= dict.fromkeys(values)
    for split in splits:
        scores = [values.get(split, {}) for values in columns.values()]
        for row in _header_rows(split, scores):
            rows.append(row + [""] * len(extra))
        for metric, label in SHOWN.items():
            if not any(metric in values for values in scores):
                continue
            row = [split, label, *(cell(values, metric) for values in scores)]
            if difference:
                row += difference_cells(difference.get(split, {}).get(metric), metric)
            rows.append(row)
    classes = metrics.get("classes", {}) if classes is None else classes
    note = zero_shot_note({name: classes[name] for name in splits if name in classes})
    return markdown_table(rows) + note + choice_note(metrics.get("auto", {}))


def zero_shot_note(classes: Mapping[str, int]) -> str:
    """Return a line for splits whose titles are class names, "" where there are none."""
    if not classes:
        return ""
    named = ", ".join(f"{name} ({count:,} classes)" for name, count in classes.items())
    return f"\n\nTitles are class names in {named}: image to text R@1 is the zero-shot accuracy."


def _header_rows(split: str, scores: Sequence[Scores]) -> list[list[str]]:
    """Return the rows above the metrics of a split: pairs and queries, and which models have collapsed."""
    pairs, queries, collapsed = [split, "pairs"], [split, "queries"], [split, "collapsed"]
    for values in scores:
        collapsed.append("yes" if values.get("collapsed") else "no")
        if "units" in values:
            pairs.append(f"{values['pairs']:,}, {values['units']:,} independent")
            queries.append(f"{values['image_to_text_queries']:,} images, {values['text_to_image_queries']:,} titles")
        else:
            pairs.append("-")
            queries.append("-")
    rows = [pairs, queries] if any("units" in values for values in scores) else []
    return [*rows, collapsed] if "yes" in collapsed else rows


def collapse_warning(name: str, split: str, values: Scores) -> str:
    """Return a sentence about a model that has collapsed, "" for others."""
    if not values.get("collapsed"):
        return ""
    return (f"Warning: {name} has collapsed on {split}: all its image or all its title embeddings are equal to "
            "rounding, so every answer is a tie and its figures mean nothing.")


def describe_sizes(values: Scores) -> str:
    """Return the numbers of pairs, distinct images and titles, and independent units of a split; "" if unknown."""
    if "units" not in values:
        return ""
    return (f"{values['pairs']:,} pairs ({values['image_to_text_queries']:,} images, "
            f"{values['text_to_image_queries']:,} titles, {values['units']:,} independent)")


def _digits(metric: str) -> int:
    """Return the number of decimals to print."""
    return 1 if metric.endswith("rank") else 3


def cell(values: Scores, metric: str) -> str:
    """Return a value with its interval, "-" if it was not measured."""
    if metric not in values:
        return "-"
    digits = _digits(metric)
    low, high = values[f"{metric}_ci95"]
    return f"{values[metric]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def difference_cells(difference: Difference | None, metric: str) -> tuple[str, str]:
    """Return a difference with its interval, and its p; "-" if unknown."""
    if not difference:
        return "-", "-"
    digits = _digits(metric)
    low, high = difference["ci95"]
    change = f"{difference['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    p = difference.get("p")
    if p is None:
        return change, "-"
    return change, "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")
