"""Signed addresses: what they are signed with is in no file and no line, and is new every day for the same files."""

import csv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers import inside, make_pairs, served

QUERY = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=SECRETkey%2Fs3&X-Amz-Date={day}&X-Amz-Signature=SECRET{day}"


@contextmanager
def bucket(folder: Path, asked: Counter[str]) -> Iterator[str]:
    """Serves `folder` to whoever has a signature; refuses the others, as S3 does, with the address in its answer."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place, query = urlsplit(self.path).path, urlsplit(self.path).query
            asked[place] += 1
            file = folder / place.lstrip("/")
            body = file.read_bytes() if file.is_file() and "SECRET" in query else self.path.encode()
            status = 403 if "SECRET" not in query else 200 if file.is_file() else 404
            self.send_response(status, f"for {self.path}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with served(Handler) as url:
        yield url


def sign(pairs: Path, folder: Path, url: str, day: int) -> None:
    """Write the tables of `pairs` with signed addresses of this day, and of a picture that is gone."""
    for table in pairs.glob("*.csv"):
        with table.open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file)]
        rows.append({"image": "images/gone.jpg", "title": "a picture that is gone", "title_neg": "another"})
        with (folder / table.name).open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["thumbnail_url", "title", "title_neg"])
            for row in rows:
                writer.writerow([f"{url}/{row['image']}?{QUERY.format(day=day)}", row["title"], row["title_neg"]])


def test_no_file_and_no_line_holds_what_an_address_is_signed_with(tiny_model: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is pushed, the report is mailed, the log is pasted into an issue: each would open the bucket."""
    pairs = make_pairs(tmp_path / "bucket", 8, 4, 4)
    tables, asked = tmp_path / "bucket" / "tables", Counter[str]()
    tables.mkdir()
    with bucket(pairs, asked) as url:
        sign(pairs, tables, url, day=1)
        run = tmp_path / "run"
        machine = ["--cache-dir", tmp_path / "cache", "--allow-host", "127.0.0.1"]
        address = f"{url}/tables/{{train,valid,test}}.csv"
        plain = ["--dataset", f"{address}?{QUERY.format(day=1)}", *machine]
        monkeypatch.setattr("sys.argv", ["run.py", *map(str, plain), "--proxy", "me:SECRET@host"])
        train = ["--model", tiny_model, "--max-bad", "0.5", "--batch-size", 4]
        said = [inside([*plain, *train, "--out", run])]
        said.append(inside(["search", "a title", "--top", 9, *plain, "--model", tiny_model,
                            "--html", tmp_path / "search.html"]))
        said.append(inside(["check", *plain, "--json"]))
        said.append(inside(["embed", *plain, "--model", tiny_model, "--max-bad", "0.5",
                            "--out", tmp_path / "embeddings"]))
        assert [each.returncode for each in said] == [0, 0, 0, 0], [each.stderr for each in said]

        # The next day's list is of the same files: none is asked for again, the run goes on, and it can be verified.
        sign(pairs, tables, url, day=2)
        fresh, before = ["--dataset", f"{address}?{QUERY.format(day=2)}", *machine], asked.copy()
        said.append(inside([*fresh, *train, "--out", run, "--resume", "on"]))
        said.append(inside(["verify", "--run", run, *fresh]))
        assert [each.returncode for each in said[-2:]] == [0, 0], said[-2:]
        pictures = {place for place in before if place.startswith("/images/") and "gone" not in place}
        assert len(pictures) == 16 and all(asked[place] == before[place] for place in pictures)
        said.append(inside([*machine, *train, "--out", run, "--resume", "on"]))  # config.json has no signature
        assert said[-1].returncode == 2 and "--dataset" in said[-1].stderr
    for each in said:
        assert "SECRET" not in each.stdout + each.stderr
    written = [path for folder in (run, tmp_path / "cache", tmp_path / "embeddings") for path in folder.rglob("*")]
    for path in [*written, tmp_path / "search.html"]:
        is_copy = path.is_relative_to(tmp_path / "cache" / "shards")  # of the dataset itself
        assert not path.is_file() or is_copy or b"SECRET" not in path.read_bytes(), path
