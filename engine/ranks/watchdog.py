"""The limit on waiting for other ranks, --dist-timeout, counted only while this process runs.

gloo's own timeouts go by the clock, so a job that was stopped as a whole (SIGSTOP, a suspended container) for longer
would fail when it goes on, though no rank is lost. On CPUs gloo therefore waits without end, and this thread counts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from engine.run_folder.crash import CURRENT_RUN, say_error

POLL_S = 0.25
MAX_POLL_S = 1.0  # a poll that took longer was cut off by a stop of this process


class AwakeClock:
    """Seconds in which this process has run: of the time between two readings at most MAX_POLL_S count."""

    def __init__(self) -> None:
        self._last, self._total = time.monotonic(), 0.0

    def read(self) -> float:
        """Return the seconds so far; call it several times a second."""
        now = time.monotonic()
        self._total += min(now - self._last, MAX_POLL_S)
        self._last = now
        return self._total


class Watchdog:
    """Ends this process when the main thread has waited `timeout_s` for other ranks in one operation.

    Time in which the main thread computes is no waiting: a backward pass computes and averages gradients in turn.
    """

    def __init__(self, command: str, rank: int, timeout_s: float) -> None:
        self._command, self._rank, self._timeout_s = command, rank, timeout_s
        self._operations: list[str] = []  # that the main thread is in, the innermost last
        self._changes = 0  # of `_operations`
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def waiting(self, operation: str) -> Iterator[None]:
        """Inside, the main thread waits for other ranks."""
        self._operations.append(operation)
        self._changes += 1
        try:
            yield
        finally:
            self._operations.pop()
            self._changes += 1

    def _watch(self) -> None:
        clock, waited, changes = AwakeClock(), 0.0, 0
        before, used_before = clock.read(), _main_thread_seconds()
        while True:
            time.sleep(POLL_S)
            now, used = clock.read(), _main_thread_seconds()
            if changes != self._changes or not self._operations:
                waited, changes = 0.0, self._changes
            else:
                waited += max(0.0, (now - before) - (used - used_before))
            before, used_before = now, used
            if waited > self._timeout_s:
                with suppress(IndexError):  # it has just ended
                    self._give_up(self._operations[-1])

    def _give_up(self, operation: str) -> None:
        CURRENT_RUN.discard()
        say_error(f"run.py {self._command} failed: rank {self._rank}, {operation}: a rank did not answer in time "
                  f"(--dist-timeout {self._timeout_s:g})")
        os._exit(1)


def _main_thread_seconds() -> float:
    """Return the CPU time of the main thread, 0 where the system does not tell."""
    main = threading.main_thread().ident
    with suppress(AttributeError, OSError):  # macOS has none
        return time.clock_gettime(time.pthread_getcpuclockid(main)) if main else 0.0
    return 0.0
