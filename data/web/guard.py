"""Guarded requests: only to public addresses, only whole bodies below the limit.

With a proxy the address that is dialled is the proxy's, so a host is checked by its name alone: literal private
addresses and local names are refused as without one; the proxy decides about what other names resolve to.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from io import BytesIO
from typing import Any

import aiohttp
from PIL import Image
from yarl import URL

from data.batch import BadSample

HEADERS = {"User-Agent": "thumbtune/0.1 (+thumbnail fetcher)", "Accept-Encoding": "identity"}
YOUTUBE = re.compile(r"(i\d?\.ytimg|img\.youtube)\.com")
NAT64, IPV6_GLOBAL = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2000::/3")
# Cloud metadata services and dead relays that Python, or some version of it, calls global.
SPECIAL = [ipaddress.ip_network(each) for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]

NOT_ENCODED = ("", "identity", "none", "binary", "utf-8", "aws-chunked")  # the last is left in S3 by some uploads
UNSAFE = re.compile(rb"%(?![0-9A-Fa-f]{2})|[^A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]")  # bytes that RFC 3986 forbids
LOCAL_NAME = re.compile(r"[^.:]+|.*\.(localhost|local|internal|home\.arpa)\.?")


class _ForbiddenAddress(OSError):
    """A refused address; the message never varies, as aiohttp merges differing ones of a host."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "not a public address; --allow-host HOST opens it")


class BadStatus(BadSample):
    """A status that is not 200; `wait` is the number of seconds its Retry-After asks for, 0 without one."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        if response.status == 407:  # not of the server: with another --proxy it may be fetched
            super().__init__("proxy-407", "the proxy wants a user name and password: --proxy http://USER:PASSWORD@HOST")
        else:
            super().__init__(f"http-{response.status}", f"from {response.url.host}")
        self.wait = _seconds(response.headers.get("Retry-After", "0"))


ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (_ForbiddenAddress, "forbidden-address"),
    (aiohttp.ClientConnectorCertificateError, "tls"),
    (aiohttp.ClientConnectorDNSError, "dns"),
    (aiohttp.ClientPayloadError, "short-body"),
    (aiohttp.ClientResponseError, "bad-response"),
    (TimeoutError, "timeout"),
    (ValueError, "bad-url"),
    (Exception, "connection"),
)  # the first that matches counts
IN_WORDS = {"timeout": "no end of the answer in the time of a try",
            "short-body": "the connection ended before the answer"}


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet; one in IPv6 that embeds IPv4 counts as the latter."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped or ip in NAT64:
            # Both reach the IPv4 address in the last 32 bits: ::ffff:127.0.0.1 is this machine.
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in IPV6_GLOBAL:
            return False
        else:
            ip = ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in SPECIAL)


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """Return a socket for one (family, type, protocol, name, address) about to be dialled. Raises _ForbiddenAddress."""
    family, kind, protocol, _, address = info
    # Checked where the address is dialled, not where the name is resolved: a name may change between the two.
    if not is_public(address[0]):
        raise _ForbiddenAddress
    return socket.socket(family, kind, protocol)


def is_local_name(host: str) -> bool:
    """Return whether a host is a private address, in any spelling, or a name of the local network."""
    with suppress(OSError):  # 127.1 and 0x7f.1 are addresses too
        host = socket.inet_ntoa(socket.inet_aton(host))
    try:
        return not is_public(host)
    except ValueError:
        return bool(LOCAL_NAME.fullmatch(host.lower()))


class Sessions:
    """A guarded session for all hosts but those that `allow_hosts` opens by name; an async context manager.

    With a `proxy` all requests go through it.
    """

    def __init__(self, allow_hosts: Iterable[str], proxy: str = "") -> None:
        self._names = {name.lower().strip("[]") for name in allow_hosts}
        self._proxy = proxy

    async def __aenter__(self) -> Sessions:
        self._guarded = _open_session(guarded=not self._proxy, proxy=self._proxy)
        self._unguarded = _open_session(guarded=False, proxy=self._proxy)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._guarded.close()
        await self._unguarded.close()

    def of(self, url: URL) -> aiohttp.ClientSession:
        """Return the session for requests to a host. Raises BadSample if a proxy must not be asked for it."""
        if url.host in self._names:
            return self._unguarded
        if self._proxy and is_local_name(url.host or ""):
            raise BadSample("forbidden-address", "not a public host; --allow-host HOST opens it")
        return self._guarded


def _open_session(guarded: bool, proxy: str) -> aiohttp.ClientSession:
    """Return a session that keeps no cookie, trusts no proxy variable, inflates nothing and always checks TLS."""
    # The client limits connections. Idle ones close early: a list of many hosts would use up the descriptors.
    factory = _public_socket if guarded else None
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0, socket_factory=factory)
    return aiohttp.ClientSession(
        connector=connector,
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(),  # ours is exact; aiohttp's own is rounded up to whole seconds
        auto_decompress=False,
        trust_env=False,
        proxy=proxy or None,
    )


def web_url(text: str, base: URL | None = None) -> URL:
    """Return the URL to request, byte for byte as it is written; only bytes that no URL may hold are percent-encoded.

    Signed and thumbor addresses are valid in one spelling alone. `base` is the URL that redirects. Raises
    BadSample.
    """
    try:
        match = re.match(r"(https?:)?//([^/?#]*)", text, re.IGNORECASE)
        if match:
            # Only here is normalising right: host names fold case, and other alphabets than ASCII become punycode.
            scheme = match[1] or (f"{base.scheme}:" if base else "")
            start = URL(f"{scheme}//{match[2]}")
            rest = _percent_encode(text[match.end():])
            path = rest if rest.startswith("/") else f"/{rest}"
            url = URL(f"{start.scheme}://{start.raw_authority}{path}", encoded=True)
        else:
            url = URL(_percent_encode(text), encoded=True)
            url = base.join(url) if base else url
        host, _ = url.host, url.port
    except ValueError as error:
        raise BadSample("bad-url", str(error)) from error
    if url.scheme not in ("http", "https") or not host:
        raise BadSample("bad-url", "not a http or https address with a host")
    if url.user is not None or url.password is not None:
        raise BadSample("bad-url", "carries a user name or a password")
    return url


def _percent_encode(text: str) -> str:
    """Percent-encode every byte that a URL may not hold. Raises ValueError for lone surrogates."""
    return UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], text.encode(errors="surrogateescape")).decode("ascii")


def variants_of(url: URL) -> list[URL]:
    """Return a YouTube thumbnail's URLs, largest first, the one given included; any other URL alone."""
    if not YOUTUBE.fullmatch(url.host or ""):
        return [url]
    names = [f"{name}{url.suffix}" for name in ("maxresdefault", "sddefault", "hqdefault")]
    return list(dict.fromkeys([*map(url.with_name, names), url]))


def redirect_target(response: aiohttp.ClientResponse) -> URL | None:
    """Return the URL that an answer redirects to, None if it does not. Raises BadSample."""
    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
        return web_url(response.headers["Location"], response.url)
    return None


async def get(session: aiohttp.ClientSession, url: URL, max_bytes: int) -> bytes | URL:
    """Return the body of one answer, or the URL it redirects to. Raises BadSample and aiohttp's errors."""
    async with session.get(url, allow_redirects=False) as response:
        if (elsewhere := redirect_target(response)) is not None:
            return elsewhere
        if response.status != 200:  # whatever the body: YouTube's 404 carries a valid picture
            raise BadStatus(response)
        body = await _read(response, max_bytes)
    if not body:
        raise BadSample("empty", "no bytes")
    if body[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise BadSample("not-image", "a page or other markup")
    if YOUTUBE.fullmatch(url.host or "") and _is_placeholder(url, body):
        raise BadSample("placeholder", "the 120x90 stand-in of a missing thumbnail")
    return body


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body, inflated; no more than `max_bytes` are taken from the wire or kept in memory."""
    encoding = encoding_of(response)
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise BadSample("bad-encoding", repr(encoding))
    if (response.content_length or 0) > max_bytes:
        raise BadSample("too-large", f"{response.content_length} bytes announced, {max_bytes} allowed")
    body = bytearray()
    taken = 0
    inflater = None if encoding == "identity" else _Inflater(encoding)
    async for chunk in response.content.iter_any():
        taken += len(chunk)
        body += inflater.inflate(chunk, max_bytes + 1 - len(body)) if inflater else chunk
        if max(taken, len(body)) > max_bytes:
            raise BadSample("too-large", f"more than {max_bytes} bytes")
    if inflater and not inflater.is_whole():
        raise BadSample("short-body", f"{encoding} ends early")
    return bytes(body)


def encoding_of(response: aiohttp.ClientResponse) -> str:
    """The Content-Encoding of an answer, "identity" for none and for words that servers write there by mistake."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return "identity" if encoding in NOT_ENCODED else encoding


class _Inflater:
    """Inflates a body piece by piece: all members of a gzip file, or the one stream of "deflate"."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self._stream: zlib._Decompress | None = None

    def inflate(self, chunk: bytes, most: int) -> bytes:
        """Return what a piece inflates to, at most `most` bytes, which is more than may come. Raises BadSample."""
        parts = b""
        while chunk and len(parts) < most:
            if self._stream is None or self._stream.eof:
                if self._stream is not None and (self.encoding == "deflate" or not chunk.startswith(b"\x1f")):
                    break  # what follows the end is padding
                # "deflate" is zlib by the standard and bare in practice: only a zlib header has 8 in its low bits.
                is_bare = self.encoding == "deflate" and chunk[0] & 15 != 8
                self._stream = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
            try:
                parts += self._stream.decompress(chunk, most - len(parts))
            except zlib.error as error:
                raise BadSample("bad-encoding", str(error)) from error
            chunk = self._stream.unused_data
        return parts

    def is_whole(self) -> bool:
        """Return whether the last stream has come to its end; also before the first one."""
        return self._stream is None or self._stream.eof


def _is_placeholder(url: URL, body: bytes) -> bool:
    """Return whether a YouTube name of a larger picture holds 120x90 pixels; the picture itself is not decoded."""
    if url.name.partition(".")[0].removesuffix("_live") in ("default", "1", "2", "3"):
        return False  # these are that small by nature
    try:
        with Image.open(BytesIO(body)) as image:  # reads the header only
            return image.size == (120, 90)
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything; a damaged file is for the decoder to judge
        return False


def as_bad_sample(error: Exception) -> BadSample:
    """Return a network error as a BadSample; the cause that aiohttp wraps (`os_error`) counts too."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return BadSample(f"proxy-{error.status}", "the proxy refuses to connect to the host; see --proxy")
    causes = error, getattr(error, "os_error", None)
    for kind, name in ERRORS:
        if any(isinstance(cause, kind) for cause in causes):
            reason = name
            break
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)  # without its address
    return BadSample(reason, IN_WORDS.get(reason) or " ".join(f"{type(error).__name__} {text}".split())[:200])


def _seconds(retry_after: str) -> float:
    """Return the seconds of a Retry-After, a number or a date (RFC 9110, 10.2.3); 0 if it is unreadable."""
    try:
        if retry_after.strip().isdecimal():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
