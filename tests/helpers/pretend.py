# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A pretend GPU, for machines without one.

A tensor on the device "pretend" holds its values on the CPU. As on CUDA, it refuses to meet tensors of the CPU. Each
operation that makes the CPU wait for the device is noted, with the line that asked for it:

    with pretend_gpu() as syncs:
        model.to("pretend")(**inputs)
    assert not syncs.of("peft_sdpt/")

Results equal those of the CPU, up to rounding where code looks at the type of the device. `model.to("cpu")` brings a
model back. A few functions of PyTorch, for instance the gradient of `prod`, do not wait for tensors of a subclass such
as these, so their waits are not noted. `torch.profiler` shows them on the CPU.

PyTorch has room for one backend that is written in Python. The first use registers it for the whole process. It says
that it is not available, so other tests in the process see no accelerator. PyTorch would prefer it to a real GPU, so
tests that use it are skipped on machines with one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from peft_sdpt import weights

NAME = "pretend"
aten = torch.ops.aten

# Operations whose result decides what the CPU does next, or has a size that only the device knows.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten._linalg_svd.default: "svd",
    aten._linalg_eigh.default: "eigh",
    aten.linalg_lstsq.default: "lstsq",
    aten._linalg_check_errors.default: "check of errors",
}
COPIES = {aten.copy_.default, aten.copy.default}
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# These take no scalar of the CPU for a tensor.
STRICT = {aten.cat.default, aten.stack.default, aten.mm.default, aten.bmm.default, aten.gather.default}


class Sync(NamedTuple):
    """A wait for the device: what asked for it, and the innermost line outside of PyTorch."""

    kind: str
    where: str


class Syncs(list):
    """The waits in their order."""

    def of(self, path: str = "") -> list[Sync]:
        """Return the waits that a file asked for whose path has this part."""
        return [sync for sync in self if path in sync.where]


_log = Syncs()


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Syncs]:
    """Make the device "pretend" usable in this context. Yields the log of waits, which may be cleared."""
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU")
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of PyTorch has no backends in Python")
    _register()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    _log.clear()
    # Parameters become other objects in `module.to`, as the values of the old ones are elsewhere.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # Without it, `torch.tensor(values, device=...)` copies where no mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        # The backward pass in this thread. The engine may have started its threads before the device was there.
        with torch.autograd.set_multithreading_enabled(False), _taken_as_plain(), _Everywhere():
            yield _log
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def _taken_as_plain():
    """The tuner takes tensors of a class that it does not know for quantised ones, which cost it its fast paths."""
    is_plain = weights._is_plain
    return mock.patch.object(weights, "_is_plain", lambda stored: _is_here(stored) or is_plain(stored))


@functools.cache
def _register() -> None:
    class Module(backend_registration._DummyBackendModule):
        def is_available(self) -> bool:
            return False

        def device_count(self) -> int:
            return 0

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    class Hook(backend_registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:
            return False

    backend_registration._setup_privateuseone_for_python_backend(NAME, Module(), Hook())


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device, with its values in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __repr__(self, **_) -> str:  # type: ignore[override]
        return f"PretendTensor({self.inner!r})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def is_set_to(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, PretendTensor) and self.inner.is_set_to(tensor.inner)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, PretendTensor) and (value.shape, value.dtype) == (self.shape, self.dtype)
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees operations without a tensor of the device too: those that make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _is_here(value: object) -> bool:
    return isinstance(value, PretendTensor)


def _run(func, args, kwargs):
    """Run an operation on the values, as the device would."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    here = any(map(_is_here, tensors))
    device = kwargs.get("device")
    target = here if device is None else torch.device(device).type == NAME
    if func is aten._to_copy.default:
        _note_copy(here, target, kwargs.get("non_blocking"))
    elif func in COPIES:
        target = _is_here(args[0])
        _note_copy(_is_here(args[1]), target, args[2:3] == (True,))
    elif here:
        _refuse_cpu(func, args, tensors)
        if func in WAITING:
            _note(WAITING[func])
        elif func in INDEXING:
            _note_indices(args)
    if not (here or target):
        return func(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # as operations of their own, since the fused kernels of the CPU have other names
    if target and device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    result = func(*_unwrapped(args), **_unwrapped(kwargs))
    if written := _written(func, args, kwargs):
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(_wrapped, result) if target else result


def _wrapped(value):
    return PretendTensor(value) if isinstance(value, torch.Tensor) else value


def _unwrapped(values):
    return tree_map(lambda value: value.inner if _is_here(value) else value, values)


def _written(func, args, kwargs) -> list:
    """Return the arguments that an operation in place writes to, if it returns them."""
    schema = func._schema
    if not any(result.alias_info and result.alias_info.is_write for result in schema.returns):
        return []
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    return [given[each.name] for each in schema.arguments if each.alias_info and each.alias_info.is_write]


def _note_copy(source: bool, target: bool, non_blocking) -> None:
    if source != target and not non_blocking:
        _note("to the CPU" if source else "to the device")


def _note_indices(args) -> None:
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            _note("boolean index")
        elif isinstance(index, torch.Tensor) and not _is_here(index):
            _note("to the device")


def _refuse_cpu(func, args, tensors) -> None:
    """Raise the error of CUDA where a tensor of the CPU meets one of the device."""
    if func in INDEXING:
        # Indices may be on the CPU if what they index is not. They are copied.
        if not _is_here(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [args[0], *args[2:3]]
    foreign = [each for each in tensors if not _is_here(each) and (each.dim() > 0 or func in STRICT)]
    if foreign:
        shapes = [tuple(each.shape) for each in foreign]
        raise RuntimeError(f"Expected all tensors to be on the same device, got {shapes} on the CPU in {func}")


def _note(kind: str) -> None:
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}" if frame else "?"
    _log.append(Sync(kind, where))
