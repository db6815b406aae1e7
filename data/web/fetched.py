"""Bytes that were fetched, as files under the hash of their URL; nothing here opens a connection."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data.batch import UserError
from data.text import unsigned


class Fetched(NamedTuple):
    """The result for one URL: `path` to its bytes, or a short stable `reason` with a `detail` for people."""

    url: str
    path: Path | None
    reason: str | None
    detail: str


def cached_path(url: str, folder: Path) -> Path:
    """Return the path of the bytes of `url` once they are fetched, whatever it is signed with: `folder/xx/SHA256`."""
    # 256 folders, as some file systems grow slow with millions of files in one.
    digest = hashlib.sha256(unsigned(url).encode(errors="surrogatepass")).hexdigest()
    return folder / digest[:2] / digest


def delete_fetched(url: str, folder: Path) -> None:
    """Delete the bytes kept for `url`, which are not a picture, so that the next run requests it again."""
    cached_path(url, folder).unlink(missing_ok=True)


@contextmanager
def disk_errors_as_user_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        is_in_the_way = error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENXIO)
        advice = f"remove {error.filename or folder}" if is_in_the_way else "free space"
        raise UserError(f"cannot write to {folder}: {why}; {advice} or name another --cache-dir") from error
