# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Which modules of a base model are fusion layers, and which of them a config asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import regex
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import SDPTConfig
from .gates import gate_sides_and_heads
from .hosts import FusionHost, find_hosts, supported_hosts
from .initialization import prompt_dim
from .layer import SDPTLayer
from .saving import plain_name
from .weights import refuse_adapted, refuse_not_finite, refuse_out_of_reach
from .wording import quoted

# Seconds that a regular expression may take on the name of one module. A usual one takes microseconds.
MATCHING_TIME = 1.0


@dataclass
class FusionLayer:
    """A fusion layer of a base model.

    Attributes:
        spec: The spec that it fits.
        parts: Full names of the modules it is made of, in the order of the base model.
        projections: The projections that are inverted, one for each side.
        heads: Number of heads that have gates. None if this kind of fusion has no gates.
    """

    spec: FusionHost
    parts: list[str] = field(default_factory=list)
    projections: list[nn.Linear] = field(default_factory=list)
    heads: int | None = None

    def prompt_dim(self, config: SDPTConfig) -> int:
        """Return the dimension of the layer's prompts."""
        return prompt_dim(config, self.spec, self.projections)

    def gates(self, config: SDPTConfig) -> list[int] | None:
        """Return the numbers of sides and of heads that have gates; None if the layer has no gates."""
        return gate_sides_and_heads(config, self.spec, self.heads)


@dataclass
class Selection:
    """The fusion layers of a base model, each under the full name of its first module, in the model's order.

    Attributes:
        known: All fusion layers of the base model.
        layers: The layers that the config selects.
        excluded: The layers that `exclude_modules` removes from the selection.
    """

    known: dict[str, FusionLayer]
    layers: dict[str, FusionLayer]
    excluded: dict[str, FusionLayer]


def outside_saved(config: SDPTConfig) -> str:
    """Return what messages say about the modules that are not looked at, because `modules_to_save` names them."""
    return f" outside of modules_to_save={quoted(config.modules_to_save)}" if config.modules_to_save else ""


def select_fusion_layers(model: nn.Module, config: SDPTConfig) -> Selection:
    """Select the fusion layers that a config asks for.

    Args:
        model: The base model. It may have adapters already.
        config: Config of the adapter.

    Raises:
        ValueError: The model has no known fusion layer, or a field of the config names no layer, or a module that is
            not a fusion layer.
    """
    modules = open_modules(model, config, lambda module: isinstance(module, SDPTLayer))
    layers = _fusion_layers(model, modules)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no fusion layer that SDPT knows{outside_saved(config)}. Models that have one: "
            f"{supported_hosts()}. Others: peft_sdpt.register_host."
        )
    names = [part for layer in layers.values() for part in layer.parts]
    for name in names:
        if outer := next((other for other in names if name.startswith(f"{other}.")), None):
            raise ValueError(f"The fusion layer '{name}' is inside the fusion layer '{outer}': SDPT cannot adapt both.")
    # Only layers that are adapted by default have an index, so indices keep their meaning when other specs are added.
    indexed = [name for name, layer in layers.items() if layer.spec.adapted_by_default]
    names = list(layers) if config.target_modules is not None else indexed
    if config.layers_to_transform is not None:
        transformed = _transformed_names(model, indexed, config)
        names = [name for name in names if name in transformed]
    if config.target_modules is not None:
        targeted = _targeted_names(modules, layers, config)
        names = [name for name in names if not targeted.isdisjoint(layers[name].parts)]
        if not names:
            raise ValueError(
                f"SDPTConfig.target_modules={quoted(config.target_modules)} matches none of the fusion "
                f"layers that layers_to_transform={quoted(config.layers_to_transform)} asks for."
            )
    excluded = [name for name in names if any(matches(config.exclude_modules, part) for part in layers[name].parts)]
    names = [name for name in names if name not in excluded]
    if not names:
        raise ValueError(
            f"SDPTConfig.exclude_modules={quoted(config.exclude_modules)} leaves no fusion layer to adapt; "
            f"it excludes {', '.join(excluded)}."
            if excluded
            else f"{type(model).__name__} has no fusion layer{outside_saved(config)} that is adapted by default; "
            f"name one in target_modules: {', '.join(layers)}."
        )
    return Selection(layers, {name: layers[name] for name in names}, {name: layers[name] for name in excluded})


def open_modules(model: nn.Module, config: SDPTConfig, is_closed: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Return all named modules, except those in `modules_to_save` and those inside a module that is closed."""
    modules: dict[str, nn.Module] = {}
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(closed):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) or matches(config.modules_to_save, name):
            closed += (name + ".",)
            continue
        if is_closed(module):
            closed += (name + ".",)
        modules[name] = module
    return modules


def _fusion_layers(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, FusionLayer]:
    """Return all fusion layers among `modules`, except layers with only one of their two modules."""
    specs = find_hosts(model)
    layers: dict[str, FusionLayer] = {}
    for name, module in modules.items():
        spec = module.fusion_host if isinstance(module, SDPTLayer) else specs.get(name)
        if spec is None:
            continue
        layer = layers.setdefault(spec.leader(name), FusionLayer(spec))
        layer.parts.append(name)
        base_layer = module.get_base_layer() if isinstance(module, SDPTLayer) else module
        layer.projections.extend(spec.projections(base_layer))
        layer.heads = spec.num_heads(base_layer)
    return {name: layer for name, layer in layers.items() if len(layer.projections) == layer.spec.num_sides}


def _transformed_names(model: nn.Module, indexed: list[str], config: SDPTConfig) -> set[str]:
    """Return the names of the fusion layers that `layers_to_transform` selects."""
    indices = config.layers_to_transform
    assert isinstance(indices, list)
    absent = [index for index in indices if index >= len(indexed)]
    if absent:
        if not indexed:
            raise ValueError(
                f"SDPTConfig.layers_to_transform has {quoted(absent)}, but {type(model).__name__} has no fusion layer "
                "that is adapted by default."
            )
        raise ValueError(
            f"SDPTConfig.layers_to_transform has {quoted(absent)}, but {type(model).__name__} has "
            f"{len(indexed)} fusion layers, numbered 0 to {len(indexed) - 1}."
        )
    return {indexed[index] for index in indices}


def _targeted_names(modules: dict[str, nn.Module], layers: dict[str, FusionLayer], config: SDPTConfig) -> set[str]:
    """Return the names of the modules of fusion layers that `target_modules` matches, by PEFT's rules."""
    targets = config.target_modules
    assert targets is not None
    parts = {part: layer for layer in layers.values() for part in layer.parts}
    matched = {name for name in modules if matches(targets, name)}
    strangers = sorted(matched.difference(parts))
    if strangers:
        raise ValueError(
            f"SDPTConfig.target_modules={quoted(targets)} matches '{strangers[0]}' "
            f"({type(modules[strangers[0]]).__name__}), which is not a fusion layer. Fusion layers of this base "
            f"model: {', '.join(parts)}."
        )
    each = [targets] if isinstance(targets, str) else [[target] for target in targets]
    unused = [target for target in each if not any(matches(target, name) for name in matched)]
    if unused:
        missing = [target if isinstance(target, str) else target[0] for target in unused]
        raise ValueError(
            f"SDPTConfig.target_modules: {quoted(missing)} matches no module. "
            f"Fusion layers of this base model: {', '.join(parts)}."
        )
    return matched


def matches(targets: list[str] | str | None, name: str) -> bool:
    """Return whether a module has one of these names or ends of names, or fits this regular expression.

    What wrappers add to names does not count.

    Raises:
        ValueError: The expression takes more than a second on one name. It may come from somebody else's config.
    """
    name = plain_name(name)
    if targets is None:
        return False
    if isinstance(targets, str):
        try:
            # As in PEFT, and with a limit, which `re` does not have.
            return regex.fullmatch(targets, name, timeout=MATCHING_TIME) is not None
        except (regex.error, TimeoutError) as error:
            reason = "takes too long" if isinstance(error, TimeoutError) else f"is not valid ({error})"
            raise ValueError(f"the regular expression {quoted(targets)} {reason} on the name '{name}'") from None
    return any(name == target or name.endswith(f".{target}") for target in map(plain_name, targets))


def check_fusion_layer(name: str, layer: FusionLayer, config: SDPTConfig) -> None:
    """Check that a fusion layer can be adapted.

    Raises:
        ValueError: The layer does not suit the config, another tuner's adapter acts on an inverted projection, or the
            weight of such a projection is sharded or offloaded, or not finite.
    """
    spec = layer.spec
    if config.prompt_mode == "independent" and spec.num_sides != 2:
        raise ValueError(
            f"SDPTConfig.prompt_mode='independent' gives each of two sides its own tokens, and '{name}' ({spec.name}) "
            "has one. Use 'unified'."
        )
    if not config.image_attends_prompts and spec.image_reads is None:
        raise ValueError(
            f"SDPTConfig.image_attends_prompts=False hides prompts from image tokens, and '{name}' ({spec.name}) does "
            "not tell which tokens attend. Use True."
        )
    if layer.heads is None and config.prompt_groups is not None:
        raise ValueError(
            f"SDPTConfig.prompt_groups={config.prompt_groups} needs gates, and '{name}' ({spec.name}) has none, "
            "because its spec names no heads. Use None."
        )
    if layer.heads is None and config.prompt_gate is not None:
        warnings.warn(
            f"The fusion layer '{name}' ({spec.name}) has no gates, because its spec names no heads. Its prompts "
            "act as with prompt_gate=None, so a new adapter changes the outputs.",
            stacklevel=2,
        )
    for projection in layer.projections:
        refuse_adapted(projection)
        refuse_out_of_reach(projection)
        try:
            refuse_not_finite(projection)
        except ValueError as error:
            raise ValueError(f"The fusion layer '{name}' ({spec.name}) cannot be adapted: {error}") from None
