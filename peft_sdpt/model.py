# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How SDPT finds the fusion layers of a host and what it answers to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, match_target_against_key
from torch import nn

from .config import SDPTConfig
from .hosts import FusionHost, find_hosts, supported_hosts
from .hosts.declaration import parameters_of
from .layer import CANNOT_MERGE, SDPTLayer, SharedSDPTLayer, prompt_width
from .saving import differing_shapes
from .weights import refuse_adapted, refuse_out_of_reach

# PEFT's name for the host without an adapter, in `adapter_names`.
BASE = "__base__"
# Before all names of a compiled model.
_COMPILED = "_orig_mod."


class SDPTModel(BaseTuner):
    """Synchronous dual prompt tuning of a fusion-based vision-language model (arXiv 2407.11414).

    Made by `peft.get_peft_model(host, SDPTConfig(...))` and the other entry points of PEFT. What makes
    the fusion layers of a host unfit for a config is found before the host is touched
    (`modules_to_save` is PEFT's own to check, after that).

    Raises:
        ValueError: the host has no known fusion layer; `target_modules` matches nothing, or a
            module that is none; a layer of `layers_to_transform` is not there; the config belongs to
            a saved adapter whose layers are not those of the host; another tuner's adapter acts on a
            projection that SDPT inverts; its weight is sharded or offloaded already.
    """

    prefix = "sdpt_"
    tuner_layer_cls = SDPTLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        *args: Any,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        # Gone again if the host is refused, which then bears no trace.
        config = self.peft_config.pop(adapter_name)
        layers = _select_fusion_layers(model, config)
        selected = {name: prompt_width(config, layer.host, layer.projections) for name, layer in layers.items()}
        if config.attached and config.fusion_layers != selected:
            # Used on another host before, whose adapter keeps what was found there.
            config = copy.deepcopy(config)
        elif not config.attached and config.fusion_layers is not None:
            _check_prompt_shapes(
                found={n: config.prompt_shape(w) for n, w in config.fusion_layers.items()},
                expected={n: config.prompt_shape(w) for n, w in selected.items()},
            )
        # Of each module to be wrapped the declaration, and the name of the fusion layer that it is a part of.
        targets = {part: (layer.host, name) for name, layer in layers.items() for part in layer.parts}
        # By the names that PEFT knows them by, of a compiled model too.
        self._targets = targets | {
            part.removeprefix(_COMPILED): (host, name.removeprefix(_COMPILED)) for part, (host, name) in targets.items()
        }
        if state_dict is not None:
            # PEFT wraps what it has weights of; the second module of a fusion layer has none of its own.
            held = {key.rpartition(".sdpt_prompts")[0].removeprefix(_COMPILED) for key in state_dict}
            selected = {name: width for name, width in selected.items() if name.removeprefix(_COMPILED) in held}
            parts = [part for part, (_, name) in self._targets.items() if name in held and part not in held]
            state_dict = state_dict | {f"{part}.sdpt_prompts": None for part in parts}
        config.fusion_layers = selected
        config.attached = True
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        for part, (_, name) in targets.items():
            if part != name and isinstance(module := model.get_submodule(part), SharedSDPTLayer):
                module.share(model.get_submodule(name))
            _watch_output_attentions(model, part)

    def _prepare_adapter_config(self, peft_config: SDPTConfig, model_config: dict) -> SDPTConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: SDPTConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: SDPTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SDPTLayer):
            target.update_layer(adapter_name, peft_config)
            return
        host, name = self._targets[current_key]
        layer_class = SDPTLayer if current_key == name else SharedSDPTLayer
        layer = layer_class(target, host, adapter_name, peft_config, side=host.side_of(current_key))
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The base class expects a `.weight`; our layer has put its prompts where the host is already.
        setattr(parent, child_name, new_module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT asks the host for its input embeddings, which detectors do not have.
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:
            return []

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        host = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in host.modules():
            for number, hook in list(module._forward_pre_hooks.items()):
                if hook is _tell_output_attentions:
                    del module._forward_pre_hooks[number], module._forward_pre_hooks_with_kwargs[number]
        return host

    def _check_merge_allowed(self) -> None:
        # Here and not only in the layer: another tuner's layers may come before the first of ours.
        raise NotImplementedError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of `model(..., adapter_names=[...])`, one a sample, to the layers for this forward.

        Raises:
            ValueError: no adapter of this tuner has one of the names.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        # In PEFT's words, which callers may look for.
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        # Those of another tuner in the same host, whose configs PEFT keeps beside ours, act on all samples.
        ours = self._names_of_ours()
        unknown = sorted(set(adapter_names) - {*ours, BASE})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. This model has the adapters "
                f"{ours}, and {BASE!r} is the host without one."
            )

        def pass_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            names = adapter_names
            if isinstance(module, AuxiliaryTrainingWrapper):  # has copies of some adapters
                names = [name if name in module._adapters else BASE for name in names]
            return args, {**kwargs, "adapter_names": names}

        # Layers of ours, and what `modules_to_save` of our adapters has copies of.
        takers = [
            module
            for module in self.model.modules()
            if isinstance(module, SDPTLayer)
            or (isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters.isdisjoint(ours))
        ]
        handles = [module.register_forward_pre_hook(pass_on, with_kwargs=True) for module in takers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _names_of_ours(self) -> list[str]:
        return sorted(name for name, config in self.peft_config.items() if isinstance(config, SDPTConfig))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Make a new adapter of others, on the layers that they share.

        Args:
            adapters: names of at least one adapter, alike in `prompt_mode`, `prompt_space`, `image_attends_prompts`,
                `pinv_rtol` and layers, and without `modules_to_save`.
            weights: a factor for the tokens of each, in the aligned space.
            adapter_name: of the new one. It is not made active, and not trainable until it is.
            combination_type: `"cat"`, the tokens of one after those of the other: with weights of 1 what activating
                all of them gives. `"linear"`, the weighted sum of their tokens; all have as many.

        Raises:
            ValueError: naming the argument, when a name is unknown or taken, numbers do not match, or the adapters
                cannot be combined.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        configs = [self.peft_config[name] for name in adapters]
        tokens = [config.num_virtual_tokens for config in configs]
        config = copy.deepcopy(configs[0])
        config.num_virtual_tokens = sum(tokens) if combination_type == "cat" else tokens[0]
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in self.model.modules():
                if not _holds_prompts(layer) or adapter_name not in layer.sdpt_prompts:
                    continue
                parts = [layer.sdpt_prompts[name] * weight for name, weight in zip(adapters, weights, strict=True)]
                # Tokens are the last dimension but one, also where each modality has a set.
                combined = torch.cat(parts, dim=-2) if combination_type == "cat" else sum(parts)
                layer.sdpt_prompts[adapter_name].copy_(combined)
        self.set_requires_grad(adapter_name, requires_grad=False)

    def _check_combination(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> None:
        if combination_type not in ("cat", "linear"):
            raise ValueError(f"combination_type must be 'cat' or 'linear', got {combination_type!r}")
        if not adapter_name or "." in adapter_name or adapter_name == BASE:
            raise ValueError(f"adapter_name must be a name without full stops, and not {BASE!r}; got {adapter_name!r}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name {adapter_name!r} is taken; this model has {sorted(self.peft_config)}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"adapters and weights must be as many, at least one; got {adapters} and {weights}")
        ours = self._names_of_ours()
        unknown = [name for name in adapters if name not in ours]
        if unknown:
            raise ValueError(f"adapters has {unknown}, but the SDPT adapters of this model are {ours}")
        alike = ["prompt_mode", "prompt_space", "image_attends_prompts", "pinv_rtol", "fusion_layers"]
        if combination_type == "linear":
            alike.append("num_virtual_tokens")
        for field in alike:
            values = [getattr(self.peft_config[name], field) for name in adapters]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"combination_type {combination_type!r} needs adapters of one {field}; {adapters} have {values}"
                )
        for name in adapters:
            if self.peft_config[name].modules_to_save:
                raise ValueError(
                    f"adapter {name!r} has modules_to_save={self.peft_config[name].modules_to_save}, which cannot be "
                    "combined"
                )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SDPTConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # Checked as a whole before anything is copied, so that nothing is loaded by halves.
        prompts = {
            f"{name}.sdpt_prompts.{adapter_name}": tuple(module.sdpt_prompts[adapter_name].shape)
            for name, module in model.named_modules()
            if _holds_prompts(module) and adapter_name in module.sdpt_prompts
        }
        found = {k: tuple(v.shape) for k, v in remapped.items() if ".sdpt_prompts" in k}
        _check_prompt_shapes(
            found={_layer_name(key): shape for key, shape in found.items()},
            expected={_layer_name(key): shape for key, shape in prompts.items()},
        )
        return remapped


def _layer_name(key: str) -> str:
    """Module name of a fusion layer in the host, from a key of its prompts."""
    return key.removeprefix("base_model.model.").partition(".sdpt_prompts")[0]


def _check_prompt_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse an adapter whose prompts are not those that this host takes.

    Args:
        found: layer name to shape of the prompts in the adapter.
        expected: layer name to shape of the prompts in the host.

    Raises:
        ValueError: naming every layer that differs, with both shapes.
    """
    if differences := differing_shapes(found, expected):
        raise ValueError(
            "This SDPT adapter was made for another host (expected: prompts that this host takes with "
            f"the adapter's config, found: prompts of the adapter). {differences}. "
            "A config loaded with an adapter belongs to its host; make a new SDPTConfig to start on "
            "another one."
        )


def _watch_output_attentions(model: nn.Module, name: str) -> None:
    """Have the fusion layer of this name told in each call whether attention weights are asked for.

    It is not given that itself: the nearest module around it that takes `output_attentions` decides what is kept.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        if "output_attentions" in parameters_of(type(module)):
            if _tell_output_attentions not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_tell_output_attentions, with_kwargs=True)
            return


def _tell_output_attentions(module: nn.Module, args: tuple, kwargs: dict) -> None:
    wanted = {**dict(zip(parameters_of(type(module)), args, strict=False)), **kwargs}.get("output_attentions")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_attentions", False)
    for layer in module.modules():
        if isinstance(layer, SDPTLayer):
            layer.output_attentions = bool(wanted)


class _FusionLayer(NamedTuple):
    """A fusion layer of a host: the modules it is made of, in the host's order."""

    host: FusionHost
    parts: list[str]
    projections: list[nn.Module]


def _holds_prompts(module: nn.Module) -> bool:
    return isinstance(module, SDPTLayer) and not isinstance(module, SharedSDPTLayer)


def _select_fusion_layers(model: nn.Module, config: SDPTConfig) -> dict[str, _FusionLayer]:
    """The fusion layers that `config` asks for, in the host's order, each under the name of its first module."""
    modules = _adaptable_modules(model, config)
    layers = _fusion_layers(model, modules)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no fusion layer that SDPT knows"
            + (f" outside of modules_to_save={config.modules_to_save}" if config.modules_to_save else "")
            + f". Models that have one: {supported_hosts()}. Others: peft_sdpt.register_host."
        )

    names = list(layers)
    if config.layers_to_transform is not None:
        absent = [index for index in config.layers_to_transform if index >= len(names)]
        if absent:
            raise ValueError(
                f"SDPTConfig.layers_to_transform has {absent}, but {type(model).__name__} has "
                f"{len(names)} fusion layers, numbered 0 to {len(names) - 1}."
            )
        names = [name for i, name in enumerate(names) if i in config.layers_to_transform]

    if config.target_modules is not None:
        targeted = _targeted_names(modules, layers, config)
        names = [name for name in names if not targeted.isdisjoint(layers[name].parts)]
        if not names:
            raise ValueError(
                f"SDPTConfig.target_modules={config.target_modules!r} matches none of the fusion "
                f"layers asked for by layers_to_transform={config.layers_to_transform}."
            )
    for name in names:
        _check_mode(name, layers[name].host, config)
        for projection in layers[name].projections:
            refuse_adapted(projection)
            refuse_out_of_reach(projection)
    return {name: layers[name] for name in names}


def _fusion_layers(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, _FusionLayer]:
    """All fusion layers among `modules`; those with one of two parts alone are none."""
    hosts = find_hosts(model)
    layers: dict[str, _FusionLayer] = {}
    for name, module in modules.items():
        host = module.fusion_host if isinstance(module, SDPTLayer) else hosts.get(name)
        if host is None:
            continue
        layer = layers.setdefault(host.leader(name), _FusionLayer(host, [], []))
        layer.parts.append(name)
        layer.projections.extend(host.projections(module.get_base_layer() if isinstance(module, SDPTLayer) else module))
    return {name: layer for name, layer in layers.items() if len(layer.projections) == layer.host.num_sides}


def _check_mode(name: str, host: FusionHost, config: SDPTConfig) -> None:
    if config.prompt_mode == "independent" and host.num_sides != 2:
        raise ValueError(
            f"SDPTConfig.prompt_mode='independent' gives each of two sides its own tokens, and '{name}' ({host.name}) "
            "has one. Use 'unified'."
        )
    if not config.image_attends_prompts and host.image_reads is None:
        raise ValueError(
            f"SDPTConfig.image_attends_prompts=False hides prompts from image tokens, and what '{name}' ({host.name}) "
            "does cannot be told apart by who attends. Use True."
        )


def _adaptable_modules(model: nn.Module, config: SDPTConfig) -> dict[str, nn.Module]:
    """All named modules but those inside tuner layers or trained whole (`modules_to_save`)."""
    modules: dict[str, nn.Module] = {}
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(closed):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or any(
            _ends_with(name, saved) for saved in config.modules_to_save or ()
        ):
            closed += (name + ".",)
            continue
        if isinstance(module, SDPTLayer):
            closed += (name + ".",)
        modules[name] = module
    return modules


def _targeted_names(modules: dict[str, nn.Module], layers: dict[str, _FusionLayer], config: SDPTConfig) -> set[str]:
    """Names that `target_modules` matches, by PEFT's rules; all of them of fusion layers."""
    targets = config.target_modules
    known = [part for layer in layers.values() for part in layer.parts]
    if isinstance(targets, str):
        matched = {name for name in modules if match_target_against_key(targets, name)}
        unused = [] if matched else [targets]
    else:
        matched = {name for name in modules if any(_ends_with(name, t) for t in targets)}
        unused = [t for t in targets if not any(_ends_with(name, t) for name in matched)]
    strangers = sorted(matched.difference(known))
    if strangers:
        raise ValueError(
            f"SDPTConfig.target_modules={targets!r} matches '{strangers[0]}' "
            f"({type(modules[strangers[0]]).__name__}), which is no fusion layer. Supported: "
            f"{supported_hosts()}."
        )
    if unused:
        raise ValueError(
            f"SDPTConfig.target_modules: {unused} matches no module. Fusion layers of this host: {', '.join(known)}."
        )
    return matched


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
