"""Mined negatives against the rule written out naively."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import mine as module
from data.catalogue import Split
from data.mine import mine


def make_split(rows: int, given: bool) -> tuple[Split, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    features_PT = torch.randn(40, 6, generator=generator)  # of all splits: this one uses 5 .. 24
    title_N = torch.randint(5, 25, (rows,), generator=generator)  # with repeats
    negative_N = torch.where(torch.arange(rows) % 3 == 0, 30, -1) if given else None
    return Split("train", np.arange(rows), torch.arange(rows), title_N, negative_N), features_PT


@pytest.mark.parametrize("how", ["hard", "far"])
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_rule_written_out(how: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    split, features_PT = make_split(50, given)
    mined = mine(split, features_PT, how).negative_N
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
        expected = 30 if given and row % 3 == 0 else pick
        assert mined[row] == expected
        assert mined[row] != title


def test_one_title_has_no_negative() -> None:
    split = Split("train", np.arange(3), torch.arange(3), torch.tensor([2, 2, 2]), None)
    assert mine(split, torch.randn(4, 5), "hard").negative_N is None
