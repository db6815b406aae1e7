"""A GPU of pretence: tensors that say they are on cuda:0 and compute on the CPU, for machines without one.

Everything runs with its real values. As on a GPU, two tensors of unlike devices do not mix, and the host waits where it
asks for a value or copies what is not pinned: every such sync is noted with the line of ours that asked.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from engine.clip import encoder

GPU, META = torch.device("cuda", 0), torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # takes indices from the host as well
ASKS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
        aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
        aten.repeat_interleave.Tensor, aten.bincount.default)
EMULATED = {aten.mm.dtype: lambda left, right, dtype: left.to(dtype) @ right.to(dtype)}  # kernels that a CPU lacks


class OnGPU(torch.Tensor):
    """What lies there; `elem` has its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(cls, elem.size(), elem.stride(), elem.storage_offset(),
                                                   dtype=elem.dtype, device=GPU, requires_grad=False)
        made.elem = elem
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch names no type
        return f"OnGPU({self.elem})"

    def tolist(self) -> Any:  # which torch has for its own class alone
        return self.cpu().tolist()

    @classmethod  # torch's stub has the function that switches dispatch off
    def __torch_dispatch__(  # type: ignore[override]
            cls, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return launch(kernel, args, kwargs or {}, [])


class StandIn(TorchDispatchMode):
    """Inside, `device="cuda"` is such a GPU; `syncs` are the lines that made the host wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return launch(kernel, args, kwargs or {}, self.syncs)


def launch(kernel: Any, args: Any, kwargs: dict[str, Any], syncs: list[str]) -> Any:
    """Run one kernel where its operands lie. Raises RuntimeError where they lie apart."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.dim()]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    wanted = GPU if wanted == META else wanted  # `cuda` without a number is asked of the guard that stands in
    if there and here and kernel not in COPIES:
        if kernel not in INDEXED or not isinstance(args[0], OnGPU):
            raise RuntimeError(f"{kernel}: expected all tensors to be on the same device; called at {caller()}")
        syncs.append(f"{caller()}: {kernel}, an index from the host")
    if kernel in COPIES:
        target = wanted or args[0].device
        ends = args[:2] if kernel is aten.copy_.default else args[:1]
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        free = asynchronous and any(getattr(end, "pinned", False) for end in ends)
        if target.type != ends[-1].device.type and not free:
            syncs.append(f"{caller()}: {kernel} from {ends[-1].device.type} to {target.type}")
    elif there and (kernel in ASKS or (kernel in INDEXED and any(
            isinstance(index, Tensor) and index.dtype is torch.bool for index in tree_leaves(args[1])))):
        syncs.append(f"{caller()}: {kernel}")
    here_too = {**kwargs, **({"device": torch.device("cpu")} if wanted is not None else {})}
    pin = here_too.pop("pin_memory", False)
    bare_args, bare_kwargs = tree_map(plain, (args, here_too))
    out = EMULATED.get(kernel, kernel)(*bare_args, **bare_kwargs)
    if pin:
        out.pinned = True
    if there if wanted is None else wanted == GPU:
        out = tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(kernel, args, kwargs, out) if there or not tensors else out


def plain(value: Any) -> Any:
    """The tensor on the CPU that computes for one on the stand-in; anything else as it is."""
    return value.elem if isinstance(value, OnGPU) else value


def caller() -> str:
    """The innermost line of the product on the stack."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        folder, _, name = frame.f_code.co_filename.rpartition("/")
        if folder.startswith(str(ROOT)) and not folder.startswith(str(ROOT / "tests")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "the test"


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """What `Tensor.backward` does; autograd's own engine asks the accelerator for its stream, and there is none."""
    first: Any = loss.grad_fn  # no stub has the attributes of the nodes that C++ makes
    needs, nodes = dict[Any, int](), [first]
    for node in nodes:
        for below, _ in node.next_functions:
            if below is not None:
                nodes += [below] if below not in needs else []
                needs[below] = needs.get(below, 0) + 1
    wanted, ready = {first: {0: torch.ones_like(loss) if gradient is None else gradient}}, [first]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = wanted.pop(node, {})
            if hasattr(node, "variable"):
                weight = node.variable
                weight.grad = given[0] if weight.grad is None else weight.grad + given[0]
                continue
            places = range(max(given, default=0) + 1)
            out = (node if callable(node) else node.apply)(*(given.get(place) for place in places))
            for (below, place), part in zip(node.next_functions, out if isinstance(out, tuple) else (out,),
                                            strict=False):  # what is no tensor comes last and has no node
                if below is None:
                    continue
                if part is not None:
                    parts = wanted.setdefault(below, {})
                    form = below._input_metadata[place]
                    part = part.to(form.dtype).sum_to_size(form.shape)
                    parts[place] = parts[place] + part if place in parts else part
                needs[below] -= 1
                ready += [] if needs[below] else [below]


@contextmanager
def stand_in(free: int = 2**33) -> Iterator[StandIn]:
    """A process that has one such GPU, with `free` bytes for tables of features."""
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    own, guards[1] = guards[1], guards[14]  # autograd asks the guard of a node's device for a stream: here meta's
    lifted = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # as Module.to keeps them
        for name in ("__enter__", "__exit__"):  # wrapped tensors know no inference mode
            patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.Tensor, "pin_memory", pinned)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        patch.setattr(torch, "set_float32_matmul_precision", partial(fp32_products, torch.set_float32_matmul_precision))
        for name, value in {"_lazy_init": None, "is_available": True, "device_count": 1, "set_device": None,
                            "get_device_capability": (9, 0), "get_device_name": "none", "max_memory_allocated": 0,
                            "current_stream": Stream(), "mem_get_info": (free, free),
                            "stream": nullcontext()}.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch.cuda, "Stream", Stream)
        events: list[Event] = []
        patch.setattr(encoder, "capture", captured)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with StandIn() as device:
                patch.setattr(torch.cuda, "Event", partial(Event, events, device.syncs))
                yield device
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)
            guards[1] = own


def fp32_products(ask: Callable[[str], None], precision: str) -> None:
    """Ask for a precision as on a GPU; the CPU, which may have such products of its own, goes on in fp32."""
    ask(precision)
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


class Stream:
    """All work is done in order."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Nothing to wait for."""


class Event:
    """A wait for the newest one is a wait for all work; for an earlier one, whose work is long done, it is none."""

    def __init__(self, recorded: list[Event], syncs: list[str], enable_timing: bool = False) -> None:
        self.recorded, self.syncs = recorded, syncs

    def record(self) -> None:
        """It is the newest."""
        self.recorded.append(self)

    def synchronize(self) -> None:
        """Note a wait."""
        if self.recorded[-1] is self:
            self.syncs.append(f"{caller()}: a wait for an event")

    def query(self) -> bool:
        """All work is done."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 0.0


def captured(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A CUDA graph of pretence: as in a real one, a replay reads and writes the tensors of the capture."""
    output = function()

    def replay() -> None:
        output.copy_(function())

    return output, replay


def pinned(tensor: Tensor) -> Tensor:
    """A copy that is known to be pinned."""
    if isinstance(tensor, OnGPU):
        raise RuntimeError("only CPU memory can be pinned")
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy
