"""The decoding of one picture, and the processes that do it: a server that loads the libraries once and forks workers.

The server is started as a program, so nothing of the main process (locks, threads, CUDA) is copied into it; it runs one
thread (beside that of pyarrow's allocator, which knows of forks) and never uses a GPU. It loads torch, whose resize
halves the time of a picture, in a second or two; a worker forked from it starts in 10 ms. Both end when the main
process does, in any way: the server when its socket closes, workers with the server. Signals to the process group are
left to the main process.

Dimension key: C colour channels, S crop side in pixels.
"""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from data.batch import BadSample
from data.images.augment import random_region
from data.images.decode import ImageSpec, decode_image
from data.images.reader import Reader
from data.store.segments import KEY, key_of

PR_SET_PDEATHSIG = 1
NOTES = 4096  # bytes at the start of the shared memory: for each worker, what it is doing
MAX_WORKERS = NOTES // 16
IDLE = -1


class Task(NamedTuple):
    """A picture to be decoded."""

    source: str | bytes  # a reference that the Reader reads, or the bytes themselves
    crop: tuple[int, int, int | None] | None = None  # seed, epoch and number of a random crop; None: the content's


class Outcome(NamedTuple):
    """The result for a Task."""

    key: bytes  # of the content, b"" where it cannot be read
    problem: tuple[str, str] | None = None  # reason and detail of the BadSample
    is_filled: bool = False  # the picture's record holds what it decodes to
    content: bytes = b""  # bytes that a job returns


class Job(Protocol):
    """Turns the bytes of a picture into a record of fixed size, or into bytes; travels to the workers by pickle."""

    @property
    def record(self) -> np.dtype:
        """The type of a record, which may be an array of fixed shape."""

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> np.ndarray | bytes | None:
        """Return the record or bytes of a picture, None for neither. Raises BadSample."""


class KnownKeys:
    """Keys of contents that need not be decoded, as sorted arrays of their first 8 bytes.

    One in 10^11 contents that are new to a store of 10^8 is taken for known; looking its whole key up shows that.
    """

    def __init__(self, *parts: np.ndarray) -> None:
        """Take arrays of keys [n] S16, each sorted."""
        self.parts = [_numbers(np.ascontiguousarray(part)) for part in parts if len(part)]

    def __contains__(self, key: bytes) -> bool:
        number = np.uint64(int.from_bytes(key[:8], "big"))
        for part in self.parts:
            place = int(np.searchsorted(part, number))
            if place < len(part) and part[place] == number:
                return True
        return False


def _numbers(keys: np.ndarray) -> np.ndarray:
    return keys.view(np.uint8).reshape(-1, KEY)[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)


@dataclass(frozen=True)
class ToPixels:
    """Decodes into the pixels that the model takes, but not contents that are `known`."""

    spec: ImageSpec
    max_pixels: int
    known: KnownKeys = field(default_factory=KnownKeys)

    @property
    def record(self) -> np.dtype:
        """uint8 [C, S, S]."""
        return np.dtype((np.uint8, (3, *self.spec.crop)))

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> np.ndarray | None:
        """Return the pixels, of a random crop where that is asked for."""
        if key in self.known:
            return None
        return decode_image(data, self.spec, self.max_pixels, partial(random_region, *crop) if crop else None)


class ToKey:
    """Computes keys alone."""

    record = np.dtype((np.uint8, (0,)))

    def decode(self, data: bytes, key: bytes, crop: tuple[int, int, int] | None) -> None:
        """Decode nothing."""


def content_number(key: bytes) -> int:
    """Return a number of 63 bits for a content by its key; two contents share one with a chance of 1e-19."""
    return int.from_bytes(key[:8], "little") >> 1


@dataclass
class Spent:
    """Bytes and seconds of reading, seconds of decoding."""

    bytes: int = 0
    reading: float = 0.0
    decoding: float = 0.0


def do_task(task: Task, job: Job, reader: Reader, records: np.ndarray, place: int, spent: Spent) -> Outcome:
    """Read and decode one picture into its record. Raises errors that are not the picture's fault."""
    began, key, read = time.perf_counter(), b"", None
    try:
        data = task.source if isinstance(task.source, bytes) else reader.read(task.source)
        key = key_of(data)
        read = time.perf_counter()
        spent.bytes += len(data)
        spent.reading += read - began
        crop = None
        if task.crop is not None:
            seed, epoch, number = task.crop
            crop = seed, epoch, content_number(key) if number is None else number
        result = job.decode(data, key, crop)
        if result is None or isinstance(result, bytes):
            return Outcome(key, content=result or b"")
        records[place] = result
        return Outcome(key, is_filled=True)
    except BadSample as problem:
        return Outcome(key, (problem.reason, problem.detail))
    finally:
        if read is not None:
            spent.decoding += time.perf_counter() - read


def records_in(memory: mmap.mmap | bytearray, job: Job) -> np.ndarray:
    """Return the records in shared memory, behind the notes of the workers."""
    size = job.record.itemsize
    count = (len(memory) - NOTES) // size if size else len(memory)
    return np.ndarray((count,), job.record, memory, NOTES if size else 0)


def notes_in(memory: mmap.mmap | bytearray) -> np.ndarray:
    """Return, for each worker, the number of pictures begun and the place of the present one in its piece, or IDLE."""
    return np.ndarray((MAX_WORKERS, 2), np.int64, memory)


# The server


def serve(descriptor: int) -> None:
    """Answer requests that come through a socket until it closes: open and close feeds, fork their workers."""
    _load_libraries()
    requests = Connection(descriptor)
    feeds: dict[int, tuple[Job, Reader, int]] = {}
    ended: dict[int, int] = {}  # process -> its exit code
    while True:
        try:
            kind, feed, number = requests.recv()
            _reap(ended)
            if kind == "open":
                job, reader = requests.recv()
                feeds[feed] = job, reader, _receive(descriptor)
            elif kind == "start":
                _fork(feeds[feed], number, _receive(descriptor), descriptor)
            elif kind == "status":
                if number not in ended:
                    ended[number] = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
                requests.send(ended.pop(number))
            elif kind == "close":
                os.close(feeds.pop(feed)[2])
        except (EOFError, OSError):  # the main process is gone, and the workers go with this one
            os._exit(0)


def _load_libraries() -> None:
    """Decode a picture once, so that forked workers share the libraries that decoding loads at its first use."""
    import torch

    torch.set_num_threads(1)
    picture = io.BytesIO()
    Image.new("RGB", (80, 60)).save(picture, "JPEG")
    decode_image(picture.getvalue(), ImageSpec.clip(32))
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the memory of all objects


def _reap(ended: dict[int, int]) -> None:
    """Note the exit codes of the workers that have ended."""
    with suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended[child[0]] = os.waitstatus_to_exitcode(child[1])


def _receive(descriptor: int) -> int:
    """Return the descriptor that was sent through a socket."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    if not descriptors:
        raise EOFError
    return descriptors[0]


def _fork(feed: tuple[Job, Reader, int], number: int, end: int, server: int) -> None:
    job, reader, memory = feed
    parent = os.getpid()
    if os.fork():
        os.close(end)
        return
    try:
        os.close(server)
        _die_with(parent)
        _work(job, reader, mmap.mmap(memory, 0), number, Connection(end))
    except (EOFError, OSError):  # the feed has ended
        pass
    finally:
        # Without Python's exit handlers: they belong to the server, of which this process is a copy.
        os._exit(0)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    if hasattr(ctypes.CDLL(None), "prctl"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(0)


def _work(job: Job, reader: Reader, memory: mmap.mmap, number: int, pieces: Connection) -> None:
    """Decode pieces (the place of the first record, tasks) as they come, and send back the outcomes."""
    note, records = notes_in(memory)[number], records_in(memory, job)
    note[:] = 0, IDLE
    pieces.send(os.getpid())
    while True:
        start, tasks = pieces.recv()
        spent, outcomes = Spent(), dict[int, Outcome]()
        try:
            for place, task in tasks.items():
                note[:] = note[0] + 1, place
                outcomes[place] = do_task(task, job, reader, records, start + place, spent)
            note[1] = IDLE
            pieces.send((outcomes, spent))
        except Exception as error:  # not the picture's fault: it ends the run, as it would in a thread
            note[1] = IDLE
            pieces.send(error)


def stop_reason(status: int) -> str:
    """Return how a process has ended, by its exit code."""
    names: Mapping[int, str] = {each.value: each.name for each in signal.Signals}
    return f"was ended by {names.get(-status, -status)}" if status < 0 else f"exited with {status}"
