"""Text for people: without control characters and secrets; Markdown tables."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

# Parts of the names of parameters whose value lets anyone who has the address fetch the file.
SECRET = re.compile(r"(?i)sig|key|token|secret|credential|auth|pass|pwd|hash|hmac|hdn|md5|jwt|sess|policy|code|verify|"
                    r"ticket|expires")
LONG = 16  # characters from which on a value may be a key, whatever its name
ADDRESS = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)  # the scheme; a password may hold a slash, a port is none
                     ([^\s/?@'"<>]*@|[^\s/?@'"<>:]*:(?!\d{1,5}/)[^\s?@'"<>]*@)?
                     ([^\s?\#'"<>]*)
                     ([?\#][^\s'"<>]*)?""", re.VERBOSE)
QUERY = re.compile(r"""(?<=[\w./)-])\?[^\s'"<>]*=[^\s'"<>]{4,}""")  # of an address that is named without its host
TOKEN = re.compile(r"""\bhf_[A-Za-z0-9]{16,}|(?i:(\bBearer\s+|\bAuthorization['"]?\s*[:=]\s*['"]?(?:\w+\s+)?|"""
                   r"""\b(?:AccountKey|SharedAccessKey|secret_access_key|session_token)['"]?\s*[:=]\s*['"]?)"""
                   r"""[\w.~+/=-]{16,})""")
MOST = 2_000  # characters of a line on stderr
DIGEST = re.compile(r"\?blake2b-[0-9a-f]{12}")
SIGNATURE = re.compile(r"(?i)X-(Amz|Goog)-(Algorithm|Credential|Date|Expires|SignedHeaders|Security-Token|Signature)|"
                       r"AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id")  # names in signed queries
AZURE_SIGNATURE = {"sv", "ss", "srt", "sp", "st", "se", "spr", "sip", "sr", "sig", "sdd", "skoid", "sktid", "skt",
                   "ske", "sks", "skv"}


def hide_secrets(text: str) -> str:
    """Return the text without tokens and credentials in addresses, and with a digest in place of secret queries.

    The digest shows which of two signed addresses is meant, and no one can fetch with it.
    """
    if "://" in text:
        text = ADDRESS.sub(lambda match: _without_user(match) + _digest_of_secret(match[4] or ""), text)
    if "?" in text:
        text = QUERY.sub(lambda match: _digest_of_secret(match[0]), text)
    return TOKEN.sub(lambda match: f"{match[1] or ''}***", text)


def without_secrets(address: str) -> str:
    """Return the address without credentials, and without a secret query, such as a signature."""
    def public(match: re.Match[str]) -> str:
        query = match[4] or ""
        return _without_user(match) + ("" if _is_secret(query) else query)

    return ADDRESS.sub(public, address) if "://" in address else address


def public_arguments(words: Sequence[str]) -> list[str]:
    """Return the words of a command line `without_secrets`, also of a proxy that is given as USER:PASSWORD@HOST."""
    shown = []
    for word in words:
        hidden = hide_secrets(without_secrets(word))
        # A proxy may be given without a scheme, so that ADDRESS does not match it.
        shown.append(re.sub(r"^(--[\w-]+=)?[^\s/:@]+:[^\s@]*@", r"\1", hidden))
    return shown


def unsigned(url: str) -> str:
    """Return the address without its signature: the name that a file has in the cache.

    A signature differs from one day's list of files to the next. Parameters of other names stay: they may choose
    between files.
    """
    place, mark, query = url.partition("?")
    if not query or "://" not in place:
        return url
    parts = query.split("&")
    names = {part.partition("=")[0] for part in parts}
    is_azure = {"sig", "sv"} <= names
    if not (is_azure or names & {"Signature", "X-Amz-Signature", "X-Goog-Signature"}):
        return url
    kept = []
    for part in parts:
        name = part.partition("=")[0]
        if not (SIGNATURE.fullmatch(name) or is_azure and name in AZURE_SIGNATURE):
            kept.append(part)
    return place + (mark + "&".join(kept) if kept else "")


def _without_user(match: re.Match[str]) -> str:
    """Return scheme and place of an address; a container of Azure, which stands where users do, stays."""
    scheme, user, place, _ = match.groups()
    is_container = scheme.lower().startswith("abfs") and ":" not in (user or ":")
    return scheme + (user if is_container else "") + place


def _is_secret(query: str) -> bool:
    """Return whether a query or a fragment, with its mark, may let someone fetch what is not public."""
    if DIGEST.fullmatch(query):
        return False
    for part in re.split("[&;#?]", query):
        name, _, value = part.rpartition("=")
        if SECRET.search(name) and value or len(value) >= LONG:
            return True
    return False


def _digest_of_secret(query: str) -> str:
    if not _is_secret(query):
        return query
    return f"?blake2b-{hashlib.blake2b(query.encode('utf-8', 'replace'), digest_size=6).hexdigest()}"


def printable(text: str) -> str:
    """Return the text as one line: a blank for each line end, control character, direction mark and lone surrogate."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


def printable_lines(text: str) -> str:
    """Return the text with each of its lines `printable`."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def json_text(value: object, indent: int | None = None) -> str:
    """Return a value as JSON in its own alphabet; what is not `printable` is escaped, and nothing is lost."""
    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e\n]", escaped, text)


def show(text: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Print lines to stdout or `file`. All text that may hold names from data reaches the terminal through here.

    On stderr, which has messages, a line of more than MOST characters loses its middle; results on stdout are whole.
    Raises OSError, also where the process was started with stdout closed (`>&-`), and ValueError where it was closed
    later.
    """
    file = sys.stdout if file is None else file
    if file is None:
        raise OSError(errno.EBADF, "stdout is closed")
    encoding = getattr(file, "encoding", None) or "utf-8"
    lines = printable_lines(hide_secrets(text))
    if file is sys.stderr and len(lines) > MOST:
        lines = "\n".join(map(_without_middle, lines.split("\n")))
    # A terminal in the C locale cannot print most titles: what it lacks is escaped rather than an error.
    lines = lines.encode(encoding, "backslashreplace").decode(encoding)
    print(lines, end=end, file=file, flush=True)


def _without_middle(line: str) -> str:
    return line if len(line) <= MOST else f"{line[:MOST // 2]} … {line[-MOST // 2:]}"


def clean_library_output() -> None:
    """Make what libraries say by `warnings` and `logging` `printable` and free of secrets from now on."""
    logging.setLogRecordFactory(_clean_record)
    warnings.formatwarning = _one_warning


def _clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Return a log record whose message is final."""
    record = logging.LogRecord(*args, **kwargs)
    with suppress(Exception):  # arguments that do not fit the message; logging itself says so
        record.msg, record.args = printable_lines(hide_secrets(record.getMessage())), None
    return record


def _one_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                 line: str | None = None) -> str:
    """Return a warning as one line, without the source line that Python adds."""
    return printable(hide_secrets(f"{category.__name__}: {message} ({filename}:{lineno})")) + "\n"


def markdown_table(rows: Sequence[Sequence[str]], pad_last: bool = True) -> str:
    """Return a Markdown table, the first row as its header, columns aligned; a "|" in a cell is escaped.

    `pad_last=False` leaves the last column as wide as each of its cells, for long text.
    """
    cells = []
    for row in rows:
        cells.append([printable(cell).replace("|", "\\|") for cell in row])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if not pad_last:
        widths[-1] = 0
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
