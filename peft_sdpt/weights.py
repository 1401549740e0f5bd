# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the weight of a frozen projection, however it is stored, and detects whether it has changed.

Projections are typed as `nn.Linear`. They may be another tuner's layer or a quantised one, which act like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def dense_weight(projection: nn.Linear) -> Iterator[torch.Tensor]:
    """Yield the weight that a projection applies, `(out_features, in_features)`.

    Weights that DeepSpeed ZeRO-3 or FSDP2 have sharded are gathered, by all processes together. Quantised weights are
    dequantised: the dynamic int8 of PyTorch, torchao and bitsandbytes are supported.
    """
    module: Any = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    if callable(module.weight):  # dynamic int8
        yield module.weight().dequantize()
        return
    # On the weight's own device, because adapters may be attached under a default device of "meta".
    with gather_params_ctx([module.weight]), torch.device(module.weight.device):
        if type(module.weight).__name__ == "Int8Params":
            # On the CPU, PEFT 0.21 would leave bitsandbytes' layer without its scales.
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = module.weight.data * scales[:, None] / 127
        else:
            weight = dequantize_module_weight(module)
        if hasattr(weight, "full_tensor"):  # FSDP2
            weight = weight.full_tensor()
        yield weight


def bias_of(projection: nn.Linear) -> torch.Tensor | None:
    """Return the bias of a projection, `(out_features,)`."""
    bias: Any = projection.bias
    return bias() if callable(bias) else bias


def device_and_dtype(projection: nn.Linear) -> tuple[torch.device, torch.dtype]:
    """Return the device of a projection and the dtype of its inputs; float32 if its weight is quantised."""
    weight: Any = projection.weight
    if callable(weight):
        return torch.device("cpu"), torch.float32
    return weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a projection is nothing but its weight and bias, so that they may be used without calling it.

    A projection with an adapter, quantisation or hooks is not, nor is one whose weights a call gathers or fetches.
    """
    return (
        type(module) is nn.Linear
        and _is_plain(module.weight)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


class TensorState(NamedTuple):
    """State of a tensor. The alias keeps its storage alive, so that no later tensor can take its address.

    The state of a tensor that requires gradients includes its values, because the fused optimizers of PyTorch 2.13
    write to a tensor without raising its version.
    """

    alias: torch.Tensor
    version: int | None
    values: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorState:
        values = tensor.detach().clone() if tensor.requires_grad and not tensor.is_meta else None
        return cls(tensor.detach(), _version(tensor), values)

    def still_holds(self, tensor: torch.Tensor) -> bool:
        if self.alias.is_meta or tensor.is_meta:
            return self.alias.is_meta and tensor.is_meta and self.alias.shape == tensor.shape
        same_memory = self.alias.device == tensor.device and self.alias.is_set_to(tensor)
        if not same_memory or self.version != _version(tensor):
            return False
        if self.values is None:
            # A tensor that requires gradients now may have been changed without a new version. The next state has its
            # values.
            return not tensor.requires_grad
        return torch.equal(self.values, tensor.detach())


class WeightState(NamedTuple):
    """State of the weight of a projection.

    PEFT merges another tuner's adapter through `.data`, which PyTorch does not count. The names of the merged adapters
    are therefore part of the state.
    """

    stored: Any
    merged: tuple[str, ...]

    @classmethod
    def of(cls, projection: nn.Linear) -> WeightState:
        stored = _stored(projection)
        return cls(TensorState.of(stored) if _is_plain(stored) else stored, _merged(projection))

    @property
    def has_values(self) -> bool:
        """Whether the values of the weight are part of the state."""
        return isinstance(self.stored, TensorState) and self.stored.values is not None

    @staticmethod
    def is_certain(projection: nn.Linear) -> bool:
        """Return whether changes in place are detected. For quantised and sharded weights, they are not."""
        return _is_plain(_stored(projection))

    def still_holds(self, projection: nn.Linear) -> bool:
        stored = _stored(projection)
        if self.merged != _merged(projection):
            return False
        if _is_plain(stored):
            return isinstance(self.stored, TensorState) and self.stored.still_holds(stored)
        return self.stored is stored


def _stored(projection: nn.Linear) -> Any:
    """Return what holds the weight: a tensor, or the packed parameters of dynamic int8."""
    packed: Any = projection
    return packed._packed_params._packed_params if callable(packed.weight) else packed.weight


def _is_plain(stored: Any) -> bool:
    """Return whether PyTorch counts changes of this tensor. Quantised and sharded weights are compared by identity.

    `torch.export` puts fake tensors in the place of weights. They act like the weights that they stand for.
    """
    return type(stored) in (torch.Tensor, nn.Parameter, FakeTensor) and not hasattr(stored, "ds_id")


def is_sharded(parameter: torch.Tensor) -> bool:
    """Return whether FSDP2 or DeepSpeed ZeRO-3 has sharded a parameter. Its module gathers it for its forward."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def is_trained(projection: nn.Linear) -> bool:
    """Return whether a training step may change the weight of a projection."""
    return bool(getattr(_stored(projection), "requires_grad", False))


def is_of_inference_mode(projection: nn.Linear) -> bool:
    """Return whether the weight of a projection was made in `torch.inference_mode`."""
    stored = _stored(projection)
    return isinstance(stored, torch.Tensor) and stored.is_inference()


def _merged(projection: nn.Linear) -> tuple[str, ...]:
    return tuple(getattr(projection, "merged_adapters", ()))


def _version(tensor: torch.Tensor) -> int | None:
    # Inference tensors have no version, so only the load hook detects that one was changed in place.
    return None if tensor.is_inference() else tensor._version


def is_adapted(projection: nn.Module) -> bool:
    """Return whether another tuner's adapter acts on a projection without being merged into it."""
    return _acting_adapter(projection) is not None


def _acting_adapter(projection: nn.Module) -> str | None:
    if not isinstance(projection, BaseTunerLayer) or projection.disable_adapters or projection.merged:
        return None
    for name in projection.active_adapters:
        if any(name in getattr(projection, attribute) for attribute in projection.adapter_layer_names):
            return str(name)
    return None


def refuse_adapted(projection: nn.Module) -> None:
    """Check that no other tuner changes a projection: SDPT inverts the base model's own weight.

    Raises:
        ValueError: Another tuner's adapter acts on the projection without being merged into it.
    """
    if name := _acting_adapter(projection):
        raise ValueError(
            f"SDPT inverts a projection that the adapter {name!r} of another tuner ({type(projection).__module__}) "
            "changes in every forward. Merge or disable it, or leave the inverted projections of the fusion layers out "
            "of its target_modules."
        )


def refuse_out_of_reach(projection: nn.Linear) -> None:
    """Check that the weight of a projection is on this machine, in one piece.

    Raises:
        ValueError: FSDP2 has sharded the weight, or Accelerate offloads it.
    """
    if hasattr(projection.weight, "full_tensor"):
        raise ValueError(
            "SDPT cannot be attached to a base model that fully_shard has sharded already: its layers would bypass the "
            "hooks that gather the weights. Attach SDPT first, and shard the tuned model."
        )
    hook = getattr(projection, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        raise ValueError(
            "SDPT cannot be attached to offloaded fusion layers: it needs their weights in every forward. Give "
            "`device_map` a device for them, and offload the backbones."
        )


def refuse_not_finite(projection: nn.Linear) -> None:
    """Check that all numbers of a projection are finite. A matrix with other numbers has no inverse.

    Raises:
        ValueError: The weight or the bias has an infinite number or a NaN.
    """
    with dense_weight(projection) as weight:
        for name, tensor in (("weight", weight), ("bias", bias_of(projection))):
            if tensor is not None and not tensor.is_meta and not bool(tensor.detach().isfinite().all()):
                raise ValueError(
                    f"the {name} of a projection that SDPT inverts has numbers that are not finite. The weights of the "
                    "base model are damaged."
                )
