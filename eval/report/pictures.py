"""Pictures for TensorBoard, drawn with Pillow: answers of the model, a similarity heat map, sprites of the projector.

Titles are drawn in the first font of FONTS that is installed; it draws boxes for characters that it lacks.
Dimension key: N pictures, S side in pixels, H height, W width, C colour channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.text import printable
from eval.report.answers import TOP_K, Answers

Title = Callable[[int], str]  # row of the split -> its title
Picture = Callable[[int], bytes]  # row of the split -> a small JPEG, b"" where there is none
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")
WIDTH, TILE_W, TILE_H, LINE, GAP = 580, 104, 78, 20, 8  # a card of TensorBoard is some 400 pixels wide
CELL, SPRITE = 14, 64  # pixels of a side: a cell of the heat map, a picture of the projector
PAPER, INK, FAINT, RIGHT, RIGHT_PAPER = "#ffffff", "#1b1f24", "#6a737d", "#116329", "#dafbe1"
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # at 0, 1/4 … 1


def draw_image_to_text(answers: Answers, places: Sequence[int], title: Title, picture: Picture) -> np.ndarray:
    """Draw each thumbnail beside its best titles with their scores, right ones marked: uint8 [H, W, 3]."""
    high = TOP_K * LINE + 3 * GAP
    sheet, pen = _paper(high * len(places))
    for index, place in enumerate(places):
        top = index * high + GAP
        row = int(answers.query_Q[place])
        _paste(sheet, picture(row), (GAP, top))
        pen.text((GAP, top + TILE_H), _rank(answers, place), FAINT, _font(13))
        for line, (candidate, score, right) in enumerate(answers.of(place)):
            _answer_line(pen, TILE_W + 2 * GAP, top + line * LINE, f"{score:.2f}", title(candidate), right)
    return np.asarray(sheet)


def draw_text_to_image(answers: Answers, places: Sequence[int], title: Title, picture: Picture) -> np.ndarray:
    """Draw each title above its best thumbnails with their scores, right ones framed: uint8 [H, W, 3]."""
    high = TILE_H + 2 * LINE + 2 * GAP
    sheet, pen = _paper(high * len(places))
    for index, place in enumerate(places):
        top = index * high + GAP
        text = f"{_clip(title(int(answers.query_Q[place])), 54)}   ({_rank(answers, place)})"
        pen.text((GAP, top), text, INK, _font(14))
        for column, (candidate, score, right) in enumerate(answers.of(place)):
            left = GAP + column * (TILE_W + GAP + 3)
            if right:
                pen.rectangle((left - 5, top + LINE - 2, left + TILE_W + 4, top + LINE + TILE_H + 21), RIGHT_PAPER,
                              RIGHT, 3)
            _paste(sheet, picture(candidate), (left, top + LINE + 3))
            pen.text((left, top + LINE + TILE_H + 4), f"{score:.2f}" + "  ✓ right" * right, RIGHT if right else FAINT,
                     _font(13))
    return np.asarray(sheet)


def heat_map(image_NE: Tensor, title_NE: Tensor) -> np.ndarray:
    """Draw cosines of images (rows) and titles (columns), bright is similar, pairs on the diagonal: uint8 [H, W, 3].

    The colours span lowest to highest cosine, which also shows a model whose cosines all lie close together.
    """
    score = (image_NE @ title_NE.T).cpu().numpy()
    low, high = float(score.min()), float(score.max())
    position = (score - low) / max(high - low, 1e-9) * (len(VIRIDIS) - 1)
    colour = np.stack([np.interp(position, range(len(VIRIDIS)), channel) for channel in zip(*VIRIDIS, strict=True)], -1)
    body = colour.round().astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    sheet = Image.new("RGB", (max(body.shape[1], 420), body.shape[0] + 30), PAPER)
    sheet.paste(Image.fromarray(body), (0, 30))
    ImageDraw.Draw(sheet).text((4, 7), f"images down, titles across; cosines {low:.2f} (dark) to {high:.2f} (bright)",
                               INK, _font(13))
    return np.asarray(sheet)


def sprite_sheet(pictures: Sequence[bytes], titles: Sequence[str]) -> np.ndarray:
    """Draw small squares for the projector, first the pictures, then the titles as text: uint8 [H, H, 3].

    They fill the sheet row by row, as many in a row as there are rows.
    """
    across = math.ceil(math.sqrt(len(pictures) + len(titles)))
    sheet = Image.new("RGB", (across * SPRITE, across * SPRITE))
    for place, data in enumerate(pictures):
        _paste_tile(sheet, place, _picture_tile(data, SPRITE))
    for place, text in enumerate(titles, len(pictures)):
        _paste_tile(sheet, place, _title_tile(_clean(text), SPRITE))
    return np.asarray(sheet)


def _paste_tile(sheet: Image.Image, place: int, tile: Image.Image) -> None:
    row, column = divmod(place, sheet.width // tile.width)
    sheet.paste(tile, (column * tile.width, row * tile.height))


def _picture_tile(data: bytes, side: int) -> Image.Image:
    tile = Image.new("RGB", (side, side), PAPER)
    if data:
        small = Image.open(io.BytesIO(data))
        small.thumbnail((side, side))
        tile.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return tile


def _title_tile(text: str, side: int) -> Image.Image:
    tile = Image.new("RGB", (side, side), PAPER)
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, side - 1, side - 1), "#fff8c5", "#9a6700")
    for line in range(4):
        pen.text((3, 4 + 14 * line), text[line * 10:line * 10 + 10], INK, _font(10))
    return tile


def _paper(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _paste(sheet: Image.Image, data: bytes, corner: tuple[int, int]) -> None:
    if data:
        small = Image.open(io.BytesIO(data))
        small.thumbnail((TILE_W, TILE_H))
        sheet.paste(small, corner)


def _answer_line(pen: ImageDraw.ImageDraw, x: int, y: int, score: str, text: str, right: bool) -> None:
    if right:
        pen.rectangle((x - 6, y - 1, WIDTH - GAP, y + LINE - 3), RIGHT_PAPER)
    pen.text((x, y), score, RIGHT if right else FAINT, _font(14))
    pen.text((x + 40, y), "✓ " * right + _clip(text, 56 - 2 * right), RIGHT if right else INK, _font(14))


def _rank(answers: Answers, place: int) -> str:
    return f"rank {int(answers.rank_Q[place]) + 1:,}"


def _clean(text: str) -> str:
    return " ".join(printable(text[:400]).split())


def _clip(text: str, length: int) -> str:
    clean = _clean(text)
    return clean if len(clean) <= length else clean[:length - 1] + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
