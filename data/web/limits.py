"""Limits of HTTP requests, and the proxy that they go through; nothing here opens a connection."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from data.batch import UserError

TRANSIENT = re.compile(r"timeout|connection|dns|short-body|http-(408|425|429|5..)")  # tried again, also by later runs


@dataclass(frozen=True)
class FetchPolicy:
    """Limits and retries of fetching; the defaults suit a list of thumbnails on one large host."""

    connections: int = 64  # requests under way at once
    per_host: int = 64  # of these, to one host name
    timeout: float = 30.0  # seconds for one try, redirects and body included; also the longest Retry-After obeyed
    max_bytes: int = 20_000_000  # largest body, as sent and after inflation; held in memory until it is whole
    # Further tries after a transient failure. Where 30 % of all requests fail, 99.8 % get through: 1 - .3^5.
    retries: int = 4
    redirects: int = 5  # hops followed before giving up
    allow_hosts: tuple[str, ...] = ()  # host names, as they stand in the URL, that may have a private address
    variants: bool = False  # YouTube: try maxresdefault, sddefault and hqdefault before the name given
    proxy: str = ""  # address of an HTTP proxy that all requests go through


def check_proxy(proxy: str) -> str:
    """Return `proxy` if it is an http(s) address. Raises UserError."""
    try:
        url = urlsplit(proxy)
        usable = url.scheme in ("http", "https") and bool(url.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise UserError("--proxy takes the address of an HTTP proxy, such as http://proxy.example:3128")
    return proxy


def unused_proxy() -> str:
    """Return the name of a proxy variable that is set but not used; "" for none."""
    names = ("https_proxy", "http_proxy", "all_proxy")
    return next((name for name in (*map(str.upper, names), *names) if os.environ.get(name)), "")
