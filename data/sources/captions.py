"""Published layouts of captioned images: Karpathy's splits, COCO, Flickr8k and Flickr30k, Conceptual Captions.

A layout is recognised by the names of its files and by their first bytes. It does not name the folder of its images;
the usual ones are tried.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.batch import BadSample, UserError
from data.ledger import Account
from data.reading import bounded_lines, open_unpacked
from data.sources.json_tables import load_json
from data.sources.parts import (
    DatasetPart,
    ReadContext,
    file_part,
    file_parts,
    files_by_word,
    folder_spellings,
    unique_splits,
)
from data.sources.rows import ROW
from data.sources.split_names import UNSPLIT, canonical_split

if TYPE_CHECKING:
    import pyarrow as pa

HEAD = 1 << 16  # bytes by which a file is recognised
IMAGE_FOLDERS = ("", "images", "Images", "train2014", "val2014", "train2017", "val2017", "flickr30k-images",
                 "flickr30k_images", "flickr30k_images/flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")


class Layout(NamedTuple):
    """A published layout of files."""

    name: str
    endings: tuple[str, ...]
    pattern: re.Pattern[str]  # names of its files in a folder, in lower case
    folders: tuple[str, ...]  # that hold them, below the folder of the dataset
    matches: Callable[[bytes], bool]  # by the first bytes of a file
    parts: Callable[[Sequence[Path], ReadContext, Account], list[DatasetPart]]


class CaptionedImage(NamedTuple):
    """An image of a file of captions."""

    row: int
    split: str
    folder: str  # below a folder of images, "" where the file names none
    image: str
    titles: list[str]
    problem: BadSample | None = None


class ImageFinder:
    """Finds images by name in the folders where a dataset may have them."""

    def __init__(self, file: Path, root: str) -> None:
        beside = [file.parent.absolute(), file.parent.parent.absolute()]
        roots = [Path(root).expanduser().absolute()] if root else beside
        self.folders: list[str] = []
        for folder in roots:
            self.folders += [str(folder / name) for name in IMAGE_FOLDERS if (folder / name).is_dir()]
        self._files: dict[str, frozenset[str]] = {}
        self.found = 0
        self.example = self.missing = ""  # the first image that is there, the first that is nowhere
        self._last = self.folders[0] if self.folders else str(roots[0])

    def __call__(self, name: str, folder: str = "") -> str:
        """Return the path of an image, in its `folder` or without it; a missing one gets the folder of those found."""
        for root in (self._last, *self.folders):
            for path in dict.fromkeys((os.path.join(root, folder, name), os.path.join(root, name))):
                if self._is_file(path):
                    self._last, self.found, self.example = root, self.found + 1, self.example or path
                    return path
        self.missing = self.missing or name
        return os.path.join(self._last, folder, name)

    def _is_file(self, path: str) -> bool:
        here, base = os.path.split(path)
        if here not in self._files:
            self._files[here] = frozenset(os.listdir(here)) if os.path.isdir(here) else frozenset()
        return base in self._files[here]

    def check(self, file: Path, split: str) -> None:
        """Raise UserError if no image was found."""
        if not self.found and self.missing:
            places = ", ".join(os.path.relpath(folder, file.parent) for folder in self.folders[:6])
            raise UserError(f"{file}{split}: its images (e.g. {self.missing[:100]!r}) are in none of {places}; put "
                            f"them into {file.parent / 'images'}, or name their folder with --image-root"
                            + (", or leave the split out with --splits" if split else ""))


def local_file_parts(split: str, file: Path, context: ReadContext, account: Account) -> list[DatasetPart]:
    """Return the parts of one file, divided by its own splits only if it has several and `split` is UNSPLIT."""
    layout = detect_layout(file) if file.is_file() else None
    if layout is None:
        return [file_part(split, file, context)]
    parts = layout.parts([file], context, account)
    has_splits = split == UNSPLIT and len({part.split for part in parts}) > 1
    return parts if has_splits else [replace(part, split=split) for part in parts]


def detect_layout(file: Path) -> Layout | None:
    """Return the layout of a file by its ending and first bytes, None for another file."""
    try:
        with open_unpacked(file) as opened:
            head = opened.read(HEAD)
    except OSError:
        return None
    return next((each for each in LAYOUTS if file.suffix.lower() in each.endings and each.matches(head)), None)


def find_layouts(folder: Path) -> Iterator[tuple[Layout, list[Path]]]:
    """Yield the layouts that a folder holds, each with its files."""
    for layout in LAYOUTS:
        for below in layout.folders:
            here = folder / below
            names = sorted(os.listdir(here)) if here.is_dir() else []
            files = [here / name for name in names if layout.pattern.fullmatch(name.lower())]
            files = [file for file in files if file.is_file() and detect_layout(file) is layout]
            if files:
                yield layout, files
                break


def _karpathy(files: Sequence[Path], context: ReadContext, account: Account) -> list[DatasetPart]:
    file = _single_file(files)
    value = load_json(file)
    if not isinstance(value, dict) or not isinstance(value.get("images"), list):
        raise UserError(f"{file}: looks like Karpathy's splits and has no list of \"images\"")

    def images() -> Iterator[CaptionedImage]:
        for row, entry in enumerate(value["images"]):
            try:
                split = canonical_split(str(entry.get("split", UNSPLIT)))
                titles = [_text(sentence["raw"]) for sentence in entry["sentences"] if sentence["raw"] is not None]
                yield CaptionedImage(row, split, _text(entry.get("filepath", "")), _text(entry["filename"]), titles)
            except (KeyError, TypeError, AttributeError) as error:
                problem = BadSample("bad-json", f"image {row}: no filename, or sentences without raw ({error!r})")
                yield CaptionedImage(row, UNSPLIT, "", "", [], problem)
            except BadSample as bad:
                yield CaptionedImage(row, UNSPLIT, "", "", [], bad)

    return _parts(file, list(images()), "Karpathy's splits", context)


def _coco(files: Sequence[Path], context: ReadContext, account: Account) -> list[DatasetPart]:
    splits = files_by_word(files)
    if not splits:
        return [_part(UNSPLIT, _single_file(files), partial(_read_coco, files[0], context))]
    named = []
    for split, files_of_split in splits.items():
        named += [(split, file.name, [file]) for file in files_of_split]
    parts = []
    for split, (file,) in unique_splits(named).items():
        parts.append(_part(split, file, partial(_read_coco, file, context)))
    return parts


def _read_coco(file: Path, context: ReadContext, account: Account) -> pa.Table:
    value = load_json(file)
    captions: dict[Any, list[str]] = defaultdict(list)
    problems: dict[Any, BadSample] = {}
    try:
        for annotation in value["annotations"]:
            try:
                if annotation["caption"] is not None:
                    captions[annotation["image_id"]].append(_text(annotation["caption"]))
            except BadSample as bad:
                problems[annotation["image_id"]] = bad
        rows = [CaptionedImage(row, "", "", _text(image["file_name"]), captions.pop(image["id"], []),
                          problems.get(image["id"])) for row, image in enumerate(value["images"])]
    except (KeyError, TypeError, BadSample) as error:
        raise UserError(f"{file}: looks like COCO's and is not a file of captions (missing: {error}); those are called "
                        "captions_*.json, with images[].file_name and annotations[].caption") from None
    for row, (image, titles) in enumerate(captions.items(), len(rows)):
        problem = BadSample("no-image", f"{len(titles)} captions of the image {image}, which is not among \"images\"")
        rows.append(CaptionedImage(row, "", "", "", titles, problem))
    return _table(file, rows, "COCO's captions", context, account)


def _table_parts(files: Sequence[Path], context: ReadContext, account: Account) -> list[DatasetPart]:
    """Return parts that the readers of tables read; only the names of their files are special."""
    return file_parts(files_by_word(files) or {UNSPLIT: files}, context)


def _token(files: Sequence[Path], context: ReadContext, account: Account) -> list[DatasetPart]:
    """Return the parts of a file of lines `name.jpg#0<TAB>caption`, with the splits of the lists beside it."""
    file = _single_file(files)
    splits = _flickr8k_splits(file)
    captions: list[CaptionedImage] = []
    unused = 0
    with open_unpacked(file) as opened:
        for row, line in enumerate(bounded_lines(opened, file)):
            match = re.fullmatch(r"(.+)#\d+\t(.*)", line.decode("utf-8", "replace").rstrip("\r\n"))
            if match is None and line.strip():
                problem = BadSample("bad-row", f"line {row + 1} is not name.jpg#0<TAB>caption")
                captions.append(CaptionedImage(row, UNSPLIT, "", "", [], problem))
            elif match is not None and splits and match[1] not in splits:
                unused += 1
            elif match is not None:
                captions.append(CaptionedImage(row, splits.get(match[1], UNSPLIT), "", match[1], [match[2].strip()]))
    if unused:
        account.note(f"{file}: {unused:,} captions of images in no split of {file.parent} are not used")
    return _parts(file, captions, "Flickr's .token files", context)


def _flickr8k_splits(file: Path) -> dict[str, str]:
    """Return image -> split from the lists of Flickr8k beside a file of captions; empty without them."""
    splits = {}
    for split in ("train", "dev", "test"):
        beside = file.with_name(f"Flickr_8k.{split}Images.txt")
        if beside.is_file():
            with open_unpacked(beside) as opened:
                splits.update(dict.fromkeys(opened.read().decode("utf-8", "replace").split(), canonical_split(split)))
    return splits


def _single_file(files: Sequence[Path]) -> Path:
    if len(files) > 1:
        raise UserError(f"{files[0].parent}: which of {', '.join(file.name for file in files[:5])}? Pass one of them")
    return files[0]


def _text(value: Any) -> str:
    """Return a value that must be text. Raises BadSample."""
    if not isinstance(value, str):
        raise BadSample("not-text", f"a {type(value).__name__}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadSample("not-utf8", f"{value[:80]!a} is not valid Unicode") from None
    return value


def _parts(file: Path, rows: Iterable[CaptionedImage], name: str, context: ReadContext) -> list[DatasetPart]:
    """Return the parts of one file by the splits of its rows."""
    splits: dict[str, list[CaptionedImage]] = defaultdict(list)
    for row in rows:
        splits[row.split].append(row)
    if not splits:
        raise UserError(f"{file}: holds no rows; fill it or remove it")
    stray = splits.pop(UNSPLIT, []) if len(splits) > 1 else []
    no_split = BadSample("no-split", "the image names no split, and others do")
    for row in stray:  # dropped with the rows of the first split
        next(iter(splits.values())).append(row._replace(problem=row.problem or no_split))
    return [_part(split, file, partial(_table, file, rows, name, context)) for split, rows in splits.items()]


def _part(split: str, file: Path, read: Callable[[Account], pa.Table]) -> DatasetPart:
    return DatasetPart(split, str(file), folder_spellings(file.parent, file.parent.parent), read)


def _table(file: Path, rows: Sequence[CaptionedImage], name: str, context: ReadContext, account: Account) -> pa.Table:
    import pyarrow as pa

    finder = ImageFinder(file, context.options.image_root)
    images, titles, numbers = [], [], []
    for row in rows:
        if row.problem is not None:
            account.drop(str(file), row.row, row.problem, row.image or None, row.titles[0] if row.titles else None)
            continue
        images.append(finder(row.image, row.folder))
        titles.append(row.titles)
        numbers.append(row.row)
    split = f", split {account.split}" if account.split else ""
    finder.check(file, split)
    if rows:
        account.apply("--image-root")
    captions = sum(map(len, titles))
    account.note(f"{file}{split}: {name}; {captions:,} captions of images like {finder.example}")
    kind = pa.large_string()
    return pa.table({"image": pa.array(images, kind), "title": pa.array(titles, pa.list_(kind)),
                     ROW: pa.array(numbers, pa.int64())})


def _is_kaggle(head: bytes) -> bool:
    return re.match(rb"(?:\xef\xbb\xbf)?image(?:_name)?,(?:comment_number,)?(?:caption|comment)\b", head) is not None


def _is_coco(head: bytes) -> bool:
    return b'"images"' in head and b'"file_name"' in head or b'"image_id"' in head and b'"caption"' in head


LAYOUTS = (
    Layout("Karpathy's splits", (".json",), re.compile(r"dataset_.*\.json"), ("", "annotations"),
           lambda head: b'"sentences"' in head and b'"filename"' in head, _karpathy),
    Layout("COCO's captions", (".json",), re.compile(r"captions_.*\.json"), ("", "annotations"), _is_coco, _coco),
    Layout("Kaggle's captions.txt", (".txt",), re.compile(r"captions\.txt"), ("",), _is_kaggle, _table_parts),
    Layout("Flickr30k's results.csv", (".csv",), re.compile(r"results\.csv"), ("", "flickr30k_images"),
           lambda head: re.match(rb"\s*image_name\s*\|", head) is not None, _table_parts),
    Layout("Flickr's captions by token", (".txt", ".token"), re.compile(r".*\.token(\.txt)?"), ("", "Flickr8k_text"),
           lambda head: re.match(rb"[^\n\t]+#\d+\t", head) is not None, _token),
)
