"""Signals that end a run: the training loop saves a checkpoint first, anything else exits immediately.

SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and SIGUSR2 (SLURM's `--signal`) exit with 143, SIGINT (Ctrl-C) with 130.
Schedulers and torchrun repeat their signals, so only a second SIGINT, or another signal GRACE_S after the first, exits
without saving. A signal that was ignored when the process started (SIGHUP under nohup) stays ignored.
Where torchrun disappears, its ranks end as if it had sent SIGTERM.
Imports nothing heavy: signals are handled, and the launcher is watched, before torch is loaded.
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

AGREE_EVERY_S = 1.0  # how often ranks exchange which signals they received
EXIT_LIMIT_S = 5.0  # how long working threads may delay an exit that saves nothing
REPEAT_S = 1.0  # within which torchrun repeats a SIGINT that was sent to all processes
WATCH_S = 0.25  # between two checks of the launcher
GRACE_S = 30.0  # how long a run may take to save before a repeated signal ends it; torchrun kills after as long
HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Handles HANDLED_SIGNALS and remembers the first one received."""

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._graceful = False
        self._has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
        self._agreed_step = 0  # the last step at which ranks exchanged their signals
        self._agreed_at = time.monotonic()
        self._agree_every = 1  # steps
        threading.excepthook = _print_thread_error
        for number in HANDLED_SIGNALS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        atexit.register(ignore_signals_during_shutdown)
        if self._has_launcher:  # any other parent, as under nohup or tmux, may exit before the run
            threading.Thread(target=self._watch_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received:
            seconds = time.monotonic() - self._received_at
            is_repeated = self._has_launcher and seconds < REPEAT_S  # torchrun hands on what the rank has received too
            if (number == signal.SIGINT and not is_repeated) or seconds > GRACE_S:
                os._exit(exit_code(number))
            return
        self._received, self._received_at = number, time.monotonic()
        if not self._graceful:
            self._exit()

    def _watch_launcher(self, launcher: int) -> None:
        """Wait until the launcher is gone, then act as on SIGTERM and exit after GRACE_S in any case.

        SIGUSR1 to a whole job (SLURM's `--signal`) ends torchrun at once, and the ranks have yet to save.
        """
        while os.getppid() == launcher:
            time.sleep(WATCH_S)
        if not self._received:  # else the launcher sent a signal before it exited
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os._exit(exit_code(signal.SIGTERM))

    def _exit(self) -> None:
        timer = threading.Timer(EXIT_LIMIT_S, os._exit, [exit_code(self._received)])
        timer.daemon = True
        timer.start()
        raise SystemExit(exit_code(self._received))

    @contextmanager
    def graceful_exit(self) -> Iterator[None]:
        """Inside, a signal is only noted, for `agreed_signal` to return; after the block it raises SystemExit."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False
        if self._received:
            self._exit()

    @contextmanager
    def immediate_exit(self) -> Iterator[None]:
        """Within `graceful_exit`, after a checkpoint: a signal ends the process immediately, as it does outside."""
        self._graceful = False
        try:
            if self._received:
                self._exit()
            yield
        finally:
            self._graceful = True

    def ask(self) -> None:
        """End the loop, on all ranks, as a signal would; what asks for it raises an error after the checkpoint."""
        self._received, self._received_at = self._received or signal.SIGTERM, time.monotonic()

    def agreed_signal(self, world: World, step: int) -> int:
        """Return the signal that any rank received, 0 for none; the same on every rank.

        Ranks exchange their signals, a host sync, about every AGREE_EVERY_S: each estimates how many steps that takes,
        and the smallest estimate counts for all.
        """
        if world.size == 1:
            return self._received
        if step < self._agreed_step + self._agree_every:
            return 0
        now = time.monotonic()
        steps_per_s = (step - self._agreed_step) / max(now - self._agreed_at, 1e-6)
        estimate = max(1, min(2 * self._agree_every, int(steps_per_s * AGREE_EVERY_S)))
        answers = world.exchange((self._received, estimate))
        agreed = max(received for received, _ in answers)
        self._received = self._received or agreed
        self._agreed_step, self._agreed_at = step, now
        self._agree_every = min(steps for _, steps in answers)
        return agreed


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal has ended: 130 for Ctrl-C, 143 for all others."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def ignore_signals_during_shutdown() -> None:
    """Ignore signals while Python shuts down, where a second one would be fatal and change the exit code."""
    for number in HANDLED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _print_thread_error(ended: threading.ExceptHookArgs) -> None:
    """Print the error that ended a thread; not an OSError, which TensorBoard's thread raises in the main thread."""
    if not isinstance(ended.exc_value, OSError):
        threading.__excepthook__(ended)
