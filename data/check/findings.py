"""Findings of `check`: kinds of defects, their meaning, as a table for people and as JSON for programs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.text import markdown_table
from data.web.limits import TRANSIENT

SEVERITIES = ("error", "warning", "hint")
TINY = 64  # pixels; CLIP sees 224
MEANING = {  # by a pattern of the kind
    TRANSIENT.pattern: "the server may answer another time: the next run asks again",
    "http-4..": "the server says that it is not to be had; it is not asked again without --retry-failed",
    "missing-file": "no such file; --image-root names the folder of the images, --image-template makes paths of ids",
    "forbidden-address": "a private address, which --allow-host HOST opens",
    "placeholder": "YouTube's stand-in for a thumbnail that is gone",
    "tiny-image": f"the shortest side is below {TINY} pixels",
    "na-title": "the title looks like a missing value; it is used as it stands",
    "long-title": "longer than CLIP's 77 tokens by an estimate (the tokenizer comes with the model); the rest is cut",
    "no-negative": "the row trains without an explicit negative",
    "negative-is-title": "the negative reads like the row's own title",
    "repeated-title": "an earlier row of the split has the title, up to case and spacing, which CLIP does not see",
    "repeated-image": "an earlier row of the split has the image, byte for byte, and one of its rows the same title",
    "several-titles": "the row is a further caption: earlier rows of the split give the image other titles",
    "similar-image": "an earlier row of the split has an image that looks the same",
    "title-in-.*": "the title is also in the split named: the two are not independent",
    "image-in-.*": "the image is also in the split named: what is measured here was seen there",
    "similar-image-in-.*": "an image that looks the same is in the split named",
}


class Finding(NamedTuple):
    """One kind of defect in one split: `count` rows have it, `examples` shows up to five of them."""

    split: str  # or the name of a file with rows that could not be read
    kind: str  # the ledger's reason or a key of MEANING; after "-in-" comes the other split: "image-in-train"
    severity: str  # one of SEVERITIES
    count: int  # type: ignore[assignment]  # hides tuple.count
    examples: tuple[str, ...]


def table(findings: Sequence[Finding], rows: Mapping[str, int], usable: Mapping[str, int], unread: int) -> str:
    """Return the findings as a Markdown table with their meanings and a summary.

    `rows` and `usable`: numbers by split; `unread`: the number of rows that could not be read.
    """
    shares = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    sums = ", ".join(f"{severity}s {count:,}" for severity, count in _totals(findings).items())
    cells = [["severity", "split", "rows", "finding", "for example"]]
    for finding in findings:
        cells.append([finding.severity, finding.split, f"{finding.count:,}", finding.kind, finding.examples[0]])
    lines = [markdown_table(cells, pad_last=False)]
    kinds = dict.fromkeys(finding.kind for finding in findings)
    lines.append("")
    for pattern, meaning in MEANING.items():
        meant = [kind for kind in kinds if re.fullmatch(pattern, kind)]
        if meant:
            lines.append(f"{', '.join(meant)}: {meaning}")
    lines.append("")
    total = sum(rows.values()) + unread
    dropped = total - sum(usable.values())
    summary = f"a run would drop {dropped:,} of {total:,} rows ({dropped / max(total, 1):.1%})"
    if dropped > 0.05 * total:
        summary += "; above --max-bad, 5% unless set, it stops"
    return "\n".join([*(lines if findings else []), f"rows checked: {shares}; {sums}", summary])


def as_json(findings: Sequence[Finding], rows: Mapping[str, int], usable: Mapping[str, int]) -> dict[str, Any]:
    """Return the findings as plain JSON values, with counts of all and of usable rows by split, and by severity."""
    return {"rows": dict(rows), "usable": dict(usable), "totals": _totals(findings),
            "findings": [{**finding._asdict(), "examples": list(finding.examples)} for finding in findings]}


def _totals(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of rows by severity; a row counts once for each of its defects."""
    totals = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        totals[finding.severity] += finding.count
    return totals
