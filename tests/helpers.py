"""What the tests share: a tiny CLIP (and `make_pairs`), run.py as a real process, and ranks on gloo.

Nothing here contacts anything but loopback.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scenes import make_pairs as make_pairs

from data.batch import AgreedError, Team
from engine.ranks.signals import StopSignal
from engine.ranks.world import World, close

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
P = ParamSpec("P")
R = TypeVar("R")


HAS_GPU = torch.cuda.is_available()  # of this machine, also for tests that do not see it: see conftest.py
HANGS_S = 500  # what still runs then will not end, on however slow a machine; pytest's own limit is above it
EXACT = 1e-9  # of float64, whose rounding (2^-53) may be multiplied by ten million before it shows


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what the product and transformers compute in fp32 is computed in float64, by a model made `.double()`.

    Two ways to compute the same then differ by the way and not by the rounding of one machine's kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype: scores.softmax(dim))
        yield


def full(reduced: int, full: int) -> int:
    """How often a test repeats itself: `reduced` in the normal suite, `full` with THUMBTUNE_FULL=1 in the environment.

    The figures of tests/README.md's reliability table are those of `THUMBTUNE_FULL=1 python -m pytest`.
    """
    return full if os.environ.get("THUMBTUNE_FULL") == "1" else reduced


def noting(function: Callable[P, R], note: Callable[P, object]) -> Callable[P, R]:
    """`function`, with every call's arguments given to `note` first: for a patch that only watches."""
    def noted(*args: P.args, **kwargs: P.kwargs) -> R:
        note(*args, **kwargs)
        return function(*args, **kwargs)

    return noted


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter that must have one."""
    assert parameter.grad is not None
    return parameter.grad


def tiny_clip(folder: Path, sentence_transformers: bool = False, seed: int = 0) -> Path:
    """Write a random CLIPModel (fp32, 32 pixels, V=32, T=24, E=16) with its preprocessing; return `folder`.

    With `sentence_transformers`, in the layout and with the habits of sentence-transformers/clip-ViT-L-14: files under
    `0_CLIPModel/`, no processor_config.json, and a config whose `eos_token_id` is the historical 2, which no title ends
    with (transformers then pools at the highest id instead).
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    old = sentence_transformers
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 16,
            "bos_token_id": 0 if old else tokenizer.bos_token_id, "pad_token_id": 1 if old else tokenizer.pad_token_id,
            "eos_token_id": 2 if old else tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 8, "projection_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    inner = folder / "0_CLIPModel" if old else folder
    model.save_pretrained(inner)
    if not old:
        CLIPProcessor(images, tokenizer).save_pretrained(inner)
        return folder
    images.save_pretrained(inner)
    tokenizer.save_pretrained(inner)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (folder / "modules.json").write_text(json.dumps([module], indent=2), encoding="utf-8")
    return folder


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer laid out as CLIP's: bytes, bytes ending a word, merges, start and end of text as last ids."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: Any = [("r", "e"), ("re", "d</w>"), ("i", "n"), ("e", "s</w>"), ("l", "es</w>"), ("a", "r")]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges),
             "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, merges, model_max_length=77)


class Loopback(ThreadingHTTPServer):
    """A server that takes many connections at once: beyond a queue of the usual 5 the kernel drops some, and a client
    that gives up on one and asks again is counted twice.
    """

    request_queue_size = 512


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve by `handler` on a free port of this machine; the address."""
    with Loopback(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class StopAt(StopSignal):
    """As if a signal had come during one step."""

    def __init__(self, step: int) -> None:
        self._received, self._graceful, self._step = 0, False, step

    def _exit(self) -> None:
        raise SystemExit(128 + self._received)

    def agreed_signal(self, world: World, step: int) -> int:
        self._received = signal.SIGTERM if step == self._step else 0
        return self._received


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as pandas does, by the ending of the file."""
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)


def start(args: Sequence[object], ranks: int = 1, env: Mapping[str, str] | None = None,
          cwd: Path = ROOT, program: Path = ROOT / "run.py", restarts: int = 0) -> subprocess.Popen[str]:
    """Start `python PROGRAM ARGS`, or under torchrun with several `ranks`, in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts",
                str(restarts)] if ranks > 1 else []
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.Popen([sys.executable, *launcher, str(program), *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **settings},
                            encoding="utf-8", errors="replace", start_new_session=True)


def run(args: Sequence[object], ranks: int = 1, env: Mapping[str, str] | None = None,
        timeout: float = HANGS_S, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`start`, then wait. After `timeout` seconds all it started is killed and AssertionError shows what it said."""
    process = start(args, ranks, env, cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process.pid)
        out, err = process.communicate(timeout=10)
        raise AssertionError(f"{process.args!r} still ran after {timeout} s\n{out}\n--- stderr\n{err}") from None
    except BaseException:
        kill(process.pid)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def last_flags(args: Sequence[str | Path]) -> list[str]:
    """`--flag value` pairs and switches without those given again later: a test changes one of its usual flags."""
    groups: list[list[str]] = []
    for word in map(str, args):
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    last = {group[0].split("=")[0]: group for group in groups}
    return [word for group in groups if last[group[0].split("=")[0]] is group for word in group]


def call(*arguments: object) -> int:
    """run.py in this process; its exit code."""
    import run as command_line

    try:
        return command_line.main([*map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)


def inside(args: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """`run` with one rank in this process, where what takes seconds to import is there: for what run.py does, not how
    a process ends. A run folder stays locked until this process does.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = call(*args)
    return subprocess.CompletedProcess([str(argument) for argument in args], code, out.getvalue(), err.getvalue())


def family(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    members, parents = [pid], {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for member in members:
        members += [child for child, parent in parents.items() if parent == member]
    return members


def kill(pid: int) -> None:
    """SIGKILL a process group and those of all processes below it: torchrun gives every rank a session of its own."""
    for member in family(pid):
        with suppress(ProcessLookupError):
            os.killpg(os.getpgid(member), signal.SIGKILL)


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = HANGS_S) -> list[Any]:
    """Call `function(*args)` in `size` fresh processes joined by gloo; return what each rank returned, in rank order.

    `function` is a module's top-level one; it asks `torch.distributed` for its rank. An exception on a rank ends all
    and is raised here with its traceback; TimeoutError after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(_on_rank, (size, folder, function, args), size, join=False, start_method="spawn")
        deadline = time.monotonic() + timeout
        try:
            while not ranks.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{function.__name__} on {size} ranks still ran after {timeout} s")
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(size)]


def _on_rank(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size,
                            timeout=datetime.timedelta(seconds=HANGS_S))
    result = function(*args)
    dist.barrier()
    close()
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))


def as_ranks(size: int, function: Callable[[Team], R]) -> list[R | Exception]:
    """Call `function` as each of `size` ranks, in threads that exchange values; what each returned or raised."""
    barrier, values = threading.Barrier(size, timeout=HANGS_S), [None] * size

    def call(rank: int) -> R | Exception:
        def exchange(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            parts = list(values)
            barrier.wait()
            return parts

        try:
            return function(Team(rank, size, exchange))
        except AgreedError as error:
            return error
        except Exception as error:
            barrier.abort()  # the others wait for this one
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def picture(number: int, size: int = 700) -> bytes:
    """Bytes that begin like a JPEG; nothing decodes them."""
    return b"\xff\xd8\xff" + random.Random(number).randbytes(size)
