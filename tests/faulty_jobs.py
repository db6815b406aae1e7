"""Jobs for worker processes that fail as decoders do; in a light module, since workers import it by name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.batch import BadSample


@dataclass(frozen=True)
class FirstBytes:
    """The first four bytes of a content after `seconds`; contents that name a fault commit it."""

    seconds: float = 0.0
    record: ClassVar[np.dtype] = np.dtype((np.uint8, (4,)))

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> np.ndarray:
        """Return them, or fail. Raises BadSample."""
        time.sleep(self.seconds)
        if data.startswith(b"SIG"):
            os.kill(os.getpid(), getattr(signal, data.decode()))
        if data == b"hang":
            time.sleep(1000)
        if data == b"exit":
            os._exit(3)
        if data == b"bad":
            raise BadSample("undecodable", "it is bad")
        if data == b"memory":
            raise MemoryError("no room")
        return np.frombuffer(data[:4], np.uint8)
