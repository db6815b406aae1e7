"""--profile: which steps a trace holds, and what the time of a GPU's kernels is put down to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import inside, last_flags

from engine.config.cli import parse
from engine.config.settings import profiled_steps
from engine.run_folder.log import NullLog
from engine.run_folder.profiler import Profiler, Trace, host_seconds, kernel_seconds, profiler


def event(kind: str, name: str, start: float, duration: float, **arguments: Any) -> dict[str, Any]:
    """One of a Chrome trace, as torch writes it."""
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "args": arguments}


REGIONS = [event("user_annotation", name, start, duration) for name, start, duration in (
    ("project", 0, 100), ("towers", 10, 50), ("backward", 200, 100), ("optim", 300, 50))]
LAUNCHES = [event("cuda_runtime", "cudaLaunchKernel", start, 5, correlation=number)
            for number, start in enumerate((5, 20, 70, 210, 320, 400))]  # backward's from another thread
KERNELS = [event(kind, "gemm", 1000 + number, duration, correlation=number) for number, (kind, duration) in enumerate(
    zip(["kernel"] * 4 + ["gpu_memcpy", "gpu_memset"], (1e6, 2e6, 3e6, 7e6, 4e6, 5e6), strict=True))]


def test_kernels_belong_to_the_region_that_launched_them() -> None:
    """Else backward, whose kernels another thread launches, seems to take the host's time and not the GPU's."""
    others = [event("python_function", "step", 0, 500), event("gpu_user_annotation", "project", 1000, 9e9)]
    events = [*others, *KERNELS, *LAUNCHES, *reversed(REGIONS)]
    assert kernel_seconds(events) == {"towers": 2.0, "project": 4.0, "backward": 7.0, "optim": 4.0, "other": 5.0}
    assert kernel_seconds([*others, *REGIONS]) == {}
    assert host_seconds(events) == {"towers": 5e-5, "project": 5e-5, "backward": 1e-4, "optim": 5e-5}


def test_a_range_has_its_steps_with_stacks_and_memory(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["--model", tiny_model, "--dataset", pairs, "--cache-dir", tmp_path / "cache", "--out",
                              tmp_path / "run", "--precision", "fp32", "--batch-size", "4", "--epochs", "1",
                              "--eval-splits", "valid"]  # ten steps
    done = inside([*args, "--profile", "3:5"])
    assert done.returncode == 0 and "time of 2 recorded steps" in done.stderr, done.stderr
    (trace,) = (tmp_path / "run" / "profile").glob("rank0.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    names = {entry["name"] for entry in events if entry.get("name", "").startswith("ProfilerStep#")}
    assert names == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any(entry.get("cat") == "python_function" and "train.py" in entry["name"] for entry in events)
    assert any(entry.get("name") == "[memory]" for entry in events)
    done = inside(last_flags([*args, "--out", tmp_path / "late", "--profile", "8:12"]))
    assert done.returncode == 2 and "--profile 8:12: the run has 10 steps" in done.stderr
    done = inside(last_flags([*args, "--out", tmp_path / "short", "--batch-size", "16", "--profile"]))
    assert "time of 1 recorded steps" in done.stderr and "when 1 of the 4 steps were recorded" in done.stderr


def test_rates_of_the_cold_pass_are_said_with_the_flag_alone(pairs: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The value `off` is a text, and so true: without the flag every run would print them."""
    args: list[str | Path] = ["--model", tiny_model, "--dataset", pairs, "--precision", "fp32", "--batch-size", "16",
                              "--epochs", "1", "--eval-splits", "valid"]
    for name, flags in (("with", ["--profile"]), ("without", [])):
        places = ["--out", tmp_path / name, "--cache-dir", tmp_path / f"cache-{name}"]
        done = inside([*args, *places, *flags])
        assert done.returncode == 0 and ("pictures of the cold pass" in done.stderr) == bool(flags), done.stderr


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "-1:4", "a:b", "1:2:3", "0:1001", "true", ""])
def test_what_is_no_range_is_refused_in_a_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("run.py", ["train", f"--profile={text}"])
    assert end.value.code == 2 and "such as 100:110" in capsys.readouterr().err


def test_files_of_before_and_bare_flags_mean_on(tmp_path: Path) -> None:
    for line, expected in (("true", "on"), ("false", "off"), ('"3:5"', "3:5")):
        (tmp_path / "recipe.toml").write_text(f"profile = {line}\n")
        assert parse("run.py", ["train", "--config", str(tmp_path / "recipe.toml")])[1].profile == expected
    assert parse("run.py", ["train", "--profile"])[1].profile == "on" and parse("run.py", [])[1].profile == "off"
    assert profiled_steps("3:5") == range(3, 5)


def test_steps_that_are_over_when_a_run_goes_on_are_not_recorded(tmp_path: Path) -> None:
    said: list[str] = []

    class Said(NullLog):
        def say(self, text: str) -> None:
            said.append(text)

    assert type(profiler("3:5", 5, tmp_path, 0, Said())) is Profiler and "not recorded" in said[0]
    assert isinstance(profiler("3:5", 4, tmp_path, 0, Said()), Trace)


def test_a_gpu_writes_its_allocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot begins and ends with the recorded steps, also where the run ends in the middle of them."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history",
                        lambda enabled="all", **_: calls.append("on" if enabled else "off"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", calls.append)
    for steps, expected in ((2, 3), (4, 3), (1, 0)):
        calls.clear()
        trace = Trace(tmp_path / "rank0.1", NullLog(), 2, 2, detailed=True)
        for _ in range(steps):
            trace._taken += 1
            trace._record_memory()
        trace._record_memory(is_over=True)
        assert calls == ["on", str(tmp_path / "rank0.1.memory.pickle"), "off"][:expected]
