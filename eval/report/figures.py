"""Parts of the report page as HTML: tables, curves, recipe, ledger, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.answers import AnswersByDirection
from eval.report.charts import Axes, Band, Line, binned, chart, interval_bar, outline
from eval.report.page import escape_attribute, escape_text, template
from eval.report.table import SHOWN, WHEN, Metrics, cell, collapse_warning, describe_sizes, difference_cells

Record = Mapping[str, Any]  # a JSON object of the run folder
FILES = {
    "model/": "the tuned model; loads in transformers and sentence-transformers",
    "metrics.json": "every figure of this page with its interval",
    "answers.npz": "what the model answers, row by row, before and after",
    "steps.jsonl": "one line a step",
    "evaluations.jsonl": "one line an evaluation",
    "ledger.jsonl": "every dropped row and why",
    "tensorboard/": "curves, pictures, projector",
    "checkpoints/": "to carry on from",
    "config.json": "settings, versions, machine",
}
REASONS = 12  # of dropped rows that are listed
HEADLINE = "image_to_text_R@10"
SPLIT_TABLE = template("""
<div class="wide" tabindex="0" role="region" aria-label="Figures of {label}">
<table>
<caption>{split}: {sizes}</caption>
<thead><tr>{heads}</tr></thead>
<tbody>{rows}</tbody>
</table>
</div>
""")
TABLE = template("""
<div class=wide tabindex=0 role=region aria-label="{label}">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>{rows}</tbody>
</table>
</div>
""")


def summary_sentence(metrics: Metrics, split: str, pairs: int) -> str:
    """Return the result in a sentence, with interval and p of the difference, after a warning for each collapse."""
    warnings = ""
    for when in WHEN:
        for measured, values in metrics[when].items():
            if warning := collapse_warning(when, measured, values):
                warnings += f'<p class="lead down">{escape_text(warning, 300)}</p>'
    change = ""
    if difference := metrics.get("difference", {}).get(split, {}).get(HEADLINE):
        points, low, high = (100 * value for value in (difference["value"], *difference["ci95"]))
        p = difference_cells(difference, HEADLINE)[1]
        change = f" Difference {points:+.1f} points [{low:+.1f}, {high:+.1f}], p {p}."
    base, tuned = metrics["base"][split], metrics["tuned"][split]
    queries = tuned.get("image_to_text_queries", pairs)
    return (f'{warnings}<p class="lead">Of {queries:,} {escape_text(split)} thumbnails, '
            f'<strong class="tuned-ink">{tuned[HEADLINE]:.0%}</strong> now find their own title among the first ten; '
            f'before training it was <strong class="base-ink">{base[HEADLINE]:.0%}</strong>.{change}</p>')


def metric_tables(metrics: Metrics, first: str) -> str:
    """Return a table for each split, `first` on top and the others folded."""
    folded = ""
    for split in metrics["tuned"]:
        if split != first:
            table = _split_table(metrics, split)
            folded += f"<details><summary>{escape_text(split)}</summary>{table}</details>"
    return (f'{_split_table(metrics, first)}<p class="soft small">Square brackets: 95 % interval, by resampling groups '
            'of rows that share images or titles. R@K: share of images (or titles) for which a right answer is '
            f'among the first K. Triplet accuracy: share of hard negatives that score below the own title.</p>{folded}')


def _split_table(metrics: Metrics, split: str) -> str:
    difference = metrics.get("difference", {}).get(split, {})
    tuned = metrics["tuned"][split]
    heads = ('<th scope=col>Metric</th><th scope=col class="base-ink">Before</th>'
             '<th scope=col class="tuned-ink">After</th><th scope=col class="bars">Both</th>')
    if difference:
        heads += "<th scope=col>Difference</th><th scope=col>p</th>"
    rows = ""
    for metric in SHOWN:
        if metric not in tuned:
            continue
        cells = ""
        bars = []
        for when, style in (("base", "b"), ("tuned", "t")):
            values = metrics[when][split]
            low, high = values[f"{metric}_ci95"]
            cells += f'<td class="n">{_with_small_interval(cell(values, metric))}</td>'
            bars.append((values[metric], low, high, style))
        is_rank = metric.endswith("rank")
        left, right = (1.0, max(bar[2] for bar in bars)) if is_rank else (0.0, 1.0)
        cells += f'<td class="bars">{interval_bar(left, right, bars)}</td>'
        if difference:
            change, p = difference_cells(difference.get(metric), metric)
            cells += f'<td class="n">{_with_small_interval(change)}</td><td class="n">{escape_text(p)}</td>'
        rows += f'<tr><th scope="row">{_long_name(metric)}</th>{cells}</tr>'
    return SPLIT_TABLE.format(label=escape_attribute(split), split=escape_text(split),
                              sizes=describe_sizes(tuned) or "pairs", heads=heads, rows=rows)


def _long_name(metric: str) -> str:
    for way, arrow in (("image_to_text_", "thumbnail → title"), ("text_to_image_", "title → thumbnail")):
        if metric.startswith(way):
            name = metric.removeprefix(way).replace("_", " ").replace("mrr", "MRR")
            return f'{name} <span class="ci">{arrow}</span>'
    return metric.replace("_", " ")


def _with_small_interval(text: str) -> str:
    """Return a number and its interval in smaller type, on a phone below it."""
    number, _, interval = text.partition(" ")
    return f'{number} <span class="ci">{interval}</span>'


def curves(losses: Sequence[float], history: Sequence[Record], answers: Mapping[str, AnswersByDirection], split: str,
           interpolation: Record | None = None) -> str:
    """Return charts of the loss, Recall in both directions beside the base model's, and margins before and after.

    `interpolation` is that entry of metrics.json: Recall of weights between base and tuned.
    """
    charts = _loss(losses)
    charts += _recall("image_to_text_R@10", "Recall@10, thumbnail to title", history)
    charts += _recall("text_to_image_R@10", "Recall@10, title to thumbnail", history)
    if set(answers) >= set(WHEN):
        charts += _margins(answers, split)
    if interpolation:
        charts += _interpolation(interpolation)
    return f'<div class="charts">{charts}</div>'


def _loss(losses: Sequence[float]) -> str:
    x, mean, low, high = binned(losses, 120)
    if not x:
        return ""
    words = (f"Over {len(losses):,} steps the training loss goes from {mean[0]:.3f} to {mean[-1]:.3f}. The line is the "
             "mean of neighbouring steps, the area their range.")
    line = Line("mean of neighbouring steps", x, mean)
    return chart("loss", "Training loss", words, [line], Axes("step", "loss"), Band(x, low, high))


def _recall(metric: str, heading: str, history: Sequence[Record]) -> str:
    """Chart the Recall of the splits that are evaluated during training, over steps."""
    lines: list[Line] = []
    sentences = []
    styles = [("s0", "s3"), ("s2", "s4")]  # of a split, and of the base model on it
    for split in ("valid", "train"):
        entries = [entry for entry in history if split in entry]
        if len(entries) < 2:
            continue
        style, base_style = styles.pop(0)
        x = [float(entry["step"]) for entry in entries]
        y = [float(entry[split][metric]) for entry in entries]
        lines.append(Line(split, x, y, style))
        lines.append(Line(f"{split}, base model", [x[0], x[-1]], [y[0], y[0]], base_style))
        sentences.append(f"On {split} it goes from {y[0]:.3f} to {y[-1]:.3f}.")
    return chart(metric.replace("@", ""), heading, " ".join(sentences), lines, Axes("step", "share", floor=0.0))


def _margins(answers: Mapping[str, AnswersByDirection], split: str) -> str:
    margins: dict[str, list[float]] = {}
    won: dict[str, float] = {}
    for when in WHEN:
        margin_Q = answers[when]["image_to_text"].margin_Q
        margins[when] = margin_Q[margin_Q.abs() < 3].tolist()  # it is infinite where there is no wrong title
        won[when] = sum(margin > 0 for margin in margins[when]) / max(1, len(margins[when]))
    both = margins["base"] + margins["tuned"]
    if not both:
        return ""
    low, high = min(both), max(both)
    lines = [Line("before", *outline(margins["base"], low, high), "s1"),
             Line("after", *outline(margins["tuned"], low, high), "s0")]
    words = (f"Cosine of the right title minus that of the best wrong one, for {split} thumbnails. Above zero the "
             f"right one wins: {won['base']:.0%} before, {won['tuned']:.0%} after.")
    axes = Axes("cosine of right minus best wrong", "share of rows", floor=0.0, mark=0.0)
    return chart("margin", "Margin of the right title", words, lines, axes)


def _interpolation(interpolation: Record) -> str:
    """Chart the Recall of weights between base and tuned; the vertical line marks the exported model."""
    points, alpha = interpolation["curve"], float(interpolation["alpha"])
    x = [float(point["alpha"]) for point in points]
    splits = [key for key in points[0] if key != "alpha"]
    lines = []
    for split, style in zip(splits, ("s0", "s1", "s2"), strict=False):
        y = [float(point[split][HEADLINE]) for point in points]
        lines.append(Line(split, x, y, style))
    origin = f"chosen on {interpolation['chosen_on']}" if interpolation.get("chosen_on") else "as asked for"
    words = f"0 is the base model, 1 the tuned one; the exported model is at {alpha:g}, {origin}."
    axes = Axes("share of the tuned weights", "share", floor=0.0, mark=alpha)
    return chart("between", "Recall@10 between base and tuned", words, lines, axes)


def recipe(config: Record, sizes: Mapping[str, int], steps: int) -> str:
    """Return the main settings of the run as a list, and all of them folded; `config` is config.json."""
    settings, devices = config["config"], config["devices"]
    optimiser = (f"AdamW, learning rate {settings['lr']:g} ({settings['schedule']}), weight decay "
                 f"{settings['weight_decay']:g}, {settings['epochs']} epochs of batch {settings['batch_size']}, "
                 f"{steps:,} steps, seed {settings['seed']}")
    if settings.get("recipe") == "auto":
        optimiser = f"chosen on held-out pairs, {steps:,} steps, seed {settings['seed']}"
    facts = {
        "Base model": settings["model"],
        "Pairs": settings["dataset"],
        "Rows kept": ", ".join(f"{split} {count:,}" for split, count in sizes.items()),
        "Trained": "parameters named like " + ", ".join(settings["trainable"]),
        "Optimiser": optimiser,
        "Machine": f"{devices['ranks']} x {devices['name']}, {config['precision']}",
        "Started": config["started"],
        "Command": config["command"],
    }
    listed = ""
    for key, value in facts.items():
        listed += f"<dt>{key}</dt><dd>{escape_text(value, 300)}</dd>"
    rows = ""
    for key, value in [*settings.items(), *config["versions"].items()]:
        name, shown = escape_text(key), escape_text(value, 300)
        rows += f"<tr><th scope=row><code>{name}</code></th><td>{shown}</td></tr>"
    heads = "<th scope=col>Name</th><th scope=col>Value</th>"
    table = TABLE.format(label="Settings", heads=heads, rows=rows)
    return f"<dl>{listed}</dl><details><summary>Every setting and version</summary>{table}</details>"


def overlap(shared: Mapping[str, Mapping[str, Mapping[str, int]]], sizes: Mapping[str, int]) -> str:
    """Return the numbers of rows whose image or title is also in an earlier split, from metrics.json; "" for none."""
    items = ""
    for split, others in shared.items():
        for other, counts in others.items():
            items += (f"<li>of {sizes[split]:,} {escape_text(split)} rows {counts['images']:,} have an image of "
                      f"{escape_text(other)}, {counts['titles']:,} a title, {counts['rows']:,} are whole rows of it"
                      "</li>")
    if not items:
        return ""
    return ("<h3>Splits overlap</h3><p>Figures of a split that shares rows with train also measure what was learnt by "
            f"heart.</p><ul>{items}</ul>")


def ledger(entries: Iterable[Record]) -> str:
    """Return the number of dropped rows by split and reason, with an example of each."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for entry in entries:
        count = entry.get("rows", 1)
        if not count:  # an unused file, which held no rows
            continue
        key = str(entry.get("split", "")), str(entry["reason"])
        counts[key] += count
        examples.setdefault(key, str(entry.get("image") or entry.get("title") or entry["detail"]))
    if not counts:
        return "<h3>Dropped rows</h3><p>None: every row was used.</p>"
    rows = ""
    for key, count in counts.most_common(REASONS):
        split, reason, example = map(escape_text, (*key, examples[key]))
        rows += f"<tr><th scope=row>{split}</th><td>{reason}</td><td>{count:,}</td><td>{example}</td></tr>"
    heads = "<th scope=col>Split</th><th scope=col>Reason</th><th scope=col>Rows</th><th scope=col>For example</th>"
    return (f"<h3>Dropped rows</h3><p>{sum(counts.values()):,} rows could not be used; <code>ledger.jsonl</code> "
            f"names each.</p>{TABLE.format(label='Dropped rows', heads=heads, rows=rows)}")


def files(out: Path) -> str:
    """Return the other files of the run folder, and the command that opens TensorBoard."""
    entries = ""
    for name, description in FILES.items():
        if (out / name).exists():
            entries += f"<dt><code>{name}</code></dt><dd>{description}</dd>"
    return (f"<p>Beside this page, in <code>{escape_text(out)}</code>:</p><dl>{entries}</dl>"
            f"<pre>tensorboard --logdir {escape_text(out.parent)}</pre>")
