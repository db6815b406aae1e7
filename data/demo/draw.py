"""Scenes of the offline demo and the thumbnails drawn from them with Pillow: shapes, grounds, and YouTube's clutter."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from zlib import crc32

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 192, 108
OVERSAMPLED = 3  # drawn this much larger, then reduced: smooth edges from a drawing library without any
RGB = {
    "red": (222, 32, 38), "orange": (250, 134, 18), "yellow": (252, 222, 40), "green": (38, 166, 72),
    "blue": (34, 92, 222), "purple": (130, 54, 190), "pink": (250, 130, 190), "white": (248, 248, 248),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "face", "bolt")
SIZES = {"tiny": 0.095, "normal": 0.15, "giant": 0.23}  # radius as a share of the height
PLACES = ("centre", "left", "right", "top", "bottom", "row")
PATTERNS = ("plain", "gradient", "stripes", "split", "rays")
WORDS = ("WOW", "OMG", "VS", "?!", "LOL", "NEW", "HOW?", "#1", "FAIL", "100%", "STOP", "REAL")
Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """The content of a thumbnail. Titles name the fields down to `ground`; the rest is clutter."""

    count: int
    size: str
    colour: str
    shape: str
    place: str
    rival: tuple[str, str] | None  # colour and shape of a single object opposite, for "A vs B"
    pattern: str
    ground: str
    ground_too: str  # the second colour of stripes, split and rays
    word: str  # a caption bar with this word; '' for none
    arrow: bool
    border: str
    badge: str  # running time in the corner
    jitter: int  # seeds positions, angles and corners

    def lot(self, lots: int) -> int:
        """A number below `lots` that depends on the contents alone: splits made from it never share contents."""
        contents = (self.count, self.size, self.colour, self.shape, self.place, self.rival, self.pattern, self.ground)
        return crc32(repr(contents).encode()) % lots


def random_scene(rng: random.Random, clutter: float) -> Scene:
    """Draw a scene; `clutter` is the chance of each of caption bar, arrow (half of it), border and badge."""
    colour, ground, ground_too, other = rng.sample(sorted(RGB), 4)
    count = rng.randint(1, 5)
    rival = (other, rng.choice(SHAPES)) if rng.random() < 0.2 else None
    return Scene(
        count=count, size=rng.choice(sorted(SIZES)), colour=colour, shape=rng.choice(SHAPES),
        place="left" if rival else rng.choice(PLACES[: -1 if count == 1 else None]), rival=rival,
        pattern=rng.choice(PATTERNS), ground=ground, ground_too=ground_too,
        word=rng.choice(WORDS) if rng.random() < clutter else "",
        arrow=rng.random() < clutter / 2,
        border=rng.choice(("red", "yellow", "white", "black")) if rng.random() < clutter else "",
        badge=f"{rng.randint(0, 29)}:{rng.randint(0, 59):02}" if rng.random() < clutter else "",
        jitter=rng.getrandbits(32),
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB thumbnail of WIDTH x HEIGHT; equal scenes give equal pixels."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED))
    pen = ImageDraw.Draw(image)
    _ground(pen, scene, rng)
    spots = _spots(rng, scene)
    shade = _mix(RGB[scene.ground], (0, 0, 0), 0.45)
    if scene.arrow:
        _arrow(pen, spots, rng)
    for x, y, radius in spots:
        _stamp(pen, scene.shape, (x, y), radius, rng.uniform(-16, 16), RGB[scene.colour], shade)
    if scene.rival:
        colour, shape = scene.rival
        spot = (rng.uniform(0.68, 0.74), rng.uniform(0.42, 0.58))
        _stamp(pen, shape, spot, 0.2, rng.uniform(-12, 12), RGB[colour], shade)
    if scene.word:
        _caption(pen, scene, rng)
    if scene.border:
        pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=RGB[scene.border], width=4 * OVERSAMPLED)
    if scene.badge:
        _badge(pen, scene.badge)
    return image.reduce(OVERSAMPLED)


def _pixels(x: float, y: float) -> Point:
    """Frame coordinates to pixels: the unit is the height and x = 0 .. 1 is the middle square, which CLIP crops."""
    side = HEIGHT * OVERSAMPLED
    return (WIDTH * OVERSAMPLED - side) / 2 + x * side, y * side


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour `share` of the way from a to b."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _ground(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    width, height = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED
    base = RGB[scene.ground]
    # The second colour stays the weaker one, so that `ground` is what anybody would call the background.
    too = _mix(base, RGB[scene.ground_too], 0.3)
    pen.rectangle((0, 0, width, height), fill=base)
    if scene.pattern == "gradient":
        dark = _mix(base, (0, 0, 0), 0.5)
        for y in range(height):
            pen.line((0, y, width, y), fill=_mix(base, dark, y / height))
    elif scene.pattern == "stripes":
        step, lean = height // 5, rng.choice((-1, 0, 1)) * height // 2
        for x in range(-height, width + height, 2 * step):
            pen.polygon([(x, 0), (x + step, 0), (x + step + lean, height), (x + lean, height)], fill=too)
    elif scene.pattern == "split":
        lean = rng.randint(-height // 6, height // 6)
        pen.polygon([(width // 2 + lean, 0), (width, 0), (width, height), (width // 2 - lean, height)], fill=too)
    elif scene.pattern == "rays":
        for k in range(12):
            a, b = (math.tau * (k + half) / 12 for half in (0.0, 0.5))
            pen.polygon([(width / 2, height / 2), *((width / 2 + width * math.cos(t), height / 2 + width * math.sin(t))
                                                  for t in (a, b))], fill=too)


def _spots(rng: random.Random, scene: Scene) -> list[tuple[float, float, float]]:
    """(x, y, radius) of every object, not touching one another: dart throwing that shrinks until all fit."""
    low, high = 0.06, 0.94
    left, top, right, bottom = {
        "left": (low, low, 0.5, high), "right": (0.5, low, high, high), "top": (low, low, high, 0.5),
        "bottom": (low, 0.5, high, high), "centre": (0.14, 0.14, 0.86, 0.86), "row": (low, 0.4, high, 0.6),
    }[scene.place]
    radius = SIZES[scene.size]
    if scene.place == "row":
        step = (right - left) / scene.count
        radius, lift = min(radius, 0.46 * step), rng.uniform(-0.08, 0.08)
        return [(left + step * (k + 0.5), 0.5 + lift, radius) for k in range(scene.count)]
    if scene.place == "centre" and scene.count == 1:
        return [(0.5 + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.04, 0.04), radius)]
    while True:
        spots: list[tuple[float, float, float]] = []
        for _ in range(60):
            x = rng.uniform(min(left + radius, (left + right) / 2), max(right - radius, (left + right) / 2))
            y = rng.uniform(min(top + radius, (top + bottom) / 2), max(bottom - radius, (top + bottom) / 2))
            if all(math.dist((x, y), (p, q)) > 2.15 * radius for p, q, _ in spots):
                spots.append((x, y, radius))
            if len(spots) == scene.count:
                return spots
        radius *= 0.93


@cache
def _unit(shape: str) -> tuple[Point, ...]:
    """The outline of a shape of radius 1 around the origin, y down."""
    def around(corners: int, radii: Sequence[float], turn: float) -> tuple[Point, ...]:
        angles = ((turn + 360 * k / corners) * math.pi / 180 for k in range(corners))
        return tuple((radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
                     for k, a in enumerate(angles))
    if shape == "square":
        return around(4, (1.15,), 45)
    if shape == "triangle":
        return tuple((x, y + 0.15) for x, y in around(3, (1.2,), -90))
    if shape == "star":
        return around(10, (1.15, 0.48), -90)
    if shape == "bolt":
        return ((0.15, -1.2), (-0.7, 0.2), (-0.1, 0.2), (-0.25, 1.2), (0.7, -0.3), (0.1, -0.3), (0.5, -1.2))
    if shape == "heart":
        turns = [math.tau * k / 40 for k in range(40)]
        return tuple((math.sin(t) ** 3 * 1.1, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                                                - math.cos(4 * t)) / 15) for t in turns)
    return around(40, (1.0,), 0)


def _stamp(pen: ImageDraw.ImageDraw, shape: str, spot: Point, radius: float, angle: float, fill: Colour,
           shade: Colour) -> None:
    """One object with its drop shadow and a contrasting edge, as stickers have."""
    cos, sin = math.cos(angle * math.pi / 180), math.sin(angle * math.pi / 180)
    edge = (30, 30, 34) if sum(fill) > 330 else (250, 250, 250)
    size = radius * HEIGHT * OVERSAMPLED
    middle_x, middle_y = _pixels(*spot)

    def placed(points: Sequence[Point], grown: float = 0.0, drop: float = 0.0) -> list[Point]:
        scale = size + grown
        return [(middle_x + drop + scale * (x * cos - y * sin), middle_y + drop + scale * (x * sin + y * cos))
                for x, y in points]

    thin, drop = 1.4 * OVERSAMPLED, 1.6 * OVERSAMPLED
    outline = _unit(shape)
    for colour, grown, offset in ((shade, thin, drop), (edge, thin, 0.0), (fill, 0.0, 0.0)):
        pen.polygon(placed(outline, grown, offset), fill=colour)
    if shape == "ring":
        pen.polygon(placed(outline, -0.42 * size), fill=edge)
        pen.polygon(placed(outline, -0.42 * size - thin), fill=shade)
    if shape == "face":
        for x in (-0.36, 0.36):
            pen.polygon(placed([(x + 0.15 * p, -0.25 + 0.24 * q) for p, q in outline]), fill=edge)
        smile = [(0.62 * math.cos(t), 0.12 + 0.5 * math.sin(t)) for t in (math.pi * k / 12 for k in range(13))]
        pen.polygon(placed(smile), fill=edge)


def _arrow(pen: ImageDraw.ImageDraw, spots: Sequence[tuple[float, float, float]], rng: random.Random) -> None:
    """The red arrow that points at the first object, from where no other is and all of it shows."""
    x, y, radius = spots[0]
    others = [(p - x, q - y) for p, q, _ in spots[1:]]
    away = (-sum(p for p, _ in others), -sum(q for _, q in others))
    if not others or not 0.4 < y + away[1] / max(0.01, math.hypot(*away)) * (radius + 0.4) < 0.6:
        away = (1.0 if sum(p for p, _ in others) < 0 else -1.0, 0.0)
    angle = math.atan2(away[1], away[0]) + rng.uniform(-0.3, 0.3)
    cos, sin = math.cos(angle), math.sin(angle)
    shape = [(0.0, 0.0), (0.12, 0.09), (0.12, 0.04), (0.34, 0.05), (0.34, -0.05), (0.12, -0.04), (0.12, -0.09)]
    points = [_pixels(x + cos * (radius + 0.03 + p) - sin * q, y + sin * (radius + 0.03 + p) + cos * q)
              for p, q in shape]
    pen.polygon(points, fill=(235, 20, 20), outline=(255, 255, 255), width=OVERSAMPLED)


def _caption(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    """A bar with a word in a corner away from the objects and from the badge's."""
    font = ImageFont.load_default(19 * OVERSAMPLED)
    box = pen.textbbox((0, 0), scene.word, font=font, stroke_width=OVERSAMPLED)
    pad, margin = 3 * OVERSAMPLED, 6 * OVERSAMPLED
    wide, tall = box[2] - box[0] + 2 * pad, box[3] - box[1] + 2 * pad
    low = scene.place == "top" or (scene.place in ("centre", "right", "row") and rng.random() < 0.5)
    right = not low and scene.place != "right" and (scene.place == "left" or rng.random() < 0.5)
    x = pen.im.size[0] - wide - margin if right else margin
    y = pen.im.size[1] - tall - margin if low else margin
    back, ink = rng.choice((((255, 230, 0), (10, 10, 10)), ((220, 0, 0), (255, 255, 255)),
                            ((10, 10, 10), (255, 230, 0)),
                            ((255, 255, 255), (220, 0, 0))))
    pen.rounded_rectangle((x, y, x + wide, y + tall), radius=2 * OVERSAMPLED, fill=back)
    pen.text((x + pad - box[0], y + pad - box[1]), scene.word, font=font, fill=ink, stroke_width=OVERSAMPLED // 2,
             stroke_fill=ink)


def _badge(pen: ImageDraw.ImageDraw, time: str) -> None:
    """The running time at the lower right, as the site itself prints it."""
    font = ImageFont.load_default(10 * OVERSAMPLED)
    width, height = pen.im.size
    box = pen.textbbox((0, 0), time, font=font)
    wide, tall = box[2] - box[0] + 4 * OVERSAMPLED, box[3] - box[1] + 4 * OVERSAMPLED
    x, y = width - wide - 3 * OVERSAMPLED, height - tall - 3 * OVERSAMPLED
    pen.rounded_rectangle((x, y, x + wide, y + tall), radius=2 * OVERSAMPLED, fill=(16, 16, 16))
    pen.text((x + 2 * OVERSAMPLED - box[0], y + 2 * OVERSAMPLED - box[1]), time, font=font, fill=(255, 255, 255))
