"""P10: thumbnails from a slow server on loopback, all at once against one by one."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from data.fetch import FetchPolicy, fetch

from .harness import Bench, Race
from .inputs import photograph

DELAY_S = 0.05


@dataclass
class Thumbnails:
    """Both ways to bring addresses that were never asked for before."""

    url: str
    folder: Path
    numbers: count[int] = field(default_factory=count)

    def at_once(self, many: int) -> None:
        """By the product's fetcher."""
        urls = [f"{self.url}/{next(self.numbers)}.jpg" for _ in range(many)]
        fetched = list(fetch(iter(urls), self.folder, FetchPolicy(allow_hosts=("127.0.0.1",))))
        if len(fetched) != many or any(answer.reason for answer in fetched):
            raise RuntimeError("the fetcher has not brought everything")

    def one_by_one(self, many: int) -> None:
        """By a loop over urllib."""
        for _ in range(many):
            with urllib.request.urlopen(f"{self.url}/{next(self.numbers)}.jpg") as answer:
                answer.read()


def thumbnails(bench: Bench) -> None:
    """P10: seconds by the clock for one thumbnail of many that are 50 ms away; one by one only some are asked for."""
    many, some = (200, 20) if bench.quick else (1000, 60)
    with slow_server(photograph(480, 360)) as url:
        ways = Thumbnails(url, bench.scratch / "fetched")
        bench.race(Race("P10", f"{many:,} thumbnails {1e3 * DELAY_S:.0f} ms away, against {some} one by one", ">= 40",
                        lambda: ways.at_once(many), lambda: ways.one_by_one(some), work=(many, some), rounds=3,
                        clock=time.perf_counter))


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
