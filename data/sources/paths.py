"""Image paths and ids as datasets write them -> absolute paths and URLs.

A table on this machine that the user named may name any file; rows of tars, hub datasets and the network may name files
below their own folders only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.lists import joined
from data.web.storage import PACKAGES, scheme_of

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
ENDINGS = "|".join(re.escape(ending) for ending in sorted(PICTURES))
READABLE = f"^(https?|{'|'.join(PACKAGES)})://"  # images at such an address are read
URL = "^[a-z][a-z0-9+.-]+://"
NO_ID = "^(/|file:|[a-z][a-z0-9+.-]+://)"
UNUSUAL = r"[:#\\]"  # without these a path is spelt as it is; one search instead of four
NUMBERED = rf"(?i)({ENDINGS})#\d+$"  # Flickr8k.token.txt counts the captions of an image so
TEMPLATE = re.compile(r"([^{}]*)\{(?::?0?(\d+)d?)?\}([^{}]*)")
CHECKED_NAMES = 20  # images that are looked for in other folders if none of them is in its place
MAX_FOLDERS = 200  # folders that are searched
IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img", "pictures", "photos", "jpegimages", "thumbnails"))
GUESSED_ENDINGS = ("", ".jpg", ".png", ".jpeg", ".webp")


@dataclass(frozen=True)
class ImageLocation:
    """The folders of a table's images, and how its paths name them."""

    folders: Sequence[str]  # relative paths start at the first; without `anywhere` paths stay within them
    relative: bool = True  # False: a path without a folder names nothing
    anywhere: bool = False  # absolute paths and .. may leave the folders
    template: str = ""  # makes a path of an id
    ending: str = ""  # is added to relative paths
    is_named: bool = False  # the user named the folder: absolute paths of another machine may be meant below it

    @property
    def in_store(self) -> bool:
        """Return whether the table lies in a store; its relative paths are then addresses below its own."""
        return bool(scheme_of(self.folders[0]))

    def under(self, root: str) -> ImageLocation:
        """Return the location with the user's folder in place of the table's. Raises UserError."""
        if not root:
            return self
        path = Path(root).expanduser()
        if not path.is_dir():
            raise UserError(f"--image-root {root}: there is no such folder")
        return replace(self, folders=(os.path.abspath(path), os.path.realpath(path)), relative=True, is_named=True)


def parse_image_template(text: str) -> str:
    """Return the template of --image-template. Raises UserError unless it holds {} or {:012} once."""
    if text and not TEMPLATE.fullmatch(text):
        raise UserError(f"--image-template {text!r} must hold {{}} once, or {{:012}} for numbers of 12 digits")
    return text


def absolute_paths(column: pa.ChunkedArray, location: ImageLocation, source: str, account: Account,
                   problems: dict[int, BadSample]) -> pa.ChunkedArray:
    """Return URLs as they are and other paths absolute; null stays null. Blanks around them are removed already.

    A path that leaves its folders (`..` is judged by spelling) is a problem of its row.
    """
    import pyarrow as pa

    chunks = [_normalize(chunk, location, source, account) for chunk in column.chunks]
    if location.relative and not location.in_store:
        if location.is_named:
            chunks = _moved(chunks, location, source, account)
        location = _locate(chunks, location, source, account)
    paths, start = [], 0
    for chunk in chunks:
        paths.append(_absolute(chunk, start, location, problems))
        start += len(chunk)
    return pa.chunked_array(paths, pa.large_string())


def _normalize(path: pa.Array, location: ImageLocation, source: str, account: Account) -> pa.Array:
    """Return paths as this machine spells them, from ids, file: and // addresses, backslashes and numbered names."""
    import pyarrow.compute as pc

    if location.template:
        filled = _fill_template(path, location.template)
        if not filled.equals(path):
            account.apply("--image-template")
        path = filled
    if _any(bare := pc.starts_with(path, "//")):
        account.note(f"{source}: image addresses that begin with // are read as https://")
        path = pc.if_else(pc.fill_null(bare, False), joined("https:", path), path)
    if not _any(pc.match_substring_regex(path, UNUSUAL)):
        return path
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
        numbered = pc.fill_null(numbered, False)
        account.note(f"{source}: image names such as {path.filter(numbered)[0]} are read without # and the number")
        path = pc.if_else(numbered, pc.replace_substring_regex(path, NUMBERED, r"\1"), path)
    return path


def _any(mask: pa.Array) -> bool:
    import pyarrow.compute as pc

    return bool(pc.any(mask).as_py())


def _replace_values(path: pa.Array, mask: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """Return the values with those of `mask` replaced by `change` of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _any(mask):
        return path
    mask = pc.fill_null(mask, False)
    values = [change(value) for value in path.filter(mask).to_pylist()]
    return pc.replace_with_mask(path, mask, pa.array(values, pa.large_string()))


def path_of_file_url(text: str) -> str:
    """Return file:///a%20b.jpg, file://localhost/a.jpg and file:/a.jpg as paths."""
    path = re.sub(r"^file:(//(localhost(?=/))?)?", "", text, flags=re.IGNORECASE)
    return unquote(path)


def _slashed(folder: str, text: str) -> str:
    """Return a Windows path with slashes, unless there is a file with backslashes in its name."""
    return text if os.path.exists(os.path.join(folder, text)) else text.replace("\\", "/")


def _fill_template(path: pa.Array, template: str) -> pa.Array:
    """Return ids in the template, URLs and absolute paths as they are; a width pads numbers with zeros."""
    import pyarrow.compute as pc

    match = TEMPLATE.fullmatch(template)
    assert match is not None  # see `parse_image_template`
    before, width, after = match.groups()
    ids = pc.replace_substring_regex(path, r"^(\d+)\.0$", r"\1")  # pandas writes numbers with gaps so
    if width is not None:
        ids = pc.if_else(pc.utf8_is_digit(ids), pc.utf8_lpad(ids, int(width), "0"), ids)
    filled = joined(before, ids, after)
    return pc.if_else(pc.match_substring_regex(path, NO_ID, ignore_case=True), path, filled)


def _absolute(path: pa.Array, start: int, location: ImageLocation, problems: dict[int, BadSample]) -> pa.Array:
    import pyarrow.compute as pc

    if location.in_store:
        return _in_store(path, start, location, problems)
    url = pc.match_substring_regex(path, READABLE if location.anywhere else "^https?://", ignore_case=True)
    absolute = pc.starts_with(path, "/")
    roots = tuple(folder.rstrip("/") + "/" for folder in location.folders)
    full = path
    if location.relative:
        below = joined(roots[0], path, *filter(None, [location.ending]))
        named = pc.or_(url, absolute)
        full = pc.if_else(named, path, below) if _any(named) else below
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
    """Return addresses as they are, other paths as addresses below the table's; a local file is a problem."""
    import pyarrow.compute as pc

    folder = location.folders[0]
    is_address = pc.fill_null(pc.match_substring_regex(path, READABLE, ignore_case=True), False)
    full = pc.if_else(is_address, path, joined(f"{folder}/", path, location.ending))
    suspect = pc.fill_null(pc.match_substring_regex(path, r"^/|://|(^|/)\.\.(/|$)"), False)
    for row in np.flatnonzero(pc.and_not(suspect, is_address).to_numpy(zero_copy_only=False)):
        problems[start + int(row)] = BadSample(
            "outside-folder", f"the image {path[row].as_py()[:200]!r} is neither below {folder} nor an address that is "
                              "read; a table of a store names no files of this machine")
    return full


def _locate(chunks: Sequence[pa.Array], location: ImageLocation, source: str, account: Account) -> ImageLocation:
    """Return the location, moved to a folder nearby if no image is at its path and all first ones are there.

    Raises UserError where there are several such folders.
    """
    names = _first(chunks, _is_relative)
    base = location.folders[0]
    if names:
        account.apply("--image-root")
    if not names or any(os.path.lexists(os.path.join(base, name)) for name in names):
        return location
    endings = [""] if all(os.path.splitext(name)[1].lower() in PICTURES for name in names) else GUESSED_ENDINGS
    nearest: list[tuple[str, str]] = []
    for nearby in (_folders_within(base), _folders_beside(base) if location.anywhere else []):
        hits: dict[tuple[int, int], tuple[str, str]] = {}  # the same folder by another name counts once
        for folder in nearby:
            for ending in endings:
                if all(os.path.isfile(os.path.join(folder, name + ending)) for name in names):
                    stat = os.stat(folder)
                    hits.setdefault((stat.st_dev, stat.st_ino), (folder, ending))
        nearest = nearest or list(hits.values())
    if len(nearest) > 1:
        first, second = nearest[0][0], nearest[1][0]
        raise UserError(f"{source}: its images are not in {base}, but in {first} and in {second}; choose with "
                        f"--image-root {first}")
    if not nearest:
        return location
    folder, ending = nearest[0]
    lacking = f", with {ending} after their names" if ending else ""
    account.note(f"{source}: the images are read from {folder}{lacking}; --image-root says otherwise")
    return replace(location, folders=(folder, os.path.realpath(folder)), ending=ending)


def _moved(chunks: Sequence[pa.Array], location: ImageLocation, source: str, account: Account) -> list[pa.Array]:
    """Return absolute paths of another machine as relative ones, if no file has the first paths and one is below."""
    import pyarrow.compute as pc

    names = _first(chunks, _is_absolute)
    if any(os.path.lexists(name) for name in names):
        return [*chunks]
    prefixes = []
    for name in names:
        prefixes += [name[: slash.end()] for slash in re.finditer("/", name)]
    # The shortest first: the more of a path stays, the less likely another file of that name is taken for the image.
    for prefix in dict.fromkeys(sorted(prefixes, key=len)):
        tails = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if any(os.path.isfile(os.path.join(location.folders[0], tail)) for tail in tails):
            account.note(f"{source}: images below {prefix} are read below {location.folders[0]}")
            return [pc.if_else(pc.starts_with(chunk, prefix), pc.utf8_slice_codeunits(chunk, len(prefix)), chunk)
                    for chunk in chunks]
    return [*chunks]


def _is_absolute(path: str) -> bool:
    return re.match("/|[a-z]:/", path, re.IGNORECASE) is not None


def _is_relative(path: str) -> bool:
    return not path.startswith("/") and not scheme_of(path)


def _first(chunks: Sequence[pa.Array], is_wanted: Callable[[str], bool]) -> list[str]:
    """Return the first CHECKED_NAMES distinct paths of a kind."""
    seen: dict[str, None] = {}
    for chunk in chunks:
        for value in chunk[: 10 * CHECKED_NAMES]:
            text = value.as_py()
            if text and is_wanted(text):
                seen[text] = None
            if len(seen) == CHECKED_NAMES:
                return [*seen]
    return [*seen]


def _folders_within(base: str) -> list[str]:
    """Return the folder and those up to two levels below: images/, flickr30k_images/flickr30k_images/."""
    inner = _subfolders(base)
    deeper = [*chain.from_iterable(map(_subfolders, inner))]
    return [base, *inner, *deeper][:MAX_FOLDERS]


def _folders_beside(base: str) -> list[str]:
    """Return folders beside the table's that are called after images; others may hold images of the same names."""
    beside = _subfolders(os.path.dirname(base))
    return [folder for folder in beside if os.path.basename(folder).lower() in IMAGE_FOLDERS]


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
