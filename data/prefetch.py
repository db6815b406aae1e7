"""The order of rows, a pure function of (seed, epoch); work ahead in threads, copies to the device, progress."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import torch
from torch import Tensor

from data.batch import Batch, Features, map_tensors, share

Item = TypeVar("Item")
Result = TypeVar("Result")
Inputs = TypeVar("Inputs", Batch, Features)


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, int64 [rows]: the same on every rank and for every world size."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))


class OrderDigest:
    """The SHA-256 of the order of all rows up to a step, chained over the epochs."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._chain = [b""]  # after 0, 1, ... whole epochs

    def at_step(self, step: int) -> str:
        """Return the digest, in hex, of the rows of the first `step` steps."""
        epochs, steps = divmod(step, -(-self.rows // self.batch_size))
        while len(self._chain) <= epochs:
            self._chain.append(self._extend(len(self._chain) - 1, self.rows))
        return self._extend(epochs, steps * self.batch_size).hex()

    def _extend(self, epoch: int, rows: int) -> bytes:
        order = epoch_order(self.rows, self.seed, epoch)[:rows]
        return hashlib.sha256(self._chain[epoch] + order.numpy().tobytes()).digest()


@dataclass(frozen=True)
class EpochBatches:
    """The row numbers of each step for one rank: epoch after epoch in shuffled order.

    The last short batch of an epoch is kept; a rank whose share of it is empty gets an empty tensor.
    """

    rows: int
    batch_size: int  # of all ranks together
    seed: int
    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Yield this rank's row numbers of every step from `step` on, without end."""
        first_epoch, skipped = divmod(step, -(-self.rows // self.batch_size))
        for epoch in count(first_epoch):
            order = epoch_order(self.rows, self.seed, epoch)
            if torch.device(self.device).type == "cuda":
                # Copied once an epoch: slices of it then need neither a copy nor a sync in a step.
                order = order.pin_memory().to(self.device, non_blocking=True)
            for start in range(skipped * self.batch_size, self.rows, self.batch_size):
                low, high = share(min(self.batch_size, self.rows - start), self.rank, self.size)
                yield order[start + low : start + high]
            skipped = 0


def threaded_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int,
                 depth: int) -> Generator[Result]:
    """Map in order over threads, at most `depth` results ahead of the consumer, so that memory stays bounded.

    An exception of `function` is raised where its result would have come. Closing the iterator stops the work.
    """
    waiting: deque[Future[Result]] = deque()
    source = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for item in source:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one shorter."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def prefetch_to_device(inputs: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """Yield each item on the device; on CUDA the next one is copied meanwhile, on a stream of its own."""
    if device.type != "cuda":
        yield from inputs
        return
    copies, compute = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(tensor: Tensor) -> Tensor:
        moved = tensor.pin_memory().to(device, non_blocking=True)
        # The allocator knows of the stream `copies` alone: without this it could reuse memory that a kernel reads.
        moved.record_stream(compute)
        return moved

    previous: Inputs | None = None
    for item in inputs:
        with torch.cuda.stream(copies):
            moved = map_tensors(item, copy)
        if previous is not None:
            yield previous
        compute.wait_stream(copies)
        previous = moved
    if previous is not None:
        yield previous
