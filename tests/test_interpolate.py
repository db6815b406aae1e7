"""Between base and tuned: the ends to the bit, and the best alpha, nearest to base of equal ones."""

import pytest
import torch
from torch import nn

from engine.interpolate import ALPHAS, blend, interpolate, snapshot


def layers(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(7, 5, generator=generator) * 10**power)
            for name, power in (("small", -9), ("large", 9))}


def test_the_ends_are_base_and_tuned_to_the_bit_and_the_middle_is_between() -> None:
    base, tuned, now = snapshot(layers(0)), snapshot(layers(1)), layers(2)
    for alpha, want in ((0.0, base), (1.0, tuned)):
        blend(now, base, tuned, alpha)
        assert all(torch.equal(now[name], want[name]) for name in want)
    blend(now, base, tuned, 0.25)
    for name in now:
        torch.testing.assert_close(now[name].detach(), 0.75 * base[name] + 0.25 * tuned[name])


@pytest.mark.parametrize(("wanted", "peak", "alpha"), [("auto", 0.3, 0.3), ("auto", 0.0, 0.0), ("auto", 1.0, 1.0),
                                                       ("0.55", 0.3, 0.55), ("1", 0.3, 1.0)])
def test_auto_takes_the_best_and_a_number_is_taken_as_it_is(wanted: str, peak: float, alpha: float) -> None:
    base, now = snapshot(layers(0)), layers(1)
    tuned = snapshot(now)

    def score() -> dict[str, dict[str, float]]:
        at = ((now["large"] - base["large"]) / (tuned["large"] - base["large"])).mean().item()
        return {"valid": {"mrr": -round(abs(at - peak), 3)}, "probe": {"mrr": at}}

    found = interpolate(now, base, wanted, score, "mrr")
    assert found["alpha"] == alpha and found["chosen_on"] == ("valid" if wanted == "auto" else None)
    assert [point["alpha"] for point in found["curve"]] == sorted({*ALPHAS, alpha})
    want = {name: torch.lerp(base[name], tuned[name], alpha) for name in base}
    assert all(torch.equal(now[name], want[name]) for name in want)


def test_of_equal_ones_the_nearest_to_base() -> None:
    now = layers(1)
    assert interpolate(now, snapshot(layers(0)), "auto", lambda: {"valid": {"mrr": 0.5}}, "mrr")["alpha"] == 0
