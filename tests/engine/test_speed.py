"""What makes things fast changes nothing: frozen towers in pieces, crops, recomputed layers, ranks shared by ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXACT, ROOT, gradient, in_float64, inside, make_pairs, noting, on_ranks, run
from torch import Tensor

from data.batch import Tokens, UserError
from data.images.augment import RATIO, SCALE, random_region
from engine.clip import encoder as module
from engine.clip.encoder import BatchedEncoder
from engine.clip.model import ModelOptions, open_model
from engine.ranks.world import World
from eval.distinct import Distinct
from eval.metrics import retrieval_ranks

CPU = torch.device("cpu")
# Libraries that take .1 to 2 s of CPU time to import and that a run with everything in its store has no use for.
UNUSED = ["transformers", "scipy", "pandas", "sympy", "datasets", "aiohttp", "sklearn", "matplotlib", "torchvision",
          "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp",
          "torch.fx.experimental.symbolic_shapes", "pyarrow.dataset", "pyarrow.parquet", "sentence_transformers"]
WARM_RUN = """
import sys
import run
assert run.main({train!r}) == 0 and run.main({evaluate!r}) == 0
print("IMPORTED", [name for name in {unused!r} if name in sys.modules])
import pandas, pyarrow
frame = pandas.DataFrame({{"title": ["a", None], "score": [1.0, float("nan")]}})
print("NULLS", [column.null_count for column in pyarrow.Table.from_pandas(frame).columns], pyarrow.array(frame.score))
"""


def test_pieces_of_a_batch_give_the_whole(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_BATCH", 4)
    towers = open_model(str(tiny_model), ModelOptions(precision="fp32"), CPU).towers.double()
    pixels = torch.randint(256, (11, 3, 32, 32), dtype=torch.uint8)
    tokens = Tokens(torch.randint(200, (11, 9)), torch.ones(11, 9, dtype=torch.int64))
    cases: list[tuple[Any, Any]] = [(towers.image, pixels), (towers.text, tokens)]
    for encode, inputs in cases:
        with in_float64():
            pieces, whole = BatchedEncoder(encode, CPU, torch.float32)(inputs), encode(inputs)
        assert whole.dtype == torch.float64
        torch.testing.assert_close(pieces, whole, atol=EXACT, rtol=EXACT)
    assert len(BatchedEncoder(towers.image, CPU, torch.float32)(pixels[:0])) == 0


def test_a_full_device_halves_the_batch_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def encode(rows: Tensor) -> Tensor:
        tried.append(len(rows))
        if len(rows) > 5:
            raise torch.OutOfMemoryError
        return rows * 2.0

    monkeypatch.setattr(module, "CPU_BATCH", 32)
    tower = BatchedEncoder(encode, CPU, torch.float32)
    rows = torch.arange(40)
    assert tower(rows).equal(rows * 2.0) and tower.batch == 4 and tried[:4] == [32, 16, 8, 4]
    assert tower(rows).equal(rows * 2.0) and max(tried[-10:]) == 4
    with pytest.raises(UserError, match="no room for one input"):
        BatchedEncoder(lambda rows: encode(torch.zeros(6)), CPU, torch.float32)(rows)


def test_compiled_lots_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    heights = set[int]()

    def compiled(encode: Any, dynamic: bool) -> Any:
        return noting(encode, lambda pixels: heights.add(len(pixels)))

    monkeypatch.setattr(torch, "compile", compiled)
    frozen = BatchedEncoder(lambda pixels: pixels.double(), CPU, torch.float32, "on")
    frozen.batch = 512
    for count in (64, 3, 61, 512, 70):
        assert frozen(torch.arange(count)[:, None]).flatten().tolist() == list(range(count))
    assert heights == {64, 128, 512}  # of the cold pass's lots one; not 512, eight times the work


def test_the_activation_is_that_of_transformers_to_the_bit() -> None:
    x = torch.randn(3, 50, 64) * 4
    expected = x * torch.sigmoid(1.702 * x)
    assert module.QuickGelu()(x.clone().requires_grad_()).equal(expected)
    with torch.no_grad():
        assert module.QuickGelu()(x.clone()).equal(expected)


def test_crops_are_as_drawn_and_a_pure_function_of_seed_epoch_and_row() -> None:
    seen = {random_region(7, epoch, row, 480, 360) for epoch in range(3) for row in range(200)}
    assert len(seen) > 300 and random_region(7, 2, 5, 480, 360) == random_region(7, 2, 5, 480, 360)
    for left, top, right, bottom in seen:
        width, height = right - left, bottom - top
        assert 0 <= left < right <= 480 and 0 <= top < bottom <= 360
        assert SCALE[0] - 0.01 <= width * height / (480 * 360) <= 1.0
        assert RATIO[0] - 0.01 <= width / height <= RATIO[1] + 0.01
    assert random_region(0, 0, 0, 1000, 10) == (493, 0, 506, 10)  # nothing fits: centred, as near as the ratio allows
    assert random_region(0, 0, 0, 1, 1) == (0, 0, 1, 1)


def gradients(model: Path, recompute: bool) -> list[Tensor]:
    options = ModelOptions(("projection", "layers.1"), precision="fp32", recompute=recompute)
    parts = open_model(str(model), options, CPU)
    torch.manual_seed(0)
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(200, (5, 9))
    image, text = parts.towers.image(pixels), parts.towers.text(Tokens(ids, torch.ones_like(ids)))
    (parts.head.image(image) * parts.head.text(text)).sum().backward()
    return [gradient(parameter) for parameter in parts.trainable.values()]


def test_recomputed_layers_give_the_same_gradients(tiny_model: Path) -> None:
    plain, recomputed = gradients(tiny_model, False), gradients(tiny_model, True)
    assert len(plain) > 20 and all(a is not None and a.equal(b) for a, b in zip(plain, recomputed, strict=True))


def shared_ranks(image: Tensor, title: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ranks_in_tiles(image, title, ids, (rank, size), World(rank, rank, size, CPU).sum)


def ranks_in_tiles(image: Tensor, title: Tensor, ids: Tensor, *team: Any) -> tuple[Tensor, Tensor]:
    distinct = Distinct.from_ids(ids // 3, ids)
    return retrieval_ranks(image[distinct.image_row_U], title[distinct.title_row_W], distinct, (64, 128), *team)


def test_ranks_share_recall_and_get_the_same_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    image, title = (torch.nn.functional.normalize(torch.randn(333, 8, generator=generator), dim=-1) for _ in range(2))
    ids = torch.randint(200, (333,), generator=generator)
    alone = ranks_in_tiles(image, title, ids)
    for ranks in (2, 3):
        for answer in on_ranks(ranks, shared_ranks, image, title, ids):
            assert all(ours.equal(one) for ours, one in zip(answer, alone, strict=True))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "steps.jsonl").read_text().splitlines()]


def test_augmented_runs_are_the_same_on_two_ranks_and_differ_by_epoch(tiny_model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 21, 5, 5)
    args = ["--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--epochs", 2, "--lr", 0.0,
            "--batch-size", 8, "--precision", "fp32"]
    for name, more, ranks in (("plain", [], 1), ("one", ["--augment", "--profile"], 1), ("two", ["--augment"], 2)):
        command = [*args, "--out", tmp_path / name, *more]
        done = inside(command) if ranks == 1 else run(command, ranks)
        assert done.returncode == 0, done.stderr
        if name == "one":
            assert "time of 4 recorded steps" in done.stderr and "towers" in done.stderr
            assert "time of the run" in done.stderr and "evaluate" in done.stderr
    plain, one, two = (losses(tmp_path / name) for name in ("plain", "one", "two"))
    assert two == pytest.approx(one, abs=1e-5) and one != pytest.approx(plain, abs=1e-4)
    assert sum(one[:3]) != pytest.approx(sum(one[3:]), abs=1e-4)  # other crops in the other epoch, nothing learned
    base = [json.loads((tmp_path / name / "metrics.json").read_text())["base"] for name in ("plain", "one")]
    assert base[0] == base[1]  # measured on whole images


def test_a_warm_run_imports_no_library_that_it_does_not_use(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Importing them took a warm run more CPU time than all it did; an installed pandas still works with pyarrow."""
    data = ["--model", str(tiny_model), "--dataset", str(pairs), "--cache-dir", str(tmp_path / "cache")]
    train = ["train", *data, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert inside(["eval", *data, "--split", "all"]).returncode == 0
    code = WARM_RUN.format(unused=UNUSED, train=train, evaluate=["eval", *data])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "IMPORTED []" in done.stdout, done.stdout + done.stderr
    assert "features: 0 images and 0 titles encoded" in done.stderr
    assert "NULLS [1, 1]" in done.stdout
