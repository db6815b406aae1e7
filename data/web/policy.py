"""Retries and redirects of HTTP requests, which small and large bodies share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from yarl import URL

from data.batch import BadSample
from data.web.guard import BadStatus, as_bad_sample
from data.web.limits import TRANSIENT, FetchPolicy

BACKOFF = 0.5  # seconds before the second try; doubled for each further one, times a random 0.5 to 1.5
Answer = TypeVar("Answer")


async def with_retries(attempt: Callable[[], Awaitable[Answer]], policy: FetchPolicy,
                       has_advanced: Callable[[], bool] = lambda: False) -> Answer:
    """Return the answer of `attempt`, called again after transient failures, `policy.retries` times in a row at most.

    A failed attempt after which `has_advanced()` does not count. Raises BadSample.
    """
    tried = 0
    while True:
        try:
            return await attempt()
        except BadSample as bad:
            # A large file over a connection that is cut often arrives after any number of tries.
            if has_advanced():
                tried = 0
            if tried == policy.retries or not TRANSIENT.fullmatch(bad.reason):
                raise
            await asyncio.sleep(_retry_delay(tried, bad, policy))
        tried += 1


async def follow_redirects(request: Callable[[URL], Awaitable[Answer | URL]], url: URL, policy: FetchPolicy) -> Answer:
    """Return the answer of `request(url)`, following redirects. Raises BadSample, also for network errors."""
    for _ in range(policy.redirects + 1):
        try:
            answer = await request(url)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise as_bad_sample(error) from error
        if not isinstance(answer, URL):
            return answer
        url = answer
    raise BadSample("redirects", f"more than {policy.redirects}")


def _retry_delay(tried: int, bad: BadSample, policy: FetchPolicy) -> float:
    """Return the seconds to wait after failure `tried` (from 0): Retry-After, plus backoff with jitter."""
    pause = BACKOFF * 2**tried * random.uniform(0.5, 1.5)
    if isinstance(bad, BadStatus):
        pause += bad.wait
    return min(pause, policy.timeout)
