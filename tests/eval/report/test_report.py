"""The report page: whole, accessible, bounded; hostile titles stay text; a real browser has nothing to complain of."""

import io
import json
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PROGRAM, Browser
from PIL import Image
from test_answers import answers_in, space

from eval.report.charts import Axes, Line, binned, chart
from eval.report.page import clean
from eval.report.report import write_report
from eval.report.table import metrics_table

HOSTILE = ["<script>document.title='owned'</script>", '"><img src=x onerror=document.title="owned">',
           "\u202ereversed\u202c \u2067 and isolated", "A" * 5000, "</bdi></h4></main><h1>broken out</h1>",
           "' onmouseover='document.title=1", "&lt;b&gt; &amp; <![CDATA[ <!-- ", "\x00\x1b[31mred\x07 \ud800",
           "عنوان بالعربية", "标题 😱 e\u0301", "", "</style><style>*{display:none}</style>", "{braces} %s %(x)d"]
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.data.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def noise(row: int) -> bytes:
    """A JPEG as large as one of its size gets; a few are missing."""
    if row % 11 == 5:
        return b""
    pixels = np.random.default_rng(row).integers(0, 256, (160, 160, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=78)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a run leaves it, every text in it hostile."""
    out = tmp_path_factory.mktemp("<b>run")
    names = [f"{way}_{m}" for way in ("image_to_text", "text_to_image")
             for m in ("R@1", "R@5", "R@10", "median_rank", "mrr")] + ["triplet_accuracy"]

    sizes = {"pairs": 260, "units": 190, "image_to_text_queries": 200, "text_to_image_queries": 205}

    def scores(share: float) -> dict[str, Any]:
        return {**sizes, "collapsed": share > 0.3} | {name: part for metric in names for name, part in (
            (metric, 30.5 if metric.endswith("rank") else share),
            (f"{metric}_ci95", [20.0, 40.0] if metric.endswith("rank") else [share / 2, share * 1.5]))}

    difference = {name: {"value": 0.2, "ci95": [0.1, 0.3], "p": 0.0004} for name in names if "rank" not in name}
    metrics = {"base": {split: scores(0.2) for split in ("train", "valid", "test")},
               "tuned": {split: scores(0.4) for split in ("train", "valid", "test")},
               "difference": {"test": difference},
               "interpolation": {"alpha": 0.5, "chosen_on": "valid", "curve": [
                   {"alpha": part, "valid": scores(part / 2), "probe": scores(0.9 - part)} for part in (0, 0.5, 1)]}}
    config = {"config": {"model": HOSTILE[0], "dataset": HOSTILE[1], "trainable": ["projection"], "lr": 1e-3,
                         "schedule": "linear", "weight_decay": 0.0, "epochs": 2, "batch_size": 16, "seed": 1},
              "precision": "float32", "command": HOSTILE[5], "versions": {"torch": "2"}, "git_commit": None,
              "devices": {"kind": "cpu", "name": HOSTILE[4], "ranks": 1}, "started": "2026-01-02T03:04:05+00:00"}
    losses = [5 / (1 + step / 50) + (math.nan if step == 7 else 0) for step in range(1000)]
    history = [{"step": step, "epoch": step, "train": scores(0.2 + step / 5000), "valid": scores(0.2 + step / 4000)}
               for step in (0, 250, 500, 750, 1000)]
    ledger = [{"split": "train", "row": row, "image": HOSTILE[row % 13], "title": "t", "reason": "not-image",
               "detail": ""} for row in range(200)]
    for name, lines in (("steps", [{"step": i, "loss": loss} for i, loss in enumerate(losses)]),
                        ("evaluations", history), ("ledger", ledger)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / "metrics.json").write_text(json.dumps(metrics))
    (out / "config.json").write_text(json.dumps(config))
    answers = {"base": answers_in(space(260)), "tuned": answers_in(space(260, seed=1))}
    write_report(out, "test", {"train": 900, "valid": 40, "test": 260}, answers, lambda row: HOSTILE[row % 13], noise)
    return out


def test_the_page_is_whole_and_titles_stay_text(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    page = Page(text)
    assert not page.open
    tags = Counter(tag for tag, _ in page.elements)
    assert not {"script", "iframe", "object", "form", "base", "a href=http"} & set(tags)
    assert tags["style"] == tags["main"] == tags["h1"] == tags["header"] == 1
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert all(value.startswith(("data:", "#")) for name, value in attributes.items() if name in ("src", "href"))
    shown = "".join(page.data)
    assert HOSTILE[0] in shown and "broken out" in shown and "A" * 199 + "…" in shown and "A" * 201 not in text
    assert not set("\u202e\u2067\x00\x1b\ud800") & set(text)
    assert "the exported model is at 0.5, chosen on valid" in shown
    assert "test: 260 pairs (200 images, 205 titles, 190 independent)" in shown.replace("\u2068", "")
    assert "tuned has collapsed on test" in shown and "base has collapsed" not in shown
    assert "Of 200 test thumbnails" in shown and "p <.001" in shown and "+20.0 points [+10.0, +30.0]" in shown


def test_the_page_can_be_read_without_eyes_or_mouse(folder: Path) -> None:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert page.all("html")[0]["lang"] == "en" and page.all("meta")[0]["charset"] == "utf-8"
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg.get("role") == "img" and svg["aria-labelledby"] or svg.get("aria-hidden") == "true"
               for svg in page.all("svg"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert page.all("caption") or not page.all("table")


@pytest.mark.skipif(not PROGRAM, reason="no Chromium here")
def test_a_browser_finds_nothing_to_complain_of(folder: Path) -> None:
    for width, dark in ((1280, False), (360, True)):
        with Browser(width, 800, dark) as browser:
            browser.open((folder / "report.html").as_uri())
            assert browser.complaints() == []
            assert [url for url in browser.requests() if not url.startswith("data:")] == [
                (folder / "report.html").as_uri()]
            assert browser.run("document.title").startswith("script> on \"><img src=x")  # the last part of a path
            assert browser.run("document.documentElement.scrollWidth") <= width  # nothing is wider than a phone
            assert browser.run("document.images.length && [...document.images].every(i => i.naturalWidth > 0)")
            paper, ink = browser.run("[getComputedStyle(document.body).backgroundColor,"
                                     "getComputedStyle(document.body).color]")
            assert (paper == "rgb(255, 255, 255)") != dark and paper != ink
            browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.run("document.documentElement.scrollWidth") <= width


def test_the_table_shows_differences_where_they_are_known(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    lines = metrics_table(metrics | {"probe": {}}).splitlines()
    assert lines[0].split(" | ")[-2].strip() == "difference"
    assert any("+0.200 [+0.100, +0.300] | <.001" in line for line in lines if "| test " in line)
    assert len({len(line) for line in lines}) == 1
    assert "difference" not in metrics_table({"some/model": metrics["base"]})


def test_charts_say_what_they_draw() -> None:
    x, mean, low, high = binned([1.0, 3.0, math.nan, 5.0, 7.0], 2)
    assert (x, mean, low, high) == ([2.0, 4.5], [2.0, 6.0], [1.0, 5.0], [3.0, 7.0])
    one = Page(chart("a", "Title & more", "words", [Line("<x>", [0, 1], [2.0, 2.0])], Axes("step", "y")))
    assert not one.open and "Title & more" in one.data and "<x>" in one.data
    assert chart("a", "t", "d", [Line("x", [1], [math.nan])], Axes("s", "y")) == ""
    for values in ([0, 0], [1e-9, 3e-9], [-5, 1e6], [0.1234, 0.1235]):
        assert "nan" not in chart("a", "t", "d", [Line("x", [0, 1], values)], Axes("s", "y"))
    assert clean(" a\n\tb\u00a0 ") == "a b"
