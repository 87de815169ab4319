"""A device that is only pretended: tensors say that they live on a GPU, their numbers lie in CPU tensors.

On a CPU nobody sees where a GPU would make the host wait: ``.cpu()`` and ``.tolist()`` of a CPU tensor do nothing. Here
every operation on a tensor "of the device" passes through a dispatch mode, which computes it on the CPU, counts what
waits on CUDA, and refuses what CUDA refuses: tensors of both devices in one operation.

What it cannot see: waits inside other libraries' kernels and inside CUDA's own allocator, and anything that this list
(`WAITS`) does not know. `torch.cuda.set_sync_debug_mode` sees these; the same tests use it where there is a GPU.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ivcp_eval
import model_adapters
from ivcp_eval.engine import fork

SHOWN, HELD = "cuda", "meta"  # the dispatcher is told the latter, which initialises no driver
CPU = torch.device("cpu")

#: Whose code a wait is, of the two: that of the innermost frame.
PROJECT = tuple(f"{Path(str(package.__file__)).parent}/" for package in (ivcp_eval, model_adapters))
STOCK = f"{Path(transformers.__file__).parent}/"
#: Where a wait is said to come from; not the functions that stand around others.
OURS = (
    "/ivcp_eval/methods/",
    "/ivcp_eval/engine/prefill",
    "/ivcp_eval/engine/hooks",
    "/ivcp_eval/engine/s",
    "/ivcp_eval/engine/d",
    "/ivcp_eval/engine/fork/",
)
#: Operations whose CUDA kernels read from the device before they return.
WAITS = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "item"),
        *("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
        *("bincount", "histc", "multinomial", "_to_sparse", "_coalesce", "isin"),
        *("linalg_eigh", "_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "linalg_inv_ex", "linalg_cholesky_ex"),
    }
)


class Pretended(Tensor):
    """A tensor of the pretended device; ``held`` has its numbers."""

    held: Tensor
    number: int

    @staticmethod
    def __new__(cls, held: Tensor, number: int = 0) -> Pretended:
        device = torch.device(HELD, number)
        options: dict[str, Any] = {"dtype": held.dtype, "device": device, "layout": held.layout}
        if held.layout == torch.strided:
            options |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: Pretended = torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)  # type: ignore[attr-defined]
        made.held, made.number = held, number
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of `pretended`")


class _Shown(TorchFunctionMode):
    """To Python the device is a GPU; and what leaves tensors without an operation is made one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        first = args[0] if args else None
        if func == Tensor.device.__get__ and isinstance(first, Pretended):  # type: ignore[attr-defined]
            return torch.device(SHOWN, first.number)
        if func == Tensor.is_cuda.__get__ and isinstance(first, Pretended):  # type: ignore[attr-defined]
            return True
        if func == Tensor.is_meta.__get__ and isinstance(first, Pretended):  # type: ignore[attr-defined]
            return False
        if func is torch.device:
            return func(*args, **given)
        if func is Tensor.tolist and isinstance(first, Pretended):
            return first.cpu().tolist()
        if func is Tensor.numpy and isinstance(first, Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, Pretended):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # A list of places is sent to the device.
            index = tuple(
                torch.tensor(part, dtype=torch.int64).to(torch.device(HELD, first.number))
                if isinstance(part, list)
                else part
                for part in index
            )
            args = (first, index, *args[2:])
        args, given = mapped(_held_device, args), mapped(_held_device, given)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            device = given.pop("device", None)
            device = first.device if device is None and isinstance(first, Pretended) else device
            values, *rest = args if func is not Tensor.new_tensor else args[1:]
            if isinstance(values, list | tuple):  # CUDA reads each number
                values = mapped(lambda part: part.item() if isinstance(part, Pretended) else part, values)
            made = (torch.tensor if func is Tensor.new_tensor else func)(values, *rest, **given)
            return made if device is None or isinstance(made, Pretended) else made.to(_held_device(device))
        return func(*args, **given)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``change`` of everything in a nest of tuples, lists and dictionaries."""
    if type(value) in (tuple, list):
        return type(value)([mapped(change, part) for part in value])
    return {key: mapped(change, part) for key, part in value.items()} if isinstance(value, dict) else change(value)


def _held_device(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == SHOWN:
        value = torch.device(value)
    return torch.device(HELD, value.index or 0) if isinstance(value, torch.device) and value.type == SHOWN else value


class Waits(TorchDispatchMode):
    """Computes on the CPU, and counts by name.

    Attributes:
        reads: operations that wait for a value of the device. sends: copies to the device that wait for all work
            queued before, which those with ``non_blocking`` do not. where: the innermost lines of the project for each.
        own: of both, those that the project's code asks for and not transformers'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.sends, self.where, self.own = (Counter[str]() for _ in range(4))

    @property
    def total(self) -> int:
        """All of them."""
        return self.reads.total() + self.sends.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        ours: list[Pretended] = []
        others: list[Tensor] = []

        def taken(value: Any) -> Any:
            if isinstance(value, Pretended):
                ours.append(value)
                return value.held
            if isinstance(value, Tensor):
                others.append(value)
            return value

        real_args, real_given = mapped(taken, args), mapped(taken, given)
        name = func.name().removeprefix("aten::").partition(".")[0]
        # The device of the result: of the operands with dimensions, unless it is named.
        place = next((tensor.number for tensor in sorted(ours, key=lambda tensor: not tensor.ndim)), None)
        if given.get("device") is not None:
            named = torch.device(given["device"])
            place = named.index or 0 if named.type == HELD else None
            real_given["device"] = CPU
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, given, place is not None)
        elif ours:
            self._check(func, name, args, ours, others)
        result = func(*real_args, **real_given)
        if place is None:
            return result
        if _in_place(func):
            return args[0]
        return mapped(lambda value: Pretended(value, place) if isinstance(value, Tensor) else value, result)

    def _copy(self, name: str, args: Sequence[Any], given: Mapping[str, Any], to_ours: bool) -> None:
        source = args[1] if name == "copy_" else args[0]
        target_ours = isinstance(args[0], Pretended) if name == "copy_" else to_ours
        if not source.numel():  # returns before it copies
            return
        blocking = not (given.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if isinstance(source, Pretended) and not target_ours:
            self._count(self.reads, "copy to the host")
        elif not isinstance(source, Pretended) and target_ours and blocking:
            self._count(self.sends, "copy to the device")

    def _check(
        self, func: Any, name: str, args: Sequence[Any], ours: Sequence[Pretended], others: Sequence[Tensor]
    ) -> None:
        if len({tensor.number for tensor in ours if tensor.ndim}) > 1:
            raise RuntimeError(f"{func}: tensors are on the devices {[tensor.number for tensor in ours]}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            self._index(name, args)
            return
        if mixed := [other for other in others if other.ndim]:
            raise RuntimeError(f"{func}: tensors of shapes {[tuple(m.shape) for m in mixed]} are on the host")
        if name in WAITS or (name == "repeat_interleave" and "Tensor" in func._overloadname):
            self._count(self.reads, name)

    def _index(self, name: str, args: Sequence[Any]) -> None:
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, Pretended):  # CUDA copies it
                self._count(self.sends, "index on the host")
            if index.dtype in (torch.bool, torch.uint8):
                filled = name != "index" and isinstance(args[2], Tensor) and args[2].numel() == 1
                if not filled:  # else it is a masked fill
                    self._count(self.reads, "boolean index")

    def _count(self, counter: Counter[str], name: str) -> None:
        counter[name] += 1
        start = sys._getframe(2)
        inner = _outwards(start, (*PROJECT, STOCK), str.startswith)
        if inner is not None and not inner.f_code.co_filename.startswith(STOCK):
            self.own[f"{Path(inner.f_code.co_filename).name}:{inner.f_lineno} {name}"] += 1
        frame = _outwards(start, OURS, str.__contains__)
        place = "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.where[f"{place} {name}"] += 1


def _outwards(frame: FrameType | None, parts: Sequence[str], fits: Callable[[str, str], bool]) -> FrameType | None:
    """The innermost frame from here on whose file one of the ``parts`` fits."""
    while frame is not None and not any(fits(frame.f_code.co_filename, part) for part in parts):
        frame = frame.f_back
    return frame


@functools.cache
def _in_place(func: Any) -> bool:
    first = func._schema.arguments[0] if func._schema.arguments else None
    return bool(first and first.alias_info and first.alias_info.is_write and func._schema.returns)


def on_device(value: Any) -> Any:
    """A tensor, or any nest of them, on the first pretended device."""
    given = dict(value) if isinstance(value, Mapping) else value
    return mapped(lambda part: Pretended(part) if isinstance(part, Tensor) else part, given)


def model_on_device(model: nn.Module, place: Callable[[str], int] = lambda _name: 0) -> nn.Module:
    """A copy of the model whose parameters and buffers are on pretended devices.

    Args:
        place: number of the device of what a module of this name holds itself.
    """
    model = copy.deepcopy(model)
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = Pretended(tensor.data, place(prefix))
    return model


@contextmanager
def pretended() -> Iterator[Waits]:
    """While the block runs there is a pretended device; gives what waits for it."""
    waits = Waits()
    with torch.no_grad(), waits, _Shown():
        yield waits


@contextmanager
def limited_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> Iterator[list[int]]:
    """More than ``most`` variants of a fork together run out of memory; yields the numbers that were tried."""
    tried: list[int] = []
    join = fork.join

    def tight(ends: Any, length: int) -> Any:
        tried.append(len(ends))
        if len(ends) > most:
            raise torch.OutOfMemoryError("injected")
        return join(ends, length)

    with monkeypatch.context() as patch:
        patch.setattr(fork, "join", tight)
        yield tried
