"""Shards from servers on loopback: fetched once by any number of processes, gone on with, guarded, bounded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from helpers import make_pairs, picture, run, served, start

import data.web.policy
from data.batch import UserError
from data.shards.writer import ShardWriter
from data.sources.source import Download, load_splits, pattern_by_split
from data.web import download, remote_files, remote_tables
from data.web.limits import FetchPolicy
from data.web.remote_files import _Download, fetch_files
from data.web.remote_tables import copy_file

POLICY = FetchPolicy(timeout=5.0, allow_hosts=("127.0.0.1",))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.web.policy, "BACKOFF", 0.01)


class Server:
    """Serves a folder as nginx does (ETag, ranges); `cut(path, n)` says after how many bytes answer n breaks off."""

    def __init__(self, folder: Path, cut: Callable[[str, int], int | None] = lambda path, n: None) -> None:
        self.folder, self.cut, self.asked, self.sent, self.ranges = folder, cut, Counter[str](), 0, list[str]()
        self.validators, self.believes, self.delay = True, True, 0.0
        self.most = sys.maxsize  # bytes that are sent; then answers wait, and break off when that changes

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].lstrip("/")
        self.asked[name] += 1
        file = self.folder / name
        if not file.exists():
            return request.send_error(404)
        data = file.read_bytes()
        tag, begin = f'"{hashlib.sha256(data).hexdigest()}"', 0
        wanted = request.headers.get("Range")
        if wanted and (request.headers.get("If-Range") == tag or not self.believes):
            self.ranges.append(wanted)
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(data):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(data)}")
                request.send_header("Content-Length", "0")
                return request.end_headers()
        request.send_response(206 if begin else 200)
        if begin:
            request.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        if self.validators:
            request.send_header("ETag", tag)
        request.send_header("Content-Length", str(len(data) - begin))
        request.end_headers()
        cut = self.cut(name, self.asked[name])
        body = memoryview(data)[begin:][:cut]
        for at in range(0, len(body), 1 << 16):
            time.sleep(self.delay)
            most = self.most
            while self.sent >= most:
                if self.most != most:
                    raise OSError  # its client is gone
                time.sleep(0.01)
            request.wfile.write(body[at : at + (1 << 16)])
            self.sent += len(body[at : at + (1 << 16)])
        request.close_connection = begin + len(body) < len(data)

    @contextmanager
    def up(self) -> Iterator[str]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(this) -> None:
                try:
                    self.answer(this)
                except OSError:
                    this.close_connection = True

            def log_message(this, *_: object) -> None:
                pass

        with served(Handler) as url:
            yield url


def write_shards(folder: Path, sizes: dict[str, int], size: int = 700, seed: int = 0) -> Path:
    for name, count in sizes.items():
        with ShardWriter(folder, name, max_samples=4) as writer:
            for number in range(count):
                writer.write(f"{number:04}", picture(seed + number, size), f"{name} {number}", f"not {number}")
    return folder


def all_pairs(dataset: str, **more: Any) -> dict[str, list[tuple]]:
    """Every row of every split: the bytes of its image by reference, its texts."""
    from data.shards.index import read_member

    found = {}
    for name, rows in load_splits(dataset, **more).items():
        assert rows.title_neg is not None
        paths = rows.image.to_pylist()
        texts = zip(rows.title.to_pylist(), rows.title_neg.to_pylist(), strict=True)
        found[name] = [(read_member(path), *pair) for path, pair in zip(paths, texts, strict=True)]
    return found


def bring(cache: Path, policy: FetchPolicy = POLICY,
          log: Callable[[str], None] = lambda text: None) -> Callable[[str], list[Path]]:
    return lambda dataset: [file for file in fetch_files(dataset, cache, policy, log) if isinstance(file, Path)]


def bring_by_split(cache: Path, policy: FetchPolicy = POLICY,
                   log: Callable[[str], None] = lambda text: None) -> Download:
    return lambda dataset: pattern_by_split(fetch_files(dataset, cache, policy, log))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_at_an_address_are_the_local_ones_and_fetched_once(tmp_path: Path, with_index: bool) -> None:
    source = write_shards(tmp_path / "shards", {"train": 10, "valid": 3, "test": 7})
    local = all_pairs(str(source))
    if not with_index:
        for index in source.glob("*.index.json"):
            index.unlink()
    server = Server(source)
    with server.up() as url:
        parts = f"{url}/train-{{000000..000002}}.tar {url}/valid-000000.tar {url}/test-{{000000..000001}}.tar".split()
        said: list[str] = []
        for _ in range(2):
            assert all_pairs(f"{url}/{{train-00000{{0,1,2}},valid-000000,test-00000{{0,1}}}}.tar",
                             download=bring_by_split(tmp_path / "cache", log=said.append)) == local
        assert said[-1].startswith("files fetched 6/6  ")  # of six
        assert {name: n for name, n in server.asked.items() if name.endswith(".tar")} == dict.fromkeys(
            (tar.name for tar in source.glob("*.tar")), 1)
        assert sum(server.asked.values()) == 12
        assert sum(map(len, all_pairs(parts[0], download=bring_by_split(tmp_path / "cache")).values())) == 10
        signed = load_splits(f"{url}/test-000000.tar?key=1&x=%2F", download=bring_by_split(tmp_path / "cache"))
        assert list(signed) == ["test"] and server.asked["test-000000.tar"] == 2
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    sidecars = {".index.json"} if with_index else set()
    assert {name.partition(".tar")[2] for name in left} == {"", ".lock", ".seal"} | sidecars


def test_cut_connections_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LEAST_BYTES", 1000)
    source = write_shards(tmp_path / "shards", {"train": 4}, 300_000)
    tar = source / "train-000000.tar"
    rng = random.Random(0)
    server = Server(source, lambda name, n: rng.randrange(100_000) if name == tar.name and n < 30 else None)
    with server.up() as url:
        (got,) = bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        assert got.read_bytes() == tar.read_bytes()
        assert len(server.ranges) > 5 and server.sent < tar.stat().st_size * 1.2 + 100_000
        # Each try of these brings less than LEAST_BYTES, as through a proxy that cuts every 64 kB.
        monkeypatch.setattr(download, "LEAST_BYTES", 1 << 20)
        server.cut = lambda name, n: 1 << 16 if name == tar.name else None
        server.asked.clear()
        (got,) = bring(tmp_path / "small")(f"{url}/train-000000.tar")
        assert got.read_bytes() == tar.read_bytes() and server.asked[tar.name] >= 19
        with pytest.raises(UserError, match="cannot be fetched"):  # unless they are too slow together
            bring(tmp_path / "slow", FetchPolicy(timeout=0.02, retries=1, allow_hosts=("127.0.0.1",)))(
                f"{url}/train-000000.tar")
        monkeypatch.setattr(download, "LEAST_BYTES", 1000)
        # A server that says nothing of versions is asked for the whole; one that is cut every time is given up.
        server.validators, server.cut = False, lambda name, n: 200_000 if n < 33 else None
        server.asked.clear()
        server.cut = lambda name, n: 200_000 if n < 3 else None
        (got,) = bring(tmp_path / "other")(f"{url}/train-000000.tar")
        assert got.read_bytes() == tar.read_bytes() and server.asked[tar.name] == 3
        server.cut = lambda name, n: 900
        with pytest.raises(UserError, match="train-000000.tar cannot be fetched .short-body.*run again to go on"):
            bring(tmp_path / "never")(f"{url}/train-000000.tar")


@pytest.mark.parametrize("believes", [True, False])
def test_a_shard_that_changes_meanwhile_is_not_mixed(tmp_path: Path, believes: bool) -> None:
    source, newer = (write_shards(tmp_path / str(seed), {"train": 4}, 100_000, seed) for seed in (0, 1))
    tar = source / "train-000000.tar"
    old = tar.read_bytes()

    def cut(name: str, n: int) -> int | None:
        if name == tar.name and n == 2:
            raise OSError
        return 150_000 if name == tar.name and n == 1 else None

    server = Server(source, cut)
    server.believes = believes  # one that does not answers with a part of what there is now
    with server.up() as url:
        def change() -> None:
            while server.asked[tar.name] < 2:
                time.sleep(0.001)
            server.folder = newer

        threading.Thread(target=change, daemon=True).start()
        (got,) = bring(tmp_path / "cache")(f"{url}/train-000000.tar")
    assert got.read_bytes() in (old, (newer / tar.name).read_bytes())


class Liar(BaseHTTPRequestHandler):
    """Answers a request for the rest of a shard, which it cut at 150,000 bytes, as `lie` says."""

    protocol_version = "HTTP/1.1"
    data, lie, asked = b"", "", 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked += 1
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        end, total, status = len(self.data), len(self.data), 206 if begin else 200
        tag = {"a version each time": f'"{cls.asked}"', "a tag that is not ASCII": '"\xe9"'}.get(self.lie, '"same"')
        if begin and self.lie == "a signature that has expired" and cls.asked == 2:
            return self.send_error(403)
        if self.path.endswith(".json") or (begin and self.lie.endswith("nothing is left")):
            self.send_response(404 if self.path.endswith(".json") else 416)
            self.send_header("Content-Range", f"bytes */{begin}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if begin and self.lie == "another whole":
            end = total = begin + 1000
        if begin and self.lie == "a rest that is not the rest":
            end = min(begin + 50_000, total)
        if begin and self.lie == "a longer rest":
            end, total = len(self.data) + 100, len(self.data) + 100
        sent = begin - 1000 if begin and self.lie == "the part before" else begin
        end -= begin - sent
        self.send_response(status)
        self.send_header("ETag", tag)
        if begin:
            self.send_header("Content-Range", f"bytes {sent}-{end - 1}/{total}")
        if self.lie != "a size unknown, nothing is left":
            self.send_header("Content-Length", str(end - sent))
        self.end_headers()
        is_whole = begin or (self.lie == "a tag that is not ASCII" and cls.asked > 1)
        self.wfile.write((self.data + bytes(100))[sent:end][: None if is_whole else 150_000])
        self.close_connection = not begin

    def log_message(self, *_: object) -> None:
        pass


def test_a_fetched_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not leave a shard, or the copy of a table, that is named and empty."""
    synced: set[str] = set()
    replace = os.replace

    def sync(path: Path) -> Path:
        synced.add(str(path))
        return path

    def rename(old: Path, new: Path) -> None:
        assert str(old) in synced, old
        replace(old, new)

    for module in (remote_files, remote_tables):
        monkeypatch.setattr(module, "fsync", sync)
        monkeypatch.setattr(module.os, "replace", rename)
    file: Any = _Download("https://host/a.tar", tmp_path / "a.tar", None)  # type: ignore[arg-type]
    file.part.write_bytes(b"a shard")
    file.keep()
    assert file.path.read_bytes() == b"a shard" and str(tmp_path) in synced
    fsspec.filesystem("memory").pipe_file("/fsync/pairs.csv", b"image,title\n")
    synced |= {str(path) for path in tmp_path.rglob("version.json")}
    monkeypatch.setattr(remote_tables, "replace_text", lambda path, text: path.write_text(text))
    assert copy_file("memory://fsync/pairs.csv", tmp_path, print).path.read_bytes() == b"image,title\n"


OUTLASTED = ["a rest that is not the rest",  # a part of it, as it says: the download goes on behind it
             "a signature that has expired", "a tag that is not ASCII"]


@pytest.mark.parametrize("lie", ["a version each time", "nothing is left", "a size unknown, nothing is left",
                                 "another whole", "a longer rest",
                                 "the part before", *OUTLASTED])
def test_a_server_that_says_untrue_things_of_a_shard_is_left_or_outlasted(
        lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download must neither go on for ever nor keep a shard that is shorter, longer or mixed."""
    monkeypatch.setattr(download, "LEAST_BYTES", 1000)
    tar = write_shards(tmp_path / "shards", {"train": 4}, 100_000) / "train-000000.tar"

    class ThisLiar(Liar):
        pass

    ThisLiar.data, ThisLiar.lie = tar.read_bytes(), lie
    with served(ThisLiar) as url:
        if lie in OUTLASTED:
            (got,) = bring(tmp_path / "cache")(f"{url}/train-000000.tar")
            assert got.read_bytes() == tar.read_bytes()
            return
        with pytest.raises(UserError, match="cannot be fetched"):
            bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        assert ThisLiar.asked < 20
    assert not list((tmp_path / "cache").rglob("train-000000.tar"))


def test_a_shard_that_was_cut_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    """A disk that lost the end of a file must not take samples from every later run."""
    tar = write_shards(tmp_path / "shards", {"train": 4}, 10_000) / "train-000000.tar"
    server = Server(tar.parent)
    with server.up() as url:
        (got,) = bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        with open(got, "r+b") as file:
            file.truncate(5_000)
        (again,) = bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        assert again.read_bytes() == tar.read_bytes() and server.asked[tar.name] == 2
        bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        assert server.asked[tar.name] == 2


def test_what_lies_in_the_place_of_a_download_is_replaced_or_named(tmp_path: Path) -> None:
    """A pipe there would be waited for without end, and a link would have another file overwritten."""
    tar = write_shards(tmp_path / "shards", {"train": 4}, 10_000) / "train-000000.tar"
    victim = tmp_path / "victim"
    victim.write_text("keep")
    with Server(tar.parent).up() as url:
        place = tmp_path / "cache" / hashlib.sha256(f"{url}/{tar.name}".encode()).hexdigest()[:32]
        place.mkdir(parents=True)
        os.mkfifo(place / f"{tar.name}.part.seal")
        for put in (os.mkfifo, lambda part: part.symlink_to(victim)):
            put(place / f"{tar.name}.part")
            (got,) = bring(tmp_path / "cache")(f"{url}/{tar.name}")
            assert got.read_bytes() == tar.read_bytes()
            got.unlink()
        (place / f"{tar.name}.part").mkdir()
        with pytest.raises(UserError, match=r"remove .*\.tar\.part or"):
            bring(tmp_path / "cache")(f"{url}/{tar.name}")
    assert victim.read_text() == "keep"


def test_a_killed_process_is_gone_on_with_and_two_at_once_share(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", {"train": 16}, 400_000)
    server, fork = Server(source), multiprocessing.get_context("fork")
    server.most = 1_500_000  # less than one shard has
    with server.up() as url:
        fetching = partial(fork.Process, target=bring(tmp_path / "cache"),
                           args=(f"{url}/train-{{000000..000003}}.tar",), daemon=True)
        child = fetching()
        child.start()
        while (before := sum(part.stat().st_size for part in (tmp_path / "cache").rglob("*.part"))) <= 500_000:
            assert child.is_alive()
            time.sleep(0.005)
        child.kill()
        child.join()
        before = sum(part.stat().st_size for part in (tmp_path / "cache").rglob("*.part"))
        server.sent, server.most, server.delay = 0, sys.maxsize, 0.02
        server.asked.clear()
        children = [fetching(), fetching()]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0]
    assert before > 500_000 and server.ranges
    assert {n for name, n in server.asked.items() if name.endswith(".tar")} == {1}
    assert server.sent < sum(path.stat().st_size for path in source.iterdir()) - before / 2
    for tar in source.glob("*.tar"):
        assert next((tmp_path / "cache").rglob(tar.name)).read_bytes() == tar.read_bytes()


def test_what_is_no_shard_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "shards", {"train": 4})
    for name, content in {"page.tar": b"<html>" * 999, "none.tar": b"", "tiny.tar": b"x"}.items():
        (source / name).write_bytes(content)
    with Server(source).up() as url:
        def refusal(dataset: str, policy: FetchPolicy = POLICY) -> str:
            with pytest.raises(UserError) as caught:
                load_splits(dataset, download=bring_by_split(tmp_path / "cache", policy))
            assert not list((tmp_path / "cache").rglob("*.tar"))
            return str(caught.value)

        assert "http-404" in refusal(f"{url}/gone-000000.tar")
        (source / "zeros.tar").write_bytes(bytes(1024))  # as tarfile closes one without files: some pipelines end so
        assert bring(tmp_path / "empty")(f"{url}/zeros.tar")[0].read_bytes() == bytes(1024)
        assert all("not-tar" in refusal(f"{url}/{name}.tar") for name in ("page", "none", "tiny"))
        with monkeypatch.context() as patch:
            patch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5000))
            assert "more than the disk has free" in refusal(f"{url}/train-000000.tar")
        assert "forbidden-address" in refusal(f"{url}/train-000000.tar", FetchPolicy())
        assert "only shards (.tar) and tables" in refusal(f"{url}/train.zip")
        assert "only shards (.tar)" in refusal(f"{url}/..%2f..%2fx.tar")
        assert "range such as" in refusal(f"{url}/train-*.tar")
        assert "braces are" in refusal(f"{url}/train-{{a..c}}.tar")
        assert "written as {a,b}" in refusal(f"{url}/a.tar::{url}/b.tar")
        for odd in ("ftp://h/x.tar", "http://me:pw@127.0.0.1/x.tar", "s3://b/x.tar", "pipe:touch ://x.tar"):
            assert "http" in refusal(odd) or "user name" in refusal(odd)
        monkeypatch.setattr("data.web.remote_files.MAX_SHARD", 2000)
        assert "too-large" in refusal(f"{url}/train-000000.tar")
        monkeypatch.undo()
        (tar,) = write_shards(tmp_path / "shards", {"large": 4}, 100_000).glob("large*.tar")
        damaged = bytearray(tar.read_bytes())
        damaged[100_300] ^= 1  # of a picture, and of none of the blocks by which an index knows its tar
        tar.write_bytes(damaged)
        assert "bad-digest" in refusal(f"{url}/{tar.name}")
    assert not list(tmp_path.rglob("x.tar*"))


def test_a_table_at_an_address_is_fetched_again_when_it_has_changed(tmp_path: Path) -> None:
    """A run would otherwise train on the rows of last week; or a table from the network name local files."""
    source = tmp_path / "source"
    source.mkdir()
    said: list[str] = []
    server = Server(source)
    with server.up() as url:
        for title in ("one", "one", "two"):
            (source / "train.csv").write_text(f"image,title\nimages/a.jpg,{title}\n/etc/passwd,x\n")
            rows = load_splits(f"{url}/train.csv?key=1", download=bring_by_split(tmp_path / "cache", log=said.append))
            assert rows["train"].title.to_pylist() == [title]
            assert rows["train"].image.to_pylist() == [f"{url}/images/a.jpg"]
    assert [line for line in said if "changed" in line] == [
        f"{url}/train.csv has changed since it was fetched: it is fetched again"]


def test_a_dripping_server_is_given_up_in_time_and_an_endless_one_costs_no_memory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_shards(tmp_path / "shards", {"train": 1}, 60_000_000)
    server = Server(source)
    server.delay = 0.05
    monkeypatch.setattr(download, "LEAST_BYTES", 1 << 30)
    with server.up() as url:
        began = time.monotonic()
        with pytest.raises(UserError, match="timeout"):
            bring(tmp_path / "cache", FetchPolicy(timeout=0.5, retries=1, allow_hosts=("127.0.0.1",)))(
                f"{url}/train-000000.tar")
        assert time.monotonic() - began < 20  # the whole would take 46
        server.delay = 0
        monkeypatch.undo()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bring(tmp_path / "cache")(f"{url}/train-000000.tar")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; the server's copy


def test_two_ranks_train_from_shards_at_an_address(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 40, 12, 8)
    packed = run(["shards", "--dataset", pairs, "--out", tmp_path / "shards", "--cache-dir", tmp_path / "cache"])
    assert packed.returncode == 0, packed.stderr
    server = Server(tmp_path / "shards")
    with server.up() as url:
        process = start(["--dataset", url + "/{train,valid,test}-000000.tar", "--model", tiny_model, "--out",
                         tmp_path / "run", "--cache-dir", tmp_path / "cache", "--allow-host", "127.0.0.1"], 2)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "train 40, valid 12, test 8; 0 rows dropped" in err
    assert set(server.asked.values()) == {1} and len(server.asked) == 6
