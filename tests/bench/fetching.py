"""P10: thumbnails from a slow server on loopback, all at once against one by one."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from data.web.fetch import fetch
from data.web.limits import FetchPolicy

from .harness import Bench, Race
from .inputs import photograph

DELAY_S = 0.05
NUMBERS = count()  # so that no address is asked for twice


def thumbnails(bench: Bench) -> None:
    """P10: seconds by the clock for one thumbnail of many that are 50 ms away; one by one only some are asked for."""
    many, some = (200, 20) if bench.quick else (1000, 60)
    with slow_server(photograph(480, 360)) as url:
        bench.race(Race("P10", f"{many:,} thumbnails {1e3 * DELAY_S:.0f} ms away, against {some} one by one", ">= 40",
                        partial(fetch_all, url, many, bench.scratch / "fetched"), partial(fetch_in_turn, url, some),
                        work=(many, some), rounds=3, clock=time.perf_counter))


def fetch_all(url: str, many: int, folder: Path) -> None:
    """By the product's fetcher."""
    urls = (f"{url}/{next(NUMBERS)}.jpg" for _ in range(many))
    fetched = list(fetch(urls, folder, FetchPolicy(allow_hosts=("127.0.0.1",))))
    if len(fetched) != many or any(answer.reason for answer in fetched):
        raise RuntimeError("the fetcher has not brought everything")


def fetch_in_turn(url: str, many: int) -> None:
    """One by one, by urllib."""
    for _ in range(many):
        with urllib.request.urlopen(f"{url}/{next(NUMBERS)}.jpg") as answer:
            answer.read()


@contextmanager
def slow_server(body: bytes) -> Iterator[str]:
    """The address of a process that answers every request on loopback with `body` after DELAY_S."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, body), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def serve(report: Connection, body: bytes) -> None:
    """Run the server, and send its port."""
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
