"""Parts of the report page as HTML: tables, curves, recipe, ledger, files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.answers import AnswersByDirection
from eval.report.charts import Axes, Band, Line, binned, chart, interval_bar, outline
from eval.report.page import escape_attribute, escape_text
from eval.report.table import SHOWN, WHEN, cell, collapse_warning, describe_sizes, difference_cells

FILES = {"model/": "the tuned model; loads in transformers and sentence-transformers",
         "metrics.json": "every figure of this page with its interval",
         "answers.npz": "what the model answers, row by row, before and after",
         "steps.jsonl": "one line a step", "evaluations.jsonl": "one line an evaluation",
         "ledger.jsonl": "every dropped row and why", "tensorboard/": "curves, pictures, projector",
         "checkpoints/": "to carry on from", "config.json": "settings, versions, machine"}
REASONS = 12  # of dropped rows that are listed


def summary_sentence(metrics: Mapping[str, Any], split: str, pairs: int) -> str:
    """The result in a sentence, with interval and p of the difference."""
    name = "image_to_text_R@10"
    base, tuned = (metrics[when][split][name] for when in WHEN)
    difference = metrics.get("difference", {}).get(split, {}).get(name)
    change = ""
    if difference:
        (low, high), (_, p) = difference["ci95"], difference_cells(difference, name)
        change = f' Difference {100 * difference["value"]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], p {p}.'
    queries = metrics["tuned"][split].get("image_to_text_queries", pairs)
    return (f'{_collapses(metrics)}<p class="lead">Of {queries:,} {escape_text(split)} thumbnails, '
            f'<strong class="tuned-ink">{tuned:.0%}</strong> now find their own title among the first ten; '
            f'before training it was <strong class="base-ink">{base:.0%}</strong>.{change}</p>')


def _collapses(metrics: Mapping[str, Any]) -> str:
    """A sentence for each model and split that has collapsed."""
    return "".join(f'<p class="lead down">{escape_text(sentence, 300)}</p>' for when in WHEN
                   for split, values in metrics[when].items() if (sentence := collapse_warning(when, split, values)))


def metric_tables(metrics: Mapping[str, Any], first: str) -> str:
    """A table for each split, `first` on top and the others folded."""
    splits = sorted(metrics["tuned"], key=lambda split: split != first)
    tables = [(split, _split_table(metrics, split)) for split in splits]
    rest = "".join(f"<details><summary>{escape_text(split)}</summary>{html}</details>" for split, html in tables[1:])
    return (f'{tables[0][1]}<p class="soft small">Square brackets: 95 % interval; what is drawn anew are images with '
            'their titles, connected through shared ones, not rows. R@K: share of images (or titles) whose best right '
            'answer is among the first K. Triplet accuracy: share of hard negatives that the own title beats.</p>'
            f'{rest}')


def _split_table(metrics: Mapping[str, Any], split: str) -> str:
    difference = metrics.get("difference", {}).get(split, {})
    rows = []
    for metric in SHOWN:
        if metric not in metrics["tuned"][split]:
            continue
        cells, bars = [], []
        for when, style in zip(WHEN, "bt", strict=True):
            values = metrics[when][split]
            cells.append(f'<td class="n">{_with_small_interval(cell(values, metric))}</td>')
            bars.append((values[metric], *values[f"{metric}_ci95"], style))
        low, high = (0, 1) if not metric.endswith("rank") else (1, max(bar[2] for bar in bars))
        cells.append(f'<td class="bars">{interval_bar(low, high, bars)}</td>')
        if difference:
            change, p = difference_cells(difference.get(metric), metric)
            cells += [f'<td class="n">{_with_small_interval(change)}</td>', f'<td class="n">{escape_text(p)}</td>']
        rows.append(f'<tr><th scope="row">{_long_name(metric)}</th>{"".join(cells)}</tr>')
    heads = ['>Metric', ' class="base-ink">Before', ' class="tuned-ink">After', ' class="bars">Both']
    heads += [">Difference", ">p"] if difference else []
    return (f'<div class="wide" tabindex="0" role="region" aria-label="Figures of {escape_attribute(split)}">'
            f'<table><caption>{escape_text(split)}: {describe_sizes(metrics["tuned"][split]) or "pairs"}</caption>'
            f'<thead><tr>{"".join(f"<th scope=col{head}</th>" for head in heads)}</tr>'
            f'</thead><tbody>{"".join(rows)}</tbody></table></div>')


def _long_name(metric: str) -> str:
    words = metric.replace("image_to_text_", "").replace("text_to_image_", "").replace("_", " ").replace("mrr", "MRR")
    for way, arrow in (("image_to_text", "thumbnail → title"), ("text_to_image", "title → thumbnail")):
        if way in metric:
            return f'{words} <span class="ci">{arrow}</span>'
    return words


def _with_small_interval(text: str) -> str:
    """A number and its interval in smaller type, on a phone below it."""
    number, _, interval = text.partition(" ")
    return f'{number} <span class="ci">{interval}</span>'


def curves(losses: Sequence[float], history: Sequence[Mapping[str, Any]],
           answers: Mapping[str, AnswersByDirection], split: str,
           interpolation: Mapping[str, Any] | None = None) -> str:
    """Loss, Recall in both directions with the base model's as reference, margins before and after.

    `interpolation` is that entry of metrics.json: Recall of weights between base and tuned.
    """
    parts = [_loss(losses)] if losses else []
    for way, words in (("image_to_text", "thumbnail to title"), ("text_to_image", "title to thumbnail")):
        parts.append(_recall(f"{way}_R@10", f"Recall@10, {words}", history))
    if set(answers) >= set(WHEN):
        parts.append(_margins(answers, split))
    if interpolation:
        parts.append(_interpolation(interpolation))
    return f'<div class="charts">{"".join(parts)}</div>'


def _loss(losses: Sequence[float]) -> str:
    x, mean, low, high = binned(losses, 120)
    if not x:
        return ""
    words = (f"Over {len(losses):,} steps the training loss goes from {mean[0]:.3f} to {mean[-1]:.3f}. The line is the "
             "mean of neighbouring steps, the area their range.")
    return chart("loss", "Training loss", words, [Line("mean of neighbouring steps", x, mean)],
                 Axes("step", "loss"), Band(x, low, high))


def _recall(metric: str, heading: str, history: Sequence[Mapping[str, Any]]) -> str:
    """Recall over steps, for each split that was evaluated during training; one evaluated at both ends is left out."""
    lines, words = [], []
    splits = [split for split in ("valid", "train") if sum(split in entry for entry in history) > 2]
    for split, style, dotted in zip(splits or [key for key in ("valid", "train") if history and key in history[0]],
                                    ("s0", "s2"), ("s3", "s4"), strict=False):
        points = [(entry["step"], entry[split][metric]) for entry in history if split in entry]
        if len(points) < 2:
            continue
        x, y = [float(p[0]) for p in points], [float(p[1]) for p in points]
        lines += [Line(f"{split}", x, y, style), Line(f"{split}, base model", [x[0], x[-1]], [y[0], y[0]], dotted)]
        words.append(f"On {split} it goes from {y[0]:.3f} to {y[-1]:.3f}.")
    return chart(metric.replace("@", ""), heading, " ".join(words), lines, Axes("step", "share", floor=0.0))


def _margins(answers: Mapping[str, AnswersByDirection], split: str) -> str:
    margins = {when: [m for m in answers[when]["image_to_text"].margin_Q.tolist() if abs(m) < 3] for when in WHEN}
    values = margins["base"] + margins["tuned"]
    if not values:
        return ""
    low, high = min(values), max(values)
    lines = [Line(name, *outline(margins[when], low, high), style)
             for when, name, style in (("base", "before", "s1"), ("tuned", "after", "s0"))]
    won = {when: sum(m > 0 for m in values) / max(1, len(values)) for when, values in margins.items()}
    words = (f"Cosine of the right title minus that of the best wrong one, for {split} thumbnails. Above zero the "
             f"right one wins: {won['base']:.0%} before, {won['tuned']:.0%} after.")
    return chart("margin", "Margin of the right title", words, lines,
                 Axes("cosine of right minus best wrong", "share of rows", floor=0.0, mark=0.0))


def _interpolation(interpolation: Mapping[str, Any]) -> str:
    """Recall of weights between base and tuned; the vertical line marks the exported model."""
    points, alpha = interpolation["curve"], float(interpolation["alpha"])
    x = [float(point["alpha"]) for point in points]
    splits = [key for key in points[0] if key != "alpha"]
    lines = []
    for split, style in zip(splits, ("s0", "s1", "s2"), strict=False):
        lines.append(Line(split, x, [float(point[split]["image_to_text_R@10"]) for point in points], style))
    origin = f"chosen on {interpolation['chosen_on']}" if interpolation.get("chosen_on") else "as asked for"
    words = f"0 is the base model, 1 the tuned one; the exported model is at {alpha:g}, {origin}."
    return chart("between", "Recall@10 between base and tuned", words, lines,
                 Axes("share of the tuned weights", "share", floor=0.0, mark=alpha))


def recipe(config: Mapping[str, Any], sizes: Mapping[str, int], steps: int) -> str:
    """The main settings of the run as a list, and all of them folded."""
    s = config["config"]
    trained = ", ".join(s["trainable"]) if isinstance(s["trainable"], list) else s["trainable"]
    facts = {"Base model": s["model"], "Pairs": s["dataset"],
             "Rows kept": ", ".join(f"{split} {count:,}" for split, count in sizes.items()),
             "Trained": f"parameters named like {trained}", "Optimiser": (
                 f"AdamW, learning rate {s['lr']:g} ({s['schedule']}), weight decay {s['weight_decay']:g}, "
                 f"{s['epochs']} epochs of batch {s['batch_size']}, {steps:,} steps, seed {s['seed']}"),
             "Machine": f"{config['devices']['ranks']} x {config['devices']['name']}, {config['precision']}",
             "Started": config["started"], "Command": config["command"]}
    listed = "".join(f"<dt>{key}</dt><dd>{escape_text(value, 300)}</dd>" for key, value in facts.items())
    every = "".join(f"<tr><th scope=row><code>{escape_text(key)}</code></th><td>{escape_text(value, 300)}</td></tr>"
                    for key, value in [*s.items(), *config["versions"].items()])
    return (f"<dl>{listed}</dl><details><summary>Every setting and version</summary><div class=wide tabindex=0 "
            'role=region aria-label="Settings"><table><thead><tr><th scope=col>Name</th><th scope=col>Value</th></tr>'
            f"</thead><tbody>{every}</tbody></table></div></details>")


def overlap(shared: Mapping[str, Mapping[str, Mapping[str, int]]], sizes: Mapping[str, int]) -> str:
    """Numbers of rows whose image or title is also in an earlier split, from metrics.json; "" without any."""
    items = []
    for split, others in shared.items():
        for other, counts in others.items():
            items.append(f"<li>of {sizes[split]:,} {escape_text(split)} rows {counts['images']:,} have an image of "
                         f"{escape_text(other)}, {counts['titles']:,} a title, {counts['rows']:,} are whole rows of it"
                         "</li>")
    return ("<h3>Splits overlap</h3><p>Figures of a split that shares rows with train also measure what was learnt by "
            f"heart.</p><ul>{''.join(items)}</ul>") if items else ""


def ledger(entries: Iterable[Mapping[str, Any]]) -> str:
    """The number of dropped rows by split and reason, with an example of each."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for entry in entries:
        key = str(entry.get("split", "")), str(entry.get("reason", ""))
        if not entry.get("rows", 1):  # an unused file, which held no rows
            continue
        counts[key] += entry.get("rows", 1)
        examples.setdefault(key, str(entry.get("image") or entry.get("title") or entry.get("detail") or ""))
    if not counts:
        return "<h3>Dropped rows</h3><p>None: every row was used.</p>"
    rows = "".join(f"<tr><th scope=row>{escape_text(split)}</th><td>{escape_text(reason)}</td><td>{count:,}</td>"
                   f"<td>{escape_text(examples[split, reason])}</td></tr>"
                   for (split, reason), count in counts.most_common(REASONS))
    return (f"<h3>Dropped rows</h3><p>{sum(counts.values()):,} rows could not be used; <code>ledger.jsonl</code> "
            "names each.</p><div class=wide tabindex=0 role=region aria-label=\"Dropped rows\"><table><thead><tr>"
            "<th scope=col>Split</th><th scope=col>Reason</th><th scope=col>Rows</th><th scope=col>For example</th>"
            f"</tr></thead><tbody>{rows}</tbody></table></div>")


def files(out: Path) -> str:
    """The other files of the run folder, and the command that opens TensorBoard."""
    entries = "".join(f"<dt><code>{name}</code></dt><dd>{words}</dd>" for name, words in FILES.items()
                      if (out / name).exists())
    return (f"<p>Beside this page, in <code>{escape_text(out)}</code>:</p><dl>{entries}</dl>"
            f"<pre>tensorboard --logdir {escape_text(out.parent)}</pre>")
