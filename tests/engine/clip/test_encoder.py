"""Frozen towers: weights held in bf16, one shape as a CUDA graph, compilation where it pays; features never change."""

from __future__ import annotations

import warnings
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from helpers import noting
from stand_in import GPU, captured, plain, stand_in
from torch import Tensor

from data.batch import Tokens, UserError
from engine.clip import encoder as module
from engine.clip import towers as towers_module
from engine.clip.encoder import BatchedEncoder, DeviceClock, OneShapeGraph
from engine.clip.loading import load_clip
from engine.clip.model import LoadedModel, ModelOptions, build_model

CPU = torch.device("cpu")
needs_stand_in = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no stand-in")


def opened(model: Path, *trainable: str) -> LoadedModel:
    return build_model(load_clip(str(model)), ModelOptions(trainable or ("projection",), precision="bf16"), CPU)


def features(parts: LoadedModel) -> list[Tensor]:
    """Of both towers, in bf16."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(200, (5, 9), generator=generator)
    eos: Any = parts.clip.text_model.config.eos_token_id
    ids[:, -1] = eos
    return [BatchedEncoder(parts.towers.image, CPU, torch.bfloat16)(pixels),
            BatchedEncoder(parts.towers.text, CPU, torch.bfloat16)(Tokens(ids, torch.ones_like(ids)))]


def test_weights_held_in_bf16_give_autocasts_features_to_the_bit_and_leave_the_model_in_fp32(
        tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise stored features are of another space than their name says, or bf16 weights are exported."""
    parts = opened(tiny_model)
    before = {name: tensor.clone() for name, tensor in parts.clip.model.state_dict().items()}
    held = features(parts)
    assert len(list(parts.towers.parameters())) == len(list(opened(tiny_model).towers.parameters()))
    after = parts.clip.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(tensor) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} <= {torch.float32, torch.int64}
    copies = {tensor.dtype for tower in (parts.towers.image, parts.towers.text)
              for tensor in tower._cast_copy[0].parameters()}
    assert copies == {torch.bfloat16, torch.float32}
    monkeypatch.setattr(towers_module.Tower, "for_pass", lambda tower, device: tower.model)
    for ours, autocasts in zip(held, features(parts), strict=True):
        assert ours.equal(autocasts)


def test_a_tower_that_trains_is_never_a_copy(tiny_model: Path) -> None:
    """A copy would not see the updates, and every evaluation would measure the first weights."""
    parts = opened(tiny_model, "vision_model.encoder.layers.1")
    image, text = features(parts)
    with torch.no_grad():
        for weight in parts.trainable.values():
            weight.add_(0.1)
    changed, same = features(parts)
    assert not changed.equal(image) and same.equal(text)
    assert not parts.towers.image._cast_copy and parts.towers.text._cast_copy


def test_a_graph_replays_one_shape_and_gives_what_the_eager_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = noting(lambda pixels: pixels.sum(-1).float() * 2, lambda pixels: calls.append(len(pixels)))
    captures: list[int] = []
    monkeypatch.setattr(module, "capture", noting(captured, lambda function: captures.append(len(calls))))
    graph, lots = OneShapeGraph(encode), [torch.randn(count, 3) for count in (8, 8, 3, 8, 8, 8, 8, 5, 8)]
    answers = [graph(lot) for lot in lots]
    assert captures == [6]  # after the third of one shape in a row
    for lot, answer in zip(lots, answers, strict=True):  # one replay does not overwrite what another gave
        assert answer.equal(lot.sum(-1) * 2)


@pytest.mark.parametrize("problem", ["replayed, it does something else", "it cannot be captured"])
def test_a_graph_that_cannot_be_is_said_once_and_the_tower_runs_without(problem: str,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(function: Any) -> Any:
        if "captured" in problem:
            raise RuntimeError("operation not permitted when stream is capturing")
        return function(), lambda: None

    monkeypatch.setattr(module, "capture", capture)
    turn = iter(range(100))
    graph = OneShapeGraph(lambda pixels: pixels + next(turn) * 0 + (0 if "captured" in problem else next(turn)))
    with pytest.warns(UserWarning, match=problem) as caught:
        for _ in range(8):
            graph(torch.ones(4))
    assert len(caught) == 1


@needs_stand_in
def test_a_cold_pass_on_a_gpu_is_the_cpus_with_its_graph(tiny_model: Path) -> None:
    parts, lots = opened(tiny_model), torch.randint(256, (6, 4, 3, 32, 32), dtype=torch.uint8)
    here = [BatchedEncoder(parts.towers.image, CPU, torch.float32)(lot) for lot in lots]
    with stand_in():
        there = build_model(load_clip(str(tiny_model)), ModelOptions(precision="fp32"), GPU)
        encode = BatchedEncoder(there.towers.image, GPU, torch.float32)
        found = [plain(encode(lot)) for lot in lots]
        assert encode._graphs is not None and encode._graphs._pixels is not None
    torch.testing.assert_close(found, here)


@needs_stand_in
@pytest.mark.parametrize("busy", [0.5, 0.9])
def test_a_compilation_is_begun_only_where_the_tower_is_the_limit(busy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the feed is, a minute of compiling makes nothing faster."""
    compiled: list[object] = []

    def compile_nothing(encode: Any, dynamic: bool) -> Any:
        compiled.append(encode)
        return encode

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(module, "COMPILE_AFTER", 20)
    monkeypatch.setattr(DeviceClock, "busy_share", lambda clock: busy)
    with stand_in():
        tower = BatchedEncoder(lambda pixels: pixels * 2.0, GPU, torch.float32, "auto")
        for count in range(1, 12):
            assert plain(tower(torch.arange(4.0))).tolist() == [0, 2, 4, 6]
            assert len(compiled) == (busy > 0.8 and count > 5)


@needs_stand_in
@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler. Please specify via CC"),
                                   CalledProcessError(1, ["gcc", "cuda_utils.c"]), FileNotFoundError("gcc")])
def test_without_a_c_compiler_auto_goes_on_and_on_refuses(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(torch, "compile", lambda encode, dynamic: fail)
    monkeypatch.setattr(module, "COMPILE_AFTER", 0)
    monkeypatch.setattr(DeviceClock, "busy_share", lambda clock: 1.0)
    with stand_in(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tower = BatchedEncoder(lambda pixels: pixels * 2.0, GPU, torch.float32, "auto")
        assert [plain(tower(torch.ones(2))).tolist() for _ in range(5)] == [[2, 2]] * 5
        assert len([each for each in caught if "runs uncompiled" in str(each.message)]) == 1
        tower = BatchedEncoder(lambda pixels: pixels * 2.0, GPU, torch.float32, "on")
        tower(torch.ones(2))
        with pytest.raises(UserError, match="do not compile here.*--compile off"):
            tower(torch.ones(2))
