"""Before and after as a Markdown table: on the console and in the model card."""

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
WHEN = ("base", "tuned")


def table(metrics: Mapping[str, Any]) -> str:
    """A Markdown table, one block of rows a split: base, tuned (or whatever is there), and the difference if known.

    Below it, how much was measured of each split, and which model has collapsed on it.
    """
    difference = metrics.get("difference", {})
    columns = {name: metrics[name] for name in WHEN if name in metrics} or dict(metrics)
    rows = [["split", "metric", *columns, *(["difference", "p"] if difference else [])]]
    for split in dict.fromkeys(split for scores in columns.values() for split in scores):
        known = {metric for scores in columns.values() for metric in scores.get(split, {})}
        rows += [[split, label, *(cell(scores.get(split, {}), metric) for scores in columns.values()),
                  *(difference_cells(difference.get(split, {}).get(metric), metric) if difference else ())]
                 for metric, label in SHOWN.items() if metric in known]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [note for split in dict.fromkeys(row[0] for row in rows[1:])
             for note in notes_on(split, {name: scores.get(split, {}) for name, scores in columns.items()})]
    return "\n".join([*lines, *(line for note in notes for line in ("", note))])


def notes_on(split: str, columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is to be known of the figures of a split: their size, and a warning for each model that has collapsed."""
    size = next((text for values in columns.values() if (text := sizes(values))), "")
    return [*([f"{split}: {size}."] if size else []),
            *filter(None, (collapse_of(name, split, values) for name, values in columns.items()))]


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
