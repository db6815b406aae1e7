"""The offline demo: a dataset of drawn thumbnails with YouTube-like titles."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data.demo.draw import Scene, draw, random_scene

COUNTS = {"train": 3000, "valid": 400, "test": 400}
# Scenes fall into lots by their contents: no split, and no pretraining whatever its seed, shares them with another.
LOTS = {"train": range(4), "valid": range(4, 5), "test": range(5, 6), "pretrain": range(6, 12)}
# For each value its plain word, then other ones.
NUMBERS = {
    1: ("one", "1", "a single", "just one", "solo"),
    2: ("two", "2", "a pair of", "double", "twin"),
    3: ("three", "3", "a trio of", "triple"),
    4: ("four", "4", "a quartet of", "quad"),
    5: ("five", "5", "a squad of"),
}
COLOURS = {
    "red": ("red", "crimson", "scarlet", "cherry"),
    "orange": ("orange", "tangerine", "pumpkin", "amber"),
    "yellow": ("yellow", "golden", "lemon", "banana"),
    "green": ("green", "emerald", "lime", "slime"),
    "blue": ("blue", "sapphire", "azure", "navy"),
    "purple": ("purple", "violet", "grape", "lavender"),
    "pink": ("pink", "bubblegum", "rosy", "barbie"),
    "white": ("white", "snowy", "ivory", "ghost"),
    "black": ("black", "midnight", "ebony", "goth"),
}
THINGS = {
    "circle": ("circle", "ball", "dot", "orb"),
    "square": ("square", "box", "block", "cube"),
    "triangle": ("triangle", "pyramid", "nacho", "spike"),
    "star": ("star", "superstar", "sparkle", "twinkle"),
    "heart": ("heart", "valentine", "crush", "sweetheart"),
    "ring": ("ring", "donut", "hoop", "halo"),
    "face": ("face", "smiley", "emoji", "grin"),
    "bolt": ("bolt", "zap", "flash", "thunder strike"),
}
SIZE_WORDS = {
    "tiny": ("tiny", "micro", "teeny", "smol", "mini"),
    "normal": ("",),
    "giant": ("giant", "HUGE", "MEGA", "monster", "XXL"),
}
PLACE_WORDS = {
    "centre": ("in the middle", "DEAD CENTRE", "front and centre"),
    "left": ("on the left", "on the WEST side", "hugging the left edge"),
    "right": ("on the right", "on the EAST side", "hugging the right edge"),
    "top": ("at the top", "up in the sky", "UPSTAIRS"),
    "bottom": ("at the bottom", "on the floor", "down LOW"),
    "row": ("in a row", "lined up", "in single file"),
}
# Slot of a template -> the field of a scene that it names; in capitals it is written in capitals.
SLOTS = {"n": "count", "colour": "colour", "thing": "shape", "things": "shape", "size": "size", "place": "place",
         "ground": "ground", "rival": "rival"}
TITLES = (
    "I Drew {n} {COLOUR} {things} and THIS Happened",
    "Why nobody paints {colour} {things} on {ground}",
    "{n} {size} {things} vs. {rival}",
    "DO NOT touch the {COLOUR} {thing}!!",
    "Who hid {n} {things} {place}?",
    "Can you find {n} {colour} {things}? 99% FAIL",
    "24 Hours with {n} {size} {colour} {things}",
    "They are BACK: {n} {colour} {things}",
    "{n} {things}, all {COLOUR}, and nobody knows why",
    "Turning my {ground} room into {n} {colour} {things}",
    "POV: {n} {colour} {things} {place}",
    "The truth about {SIZE} {colour} {things}",
    "{colour} {thing} or {rival}: which one WINS?",
    "I bought {n} {colour} {things} so you don't have to",
    "{ground} wall, {n} {things}, zero budget",
    "What {n} {colour} {things} look like on {ground}",
    "My {size} {colour} {thing} setup, {place}",
    "Stop scrolling: {things} {place} in {COLOUR}",
    "Ranking {n} {colour} {things} from worst to best",
    "How to draw {colour} {things} on {ground} like a pro",
    "{n} {size} {things} {place} changed my life",
    "{rival} challenged {n} {colour} {things}",
    "This {colour} {thing} broke the internet",
    "{n} {COLOUR} {things}. One winner. $10,000",
)
BEFORE = ("", "", "", "", "BREAKING: ", "MUST WATCH: ", "😱 ", "🔥 ", "[4K] ", "(not clickbait) ")
AFTER = ("", "", "", "", " (part {k})",
         " | ep. {k}", " 😱", " #shorts", " - GONE WRONG", " (emotional)", " 🔥🔥", " ...again")
CLUTTER = 0.5  # chance of each kind of clutter in a picture
SLANG = 0.8  # chance that a word is any of its kind
WRITTEN_ALIKE = 0.015  # share of rows whose title another row already has, as in real uploads


class Title(NamedTuple):
    """A text and its claims about the picture: Scene field -> value."""

    text: str
    claims: Mapping[str, Any]

    def shared(self, scene: Scene) -> int:
        """Return how many of the claims are true of the scene."""
        return sum(getattr(scene, field) == value for field, value in self.claims.items())

    def fits(self, scene: Scene) -> bool:
        """Return whether no claim is wrong of the scene."""
        return self.shared(scene) == len(self.claims)


def write_demo(folder: Path, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> None:
    """Write a dataset folder as a user would have one: `{split}.csv` (image, title, title_neg) and `images/*.jpg`.

    A title_neg is another row's title that is partly right and wrong about at least one thing. Rows and pixels depend
    on `seed` alone; no two splits share a scene or a title. A split needs at least 8 rows to have negatives.
    """
    rng = random.Random(f"demo {seed}")
    seen: set[str] = set()
    for split, count in counts.items():
        rows = list(scene_rows(rng, split, count, seen))
        titles = [title for _, title in rows]
        negatives = [_negative(rng, scene, titles) for scene, _ in rows]
        write_split(folder, split, rows, negatives)


def scene_rows(rng: random.Random, split: str, count: int, seen: set[str]) -> Iterator[tuple[Scene, Title]]:
    """Yield `count` scenes of the lots of `split`, each with a title not in `seen`, but for a few repeated ones."""
    written: list[Title] = []
    while len(written) < count:
        scene = random_scene(rng, CLUTTER)
        repeated = None
        if written and rng.random() < WRITTEN_ALIKE:
            repeated = rng.choice(written)
            scene = replace(scene, **repeated.claims)
        if scene.lot not in LOTS[split]:
            continue
        title = repeated
        if title is None:
            text, claims = fill_template(rng, scene, TITLES, SLANG)
            text = rng.choice(BEFORE) + text + rng.choice(AFTER).format(k=rng.randint(2, 19))
            if text in seen:
                continue
            title = Title(text, claims)
        seen.add(title.text)
        written.append(title)
        yield scene, title


def fill_template(rng: random.Random, scene: Scene, templates: Sequence[str], slang: float) -> Title:
    """Fill a template that fits the scene; each word is the plain one, or with the chance `slang` any of its kind."""
    while True:
        template = rng.choice(templates)
        slots = re.findall(r"{(\w+)}", template.lower())
        lacks_size = "size" in slots and scene.size == "normal"
        lacks_rival = "rival" in slots and scene.rival is None
        if not lacks_size and not lacks_rival:
            break

    def say(words: tuple[str, ...]) -> str:
        return rng.choice(words) if rng.random() < slang else words[0]

    words = {"n": say(NUMBERS[scene.count]), "colour": say(COLOURS[scene.colour]), "thing": say(THINGS[scene.shape])}
    things = say(THINGS[scene.shape])
    if scene.count > 1 or "n" not in slots:
        things += "es" if things.endswith(("x", "sh")) else "s"
    words["things"] = things
    words["ground"] = say(COLOURS[scene.ground])
    words["size"] = say(SIZE_WORDS[scene.size])
    words["place"] = say(PLACE_WORDS[scene.place])
    if scene.rival:
        colour, shape = scene.rival
        words["rival"] = f"one {say(COLOURS[colour])} {say(THINGS[shape])}"
    text = template.format(**words, COLOUR=words["colour"].upper(), SIZE=words["size"].upper())
    return Title(text, {SLOTS[slot]: getattr(scene, SLOTS[slot]) for slot in slots})


def _negative(rng: random.Random, scene: Scene, titles: list[Title]) -> Title:
    """Return, of some other titles that are wrong about the scene, the one that is right about most."""
    drawn = rng.sample(titles, min(48, len(titles)))
    wrong = [title for title in drawn if not title.fits(scene)]
    return max(wrong, key=lambda title: title.shared(scene))


def write_split(folder: Path, split: str, rows: list[tuple[Scene, Title]], negatives: list[Title] | None) -> None:
    """Write `{split}.csv` and the drawn images of its rows."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "title", "title_neg"] if negatives else ["image", "title"])
        for number, (scene, title) in enumerate(rows):
            name = f"images/{split}-{number:05}.jpg"
            draw(scene).save(folder / name, quality=85)
            texts = [title.text, negatives[number].text] if negatives else [title.text]
            table.writerow([name, *texts])
