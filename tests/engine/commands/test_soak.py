"""A long run on two ranks: after warm-up neither memory nor descriptors nor threads grow (R22)."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import family, full, kill, start
from PIL import Image

ROWS, SECONDS, MB_A_MINUTE = full(4_000, 1_000_000), full(20, 600), full(20, 1)
READY_S = full(120, 1500)


def write_table(folder: Path) -> None:
    """ROWS training pairs with titles of their own on 200 pictures, and 50 to validate."""
    (folder / "images").mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 255, (200, 3))
    for number, colour in enumerate(colours.tolist()):
        Image.new("RGB", (40, 40), tuple(colour)).save(folder / "images" / f"{number}.png")
    for split, rows in (("train", ROWS), ("valid", 50)):
        with (folder / f"{split}.csv").open("w") as file:
            file.write("image,title\n")
            file.writelines(f"images/{row % 200}.png,{split} number {row}\n" for row in range(rows))


def look(pid: int) -> tuple[float, int, int]:
    """Megabytes of a process's own memory, open descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


@pytest.mark.timeout(READY_S + SECONDS + 120)
def test_two_ranks_grow_no_more_after_warming_up(tiny_model: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "pairs")
    out = tmp_path / "run"
    process = start(["--model", tiny_model, "--dataset", tmp_path / "pairs", "--out", out, "--cache-dir",
                     tmp_path / "cache", "--precision", "fp32", "--batch-size", "256", "--epochs", "1000000",
                     "--eval-splits", "valid", "--eval-every", "500", "--save-every", "500", "--log-every", "50"], 2)
    try:
        deadline = time.monotonic() + READY_S
        while not (out / "checkpoints" / "last").exists():  # training, evaluation and saving have all happened
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
            time.sleep(0.2)
        ranks = [pid for pid in family(process.pid) if b"run.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
                 and pid != process.pid]
        assert len(ranks) == 2
        began, seen = time.monotonic(), []
        while time.monotonic() - began < SECONDS:
            seen.append([(time.monotonic() - began, *look(pid)) for pid in ranks])
            time.sleep(0.5)
        late_SRX = np.array(seen)[len(seen) // 3 :]  # samples x ranks x (seconds, MB, descriptors, threads)
        for rank in range(2):
            second_S, mb_S, descriptors_S, threads_S = late_SRX[:, rank].T
            growth = np.polyfit(second_S, mb_S, 1)[0] * 60
            print(f"rank {rank}: {mb_S[-1]:.0f} MB, {growth:+.2f} MB a minute")
            assert growth < MB_A_MINUTE
            assert descriptors_S.max() - descriptors_S.min() <= 4  # a checkpoint being written
            assert threads_S.max() - threads_S.min() <= 2  # a profiler's or a writer's
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        kill(process.pid)
