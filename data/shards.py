"""WebDataset tar shards: read, write, index.

A sample is a run of files KEY.ENDING, KEY going up to the first dot of the base name: an image, its title (KEY.txt, or
"title" or "caption" in KEY.json) and perhaps a negative ("title_neg" or "negative" in KEY.json). What a tar says is not
trusted: nothing is extracted, names are labels, and headers are parsed here because tarfile believes their sizes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from data.batch import BadSample, UserError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 512
END = bytes(2 * BLOCK)
PADDING = 1 << 16  # bytes of zeros that may end a tar; more of them are a hole where samples may have been
MAX_TEXT = 1 << 20  # bytes of a title, of a JSON file, of an extended header
MAX_IMAGE = 1 << 26
MAX_KEY = 1000  # characters, of what is written
MAX_INDEX = 1 << 28
MAX_SHARDS = 1_000_000  # that one pattern may name
HANDLES = 64  # tars kept open
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str)  # the title 1984 is text, and no number costs minutes
IMAGES = {  # ending -> how such a file begins, where `ShardWriter` gives it that ending
    "jpg": rb"\xff\xd8\xff", "jpeg": None, "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP", "gif": rb"GIF8[79]a",
    "bmp": rb"BM", "avif": rb"....ftyp.{0,60}avi[fs]", "tif": rb"II[*+]\0|MM\0[*+]", "tiff": None}
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zX": "xz", b"(\xb5/\xfd": "zstd"}
NOT_A_FILE = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse"}
# Keys that the webdataset package reads back as they are, and that nobody's extraction takes out of its folder.
KEY = re.compile(r"(?!__[^/]*__/)((?!\.{1,2}/)[^\0-\x1f\ud800-\udfff/]+/)*[^\0-\x1f\ud800-\udfff./]+")
REFERENCE = re.compile(r"([^\0]+)#([0-9]{1,18})\+([1-9][0-9]{0,17})")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
COLUMNS = ("key", "image_offset", "image_size", "title", "title_neg")
INDEX = (*COLUMNS, "sha256")
FORMAT = "thumbtune shard index 1"
Ledger = Callable[[dict[str, Any]], None]


def read_index(path: Path, ledger: Ledger | None = None) -> pa.Table:
    """The samples of a shard in order, without reading an image: key, image_offset, image_size, title, title_neg.

    int64 offsets and sizes are bytes of the tar; `title_neg` is null where there is none. `ledger` is told each sample
    dropped: {"shard", "key", "reason", "detail"}; with the key "" it is told of damage that may have hidden samples.
    A sidecar index that fits is believed instead: an edit that keeps the tar's size and all bytes its index sampled is
    seen by `check_shard` only. Raises UserError if the file is no tar, OSError.
    """
    with _open(path) as file:
        table = _indexed(path, file)
        table = _scanned(path, file, ledger) if table is None else table
    return table.select(COLUMNS).replace_schema_metadata(None)


def read_member(reference: str) -> bytes:
    """The bytes at FILE.tar#OFFSET+SIZE, in any thread.

    Raises BadSample (truncated, too-large, bad-reference), OSError.
    """
    tar, offset, size = parse_reference(reference)
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{size} bytes, {MAX_IMAGE} allowed")
    found = os.stat(tar)
    data = b""
    if offset + size <= found.st_size:
        handle = _handle(tar, found.st_dev, found.st_ino, found.st_mtime_ns)  # held until the bytes are there
        data = os.pread(handle.descriptor, size, offset)
    if len(data) < size:
        raise BadSample("truncated", f"{tar} ends before the {size} bytes at {offset} do")
    return data


class _Handle:
    """An open file, closed when neither the cache nor a thread that reads holds it any more."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


@lru_cache(HANDLES)
def _handle(path: str, *_identity: int) -> _Handle:  # another file of that name is another handle
    return _Handle(os.open(path, os.O_RDONLY))


def format_reference(tar: str | Path, offset: int, size: int) -> str:
    """FILE.tar#OFFSET+SIZE, which `read_member` reads."""
    return f"{tar}#{offset}+{size}"


def parse_reference(reference: str) -> tuple[str, int, int]:
    """The file, offset and size (at least 1) that a reference names. Raises BadSample (bad-reference)."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise BadSample("bad-reference", f"{reference[:200]!r} is not FILE.tar#OFFSET+SIZE")
    return match[1], int(match[2]), int(match[3])


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with {000..009} and {a,b} stands for, in order. Raises UserError above MAX_SHARDS."""
    names = list(islice(_expanded(pattern), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise UserError(f"{pattern} names more than {MAX_SHARDS:,} files; narrow its ranges")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    options = words.split(",") if words else (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
    for option in options:
        yield from _expanded(pattern[: match.start()] + option + pattern[match.end() :])


def check_shard(path: Path) -> list[str]:
    """What is wrong with a shard written here: any changed byte of it or its index; empty if nothing is."""
    problems: list[str] = []

    def note(loss: dict[str, Any]) -> None:
        problems.append(f"{loss['key'] or 'the tar'}: {loss['reason']}: {loss['detail']}")

    try:
        with _open(path) as file:
            scanned, index = _scanned(path, file, note), _indexed(path, file)
            if index is None:
                return [*problems, "there is no index that fits this tar"]
            if not index.select(COLUMNS).equals(scanned):
                problems.append("its index lists other samples than it holds")
            for at in range(len(index)):
                key, offset, size, digest = (index[name][at].as_py() for name in (*COLUMNS[:3], "sha256"))
                if hashlib.sha256(_read(file, offset, size)).hexdigest() != digest:
                    problems.append(f"{key}: its image is not the one that was written")
        with open(path, "rb") as whole:
            if not problems and hashlib.file_digest(whole, "sha256").hexdigest() != _tar_digest(index):
                problems.append("it has been changed, though neither in an image nor in a title")
    except (OSError, UserError) as error:
        return [str(error)]
    return problems


class ShardWriter:
    """Writes FOLDER/NAME-000000.tar, … and their indexes, the same bytes for the same samples; a context manager.

    A tar appears under its name when it and its index are safe on disk. After a kill, give a new writer the samples
    whose keys are not in `done()`, in the same order: the result is that of a run never interrupted. Leaving the block
    by an exception drops the incomplete shard. Raises UserError where another process writes, or a tar of that name is
    not a complete shard; OSError.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int = 1 << 28, max_samples: int = 10_000) -> None:
        self.folder, self.name, self.max_bytes, self.max_samples = folder, name, max_bytes, max_samples
        self._part, self._index = folder / f".{name}.part", folder / f".{name}.index.part"
        self._done: set[str] = set()
        self._number = 0
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._digest = hashlib.sha256()  # of the tar so far

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begin()
        try:
            for path in self.folder.iterdir():
                if re.fullmatch(rf"{re.escape(self.name)}-\d{{6,}}\.tar", path.name):
                    self._done.update(_keys_of_complete(path))
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._rows:
                self._finish()
        finally:
            self._abandon()

    def done(self) -> frozenset[str]:
        """The keys in complete shards, of this run and of earlier ones."""
        return frozenset(self._done)

    def write(self, key: str, image: bytes, title: str, title_neg: str | None = None,
              extra: Mapping[str, Any] | None = None) -> None:
        """Add a sample: `image` as it is, `extra` for KEY.json. Raises BadSample where it could not be read back:

        bad-key, duplicate-key, empty, not-image, too-large, bad-title, no-title, bad-json.
        """
        if len(key) > MAX_KEY or not KEY.fullmatch(key):
            raise BadSample("bad-key", f"{key[:200]!r} cannot name a sample")
        if key in self._rows or key in self._done:
            raise BadSample("duplicate-key", key)
        files = _files(image, title, {**(extra or {}), "title_neg": title_neg})
        pair = _pair(files["txt"], files["json"])  # what will be read back: BOM and last line ends go
        members, at = b"", 0
        for ending, content in sorted(files.items()):
            members += _tar_header(f"{key}.{ending}", len(content))
            at = len(members) if ending in IMAGES else at
            members += content + bytes(-len(content) % BLOCK)
        room = self.max_bytes - self._bytes - len(END)
        if self._rows and (len(self._rows) >= self.max_samples or len(members) > room):
            self._finish()
            self._begin()
        self._append(members)
        self._rows[key] = key, self._bytes - len(members) + at, len(image), *pair, hashlib.sha256(image).hexdigest()

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def _begin(self) -> None:
        self._file, self._bytes, self._digest = open(self._part, "ab+"), 0, hashlib.sha256()
        mine = False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have renamed the file after we opened it; then it is a shard, not ours to empty.
            mine = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._part))
        except (BlockingIOError, FileNotFoundError):
            pass
        if not mine:
            self._file.close()
            raise UserError(f"{self.folder}: another process is writing {self.name} shards there; wait for it")
        self._file.truncate(0)

    def _finish(self) -> None:
        while (path := self.folder / f"{self.name}-{self._number:06d}.tar").exists():
            self._number += 1
        self._append(END)
        columns = dict(zip(INDEX, zip(*self._rows.values(), strict=True), strict=True))
        body = json.dumps({"tar_sha256": self._digest.hexdigest(), **columns}, ensure_ascii=False,
                          separators=(",", ":")).encode()
        with open(self._index, "wb") as index:
            index.write(json.dumps(_seal(self._file, body)).encode() + b"\n" + body)
            index.flush()
            os.fsync(index.fileno())
        os.fsync(self._file.fileno())
        os.replace(self._index, _sidecar(path))
        _sync(self.folder)
        os.replace(self._part, path)  # this makes the shard complete
        _sync(self.folder)
        self._file.close()
        self._done.update(self._rows)
        self._rows = {}

    def _abandon(self) -> None:
        """Remove what is left of an incomplete shard; nothing after `_finish`."""
        if not self._file.closed:
            self._part.unlink(missing_ok=True)
            self._index.unlink(missing_ok=True)
            self._file.close()


def _files(image: bytes, title: str, record: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a sample by ending. Raises BadSample."""
    _check_image("the image", len(image))
    ending = next((name for name, magic in IMAGES.items() if magic and re.match(magic, image, re.DOTALL)), None)
    if ending is None:
        raise BadSample("not-image", f"starts with {image[:16]!r}")
    try:
        files = {ending: image, "json": json.dumps(record, sort_keys=True).encode(), "txt": title.encode()}
    except UnicodeEncodeError as error:
        raise BadSample("bad-title", str(error)) from None
    if max(len(files["json"]), len(files["txt"])) > MAX_TEXT:
        raise BadSample("too-large", f"more than {MAX_TEXT} bytes of text")
    return files


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mode 644, everything else zero: the same bytes on every machine and day
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


# The index beside a tar: a line that says which tar and index belong together, then the columns


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".index.json")


def _seal(file: BinaryIO, body: bytes) -> dict[str, Any]:
    """What identifies a tar (its size and 64 blocks spread over it, so no clock counts) and the body of its index."""
    size = file.seek(0, os.SEEK_END)
    sampled = b"".join(_read(file, (size - BLOCK) * i // 63, BLOCK) for i in range(64))
    return {"format": FORMAT, "tar_bytes": size, "tar_sha256_of_64_blocks": hashlib.sha256(sampled).hexdigest(),
            "index_sha256": hashlib.sha256(body).hexdigest()}


def _indexed(path: Path, file: BinaryIO) -> pa.Table | None:
    """The index beside a tar; None if there is none, it is damaged, or it does not fit this tar."""
    try:
        with _open(_sidecar(path)) as index:
            seal, _, body = _read(index, 0, min(index.seek(0, os.SEEK_END), MAX_INDEX)).partition(b"\n")
        identity = _seal(file, body)
        if json.loads(seal) != identity:
            return None
        columns = json.loads(body)
        table = _table(columns, INDEX).replace_schema_metadata({"tar_sha256": columns["tar_sha256"]})
        offset, size = (table[name].to_numpy() for name in COLUMNS[1:3])
        inside = (offset >= 0) & (size > 0) & (size <= MAX_IMAGE) & (offset <= identity["tar_bytes"] - size)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return table if inside.all() and not any(table[name].null_count for name in COLUMNS[:4]) else None


def _tar_digest(index: pa.Table) -> str:
    return index.schema.metadata[b"tar_sha256"].decode()


def _keys_of_complete(path: Path) -> list[str]:
    with _open(path) as file:
        table = _indexed(path, file)
    if table is None:
        raise UserError(f"{path}: not a complete shard, for no index fits it; remove it, or write elsewhere")
    return table["key"].to_pylist()


def _table(columns: Mapping[str, Any], names: Iterable[str]) -> pa.Table:
    import pyarrow as pa

    kinds = dict.fromkeys(COLUMNS[1:3], pa.int64())
    return pa.table({name: pa.array(columns[name], kinds.get(name, pa.string())) for name in names})


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Samples


def _scanned(path: Path, file: BinaryIO, ledger: Ledger | None) -> pa.Table:
    """`read_index` from the tar itself."""
    def tell(key: str, problem: BadSample) -> None:
        if ledger is not None:
            ledger({"shard": str(path), "key": key, "reason": problem.reason, "detail": problem.detail})

    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for key, files in _samples(_members(file, tell)):
        try:
            row = key, *_row(file, files)
        except BadSample as problem:
            tell(key, problem)
            continue
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return _table(columns, COLUMNS)


def _samples(members: Iterable[_Member]) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Neighbours of one key, by ending in lower case. A name that the sample has already starts the next sample."""
    current, files = "", dict[str, _Member]()
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not stem or not dot:  # not part of any sample, by the convention
            continue
        key, ending = folder + slash + stem, ending.lower()
        if files and (key != current or ending in files):
            yield current, files
            files = {}
        current, files[ending] = key, member
    if files:
        yield current, files


def _row(file: BinaryIO, files: Mapping[str, _Member]) -> tuple[int, int, str, str | None]:
    """Offset and size of the image, title, negative. Raises BadSample."""
    image = _choose(files, IMAGES)
    if image is None:
        raise BadSample("no-image", f"only {', '.join(files)}; the files of a sample must be neighbours"[:200])
    if image.fault is not None:
        raise image.fault
    _check_image(image.name, image.size)
    text, record = (_content(file, _choose(files, (ending,))) for ending in ("txt", "json"))
    return image.offset, image.size, *_pair(text, record)


def _choose(files: Mapping[str, _Member], endings: Iterable[str]) -> _Member | None:
    """The file that has the first of `endings` as its ending, or else as the last part of it (KEY.thumb.jpg)."""
    for ending in endings:
        if ending in files:
            return files[ending]
    others = [ending for ending in files if ending.rpartition(".")[2] in endings]
    if len(others) > 1:
        raise BadSample("ambiguous", f"which of {', '.join(others)}? A key goes up to the first dot"[:200])
    return files[others[0]] if others else None


def _content(file: BinaryIO, member: _Member | None) -> bytes | None:
    if member is None:
        return None
    if member.fault is not None:
        raise member.fault
    if member.size > MAX_TEXT:
        raise BadSample("too-large", f"{member.name[:200]}: {member.size} bytes, {MAX_TEXT} allowed")
    return _read(file, member.offset, member.size)


def _pair(text: bytes | None, record: bytes | None) -> tuple[str, str | None]:
    """Title and negative, from the contents of KEY.txt and KEY.json. Raises BadSample."""
    fields: Any = {}
    if record is not None:
        try:
            fields = AS_WRITTEN.decode(record.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample("bad-json", str(error)) from None
        if not isinstance(fields, dict):
            raise BadSample("bad-json", f"a {type(fields).__name__}, not an object")
    try:
        title = _field(fields, "title", "caption") if text is None else text.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadSample("bad-title", str(error)) from None
    if not title or not title.strip():
        raise BadSample("no-title", "KEY.txt, or title or caption in KEY.json, is missing or blank")
    return title, _field(fields, "title_neg", "negative")


def _field(fields: Mapping[str, Any], *names: str) -> str | None:
    """The text under the first of `names` that has one. Raises BadSample."""
    for name in names:
        value = fields.get(name)
        if value is None or value == "":
            continue
        try:
            value.encode()
        except (AttributeError, UnicodeEncodeError):
            raise BadSample("bad-json", f"{name!r} is no text but a {type(value).__name__}") from None
        return value
    return None


def _check_image(name: str, size: int) -> None:
    if not size:
        raise BadSample("empty", f"{name[:200]}: zero bytes")
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{name[:200]}: {size} bytes, {MAX_IMAGE} allowed")


# Headers


class _Member(NamedTuple):
    """One file of a tar: where its content lies, or why that cannot be used."""

    name: str
    offset: int
    size: int
    fault: BadSample | None


class _Header(NamedTuple):
    """What a header says, before anything is believed but its checksum."""

    kind: bytes
    name: bytes
    size: int
    mapped: int  # of a sparse file: does its map go on in the next block?


def _members(file: BinaryIO, tell: Callable[[str, BadSample], None]) -> Iterator[_Member]:
    """Walk from header to header without reading what lies between; behind damage, from the next sound header."""
    end, at, closed = file.seek(0, os.SEEK_END), 0, False
    extra: dict[str, Any] = {}  # what extended headers say of the next member
    while at + BLOCK <= end:
        header = _header(_read(file, at, BLOCK))
        if header is None:
            at, extra = _behind_damage(file, at, end, tell), {}
            closed = at == end
            continue
        kind, name, size, mapped = header
        at += BLOCK
        while mapped and at + BLOCK <= end:
            mapped, at = _read(file, at, BLOCK)[504], at + BLOCK
        if kind in b"xL":
            extra |= _extension(file, kind, at, size, end)
        elif kind not in b"gK5":  # pax defaults for all members, GNU's long name of a link's target, a folder
            name, size = extra.get("name", name), extra.get("size", size)
            label = name.decode(errors="backslashreplace")
            yield _Member(label, at, size, extra.get("fault") or _fault(kind, label, size, end - at))
        if kind not in b"xLgK":
            extra = {}
        if kind not in b"123456" and at + size <= end:  # those have no content, whatever their size says
            at += size + -size % BLOCK
    if end < BLOCK:
        raise _no_tar(file)
    if not closed:
        tell("", BadSample("damaged-shard", f"it ends at byte {end} without the mark of an end: perhaps cut off"))


def _fault(kind: bytes, name: str, size: int, there: int) -> BadSample | None:
    if kind not in b"07\0":
        return BadSample("not-a-file", f"{name[:200]} is a {NOT_A_FILE.get(kind, repr(kind))} member")
    if size > there:
        return BadSample("truncated", f"{name[:200]}: the tar ends before its {size} bytes do")
    return None


def _header(block: bytes) -> _Header | None:
    """Parse a block by POSIX ustar and GNU rules; None if its checksum or a number says that it is no header."""
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


def _number(field: bytes) -> int:
    """An octal number, or one in base 256 as GNU writes large ones. Raises ValueError, also if it is negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("not octal")
    return int(digits or b"0", 8)


def _extension(file: BinaryIO, kind: bytes, at: int, size: int, end: int) -> dict[str, Any]:
    """Name, size, fault that an extended header (L: GNU's long name, x: pax records) gives to the member after it."""
    if size > MAX_TEXT or at + size > end:
        return {"fault": BadSample("bad-header", f"extended by {size} bytes, {MAX_TEXT} allowed")}
    data = _read(file, at, size)
    if kind == b"L":
        return {"name": data.partition(b"\0")[0]}
    said: dict[str, Any] = {}
    try:
        for key, value in _pax_records(data):
            if key.startswith(b"GNU.sparse."):
                said["fault"] = BadSample("not-a-file", "a sparse member")
            if key in (b"path", b"GNU.sparse.name"):
                said["name"] = value
            if key == b"size":
                said["size"] = _decimal(value)
    except ValueError as error:
        return {"fault": BadSample("bad-header", f"damaged pax records: {error}")}
    return said


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header. Raises ValueError."""
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


def _behind_damage(file: BinaryIO, at: int, end: int, tell: Callable[[str, BadSample], None]) -> int:
    """Where the next header is, or `end`. Zeros up to there are how a tar ends; everything else is told."""
    start, blank = at, True
    while at + BLOCK <= end and _header(block := _read(file, at, BLOCK)) is None:
        blank = blank and not block.strip(b"\0")
        at += BLOCK
    at = end if at + BLOCK > end else at
    if blank and at == end and end - start <= PADDING:
        return end
    if start == 0 and at == end:
        raise _no_tar(file)
    tell("", BadSample("damaged-shard", f"bytes {start} to {at} hold no header; samples there are lost"))
    return at


def _no_tar(file: BinaryIO) -> UserError:
    start = _read(file, 0, min(file.seek(0, os.SEEK_END), 4))
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            return UserError(f"{file.name} is compressed with {program}; uncompress it, shards must be plain tar files")
    return UserError(f"{file.name} is {'no tar file' if start else 'empty'}; make or download it again")


def _open(path: str | Path) -> BinaryIO:
    """Open to hop from header to header: little is read ahead. A named pipe is refused at the first seek."""
    return open(path, "rb", buffering=8 * BLOCK, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    """Exactly these bytes, which lie inside the file. Raises OSError if it has become shorter."""
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise OSError(f"{file.name} has become shorter while it was read")
    return data
