"""The store at which all ranks meet, and an id that tells a restarted job from an earlier one."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist

from data.batch import AgreedError, RunFailed, UserError
from engine.ranks.launch import Launch, read_launch

POLL_S = 0.05  # between two checks of the store
LOOK_S = 0.5  # between two looks whether rank 0 is there
REFUSAL = "refusal"  # the key of what keeps all ranks from joining
REFUSAL_S = 20.0  # how long a rank that has ended waits for the others to hear it
UNCERTAIN_WAIT = datetime.timedelta(seconds=30)  # for other ranks where the environment may be that of a script


def agree_session_id(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """Return an id for this set of living ranks, the same on all of them and never used before.

    torchrun keeps one store over its restarts: without an id as prefix, ranks would read the addresses of dead ones.
    Each rank writes a random token under here/RANK. Rank 0 keeps publishing its own token and those it has read; a rank
    that finds its token there knows that rank 0 is alive and confirms under joined/RANK. When all have confirmed, the
    token of rank 0 is the id. A token ends with the world size that its rank was given. Raises UserError, RunFailed.
    """
    token = f"{uuid4().hex}-{size}"
    deadline = time.monotonic() + timeout_s
    missing = list(range(1, size))
    own = f"here/{rank}"
    has_written = False
    while time.monotonic() < deadline:
        _hear_refusal(store, rank, size)
        if has_written and _read(store, own) != token:
            _refuse_all(store, rank, f"two processes were started as rank {rank}; give each a RANK of its own, or "
                               "use `torchrun --nproc-per-node N run.py`")
        store.set(own, token)
        has_written = True
        if rank == 0:
            tokens = [_read(store, f"here/{other}") for other in range(1, size)]
            store.set("welcome", " ".join([token, *tokens]))
            missing = [other for other in missing if _read(store, f"joined/{other}") != token]
            if not missing:
                store.set("session", token)
                return token
        else:
            session_id, *tokens = _read(store, "welcome").split(" ")
            if token in tokens:
                size_0 = session_id.rpartition("-")[2]
                if size_0 != str(size):
                    _refuse_all(store, rank, f"WORLD_SIZE is {size} for rank {rank} and {size_0} for rank 0; set "
                                             "one number for all ranks")
                store.set(f"joined/{rank}", session_id)
                missing.clear()
            if not missing and _read(store, "session") == session_id:
                return session_id
        time.sleep(POLL_S)
    absent = f"ranks {missing} have" if rank == 0 else "rank 0 has" if missing else "another rank has"
    raise RunFailed(f"rank {rank}: {absent} not joined within {timeout_s:g} s (--dist-timeout)")


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _refuse_all(store: dist.Store, rank: int, text: str) -> NoReturn:
    """Raise UserError on this rank, and AgreedError on those that wait for it."""
    if not _is_torchruns():  # whose store is kept over restarts, and which ends the other ranks by itself
        store.set(f"heard/{rank}", "")
        store.set(REFUSAL, text)
    raise UserError(text)


def _hear_refusal(store: dist.Store, rank: int, size: int) -> None:
    """Raise AgreedError where a rank has refused to go on; rank 0, which holds the store, lets the others hear it."""
    if text := _read(store, REFUSAL):
        if rank:
            store.set(f"heard/{rank}", "")
        else:
            _wait_until_heard(store, size)
        raise AgreedError(text)


def _wait_until_heard(store: dist.Store, size: int) -> None:
    deadline = time.monotonic() + REFUSAL_S
    while time.monotonic() < deadline and not all(store.check([f"heard/{other}"]) for other in range(1, size)):
        time.sleep(POLL_S)


@contextmanager
def end_announced(launch: Launch) -> Iterator[None]:
    """Inside, before this rank has joined the others, a UserError ends them too."""
    try:
        yield
    except UserError:
        announce_end(launch)
        raise


def announce_early_end() -> None:
    """`announce_end` of a rank whose command line is refused."""
    with suppress(UserError):
        announce_end(read_launch())


def announce_end(launch: Launch) -> None:
    """Tell the other ranks that this one has ended before it joined them; they would wait for it in vain."""
    if launch.size == 1 or not launch.certain or _is_torchruns():
        return
    with suppress(dist.DistError, RuntimeError, UserError):  # nobody is there
        store = _open_store(launch, datetime.timedelta(seconds=REFUSAL_S))
        store.set(f"heard/{launch.rank}", "")
        store.set(REFUSAL, f"rank {launch.rank} has ended before it joined the others, and has said why")
        if launch.rank == 0:
            _wait_until_heard(store, launch.size)


def meet(launch: Launch, timeout: datetime.timedelta) -> tuple[Launch, dist.Store | None]:
    """Return the store that all ranks share, or a launch of one where no other rank comes and none may exist."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _open_store(launch, timeout if launch.certain else min(timeout, UNCERTAIN_WAIT))
    except dist.DistStoreError:
        if launch.certain:
            raise
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        return Launch(launcher=launch.launcher, remark=f"one process: {launch.launcher}'s variables say "
                      f"{launch.size} tasks, but no other came to {where} within {UNCERTAIN_WAIT.seconds} s; `srun "
                      "python run.py` starts all of them"), None
    store.set_timeout(timeout)
    if launch.launcher != "torchrun":
        launch = replace(launch, remark=f"joined {launch.size} ranks that {launch.launcher} started, rank 0 at {where}")
    return launch, store


def refuse_shared_devices(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Raise AgreedError on all ranks where two of them have one GPU, or not all a GPU: NCCL would fail later."""
    name = device.type
    if device.type == "cuda":
        name = f"{platform.node()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"device/{rank}", name)
    names = [store.get(f"device/{other}").decode() for other in range(size)]
    kinds = ["cuda" if " " in each else each for each in names]
    for other in range(size):
        if kinds[other] != kinds[0]:
            raise AgreedError(f"rank {other} runs on {kinds[other]}, rank 0 on {kinds[0]}; give all ranks a GPU, or "
                              "--device cpu")
        if kinds[other] == "cuda" and (first := names.index(names[other])) != other:
            raise AgreedError(f"ranks {first} and {other} have the same GPU ({names[other]}); start one process a GPU "
                              "(torchrun --nproc-per-node, srun --gpus-per-task=1), or use --device cpu")


def _is_torchruns() -> bool:
    """Return whether torchrun started this rank, and holds the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(launch: Launch, timeout: datetime.timedelta) -> dist.Store:
    """Return the store at MASTER_ADDR and MASTER_PORT. Raises UserError where they are unset, unknown or in use."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        if _is_torchruns() or not launch.certain or not host or not port:
            return next(dist.rendezvous("env://", launch.rank, launch.size, timeout=timeout))[0]
        _wait_for_rank_0(launch, host, int(port), timeout.total_seconds())
        # Rank 0 does not wait for the others here, where it could not hear why one of them does not come.
        return dist.TCPStore(host, int(port), launch.size, launch.rank == 0, timeout, wait_for_workers=False)
    except ValueError as error:  # an environment variable is missing
        raise UserError(f"WORLD_SIZE is {launch.size}, but torchrun did not set it ({error}); start several ranks with "
                        "`torchrun --nproc-per-node N run.py`") from None
    except dist.DistNetworkError as error:
        first_line = str(error).splitlines()[0][:150]
        raise UserError(f"rank {launch.rank} cannot meet the others at {host}:{port} ({first_line}); is the "
                        "port in use, perhaps by another process that was started as rank 0? Give torchrun another "
                        "--master-port, or --standalone; else set MASTER_PORT") from None


def _wait_for_rank_0(launch: Launch, host: str, port: int, timeout_s: float) -> None:
    """Wait until rank 0 listens and its name is known, which a cluster may make so when its machine starts.

    torch's own wait takes up to three times as long and prints a stack. Raises UserError.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if launch.rank == 0:
                socket.getaddrinfo(host, port)
            else:
                socket.create_connection((host, port), timeout=5.0).close()
            return
        except (OSError, UnicodeError) as error:
            problem = f"rank 0 does not answer at {host}:{port}"
            advice = "is it running there, and does no firewall lie between?"
            if isinstance(error, (socket.gaierror, UnicodeError)):
                problem, advice = f"MASTER_ADDR is {host[:100]}, a name that is not known here", "name rank 0's machine"
            if time.monotonic() > deadline:
                raise UserError(f"rank {launch.rank}: {problem} ({error}) within {timeout_s:g} s (--dist-timeout); "
                                f"{advice}") from None
        time.sleep(LOOK_S)
