"""Pictures in lots: read and decoded by worker processes or threads straight into memory that the consumer sees.

    groups of tasks ─▶ pieces of 16 ─▶ threads, or processes (processes.py) ─▶ records of a lot, in the order of tasks

A lot is a part of a ring in shared memory, so that handing it on copies nothing. Threads begin at once; where there are
many pictures and several workers, processes take over as soon as they are up, since threads share Python's lock.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from data.batch import BadSample
from data.images.processes import Backlog, Piece, Processes, Server
from data.images.reader import Reader
from data.images.worker import MAX_WORKERS, NOTES, Job, Outcome, Spent, Task, do_task, records_in
from data.prefetch import batched

Item = TypeVar("Item")
Tag = TypeVar("Tag")

# Pictures handed on at once: of MANY, and of fewer, where a large first lot would be a long wait.
LOT, SMALL_LOT = 256, 64
MANY = 4096  # pictures
# Pictures that a worker takes at once: 20 ms of work, where handing it out takes .1 ms.
PIECE = 16
# Pictures from which on processes are started: loading their libraries takes 1.6 s of a core, the time of 1,300.
MIN_PICTURES = MANY
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # "max PERIOD" or "QUOTA PERIOD"
SHOWN_S = 5.0  # a feed that takes less says nothing of its rates


def cores_of_rank() -> int:
    """Return how many of the cores that this process may use are its share, beside the other ranks of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # a container's limit, which the affinity does not show
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cores = min(cores, -(-quota // period))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, cores // max(1, int(ranks) if ranks.isascii() and ranks.isdecimal() else 1))


class Lot(NamedTuple, Generic[Tag]):
    """Pictures in the order of their tasks."""

    tags: list[Tag]  # what came with the tasks
    outcomes: list[Outcome]
    records: np.ndarray  # [n, …], of those that are filled; valid until the next lot is asked for


@dataclass
class Times:
    """The time that a feed has taken: reading, decoding, waiting."""

    pictures: int = 0
    spent: Spent = field(default_factory=Spent)
    waited: float = 0.0  # seconds that the consumer waited
    total: float = 0.0
    by: str = ""  # number and kind of the workers: `2 threads`, `8 processes`

    def add(self, spent: Spent) -> None:
        """Add the bytes and seconds of a worker."""
        self.spent.bytes += spent.bytes
        self.spent.reading += spent.reading
        self.spent.decoding += spent.decoding

    @property
    def waited_share(self) -> float:
        """The share of the time that the consumer waited."""
        return self.waited / self.total if self.total else 0.0

    def describe(self) -> str:
        """Return the rates of reading, decoding and handing on."""
        mb = self.spent.bytes / 1e6
        read, decoded = max(self.spent.reading, 1e-9), max(self.spent.decoding, 1e-9)
        return (f"read {mb / read:,.0f} MB/s and decoded {self.pictures / decoded:,.0f}/s by each of {self.by}, "
                f"{self.pictures / max(self.total, 1e-9):,.0f}/s handed on; waiting for pictures "
                f"{self.waited_share:.0%}")


class Feed:
    """Decodes pictures by a job, about `pictures` of them in all, which decides on lots and processes."""

    def __init__(self, job: Job, reader: Reader, pictures: int, log: Callable[[str], None] = lambda text: None,
                 lot: int = 0, pinned: bool = False) -> None:
        self.job, self.reader, self.log, self.pinned = job, reader, log, pinned and pictures >= MANY
        self.lot = lot or (LOT if pictures >= MANY else SMALL_LOT)
        self.workers = min(reader.workers, MAX_WORKERS)
        self.use_processes = self.workers > 1 and cores_of_rank() > 1 and pictures >= MIN_PICTURES
        # Lots of the ring: enough for the consumer's and for two pieces of each worker.
        self.slots = 2 + -(-2 * PIECE * self.workers // self.lot)
        self.times = Times()

    def lots(self, groups: Iterable[Iterable[tuple[Tag, Task | BadSample | np.ndarray]]]) -> Generator[Lot[Tag]]:
        """Yield a lot for each group of at most `lot` tasks, in order.

        A BadSample, or a record that is decoded already, takes its place in the lot as it is.
        """
        times, began = self.times, time.perf_counter()
        wait_began = began
        try:
            with _Ring(self) as ring:
                for lot in self._finished(ring, groups):
                    times.waited += time.perf_counter() - wait_began
                    times.pictures += len(lot.tags)
                    yield lot
                    wait_began = time.perf_counter()
                    times.total = wait_began - began
        except GeneratorExit:  # a stream without end has been left
            self._say_rates()
            raise
        self._say_rates()

    def _finished(self, ring: _Ring, groups: Iterable[Iterable[tuple[Tag, Task | BadSample | np.ndarray]]]
                  ) -> Iterator[Lot[Tag]]:
        """Yield lots in order; the others of the ring are decoded meanwhile."""
        waiting = deque[_PendingLot[Tag]]()
        for number, group in enumerate(groups):
            while waiting and (len(waiting) == self.slots - 1 or waiting[0].is_done()):
                yield waiting.popleft().result()
            waiting.append(ring.begin(group, number % self.slots))
        while waiting:
            yield waiting.popleft().result()

    def _say_rates(self) -> None:
        if self.times.total >= SHOWN_S:
            self.log(f"pictures: {self.times.describe()}")


class _PendingLot(Generic[Tag]):
    """A lot of which some pieces may still have to be decoded."""

    def __init__(self, records: np.ndarray) -> None:
        self.records, self.tags, self.pieces = records, list[Tag](), list[Piece]()

    def is_done(self) -> bool:
        """Return whether all its pieces are decoded."""
        return all(piece.done.done() for piece in self.pieces)

    def result(self) -> Lot[Tag]:
        """Wait for all its pieces and return the lot. Raises the exception of a worker."""
        outcomes = list[Outcome]()
        for piece in self.pieces:
            piece.done.result()
            outcomes += [piece.outcomes[place] for place in range(len(piece.outcomes))]
        return Lot(self.tags, outcomes, self.records[: len(outcomes)])


class _Ring:
    """The memory of a feed, and the threads and processes that fill it; a context manager."""

    def __init__(self, feed: Feed) -> None:
        self.feed, self.backlog = feed, Backlog()
        size = NOTES + feed.slots * feed.lot * feed.job.record.itemsize
        self.descriptor: int | None = None
        try:
            self.descriptor, self.memory = shared_memory(size)
        except OSError as error:  # a limit on the size of files, no descriptor left
            feed.log(f"{size / 1e6:,.0f} MB of memory for pictures cannot be shared ({error.strerror}): threads decode")
            feed.use_processes, self.memory = False, mmap.mmap(-1, size)
        self.records = records_in(self.memory, feed.job)
        self.processes: Processes | None = None
        self._threads = list[threading.Thread]()

    def __enter__(self) -> _Ring:
        feed = self.feed
        feed.times.by = f"{feed.workers} thread{'s' * (feed.workers > 1)}"
        if feed.pinned:
            register(self.memory)
        if feed.use_processes:
            self.processes = Processes(self)
        # An earlier feed of this process may have loaded the server: then processes start at once, without threads.
        if self.processes is not None and Server.can_fork_now():
            self.backlog.set(for_threads=False)
            self.processes.start()
        else:
            self.start_threads()
        return self

    def start_threads(self) -> None:
        """Start threads that decode."""
        self.backlog.set(for_threads=True)
        for number in range(self.feed.workers):
            self._threads.append(threading.Thread(target=self._decode, name=f"decode-{number}", daemon=True))
            self._threads[-1].start()

    def __exit__(self, *_: object) -> None:
        self.backlog.set(closed=True)
        if self.processes is not None:
            self.processes.close()
        for thread in self._threads:
            thread.join()
        if self.feed.pinned:
            unregister(self.memory)
        if self.descriptor is not None:
            os.close(self.descriptor)

    def begin(self, group: Iterable[tuple[Tag, Task | BadSample | np.ndarray]], slot: int) -> _PendingLot[Tag]:
        """Hand out the tasks of a group, to be decoded into this part of the ring."""
        first = slot * self.feed.lot
        lot = _PendingLot[Tag](self.records[first : first + self.feed.lot])
        for pairs in batched(group, PIECE):
            piece = Piece(first + len(lot.tags))
            for place, (tag, task) in enumerate(pairs):
                lot.tags.append(tag)
                if isinstance(task, Task):
                    piece.tasks[place] = task
                elif isinstance(task, BadSample):
                    piece.outcomes[place] = Outcome(b"", (task.reason, task.detail))
                else:
                    self.records[piece.start + place] = task
                    piece.outcomes[place] = Outcome(b"", is_filled=True)
            lot.pieces.append(piece)
            self.backlog.put(piece)
            if self.processes is not None:
                self.processes.wake()
        return lot

    def _decode(self) -> None:
        """Decode pieces in a thread."""
        feed = self.feed
        while (piece := self.backlog.wait()) is not None:
            spent, outcomes = Spent(), dict[int, Outcome]()
            try:
                for place, task in piece.tasks.items():
                    if self.backlog.closed:
                        return
                    outcomes[place] = do_task(task, feed.job, feed.reader, self.records, piece.start + place, spent)
            except BaseException as error:  # is raised where the lot is taken
                piece.done.set_exception(error)
                continue
            self.finish(piece, outcomes, spent)

    def finish(self, piece: Piece, outcomes: dict[int, Outcome], spent: Spent) -> None:
        """Set the outcomes of a piece; start the processes once the first picture is decoded."""
        if self.processes is not None and not self.processes.started:
            if any(outcome.is_filled or outcome.content for outcome in outcomes.values()):
                self.processes.start()
        self.feed.times.add(spent)
        piece.finish(outcomes)


def shared_memory(size: int) -> tuple[int, mmap.mmap]:
    """Return a descriptor and a mapping of memory without a name, which may be larger than what /dev/shm holds.

    Raises OSError.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("thumbtune-pictures")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "memfd_create"):
            os.ftruncate(descriptor, size)
        else:  # writing beyond a full disk would end the process by SIGBUS
            os.posix_fallocate(descriptor, 0, size)
        return descriptor, mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise


def register(memory: mmap.mmap) -> None:
    """Make memory page-locked for CUDA, so that copies to a GPU are fast and need no copy before them."""
    pointer = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(pointer, len(memory), 0))


def unregister(memory: mmap.mmap) -> None:
    """Undo `register`."""
    pointer = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(pointer))


def grouped(items: Iterable[Item], size: int) -> Iterator[Iterator[Item]]:
    """Yield groups of `size` items as iterators, each to be used up before the next is asked for."""
    source = iter(items)
    for first in source:
        yield chain([first], islice(source, size - 1))


