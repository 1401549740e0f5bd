# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Features of images and prompts from the frozen backbones of a detector, computed once and stored on disk.

If only prompts of the fusion layers train, these features are the same in every epoch. `FeatureCache` replaces the
forward of the image backbone and of the text encoder by one that reads stored features. Everything above them runs as
usual, including masks, position embeddings and projections.

An entry holds the output of a module in evaluation mode for one sample alone. Its key is a hash of everything that
determines it: weights, config and inputs. The inputs are the processed image, padded as in its batch, or the tokens of
the prompt with their masks. So a changed image, class name or size needs no action, and an entry does not depend on the
batch. Its last bits depend on the kind of CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

from ..errors import InputError
from ..files import UNFINISHED, check_writable
from .devices import to_cpu
from .prediction import evaluation_mode
from .stored_tensors import digest, read_tensors, weights_of, write_tensors

# Unfinished entries older than this many seconds come from killed processes. Writing takes far less than a second. If
# the clock jumps in that time, one entry is not stored.
ABANDONED = 3600


class FeatureCache:
    """Stored features of the frozen backbones of a Grounding DINO or MM Grounding DINO.

    Several processes may share a folder, and the folder may be removed at any time. Features that cannot be stored are
    computed each time. The first time that this happens, a line on stderr says so.

    Args:
        cache_folder: Folder for the features. It is made if it does not exist.
        detector: The detector with its adapter, on its device.

    Attributes:
        leaves_out_dropout: Whether the backbones have dropout, which stored features are computed without.

    Raises:
        InputError: The folder cannot be written, the base model has other backbones, or a part of them trains.
    """

    def __init__(self, cache_folder: str | os.PathLike, detector: nn.Module):
        # Any, because these are attributes of one family of models, which `nn.Module` does not declare.
        unwrapped: Any = detector
        base_model: Any = unwrapped.get_base_model() if hasattr(detector, "get_base_model") else detector
        try:
            vision, text = base_model.model.backbone, base_model.model.text_backbone
            image_backbone = vision.conv_encoder.model
        except AttributeError:
            raise InputError(
                f"cache_folder=...: only works with Grounding DINO and MM Grounding DINO, got "
                f"{type(base_model).__name__}."
            ) from None
        for part in (vision, text):
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    raise InputError(
                        f"cache_folder=...: {name} of {type(part).__name__} trains, so its stored features would "
                        "become outdated."
                    )
        folder = Path(cache_folder)
        _make(folder)
        entries = _Entries()
        self._stored = {
            "pictures": _Stored(image_backbone, folder, "pictures", _backbone_output, entries),
            "prompts": _Stored(text, folder, "prompts", _text_output, entries),
        }
        self.leaves_out_dropout = any(_drops(stored.module) for stored in self._stored.values())

    @contextlib.contextmanager
    def used(self, prompts: bool = True) -> Iterator[None]:
        """Read features from the folder in this context, and store features that are missing.

        Args:
            prompts: Whether to use stored features of prompts. Use False for random prompts, which do not occur again.
        """
        with self._stored["pictures"].in_place(), self._stored["prompts"].in_place() if prompts else nullcontext():
            yield


class _Stored:
    """Replaces the forward of a frozen module by one that uses stored features for each sample of a batch.

    Args:
        module: The module. It takes tensors with one row per sample. The features of a sample do not depend on other
            samples.
        folder: Folder of all entries.
        name: Name for the entries of this module.
        as_output: Makes the output of the module from batches of its features.
        entries: Writes the entries.
    """

    def __init__(
        self,
        module: nn.Module,
        folder: Path,
        name: str,
        as_output: Callable[[list[Tensor]], Any],
        entries: _Entries,
    ):
        self.module, self.as_output, self.entries = module, as_output, entries
        # The part of the keys that all calls share.
        self.module_key = digest(itertools.chain(_configuration(module), weights_of(module)))
        self.folder = folder / f"{name}-{self.module_key[:16]}"

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let calls of the module use stored features in this context."""
        # `nn.Module` prefers an attribute `forward` to the method of the class. So the module stays in the model, with
        # its parameters and its name.
        before = vars(self.module).get("forward")
        self._compute = self.module.forward
        self.module.forward = self._forward
        try:
            yield
        finally:
            del self.module.forward
            if before is not None:
                self.module.forward = before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = [*args, *kwargs.values()]
        if torch.is_grad_enabled() and any(torch.is_tensor(value) and value.requires_grad for value in arguments):
            raise InputError(
                "FeatureCache.used(): stored features have no gradient with respect to pixels; leave this context to "
                "attack images."
            )
        device = next(value.device for value in arguments if torch.is_tensor(value))
        keys = self._keys(arguments, list(kwargs), device)
        features_of: dict[str, list[Tensor]] = {}
        for row, key in enumerate(keys):
            if key not in features_of:
                file = self.folder / f"{key}.safetensors"
                features = read_tensors(file, key)
                if features is None:
                    features = self._compute_row(row, args, kwargs)
                    self.entries.write(file, key, features)
                features_of[key] = features
        levels = zip(*(features_of[key] for key in keys), strict=True)
        return self.as_output([torch.stack(features).to(device) for features in levels])

    def _keys(self, arguments: list, names: list[str], device: torch.device) -> list[str]:
        """Return the key of each row."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        common = [self.module_key, torch.__version__, transformers.__version__, device.type, str(autocast), str(names)]
        # Pixels are hashed where they came from, not copied back from the device.
        tensors = to_cpu([value for value in arguments if torch.is_tensor(value)])
        common += [repr(value) for value in arguments if not torch.is_tensor(value)]
        return [digest([*common, *(tensor[row] for tensor in tensors)]) for row in range(len(tensors[0]))]

    @torch.no_grad()
    def _compute_row(self, row: int, args: tuple, kwargs: dict) -> list[Tensor]:
        """Compute the features of one sample, on the CPU. It runs alone, because others could change its last bits."""

        def one(value: Any) -> Any:
            return value[row : row + 1] if torch.is_tensor(value) else value

        with evaluation_mode(self.module):
            output = self._compute(*map(one, args), **{name: one(value) for name, value in kwargs.items()})
        features = output.feature_maps if "feature_maps" in output else output[:1]
        return [feature[0].contiguous().cpu() for feature in features]


def _backbone_output(features: list[Tensor]) -> BackboneOutput:
    return BackboneOutput(feature_maps=tuple(features))  # type: ignore[arg-type]  # declared as a tuple of one


def _text_output(features: list[Tensor]) -> BaseModelOutput:
    return BaseModelOutput(last_hidden_state=features[0])


def _configuration(module: nn.Module) -> list[str]:
    """Return what determines the output of the module, apart from its weights and inputs."""
    # Any, because `nn.Module` does not declare the config of a model of transformers.
    model_config: Any = module.config
    config = model_config.to_dict()
    config.pop("_name_or_path", None)
    attention = str(getattr(model_config, "_attn_implementation", None))
    return [type(module).__qualname__, attention, json.dumps(config, sort_keys=True, default=str)]


class _Entries:
    """Writes entries. If entries cannot be written, it prints this once and raises no error."""

    def __init__(self) -> None:
        self.told = False

    def write(self, file: Path, key: str, features: list[Tensor]) -> None:
        try:
            write_tensors(file, key, features)
        except InputError as error:
            if not self.told:
                self.told = True
                tqdm.write(f"{error} Features that are not stored are computed in each epoch.", file=sys.stderr)


def _make(folder: Path) -> None:
    """Make the folder, check that it can be written, and remove unfinished entries of killed processes."""
    check_writable(folder, "cache_folder")
    for file in folder.rglob(f"*{UNFINISHED}"):
        # Another process may be faster, and a file of another user may stay.
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


def _drops(module: nn.Module) -> bool:
    """Return whether a module has dropout in training mode, including DropPath and the dropout of attention."""

    def rates(part: nn.Module) -> list[Any]:
        return [value for name, value in vars(part).items() if "drop" in name or name == "p"]

    return any(isinstance(rate, float) and rate > 0 for part in module.modules() for rate in rates(part))
