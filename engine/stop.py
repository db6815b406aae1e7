"""SIGTERM and SIGINT: the loop ends cleanly, anything else at once; a second one never waits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from engine.dist import World


class Stop:
    """Remembers the first signal; 128 + its number is the exit code."""

    def __init__(self) -> None:
        self._received = 0
        self._graceful = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
        if not self._graceful:
            raise SystemExit(128 + number)

    @contextmanager
    def gracefully(self) -> Iterator[None]:
        """Inside, a signal only sets a flag that `agreed` reports."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def agreed(self, world: World) -> int:
        """The signal that any rank received, 0 for none; the same answer on every rank."""
        return world.max(self._received)
