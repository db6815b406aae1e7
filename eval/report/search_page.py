"""Search results as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.report.page import document, escape_text, image_tag, template
from eval.search import QueryResult

Pictures = Mapping[tuple[str, int] | str, bytes]  # (split, row) of an answer, or an image query, -> JPEG
LIMIT = 5_000  # characters of a title, which is shown in full
ANSWER = template("""
<li class="case">
{image}
<p>{rank}. {title}</p>
<small>{score:.3f} · {place}</small>
</li>
""")


def page(folder: str, results: Sequence[QueryResult], pictures: Pictures) -> str:
    """Return the HTML of results from the dataset in `folder`; an answer without a picture is shown by its title."""
    main = ""
    for result in results:
        query = escape_text(result.query, LIMIT)
        picture = ""
        if result.kind == "image" and result.query in pictures:
            picture = f"<p>{image_tag(pictures[result.query], 'Image of the query')}</p>"
        answers = ""
        for answer in result.answers:
            jpeg = pictures.get((answer.split, answer.row))
            image = image_tag(jpeg, "") if jpeg else ""  # no alt text: the title stands below
            title, place = escape_text(answer.title, LIMIT), escape_text(answer.place(folder), LIMIT)
            answers += ANSWER.format(image=image, rank=answer.rank, title=title, score=answer.score, place=place)
        main += f'<section><h2>{query}</h2>{picture}<ol class="results">{answers}</ol></section>'
    title = f"Search in {Path(folder).name}"
    return document(title, f"<h1>{escape_text(title)}</h1>", main, "")
