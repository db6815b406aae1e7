"""The queries that the report page shows: helped most by training, hurt most, and hardest after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eval.report.answers import Answers, AnswersByDirection, hardest, improved, worsened
from eval.report.page import escape_text, image_tag, template

Title = Callable[[int], str]
Picture = Callable[[int], bytes]
IMAGES, TITLES = 6, 2  # image queries and title queries of each kind
KINDS = (
    ("helped", "Helped most", "The right answer rose the farthest.", improved),
    ("hurt", "Hurt most", "The right answer fell the farthest: what the gain has cost.", worsened),
    ("hardest", "Hardest now", "The right answer is the farthest down after training.",
     lambda base, tuned, count: hardest(tuned, count)),
)
SECTION = template("""
<section aria-labelledby="{kind}">
<h3 id="{kind}">{heading}</h3>
<p class="soft">{explanation}</p>
{body}
</section>
""")
IMAGE_CARD = template("""
<li class="case">
<div class="query">{image}<div><h4>{title}</h4>{rank}</div></div>
<div class="two">{before_and_after}</div>
</li>
""")
TITLE_CARD = template("""
<li class="case">
<h4>{title}</h4>
<p class="soft small">A title asks for thumbnails</p>
{rank}
{before_and_after}
</li>
""")
STYLE = {True: ' class="right"', False: ""}
MARK = {True: ' <span role="img" aria-label="right answer">✓</span>', False: ""}


def case_sections(answers: Mapping[str, AnswersByDirection], title: Title, picture_of: Picture) -> str:
    """Return the HTML of all kinds; `answers` holds base and tuned."""
    images = answers["base"]["image_to_text"], answers["tuned"]["image_to_text"]
    titles = answers["base"]["text_to_image"], answers["tuned"]["text_to_image"]
    html = (f'<p class="soft">Chosen by rank among {len(images[1].query_Q):,} images and '
            f'{len(titles[1].query_Q):,} titles, not by hand. Each list shows the five best answers with their '
            'cosine; <span class="right">✓ marks a right one</span>.</p>')
    for kind, heading, explanation, select in KINDS:
        cards = ""
        for query in select(*images, IMAGES):
            cards += _image_card(query, *images, title, picture_of)
        for query in select(*titles, TITLES):
            cards += _title_card(query, *titles, title, picture_of)
        body = f'<ul class="cases">{cards}</ul>' if cards else "<p>There are none.</p>"
        html += SECTION.format(kind=kind, heading=heading, explanation=explanation, body=body)
    return html


def _rank_change(base: Answers, tuned: Answers, query: int) -> str:
    before = int(base.rank_Q[query]) + 1
    after = int(tuned.rank_Q[query]) + 1
    style = "up" if after < before else "down" if after > before else ""
    return f'<p class="rank">rank {before:,} → <span class="{style}">{after:,}</span></p>'


def _image_card(query: int, base: Answers, tuned: Answers, title: Title, picture_of: Picture) -> str:
    """Return an image with its rank, and its best titles before and after."""
    lists = ""
    for name, answers in (("Before", base), ("After", tuned)):
        items = ""
        for row, score, right in answers.of(query):
            text = escape_text(title(row), 90)
            items += f'<li{STYLE[right]}><span class="score">{score:.2f}</span>{text}{MARK[right]}</li>'
        lists += f"<div><h5>{name}</h5><ol>{items}</ol></div>"
    row = int(tuned.query_Q[query])
    image = image_tag(picture_of(row), f"Thumbnail of: {title(row)}")
    return IMAGE_CARD.format(image=image, title=escape_text(title(row)), rank=_rank_change(base, tuned, query),
                             before_and_after=lists)


def _title_card(query: int, base: Answers, tuned: Answers, title: Title, picture_of: Picture) -> str:
    """Return a title with its rank, and its best thumbnails before and after."""
    strips = ""
    for name, answers in (("Before", base), ("After", tuned)):
        items = ""
        for row, score, right in answers.of(query):
            image = image_tag(picture_of(row), f"Thumbnail of: {title(row)}")
            items += f'<li{STYLE[right]}>{image}<span class="score">{score:.2f}</span>{MARK[right]}</li>'
        strips += f'<div class="strip"><h5>{name}</h5><ol>{items}</ol></div>'
    own_title = escape_text(title(int(tuned.query_Q[query])))
    return TITLE_CARD.format(title=own_title, rank=_rank_change(base, tuned, query), before_and_after=strips)
