"""Mined negatives against the rule written out naively."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import noting

from data import mine as module
from data.batch import Team
from data.catalogue import Split
from data.mine import mine_negatives


def make_split(rows: int, given: bool) -> tuple[Split, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    features_PT = torch.randn(40, 6, generator=generator)  # of all splits: this one uses 5 .. 24
    title_N = torch.randint(5, 25, (rows,), generator=generator)  # with repeats
    negative_NH = None
    if given:  # every third row has one in the first place, every fifth one in the second place
        row_N = torch.arange(rows)
        negative_NH = torch.stack([torch.where(row_N % 3 == 0, 30, -1), torch.where(row_N % 5 == 0, 31, -1)], 1)
    return Split("train", np.arange(rows), torch.arange(rows), title_N, negative_NH), features_PT


@pytest.mark.parametrize("how", ["hard", "far"])
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_rule_written_out(how: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.MAX_SIMILARITIES, "cpu", 7 * 20)  # rows of 20 titles
    split, features_PT = make_split(50, given)
    mined = mine_negatives(split, features_PT, how).negative_N
    assert mined is not None
    own = sorted(set(split.title_N.tolist()))
    unit = F.normalize(features_PT, dim=-1)
    taken: set[int] = set()
    for row, title in enumerate(split.title_N.tolist()):
        others = [t for t in own if t != title]
        if how == "far":
            free = [t for t in others if t not in taken]
            if not free:
                taken, free = set(), others
            pick = min(free, key=lambda t: float(unit[t] @ unit[title]))
            taken.add(pick)
        else:
            pick = max(others, key=lambda t: float(unit[t] @ unit[title]))
        if given and (row % 3 == 0 or row % 5 == 0):
            assert split.negative_N is not None and mined[row].equal(split.negative_N[row])
        else:
            assert mined[row].tolist() == ([pick, -1] if given else [pick])
        assert pick != title


def test_one_title_has_no_negative() -> None:
    split = Split("train", np.arange(3), torch.arange(3), torch.tensor([2, 2, 2]), None)
    assert mine_negatives(split, torch.randn(4, 5), "hard").negative_N is None


@pytest.mark.parametrize("how", ["hard", "far"])
def test_no_title_of_the_rows_own_image_is_mined(how: str) -> None:
    """Five captions of one picture are five right answers: mined, they would teach that they are wrong ones."""
    generator = torch.Generator().manual_seed(0)
    features_PT = torch.randn(60, 4, generator=generator)
    image_N, title_N = (torch.randint(high, (200,), generator=generator) for high in (25, 60))
    given_N = torch.where(torch.arange(200) % 4 == 0, title_N, -1)  # reads like the row's own title: no negative
    split = Split("train", np.arange(200), image_N, title_N, given_N[:, None])
    other = Split("test", np.arange(60), torch.arange(60) % 25, torch.arange(60), None)
    right = {pair for some in (split, other) for pair in zip(some.image_N.tolist(), some.title_N.tolist(), strict=True)}
    mined = mine_negatives(split, features_PT, how, [other]).negative_N
    assert mined is not None and bool((mined >= 0).all())
    assert not [row for row in range(200) if (int(image_N[row]), int(mined[row])) in right]
    few = Split("train", np.arange(4), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]), None)
    mined = mine_negatives(few, features_PT, how).negative_N
    assert mined is not None and mined[:3].tolist() == [[-1]] * 3  # all there is goes with image 0


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_mine_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run's data would depend on the number of GPUs; ranks are threads that meet in their exchange."""
    monkeypatch.setitem(module.MAX_SIMILARITIES, "cpu", 7 * 20)
    split, features_PT = make_split(50, True)
    computed: list[int] = []
    monkeypatch.setattr(module._TitlesOfImages, "mask", noting(
        module._TitlesOfImages.mask, lambda self, image_R: computed.append(len(image_R))))
    for how, work in (("hard", 50), ("far", 50 * size)):
        alone = mine_negatives(split, features_PT, how).negative_N
        values: dict[int, object] = {}
        meet = threading.Barrier(size)

        def exchange(rank: int, value: object, values: dict = values, meet: threading.Barrier = meet) -> list:
            values[rank] = value
            meet.wait(60)
            return [values[other] for other in range(size)]

        def mine(rank: int, how: str = how) -> Split:
            return mine_negatives(split, features_PT, how, team=Team(rank, size, partial(exchange, rank)))

        computed.clear()
        with ThreadPoolExecutor(size) as pool:
            for mined in pool.map(mine, range(size)):
                assert alone is not None and mined.negative_N is not None and mined.negative_N.equal(alone)
        assert sum(computed) == work
