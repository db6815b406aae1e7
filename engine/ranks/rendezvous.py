"""Ranks find one another again after a restart: a name for each set of living ranks."""

from __future__ import annotations

import time
from uuid import uuid4

import torch.distributed as dist

from data.batch import RunFailed

POLL_S = 0.05  # between two looks at who has arrived


def agree_session_id(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name for this set of living ranks, the same on all and never used before.

    torchrun keeps one store over its restarts: without a name of their own, ranks read the addresses of the dead ones.
    So each says a fresh word, and rank 0 repeats to all what it hears until each has heard its own word from it.
    """
    word, deadline, late = uuid4().hex, time.monotonic() + timeout_s, list(range(1, size))

    def heard(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    while time.monotonic() < deadline:
        if rank == 0:
            store.set("welcome", " ".join([word, *(heard(f"here/{other}") for other in range(1, size))]))
            late = [other for other in late if heard(f"joined/{other}") != word]
            if not late:
                return word
        else:
            store.set(f"here/{rank}", word)
            leader, *others = heard("welcome").split(" ")
            if word in others:
                store.set(f"joined/{rank}", leader)
                return leader
        time.sleep(POLL_S)
    who = f"ranks {late} have" if rank == 0 else "rank 0 has"
    raise RunFailed(f"rank {rank}: {who} not joined within {timeout_s:g} s (--dist-timeout)")
