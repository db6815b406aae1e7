"""The splits that a dataset has itself, by its files or by a column, and those that --splits makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.options import ReadOptions
from data.sources.rows import ROW, drop_rows

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
UNSPLIT = "all"  # the split of a dataset that names none
SPLITS = ("train", "valid", "test")
COLUMN = "split"  # the role of a column that says the split of each row
SPLIT_NAMES = {  # spellings of our splits; restval are the rows of COCO that Karpathy adds to train
    "train": "train", "training": "train", "restval": "train", "valid": "valid", "validation": "valid", "val": "valid",
    "dev": "valid", "test": "test", "testing": "test"}


def canonical_split(name: str) -> str:
    """Return our name of a split: valid for val; one of another kind keeps its own."""
    return SPLIT_NAMES.get(name.strip().lower(), name.strip())


def select_groups(groups: Mapping[str, Sequence[T]], options: ReadOptions, account: Account) -> dict[str, list[T]]:
    """Return the groups of tables by our split, of several only those that --splits names, if it is given.

    A lone group comes as it is, and all are one where the user names a column of splits. Raises UserError for names
    that are not there.
    """
    if options.columns.split is not None and len(groups) > 1:
        return {UNSPLIT: [table for group in groups.values() for table in group]}
    if len(groups) == 1:
        return {name: list(group) for name, group in groups.items()}
    ours = _ours(list(groups), options)
    if not options.splits:  # val beside validation stays a split of its own
        taken = list(ours.values())
        ours = {name: our if taken.index(our) == place else name for place, (name, our) in enumerate(ours.items())}
    selected: dict[str, list[T]] = {}
    for name, group in groups.items():
        if name in ours:
            selected.setdefault(ours[name], []).extend(group)
    unused = [name for name in groups if name not in ours]
    if unused:
        account.note(f"--splits leaves out {', '.join(unused)}")
    return selected


def select_shards(shards: Mapping[str, Sequence[T]], options: ReadOptions, account: Account) -> dict[str, list[T]]:
    """Return shards by our split, as `select_groups` does; shards have no column of splits that could say another.

    Raises UserError for names of --splits that are not there.
    """
    selected = select_groups(shards, options, account)
    if len(shards) == 1 and options.splits:
        ours = _ours([*selected], options)
        return {ours[name]: group for name, group in selected.items()}
    return selected


def without_split_column(name: str, tables: Sequence[pa.Table], account: Account) -> list[pa.Table]:
    """Return the tables of one of several splits without their column of splits, and say so where it says another."""
    others = {canonical_split(str(value)) for table in tables for value in _values(table)} - {"", name}
    if others:
        account.note("the column 'split' is not used, as the dataset names its splits; --split-column split uses it "
                     "instead")
    return [_without_column(table) for table in tables]


def divide_by_column(name: str, tables: Sequence[pa.Table], sources: Sequence[str], options: ReadOptions,
                     account: Account) -> dict[str, list[pa.Table]]:
    """Return the tables of the split `name` by the split that their rows say.

    Where they say none, by `name` itself, as --splits has it. Rows that name no split are dropped. `sources` name the
    tables. Raises UserError for names of --splits that are not there.
    """
    import pyarrow as pa

    values = [_values(table) for table in tables]
    counts: dict[str, int] = {}
    for each in values:
        for value, count in zip(*np.unique(each, return_counts=True), strict=True):
            counts[str(value)] = counts.get(str(value), 0) + int(count)
    blank = counts.pop("", 0)
    if not _says_splits(counts, options, sources, account):
        renamed = _ours([name], options).get(name, name) if options.splits else name
        return {renamed: [_without_column(table) for table in tables]}
    ours = _ours(list(counts), options)
    divided: dict[str, list[pa.Table]] = {}
    for source, table, value_N in zip(sources, tables, values, strict=True):
        number_N = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
        problems = {int(row): BadSample("no-split", "the row names no split") for row in np.flatnonzero(value_N == "")}
        drop_rows(table, problems, number_N, source, account)
        our_N = np.array([ours.get(str(value), "") for value in value_N], object)
        for split in dict.fromkeys(ours.values()):
            divided.setdefault(split, []).append(_without_column(table).filter(pa.array(our_N == split)))
    account.note(_describe(sources[0], counts, blank, ours))
    return divided


def _values(table: pa.Table) -> np.ndarray:
    """The split that each row says, "" for none; an array of str [N]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if COLUMN not in table.column_names:
        return np.array([], object)
    try:
        texts = pc.fill_null(pc.utf8_trim_whitespace(table[COLUMN].cast(pa.string())), "")
        return texts.to_numpy().astype(object)
    except pa.ArrowException:  # lists, or text that is not UTF-8
        return np.full(len(table), "", object)


def _says_splits(counts: Mapping[str, int], options: ReadOptions, sources: Sequence[str], account: Account) -> bool:
    """True if rows are divided by the column: the user's, or one with one of the usual values. Raises UserError."""
    if not counts and options.columns.split is not None:
        raise UserError(f"{sources[0]}: --split-column {options.columns.split} holds no names of splits")
    if not counts:
        return False
    if options.columns.split is not None or any(value.lower() in SPLIT_NAMES for value in counts):
        return True
    shown = ", ".join(value[:40] for value in sorted(counts)[:3])
    account.note(f"{sources[0]}: the column 'split' ({shown}, …) names neither train, valid nor test and is not used; "
                 "--split-column split uses it")
    return False


def _without_column(table: pa.Table) -> pa.Table:
    return table.drop_columns([COLUMN]) if COLUMN in table.column_names else table


def _ours(names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Our split of each of the dataset's own `names`; those that --splits does not name are absent."""
    if not options.splits:
        return {name: canonical_split(name) for name in names}
    ours: dict[str, str] = {}
    for our, theirs in options.splits.items():
        for their in theirs:
            matches = [name for name in names if name == their]
            matches = matches or [name for name in names if canonical_split(name) == canonical_split(their)
                                  or (name == UNSPLIT and their in (UNSPLIT, SPLITS[0]))]
            if not matches:
                ordered = sorted(names, key=lambda name: (*SPLITS, name).index(name))
                there = ", ".join("train (it names no splits)" if name == UNSPLIT else name for name in ordered)
                raise UserError(f"--splits {our}={their}: there is no split {their!r}; there is {there}")
            for name in matches:
                if name in ours:
                    raise UserError(f"--splits uses {name!r} twice; name it once")
                ours[name] = canonical_split(our)
    return ours


def _describe(source: str, counts: Mapping[str, int], blank: int, ours: Mapping[str, str]) -> str:
    parts = []
    for split in dict.fromkeys(ours.values()):
        own = [name for name in counts if ours.get(name) == split]
        spelt = f" ({' + '.join(own)})" if own != [split] else ""
        parts.append(f"{split} {sum(counts[name] for name in own):,}{spelt}")
    unused = [f"{name} {count:,}" for name, count in counts.items() if name not in ours]
    text = f"{source}: rows by its column of splits: {', '.join(parts)}"
    text += f"; {blank:,} that name none are dropped" if blank else ""
    return text + (f"; not used: {', '.join(unused)}" if unused else "")
