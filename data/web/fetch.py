"""Thumbnails from the web into a folder: bounded, retried, guarded, and every URL accounted for.

`fetch` runs an event loop in a thread of its own, so transfers go on while the caller works. Bytes land under the hash
of their URL; permanent failures are remembered in `failures.jsonl` beside them. Each URL has a lock, so that runs side
by side on one folder request it once.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

from yarl import URL

from data.batch import BadSample
from data.locks import try_lock
from data.text import hide_secrets
from data.web.fetched import Fetched, cached_path, disk_errors_as_user_errors
from data.web.guard import Sessions, get, variants_of, web_url
from data.web.limits import TRANSIENT, FetchPolicy
from data.web.policy import follow_redirects, with_retries

POLL_S = 0.01  # between first looks at a URL that another run is fetching; up to 50 times as long later
STALE = 60.0  # seconds after which a file in `partial/` (written in milliseconds) is one of a killed run
PERMANENT = re.compile(r"bad-url|too-large|redirects|bad-encoding|empty|not-image|placeholder|http-4..")  # remembered


def fetch(urls: Iterable[str], folder: Path, policy: FetchPolicy, retry_failed: bool = False) -> Generator[Fetched]:
    """Yield one `Fetched` for every URL given, as they finish; equal URLs are requested once.

    What lies in `folder`, or failed permanently under the same limits, is not requested (`retry_failed` requests the
    latter again). Memory grows with the failures only. Raises `UserError` where `folder` cannot be written.
    """
    window = 4 * policy.connections  # more than the connections, so that pauses and slow hosts do not hold up others
    pending: dict[str, int] = {}  # URL -> number of the given ones that are equal to it
    finished: SimpleQueue[Future[Fetched]] = SimpleQueue()
    results = _Results(folder, policy, retry_failed)

    def next_finished() -> Iterator[Fetched]:
        fetched = finished.get().result()
        return repeat(fetched, pending.pop(fetched.url))

    with results.file, _network(results, policy) as start:
        for url in urls:
            while pending and (len(pending) >= window or not finished.empty()):
                yield from next_finished()
            if url in pending:
                pending[url] += 1
            elif result := results.known(url):
                yield result
            else:
                pending[url] = 1
                start(url).add_done_callback(finished.put)
        while pending:
            yield from next_finished()


class _Results:
    """Known results: bytes in the cache, failures of this run, permanent failures of earlier runs."""

    def __init__(self, folder: Path, policy: FetchPolicy, retry_failed: bool) -> None:
        self.folder = folder
        self.failed: dict[str, Fetched] = {}  # by `hide_secrets` of the URL: failures.jsonl holds no signature
        # Other limits may give another result, so a failure counts only under the limits that it happened under.
        self.limits = f"{policy.max_bytes} bytes, {policy.redirects} redirects, variants {policy.variants}"
        with disk_errors_as_user_errors(folder):
            (folder / "partial").mkdir(parents=True, exist_ok=True)
            # A lock tells a killed run's file from that of a run beside this one.
            for part in (folder / "partial").iterdir():
                with suppress(FileNotFoundError), part.open("ab") as file:  # another run's, finished meanwhile
                    if time.time() - os.fstat(file.fileno()).st_mtime > STALE and try_lock(file):
                        part.unlink()
            failures = folder / "failures.jsonl"
            self.file = failures.open("ab+", buffering=0)  # one write a line: parallel runs do not mix lines
            self._read = 0  # bytes of it that have been read
            if retry_failed:
                self._read = self.file.seek(0, os.SEEK_END)  # other runs' failures from here on count
            if not self.read_failures():
                self.file.write(b"\n")  # ends the torn line of a killed run

    def read_failures(self) -> bool:
        """Read the lines written since the last call, also by other runs; False where the last line is torn."""
        size = os.fstat(self.file.fileno()).st_size
        lines = os.pread(self.file.fileno(), max(0, size - self._read), self._read)
        for line in lines.splitlines(keepends=True):
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # the torn line of a killed run
                row = json.loads(line)
                if row["limits"] == self.limits:
                    self.failed[hide_secrets(row["url"])] = Fetched(row["url"], None, row["reason"], row["detail"])
        self._read += lines.rfind(b"\n") + 1
        return not lines or lines.endswith(b"\n")

    def known(self, url: str) -> Fetched | None:
        """Return the result for `url`, None if it has to be fetched."""
        path = cached_path(url, self.folder)
        with suppress(FileNotFoundError):
            if path.stat().st_size:  # none is stored empty, but a power cut can leave one so
                return Fetched(url, path, None, "")
        failure = self.failed.get(hide_secrets(url))
        return failure and Fetched(url, None, failure.reason, failure.detail)

    def add_failure(self, failure: Fetched) -> None:
        """Remember a failure for this run and, if it is permanent, for later ones."""
        name = hide_secrets(failure.url)
        self.failed[name] = failure
        if PERMANENT.fullmatch(failure.reason or "") and not TRANSIENT.fullmatch(failure.reason or ""):
            row = {"url": name, "reason": failure.reason, "detail": hide_secrets(failure.detail), "limits": self.limits}
            with disk_errors_as_user_errors(self.folder):
                self.file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def _network(results: _Results, policy: FetchPolicy) -> Iterator[Callable[[str], Future[Fetched]]]:
    """Run a client on an event loop in another thread; yield a function that starts fetching one URL there."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="fetch", daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    client = _Client(results, policy)
    run(client.sessions.__aenter__()).result()
    try:
        yield lambda url: run(client.obtain(url))
    finally:
        run(client.close()).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Client:
    """Sessions and limits of one `fetch`; runs on the network thread."""

    def __init__(self, results: _Results, policy: FetchPolicy) -> None:
        self.results, self.folder, self.policy = results, results.folder, policy
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
        """Fetch a URL into the cache, unless another run has done so while its lock was waited for."""
        async with self._locked(url):
            self.results.read_failures()
            if result := self.results.known(url):
                return result
            try:
                body = await self._best(web_url(url))
            except BadSample as bad:
                failure = Fetched(url, None, bad.reason, bad.detail)
                self.results.add_failure(failure)
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
                is_held = try_lock(file)
                # Without the lock after that time: the worst is that two runs request one URL.
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
        """Return the body at a URL, or at the first of its variants that exists."""
        *variants, last = variants_of(url) if self.policy.variants else [url]
        for variant in variants:
            try:
                return await self._get(variant)
            except BadSample as bad:
                if bad.reason not in ("http-404", "placeholder"):
                    raise
        return await self._get(last)

    async def _get(self, url: URL) -> bytes:
        """Return the body at a URL, after retries and redirects."""
        return await with_retries(lambda: self._try(url), self.policy)

    async def _try(self, url: URL) -> bytes:
        """Try once, over all redirects; the time waited for a free connection is not counted."""
        left = self.policy.timeout

        async def request(url: URL) -> bytes | URL:
            nonlocal left
            gate = self.gates.setdefault(url.host or "", asyncio.Semaphore(self.policy.per_host))
            async with gate, self.slots:
                began = time.monotonic()
                async with asyncio.timeout(left):
                    answer = await get(self.sessions.of(url), url, self.policy.max_bytes)
                left -= time.monotonic() - began
            return answer

        return await follow_redirects(request, url, self.policy)
