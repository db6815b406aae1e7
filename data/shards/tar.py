"""Parse a tar's headers without trusting them: its files, where their content lies, and damage.

tarfile trusts the sizes it reads; here every size is checked against the file before anything is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from data.batch import BadSample, UserError
from data.reading import open_regular

BLOCK = 512
END = bytes(2 * BLOCK)  # the mark of a tar's end
PADDING = 1 << 16  # bytes of zeros that may end a tar; more of them are a hole where samples may have been
MAX_EXTENSION = 1 << 20  # bytes of an extended header
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"(\xb5/\xfd": "zstd", b"\x04\x22M\x18": "lz4",
              b"LZIP": "lzip", b"\x1f\x9d": "compress", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7-Zip", b"Rar!": "RAR"}
NOT_A_FILE = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse"}


class SeekableFile(Protocol):
    """A file that is read at given offsets: an open one, or `data.shards.stream.ForwardFile`."""

    @property
    def name(self) -> str:
        """The name that messages have for the file."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Set where the next `read` begins; return it."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes from there."""


class Member(NamedTuple):
    """One file of a tar: where its content lies, or the fault that makes it unusable."""

    name: str
    offset: int
    size: int
    fault: BadSample | None


class _Header(NamedTuple):
    """The fields of a header whose checksum is right; nothing else is verified yet."""

    kind: bytes
    name: bytes
    size: int
    mapped: int  # of a sparse file: not 0 if its map continues in the next block


def members(file: SeekableFile, report: Callable[[str, BadSample], None]) -> Iterator[Member]:
    """Walk from header to header without reading what lies between; behind damage, from the next sound header."""
    end, at, closed = file.seek(0, os.SEEK_END), 0, False
    extra: dict[str, Any] = {}  # fields that extended headers give to the next member
    while at + BLOCK <= end:
        header = _header(read_at(file, at, BLOCK))
        if header is None:
            at, extra = _behind_damage(file, at, end, report), {}
            closed = at == end
            continue
        kind, name, size, mapped = header
        at += BLOCK
        while mapped and at + BLOCK <= end:
            mapped, at = read_at(file, at, BLOCK)[504], at + BLOCK
        if kind in b"xL":
            extra |= _extension(file, kind, at, size, end)
        elif kind not in b"gK5":  # pax defaults for all members, GNU's long name of a link's target, a folder
            name, size = extra.get("name", name), extra.get("size", size)
            label = name.decode(errors="backslashreplace")
            yield Member(label, at, size, extra.get("fault") or _fault(kind, label, size, end - at))
        if kind not in b"xLgK":
            extra = {}
        # Links, devices, folders and pipes have no content, whatever their size field says.
        if kind not in b"123456" and at + size <= end:
            at += size + -size % BLOCK
    if end < BLOCK:
        raise _no_tar(file)
    if not closed:
        report("", BadSample("damaged-shard", f"it ends at byte {end} without the mark of an end: perhaps cut off"))


def _fault(kind: bytes, name: str, size: int, there: int) -> BadSample | None:
    if kind not in b"07\0":
        return BadSample("not-a-file", f"{name[:200]} is a {NOT_A_FILE.get(kind, repr(kind))} member")
    if size > there:
        return BadSample("truncated", f"{name[:200]}: the tar ends before its {size} bytes do")
    return None


def _header(block: bytes) -> _Header | None:
    """Parse a block by POSIX ustar and GNU rules; None if its checksum or a number is wrong."""
    try:
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return _Header(block[156:157], name, size, block[482] if block[156:157] == b"S" else 0)


def is_header(block: bytes) -> bool:
    """Return whether a tar may start with these bytes."""
    return len(block) == BLOCK and _header(block) is not None


def _number(field: bytes) -> int:
    """Parse an octal number, or one in base 256 as GNU writes large ones. Raises ValueError, also if negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("not octal")
    return int(digits or b"0", 8)


def _extension(file: SeekableFile, kind: bytes, at: int, size: int, end: int) -> dict[str, Any]:
    """Return name, size and fault that an extended header (L: GNU's long name, x: pax) gives to the next member."""
    if size > MAX_EXTENSION or at + size > end:
        return {"fault": BadSample("bad-header", f"extended by {size} bytes, {MAX_EXTENSION} allowed")}
    data = read_at(file, at, size)
    if kind == b"L":
        return {"name": data.partition(b"\0")[0]}
    fields: dict[str, Any] = {}
    try:
        for key, value in _pax_records(data):
            if key.startswith(b"GNU.sparse."):
                fields["fault"] = BadSample("not-a-file", "a sparse member")
            if key in (b"path", b"GNU.sparse.name"):
                fields["name"] = value
            if key == b"size":
                fields["size"] = _decimal(value)
    except ValueError as error:
        return {"fault": BadSample("bad-header", f"damaged pax records: {error}")}
    return fields


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records "LENGTH KEY=VALUE\\n" of a pax header. Raises ValueError."""
    at = 0
    while at < len(data):
        space = data.index(b" ", at, at + 8)
        stop = at + _decimal(data[at:space])
        key, equals, value = data[space + 1 : stop - 1].partition(b"=")
        if not equals or data[stop - 1 : stop] != b"\n":
            raise ValueError(f"no record ends at byte {stop}")
        yield key, value
        at = stop


def _decimal(digits: bytes) -> int:
    if not digits.isdigit():
        raise ValueError("not a number")
    return int(digits)


def _behind_damage(file: SeekableFile, at: int, end: int, report: Callable[[str, BadSample], None]) -> int:
    """Return the offset of the next header, or `end`; report the bytes before it unless they end a tar (zeros)."""
    start = at
    blank = True
    while at + BLOCK <= end and _header(block := read_at(file, at, BLOCK)) is None:
        blank = blank and not block.strip(b"\0")
        at += BLOCK
    at = end if at + BLOCK > end else at
    if blank and at == end and end - start <= PADDING:
        return end
    if start == 0 and at == end:
        raise _no_tar(file)
    report("", BadSample("damaged-shard", f"bytes {start} to {at} hold no header; samples there are lost"))
    return at


def _no_tar(file: SeekableFile) -> UserError:
    start = read_at(file, 0, min(file.seek(0, os.SEEK_END), 4))
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            return UserError(f"{file.name} is compressed with {program}; uncompress it, shards must be plain tar files")
    return UserError(f"{file.name} is {'no tar file' if start else 'empty'}; make or download it again")


def open_tar(path: str | Path) -> BinaryIO:
    """Open a tar to seek from header to header, with little read ahead. Raises OSError, also for no regular file."""
    return open_regular(path, buffering=8 * BLOCK)


def read_at(file: SeekableFile, offset: int, size: int) -> bytes:
    """Return exactly these bytes, which lie inside the file. Raises OSError if it has become shorter."""
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError(f"{file.name} has become shorter while it was read")
    return data
