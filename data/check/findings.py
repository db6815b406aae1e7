"""What a look over a dataset has found: kinds of defects, what they mean, and how people and programs read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data.text import markdown_table
from data.web.policy import TRANSIENT

SEVERITIES = ("error", "warning", "hint")
TINY = 64  # pixels; CLIP sees 224
MEANING = {  # by a pattern of the kind
    TRANSIENT.pattern: "the server may answer another time: the next run asks again",
    "http-4..": "the server says that it is not to be had; it is not asked again without --retry-failed",
    "forbidden-address": "a private address, which --allow-host HOST opens",
    "placeholder": "YouTube's stand-in for a thumbnail that is gone",
    "tiny-image": f"the shortest side is below {TINY} pixels",
    "na-title": "the title looks like a missing value; it is used as it stands",
    "long-title": "longer than CLIP's 77 tokens by an estimate (the tokenizer comes with the model); the rest is cut",
    "no-negative": "the row trains without an explicit negative",
    "negative-is-title": "the negative reads like the row's own title",
    "repeated-title": "an earlier row of the split has the title, up to case and spacing, which CLIP does not see",
    "repeated-image": "an earlier row of the split has the image, byte for byte",
    "similar-image": "an earlier row of the split has an image that looks the same",
    "title-in-.*": "the title is also in the split named: the two are not independent",
    "image-in-.*": "the image is also in the split named: what is measured here was seen there",
    "similar-image-in-.*": "an image that looks the same is in the split named",
}


class Finding(NamedTuple):
    """One kind of defect in one split: `count` rows have it, `examples` shows up to five of them."""

    split: str  # or the file name of a shard that has lost samples
    kind: str  # the ledger's reason or a key of MEANING; after "-in-" comes the other split: "image-in-train"
    severity: str  # one of SEVERITIES
    count: int  # type: ignore[assignment]  # nobody misses tuple.count
    examples: tuple[str, ...]


def table(findings: Sequence[Finding], rows: Mapping[str, int], usable: Mapping[str, int], lost: int) -> str:
    """The findings as a Markdown table, what they mean, and two lines that sum up.

    `rows` and `usable` rows by split; `lost` samples never became rows.
    """
    shares = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    sums = ", ".join(f"{severity}s {count:,}" for severity, count in _totals(findings).items())
    cells = [["severity", "split", "rows", "finding", "for example"]]
    for finding in findings:
        cells.append([finding.severity, finding.split, f"{finding.count:,}", finding.kind, finding.examples[0]])
    lines = [markdown_table(cells, pad_last=False)]
    kinds = dict.fromkeys(one.kind for one in findings)
    meant = {meaning: [kind for kind in kinds if re.fullmatch(pattern, kind)] for pattern, meaning in MEANING.items()}
    lines += ["", *(f"{', '.join(some)}: {meaning}" for meaning, some in meant.items() if some), ""]
    total, dropped = sum(rows.values()) + lost, sum(rows.values()) + lost - sum(usable.values())
    says = f"a run would drop {dropped:,} of {total:,} rows ({dropped / max(total, 1):.1%})"
    return "\n".join([*(lines if findings else []), f"rows checked: {shares}; {sums}",
                      says + ("; above --max-bad, 5% unless set, it stops" if dropped > 0.05 * total else "")])


def as_json(findings: Sequence[Finding], rows: Mapping[str, int], usable: Mapping[str, int]) -> dict[str, Any]:
    """The findings as plain JSON values, with the number of rows and of usable rows of each split, and by severity."""
    return {"rows": dict(rows), "usable": dict(usable), "totals": _totals(findings),
            "findings": [{**one._asdict(), "examples": list(one.examples)} for one in findings]}


def _totals(findings: Sequence[Finding]) -> dict[str, int]:
    """Rows by severity; a row counts once for each of its defects."""
    return {severity: sum(one.count for one in findings if one.severity == severity) for severity in SEVERITIES}
