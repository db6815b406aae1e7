"""Order, look-ahead and copies: what keeps the step fed. Order is a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import TypeVar

import torch
from torch import Tensor

from data.batch import Batch, Features, map_tensors, share

Item = TypeVar("Item")
Result = TypeVar("Result")
Inputs = TypeVar("Inputs", Batch, Features)


def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, int64 [rows]: the same on every rank and for every world size."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch))


def order_digest(rows: int, batch_size: int, seed: int) -> Callable[[int], str]:
    """A function of the step: the sha256 of the order of all rows up to there, chained over the epochs."""
    chain = [b""]  # after 0, 1, ... whole epochs

    def extended(epoch: int, upto: int) -> bytes:
        return hashlib.sha256(chain[epoch] + epoch_order(rows, seed, epoch)[:upto].numpy().tobytes()).digest()

    def digest(step: int) -> str:
        epochs, steps = divmod(step, -(-rows // batch_size))
        while len(chain) <= epochs:
            chain.append(extended(len(chain) - 1, rows))
        return extended(epochs, steps * batch_size).hex()

    return digest


def epoch_batches(rows: int, batch_size: int, seed: int, rank: int, size: int, first_step: int = 0,
           device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """This rank's row numbers of every step from `first_step` on, epoch after epoch without end.

    The last short batch of an epoch is kept; a rank whose share is empty gets an empty tensor. The order goes to
    `device` once an epoch, so that slicing it costs no copy and no sync.
    """
    per_epoch = -(-rows // batch_size)
    for epoch in count(first_step // per_epoch):
        order = epoch_order(rows, seed, epoch)
        if torch.device(device).type == "cuda":
            order = order.pin_memory().to(device, non_blocking=True)
        skip = first_step % per_epoch if epoch == first_step // per_epoch else 0
        for start in range(skip * batch_size, rows, batch_size):
            low, high = share(min(batch_size, rows - start), rank, size)
            yield order[start + low : start + high]


def threaded_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int) -> Iterator[Result]:
    """`map` in order over threads, at most `depth` results ahead of the consumer, so memory stays bounded.

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
    """Lists of `size` items, the last one shorter."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def prefetch_to_device(inputs: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """Each item on the device, the next one's copy already under way on a stream of its own (CUDA)."""
    if device.type != "cuda":
        yield from inputs
        return
    side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(tensor: Tensor) -> Tensor:
        moved = tensor.pin_memory().to(device, non_blocking=True)
        moved.record_stream(here)  # allocated on `side`, used on `here`: not to be reused while a kernel reads it
        return moved

    previous: Inputs | None = None
    for item in inputs:
        with torch.cuda.stream(side):
            moved = map_tensors(item, copy)
        if previous is not None:
            yield previous
        here.wait_stream(side)
        previous = moved
    if previous is not None:
        yield previous
