"""Generated pairs: scenes whose titles and pictures say the same, as a dataset folder and as the hub's dataset."""

from __future__ import annotations

import colorsys
import csv
import io
import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from data.web.storage import Entry

COLOURS = {"red": (220, 40, 40), "orange": (245, 140, 20), "yellow": (250, 225, 40), "green": (40, 160, 60),
           "teal": (20, 150, 150), "blue": (40, 80, 220), "purple": (130, 50, 180), "pink": (250, 140, 190),
           "white": (250, 250, 250), "black": (15, 15, 15)}
SHAPES = {"circles": (), "squares": ((0, 0), (1, 0), (1, 1), (0, 1)), "triangles": ((0, 1), (1, 1), (.5, 0)),
          "bars": ((0, 0), (1, 0), (1, .25), (0, .25))}  # corners; a circle has none
COUNTS = ("1", "2", "3", "4", "5", "6")
ENDINGS = ("Explained", "that Changed my Life", "you Should Know", "in 10 Minutes", "for Beginners", "I Regret",
           "nobody Talks About", "from Scratch", "vs the World", "at 3 AM", "on a Budget", "I'd Buy Again",
           "(with Code)", "every Day for a Year", "and What Happened Next", "before you Quit", "in the Wild",
           "like a Pro", "the Honest Review", "worth it?", "in Slow Motion", "for Free", "under Water", "ranked")
SCENES = len(COUNTS) * len(COLOURS) * len(SHAPES) * len(ENDINGS)  # 5,760, each with a title and look of its own


def _parts(scene: int) -> tuple[int, int, int, int]:
    """A scene number's digits: count, colour, shape, ending."""
    scene, count = divmod(scene % SCENES, len(COUNTS))
    scene, colour = divmod(scene, len(COLOURS))
    ending, shape = divmod(scene, len(SHAPES))
    return count, colour, shape, ending


def scene_title(scene: int) -> str:
    """The title of a scene, e.g. `3 red circles for Beginners`; two scenes never share one."""
    count, colour, shape, ending = _parts(scene)
    return f"{COUNTS[count]} {list(COLOURS)[colour]} {list(SHAPES)[shape]} {ENDINGS[ending]}"


def scene_negative(scene: int) -> str:
    """A hard negative: the same title with another colour."""
    colour = _parts(scene)[1]
    return scene_title(scene + len(COUNTS) * ((colour + 3) % len(COLOURS) - colour))


def scene_picture(scene: int, size: tuple[int, int] = (96, 64), take: int = 0) -> Image.Image:
    """An RGB picture that shows what the title says (the ending is the backdrop); `take_rows` moves the shapes."""
    count, colour, shape, ending = _parts(scene)
    backdrop = tuple(int(255 * part) for part in colorsys.hsv_to_rgb(ending / len(ENDINGS), 0.35, 0.75))
    image, rng = Image.new("RGB", size, backdrop), random.Random(f"{scene}/{take}")
    draw, side = ImageDraw.Draw(image), min(size) // 3
    corners, fill = list(SHAPES.values())[shape], list(COLOURS.values())[colour]
    for place in rng.sample(range(6), count + 1):
        x = size[0] * (place % 3) // 3 + rng.randrange(max(1, size[0] // 3 - side))
        y = size[1] * (place // 3) // 2 + rng.randrange(max(1, size[1] // 2 - side))
        if corners:
            draw.polygon([(x + side * right, y + side * down) for right, down in corners], fill)
        else:
            draw.ellipse((x, y, x + side, y + side), fill)
    return image


@lru_cache(maxsize=1024)
def scene_thumbnail(scene: int) -> bytes:
    """A JPEG of 480x360, the scene in 16:9 between black bars, as YouTube's hqdefault.jpg is."""
    frame, file = Image.new("RGB", (480, 360)), io.BytesIO()
    frame.paste(scene_picture(scene, (480, 270)), (0, 45))
    frame.save(file, "JPEG", quality=85)
    return file.getvalue()


def _negative(scenes: list[int], row: int) -> str:
    """Every fifth negative is the title of the row before: in the original, too, 20 % are the title of another row."""
    other = scenes[row - 1]
    return scene_title(other) if row % 5 == 4 and other != scenes[row] else scene_negative(scenes[row])


def make_pairs(folder: Path, n_train: int, n_valid: int, n_test: int, seed: int = 0,
               negatives: bool = True, duplicates: float = 0.0) -> Path:
    """Write `{train,valid,test}.csv` (image, title[, title_neg]) and their JPEGs under `images/`; return `folder`.

    Titles are distinct over all splits, but for the share `duplicates` (< 1) of a split's rows, which repeat the title
    of another row of it with a picture of their own.
    """
    rng = random.Random(seed)
    scenes = iter(rng.sample(range(SCENES), n_train + n_valid + n_test))
    (folder / "images").mkdir(parents=True)
    for split, rows in {"train": n_train, "valid": n_valid, "test": n_test}.items():
        drawn = [next(scenes) for _ in range(rows)]
        repeats = set(rng.sample(range(rows), int(duplicates * rows)))
        originals = [scene for row, scene in enumerate(drawn) if row not in repeats]
        drawn = [rng.choice(originals) if row in repeats else scene for row, scene in enumerate(drawn)]
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "title", "title_neg"] if negatives else ["image", "title"])
            for row, scene in enumerate(drawn):
                name = f"images/{split}-{row:04d}.jpg"
                scene_picture(scene, take=row).save(folder / name, quality=90)
                writer.writerow([name, scene_title(scene), _negative(drawn, row)][: 3 if negatives else 2])
    return folder


def jpeg(scene: int, take: int = 0) -> bytes:
    """A scene's picture as a file."""
    out = io.BytesIO()
    scene_picture(scene, take=take).save(out, "JPEG")
    return out.getvalue()


def wds_shards(folder: Path, split: str, samples: int, per_shard: int, negatives: bool = True) -> list[str]:
    """Write SPLIT-*.tar by webdataset's own writer; return their paths."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number in range(samples):
            sample = {"__key__": f"{split}{number:05d}", "jpg": jpeg(number), "txt": f"{number} {scene_title(number)}"}
            writer.write({**sample, "json": {"title_neg": scene_title(number + 1)}} if negatives else sample)
    return sorted(map(str, folder.glob(f"{split}-*.tar")))


def entries(shards: Sequence[str]) -> list[Entry]:
    """Local shards as a stream takes them."""
    return [Entry(shard, os.path.getsize(shard), "") for shard in shards]


def youtube_pairs(folder: Path, base_url: str, n: tuple[int, int, int] = (53, 11, 12)) -> Path:
    """Write the repository shawhin/yt-title-thumbnail-pairs with generated rows, thumbnails on `base_url`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    splits, first, bytes_in = dict(zip(("train", "valid", "test"), n, strict=True)), 0, {}
    for split, rows in splits.items():
        scenes = [(first + row) * 1013 % SCENES for row in range(rows)]  # 1013 shares no factor with SCENES
        first += rows
        ids = [f"v{scene:010d}" for scene in scenes]
        table = pa.table({
            "video_id": ids, "title": [scene_title(scene) for scene in scenes],
            "thumbnail_url": [f"{base_url}/thumbs/{id}.jpg" for id in ids],
            "title_neg": [_negative(scenes, row) for row in range(rows)],
        })
        pq.write_table(table, folder / f"data/{split}-00000-of-00001.parquet")
        bytes_in[split] = table.nbytes
    features = "".join(f"  - name: {name}\n    dtype: string\n"
                       for name in ("video_id", "title", "thumbnail_url", "title_neg"))
    counts = "".join(f"  - name: {split}\n    num_bytes: {bytes_in[split]}\n    num_examples: {rows}\n"
                     for split, rows in splits.items())
    paths = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(
        f"---\ndataset_info:\n  features:\n{features}  splits:\n{counts}configs:\n- config_name: default\n"
        f"  data_files:\n{paths}---\n", encoding="utf-8")
    return folder
