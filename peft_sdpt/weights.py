# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The weight of a frozen projection: dense whatever keeps it, and whether it is still what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import nn

from .inverse import inverse_projection, reachable_basis


def inverse_of(query: nn.Module, rtol: float | None) -> torch.Tensor:
    """Inverse of a projection, as `inverse_projection` takes it of its dense weight.

    Raises:
        TypeError: the weight is of no floating point dtype and of no known quantisation.
    """
    with _dense_weight(query) as weight:
        return inverse_projection(weight, rtol)


def basis_of(queries: Sequence[nn.Module]) -> torch.Tensor:
    """Basis of what projections reach, as `reachable_basis` takes it of their dense weights."""
    weights = []
    for query in queries:
        with _dense_weight(query) as weight:
            # A copy, because a gathered weight is gone after this.
            weights.append(weight.detach().clone())
    return reachable_basis(weights)


@contextmanager
def _dense_weight(query: nn.Module) -> Iterator[torch.Tensor]:
    """The map that the host applies, `(out_features, in_features)`.

    Weights that DeepSpeed ZeRO-3 or FSDP2 have sharded are gathered for it, by all processes together; quantised ones
    are what they stand for. Known are the dynamic int8 of PyTorch, torchao and bitsandbytes.
    """
    module = query.get_base_layer() if isinstance(query, BaseTunerLayer) else query
    if callable(module.weight):  # dynamic int8
        yield module.weight().dequantize()
        return
    # On its own device: adapters may be attached under a default of "meta".
    with gather_params_ctx([module.weight]), torch.device(module.weight.device):
        if type(module.weight).__name__ == "Int8Params":
            # On the CPU, PEFT 0.21's way leaves bitsandbytes' layer without its scales.
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = module.weight.data * scales[:, None] / 127
        else:
            weight = dequantize_module_weight(module)
        if hasattr(weight, "full_tensor"):  # FSDP2
            weight = weight.full_tensor()
        yield weight


def bias_of(query: nn.Module) -> torch.Tensor | None:
    """Bias of a projection, `(out_features,)`."""
    return query.bias() if callable(query.bias) else query.bias


def device_and_dtype(query: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a projection computes and what it takes: of a quantised one that computes wider than it stores, float32."""
    if callable(query.weight):
        return torch.device("cpu"), torch.float32
    dtype = query.weight.dtype
    return query.weight.device, dtype if dtype.is_floating_point else torch.float32


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a projection is its weight and bias and nothing else, so that others may calculate with them: no adapter,
    no quantisation, no weights that are gathered or fetched by a call, no hooks that watch one."""
    return (
        type(module) is nn.Linear
        and _is_plain(module.weight)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


class TensorState(NamedTuple):
    """What a tensor was. The alias keeps the storage alive: no later tensor can come to lie at its address unseen."""

    alias: torch.Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorState:
        return cls(tensor.detach(), _version(tensor))

    def still_holds(self, tensor: torch.Tensor) -> bool:
        if self.alias.is_meta or tensor.is_meta:
            return self.alias.is_meta and tensor.is_meta and self.alias.shape == tensor.shape
        return self.alias.device == tensor.device and self.alias.is_set_to(tensor) and self.version == _version(tensor)


class WeightState(NamedTuple):
    """What the weight of a projection was when its inverse was taken.

    PEFT merges another tuner's adapter through `.data`, which PyTorch does not count; what is merged
    into the projection is therefore part of its state.
    """

    held: Any
    merged: tuple[str, ...]

    @classmethod
    def of(cls, query: nn.Module) -> WeightState:
        held = _held(query)
        return cls(TensorState.of(held) if _is_plain(held) else held, _merged(query))

    @staticmethod
    def is_certain(query: nn.Module) -> bool:
        """Whether a change in place is seen; not of quantised and sharded weights."""
        return _is_plain(_held(query))

    def still_holds(self, query: nn.Module) -> bool:
        held = _held(query)
        if self.merged != _merged(query):
            return False
        if _is_plain(held):
            return isinstance(self.held, TensorState) and self.held.still_holds(held)
        return self.held is held


def _held(query: nn.Module) -> Any:
    """What the weight is kept in: a tensor, or the packed parameters of dynamic int8."""
    return query._packed_params._packed_params if callable(query.weight) else query.weight


def _is_plain(held: Any) -> bool:
    """Whether PyTorch tells of changes; quantised and sharded weights are compared by identity."""
    return type(held) in (torch.Tensor, nn.Parameter) and not hasattr(held, "ds_id")


def _merged(query: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(query, "merged_adapters", ()))


def _version(tensor: torch.Tensor) -> int | None:
    # Inference tensors have no version; a change of one in place is seen by the load hook only.
    return None if tensor.is_inference() else tensor._version


def refuse_adapted(query: nn.Module) -> None:
    """SDPT inverts the host's own map, not the one that another tuner makes of it.

    Raises:
        ValueError: another tuner's adapter acts on the projection without being merged into it.
    """
    if isinstance(query, BaseTunerLayer) and not query.disable_adapters and not query.merged:
        acting = [
            name for name in query.active_adapters if any(name in getattr(query, n) for n in query.adapter_layer_names)
        ]
        if acting:
            raise ValueError(
                f"SDPT inverts a projection that the adapter {acting[0]!r} of another tuner ({type(query).__module__}) "
                "changes in every forward. Merge or disable it, or leave the inverted projections of the fusion layers "
                "out of its target_modules."
            )


def refuse_out_of_reach(query: nn.Module) -> None:
    """An adapter is attached to projections whose weights are here.

    Raises:
        ValueError: FSDP2 has sharded the weight, or Accelerate offloads it.
    """
    if hasattr(query.weight, "full_tensor"):
        raise ValueError(
            "SDPT cannot be attached to a host that fully_shard has sharded already: its layers would bypass the hooks "
            "that gather the weights. Attach SDPT first, and shard the tuned model."
        )
    hook = getattr(query, "_hf_hook", None)
    if any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,))):
        raise ValueError(
            "SDPT cannot be attached to offloaded fusion layers: it needs their weights in every forward. Give "
            "`device_map` a device for them, and offload the backbones."
        )
