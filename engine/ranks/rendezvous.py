"""A session id that all ranks agree on, so that a restarted job never reads the keys of an earlier one."""

from __future__ import annotations

import time
from uuid import uuid4

import torch.distributed as dist

from data.batch import RunFailed

POLL_S = 0.05  # between two checks of the store


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
