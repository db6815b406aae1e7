"""The output of img2dataset: images as `parquet` (column jpg), `files` or `webdataset`, beside tables of addresses.

Its tables have a row for every address, with "status" and "error_message" where there is no image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.batch import BadSample
from data.ledger import Account
from data.reading import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

PART = re.compile(r"\d{4,}\.parquet")
STATUS = ("status", "error_message")
SUCCESS = "success"


def status_columns(names: Sequence[str]) -> list[str]:
    """Return the columns with the download status of each address; empty for a table of another kind."""
    return [*STATUS] if set(STATUS) <= set(names) else []


def failed(table: pa.Table) -> dict[int, BadSample]:
    """Return the rows without an image, with their status as the reason."""
    import pyarrow as pa
    import pyarrow.compute as pc

    status = table[STATUS[0]].cast(pa.large_string())
    rows = pc.indices_nonzero(pc.fill_null(pc.not_equal(status, SUCCESS), True)).to_pylist()
    problems = {}
    for row in rows:
        reason = str(status[row].as_py() or "no-image").replace("_", "-")
        problems[row] = BadSample(reason, str(table[STATUS[1]][row].as_py() or ""))
    return problems


def report_failures(files: Sequence[Path], account: Account) -> None:
    """Drop the failed rows of the tables that lie beside shards NAME.tar or folders NAME/ of the same name."""
    import pyarrow as pa
    from pyarrow import parquet

    for path in files:
        is_beside = path.with_suffix(".tar").is_file() or path.with_suffix("").is_dir()
        if not PART.fullmatch(path.name) or not is_beside:
            continue
        try:
            open_regular(path).close()
            with parquet.ParquetFile(path) as file:
                columns = status_columns(file.schema_arrow.names)
                if not columns:
                    continue
                urls = [name for name in ("url", "caption") if name in file.schema_arrow.names]
                table = file.read(columns=[*columns, *urls])
                problems = failed(table)
        except (pa.ArrowException, OSError, ValueError) as error:
            account.note(f"{path}: not read for failed rows ({' '.join(str(error).split())[:200]})")
            continue
        for row, problem in problems.items():
            url, title = (str(table[name][row].as_py()) if name in urls else None for name in ("url", "caption"))
            account.drop(str(path), row, problem, url, title)
