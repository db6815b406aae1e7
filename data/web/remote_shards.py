"""Shards at http(s) addresses to local files, each fetched once, whatever the number of ranks and runs.

A shard streams to disk, so memory stays flat; it is resumed where a cut connection or a killed run left it, and gets
its name when it is whole. Addresses are checked as those of thumbnails are (`data.web.guard`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data.batch import BadSample, UserError
from data.files import try_lock
from data.progress import DownloadProgress
from data.shards.index import MAX_INDEX, expand_braces, indexed, sidecar, tar_digest
from data.shards.tar import open_tar
from data.web.download import Downloader, validator_path
from data.web.fetch import disk_errors_as_user_errors
from data.web.guard import Sessions, unused_proxy, web_url
from data.web.policy import FetchPolicy

MAX_SHARD = 1 << 36  # bytes; larger files are refused
AT_ONCE = 4  # shards under way in one process
POLL_S = 0.2  # between checks of a shard that another process is fetching


def fetch_shards(pattern: str, folder: Path, policy: FetchPolicy, log: Callable[[str], None]) -> list[Path]:
    """The local paths, in order, of the shards at http://HOST/{train,valid}-{000..009}.tar, fetched if need be.

    Those in `folder` are not requested again; those that another process is fetching are waited for. Raises UserError
    at the first that cannot be fetched; the others stay.
    """
    if "*" in pattern:
        raise UserError(f"{pattern}: a server cannot be asked what * stands for; write a range such as {{000..009}}")
    urls = list(dict.fromkeys(expand_braces(pattern)))
    paths = {}
    for url in urls:
        name = web_name(url)
        paths[url] = folder / hashlib.sha256(url.encode()).hexdigest()[:32] / name
    missing = [(url, path) for url, path in paths.items() if not path.exists()]
    random.shuffle(missing)  # an order of its own for every rank, so that they share the work and seldom wait
    if missing and not policy.proxy and (variable := unused_proxy()):
        log(f"{variable} is set and not used: shards are fetched directly; --proxy URL fetches them through a proxy")
    if missing:
        asyncio.run(_fetch_all(missing, folder, policy, log))
    return [*paths.values()]


def web_name(url: str) -> str:
    """The file name in the address of a shard. Raises UserError."""
    try:
        name = web_url(url).name
    except BadSample as bad:
        raise UserError(f"{url}: {bad.detail}") from None
    if not re.fullmatch(r"[\w.-]{1,200}\.tar", name):
        raise UserError(f"{url}: only tar shards are read from addresses; download other files and pass their folder")
    return name


async def _fetch_all(missing: Sequence[tuple[str, Path]], folder: Path, policy: FetchPolicy,
                     log: Callable[[str], None]) -> None:
    progress = DownloadProgress("shards fetched", len(missing), log)
    slots = asyncio.Semaphore(AT_ONCE)
    async with Sessions(policy.allow_hosts, policy.proxy) as sessions:
        downloader = Downloader(sessions, policy, progress)

        async def fetch_one(url: str, path: Path) -> None:
            async with slots:
                await _Shard(url, path, downloader).obtain()
                progress()

        try:
            async with asyncio.TaskGroup() as group:
                for url, path in missing:
                    group.create_task(fetch_one(url, path))
        except BaseExceptionGroup as problems:  # the first failure has cancelled the others
            raise problems.exceptions[0] from None


class _Shard:
    """One shard being downloaded, to NAME.tar.part, with its version (`validator_path`) beside it."""

    def __init__(self, url: str, path: Path, downloader: Downloader) -> None:
        self.url, self.path, self.downloader = url, path, downloader
        self.part = path.with_name(path.name + ".part")

    async def obtain(self) -> None:
        """Fetch the shard under a lock, or wait for the process that does; the kernel frees a killed process's lock."""
        with disk_errors_as_user_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{self.path}.lock", "ab")
        with lock:
            while not self.path.exists():
                if not try_lock(lock):
                    await asyncio.sleep(POLL_S)
                    continue
                if not self.path.exists():
                    await self._fetch()

    async def _fetch(self) -> None:
        try:
            await self.downloader.persist(web_url(self.url), self.part, MAX_SHARD, is_tar=True)
            await self._index()
        except BadSample as bad:
            raise UserError(f"{self.url} cannot be fetched ({bad}); run again to go on where it stopped, or leave the "
                            "shard out of the pattern") from None
        with disk_errors_as_user_errors(self.path.parent), open(self.part, "rb+") as file:
            os.fsync(file.fileno())
            os.replace(self.part, self.path)
            validator_path(self.part).unlink(missing_ok=True)

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
