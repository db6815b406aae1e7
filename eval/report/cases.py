"""The queries that the report page shows: helped most by training, hurt most, and hardest after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eval.report.answers import Answers, AnswersByDirection, hardest, improved, worsened
from eval.report.page import escape_text, image_tag

Title = Callable[[int], str]
Picture = Callable[[int], bytes]
IMAGES, TITLES = 6, 2  # image queries and title queries of each kind
KINDS = (
    ("helped", "Helped most", "The right answer rose the farthest."),
    ("hurt", "Hurt most", "The right answer fell the farthest: what the gain has cost."),
    ("hardest", "Hardest now", "The right answer is the farthest down after training."),
)


def case_sections(answers: Mapping[str, AnswersByDirection], title: Title, picture_of: Picture) -> str:
    """The HTML of all kinds; `answers` holds base and tuned."""
    base, tuned = answers["base"], answers["tuned"]
    images, titles = (len(tuned[way].query_Q) for way in ("image_to_text", "text_to_image"))
    parts = [f'<p class="soft">Chosen by rank among {images:,} images and {titles:,} titles, not by hand. Each list '
             'shows the five best answers with their cosine; <span class="right">✓ marks a right one</span>.</p>']
    for key, heading, words in KINDS:
        cards = [_image_card(place, base["image_to_text"], tuned["image_to_text"], title, picture_of)
                 for place in select_cases(key, base["image_to_text"], tuned["image_to_text"], IMAGES)]
        cards += [_title_card(place, base["text_to_image"], tuned["text_to_image"], title, picture_of)
                  for place in select_cases(key, base["text_to_image"], tuned["text_to_image"], TITLES)]
        body = f'<ul class="cases">{"".join(cards)}</ul>' if cards else "<p>There are none.</p>"
        parts.append(f'<section aria-labelledby="{key}"><h3 id="{key}">{heading}</h3><p class="soft">{words}</p>'
                     f'{body}</section>')
    return "".join(parts)


def select_cases(kind: str, base: Answers, tuned: Answers, count: int) -> list[int]:
    """Indices of at most `count` queries of one kind."""
    if kind == "hardest":
        return hardest(tuned, count)
    return (improved if kind == "helped" else worsened)(base, tuned, count)


def _rank_change(base: Answers, tuned: Answers, place: int) -> str:
    before, after = int(base.rank_Q[place]) + 1, int(tuned.rank_Q[place]) + 1
    style = "up" if after < before else "down" if after > before else ""
    return f'<p class="rank">rank {before:,} → <span class="{style}">{after:,}</span></p>'


def _image_card(place: int, base: Answers, tuned: Answers, title: Title, picture_of: Picture) -> str:
    own = title(int(tuned.query_Q[place]))
    lists = "".join(f"<div><h5>{name}</h5><ol>{_titles(answers, place, title)}</ol></div>"
                    for name, answers in (("Before", base), ("After", tuned)))
    image = image_tag(picture_of(int(tuned.query_Q[place])), f"Thumbnail of: {own}")
    return (f'<li class="case"><div class="query">{image}<div><h4>{escape_text(own)}</h4>'
            f'{_rank_change(base, tuned, place)}</div></div><div class="two">{lists}</div></li>')


def _titles(answers: Answers, place: int, title: Title) -> str:
    return "".join(f'<li{_style(right)}><span class="score">{score:.2f}</span>{escape_text(title(row), 90)}'
                   f'{_mark(right)}</li>' for row, score, right in answers.of(place))


def _title_card(place: int, base: Answers, tuned: Answers, title: Title, picture_of: Picture) -> str:
    strips = "".join(f'<div class="strip"><h5>{name}</h5><ol>{_pictures(answers, place, title, picture_of)}</ol></div>'
                     for name, answers in (("Before", base), ("After", tuned)))
    own = title(int(tuned.query_Q[place]))
    return (f'<li class="case"><h4>{escape_text(own)}</h4><p class="soft small">A title asks for '
            f'thumbnails</p>{_rank_change(base, tuned, place)}{strips}</li>')


def _pictures(answers: Answers, place: int, title: Title, picture_of: Picture) -> str:
    return "".join(f'<li{_style(right)}>{image_tag(picture_of(row), f"Thumbnail of: {title(row)}")}'
                   f'<span class="score">{score:.2f}</span>{_mark(right)}</li>'
                   for row, score, right in answers.of(place))


def _style(right: bool) -> str:
    return ' class="right"' if right else ""


def _mark(right: bool) -> str:
    return ' <span role="img" aria-label="right answer">✓</span>' if right else ""
