"""A page of search results: one self-contained file that asks nothing of any network. Titles are hostile: escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from data.files import GENERATOR
from eval.search import Answer, QueryResult, printable

Pictures = Mapping[tuple[str, int] | str, bytes]  # (split, row) of an answer, or an image query, -> JPEG

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
{generator}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
body {{ font: 1rem/1.4 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 1rem; }}
h1, h2, p {{ overflow-wrap: anywhere; }}
ol {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem; padding: 0; }}
li {{ list-style: none; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: .5rem;
  padding: .5rem; overflow-wrap: anywhere; }}
img {{ width: 100%; height: 10rem; object-fit: contain; background: color-mix(in srgb, currentColor 8%, transparent); }}
.query {{ max-width: 20rem; }}
small {{ opacity: .75; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
"""


def page(folder: str, results: Sequence[QueryResult], pictures: Pictures) -> str:
    """The HTML of these results from a dataset's `folder`; an answer without a picture shows its title alone."""
    parts = [HEAD.format(generator=GENERATOR, title=_text(f"Search in {Path(folder).name}"))]
    for found in results:
        parts.append(f"<section>\n<h2>{_text(found.query)}</h2>")
        if found.kind == "image":
            parts.append(f'<p class="query">{_picture(pictures.get(found.query), "the picture asked about")}</p>')
        parts += ["<ol>", *(_item(answer, folder, pictures) for answer in found.answers), "</ol>\n</section>"]
    return "\n".join([*parts, "</main>\n</body>\n</html>\n"])


def _item(answer: Answer, folder: str, pictures: Pictures) -> str:
    return (f"<li>{_picture(pictures.get((answer.split, answer.row)), '')}\n"
            f"<p>{answer.rank}. {_text(answer.title)}</p>\n"
            f"<small>{answer.score:.3f} · {_text(answer.place(folder))}</small></li>")


def _picture(jpeg: bytes | None, alt: str) -> str:
    """The picture inline; its `alt` is empty where the title beside it says what it is."""
    if jpeg is None:
        return ""
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _text(text: str) -> str:
    return escape(printable(text))
