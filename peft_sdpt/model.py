# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner as PEFT calls it: attaching, switching, combining and loading adapters."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from .calls import BASE, SWITCHING, calling
from .config import SDPTConfig
from .gates import factors_of, gates_of
from .hosts import FusionHost
from .layer import CANNOT_MERGE, SDPTLayer, SharedSDPTLayer, read_gates
from .lora import SDPTLoraLayer, refuse_lora_on_inverted, refuse_modules_to_save_with_lora, select_lora_layers
from .saving import (
    LORA_KEYS,
    MAX_NAME,
    PARAMETER_KEYS,
    PROMPTS_KEY,
    check_base_model,
    check_numbers,
    check_state_dict,
    lora_name,
    parameter_of,
    parameters_in,
    plain_name,
    refuse_strangers,
    without_wrappers,
)
from .targeting import FusionLayer, Selection, check_fusion_layer, matches, select_fusion_layers
from .wording import is_control, quoted

# An adapter may have this many parameters (40 MB in float32), even if the base model has fewer.
SMALL = 10_000_000
# Names with a meaning in PEFT, and attributes of the containers that PyTorch keeps parameters and modules in.
_TAKEN = {
    *(BASE, "base_layer", "modules_to_save", "original_module"),
    *(kind.removeprefix(".") for kind in PARAMETER_KEYS),
    *dir(nn.ParameterDict()),
    *dir(nn.ModuleDict()),
}
# Containers without a forward, which PEFT refuses in `modules_to_save`.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class SDPTModel(BaseTuner):
    """Synchronous dual prompt tuning of a fusion-based vision-language model (arXiv 2407.11414).

    `peft.get_peft_model(model, SDPTConfig(...))` and the other functions of PEFT make it. A base model whose fusion
    layers do not suit the config is rejected before it is changed. PEFT checks `modules_to_save` itself, later.

    Raises:
        ValueError: The base model has no known fusion layer, or is a `PeftModel` with SDPT adapters; `target_modules`
            matches nothing, or a module that is not a fusion layer; an index of `layers_to_transform` does not exist;
            `exclude_modules` leaves nothing; the config belongs to a saved adapter of a base model with other fusion
            layers; another tuner's adapter acts on a projection that SDPT inverts; the weight of such a projection is
            sharded or offloaded; or `lora_target_modules` matches no module, or one that cannot have LoRA.
    """

    prefix = "sdpt_"
    tuner_layer_cls = (SDPTLayer, SDPTLoraLayer)  # type: ignore[assignment] # PEFT passes it to `isinstance` only
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it
    peft_config: dict[str, Any]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        _refuse_second_tuner(model)
        # PEFT puts the new config among those of the model before it attaches the adapter.
        configs = getattr(model, "peft_config", None)
        before = dict(configs) if isinstance(configs, dict) else {}
        # The layers of this tuner in the base model, and the modules that the current injection has replaced: parent,
        # name and module.
        self._layers: list[SDPTLayer | SDPTLoraLayer] = []
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            super().__init__(model, *args, **kwargs)
        except Exception:
            if isinstance(configs, dict):
                configs.clear()
                configs.update(before)
            raise

    # Parameters that were created in inference mode could not be trained later.
    @torch.inference_mode(False)
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
    ) -> None:
        # Removed until nothing can be refused any more, so that a rejected base model stays unchanged.
        config: SDPTConfig = self.peft_config.pop(adapter_name)
        check_adapter_name(adapter_name)
        if self.peft_config:
            _refuse_names_of_parts(model, {*self.peft_config, adapter_name})
        config.check()  # a field may have been changed since the config was made
        selection = select_fusion_layers(model, config)
        layers = selection.layers
        # The layers of a saved adapter are those that it was made on, also if another version has another default.
        named_for_lora = set(config.lora_layers or ()) if config.belongs_to_base_model else None
        if state_dict is not None:
            # PEFT wraps the modules that the state dict names, whatever the config says. It reads only the keys, as its
            # documentation says, so the values can be empty, and the second modules of fusion layers, which have no
            # prompts of their own, get keys too.
            named = {plain_name(key.rpartition(".sdpt_")[0]) for key in state_dict if not key.endswith(LORA_KEYS)}
            layers = {name: layer for name, layer in selection.known.items() if plain_name(name) in named}
            parts = [part for layer in layers.values() for part in layer.parts]
            named_for_lora = {lora_name(key.rpartition(LORA_KEYS[0])[0]) for key in state_dict if LORA_KEYS[0] in key}
            state_dict = {f"{_name_in_peft(part)}{PROMPTS_KEY}": torch.empty(0) for part in parts}
        for name, layer in layers.items():
            refuse_lora_on_inverted(name, layer.projections)
            check_fusion_layer(name, layer, config)
        dims = {plain_name(name): layer.prompt_dim(config) for name, layer in layers.items()}
        gates = {plain_name(name): numbers for name, layer in layers.items() if (numbers := layer.gates(config))}
        adapted = [part for layer in layers.values() for part in layer.parts]
        lora_layers = select_lora_layers(model, config, adapted, named_for_lora)
        lora_sizes = {lora_name(name): size for name, size in lora_layers.items()} or None
        filled_in: dict[str, Any] = {"fusion_layers": dims, "fusion_gates": gates, "lora_layers": lora_sizes}
        if config.belongs_to_base_model:
            fitting = dataclasses.replace(config, **filled_in)
            check_base_model(found=config.parameter_shapes() or {}, expected=fitting.parameter_shapes() or {})
            config.check_saved_modules(model)
        _refuse_more_than_base_model(model, dataclasses.replace(config, **filled_in))
        _refuse_modules_to_save(model, config)
        refuse_modules_to_save_with_lora(model, config)
        self._set_targets(selection)
        self._lora_targets = {*lora_layers, *map(_name_in_peft, lora_layers)}
        if state_dict is not None:
            state_dict.update({f"{_name_in_peft(name)}{LORA_KEYS[0]}": torch.empty(0) for name in lora_layers})
        if any(getattr(config, name) not in (None, value) for name, value in filled_in.items()):
            # The adapter of another base model uses the same config.
            config = copy.deepcopy(config)
        if not config.belongs_to_base_model:
            for name, value in filled_in.items():
                setattr(config, name, value)
            config.fusion_layers_digest = None
        self.peft_config[adapter_name] = config
        with self._undone_after_an_error(model, adapter_name):
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        for name, layer in layers.items():
            for part in layer.parts:
                if isinstance(module := model.get_submodule(part), SharedSDPTLayer):
                    first = model.get_submodule(name)
                    assert isinstance(first, SDPTLayer)
                    module.share(first)

    @contextmanager
    def _undone_after_an_error(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Restore the base model after any error in this context, for instance because the memory is full."""
        before = list(self._layers)
        layers = [module for module in model.modules() if isinstance(module, (SDPTLayer, SDPTLoraLayer))]
        had_it = [layer for layer in layers if adapter_name in layer.sdpt_scale]
        try:
            yield
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            for layer in self._layers:
                if layer not in had_it:
                    layer.delete_adapter(adapter_name)
            for parent, child_name, child in self._replaced:
                setattr(parent, child_name, child)
            self._layers = before
            raise
        finally:
            self._replaced.clear()

    def _set_targets(self, selection: Selection) -> None:
        """Store what PEFT is told about each module while it walks through the base model."""
        # Maps each module that can be wrapped to its spec, and to whether it has the prompts of its fusion layer.
        self._specs: dict[str, tuple[FusionHost, bool]] = {}
        for name, layer in selection.known.items():
            for part in layer.parts:
                self._specs[part] = self._specs[_name_in_peft(part)] = (layer.spec, part == name)
        self._targets = _part_names(selection.layers)
        self._excluded = _part_names(selection.excluded)

    def _check_tied_modules(self, model: nn.Module, peft_config: SDPTConfig) -> None:
        # PEFT would match the expression in `target_modules` with names of embeddings, without a time limit.
        super()._check_tied_modules(model, dataclasses.replace(peft_config, target_modules=None))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(  # type: ignore[override] # PEFT calls its static method on the instance
        self, peft_config: PeftConfig, key: str
    ) -> Any:
        # PEFT warns if `exclude_modules` is given and nothing was excluded.
        return _ExcludedModule() if key in self._excluded else key in self._targets or key in self._lora_targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SDPTConfig)
        if isinstance(target, (SDPTLayer, SDPTLoraLayer)):
            if target not in self._layers:  # another `SDPTModel` of the same base model has attached it
                self._layers.append(target)
            target.update_layer(adapter_name, peft_config)
            return
        if current_key in self._lora_targets:
            layer: SDPTLayer | SDPTLoraLayer = SDPTLoraLayer(target, adapter_name, peft_config)
        else:
            spec, holds_prompts = self._specs[current_key]
            layer_class = SDPTLayer if holds_prompts else SharedSDPTLayer
            layer = layer_class(target, spec, adapter_name, peft_config, side=spec.side_of(current_key))
        # Another thread may call the model before PEFT sets the active adapters of the new layer.
        layer._active_adapter = self.active_adapters
        self._replace_module(parent, target_name, layer, target)
        self._replaced.append((parent, target_name, target))
        self._layers.append(layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The base class expects a `.weight`. The new layer already is on the device of the base model.
        setattr(parent, child_name, new_module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT asks the base model for its input embeddings, which detectors do not have.
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:
            return []

    def _check_merge_allowed(self) -> None:
        # Checked here as well as in the layer, because a layer of another tuner may come before the first of ours.
        raise NotImplementedError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass the `adapter_names` of `model(..., adapter_names=[...])`, one per sample, to the layers.

        Raises:
            ValueError: The model is in training mode, or no adapter of this tuner has one of the names, or
                `adapter_names` is one string.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            # Compiled code reads the attributes of the layers; see `calls.py`.
            if torch.compiler.is_compiling():
                yield
                return
            with calling(self._layers, silent=read_gates(self._layers, self.active_adapters)):
                yield
            return
        # The message is PEFT's own, because callers may look for it.
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names must be a list with a name for each sample, got {quoted(adapter_names)}")
        # PEFT keeps the configs of another tuner beside ours. Its adapters act on all samples.
        ours = self._sdpt_adapters()
        unknown = sorted(map(str, set(adapter_names) - {*ours, BASE}))
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. This model has the adapters "
                f"{ours}, and {BASE!r} is the base model without one."
            )

        # Collected in each call, because the replicas of DataParallel have other modules.
        modules = list(self.model.modules())
        layers = [module for module in modules if isinstance(module, (SDPTLayer, SDPTLoraLayer))]
        copied = [
            module
            for module in modules
            if isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters.isdisjoint(ours)
        ]
        silent = {} if torch.compiler.is_compiling() else read_gates(layers, set(adapter_names))
        with calling(layers, adapter_names, copied, ours, silent):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active. Calls of other threads that have begun keep the adapters that they began with."""
        with SWITCHING:
            super().set_adapter(adapter_name, inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with SWITCHING:
            super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If no other is active, the first of the remaining ones becomes active.

        No other thread may be calling the model with this adapter.
        """
        with SWITCHING:
            was_active = self.active_adapters
            super().delete_adapter(adapter_name)
            # PEFT lets each layer choose among its own adapters, and not every layer has all of them.
            remaining = [name for name in was_active if name != adapter_name] or self._sdpt_adapters()[:1]
            if adapter_name in was_active and remaining:
                self.set_adapter(remaining)

    def refresh_inverses(self) -> None:
        """Compute the inverse projections of all layers again.

        Call this method after a write through NumPy, in place through `.data`, by another process into shared memory,
        or into a quantised weight. PyTorch does not count such writes. Other changes are detected; see `SDPTLayer`.

        Raises:
            ValueError: Another tuner's adapter acts on a projection, or a weight is not finite.
        """
        for layer in self._layers:
            if isinstance(layer, SDPTLayer):
                layer.refresh_inverses(force=True)

    def _sdpt_adapters(self) -> list[str]:
        return sorted(name for name, config in self.peft_config.items() if isinstance(config, SDPTConfig))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the effect of an adapter by a number, until it is set again or the adapter is deleted.

        0 is the base model, and 1 is the adapter as it was trained. Numbers in between give back some of what tuning
        has cost on other classes. The scale is not saved.

        Args:
            adapter_name: Name of an SDPT adapter of this model, with gates and without `modules_to_save`.
            scale: Factor of its gates, and of its LoRA part; a finite number.

        Raises:
            ValueError: The model has no such adapter, the adapter has no gates or has `modules_to_save`, or `scale` is
                not a finite number.
        """
        if adapter_name not in self._sdpt_adapters():
            raise ValueError(f"adapter_name must be one of {self._sdpt_adapters()}, got {quoted(adapter_name)}")
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, got {quoted(scale)}")
        config = self.peft_config[adapter_name]
        for name, layer in _layers_with_prompts(self.model, adapter_name):
            if adapter_name not in layer.sdpt_gates:
                reason = "prompt_gate is None" if config.prompt_gate is None else "its spec names no heads"
                raise ValueError(
                    f"adapter_name={adapter_name!r}: scale multiplies gates, and the layer '{name}' has none: {reason}"
                )
        if config.modules_to_save:
            raise ValueError(
                f"adapter_name={adapter_name!r}: an adapter with modules_to_save={quoted(config.modules_to_save)} "
                "cannot be scaled, because modules that are trained whole have no gates"
            )
        with SWITCHING:
            for layer in self._layers:
                if adapter_name in layer.sdpt_scale:
                    layer.set_scale(adapter_name, float(scale))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Combine adapters into a new one.

        Args:
            adapters: Names of the adapters, at least one. They must have the same `prompt_gate`, `prompt_mode`,
                `prompt_space`, `image_attends_prompts`, `pinv_rtol` and fusion layers, and neither `modules_to_save`
                nor `lora_rank`.
            weights: A factor for each adapter. With `"cat"` and gates, it multiplies the effect of the adapter, as
                `set_scale` does. Otherwise, it multiplies parameters: the tokens in the aligned space, and the gates.
                The scales that `set_scale` has set do not count.
            adapter_name: Name of the new adapter. It is not active, and not trainable until it is made active.
            combination_type: `"cat"` concatenates the tokens of all adapters, and keeps each adapter's gates and
                softmax as a group of its own (`prompt_groups`). With weights of 1, this equals activating all of them.
                `"linear"` is the weighted sum of their parameters; all must have the same numbers of tokens and groups.

        Raises:
            ValueError: A name is unknown or taken, `adapters` and `weights` have different lengths, or the adapters
                cannot be combined. The message names the argument. With gates and `"cat"`, no gate can stand for a
                factor beyond -1 and 1, so weights may be too large.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        combined = {
            name: self._combined(layer, adapters, weights, combination_type)
            for name, layer in _layers_with_prompts(self.model, adapters[0])
        }
        configs = [self.peft_config[name] for name in adapters]
        groups = configs[0].prompt_groups
        num_tokens = configs[0].num_virtual_tokens
        if combination_type == "cat":
            num_tokens = sum(config.num_virtual_tokens for config in configs)
            if configs[0].prompt_gate is not None:
                groups = [size for config in configs for size in config.group_sizes]
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0], num_virtual_tokens=num_tokens, prompt_groups=groups
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, layer in _layers_with_prompts(self.model, adapter_name):
                prompts, gates = combined[name]
                layer.sdpt_prompts[adapter_name].copy_(prompts)
                if gates is not None:
                    layer.sdpt_gates[adapter_name].copy_(gates)
        self.set_requires_grad(adapter_name, requires_grad=False)

    @torch.no_grad()
    def _combined(
        self, layer: SDPTLayer, adapters: list[str], weights: list[float], combination_type: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the prompts and the gates of the combination of some adapters in a layer."""
        all_prompts: list[torch.Tensor] = [layer.sdpt_prompts[name] for name in adapters]
        all_gates = [layer.sdpt_gates[name] for name in adapters if name in layer.sdpt_gates]
        if combination_type == "linear" or not all_gates:
            all_prompts = [prompts * weight for prompts, weight in zip(all_prompts, weights, strict=True)]
        if combination_type == "linear":
            gates = [gate * weight for gate, weight in zip(all_gates, weights, strict=False)]
            return functools.reduce(torch.add, all_prompts), functools.reduce(torch.add, gates) if gates else None
        # Tokens are the second to last dimension, also if each modality has its own set. So are the groups of gates.
        prompts = torch.cat(all_prompts, dim=-2)
        if not all_gates:
            return prompts, None
        try:
            gates = [
                gate if weight == 1 else gates_of(factors_of(gate) * weight).to(gate)
                for gate, weight in zip(all_gates, weights, strict=True)
            ]
        except ValueError as error:
            raise ValueError(f"weights {weights} of the adapters {adapters} are too large: {error}") from error
        return prompts, torch.cat(gates, dim=-2)

    def _check_combination(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> None:
        if combination_type not in ("cat", "linear"):
            raise ValueError(f"combination_type must be 'cat' or 'linear', got {combination_type!r}")
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name {adapter_name!r} is taken; this model has {sorted(self.peft_config)}")
        for name, values in (("adapters", adapters), ("weights", weights)):
            if isinstance(values, str) or not isinstance(values, Collection):
                raise ValueError(f"{name} must be a list, got {quoted(values)}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"adapters and weights must be equally long, at least 1; got {adapters} and {weights}")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                raise ValueError(f"weights must be finite numbers, got {quoted(weight)}")
        ours = self._sdpt_adapters()
        unknown = [name for name in adapters if name not in ours]
        if unknown:
            raise ValueError(f"adapters has {unknown}, but the SDPT adapters of this model are {ours}")
        alike = ["prompt_gate", "prompt_mode", "prompt_space", "image_attends_prompts", "pinv_rtol", "fusion_layers"]
        if combination_type == "linear":
            alike += ["num_virtual_tokens", "prompt_groups"]
        for field in alike:
            values = [getattr(self.peft_config[name], field) for name in adapters]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"combination_type {combination_type!r} needs adapters of one {field}; {adapters} have {values}"
                )
        for name in adapters:
            for field in ("modules_to_save", "lora_rank"):
                if value := getattr(self.peft_config[name], field):
                    raise ValueError(f"adapter {name!r} has {field}={value}, which cannot be combined")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # By the keys alone: names of modules may have what wrappers add, which keys do not have.
        suffixes = tuple(f"{kind}.{adapter_name}" for kind in PARAMETER_KEYS)
        return {key: value for key, value in state_dict.items() if key.endswith(suffixes)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the key of a saved tensor; for our parameters, without what wrappers add to names."""
        saved = str(super()._remove_adapter_name_from_key(key, adapter_name))
        # PEFT looks for the keys of `modules_to_save` under the names that the modules have.
        if saved.endswith(LORA_KEYS):
            # Another tuner may have been put around the layer since.
            return ".".join(part for part in without_wrappers(saved).split(".") if part != "base_layer")
        return without_wrappers(saved) if saved.endswith(PARAMETER_KEYS) else saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Map the keys of saved parameters to those of the model, whatever wrappers either of them had.

        Only the parameters of the adapter and its copies of the modules in `modules_to_save` are loaded. PEFT has
        already given the copies the keys of the model. Any other tensor would overwrite the base model.

        Raises:
            ValueError: A parameter is missing, surplus, of another shape or not finite, or the state dict has a tensor
                that does not belong to the adapter. In this case, nothing has been loaded.
        """
        current = model.state_dict()
        own = {key: value for key, value in current.items() if key.endswith(f".{adapter_name}")}
        keys = parameters_in({key: key for key in own}, adapter_name)
        parameters = parameters_in(state_dict, adapter_name)
        check_state_dict(
            found={name: tuple(value.shape) for name, value in parameters.items()},
            expected={name: tuple(own[key].shape) for name, key in keys.items()},
            adapter_name=adapter_name,
        )
        rest = {key: value for key, value in state_dict.items() if parameter_of(key, adapter_name) is None}
        of_copies = f".modules_to_save.{adapter_name}."
        copies = {without_wrappers(key) for key in current if of_copies in key}
        # A state dict may have parameters of other adapters. They are not loaded.
        rest = {key: value for key, value in rest.items() if not _is_of_other_adapter(key)}
        refuse_strangers((key for key in rest if without_wrappers(key) not in copies), f"adapter {adapter_name!r}")
        check_numbers(parameters, rest, f"adapter {adapter_name!r}")
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, rest
        )
        remapped |= {keys[name]: value for name, value in parameters.items()}
        with torch.inference_mode(False):
            # With `low_cpu_mem_usage`, these tensors become the parameters, which may be trained later.
            return {key: value.clone() if value.is_inference() else value for key, value in remapped.items()}


def _name_in_peft(name: str) -> str:
    """Return the name of a module in PEFT's state dicts, without the prefix that compiling the model adds."""
    return name.removeprefix("_orig_mod.")


def _is_of_other_adapter(key: str) -> bool:
    """Return whether a key of a state dict names a parameter of this tuner, with the name of any adapter."""
    return parameter_of(key, key.rpartition(".")[2]) is not None


def check_adapter_name(adapter_name: str) -> None:
    """Check the name of a new adapter.

    Raises:
        ValueError: PyTorch cannot use the name for a parameter, or the name has a meaning in PEFT.
    """
    # PyTorch stores parameters as attributes of a container, which has methods such as "keys". It separates the names
    # of modules by full stops.
    if (
        not isinstance(adapter_name, str)
        or not adapter_name
        or "." in adapter_name
        or adapter_name in _TAKEN
        # An adapter is saved to a folder of its name.
        or len(adapter_name) > MAX_NAME
        or os.path.isabs(adapter_name)
        or any(map(is_control, adapter_name))
    ):
        raise ValueError(
            f"adapter_name must be a name without full stops that has no meaning in PyTorch or PEFT, as {BASE!r} and "
            f"'keys' have, and can be the name of a folder; got {quoted(adapter_name)}"
        )


def _names_within(module: nn.Module) -> set[str]:
    """Return the names of all modules, parameters and buffers in a module, without those that tuners have added."""
    if isinstance(module, BaseTunerLayer):
        return {"base_layer", *_names_within(module.get_base_layer())}
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _names_within(module.original_module)
    names = {*module._parameters, *module._buffers, *module._modules}
    return names.union(*(_names_within(child) for child in module.children()))


def _refuse_names_of_parts(model: nn.Module, names: set[str]) -> None:
    """Check that the names of several adapters differ from the names of all parts of the base model.

    When PEFT saves one of several adapters, it drops each key that has the name of another adapter in it.

    Raises:
        ValueError: A part of the model has the name of an adapter.
    """
    parts = {*_names_within(model), *(kind.removeprefix(".") for kind in PARAMETER_KEYS)}
    if taken := sorted(names & parts):
        raise ValueError(
            f"adapter_name={taken[0]!r} is also the name of a part of the model, and PEFT could not tell them apart in "
            "the saved weights of several adapters. Choose another name."
        )


def _refuse_more_than_base_model(model: nn.Module, config: SDPTConfig) -> None:
    """Check that an adapter is smaller than its base model, before memory is allocated for it.

    A downloaded config could ask for any number of parameters.

    Raises:
        ValueError: The adapter has more parameters than the base model, and more than 10 million.
    """
    size = sum(map(math.prod, (config.parameter_shapes() or {}).values()))
    if size > max(sum(parameter.numel() for parameter in model.parameters()), SMALL):
        raise ValueError(
            f"SDPTConfig.num_virtual_tokens={quoted(config.num_virtual_tokens)} and "
            f"lora_rank={quoted(config.lora_rank)} make an adapter of {quoted(size)} parameters, which is more than "
            f"{type(model).__name__} itself has. Use smaller numbers."
        )


def _part_names(layers: dict[str, FusionLayer]) -> set[str]:
    names = {part for layer in layers.values() for part in layer.parts}
    return names | {_name_in_peft(name) for name in names}


def _layers_with_prompts(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SDPTLayer]]:
    """Yield each layer that has prompts of an adapter, with its full name."""
    for name, module in model.named_modules():
        if (
            isinstance(module, SDPTLayer)
            and not isinstance(module, SharedSDPTLayer)
            and adapter_name in module.sdpt_prompts
        ):
            yield name, module


def _refuse_second_tuner(model: nn.Module) -> None:
    """Raise a `ValueError` for a `PeftModel` with SDPT adapters, whose own methods add and load adapters."""
    for module in model.modules():
        if isinstance(module, PeftModel) and isinstance(module.base_model, SDPTModel):
            raise ValueError(
                f"The model is a PeftModel with the SDPT adapters {sorted(module.peft_config)} already. Add an adapter "
                "to it with its add_adapter, load one with its load_adapter, or pass its get_base_model() after "
                "unload()."
            )


def _refuse_modules_to_save(model: nn.Module, config: SDPTConfig) -> None:
    """Check what PEFT would refuse after the model has been changed, or save wrongly."""
    for name, module in model.named_modules():
        if not matches(config.modules_to_save, name):
            continue
        if isinstance(module, _CONTAINERS):
            raise TypeError(
                f"SDPTConfig.modules_to_save={quoted(config.modules_to_save)} names '{name}', which is a "
                f"{type(module).__name__}. PEFT cannot save such a container: name the modules in it."
            )
        if "_orig_mod" in name or isinstance(module, OptimizedModule):
            raise ValueError(
                f"SDPTConfig.modules_to_save={quoted(config.modules_to_save)} names '{name}', which is compiled. PEFT "
                "would save and load it under the name that torch.compile gives it. Attach or load the adapter first, "
                "and compile the model then."
            )
