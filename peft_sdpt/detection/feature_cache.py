# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a host's frozen backbones make of pictures and prompts, computed once and kept on disk.

While only prompts of the fusion layers train, these features are the same in every epoch. Here the forward of the
backbone and of the text encoder is stood in for by one that reads them; all that is above, masks, position embeddings
and projections included, is the host's own and runs as ever.

An entry is what a module in evaluation mode makes of one sample alone, and its key is a hash of all that goes into it:
weights, configuration and what the module is called with, which is the picture as the processor gave it, padded as its
batch is, or the prompt's tokens with their masks. So nothing has to be told that a picture, a name or a size has
changed, and an entry is the same in whatever batch it is computed; kinds of CPU differ in its last bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

from ..errors import InputError
from ..files import UNFINISHED, whole_file

# Seconds after which an unfinished entry is one of a killed process. Writing takes far less than one.
ABANDONED = 3600


class FeatureCache:
    """Stored features of the frozen backbones of a Grounding DINO or MM Grounding DINO.

    Several processes may share a folder, and it may be removed at any time.

    Args:
        cache_folder: where they are kept; made if it is not there.
        detector: with its adapter, on its device.

    Raises:
        InputError: the folder cannot be written, the host has other parts, or something below the fusion layers trains.
    """

    def __init__(self, cache_folder: str | os.PathLike, detector: nn.Module):
        host = detector.get_base_model() if hasattr(detector, "get_base_model") else detector
        try:
            vision, text = host.model.backbone, host.model.text_backbone
            pictures = vision.conv_encoder.model
        except AttributeError:
            raise InputError(
                f"cache_folder=...: {type(host).__name__} has no backbones that are known here; leave it out."
            ) from None
        for part in (vision, text):
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    raise InputError(
                        f"cache_folder=...: {name} of {type(part).__name__} trains, and stored features would not "
                        "follow it; leave it out."
                    )
        folder = Path(cache_folder)
        _make(folder)
        self._stored = {
            "pictures": _Stored(pictures, folder, "pictures", lambda maps: BackboneOutput(feature_maps=tuple(maps))),
            "prompts": _Stored(text, folder, "prompts", lambda states: BaseModelOutput(last_hidden_state=states[0])),
        }
        # Features are of evaluation mode, and a host may be set to drop some of them at random in training.
        self.leaves_out_dropout = any(_drops(stored.module) for stored in self._stored.values())

    @contextlib.contextmanager
    def used(self, prompts: bool = True) -> Iterator[None]:
        """Within, the detector takes features from the folder, and puts there what is missing.

        A forward raises `InputError` where that cannot be written.

        Args:
            prompts: whether to keep those of prompts; prompts that are drawn at random are never met again.
        """
        with self._stored["pictures"].in_place(), self._stored["prompts"].in_place() if prompts else nullcontext():
            yield


class _Stored:
    """The forward of a frozen module by stored results, each of one sample of a batch.

    Args:
        module: takes tensors with a sample in each row, and returns features of each that do not depend on the others.
        folder: of all entries.
        name: of this module's among them.
        as_output: makes what the host expects of the module of the features, a batch each.
    """

    def __init__(self, module: nn.Module, folder: Path, name: str, as_output: Callable[[list[Tensor]], Any]):
        self.module, self.as_output = module, as_output
        # What else decides the numbers; the call itself adds its part.
        self.host = _digest(itertools.chain(_configuration(module), _weights(module)))
        self.folder = folder / f"{name}-{self.host[:16]}"

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        # As an attribute of the module, which `nn.Module` calls in place of the method of its class: the module stays
        # where it is, with its parameters and under its name.
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
        device = next(value.device for value in arguments if torch.is_tensor(value))
        keys = self._keys(arguments, list(kwargs), device)
        found: dict[str, list[Tensor]] = {}
        for row, key in enumerate(keys):
            if key not in found:
                file = self.folder / f"{key}.safetensors"
                features = _read(file, key)
                if features is None:
                    features = self._features_of(row, args, kwargs)
                    _write(file, key, features)
                found[key] = features
        levels = zip(*(found[key] for key in keys), strict=True)
        return self.as_output([torch.stack(features).to(device) for features in levels])

    def _keys(self, arguments: list, names: list[str], device: torch.device) -> list[str]:
        """A key a row."""
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        common = [self.host, torch.__version__, transformers.__version__, device.type, str(autocast), str(names)]
        tensors = [value.cpu() for value in arguments if torch.is_tensor(value)]
        common += [repr(value) for value in arguments if not torch.is_tensor(value)]
        return [_digest([*common, *(tensor[row] for tensor in tensors)]) for row in range(len(tensors[0]))]

    @torch.no_grad()
    def _features_of(self, row: int, args: tuple, kwargs: dict) -> list[Tensor]:
        """Of one sample alone, on the CPU: with others beside it, the last bits might be theirs."""

        def one(value: Any) -> Any:
            return value[row : row + 1] if torch.is_tensor(value) else value

        was_training = self.module.training
        self.module.eval()
        try:
            output = self._compute(*map(one, args), **{name: one(value) for name, value in kwargs.items()})
        finally:
            self.module.train(was_training)
        features = output.feature_maps if "feature_maps" in output else output[:1]
        return [feature[0].contiguous().cpu() for feature in features]


def _configuration(module: nn.Module) -> list[str]:
    """What a module is, but for its weights and where they came from."""
    config = module.config.to_dict()
    config.pop("_name_or_path", None)
    attention = str(getattr(module.config, "_attn_implementation", None))
    return [type(module).__qualname__, attention, json.dumps(config, sort_keys=True, default=str)]


def _weights(module: nn.Module) -> Iterator[str | Tensor]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name
        yield tensor.detach().cpu()


def _digest(parts: Iterable[str | Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        tensor = torch.is_tensor(part)
        data = _bytes(part) if tensor else part.encode()
        # With its kind and length, or the end of one part could be the start of the next.
        digest.update(f"{_kind(part) if tensor else 'text'} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _bytes(tensor: Tensor) -> memoryview:
    # By way of uint8, because NumPy has no bfloat16.
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _about(key: str, features: list[Tensor]) -> dict[str, str]:
    """What an entry says of itself."""
    checksum = 0
    for feature in features:
        checksum = zlib.crc32(_bytes(feature), zlib.crc32(_kind(feature).encode(), checksum))
    # One value, because several come in any order, and the same features should make the same file.
    return {"entry": f"{key} {checksum}"}


def _read(file: Path, key: str) -> list[Tensor] | None:
    """Features of an entry, mapped into memory; None where there is none, or one that is not whole."""
    try:
        with safe_open(file, framework="pt") as entry:
            about = entry.metadata()
            features = [entry.get_tensor(str(level)) for level in range(len(entry.keys()))]
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return None
    # A length alone would not tell a file whose blocks never reached the disk.
    return features if about == _about(key, features) else None


def _write(file: Path, key: str, features: list[Tensor]) -> None:
    data = save({str(level): feature for level, feature in enumerate(features)}, metadata=_about(key, features))
    try:
        # Not durable: an entry that a power cut has damaged does not match its checksum.
        with whole_file(file, durable=False) as unfinished:
            unfinished.write_bytes(data)
    except InputError as error:
        raise _cannot_be_written(file.parents[1], error.__cause__) from None


def _make(folder: Path) -> None:
    """Make the folder, find out whether it can be written, and clear away what killed processes left."""
    try:
        with whole_file(folder / "probe", durable=False) as unfinished:
            unfinished.write_bytes(b"")
        (folder / "probe").unlink(missing_ok=True)  # another process may have been faster
        for left in folder.rglob(f"*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
    except InputError as error:
        raise _cannot_be_written(folder, error.__cause__) from None
    except OSError as error:
        raise _cannot_be_written(folder, error) from None


def _cannot_be_written(folder: Path, cause: BaseException | None) -> InputError:
    return InputError(f"cache_folder={str(folder)!r}: cannot be written ({cause}).")


def _drops(module: nn.Module) -> bool:
    """Whether a module in training mode leaves out something at random: dropout, DropPath, that of an attention."""

    def rates(part: nn.Module) -> list[Any]:
        return [value for name, value in vars(part).items() if "drop" in name or name == "p"]

    return any(isinstance(rate, float) and rate > 0 for part in module.modules() for rate in rates(part))
