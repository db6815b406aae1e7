"""Group the files of a tar into samples, by WebDataset's convention.

A sample is a run of files KEY.ENDING, KEY going up to the first dot of the base name: an image, its title (KEY.txt, or
"title" or "caption" in KEY.json) and perhaps a negative ("title_neg" or "negative" in KEY.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data.batch import BadSample
from data.shards.tar import Member, SeekableFile, read_at

MAX_TEXT = 1 << 20  # bytes of a title, of a JSON file
MAX_IMAGE = 1 << 26
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str)  # the title 1984 is text, and no number costs minutes
IMAGES = {  # ending -> pattern of the first bytes, None where `ShardWriter` does not use the ending
    "jpg": rb"\xff\xd8\xff", "jpeg": None, "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP", "gif": rb"GIF8[79]a",
    "bmp": rb"BM", "avif": rb"....ftyp.{0,60}avi[fs]", "tif": rb"II[*+]\0|MM\0[*+]", "tiff": None}


def samples(files_of_tar: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbours of one key, by ending in lower case. A name that the sample has already starts the next sample."""
    current, files = "", dict[str, Member]()
    for member in files_of_tar:
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


def row(file: SeekableFile, files: Mapping[str, Member]) -> tuple[int, int, str, str | None]:
    """Offset and size of the image, title, negative. Raises BadSample."""
    image = _choose(files, IMAGES)
    if image is None:
        raise BadSample("no-image", f"only {', '.join(files)}; the files of a sample must be neighbours"[:200])
    if image.fault is not None:
        raise image.fault
    check_image(image.name, image.size)
    text, record = (_content(file, _choose(files, (ending,))) for ending in ("txt", "json"))
    return image.offset, image.size, *pair(text, record)


def _choose(files: Mapping[str, Member], endings: Iterable[str]) -> Member | None:
    """The file that has the first of `endings` as its ending, or else as the last part of it (KEY.thumb.jpg)."""
    for ending in endings:
        if ending in files:
            return files[ending]
    others = [ending for ending in files if ending.rpartition(".")[2] in endings]
    if len(others) > 1:
        raise BadSample("ambiguous", f"which of {', '.join(others)}? A key goes up to the first dot"[:200])
    return files[others[0]] if others else None


def _content(file: SeekableFile, member: Member | None) -> bytes | None:
    if member is None:
        return None
    if member.fault is not None:
        raise member.fault
    if member.size > MAX_TEXT:
        raise BadSample("too-large", f"{member.name[:200]}: {member.size} bytes, {MAX_TEXT} allowed")
    return read_at(file, member.offset, member.size)


def pair(text: bytes | None, record: bytes | None) -> tuple[str, str | None]:
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


def check_image(name: str, size: int) -> None:
    """Refuse an image by its size in bytes. Raises BadSample (empty, too-large)."""
    if not size:
        raise BadSample("empty", f"{name[:200]}: zero bytes")
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{name[:200]}: {size} bytes, {MAX_IMAGE} allowed")
