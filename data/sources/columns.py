"""The columns of a table by role: image, title, negative and split, by their names or as the user names them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from data.batch import UserError
from data.ledger import Account

CLASS_COLUMNS = ("label", "labels", "class", "class_name", "category")  # titles where nothing else is one
KNOWN = {  # role -> names of columns for it, the preferred ones first
    "image": ("image", "thumbnail", "thumbnail_url", "image_url", "url", "jpg", "jpeg", "png", "webp", "image_path",
              "file_name", "filename", "path", "img", "image_name", "filepath", "anchor", "positive"),
    "title": ("title", "text", "caption", "txt", "captions", "sentences", "sentences_raw", "raw", "comment", "positive",
              "anchor", *CLASS_COLUMNS),
    "title_neg": ("title_neg", "negative", "negatives", "neg", "neg_title", "negative_title", "neg_text",
                  "neg_caption"),
    "split": ("split",),
}
OPTIONAL = ("title_neg", "split")  # roles that a dataset may lack
NUMBERED = re.compile(r"(.*?)[_ .-]?(\d{1,3})")  # caption_0, caption1, caption 2: a family of columns
NEGATIVE = re.compile(r"(?<![a-z])(neg|negative|false|wrong|foil|distractor)s?(?![a-z])")  # in names like hard_negative
TUPLE = ("anchor", "positive")  # of sentence-transformers: either may be the image
FLAGS = {"image": "--image-column", "title": "--title-column", "title_neg": "--negative-column",
         "split": "--split-column"}


@dataclass(frozen=True)
class Columns:
    """Column names given by the user; None and (): detect. Each of several titles makes a row."""

    image: str | None = None
    title: tuple[str, ...] = ()
    title_neg: tuple[str, ...] = ()
    split: str | None = None

    def names(self, role: str) -> tuple[str, ...]:
        """Return the names given for a role."""
        if role in ("image", "split"):
            name = self.image if role == "image" else self.split
            return (name,) if name else ()
        return self.title if role == "title" else self.title_neg


def detect_columns(names: list[str], columns: Columns, source: str, account: Account,
                   with_bytes: Collection[str] = ()) -> dict[str, list[str]]:
    """Return role -> its columns: the user's, else those of the first known name, also numbered (caption_0, …).

    Of the known image columns those that hold pictures (`with_bytes`) are preferred; they are never titles. A choice
    among several is noted. Raises UserError naming the columns.
    """
    existing = f"there are {', '.join(_shown(names)) or 'none'}"
    picked: dict[str, list[str]] = {}
    choices, missing = [], []
    for role in KNOWN:
        given = columns.names(role)
        for name in set(given) - set(names):
            close = difflib.get_close_matches(name, names, 1)
            raise UserError(f"{source}: no column {name!r} for {FLAGS[role]}; {existing}"
                            + (f"; did you mean {close[0]!r}?" if close else ""))
        taken: list[str] = []  # by other roles
        for other in KNOWN:
            if other != role:
                taken += [*columns.names(other), *picked.get(other, ())]
        families = [] if given else _families(role, names, with_bytes, taken)
        if given:
            account.apply(FLAGS[role])
        if given or families:
            picked[role] = [*given] or families[0]
        elif role not in OPTIONAL:
            missing.append(role)
        unused = [*chain.from_iterable(families[1:])]
        unused += [] if given else _lookalikes(role, names, families)
        if unused or families and (len(families[0]) > 1 or families[0][0].strip().lower() in TUPLE):
            choices.append(f"{role} = {', '.join(_shown(picked.get(role, ()))) or 'none'}"
                           + (f" (not used: {', '.join(_shown(unused))})" if unused else ""))
    if missing:
        raise _no_column(missing, source, existing)
    if choices:
        account.note(f"columns: {'; '.join(choices)}")
    for column in chain.from_iterable(picked.values()):
        if names.count(column) > 1:
            raise UserError(f"{source}: the column {column[:100]!r} is there {names.count(column)} times; rename all "
                            "but one")
    return picked


def _no_column(roles: Sequence[str], source: str, existing: str) -> UserError:
    """Return the error for roles without a known column: all of them at once, with the flags that name columns."""
    lacking = " and ".join(f"no {role} column" for role in roles)
    flags = " and ".join(FLAGS[role] for role in roles)
    known = "; ".join(f"{role}: {', '.join(KNOWN[role])}" for role in roles)
    which = "name one with" if len(roles) == 1 else "name them with"
    return UserError(f"{source}: {lacking}; {existing}; {which} {flags} (known names are {known})")


def _families(role: str, names: Sequence[str], with_bytes: Collection[str], taken: Collection[str]) -> list[list[str]]:
    """Return the columns that a role may have, the preferred ones first: each known name with its numbered columns.

    Columns `taken` by other roles have none but that of the image.
    """
    numbered: dict[str, dict[int, str]] = {base: {} for base in KNOWN[role]}
    for name in reversed(names):  # of two spellings of one name (Image, image) the first column counts
        spelled = name.strip().lower()
        match = NUMBERED.fullmatch(spelled)
        if role != "image" and (name in taken or name in with_bytes):
            continue
        if spelled in numbered:
            numbered[spelled][-1] = name
        elif match and match[1] in numbered and role not in ("image", "split"):
            numbered[match[1]][int(match[2])] = name
    families: list[list[str]] = []
    for family in numbered.values():
        if family:
            families.append([family[number] for number in sorted(family)])
    if role == "image":
        # `positive` is an image only where it holds bytes: in most sets with an anchor both are text.
        families = [[name] for (name,) in families if name in with_bytes or name.strip().lower() != "positive"]
        families.sort(key=lambda family: family[0] not in with_bytes)  # stable: known names keep their order
    return families


def _lookalikes(role: str, names: Sequence[str], families: Sequence[Sequence[str]]) -> list[str]:
    """Return the columns of no family that may be meant for a role: image_2, hard_negative."""
    known = {*chain.from_iterable(families)}
    if role == "title_neg":
        return [name for name in names if name not in known and NEGATIVE.search(name.lower())]
    matches = [(name, NUMBERED.fullmatch(name.strip().lower())) for name in names if name not in known]
    return [name for name, match in matches if role == "image" and match and match[1] in KNOWN["image"]
            and match[1] not in TUPLE]


def _shown(names: Sequence[str]) -> list[str]:
    return [" ".join(name[:100].split()) for name in names[:20]]


def is_known(name: str) -> bool:
    """Return whether `detect_columns` may pick a column of this name."""
    spelled = name.strip().lower()
    match = NUMBERED.fullmatch(spelled)
    bases = {spelled, match[1]} if match else {spelled}
    return any(not bases.isdisjoint(known) for known in KNOWN.values())
