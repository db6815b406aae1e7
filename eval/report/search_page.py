"""Search results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.report.page import document, escape_text, image_tag
from eval.search import Answer, QueryResult

Pictures = Mapping[tuple[str, int] | str, bytes]  # (split, row) of an answer, or an image query, -> JPEG
LIMIT = 5_000  # characters of a title, which is shown in full


def page(folder: str, results: Sequence[QueryResult], pictures: Pictures) -> str:
    """The HTML of results from the dataset in `folder`; an answer without a picture is shown by its title alone."""
    sections = []
    for result in results:
        query = pictures.get(result.query)
        picture = f"<p>{image_tag(query, 'Image of the query')}</p>" if result.kind == "image" and query else ""
        answers = "".join(_answer(answer, folder, pictures) for answer in result.answers)
        sections.append(f"<section><h2>{escape_text(result.query, LIMIT)}</h2>{picture}"
                        f'<ol class="results">{answers}</ol></section>')
    title = f"Search in {Path(folder).name}"
    return document(title, f"<h1>{escape_text(title)}</h1>", "".join(sections), "")


def _answer(answer: Answer, folder: str, pictures: Pictures) -> str:
    jpeg = pictures.get((answer.split, answer.row))
    picture = image_tag(jpeg, "") if jpeg else ""  # no alt text: the title stands below
    return (f'<li class="case">{picture}<p>{answer.rank}. {escape_text(answer.title, LIMIT)}</p>'
            f"<small>{answer.score:.3f} · {escape_text(answer.place(folder), LIMIT)}</small></li>")
