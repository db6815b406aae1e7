"""data/fetch.py against real servers on loopback: hostile ones, failing ones, forbidden ones, and a killed process."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import chain, cycle, repeat, takewhile
from pathlib import Path
from typing import Any

import pytest
from helpers import full
from site_server import CLOSE, GREY, LOCAL, PICTURE, RESET, Answer, Part, Site, reply

import data.web.policy as module
from data.batch import UserError
from data.web.fetch import fetch
from data.web.fetched import cached_path
from data.web.guard import is_public
from data.web.limits import FetchPolicy, check_proxy

ROOT = Path(__file__).resolve().parents[3]


def policy(**changes: Any) -> FetchPolicy:
    return replace(FetchPolicy(timeout=5.0, allow_hosts=(LOCAL,)), **changes)


def ask(folder: Path, *urls: str, again: bool = False, **changes) -> list:
    return list(fetch(urls, folder, policy(**changes), again))


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", 0.01)


BOMB = zlib.compress(bytes(200_000_000), 9, wbits=31)
BARE = zlib.compress(PICTURE, wbits=-15)
HOSTILE: dict[str, tuple[Answer, str | None]] = {
    "drip": (lambda p, n: chain([reply(Content_Length=1000, body=b"")], cycle([b"x", 0.02])), "timeout"),  # 20 s
    "drip-head": (lambda p, n: chain([b"HTTP/1.1 200 OK\r\n"], cycle([b"A: b\r\n", 0.05])), "timeout"),
    "no-answer": (lambda p, n: [60.0], "timeout"),
    "slow-hops": (lambda p, n: [0.3, reply(302, b"", Location=f"/{n}")], "timeout"),
    "endless-head": (lambda p, n: chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"A: " + b"b" * 4000 + b"\r\n")),
                     "bad-response"),
    "endless": (lambda p, n: chain([reply(body=b"", Content_Length=None)], repeat(b"x" * 65536)), "too-large"),
    "announced": (lambda p, n: [reply(body=b"", Content_Length=2_000_000), 60.0], "too-large"),
    "bomb": (lambda p, n: reply(body=BOMB, Content_Encoding="gzip"), "too-large"),
    "short": (lambda p, n: [reply(Content_Length=len(PICTURE) + 1), CLOSE], "short-body"),
    "short-gzip": (lambda p, n: reply(body=gzip.compress(PICTURE)[:-9], Content_Encoding="gzip"), "short-body"),
    "torn-gzip": (lambda p, n: reply(body=gzip.compress(PICTURE)[:50] + GREY, Content_Encoding="gzip"), "bad-encoding"),
    "endless-gzip": (lambda p, n: chain([reply(body=gzip.compress(GREY), Content_Length=None, Content_Encoding="gzip")],
                                        repeat(b"x" * 65536)), "too-large"),
    "brotli": (lambda p, n: reply(Content_Encoding="br"), "bad-encoding"),
    "twice": (lambda p, n: reply(body=gzip.compress(PICTURE), Content_Encoding="gzip, gzip"), "bad-encoding"),
    "reset": (lambda p, n: [RESET], "connection"),
    "hang-up": (lambda p, n: [CLOSE], "connection"),
    "garbage": (lambda p, n: [b"no such protocol\r\n\r\n", CLOSE], "bad-response"),
    "loop": (lambda p, n: reply(302, b"", Location=p), "redirects"),
    "to-file": (lambda p, n: reply(302, b"", Location="file:///etc/passwd"), "bad-url"),
    "to-user": (lambda p, n: reply(302, b"", Location="//me:secret@127.0.0.1/"), "bad-url"),
    "picture-404": (lambda p, n: reply(404), "http-404"),
    "proxy-login": (lambda p, n: reply(407), "proxy-407"),  # not remembered: it says nothing of the picture
    "busy": (lambda p, n: reply(429, Retry_After=3600), "http-429"),
    "broken": (lambda p, n: reply(500), "http-500"),
    "no-content": (lambda p, n: reply(204, b""), "http-204"),
    "page": (lambda p, n: reply(body=b"\n<!DOCTYPE html><p>Not here"), "not-image"),
    "nothing": (lambda p, n: reply(body=b""), "empty"),
    "gzip": (lambda p, n: reply(body=gzip.compress(PICTURE), Content_Encoding="gzip"), None),
    "members": (lambda p, n: reply(body=gzip.compress(PICTURE[:99]) + gzip.compress(PICTURE[99:]) + bytes(9),
                                   Content_Encoding="gzip"), None),
    "second-cut": (lambda p, n: reply(body=gzip.compress(PICTURE[:99]) + gzip.compress(PICTURE[99:])[:-9],
                                      Content_Encoding="gzip"), "short-body"),
    "aws-chunked": (lambda p, n: reply(Content_Encoding="aws-chunked"), None),  # S3 keeps it of some uploads
    "zlib": (lambda p, n: reply(body=zlib.compress(PICTURE), Content_Encoding="deflate"), None),
    "bare": (lambda p, n: reply(body=BARE, Content_Encoding="deflate"), None),
    "hops": (lambda p, n: reply() if p == "/5" else reply(302, b"", Location=f"/{int(p[1:] or 0) + 1}"), None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_every_answer_ends_in_time_with_its_reason(name: str, tmp_path: Path) -> None:
    answer, reason = HOSTILE[name]
    site = Site(answer)
    start = time.monotonic()
    tracemalloc.start()
    limit = 1.0 if reason == "timeout" else 60.0
    (got,) = ask(tmp_path, site.url(), timeout=limit, retries=0, max_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - start < 15  # none of these servers ends before 20 s by itself
    assert peak < 8_000_000
    assert got.reason == reason
    assert (got.path.read_bytes() == PICTURE) if reason is None else not cached_path(got.url, tmp_path).exists()
    assert not any((tmp_path / "partial").iterdir())
    assert "secret" not in got.detail


def date_in(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("wait, least", [("1", 1.0), (lambda: date_in(2.2), 1.0), ("9" * 5000, 2.0), ("soon", 0.0)])
def test_a_busy_server_is_asked_again_when_it_says(tmp_path: Path, wait, least: float) -> None:
    site = Site(lambda path, n: reply(429, Retry_After=wait() if callable(wait) else wait) if n == 1 else reply())
    assert ask(tmp_path, site.url(), timeout=2.0)[0].reason is None
    assert site.times[1] - site.times[0] >= least


def test_first_failures_are_recovered_with_at_most_twice_the_requests(tmp_path: Path) -> None:
    bad: list[bytes | list[Part]] = [reply(503), [RESET], [CLOSE], [reply(Content_Length=len(PICTURE) + 5), CLOSE],
                                     reply(408), [reply(), CLOSE]]
    site = Site(lambda path, n: bad[int(path[1:]) % len(bad)] if n == 1 else reply())
    got = ask(tmp_path, *(site.url(f"/{i}") for i in range(240)))
    assert all(each.reason is None for each in got)
    assert len(got) == 240 and sum(site.hits.values()) <= 480
    site = Site(lambda path, n: reply(500))
    assert ask(tmp_path, site.url(), retries=3)[0].reason == "http-500"
    gaps = [after - before for before, after in zip(site.times, site.times[1:], strict=False)]
    assert all(0.004 * 2**i < gap for i, gap in enumerate(gaps)) and site.hits["/"] == 4


def test_a_table_with_faults_is_accounted_for_row_by_row(tmp_path: Path) -> None:
    rows = full(400, 5000)
    faults = {0: (reply(404), "http-404"), 1: (reply(body=b"<html>"), "not-image"), 2: ([RESET], "connection")}

    def answer(path: str, n: int):
        number = int(path[1:])
        return faults[number % 10][0] if number % 10 in faults else [0.001, reply(body=PICTURE + path.encode())]

    pulled = 0

    def table():
        nonlocal pulled
        for pulled in range(1, rows + 1):  # every 7th row repeats the one before
            yield site.url(f"/{pulled - 1 if pulled % 7 == 0 else pulled}")

    site, seen = Site(answer), Counter[str]()
    for got in fetch(table(), tmp_path, policy(per_host=16, retries=1)):
        seen[got.url] += 1
        assert pulled - pulled // 7 - len(seen) <= 4 * 64 + 1  # no more URLs in hand, however long the table
        number = got.url.rpartition("/")[2]
        assert got.reason == faults.get(int(number) % 10, (None, None))[1]
        assert got.path is None or got.path.read_bytes() == PICTURE + b"/" + number.encode()
    assert seen == Counter(table())
    assert site.most <= 16
    assert all(site.hits[path] == 1 for path in site.hits if int(path[1:]) % 10 not in faults)


def test_failures_are_remembered_only_where_asking_again_is_useless(tmp_path: Path) -> None:
    final, passing = Site(lambda p, n: reply(404)), Site(lambda p, n: reply(429))
    for _ in range(2):
        assert ask(tmp_path, final.url(), final.url())[1].reason == "http-404"
        assert ask(tmp_path, passing.url(), passing.url(), retries=0)[1].reason == "http-429"
    assert (final.hits["/"], passing.hits["/"]) == (1, 2)
    ask(tmp_path, final.url(), variants=True)
    ask(tmp_path, final.url(), again=True)
    assert final.hits["/"] == 3
    with (tmp_path / "failures.jsonl").open("ab") as file:
        file.write(b'{"url": "http://torn')
    ask(tmp_path, final.url("/b"))
    (tmp_path / "partial" / "old").touch()
    os.utime(tmp_path / "partial" / "old", (0, 0))
    assert ask(tmp_path, final.url("/b"), final.url())[0].reason == "http-404"
    assert final.hits == {"/": 3, "/b": 1}
    assert not any((tmp_path / "partial").iterdir())
    final.answer = lambda p, n: reply()
    assert ask(tmp_path, final.url(), again=True)[0].path == cached_path(final.url(), tmp_path)
    assert ask(tmp_path, final.url())[0].reason is None and final.hits["/"] == 4


def test_a_killed_process_leaves_whole_files_and_only_the_rest_is_fetched(tmp_path: Path) -> None:
    site: Site = Site(lambda path, n: [0.02 if site.hits.total() <= 60 else 60.0, reply(body=PICTURE + path.encode())])
    urls = [site.url(f"/{i}") for i in range(200)]
    code = (
        "import json, sys; from pathlib import Path\n"
        "from data.web.fetch import fetch; from data.web.limits import FetchPolicy\n"
        f"list(fetch(json.load(sys.stdin), Path({str(tmp_path)!r}), FetchPolicy(4, 4, allow_hosts=({LOCAL!r},))))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT, text=True)
    assert child.stdin is not None
    child.stdin.write(json.dumps(urls))
    child.stdin.close()
    def whole() -> set[str]:
        return {url for url in urls if cached_path(url, tmp_path).exists()}

    while len(whole()) <= 40 and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = whole()
    assert 40 < len(kept) <= 60
    site.hits.clear()
    site.answer = lambda path, n: reply(body=PICTURE + path.encode())
    got = ask(tmp_path, *urls)
    assert {site.url(path) for path in site.hits} == set(urls) - kept
    for each in got:
        assert each.path.read_bytes() == PICTURE + b"/" + each.url.rpartition("/")[2].encode()


def test_requests_are_plain_and_honest(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site = Site(lambda path, n: reply(Set_Cookie="me=1; Path=/"))
    assert all(each.reason is None for each in ask(tmp_path, site.url("/a"), site.url("/b"), connections=1))
    assert all("thumbtune/" in head and "Cookie" not in head and "gzip" not in head for head in site.heads)


def test_a_generator_left_early_ends_its_thread(tmp_path: Path) -> None:
    site = Site(lambda path, n: reply() if path == "/0" else [60.0])
    running = fetch([site.url(f"/{i}") for i in range(20)], tmp_path, policy())
    next(running)
    running.close()
    assert not any(thread.name == "fetch" for thread in threading.enumerate())


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    site = Site(lambda path, n: reply())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*--cache-dir"):
        ask(tmp_path / "file", site.url())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: the write itself fails
        with pytest.raises(UserError, match="--cache-dir"):
            ask(tmp_path, site.url())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "failures.jsonl").read_bytes() == b"" and not any((tmp_path / "partial").iterdir())
    assert not cached_path(site.url(), tmp_path).exists()


@pytest.fixture
def dialled(monkeypatch) -> list[str]:
    """Every address dialled; those outside loopback are refused here, so that no test leaves the machine."""
    addresses, dial = [], asyncio.selector_events.BaseSelectorEventLoop.sock_connect

    async def sock_connect(loop, sock, address):
        addresses.append(address[0])
        if is_public(address[0]):
            raise ConnectionRefusedError
        await dial(loop, sock, address)

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", sock_connect)
    return addresses


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """A resolver: what each name stands for, the next of the list at every look-up (the last one stays)."""
    table, resolve = dict[str, list[str]](), socket.getaddrinfo

    def getaddrinfo(host, *rest, **more):
        answers = table.get(host)
        address = host if answers is None else answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for each in address.split() for found in resolve(each, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


PRIVATE = """
127.0.0.1 127.1 127.8.9.10 0.0.0.0 0 2130706433 0x7f000001 0x7f.1 0177.0.0.1 localhost 127.0.0.1. 10.1.2.3 172.16.0.1
172.31.255.254 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200 192.0.0.192 168.63.129.16 198.18.0.1 224.0.0.251
240.0.0.1 255.255.255.255 [::1] [::] [::ffff:127.0.0.1] [::ffff:10.0.0.1] [::127.0.0.1] [64:ff9b::7f00:1]
[64:ff9b::a00:1] [64:ff9b:1::1] [2002:7f00:1::] [2002:a00:1::1] [2001:0:7f00:1::] [fe80::1] [fc00::1] [fec0::1]
[ff02::1] [2001:db8::1] ①②⑦.0.0.1 %31%32%37.0.0.1 inside.example inside6.example
""".split()
ODD = ["file:///etc/passwd", "ftp://8.8.8.8/", "data:image/png;base64,AA", "gopher://8.8.8.8/", "//8.8.8.8/", "",
       "x.jpg", "http://", "http://me@8.8.8.8/", "http://me:secret@8.8.8.8/", "http://8.8.8.8\\@127.0.0.1/", "http://[::1",
       "\ud800"]


def test_no_private_address_is_ever_dialled(tmp_path: Path, dialled, names) -> None:
    names |= {"inside.example": ["10.0.0.1"], "inside6.example": ["::ffff:192.168.0.1 ::1"], "%31%32%37.0.0.1": [LOCAL]}
    targets: list[str] = []
    site = Site(lambda path, n: reply(302, b"", Location=targets[int(path[1:])]) if path != "/" else reply())
    private = [f"http://{host}:{site.port}/" for host in PRIVATE]
    assert len(private) >= 30
    for got in ask(tmp_path, *private, *ODD, allow_hosts=(), retries=0):
        allowed = {"bad-url"} if got.url in ODD else {"forbidden-address", "bad-url", "dns"}
        assert got.reason in allowed, got
    assert dialled == [] and not site.hits
    # The same as targets of a redirect from the one host that is open, by this name alone.
    targets = [url for url in private + ODD if "://" in url[:-1] and "①" not in url and f"//{LOCAL}:" not in url]
    got = ask(tmp_path, *(site.url(f"/{i}") for i in range(len(targets))), retries=0)
    assert len(got) == len(targets) > 40 and {each.reason for each in got} <= {"forbidden-address", "bad-url", "dns"}
    assert set(dialled) == {LOCAL} and "/" not in site.hits


def test_a_name_that_changes_its_address_is_judged_when_it_is_dialled(tmp_path: Path, dialled, names) -> None:
    names["rebound.example"] = ["8.8.8.8", LOCAL]
    names["mixed.example"] = [f"{LOCAL} 8.8.8.8"]
    site = Site(lambda path, n: reply())
    for name, reason in [("rebound", "connection"), ("rebound", "forbidden-address"), ("mixed", "connection")]:
        assert ask(tmp_path, site.url(host=f"{name}.example"), retries=0)[0].reason == reason
    assert set(dialled) == {"8.8.8.8"} and not site.hits


def test_allow_host_opens_one_host_by_its_name(tmp_path: Path, dialled, names) -> None:
    names["nas.example"] = [LOCAL]
    site = Site(lambda path, n: reply())
    for host, reason in [("nas.example", None), ("NAS.example", None), (LOCAL, "forbidden-address")]:
        assert ask(tmp_path, site.url(host=host), allow_hosts=("Nas.Example",))[0].reason == reason
    assert len(dialled) == site.hits["/"] == 2
    # A refusal is no verdict of a server: it is forgotten as soon as the host is opened.
    assert ask(tmp_path, site.url())[0].reason is None


@pytest.mark.parametrize("connections, per_host, most", [(6, 64, 6), (64, 3, 6)])
def test_connections_are_limited_in_all_and_for_each_host(tmp_path: Path, names, connections, per_host, most) -> None:
    names |= {"a.example": [LOCAL], "b.example": [LOCAL]}
    def answer(path: str, n: int) -> Iterator[float | bytes]:  # none comes before as many are open as may be
        yield from takewhile(lambda _: site.most < most, repeat(0.01, 400))
        yield 0.02
        yield reply()

    site: Site = Site(answer)
    urls = [site.url(f"/{i}", host) for i in range(20) for host in names]
    ask(tmp_path, *urls, connections=connections, per_host=per_host, allow_hosts=tuple(names))
    assert site.most == most


def test_public_addresses_are_told_from_the_rest() -> None:
    assert all(map(is_public, ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]))
    assert not any(map(is_public, ["fe80::1%eth0", "5f00::1", "100::1", "192.88.99.1", "ff0e::1"]))


def test_youtube_variants_and_placeholders(tmp_path: Path, names) -> None:
    names["i.ytimg.com"] = [LOCAL]
    pages = {"/vi/full/sddefault.jpg": reply(), "/vi/full/hqdefault.jpg": reply(body=GREY),
             "/vi/ill/hqdefault.jpg": reply(), "/vi/gone/hqdefault.jpg": reply(body=GREY),
             "/vi/gone/default.jpg": reply(body=GREY), "/vi/ill/maxresdefault.jpg": reply(503),
             "/vi/odd/0.jpg": reply()}
    site = Site(lambda path, n: pages.get(path, reply(404, GREY)))

    def verdicts(*paths: str, **changes) -> list[str | None]:
        urls = [site.url(f"/vi/{path}.jpg", "i.ytimg.com") for path in paths]
        by_url = {each.url: each.reason for each in ask(tmp_path, *urls, allow_hosts=("i.ytimg.com",), **changes)}
        return [by_url[url] for url in urls]

    assert verdicts("full/hqdefault", "gone/default") == ["placeholder", None]
    paths = "full/hqdefault", "odd/0", "gone/hqdefault", "none/hqdefault", "ill/hqdefault"
    assert verdicts(*paths, variants=True, retries=0) == [None, None, "placeholder", "http-404", "http-503"]
    kept = cached_path(site.url("/vi/full/hqdefault.jpg", "i.ytimg.com"), tmp_path)
    assert kept.read_bytes() == PICTURE




KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
TLS_CHILD = """import json, sys
from pathlib import Path
from data.web.fetch import fetch; from data.web.limits import FetchPolicy
found = fetch(sys.argv[2:], Path(sys.argv[1]), FetchPolicy(allow_hosts=("localhost",)))
print(json.dumps({each.url: [each.reason, each.detail] for each in found}))"""


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificates with the openssl command")
def test_tls_is_always_checked(tmp_path: Path) -> None:
    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)

    def context(name: str, host: str, days: int, sign: str = "-CA ca.pem -CAkey ca.key") -> ssl.SSLContext:
        openssl(f"req -new {KEY} -keyout {name}.key -out {name}.csr -subj /CN=x -addext subjectAltName=DNS:{host}")
        openssl(f"x509 -req -in {name}.csr -copy_extensions copy -days {days} {sign} -out {name}.pem")
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        return made

    openssl(f"req -x509 {KEY} -keyout ca.key -out ca.pem -subj /CN=ca -addext basicConstraints=critical,CA:TRUE")
    cases = {
        "": context("good", "localhost", 2),
        "mismatch": context("other", "other.example", 2),
        "expired": context("old", "localhost", -1),
        "self": context("own", "localhost", 2, "-key own.key"),
    }
    sites = {word: Site(lambda path, n: reply(), tls) for word, tls in cases.items()}
    urls = {word: f"https://localhost:{site.port}/" for word, site in sites.items()}
    child = [sys.executable, "-c", TLS_CHILD, str(tmp_path / "cache"), *urls.values()]
    trusting = os.environ | {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    found = json.loads(subprocess.run(child, cwd=ROOT, env=trusting, check=True, capture_output=True).stdout)
    for word, url in urls.items():
        reason, detail = found[url]
        assert reason == ("tls" if word else None) and word in detail
        assert sites[word].hits.total() == (0 if word else 1)


SIGNED = ["/9eOz=/smart/http%3A%2F%2Fcdn.example%2Fa.jpg", "/foo%27bar.jpg?sig=q%2FX&type=image%2Fjpeg",
          "/p%28t%29.jpg", "/a/../b.jpg?x=a+b%20c", "/lower%c3%a9.jpg"]


def test_a_signed_address_goes_out_byte_for_byte_also_in_a_redirect(tmp_path: Path) -> None:
    """A signature covers one spelling: an address that is decoded and encoded again answers 403."""
    site = Site(lambda path, n: reply(302, b"", Location=path.removeprefix("/to")) if path[:3] == "/to" else reply())
    for paths in SIGNED, [f"/to{path}" for path in SIGNED if "/../" not in path]:  # a relative redirect resolves those
        site.hits.clear()
        assert [got.reason for got in ask(tmp_path, *map(site.url, paths), again=True)] == [None] * len(paths)
        assert {path for path in site.hits if path[:3] != "/to"} == {path.removeprefix("/to") for path in paths}


def test_what_no_address_may_hold_is_encoded(tmp_path: Path) -> None:
    site = Site(lambda path, n: reply())
    assert [got.reason for got in ask(tmp_path, site.url('/ä b"|.jpg?q=é'), site.url("/100%.jpg"))] == [None, None]
    assert set(site.hits) == {"/%C3%A4%20b%22%7C.jpg?q=%C3%A9", "/100%25.jpg"}


TWIN = """import sys
from pathlib import Path
from data.web.fetch import fetch; from data.web.limits import FetchPolicy
found = fetch(sys.argv[2:], Path(sys.argv[1]), FetchPolicy(allow_hosts=("127.0.0.1",), timeout=5.0))
print(sum(each.path is not None for each in found))"""


def test_two_runs_on_one_cache_ask_for_an_address_once(tmp_path: Path) -> None:
    """Else two runs started together fetch everything twice, and a host that counts requests bans both."""
    site = Site(lambda path, n: [0.05, reply(404) if path.startswith("/gone") else reply()])
    urls = [site.url(f"/{name}{k}") for k in range(60) for name in ("there", "gone")]
    twins = [subprocess.Popen([sys.executable, "-c", TWIN, str(tmp_path), *urls], cwd=ROOT, stdout=subprocess.PIPE)
             for _ in range(2)]
    assert [twin.communicate(timeout=60)[0] for twin in twins] == [b"60\n", b"60\n"]
    assert set(site.hits.values()) == {1} and site.hits.total() == 120
    assert not list((tmp_path / "partial").iterdir())


def test_a_suspended_run_does_not_hold_up_another_for_ever(tmp_path: Path) -> None:
    site = Site(lambda path, n: reply())
    (tmp_path / "partial").mkdir()
    with (tmp_path / "partial" / f"{cached_path(site.url(), tmp_path).name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ask(tmp_path, site.url(), timeout=0.1, retries=0)[0].reason is None


def test_all_requests_go_through_the_proxy_and_local_names_are_refused(tmp_path: Path) -> None:
    """A proxy dials for us, so the guard at the socket sees only the proxy: names have to be judged before."""
    proxy = Site(lambda path, n: reply())
    private = ["http://127.1/", "http://[::1]/", "http://10.0.0.1/", "http://localhost/", "http://nas/",
               "http://metadata.google.internal/", "http://printer.local/"]
    found = ask(tmp_path, "http://pictures.example/a%2Fb.jpg", *private, allow_hosts=(), proxy=proxy.url())
    assert {got.url: got.reason for got in found} == {
        "http://pictures.example/a%2Fb.jpg": None, **dict.fromkeys(private, "forbidden-address")}
    assert set(proxy.hits) == {"http://pictures.example/a%2Fb.jpg"}
    assert ask(tmp_path, "http://nas/2", allow_hosts=("nas",), proxy=proxy.url())[0].reason is None


@pytest.mark.parametrize("address", ["socks5://host:1", "host:3128", "http://", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="--proxy takes the address of an HTTP proxy"):
        check_proxy(address)
