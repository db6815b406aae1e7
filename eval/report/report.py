"""The page `report.html`: one run, before and after, self-contained and offline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.files import open_regular, read_text, replace_text
from eval.report.answers import AnswersByDirection
from eval.report.cases import case_sections
from eval.report.figures import curves, files, ledger, metric_tables, overlap, recipe, summary_sentence
from eval.report.page import document, escape_text
from eval.report.table import WHEN


def write_report(out: Path, split: str, sizes: Mapping[str, int], answers: Mapping[str, AnswersByDirection],
                 title: Callable[[int], str], picture: Callable[[int], bytes]) -> Path:
    """Write `report.html` from the files of the run folder and the answers of `split`; at most some 2 MB.

    `sizes` are the pairs of each split; `title` and `picture` return title and small JPEG of a row of `split`.
    """
    config = json.loads(read_text(out / "config.json"))
    metrics = json.loads(read_text(out / "metrics.json"))
    losses = [float(line["loss"]) for line in _lines(out / "steps.jsonl")]
    history = list({line["step"]: line for line in _lines(out / "evaluations.jsonl")}.values())
    settings = config["config"]
    name = f"{Path(str(settings['model'])).name} on {Path(str(settings['dataset'])).name}"
    contents = {"figures": "Before and after", "curves": "How it got there", "cases": "Row by row",
                "recipe": "Recipe and data", "files": "Files"}
    body = {
        "figures": metric_tables(metrics, split),
        "curves": curves(losses, history, answers, split, metrics.get("interpolation")),
        "cases": case_sections(answers, title, picture) if set(answers) >= set(WHEN) else "<p>Not kept.</p>",
        "recipe": recipe(config, sizes, len(losses)) + overlap(metrics.get("overlap", {}), sizes)
        + ledger(_lines(out / "ledger.jsonl")),
        "files": files(out),
    }
    links = "".join(f'<li><a href="#{key}">{label}</a></li>' for key, label in contents.items())
    started, commit = config["started"][:10], (config.get("git_commit") or "unknown")[:12]
    head = (f'<p class="soft small">thumbtune report · {escape_text(started)}</p><h1>{escape_text(name)}</h1>'
            f'{summary_sentence(metrics, split, sizes.get(split, 0))}'
            f'<nav aria-label="On this page"><ul>{links}</ul></nav>')
    main = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{contents[key]}</h2>{html}</section>'
                   for key, html in body.items())
    foot = f'<p class="small">Written by thumbtune, commit {escape_text(commit)}.</p>'
    page = out / "report.html"
    replace_text(page, document(f"{name}: before and after", head, main, foot))
    return page


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with open_regular(path) as file:
            yield from map(json.loads, file)
