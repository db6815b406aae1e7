"""Metrics before and after as a Markdown table, for the console and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.text import markdown_table

SHOWN = {
    "image_to_text_R@1": "image to text R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
    "image_to_text_median_rank": "median rank", "image_to_text_mrr": "MRR",
    "text_to_image_R@1": "text to image R@1", "text_to_image_R@5": "R@5", "text_to_image_R@10": "R@10",
    "text_to_image_median_rank": "median rank", "text_to_image_mrr": "MRR",
    "triplet_accuracy": "triplet accuracy",
}
WHEN = ("base", "tuned")


def metrics_table(metrics: Mapping[str, Any], classes: Mapping[str, int] | None = None) -> str:
    """A Markdown table with a block of rows for each split: base and tuned (or any other models) and their difference.

    Each block begins with the numbers of pairs and queries and, if a model has collapsed, with that. A line below says
    for which splits titles are names of `classes` (their numbers by split; default: those in `metrics`).
    """
    difference = metrics.get("difference", {})
    columns = {name: metrics[name] for name in WHEN if name in metrics} or dict(metrics)
    rows = [["split", "metric", *columns, *(["difference", "p"] if difference else [])]]
    for split in dict.fromkeys(split for scores in columns.values() for split in scores):
        blanks = ["", ""] if difference else []
        scores = [values.get(split, {}) for values in columns.values()]
        rows += [row + blanks for row in _header_rows(split, scores)]
        for metric, label in SHOWN.items():
            if any(metric in values for values in scores):
                row = [split, label, *(cell(values, metric) for values in scores)]
                change = difference_cells(difference.get(split, {}).get(metric), metric) if difference else ()
                rows.append([*row, *change])
    measured = dict.fromkeys(row[0] for row in rows)
    classes = metrics.get("classes", {}) if classes is None else classes
    return markdown_table(rows) + zero_shot_note({name: classes[name] for name in measured if name in classes})


def zero_shot_note(classes: Mapping[str, int]) -> str:
    """A line for splits whose titles are class names, "" where there are none."""
    if not classes:
        return ""
    named = ", ".join(f"{name} ({count:,} classes)" for name, count in classes.items())
    return f"\n\nTitles are class names in {named}: image to text R@1 is the zero-shot accuracy."


def _header_rows(split: str, scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a split above its metrics: numbers of pairs and queries, and which models have collapsed."""
    rows = []
    if any("units" in values for values in scores):
        pairs, queries = [split, "pairs"], [split, "queries"]
        for values in scores:
            if "units" not in values:
                pairs.append("-")
                queries.append("-")
                continue
            pairs.append(f"{values['pairs']:,}, {values['units']:,} independent")
            queries.append(f"{values['image_to_text_queries']:,} images, {values['text_to_image_queries']:,} titles")
        rows += [pairs, queries]
    if any(values.get("collapsed") for values in scores):
        rows.append([split, "collapsed", *("yes" if values.get("collapsed") else "no" for values in scores)])
    return rows


def collapse_warning(name: str, split: str, values: Mapping[str, Any]) -> str:
    """A sentence about a model that has collapsed, "" for others."""
    if not values.get("collapsed"):
        return ""
    return (f"Warning: {name} has collapsed on {split}: all its image or all its title embeddings are equal to "
            "rounding, so every answer is a tie and its figures mean nothing.")


def describe_sizes(values: Mapping[str, Any]) -> str:
    """The numbers of pairs, distinct images and titles, and independent units of a split; "" if unknown."""
    if "units" not in values:
        return ""
    return (f"{values['pairs']:,} pairs ({values['image_to_text_queries']:,} images, "
            f"{values['text_to_image_queries']:,} titles, {values['units']:,} independent)")


def digits_of(metric: str) -> int:
    """Decimals to print."""
    return 1 if metric.endswith("rank") else 3


def cell(values: Mapping[str, Any], metric: str) -> str:
    """A value with its interval, "-" if it was not measured."""
    if metric not in values:
        return "-"
    value, (low, high), digits = values[metric], values[f"{metric}_ci95"], digits_of(metric)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def difference_cells(difference: Mapping[str, Any] | None, metric: str) -> tuple[str, str]:
    """A difference with its interval, and its p; "-" if unknown."""
    if not difference:
        return "-", "-"
    (low, high), digits = difference["ci95"], digits_of(metric)
    p = difference.get("p")
    return (f"{difference['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0"))
