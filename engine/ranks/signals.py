"""Signals that ask a run to end: the loop saves and ends, anything else ends at once. Ranks follow torchrun.

SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and SIGUSR2 (SLURM's `--signal`) exit with 143, SIGINT (Ctrl-C) with 130.
Schedulers and torchrun repeat themselves, so only a second SIGINT, or another signal GRACE_S after the first, means
"do not save". What was ignored when the process started (SIGHUP under nohup) stays ignored.
Imports nothing heavy: signals are heeded, and the launcher is watched, before torch is loaded.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.ranks.world import World

ASK_EVERY_S = 1.0  # how often ranks ask one another for signals
AT_ONCE_S = 5.0  # how long threads at work may hold up an exit that saves nothing
ORPHAN_S = 2.0  # how long a rank whose launcher is gone may take to save
WATCH_S = 0.25
GRACE_S = 30.0  # how long a run may take to save before a repeated signal ends it; torchrun kills after as long
HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Remembers the first signal: `code_of` it is the exit code."""

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._graceful = False
        self._asked, self._asked_at, self._ahead = 0, time.monotonic(), 1
        threading.excepthook = _heed
        for number in HEEDED:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        atexit.register(ignore_signals_during_shutdown)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # under nohup or tmux a parent may go; torchrun's going is an end
            threading.Thread(target=self._follow, args=(os.getppid(),), name="launcher", daemon=True).start()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received:
            if number == signal.SIGINT or time.monotonic() - self._received_at > GRACE_S:
                os._exit(code_of(number))
            return
        self._received, self._received_at = number, time.monotonic()
        if not self._graceful:
            self._leave()

    def _follow(self, launcher: int) -> None:
        """Wait until the launcher is gone; then stop as if it had asked for that, and soon in any case."""
        while os.getppid() == launcher:
            time.sleep(WATCH_S)
        if not self._received:  # it may have asked before it went
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_S)
        os._exit(code_of(signal.SIGTERM))

    def _leave(self) -> None:
        last = threading.Timer(AT_ONCE_S, os._exit, [code_of(self._received)])
        last.daemon = True
        last.start()
        raise SystemExit(code_of(self._received))

    @contextmanager
    def gracefully(self) -> Iterator[None]:
        """Inside, a signal only sets a flag that `agreed` reports; raises SystemExit at the end if there was one."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False
        if self._received:
            self._leave()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch inside `gracefully` before which all was saved: a signal ends the process as it does outside."""
        self._graceful = False
        try:
            if self._received:
                self._leave()
            yield
        finally:
            self._graceful = True

    def agreed(self, world: World, step: int) -> int:
        """The signal that any rank received, 0 for none; the same answer on every rank.

        Ranks ask one another, a host sync, about once a second: after so many steps as all think that takes.
        """
        if world.size == 1:
            return self._received
        if step < self._asked + self._ahead:
            return 0
        now = time.monotonic()
        per_s = (step - self._asked) / max(now - self._asked_at, 1e-6)
        answers = world.exchange((self._received, max(1, min(2 * self._ahead, int(per_s * ASK_EVERY_S)))))
        self._received = self._received or max(answer[0] for answer in answers)
        self._asked, self._asked_at, self._ahead = step, now, min(answer[1] for answer in answers)
        return max(answer[0] for answer in answers)


def code_of(number: int) -> int:
    """The exit code of a run that a signal has ended: 130 for Ctrl-C, 143 for every other request to end."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def ignore_signals_during_shutdown() -> None:
    """What is left is Python's own end, in which a second signal would be fatal and the exit code not ours."""
    for number in HEEDED:
        signal.signal(number, signal.SIG_IGN)


def _heed(ended: threading.ExceptHookArgs) -> None:
    """Say what ended a thread, but not that a disk refused: TensorBoard's thread hands that on to the main one."""
    if not isinstance(ended.exc_value, OSError):
        threading.__excepthook__(ended)
