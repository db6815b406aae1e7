"""Read the samples of a tar that comes as a stream, with all checks of `data.shards.tar`, in flat memory.

`members` and `row` seek to each header, then back to the texts of a complete sample. `ForwardFile` reads forward only
and keeps the bytes that they seek back to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.batch import BadSample, UserError
from data.shards.samples import (
    CLASS_FILES,
    IMAGES,
    MAX_IMAGE,
    MAX_TEXT,
    class_names_beside,
    parse_class_names,
    row,
    samples,
)
from data.shards.tar import BLOCK, Member, members, read_at
from data.web.storage import is_stored, parent, public_name, read_if_there

MAX_HELD = 2 * MAX_IMAGE  # bytes of the files of one sample that are kept until it is complete
SKIP = 1 << 20  # bytes read at once where nothing is kept


class StreamedSample(NamedTuple):
    """A sample: its values of `index.COLUMNS`, and the bytes of its image."""

    values: tuple[Any, ...]
    image: bytes


class ForwardFile:
    """A tar of known size over a stream; only the first block, the last one and held members can be read again."""

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self.name = name
        self._stream, self._size, self._at = stream, size, 0
        self._read = 0  # bytes that the stream has given
        self._first = self._last = b""
        self._held: dict[int, bytes] = {}  # offset -> content
        self._held_bytes = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set where the next `read` begins; return it."""
        self._at = offset + (self._size if whence == os.SEEK_END else 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the bytes there. Raises BadSample (too-large) for content that was not held."""
        at = self._at
        if size == 0:
            return b""
        if at in self._held and len(self._held[at]) == size:
            return self._held[at]
        if at < self._read:
            return self._reread(at, size)
        self._skip(at - self._read)
        data = self._take(size)
        # Kept for `_no_tar`, which looks at the first bytes, and `_behind_damage`, which reads a header twice.
        self._first = self._first if at else data
        self._last = data[-BLOCK:]
        return data

    def hold(self, member: Member) -> None:
        """Keep the content of a member, which begins where the stream is, until `release`."""
        if self._held_bytes + member.size <= MAX_HELD:
            self._held[member.offset] = read_at(self, member.offset, member.size)
            self._held_bytes += member.size

    def release(self, stop: int) -> None:
        """Drop the members that begin before `stop`."""
        for offset in [offset for offset in self._held if offset < stop]:
            self._held_bytes -= len(self._held.pop(offset))

    def skip_rest(self) -> None:
        """Read to the end. Raises OSError if the stream ends early."""
        self._skip(self._size - self._read)

    def _reread(self, at: int, size: int) -> bytes:
        start = self._read - len(self._last)
        if at >= start and at + size <= self._read:
            return self._last[at - start :][:size]
        if at + size <= len(self._first):
            return self._first[at : at + size]
        raise BadSample("too-large", f"the files of a sample have more than {MAX_HELD} bytes, or it is damaged")

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._take(min(count, SKIP)))

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < min(size, self._size - self._read):
            raise OSError(f"{self.name} has become shorter while it was read")
        self._read += len(data)
        return data


def class_names(shard: str) -> list[str]:
    """Return the class names of a shard, as `class_names_beside` finds them, also in a store. Raises UserError."""
    if not is_stored(shard):
        return class_names_beside(Path(shard))
    for folder in filter(is_stored, (parent(shard), parent(parent(shard)))):
        for name in CLASS_FILES:
            address = f"{folder}/{name}"
            try:
                content = read_if_there(address, MAX_TEXT)
                if content is not None:
                    return parse_class_names(content.decode())
            except BadSample as problem:
                raise UserError(problem.detail) from problem
            except UnicodeDecodeError:
                raise UserError(f"{public_name(address)}: the names of classes must be UTF-8 text") from None
    return []


def stream_samples(file: ForwardFile, report: Callable[[str, BadSample], None],
                   classes: Sequence[str] = ()) -> Iterator[StreamedSample]:
    """Yield the samples of a tar in order, with their images; `report` gets the key and problem of unusable ones.

    `classes` are the names that KEY.cls has the numbers of. Raises UserError if it is no tar, OSError.
    """
    for key, files in samples(_held(members(file, report), file)):
        try:
            values = (key, *row(file, files, classes, partial(report, key)))
            sample = StreamedSample(values, read_at(file, *values[1:3]))
        except BadSample as problem:
            report(key, problem)
        else:
            yield sample
        file.release(1 + max(member.offset for member in files.values()))


def _held(members_of_tar: Iterable[Member], file: ForwardFile) -> Iterator[Member]:
    """Yield the same members, and hold the content of those that a sample may use."""
    for member in members_of_tar:
        ending = member.name.rpartition(".")[2].lower()
        if member.fault is None and 0 < member.size <= (MAX_IMAGE if ending in IMAGES else MAX_TEXT):
            file.hold(member)
        yield member
