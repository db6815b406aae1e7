"""Worker processes of a feed: a thread of the main process hands out pieces, collects outcomes and replaces workers.

A worker that dies, or is killed since it has not finished a picture in time, is replaced, and its pieces are decoded
again. A picture at which a second worker ends is unusable, as `decoder-crashed`: the first may have been killed for
another reason, as when memory runs out.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from data.images.reader import Reader
from data.images.worker import IDLE, Job, Outcome, Spent, Task, notes_in, stop_reason

if TYPE_CHECKING:
    from data.images.feed import _Ring

HANG_S = 120  # seconds that one picture may take; the largest that is allowed by default takes one
READY_S = 120  # seconds in which a server that is loaded forks a worker
LOOK_S = 1.0  # seconds between two looks at what workers are doing
CLOSE_S = 10.0  # seconds in which the server takes a request
# Bytes of a piece that a busy worker may be sent: more might not fit into its socket, and sending would wait for it.
QUEUED = 1 << 15
TRIES = 3  # workers that may end before they are ready
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); " \
        "from data.images.worker import serve; serve(int(sys.argv[2]))"
# Signals of a terminal or scheduler go to all processes of a group, and are for the main process to act on.
LEFT_TO_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


class Piece:
    """Tasks of consecutive records, decoded by one worker."""

    def __init__(self, start: int) -> None:
        self.start = start  # the record of its first task
        self.tasks: dict[int, Task] = {}  # by place in the piece; without those whose outcome is known
        self.outcomes: dict[int, Outcome] = {}
        self.suspects: set[int] = set()  # places of tasks at which a worker has ended
        self.done: Future[None] = Future()

    @property
    def size(self) -> int:
        """Characters and bytes of its tasks' sources."""
        return sum(len(task.source) for task in self.tasks.values())

    def finish(self, outcomes: dict[int, Outcome]) -> None:
        """Set the outcomes of the remaining tasks."""
        self.outcomes |= outcomes
        self.done.set_result(None)


class Backlog:
    """Pieces that wait for a worker."""

    def __init__(self) -> None:
        self._pieces = deque[Piece]()
        self._changed = threading.Condition()
        self.closed, self.for_threads = False, True

    def put(self, piece: Piece, first: bool = False) -> None:
        """Add a piece at the end, or as the first."""
        with self._changed:
            if first:
                self._pieces.appendleft(piece)
            else:
                self._pieces.append(piece)
            self._changed.notify()

    def take(self) -> Piece | None:
        """Return the next piece, None where there is none."""
        with self._changed:
            return self._pieces.popleft() if self._pieces else None

    def wait(self) -> Piece | None:
        """Wait for a piece and return it; None when threads are to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self.closed or not self.for_threads)
            return self._pieces.popleft() if self._pieces and self.for_threads and not self.closed else None

    def set(self, closed: bool = False, for_threads: bool = True) -> None:
        """Close the backlog, or set whether threads take pieces from it."""
        with self._changed:
            self.closed, self.for_threads = self.closed or closed, for_threads
            self._changed.notify_all()


class Server:
    """The program that forks workers; started when it is first needed, and one for all feeds of this process."""

    _current: Server | None = None
    _starting = threading.Lock()

    def __init__(self) -> None:
        own_end, server_end = socket.socketpair()
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = [str(Path(__file__).resolve().parents[2]), *sys.path]
        # A child inherits the mask: Ctrl-C in a terminal reaches every process of the group.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_MAIN)
        try:
            with server_end:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", START, json.dumps(path), str(server_end.fileno())],
                    stdin=subprocess.DEVNULL, pass_fds=[server_end.fileno()],
                    env={**os.environ, **one_thread, "CUDA_VISIBLE_DEVICES": ""})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._socket, self._requests = own_end, Connection(os.dup(own_end.fileno()))
        self._lock = threading.Lock()
        self._feeds = 0
        self.is_loaded = False  # it has forked a worker

    @classmethod
    def get(cls) -> Server:
        """Return the server of this process, which may still be loading. Raises OSError."""
        with cls._starting:
            if cls._current is None or cls._current.process.poll() is not None:
                cls._current = Server()
            return cls._current

    @classmethod
    def can_fork_now(cls) -> bool:
        """Return whether there is a server that has loaded its libraries."""
        return cls._current is not None and cls._current.is_loaded and cls._current.process.poll() is None

    def open(self, job: Job, reader: Reader, memory: int) -> int:
        """Return the number of a new feed. Raises OSError."""
        with self._lock:
            self._feeds += 1
            self._requests.send(("open", self._feeds, 0))
            self._requests.send((job, reader))
            socket.send_fds(self._socket, [b"."], [memory])
            return self._feeds

    def start(self, feed: int, number: int) -> Connection:
        """Ask the server to fork a worker; return this end of its socket. Raises OSError."""
        own_end, worker_end = socket.socketpair()
        with self._lock, worker_end:
            self._requests.send(("start", feed, number))
            socket.send_fds(self._socket, [b"."], [worker_end.fileno()])
        return Connection(own_end.detach())

    def exit_code(self, process: int) -> int | None:
        """Wait for a worker that is ending and return its exit code; None where the server has ended or is stopped."""
        try:
            with self._lock:
                self._requests.send(("status", 0, process))
                if not self._requests.poll(HANG_S):
                    self.process.kill()
                return int(self._requests.recv())
        except (EOFError, OSError):
            return None

    def close(self, feed: int) -> None:
        """End a feed; its workers end with their sockets."""
        with suppress(OSError), self._lock:
            self._requests.send(("close", feed, 0))

    @classmethod
    def stop(cls) -> None:
        """End the server of this process, if there is one."""
        with cls._starting:
            if cls._current is not None:
                cls._current._requests.close()
                cls._current._socket.close()
                cls._current.process.wait()
                cls._current = None


class _Worker:
    """A worker process as the main process sees it."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number, self.connection = number, connection
        self.process = 0  # known when it is ready
        self.pieces = deque[Piece]()  # the first is being decoded
        self.seen, self.seen_for = (0, IDLE), 0.0  # the latest note, and for how many seconds it has been the same
        self.hangs = False

    def kill(self) -> None:
        """End the process; it is known when it is ready."""
        if self.process:
            with suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)


class Processes:
    """The worker processes of a feed."""

    def __init__(self, ring: _Ring) -> None:
        self.ring, self.backlog, self.notes = ring, ring.backlog, notes_in(ring.memory)
        self._workers: dict[Connection, _Worker] = {}
        self._awake, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._awake.setblocking(False)
        self._early = 0  # deaths of workers that were not ready
        self.started = False
        self._starting = threading.Lock()
        self._closed = False
        self._has_room = True  # perhaps a worker could take a piece
        self._feed = 0
        self._thread = threading.Thread(target=self._run, name="decoding-processes", daemon=True)
        self._ended = threading.Event()
        # Looks on while the other thread waits for the rest of a message of a process that is stopped.
        self._looking = threading.Thread(target=self._look, name="decoding-hangs", daemon=True)

    def start(self) -> None:
        """Start the thread that starts the processes, unless it runs already."""
        with self._starting:
            if not self.started and not self._closed:
                self.started = True
                self._thread.start()

    def wake(self) -> None:
        """Wake the thread that hands out pieces, if a worker could take a new one."""
        if self._has_room or self._closed:
            self._has_room = False
            with suppress(BlockingIOError):
                self._wake.send(b".")

    def close(self) -> None:
        """End the processes."""
        with self._starting:
            self._closed = True
        self.wake()
        if self.started:
            # The thread may be reading a message of a worker that is stopped (SIGSTOP), and would wait for the rest.
            for worker in [*self._workers.values()]:
                worker.kill()
            self._thread.join(CLOSE_S)
            while self._thread.is_alive():  # the server is stopped
                self._server.process.kill()
                self._thread.join(CLOSE_S)
        self._wake.close()
        self._awake.close()

    def _run(self) -> None:
        server = None
        try:
            server = self._server = Server.get()
            self._looking.start()
            assert self.ring.descriptor is not None  # memory that is not shared has no processes
            self._feed = server.open(self.ring.feed.job, self.ring.feed.reader, self.ring.descriptor)
            for number in range(self.ring.feed.workers):
                self._start(number)
            while not self._closed:
                for end in wait([self._awake, *self._workers], LOOK_S):
                    if isinstance(end, Connection):
                        self._take_message(self._workers[end])
                    else:
                        self._empty_wake()
                self._has_room = True  # before looking at the backlog, so that no new piece is overlooked
                self._hand_out()
        except Exception as error:  # whatever it is, the run goes on
            self._fall_back(f"{type(error).__name__}: {error}")
        finally:
            self._ended.set()
            for worker in [*self._workers.values()]:
                worker.kill()
                worker.connection.close()
            if server is not None and self._feed:
                server.close(self._feed)

    def _empty_wake(self) -> None:
        with suppress(BlockingIOError):
            self._awake.recv(1 << 12)

    def _start(self, number: int) -> None:
        self.notes[number] = 0, IDLE
        worker = _Worker(number, self._server.start(self._feed, number))
        self._workers[worker.connection] = worker

    def _take_message(self, worker: _Worker) -> None:
        """Take a message of a worker; one that has ended is replaced."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if isinstance(message, int):
            worker.process, self._server.is_loaded = message, True
            self.ring.feed.times.by = f"{self.ring.feed.workers} processes"
            self.backlog.set(for_threads=False)
            return
        piece = worker.pieces.popleft()
        if isinstance(message, Exception):
            piece.done.set_exception(message)
        else:
            self.ring.finish(piece, *message)

    def _hand_out(self) -> None:
        """Send each ready worker a piece, and then a second, small one, so that it need not wait for this thread."""
        for already in (0, 1):
            for worker in [*self._workers.values()]:
                if worker.process and len(worker.pieces) == already:
                    piece = self.backlog.take()
                    if piece is None:
                        return
                    if already and piece.size > QUEUED:
                        self.backlog.put(piece, first=True)
                        return
                    worker.pieces.append(piece)
                    with suppress(OSError):  # it has ended, which its socket says next
                        worker.connection.send((piece.start, piece.tasks))
        self._has_room = False

    def _look(self) -> None:
        """Kill workers that make no progress for HANG_S, and a server that forks none; run by a thread of its own.

        Time is counted in looks, not by a clock, so that time in which this process was stopped does not count.
        """
        unready_for = 0.0
        while not self._ended.wait(LOOK_S):
            workers = [*self._workers.values()]
            for worker in workers:
                self._look_for_hang(worker)
            # A server that is stopped forks nobody; where it is killed threads decode.
            is_ready = any(worker.process for worker in workers)
            unready_for = 0.0 if is_ready or self.backlog.for_threads else unready_for + LOOK_S
            if unready_for >= READY_S:
                self._server.process.kill()

    def _look_for_hang(self, worker: _Worker) -> None:
        """Kill a worker that has work and has made no progress for HANG_S."""
        note = int(self.notes[worker.number, 0]), int(self.notes[worker.number, 1])
        worker.seen_for = worker.seen_for + LOOK_S if note == worker.seen and worker.pieces else 0.0
        worker.seen = note
        if worker.seen_for >= HANG_S and not worker.hangs:
            worker.hangs = True
            worker.kill()

    def _replace(self, worker: _Worker) -> None:
        """Replace a worker that has ended, and suspect the picture that it was decoding."""
        del self._workers[worker.connection]
        worker.connection.close()
        status = self._server.exit_code(worker.process) if worker.process else None
        place = int(self.notes[worker.number, 1])
        if status is not None and worker.pieces and place != IDLE:
            detail = f"did not end within {HANG_S} s" if worker.hangs else stop_reason(status)
            self._suspect(worker.pieces, place, f"the process that decoded it {detail}")
        elif status is None:
            self._early += 1
        for piece in reversed(worker.pieces):
            self.backlog.put(piece, first=True)
        if self._early >= TRIES:
            raise OSError("they end at once")
        self._start(worker.number)

    def _suspect(self, pieces: deque[Piece], place: int, detail: str) -> None:
        """Note at which picture of the first piece a worker has ended; the second time it is unusable."""
        piece = pieces[0]
        if place not in piece.suspects:
            piece.suspects.add(place)
            return
        del piece.tasks[place]
        piece.outcomes[place] = Outcome(b"", ("decoder-crashed", detail))
        if not piece.tasks:
            self.ring.finish(pieces.popleft(), {}, Spent())

    def _fall_back(self, reason: str) -> None:
        """End all processes and start threads, which decode from now on."""
        if self._closed:
            return
        self.ring.feed.log(f"decoding in processes is not possible here ({reason}): threads decode")
        for worker in self._workers.values():
            worker.kill()
            for piece in reversed(worker.pieces):
                self.backlog.put(piece, first=True)
        if not self.backlog.for_threads:
            self.ring.start_threads()
