"""Between base and tuned: the ends to the bit, and the best alpha, nearest to base of equal ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import last_flags
from safetensors.torch import load_file
from torch import nn

import run as command_line
from engine.sweep.interpolate import ALPHAS, blend, interpolate, snapshot


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


def test_auto_by_a_rank_takes_the_lowest() -> None:
    """Else `--interpolate auto --best-metric image_to_text_median_rank` exports the worst of all mixtures."""
    ranks = iter(range(len(ALPHAS), 0, -1))
    found = interpolate(layers(1), snapshot(layers(0)), "auto", lambda: {"valid": {"median_rank": float(next(ranks))}},
                        "median_rank")
    assert found["alpha"] == 1.0


def test_of_equal_ones_the_nearest_to_base() -> None:
    now = layers(1)
    assert interpolate(now, snapshot(layers(0)), "auto", lambda: {"valid": {"mrr": 0.5}}, "mrr")["alpha"] == 0


def train(pairs: Path, model: Path, out: Path, *flags: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train in this process; metrics.json and the exported projections."""
    flags = tuple(last_flags(["--model", model, "--dataset", pairs, "--out", out, "--cache-dir", out.parent / "cache",
                              "--precision", "fp32", "--lr", "1e-2", *flags]))
    assert command_line.main(flags) == 0
    return json.loads((out / "metrics.json").read_text()), load_file(out / "model" / "projections.safetensors")


def test_a_run_exports_what_it_measures_between_base_and_tuned(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Pairs of another kind ride along, only measured; here they are the same ones, so they must measure the same."""
    base = load_file(tiny_model / "model.safetensors")
    plain, tuned = train(pairs, tiny_model, tmp_path / "plain")
    assert set(plain) == {"base", "tuned", "difference"}
    flags = {alpha: ("--interpolate", alpha, "--probe", str(pairs)) for alpha in ("0", "0.25", "1", "auto")}
    found = {alpha: train(pairs, tiny_model, tmp_path / alpha, *flags[alpha]) for alpha in flags}
    for alpha, (metrics, weights) in found.items():
        taken = metrics["interpolation"]["alpha"]
        assert taken == float(alpha) if alpha != "auto" else metrics["interpolation"]["chosen_on"] == "valid"
        assert all(torch.equal(weights[name], torch.lerp(base[name], tuned[name], taken)) for name in tuned)
        for when in ("base", "tuned", "difference"):
            assert metrics[when]["probe"] == metrics[when]["test"]
        at = {point["alpha"]: point for point in metrics["interpolation"]["curve"]}
        assert at[taken]["valid"]["image_to_text_mrr"] == metrics["tuned"]["valid"]["image_to_text_mrr"]
        assert at[1]["valid"]["image_to_text_mrr"] == plain["tuned"]["valid"]["image_to_text_mrr"]
    assert found["1"][0]["tuned"]["test"] == plain["tuned"]["test"]
    assert found["0"][0]["tuned"] == found["0"][0]["base"]
    for test in found["0"][0]["difference"]["test"].values():
        assert test["value"] == 0 and test["p"] == 1 and test["ci95"][0] < 0 < test["ci95"][1]
    for split, tests in plain["difference"].items():
        for name, test in tests.items():
            assert test["value"] == pytest.approx(plain["tuned"][split][name] - plain["base"][split][name])
    ledger = [json.loads(line) for line in (tmp_path / "auto" / "ledger.jsonl").read_text().splitlines()]
    assert not ledger


def test_the_paired_test_of_a_resumed_run_is_that_of_an_uninterrupted_one(pairs: Path, tiny_model: Path,
                                                                          tmp_path: Path) -> None:
    flags = "--save-every", "2", "--interpolate", "0.5", "--keep", "9"
    whole, weights = train(pairs, tiny_model, tmp_path / "whole", *flags)
    for last in (4, 6):  # in the middle, and at the end with what comes after the loop cut off
        cut = tmp_path / f"cut-{last}"
        shutil.copytree(tmp_path / "whole", cut, symlinks=True)
        shutil.rmtree(cut / "model")
        for checkpoint in (cut / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > last:
                shutil.rmtree(checkpoint)
        (cut / "metrics.json").write_text(json.dumps({"base": whole["base"]}))
        assert command_line.main(["--resume", "--out", str(cut)]) == 0
        assert json.loads((cut / "metrics.json").read_text()) == whole
        again = load_file(cut / "model" / "projections.safetensors")
        assert all(torch.equal(again[name], weights[name]) for name in weights)
