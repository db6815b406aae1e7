"""The choice between sharing the rows of a step among ranks, and computing the whole step on each without any traffic.

Dimension key: G rows of all ranks, H hard negatives of a row, K = 1 + H texts of a row, V/T image/text feature width,
E embedding.
"""

from __future__ import annotations

import torch

from data.store.feature_split import FeatureSplit
from engine.ranks.world import World

# A step of more floating point operations is shared. For GPUs this is a prediction, to be measured: a shared step of
# cached features takes about 1.5 ms for its launches and three collectives, whatever its size, and a whole step that is
# replayed as a CUDA graph .3 ms. The 1.2 ms between them are 2.5e11 operations at 200 TFLOP/s (an H100's
# TF32 and bf16, well below their peak): about 7,000 rows of ViT-L/14.
# Measured on CPUs, two ranks over gloo on one machine, CPU time a step, shared / whole, with ViT-B/32's widths:
# .06 GFLOP 9.8 / 4.9 ms, .26 GFLOP 10.7 / 7.1 ms, .57 GFLOP 10.7 / 11.5 ms; with ViT-L/14's: .13 GFLOP 11.0 / 6.2 ms,
# .54 GFLOP 13.7 / 11.3 ms, 1.2 GFLOP 20.3 / 18.9 ms.
MAX_REPLICATED_FLOP = {"cpu": 5e8, "cuda": 2.5e11}


def flop_of_step(pairs: FeatureSplit, rows: int, embedding: int, symmetric: bool) -> float:
    """Return the multiplications and additions of a step's matrix products over a global batch of `rows`.

    Projections: 2 G E (V + K T) forward and the same for the gradient of the weights, as features have none. Logits:
    2 G (K G) E forward, twice that backward; the symmetric loss has G x G more.
    """
    image_width, text_width = pairs.widths
    texts = 1 if pairs.negative_row_NH is None else 1 + pairs.negative_row_NH.shape[1]
    projections = 4 * rows * embedding * (image_width + texts * text_width)
    return projections + 6.0 * rows * rows * (texts + symmetric) * embedding


def world_of_steps(world: World, pairs: FeatureSplit, rows: int, embedding: int, symmetric: bool) -> World:
    """Return the world whose ranks share each step of `rows` rows: all of them, or this rank alone.

    A rank that is alone computes the whole step, as every other rank does: same data, order and arithmetic, so same
    weights to the bit. That needs ranks with equal processors, and features on the device that computes: looking all
    rows up on the host would cost more than the collectives. Prints which it is.
    """
    if world.size == 1:
        return world
    flop, limit = flop_of_step(pairs, rows, embedding, symmetric), MAX_REPLICATED_FLOP.get(world.device.type, 0.0)
    size = f"{flop / 1e9:,.3g} GFLOP a step"
    if flop > limit:
        reason = f"{size}, more than {limit / 1e9:,.3g}"
    elif pairs.image_row_N.device.type != world.device.type:
        reason = "the features lie on the host"
    elif len(set(world.exchange(_processor(world.device)))) > 1:
        reason = "they have unlike processors or numbers of threads"
    else:
        world.say(f"steps: each of the {world.size} ranks computes the whole batch ({size}; up to {limit / 1e9:,.3g} "
                  "cost less than collectives)")
        return world.alone()
    world.say(f"steps: the {world.size} ranks share each batch ({reason})")
    return world


def _processor(device: torch.device) -> str:
    """Return a text that is equal where the same operations give the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
