"""P5, P16, P17 and raw shards: JPEG bytes to pixels, the feed of the cold pass, tar shards against webdataset."""

from __future__ import annotations

import importlib.util
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data.cold import decode_lots
from data.images.decode import ImageSpec, decode_image
from data.images.feed import MANY, Feed, grouped
from data.images.reader import Reader
from data.images.worker import Task, ToPixels
from data.shards.index import read_index, read_member
from data.shards.writer import ShardWriter
from data.web.limits import FetchPolicy

from .harness import Bench, Figure, NotMeasured, Race, timed
from .inputs import photograph
from .store import read_pairs

if TYPE_CHECKING:
    from webdataset import WebDataset

SIZES = ((1280, 720, ">= 2.7"), (480, 360, ">= 2.2"))  # what YouTube calls maxresdefault and hqdefault
PICTURES = 4  # in one call of an arm, all different: images come one after another in a run, too
WORKERS = 2


def jpeg(bench: Bench) -> None:
    """P5: JPEG bytes -> uint8 pixels of CLIP's 224 x 224, ours against the transformers processor, on one core."""
    processor = CLIPImageProcessorPil()
    spec = ImageSpec.from_processor(processor)
    for width, height, goal in SIZES:
        pictures = [photograph(width, height, seed) for seed in range(PICTURES)]
        ours, theirs = partial(decode_all, pictures, spec), partial(process_all, pictures, processor)
        bench.race(Race("P5", f"JPEG of {width}x{height} to pixels, against transformers' processor", goal, ours,
                        theirs, work=(PICTURES, PICTURES), rounds=8))
        apart = [np.abs(a.astype(int) - b).max() for a, b in zip(ours(), theirs(), strict=True)]
        bench.add(Figure("P5", f"largest difference of 255 to that, {width}x{height}", "<= 2", [float(max(apart))]))


def decode_all(pictures: list[bytes], spec: ImageSpec) -> list[np.ndarray]:
    """Pixels by the product."""
    return [decode_image(data, spec) for data in pictures]


def process_all(pictures: list[bytes], processor: CLIPImageProcessorPil) -> list[np.ndarray]:
    """Pixels by transformers."""
    pixels = []
    for data in pictures:
        image = Image.open(io.BytesIO(data))
        pixels.append(processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0])
    return pixels


def feed(bench: Bench) -> None:
    """P16: CPU time of the main process for each picture that the cold pass hands on, whoever decodes it."""
    images = 512 if bench.quick else 2048
    catalogue, reader = read_pairs(bench.scratch / "feed", images, WORKERS)

    def arm() -> None:
        for _ in decode_lots(catalogue, range(images), feed_of(reader, WORKERS)):
            pass

    arm()
    spent = [1e3 * timed(arm, time.process_time) / images for _ in range(2 if bench.quick else 5)]
    bench.add(Figure("P16", "feed of the cold pass, 480x360: CPU time of the main process, ms a picture", "<= 0.05",
                     spent))


def feed_of(reader: Reader, workers: int) -> Feed:
    """The feed of a long pass, in which processes decode whatever their number."""
    feed = Feed(ToPixels(reader.spec, reader.max_pixels), replace(reader, workers=workers), MANY)
    feed.use_processes = True
    return feed


@dataclass(frozen=True)
class Shards:
    """Tar shards as the product's readers and as the webdataset package take them; every arm reads all samples."""

    tars: list[str]

    def raw(self) -> None:
        """Index, then members by reference."""
        for reference in self._references():
            read_member(reference)

    def raw_webdataset(self) -> None:
        """The package's own pipeline."""
        for _ in self._webdataset():
            pass

    def decoded(self, workers: int) -> None:
        """The same, decoded to 224 x 224 by as many processes."""
        reader = Reader(Path(), ImageSpec.clip(), FetchPolicy(), 25_000_000, workers)
        feed = feed_of(reader, workers)
        tasks = ((reference, Task(reference)) for reference in self._references())
        for _ in feed.lots(grouped(tasks, feed.lot)):
            pass

    def decoded_webdataset(self) -> None:
        """The package's loader with worker processes and the same decoder."""
        from webdataset import WebLoader

        dataset = self._webdataset().map_tuple(partial(decode_image, spec=ImageSpec.clip()), bytes.decode)
        for _ in WebLoader(dataset, batch_size=None, num_workers=WORKERS):
            pass

    def _references(self) -> Iterator[str]:
        for tar in self.tars:
            index = read_index(Path(tar))
            for at, size in zip(index["image_offset"].to_pylist(), index["image_size"].to_pylist(), strict=True):
                yield f"{tar}#{at}+{size}"

    def _webdataset(self) -> WebDataset:
        from webdataset import WebDataset

        return WebDataset(self.tars, shardshuffle=False, empty_check=False).to_tuple("jpg", "txt")


def shards(bench: Bench) -> None:
    """P17 and raw shards: samples a second by the clock, and how two processes compare with one."""
    samples = 200 if bench.quick else 1000
    made = Shards(write_shards(bench.scratch / "shards", samples))
    work = (samples, samples)
    one, two = partial(made.decoded, 1), partial(made.decoded, 2)
    if len(os.sched_getaffinity(0)) > 1:
        bench.race(Race("P17", "shards decoded to 224, two decoding processes against one", ">= 1.9", two, one, work,
                        "samples", rounds=3, clock=time.perf_counter))
    if importlib.util.find_spec("webdataset") is None:
        raise NotMeasured("webdataset, to compare with, is not installed")
    bench.race(Race("shards", "raw samples against the webdataset package", ">= 1", made.raw, made.raw_webdataset, work,
                    "samples", rounds=3, clock=time.perf_counter))
    bench.race(Race("P17", "shards decoded to 224, two processes against webdataset's loader with two", ">= 1.5", two,
                    made.decoded_webdataset, work, "samples", rounds=3, clock=time.perf_counter))


def write_shards(folder: Path, count: int) -> list[str]:
    """`count` samples of 480x360 in shards of 500."""
    pictures = [photograph(480, 360, seed) for seed in range(16)]
    with ShardWriter(folder, "train", max_samples=500) as writer:
        for number in range(count):
            writer.write(f"{number:09d}", pictures[number % len(pictures)], f"title {number}")
    return sorted(map(str, folder.glob("*.tar")))
