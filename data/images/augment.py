"""Random crops for `--augment`: a pure function of (seed, epoch, row)."""

from __future__ import annotations

import math

import numpy as np

SCALE = (0.9, 1.0)  # share of the area kept: open_clip's default (AugmentationCfg.scale)
RATIO = (3 / 4, 4 / 3)  # width : height, as torchvision's RandomResizedCrop
TRIES = 10

Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def random_region(seed: int, epoch: int, row: int, width: int, height: int) -> Region:
    """Return the crop of a `width` x `height` image for `row` in `epoch`; it is then resized to the model's side.

    RandomResizedCrop (Szegedy et al. 2014, arXiv 1409.4842, section 6) as torchvision draws it: an area and a log-even
    ratio, up to TRIES times until it fits, else the largest centred part whose ratio is within bounds. It depends on
    neither resuming nor the number of ranks.
    """
    rng = np.random.default_rng([seed, epoch, row])
    for _ in range(TRIES):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # None fitted, as in a very long image.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
