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
OVERSAMPLED = 3  # drawn this much larger, then reduced: Pillow does not smooth the edges of polygons
WIDE, HIGH = WIDTH * OVERSAMPLED, HEIGHT * OVERSAMPLED  # pixels of the drawing
RGB = {
    "red": (222, 32, 38), "orange": (250, 134, 18), "yellow": (252, 222, 40), "green": (38, 166, 72),
    "blue": (34, 92, 222), "purple": (130, 54, 190), "pink": (250, 130, 190), "white": (248, 248, 248),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "face", "bolt")
SIZES = {"tiny": 0.095, "normal": 0.15, "giant": 0.23}  # radius as a share of the height
AREAS = {  # place -> the area of its objects: left, top, right, bottom, as `_pixels` takes them
    "centre": (0.14, 0.14, 0.86, 0.86),
    "left": (0.06, 0.06, 0.5, 0.94),
    "right": (0.5, 0.06, 0.94, 0.94),
    "top": (0.06, 0.06, 0.94, 0.5),
    "bottom": (0.06, 0.5, 0.94, 0.94),
    "row": (0.06, 0.4, 0.94, 0.6),
}
PATTERNS = ("plain", "gradient", "stripes", "split", "rays")
WORDS = ("WOW", "OMG", "VS", "?!", "LOL", "NEW", "HOW?", "#1", "FAIL", "100%", "STOP", "REAL")
Point = tuple[float, float]
Spot = tuple[float, float, float]  # x, y and radius of an object, as `_pixels` takes them
Colour = tuple[int, int, int]
LOT_COUNT = 12
BLACK: Colour = (0, 0, 0)
CAPTION_COLOURS = (  # of the bar and of the word
    ((255, 230, 0), (10, 10, 10)),
    ((220, 0, 0), (255, 255, 255)),
    ((10, 10, 10), (255, 230, 0)),
    ((255, 255, 255), (220, 0, 0)),
)
# Outline of the arrow: distance from its tip, distance from its axis.
ARROW = ((0.0, 0.0), (0.12, 0.09), (0.12, 0.04), (0.34, 0.05), (0.34, -0.05), (0.12, -0.04), (0.12, -0.09))


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
    second_ground: str  # the second colour of stripes, split and rays
    word: str  # a caption bar with this word; '' for none
    arrow: bool
    border: str
    badge: str  # running time in the corner
    jitter: int  # seeds positions, angles and corners

    @property
    def lot(self) -> int:
        """Return a number below LOT_COUNT that depends on the contents alone: splits made by it share none."""
        contents = (self.count, self.size, self.colour, self.shape, self.place, self.rival, self.pattern, self.ground)
        return crc32(repr(contents).encode()) % LOT_COUNT


def random_scene(rng: random.Random, clutter: float) -> Scene:
    """Draw a scene; `clutter` is the chance of each of caption bar, arrow (half of it), border and badge."""
    colour, ground, second_ground, other = rng.sample(sorted(RGB), 4)
    count = rng.randint(1, 5)
    rival = (other, rng.choice(SHAPES)) if rng.random() < 0.2 else None
    places = [place for place in AREAS if place != "row" or count > 1]
    return Scene(
        count=count,
        size=rng.choice(sorted(SIZES)),
        colour=colour,
        shape=rng.choice(SHAPES),
        place="left" if rival else rng.choice(places),
        rival=rival,
        pattern=rng.choice(PATTERNS),
        ground=ground,
        second_ground=second_ground,
        word=rng.choice(WORDS) if rng.random() < clutter else "",
        arrow=rng.random() < clutter / 2,
        border=rng.choice(("red", "yellow", "white", "black")) if rng.random() < clutter else "",
        badge=f"{rng.randint(0, 29)}:{rng.randint(0, 59):02}" if rng.random() < clutter else "",
        jitter=rng.getrandbits(32),
    )


def draw(scene: Scene) -> Image.Image:
    """Return the scene as an RGB thumbnail of WIDTH x HEIGHT; equal scenes give equal pixels."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (WIDE, HIGH))
    pen = ImageDraw.Draw(image)
    _draw_ground(pen, scene, rng)
    spots = _spots(rng, scene)
    shade = _mix(RGB[scene.ground], BLACK, 0.45)
    if scene.arrow:
        _draw_arrow(pen, spots, rng)
    for spot in spots:
        _draw_object(pen, scene.shape, spot, rng.uniform(-16, 16), RGB[scene.colour], shade)
    if scene.rival:
        colour, shape = scene.rival
        spot = (rng.uniform(0.68, 0.74), rng.uniform(0.42, 0.58), 0.2)
        _draw_object(pen, shape, spot, rng.uniform(-12, 12), RGB[colour], shade)
    if scene.word:
        _draw_caption(pen, scene, rng)
    if scene.border:
        pen.rectangle((0, 0, WIDE - 1, HIGH - 1), outline=RGB[scene.border], width=4 * OVERSAMPLED)
    if scene.badge:
        _draw_badge(pen, scene.badge)
    return image.reduce(OVERSAMPLED)


def _pixels(x: float, y: float) -> Point:
    """Return a place in pixels: the unit is the height, and x = 0 .. 1 is the middle square, which CLIP crops."""
    return (WIDE - HIGH) / 2 + x * HIGH, y * HIGH


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return the colour `share` of the way from a to b."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _draw_ground(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    base = RGB[scene.ground]
    # The second colour stays the weaker one, so that `ground` is what anybody would call the background.
    second = _mix(base, RGB[scene.second_ground], 0.3)
    pen.rectangle((0, 0, WIDE, HIGH), fill=base)
    if scene.pattern == "gradient":
        dark = _mix(base, BLACK, 0.5)
        for y in range(HIGH):
            pen.line((0, y, WIDE, y), fill=_mix(base, dark, y / HIGH))
    elif scene.pattern == "stripes":
        step = HIGH // 5
        lean = rng.choice((-1, 0, 1)) * HIGH // 2
        for x in range(-HIGH, WIDE + HIGH, 2 * step):
            pen.polygon([(x, 0), (x + step, 0), (x + step + lean, HIGH), (x + lean, HIGH)], fill=second)
    elif scene.pattern == "split":
        middle = WIDE // 2
        lean = rng.randint(-HIGH // 6, HIGH // 6)
        pen.polygon([(middle + lean, 0), (WIDE, 0), (WIDE, HIGH), (middle - lean, HIGH)], fill=second)
    elif scene.pattern == "rays":
        centre = (WIDE / 2, HIGH / 2)
        for k in range(12):
            ray = [centre]
            for angle in (math.tau * k / 12, math.tau * (k + 0.5) / 12):
                ray.append((centre[0] + WIDE * math.cos(angle), centre[1] + WIDE * math.sin(angle)))
            pen.polygon(ray, fill=second)


def _spots(rng: random.Random, scene: Scene) -> list[Spot]:
    """Return the place of every object, none touching another: drawn at random, smaller until all fit."""
    left, top, right, bottom = AREAS[scene.place]
    radius = SIZES[scene.size]
    if scene.place == "row":
        step = (right - left) / scene.count
        radius = min(radius, 0.46 * step)
        y = 0.5 + rng.uniform(-0.08, 0.08)
        return [(left + step * (k + 0.5), y, radius) for k in range(scene.count)]
    if scene.place == "centre" and scene.count == 1:
        return [(0.5 + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.04, 0.04), radius)]
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    while True:
        spots: list[Spot] = []
        for _ in range(60):
            x = rng.uniform(min(left + radius, centre_x), max(right - radius, centre_x))
            y = rng.uniform(min(top + radius, centre_y), max(bottom - radius, centre_y))
            if all(math.dist((x, y), spot[:2]) > 2.15 * radius for spot in spots):
                spots.append((x, y, radius))
            if len(spots) == scene.count:
                return spots
        radius *= 0.93


@cache
def _outline(shape: str) -> tuple[Point, ...]:
    """Return the outline of a shape of radius 1 around the origin, y down."""
    if shape == "square":
        return _polygon(4, (1.15,), 45)
    if shape == "triangle":
        return tuple((x, y + 0.15) for x, y in _polygon(3, (1.2,), -90))
    if shape == "star":
        return _polygon(10, (1.15, 0.48), -90)
    if shape == "bolt":
        return ((0.15, -1.2), (-0.7, 0.2), (-0.1, 0.2), (-0.25, 1.2), (0.7, -0.3), (0.1, -0.3), (0.5, -1.2))
    if shape == "heart":
        points = []
        for t in (math.tau * k / 40 for k in range(40)):
            up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((math.sin(t) ** 3 * 1.1, -up / 15))
        return tuple(points)
    return _polygon(40, (1.0,), 0)  # nearly a circle


def _polygon(corners: int, radii: Sequence[float], first_angle: float) -> tuple[Point, ...]:
    """Return corners at equal angles, in degrees from `first_angle` on, whose distances take turns among `radii`."""
    points = []
    for k in range(corners):
        angle = (first_angle + 360 * k / corners) * math.pi / 180
        radius = radii[k % len(radii)]
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return tuple(points)


def _draw_object(pen: ImageDraw.ImageDraw, shape: str, spot: Spot, angle: float, fill: Colour, shade: Colour) -> None:
    """Draw one object with its drop shadow and a contrasting edge, as stickers have; `angle` is in degrees."""
    cos, sin = math.cos(angle * math.pi / 180), math.sin(angle * math.pi / 180)
    edge = (30, 30, 34) if sum(fill) > 330 else (250, 250, 250)
    x, y, radius = spot
    middle_x, middle_y = _pixels(x, y)
    size = radius * HIGH

    def placed(points: Sequence[Point], margin: float = 0.0, drop: float = 0.0) -> list[Point]:
        scale = size + margin
        moved = []
        for x, y in points:
            moved.append((middle_x + drop + scale * (x * cos - y * sin), middle_y + drop + scale * (x * sin + y * cos)))
        return moved

    thin = 1.4 * OVERSAMPLED
    outline = _outline(shape)
    pen.polygon(placed(outline, thin, drop=1.6 * OVERSAMPLED), fill=shade)
    pen.polygon(placed(outline, thin), fill=edge)
    pen.polygon(placed(outline), fill=fill)
    if shape == "ring":
        pen.polygon(placed(outline, -0.42 * size), fill=edge)
        pen.polygon(placed(outline, -0.42 * size - thin), fill=shade)
    if shape == "face":
        for eye_x in (-0.36, 0.36):
            eye = [(eye_x + 0.15 * x, -0.25 + 0.24 * y) for x, y in outline]
            pen.polygon(placed(eye), fill=edge)
        angles = [math.pi * k / 12 for k in range(13)]
        smile = [(0.62 * math.cos(t), 0.12 + 0.5 * math.sin(t)) for t in angles]
        pen.polygon(placed(smile), fill=edge)


def _draw_arrow(pen: ImageDraw.ImageDraw, spots: Sequence[Spot], rng: random.Random) -> None:
    """Draw a red arrow that points at the first object, from where no other is and all of it shows."""
    x, y, radius = spots[0]
    # From the other objects' side to the opposite one.
    away_x = -sum(other_x - x for other_x, _, _ in spots[1:])
    away_y = -sum(other_y - y for _, other_y, _ in spots[1:])
    end_y = y + away_y / max(0.01, math.hypot(away_x, away_y)) * (radius + 0.4)
    if len(spots) == 1 or not 0.4 < end_y < 0.6:
        away_x, away_y = (1.0 if away_x > 0 else -1.0), 0.0
    angle = math.atan2(away_y, away_x) + rng.uniform(-0.3, 0.3)
    cos, sin = math.cos(angle), math.sin(angle)
    points = []
    for along, across in ARROW:
        distance = radius + 0.03 + along
        points.append(_pixels(x + cos * distance - sin * across, y + sin * distance + cos * across))
    pen.polygon(points, fill=(235, 20, 20), outline=(255, 255, 255), width=OVERSAMPLED)


def _draw_caption(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    """Draw a bar with a word in a corner away from the objects and from the badge's."""
    font = ImageFont.load_default(19 * OVERSAMPLED)
    left, top, right, bottom = pen.textbbox((0, 0), scene.word, font=font, stroke_width=OVERSAMPLED)
    pad, margin = 3 * OVERSAMPLED, 6 * OVERSAMPLED
    wide, tall = right - left + 2 * pad, bottom - top + 2 * pad
    at_bottom = scene.place == "top" or (scene.place in ("centre", "right", "row") and rng.random() < 0.5)
    at_right = not at_bottom and scene.place != "right" and (scene.place == "left" or rng.random() < 0.5)
    x = WIDE - wide - margin if at_right else margin
    y = HIGH - tall - margin if at_bottom else margin
    back, ink = rng.choice(CAPTION_COLOURS)
    pen.rounded_rectangle((x, y, x + wide, y + tall), radius=2 * OVERSAMPLED, fill=back)
    pen.text((x + pad - left, y + pad - top), scene.word, font=font, fill=ink, stroke_width=OVERSAMPLED // 2,
             stroke_fill=ink)


def _draw_badge(pen: ImageDraw.ImageDraw, time: str) -> None:
    """Draw the running time at the lower right, as the site itself prints it."""
    font = ImageFont.load_default(10 * OVERSAMPLED)
    left, top, right, bottom = pen.textbbox((0, 0), time, font=font)
    pad, margin = 2 * OVERSAMPLED, 3 * OVERSAMPLED
    wide, tall = right - left + 2 * pad, bottom - top + 2 * pad
    x, y = WIDE - wide - margin, HIGH - tall - margin
    pen.rounded_rectangle((x, y, x + wide, y + tall), radius=2 * OVERSAMPLED, fill=(16, 16, 16))
    pen.text((x + pad - left, y + pad - top), time, font=font, fill=(255, 255, 255))
