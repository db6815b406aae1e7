"""Shards (tar, samples, shards, shard_writer) beside tarfile and the webdataset package; hostile and damaged tars;
a writer killed at every step.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import signal
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
import pytest
import webdataset
from helpers import full, picture

import data.shards.index as module
import data.shards.writer as writing
from data.batch import BadSample, UserError
from data.reading import open_regular
from data.shards.index import (
    COLUMNS,
    expand_braces,
    indexed,
    read_index,
    read_member,
    scanned,
    tar_digest,
)
from data.shards.samples import IMAGES, MAX_IMAGE
from data.shards.tar import open_tar, read_at
from data.shards.writer import ShardWriter

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Files = Iterable[tuple[str, bytes]]


def pack(path: Path, files: Files, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, encoding="utf-8") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def check_shard(path: Path) -> list[str]:
    """The defects of a shard that `ShardWriter` wrote: any changed byte of it or of its index."""
    problems: list[str] = []

    def note(loss: dict[str, Any]) -> None:
        problems.append(f"{loss['key'] or 'the tar'}: {loss['reason']}: {loss['detail']}")

    try:
        with open_tar(path) as file:
            found, index = scanned(path, file, note), indexed(path, file)
            if index is None:
                return [*problems, "there is no index that fits this tar"]
            if not index.select(COLUMNS).equals(found):
                problems.append("its index lists other samples than it holds")
            for at in range(len(index)):
                key, offset, size, digest = (index[name][at].as_py() for name in (*COLUMNS[:3], "sha256"))
                if hashlib.sha256(read_at(file, offset, size)).hexdigest() != digest:
                    problems.append(f"{key}: its image is not the one that was written")
        with open_regular(path) as whole:
            if not problems and hashlib.file_digest(whole, "sha256").hexdigest() != tar_digest(index):
                problems.append("it has been changed, though neither in an image nor in a title")
    except (OSError, UserError) as error:
        return [str(error)]
    return problems


def one_or_all(texts: list[str]) -> str | list[str] | None:
    return texts[0] if len(texts) == 1 else texts or None


def scan(path: Path) -> tuple[list[tuple[str, bytes, Any, Any]], list[tuple[str, str]]]:
    """What a shard holds (key, image, title, negative; lists of several), what its ledger is told (key, reason)."""
    losses: list[dict] = []
    rows = read_index(path, losses.append).to_pylist()
    held = [(row["key"], read_member(f"{path}#{row['image_offset']}+{row['image_size']}"),
             one_or_all(row["title"]), one_or_all(row["title_neg"])) for row in rows]
    assert all(set(loss) == {"shard", "key", "reason", "detail"} and loss["shard"] == str(path) for loss in losses)
    return held, [(loss["key"], loss["reason"]) for loss in losses]


def peer(path: Path) -> list[dict]:
    """The samples of a shard as the webdataset package reads them, whose names are in the locale's encoding there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(webdataset.WebDataset([str(path)], shardshuffle=False, nodesplitter=None))
    return [{**sample, "__key__": sample["__key__"].encode("utf-8", "surrogateescape").decode()} for sample in samples]


SAMPLES = [("0001", picture(1), "plain", None),
           ("a.b/c d/0002", b"\x89PNG\r\n\x1a\n" + picture(2), "émoji 🎬 עברית", "other"),
           ("x" * 150, b"GIF89a" + picture(3), "007", "1984"),
           ("ключ/" * 30 + "日本", b"RIFF1234WEBP" + picture(4, 5000), "NA", None),
           ("5", b"II*\0" + picture(5), "line\none", "None"), ("6", b"BM" + picture(6), "ends\n", ""),
           ("7", b"\0\0\0\x20ftypmif1\0\0\0\0mif1avif" + picture(7), "t" * 5000, "n")]


def write(folder: Path, samples: Iterable[tuple], name: str = "train", max_bytes: int = 1 << 28,
          max_samples: int = 10_000) -> ShardWriter:
    with ShardWriter(folder, name, max_bytes, max_samples) as writer:
        done = writer.done()
        for key, image, title, negative in samples:
            if key not in done:
                writer.write(key, image, title, negative, {"url": "http://127.0.0.1/x.jpg"})
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_by_us_by_webdataset_and_by_tarfile(tmp_path: Path) -> None:
    write(tmp_path / "one", SAMPLES)
    write(tmp_path / "two", SAMPLES)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tar = tmp_path / "one" / "train-000000.tar"
    as_read = [(key, image, title.rstrip("\n"), negative or None) for key, image, title, negative in SAMPLES]
    assert check_shard(tar) == [] and scan(tar) == (as_read, [])
    indexed = read_index(tar)
    (tmp_path / "one" / "train-000000.tar.index.json").unlink()
    assert read_index(tar).equals(indexed) and check_shard(tar) == ["there is no index that fits this tar"]
    endings = "jpg", "png", "gif", "webp", "tif", "bmp", "avif"
    for mine, theirs, ending in zip(SAMPLES, peer(tar), endings, strict=True):
        assert (theirs["__key__"], theirs[ending], theirs["txt"].decode()) == mine[:3]
        assert json.loads(theirs["json"]) == {"title_neg": mine[3], "url": "http://127.0.0.1/x.jpg"}
    with tarfile.open(tar) as members:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize("format", FORMATS)
def test_tars_of_others_hold_what_webdataset_finds_in_them(tmp_path: Path, format: str) -> None:
    """Random names (long, dotted, upper case, non-ASCII), endings and orders: the same samples; the rest is told."""
    rng = random.Random(format)
    words = ["a", "b.c", "Ünï", "d" * 60, "日本", "e f", "g" * (40 if format == "ustar" else 130)]
    for trial in range(30):
        files: dict[str, bytes] = {}
        for number in range(20):
            folder = rng.choice(["", *(word + "/" for word in words)])
            key = f"{folder}{number}{rng.choice(words).replace('.', '')}"
            for ending in rng.sample(["jpg", "PNG", "txt", "json", "cls", "thumb.webp", "Jpeg"], rng.randrange(1, 6)):
                about = {"caption": f"c{number}", "negative": rng.choice([None, "n"]), "sha256": "0", "width": 3}
                texts = {"txt": f"t{number}".encode(), "json": json.dumps(about).encode()}
                files[f"{key}.{ending}"] = texts.get(ending, picture(number + ord(ending[0]), rng.randrange(2000)))
        tar = pack(tmp_path / f"{trial}.tar", files.items(), FORMATS[format])
        expected, lost = [], []
        for sample in peer(tar):
            image = next((sample[e] for e in (*IMAGES, "thumb.webp") if e in sample), None)
            fields = json.loads(sample.get("json", "{}"))
            title = sample["txt"].decode() if "txt" in sample else fields.get("caption")
            if image is None or title is None:
                lost.append((sample["__key__"], "no-image" if image is None else "no-title"))
            else:
                expected.append((sample["__key__"], image, title, fields.get("negative")))
        assert scan(tar) == (expected, lost) and len(expected) + len(lost) == 20


def test_webdatasets_writer_and_img2datasets_layout(tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for number in range(5):
            about = {"caption": f"caption {number}", "url": "http://127.0.0.1/", "key": f"{number:09d}",
                     "status": "success", "error_message": None, "width": 256, "exif": "{}", "title": None}
            text = {"txt": f"text {number}".encode()} if number % 2 else {}
            files = {"jpg": picture(number), "json": json.dumps(about).encode(), **text}
            writer.write({"__key__": f"{number:09d}", **files})
        failed = {"caption": "c", "status": "failed_to_download", "error_message": "HTTP Error 404"}
        writer.write({"__key__": "000000005", "json": json.dumps(failed).encode()})
    titles = ["caption 0", "text 1", "caption 2", "text 3", "caption 4"]
    assert scan(tar) == ([(f"{n:09d}", picture(n), title, None) for n, title in enumerate(titles)],
                         [("000000005", "no-image")])


def raw(name: bytes, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None, prefix: bytes = b"",
        more: bool = False) -> bytes:
    """A member with any fields, its checksum right."""
    block = bytearray(512)
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = b"%011o\0" % len(content) if size is None else size
    block[156:157], block[257:263], block[345 : 345 + len(prefix)] = kind, b"ustar\0", prefix
    if kind == b"S":
        block[257:265], block[482] = b"ustar  \0", more
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % 512)


def pax(**records: bytes) -> bytes:
    out = b""
    for key, value in records.items():
        body = b" " + key.replace("_", ".").encode() + b"=" + value + b"\n"
        length = next(n for n in range(len(body), len(body) + 12) if len(str(n)) + len(body) == n)
        out += str(length).encode() + body
    return raw(b"./PaxHeaders/x", out, b"x")


PICTURE = picture(0)
GOOD = raw(b"good.jpg", PICTURE) + raw(b"good.txt", b"good")
END = bytes(1024)
DEEP = b'{"title":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
IMAGE, TITLE = raw(b"a.jpg", PICTURE), raw(b"a.txt", b"a")
HOSTILE: dict[str, tuple[bytes, list[str], list[tuple[str, str]]]] = {  # tar, keys kept beside `good`, what is told
    "parent": (raw(b"../../x.jpg", PICTURE) + raw(b"../../x.txt", b"t") + END, ["../../x"], []),
    "absolute": (raw(b"/tmp/x.jpg", PICTURE) + raw(b"/tmp/x.txt", b"t") + END, ["/tmp/x"], []),
    "symbolic link": (raw(b"a.jpg", kind=b"2") + TITLE + END, [], [("a", "not-a-file")]),
    "hard link": (raw(b"a.jpg", kind=b"1", size=b"%011o\0" % 512) + TITLE + END, [], [("a", "not-a-file")]),
    "linked title": (IMAGE + raw(b"a.txt", kind=b"2") + END, [], [("a", "not-a-file")]),
    "device": (raw(b"a.jpg", kind=b"3") + TITLE + END, [], [("a", "not-a-file")]),
    "pipe": (raw(b"a.jpg", kind=b"6") + TITLE + END, [], [("a", "not-a-file")]),
    "folder": (raw(b"a.jpg/", kind=b"5", size=b"77777777777\0") + END, [], []),
    "sparse": (raw(b"a.jpg", PICTURE, b"S") + TITLE + END, [], [("a", "not-a-file")]),
    "long sparse": (raw(b"a.jpg", kind=b"S", size=b"%011o\0" % 512, more=True) + bytes(504) + b"\1" + bytes(7 + 2 * 512)
                    + TITLE + END, [], [("a", "not-a-file")]),
    "pax sparse": (pax(GNU_sparse_major=b"1", GNU_sparse_name=b"a.jpg") + raw(b"GNUSparse.0/a.jpg", PICTURE)
                   + TITLE + END, [], [("a", "not-a-file")]),
    "unknown kind": (raw(b"a.jpg", PICTURE, b"V") + TITLE + END, [], [("a", "not-a-file")]),
    "negative size": (raw(b"a.jpg", size=b"\xff" * 12) + TITLE + END, [], [("", "damaged-shard"), ("a", "no-image")]),
    "minus sign": (raw(b"a.jpg", size=b"-0000000010\0") + TITLE + END, [], [("", "damaged-shard"), ("a", "no-image")]),
    "size in base 256": (raw(b"a.jpg", PICTURE, size=b"\x80" + len(PICTURE).to_bytes(11)) + TITLE + END, ["a"], []),
    "absurd size": (raw(b"a.jpg", PICTURE, size=b"\x80" + b"\xff" * 11) + TITLE + END, [],
                    [("", "damaged-shard"), ("a", "truncated")]),
    "absurd octal size": (raw(b"a.jpg", PICTURE, size=b"777777777777") + TITLE + END, [],
                          [("", "damaged-shard"), ("a", "truncated")]),
    "absurd pax size": (pax(size=b"9" * 4000) + IMAGE + TITLE + END, [],
                        [("", "damaged-shard"), ("a", "truncated")]),
    "pax size": (pax(size=b"%d" % len(PICTURE)) + raw(b"a.jpg", PICTURE, size=b"%011o\0" % 5) + TITLE + END, ["a"], []),
    "negative pax size": (pax(size=b"-512") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "pax length zero": (raw(b"x", b"0 path=b.jpg\n", b"x") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "pax length beyond": (raw(b"x", b"99 path=b.jpg\n", b"x") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "pax no record": (raw(b"x", b"\0" * 400, b"x") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "giant pax": (raw(b"x", b"9" * (1 << 21), b"x") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "pax of many records": (raw(b"x", b"5 a=\n" * 200_000, b"x") + IMAGE + TITLE + END, ["a"], []),
    "pax beyond the end": (raw(b"x", b"", b"x", size=b"77777777777\0") + IMAGE + TITLE + END, [],
                           [("a", "bad-header")]),
    "global pax path": (raw(b"g", b"14 path=z.jpg\n", b"g") + IMAGE + TITLE + END, ["a"], []),
    "giant GNU name": (raw(b"L", b"n" * (1 << 21), b"L") + IMAGE + TITLE + END, [], [("a", "bad-header")]),
    "not UTF-8": (raw(b"\xff\xfe.jpg", PICTURE) + raw(b"\xff\xfe.txt", b"t") + END, [r"\xff\xfe"], []),
    "prefix": (raw(b"a.jpg", PICTURE, prefix=b"p/q") + raw(b"a.txt", b"t", prefix=b"p/q") + END, ["p/q/a"], []),
    "not samples": (raw(b"README", b"r") + raw(b"._a.jpg", PICTURE) + raw(b"dir/.b.jpg", PICTURE) + END, [], []),
    "no image bytes": (raw(b"a.jpg") + TITLE + END, [], [("a", "empty")]),
    "no title bytes": (IMAGE + raw(b"a.txt") + END, [], [("a", "no-title")]),
    "blank title": (IMAGE + raw(b"a.txt", b" \t\n") + END, [], [("a", "no-title")]),
    "giant title": (IMAGE + raw(b"a.txt", b"t" * 100_000_000) + END, [], [("a", "too-large")]),
    "title not UTF-8": (IMAGE + raw(b"a.txt", b"\xff") + END, [], [("a", "bad-title")]),
    "JSON list": (IMAGE + raw(b"a.json", b'["title"]') + END, ["a"], []),
    "blanks in a JSON list": (IMAGE + raw(b"a.json", b'{"caption": ["", "one", null, " ", "two"]}') + END, ["a"],
                              [("a", "no-title")] * 2),  # as in a table: each title is a row
    "a blank text of several": (IMAGE + raw(b"a.0.txt", b"one") + raw(b"a.1.txt", b" \n") + END, ["a"],
                                [("a", "no-title")]),
    "JSON deep": (IMAGE + raw(b"a.json", DEEP) + END, [], [("a", "bad-json")]),
    "JSON broken": (IMAGE + raw(b"a.json", b'{"title": "x') + TITLE + END, [], [("a", "bad-json")]),
    "JSON huge": (IMAGE + raw(b"a.json", b'{"title": "' + b"x" * (1 << 21) + b'"}') + END, [],
                  [("a", "too-large")]),
    "JSON huge number": (IMAGE + raw(b"a.json", b'{"title": ' + b"7" * 1_000_000 + b"}") + END, ["a"], []),
    "JSON half a letter": (IMAGE + raw(b"a.json", rb'{"title": "\ud800"}') + END, [], [("a", "bad-json")]),
    "JSON title an object": (IMAGE + raw(b"a.json", b'{"title": {}}') + END, [], [("a", "bad-json")]),
    "same names": (IMAGE + TITLE + IMAGE + END, ["a"], [("a", "no-title")]),
    "same sample twice": ((IMAGE + TITLE) * 2 + END, ["a", "a"], []),
    "two images, dotted": (raw(b"a.1.jpg", PICTURE) + raw(b"a.2.jpg", PICTURE) + TITLE + END, [], [("a", "ambiguous")]),
    "apart": (IMAGE + raw(b"b.jpg", PICTURE) + TITLE + raw(b"b.txt", b"b") + END, [],
              [("a", "no-title"), ("b", "no-title"), ("a", "no-image"), ("b", "no-image")]),
    "cut between samples": (b"", [], [("", "damaged-shard")]),
    "cut in data": (IMAGE[:900], [], [("", "damaged-shard"), ("a", "truncated")]),
    "cut in a header": (IMAGE + TITLE[:300], [], [("", "damaged-shard"), ("a", "no-title")]),
    "zeros amid": (bytes(1536) + IMAGE + TITLE + END, ["a"], [("", "damaged-shard")]),
    "zeros for the rest": (bytes(1 << 20), [], [("", "damaged-shard")]),
    "garbage amid": (b"\x55" * 5120 + IMAGE + TITLE + END, ["a"], [("", "damaged-shard")]),
    "concatenated": (END + IMAGE + TITLE + END, ["a"], [("", "damaged-shard")]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    body, kept, told = HOSTILE[case]
    tar = tmp_path / "deep" / "er" / "x.tar"
    tar.parent.mkdir(parents=True)
    monkeypatch.chdir(tar.parent)
    tar.write_bytes(GOOD + body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held, losses = scan(tar)
    assert [key for key, *_ in held] == ["good", *kept] and sorted(losses) == sorted(told)
    assert all(image == PICTURE for _, image, *_ in held)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32_000  # KiB
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tar]


@pytest.mark.parametrize("body, word", [
    (b"", "empty"), (b"x", "no tar"), (b"\0" * 400, "no tar"), (b"<html>" * 2000, "no tar"), (bytes(1 << 20), "no tar"),
    (b"\x1f\x8b\x08" + bytes(3000), "gzip"), (b"BZh9" + bytes(3000), "bzip2"), (b"\xfd7zXZ\0" + bytes(99), "xz"),
    (b"(\xb5/\xfd" + bytes(3000), "zstd"), (b"PK\x03\x04" + bytes(3000), "zip"), (b"7z\xbc\xaf" + bytes(99), "7-Zip"),
    (b"Rar!" + bytes(3000), "RAR")])
def test_what_is_no_tar_says_so(tmp_path: Path, body: bytes, word: str) -> None:
    tar = tmp_path / "x.tar"
    tar.write_bytes(body)
    with pytest.raises(UserError, match=word):
        read_index(tar)
    assert len(check_shard(tar)) == 1


def test_neither_commands_nor_pickles_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = b"cos\nsystem\n(S'touch marker'\ntR."
    files = [("a.jpg", PICTURE), ("a.pickle", bomb), ("a.pyd", bomb), ("a.pth", bomb), ("a.txt", b"t")]
    tar = pack(tmp_path / "x.tar", files)
    assert [key for key, *_ in scan(tar)[0]] == ["a"]
    for spec in ("pipe:touch marker", "pipe:touch marker.tar", "|touch marker"):
        with pytest.raises(FileNotFoundError):
            read_index(Path(spec))
        with pytest.raises(FileNotFoundError):
            read_member(f"{spec}#0+5")
        assert expand_braces(spec) == [spec]
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(OSError):
        read_index(tmp_path / "fifo.tar")
    with pytest.raises(BadSample):
        read_member(f"{tmp_path / 'fifo.tar'}#0+5")
    assert not list(tmp_path.glob("marker*"))


def mutated(data: bytes, rng: random.Random) -> bytes:
    out, at = bytearray(data), rng.randrange(len(data))
    kind, size = rng.randrange(6), rng.choice([1, 8, 512, 3000])
    if kind == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        del out[at : at + size]
    elif kind == 3:
        out[at : at + size] = bytes(len(out[at : at + size]))
    elif kind == 4:
        out[at:at] = rng.randbytes(size)
    else:  # a header whose checksum is right again
        start = at - at % 512
        out[start + rng.randrange(512)] = rng.choice([0, 0x80, 0xFF, *b"0157xLSg/.\n", rng.randrange(256)])
        out[start + 148 : start + 156] = b" " * 8
        out[start + 148 : start + 156] = b"%06o\0 " % sum(out[start : start + 512])
    return bytes(out)


def test_mutations_lose_nothing_silently(tmp_path: Path) -> None:
    """Whatever is done to a tar: rows that can be read, or a clean error; a key that is gone has been told."""
    rng, tar = random.Random(0), tmp_path / "x.tar"
    samples = [(f"{n}{'long' * 40 * (n % 2)}", picture(n), f"title {n}") for n in range(6)]
    tars = [pack(tar, [(f"{key}.{e}", c) for key, image, title in samples for e, c in
                       (("jpg", image), ("json", b'{"title_neg": "n"}'), ("txt", title.encode()))], format).read_bytes()
            for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    for _ in range(full(300, 2000)):
        data = mutated(rng.choice(tars), rng)
        tar.write_bytes(data)
        try:
            held, losses = scan(tar)
        except UserError:  # no block is a header any more: the first is cut, or what follows it is out of step
            assert not any(data.startswith(tar[:512]) for tar in tars)
            continue
        missing = {key for key, *_ in samples} - {key for key, *_ in held}
        assert not missing or losses
        assert all(image and image in data and title.strip() for _, image, title, _ in held)
    assert contents(tmp_path) == {"x.tar": data}


def test_a_scan_reads_no_image_and_an_index_reads_no_tar(tmp_path: Path) -> None:
    """Bytes that this process asks the kernel for, counted by the kernel."""
    def asked(action: Callable[[], object]) -> int:
        before = int(Path("/proc/self/io").read_text().split()[1])
        action()
        return int(Path("/proc/self/io").read_text().split()[1]) - before

    write(tmp_path, [(str(n), picture(n, 200_000), f"title {n}", None) for n in range(100)])
    tar = tmp_path / "train-000000.tar"
    read_index(tar)  # imports pyarrow, which is read too
    assert asked(lambda: read_index(tar)) < 64 * 4096 + 50_000  # 20 MB
    tar.with_name(tar.name + ".index.json").unlink()
    assert asked(lambda: read_index(tar)) < 100 * 3 * 4096 + 50_000


def seal_index(tar: Path, body: bytes) -> None:
    """Give a tar an index that nobody can tell from one written with it."""
    with tar.open("rb") as file:
        seal = json.dumps(module.seal(file, body)).encode()
    tar.with_name(tar.name + ".index.json").write_bytes(seal + b"\n" + body)


def test_an_index_is_believed_only_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, SAMPLES)
    tar = tmp_path / "train-000000.tar"
    side = tar.with_name(tar.name + ".index.json")
    index, true, rng = side.read_bytes(), read_index(tar), random.Random(1)
    with monkeypatch.context() as patch:
        patch.delattr(module, "scanned")
        os.utime(tar, (1, 1))
        assert read_index(tar).equals(true)  # it is used, whatever the clock said
    for damaged in (b"", b"{}", b"[]\n[]", index[:-1], index + b" ", b"[" * 100_000, index.replace(b"plain", b"plane"),
                    *(mutated(index, rng) for _ in range(200))):
        side.write_bytes(damaged)
        assert read_index(tar).equals(true)
    body = index.partition(b"\n")[2]
    lies: dict[str, tuple] = {"image_offset": (-1, 1 << 70, "x", None), "image_size": (0, 1 << 62, 1 << 70),
                              "key": ([], None, 5), "title": (None, "\ud800", {})}
    for forged in ({"title": []}, {"key": "x"}, {"tar_sha256": 5}, {"sha256": 5},
                   *({name: [lie] * 7} for name, some in lies.items() for lie in some)):
        lie = json.dumps(json.loads(body) | forged).encode()
        seal_index(tar, lie)
        assert read_index(tar).equals(true), forged
    side.write_bytes(index)
    content = tar.read_bytes()
    for other in (content[:-512], content + bytes(512), content[:100] + b"!" + content[101:]):
        tar.write_bytes(other)
        assert not read_index(tar).equals(true) or check_shard(tar)
        with tar.open("rb") as file:
            assert module.indexed(tar, file) is None


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES)
    tar = tmp_path / "train-000000.tar"
    files, rng = contents(tmp_path), random.Random(2)
    for name, content in files.items():
        for _ in range(60):
            at = rng.randrange(len(content))
            flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
            (tmp_path / name).write_bytes(content[:at] + flipped + content[at + 1 :])
            assert check_shard(tar), (name, at)
        (tmp_path / name).write_bytes(content)
    assert check_shard(tar) == []
    at = read_index(tar)["image_offset"][1].as_py()
    tar.write_bytes(files[tar.name][:at] + b"?" + files[tar.name][at + 1 :])
    assert check_shard(tar) == [f"{SAMPLES[1][0]}: its image is not the one that was written"]
    tar.write_bytes(files[tar.name])
    seal_index(tar, files[tar.name + ".index.json"].partition(b"\n")[2].replace(b"plain", b"plane"))
    assert check_shard(tar) == ["its index lists other samples than it holds"]
    assert len(check_shard(tmp_path / "missing.tar")) == 1


def test_members_are_read_by_reference(tmp_path: Path) -> None:
    file = tmp_path / "odd #1+2.tar"
    file.write_bytes(bytes(range(100)))
    assert read_member(f"{file}#10+5") == bytes(range(10, 15))
    assert module.parse_reference(f"{file}#10+5") == (str(file), 10, 5)
    os.replace(pack(tmp_path / "new", [("a", b"x" * 99)]), file)
    assert read_member(f"{file}#512+3") == b"xxx"  # the file of that name, not the one opened before
    end = file.stat().st_size
    wrong: dict[str, list[tuple]] = {
        "truncated": [(end - 4, 5), (end, 1), (10**17, 5)], "too-large": [(0, MAX_IMAGE + 1)],
        "bad-reference": [(0, 0), (-1, 5), (0, -5), (0, 10**18), ("x", 1), ("١", 1)]}
    for reason, offset, size in ((reason, *each) for reason, some in wrong.items() for each in some):
        with pytest.raises(BadSample) as problem:
            read_member(f"{file}#{offset}+{size}")
        assert problem.value.reason == reason
    for path in ("", "a\0b"):
        with pytest.raises(BadSample):
            read_member(f"{path}#0+1")
    with pytest.raises(FileNotFoundError):
        read_member(f"{tmp_path}/none.tar#0+1")


def test_threads_share_few_descriptors(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.tar" for n in range(3 * module.HANDLES)]
    for number, file in enumerate(files):
        file.write_bytes(picture(number))
    most, wanted = 0, random.Random(3).choices(range(len(files)), k=5000)

    def read(number: int) -> bool:
        nonlocal most
        if not number % 16:
            most = max(most, len(os.listdir("/proc/self/fd")))
        return read_member(f"{files[number]}#1+699") == picture(number)[1:700]

    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, wanted))
    assert most <= before + module.HANDLES + 2 * 8
    module._handle.cache_clear()
    assert len(os.listdir("/proc/self/fd")) <= before


BAD_KEYS = ("", "a.b", "/a", "../a", "x/../a", "x/./a", "a\nb", "a//b", "a/", "\ud800", "__meta__/a", "a" * 5000)


@pytest.mark.parametrize("change, reason", [
    *(({"key": key}, "bad-key") for key in BAD_KEYS), ({"key": "first"}, "duplicate-key"),
    ({"key": "second"}, "duplicate-key"), ({"image": b""}, "empty"), ({"image": b"<html>"}, "not-image"),
    ({"image": PICTURE + bytes(1 << 26)}, "too-large"), ({"title": ""}, "no-title"), ({"title": " \n"}, "no-title"),
    ({"title": "\ud800"}, "bad-title"), ({"title": "t" * (1 << 21)}, "too-large"),
    ({"title_neg": ["x", {}]}, "bad-json"), ({"title_neg": "\ud800"}, "bad-json")])
def test_what_could_not_be_read_back_is_not_written(tmp_path: Path, change: dict, reason: str) -> None:
    with ShardWriter(tmp_path, "train", max_samples=1) as writer:
        writer.write("first", PICTURE, "t")
        writer.write("second", PICTURE, "t")
        with pytest.raises(BadSample) as problem:
            writer.write(**{"key": "k", "image": PICTURE, "title": "t", "title_neg": None} | change)
        assert problem.value.reason == reason
        writer.write("third", PICTURE, "t")
    assert [scan(tmp_path / f"train-{n:06d}.tar")[0][0][0] for n in range(3)] == ["first", "second", "third"]


MANY = [(f"{n:04d}", picture(n, 300 + 997 * n % 4000), f"title {n}", f"neg {n}" if n % 3 else None) for n in range(60)]


def test_shards_roll_over_and_a_later_run_goes_on(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_samples": 5, "max_bytes": 30_000}
    writer = write(tmp_path, MANY, **limits)
    tars = [tmp_path / name for name in sorted(contents(tmp_path)) if name.endswith(".tar")]
    sizes = [tar.stat().st_size for tar in tars]
    assert max(sizes) <= limits["max_bytes"] and {len(read_index(tar)) for tar in tars} >= {4, 5}
    keys = [row[0] for row in MANY]
    assert [row[0] for tar in tars for row in scan(tar)[0]] == keys and writer.done() == {*keys}
    before = contents(tmp_path)
    assert write(tmp_path, MANY, **limits).done() == writer.done() and contents(tmp_path) == before
    tars[3].unlink()
    write(tmp_path, MANY, **limits)
    assert contents(tmp_path) == before
    write(tmp_path, [("other", PICTURE, "t", None)], name="train-x")
    assert write(tmp_path, MANY, **limits).done() == writer.done()


def test_foreign_tars_and_a_second_writer_are_left_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as first, ShardWriter(tmp_path, "valid") as other:
        first.write(*MANY[0])
        other.write(*MANY[1])
        with pytest.raises(UserError, match="another process"), ShardWriter(tmp_path, "train"):
            pass
        first.write(*MANY[2])
    assert len(scan(tmp_path / "train-000000.tar")[0]) == 2 and len(contents(tmp_path)) == 4
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, "train") as writer:
        writer.write(*MANY[3])
        raise ZeroDivisionError
    assert len(contents(tmp_path)) == 4
    foreign = pack(tmp_path / "train-000001.tar", [("a.jpg", PICTURE), ("a.txt", b"t")]).read_bytes()
    with pytest.raises(UserError, match="train-000001"), ShardWriter(tmp_path, "train"):
        pass
    assert (tmp_path / "train-000001.tar").read_bytes() == foreign and len(contents(tmp_path)) == 5


def child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its pid."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def test_a_killed_writer_goes_on_to_the_same_shards(tmp_path: Path) -> None:
    """SIGKILL before each fsync, rename, lock and flush in turn, then at random moments, again and again."""
    limits: dict[str, Any] = {"max_samples": 30}
    write(tmp_path / "whole", MANY, **limits)
    whole, rng = contents(tmp_path / "whole"), random.Random(4)

    def die_at(folder: Path, step: int) -> None:
        left = step

        def counted(action: Callable) -> Callable:
            def call(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*args, **options)
            return call

        for name in ("fsync", "replace", "stat"):
            setattr(os, name, counted(getattr(os, name)))
        writing.try_lock = counted(writing.try_lock)
        writing.seal = counted(writing.seal)
        write(folder, MANY, **limits)

    for step in range(100):
        folder = tmp_path / f"step{step}"
        status = os.waitpid(child(partial(die_at, folder, step)), 0)[1]
        for tar in folder.glob("train-*.tar"):
            assert check_shard(tar) == []
        write(folder, MANY, **limits)
        assert contents(folder) == whole
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert 20 < step < 99

    for trial in range(full(4, 30)):
        folder = tmp_path / f"trial{trial}"
        for _ in range(50):
            pid = child(partial(write, folder, MANY, **limits))
            time.sleep(rng.random() * 0.06)
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == 0:
                break
        write(folder, MANY, **limits)
        assert contents(folder) == whole


def test_a_full_disk_leaves_the_complete_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path, "train", max_samples=20) as writer:
        for sample in MANY:
            if sample[0] == "0030":
                monkeypatch.setattr(os, "fsync", disk_is_full)
            writer.write(*sample)
    assert sorted(contents(tmp_path)) == ["train-000000.tar", "train-000000.tar.index.json"]
    monkeypatch.undo()
    write(tmp_path, MANY, max_samples=20)
    assert all(check_shard(tar) == [] for tar in tmp_path.glob("*.tar")) and len(contents(tmp_path)) == 6


def test_braces_expand_as_the_braceexpand_package_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(5)
    pieces = ["s/", "{000..011}", "{7..12}", "{a,b,,c d}", "-", "{08..10}", "{9..0}", "{010..8}", "{0..9..3}",
              "{9..0..2}", ".tar", "{}", "{x}", "日", "{3..3}"]
    for _ in range(200):
        pattern = "".join(rng.choices(pieces, k=rng.randrange(1, 5)))
        assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern)), pattern
    assert expand_braces("t-{000000..000009}.tar")[9] == "t-000009.tar"
    monkeypatch.setattr(module, "MAX_SHARDS", 1000)
    for bomb in ("{0..9999999999999}", "{0..999}" * 9):
        with pytest.raises(UserError, match="more than"):
            expand_braces(bomb)


def test_member_names_that_are_not_utf8_are_names_like_others(tmp_path: Path) -> None:
    """One name of another encoding must not end the reading of a shard."""
    with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.GNU_FORMAT) as file:
        for key in ("0", "caf\udce9", "2"):
            for ending, content in (("jpg", b"\xff\xd8\xffpicture"), ("txt", b"title")):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    lost: list[dict] = []
    index = read_index(tmp_path / "one.tar", lost.append)
    assert index["key"].to_pylist() == ["0", "caf\\xe9", "2"] and not lost


def test_numbered_negatives_and_lists_of_titles_in_shards(tmp_path: Path) -> None:
    """negative_1 … of KEY.json were not used, and nobody was told."""
    records = [{"title": "a", "negative_2": "y", "negative_1": ["x", ""], "negative_10": "z"}, ["b", "c"]]
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for key, record in enumerate(records):
            writer.write({"__key__": str(key), "jpg": PICTURE, "json": record})
    table = read_index(tmp_path / "x.tar")
    assert table["title"].to_pylist() == [["a"], ["b", "c"]]
    assert table["title_neg"].to_pylist() == [["x", "y", "z"], []]
