"""The losses against their definitions, sentence-transformers and torch; several ranks and chunks against one."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, gradient, on_ranks
from torch import Tensor, nn

from data.batch import Features, UserError, map_tensors, share
from data.store.feature_split import FeatureSplit
from engine import loss as losses
from engine.clip.model import Embeddings, distribute, l2_normalize
from engine.loss import Candidates, Objective
from engine.ranks.world import World
from engine.train import global_batch_loss
from eval.retrieval import measure_split

V, T, E = 7, 5, 4


def hinge(logits_RC: Tensor, target_RC: Tensor, ignored_RC: Tensor) -> Tensor:
    """A loss of somebody's own, as the README tells them to write it: each pair alone, right or wrong by a margin."""
    sign_RC = torch.where(target_RC > 0, 1.0, -1.0)
    return (1 - sign_RC * logits_RC).clamp(min=0).sum()


losses.LOSSES["hinge"] = hinge
KINDS = [Objective(kind, duplicates, hardness) for kind, duplicates, hardness in itertools.product(
             ("image-to-text", "symmetric", "sigmoid", "hinge"), ("mask", "multi", "keep"), (0.0, 5.0))
         if kind not in ("sigmoid", "hinge") or not hardness]


class TwoLinear(nn.Module):
    """A head as small as it gets, with a scale that trains and the same start on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(V, E, bias=False), nn.Linear(T, E, bias=False)
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, features: Features) -> Embeddings:
        texts = features.title_BT
        if features.negative_BHT is not None:
            texts = torch.cat([texts, *features.negative_BHT.unbind(1)])
        return Embeddings(l2_normalize(self.image(features.image_BV)), l2_normalize(self.text(texts)), self.scale)


def global_batch(rows: int, negatives: int) -> Features:
    """A third of the titles and a fifth of the images repeat; rows have up to `negatives` negatives, some of them the
    row's own title or another row's.

    Everything in float64, so that what differs between two ways to compute it is the way and not rounding.
    """
    generator = torch.Generator().manual_seed(2)
    image, title = (torch.randn(rows, width, generator=generator).double() for width in (V, T))
    title_id, image_id = torch.arange(rows), torch.arange(rows) + 50
    title_id[2::3], image_id[4::5] = title_id[0], image_id[1:2]
    if not negatives:
        return Features(image, title, None, image_id, title_id, None)
    negative = torch.randn(rows, negatives, T, generator=generator).double()
    negative_id = torch.arange(rows * negatives).unflatten(0, (rows, negatives)) + 100
    for place in range(negatives):  # ragged: another quarter of the rows lacks each of the first four
        negative_id[(place + 1) % 4::4, place] = -1
    negative_id[3::4, 0] = title_id[3::4]
    if rows > 2:
        negative_id[2, -1] = title_id[1]
    return Features(image, title, negative, image_id, title_id, negative_id)


def brute_force(objective: Objective, out: Embeddings, batch: Features) -> Tensor:
    """The definition, one pair after the other, by autograd."""
    rows = len(batch.title_id_B)

    def one_way(queries: Tensor, answers: list[tuple[Tensor, int, int]], hardness: float) -> Tensor:
        total = out.scale * 0
        for i in range(rows):
            logits, right = [], []
            for j, (embedding, title, image) in enumerate(answers):
                same = title == batch.title_id_B[i] or image == batch.image_id_B[i]
                if title < 0 or (objective.duplicates == "mask" and same and j != i):
                    continue
                right.append(j == i or bool(objective.duplicates == "multi" and same))
                cosine = queries[i] @ embedding
                logits.append(out.scale * cosine + (0 if right[-1] else hardness * cosine.detach()))
            if objective.loss == "sigmoid":
                total = total - sum(F.logsigmoid((logit - 10) * (1 if hit else -1))
                                    for logit, hit in zip(logits, right, strict=True))
                continue
            if objective.loss == "hinge":
                total = total + sum((1 - logit * (1 if hit else -1)).clamp(min=0)
                                    for logit, hit in zip(logits, right, strict=True))
                continue
            log_share = torch.stack(logits) - torch.stack(logits).logsumexp(0)
            wanted = torch.tensor(right).double() / sum(right)
            total = total - wanted @ log_share
        return total / rows

    titles = [(out.text_XE[j], int(batch.title_id_B[j]), int(batch.image_id_B[j])) for j in range(rows)]
    if batch.negative_id_BH is not None:
        for place in range(batch.negative_id_BH.shape[1]):
            for j in range(rows):
                titles.append((out.text_XE[(1 + place) * rows + j], int(batch.negative_id_BH[j, place]), -1))
    forward = one_way(out.image_BE, titles, objective.hardness)
    if objective.loss != "symmetric":
        return forward
    images = [(out.image_BE[j], int(batch.title_id_B[j]), int(batch.image_id_B[j])) for j in range(rows)]
    return (forward + one_way(out.text_XE[:rows], images, 0.0)) / 2


def one_step(objective: Objective, rows: int, negatives: int, naive: bool = False) -> list[Tensor]:
    """Loss and gradients of one global batch, on whatever ranks there are."""
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if size > 1 else 0
    world, batch = World(rank, rank, size, torch.device("cpu")), global_batch(rows, negatives)
    mine = slice(*share(rows, rank, size))
    inputs = map_tensors(batch, lambda part: part[mine])
    model = TwoLinear().double()
    wrapped = distribute(model, size)  # must outlive the backward pass
    out = wrapped(inputs)
    loss = brute_force(objective, out, batch) if naive else global_batch_loss(
        objective, world, out, inputs, rows)
    loss.backward(torch.tensor(size).double())  # as the loop does
    return [world.sum(loss.detach()), *(gradient(p).clone() for p in model.parameters())]


def every_step(cases: list[tuple[Any, ...]]) -> list[list[Tensor]]:
    return [one_step(*case) for case in cases]


CASES = [(objective, 11, negatives) for objective in KINDS for negatives in (3, 0)]
SINGLE = [(objective, 11, 1) for objective in KINDS]
UNEVEN = [(objective, rows, 2) for objective in (KINDS[0], KINDS[9]) for rows in (2, 4)]  # some ranks are empty


def assert_equal(ours: list[Tensor], theirs: list[Tensor], what: Any) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=EXACT, rtol=EXACT, msg=lambda text: f"{what}: {text}")


def test_equal_the_definition() -> None:
    for case in CASES + SINGLE:
        assert_equal(one_step(*case), one_step(*case, naive=True), case)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_add_up_to_one_process(ranks: int) -> None:
    cases = CASES[::2] + CASES[1::8] + UNEVEN
    for theirs in on_ranks(ranks, every_step, cases):
        for case, got in zip(cases, theirs, strict=True):
            assert_equal(got, one_step(*case), case)


def test_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [one_step(*case) for case in CASES]
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", 70)  # one row of 44 candidates, six of 11
    for case, expected in zip(CASES, whole, strict=True):
        assert_equal(one_step(*case), expected, case)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.hardness])  # its weight has no gradient
def test_gradient_is_the_slope(kind: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", 20)
    batch = global_batch(5, 2)
    assert batch.negative_id_BH is not None
    ids = (torch.cat([batch.title_id_B, *batch.negative_id_BH.unbind(1)]),
           torch.cat([batch.image_id_B, torch.full((10,), -1)]))

    def value(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        loss = kind.sum_over_rows(image, Candidates(text, *ids), scale, 0)
        if kind.loss == "symmetric":
            loss = loss + kind.sum_over_rows(text[:5], Candidates(image, batch.title_id_B, batch.image_id_B), scale, 0)
        return loss

    torch.manual_seed(3)
    inputs = torch.randn(5, E).double(), torch.randn(15, E).double(), torch.tensor(2.0).double()
    assert torch.autograd.gradcheck(value, tuple(part.requires_grad_() for part in inputs))


@pytest.mark.parametrize("max_logits", [1 << 20, 90])  # one chunk; two rows each
def test_half_precision_products_round_their_factors_and_nothing_else(max_logits: int,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit rounded to bf16 is off by .06 at 20, which would drown the loss of a well-trained model."""
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", max_logits)
    torch.manual_seed(7)
    query, candidate = (F.normalize(torch.randn(rows, 64), dim=-1).requires_grad_() for rows in (20, 40))
    ids = torch.arange(40) // 2
    titles, scale = Candidates(candidate, ids, ids), torch.tensor(16.0)  # a power of 2, which rounds nothing
    loss = Objective(hardness=1.0, product_dtype=torch.bfloat16).sum_over_rows(query, titles, scale, 0)
    loss.backward()

    rounded_query, rounded = (16 * query.detach()).bfloat16().float(), candidate.detach().bfloat16().float()
    logits = (rounded_query @ rounded.T).requires_grad_()
    target, ignored = Objective().targets(titles, 0, 20)
    harder = logits + (logits * (target == 0) / 16).detach()
    expected = losses.info_nce(harder.masked_fill(ignored, losses.IGNORED_LOGIT), target, ignored)
    (grad,) = torch.autograd.grad(expected, logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    half, noise = torch.finfo(torch.bfloat16).eps / 2, 1e-5
    for ours, wanted, most in ((gradient(query), 16 * grad @ rounded, 16 * grad.abs() @ rounded.abs()),
                               (gradient(candidate), grad.T @ rounded_query, grad.abs().T @ rounded_query.abs())):
        assert ours.dtype == torch.float32 and ((ours - wanted).abs() <= half * most + noise).all()


@pytest.mark.parametrize(("kind", "options"), [
    (Objective(duplicates="keep"), {}),
    (Objective("symmetric", "keep"), {"directions": ("query_to_doc", "doc_to_query"),
                                      "partition_mode": "per_direction"}),
    (Objective("image-to-text", "keep", 9.0), {"hardness_mode": "all_negatives", "hardness_strength": 9.0}),
    (Objective("symmetric", "keep", 5.0), {"directions": ("query_to_doc", "doc_to_query"),
                                           "partition_mode": "per_direction", "hardness_mode": "all_negatives",
                                           "hardness_strength": 5.0}),
])
@pytest.mark.parametrize("negatives", [0, 1, 2, 5])
def test_equal_sentence_transformers(kind: Objective, options: dict[str, Any], negatives: int) -> None:
    """Loss and gradients are those of its MultipleNegativesRankingLoss on columns anchor, positive, negative_1, …"""
    peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    theirs = peer.MultipleNegativesRankingLoss(nn.Identity(), **options)
    torch.manual_seed(4)
    image, *texts = (torch.randn(9, E).double().requires_grad_() for _ in range(2 + negatives))
    expected = theirs.compute_loss_from_embeddings([image, *texts], None)
    wanted = torch.autograd.grad(expected, [image, *texts])
    batch = Features(image, texts[0], None, torch.arange(9), torch.zeros(9).long(),
                     torch.arange(9 * negatives).unflatten(0, (9, negatives)) if negatives else None)
    world = World(0, 0, 1, torch.device("cpu"))
    out = Embeddings(F.normalize(image, dim=-1), F.normalize(torch.cat(texts), dim=-1), torch.tensor(20.0).double())
    found = global_batch_loss(kind, world, out, batch, 9)
    assert_equal([found, *torch.autograd.grad(found, [image, *texts])], [expected, *wanted], kind)


def test_what_becomes_of_repeats_does_not_matter_without_repeats() -> None:
    torch.manual_seed(6)
    image, text = F.normalize(torch.randn(6, E), dim=-1), F.normalize(torch.randn(12, E), dim=-1)
    titles = Candidates(text, torch.arange(12), torch.cat([torch.arange(6), torch.full((6,), -1)]))
    mask, multi, keep = (Objective(duplicates=how).sum_over_rows(image, titles, torch.tensor(20.0), 0).item()
                         for how in ("mask", "multi", "keep"))
    assert mask == multi == keep


def test_repeats_cost_nothing_when_masked() -> None:
    """Two rows with one title floor the reference's loss at ln 2; masked, a perfect model reaches 0."""
    image = text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([7, 7, 8])
    for how, floor in (("keep", 2 / 3 * math.log(2)), ("mask", 0.0), ("multi", 2 / 3 * math.log(2))):
        titles = Candidates(text, ids, torch.arange(3))
        loss = Objective(duplicates=how).sum_over_rows(image, titles, torch.tensor(100.0), 0)
        assert loss.item() / 3 == pytest.approx(floor, abs=1e-5)


def test_prompts_of_a_class_are_no_negatives_of_each_other_and_metrics_know_them_apart() -> None:
    """Else "a photo of a cat" is taught to be wrong where "a picture of a cat" is right, and no model reaches 0.

    Without classes rows 0 and 1 each see their own answer and three equal ones: a title and two negatives.
    """
    embeddings, rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.arange(3)
    negatives = torch.tensor([[1, 2], [0, -1], [0, 1]])
    apart = FeatureSplit(embeddings, embeddings, rows, rows, negatives)
    by_class = replace(apart, title_group_P=torch.tensor([0, 0, 2]))
    for split, floor in ((apart, 2 / 3 * math.log(4)), (by_class, 0.0)):
        batch = next(split.batches(3, 0).from_step(0))
        assert batch.negative_BHT is not None
        texts = torch.cat([batch.title_BT, *batch.negative_BHT.unbind(1)])
        out = Embeddings(batch.image_BV, texts, torch.tensor(100.0))
        loss = global_batch_loss(Objective(), World(0, 0, 1, torch.device("cpu")), out, batch, 3)
        assert loss.item() == pytest.approx(floor, abs=1e-5)
    measured = [measure_split(l2_normalize, l2_normalize, split.parts()).summarise() for split in (apart, by_class)]
    assert measured[0] == measured[1]


def test_a_trained_tensor_inside_a_loss_is_refused_in_chunks_and_not_left_untrained(
        monkeypatch: pytest.MonkeyPatch) -> None:
    margin = torch.tensor(0.1, requires_grad=True)
    monkeypatch.setitem(losses.LOSSES, "learned", lambda logits_RC, target_RC, ignored_RC: losses.info_nce(
        logits_RC - margin * target_RC, target_RC, ignored_RC))
    image, text, ids = torch.randn(4, E), torch.randn(4, E), torch.arange(4)
    arguments = image, Candidates(text, ids, ids), torch.tensor(20.0), 0
    Objective("learned").sum_over_rows(*arguments).backward()
    assert margin.grad is not None
    monkeypatch.setitem(losses.MAX_LOGITS, "cpu", 8)
    with pytest.raises(UserError, match="another trained tensor"):
        Objective("learned").sum_over_rows(*arguments)
