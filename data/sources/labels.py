"""Class names -> titles: "golden_retriever" becomes "golden retriever", or one title for each --template.

Titles with a column LABEL beside them are class names; the titles of one class are no negatives of each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.batch import UserError
from data.ledger import Account
from data.sources.lists import joined
from data.sources.rows import LABEL, Rows

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 3  # class names in a message
NUMBER = re.compile(r"-?\d+(\.0*)?")


def class_titles(table: pa.Table, templates: Sequence[str], source: str, account: Account) -> pa.Table:
    """Return the columns of `to_row_columns` with titles made of class names, if there are any, or `templates`.

    Each template makes a row. Raises UserError for classes that are numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if LABEL not in table.column_names and not templates:
        return table
    text = pc.utf8_trim_whitespace(table["title"])
    is_class = pc.not_equal(text, "")
    if LABEL in table.column_names:  # null where a title is no class name
        is_class = pc.and_(is_class, pc.is_valid(table[LABEL]))
    classes = pc.if_else(is_class, text, pa.scalar(None, pa.large_string()))
    names = sorted(pc.unique(classes.drop_null()).to_pylist())
    _refuse_numbers(names, source)
    table = table.drop_columns([LABEL]) if LABEL in table.column_names else table
    if not names:
        return table
    account.apply("--template")
    shown = ", ".join(name[:40] for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    several = f", each in {len(templates)} templates" if len(templates) > 1 else ""
    account.note(f"{source}: the titles are the names of {len(names):,} classes ({shown}){several}")
    if templates and "title_neg" in table.column_names and pc.sum(pc.list_value_length(table["title_neg"])).as_py():
        account.note(f"{source}: --template makes titles, negatives stay as they are")
    spelt = pc.replace_substring(classes, "_", " ")
    titles = []
    for template in templates or ("{}",):
        before, _, after = template.partition("{}")
        filled = joined(before, spelt, after)
        titles.append(pc.coalesce(filled, table["title"]))
    table = table.append_column(LABEL, classes)
    if len(titles) == 1:
        return table.set_column(table.column_names.index("title"), "title", titles[0])
    row_N = np.repeat(np.arange(len(table)), len(titles))
    # The tables, one for each template, lie end to end. Their rows are taken so that the titles of a row follow each
    # other; a title that is no class name is the same in all of them and is taken once.
    row_N += np.tile(np.arange(len(titles)) * len(table), len(table))
    is_class_N = classes.is_valid().to_numpy()
    row_N = row_N[(row_N < len(table)) | is_class_N[row_N % len(table)]]
    parts = [table.set_column(table.column_names.index("title"), "title", title) for title in titles]
    return pa.concat_tables(parts).take(pa.array(row_N))


def _refuse_numbers(names: Sequence[str], source: str) -> None:
    """Raise UserError if all class names are numbers, which mean nothing to a text tower.

    A column of numbers with gaps is written as 0.0, 1.0 by pandas; -1 is no class.
    """
    if names and all(NUMBER.fullmatch(name) for name in names):
        shown = ", ".join(names[:SHOWN])
        raise UserError(f"{source}: the classes are numbers ({shown}, …), which are no titles; write their names in "
                        "place of them, or name a column of text with --title-column")


def class_codes(rows: Rows) -> np.ndarray:
    """Return the number of each row's class, int64 [N]; -1 if its title is no class name."""
    import pyarrow.compute as pc

    if rows.label is None:
        return np.full(len(rows), -1, np.int64)
    codes = rows.label.combine_chunks().dictionary_encode().indices
    return pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def count_classes(splits: Mapping[str, Rows]) -> dict[str, int]:
    """Return the number of classes of each split whose titles are all class names."""
    import pyarrow.compute as pc

    counts = {}
    for name, rows in splits.items():
        if rows.label is not None and not pc.any(pc.and_(pc.is_null(rows.label), pc.not_equal(rows.title, ""))).as_py():
            counts[name] = pc.count_distinct(rows.label, mode="only_valid").as_py()
    return counts


def title_groups(splits: Mapping[str, Rows], title_N: Mapping[str, np.ndarray], titles: int) -> Tensor | None:
    """Return the number of the first title of each title's class, int64 [titles]; None without classes.

    `title_N` has the number of each row's title by split. Titles of no class are groups of their own.
    """
    first: dict[str, int] = {}
    group_P = np.arange(titles)
    for name, rows in splits.items():
        if rows.label is None:
            continue
        code_N, title_of_N = class_codes(rows), title_N[name]
        names = rows.label.combine_chunks().dictionary_encode().dictionary.to_pylist()
        pairs = np.unique(np.stack([code_N, title_of_N])[:, code_N >= 0], axis=1)
        for code, title in pairs.T.tolist():
            group = first.setdefault(names[code], title)
            group_P[title] = min(group, group_P[title])
    return torch.from_numpy(group_P) if first else None
