"""Search: top-k against the naive sort, answers against transformers, and what a warm store is spared."""

from __future__ import annotations

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_pairs, noting
from hub import Hub

import run as command_line
from engine.commands.search import search as run_search
from engine.config.cli import parse
from engine.ranks.world import World
from eval.search import top_k

HOSTILE = "<script>alert(1)</script>\x1b[31m & \"quoted\" \u202e"


@pytest.mark.parametrize("seed", range(12))
def test_top_k_equals_the_naive_stable_sort(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, queries, k, chunk = (int(torch.randint(1, high, (), generator=generator)) for high in (90, 9, 20, 40))
    gallery = torch.randint(-1, 2, (rows, 3), generator=generator).float()  # few values: many equal scores
    query = torch.randint(-2, 3, (queries, 3), generator=generator).float()
    scores, items = top_k(query, lambda start, stop: gallery[start:stop], rows, k, chunk)
    naive = (query @ gallery.T).sort(stable=True, dim=1, descending=True)
    assert torch.equal(items, naive.indices[:, :k]) and torch.equal(scores, naive.values[:, :k])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with a copied image, titles repeated as they are and in capitals, a hostile title, a row without title and
    one whose image is dead.
    """
    pairs = make_pairs(tmp_path_factory.mktemp("odd") / "pairs", 20, 5, 5)
    with (pairs / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shutil.copy(pairs / rows[0]["image"], pairs / "images" / "copy.png")
    rows[7]["image"], rows[8]["title"], rows[9]["title"], rows[10]["title"], rows[12]["title"] = (
        "images/copy.png", rows[0]["title"], HOSTILE, "", f" {rows[1]['title'].upper()}")
    (pairs / rows[11]["image"]).write_bytes(b"gone")
    with (pairs / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return pairs


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search") / "cache"


def search(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert command_line.main(["search", "--precision", "fp32", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def embedded(model: Path, titles: list[str], pictures: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of titles and pictures as transformers makes them."""
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    images = [Image.open(path).convert("RGB") for path in pictures]
    inputs = CLIPProcessor.from_pretrained(model)(text=titles, images=images, return_tensors="pt", padding=True,
                                                  truncation=True, max_length=77)
    with torch.no_grad():
        out = CLIPModel.from_pretrained(model)(**inputs)
    return out.text_embeds, out.image_embeds


def test_answers_are_those_of_transformers(odd: Path, cache: Path, tiny_model: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "queries.txt").write_text("2 blue bars\n\n  1984 \n", encoding="utf-8")
    flags = "--model", tiny_model, "--dataset", odd, "--cache-dir", cache, "--top", "99", "--json"
    told = json.loads(search(capsys, *flags, "3 red circles", "--queries", tmp_path / "queries.txt"))["queries"]
    titles = ["3 red circles", "2 blue bars", "1984"]
    assert [one["query"] for one in told] == titles and {one["kind"] for one in told} == {"title"}
    for number, one in enumerate(told):
        shown = [Path(answer["image"]) for answer in one["answers"]]
        assert len(shown) == len({path.read_bytes() for path in shown}) == 28  # of 30, a copy and a dead one
        assert [answer["rank"] for answer in one["answers"]] == list(range(1, 29))
        assert sum(answer["title"] == "" for answer in one["answers"]) == 1  # no title is needed to be found
        text, image = embedded(tiny_model, titles, shown)
        theirs = image @ text[number]
        assert torch.allclose(theirs, torch.tensor([answer["score"] for answer in one["answers"]]), atol=2e-3)
    best = json.loads(search(capsys, *flags, "--image", shown[0], "--split", "train"))["queries"][0]
    found = [answer["title"] for answer in best["answers"]]
    assert best["kind"] == "image" and len(found) == len(set(found)) == 17  # of 20, two repeated, one missing
    text, image = embedded(tiny_model, found, shown[:1])
    assert torch.allclose(text @ image[0], torch.tensor([answer["score"] for answer in best["answers"]]), atol=2e-3)


def test_a_warm_store_runs_no_tower_over_the_gallery(odd: Path, cache: Path, tiny_model: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", tiny_model, "--dataset", odd, "--cache-dir", cache]
    search(capsys, *flags, "warm up")
    picture = next((odd / "images").glob("*.png"))
    search(capsys, *flags, "--image", picture)

    def encode(count: int, encode: Any) -> Any:
        def limited(self: Any, inputs: Any) -> torch.Tensor:
            assert len(inputs[0] if isinstance(inputs, tuple) else inputs) == count
            return encode(self, inputs)
        return limited

    from engine.clip.towers import ImageTower, TextTower

    monkeypatch.setattr(ImageTower, "forward", encode(0, ImageTower.forward))
    monkeypatch.setattr(TextTower, "forward", encode(1, TextTower.forward))
    again = search(capsys, *flags, "another title", "--top", "30", "--html", tmp_path / "page.html").splitlines()
    assert again[0] == "another title" and len(again) == 29
    assert any("alert(1)" in line for line in again) and not any("\x1b" in line or "\u202e" in line for line in again)
    assert all("images/" in line and str(odd) not in line for line in again[1:])
    seen = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in seen.tags and seen.tags.count("img") == 28
    assert all(source.startswith(("data:", "#")) for source in seen.sources)  # nothing is loaded
    assert "default-src 'none'" in seen.policy and "<script>alert(1)</script>" in seen.text


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.policy, self.text = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if known.get("http-equiv"):
            self.policy = known["content"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_picture_from_the_web_comes_through_the_guard(odd: Path, cache: Path, tiny_model: Path, hub: Hub,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["search", "--model", tiny_model, "--dataset", odd, "--cache-dir", cache, "--image",
             f"{hub.url}/thumbs/v0000000003.jpg"]
    asked = len(hub.requests)
    assert command_line.main([*map(str, flags)]) == 2
    assert "forbidden-address" in capsys.readouterr().err and len(hub.requests) == asked
    assert command_line.main([*map(str, flags), "--allow-host", "127.0.0.1", "--top", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_only_the_main_rank_answers(odd: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, cfg = parse("run.py", ["search", "--model", str(tiny_model), "--dataset", str(odd), "words"])
    rank = World(1, 1, 2, torch.device("cpu"))
    assert run_search(cfg, rank, None) == 0  # type: ignore[arg-type]  # a signal object would keep its handlers
    assert capsys.readouterr() == ("", "")


def test_only_files_that_changed_are_read_again(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    import os

    from data.cold import Reader

    pairs = make_pairs(tmp_path / "pairs", 8, 3, 3)
    pictures = sorted((pairs / "images").iterdir())
    long_ago = 1_600_000_000
    read: list[str] = []
    monkeypatch.setattr(Reader, "read", noting(Reader.read, lambda self, reference: read.append(reference)))
    monkeypatch.setattr("data.store.stat_cache.SETTLED", -60.0)  # all files count as settled

    def look() -> tuple[list[str], list[str]]:
        read.clear()
        out = search(capsys, "--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "words",
                     "--top", "50")
        return sorted(read), out.splitlines()

    everything, first = look()
    assert everything == [str(path) for path in pictures]
    assert look() == ([], first)
    content = pictures[0].read_bytes()
    pictures[1].write_bytes(content)
    os.utime(pictures[1], (long_ago, long_ago))  # a date made up; the time of change cannot be
    again, second = look()
    assert again == [str(pictures[1])] and len(second) == len(first) - 1  # it is a copy now
    (index,) = (tmp_path / "cache" / "seen").iterdir()
    index.write_bytes(index.read_bytes()[:-30])
    assert look() == (everything, second)
    monkeypatch.setattr("data.store.stat_cache.SETTLED", 60.0)  # written just now: not to be trusted
    index.unlink()
    assert look() == look() == (everything, second)
