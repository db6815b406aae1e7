"""A dataset behind a server that fails: every row is kept or in the ledger, no URL is asked for without need."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import inside, make_pairs, run, served

SHARED = Path(__file__).resolve().parents[4] / "shared"


@contextmanager
def faulty_server(folder: Path, asked: Counter[str]) -> Iterator[str]:
    """Serves `folder`; by the hash of the path 10 % are gone for good and 20 % fail once (503, reset, half a body)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fate = int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:2], "big") % 100
            asked[self.path] += 1
            data = (folder / unquote(self.path).lstrip("/")).read_bytes()
            first = asked[self.path] == 1
            if fate < 10 or (fate < 20 and first):
                self.send_error(404 if fate < 10 else 503)
            elif fate < 25 and first:
                self.connection.close()
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fate < 30 and first else data)

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        yield url


def write_urls(source: Path, folder: Path, url: str) -> int:
    """The tables of `source` with URLs in place of paths; how many rows there are."""
    folder.mkdir()
    count = 0
    for table in source.glob("*.csv"):
        with table.open(newline="", encoding="utf-8") as file, \
                (folder / table.name).open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["thumbnail_url", "title", "title_neg"])
            for row in csv.DictReader(file):
                writer.writerow([f"{url}/{row['image']}", row["title"], row["title_neg"]])
                count += 1
    return count


def check_run(source: Path, model: Path, tmp_path: Path, ranks: int) -> None:
    asked: Counter[str] = Counter()
    with faulty_server(source, asked) as url:
        rows = write_urls(source, tmp_path / "urls", url)
        flags = ["--model", model, "--dataset", tmp_path / "urls", "--cache-dir", tmp_path / "cache",
                 "--max-bad", "0.2", "--allow-host", "127.0.0.1", "--epochs", "1", "--batch-size", "64"]
        first = [*flags, "--out", tmp_path / "one"]
        done = inside(first) if ranks == 1 else run(first, ranks)
        assert done.returncode == 0, done.stderr
        ledger = [json.loads(line) for line in (tmp_path / "one" / "ledger.jsonl").read_text().splitlines()]
        steps = [json.loads(line) for line in (tmp_path / "one" / "steps.jsonl").read_text().splitlines()]
        lost = Counter(entry["split"] for entry in ledger)
        trained = sum(step["rows"] for step in steps)
        with (tmp_path / "urls" / "train.csv").open(newline="", encoding="utf-8") as file:
            assert trained + lost["train"] == sum(1 for _ in csv.DictReader(file))
        assert {entry["reason"] for entry in ledger} == {"http-404"}
        assert 0.05 < len(ledger) / rows < 0.15
        assert sum(asked.values()) < 1.4 * len(asked)
        before = asked.copy()
        again = inside([*flags, "--out", tmp_path / "two"])  # nothing is asked for a second time, the gone ones neither
        assert again.returncode == 0 and asked == before
        assert (tmp_path / "two" / "ledger.jsonl").read_text() == (tmp_path / "one" / "ledger.jsonl").read_text()


@pytest.mark.parametrize("ranks", [2])
def test_every_row_is_accounted_for(ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    check_run(make_pairs(tmp_path / "pairs", 200, 40, 40), tiny_model, tmp_path, ranks)


@pytest.mark.skipif(not SHARED.exists(), reason="the real data is not here")
def test_every_real_row_is_accounted_for(tmp_path: Path) -> None:
    check_run(SHARED / "data/openstax-titles", SHARED / "models/clip-small", tmp_path, 1)
