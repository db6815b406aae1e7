"""The head's unit length against F.normalize; micro-batches against the whole batch at once."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, gradient, in_float64, on_ranks
from torch import Tensor

from data.batch import Batch, Tokens, UserError, share
from engine.clip.model import ModelOptions, distribute, l2_normalize, open_model
from engine.loss import Objective
from engine.ranks.world import World
from engine.train import global_batch_loss


def test_unit_length_equals_normalize() -> None:
    torch.manual_seed(0)
    rows, slope = torch.randn(3, 5).double().requires_grad_(), torch.randn(3, 5).double()
    assert torch.autograd.gradcheck(l2_normalize, (rows,))
    for ours, theirs in zip(torch.autograd.grad(l2_normalize(rows), rows, slope),
                            torch.autograd.grad(F.normalize(rows, dim=-1), rows, slope), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert l2_normalize(torch.zeros(1, 4)).equal(torch.zeros(1, 4))


def stream_step(folder: str, micro_batch: int, rows: int, negatives: int) -> tuple[Tensor, list[Tensor], int]:
    """Loss and gradients of one step through the towers in float64, and the bytes that forward kept for backward."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    world = World(rank, rank, size, torch.device("cpu"))
    parts = open_model(folder, ModelOptions(("all", "logit_scale"), "streaming", precision="fp32"), world.device)
    generator, at = torch.Generator().manual_seed(1), torch.arange(rows)
    ids_BL = torch.randint(0, 500, (rows, 9), generator=generator)
    tokens = Tokens(ids_BL, torch.ones_like(ids_BL))
    batch = Batch(torch.randint(0, 256, (rows, 3, 32, 32), generator=generator).byte(), tokens,
                  None, at, at, None)
    if negatives:  # each with words of its own
        words_XL = torch.randint(0, 500, (negatives * rows, 7), generator=generator)
        ids_BH = torch.arange(rows, rows + negatives * rows).unflatten(0, (negatives, rows)).T
        batch = batch._replace(negative=Tokens(words_XL, torch.ones_like(words_XL)), negative_id_BH=ids_BH)
    inputs, kept = batch.take(slice(*share(rows, rank, size))), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes * (not isinstance(tensor, torch.nn.Parameter))
        return tensor

    with in_float64():
        model = distribute(parts.trained_model(micro_batch).double(), size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = global_batch_loss(Objective("symmetric"), world, model(inputs), inputs, rows)
        loss.backward(torch.tensor(size).double())
    return world.sum(loss.detach()), [gradient(p).clone() for p in parts.trainable.values()], kept


@pytest.mark.parametrize(("rows", "negatives", "ranks"), [(7, 1, 1), (7, 0, 1), (7, 3, 1), (7, 3, 2), (1, 2, 2)])
def test_micro_batches_equal_the_whole_batch(rows: int, negatives: int, ranks: int, tiny_model: Path) -> None:
    loss, gradients, kept = stream_step(str(tiny_model), 0, rows, negatives)
    arguments = str(tiny_model), 2, rows, negatives
    for ours, theirs, least in [stream_step(*arguments)] if ranks == 1 else on_ranks(ranks, stream_step, *arguments):
        for one, other in zip([ours, *theirs], [loss, *gradients], strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, atol=EXACT, rtol=EXACT)
        assert least < kept / 10


def test_micro_batches_of_cached_features_are_refused(tiny_model: Path) -> None:
    parts = open_model(str(tiny_model), ModelOptions(precision="fp32"), torch.device("cpu"))
    with pytest.raises(UserError, match="--mode streaming"):
        parts.trained_model(2)
