"""`--recipe auto`: what it may choose, and that it leaves a model alone where nothing is gained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import inside, make_pairs, run
from safetensors.torch import load_file

from data.batch import UserError
from data.sources.folds import folds
from data.store.feature_split import FeatureSplit
from engine.clip.model import ModelOptions, open_model
from engine.commands import auto
from engine.config.fields import Config
from engine.ranks.world import World
from engine.sweep.batched import PROJECTIONS, Projections
from engine.sweep.cca import cca_projections, trailing_subspace
from engine.sweep.choose import (
    BATCH,
    CANDIDATES,
    HELD_OUT,
    SCALE_GRID,
    STEPS,
    Candidate,
    Choice,
    HeldOutScores,
    candidate_weights,
    choose,
    held_out_embeddings,
    loss_scale,
    partner_losses,
    pick,
    repeats,
    run_settings,
    similarities,
    split_pairs,
    standard_error,
)
from engine.sweep.trials import Tuner

ALONE = World(0, 0, 1, torch.device("cpu"))
E, V, T = 16, 40, 24


def hidden_pairs(rows: int, noise: float, seed: int = 0) -> tuple[Projections, FeatureSplit]:
    """Pairs whose image and text features share 8 hidden numbers, and a random base that knows nothing of them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden_N8, image_8V, text_8T = normal(rows, 8), normal(8, V), normal(8, T)
    image_NV = hidden_N8 @ image_8V + noise * normal(rows, V) + 3
    text_NT = hidden_N8 @ text_8T + noise * normal(rows, T) - 2
    base = Projections(normal(E, V) * 0.05, normal(E, T) * 0.05)
    return base, FeatureSplit(image_NV, text_NT, torch.arange(rows), torch.arange(rows))


def mean_rank(weights: Projections, pairs: FeatureSplit) -> float:
    cosine_NN = similarities(weights, pairs)
    return float((cosine_NN >= cosine_NN.diagonal()[:, None]).sum(1).double().mean())


def test_what_can_be_learned_is_chosen_and_pays_on_new_pairs() -> None:
    base, pairs = hidden_pairs(120, 0.5)
    new = replace(pairs, image_row_N=torch.arange(80, 120), title_row_N=torch.arange(80, 120))
    known = replace(pairs, image_row_N=torch.arange(80), title_row_N=torch.arange(80))
    choice = choose(base, known, Config(), torch.float32, ALONE)
    assert choice.candidate.kind != "base"
    weights = candidate_weights(base, known, Config(), torch.float32, choice.candidate)
    assert mean_rank(weights, new) < 0.5 * mean_rank(base, new)


def test_pairs_that_mean_nothing_leave_the_base_as_it_is() -> None:
    """Tuning on noise would make every user's model worse."""
    base, pairs = hidden_pairs(100, 0.0)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    shuffled = replace(pairs, title_row_N=order)
    for seed in range(3):
        choice = choose(base, shuffled, replace(Config(), seed=seed), torch.float32, ALONE)
        assert choice.candidate == Candidate("base"), choice.curve
        assert choice.describe() == "left as it is: nothing was better by more than chance"


def test_of_all_as_good_as_the_best_the_nearest_to_the_base_is_taken() -> None:
    """The best of thirteen is partly luck; a smaller change that is as good up to chance forgets less."""
    rows, count = 64, len(CANDIDATES)
    generator = torch.Generator().manual_seed(0)
    noise_CH = 0.1 * torch.randn(count, rows, generator=generator)
    loss_CH = 2.0 + noise_CH - noise_CH.mean(1, keepdim=True)
    loss_CH[5:] -= 0.5
    loss_CH[9] -= 1e-3  # the best, by less than one standard error
    loss_CSH = loss_CH[:, None].expand(count, len(SCALE_GRID), rows).clone()
    loss_CSH[:, 3:] += 1  # the scale is each candidate's best one
    change_C = torch.arange(count).float()
    change_C[7] = 0.5  # nearest to the base among the good ones
    parts = [HeldOutScores(torch.arange(part, rows, 2), loss_CSH[:, :, part::2], change_C) for part in range(2)]
    choice = pick(parts, torch.arange(rows))
    assert choice.candidate == CANDIDATES[7] and choice.best == CANDIDATES[9]
    assert [line["candidate"] for line in choice.curve] == [candidate.describe() for candidate in CANDIDATES]
    assert choice.curve[7]["worse_than_best"] <= choice.curve[7]["standard_error"] < choice.curve[0]["worse_than_best"]


def test_rows_of_one_image_count_once_in_the_standard_error() -> None:
    value_CH = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = standard_error(value_CH, torch.arange(50))
    torch.testing.assert_close(plain, value_CH.std(1) / 50**0.5)
    five_times = standard_error(value_CH.repeat_interleave(5, 1), torch.arange(50).repeat_interleave(5))
    torch.testing.assert_close(five_times, plain)


def test_many_rows_of_few_images_are_no_proof() -> None:
    """Five captions an image would make chance look like a gain that is certain, and a strong model worse."""
    loss_CSH = torch.full((len(CANDIDATES), len(SCALE_GRID), 400), 2.0)
    gain_U = torch.tensor([-0.9, 1.2, -0.8, 1.1, -1.0, 1.3, -0.7, 0.8])  # of 8 images, 50 rows each
    loss_CSH[9] -= gain_U.repeat_interleave(50)
    parts = [HeldOutScores(torch.arange(400), loss_CSH, torch.arange(len(CANDIDATES)).float())]
    assert pick(parts, torch.arange(8).repeat_interleave(50)).candidate.kind == "base"
    assert pick(parts, torch.arange(400)).candidate == CANDIDATES[9]


def test_the_loss_is_the_likelihood_of_the_partner_without_repeats() -> None:
    base, pairs = hidden_pairs(12, 1.0)
    pairs = replace(pairs, image_row_N=torch.tensor([0, 0, *range(2, 12)]), title_row_N=torch.tensor([*range(11), 3]))
    cosine_NN, repeat_NN = similarities(base, pairs), repeats(pairs)
    assert repeat_NN.nonzero().tolist() == [[0, 1], [1, 0], [3, 11], [11, 3]]
    found_SN = partner_losses(cosine_NN, repeat_NN)
    for place, scale in enumerate(SCALE_GRID):
        for row in range(12):
            others = [column for column in range(12) if not repeat_NN[row, column]]
            own = others.index(row)
            want = sum(-(part[others] * scale).log_softmax(0)[own] for part in (cosine_NN[row], cosine_NN[:, row])) / 2
            torch.testing.assert_close(found_SN[place, row], want, atol=1e-4, rtol=1e-4)


def test_folds_by_size_and_large_data_bounded() -> None:
    def sizes(rows: int) -> list[tuple[int, int]]:
        pairs = FeatureSplit(torch.zeros(rows, 1), torch.zeros(rows, 1), torch.arange(rows), torch.arange(rows))
        return [(len(fold.train), len(fold.held)) for _, fold in split_pairs(pairs, 0)]

    assert sizes(150) == [(120, 30)] * 10 and sizes(250) == [(200, 50)] * 5 and sizes(3_000) == [(2_000, 1_000)] * 3
    ((train, held),) = sizes(100_000)
    assert train == BATCH * STEPS and held == HELD_OUT
    for rows in (53, 1_000, 81_920, 1_000_000):
        cfg = run_settings(Config(), 0.01, rows, 10.0)
        assert cfg.epochs * -(-rows // cfg.batch_size) <= STEPS and cfg.batch_size <= rows
    with pytest.raises(UserError, match="these 4 are too few"):
        sizes(4)


def test_canonical_directions_find_what_is_shared_and_keep_the_width() -> None:
    base, pairs = hidden_pairs(300, 0.5)
    new = replace(pairs, image_row_N=torch.arange(200, 300), title_row_N=torch.arange(200, 300))
    known = replace(pairs, image_row_N=torch.arange(200), title_row_N=torch.arange(200))
    weak, strong = (cca_projections(base, known, weight) for weight in (0.1, 0.75))
    assert [weight.shape for weight in strong] == [weight.shape for weight in base]
    assert mean_rank(strong, new) < mean_rank(weak, new) < mean_rank(base, new)
    for tuned, before in zip(strong, base, strict=True):
        torch.testing.assert_close(tuned.std(), before.std())
    nothing = cca_projections(base, known, 1e-6)  # without weight it is the base, turned
    torch.testing.assert_close(similarities(nothing, new), similarities(base, new), atol=0.02, rtol=0)


def test_a_fold_scores_what_would_be_exported() -> None:
    """Candidates are scored without making their weights; a difference would choose by another model's figures."""
    base, pairs = hidden_pairs(60, 1.0)
    fold = folds(pairs, 3, 0)[0]
    cfg = replace(Config(), seed=3)
    scored = held_out_embeddings(base, fold, cfg, torch.float32)
    for candidate, (image_HE, title_HE) in zip(CANDIDATES, scored, strict=True):
        weights = candidate_weights(base, fold.train, cfg, torch.float32, candidate)
        cosine_HH = torch.nn.functional.cosine_similarity(image_HE[:, None], title_HE[None], dim=-1)
        torch.testing.assert_close(cosine_HH, similarities(weights, fold.held), atol=1e-4, rtol=0)


def test_the_subspace_left_out_is_that_of_the_trailing_eigenvectors() -> None:
    root_FF = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment_FF = root_FF @ torch.diag(torch.logspace(1, -3, 20, dtype=torch.float64)) @ root_FF.T
    found_FE = trailing_subspace(moment_FF, 15)
    want_FE = torch.linalg.eigh(moment_FF)[1][:, :5]
    torch.testing.assert_close(found_FE @ found_FE.T, want_FE @ want_FE.T, atol=0.05, rtol=0)
    torch.testing.assert_close(found_FE.T @ found_FE, torch.eye(5, dtype=torch.float64))


FLAGS = ("--recipe", "auto", "--precision", "fp32")


@pytest.fixture(scope="module")
def auto_run(pairs: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("auto") / "run"
    done = inside([*FLAGS, "--model", tiny_model, "--dataset", pairs, "--out", out, "--cache-dir",
                   out.parent / "cache"])
    assert done.returncode == 0, done.stderr
    return out, done.stdout + done.stderr


def files(folder: Path) -> dict[str, Any]:
    return {"metrics": json.loads((folder / "metrics.json").read_text()),
            "weights": load_file(folder / "model" / "projections.safetensors")}


def test_a_run_says_and_keeps_what_was_tried_and_chosen(auto_run: tuple[Path, str]) -> None:
    out, said = auto_run
    metrics = files(out)["metrics"]
    choice = metrics["auto"]
    assert len(choice["held_out"]) == len(CANDIDATES) and set(metrics["tuned"]) == {"test"}
    for text in (said, (out / "model" / "README.md").read_text(), (out / "report.html").read_text()):
        assert choice["why"] in text and "canonical correlation, weight 0.75" in text
    assert 'recipe = "auto"' in (out / "model" / "README.md").read_text()
    assert "lr = 0.0001" not in (out / "model" / "README.md").read_text()  # the default, which nothing has used
    done = inside(["verify", "--run", out, "--cache-dir", out.parent / "cache"])
    assert done.returncode == 0 and "choice and weights  ok" in done.stdout, done.stdout


@pytest.mark.parametrize("candidate", [Candidate("run", 0.0375, 0.5), Candidate("cca", 0.0, 0.25)])
def test_what_is_chosen_is_what_is_exported(candidate: Candidate, auto_run: tuple[Path, str], pairs: Path,
                                            tiny_model: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    curve = files(auto_run[0])["metrics"]["auto"]["held_out"]
    monkeypatch.setattr(auto, "choose", lambda *_: Choice(candidate, curve, candidate))
    out, base = tmp_path / "run", files(auto_run[0])["weights"]
    cache = ["--cache-dir", auto_run[0].parent / "cache"]
    assert inside([*FLAGS, "--model", tiny_model, "--dataset", pairs, "--out", out, *cache]).returncode == 0
    found = files(out)
    steps = (out / "steps.jsonl").read_text().splitlines()
    assert len(steps) == (40 if candidate.kind == "run" else 0)  # 40 epochs of one batch, or a closed form
    assert all(not torch.equal(found["weights"][name], base[name]) for name in PROJECTIONS)
    assert ("settings" in found["metrics"]["auto"]) == (candidate.kind == "run")
    assert found["metrics"]["difference"]["test"]["image_to_text_mrr"]["value"] != 0
    done = inside(["verify", "--run", out, *cache])
    assert done.returncode == 0 and "choice and weights  ok" in done.stdout, done.stdout


def test_resuming_a_finished_run_changes_nothing_and_a_cut_one_begins_again(auto_run: tuple[Path, str]) -> None:
    """A scheduler that restarts its job would get another model."""
    out, _ = auto_run
    before = files(out)
    flags = ["--resume", "--out", out, "--cache-dir", out.parent / "cache"]
    done = inside(flags)
    assert done.returncode == 0 and "had ended" in done.stdout + done.stderr
    (out / "manifest.json").unlink()
    assert inside(flags).returncode == 0
    again = files(out)
    assert again["metrics"] == before["metrics"]
    assert all(torch.equal(again["weights"][name], before["weights"][name]) for name in PROJECTIONS)


def test_two_ranks_choose_and_train_alike(auto_run: tuple[Path, str], pairs: Path, tiny_model: Path,
                                          tmp_path: Path) -> None:
    out, _ = auto_run
    done = run([*FLAGS, "--model", tiny_model, "--dataset", pairs, "--out", tmp_path / "two", "--cache-dir",
                tmp_path / "cache"], ranks=2)
    assert done.returncode == 0, done.stderr
    one, two = files(out), files(tmp_path / "two")
    assert one["metrics"]["auto"]["chosen"] == two["metrics"]["auto"]["chosen"]
    for name in PROJECTIONS:
        torch.testing.assert_close(one["weights"][name], two["weights"][name], atol=1e-4, rtol=1e-3)


def test_the_chosen_settings_as_flags_give_the_same_run(tiny_model: Path) -> None:
    """The settings that the card names are those of the model."""
    model = open_model(str(tiny_model), ModelOptions(precision="fp32"), torch.device("cpu"))
    tuner = Tuner(model, FeatureSplit.batches)
    base = Projections(*(tuner.base[name] for name in PROJECTIONS))
    generator = torch.Generator().manual_seed(0)
    pairs = FeatureSplit(torch.randn(40, 32, generator=generator), torch.randn(40, 24, generator=generator),
                         torch.arange(40), torch.arange(40))
    candidate = Candidate("run", 0.0375, 0.5)
    weights = candidate_weights(base, pairs, Config(), torch.float32, candidate)
    cfg = replace(run_settings(Config(), 0.0375, 40, loss_scale(base, pairs)), interpolate="0.5")
    tuner.tune(cfg, pairs)
    for name, weight in zip(PROJECTIONS, weights, strict=True):
        torch.testing.assert_close(model.trainable[name].detach(), weight, atol=1e-4, rtol=1e-3)


def test_data_without_a_test_split_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 20, 6, 6)
    (pairs / "test.csv").unlink()
    done = inside([*FLAGS, "--model", tiny_model, "--dataset", pairs, "--out", tmp_path / "out", "--cache-dir",
                   tmp_path / "cache"])
    assert done.returncode == 2 and "--splits train=train,test=valid" in done.stderr
