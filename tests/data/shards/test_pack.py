"""`run.py shards`: fetching, decoding and writing overlap, and the order is that of the rows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from helpers import noting
from PIL import Image, ImageOps
from site_server import PICTURE, Site, reply
from test_shards import contents, scan

from data import progress
from data.cold import Reader
from data.images.decode import ImageSpec, decode_image
from data.shards.pack import links_out, pack
from data.shards.writer import ShardWriter
from data.sources.source import load_splits
from data.web.limits import FetchPolicy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter for Pillow's


def test_rows_are_written_in_order_while_others_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, n: int):
        number = int(path[1:])
        late = [0.3] if number == 5 else [0.01]
        return reply(404) if number % 50 == 7 else [*late, reply(body=PICTURE + path.encode())]

    site, said, hits = Site(answer), list[str](), list[int]()
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "here.jpg").write_bytes(PICTURE)
    with (folder / "test.csv").open("w", newline="") as file:
        rows = [("here.jpg" if n % 100 == 3 else site.url(f"/{n - n % 3 if n % 5 == 0 else n}"), f"title {n}")
                for n in range(700)]  # some URLs come twice, at once or much later
        csv.writer(file).writerows([("image", "title"), *rows, (rows[0][0], "again"), (rows[8][0], " ")])
    monkeypatch.setattr(progress, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(ShardWriter, "write", noting(ShardWriter.write, lambda *_: hits.append(site.hits.total())))
    reader = Reader(tmp_path / "cache", ImageSpec.clip(), FetchPolicy(allow_hosts=("127.0.0.1",)), 25_000_000, 2)
    ledger = pack(load_splits(str(folder)), reader, tmp_path / "out", 0, said.append)
    assert hits[0] < 400 < site.hits.total()  # of those that fit into the fetcher's window
    held, losses = scan(tmp_path / "out" / "test-000000.tar")
    dropped = {entry["row"]: entry["reason"] for entry in ledger}
    assert not losses and [int(key) for key, *_ in held] == [n for n in range(702) if n not in dropped]
    assert [title for _, _, title, _ in held] == [t for n, (_, t) in enumerate([*rows, ("", "again")])
                                                  if n not in dropped]
    for key, image, *_ in held[:-1]:
        url = rows[int(key)][0]
        assert image == PICTURE + (b"/" + url.rpartition("/")[2].encode() if "http" in url else b"")
    gone = [n for n, (url, _) in enumerate(rows) if "http" in url and int(url.rpartition("/")[2]) % 50 == 7]
    assert [n for n, reason in dropped.items() if reason == "http-404"] == gone and len(gone) >= 14
    assert dropped[701] == "no-title" and set(dropped.values()) == {"http-404", "no-title"}
    assert said[-1] == f"test: 702 rows, {len(ledger)} left out"
    (line,) = [text for text in said if text.startswith("test rows 702/702  ")]
    assert f"/s  eta 0 s  http-404 {len(gone)}" in line
    assert (ledger[0]["split"], ledger[0]["row"], ledger[0]["image"]) == ("test", 7, site.url("/7"))
    before, asked = contents(tmp_path / "out"), site.hits.copy()
    assert pack(load_splits(str(folder)), reader, tmp_path / "out", 0, said.append) == ledger
    assert contents(tmp_path / "out") == before and site.hits == asked


@pytest.mark.parametrize("side", [0, 64])
def test_shards_hold_pictures_that_are_upright(tmp_path: Path, side: int) -> None:
    """With `--resize` the orientation would be lost, and the shards would train on pictures that lie on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 120, 0).repeat(3, 2))
    stored.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    (tmp_path / "test.csv").write_text("image,title\nphone.jpg,a phone\n")
    reader = Reader(tmp_path / "cache", ImageSpec.clip(64), FetchPolicy(), 25_000_000, 1)
    assert pack(load_splits(str(tmp_path)), reader, tmp_path / "out", side, lambda text: None) == []
    ((_, image, *_),), _ = scan(tmp_path / "out" / "test-000000.tar")
    seen = decode_image(image, reader.spec).astype(int)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "phone.jpg")).resize((64, 64))).astype(int)
    assert np.abs(seen.transpose(1, 2, 0) - upright).max() < 16 < np.abs(seen.transpose(2, 1, 0) - upright).max()


def test_pictures_behind_links_out_of_the_folder_are_counted_before_they_are_packed(tmp_path: Path) -> None:
    """A dataset from elsewhere may hold links to private pictures, which shards would publish."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (tmp_path / "private.jpg").write_bytes(PICTURE)
    (folder / "own.jpg").write_bytes(PICTURE)
    (folder / "inside.jpg").symlink_to("own.jpg")
    (folder / "out.jpg").symlink_to("../private.jpg")
    (folder / "train.csv").write_text("image,title\nown.jpg,a\ninside.jpg,b\nout.jpg,c\nout.jpg,d\n")
    (tmp_path / "private.txt").write_text("a password")
    (folder / "own.txt").symlink_to("../private.txt")
    assert links_out(load_splits(str(folder)), folder) == [
        f"{name} -> {(tmp_path / target).resolve()}" for name, target in (("own.txt", "private.txt"),
                                                                          ("out.jpg", "private.jpg"))]
