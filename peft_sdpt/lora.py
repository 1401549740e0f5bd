# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The LoRA part of an adapter: low-rank matrices on linear layers outside the fusion layers (arXiv 2106.09685).

It is a layer of this tuner and not of PEFT's LoRA. So it is trained, saved and switched with the tokens, a LoRA adapter
of PEFT on the same model stays a separate adapter, and any quantised linear layer can have it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, MutableMapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .calls import Choice, activation
from .config import SDPTConfig
from .hosts import GROUNDING_DINO, find_hosts
from .layer import CANNOT_MERGE, SDPTLayer
from .saving import lora_name, plain_name
from .targeting import matches, open_modules, outside_saved
from .weights import device_and_dtype
from .wording import quoted

# The projections of attention and the feed-forward networks in the encoder and the decoder of Grounding DINO and MM
# Grounding DINO. `value_proj` and `output_proj` belong to deformable attention.
DEFAULT_LORA_TARGETS = (
    r"(model\.)?((encoder|decoder)\.)?layers\.\d+\.(.*\.)?"
    r"(query|key|value|out_proj|value_proj|output_proj|fc1|fc2)"
)


class SDPTLoraLayer(nn.Module, BaseTunerLayer):
    """A linear layer W with the LoRA part of adapters: `x -> W x + scaling * B A x`.

    B starts at zero, so a new adapter changes nothing here. If no adapter is active on the layer, or adapters are
    disabled, the outputs are those of W bit for bit. The matrices have the initialization, the scaling and the
    precision of PEFT's LoRA.

    Args:
        base_layer: Linear layer of the base model.
        adapter_name: Name of the first adapter.
        config: Config of the first adapter.

    Attributes:
        sdpt_lora_A: The matrices A, `(r, in_features)`, by adapter name.
        sdpt_lora_B: The matrices B, `(out_features, r)`, by adapter name.
        sdpt_lora_scaling: The factors, by adapter name.
        sdpt_scale: Further factors, by adapter name; see `SDPTModel.set_scale`.
    """

    adapter_layer_names: tuple[str, ...] = ("sdpt_lora_A", "sdpt_lora_B")
    other_param_names: tuple[str, ...] = ("sdpt_lora_scaling", "sdpt_scale")
    # The adapters of the samples in the current call. See `peft_sdpt.calls`.
    sdpt_call: Choice | None = None
    sdpt_compiled_call: Choice | None = None
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SDPTConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sdpt_lora_A: MutableMapping[str, nn.Parameter] = nn.ParameterDict()  # type: ignore[assignment] # it is one
        self.sdpt_lora_B: MutableMapping[str, nn.Parameter] = nn.ParameterDict()  # type: ignore[assignment] # it is one
        self.sdpt_lora_scaling: dict[str, float] = {}
        self.sdpt_scale: dict[str, float] = {}
        self.training = base_layer.training
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def in_features(self) -> int:
        """Number of inputs of the linear layer."""
        return int(_size(self.get_base_layer())[0])

    @property
    def out_features(self) -> int:
        """Number of outputs of the linear layer."""
        return int(_size(self.get_base_layer())[1])

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Add the matrices of an adapter. A is drawn from torch's default generator, and B is zero."""
        assert config.lora_rank is not None
        inputs, outputs = _size(self.get_base_layer())
        # On the CPU, so that a seed gives the same numbers on every device, as for tokens.
        first = torch.empty(config.lora_rank, inputs, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))
        self.sdpt_lora_A[adapter_name] = nn.Parameter(first)
        self.sdpt_lora_B[adapter_name] = nn.Parameter(
            torch.zeros(outputs, config.lora_rank, device="cpu", dtype=torch.float32)
        )
        self.sdpt_lora_scaling[adapter_name] = config.lora_scaling
        self.sdpt_scale[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Apply the linear layer and the LoRA part of adapters to `x`, `(..., in_features)`.

        Args:
            adapter_names: For each sample, the adapter to use; others than those of this layer mean the base model.
                Samples are the first dimension of `x`. None if all samples use the active adapters.

        Raises:
            ValueError: There is not one name for each sample.
        """
        result = self.base_layer(x, *args, **kwargs)
        enabled, active, scales, choice, _ = activation(self, adapter_names)
        wanted = active if choice is None else choice.adapters
        names = [name for name in wanted if name in self.sdpt_lora_A and scales[name] != 0]
        if not enabled or not names:
            return result
        dtype = result.dtype
        scalings = {name: self.sdpt_lora_scaling[name] * scales[name] for name in names}
        if choice is None:
            for name in names:
                result = result + self._change(x, self.sdpt_lora_A[name], self.sdpt_lora_B[name]) * scalings[name]
            return result.to(dtype)
        if len(x) == 1:
            # Prompts of a fusion layer, which all samples share before this layer.
            num_samples = choice.places.shape[0]
            x, result = x.expand(num_samples, *x.shape[1:]), result.expand(num_samples, *result.shape[1:])
        choice.check_length(len(x))
        if len({(self.sdpt_lora_A[name].shape, self.sdpt_lora_A[name].dtype) for name in names}) == 1:
            # A product of batches of matrices. A base model without LoRA gets zeros.
            first = choice.take({name: self.sdpt_lora_A[name] for name in names})
            second = choice.take({name: self.sdpt_lora_B[name] * scalings[name] for name in names})
            change = self._change(x.flatten(1, -2) if x.dim() > 2 else x[:, None], first, second)
            return (result + change.view_as(result)).to(dtype)
        for name in names:
            changed = result + self._change(x, self.sdpt_lora_A[name], self.sdpt_lora_B[name]) * scalings[name]
            result = torch.where(choice.uses(name).view(-1, *[1] * (changed.dim() - 1)), changed, result)
        return result.to(dtype)

    def _change(self, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return `B A x`, for matrices of all samples or `(B, ...)` of each sample."""
        return self._cast_input_dtype(x, first.dtype) @ first.mT @ second.mT

    @property
    def device_of_adapters(self) -> torch.device:
        """The device of the matrices."""
        return device_and_dtype(self.get_base_layer())[0]  # type: ignore[arg-type] # acts like `nn.Linear`

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the LoRA part of an adapter by `scale`."""
        self.sdpt_scale[adapter_name] = scale

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return device_and_dtype(base_layer)  # type: ignore[arg-type] # acts like `nn.Linear`

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def extra_repr(self) -> str:
        return f"rank={ {name: len(matrix) for name, matrix in self.sdpt_lora_A.items()} }"


def select_lora_layers(
    model: nn.Module, config: SDPTConfig, adapted: Collection[str], named: Collection[str] | None = None
) -> dict[str, list[int]]:
    """Select the linear layers that get the LoRA part of an adapter.

    Args:
        model: The base model. It may have adapters already.
        config: Config of the adapter.
        adapted: Full names of the modules that the adapter adds prompts to.
        named: Plain names of the layers to select instead of those that the config asks for, or None.

    Returns:
        The numbers of inputs and outputs of each layer, by its full name. Empty without `lora_rank`.

    Raises:
        ValueError: The config asks for no layer, or for a module that cannot have LoRA.
    """
    if config.lora_rank is None:
        return {}
    targets = config.lora_target_modules
    by_default = named is None and targets is None
    has_default = not by_default or GROUNDING_DINO in find_hosts(model).values()

    def wanted(name: str) -> bool:
        return lora_name(name) in named if named is not None else matches(targets or DEFAULT_LORA_TARGETS, name)

    modules = open_modules(model, config, _closes) if has_default else {}
    found = {name: module for name, module in modules.items() if wanted(lora_name(name))}
    fusion_layers = {*adapted, *(name for name, module in model.named_modules() if isinstance(module, SDPTLayer))}
    layers: dict[str, tuple[str, list[int]]] = {}
    for name, module in found.items():
        if by_default and _cannot_have_lora(model, name, module, fusion_layers):
            continue  # the default is a pattern for names, so it may match more than it means
        reason = _cannot_have_lora(model, name, module, fusion_layers) or _adapter_of_another_tuner(module)
        if reason is not None:
            if named is not None:
                raise ValueError(f"The adapter has LoRA for '{lora_name(name)}', {reason}")
            if by_default:
                raise ValueError(
                    f"SDPTConfig.lora_target_modules=None means the attention and the feed-forward networks of encoder "
                    f"and decoder, and so '{lora_name(name)}', {reason} Name other layers in lora_target_modules."
                )
            raise ValueError(
                f"SDPTConfig.lora_target_modules={quoted(targets)} matches '{lora_name(name)}', {reason} Leave it out."
            )
        # Wrappers such as `torch.compile` come before what they wrap, which is the layer itself.
        layers[lora_name(name)] = name, _size(_inner(module))
    outside = outside_saved(config)
    if by_default and not layers:
        raise ValueError(
            f"SDPTConfig.lora_rank={config.lora_rank} needs lora_target_modules, the linear layers with LoRA: "
            f"{type(model).__name__} has none of the layers{outside} that are its default, which are those of "
            "Grounding DINO and MM Grounding DINO."
        )
    if named is None and targets is not None:
        each = [targets] if isinstance(targets, str) else targets
        missing = [
            target
            for target in each
            if not any(matches(target if isinstance(targets, str) else [target], name) for name in layers)
        ]
        if missing:
            raise ValueError(f"SDPTConfig.lora_target_modules: {quoted(missing)} matches no module{outside}.")
    return dict(layers.values())


def refuse_modules_to_save_with_lora(model: nn.Module, config: SDPTConfig) -> None:
    """Check that no module that the config trains whole has LoRA already, which its copies would contain.

    Raises:
        ValueError: A module in `modules_to_save` has the LoRA part of another adapter.
    """
    for name, module in model.named_modules():
        if matches(config.modules_to_save, name) and any(isinstance(part, SDPTLoraLayer) for part in module.modules()):
            raise ValueError(
                f"SDPTConfig.modules_to_save={quoted(config.modules_to_save)} names '{lora_name(name)}', which has the "
                "LoRA part of another SDPT adapter. Put these two adapters on different copies of the base model."
            )


def refuse_lora_on_inverted(name: str, projections: Sequence[nn.Module]) -> None:
    """Check that the projections of a fusion layer that SDPT inverts have no LoRA of an SDPT adapter.

    Raises:
        ValueError: One of them has LoRA, active or not.
    """
    for projection in projections:
        if isinstance(projection, SDPTLoraLayer) and projection.sdpt_lora_A:
            raise ValueError(
                f"The fusion layer '{plain_name(name)}' cannot get prompts, because the SDPT adapters "
                f"{sorted(projection.sdpt_lora_A)} have LoRA on a projection that SDPT inverts. Leave the layer out of "
                "target_modules, or out of the lora_target_modules of these adapters."
            )


def _closes(module: nn.Module) -> bool:
    """Return whether no target is looked for inside a module: it has what a tuner has put into it.

    The parts of a fusion layer with prompts are looked at, so that a target there is refused.
    """
    return isinstance(module, BaseTunerLayer) and not isinstance(module, SDPTLayer)


def _cannot_have_lora(model: nn.Module, name: str, module: nn.Module, fusion_layers: Collection[str]) -> str | None:
    """Return why a module can never have LoRA, or None if it can."""
    around = next((layer for layer in fusion_layers if f"{name}.".startswith(f"{layer}.")), None)
    if around is not None:
        return f"which is in the fusion layer '{around}'. SDPT inverts weights of this layer."
    if _size(_inner(module)) is None:
        return f"which is not a linear layer ({type(module).__name__})."
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "which nn.MultiheadAttention never calls, so LoRA would have no effect there."
    return None


def _adapter_of_another_tuner(module: nn.Module) -> str | None:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SDPTLoraLayer):
        return f"which has an adapter of another tuner ({type(module).__module__})."
    return None


def _inner(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _size(module: Any) -> Any:
    """Return the numbers of inputs and outputs of a linear layer, also of a quantised one. None for other modules."""
    size = [getattr(module, "in_features", None), getattr(module, "out_features", None)]
    return size if all(isinstance(number, int) for number in size) else None
