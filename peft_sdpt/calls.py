# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Stores for each call of a model which adapters its layers use, so that several threads can call one model.

PEFT stores the active adapters in the layers. If another thread switched adapters in the middle of a call, the first
layers would use one adapter and the last layers another one. So each call copies the state of all layers when it
begins. The copy is in a context variable. Compiled code cannot read this variable, and reads the attributes of the
layers instead.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

# PEFT's name for the base model without an adapter, in `adapter_names`.
BASE = "__base__"
# Held while adapters are switched, and while a call copies the state of the layers. One lock is enough for all models,
# because it is held for microseconds.
SWITCHING = threading.RLock()


class Activation(NamedTuple):
    """Which adapters a layer uses in a call.

    Attributes:
        enabled: False if the adapters of the layer are disabled.
        active: Names of the active adapters.
        scales: Factor of each adapter, from `set_scale`.
        names: For each sample, the name of the adapter to use instead of the active ones, or `"__base__"`. None if all
            samples use the active adapters.
    """

    enabled: bool
    active: Sequence[str]
    scales: Mapping[str, float]
    names: Sequence[str] | None = None


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
    copied: Collection[AuxiliaryTrainingWrapper] = (),
) -> Iterator[None]:
    """Fix the adapters that the layers of a model use for the time of a call.

    Args:
        layers: The layers of this tuner in the model.
        adapter_names: For each sample, the adapter to use, or `"__base__"`. None if all samples use the active
            adapters.
        copied: Modules that PEFT has copied for adapters of this tuner (`modules_to_save`). They receive the names too.
    """
    with SWITCHING:
        notes = {
            id(layer): Activation(
                not layer.disable_adapters, tuple(layer.active_adapters), dict(layer.sdpt_scale), adapter_names
            )
            for layer in layers
        }
        names: dict[int, Sequence[str]] = {}
        with_names: list[Any] = []
        if adapter_names is not None:
            for module in copied:
                names[id(module)] = [name if name in module._adapters else BASE for name in adapter_names]
                if _pass_names_on not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(_pass_names_on, with_kwargs=True)
            with_names = [*copied, *layers]
            for module in with_names:
                module.sdpt_call_names = names.get(id(module), adapter_names)
    token = _CALL.set(_Call(notes, names, adapter_names is not None))
    try:
        yield
    finally:
        _CALL.reset(token)
        for module in with_names:
            module.sdpt_call_names = None


def activation(layer: Any, adapter_names: Sequence[str] | None = None) -> Activation:
    """Return which adapters a layer uses: those of the current call of its model, or else those of its own state.

    Args:
        layer: A layer of this tuner.
        adapter_names: Names that the layer was called with. They override those of the call.
    """
    call = None if torch.compiler.is_compiling() else _CALL.get()
    noted = None if call is None else call.layers.get(id(layer))
    if noted is None:
        names = adapter_names
        if names is None and (call is None or call.has_names):
            # Compiled code, or a thread or a replica that the base model has made for its own work.
            names = layer.sdpt_call_names
        return Activation(not layer.disable_adapters, layer.active_adapters, layer.sdpt_scale, names)
    return noted if adapter_names is None else noted._replace(names=adapter_names)


def _pass_names_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pass the names of the current call as an argument to a module that PEFT has copied (a forward pre-hook)."""
    call = None if torch.compiler.is_compiling() else _CALL.get()
    names: Any = None if call is None else call.copied.get(id(module))
    if names is None and (call is None or call.has_names):
        names = getattr(module, "sdpt_call_names", None)
    return None if names is None else (args, {**kwargs, "adapter_names": names})
