"""Measure how every kind of dataset is read, at 10,000 to 1,000,000 rows, and print a table.

python -m tests.bench.load [--rows 10000,100000,1000000] [--only "CSV;Parquet"] [--check]

Each dataset is written by the library that makes it in the world, read in a process of its own, and, where pyarrow
reads its file, read by pyarrow in another. A title has about 60 characters, every tenth repeats, each row has a
negative.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

from PIL import Image

from data.text import markdown_table

from .jobs import python

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

IMAGES = 1000  # that rows share where a format allows it
STEP = 10_000  # rows that are Python objects at one time
WORDS = "cat dog river code robot train music paint star moon salad bike chess tower garden ocean camera guitar".split()
PEAK = """
import re
def peak():  # of this program; ru_maxrss would count the process that started it too
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
READ = """
import json, time
from pathlib import Path
from data.catalogue import build_catalogue
from data.sources.source import load_splits
notes, ledger = [], []
wall, cpu = time.perf_counter(), time.process_time()
rows = load_splits({dataset!r}, ledger=ledger.append, log=notes.append, embedded=Path({dataset!r} + "-cache"))
used = time.process_time() - cpu, time.perf_counter() - wall
kilobytes = peak()
print(json.dumps([*used, kilobytes, sum(map(len, rows.values())), len(ledger)]))
"""
ARROW = """
import json, time
from pathlib import Path
import pyarrow as pa
from pyarrow import csv, feather, json as lines, parquet
wall, cpu = time.perf_counter(), time.process_time()
table = {call}
used = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps([*used, peak(), len(table)]))
"""
CHECK = """
import contextlib, io, json, time
import run
wall, cpu = time.perf_counter(), time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    code = run.main(["check", "--dataset", {dataset!r}, "--cache-dir", {dataset!r} + "-cache", "--quiet"])
used = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps([*used, peak(), code]))
"""
HEADINGS = ("dataset", "rows", "read: CPU s", "wall s", "peak MB", "pyarrow: CPU s", "peak MB", "check: CPU s",
            "peak MB")


class Kind(NamedTuple):
    """A kind of dataset: what writes it, what pyarrow reads it with ({} is its folder), and its largest size."""

    write: Callable[[Path, int], None]
    arrow: str = ""
    most: int = 1 << 62
    is_checked: bool = False


def titles(start: int, stop: int) -> Iterator[str]:
    """Yield titles of about 60 characters, of which every tenth repeats an earlier one."""
    for row in range(start, stop):
        number = row if row % 10 else row // 100
        words = " ".join(WORDS[(number * step + step) % len(WORDS)] for step in (1, 5, 7, 11))
        yield f"How I made a {words} in {number:07d} days, part {number % 97}"


def columns(start: int, stop: int) -> dict[str, list[str]]:
    """Return the columns of some rows as pandas takes them."""
    images = [f"images/{row % IMAGES}.jpg" for row in range(start, stop)]
    return {"image": images, "title": [*titles(start, stop)], "title_neg": [*titles(start + 5, stop + 5)]}


def frame(rows: int) -> pd.DataFrame:
    """Return all rows as a frame of pandas."""
    import pandas as pd

    return pd.DataFrame(columns(0, rows))


@cache
def jpeg(number: int = 0, side: int = 72) -> bytes:
    """Return a small picture; each number another one."""
    file, colour = io.BytesIO(), (number * 37 % 256, number * 91 % 256, number // 4 % 256)
    picture = Image.new("RGB", (side, side), colour)
    picture.paste((255 - colour[0], 0, 128), (number % 50, number // 50 % 50, side, side))
    picture.save(file, "JPEG", quality=50)
    return file.getvalue()


def write_images(folder: Path) -> None:
    """Write the pictures that rows share."""
    (folder / "images").mkdir()
    for number in range(IMAGES):
        (folder / f"images/{number}.jpg").write_bytes(jpeg(number))


def _pandas(name: str, method: str, **options: Any) -> Callable[[Path, int], None]:
    def write(folder: Path, rows: int) -> None:
        write_images(folder)
        getattr(frame(rows), method)(folder / name, **options)
    return write


def _dataset(folder: Path, rows: int, **more: Any) -> Any:
    from datasets import Dataset

    return Dataset.from_pandas(frame(rows), preserve_index=False)


def _saved(folder: Path, rows: int) -> None:
    write_images(folder)
    saved = folder / "saved"
    _dataset(folder, rows).save_to_disk(str(saved))
    for file in saved.iterdir():
        file.rename(folder / file.name)


def _embedded_batches(rows: int) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for start in range(0, rows, STEP):
        some = columns(start, min(rows, start + STEP))
        some["image"] = pa.array([{"bytes": jpeg(row % IMAGES) + row.to_bytes(4, "big"), "path": None}
                                  for row in range(start, min(rows, start + STEP))], picture)
        yield pa.record_batch(some)


def _embedded(folder: Path, rows: int) -> None:
    """Write Parquet as `Dataset.to_parquet` does, a batch at a time: all pictures in memory would be a gigabyte."""
    from pyarrow import parquet

    batches = _embedded_batches(rows)
    first = next(batches)
    with parquet.ParquetWriter(folder / "train.parquet", first.schema) as file:
        file.write_batch(first)
        for batch in batches:
            file.write_batch(batch)


def _categories(folder: Path, rows: int) -> None:
    write_images(folder)
    frame(rows).astype("category").to_parquet(folder / "train.parquet")


def _caption_lists(folder: Path, rows: int) -> None:
    import pandas as pd

    write_images(folder)
    images = [f"images/{row % IMAGES}.jpg" for row in range(rows // 5)]
    every = iter(titles(0, rows))
    pd.DataFrame({"image": images, "caption": [[*islice(every, 5)] for _ in images]}).to_parquet(
        folder / "train.parquet")


def _hive(folder: Path, rows: int) -> None:
    write_images(folder)
    table = frame(rows)
    table["image"] = str(folder) + "/" + table["image"]
    table["year"] = table.index % 10 + 2010
    table.to_parquet(folder, partition_cols=["year"])


def _several_csv(folder: Path, rows: int) -> None:
    write_images(folder)
    table = frame(rows)
    for part in range(10):
        table.iloc[part * rows // 10:(part + 1) * rows // 10].to_csv(folder / f"{part:04d}.csv", index=False)


def _json_array(folder: Path, rows: int) -> None:
    write_images(folder)
    with (folder / "train.json").open("w") as file:  # as json.dump(list) writes it
        for start in range(0, rows, STEP):
            some = frame_records(start, min(rows, start + STEP))
            file.write(("[" if start == 0 else ", ") + json.dumps(some)[1:-1])
        file.write("]")


def frame_records(start: int, stop: int) -> list[dict[str, str]]:
    """Return some rows as objects."""
    some = columns(start, stop)
    return [dict(zip(some, row, strict=True)) for row in zip(*some.values(), strict=True)]


def _karpathy(folder: Path, rows: int) -> None:
    write_images(folder)
    every = iter(titles(0, rows))
    images = [{"filename": f"{row % IMAGES}.jpg", "imgid": row, "split": ("train", "val", "test")[row % 3],
               "sentids": [*range(5)], "sentences": [
                   {"raw": title, "tokens": title.split(), "imgid": row, "sentid": 5 * row + place}
                   for place, title in enumerate(islice(every, 5))]} for row in range(rows // 5)]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def _coco(folder: Path, rows: int) -> None:
    write_images(folder)
    images = [{"license": 1, "file_name": f"{row % IMAGES}.jpg", "id": row, "height": 72, "width": 72}
              for row in range(rows // 5)]
    annotations = [{"image_id": row // 5, "id": row, "caption": title} for row, title in enumerate(titles(0, rows))]
    (folder / "captions_train2017.json").write_text(
        json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))


def _kaggle(folder: Path, rows: int) -> None:
    write_images(folder)
    (folder / "images").rename(folder / "Images")
    with (folder / "captions.txt").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((f"{row % IMAGES}.jpg", title) for row, title in enumerate(titles(0, rows)))


def _tokens(folder: Path, rows: int) -> None:
    write_images(folder)
    with (folder / "Flickr8k.token.txt").open("w") as file:
        file.writelines(f"{row % IMAGES}.jpg#{row // IMAGES}\t{title}\n" for row, title in enumerate(titles(0, rows)))


def _metadata(folder: Path, rows: int) -> None:
    table = frame(rows).rename(columns={"image": "file_name", "title": "text"})
    write_images(folder)
    table.to_csv(folder / "metadata.csv", index=False)


def _link(folder: Path, names: Iterator[str]) -> None:
    """Write a picture under many names: links to one file, of which a file system allows some ten thousands."""
    for number, name in enumerate(names):
        if number % STEP == 0:
            original = folder / name
            original.write_bytes(jpeg(number // STEP))
        else:
            os.link(original, folder / name)


def _class_folders(folder: Path, rows: int) -> None:
    for number in range(100):
        (folder / f"class_{number}").mkdir()
    _link(folder, (f"class_{row % 100}/{row}.jpg" for row in range(rows)))


def _texts(folder: Path, rows: int) -> None:
    _link(folder, (f"{row:07d}.jpg" for row in range(rows)))
    for row, title in enumerate(titles(0, rows)):
        (folder / f"{row:07d}.txt").write_text(title)


def _webdataset(folder: Path, rows: int, index: bool = False) -> None:
    import webdataset

    every = iter(enumerate(titles(0, rows)))
    for shard, _ in enumerate(range(0, rows, STEP)):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for row, title in islice(every, STEP):
                writer.write({"__key__": f"{row:09d}", "jpg": jpeg(row % IMAGES), "txt": title})


def _img2dataset_files(folder: Path, rows: int) -> None:
    every = iter(enumerate(titles(0, rows)))
    for shard, _ in enumerate(range(0, rows, STEP)):
        here = folder / f"{shard:05d}"
        here.mkdir()
        for row, title in islice(every, STEP):
            key = here / f"{shard:05d}{row % STEP:04d}"
            key.with_suffix(".jpg").write_bytes(jpeg(row % IMAGES))
            key.with_suffix(".txt").write_text(title)
            key.with_suffix(".json").write_text(json.dumps(_img2dataset_row(row, title)))


def _img2dataset_row(row: int, title: str) -> dict[str, Any]:
    return {"caption": title, "url": f"https://example.org/{row}.jpg", "key": f"{row:09d}", "status": "success",
            "error_message": None, "width": 72, "height": 72, "exif": "{}", "sha256": f"{row:064x}"}


def _img2dataset_tars(folder: Path, rows: int) -> None:
    import pandas as pd

    every = iter(enumerate(titles(0, rows)))
    for shard, _ in enumerate(range(0, rows, STEP)):
        records = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row, title in islice(every, STEP):
                records.append(_img2dataset_row(row, title))
                for ending, content in ((".jpg", jpeg(row % IMAGES)), (".txt", title.encode()),
                                        (".json", json.dumps(records[-1]).encode())):
                    member = tarfile.TarInfo(f"{row:09d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        pd.DataFrame(records).to_parquet(folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(records)}))


def _img2dataset_parquet(folder: Path, rows: int) -> None:
    import pandas as pd

    every = iter(enumerate(titles(0, rows)))
    for shard, _ in enumerate(range(0, rows, STEP)):
        records = [{**_img2dataset_row(row, title), "jpg": jpeg(row % IMAGES)} for row, title in islice(every, STEP)]
        pd.DataFrame(records).to_parquet(folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(records)}))


def _laion(folder: Path, rows: int) -> None:
    table = frame(rows)
    urls = [f"https://cdn.example.org/products/{row:09d}/large.jpg" for row in range(rows)]
    table.assign(URL=urls, TEXT=table["title"], WIDTH=512, HEIGHT=512, similarity=0.31)[
        ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity"]].to_parquet(folder / "part-00000.snappy.parquet")


def _conceptual_captions(folder: Path, rows: int) -> None:
    with (folder / "Train_GCC-training.tsv").open("w") as file:
        file.writelines(f"{title}\thttps://cdn.example.org/{row:09d}/large.jpg\n"
                        for row, title in enumerate(titles(0, rows)))


def _gzip(ending: str, write: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    def packed(folder: Path, rows: int) -> None:
        write(folder, rows)
        file = folder / f"train.{ending}"
        with file.open("rb") as plain, gzip.open(f"{file}.gz", "wb", compresslevel=6) as target:
            shutil.copyfileobj(plain, target)
        file.unlink()
    return packed


CSV = _pandas("train.csv", "to_csv", index=False)
LINES = _pandas("train.jsonl", "to_json", orient="records", lines=True)
READ_CSV = ("csv.read_csv({!r}, parse_options=csv.ParseOptions(newlines_in_values=True), "
            "convert_options=csv.ConvertOptions(include_columns=['image', 'title', 'title_neg']))")
KINDS = {
    "CSV": Kind(CSV, READ_CSV.replace("{!r}", "'{0}/train.csv'"), is_checked=True),
    "TSV": Kind(_pandas("train.tsv", "to_csv", index=False, sep="\t"),
                "csv.read_csv('{0}/train.tsv', parse_options=csv.ParseOptions(delimiter='\\t'))"),
    "CSV, packed": Kind(_gzip("csv", CSV), "csv.read_csv('{0}/train.csv.gz')"),
    "several CSVs": Kind(_several_csv,
                         "pa.concat_tables([csv.read_csv(f'{0}/{{part:04d}}.csv') for part in range(10)])"),
    "JSON lines": Kind(LINES, "lines.read_json('{0}/train.jsonl')", is_checked=True),
    "JSON lines, packed": Kind(_gzip("jsonl", LINES), "lines.read_json('{0}/train.jsonl.gz')"),
    "JSON array": Kind(_json_array),
    "JSON columns by pandas": Kind(_pandas("train.json", "to_json")),
    "Parquet": Kind(_pandas("train.parquet", "to_parquet"), "parquet.read_table('{0}/train.parquet')", is_checked=True),
    "Parquet, categories": Kind(_categories, "parquet.read_table('{0}/train.parquet')"),
    "Parquet, five captions in a list": Kind(_caption_lists, "parquet.read_table('{0}/train.parquet')"),
    "Parquet, pictures within": Kind(_embedded, "parquet.read_table('{0}/train.parquet')"),
    "Parquet in folders YEAR=": Kind(
        _hive, "pa.concat_tables([parquet.ParquetFile(f).read() for f in Path('{0}').glob('y*/*')])"),
    "Feather": Kind(_pandas("train.feather", "to_feather"), "feather.read_table('{0}/train.feather')"),
    "`save_to_disk`": Kind(_saved),
    "LAION, addresses": Kind(_laion, "parquet.read_table('{0}/part-00000.snappy.parquet', columns=['URL', 'TEXT'])"),
    "Conceptual Captions": Kind(_conceptual_captions, "csv.read_csv('{0}/Train_GCC-training.tsv', csv.ReadOptions("
                                "column_names=['a', 'b']), csv.ParseOptions(delimiter='\\t'))"),
    "Karpathy's JSON": Kind(_karpathy),
    "COCO's JSON": Kind(_coco),
    "Kaggle's captions.txt": Kind(_kaggle, "csv.read_csv('{0}/captions.txt')"),
    "Flickr8k.token.txt": Kind(_tokens),
    "imagefolder, metadata.csv": Kind(_metadata, "csv.read_csv('{0}/metadata.csv')"),
    "class folders": Kind(_class_folders, most=100_000),
    "images with .txt": Kind(_texts, most=100_000),
    "webdataset shards": Kind(_webdataset),
    "img2dataset, webdataset": Kind(_img2dataset_tars, most=100_000),
    "img2dataset, files": Kind(_img2dataset_files, most=100_000),
    "img2dataset, Parquet": Kind(_img2dataset_parquet, most=100_000),
}


def measure(name: str, rows: int, folder: Path, is_checked: bool) -> list[str]:
    """Write a dataset and return its line of the table."""
    kind = KINDS[name]
    folder.mkdir()
    kind.write(folder, rows)
    cpu, wall, peak, read, lost = json.loads(python(PEAK + READ.format(dataset=str(folder)))[0].splitlines()[-1])
    cells = [name, f"{rows:,}", f"{cpu:.2f}", f"{wall:.2f}", f"{peak / 1000:,.0f}"]
    if read != rows or lost:
        cells[1] += f" ({read:,} read, {lost:,} in the ledger)"
    if kind.arrow:
        cpu, _, peak, _ = json.loads(python(PEAK + ARROW.format(call=kind.arrow.format(folder)))[0].splitlines()[-1])
        cells += [f"{cpu:.2f}", f"{peak / 1000:,.0f}"]
    else:
        cells += ["", ""]
    if kind.is_checked and is_checked:
        cpu, _, peak, _ = json.loads(python(PEAK + CHECK.format(dataset=str(folder)))[0].splitlines()[-1])
        cells += [f"{cpu:.1f}", f"{peak / 1000:,.0f}"]
    return [*cells, *[""] * (len(HEADINGS) - len(cells))]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.load", description=__doc__)
    parser.add_argument("--rows", default="10000,100000,1000000", help="sizes")
    parser.add_argument("--only", default="", metavar="CSV;Parquet", help=f"kinds: {'; '.join(KINDS)}")
    parser.add_argument("--check", action="store_true", help="measure `run.py check` too")
    flags = parser.parse_args()
    lines = []
    for name in flags.only.split(";") if flags.only else KINDS:
        for rows in map(int, flags.rows.split(",")):
            if rows > KINDS[name].most:
                continue
            with TemporaryDirectory(prefix="thumbtune-load-") as scratch:
                try:
                    lines.append(measure(name, rows, Path(scratch) / "pairs", flags.check))
                except RuntimeError as error:
                    lines.append([name, f"{rows:,}", str(error)[-300:], *[""] * (len(HEADINGS) - 3)])
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    print(markdown_table([HEADINGS, *lines]))


if __name__ == "__main__":
    main()
