"""The store at which all ranks meet, and an id that tells a restarted job from an earlier one."""

from __future__ import annotations

import datetime
import os
import platform
import time
from dataclasses import replace
from uuid import uuid4

import torch
import torch.distributed as dist

from data.batch import AgreedError, RunFailed, UserError
from engine.ranks.launch import Launch

POLL_S = 0.05  # between two checks of the store
UNCERTAIN_WAIT = datetime.timedelta(seconds=30)  # for other ranks where the environment may be that of a script


def agree_session_id(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """Return an id for this set of living ranks, the same on all of them and never used before.

    torchrun keeps one store over its restarts: without an id as prefix, ranks would read the addresses of dead ones.
    Each rank writes a random token under here/RANK. Rank 0 keeps publishing its own token and those it has read; a rank
    that finds its token there knows that rank 0 is alive, confirms under joined/RANK, and takes rank 0's token as id.
    """
    token = uuid4().hex
    deadline = time.monotonic() + timeout_s
    missing = list(range(1, size))

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while time.monotonic() < deadline:
        if rank == 0:
            tokens = [read(f"here/{other}") for other in range(1, size)]
            store.set("welcome", " ".join([token, *tokens]))
            missing = [other for other in missing if read(f"joined/{other}") != token]
            if not missing:
                return token
        else:
            store.set(f"here/{rank}", token)
            session_id, *tokens = read("welcome").split(" ")
            if token in tokens:
                store.set(f"joined/{rank}", session_id)
                return session_id
        time.sleep(POLL_S)
    absent = f"ranks {missing} have" if rank == 0 else "rank 0 has"
    raise RunFailed(f"rank {rank}: {absent} not joined within {timeout_s:g} s (--dist-timeout)")


def meet(launch: Launch, timeout: datetime.timedelta) -> tuple[Launch, dist.Store | None]:
    """Return the store that all ranks share, or a launch of one where no other rank comes and none may exist."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _rendezvous_store(launch.rank, launch.size, timeout if launch.certain else min(timeout, UNCERTAIN_WAIT))
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


def _rendezvous_store(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Return the store at torchrun's MASTER_ADDR and MASTER_PORT. Raises UserError where they are unset or in use."""
    try:
        return next(dist.rendezvous("env://", rank, size, timeout=timeout))[0]
    except ValueError as error:  # an environment variable is missing
        raise UserError(f"WORLD_SIZE is {size}, but torchrun did not set it ({error}); start several ranks with "
                        "`torchrun --nproc-per-node N run.py`") from None
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"the ranks cannot meet at {where} ({str(error).splitlines()[0][:150]}); is the port in use? "
                        "Give torchrun another --master-port, or --standalone; else set MASTER_PORT") from None
