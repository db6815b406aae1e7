"""The device of this rank and the dtype of its towers: chosen, checked, and named on the console."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data.batch import RunFailed, UserError
from engine.config.fields import Config

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DRIVER_FOR_CUDA = {13: 580, 12: 525, 11: 450}  # oldest driver of each major version, from NVIDIA's release notes
DRIVER_FILES, DEVICE_FILES = Path("/proc/driver/nvidia"), Path("/dev")
WHEELS = "(pytorch.org, Get Started)"
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")


def open_device(wanted: str, local_rank: int) -> torch.device:
    """Return this rank's device, made the current one, with TF32 off. Raises UserError."""
    device = pick_device(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # on by default, and the towers' patch embedding is a convolution
        torch.set_float32_matmul_precision("highest")  # whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
    return device


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """Return this rank's GPU, or the CPU for `cpu` or for `auto` on a machine without an NVIDIA device.

    Raises UserError for `cuda` without one, and for `auto` where there is one that torch cannot use.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if reason := why_no_cuda():
            raise UserError(f"--device {wanted}: there is an NVIDIA device, and {reason}; or use --device cpu")
        if wanted == "cuda":
            raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        local_rank = 0  # the launcher gave this rank one GPU, such as srun --gpus-per-task=1
    if local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU of its own ({visible} visible); "
                        "start fewer processes or use --device cpu")
    device = torch.device("cuda", local_rank)
    _refuse_missing_kernels(device)
    return device


def why_no_cuda() -> str:
    """Return why torch cannot use the NVIDIA device of this machine, and what helps; "" where there is no device.

    A CUDA_VISIBLE_DEVICES that hides every device asks for the CPU, so it counts as no device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"|-\d.*|NoDevFiles", visible.strip()):  # the last is Slurm's
        return ""
    driver = _driver_version()
    if not driver and not any(DEVICE_FILES.glob("nvidia[0-9]*")):
        return ""
    build = f"this torch ({torch.__version__})"
    major = int(driver.partition(".")[0] or 0)
    wheel = "cu130" if major >= DRIVER_FOR_CUDA[13] else "cu126"
    driver_text = f"driver {driver}" if driver else "its driver, whose version cannot be read,"
    if torch.version.cuda is None:
        too_old = bool(driver) and major < DRIVER_FOR_CUDA[12]
        update = f", after an update of driver {driver}" if too_old else ""
        return f"{build} is built without CUDA; install its {wheel} wheel for {driver_text}{update} {WHEELS}"
    needed = DRIVER_FOR_CUDA.get(int(torch.version.cuda.partition(".")[0]), 0)
    if 0 < major < needed:
        older_wheel = f", or install torch's cu126 wheel {WHEELS}" if major >= DRIVER_FOR_CUDA[12] else ""
        return (f"driver {driver} is too old for {build}, whose CUDA {torch.version.cuda} needs {needed}; update it"
                f"{older_wheel}")
    cause = "the driver" if not visible else f"CUDA_VISIBLE_DEVICES ({visible}), the driver"
    return f"{build} cannot use it with {driver_text}: {_cuda_error()}; check {cause} and the container's --gpus"


def _driver_version() -> str:
    """Return the version of the NVIDIA driver, "" on a machine without a GPU or where it cannot be read."""
    if any(DRIVER_FILES.glob("gpus/*")):
        with suppress(OSError):
            text = (DRIVER_FILES / "version").read_text(errors="replace")
            if version := re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text):
                return version[1]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
            if version := re.match(r"\d+(\.\d+)+", done.stdout):
                return version[0]
    return ""


def _cuda_error() -> str:
    """Return the first line of the error that torch raises as it initialises CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0][:150]
    return "it finds no device"


def _refuse_missing_kernels(device: torch.device) -> None:
    """Raise UserError for a GPU that this build of torch has no kernels for, as it is too old (a V100 under CUDA 13).
    """
    built = [int(number) for number in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    major, minor = torch.cuda.get_device_capability(device)
    if built and 10 * major + minor < min(built):
        raise UserError(f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is older than what "
                        f"torch {torch.__version__} is built for; install its cu126 wheel {WHEELS} or use --device cpu")


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the towers' products; `auto` is bf16 where the hardware has units for it.

    GPUs with fp16 units alone (V100, T4) get fp16. Measured: a CPU without bf16 units runs bf16 autocast 4.3x slower
    than fp32, one with them 1.8x faster. Raises UserError for fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 is for GPUs without bf16; use --precision auto")
    if wanted != "auto":
        return PRECISIONS[wanted]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def describe_device(cfg: Config, device: torch.device, size: int) -> str:
    """Return one line about device, ranks and precision, e.g. `device: NVIDIA H100 80GB HBM3 x 8 ranks, bf16`."""
    precision = pick_precision(cfg.precision, device)
    text = next(name for name, dtype in PRECISIONS.items() if dtype is precision)
    if precision is torch.float16:
        text = "fp16 in frozen towers, fp32 in training"
    ranks = f" x {size} ranks" if size > 1 else ""
    if device.type == "cuda":
        return f"device: {torch.cuda.get_device_name(device)}{ranks}, {text}"
    threads = torch.get_num_threads()
    line = f"device: CPU ({threads} thread{'s' if threads > 1 else ''}){ranks}, {text}"
    if cfg.device == "cpu":
        return line
    for other, module in (("Apple's GPU (MPS)", torch.backends.mps), ("Intel's GPU (XPU)", torch.xpu)):
        if module.is_available():
            return f"{line}; {other} is not supported"
    return f"{line}; no NVIDIA device"


@contextmanager
def explain_out_of_memory(command: str, cfg: Config) -> Iterator[None]:
    """Turn a failed allocation, on the device or the host, into a RunFailed that names the settings to change."""
    try:
        yield
    except MemoryError as error:
        raise RunFailed(f"out of memory on this machine; {_memory_advice(command, cfg)}") from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        place = "this machine" if "DefaultCPUAllocator" in str(error) else "the device"
        wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|allocate (\d+) bytes", str(error))
        size = f" ({wanted[1] or wanted[2] + ' bytes'} at once)" if wanted else ""
        raise RunFailed(f"out of memory on {place}{size}; {_memory_advice(command, cfg)}") from error


def _memory_advice(command: str, cfg: Config) -> str:
    """Return the settings, not set yet, that need less memory; those that cost the least speed come first."""
    if command == "eval":
        return "use --device cpu, a smaller --model, or a smaller split"
    if command not in ("train", "demo", "sweep"):
        return "use --device cpu or a smaller --model"
    trains_towers = any("projection" not in name and name != "logit_scale" for name in cfg.trainable)
    advice = [f"a smaller --batch-size than {cfg.batch_size:,}", "more ranks"]
    if command != "sweep" and (trains_towers or cfg.augment or cfg.mode == "streaming"):
        half = max(1, (cfg.micro_batch or cfg.batch_size) // 2)
        advice.insert(0, f"--micro-batch {half}")
        if trains_towers and not cfg.gradient_checkpointing:
            advice.insert(1, "--gradient-checkpointing")
    return f"use {', '.join(advice[:-1])} or {advice[-1]}"
