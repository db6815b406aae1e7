"""Thumbnails from the web into a folder: bounded, retried, guarded, and every URL accounted for.

`fetch` runs an event loop in a thread of its own, so transfers go on while the caller works. Bytes land under the hash
of their URL; what failed for good is remembered in `failures.jsonl` beside them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import ipaddress
import json
import random
import re
import socket
import time
import zlib
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from io import BytesIO
from itertools import count, repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import aiohttp
from PIL import Image
from yarl import URL

from data.batch import BadSample, UserError

BACKOFF = 0.5  # seconds before the second try; doubled for each further one, times a random 0.5 to 1.5
STALE = 60.0  # seconds after which a file in `partial/` (written in milliseconds) is one of a killed run
PASSING = re.compile(r"timeout|connection|dns|short-body|http-(408|425|429|5..)")  # tried again, also by later runs
FINAL = re.compile(r"bad-url|too-large|redirects|bad-encoding|empty|not-image|placeholder|http-4..")  # remembered
HEADERS = {"User-Agent": "thumbtune/0.1 (+thumbnail fetcher)", "Accept-Encoding": "identity"}
YOUTUBE = re.compile(r"(i\d?\.ytimg|img\.youtube)\.com")
NAT64, IPV6_GLOBAL = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")
# Cloud metadata services and dead relays that Python, or some version of it, calls global.
SPECIAL = [ipaddress.ip_network(each) for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]


@dataclass(frozen=True)
class FetchPolicy:
    """How hard, how long and how far to try; the defaults suit a list of thumbnails on one large host."""

    connections: int = 64  # requests under way at once
    per_host: int = 64  # of these, to one host name
    timeout: float = 30.0  # seconds for one try, redirects and body included; also the longest Retry-After obeyed
    max_bytes: int = 20_000_000  # largest body, as sent and after inflation; held in memory until it is whole
    retries: int = 4  # further tries after a passing failure: with 30 % faults 99.8 % get through
    redirects: int = 5  # hops followed before giving up
    allow_hosts: tuple[str, ...] = ()  # host names, as they stand in the URL, that may have a private address
    variants: bool = False  # YouTube: try maxresdefault, sddefault and hqdefault before the name given


class Fetched(NamedTuple):
    """What became of one URL: `path` to its bytes, or a short stable `reason` with a `detail` for people."""

    url: str
    path: Path | None
    reason: str | None
    detail: str


def fetch(urls: Iterable[str], folder: Path, policy: FetchPolicy, retry_failed: bool = False) -> Iterator[Fetched]:
    """Yield one `Fetched` for every URL given, as they finish; equal URLs are requested once.

    What lies in `folder`, or failed for good under the same limits, is answered without a request (`retry_failed` asks
    the latter again). Memory grows with the failures only. Raises `UserError` where `folder` cannot be written.
    """
    window = 4 * policy.connections  # wider than the connections, so that pauses and slow hosts hold nobody up
    flying: dict[str, int] = {}  # URL -> how many of the rows given wait for it
    landed: SimpleQueue[Future[Fetched]] = SimpleQueue()
    book = _Notebook(folder, policy, retry_failed)

    def land() -> Iterator[Fetched]:
        fetched = landed.get().result()
        book.note(fetched)
        return repeat(fetched, flying.pop(fetched.url))

    with book.file, _network(folder, policy) as start:
        for url in urls:
            while flying and (len(flying) >= window or not landed.empty()):
                yield from land()
            if url in flying:
                flying[url] += 1
            elif known := book.recall(url):
                yield known
            else:
                flying[url] = 1
                start(url).add_done_callback(landed.put)
        while flying:
            yield from land()


def cached_path(url: str, folder: Path) -> Path:
    """Where the bytes of `url` lie once they are fetched: `folder/xx/SHA256`."""
    digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
    return folder / digest[:2] / digest


class _Notebook:
    """What is settled about a URL: its bytes are in the cache, or it failed in this run or for good in an earlier."""

    def __init__(self, folder: Path, policy: FetchPolicy, retry_failed: bool) -> None:
        self.folder = folder
        self.failed: dict[str, Fetched] = {}
        # Under another limit the verdict may be another, so it counts only under the limits it was given under.
        self.limits = f"{policy.max_bytes} bytes, {policy.redirects} redirects, variants {policy.variants}"
        with _on_disk(folder):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
            for part in (folder / "partial").iterdir():
                with suppress(FileNotFoundError):  # another run's, finished meanwhile
                    if time.time() - part.stat().st_mtime > STALE:
                        part.unlink()
            failures = folder / "failures.jsonl"
            self.file = failures.open("ab", buffering=0)  # one write a line: runs side by side do not mix theirs
            line = b"\n"
            with failures.open("rb") as lines:
                for line in lines:
                    with suppress(ValueError, KeyError, TypeError):  # the torn line of a killed run
                        row = json.loads(line)
                        if row["limits"] == self.limits and not retry_failed:
                            self.failed[row["url"]] = Fetched(row["url"], None, row["reason"], row["detail"])
            if not line.endswith(b"\n"):
                self.file.write(b"\n")

    def recall(self, url: str) -> Fetched | None:
        path = cached_path(url, self.folder)
        with suppress(FileNotFoundError):
            if path.stat().st_size:  # none is stored empty, but a power cut can leave one so
                return Fetched(url, path, None, "")
        return self.failed.get(url)

    def note(self, fetched: Fetched) -> None:
        if fetched.reason is None:
            return
        self.failed[fetched.url] = fetched
        if FINAL.fullmatch(fetched.reason) and not PASSING.fullmatch(fetched.reason):
            row = {"url": fetched.url, "reason": fetched.reason, "detail": fetched.detail, "limits": self.limits}
            with _on_disk(self.folder):
                self.file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder}: {reason}; free some space or choose another --cache-dir") from error


@contextmanager
def _network(folder: Path, policy: FetchPolicy) -> Iterator[Callable[[str], Future[Fetched]]]:
    """Run a client on an event loop in another thread, and give the function that starts one URL on it."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="fetch", daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    client = _Client(folder, policy)
    run(client.open()).result()
    try:
        yield lambda url: run(client.obtain(url))
    finally:
        run(client.close()).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Client:
    """The sessions and limits of one `fetch`, on the network thread."""

    def __init__(self, folder: Path, policy: FetchPolicy) -> None:
        self.folder, self.policy = folder, policy
        self.slots = asyncio.Semaphore(policy.connections)
        self.gates: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by host, while in use
        self.names = {name.lower().strip("[]") for name in policy.allow_hosts}

    async def open(self) -> None:
        self.guarded, self.unguarded = _session(_public_socket), _session(None)

    async def close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.guarded.close()
        await self.unguarded.close()

    async def obtain(self, url: str) -> Fetched:
        """Fetch a URL into its place in the cache."""
        try:
            body = await self._best(_web_url(url))
        except BadSample as bad:
            return Fetched(url, None, bad.reason, bad.detail)
        path, part = cached_path(url, self.folder), self.folder / "partial" / uuid4().hex
        with _on_disk(self.folder):
            path.parent.mkdir(exist_ok=True)
            try:
                part.write_bytes(body)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        return Fetched(url, path, None, "")

    async def _best(self, url: URL) -> bytes:
        """The body at a URL, or at the first of its variants that exists."""
        candidates = _variants(url) if self.policy.variants else [url]
        for candidate in candidates:
            try:
                return await self._persist(candidate)
            except BadSample as bad:
                if bad.reason not in ("http-404", "placeholder") or candidate == candidates[-1]:
                    raise
        raise AssertionError("there is always one candidate")

    async def _persist(self, url: URL) -> bytes:
        """The body at a URL, asked for again after every failure that may pass."""
        for tried in count():
            try:
                return await self._follow(url)
            except BadSample as bad:
                if tried == self.policy.retries or not PASSING.fullmatch(bad.reason):
                    raise
                pause = BACKOFF * 2**tried * random.uniform(0.5, 1.5)
                pause += bad.wait if isinstance(bad, _Status) else 0.0
            await asyncio.sleep(min(pause, self.policy.timeout))
        raise AssertionError("the loop ends by returning or raising")

    async def _follow(self, url: URL) -> bytes:
        """One try, over all its hops; the time waited for a free connection is not counted."""
        left = self.policy.timeout
        for _ in range(self.policy.redirects + 1):
            host = url.host or ""
            gate = self.gates.setdefault(host, asyncio.Semaphore(self.policy.per_host))
            session = self.unguarded if host in self.names else self.guarded
            async with gate, self.slots:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(left):
                        answer = await _get(session, url, self.policy.max_bytes)
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    raise _named(error) from error
                left -= time.monotonic() - began
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise BadSample("redirects", f"more than {self.policy.redirects}")


# One request: no address but a public one, no body but a whole one below the limit.


class _ForbiddenAddress(OSError):
    """The guard's refusal; always with the same words, as aiohttp merges the differing errors of a host's addresses."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "not a public address; --allow-host HOST opens it")


class _Status(BadSample):
    """A status that is not 200; `wait` is the number of seconds its Retry-After asks for, 0 without one."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(f"http-{response.status}", f"from {response.url.host}")
        self.wait = _seconds(response.headers.get("Retry-After", "0"))


ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (_ForbiddenAddress, "forbidden-address"),
    (aiohttp.ClientConnectorCertificateError, "tls"),
    (aiohttp.ClientConnectorDNSError, "dns"),
    (aiohttp.ClientPayloadError, "short-body"),
    (aiohttp.ClientResponseError, "bad-response"),
    (TimeoutError, "timeout"),
    (ValueError, "bad-url"),
    (Exception, "connection"),
)  # the first that fits


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet; IPv6 that carries an IPv4 address is judged by that one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped or ip in NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in IPV6_GLOBAL:
            return False
        else:
            ip = ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in SPECIAL)


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """A socket for one (family, type, protocol, name, address) about to be dialled, whatever name led to it."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise _ForbiddenAddress
    return socket.socket(family, kind, protocol)


def _session(socket_factory: Callable[[tuple[Any, ...]], socket.socket] | None) -> aiohttp.ClientSession:
    """A session that keeps no cookie, trusts no proxy variable, inflates nothing and always checks TLS."""
    # The limits are the client's. Idle connections go early: a list of many hosts would eat up the descriptors.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0, socket_factory=socket_factory)
    return aiohttp.ClientSession(
        connector=connector,
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),  # ours is exact; aiohttp's own is rounded up to whole seconds
        auto_decompress=False,
        trust_env=False,
    )


def _web_url(text: str, base: URL | None = None) -> URL:
    try:
        url = base.join(URL(text)) if base else URL(text)
        host = url.host
    except ValueError as error:
        raise BadSample("bad-url", str(error)) from error
    if url.scheme not in ("http", "https") or not host:
        raise BadSample("bad-url", "not a http or https address with a host")
    if url.user is not None or url.password is not None:
        raise BadSample("bad-url", "carries a user name or a password")
    return url


def _variants(url: URL) -> list[URL]:
    """A YouTube thumbnail's URLs, largest first, the one given included; any other URL alone."""
    if not YOUTUBE.fullmatch(url.host or ""):
        return [url]
    names = [f"{name}{url.suffix}" for name in ("maxresdefault", "sddefault", "hqdefault")]
    return list(dict.fromkeys([*map(url.with_name, names), url]))


async def _get(session: aiohttp.ClientSession, url: URL, max_bytes: int) -> bytes | URL:
    """The body of one answer, or where it redirects to; raises `BadSample` and what aiohttp raises."""
    async with session.get(url, allow_redirects=False) as response:
        if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
            return _web_url(response.headers["Location"], url)
        if response.status != 200:  # whatever the body: YouTube's 404 carries a valid picture
            raise _Status(response)
        body = await _read(response, max_bytes)
    if not body:
        raise BadSample("empty", "no bytes")
    if body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise BadSample("not-image", "a page or other markup")
    if YOUTUBE.fullmatch(url.host or "") and _is_placeholder(url, body):
        raise BadSample("placeholder", "the 120x90 stand-in of a missing thumbnail")
    return body


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body, inflated; no more than `max_bytes` are taken from the wire or kept in memory."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise BadSample("bad-encoding", repr(encoding))
    if (response.content_length or 0) > max_bytes:
        raise BadSample("too-large", f"{response.content_length} bytes announced, {max_bytes} allowed")
    body, taken, inflater = bytearray(), 0, None
    async for chunk in response.content.iter_any():
        taken += len(chunk)
        if encoding != "identity":
            # "deflate" is zlib by the standard and bare in practice: only a zlib header has 8 in its low bits.
            bare = encoding == "deflate" and chunk[0] & 15 != 8
            inflater = inflater or zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
            try:
                chunk = inflater.decompress(chunk, max_bytes + 1 - len(body))
            except zlib.error as error:
                raise BadSample("bad-encoding", str(error)) from error
        body += chunk
        if max(taken, len(body)) > max_bytes:
            raise BadSample("too-large", f"more than {max_bytes} bytes")
    if inflater and not inflater.eof:
        raise BadSample("short-body", f"{encoding} ends early")
    return bytes(body)


def _is_placeholder(url: URL, body: bytes) -> bool:
    """Whether a YouTube name that promises more holds 120x90 pixels; the picture itself is not looked at."""
    if url.name.partition(".")[0].removesuffix("_live") in ("default", "1", "2", "3"):
        return False  # these are that small by nature
    try:
        with Image.open(BytesIO(body)) as image:  # reads the header only
            return image.size == (120, 90)
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything; a damaged file is for the decoder to judge
        return False


def _named(error: Exception) -> BadSample:
    """An error as a row of the ledger; what aiohttp wraps (`os_error`) counts too."""
    causes = error, getattr(error, "os_error", None)
    reason = next(word for kind, word in ERRORS if any(isinstance(cause, kind) for cause in causes))
    return BadSample(reason, f"{type(error).__name__} {error}".strip()[:200])


def _seconds(retry_after: str) -> float:
    """Seconds that a Retry-After asks for, given as a number or a date (RFC 9110, 10.2.3); 0 if unreadable."""
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
