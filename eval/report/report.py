"""The page `report.html`: one run, before and after, self-contained and offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from data.files import replace_text
from data.reading import open_regular, parse_json, read_text
from eval.report import figures
from eval.report.answers import AnswersByDirection
from eval.report.cases import case_sections
from eval.report.choice import choice_section
from eval.report.page import document, escape_text, template
from eval.report.table import WHEN

CONTENTS = {"figures": "Before and after", "curves": "How it got there", "cases": "Row by row",
            "recipe": "Recipe and data", "files": "Files"}
HEADER = template("""
<p class="soft small">thumbtune report · {started}</p>
<h1>{name}</h1>
{summary}
<nav aria-label="On this page"><ul>{links}</ul></nav>
""")


def write_report(out: Path, split: str, sizes: Mapping[str, int], answers: Mapping[str, AnswersByDirection],
                 title: Callable[[int], str], picture: Callable[[int], bytes]) -> Path:
    """Write `report.html` from the files of the run folder and the answers of `split`; at most some 2 MB.

    `sizes` are the pairs of each split; `title` and `picture` return title and small JPEG of a row of `split`.
    """
    config = parse_json(read_text(out / "config.json"))
    metrics = parse_json(read_text(out / "metrics.json"))
    losses = [float(line["loss"]) for line in _lines(out / "steps.jsonl")]
    history = {line["step"]: line for line in _lines(out / "evaluations.jsonl")}  # the latest of each step
    shared, interpolation = metrics.get("overlap", {}), metrics.get("interpolation")
    body = {
        "figures": figures.metric_tables(metrics, split),
        "curves": figures.curves(losses, list(history.values()), answers, split, interpolation),
        "cases": case_sections(answers, title, picture) if set(answers) >= set(WHEN) else "<p>Not kept.</p>",
        "recipe": figures.recipe(config, sizes, len(losses)) + choice_section(metrics.get("auto", {}))
        + figures.overlap(shared, sizes) + figures.ledger(_lines(out / "ledger.jsonl")),
        "files": figures.files(out),
    }
    links = ""
    main = ""
    for key, heading in CONTENTS.items():
        links += f'<li><a href="#{key}">{heading}</a></li>'
        main += f'<section aria-labelledby="{key}"><h2 id="{key}">{heading}</h2>{body[key]}</section>'
    settings = config["config"]
    name = f"{Path(settings['model']).name} on {Path(settings['dataset']).name}"
    header = HEADER.format(started=escape_text(config["started"][:10]), name=escape_text(name),
                           summary=figures.summary_sentence(metrics, split, sizes.get(split, 0)), links=links)
    commit = (config.get("git_commit") or "unknown")[:12]
    footer = f'<p class="small">Written by thumbtune, commit {escape_text(commit)}.</p>'
    page = out / "report.html"
    replace_text(page, document(f"{name}: before and after", header, main, footer))
    return page


def _lines(path: Path) -> Iterator[figures.Record]:
    if path.exists():
        with open_regular(path) as file:
            yield from map(parse_json, file)
