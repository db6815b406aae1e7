"""What this room shows in `run.py bench` beside decoding and fetching: unpadded titles, the cold pass, the store.

Each `measure_*` gets `race`, which times two arms in turn and takes the figure down (eval.bench.Bench.race).
Dimension key: V/T image/text feature width, L tokens.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batch import Batches, Tokens
from data.bench import photograph
from data.catalogue import catalogue
from data.cold import CHUNK, Reader, encode_titles, fill_images, fill_titles
from data.demo.demo import some_titles
from data.identity import TitleIds
from data.images.decode import ImageSpec, collate_tokens, decode_image, tokenize
from data.pairs import Encoders
from data.sources.source import load_splits
from data.sources.split import divide
from data.store.features import FeatureStore
from data.store.resident import Mapped, Resident
from data.web.fetch import FetchPolicy

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


def measure_titles(race: Race, note: Note, encode: Callable[[Tokens], Tensor], plain: Callable[[Tokens], Tensor],
                   width: int, tokenizer: object, count: int) -> Tokens:
    """P4: titles a second without padding against `plain`, transformers' own pass, with all padded to 77.

    Returns 32 titles padded to the longest of them.
    """
    ids = tokenize(tokenizer, some_titles(count), 77)
    few = ids[:16]  # padded to 77 a title costs the same whatever its company
    whole = collate_tokens([*few, [0] * 77], 0)
    padded = Tokens(whole.ids_BL[:-1].clone(), whole.mask_BL[:-1].clone())
    apart = (plain(padded) - encode_titles(few, 0, encode, width)).abs().max().item()
    lengths = np.array([len(row) for row in ids])
    what = f"{count:,} titles of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} on average"
    race("P4", f"{what}, against transformers' pass padded to 77",
         lambda: encode_titles(ids, 0, encode, width), lambda: plain(padded), ">= 5", work=(count, len(few)),
         unit="titles")
    note("P4", "largest difference to that", f"{apart:.1e}", "", [apart], "<= 5e-6")
    return collate_tokens(ids[:32], 0)


def measure_cold(race: Race, lent: Encoders, folder: Path, count: int) -> None:
    """P6: the whole cold pass over files against its parts alone: decoding, and both towers on ready inputs.

    On one core they cannot overlap, so the limit is their sum; a device of its own would leave the slower of them.
    """
    write_pairs(folder / "pairs", {"train": count}, negatives=False)
    spec = ImageSpec.clip()
    reader, widths = Reader(folder, spec, FetchPolicy(), 25_000_000, 1), (lent.image_width, lent.text_width)
    found = catalogue(divide(load_splits(str(folder / "pairs")), reader, folder / "cache", 0, lambda _: None),
                      TitleIds(lent.tokenizer, 77))
    texts, keys = found.titles.to_pylist(), found.title_keys
    ids = tokenize(lent.tokenizer, texts, 77)
    references = [found.references[i].as_py() for i in range(count)]
    pixels = torch.from_numpy(np.stack([reader.pixels(reference) for reference in references]))
    spaces = iter(range(1000))

    def ours() -> None:
        store = folder / f"features-{next(spaces)}"
        images, titles = (FeatureStore(store / name, width) for name, width in zip(("i", "t"), widths, strict=True))
        fill_images(found, reader, range(count), images, lent.image, lambda _: None)
        fill_titles(lambda some: [ids[i] for i in some], keys, titles, range(len(ids)), 0, lent.text)

    def parts() -> None:
        for reference in references:
            decode_image(reader.read(reference), reader.spec)
        for chunk in pixels.split(CHUNK):
            lent.image(chunk)
        encode_titles(ids, 0, lent.text, widths[1])

    race("P6", f"cold pass over {count} pairs (files, decode, towers, store) against decode + towers alone", ours,
         parts, ">= 0.9", rounds=3)


def measure_store(race: Race, note: Note, folder: Path, rows: int, widths: tuple[int, int]) -> None:
    """P9: a store of `rows` synthetic pairs: open, find and verify all, random rows, memory that stays flat."""
    rng, part = np.random.default_rng(0), min(rows, 65_536)
    keys = rng.integers(256, size=(rows, 16), dtype=np.uint8)
    folders = [folder / name for name in ("images", "titles")]
    for place, width in zip(folders, widths, strict=True):
        writer, values = FeatureStore(place, width), torch.randn(part, width)
        for low in range(0, rows, part):
            writer.append(keys[low : low + part], values[: min(part, rows - low)])
    start = time.perf_counter()
    stores = [FeatureStore(place, width) for place, width in zip(folders, widths, strict=True)]
    opened = time.perf_counter() - start
    size = sum(store.nbytes for store in stores) / 2**30
    note("P9", f"open a store of {rows:,} pairs ({size:.1f} GiB): seconds by the clock", f"{opened:.2f} s", "",
         [opened], "<= 1")
    start = time.process_time()
    tables = [Mapped(store, store.locate(keys)) for store in stores]
    note("P9", "find all its keys and verify every byte: CPU time", f"{time.process_time() - start:.2f} s")
    ready = [torch.randn(part, width) for width in widths]
    steps = [torch.from_numpy(rng.integers(rows, size=8192)) for _ in range(8)]
    near = [index % part for index in steps]
    race("P9", "random rows of it (fp32, in batches of 8,192), against tensors of 65,536 rows in memory",
         lambda: _take_turns(tables, steps), lambda: _take_turns(ready, near), "", unit="rows",
         work=(2 * 8192 * len(steps),) * 2)
    before = _private_bytes()
    _take_turns(tables, steps * 4)
    note("P9", f"private memory after {64 * 8192:,} more rows", f"{(_private_bytes() - before) / 2**20:+.1f} MiB")


def _take_turns(tables: Sequence[Tensor | Mapped], steps: Sequence[Tensor]) -> None:
    """Rows of every table, step by step; as in the loop none is kept, or new memory would be what is measured."""
    for index in steps:
        for table in tables:
            table.index_select(0, index)


def warm_batches(rows: int, widths: tuple[int, int], batch: int,
                 device: torch.device | str = "cpu") -> Batches:
    """What the loop trains on after a cold pass: batches of `rows` pairs with negatives from tables on the device."""
    device = torch.device(device)
    ids = torch.arange(rows, device=device)
    split = Resident(torch.randn(rows, widths[0], device=device), torch.randn(rows, widths[1], device=device), ids, ids,
                     ids.roll(1), device)
    return split.batches(batch, 0)


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
