"""Before and after as a Markdown table: on the console and in the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = {
    "image_to_text_R@1": "image to text R@1", "image_to_text_R@5": "R@5", "image_to_text_R@10": "R@10",
    "image_to_text_median_rank": "median rank", "image_to_text_mrr": "MRR",
    "text_to_image_R@1": "text to image R@1", "text_to_image_R@5": "R@5", "text_to_image_R@10": "R@10",
    "text_to_image_median_rank": "median rank", "text_to_image_mrr": "MRR",
    "triplet_accuracy": "triplet accuracy",
}
WHEN = ("base", "tuned")


def table(metrics: Mapping[str, Any]) -> str:
    """A Markdown table, one block of rows a split: base, tuned (or whatever is there), and the difference if known.

    First how much was measured, and whether a model has collapsed.
    """
    difference = metrics.get("difference", {})
    columns = {name: metrics[name] for name in WHEN if name in metrics} or dict(metrics)
    rows = [["split", "metric", *columns, *(["difference", "p"] if difference else [])]]
    for split in dict.fromkeys(split for scores in columns.values() for split in scores):
        blanks = ["", ""] if difference else []
        rows += [row + blanks for row in _heads(split, [scores.get(split, {}) for scores in columns.values()])]
        known = {metric for scores in columns.values() for metric in scores.get(split, {})}
        rows += [[split, label, *(cell(scores.get(split, {}), metric) for scores in columns.values()),
                  *(difference_cells(difference.get(split, {}).get(metric), metric) if difference else ())]
                 for metric, label in SHOWN.items() if metric in known]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _heads(split: str, scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a split above its metrics: how much was measured with each model, and which has collapsed."""
    rows = []
    if any("units" in values for values in scores):
        rows.append([split, "pairs", *(f"{values['pairs']:,}, {values['units']:,} independent" if "units" in values
                                       else "-" for values in scores)])
        rows.append([split, "queries", *(f"{values['image_to_text_queries']:,} images, "
                                         f"{values['text_to_image_queries']:,} titles" if "units" in values else "-"
                                         for values in scores)])
    if any(values.get("collapsed") for values in scores):
        rows.append([split, "collapsed", *("yes" if values.get("collapsed") else "no" for values in scores)])
    return rows


def collapse_of(name: str, split: str, values: Mapping[str, Any]) -> str:
    """A sentence for a model that has collapsed, "" for others."""
    if not values.get("collapsed"):
        return ""
    return (f"Warning: {name} has collapsed on {split}: all its image or all its title embeddings are equal to "
            "rounding, so every answer is a tie and its figures mean nothing.")


def sizes(values: Mapping[str, Any]) -> str:
    """How many pairs, distinct images and titles, and independent units a split's figures rest on; "" if unknown."""
    if "units" not in values:
        return ""
    return (f"{values['pairs']:,} pairs ({values['image_to_text_queries']:,} images, "
            f"{values['text_to_image_queries']:,} titles, {values['units']:,} independent)")


def digits_of(metric: str) -> int:
    """Digits after the point."""
    return 1 if metric.endswith("rank") else 3


def cell(values: Mapping[str, Any], metric: str) -> str:
    """A value with its interval."""
    if metric not in values:
        return "-"
    value, (low, high), digits = values[metric], values[f"{metric}_ci95"], digits_of(metric)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def difference_cells(found: Mapping[str, Any] | None, metric: str) -> tuple[str, str]:
    """A difference with its interval, and its p; "-" where it is not known."""
    if not found:
        return "-", "-"
    (low, high), digits = found["ci95"], digits_of(metric)
    p = found.get("p")
    return (f"{found['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0"))
