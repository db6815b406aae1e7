"""Object stores and other file systems through fsspec: list, stat, read a range, open as a stream.

Addresses are SCHEME://PLACE/KEY. http(s) is not read here: it has a client of its own, with an address guard.
A driver's errors become one UserError line that names the address without what follows a "?".
"""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from data.batch import BadSample, UserError
from data.prefetch import threaded_map
from data.reading import BlockStream
from data.text import without_secrets

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# scheme -> the package that reads it. Others that fsspec knows (ssh, zip, github, local …) are not taken.
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
            "abfss": "adlfs", "hf": "huggingface_hub", "memory": "fsspec"}
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "blob_id", "LastModified", "last_modified",
            "mtime", "created")  # keys of a file's version in drivers' answers; the first present one counts
BLOCK = 8 << 20  # bytes of one request of a stream
AHEAD = 2  # blocks requested before they are needed
RETRIES = 5  # further tries of a request after a failure that may pass
BACKOFF = 0.5  # seconds before the second try; doubled for each further one, times a random 0.5 to 1.5
Answer = TypeVar("Answer")


class Entry(NamedTuple):
    """A file or folder of a store. `version` is "" if the driver has none."""

    address: str
    size: int
    version: str
    is_folder: bool = False

    @property
    def name(self) -> str:
        """The last part of the address."""
        return public_name(self.address).rstrip("/").rpartition("/")[2]


class RemoteFile(NamedTuple):
    """A file at an address, and its local counterpart: the copy of a table, the manifest of a shard."""

    address: str
    path: Path

    @property
    def name(self) -> str:
        """The last part of the address."""
        return public_name(self.address).rpartition("/")[2]


class Changed(UserError):
    """A file that was replaced while it was read."""


def scheme_of(address: str) -> str:
    """Return the scheme of an address in lower case; "" for a path."""
    scheme, separator, _ = address.partition("://")
    return scheme.lower() if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else ""


def is_stored(address: str) -> bool:
    """Return whether an address is read through fsspec."""
    return scheme_of(address) in PACKAGES


def public_name(address: str) -> str:
    """Return the address as messages show it, without a query or credentials."""
    return without_secrets(address).partition("?")[0]


def parent(address: str) -> str:
    """Return the folder that a file lies in, without a slash at its end."""
    return address.partition("?")[0].rstrip("/").rpartition("/")[0]


def stat(address: str) -> Entry:
    """Return the present size and version of a file. Raises UserError, also for a folder."""
    with _readable_errors(address):
        files, path = _open_filesystem(address)
        files.invalidate_cache(path)  # fsspec keeps listings for the whole process: a changed file would look as before
        entry = _entry(address, files.info(path))
    if entry.is_folder:
        raise UserError(f"{public_name(address)} is a folder, not a file")
    return entry


def is_folder(address: str) -> bool:
    """Return whether an address is a folder. Raises UserError if there is nothing."""
    with _readable_errors(address):
        files, path = _open_filesystem(address)
        files.invalidate_cache(path)
        return str(files.info(path.rstrip("/")).get("type")) == "directory"


def list_folder(address: str) -> list[Entry]:
    """Return the files and folders in a folder by name, without hidden ones. Raises UserError."""
    base = address.rstrip("/")
    with _readable_errors(address):
        files, path = _open_filesystem(base)
        files.invalidate_cache(path)
        own = path.rstrip("/")
        names: dict[str, dict[str, object]] = {}
        for info in files.ls(path, detail=True):
            listed = str(info["name"]).rstrip("/")
            if listed != own:  # S3 lists an empty object of the folder's own name in it
                names[listed.rpartition("/")[2]] = info
    return [_entry(f"{base}/{name}", names[name]) for name in sorted(names) if name and not name.startswith(".")]


def expand(pattern: str) -> list[str]:
    """Return the sorted addresses of the files that match a pattern with *. Raises UserError if there is none."""
    base = parent(pattern[: pattern.index("*")] + "x")
    with _readable_errors(pattern):
        files, path = _open_filesystem(base)
        files.invalidate_cache(path)
        paths = files.glob(_open_filesystem(pattern)[1])
    own = path.rstrip("/") + "/"
    addresses = [f"{base}/{str(name).removeprefix(own)}" for name in sorted(paths)]
    if not addresses:
        raise UserError(f"{public_name(pattern)}: no such file; the pattern asks for it")
    return addresses


def read(address: str, max_bytes: int) -> bytes:
    """Return the bytes of a file, in any thread. Raises BadSample, also for more than `max_bytes`."""
    with _as_bad_sample(address):
        data = _with_retries(lambda: _cat(address, 0, max_bytes + 1))
    if len(data) > max_bytes:
        raise BadSample("too-large", f"{public_name(address)}: more than {max_bytes} bytes")
    return data


def read_if_there(address: str, max_bytes: int) -> bytes | None:
    """Return `read`; None where the file is missing or may not be read. Raises BadSample."""
    try:
        return read(address, max_bytes)
    except BadSample as problem:
        # The driver's own error: `_as_bad_sample` raises from a UserError, which is raised from it. S3 answers 403, not
        # 404, for a missing file in a bucket that this account may not list.
        driver_error = problem.__cause__ and problem.__cause__.__cause__
        if isinstance(driver_error, (FileNotFoundError, PermissionError)):
            return None
        raise


def read_range(address: str, offset: int, size: int) -> bytes:
    """Return exactly `size` bytes from `offset` on, in any thread. Raises BadSample."""
    def attempt() -> bytes:
        data = _cat(address, offset, size)
        if len(data) < size:
            raise _ShortAnswer(f"{len(data)} of the {size} bytes at {offset} came")
        return data

    with _as_bad_sample(address):
        return _with_retries(attempt)


def open_stream(address: str, expected: Entry | None = None) -> BinaryIO:
    """Open a file to be read once from its beginning to its end, blocks being requested ahead.

    A request that fails is repeated from the byte that was reached. The last block comes only if the file has the
    size and version that it had at the beginning (those `expected`, if given): raises Changed, else UserError.
    """
    entry = stat(address)
    if expected is not None and entry != expected:
        raise Changed(f"{public_name(address)} has changed; run again")
    blocks = threaded_map(partial(_fetch_block, entry), range(0, entry.size, BLOCK), AHEAD, AHEAD)
    return io.BufferedReader(BlockStream(blocks), buffer_size=1 << 16)


class _ShortAnswer(OSError):
    """Fewer bytes than were asked for."""


def _fetch_block(entry: Entry, start: int) -> bytes:
    """Return the block of a file that begins at `start`. Raises UserError."""
    address, stop = entry.address, min(start + BLOCK, entry.size)
    parts: list[bytes] = []

    def rest() -> None:
        """Fetch the bytes that are missing; those of an earlier try are kept."""
        at = start + sum(map(len, parts))
        parts.append(_cat(address, at, stop - at))
        if len(parts[-1]) < stop - at:
            raise _ShortAnswer(f"{len(parts[-1])} of {stop - at} bytes came")

    with _readable_errors(address):
        _with_retries(rest)
    # Asked before the last block is given out: whoever has read the whole file knows that it is of one version.
    if stop == entry.size and stat(address) != entry:
        raise Changed(f"{public_name(address)} has changed while it was read; run again")
    return b"".join(parts)


def _cat(address: str, start: int, size: int) -> bytes:
    files, path = _open_filesystem(address)
    return bytes(files.cat_file(path, start=start, end=start + size))


def _open_filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the driver of an address (fsspec keeps one for each kind) and the path of the file in it."""
    from fsspec.core import url_to_fs

    scheme = scheme_of(address)
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{public_name(address)}: {scheme}:// is not read; known are {known}, https:// and file://")
    if "::" in address or public_name(address) != address.partition("?")[0]:
        raise UserError(f"{public_name(address)}: an address holds neither credentials nor '::'; the driver takes "
                        "credentials from its own settings (AWS_…, GOOGLE_…, AZURE_…, `hf auth login`)")
    return url_to_fs(scheme + address[len(scheme):])  # drivers know their scheme in lower case alone


def _entry(address: str, info: dict[str, object]) -> Entry:
    version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
    return Entry(address, int(str(info.get("size") or 0)), version, info.get("type") == "directory")


def _with_retries(attempt: Callable[[], Answer]) -> Answer:
    """Return the answer of `attempt`, which is called again after failures that may pass."""
    for tried in range(RETRIES + 1):
        try:
            return attempt()
        except Exception as error:  # drivers raise errors of many libraries
            if tried == RETRIES or _is_final(error):
                raise
            time.sleep(BACKOFF * 2**tried * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    final = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, NotImplementedError, UserError)
    return isinstance(error, final) or "Credential" in type(error).__name__


@contextmanager
def _readable_errors(address: str) -> Iterator[None]:
    """Turn whatever a driver raises into one UserError line."""
    try:
        yield
    except (UserError, BadSample):
        raise
    except Exception as error:  # drivers raise errors of many libraries
        raise UserError(f"{public_name(address)}: {_reason(address, error)}") from error


@contextmanager
def _as_bad_sample(address: str) -> Iterator[None]:
    try:
        with _readable_errors(address):
            yield
    except UserError as error:
        reason = "unreadable-file"
        if isinstance(error.__cause__, FileNotFoundError):
            reason = "missing-file"
        elif isinstance(error.__cause__, _ShortAnswer):
            reason = "truncated"
        raise BadSample(reason, str(error)) from error


def _reason(address: str, error: Exception) -> str:
    """Return the cause of a driver's error, and what to do about it."""
    scheme = scheme_of(address)
    text = " ".join(str(error).split()).replace(address, public_name(address))
    text = re.sub(r"\?\S*", "", text)[:200]  # the signature of a signed address
    if isinstance(error, ImportError):
        return f"{scheme}:// addresses are read by the package {PACKAGES[scheme]}: pip install {PACKAGES[scheme]}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file, folder or bucket"
    if isinstance(error, PermissionError) or _is_final(error):
        return f"access is refused ({text or type(error).__name__}); check the credentials of {PACKAGES[scheme]}"
    kind = "" if isinstance(error, _ShortAnswer) else f"{type(error).__name__}: "
    return f"cannot be read ({kind}{text}); check the network and the store, then run again"
