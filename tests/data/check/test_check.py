"""The check finds each planted defect once and nothing else; the pair search finds what comparing all pairs finds."""

import csv
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import Loopback, make_pairs, run, served
from PIL import Image, ImageEnhance
from scenes import SCENES, scene_thumbnail

from data.check import similar
from data.check.checks import _flaws, check
from data.check.findings import Finding, as_json, table
from data.check.similar import NEAR, first_similar, near_pairs, perceptual_hash, picture_signature
from data.cold import Reader
from data.images.decode import ImageSpec
from data.sources.source import load_splits
from data.web.limits import FetchPolicy

SHARED = Path(__file__).resolve().parents[4] / "shared"
LONG = "How I built it: " + "one part after the other, " * 16


def look_over(dataset: Path, cache: Path, lost: Sequence[Mapping[str, Any]] = ()) -> list[Finding]:
    reader = Reader(cache, ImageSpec.clip(), FetchPolicy(allow_hosts=("127.0.0.1",)), 25_000_000, 2)
    return check(load_splits(str(dataset)), reader, print, lost)[0]


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def brighter(data: bytes) -> bytes:
    return jpeg(ImageEnhance.Brightness(Image.open(io.BytesIO(data))).enhance(1.08))


def resized(data: bytes, by: float) -> bytes:
    image = Image.open(io.BytesIO(data))
    return jpeg(image.resize((int(image.width * by), int(image.height * by))))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A host that counts as YouTube's: its one thumbnail is the placeholder, all others are gone."""
    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = jpeg(Image.new("RGB", (120, 90), (128, 128, 128)))
            self.send_response(200 if "placeholder" in self.path else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr("data.web.guard.YOUTUBE", re.compile(r"127\.0\.0\.1"))
    with served(Host) as url:
        yield url


class Table:
    """A split's CSV, to be edited by row; leaving the block writes it."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.path = folder, folder / f"{split}.csv"
        with self.path.open(newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def file(self, row: int) -> Path:
        return self.folder / self.rows[row]["image"]

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


def plant(folder: Path, server: str) -> dict[tuple[str, str], tuple[str, int, str]]:
    """Spoil a dataset; what is to be found: (split, kind) -> (severity, row, what the example names)."""
    with Table(folder, "train") as train, Table(folder, "valid") as valid, Table(folder, "test") as test:
        train.file(0).unlink()
        train.file(1).write_bytes(b"<html>not found</html>")
        train.file(2).write_bytes(train.file(2).read_bytes()[:-400])
        train.file(3).write_bytes(jpeg(Image.open(train.file(3)).resize((90, 63))))
        train.rows[4]["title"], train.rows[4]["title_neg"] = " \t", " "
        train.rows[5]["title"] = "NaN"
        train.rows[6]["title"] = LONG
        train.rows[8]["title_neg"] = train.rows[8]["title"].upper().replace(" ", "  ")
        train.rows[10]["title"] = train.rows[9]["title"].title() + " "
        train.file(12).write_bytes(train.file(11).read_bytes())
        train.file(14).write_bytes(jpeg(Image.open(train.file(13)), 70))
        train.rows[15]["image"] = f"{server}/gone.jpg"
        train.rows[16]["image"] = f"{server}/placeholder.jpg"
        train.rows[17]["image"] = ""
        valid.rows[0]["title"] = train.rows[20]["title"]
        valid.file(1).write_bytes(train.file(21).read_bytes())
        valid.rows[7]["title_neg"] = ""
        test.file(2).write_bytes(brighter(train.file(22).read_bytes()))
        test.rows[3]["title"] = valid.rows[5]["title"]
        test.file(6).write_bytes(train.file(14).read_bytes())  # the same as one, and therefore not also similar to 13
    return {
        ("train", "missing-file"): ("error", 0, "train-0000.jpg"), ("train", "not-image"): ("error", 1, "<html"),
        ("train", "truncated"): ("error", 2, "train-0002.jpg"), ("train", "no-title"): ("error", 4, "train-0004.jpg"),
        ("train", "negative-is-title"): ("error", 8, train.rows[8]["title"]),
        ("train", "http-404"): ("error", 15, "/gone.jpg"), ("train", "placeholder"): ("error", 16, "stand-in"),
        ("train", "no-image"): ("error", 17, "no image"),
        ("valid", "image-in-train"): ("error", 1, "train row 21: images/train-0021.jpg"),
        ("test", "image-in-train"): ("error", 6, "train row 14: images/train-0014.jpg"),
        ("train", "tiny-image"): ("warning", 3, "63 px"),
        ("train", "repeated-title"): ("warning", 10, "train row 9: "),
        ("train", "several-titles"): ("hint", 12, "train row 11: images/train-0011.jpg"),
        ("train", "similar-image"): ("warning", 14, "train row 13: images/train-0013.jpg"),
        ("valid", "title-in-train"): ("warning", 0, "train row 20: "),
        ("test", "similar-image-in-train"): ("warning", 2, "train row 22: images/train-0022.jpg"),
        ("test", "title-in-valid"): ("warning", 3, "valid row 5: "),
        ("train", "na-title"): ("hint", 5, "'NaN'"), ("train", "long-title"): ("hint", 6, "How I built it"),
        ("train", "no-negative"): ("hint", 4, "' "), ("valid", "no-negative"): ("hint", 7, valid.rows[7]["title"]),
    }


def test_each_planted_defect_is_found_and_nothing_else(server: str, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 40, 10, 10)
    assert look_over(pairs, tmp_path / "cache") == []  # some of the negatives are other rows' titles
    planted = plant(pairs, server)
    findings = look_over(pairs, tmp_path / "cache")
    assert {(one.split, one.kind): (one.severity, one.count) for one in findings} == {
        key: (severity, 1) for key, (severity, _, _) in planted.items()}
    for one in findings:
        _, row, names = planted[one.split, one.kind]
        assert len(one.examples) == 1 and one.examples[0].startswith(f"row {row}: ") and names in one.examples[0]
    assert [one.severity for one in findings] == ["error"] * 10 + ["warning"] * 6 + ["hint"] * 5


def test_five_captions_an_image_are_one_line(tmp_path: Path) -> None:
    """Flickr30k would be 4,003 warnings; a caption that an image has twice is still one."""
    folder = tmp_path / "flickr"
    make_pairs(folder, 12, 6, 6)
    images = sorted(f"images/{path.name}" for path in (folder / "images").glob("train*"))
    captions = [[f"caption {n} of picture {row}" for n in range(5)] for row in range(len(images))]
    for split in ("train", "valid", "test"):
        (folder / f"{split}.csv").unlink()

    def find() -> list[tuple[str, str, int]]:
        rows = [{"image": image, "caption": texts} for image, texts in zip(images, captions, strict=True)]
        (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = look_over(folder, tmp_path / "cache")
        return [(finding.kind, finding.severity, finding.count) for finding in found if finding.split == "train"]

    assert find() == [("several-titles", "hint", 4 * 12)]
    captions[3][1] = captions[3][0]
    assert sorted(find()) == [("repeated-image", "warning", 4), ("repeated-title", "warning", 1),
                              ("several-titles", "hint", 4 * 11)]


def test_rows_are_counted_and_five_shown(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 40, 10, 10)
    with Table(pairs, "train") as train:
        for row in range(3, 12):
            train.rows[row]["title"] = train.rows[2]["title"]
    entry = {"shard": "/a/train-0.tar", "reason": "truncated", "detail": "cut\x1b[2J"}
    lost = [{**entry, "key": "k7"}, {**entry, "key": ""}]
    damage, repeats = look_over(pairs, tmp_path / "cache", lost=lost)
    assert damage == Finding("train-0.tar", "truncated", "error", 2,
                             ("k7: cut [2J", "(unknown sample): cut [2J"))
    assert repeats[:4] == ("train", "repeated-title", "warning", 9)
    assert [example.split(":")[0] for example in repeats.examples] == [f"row {row}" for row in range(3, 8)]
    rows = {"train": 40, "valid": 10, "test": 10}
    lines = table([damage, repeats], rows, rows, 2).splitlines()
    assert lines[2].startswith("| error    | train-0.tar | 2    | truncated") and len(lines) == 9
    assert lines[-2] == "rows checked: train 40, valid 10, test 10; errors 2, warnings 9, hints 0"
    assert lines[-1] == "a run would drop 2 of 62 rows (3.2%)"
    plain = as_json([damage, repeats], rows, rows)
    assert json.loads(json.dumps(plain)) == plain and plain["findings"][1]["count"] == 9
    assert table([], rows, {**rows, "train": 36}, 0).splitlines() == [
        "rows checked: train 40, valid 10, test 10; errors 0, warnings 0, hints 0",
        "a run would drop 4 of 60 rows (6.7%); above --max-bad, 5% unless set, it stops"]


def test_the_command_and_its_exit_code(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 20, 6, 6)
    flags = ["check", "--dataset", pairs, "--cache-dir", tmp_path / "cache"]
    with Table(pairs, "test") as test:
        test.rows[4]["title"] = "None"
    hinted = run([*flags, "--strict"])
    assert hinted.returncode == 0 and "| hint " in hinted.stdout, hinted.stderr
    next((pairs / "images").glob("valid*")).write_bytes(b"")
    strict = run([*flags, "--strict", "--json"])
    assert strict.returncode == 1, strict.stderr
    said = json.loads(strict.stdout)
    assert said["rows"] == {"train": 20, "valid": 6, "test": 6} == {**said["usable"], "valid": 6}
    assert said["usable"]["valid"] == 5
    assert said["totals"] == {"error": 1, "warning": 0, "hint": 1}
    assert [(one["split"], one["kind"]) for one in said["findings"]] == [("valid", "empty"), ("test", "na-title")]
    lenient = run(flags)
    assert lenient.returncode == 0 and "| error " in lenient.stdout, lenient.stderr


def test_copies_look_alike_and_different_pictures_do_not() -> None:
    pictures = [scene_thumbnail(scene) for scene in range(0, SCENES, 59)]
    changes = (lambda data: jpeg(Image.open(io.BytesIO(data)), 40), lambda data: resized(data, 0.6),
               lambda data: resized(data, 1.5), brighter, lambda data: brighter(resized(data, 0.6)))
    copies = [change(data) for change in changes for data in pictures]
    looks = np.array([picture_signature(data, 25_000_000) for data in [*pictures, *copies]])
    N = len(pictures)
    assert looks["side"][:N].tolist() == [360] * N
    original = np.arange(len(looks)) % N
    is_of = original[:, None] == np.arange(N)  # one set for each picture: its copies and itself
    first = first_similar(looks, is_of)
    alike = first < len(looks)
    np.testing.assert_array_equal(alike, is_of)
    np.testing.assert_array_equal(first[N:][is_of[N:]], original[N:])  # the least of those alike: the picture itself


def test_plain_pictures_are_told_apart_by_colour() -> None:
    def look(*colour: int) -> np.ndarray:
        noise = np.random.default_rng(sum(colour)).integers(-2, 3, (90, 120, 3))
        return picture_signature(jpeg(Image.fromarray((noise + colour).astype(np.uint8))), 25_000_000)

    looks = np.array([look(200, 40, 40), look(40, 40, 200), look(190, 40, 40), look(93, 93, 93), look(220, 220, 220)])
    assert not looks["hash"].any()
    assert first_similar(looks, np.ones((5, 1), bool))[:, 0].tolist() == [2, 5, 0, 5, 5]


def test_hash_is_the_cosine_transform() -> None:
    pixels_CSS = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    grey = 0.299 * pixels_CSS[0] + 0.587 * pixels_CSS[1] + 0.114 * pixels_CSS[2]
    at = np.arange(32) + 0.5
    waves = [[(grey * np.outer(np.cos(np.pi * v * at / 32), np.cos(np.pi * h * at / 32))).sum() for h in range(8)]
             for v in range(8)]
    flat = np.array(waves).ravel()
    strong = flat > np.median(flat[1:]) + 256
    strong[0] = False
    bits = np.unpackbits(np.array([perceptual_hash(pixels_CSS)]).view(np.uint8))
    np.testing.assert_array_equal(bits, strong)


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_pair_search_equals_brute_force(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    hashes = rng.integers(0, 1 << 64, 1000, np.uint64)
    planted = hashes[:600].copy()
    for row, distance in enumerate(np.arange(600) % 10):  # neighbours at 0 to 9 bits
        for bit in rng.choice(64, distance, replace=False):
            planted[row] ^= np.uint64(1) << np.uint64(bit)
    crowd = np.full(40, hashes[0]) ^ (np.uint64(1) << rng.integers(0, 64, 40, np.uint64))  # one or two bits apart
    hash_N = rng.permutation(np.concatenate([hashes, planted, crowd]))
    found = [tuple(sorted(pair)) for left, right in near_pairs(hash_N) for pair in zip(left.tolist(), right.tolist(),
                                                                                      strict=True)]
    apart = np.bitwise_count(hash_N[:, None] ^ hash_N)
    expected = np.argwhere(np.triu(apart <= NEAR, 1))
    assert len(expected) > 480 + 780
    assert sorted(found) == [tuple(pair) for pair in expected.tolist()]
    assert not any(len(left) for few in (0, 1) for left, _ in near_pairs(hash_N[:few]))


@pytest.mark.skipif(not (SHARED / "clip-tokenizer").is_dir(), reason="needs CLIP's vocabulary")
def test_the_estimate_of_long_titles() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(SHARED / "clip-tokenizer")
    with (SHARED / "data" / "openstax-titles" / "train.csv").open(newline="", encoding="utf-8") as file:
        texts = [text for row in csv.DictReader(file) for text in (row["title"], row["caption"], row["alt"]) if text]
    too_long = np.array([len(ids) for ids in tokenizer(texts)["input_ids"]]) > 77
    estimate = _flaws(pa.array(texts)) == "long-title"
    assert estimate[too_long].mean() > 0.97 and too_long[estimate].mean() > 0.97


def test_a_body_that_is_no_picture_is_forgotten(tmp_path: Path) -> None:
    """Else an error message that a server sent with status 200 stands for the picture in every later run."""
    picture = jpeg(Image.effect_noise((300, 200), 60))
    broken = {"/message.jpg": b'{"error": "rate limited"}', "/cut.jpg": picture[: len(picture) // 2]}
    bodies = dict(broken)

    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()  # without a length nobody can tell that a body was cut
            self.wfile.write(bodies[self.path])

        def log_message(self, *_: object) -> None:
            pass

    host = Loopback(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    (tmp_path / "all.csv").write_text("image,title\n" + "".join(
        f"http://127.0.0.1:{host.server_port}{path},title of {path}\n" for path in broken))
    kinds = [one.kind for one in look_over(tmp_path / "all.csv", tmp_path / "cache")]
    assert {"not-image", "truncated"} <= set(kinds)
    bodies.update(dict.fromkeys(broken, picture))
    kinds = [one.kind for one in look_over(tmp_path / "all.csv", tmp_path / "cache")]
    assert not {"not-image", "truncated"} & set(kinds)
    host.shutdown()


def test_a_crowd_of_alike_hashes_costs_a_multiple_of_its_size() -> None:
    """Plain pictures all hash to 0: comparing all pairs of 100,000 of them would take hours, without a word."""
    compared = {}
    for count in (2000, 8000):
        hash_N = (np.arange(count) % 5).astype(np.uint64)  # at most three bits apart
        compared[count] = sum(len(left) for left, _ in near_pairs(hash_N))
    assert compared[2000] > 2000 * similar.CROWD // 2
    assert compared[8000] <= 4.5 * compared[2000]


def test_almost_every_plain_picture_that_has_a_twin_is_found_in_a_crowd() -> None:
    """Else the leak of a plain picture from one split into another goes unseen where there are many plain ones."""
    count = 3000
    colours = np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8)
    looks = np.zeros(count, similar.LOOK)
    looks["cells"] = colours[:, :, None, None]
    is_in = np.zeros((count, 2), bool)
    is_in[:, 0], is_in[count - 300 :, 1] = np.arange(count) < count - 300, True
    first = first_similar(looks, is_in)
    every = np.arange(count)
    for split in (0, 1):
        has_twin = []
        for image in range(0, count, 7):
            others = every[is_in[:, split] & (every != image)]
            has_twin.append(similar._same_cells(looks["cells"][[image] * len(others)], looks["cells"][others]).any())
        is_found = first[::7, split] < count
        assert not (is_found & ~np.array(has_twin)).any()
        assert is_found[has_twin].mean() > 0.9
