# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Stores for each call of a model which adapters its layers use, so that several threads can call one model.

PEFT stores the active adapters in the layers. If another thread switched adapters in the middle of a call, the first
layers would use one adapter and the last layers another one. So each call copies the state of all layers when it
begins. The copy is in a context variable. Compiled code cannot read this variable, and reads the attributes of the
layers instead.

Which adapter each sample of a mixed batch uses is a tensor, which is made once for each call. A compiled base model
gets it from outside, and does not depend on the names.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

# PEFT's name for the base model without an adapter, in `adapter_names`.
BASE = "__base__"
# Held while adapters are switched, and while a call copies the state of the layers. One lock is enough for all models,
# because it is held for microseconds.
SWITCHING = threading.RLock()


class Choice(NamedTuple):
    """Which adapter each sample of a batch uses, as a tensor.

    Attributes:
        adapters: Names of adapters.
        places: For each sample, the place of its adapter in `adapters`; `len(adapters)` is the base model. `(B,)`,
            int64.
    """

    adapters: tuple[str, ...]
    places: torch.Tensor

    @classmethod
    def of(cls, adapter_names: Sequence[str], device: torch.device) -> Choice:
        """Return a choice among the adapters that the samples use.

        Args:
            adapter_names: For each sample, the adapter to use, or `"__base__"`.
            device: The device of the places.
        """
        return _choices(adapter_names, (), device)[0]

    def check_length(self, num_inputs: int) -> None:
        """Check that there is one adapter for each input.

        Raises:
            ValueError: Their numbers differ. The message is PEFT's own, because callers may look for it.
        """
        if self.places.shape[0] != num_inputs:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{self.places.shape[0]} and {num_inputs} respectively."
            )

    def uses(self, adapter: str) -> torch.Tensor:
        """Return which samples use an adapter, `(B,)`, bool."""
        return self.places == self.adapters.index(adapter)

    def take(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor of each sample, `(B, ...)`. It is zero for samples whose adapter has none.

        Args:
            tensors: Tensors of the same shape, by the names of their adapters.
        """
        zeros = torch.zeros_like(next(iter(tensors.values())))
        return torch.stack([*(tensors.get(name, zeros) for name in self.adapters), zeros])[self.places]


def _choices(adapter_names: Sequence[str], all_adapters: Sequence[str], device: torch.device) -> tuple[Choice, Choice]:
    """Return choices among the adapters that the samples use, and among all adapters, in one copy to the device."""
    used = tuple(name for name in dict.fromkeys(adapter_names) if name != BASE)
    rows = []
    for adapters in (used, all_adapters):
        place = {name: number for number, name in enumerate(adapters)}
        rows.append([place.get(name, len(place)) for name in adapter_names])
    # A copy that blocks would wait for the GPU.
    places = torch.tensor(rows, device="cpu").to(device, non_blocking=True)
    return Choice(used, places[0]), Choice(tuple(all_adapters), places[1])


class Activation(NamedTuple):
    """Which adapters a layer uses in a call.

    Attributes:
        enabled: False if the adapters of the layer are disabled.
        active: Names of the active adapters.
        scales: Factor of each adapter, from `set_scale`.
        choice: The adapter of each sample, which it uses instead of the active ones. None if all samples use the active
            adapters.
        silent: Whether the gates of an adapter are all zero, by its name, where this was read before the call.
    """

    enabled: bool
    active: Sequence[str]
    scales: Mapping[str, float]
    choice: Choice | None = None
    silent: Mapping[str, bool] = MappingProxyType({})


class _Call(NamedTuple):
    """The state of a call of a model."""

    # By the id of the layer.
    layers: dict[int, Activation]
    # By the id of a module that PEFT has copied for adapters: for each sample, the adapter whose copy it uses.
    copied: dict[int, Sequence[str]]
    has_names: bool


_CALL: ContextVar[_Call | None] = ContextVar("peft_sdpt_call", default=None)


@contextmanager
def calling(
    layers: Collection[Any],
    adapter_names: Sequence[str] | None = None,
    copied: Collection[Any] = (),
    adapters: Sequence[str] = (),
    silent: Mapping[int, Mapping[str, bool]] = MappingProxyType({}),
) -> Iterator[None]:
    """Fix the adapters that the layers of a model use for the time of a call.

    Args:
        layers: The layers of this tuner in the model.
        adapter_names: For each sample, the adapter to use, or `"__base__"`. None if all samples use the active
            adapters.
        copied: Modules that PEFT has copied for adapters of this tuner (`modules_to_save`). They receive the names too.
        adapters: Names of all adapters of this tuner. Compiled layers choose among them, so that the same code is
            valid for all `adapter_names`.
        silent: What `read_gates` of `layer.py` has read for this call.
    """
    compiling = torch.compiler.is_compiling()
    choices: dict[torch.device, tuple[Choice | None, Choice | None]] = {}
    for device in {layer.device_of_adapters for layer in layers}:
        choices[device] = (None, None) if adapter_names is None else _choices(adapter_names, adapters, device)
    names: dict[int, Sequence[str]] = {}
    with nullcontext() if compiling else SWITCHING:
        notes: dict[int, Activation] = {}
        if not compiling:
            for layer in layers:
                choice = choices[layer.device_of_adapters][0]
                notes[id(layer)] = Activation(
                    not layer.disable_adapters,
                    tuple(layer.active_adapters),
                    dict(layer.sdpt_scale),
                    choice,
                    silent.get(id(layer), {}),
                )
        if adapter_names is not None:
            for module in copied:
                names[id(module)] = [name if name in module._adapters else BASE for name in adapter_names]
                if _pass_names_on not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(_pass_names_on, with_kwargs=True)
                module.sdpt_call_names = names[id(module)]
            for layer in layers:
                layer.sdpt_call, layer.sdpt_compiled_call = choices[layer.device_of_adapters]
    token = None if compiling else _CALL.set(_Call(notes, names, adapter_names is not None))
    try:
        yield
    finally:
        if token is not None:
            _CALL.reset(token)
        if adapter_names is not None:
            for module in copied:
                module.sdpt_call_names = None
            for layer in layers:
                layer.sdpt_call = layer.sdpt_compiled_call = None


def activation(layer: Any, adapter_names: Sequence[str] | None = None) -> Activation:
    """Return which adapters a layer uses: those of the current call of its model, or else those of its own state.

    Args:
        layer: A layer of this tuner.
        adapter_names: Names that the layer was called with. They override those of the call.
    """
    choice = None if adapter_names is None else Choice.of(adapter_names, layer.device_of_adapters)
    if torch.compiler.is_compiling():
        choice = layer.sdpt_compiled_call if choice is None else choice
        return Activation(not layer.disable_adapters, layer.active_adapters, layer.sdpt_scale, choice)
    call = _CALL.get()
    noted = None if call is None else call.layers.get(id(layer))
    if noted is not None:
        return noted if choice is None else noted._replace(choice=choice)
    if choice is None and (call is None or call.has_names):
        # A thread or a replica that the base model has made for its own work.
        choice = layer.sdpt_call
    return Activation(not layer.disable_adapters, layer.active_adapters, layer.sdpt_scale, choice)


def _pass_names_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pass the names of the current call as an argument to a module that PEFT has copied (a forward pre-hook)."""
    call = None if torch.compiler.is_compiling() else _CALL.get()
    names: Any = None if call is None else call.copied.get(id(module))
    if names is None and (call is None or call.has_names):
        names = getattr(module, "sdpt_call_names", None)
    return None if names is None else (args, {**kwargs, "adapter_names": names})
