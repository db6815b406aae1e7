"""The device is never a guess: GPUs that torch cannot use, old ones, several precisions, and memory that runs out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import inside, noting
from torch import nn

from data.batch import Features, RunFailed, UserError
from data.store.feature_split import FeatureSplit
from engine import device as module
from engine import train
from engine.commands import common
from engine.config.fields import Config
from engine.device import (
    describe_device,
    explain_out_of_memory,
    open_device,
    pick_device,
    pick_precision,
)
from engine.loss import Objective
from engine.optim import Plan, adamw
from engine.ranks.world import World
from engine.run_folder.checkpoint import State
from engine.run_folder.profiler import Profiler

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DRIVER_TEXT = "NVRM version: NVIDIA UNIX {}Kernel Module{} x86_64  {}  Thu Feb  1 00:00:00 UTC 2024\nGCC version: 12"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A function that makes this machine look like one with a driver, a torch built for a CUDA, and so many GPUs."""
    def pretend(driver: str = "", cuda: str | None = "13.0", count: int = 0, capability: tuple[int, int] = (9, 0),
                visible: str | None = None, kernels: tuple[str, ...] = ("sm_75", "sm_90a", "compute_120")) -> None:
        open_text = ("Open ", " for") if driver.startswith("58") else ("", "")  # kernel modules of either kind
        files = tmp_path / f"driver {driver}"
        (files / "gpus" / "0000:01:00.0").mkdir(parents=True, exist_ok=True)
        (files / "version").write_text(DRIVER_TEXT.format(*open_text, driver))
        monkeypatch.setattr(module, "DRIVER_FILES", files if driver else tmp_path / "none")
        monkeypatch.setattr(module, "DEVICE_FILES", tmp_path / "none")
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name, value in {"is_available": count > 0, "device_count": count, "get_device_capability": capability,
                            "get_device_name": "NVIDIA H100 80GB HBM3", "get_arch_list": list(kernels),
                            "set_device": None}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return pretend


@pytest.mark.parametrize(("driver", "cuda", "says"), [
    ("535.104.05", "13.0", r"driver 535.104.05 is too old for .* CUDA 13.0 needs 580; update it, or .* cu126 wheel"),
    ("470.82", "12.6", r"driver 470.82 is too old for .* CUDA 12.6 needs 525; update it; or use --device cpu$"),
    ("580.65.06", None, r"built without CUDA; install its cu130 wheel for driver 580.65.06"),
    ("535.104.05", None, r"built without CUDA; install its cu126 wheel for driver 535.104.05"),
    ("590.1", "13.0", r"cannot use it with driver 590.1: .+; check the driver"),
])
def test_a_gpu_that_torch_cannot_use_is_an_error_and_no_silent_run_on_the_cpu(
        driver: str, cuda: str | None, says: str, machine: Callable[..., None]) -> None:
    """Else a job on a paid GPU trains on the CPU for a day before anyone looks."""
    for wanted in ("auto", "cuda"):
        machine(driver, cuda)
        with pytest.raises(UserError, match=says) as caught:
            pick_device(wanted, 0)
        assert f"--device {wanted}" in str(caught.value) and "--device cpu" in str(caught.value)
    for hidden in ("", "-1", "-1,0", " -1 "):  # a wish for the CPU
        machine(driver, cuda, visible=hidden)
        assert pick_device("auto", 0) == CPU
    machine("590.1", "13.0", visible="7")
    with pytest.raises(UserError, match=r"check CUDA_VISIBLE_DEVICES \(7\), the driver"):
        pick_device("auto", 0)
    assert pick_device("cpu", 0) == CPU
    machine("")
    assert pick_device("auto", 0) == CPU


def test_a_gpu_too_old_for_the_kernels_of_this_torch_is_named(machine: Callable[..., None]) -> None:
    """CUDA 13 has none for a V100, whose first kernel would fail with `no kernel image`."""
    machine("580.1", count=1, capability=(7, 0))
    with pytest.raises(UserError, match=r"compute capability 7\.0.*cu126 wheel"):
        pick_device("auto", 0)
    machine("580.1", count=1, capability=(7, 5))
    assert pick_device("auto", 0) == GPU


def test_precision_is_what_the_hardware_has_and_fp32_is_fp32(machine: Callable[..., None],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution in TF32, torch's default, is 10 bits of the 23 that --precision fp32 promises."""
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16),
                              ((7, 0), torch.float16), ((6, 1), torch.float32)):
        machine(count=1, capability=capability)
        assert pick_precision("auto", GPU) is dtype
    with pytest.raises(UserError, match="fp16 is for GPUs"):
        pick_precision("fp16", CPU)
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    machine(count=1)
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        assert open_device("auto", 0) == GPU
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (False, "highest")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_one_line_says_device_ranks_and_precision(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
                                                  tiny_model: Path) -> None:
    machine(count=8)
    assert describe_device(Config(), GPU, 8) == "device: NVIDIA H100 80GB HBM3 x 8 ranks, bf16"
    machine(count=1, capability=(7, 5))
    assert describe_device(Config(), GPU, 1).endswith("HBM3, fp16 in frozen towers, fp32 in training")
    fp32 = Config(model=str(tiny_model), precision="fp32")
    machine()
    threads = re.escape(f"{torch.get_num_threads()} thread")
    assert re.fullmatch(rf"device: CPU \({threads}s?\), fp32; no NVIDIA device", describe_device(fp32, CPU, 1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert describe_device(fp32, CPU, 2).endswith(" x 2 ranks, fp32; Apple's GPU (MPS) is not supported")
    lines: list[str] = []
    monkeypatch.setattr(World, "say", lambda world, text: lines.append(text))
    common.load_model(fp32, World(0, 0, 1, CPU))
    assert [line for line in lines if line.startswith("device: ")] == lines[:1]


def test_beside_fp16_towers_small_gradients_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 what is below 6e-8 is 0: a large batch would train nothing."""
    dtypes = set[torch.dtype]()

    class Spy(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            dtypes.add(super().forward(inputs).dtype)
            return super().forward(inputs)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Spy(4, 4)

        def forward(self, features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return self.layer(features.image_BV), self.layer(features.title_BT), torch.tensor(1.0)

    model, ids = Model(), torch.arange(3)
    replica = train.Replica(model, adamw(model.parameters(), 0.1, 0.0), World(0, 0, 1, CPU), torch.float16)
    inputs = Features(torch.randn(3, 4), torch.randn(3, 4), None, ids, ids, None)
    train.Step(replica, Objective(), 1.0, Profiler())(inputs, 3, 0.1)
    assert dtypes == {torch.float32}


def test_the_loss_multiplies_in_bf16_on_a_gpu_in_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, which a user asks for by name, and on a CPU, which has no such products with fp32 sums, it does not."""
    seen: list[torch.dtype | None] = []
    monkeypatch.setattr(train, "Objective", noting(Objective, lambda *args: seen.append(args[3])))
    layer, cfg, plan = nn.Linear(2, 2), Config(cuda_graph="off"), Plan(4, 4, 1)
    for device, precision in ((GPU, torch.bfloat16), (GPU, torch.float32), (GPU, torch.float16), (CPU, torch.bfloat16)):
        replica = train.Replica(layer, adamw(layer.parameters(), 0.1, 0.0), World(0, 0, 1, device), precision)
        table, ids = torch.ones(4, 2), torch.arange(4)
        batches = FeatureSplit(table, table, ids, ids).batches(4, 0)
        train.fit(replica, batches, plan, State(step=plan.steps), cfg, train.Callbacks())
    assert seen == [torch.bfloat16, None, None, None]


@pytest.mark.parametrize(("error", "says"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), r"the device \(2.50 GiB at"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes"),
     r"this machine \(17179869184 bytes at"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the device;"),
    (MemoryError(), "this machine;"),
])
def test_out_of_memory_is_one_sentence_that_names_what_helps(error: Exception, says: str) -> None:
    cached, streaming = Config(batch_size=512), Config(batch_size=512, trainable=("all",))
    for command, cfg, advice in (
            ("train", cached, "use a smaller --batch-size than 512 or more ranks"),
            ("train", streaming, "use --micro-batch 256, --gradient-checkpointing, a smaller --batch-size than 512 or"),
            ("train", Config(augment=True, micro_batch=8), "use --micro-batch 4, a smaller --batch-size"),
            ("eval", Config(), "use --device cpu, a smaller --model")):
        with pytest.raises(RunFailed, match=says) as caught, explain_out_of_memory(command, cfg):
            raise error
        assert advice in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("train", cached):
        raise RuntimeError("another")


def test_a_run_out_of_memory_ends_with_one_line_and_code_1(pairs: Path, tiny_model: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(train, "global_batch_loss", full)
    done = inside(["--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path, "--out", tmp_path / "run",
                   "--device", "cpu"])
    assert done.returncode == 1 and "not foreseen" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("run.py train failed: out of memory on the device (2.50 GiB at once); use a smaller --batch")
