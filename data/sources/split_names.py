"""The splits of a dataset by its files or by a column, and how --splits renames, joins and selects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from data.batch import BadSample, UserError
from data.ledger import Account
from data.sources.lists import decoded
from data.sources.options import ReadOptions
from data.sources.rows import ROW, drop_rows

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
UNSPLIT = "all"  # the name of all rows of a dataset without splits
SPLITS = ("train", "valid", "test")
COLUMN = "split"  # the role of a column that holds the split of each row
SPLIT_NAMES = {  # spelling -> split; restval are the rows of COCO that Karpathy adds to train
    "train": "train", "training": "train", "restval": "train", "valid": "valid", "validation": "valid", "val": "valid",
    "dev": "valid", "test": "test", "testing": "test"}


def canonical_split(name: str) -> str:
    """Return train, valid or test for a spelling of these; other names stay as they are."""
    return SPLIT_NAMES.get(name.strip().lower(), name.strip())


def select_groups(groups: Mapping[str, Sequence[T]], options: ReadOptions, account: Account) -> dict[str, list[T]]:
    """Return the groups of tables by canonical split, only those that --splits names if it is given.

    A single group stays as it is. With --split-column, all groups become one. Raises UserError for a split that is not
    there.
    """
    if options.columns.split is not None and len(groups) > 1:
        return {UNSPLIT: [*chain.from_iterable(groups.values())]}
    if len(groups) == 1:
        return {name: list(group) for name, group in groups.items()}
    renamed = _rename(list(groups), options)
    selected: dict[str, list[T]] = {}
    for name, group in groups.items():
        split = renamed.get(name)
        if split in selected and not options.splits:  # val beside validation stays a split of its own
            split = name
        if split is not None:
            selected.setdefault(split, []).extend(group)
    unused = [name for name in groups if name not in renamed]
    if unused:
        account.note(f"--splits leaves out {', '.join(unused)}")
    return selected


def select_shards(shards: Mapping[str, Sequence[T]], options: ReadOptions, account: Account) -> dict[str, list[T]]:
    """Return shards by our split, as `select_groups` does; shards have no column of splits that could say another.

    Raises UserError for names of --splits that are not there.
    """
    selected = select_groups(shards, options, account)
    if len(shards) == 1 and options.splits:
        ours = _rename([*selected], options)
        return {ours[name]: group for name, group in selected.items()}
    return selected


def without_split_column(name: str, tables: Sequence[pa.Table], account: Account) -> list[pa.Table]:
    """Return the tables of one of several splits without their column of splits; other names in it are noted."""
    others: set[str] = set()
    for table in tables:
        others.update(map(canonical_split, _values(table).unique().to_pylist()))
    if others - {"", name}:
        account.note("the column 'split' is not used, as the dataset names its splits; --split-column split uses it "
                     "instead")
    return [_without_column(table) for table in tables]


def divide_by_column(name: str, tables: Sequence[pa.Table], sources: Sequence[str], options: ReadOptions,
                     account: Account) -> dict[str, list[pa.Table]]:
    """Return the tables of the split `name`, divided by their column of splits where they have one.

    Rows without a split there are dropped. `sources` name the tables. Raises UserError for a split of --splits that is
    not there.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = [_values(table) for table in tables]
    counts: dict[str, int] = {}
    for each in values:
        for entry in sorted(pc.value_counts(each).to_pylist(), key=itemgetter("values")):
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    blank = counts.pop("", 0)
    if not _names_splits(counts, options, sources, account):
        split = _rename([name], options).get(name, name) if options.splits else name
        return {split: [_without_column(table) for table in tables]}
    renamed = _rename(list(counts), options)
    divided: dict[str, list[pa.Table]] = {}
    for source, table, value_N in zip(sources, tables, values, strict=True):
        number_N = table[ROW].to_numpy() if ROW in table.column_names else np.arange(len(table))
        blank_rows = np.flatnonzero(pc.equal(value_N, ""))
        problems = {int(row): BadSample("no-split", "the row names no split") for row in blank_rows}
        drop_rows(table, problems, number_N, source, account)
        for split in dict.fromkeys(renamed.values()):
            names = pa.array([name for name, new in renamed.items() if new == split], pa.large_string())
            divided.setdefault(split, []).append(_without_column(table).filter(pc.is_in(value_N, names)))
    account.note(_describe(sources[0], counts, blank, renamed))
    return divided


def _values(table: pa.Table) -> pa.ChunkedArray:
    """Return the split that each row names, "" for none; a string for each row, none at all without the column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if COLUMN not in table.column_names:
        return pa.chunked_array([], pa.large_string())
    try:
        texts = [decoded(chunk).cast(pa.large_string()) for chunk in table[COLUMN].chunks]
        plain = pa.chunked_array(texts, pa.large_string())
        return pc.fill_null(pc.utf8_trim_whitespace(plain), "")
    except pa.ArrowException:  # lists, or text that is not UTF-8
        return pa.chunked_array([[""] * len(table)], pa.large_string())


def _names_splits(counts: Mapping[str, int], options: ReadOptions, sources: Sequence[str], account: Account) -> bool:
    """Return whether the column divides the rows: it is the user's, or has a usual value. Raises UserError."""
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


def _rename(names: Sequence[str], options: ReadOptions) -> dict[str, str]:
    """Return the canonical split of each of the dataset's `names`; those that --splits does not name are absent."""
    if not options.splits:
        return {name: canonical_split(name) for name in names}
    renamed: dict[str, str] = {}
    wanted: list[tuple[str, str]] = []
    for split, sources in options.splits.items():
        wanted += [(split, name) for name in sources]
    for split, sought in wanted:
        matches = [sought] if sought in names else [name for name in names if _is_same(name, sought)]
        if not matches:
            ordered = sorted(names, key=lambda name: (*SPLITS, name).index(name))
            there = ", ".join("train (it names no splits)" if name == UNSPLIT else name for name in ordered)
            raise UserError(f"--splits {split}={sought}: there is no split {sought!r}; there is {there}")
        for name in matches:
            if name in renamed:
                raise UserError(f"--splits uses {name!r} twice; name it once")
            renamed[name] = canonical_split(split)
    return renamed


def _is_same(name: str, sought: str) -> bool:
    """Return whether two names are spellings of one split; rows without splits count as train."""
    return canonical_split(name) == canonical_split(sought) or (name == UNSPLIT and sought == "train")


def _describe(source: str, counts: Mapping[str, int], blank: int, renamed: Mapping[str, str]) -> str:
    parts = []
    for split in dict.fromkeys(renamed.values()):
        own = [name for name in counts if renamed.get(name) == split]
        spelt = f" ({' + '.join(own)})" if own != [split] else ""
        parts.append(f"{split} {sum(counts[name] for name in own):,}{spelt}")
    unused = [f"{name} {count:,}" for name, count in counts.items() if name not in renamed]
    text = f"{source}: rows by its column of splits: {', '.join(parts)}"
    text += f"; {blank:,} that name none are dropped" if blank else ""
    return text + (f"; not used: {', '.join(unused)}" if unused else "")
