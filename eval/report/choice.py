"""The candidates of `--recipe auto` and its choice, from metrics.json, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.text import markdown_table
from eval.report.page import escape_text

HEADS = ("candidate", "held-out loss", "worse than the best by", "standard error", "change of a cosine")
RULE = ("Held-out loss: negative log likelihood of the right partner among the held-out pairs, both ways. Chosen is, "
        "of all that are within one standard error of the best, the one that changes the base least, if it is better "
        "than the base by two.")


def choice_note(choice: Mapping[str, Any]) -> str:
    """Return Markdown: what was chosen and why, its settings, and the held-out loss of all candidates; "" for none."""
    if not choice:
        return ""
    reason = f"Chosen on held-out pairs: {choice['why']}.{_settings(choice)}"
    return f"\n\n{reason}\n\n{markdown_table(_rows(choice))}\n\n{RULE}"


def choice_section(choice: Mapping[str, Any]) -> str:
    """Return the same as HTML; "" for none."""
    if not choice:
        return ""
    heads, *rows = _rows(choice)
    head = "".join(f"<th scope=col>{escape_text(name)}</th>" for name in heads)
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td>{escape_text(value)}</td>" for value in values)
        body += f"<tr><th scope=row>{escape_text(name)}</th>{cells}</tr>"
    words = escape_text(f"Chosen on held-out pairs: {choice['why']}.{_settings(choice)}", 1_000)
    return (f"<h3>How it was chosen</h3><p>{words}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"</table><p class=\"soft small\">{escape_text(RULE, 500)}</p>")


def _settings(choice: Mapping[str, Any]) -> str:
    settings = choice.get("settings", {})
    if not settings:
        return ""
    return " Settings: " + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in settings.items()) + "."


def _rows(choice: Mapping[str, Any]) -> list[list[str]]:
    rows = [list(HEADS)]
    for line in choice["held_out"]:
        mark = " (chosen)" if line["candidate"] == choice["chosen"] else ""
        values = [line[name] for name in ("held_out_loss", "worse_than_best", "standard_error", "change")]
        rows.append([line["candidate"] + mark, *(f"{value:.4f}" for value in values)])
    return rows
