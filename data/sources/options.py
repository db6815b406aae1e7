"""Settings of reading a dataset: columns, separator, encoding, splits, image paths, templates of titles."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data.batch import UserError
from data.sources.columns import FLAGS, Columns

SEPARATOR_NAMES = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}  # for the shell


@dataclass(frozen=True)
class ReadOptions:
    """Settings given by the user; "" and empty: detect."""

    columns: Columns = Columns()
    delimiter: str = ""  # of text tables, one character
    encoding: str = ""  # of text tables, a codec of Python
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)  # split -> its names in the dataset
    image_root: str = ""  # the folder that relative image paths start at, in place of the table's
    image_template: str = ""  # turns image ids into paths: "{}.jpg"
    templates: tuple[str, ...] = ()  # turn class names into titles: "a photo of a {}"
    lost: frozenset[str] = frozenset()  # paths of pictures that are rows of a folder though their files may be gone

    def by_flag(self) -> dict[str, object]:
        """Return the options that may find nothing to apply to, by the flag that sets them."""
        columns = {FLAGS[role]: self.columns.names(role) for role in ("image", "title", "title_neg")}
        return {**columns, "--delimiter": self.delimiter, "--encoding": self.encoding, "--image-root": self.image_root,
                "--image-template": self.image_template, "--template": self.templates}


def parse_delimiter(text: str) -> str:
    """Return the separator that --delimiter names. Raises UserError."""
    character = SEPARATOR_NAMES.get(text.strip().lower(), text if len(text) == 1 else text.strip(" "))
    if text and (len(character) != 1 or character in '"\r\n\0'):
        raise UserError(f"--delimiter {text!r} must be one character such as ',' or ';', or tab")
    return character


def parse_encoding(text: str) -> str:
    """Return the codec that --encoding names. Raises UserError."""
    try:
        "".encode(text or "utf-8")
        return codecs.lookup(text).name if text else ""
    except LookupError:  # also for a codec of bytes, such as base64
        raise UserError(f"--encoding {text} is not known; there are utf-8, utf-16, cp1252, latin-1, …") from None


def parse_splits(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return split -> its names in the dataset from --splits train=NAME,test=NAME+NAME. Raises UserError."""
    splits: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        split, _, joined = (part.strip() for part in pair.partition("="))
        names = tuple(name.strip() for name in joined.split("+") if name.strip())
        if not split or not names:
            raise UserError(f"--splits {pair}: write SPLIT=NAME, such as train=train+restval,test=validation")
        if split in splits:
            raise UserError(f"--splits names {split} twice; join its parts with +, as in {split}=NAME+NAME")
        splits[split] = names
    return splits


def parse_templates(parts: Sequence[str]) -> tuple[str, ...]:
    """Return the templates of --template A,B; a part without {} belongs to its neighbour. Raises UserError.

    Templates may hold commas themselves: "a photo of a {}, a type of pet".
    """
    templates: list[str] = []
    for part in parts:
        if templates and ("{}" not in part or "{}" not in templates[-1]):
            templates[-1] += f", {part}"
        else:
            templates.append(part)
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"--template {template!r} must hold {{}} once, where the class name goes")
    return tuple(templates)


def resolve_positions(columns: Columns, names: Sequence[str]) -> Columns:
    """Return `columns` with names in place of positions counted from 1, where no column is called so."""
    def resolve(column: str) -> str:
        is_position = column not in names and column.isdecimal() and 1 <= int(column) <= len(names)
        return names[int(column) - 1] if is_position else column

    return Columns(columns.image and resolve(columns.image), tuple(map(resolve, columns.title)),
                   tuple(map(resolve, columns.title_neg)), columns.split and resolve(columns.split))
