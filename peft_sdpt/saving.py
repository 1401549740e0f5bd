# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the saved weights of an adapter before a base model is changed.

PEFT attaches an adapter first, and fetches and reads its weights afterwards. If that failed, the base model would be
left with an adapter of random numbers. So the weights are checked when PEFT loads the config, which it does first.
Their names and shapes are checked before their values are read. A downloaded file may have any tensor, and only those
that the config declares are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.config import PeftConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .downloads import remove_damaged
from .errors import reason
from .files import follow_umask
from .model_card import complete_card
from .wording import MAX_LISTED, counted, enumerated, quoted

# Shapes of the parameters of an adapter, by plain name.
Shapes = dict[str, tuple[int, ...]]
# In keys of a state dict, these are between the name of a layer and the name of the adapter: the prompts and the gates
# of a fusion layer, and the LoRA matrices A and B of a linear layer.
PROMPTS_KEY, GATES_KEY = ".sdpt_prompts", ".sdpt_gates"
LORA_KEYS = (".sdpt_lora_A", ".sdpt_lora_B")
PARAMETER_KEYS = (PROMPTS_KEY, GATES_KEY, *LORA_KEYS)
# Largest absolute value of a parameter. Training gives far smaller ones, and much larger ones overflow.
LARGEST = 1e9
# Largest number of letters of a name in a message. Names of modules are rarely longer.
MAX_NAME = 200
# Modules that wrappers put around others: `torch.compile`, `checkpoint_wrapper` and FSDP.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
T = TypeVar("T")


class SavedConfig(PeftConfig):
    """A config that checks the weights beside it when it is loaded, and completes the model card when it is saved.

    Attributes:
        saved_modules: The value of `modules_to_save` when the config was loaded, and the shape of each tensor of these
            modules in the weights beside it, by its plain name. None if the config was not loaded, or has no weights
            beside it.
    """

    modules_to_save: list[str] | None = None
    saved_modules: tuple[list[str], Shapes] | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a config, and check that the weights beside it can be read and fit it.

        `PeftModel.from_pretrained` and `load_adapter` call this before they touch the base model, unless they are given
        `config=`. `PeftConfig.from_pretrained`, which `load_adapter` of transformers calls, makes the same check.
        Without weights, there is nothing to check.

        Args:
            pretrained_model_name_or_path: Folder, or repository of the Hub.
            subfolder: Subfolder in the folder or repository.
            kwargs: Arguments of `huggingface_hub.hf_hub_download`. Others are ignored.

        Raises:
            ValueError: There is no config, one of its values breaks a rule, or the weights beside it cannot be fetched
                or read, are not finite, do not fit the config, or have a tensor that the config does not declare.
        """
        path = os.fspath(pretrained_model_name_or_path)
        config = super().from_pretrained(path, subfolder=subfolder, **kwargs)
        if isinstance(config, SavedConfig):
            download, _, _ = cls._split_kwargs(kwargs)
            config.check_weights_beside(path, subfolder, **download)
        return config

    def check_weights_beside(self, path: str, subfolder: str | None = None, **download: Any) -> None:
        """Check the weights beside the config, and mark it as one that belongs to their base model.

        Args:
            path: Folder, or repository of the Hub.
            subfolder: Subfolder in the folder or repository.
            download: Arguments of `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: See `check_weights`.
        """
        modules = self.modules_to_save or []
        shapes = check_weights(path, subfolder, self.parameter_shapes(), modules, **download)
        self.saved_modules = None if shapes is None else (list(modules), shapes)
        self.mark_as_saved(has_weights=shapes is not None)

    def check_saved_modules(self, model: nn.Module) -> None:
        """Check that the weights beside the config hold the modules of a base model that `modules_to_save` names.

        Args:
            model: The base model.

        Raises:
            ValueError: A tensor is missing, surplus or of another shape.
        """
        # If the field was changed after loading, the modules are new ones.
        if self.saved_modules is not None and self.saved_modules[0] == (self.modules_to_save or []):
            modules, shapes = self.saved_modules
            check_base_model(found=shapes, expected=shapes_of_saved_modules(model, modules))

    def mark_as_saved(self, has_weights: bool) -> None:
        """Mark the config as one that belongs to the base model of a saved adapter.

        Args:
            has_weights: Whether the config has weights beside it. If True, the config is always marked, and its regular
                expressions are replaced by the names that they selected. If False, only a config without a digest is
                marked.
        """
        raise NotImplementedError

    def parameter_shapes(self) -> Shapes | None:
        """Return the shape of each parameter by its plain name; None if the config does not name the fusion layers."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and complete the model card if PEFT has put one beside it."""
        # PEFT's model passes the class of the base model here. It is stored, so that it is not lost if the config alone
        # is saved or pushed later.
        self.auto_mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        complete_card(save_directory, self)
        # PEFT's model has just written the weights.
        follow_umask(Path(save_directory) / SAFETENSORS_WEIGHTS_NAME)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has put the card of the repository, or transformers' empty one, over ours.
        complete_card(working_dir, self)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def plain_name(name: str) -> str:
    """Return the name of a module or parameter without what wrappers add.

    These are `torch.compile`, activation checkpointing and FSDP anywhere in the name, and `PeftModel`, DataParallel and
    DistributedDataParallel at its beginning.

    Example:
        >>> plain_name("module.base_model.model._orig_mod.encoder.layers.0._orig_mod.attn")
        'encoder.layers.0.attn'
    """
    name = without_wrappers(name)
    while (inner := name.removeprefix("module.").removeprefix("base_model.model.")) != name:
        name = inner
    return name


def without_wrappers(name: str) -> str:
    """Return a name without the modules that `torch.compile`, activation checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def parameter_of(key: str, adapter_name: str | None = None) -> str | None:
    """Return the plain name of the parameter of an adapter that a key of a state dict names.

    Args:
        key: Key of a saved adapter, or of a model.
        adapter_name: The key may end with this name, as those of a model do.

    Returns:
        None if the key names no parameter of this tuner, or one of another adapter.
    """
    for kind in PARAMETER_KEYS:
        layer, found, suffix = key.rpartition(kind)
        if found and suffix in ("", "" if adapter_name is None else f".{adapter_name}"):
            return (lora_name(layer) if kind in LORA_KEYS else plain_name(layer)) + kind
    return None


def lora_name(name: str) -> str:
    """Return the plain name of a linear layer, also without the `base_layer` of each tuner layer around it."""
    return ".".join(part for part in plain_name(name).split(".") if part != "base_layer")


def parameters_in(state_dict: Mapping[str, T], adapter_name: str | None = None) -> dict[str, T]:
    """Return the parameters of an adapter in a state dict by their plain names; see `parameter_of`.

    Raises:
        ValueError: Two keys name one parameter.
    """
    parameters: dict[str, T] = {}
    for key, value in state_dict.items():
        name = parameter_of(key, adapter_name)
        if name is None:
            continue
        if name in parameters:
            raise ValueError(f"The state dict has two keys for {_described(name)}; one is '{key}'.")
        parameters[name] = value
    return parameters


def _described(parameter: str) -> str:
    """Describe a parameter, given its plain name."""
    layer, found, kind = parameter.rpartition(".sdpt_")
    if not found:
        return f"the tensor {quoted(parameter, MAX_NAME)} of modules_to_save"
    if parameter.endswith(LORA_KEYS):
        return f"the LoRA matrix {quoted(parameter, MAX_NAME)}"
    return f"the {kind} of the fusion layer {quoted(layer, MAX_NAME)}"


def check_weights(
    adapter: str, subfolder: str | None, expected: Shapes | None, modules_to_save: Sequence[str] = (), **download: Any
) -> Shapes | None:
    """Check the saved weights of an adapter: their names and shapes first, then their values.

    Args:
        adapter: Folder, or repository of the Hub. Files from the Hub stay in the cache, where PEFT finds them.
        subfolder: Subfolder in the folder or repository.
        expected: Shape of each parameter by its plain name. None if the config does not name the fusion layers.
        modules_to_save: Names of the modules that the weights may hold beside the parameters.
        download: Arguments of `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir` and so on.

    Returns:
        Shape of each tensor of `modules_to_save` by its plain name. None if there are no weights to check.

    Raises:
        ValueError: The weights cannot be fetched or read, the config does not name the fusion layers, a parameter is
            missing, surplus, of another shape or not finite, other modules have names of a compiled model, or there is
            a tensor that is neither a parameter nor in `modules_to_save`.
    """
    path = os.path.join(adapter, subfolder) if subfolder else adapter
    named = f"SDPT adapter {quoted(path, MAX_NAME)}"
    with _loading(named):
        files = _weights_files(adapter, subfolder, **download)
    if not files:
        return None
    if expected is None:
        raise ValueError(
            f"The config of the {named} does not name its fusion layers (fusion_layers is None), as the config of a "
            "saved adapter does, and nothing was put on the base model."
        )
    shapes = [_check_file(file, named, expected, modules_to_save) for file in files]
    return shapes[0]


def _check_file(file: str, named: str, expected: Shapes, modules_to_save: Sequence[str]) -> Shapes:
    """Check a file with weights. See `check_weights`."""
    with _loading(named, file):
        shapes = _shapes_in(file)
    wrapped = [key for key in shapes if parameter_of(key) is None and without_wrappers(key) != key]
    if wrapped:
        raise ValueError(
            f"The weights of the {named} name a module as a compiled or wrapped model does "
            f"({quoted(wrapped[0], MAX_NAME)}), and PEFT cannot load it. Rename the key to "
            f"{quoted(without_wrappers(wrapped[0]), MAX_NAME)}."
        )
    if differences := differing_shapes(parameters_in(shapes), expected):
        raise ValueError(
            f"The weights of the {named} do not fit its config, and nothing was put on the base model "
            f"(expected: what the config names, found: what the weights have). {differences}."
        )
    rest = {key: shape for key, shape in shapes.items() if parameter_of(key) is None}
    # PEFT looks for the tensors of `modules_to_save` under exactly these names.
    strangers = (
        key
        for key in rest
        if not _is_in_modules(plain_name(key), modules_to_save)
        or key.removeprefix("base_model.model.") != plain_name(key)
    )
    refuse_strangers(strangers, named)
    with _loading(named, file):
        values = _values_in(file)
    check_numbers(
        {name: values[key] for name, key in parameters_in({key: key for key in shapes}).items()},
        {key: values[key] for key in rest},
        named,
    )
    return {plain_name(key): shape for key, shape in rest.items()}


@contextmanager
def _loading(named: str, file: str | None = None) -> Iterator[None]:
    """Name the adapter in any error that is raised in this context.

    Args:
        named: The adapter.
        file: A file that is read. If it is in the cache of the Hub and damaged, it is removed from there.

    Raises:
        ValueError: There was an error.
    """
    try:
        try:
            yield
        except Exception:
            remove_damaged([] if file is None else [Path(file)])
            raise
    except Exception as error:  # safetensors, pickle, the file system and HTTP raise many kinds of errors
        raise ValueError(
            f"The weights of the {named} cannot be loaded, and nothing was put on the base model: {reason(error)}"
        ) from error


def _is_in_modules(parameter: str, modules: Sequence[str]) -> bool:
    """Return whether a parameter with this plain name is in a module that PEFT saves for these `modules_to_save`."""
    parts = parameter.split(".")
    around = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(_is_saved_module(name, modules) for name in around)


def _is_saved_module(name: str, modules: Sequence[str]) -> bool:
    """Return whether PEFT trains and saves a module whole, by the rule of `peft.utils.other._set_trainable`."""
    return name.endswith(tuple(modules))


def shapes_of_saved_modules(model: nn.Module, modules: Sequence[str]) -> Shapes:
    """Return the shape of each tensor that an adapter with these `modules_to_save` saves, by its plain name.

    Args:
        model: The base model. It may have adapters already.
        modules: Value of `modules_to_save`.
    """
    shapes: Shapes = {}
    found: list[str] = []
    places: set[tuple[int, str]] = set()
    # A module can have several parents. PEFT copies it once for each.
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_saved_module(name, modules) or name.startswith(tuple(f"{other}." for other in found)):
            continue
        found.append(name)
        parent, _, child = name.rpartition(".")
        place = (id(model.get_submodule(parent)), child)
        if place not in places:
            places.add(place)
            whole = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            tensors = whole.state_dict().items()
            shapes |= {plain_name(f"{name}.{key}"): tuple(value.shape) for key, value in tensors}
    return shapes


def refuse_strangers(keys: Iterable[str], named: str) -> None:
    """Raise an error if weights have tensors that do not belong to the adapter.

    Args:
        keys: Keys of these tensors.
        named: Description of the adapter for the message.

    Raises:
        ValueError: There is at least one key.
    """
    strangers = [quoted(key, MAX_NAME) for key in keys]
    if strangers:
        raise ValueError(
            f"The weights of the {named} have {counted(len(strangers), 'tensor')} that its config does not declare, "
            f"and nothing was loaded, because they would overwrite the base model: {enumerated(strangers)}. An adapter "
            "has prompts, gates, LoRA matrices, and the modules that modules_to_save names."
        )


def check_numbers(parameters: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], named: str) -> None:
    """Check the values of weights. Tensors without values, on the meta device, are not checked.

    Args:
        parameters: Prompts, gates and LoRA matrices by their plain names.
        others: Tensors of `modules_to_save` by their keys.
        named: Description of the adapter for the message.

    Raises:
        ValueError: A parameter is not floating point, has a number that is not finite, or has an absolute value above
            1e9; another weight or bias is not finite; or another tensor has a NaN.
    """

    def is_usable(key: str, value: torch.Tensor) -> bool:
        # A buffer may be a mask, which is infinite.
        is_finite = value.isfinite() if key.endswith((".weight", ".bias")) else ~value.isnan()
        return bool(is_finite.all())

    bad = [
        _described(name)
        for name, value in parameters.items()
        # "not <=" instead of ">", because a comparison with a NaN is always False.
        if not value.is_meta and not (value.is_floating_point() and bool((value.float().abs() <= LARGEST).all()))
    ]
    bad += [
        _described(plain_name(key))
        for key, value in others.items()
        if not value.is_meta and value.is_floating_point() and not is_usable(key, value.float())
    ]
    if bad:
        raise ValueError(
            f"The weights of the {named} are damaged, and nothing was loaded: all numbers must be finite, and those of "
            f"prompts, gates and LoRA matrices floating-point numbers of at most {LARGEST:g}. "
            f"This does not hold for {enumerated(bad)}."
        )


def _weights_files(adapter: str, subfolder: str | None, **download: Any) -> list[str]:
    """Return the paths of the weights, first the file that PEFT loads, which is fetched from the Hub if necessary.

    A folder may have weights in both formats, and transformers loads the other one with `use_safetensors=False`.
    """
    folder = os.path.join(adapter, subfolder or "")
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    # A link that leads nowhere is a file that cannot be read.
    files = [file for name in names if os.path.lexists(file := os.path.join(folder, name))]
    if files or os.path.isdir(folder):
        return files
    offline: LocalEntryNotFoundError | None = None
    for name in names:
        if constants.HF_HUB_OFFLINE and subfolder:
            # PEFT 0.21 looks for subfolder/subfolder/... when it is offline, and would fail later.
            name = f"{subfolder}/{name}"
        try:
            return [hf_hub_download(adapter, name, subfolder=subfolder, **download)]
        except LocalEntryNotFoundError as error:  # the Hub cannot be reached, and the cache does not have the file
            offline = error
        except EntryNotFoundError:
            continue
    if offline is not None:
        raise offline
    return []


def _shapes_in(file: str) -> Shapes:
    if file.endswith(".safetensors"):
        # Reads the header only, and checks that the file is as long as the header says.
        with safe_open(file, framework="pt") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    weights = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    ):
        raise TypeError(f"{os.path.basename(file)} is no mapping of names to tensors")
    return {key: tuple(value.shape) for key, value in weights.items()}


def _values_in(file: str) -> dict[str, torch.Tensor]:
    if file.endswith(".safetensors"):
        return load_file(file)
    weights: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


def check_base_model(found: Shapes, expected: Shapes) -> None:
    """Check that the parameters of a saved adapter are those that a base model takes.

    Args:
        found: Shape of each parameter of the adapter, by its plain name.
        expected: Shape of each parameter that fits the base model.

    Raises:
        ValueError: They do not fit. The message names every layer that differs, with both shapes.
    """
    if differences := differing_shapes(found, expected):
        raise ValueError(
            "This SDPT adapter was made for another base model (expected: what this base model takes with the "
            f"adapter's config, found: what the adapter has). {differences}. A config loaded with an adapter belongs "
            "to its base model; make a new SDPTConfig to start on another one."
        )


def check_state_dict(found: Shapes, expected: Shapes, adapter_name: str) -> None:
    """Check that the parameters in a state dict are those of an adapter that a model has.

    Args:
        found: Shape of each parameter in the state dict, by its plain name.
        expected: Shape of each parameter of the model.
        adapter_name: Name of the adapter.

    Raises:
        ValueError: They differ. The message names every layer that does, with both shapes.
    """
    if differences := differing_shapes(found, expected):
        raise ValueError(
            f"The weights do not fit the SDPT adapter {adapter_name!r} of this model, and nothing was loaded "
            f"(expected: what the model has, found: what the weights have). {differences}. To load another adapter "
            "beside it, choose another adapter_name."
        )


def differing_shapes(found: Shapes, expected: Shapes) -> str:
    """Describe parameters that are not as expected, at most ten, with both shapes. The text is empty if all are."""
    layers = {name.rpartition(".sdpt_")[0] for name in expected}
    differences = []
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) == found.get(name):
            continue
        layer, is_ours, kind = name.rpartition(".sdpt_")
        absent = "no such matrix" if name.endswith(LORA_KEYS) else f"no {kind}" if is_ours else "no such tensor"
        unknown = "no such fusion layer" if absent == f"no {kind}" and layer not in layers else absent
        wanted = quoted(expected[name]) if name in expected else unknown
        got = quoted(found[name]) if name in found else absent
        differences.append(f"{_described(name)}: expected {wanted}, found {got}")
    more = f"; and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
    return "; ".join(differences[:MAX_LISTED]) + more
