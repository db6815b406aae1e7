"""Self-contained HTML pages: no script, nothing loaded from elsewhere.

Titles are untrusted: all text from data goes through `escape_text` (in elements) or `escape_attribute`.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from html import escape
from pathlib import Path

from data.files import GENERATOR
from data.text import hide_secrets

LIMIT = 200  # characters of a text from data
SCANNED = 10_000  # of these that are looked at: an address is not cut before its secrets are found
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")  # embeddings, overrides, isolates: they affect text after a title
STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{generator}
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>{header}</header>
<main id="main">{main}</main>
<footer>{footer}</footer>
</body>
</html>
"""


def document(title: str, header: str, main: str, footer: str) -> str:
    """Return a whole page; `title` is plain text, the other parts are HTML."""
    return PAGE.format(policy=POLICY, generator=GENERATOR, title=escape(clean(title)), style=STYLE, header=header,
                       main=main, footer=footer)


def template(text: str) -> str:
    """Return a template for `str.format` without its line breaks, which are there for its readers alone."""
    return text.replace("\n", "")


def clean(value: object, limit: int = LIMIT) -> str:
    """Return one line of at most `limit` characters, without secrets, control, surrogate and bidi characters."""
    raw = BIDI.sub("", hide_secrets(str(value)[:SCANNED])[:4 * limit])
    characters = []
    for char in raw:
        forbidden = unicodedata.category(char) in ("Cc", "Cs") and not char.isspace()
        characters.append("\ufffd" if forbidden else char)
    line = " ".join("".join(characters).split())
    return line if len(line) <= limit else line[:limit - 1] + "…"


def escape_text(value: object, limit: int = LIMIT) -> str:
    """Return text from data for an element: escaped, clipped, isolated from the direction of the text around it."""
    return f'<bdi dir="auto">{escape(clean(value, limit))}</bdi>'


def escape_attribute(value: object) -> str:
    """Return text from data for the inside of a quoted attribute: escaped, at most LIMIT characters."""
    return escape(clean(value, LIMIT), quote=True)


def image_tag(jpeg: bytes, alt: str) -> str:
    """Return an inline JPEG, a grey box for empty bytes; `alt` is plain text."""
    text = escape_attribute(alt)
    if not jpeg:
        return f'<span class="gone" role="img" aria-label="{text} (not available)">no picture</span>'
    data = base64.b64encode(jpeg).decode()
    return f'<img class="thumb" alt="{text}" src="data:image/jpeg;base64,{data}">'
