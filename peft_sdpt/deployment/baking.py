# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A tuned model as a plain PyTorch model: prompts are buffers of the fusion layers, and no module of PEFT is left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from ..attention import GatedPrompts, Prompts
from ..calls import activation
from ..errors import InputError
from ..hosts import BiAttentionHost, FusionHost
from ..layer import SDPTLayer
from ..lora import SDPTLoraLayer
from ..weights import is_plain_linear

# What PEFT and transformers store in a base model that has adapters.
_CONFIGS, _IS_ADAPTED = "peft_config", "_hf_peft_config_loaded"


class BakedFusionLayer(nn.Module):
    """A fusion layer whose tokens also attend to constant prompts.

    Its outputs are those of `peft_sdpt.SDPTLayer` with the same prompts. Prompts are buffers in the input spaces of the
    sides of the module, and the gates are multiplied by their scales.

    Args:
        fusion_layer: The fusion layer of the base model.
        fusion_host: Its spec.
        prompts: The prompts of each side of the module. They are the same for all samples.
        eager: Whether to compute the attention with its weights, as `attn_implementation="eager"` does.

    Attributes:
        fusion_layer: The module that attends. It is `self` for a bi-directional attention, whose projections keep their
            names in the state dict.
    """

    def __init__(
        self, fusion_layer: nn.Module, fusion_host: FusionHost, prompts: Sequence[Prompts], eager: bool = False
    ) -> None:
        super().__init__()
        self.fusion_host = fusion_host
        self.eager = eager
        self.group_sizes = [() if side.gated is None else side.gated.sizes for side in prompts]
        self._take_over(fusion_layer)
        for index, side in enumerate(prompts):
            gated = (None, None) if side.gated is None else (side.gated.tokens, side.gated.gates)
            # A buffer that is None is not in the state dict.
            for name, tensor in zip(("prompts", "gated_prompts", "gates"), (side.tokens, *gated), strict=True):
                self.register_buffer(f"{name}{index}", None if tensor is None else tensor.detach().clone())

    def _take_over(self, fusion_layer: nn.Module) -> None:
        self.fusion_layer = fusion_layer

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT would put the layer here, around the fusion layer, which this module could then not call.
        if isinstance(value, SDPTLayer):
            raise InputError(
                "model: its fusion layers have the prompts of a baked adapter; attach SDPT to the base model instead."
            )
        super().__setattr__(name, value)

    def prompts(self) -> list[Prompts]:
        """Return the prompts of each side of the module."""
        sides = []
        for index, sizes in enumerate(self.group_sizes):
            tokens, gated, gates = (getattr(self, f"{name}{index}") for name in ("prompts", "gated_prompts", "gates"))
            sides.append(Prompts(tokens, None, None if gated is None else GatedPrompts(gated, sizes, gates)))
        return sides

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the fusion layer with prompts."""
        return self.fusion_host.attend(self.fusion_layer, args, kwargs, self.prompts(), self.eager)

    def extra_repr(self) -> str:
        return f"fusion_host={self.fusion_host.name!r}"


class BakedBiAttention(BakedFusionLayer):
    """A bi-directional attention with constant prompts. It has the projections of the fusion layer as its own."""

    def _take_over(self, fusion_layer: nn.Module) -> None:
        for name in self.fusion_host.needed:
            setattr(self, name, getattr(fusion_layer, name))

    @property
    def fusion_layer(self) -> nn.Module:  # type: ignore[override] # nobody assigns it here
        return self


@torch.inference_mode(False)
@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Copy a tuned model as a plain PyTorch model, which computes the same without PEFT.

    The active adapters are built in: prompts are buffers of the fusion layers, gates and scales are multiplied, the
    LoRA part is merged into the weights, and modules in `modules_to_save` replace those of the base model. What no
    active adapter uses is not copied. A fusion layer whose gates are all zero stays as it is in the base model.

    The copy has the class of the base model, for instance `GroundingDinoForObjectDetection`, and so its config and its
    methods. It can be copied, pickled, moved, cast, compiled and exported. Another adapter of SDPT cannot be attached
    to its fusion layers.

    Args:
        model: A model with active SDPT adapters: a `PeftModel`, or a model that PEFT or transformers has injected
            adapters into. It stays unchanged.

    Returns:
        The copy, in evaluation mode and frozen, on the devices and in the dtypes of the model.

    Raises:
        InputError: The model has no SDPT adapter, none is active, the adapters are disabled, an adapter of another
            tuner is not merged, or the LoRA part is on a quantised layer.
        ValueError: The weight of a projection that is inverted is not finite.
    """
    base = _unwrapped(model)
    modules = dict(base.named_modules())
    _check(modules)
    # What `deepcopy` is to put in the place of an object, by the id of the object.
    memo: dict[int, Any] = {}
    for module in modules.values():
        if _CONFIGS in module.__dict__:
            memo[id(module.__dict__[_CONFIGS])] = None
    # A module follows the modules in it, so that a copy of it has their replacements.
    for module in reversed(modules.values()):
        if isinstance(module, SDPTLayer):
            memo[id(module)] = _baked(module, memo)
        elif isinstance(module, SDPTLoraLayer):
            memo[id(module)] = _merged(module, memo)
        elif isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            used = module.modules_to_save[active[0]] if active else module.original_module
            memo[id(module)] = copy.deepcopy(used, memo)
        elif isinstance(module, BaseTunerLayer):
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
        elif isinstance(module, OptimizedModule):
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    copied = copy.deepcopy(base, memo)
    for module in copied.modules():
        for name in (_CONFIGS, _IS_ADAPTED):
            module.__dict__.pop(name, None)
    return copied.eval().requires_grad_(False)


def has_prompts(model: nn.Module) -> bool:
    """Return whether a model has SDPT adapters, so that it can be baked."""
    return any(isinstance(module, (SDPTLayer, SDPTLoraLayer)) for module in model.modules())


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the base model within the wrappers of PEFT and `torch.compile`."""
    while isinstance(model, (PeftModel, OptimizedModule)):
        inner = model.get_base_model() if isinstance(model, PeftModel) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _check(modules: dict[str, nn.Module]) -> None:
    """Check that a model can be baked.

    Args:
        modules: All modules of the base model, by their full names.

    Raises:
        InputError: It cannot be baked.
    """
    root = type(modules[""]).__name__
    layers = [module for module in modules.values() if isinstance(module, (SDPTLayer, SDPTLoraLayer))]
    if not layers:
        raise InputError(f"model={root}: has no SDPT adapter to bake; attach or load one with PEFT first.")
    if any(layer.disable_adapters for layer in layers):
        raise InputError(f"model={root}: its adapters are disabled; bake it outside of disable_adapter().")
    if not any(set(activation(layer).active) & layer.sdpt_scale.keys() for layer in layers):
        names = sorted({name for layer in layers for name in layer.sdpt_scale})
        raise InputError(f"model={root}: none of its SDPT adapters {names} is active; call set_adapter first.")
    for name, module in modules.items():
        if isinstance(module, (SDPTLayer, SDPTLoraLayer, ModulesToSaveWrapper)):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or (isinstance(module, BaseTunerLayer) and not module.merged):
            raise InputError(
                f"model={root}: '{name}' has an adapter of another tuner ({type(module).__name__}) that is not merged. "
                "Merge it with merge_and_unload() before SDPT is attached, or remove it."
            )


def _baked(layer: SDPTLayer, memo: dict[int, Any]) -> nn.Module:
    """Return what replaces a layer: a fusion layer with prompts, or that of the base model if no prompt has an effect.

    Args:
        layer: The layer.
        memo: The memo of `deepcopy`.
    """
    fusion_layer = copy.deepcopy(layer.base_layer, memo)
    state = activation(layer)
    active, scales = state.active, state.scales
    names = [name for name in active if name in layer.sdpt_prompts and _has_effect(layer, name, scales[name])]
    # Without the dropout of prompts. It is a copy, because other threads may train or call the layer.
    quiet = copy.copy(layer)
    quiet.training = False
    prompts = quiet.input_prompts(names, scales=scales)
    if all(side.tokens is None and side.gated is None for side in prompts):
        return fusion_layer
    eager = any(layer.sdpt_config[name].attn_implementation == "eager" for name in names)
    kind = BakedBiAttention if isinstance(layer.fusion_host, BiAttentionHost) else BakedFusionLayer
    return kind(fusion_layer, layer.fusion_host, prompts, eager)


def _has_effect(layer: SDPTLayer, name: str, scale: float) -> bool:
    if name not in layer.sdpt_gates:
        return scale != 0
    return bool(layer.gate_factors(name, scale).any())


def _merged(layer: SDPTLoraLayer, memo: dict[int, Any]) -> nn.Module:
    """Return the linear layer of the base model with the LoRA parts of the active adapters in its weight.

    Raises:
        InputError: The weight is quantised.
    """
    linear: Any = copy.deepcopy(layer.get_base_layer(), memo)
    state = activation(layer)
    active, scales = state.active, state.scales
    changes = [
        layer.sdpt_lora_B[name] @ layer.sdpt_lora_A[name] * (layer.sdpt_lora_scaling[name] * scales[name])
        for name in active
        if name in layer.sdpt_lora_A and scales[name] != 0
    ]
    if not changes:
        return linear
    if not is_plain_linear(linear):
        raise InputError(
            f"model: the LoRA part of an adapter cannot be merged into a {type(linear).__name__}, for instance because "
            "its weight is quantised. Load the base model without quantisation, bake it, and quantise the copy."
        )
    weight = linear.weight
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for change in changes:
        merged = merged + change.to(merged.dtype)
    # A new parameter, because the copied one may be tied to another module.
    linear.weight = nn.Parameter(merged.to(weight.dtype))
    return linear
