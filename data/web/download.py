"""Download one large body to a file: streamed, bounded, resumed where a cut connection or a killed run left it.

`data.web.fetch` fetches small bodies, which are held in memory until they are whole.
"""

from __future__ import annotations

import asyncio
import errno
import re
import shutil
import time
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import aiohttp
from yarl import URL

from data.batch import BadSample
from data.progress import DownloadProgress
from data.reading import read_text
from data.shards.tar import BLOCK, END, is_header
from data.web.fetched import disk_errors_as_user_errors
from data.web.guard import BadStatus, Sessions, encoding_of, redirect_target
from data.web.limits import FetchPolicy
from data.web.policy import follow_redirects, with_retries

LEAST_BYTES = 1 << 20  # a try that brings fewer in `policy.timeout` seconds ends, for servers that drip bytes
PIECE = 1 << 18
SENDABLE = re.compile(r"(?!W/)[ -~]+")  # not weak, and nothing but printable ASCII
CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class Downloader:
    """Downloads files over shared sessions, under one policy, with one progress display."""

    def __init__(self, sessions: Sessions, policy: FetchPolicy, progress: DownloadProgress) -> None:
        self.sessions, self.policy, self.progress = sessions, policy, progress

    async def persist(self, url: URL, part: Path, max_bytes: int, is_tar: bool = False) -> None:
        """Download the file at a URL to `part`, which may hold its beginning. Raises BadSample, UserError.

        Tried until it is whole. A try counts against `retries` only if it brought nothing of its version beyond what
        an earlier one had (a server may name another version in each answer), or if the tries together are slower than
        LEAST_BYTES in `policy.timeout` seconds.
        """
        begin, version = _begun(part)
        most_of: dict[str, int] = {version: begin} if begin else {}  # bytes that a try has brought, by version
        milestone, reached_at = begin, time.monotonic()

        async def request(url: URL) -> URL | None:
            async with asyncio.timeout(self.policy.timeout) as limit:
                return await self._get(url, part, max_bytes, is_tar, limit)

        def has_advanced() -> bool:
            nonlocal milestone, reached_at
            version, size = read_seal(part).version, _size(part)
            is_another = bool(most_of) and version not in most_of
            before = most_of.get(version, 0)
            most_of[version] = max(size, before)
            if is_another or size >= milestone + LEAST_BYTES:
                milestone, reached_at = size, time.monotonic()
            return size > before and not is_another and time.monotonic() < reached_at + self.policy.timeout

        await with_retries(lambda: follow_redirects(request, url, self.policy), self.policy, has_advanced)

    async def is_current(self, url: URL, version: str) -> bool:
        """Return whether the file at a URL still has the `version` that `validator_path` holds. Raises BadSample."""
        name = "If-None-Match" if version.startswith('"') else "If-Modified-Since"

        async def request(url: URL) -> URL | bool:
            async with asyncio.timeout(self.policy.timeout):
                async with self.sessions.of(url).get(url, allow_redirects=False, headers={name: version}) as response:
                    if (elsewhere := redirect_target(response)) is not None:
                        return elsewhere
                    if response.status not in (200, 304):
                        raise BadStatus(response)
                    return response.status == 304 or _validator(response) == version

        return await with_retries(lambda: follow_redirects(request, url, self.policy), self.policy)

    async def _get(self, url: URL, part: Path, max_bytes: int, is_tar: bool, limit: asyncio.Timeout) -> URL | None:
        """Append one answer to the bytes in `part`; or return the URL it redirects to."""
        begin, version = _begun(part)
        headers = {"Range": f"bytes={begin}-", "If-Range": version} if begin else {}
        async with self.sessions.of(url).get(url, allow_redirects=False, headers=headers) as response:
            if (elsewhere := redirect_target(response)) is not None:
                return elsewhere
            if begin and response.status in (401, 403, 410):  # the next try asks for a new one
                raise BadSample("short-body", f"http-{response.status} in the middle: a signature has perhaps expired")
            if response.status not in (200, 206, 416):  # whatever the body
                raise BadStatus(response)
            total = read_seal(part).total
            if begin and response.status == 416 and response.headers.get("Content-Range") == f"bytes */{begin}" \
                    and total == begin:
                return None  # nothing was left to fetch
            span = _span(response)
            is_rest = (response.status == 206 and _validator(response) == version and span is not None
                       and span.begin == begin and span.total in (None, total))
            if response.status != 200 and not is_rest:  # a part of another version: begin again with the first byte
                part.unlink(missing_ok=True)
                raise BadSample("short-body", "the server answers with another part than was asked for")
            begin = begin if response.status == 206 else 0
            total = total if begin else response.content_length
            if encoding_of(response) != "identity":
                raise BadSample("bad-encoding", "shards must be sent as they are")
            _refuse_if_too_large(begin + (response.content_length or 0), max_bytes)
            self.progress.expect(response.content_length or 0)
            with disk_errors_as_user_errors(part.parent):
                _refuse_if_no_room(part.parent, response.content_length or 0)
                if not begin:
                    part.unlink(missing_ok=True)  # also a link or a pipe, which would be written into
                    write_seal(part, Seal(_validator(response), total))
                file = open(part, "ab" if begin else "xb", buffering=0)
            with file:
                try:
                    await self._save(response, file, begin, max_bytes, is_tar, limit)
                except BaseException:
                    if total is None:  # a part of unknown size cannot be resumed, see `_begun`
                        part.unlink(missing_ok=True)
                    raise
            if total is not None and _size(part) != total:
                if _size(part) > total:
                    part.unlink(missing_ok=True)
                raise BadSample("short-body", f"the server sent another number of bytes than the {total:,} it named")
        return None

    async def _save(self, response: aiohttp.ClientResponse, file: FileIO, size: int, max_bytes: int, is_tar: bool,
                    limit: asyncio.Timeout) -> None:
        """Write the body of an answer to a file of `size` bytes; `limit` is extended with every LEAST_BYTES."""
        milestone = size + LEAST_BYTES
        last = b""
        async for piece in _pieces(response, is_tar and not size):
            last = (last + piece)[-len(END):]
            size += len(piece)
            _refuse_if_too_large(size, max_bytes)
            with disk_errors_as_user_errors(Path(file.name).parent):
                file.write(piece)
            self.progress.add_bytes(len(piece))
            if size >= milestone:
                milestone = size + LEAST_BYTES
                limit.reschedule(asyncio.get_running_loop().time() + self.policy.timeout)
        # Without length or chunks a body ends when the connection does, and a cut one looks whole: a tar's end tells.
        if is_tar and response.content_length is None and "Transfer-Encoding" not in response.headers and last != END:
            raise BadSample("short-body", "it ends without the mark of a tar's end")


async def _pieces(response: aiohttp.ClientResponse, is_tar: bool) -> AsyncIterator[bytes]:
    """Yield the body in pieces; `is_tar` checks its first header before anything is stored. Raises BadSample."""
    if is_tar:
        head = b""
        while len(head) < BLOCK and (more := await response.content.read(BLOCK - len(head))):
            head += more
        if not is_header(head) and head != bytes(BLOCK):  # which an empty tar starts with
            raise BadSample("not-tar", f"it starts with {head[:16]!r}")
        yield head
    async for piece in response.content.iter_chunked(PIECE):
        yield piece


def validator_path(part: Path) -> Path:
    """Return the path of the file that holds version and size of a file, or of a part of it."""
    return part.with_name(part.name + ".seal")


class Seal(NamedTuple):
    """Version (see `_validator`) and size of a file as the server gave them; None: no size."""

    version: str
    total: int | None


def write_seal(path: Path, seal: Seal) -> None:
    """Record version and size of a file, or of a part of it."""
    total = "" if seal.total is None else f"\n{seal.total}"
    validator_path(path).unlink(missing_ok=True)
    validator_path(path).write_text(seal.version + total, encoding="utf-8")


def read_seal(path: Path) -> Seal:
    """Return what `write_seal` recorded of a file; no version and no size where nothing is recorded."""
    try:
        version, _, total = read_text(validator_path(path)).partition("\n")
    except (OSError, ValueError):
        return Seal("", None)
    return Seal(version, int(total) if total.isdecimal() else None)


def is_whole(path: Path) -> bool:
    """Return whether a fetched file exists and has its recorded size."""
    total = read_seal(path).total
    return path.is_file() and total in (None, path.stat().st_size)


class Span(NamedTuple):
    """The bytes in an answer to a request for a part, and those of the whole; None: not said."""

    begin: int
    total: int | None


def _span(response: aiohttp.ClientResponse) -> Span | None:
    """Return what Content-Range says; None where it says nothing that fits the rest of the answer."""
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None:
        return None
    begin, end, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    length = response.content_length
    if end < begin or (length is not None and length != end + 1 - begin) or (total is not None and end >= total):
        return None
    return Span(begin, total)


def _begun(part: Path) -> tuple[int, str]:
    """Return the number of bytes to resume behind, and their version.

    0 where the version or the size of the whole file is unknown: nothing could show then that the rest is complete.
    """
    version, total = read_seal(part)
    return (_size(part) if version and total is not None else 0), version


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() and not part.is_symlink() else 0


def _validator(response: aiohttp.ClientResponse) -> str:
    """Return the version of an answer as If-Range takes it (RFC 9110, 13.1.5): a strong ETag, else a date, else "".

    A value that could not be sent back, such as a tag that is not ASCII, is passed over.
    """
    for name in ("ETag", "Last-Modified"):
        version = response.headers.get(name, "")
        if SENDABLE.fullmatch(version):
            return version
    return ""


def _refuse_if_no_room(folder: Path, more: int) -> None:
    """Raise OSError if a disk has fewer than `more` bytes free: a full one would end other programs too."""
    if more > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{more:,} bytes are to come, which is more than the disk has free")


def _refuse_if_too_large(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BadSample("too-large", f"{size:,} bytes, {max_bytes:,} allowed")
