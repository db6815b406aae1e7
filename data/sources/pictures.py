"""A folder of images with sidecars -> records: KEY.jpg, its title in KEY.txt, other fields in KEY.json."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data.batch import BadSample
from data.files import is_output
from data.ledger import Account
from data.reading import NotAFile, open_regular
from data.shards.samples import MAX_TEXT
from data.sources.paths import PICTURES
from data.sources.records import Record, parse_json_object
from data.sources.rows import LABEL, ROW

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS = re.compile(r"\d+_stats\.json")  # what img2dataset writes beside its parts
MAX_SEEN = 10_000  # files among which a picture with a sidecar is looked for
SIDECARS = frozenset((".txt", ".json"))
OTHER_DATA = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".gz", ".tar"))


def pictures(folder: Path, account: Account) -> Iterator[Record]:
    """Yield the images at any depth below `folder`, sorted, with the fields of KEY.json and with KEY.txt as title.

    A file of an unknown ending with a title beside it is a row that is dropped. Sidecars without an image and linked
    folders are passed over. Raises OSError.
    """
    row = 0
    for here, names in _walk(folder, account):
        sidecars, others = _by_stem(names)
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in PICTURES:
                continue
            path = os.path.abspath(os.path.join(here, name))
            try:
                yield Record(row, path, _fields(here, sidecars.get(stem, {}), path))
            except BadSample as bad:
                account.drop(str(folder), row, bad, path)
            row += 1
        titled = {os.path.splitext(name)[0] for name in names if is_picture(name)}
        for stem in sorted(sidecars.keys() - titled):
            if stem in others:
                path = os.path.abspath(os.path.join(here, others[stem]))
                problem = BadSample("unknown-ending", f"known are {' '.join(sorted(PICTURES))}")
                account.drop(str(folder), row, problem, path)
                row += 1
            else:
                for name in sidecars[stem].values():
                    account.pass_over("sidecar-without-image", os.path.join(here, name))


def is_picture(name: str) -> bool:
    """Return whether a file name has the ending of a picture."""
    return os.path.splitext(name)[1].lower() in PICTURES


def holds_titled_pictures(folder: Path) -> bool:
    """Return whether a picture with a sidecar is among the first MAX_SEEN files."""
    seen = 0
    for _, names in _walk(folder, Account()):
        sidecars, _ = _by_stem(names)
        if any(is_picture(name) and os.path.splitext(name)[0] in sidecars for name in names):
            return True
        seen += len(names)
        if seen > MAX_SEEN:
            break
    return False


def holds_pictures(folder: Path) -> bool:
    """Return whether there is a picture, or a text that may be the title of one, at any depth."""
    return any(is_picture(name) or os.path.splitext(name)[1].lower() in SIDECARS
               for _, names in _walk(folder, Account()) for name in names)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders of classes: two or more hold all pictures, and no picture has a title."""
    classes = []
    for here, names in _walk(folder, Account()):
        sidecars, _ = _by_stem(names)
        stems = {os.path.splitext(name)[0] for name in names if is_picture(name)}
        if stems and (Path(here) == folder or stems & sidecars.keys()):
            return []
        if stems:
            classes.append(os.path.basename(here))
    return sorted({*classes}) if len({*classes}) > 1 else []


def read_class_folders(folder: Path, account: Account) -> pa.Table:
    """Read the images below `folder`; the name of an image's folder is its title and its label."""
    import pyarrow as pa

    images, titles, numbers, row = [], [], [], -1
    for here, names in _walk(folder, account):
        for name in filter(is_picture, names):
            path, row = os.path.abspath(os.path.join(here, name)), row + 1
            try:
                _check_name(path)
            except BadSample as bad:
                account.drop(str(folder), row, bad, path)
                continue
            images.append(path)
            titles.append(os.path.basename(here))
            numbers.append(row)
    return pa.table({"image": pa.array(images, pa.large_string()), "title": pa.array(titles, pa.large_string()),
                     LABEL: pa.array(titles, pa.large_string()), ROW: pa.array(numbers, pa.int64())})


def _walk(folder: Path, account: Account) -> Iterator[tuple[str, list[str]]]:
    """Yield folders at any depth and their files, sorted, without hidden ones and without output of this program.

    A picture that a run has lost is among the files of its folder: its row is one of those that the run began with.
    """
    def refuse(error: OSError) -> NoReturn:
        raise error

    lost: dict[str, set[str]] = defaultdict(set)
    for path in account.lost:
        lost[os.path.dirname(path)].add(os.path.basename(path))
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            path = os.path.join(here, name)
            if os.path.islink(path):  # the walk does not enter it
                account.pass_over("linked-folder", path)
            elif is_output(Path(path)):
                folders.remove(name)
                account.pass_over("own-output", path)
        if lost:
            names = [*{*names, *lost.get(os.path.abspath(here), ())}]
        yield here, sorted(name for name in names if not name.startswith("."))


def _by_stem(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the sidecars of each stem by ending, and for each stem a file of an unknown ending."""
    sidecars: dict[str, dict[str, str]] = defaultdict(dict)
    others: dict[str, str] = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        if STATISTICS.fullmatch(name):
            continue
        if ending.lower() in SIDECARS:
            sidecars[stem][ending.lower()] = name
        elif ending.lower() not in PICTURES | OTHER_DATA:
            others[stem] = name
    return sidecars, others


def _fields(here: str, files: Mapping[str, str], path: str) -> dict[str, Any]:
    """Return the fields of one image. Raises BadSample."""
    _check_name(path)
    fields: dict[str, Any] = {}
    if ".json" in files:
        fields = parse_json_object(_content(os.path.join(here, files[".json"])), files[".json"])
    if ".txt" in files:
        text = _content(os.path.join(here, files[".txt"]))
        try:
            fields["title"] = text.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError:
            raise BadSample("bad-title", f"{files['.txt']} is not UTF-8; save the file as UTF-8") from None
    return fields | {"image": path}


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise BadSample("bad-name", "the file's name is not UTF-8; rename it") from None


def _content(path: str) -> bytes:
    """Return the bytes of a sidecar. Raises BadSample."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_TEXT + 1)
    except NotAFile as error:
        raise BadSample("not-a-file", f"{path}: {error.strerror}") from None
    except OSError as error:
        raise BadSample("unreadable-file", f"{path}: {error.strerror}") from None
    if len(content) > MAX_TEXT:
        raise BadSample("too-large", f"{path}: more than {MAX_TEXT} bytes")
    return content
