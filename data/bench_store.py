"""What this room shows in `run.py bench` beside decoding and fetching: titles in buckets, the cold pass, the store.

Each `measure_*` gets `race`, which times two arms in turn and takes the figure down (eval.bench.Bench.race).
Dimension key: V/T image/text feature width, L tokens.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import Tokens
from data.bench import photograph
from data.catalogue import catalogue
from data.cold import CHUNK, Reader, encode_titles, fill_images, fill_titles
from data.decode import collate_tokens, decode_image, tokenize
from data.demo import some_titles
from data.features import FeatureStore
from data.resident import Mapped
from data.segments import keys_of_titles
from data.source import Columns, load_splits

Race = Callable[..., None]
Note = Callable[..., None]


def write_pairs(folder: Path, counts: Mapping[str, int], negatives: bool = True) -> None:
    """A dataset folder of 480x360 JPEGs, every one different, with the demo's titles."""
    total = sum(counts.values())
    pictures, titles = [photograph(480, 360, seed) for seed in range(min(16, total))], iter(some_titles(2 * total))
    (folder / "images").mkdir(parents=True)
    number = 0
    for split, count in counts.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "title", *(["title_neg"] if negatives else [])])
            for _ in range(count):
                path = folder / "images" / f"{number}.jpg"
                # Bytes behind the end marker make it another image to the store, and the same work to the decoder.
                path.write_bytes(pictures[number % len(pictures)] + number.to_bytes(4, "big"))
                writer.writerow([f"images/{number}.jpg", next(titles), *([next(titles)] if negatives else [])])
                number += 1


def measure_titles(race: Race, note: Note, encode: Callable[[Tokens], Tensor], width: int, tokenizer: object,
                   count: int) -> Tokens:
    """P4: titles a second in buckets of like length against all padded to 77; returns 32 titles padded together."""
    ids = tokenize(tokenizer, some_titles(count), 77)
    few = ids[:16]  # padded to 77 a title costs the same whatever its company
    whole = collate_tokens([*few, [0] * 77], 0)
    padded = Tokens(whole.ids_BL[:-1].clone(), whole.mask_BL[:-1].clone())
    apart = (encode(padded) - encode_titles(few, 0, encode, width)).abs().max().item()
    lengths = np.array([len(row) for row in ids])
    race("P4", f"{count:,} titles of {lengths.mean():.0f} tokens ({lengths.min()} to {lengths.max()}) against padding to 77",
         lambda: encode_titles(ids, 0, encode, width), lambda: encode(padded), ">= 5", work=(count, len(few)),
         unit="titles")
    note("P4", "largest difference to features padded to 77", f"{apart:.1e}", "", [apart], "<= 5e-6")
    return collate_tokens(ids[:32], 0)


def measure_cold(race: Race, encode_image: Callable[[Tensor], Tensor], encode_text: Callable[[Tokens], Tensor],
                 widths: tuple[int, int], tokenizer: object, reader: Reader, folder: Path, count: int) -> None:
    """P6: the whole cold pass over files against its parts alone: decoding, and both towers on ready inputs.

    On one core they cannot overlap, so the limit is their sum; a device of its own would leave the slower of them.
    """
    write_pairs(folder / "pairs", {"train": count}, negatives=False)
    found = catalogue(load_splits(str(folder / "pairs"), Columns(), 0, lambda _: None))
    texts = found.titles.to_pylist()
    ids, keys = tokenize(tokenizer, texts, 77), keys_of_titles(texts)
    references = [found.references[i].as_py() for i in range(count)]
    pixels = torch.from_numpy(np.stack([reader.pixels(reference) for reference in references]))
    spaces = iter(range(1000))

    def ours() -> None:
        store = folder / f"features-{next(spaces)}"
        images, titles = (FeatureStore(store / name, width) for name, width in zip(("i", "t"), widths, strict=True))
        fill_images(found, reader, range(count), images, encode_image, lambda _: None)
        fill_titles(ids, keys, titles, range(len(ids)), 0, encode_text)

    def parts() -> None:
        for reference in references:
            decode_image(reader.read(reference), reader.spec)
        for chunk in pixels.split(CHUNK):
            encode_image(chunk)
        encode_titles(ids, 0, encode_text, widths[1])

    race("P6", f"cold pass over {count} pairs (files, decode, towers, store) against decode + towers alone", ours, parts,
         ">= 0.9", rounds=3)


def measure_store(race: Race, note: Note, folder: Path, rows: int, width: int) -> None:
    """P9: a store of `rows` synthetic features: open, find all and verify, random rows, memory that stays flat."""
    rng, part = np.random.default_rng(0), min(rows, 65_536)
    keys, values = rng.integers(256, size=(rows, 16), dtype=np.uint8), torch.randn(part, width)
    writer = FeatureStore(folder, width)
    for low in range(0, rows, part):
        writer.append(keys[low : low + part], values[: min(part, rows - low)])
    size = writer.nbytes
    del writer, values
    start = time.perf_counter()
    store = FeatureStore(folder, width)
    opened = time.perf_counter() - start
    note("P9", f"open a store of {rows:,} rows ({size / 2**30:.2f} GiB): seconds by the clock", f"{opened:.2f} s", "",
         [opened], "<= 1")
    start = time.process_time()
    found = store.locate(keys)
    note("P9", "find all keys and verify every byte: CPU seconds", f"{time.process_time() - start:.2f} s")
    table, before = Mapped(store, found), _private_bytes()
    steps = [torch.from_numpy(rng.integers(rows, size=8192)) for _ in range(16)]

    def gather() -> None:
        for index in steps:
            table.index_select(0, index)

    ready = torch.randn(65_536, width)
    steps_in = [index % len(ready) for index in steps]
    race("P9", f"random rows of {width} fp32, batches of 8,192, against a 65,536-row tensor in memory", gather,
         lambda: [ready.index_select(0, index) for index in steps_in], "", work=(8192 * 16,) * 2, unit="rows")
    note("P9", "private memory after them", f"{(_private_bytes() - before) / 2**20:+.0f} MiB")


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
