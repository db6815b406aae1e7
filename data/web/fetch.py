"""Thumbnails from the web into a folder: bounded, retried, guarded, and every URL accounted for.

`fetch` runs an event loop in a thread of its own, so transfers go on while the caller works. Bytes land under the hash
of their URL; what failed for good is remembered in `failures.jsonl` beside them. Each URL has a lock, so that runs side
by side on one folder ask for it once.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any, NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from data.batch import BadSample, UserError
from data.web.guard import BadStatus, Sessions, as_bad_sample, get, variants_of, web_url

BACKOFF = 0.5  # seconds before the second try; doubled for each further one, times a random 0.5 to 1.5
POLL_S = 0.01  # between first looks at a URL that another run is fetching; up to 50 times as long later
STALE = 60.0  # seconds after which a file in `partial/` (written in milliseconds) is one of a killed run
PASSING = re.compile(r"timeout|connection|dns|short-body|http-(408|425|429|5..)")  # tried again, also by later runs
FINAL = re.compile(r"bad-url|too-large|redirects|bad-encoding|empty|not-image|placeholder|http-4..")  # remembered


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
    proxy: str = ""  # address of an HTTP proxy that all requests go through


class Fetched(NamedTuple):
    """What became of one URL: `path` to its bytes, or a short stable `reason` with a `detail` for people."""

    url: str
    path: Path | None
    reason: str | None
    detail: str


def fetch(urls: Iterable[str], folder: Path, policy: FetchPolicy, retry_failed: bool = False) -> Generator[Fetched]:
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
        return repeat(fetched, flying.pop(fetched.url))

    with book.file, _network(book, policy) as start:
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


def retry_delay(tried: int, bad: BadSample, policy: FetchPolicy) -> float:
    """Seconds to wait after failure number `tried` (from 0): what a server asks for, and jitter."""
    pause = BACKOFF * 2**tried * random.uniform(0.5, 1.5) + (bad.wait if isinstance(bad, BadStatus) else 0.0)
    return min(pause, policy.timeout)


def cached_path(url: str, folder: Path) -> Path:
    """Where the bytes of `url` lie once they are fetched: `folder/xx/SHA256`."""
    digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
    return folder / digest[:2] / digest


def delete_fetched(url: str, folder: Path) -> None:
    """Delete the bytes kept for `url`: they are no picture, so the next run asks for it again."""
    cached_path(url, folder).unlink(missing_ok=True)


class _Notebook:
    """What is settled about a URL: its bytes are in the cache, or it failed in this run or for good in another."""

    def __init__(self, folder: Path, policy: FetchPolicy, retry_failed: bool) -> None:
        self.folder, self.failed = folder, dict[str, Fetched]()
        # Under another limit the verdict may be another, so it counts only under the limits it was given under.
        self.limits = f"{policy.max_bytes} bytes, {policy.redirects} redirects, variants {policy.variants}"
        with disk_errors_as_user_errors(folder):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
            for part in (folder / "partial").iterdir():
                with suppress(FileNotFoundError), part.open("ab") as file:  # another run's, finished meanwhile
                    if time.time() - os.fstat(file.fileno()).st_mtime > STALE and _try_lock(file):
                        part.unlink()
            failures = folder / "failures.jsonl"
            self.file = failures.open("ab+", buffering=0)  # one write a line: runs side by side do not mix theirs
            self._read = 0  # bytes of it that have been read
            if retry_failed:
                self._read = self.file.seek(0, os.SEEK_END)  # other runs' failures from here on count
            if not self.read_failures():
                self.file.write(b"\n")  # ends the torn line of a killed run

    def read_failures(self) -> bool:
        """Take over what has been written since the last look; whether it ends in a whole line."""
        lines = os.pread(self.file.fileno(), max(0, os.fstat(self.file.fileno()).st_size - self._read), self._read)
        for line in lines.splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError):  # the torn line of a killed run
                row = json.loads(line)
                if row["limits"] == self.limits:
                    self.failed[row["url"]] = Fetched(row["url"], None, row["reason"], row["detail"])
        self._read += lines.rfind(b"\n") + 1
        return not lines or lines.endswith(b"\n")

    def recall(self, url: str) -> Fetched | None:
        """What became of `url`, if that is known."""
        path = cached_path(url, self.folder)
        with suppress(FileNotFoundError):
            if path.stat().st_size:  # none is stored empty, but a power cut can leave one so
                return Fetched(url, path, None, "")
        return self.failed.get(url)

    def note(self, failure: Fetched) -> None:
        """Remember a failure for this run and, where it is one for good, for others."""
        self.failed[failure.url] = failure
        if FINAL.fullmatch(failure.reason or "") and not PASSING.fullmatch(failure.reason or ""):
            row = {"url": failure.url, "reason": failure.reason, "detail": failure.detail, "limits": self.limits}
            with disk_errors_as_user_errors(self.folder):
                self.file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def disk_errors_as_user_errors(folder: Path) -> Iterator[None]:
    """Raises UserError for what a disk refuses."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write to {folder}: {why}; free space or name another --cache-dir") from error


@contextmanager
def _network(book: _Notebook, policy: FetchPolicy) -> Iterator[Callable[[str], Future[Fetched]]]:
    """Run a client on an event loop in another thread, and give the function that starts one URL on it."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="fetch", daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    client = _Client(book, policy)
    run(client.sessions.__aenter__()).result()
    try:
        yield lambda url: run(client.obtain(url))
    finally:
        run(client.close()).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _try_lock(file: IO[bytes]) -> bool:
    """Lock a file without waiting; False where another process holds it or has just deleted it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: each run asks for itself
        return True
    return os.fstat(file.fileno()).st_nlink > 0


class _Client:
    """The sessions and limits of one `fetch`, on the network thread."""

    def __init__(self, book: _Notebook, policy: FetchPolicy) -> None:
        self.book, self.folder, self.policy = book, book.folder, policy
        self.slots = asyncio.Semaphore(policy.connections)
        self.gates: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by host, while in use
        self.sessions = Sessions(policy.allow_hosts, policy.proxy)

    async def close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.sessions.__aexit__()

    async def obtain(self, url: str) -> Fetched:
        """Fetch a URL into its place in the cache, or take what another run has fetched meanwhile."""
        async with self._locked(url):
            self.book.read_failures()
            if known := self.book.recall(url):
                return known
            try:
                body = await self._best(web_url(url))
            except BadSample as bad:
                failure = Fetched(url, None, bad.reason, bad.detail)
                self.book.note(failure)
                return failure
            path, part = cached_path(url, self.folder), self.folder / "partial" / uuid4().hex
            with disk_errors_as_user_errors(self.folder):
                path.parent.mkdir(exist_ok=True)
                try:
                    part.write_bytes(body)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
            return Fetched(url, path, None, "")

    @asynccontextmanager
    async def _locked(self, url: str) -> AsyncIterator[None]:
        """Hold the lock of `url`; the kernel frees that of a killed run.

        A holder that is suspended is not waited for longer than its own tries could take.
        """
        path, pause = self.folder / "partial" / f"{cached_path(url, self.folder).name}.lock", POLL_S
        until = time.monotonic() + 2 * self.policy.timeout * (self.policy.retries + 1)
        while True:
            with disk_errors_as_user_errors(self.folder):
                file = path.open("ab")
            with file:
                is_held = _try_lock(file)
                if is_held or time.monotonic() > until:
                    try:
                        yield
                    finally:
                        if is_held:
                            path.unlink(missing_ok=True)
                    return
            pause = min(2 * pause, 50 * POLL_S)
            await asyncio.sleep(pause)

    async def _best(self, url: URL) -> bytes:
        """The body at a URL, or at the first of its variants that exists."""
        *variants, last = variants_of(url) if self.policy.variants else [url]
        for variant in variants:
            try:
                return await self._persist(variant)
            except BadSample as bad:
                if bad.reason not in ("http-404", "placeholder"):
                    raise
        return await self._persist(last)

    async def _persist(self, url: URL) -> bytes:
        """The body at a URL, asked for again after every failure that may pass."""
        tried = 0
        while True:
            try:
                return await self._follow(url)
            except BadSample as bad:
                if tried == self.policy.retries or not PASSING.fullmatch(bad.reason):
                    raise
                await asyncio.sleep(retry_delay(tried, bad, self.policy))
            tried += 1

    async def _follow(self, url: URL) -> bytes:
        """One try, over all its hops; the time waited for a free connection is not counted."""
        left = self.policy.timeout
        for _ in range(self.policy.redirects + 1):
            host = url.host or ""
            gate = self.gates.setdefault(host, asyncio.Semaphore(self.policy.per_host))
            async with gate, self.slots:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(left):
                        answer = await get(self.sessions.of(url), url, self.policy.max_bytes)
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    raise as_bad_sample(error) from error
                left -= time.monotonic() - began
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise BadSample("redirects", f"more than {self.policy.redirects}")
