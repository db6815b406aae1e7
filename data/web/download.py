"""One large body -> a file: streamed to disk, bounded, gone on with where a cut connection or a killed run left it.

Small bodies, which are held in memory until they are whole, are `data.web.fetch`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path

import aiohttp
from yarl import URL

from data.batch import BadSample
from data.progress import DownloadProgress
from data.shards.tar import BLOCK, END, is_header
from data.web.fetch import PASSING, FetchPolicy, disk_errors_as_user_errors, retry_delay
from data.web.guard import BadStatus, Sessions, as_bad_sample, redirect_target

LEAST_BYTES = 1 << 20  # a try that brings fewer in `policy.timeout` seconds is over: a server that drips holds nobody
PIECE = 1 << 18


class Downloader:
    """What all downloads of a process share."""

    def __init__(self, sessions: Sessions, policy: FetchPolicy, progress: DownloadProgress) -> None:
        self.sessions, self.policy, self.progress = sessions, policy, progress

    async def persist(self, url: URL, part: Path, most: int, is_tar: bool = False) -> None:
        """Bring the file at a URL to `part`, which may hold the beginning of it. Raises BadSample, UserError.

        Tried until it is whole; only tries in a row that bring less than LEAST_BYTES count against `retries`.
        """
        tried = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                return await self._follow(url, part, most, is_tar)
            except BadSample as bad:
                if part.exists() and part.stat().st_size >= before + LEAST_BYTES:
                    tried = 0
                if tried == self.policy.retries or not PASSING.fullmatch(bad.reason):
                    raise
                await asyncio.sleep(retry_delay(tried, bad, self.policy))
            tried += 1

    async def _follow(self, url: URL, part: Path, most: int, is_tar: bool) -> None:
        """One try, over all its hops."""
        for _ in range(self.policy.redirects + 1):
            try:
                async with asyncio.timeout(self.policy.timeout) as limit:
                    elsewhere = await self._get(url, part, most, is_tar, limit)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise as_bad_sample(error) from error
            if elsewhere is None:
                return
            url = elsewhere
        raise BadSample("redirects", f"more than {self.policy.redirects}")

    async def _get(self, url: URL, part: Path, most: int, is_tar: bool, limit: asyncio.Timeout) -> URL | None:
        """One answer, put behind what is there already; or where it redirects to."""
        begin, seal = _begun(part)
        wanted = {"Range": f"bytes={begin}-", "If-Range": seal} if begin else {}
        async with self.sessions.of(url).get(url, allow_redirects=False, headers=wanted) as response:
            if (elsewhere := redirect_target(response)) is not None:
                return elsewhere
            if response.status not in (200, 206, 416):  # whatever the body
                raise BadStatus(response)
            if begin and response.status == 416 and response.headers.get("Content-Range") == f"bytes */{begin}":
                return None  # nothing was left to fetch
            if response.status != 200 and not (_validator(response) == seal and response.headers.get(
                    "Content-Range", "").startswith(f"bytes {begin}-")):  # a part of something else: start afresh
                part.unlink(missing_ok=True)
                raise BadSample("short-body", "the server answers with another part than was asked for")
            begin = begin if response.status == 206 else 0
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise BadSample("bad-encoding", "shards must be sent as they are")
            _refuse_if_too_large(begin + (response.content_length or 0), most)
            self.progress.expect(response.content_length or 0)
            with disk_errors_as_user_errors(part.parent):
                if not begin:
                    validator_path(part).write_text(_validator(response))
                file = open(part, "ab" if begin else "wb", buffering=0)
            with file:
                await self._save(response, file, begin, most, is_tar, limit)
        return None

    async def _save(self, response: aiohttp.ClientResponse, file: FileIO, size: int, most: int, is_tar: bool,
                    limit: asyncio.Timeout) -> None:
        """The body of an answer into a file; `limit` moves on with every LEAST_BYTES."""
        milestone, last = size + LEAST_BYTES, b""
        async for piece in _pieces(response, is_tar and not size):
            last = (last + piece)[-len(END):]
            size += len(piece)
            _refuse_if_too_large(size, most)
            with disk_errors_as_user_errors(Path(file.name).parent):
                file.write(piece)
            self.progress.add_bytes(len(piece))
            if size >= milestone:
                milestone = size + LEAST_BYTES
                limit.reschedule(asyncio.get_running_loop().time() + self.policy.timeout)
        if is_tar and response.content_length is None and "Transfer-Encoding" not in response.headers and last != END:
            raise BadSample("short-body", "it ends without the mark of a tar's end")


async def _pieces(response: aiohttp.ClientResponse, is_tar: bool) -> AsyncIterator[bytes]:
    """The body; before anything is stored of what `is_tar`, its first header is judged. Raises BadSample."""
    if is_tar:
        head = b""
        while len(head) < BLOCK and (more := await response.content.read(BLOCK - len(head))):
            head += more
        if not is_header(head):
            raise BadSample("not-tar", f"it starts with {head[:16]!r}")
        yield head
    async for piece in response.content.iter_chunked(PIECE):
        yield piece


def validator_path(part: Path) -> Path:
    """Where it says which version of a file a part is of."""
    return part.with_name(part.name + ".seal")


def _begun(part: Path) -> tuple[int, str]:
    """How many bytes are there to go on behind, and of which version; 0 where that cannot be told."""
    try:
        seal = validator_path(part).read_text()
        return (part.stat().st_size if seal else 0), seal
    except OSError:
        return 0, ""


def _validator(response: aiohttp.ClientResponse) -> str:
    """What If-Range takes (RFC 9110, 13.1.5): a strong ETag or else a date; "" for none."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag


def _refuse_if_too_large(size: int, most: int) -> None:
    if size > most:
        raise BadSample("too-large", f"{size:,} bytes, {most:,} allowed")
