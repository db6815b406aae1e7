"""Image paths and ids as datasets write them -> absolute paths and URLs.

A table on this machine that the user named may point anywhere; rows from tars, hub datasets and the network reach files
below their folders only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.web.storage import PACKAGES, scheme_of

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
ENDINGS = "|".join(re.escape(ending) for ending in sorted(PICTURES))
ADDRESS = f"^(https?|{'|'.join(PACKAGES)})://"  # images at such an address are read
URL = "^[a-z][a-z0-9+.-]+://"
NUMBERED = rf"(?i)({ENDINGS})#\d+$"  # Flickr8k.token.txt counts the captions of an image so
TEMPLATE = re.compile(r"([^{}]*)\{(?::?0?(\d+)d?)?\}([^{}]*)")
CHECKED_NAMES = 20  # rows whose images are looked for where the first are not in their place
MAX_FOLDERS = 200  # folders that are looked in
IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "thumbnails"))
GUESSED_ENDINGS = ("", ".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class ImageLocation:
    """The places that the images of a table lie in."""

    folders: Sequence[str]  # relative paths start at the first; none but `anywhere` leaves them
    relative: bool = True  # False: a path without a folder names nothing
    anywhere: bool = False  # absolute paths and .. may leave the folders
    template: str = ""  # makes a path of an id
    ending: str = ""  # what the names lack

    @property
    def in_store(self) -> bool:
        """True for a table in a store, whose relative paths are addresses below its own."""
        return bool(scheme_of(self.folders[0]))

    def under(self, root: str) -> ImageLocation:
        """Return the places with the user's folder in place of the table's. Raises UserError."""
        if not root:
            return self
        path = Path(root).expanduser()
        if not path.is_dir():
            raise UserError(f"--image-root {root}: there is no such folder")
        return replace(self, folders=(os.path.abspath(path), os.path.realpath(path)), relative=True)


def parse_image_template(text: str) -> str:
    """Return the template of --image-template. Raises UserError unless it holds {} or {:012} once."""
    if text and not TEMPLATE.fullmatch(text):
        raise UserError(f"--image-template {text!r} must hold {{}} once, or {{:012}} for numbers of 12 digits")
    return text


def absolute_paths(column: pa.ChunkedArray, location: ImageLocation, source: str, account: Account,
                   problems: dict[int, BadSample]) -> pa.ChunkedArray:
    """Return URLs as they are and other paths absolute; null stays null. Blanks around them are gone already.

    A path that leaves its folders is a problem of its row, `..` by spelling.
    """
    import pyarrow as pa

    chunks = [_normalize(chunk, location, source, account) for chunk in column.chunks]
    if location.relative and not location.in_store:
        location = _locate(chunks, location, source, account)
    paths, start = [], 0
    for chunk in chunks:
        paths.append(_absolute(chunk, start, location, problems))
        start += len(chunk)
    return pa.chunked_array(paths, pa.string())


def _normalize(path: pa.Array, location: ImageLocation, source: str, account: Account) -> pa.Array:
    """Paths in the spelling of this machine: ids made paths, file: and // addresses, backslashes, numbered names."""
    import pyarrow.compute as pc

    if location.template:
        path = _fill_template(path, location.template)
    if _any(bare := pc.starts_with(path, "//")):
        account.note(f"{source}: image addresses that begin with // are read as https://")
        path = pc.if_else(pc.fill_null(bare, False), pc.binary_join_element_wise("https:", path, ""), path)
    is_file = pc.match_substring_regex(path, "^file:", ignore_case=True)
    path = _replace_values(path, is_file, path_of_file_url)
    is_url = pc.match_substring_regex(path, URL, ignore_case=True)
    if location.relative and not location.in_store:
        base = location.folders[0]
        backslashed = pc.and_not(pc.match_substring(path, "\\"), is_url)
        slashed = _replace_values(path, backslashed, lambda text: _slashed(base, text))
        if not slashed.equals(path):
            account.note(f"{source}: \\ in image paths is read as /")
            path = slashed
    numbered = pc.and_not(pc.match_substring_regex(path, NUMBERED), is_url)
    if _any(numbered):
        account.note(f"{source}: image names such as {path.filter(pc.fill_null(numbered, False))[0]} are read without # "
                     "and the number")
        path = pc.if_else(pc.fill_null(numbered, False), pc.replace_substring_regex(path, NUMBERED, r"\1"), path)
    return path


def _any(mask: pa.Array) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(mask).as_py())


def _replace_values(path: pa.Array, mask: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """The values with those of `mask` changed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _any(mask):
        return path
    mask = pc.fill_null(mask, False)
    values = [change(value) for value in path.filter(mask).to_pylist()]
    return pc.replace_with_mask(path, mask, pa.array(values, pa.string()))


def path_of_file_url(text: str) -> str:
    """Return file:///a%20b.jpg, file://localhost/a.jpg and file:/a.jpg as paths."""
    path = re.sub(r"^file:(//(localhost(?=/))?)?", "", text, flags=re.IGNORECASE)
    return unquote(path)


def _slashed(folder: str, text: str) -> str:
    """A Windows path with slashes, unless there is a file with backslashes in its name."""
    return text if os.path.exists(os.path.join(folder, text)) else text.replace("\\", "/")


def _fill_template(path: pa.Array, template: str) -> pa.Array:
    """Ids in the template; a width pads numbers with zeros. URLs are no ids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    match = TEMPLATE.fullmatch(template)
    if match is None:
        raise UserError(f"--image-template {template!r} must hold {{}} once")
    before, width, after = match[1], match[2], match[3]
    ids = path if width is None else pc.if_else(pc.utf8_is_digit(path), pc.utf8_lpad(path, int(width), "0"), path)
    filled = pc.binary_join_element_wise(pa.scalar(before), ids, pa.scalar(after), "")
    return pc.if_else(pc.match_substring_regex(path, URL, ignore_case=True), path, filled)


def _absolute(path: pa.Array, start: int, location: ImageLocation, problems: dict[int, BadSample]) -> pa.Array:
    import pyarrow.compute as pc

    if location.in_store:
        return _in_store(path, start, location, problems)
    url = pc.match_substring_regex(path, ADDRESS if location.anywhere else "^https?://", ignore_case=True)
    absolute = pc.starts_with(path, "/")
    roots = tuple(folder.rstrip("/") + "/" for folder in location.folders)
    full = path
    if location.relative:
        full = pc.if_else(pc.or_(url, absolute), path, pc.binary_join_element_wise(roots[0], path, location.ending, ""))
    if location.anywhere:
        return full
    suspect = pc.or_(pc.match_substring_regex(path, r"(^|/)\.\.(/|$)"), not location.relative)
    if location.relative:
        suspect = pc.or_(suspect, pc.and_not(absolute, pc.starts_with(path, roots[0])))
    suspect = pc.fill_null(pc.and_not(suspect, url), False)
    fix = ("move the images there" if location.relative else
           "if it is a path in the repository, download that and pass its folder")
    for row in np.flatnonzero(suspect.to_numpy(zero_copy_only=False)):
        if not os.path.normpath(full[row].as_py()).startswith(roots):
            image = path[row].as_py()[:200]
            problems[start + int(row)] = BadSample(
                "outside-folder", f"the image {image!r} is no URL and no file below {location.folders[0]}; {fix}")
    return full


def _in_store(path: pa.Array, start: int, location: ImageLocation, problems: dict[int, BadSample]) -> pa.Array:
    """Addresses as they are, other paths as addresses below the table's; what names a local file is a problem."""
    import pyarrow.compute as pc

    folder = location.folders[0]
    is_address = pc.fill_null(pc.match_substring_regex(path, ADDRESS, ignore_case=True), False)
    full = pc.if_else(is_address, path, pc.binary_join_element_wise(f"{folder}/", path, location.ending, ""))
    suspect = pc.fill_null(pc.match_substring_regex(path, r"^/|://|(^|/)\.\.(/|$)"), False)
    for row in np.flatnonzero(pc.and_not(suspect, is_address).to_numpy(zero_copy_only=False)):
        problems[start + int(row)] = BadSample(
            "outside-folder", f"the image {path[row].as_py()[:200]!r} is neither below {folder} nor an address that is "
                              "read; a table of a store names no files of this machine")
    return full


def _locate(chunks: Sequence[pa.Array], location: ImageLocation, source: str, account: Account) -> ImageLocation:
    """The location, in another folder nearby where the first images lie there and none is in its place.

    Raises UserError where there are several such folders.
    """
    names = list(_first_relative(chunks))
    base = location.folders[0]
    if not names or any(os.path.lexists(os.path.join(base, name)) for name in names):
        return places
    endings = [""] if all(os.path.splitext(name)[1].lower() in PICTURES for name in names) else GUESSED_ENDINGS
    found: list[tuple[str, str]] = []
    for nearby in (_folders_within(base), _folders_beside(base) if location.anywhere else []):
        hits: dict[tuple[int, int], tuple[str, str]] = {}  # the same folder by another name counts once
        for folder in nearby:
            for ending in endings:
                if all(os.path.isfile(os.path.join(folder, name + ending)) for name in names):
                    stat = os.stat(folder)
                    hits.setdefault((stat.st_dev, stat.st_ino), (folder, ending))
        found = found or list(hits.values())
    if len(found) > 1:
        raise UserError(f"{source}: its images are not in {base}, but in {found[0][0]} and in {found[1][0]}; choose "
                        f"with --image-root {found[0][0]}")
    if not found:
        return places
    folder, ending = found[0]
    lacking = f", with {ending} after their names" if ending else ""
    account.note(f"{source}: the images are read from {folder}{lacking}; --image-root says otherwise")
    return replace(location, folders=(folder, os.path.realpath(folder)), ending=ending)


def _first_relative(chunks: Sequence[pa.Array]) -> Iterator[str]:
    """The first CHECKED_NAMES distinct relative paths."""
    seen: dict[str, None] = {}
    for chunk in chunks:
        for value in chunk[: 10 * CHECKED_NAMES]:
            text = value.as_py()
            if text and not text.startswith("/") and not re.match(URL, text, re.IGNORECASE) and text not in seen:
                seen[text] = None
                yield text
            if len(seen) == CHECKED_NAMES:
                return


def _folders_within(base: str) -> list[str]:
    """The folder itself, those in it and in these: images/, Images/, flickr30k_images/flickr30k_images/."""
    inner = _subfolders(base)
    deeper = [folder for parent in inner for folder in _subfolders(parent)]
    return [base, *inner, *deeper][:MAX_FOLDERS]


def _folders_beside(base: str) -> list[str]:
    """Folders for images beside the table's: any other may hold images of the same names."""
    return [folder for folder in _subfolders(os.path.dirname(base)) if os.path.basename(folder).lower() in IMAGE_FOLDERS]


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
