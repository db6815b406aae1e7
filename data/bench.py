"""Figures of this room for `run.py bench`: decoding, fetching and reading shards, each beside what it is to beat.

The arms of a comparison take turns within one process; a figure is the median of its rounds, a ratio that of the
rounds' ratios. Decoding is CPU time of one thread; where waiting or several workers are the point, it is the clock's.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import io
import multiprocessing
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from data.images.decode import ImageSpec, decode_image
from data.prefetch import ahead
from data.shards.index import format_reference, read_index, read_member
from data.shards.writer import ShardWriter
from data.web.fetch import FetchPolicy, fetch

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SIZES = ((1280, 720), (480, 360))  # what YouTube calls maxresdefault and hqdefault
PICTURES = 4
DELAY_S = 0.05
ONE_BY_ONE = 60  # requests that stand for all of them
WORKERS = 2


def measure_decode(quick: bool) -> dict[str, float]:
    """P5: JPEG bytes -> uint8 pixels of CLIP's 224 x 224, ours against the transformers processor; ms of CPU time.

    A turn is PICTURES pictures, all different: images come one after another in a run, too.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor, threads = CLIPImageProcessorPil(), torch.get_num_threads()
    spec, found = ImageSpec.from_processor(processor), dict[str, float]()

    def theirs(data: bytes) -> np.ndarray:
        return processor(Image.open(io.BytesIO(data)), do_rescale=False, do_normalize=False)["pixel_values"][0]

    torch.set_num_threads(1)
    try:
        for width, height in SIZES:
            pictures, size = [photograph(width, height, seed) for seed in range(PICTURES)], f"decode {width}x{height}"
            ways = {"transformers": theirs, "ours": partial(decode_image, spec=spec)}
            arms = {name: partial(lambda way, pictures: [way(data) for data in pictures], way, pictures)
                    for name, way in ways.items()}
            times = _interleaved(arms, 2 if quick else 8, time.process_time)
            found |= {f"{size}: {arm}, ms": 1e3 * median(each) / PICTURES for arm, each in times.items()}
            found[f"{size}: times faster"] = _ratio(times["transformers"], times["ours"])
            apart = max(np.abs(a.astype(int) - b).max() for a, b in zip(*(arm() for arm in arms.values()), strict=True))
            found[f"{size}: largest difference of 255"] = float(apart)
    finally:
        torch.set_num_threads(threads)
    return found


def measure_fetch(quick: bool) -> dict[str, float]:
    """P10: 1,000 thumbnails (200 if `quick`) from a loopback server that answers after 50 ms, against one by one.

    One-by-one requests are timed on ONE_BY_ONE URLs and scaled to all.
    """
    count = 200 if quick else 1000
    policy = FetchPolicy(allow_hosts=("127.0.0.1",))
    with _slow_server(photograph(480, 360)) as url, tempfile.TemporaryDirectory() as folder:
        def ours(round_number: int) -> None:
            got = list(fetch((f"{url}/{round_number}/{i}.jpg" for i in range(count)), Path(folder), policy))
            assert len(got) == count and not any(one.reason for one in got)

        def one_by_one(round_number: int) -> None:
            for i in range(20 if quick else ONE_BY_ONE):
                with urllib.request.urlopen(f"{url}/one/{round_number}/{i}.jpg") as answer:
                    answer.read()

        rounds = range(1 if quick else 3)
        one = [count / (20 if quick else ONE_BY_ONE) * _seconds(partial(one_by_one, i)) for i in rounds]
        all_s = [_seconds(partial(ours, i)) for i in rounds]
    name = f"fetch {count:,} thumbnails, {1e3 * DELAY_S:.0f} ms away"
    return {f"{name}: one by one (scaled), s": median(one), f"{name}: ours, s": median(all_s),
            f"{name}: times faster": _ratio(one, all_s)}


def measure_shards(quick: bool) -> dict[str, float]:
    """Samples a second from local tar shards, raw and decoded, and those of the webdataset package where installed.

    Decoding is by the same function on all sides; ours in threads, webdataset's in its loader's worker processes.
    """
    count = 200 if quick else 1000
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), count)
        tars = sorted(map(str, Path(folder).glob("*.tar")))
        arms: dict[str, Callable[[], int]] = {"raw: ours": partial(_read_ours, tars, None),
                                              "decoded: ours": partial(_read_ours, tars, ImageSpec.clip())}
        if importlib.util.find_spec("webdataset"):
            arms |= {"raw: webdataset": partial(_read_theirs, tars, None),
                     "decoded: webdataset": partial(_read_theirs, tars, ImageSpec.clip())}
        times = _interleaved(arms, 1 if quick else 3, time.perf_counter)
    found = {f"shards {arm}, samples/s": count / median(each) for arm, each in times.items()}
    if "raw: webdataset" in times:
        found |= {f"shards {kind}: times faster": _ratio(times[f"{kind}: webdataset"], times[f"{kind}: ours"])
                  for kind in ("raw", "decoded")}
    return found


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with about the detail, and so the bytes, of a video's thumbnail: noise of several scales, most coarse."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cell, weight in ((160, 70), (40, 35), (8, 14), (2, 7)):
        coarse = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC))
                  for c in range(3)]
        total += weight * np.stack(planes, -1)
    file = io.BytesIO()
    Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_shards(folder: Path, count: int) -> None:
    """`count` samples of 480x360 in shards of 500."""
    pictures = [photograph(480, 360, seed) for seed in range(16)]
    with ShardWriter(folder, "train", max_samples=500) as writer:
        for number in range(count):
            writer.write(f"{number:09d}", pictures[number % len(pictures)], f"title {number}")


def _read_ours(tars: list[str], spec: ImageSpec | None) -> int:
    """All images of the shards, in order, as this project's readers take them: index, then members by reference."""
    def references() -> Iterator[str]:
        for tar in tars:
            index = read_index(Path(tar))
            for at, size in zip(index["image_offset"].to_pylist(), index["image_size"].to_pylist(), strict=True):
                yield format_reference(tar, at, size)

    if spec is None:
        return sum(len(read_member(reference)) > 0 for reference in references())
    return sum(pixels.shape[0] == 3 for pixels in ahead(
        lambda reference: decode_image(read_member(reference), spec), references(), WORKERS, 128))


def _read_theirs(tars: list[str], spec: ImageSpec | None) -> int:
    """The same with webdataset: its own pipeline, and for decoding its loader with worker processes."""
    webdataset: Any = importlib.import_module("webdataset")
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).to_tuple("jpg", "txt")
    if spec is None:
        return sum(len(image) > 0 for image, _ in dataset)
    loader = webdataset.WebLoader(dataset.map_tuple(partial(decode_image, spec=spec), bytes.decode), batch_size=None,
                                  num_workers=WORKERS)
    return sum(pixels.shape[0] == 3 for pixels, _ in loader)


def _interleaved(arms: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[
        str, list[float]]:
    """Seconds of each arm in each round; one round to warm up is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            times[name].append(_seconds(arm, clock))
    return {name: each[1:] for name, each in times.items()}


def _seconds(arm: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    arm()
    return clock() - began


def _ratio(slow: list[float], fast: list[float]) -> float:
    return median(a / b for a, b in zip(slow, fast, strict=True))


@contextmanager
def _slow_server(body: bytes) -> Iterator[str]:
    """A process that answers every request on loopback with `body` after DELAY_S; its address."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(there, body), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(report: Connection, body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(DELAY_S)
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=512)
        report.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())
