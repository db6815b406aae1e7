"""Ranks: who am I, gather with gradient, agree. Without torchrun the world is one process and nothing is sent.

What is asked of another rank has an end: a rank that died or stalled is a RunFailed that names the operation.
Dimension key: B rows of this rank, G rows of all ranks.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from data.batch import RunFailed, UserError
from engine.ranks.rendezvous import POLL_S, agree_session_id

CLEAR = "\x1b[2K"  # what a live line has left on this line of a terminal


def whole_fields(line: str, width: int) -> str:
    """The fields of a line, two blanks apart, that fit into `width` columns: a number cut short is another number."""
    if len(line) <= width:
        return line
    return line[: width + 2].rpartition("  ")[0] or line[:width]


@dataclass(frozen=True)
class World:
    """This process among its equals, named as torchrun names them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0
    store: dist.Store | None = None
    quiet: bool = False
    _meetings: Iterator[int] = field(default_factory=count, init=False, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """One line for people on stderr, from rank 0; said by any rank it tells those who wait in `meet` to go on."""
        self._alive()
        if self.is_main and not self.quiet:
            _print(CLEAR + text if _on_terminal() else text)

    def live(self, text: str) -> None:
        """Progress: on a terminal a line that the next one replaces, elsewhere a line like any other."""
        self._alive()
        if not _on_terminal():
            self.say(text) if text else None
        elif self.is_main and not self.quiet:
            line = whole_fields(text, shutil.get_terminal_size().columns - 1)
            _print(CLEAR + line, end="\r")

    def _alive(self) -> None:
        if self.store is not None:
            self.store.add(f"progress/{self.rank}", 1)

    def gather(self, rows_BX: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows of all ranks in rank order, [G, ...]; the gradient flows back to the rank that owns a row.

        `sizes[r]` is how many rows rank r holds (it may be 0), known to all beforehand, so nothing is negotiated.
        """
        return rows_BX if self.size == 1 else _Gather.apply(rows_BX, tuple(sizes), self.rank)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks (a new tensor, the same on every rank)."""
        if self.size == 1:
            return value
        total = value.clone()
        with explain_collective_errors("summing over ranks"):
            dist.all_reduce(total)
        return total

    def exchange(self, value: Any) -> list[Any]:
        """What every rank said, in rank order."""
        if self.size == 1:
            return [value]
        answers: list[Any] = [None] * self.size
        with explain_collective_errors("exchanging results"):
            dist.all_gather_object(answers, value)
        return answers

    def meet(self, value: Any) -> list[Any]:
        """`exchange` after work that takes ranks unlike times: waits as long as those who are late report progress.

        Raises RunFailed naming a rank that reported none for `timeout_s` seconds.
        """
        if self.store is not None:
            self._await_all(self.store, next(self._meetings))
        return self.exchange(value)

    def _await_all(self, store: dist.Store, meeting: int) -> None:
        store.set(f"arrived/{meeting}/{self.rank}", "")
        late = set(range(self.size))
        heard = {rank: (-1, time.monotonic()) for rank in late}
        while late := {rank for rank in late if not store.check([f"arrived/{meeting}/{rank}"])}:
            for rank in late:
                progress, (last, since) = store.add(f"progress/{rank}", 0), heard[rank]
                if progress != last:
                    heard[rank] = progress, time.monotonic()
                elif time.monotonic() - since > self.timeout_s:
                    raise RunFailed(f"rank {self.rank} has heard nothing of rank {rank} for {self.timeout_s:g} s while "
                                    "reading the data; --dist-timeout sets how long to wait")
            time.sleep(POLL_S)

    def on_main(self, action: Callable[[], None]) -> None:
        """Rank 0 acts while the others wait. Raises RunFailed on every rank when the disk refuses."""
        problem = None
        if self.is_main:
            try:
                action()
            except (OSError, SafetensorError) as error:
                problem = str(error)
        if problem := self.exchange(problem)[0]:
            raise RunFailed(problem)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            with explain_collective_errors("waiting for all ranks"):
                dist.barrier()


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _print(text: str, end: str = "\n") -> None:
    """To stderr. A closed terminal or a `tee` that is gone takes the line, not the run."""
    with suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)


@contextmanager
def explain_collective_errors(operation: str) -> Iterator[None]:
    """Inside, ranks talk to one another: a failure of that is a RunFailed that names this rank and the operation."""
    try:
        yield
    except RuntimeError as error:
        explain(error, operation)


def explain(error: RuntimeError, operation: str) -> NoReturn:
    """Raise RunFailed if a rank did not answer, else `error` again: gloo throws plain RuntimeErrors."""
    text = str(error)
    spoken = re.search("gloo|Connection|Timed out|NCCL", text) and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not isinstance(error, dist.DistError) and not spoken:
        raise error
    stalled = re.search("[Tt]imed out|timeout", text)
    what = "a rank did not answer in time (--dist-timeout)" if stalled else "a rank is lost"
    raise RunFailed(f"rank {os.environ.get('RANK', 0)}, {operation}: {what}; {text.splitlines()[0][:200]}") from error


class _Gather(torch.autograd.Function):
    """Forward: all_gather. Backward: sum what every rank wants of each row, keep one's own. Any sizes."""

    @staticmethod
    def forward(ctx: Any, rows_BX: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        longest = max(sizes)
        padded = rows_BX.new_zeros((longest, *rows_BX.shape[1:]))
        padded[: len(rows_BX)] = rows_BX
        parts = [torch.empty_like(padded) for _ in sizes]
        with explain_collective_errors("gathering candidates"):
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total_GX = grads[0].contiguous().clone()
        with explain_collective_errors("summing gradients of candidates"):
            dist.all_reduce(total_GX)
        start = sum(ctx.sizes[: ctx.rank])
        return total_GX[start : start + ctx.sizes[ctx.rank]], None, None


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """`auto` takes this rank's GPU where there is one. Raises UserError when `cuda` is asked for in vain."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible); "
                         "start fewer processes or use --device cpu")
    return torch.device("cuda", local_rank)


def launched_as() -> tuple[int, int, int]:
    """Rank, local rank and world size as torchrun's environment says them; 0, 0, 1 without one.

    Raises UserError for what is no number or does not go together.
    """
    values = {}
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default)).strip()
        if not (text.isascii() and text.isdecimal()):
            raise UserError(f"the environment variable {name} is {text!r}, which is no number; torchrun sets it, "
                            f"without torchrun `unset {name}`")
        values[name] = int(text)
    rank, local_rank, size = values.values()
    if rank >= size:
        raise UserError(f"the environment variables RANK and WORLD_SIZE say rank {rank} of {size}"
                        f"{'' if 'WORLD_SIZE' in os.environ else ' (WORLD_SIZE is not set)'}; start several ranks with "
                        "`torchrun --nproc-per-node N run.py`, without torchrun `unset RANK WORLD_SIZE`")
    return rank, local_rank, size


def init(wanted: str, timeout_s: float, quiet: bool = False) -> World:
    """Join the process group that torchrun's environment describes, or be alone without one. Raises UserError."""
    rank, local_rank, size = launched_as()
    device = pick_device(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, local_rank, size, device, timeout_s, quiet=quiet)
    timeout = datetime.timedelta(seconds=timeout_s)
    with explain_collective_errors("joining"):
        store = _meeting_place(rank, size, timeout)
        store.set_timeout(timeout)
        store = dist.PrefixStore(agree_session_id(store, rank, size, timeout_s), store)
        # What is no tensor of a GPU goes over gloo also there: it waits for no kernel, and who stalls is a RunFailed.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, local_rank, size, device, timeout_s, dist.PrefixStore("thumbtune", store), quiet)


def _meeting_place(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Where torchrun's environment says that the ranks meet. Raises UserError when it says nothing or it is taken."""
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
    except ValueError as error:  # an environment variable is missing
        raise UserError(f"WORLD_SIZE is {size}, but torchrun did not set it ({error}); start several ranks with "
                        "`torchrun --nproc-per-node N run.py`") from None
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the ranks cannot meet at {where} ({str(error).splitlines()[0][:150]}); is the port in use? "
                        "Give torchrun another --master-port, or --standalone") from None


def close() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        gc.collect()  # a dead DDP wrapper is a cycle that keeps gloo's threads; at exit they would abort the process
        dist.destroy_process_group()


def leave(code: int) -> int:
    """After a failure or a signal: end this process at once if there are other ranks, which may never answer."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
