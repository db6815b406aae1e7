"""How a dataset is read, where the user says more than its address: columns, separator, splits, places of images."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from data.batch import UserError
from data.sources.rows import FLAGS, Columns

SEPARATORS = {"tab": "\t", r"\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}  # names of them, for the shell
ROLES = ("image", "title", "title_neg", "split")


@dataclass(frozen=True)
class ReadOptions:
    """The user's word on how a dataset is to be read; "" and empty: find out."""

    columns: Columns = Columns()
    delimiter: str = ""  # of text tables: one character
    encoding: str = ""  # of text tables: a codec of Python
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)  # ours -> names of the dataset's own
    image_root: str = ""  # the base of relative image paths, in place of the table's folder
    image_template: str = ""  # makes a path of an image id: "{}.jpg"
    templates: tuple[str, ...] = ()  # make titles of class names: "a photo of a {}"

    def by_flag(self) -> dict[str, object]:
        """Return the options that may find nothing to apply to, by the flag that sets them."""
        columns = {FLAGS[role]: self.columns.of(role) for role in ("image", "title", "title_neg")}
        return {**columns, "--delimiter": self.delimiter, "--encoding": self.encoding, "--image-root": self.image_root,
                "--image-template": self.image_template, "--template": self.templates}


def parse_delimiter(text: str) -> str:
    """Return the separator that --delimiter names. Raises UserError."""
    character = SEPARATORS.get(text.strip().lower(), text if len(text) == 1 else text.strip(" "))
    if text and (len(character) != 1 or character in '"\r\n\0'):
        raise UserError(f"--delimiter {text!r} must be one character such as ',' or ';', or tab")
    return character


def parse_encoding(text: str) -> str:
    """Return the codec that --encoding names. Raises UserError."""
    try:
        "".encode(text or "utf-8")
        return codecs.lookup(text).name if text else ""
    except LookupError:  # also of a codec that makes no text
        raise UserError(f"--encoding {text} is not known; there are utf-8, utf-16, cp1252, latin-1, …") from None


def parse_splits(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return ours -> theirs of --splits train=NAME,test=NAME+NAME. Raises UserError."""
    splits: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        ours, _, theirs = (part.strip() for part in pair.partition("="))
        names = tuple(name.strip() for name in theirs.split("+") if name.strip())
        if not ours or not names:
            raise UserError(f"--splits {pair}: write OURS=THEIRS, such as train=train+restval,test=validation")
        if ours in splits:
            raise UserError(f"--splits names {ours} twice; join its parts with +, as in {ours}=NAME+NAME")
        splits[ours] = names
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
    resolved = {role: getattr(columns, role) for role in ROLES}
    for role, value in resolved.items():
        if isinstance(value, str):
            resolved[role] = _name_of(value, names)
        elif value:
            resolved[role] = tuple(_name_of(name, names) for name in value)
    return replace(columns, **resolved)


def _name_of(column: str, names: Sequence[str]) -> str:
    is_position = column not in names and column.isdecimal() and 1 <= int(column) <= len(names)
    return names[int(column) - 1] if is_position else column
