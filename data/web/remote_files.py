"""Shards and tables at http(s) addresses to local files, each fetched once, whatever the number of ranks and runs.

A file streams to disk, so memory stays flat; it is resumed where a cut connection or a killed run left it, and gets its
name when it is whole. A table is fetched again if the server has another version. Addresses are checked as those of
thumbnails are (`data.web.guard`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from data.batch import BadSample, UserError
from data.files import fsync
from data.locks import try_lock
from data.progress import DownloadProgress
from data.shards.index import MAX_INDEX, expand_braces, indexed, sidecar, tar_digest
from data.shards.tar import open_tar
from data.text import unsigned
from data.web.download import Downloader, Seal, is_whole, read_seal, validator_path, write_seal
from data.web.fetched import disk_errors_as_user_errors
from data.web.guard import Sessions, web_url
from data.web.limits import TRANSIENT, FetchPolicy, unused_proxy
from data.web.storage import RemoteFile, public_name

MAX_SHARD = 1 << 36  # bytes; larger files are refused
AT_ONCE = 4  # shards under way in one process
POLL_S = 0.2  # between checks of a shard that another process is fetching
ADVICE = {  # what to do about a reason; the first that matches counts
    TRANSIENT.pattern: "run again to go on where it stopped, or leave it out of the pattern",
    "http-40[013]|http-410": "a signed address expires: give one that is signed anew as --dataset, also to resume (no "
                             "file of a run keeps it); where a login is needed, download it and pass its folder",
    "http-4..": "mend the address, or leave it out of the pattern",
    "not-tar": "see in a browser what the address answers: it may be a page that asks for a login",
    "forbidden-address|tls": "mend the address or the server, or download it and pass its folder",
    ".*": "mend the server, or leave it out of the pattern"}


def fetch_files(pattern: str, folder: Path, policy: FetchPolicy, log: Callable[[str], None]) -> list[Path | RemoteFile]:
    """Return the local paths, in order, of the files at http://HOST/{train,valid}-{000..009}.tar, fetched if need be.

    Tables come with their addresses, below which their images are. Shards in `folder` are not requested again; files
    that another process is fetching are waited for. Raises UserError at the first that cannot be fetched; the others
    stay.
    """
    if "*" in pattern:
        raise UserError(f"{public_name(pattern)}: a server cannot be asked what * stands for; write a range such as "
                        "{000..009}")
    if "::" in pattern:
        raise UserError(f"{public_name(pattern)}: several addresses are written as {{a,b}}, not with ::")
    urls = list(dict.fromkeys(expand_braces(pattern)))
    paths = {}
    for url in urls:
        name = web_name(url)
        paths[url] = folder / hashlib.sha256(unsigned(url).encode()).hexdigest()[:32] / name
    missing = [(url, path) for url, path in paths.items() if not (_is_shard(path) and is_whole(path))]
    for url, path in missing:
        if path.exists() and not is_whole(path):
            log(f"{public_name(url)} is not as it was fetched, perhaps cut: it is fetched again")
    # Each rank takes them in an order of its own, so that ranks share the work and seldom wait for one file.
    random.shuffle(missing)
    if missing and not policy.proxy and (variable := unused_proxy()):
        log(f"{variable} is set and not used: files are fetched directly; --proxy URL fetches them through a proxy")
    if missing:
        asyncio.run(_fetch_all(missing, folder, policy, log))
    return [path if _is_shard(path) else RemoteFile(url, path) for url, path in paths.items()]


def web_name(url: str) -> str:
    """Return the file name in the address of a shard or a table. Raises UserError."""
    try:
        name = web_url(url).name
    except BadSample as bad:
        raise UserError(f"{public_name(url)}: {bad.detail}") from None
    if "{" in url or "}" in url:
        raise UserError(f"{public_name(url)}: braces are ranges of numbers {{000..009}}, with a step {{0..8..2}}, or "
                        "lists {a,b}; write them so")
    if not re.fullmatch(r"[\w.-]{1,200}\.(tar|csv|tsv|jsonl|parquet)", name):
        raise UserError(f"{public_name(url)}: only shards (.tar) and tables (.csv .tsv .jsonl .parquet) are "
                        "read from such addresses; download other files and pass their folder")
    return name


def _is_shard(path: Path) -> bool:
    return path.suffix == ".tar"


async def _fetch_all(missing: Sequence[tuple[str, Path]], folder: Path, policy: FetchPolicy,
                     log: Callable[[str], None]) -> None:
    progress = DownloadProgress("files fetched", len(missing), log)
    slots = asyncio.Semaphore(AT_ONCE)
    async with Sessions(policy.allow_hosts, policy.proxy) as sessions:
        downloader = Downloader(sessions, policy, progress)

        async def fetch_one(url: str, path: Path) -> None:
            async with slots:
                await (_Shard(url, path, downloader).obtain() if _is_shard(path)
                       else _Table(url, path, downloader).obtain(log))
                progress()

        try:
            async with asyncio.TaskGroup() as group:
                for url, path in missing:
                    group.create_task(fetch_one(url, path))
        except BaseExceptionGroup as problems:  # the first failure has cancelled the others
            raise problems.exceptions[0] from None


class _Download:
    """One file being downloaded, to NAME.part, with its version (`validator_path`) beside it."""

    def __init__(self, url: str, path: Path, downloader: Downloader) -> None:
        self.url, self.path, self.downloader = url, path, downloader
        self.part = path.with_name(path.name + ".part")

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the file's lock; the kernel frees a killed process's."""
        with disk_errors_as_user_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{self.path}.lock", "ab")
        with lock:
            while not try_lock(lock):
                await asyncio.sleep(POLL_S)
            yield

    async def download(self, is_tar: bool) -> None:
        """Download the file to `part`. Raises BadSample, UserError."""
        await self.downloader.persist(web_url(self.url), self.part, MAX_SHARD, is_tar)

    def refuse(self, bad: BadSample) -> UserError:
        """Return the error for a file that cannot be fetched, with the reason and what to do about it."""
        advice = next(advice for reason, advice in ADVICE.items() if re.fullmatch(reason, bad.reason))
        return UserError(f"{public_name(self.url)} cannot be fetched ({bad}); {advice}")

    def keep(self) -> None:
        """Rename the complete part to its name; record its size, so that a file cut later is noticed."""
        with disk_errors_as_user_errors(self.path.parent):
            write_seal(self.part, Seal(read_seal(self.part).version, self.part.stat().st_size))
            os.replace(fsync(self.part), self.path)
            os.replace(fsync(validator_path(self.part)), validator_path(self.path))
            fsync(self.path.parent)


class _Table(_Download):
    """A table, which is fetched again if the server has another version than that of the file."""

    async def obtain(self, log: Callable[[str], None]) -> None:
        """Fetch the table if need be. Raises UserError."""
        async with self.locked():
            try:
                if is_whole(self.path):
                    url, old = web_url(self.url), read_seal(self.path).version
                    if old and await self.downloader.is_current(url, old):
                        return
                    if old:
                        log(f"{public_name(self.url)} has changed since it was fetched: it is fetched again")
                    self.part.unlink(missing_ok=True)
                await self.download(is_tar=False)
            except BadSample as bad:
                raise self.refuse(bad) from None
            self.keep()


class _Shard(_Download):
    """A shard, which does not change."""

    async def obtain(self) -> None:
        """Fetch the shard if need be. Raises UserError."""
        async with self.locked():
            if not is_whole(self.path):
                await self._fetch()

    async def _fetch(self) -> None:
        try:
            await self.download(is_tar=True)
            await self._index()
        except BadSample as bad:
            raise self.refuse(bad) from None
        self.keep()

    async def _index(self) -> None:
        """Fetch the index of the shard, if the server has one that fits, so that no run has to scan the tar.

        The index also holds the digest of the tar, which is checked. Raises BadSample.
        """
        part = sidecar(self.part)
        url = web_url(self.url)
        try:
            await self.downloader.persist(url.with_path(url.path + ".index.json", keep_query=True), part, MAX_INDEX)
            with open_tar(self.part) as file:
                index = indexed(self.part, file)
        except BadSample:
            index = None
        validator_path(part).unlink(missing_ok=True)
        if index is None:
            part.unlink(missing_ok=True)
            return
        with open(self.part, "rb") as whole:
            if hashlib.file_digest(whole, "sha256").hexdigest() != tar_digest(index):
                self.part.unlink()
                raise BadSample("bad-digest", "its bytes are not those that its index was written with")
        part.replace(sidecar(self.path))
