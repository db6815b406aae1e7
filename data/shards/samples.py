"""Group the files of a tar into samples, by WebDataset's convention.

A sample is a run of files KEY.ENDING, KEY going up to the first dot of the base name: an image, its titles (KEY.txt,
KEY.0.txt, KEY.1.txt, …, or "title", "caption" or "captions" in KEY.json) and perhaps negatives ("title_neg" or
"negative", also numbered, in KEY.json). A field of the JSON holds one text or a list of them; KEY.json may itself be a
list of titles. KEY.cls is the title where there is no other: the name of a class, or its number, the name being a line
of a file beside the shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.batch import BadSample
from data.reading import read_text
from data.shards.tar import Member, SeekableFile, read_at

MAX_TEXT = 1 << 20  # bytes of a title, of a JSON file
MAX_IMAGE = 1 << 26
CLASS_FILES = ("classnames.txt", "classes.txt", "labels.txt")  # the first is what CLIP_benchmark writes
AS_WRITTEN = json.JSONDecoder(parse_int=str, parse_float=str)  # the title 1984 is text, and no number costs minutes
NUMBERED = re.compile(r"(\D*)(\d{1,9})\.txt")  # endings of one title of several
TITLES, NEGATIVES = ("title", "caption", "captions"), ("title_neg", "negative", "negatives")  # fields of KEY.json
NEGATIVE = re.compile(rf"(?:{'|'.join(NEGATIVES)})_?(\d{{1,3}})")  # one negative of several
IMAGES = {  # ending -> pattern of the first bytes, None where `ShardWriter` does not use the ending
    "jpg": rb"\xff\xd8\xff", "jpeg": None, "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP", "gif": rb"GIF8[79]a",
    "bmp": rb"BM", "avif": rb"....ftyp.{0,60}avi[fs]", "tif": rb"II[*+]\0|MM\0[*+]", "tiff": None}


def samples(files_of_tar: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key and the files by ending of each sample; an ending that a sample has already starts the next one."""
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


def row(file: SeekableFile, files: Mapping[str, Member], classes: Sequence[str],
        report: Callable[[BadSample], None]) -> tuple[int, int, list[str], list[str]]:
    """Return offset and size of the image, titles (one or more), negatives. Raises BadSample.

    `report` gets each title that is blank beside others, which would be a row of its own.
    """
    image = _choose(files, IMAGES)
    if image is None:
        raise BadSample("no-image", f"only {', '.join(files)}; the files of a sample must be neighbours"[:200])
    if image.fault is not None:
        raise image.fault
    check_image(image.name, image.size)
    member = _choose(files, ("json",))
    record = _content(file, member) if member else None
    texts = [_content(file, text) for text in _text_files(files)]
    try:
        titles, negatives = titles_and_negatives(texts, record)
        for number, title in enumerate(titles, 1):
            if not title.strip():
                report(BadSample("no-title", f"caption {number} of {len(titles)} is blank"))
        return image.offset, image.size, [title for title in titles if title.strip()], negatives
    except BadSample as problem:
        if problem.reason != "no-title" or "cls" not in files:
            raise
    name = class_name(_content(file, files["cls"]), classes)
    return image.offset, image.size, *titles_and_negatives([name], record)


def class_name(content: bytes, classes: Sequence[str]) -> bytes:
    """Return the name of the class that KEY.cls holds. Raises BadSample (no-title, no-class-names)."""
    number = content.strip()
    if not re.fullmatch(rb"-?\d{1,9}", number):
        try:
            content.decode()
        except UnicodeDecodeError:
            raise BadSample("no-title", "KEY.cls is neither a number nor text") from None
        return spell_class(content.decode()).encode()
    if not 0 <= int(number) < len(classes):
        raise BadSample("no-class-names", f"class {int(number)} of KEY.cls has no name; write the names, one a line, "
                        f"into {CLASS_FILES[0]} beside the shards" + f" ({len(classes)} are there)" * bool(classes))
    return spell_class(classes[int(number)]).encode()


def spell_class(name: str) -> str:
    """Return the name of a class in plain words: golden_retriever as "golden retriever"."""
    return name.replace("_", " ")


def class_names_beside(shard: Path) -> list[str]:
    """Return the class names of a shard, from a file in its folder or the one above; empty if there is none."""
    for folder in (shard.absolute().parent, shard.absolute().parent.parent):
        for name in CLASS_FILES:
            if (folder / name).is_file():
                return parse_class_names(read_text(folder / name, MAX_TEXT))
    return []


def parse_class_names(text: str) -> list[str]:
    """Return the names of classes, one a line."""
    return text.removeprefix("\ufeff").splitlines()


def _text_files(files: Mapping[str, Member]) -> list[Member]:
    """Return KEY.txt, then KEY.0.txt … in order; without these, the only other text."""
    if [ending for ending in files if ending.endswith("txt")] == ["txt"]:  # nearly always
        return [files["txt"]]
    numbered = [(match[1], int(match[2]), ending) for ending in files if (match := NUMBERED.fullmatch(ending))]
    endings = [*(["txt"] if "txt" in files else []), *(ending for _, _, ending in sorted(numbered))]
    others = [ending for ending in files if ending.endswith(".txt") and ending not in endings]
    if others and "txt" not in files:
        only = _choose(files, ("txt",))  # refuses several
        return [] if only is None else [only]
    return [files[ending] for ending in endings]


def _choose(files: Mapping[str, Member], endings: Iterable[str]) -> Member | None:
    """Return the file with the first of `endings`, else the one that has one as a last part (KEY.thumb.jpg)."""
    for ending in endings:
        if ending in files:
            return files[ending]
    others = [ending for ending in files if ending.rpartition(".")[2] in endings]
    if len(others) > 1:
        raise BadSample("ambiguous", f"which of {', '.join(others)}? A key goes up to the first dot"[:200])
    return files[others[0]] if others else None


def _content(file: SeekableFile, member: Member) -> bytes:
    if member.fault is not None:
        raise member.fault
    if member.size > MAX_TEXT:
        raise BadSample("too-large", f"{member.name[:200]}: {member.size} bytes, {MAX_TEXT} allowed")
    return read_at(file, member.offset, member.size)


def titles_and_negatives(texts: Sequence[bytes], record: bytes | None) -> tuple[list[str], list[str]]:
    """Return titles and negatives from the contents of the .txt files and of KEY.json. Raises BadSample.

    Of several titles some may be blank, but not all.
    """
    fields: Any = {}
    if record is not None:
        try:
            fields = AS_WRITTEN.decode(record.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample("bad-json", str(error)) from None
        if isinstance(fields, list):
            fields = {TITLES[0]: fields}
        if not isinstance(fields, dict):
            raise BadSample("bad-json", f"a {type(fields).__name__}, not an object")
    try:
        titles = [text.decode("utf-8-sig").rstrip("\r\n") for text in texts]
    except UnicodeDecodeError as error:
        raise BadSample("bad-title", str(error)) from None
    titles = titles or _field(fields, *TITLES)
    if not any(title.strip() for title in titles):
        raise BadSample("no-title", "KEY.txt, or title or caption in KEY.json, is missing or blank")
    numbered = sorted((int(match[1]), name) for name in fields if (match := NEGATIVE.fullmatch(name)))
    negatives = [*_field(fields, *NEGATIVES), *(text for _, name in numbered for text in _field(fields, name))]
    return titles, [*filter(None, negatives)]


def _field(fields: Mapping[str, Any], *names: str) -> list[str]:
    """Return the texts, one or a list, of the first of `names` that has any. Raises BadSample."""
    for name in filter(fields.__contains__, names):
        value = fields[name]
        values = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
        for each in values:
            try:
                each.encode()
            except (AttributeError, UnicodeEncodeError):
                raise BadSample("bad-json", f"{name!r} is no text but a {type(each).__name__}") from None
        if any(values):
            return values
    return []


def check_image(name: str, size: int) -> None:
    """Refuse an image by its size in bytes. Raises BadSample (empty, too-large)."""
    if not size:
        raise BadSample("empty", f"{name[:200]}: zero bytes")
    if size > MAX_IMAGE:
        raise BadSample("too-large", f"{name[:200]}: {size} bytes, {MAX_IMAGE} allowed")
