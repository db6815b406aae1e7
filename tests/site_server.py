"""A web server on loopback that answers as a test tells it to: slowly, in parts, or not at all."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import EllipsisType

from PIL import Image

LOCAL = "127.0.0.1"
RESET, CLOSE = None, ...  # parts of an answer, beside bytes and pauses (floats, in seconds)
Part = bytes | float | EllipsisType | None
Answer = Callable[[str, int], bytes | Iterable[Part]]


def jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


PICTURE, GREY = jpeg(480, 360), jpeg(120, 90)


def reply(status: int = 200, body: bytes = PICTURE, **headers: object) -> bytes:
    lines = {"Content_Length": len(body)} | headers
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"HTTP/1.1 {status} Word\r\n{head}\r\n".encode() + body


class Site:
    """An HTTP/1.1 server in a thread: `answer(path, n)` gives the parts of the n-th answer to a path, or just bytes."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls, self.hits = answer, tls, Counter[str]()
        self.heads, self.times, self.busy, self.most = list[str](), list[float](), 0, 0
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self.run(ready)), daemon=True).start()
        ready.wait()

    async def run(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self.serve, LOCAL, 0, backlog=512, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await server.serve_forever()

    def url(self, path: str = "/", host: str = LOCAL) -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split()[1]
                self.hits[path] += 1
                self.heads.append(head)
                self.times.append(time.monotonic())
                parts = self.answer(path, self.hits[path])
                for part in [parts] if isinstance(parts, bytes) else parts:
                    if isinstance(part, bytes):
                        writer.write(part)
                        await writer.drain()
                    elif isinstance(part, float):
                        self.busy += 1
                        self.most = max(self.most, self.busy)
                        await asyncio.sleep(part)
                        self.busy -= 1
                    else:
                        if part is RESET:
                            linger = struct.pack("ii", 1, 0)
                            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        return
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
