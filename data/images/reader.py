"""Image references to bytes: fetched bodies, files, ranges of files, objects in a store."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.batch import BadSample
from data.images.decode import ImageSpec, decode_image
from data.reading import NotAFile, TooLarge, read_regular
from data.shards.index import MAX_IMAGE, is_range, read_member, read_stored
from data.web.fetched import Fetched, cached_path, delete_fetched
from data.web.limits import FetchPolicy
from data.web.storage import PACKAGES, is_stored

if TYPE_CHECKING:
    import pyarrow as pa

# Errors of this machine at this moment; all others are the file's, whose row is dropped.
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Patterns of references, for `matching`: `is_url` and `is_stored` of each.
URL_START = "^(?i)https?://"
STORE_START = f"^(?i)({'|'.join(PACKAGES)})://"


@dataclass(frozen=True)
class Reader:
    """Reads image references: fetched bytes, files, and ranges of files (members of shards, embedded pictures)."""

    folder: Path  # of fetched bytes
    spec: ImageSpec
    policy: FetchPolicy
    max_pixels: int
    workers: int
    retry_failed: bool = False
    augment: bool = False  # training uses random crops

    def fetch(self, urls: Iterable[str]) -> Generator[Fetched]:
        """Fetch these URLs into the folder; yield the result of each as it arrives."""
        from data.web.fetch import fetch  # its client takes a fifth of a second to import

        return fetch(urls, self.folder, self.policy, self.retry_failed)

    def forget(self, reference: str) -> None:
        """Delete the fetched bytes of a reference that are no picture, so that a later run fetches them again."""
        if is_url(reference):
            delete_fetched(reference, self.folder)

    def fetch_and_read(self, reference: str) -> bytes:
        """Return `read` of a reference, after fetching a URL whose bytes only the cache of another node holds."""
        if is_url(reference) and not cached_path(reference, self.folder).exists():
            for _ in self.fetch([reference]):
                pass
        return self.read(reference)

    def read(self, reference: str) -> bytes:
        """Return the bytes of a reference. Raises BadSample when they are missing or cannot be read.

        Raises OSError where the machine has no file descriptor or memory left: that would drop rows by chance.
        """
        try:
            if not reference:
                raise BadSample("no-image", "the row names no image")
            if is_stored(reference):
                return read_stored(reference, self.policy.max_bytes)
            if is_url(reference):
                return read_regular(cached_path(reference, self.folder))
            return read_member(reference) if is_range(reference) else read_regular(reference, MAX_IMAGE)
        except FileNotFoundError:
            raise BadSample("missing-file", reference) from None
        except TooLarge as error:
            raise BadSample("too-large", f"{reference}: {error.strerror}") from None
        except NotAFile as error:
            raise BadSample("not-a-file", f"{reference}: {error.strerror}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise
            raise BadSample("unreadable-file", f"{reference}: {error}") from None

    def pixels(self, reference: str) -> np.ndarray:
        """Return uint8 pixels [3, S, S] of a reference. Raises BadSample."""
        return decode_image(self.read(reference), self.spec, self.max_pixels)


def matching(references: pa.LargeStringArray, pattern: str) -> np.ndarray:
    """Return which references match, bool [M]."""
    import pyarrow.compute as pc

    return pc.match_substring_regex(references, pattern).to_numpy(zero_copy_only=False)


def is_url(path: str) -> bool:
    """Return whether a reference has to be fetched."""
    return path.lower().startswith(("http://", "https://"))
