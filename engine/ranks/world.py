"""Ranks and their collectives, gathering with gradient among them. Without torchrun the world is one process.

Every collective has a timeout: a rank that died or stalled raises RunFailed, which names the operation.
Dimension key: B rows of this rank, G rows of all ranks.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from data.batch import AgreedError, RunFailed, Team
from engine.console import ProgressPrinter, on_terminal, print_result
from engine.device import open_device
from engine.ranks.launch import choose_interface, describe_network, read_launch
from engine.ranks.rendezvous import POLL_S, agree_session_id, end_announced, meet, refuse_shared_devices
from engine.ranks.watchdog import AwakeClock, Watchdog
from engine.run_folder.crash import end_now

Value = TypeVar("Value")
ENDLESS = datetime.timedelta(days=1000)  # for gloo, where a Watchdog counts instead
MEET_S = 3.0  # how long a rank that has failed waits for the others to fail too
_console = ProgressPrinter()


@dataclass(frozen=True)
class World:
    """This process among all ranks; rank, local_rank and size as torchrun names them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    timeout_s: float = 600.0
    store: dist.Store | None = None
    quiet: bool = False
    main: bool = True  # False where another process prints and writes for this one: see `alone`
    _barriers: Iterator[int] = field(default_factory=count, init=False, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0 and self.main

    def alone(self) -> World:
        """Return this process as a world of its own: nothing waits for other ranks; only rank 0 prints and writes."""
        return replace(self, rank=0, size=1, store=None, main=self.is_main)

    @property
    def team(self) -> Team:
        """This rank among all ranks, as data/ knows it."""
        return Team(self.rank, self.size, self.monitored_exchange)

    def say(self, text: str) -> None:
        """Print a line on stderr from rank 0; from any rank it counts as progress for `monitored_exchange`."""
        self._count_progress()
        if self.is_main and not self.quiet:
            _console.line(text)

    def warn(self, text: str) -> None:
        """`say` a line that --quiet keeps: something was damaged, and what was done about it."""
        replace(self, quiet=False).say(text)

    def live(self, text: str) -> None:
        """Print progress: on a terminal a line that the next one replaces, elsewhere a line like any other."""
        self._count_progress()
        if not on_terminal():
            if text:
                self.say(text)
        elif self.is_main and not self.quiet:
            _console.live(text)

    def show(self, text: str, place: str = "") -> None:
        """Print a result on stdout, from rank 0. Where that fails and it is in a file, `place`, that is said instead.

        Else raises OSError; see `print_result`.
        """
        if self.is_main and (failure := print_result(text, place)):
            self.warn(failure)

    def _count_progress(self) -> None:
        if self.store is not None:
            # The store's process may have been killed, as torchrun: save first.
            with _asking_store(), suppress(dist.DistError, RuntimeError):
                self.store.add(f"progress/{self.rank}", 1)

    def gather(self, rows_BX: Tensor, ids_BN: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the rows and their int64 ids of all ranks in rank order, [G, X] and [G, N], by one collective.

        The gradient of a row flows back to the rank that owns it. `sizes[r]` is how many rows rank r holds; it may be
        0.
        """
        return (rows_BX, ids_BN) if self.size == 1 else _Gather.apply(rows_BX, ids_BN, tuple(sizes), self.rank)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all ranks; with several ranks a new tensor."""
        if self.size == 1:
            return value
        total = value.clone()
        with explain_collective_errors("summing over ranks"):
            dist.all_reduce(total)
        return total

    def exchange(self, value: Value) -> list[Value]:
        """Return the values of all ranks in rank order; they are pickled."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with explain_collective_errors("exchanging results"):
            dist.all_gather_object(values, value)
        return values

    def monitored_exchange(self, value: Value) -> list[Value]:
        """Do `exchange` after work that takes ranks unequal times: wait as long as late ranks report progress.

        Raises RunFailed naming a rank that reported none for `timeout_s` seconds, or that has ended.
        """
        if self.store is not None:
            with explain_collective_errors("waiting for late ranks", watched=False):
                self._monitored_barrier(self.store, next(self._barriers))
        return self.exchange(value)

    def _monitored_barrier(self, store: dist.Store, number: int) -> None:
        store.set(f"arrived/{number}/{self.rank}", "")
        late = set(range(self.size))
        clock = AwakeClock()
        progress = dict.fromkeys(late, -1)
        changed_at = dict.fromkeys(late, clock.read())
        while late:
            with _asking_store():
                late = {rank for rank in late if not store.check([f"arrived/{number}/{rank}"])}
                counts = {rank: store.add(f"progress/{rank}", 0) for rank in late}
                codes = {rank: int(store.get(f"ended/{rank}")) for rank in late if store.check([f"ended/{rank}"])}
            for rank, progressed in counts.items():
                if rank in codes:
                    raise _ended_error(rank, codes[rank])
                now = clock.read()
                if progressed != progress[rank]:
                    progress[rank], changed_at[rank] = progressed, now
                elif now - changed_at[rank] > self.timeout_s:
                    raise RunFailed(f"rank {self.rank} has heard nothing of rank {rank} for {self.timeout_s:g} s while "
                                    "waiting for it; --dist-timeout sets how long to wait")
            if late:
                time.sleep(POLL_S)

    def have_all_failed(self, step: int) -> bool:
        """Return whether all ranks come here after the same step, within MEET_S: then their collectives still match."""
        if self.size == 1:
            return True
        if self.store is None:
            return False
        keys, deadline = [f"failed/{rank}" for rank in range(self.size)], time.monotonic() + MEET_S
        with _asking_store(), suppress(dist.DistError, RuntimeError):  # the store is gone
            self.store.set(keys[self.rank], str(step))
            while not self.store.check(keys) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            return self.store.check(keys) and {self.store.get(key) for key in keys} == {str(step).encode()}
        return False

    def on_main(self, action: Callable[[], None]) -> None:
        """Call `action` on rank 0 while the others wait. Raises RunFailed on every rank when it raises OSError."""
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


def _asking_store() -> AbstractContextManager[None]:
    """Inside, the main thread asks the store. It does not answer while its process is stopped: rank 0, under srun."""
    is_watched = _store_watchdogs and threading.current_thread() is threading.main_thread()
    return _store_watchdogs[-1].waiting("asking the store of rank 0") if is_watched else nullcontext()


@contextmanager
def explain_collective_errors(operation: str, watched: bool = True) -> Iterator[None]:
    """Inside, a failure to communicate with other ranks becomes a RunFailed that names this rank and the operation.

    Where all of the block waits for other ranks, it is `watched`: the process ends when they do not answer in time.
    """
    watchdog = _watchdogs[-1] if watched and _watchdogs else None
    try:
        with watchdog.waiting(operation) if watchdog else nullcontext():
            yield
    except RuntimeError as error:
        if not _is_collective_error(error):
            raise
        first_line = str(error).splitlines()[0][:200]
        cause = "a rank is lost"
        if re.search("[Tt]imed out|timeout", str(error)):
            cause = "a rank did not answer in time (--dist-timeout)"
        if re.search("NCCL.*(socket|connect|network)", str(error)):
            cause += f" or another network is between them ({describe_network()})"
        raise RunFailed(f"rank {os.environ.get('RANK', 0)}, {operation}: {cause}; {first_line}") from error


_joined: list[World] = []  # of this process, once it has joined others
_store_watchdogs: list[Watchdog] = []
_watchdogs: list[Watchdog] = []  # of this process, once it has joined others


def _is_collective_error(error: RuntimeError) -> bool:
    """Return whether communication failed; gloo raises plain RuntimeErrors, recognised by their text."""
    if isinstance(error, dist.DistError):
        return True
    named = re.search("gloo|Connection|Timed out|NCCL", str(error))
    return named is not None and os.environ.get("WORLD_SIZE", "1") != "1"


# torch 2.13 renames these two; older versions know the old names alone.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    """Forward: one all_gather of rows and ids. Backward: one reduce_scatter of the rows' gradient.

    Ranks with fewer rows than others fill up what they send, as both collectives take equal parts.
    """

    @staticmethod
    def forward(ctx: Any, rows_BX: Tensor, ids_BN: Tensor, sizes: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.rank = sizes, rank
        longest, row_bytes = max(sizes), rows_BX.shape[1] * rows_BX.element_size()
        bytes_BP = torch.cat([rows_BX.contiguous().view(torch.uint8), ids_BN.contiguous().view(torch.uint8)], 1)
        bytes_BP = F.pad(bytes_BP, (0, 0, 0, longest - len(bytes_BP)))
        bytes_GP = bytes_BP.new_empty(len(sizes) * longest, bytes_BP.shape[1])
        with explain_collective_errors("gathering candidates"):
            _all_gather(bytes_GP, bytes_BP)
        bytes_GP = _without_padding(bytes_GP, sizes)
        ids_GN = bytes_GP[:, row_bytes:].contiguous().view(ids_BN.dtype)
        ctx.mark_non_differentiable(ids_GN)
        return bytes_GP[:, :row_bytes].contiguous().view(rows_BX.dtype), ids_GN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad_GX, longest = grads[0].contiguous(), max(ctx.sizes)
        if min(ctx.sizes) < longest:
            parts = [F.pad(part, (0, 0, 0, longest - len(part))) for part in grad_GX.split(ctx.sizes)]
            grad_GX = torch.cat(parts)
        own_BX = grad_GX.new_empty(longest, grad_GX.shape[1])
        with explain_collective_errors("summing gradients of candidates"):
            _reduce_scatter(own_BX, grad_GX)
        return own_BX[: ctx.sizes[ctx.rank]], None, None, None


def _without_padding(rows_GX: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the first sizes[r] rows of each of len(sizes) equal parts."""
    longest = max(sizes)
    if min(sizes) == longest:
        return rows_GX
    return torch.cat([part[:size] for part, size in zip(rows_GX.split(longest), sizes, strict=True)])


def init(wanted: str, timeout_s: float, quiet: bool = False, command: str = "train") -> World:
    """Join the other ranks of torchrun, srun or mpirun; without a launcher return a world of one. Raises UserError."""
    launch = read_launch()
    with end_announced(launch):
        device = open_device(wanted, launch.local_rank)
    store, timeout = None, datetime.timedelta(seconds=timeout_s)
    if launch.size > 1:
        choose_interface(launch)
        with explain_collective_errors("joining"):
            launch, store = meet(launch, timeout)
    rank, size = launch.rank, launch.size
    if store is None:
        world = World(rank, launch.local_rank, size, device, timeout_s, quiet=quiet)
    else:
        with explain_collective_errors("joining"):
            store = dist.PrefixStore(agree_session_id(store, rank, size, timeout_s), store)
            refuse_shared_devices(store, rank, size, device)
        _store_watchdogs.append(Watchdog(command, rank, timeout_s))
        if device.type == "cpu":
            _watchdogs.append(Watchdog(command, rank, timeout_s))
            timeout = ENDLESS
        # Objects go over gloo on a GPU too: it waits for no kernel, and a stalled rank raises instead of aborting.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with explain_collective_errors(f"connecting to the other ranks ({describe_network()})"):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        world = World(rank, launch.local_rank, size, device, timeout_s, dist.PrefixStore("thumbtune", store), quiet)
        _joined.append(world)
    if launch.remark:
        world.say(launch.remark)
    return world


def close() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        gc.collect()  # a dead DDP wrapper is a cycle that keeps gloo's threads; at exit they would abort the process
        dist.destroy_process_group()


def exit_process(code: int) -> int:
    """End this process immediately if there are other ranks, which may never answer again; else return `code`.

    Ranks that wait for this one are told: srun lets them run on when one has ended.
    """
    if dist.is_initialized():
        for world in _joined:
            if world.store is not None:
                with suppress(dist.DistError, RuntimeError):  # rank 0, which holds the store, is gone
                    world.store.set(f"ended/{world.rank}", str(code))
        end_now(code)
    return code


def _ended_error(rank: int, code: int) -> RunFailed | AgreedError:
    """Return what the others raise when a rank has ended by itself: a mistake of the user's ends them as one too."""
    text = f"rank {rank} has ended with exit code {code} and has said why"
    return AgreedError(text) if code == 2 else RunFailed(text)
