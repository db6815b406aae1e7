"""The same training, by sentence-transformers and by us: same start, rows and seed, same losses and weights."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import make_pairs, run, tiny_clip
from PIL import Image
from safetensors.torch import load_file

EPOCHS, ROWS = 2, 101  # batches of 16: the last one holds 5
TOLERANCE = {"same pixels": 1e-5, "own decoders": 1e-4}


class Theirs(NamedTuple):
    """What sentence-transformers' trainer did with its defaults: the loss of every step, the final projections."""

    losses: list[float]
    projections: dict[str, torch.Tensor]
    base: Path
    pairs: Path
    tolerance: float


@pytest.fixture(scope="module", params=list(TOLERANCE))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("accelerate")
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    base = tiny_clip(tmp_path_factory.mktemp("parity-model") / "base", sentence_transformers=True)
    model = sentence_transformers.SentenceTransformer(str(base), device="cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("projection" in name)
    triplets = make_pairs(tmp_path_factory.mktemp("parity") / "pairs", ROWS, 11, 12, duplicates=0.1)
    if request.param == "same pixels":  # neither side has anything left to resize
        for path in (triplets / "images").iterdir():
            with Image.open(path) as image:
                image.resize((32, 32)).save(path, format="png")
    with (triplets / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = Dataset.from_dict({
        "anchor": [str(triplets / row["image"]) for row in rows], "positive": [row["title"] for row in rows],
        "negative": [row["title_neg"] for row in rows],
    }).cast_column("anchor", ImageFeature())
    losses: list[float] = []

    class Recorded(MultipleNegativesRankingLoss):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().forward(*args, **kwargs)
            losses.append(loss.item())
            return loss

    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("theirs")), num_train_epochs=EPOCHS, per_device_train_batch_size=16,
        learning_rate=1e-4, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    sentence_transformers.SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=table, loss=Recorded(model)).train()
    state = {name.split(".model.")[-1]: value for name, value in model.state_dict().items() if "projection" in name}
    return Theirs(losses, state, base, triplets, TOLERANCE[request.param])


@pytest.mark.parametrize(("mode", "ranks"), [("cached", 1), ("streaming", 1), ("cached", 3), ("streaming", 2)])
def test_losses_and_weights_equal_theirs(mode: str, ranks: int, theirs: Theirs, tmp_path: Path) -> None:
    if ranks > 1 and theirs.tolerance > TOLERANCE["same pixels"]:
        pytest.skip("that ranks change nothing is held on the same pixels")
    out = tmp_path / "run"
    done = run(["--model", theirs.base, "--dataset", theirs.pairs, "--out", out, "--cache-dir", tmp_path / "cache",
                "--epochs", EPOCHS, "--precision", "fp32", "--mode", mode, "--duplicates", "keep"], ranks)
    assert done.returncode == 0, done.stderr
    ours = [json.loads(line)["loss"] for line in (out / "steps.jsonl").read_text().splitlines()]
    assert len(ours) == EPOCHS * 7
    assert ours == pytest.approx(theirs.losses, abs=theirs.tolerance, rel=0)
    tuned = load_file(out / "model" / "model.safetensors")
    for name, expected in theirs.projections.items():
        torch.testing.assert_close(tuned[name], expected, atol=1e-5, rtol=0)
