"""Simulates a GPU: tensors that report a CUDA device but are computed on the CPU. Operations that mix them with host
tensors are refused, as on a GPU, and operations that make the host wait for the device are counted.

Tensors hold real values, so that code with data-dependent control flow runs to its end, unlike under torch's
FakeTensorMode.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rb_gpu.learn import devices, streaming

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
# operations for which the host must wait, for a value or for a size that depends on values
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.bincount.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
# operations that torch refuses on a GPU under deterministic algorithms; cumsum only for floats, bincount only with
# weights
UNORDERED = {
    aten.median.dim, aten.nanmedian.dim, aten.kthvalue.default, aten.histc.default, aten.put_.default,
    aten.cumsum.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# operations besides the elementwise ones that take a single number of the host
TAKING = INDEXING | {aten.copy_.default, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
# products that cuBLAS has for floating point numbers only
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.addmv.default,
    aten.dot.default,
}  # fmt: skip


class MixedError(RuntimeError):
    """Raised if one operation gets tensors of both the host and the device."""


class Memory:
    """Bytes that tensors hold now, and the most that they held; views hold what their base does."""

    def __init__(self) -> None:
        self.users: Counter[tuple[int, int]] = Counter()
        self.now = self.peak = 0

    def take(self, tensor: OnDevice) -> None:
        storage = tensor.held.untyped_storage()
        place = (storage.data_ptr(), storage.nbytes())
        self.now += storage.nbytes() * (self.users[place] == 0)
        self.users[place] += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self.free, place).atexit = False

    def free(self, place: tuple[int, int]) -> None:
        self.users[place] -= 1
        self.now -= place[1] * (self.users[place] == 0)


class OnDevice(torch.Tensor):
    """A tensor that reports the device cuda:0, with its values in `held`, on the CPU."""

    held: torch.Tensor
    memory = Memory()

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        # internally it has the host's device, because a build of torch without CUDA has no other
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=held.device, **options)
        made.held = held.detach()
        cls.memory.take(made)
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MixedError(f"{func} outside of `pretended`")


class Operations(TorchDispatchMode):
    """Runs every operation on the held values, and records what would be slow or nondeterministic on a GPU.

    waits: how often the host waited, by operation. unordered: operations that torch would refuse under deterministic
    algorithms, or that ran without that mode. memory: what the tensors on the device take; what an operation takes
    while it runs is not counted. raced: number of indexed writes beyond the first to the same place, where
    any of the threads may win. serial: shapes of cumulative sums along a dimension other than the last, for which a GPU
    uses one thread per column.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.unordered: set[str] = set()
        self.serial: list[tuple[int, ...]] = []
        self.raced = 0
        self.memory = Memory()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's own check would import modules for a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        there = {id(t.held): t for t in tensors if isinstance(t, OnDevice)}
        if not there:
            return func(*args, **kwargs)
        # a GPU operation may also take from the host: single numbers, and indices into its tensors
        allowed = args[1] if func in INDEXING and isinstance(args[0], OnDevice) else ()
        here = [
            tuple(t.shape)
            for t in tensors
            if not isinstance(t, OnDevice) and t.dim() > 0 and not any(t is index for index in allowed)
        ]
        if func.namespace == "c10d" and not all(t.is_contiguous() for t in tensors):
            raise ValueError("Tensors must be contiguous")  # as NCCL says
        if here and func is not aten.copy_.default:
            raise MixedError(f"{func}: {here} of the host beside the device's")
        numbers = any(not isinstance(t, OnDevice) and t.dim() == 0 for t in tensors)
        if numbers and func not in TAKING and torch.Tag.pointwise not in func.tags:
            raise MixedError(f"{func}: a number of the host beside the device's")
        if func is not aten.copy_.default and _writes_to_host(func, args, kwargs):
            raise MixedError(f"{func} of the device's numbers into a tensor of the host")
        if func in INDEXING and func is not aten.index.Tensor and torch.are_deterministic_algorithms_enabled():
            wanted = aten.index.Tensor(*_held(args[:2])).numel()
            if args[2].dim() > 0 and args[2].numel() < wanted:
                # mended in torch 2.8 (pytorch/pytorch#79987)
                raise RuntimeError(f"number of flattened indices did not match: {wanted} vs {args[2].numel()}")
        if func in PRODUCTS and not args[0].dtype.is_floating_point:
            raise NotImplementedError(f"{func} not implemented for {args[0].dtype}")
        refused = func in UNORDERED and (func is not aten.cumsum.default or args[0].dtype.is_floating_point)
        refused |= func is aten.bincount.default and len(args) > 1 and args[1] is not None
        if refused or not torch.are_deterministic_algorithms_enabled():
            self.unordered.add(str(func))
        if func is aten.cumsum.default and args[1] % args[0].dim() != args[0].dim() - 1:
            self.serial.append(tuple(args[0].shape))
        if self._waits(func, args):
            self.waits[str(func)] += 1
        if func in INDEXING and func is not aten.index.Tensor and not any(args[3:4]) and args[2].numel() > 1:
            places = torch.stack([_held(t).flatten() for t in args[1] if t is not None and t.dtype != torch.bool] or [
                torch.arange(args[2].numel())
            ])  # fmt: skip
            self.raced += places.shape[1] - torch.unique(places, dim=1).shape[1]
        out = func(*_held(args), **{name: _held(value) for name, value in kwargs.items()})
        if func is aten.copy_.default:
            return args[0]
        return _told(out, there)

    @staticmethod
    def _waits(func: Any, args: Any) -> bool:
        if func is aten.copy_.default:
            return not isinstance(args[0], OnDevice)
        if func in INDEXING:
            return any(t is not None and t.dtype == torch.bool for t in args[1])
        return func in WAITS


class Devices(TorchFunctionMode):
    """Intercepts calls that move tensors between the host and the device or create them on the device."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            return self.moved(args[0], "cpu").tolist()
        if func is torch.Tensor.cpu:
            return self.moved(args[0], "cpu")
        if func is torch.Tensor.to:
            if len(args) > 1 and isinstance(args[1], torch.Tensor):
                args = (args[0], args[1].device, args[1].dtype)
            target = next((a for a in args[1:] if isinstance(a, (str, torch.device))), kwargs.pop("device", None))
            kind = next((a for a in args[1:] if isinstance(a, torch.dtype)), kwargs.pop("dtype", None))
            tensor = args[0] if target is None else self.moved(args[0], target)
            return tensor if kind is None else func(tensor, kind)
        kwargs.pop("pin_memory", None)
        target = kwargs.get("device")
        drawn = kwargs.get("generator")
        if isinstance(drawn, torch.Generator):
            there = any(isinstance(a, OnDevice) for a in args) or (target and torch.device(target).type == "cuda")
            if bool(there) != (getattr(drawn, "kind", "cpu") == "cuda"):
                raise MixedError(f"{func}: a generator of another device")
        if target is None or torch.device(target).type != "cuda":
            return func(*args, **kwargs)
        del kwargs["device"]
        return self.moved(func(*args, **kwargs), GPU)

    def moved(self, tensor: torch.Tensor, target: Any) -> torch.Tensor:
        if torch.device(target).type == "cuda":
            return tensor if isinstance(tensor, OnDevice) else OnDevice(tensor.detach().clone())
        if isinstance(tensor, OnDevice):
            self.operations.waits["to the host"] += 1
            return tensor.held.clone()
        return tensor


class Drawing(torch.Generator):
    """A host generator that can be created for any device."""

    kind: str

    def __new__(cls, device: Any = "cpu") -> Drawing:
        made = super().__new__(cls)
        made.kind = torch.device(device).type
        return made


# operations take and return tensors and flat lists of them; torch's general tree traversal took most of the time
def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _writes_to_host(func: Any, args: Any, kwargs: Any) -> bool:
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    written = (given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return any(isinstance(t, torch.Tensor) and not isinstance(t, OnDevice) for t in written)


def _held(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_held, value))
    return value.held if isinstance(value, OnDevice) else value


def _told(value: Any, there: dict[int, OnDevice]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_told(one, there) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    # an operation in place returns the tensor that it was given
    return there[id(value)] if id(value) in there else OnDevice(value)


@contextmanager
def pretended(memory: int = 2**36) -> Iterator[Operations]:
    """Makes device=cuda available inside the block, by simulation. memory: free bytes of the device."""
    straight = {
        "__init__": lambda self, device: setattr(self, "device", device),
        "pinned": lambda self, rows, dim: torch.empty(rows, dim),
        "buffer": lambda self, rows, dim: torch.empty(rows, dim, device=self.device),
        "copy": lambda self, into, source: into.copy_(source),
        **{name: lambda self: None for name in ("copied", "computed")},
        **{name: lambda self, event: None for name in ("copies_wait", "computations_wait", "host_waits")},
    }
    operations = Operations()
    with pytest.MonkeyPatch.context() as patch, Devices(operations), operations:
        for name in ("is_available", "is_initialized"):
            patch.setattr(torch.cuda, name, lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(devices, "_triton_fault", lambda: "")
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (memory, 2**37))
        for name in ("memory_reserved", "memory_allocated"):
            patch.setattr(torch.cuda, name, lambda device=None: 0)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        for name in ("max_memory_allocated", "reset_peak_memory_stats", "utilization", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda: 0)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        card = SimpleNamespace(name="NVIDIA Simulated", total_memory=2**37, major=9, minor=0)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
        patch.setattr(torch, "Generator", Drawing)
        patch.setattr(OnDevice, "memory", operations.memory)
        # makes Module.to replace parameters by the moved tensors instead of changing them in place
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        for name, function in straight.items():
            patch.setattr(streaming.CudaStreams, name, function)
        yield operations
