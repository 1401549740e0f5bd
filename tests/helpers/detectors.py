# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random hosts that are not blind to prompts.

E is four times d, as in Grounding DINO (where both the inverse and `- b` matter), every weight and
bias has some size, the fusion layers' scales are 0.7 (1e-4 in a fresh host), box heads are not zero
and nothing is dropped at random.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoBiMultiHeadAttention,
)
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import (
    MMGroundingDinoBiMultiHeadAttention,
)

import peft_sdpt
from peft_sdpt import SDPTConfig, SDPTLayer
from tests.helpers.patience import PATIENCE

# The method as it was published, where defaults are others.
PUBLISHED = {"init_weights": "uniform", "pinv_rtol": None, "prompt_space": "aligned", "prompt_gate": None}

D_MODEL = 32
WIDTH = 4 * D_MODEL
REACHED = 2 * D_MODEL  # of it, by both projections
GATES = (2, 1, 2)  # of a fusion layer: sides, groups, heads
NUM_GATES = 4
ATTENTION_CLASSES = {
    "grounding_dino": GroundingDinoBiMultiHeadAttention,
    "mm_grounding_dino": MMGroundingDinoBiMultiHeadAttention,
}
_MODEL_CLASSES = {
    "grounding_dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm_grounding_dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}
HOST_NAMES = tuple(_MODEL_CLASSES)


def host_config(name: str, *, d_model: int = D_MODEL, layers: int = 2, stages: int = 3, **changes):
    """Configuration of a tiny host, with so many encoder layers, and stages of the backbone."""
    config_class, _ = _MODEL_CLASSES[name]
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1][:stages],
        num_heads=[1, 2, 2][:stages],
        window_size=4,
        patch_size=4,
        drop_path_rate=0.0,
        out_indices=[stages - 1, stages],
    )
    text = BertConfig(
        vocab_size=1100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    values = {
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 8 * d_model,
        "decoder_ffn_dim": 64,
        "num_queries": 6,
        "num_feature_levels": 2,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
        "max_text_len": 32,
        "fusion_droppath": 0.0,
        "fusion_dropout": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return config_class(backbone_config=backbone, text_config=text, **{**values, **changes})


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every bias and flat parameter some size, with a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith(("vision_param", "text_param")):
                parameter.fill_(0.7)
            elif name.endswith("bias") or "bbox_embed" in name:
                parameter.copy_(scale * noise)
    return module


def make_host(name: str = "grounding_dino", *, seed: int = 0, **changes) -> nn.Module:
    """A tiny detector in evaluation mode; `changes` go to `host_config`."""
    context = (torch.get_default_device(), torch.get_default_dtype())
    host, random_state = _made_host(name, seed, tuple(sorted(changes.items())), context)
    torch.manual_seed(seed)  # of a GPU as well
    torch.set_rng_state(random_state)
    return copy.deepcopy(host)


@functools.lru_cache(maxsize=8)
def _made_host(name: str, seed: int, changes: tuple, context: tuple) -> tuple[nn.Module, torch.Tensor]:
    """Return a detector and the state of random numbers that it leaves. A copy takes a third of the time."""
    torch.manual_seed(seed)
    host = _MODEL_CLASSES[name][1](host_config(name, **dict(changes)))
    return randomise(host, seed).eval(), torch.get_rng_state()


def make_attention(name: str = "grounding_dino", *, seed: int = 0, **changes) -> nn.Module:
    """A host's bi-directional attention alone, in evaluation mode."""
    torch.manual_seed(seed)
    return randomise(ATTENTION_CLASSES[name](host_config(name, **changes)), seed).eval()


class FusionStack(nn.Module):
    """Plain module with fusion attentions: a host that is no transformers model."""

    def __init__(self, name: str = "grounding_dino", *, layers: int = 2, **changes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make_attention(name, seed=seed, **changes) for seed in range(layers))
        self.head = nn.Linear(changes.get("d_model", D_MODEL), 3)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            (image_delta, _), (text_delta, _) = layer(image, text)
            image, text = image + image_delta, text + text_delta
        return self.head(image)


def model_inputs(batch: int = 2, *, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pixels and prompts for a detector; the second sample's text is shorter by two tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = 8
    ids = torch.randint(200, 1000, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    ids[:, 0], ids[:, 3], ids[:, -2], ids[:, -1] = 101, 1012, 1012, 102
    if batch > 1:
        ids[1, -4:] = torch.tensor([1012, 102, 0, 0])
        mask[1, -2:] = 0
    if padding:
        ids = nn.functional.pad(ids, (0, padding))
        mask = nn.functional.pad(mask, (0, padding))
    return {
        "pixel_values": torch.randn(batch, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
    }


def moved(value, device: torch.device | str = "pretend"):
    """A copy of the outputs of a model, or of labels, on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        value = copy.copy(value)
        for name, part in value.items():
            value[name] = moved(part, device)
        return value
    return [moved(part, device) for part in value] if isinstance(value, list | tuple) else value


# Fusion layers of a host that `make_host` makes.
LAYERS = [f"model.encoder.layers.{index}.fusion_layer.attn" for index in range(2)]


@torch.no_grad()
def run(model: nn.Module, **changes) -> torch.Tensor:
    """Class logits and boxes of the two samples, flat; padded text positions are -inf."""
    outputs = model(**{**model_inputs(), **changes})
    return torch.cat([outputs.logits.flatten(), outputs.pred_boxes.flatten()])


def snapshot(model: nn.Module):
    """Return everything that a refused load must leave as it was."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        hasattr(model, "peft_config"),
        run(model).tolist(),
    )


def adapted_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SDPTLayer)]


def acting(**config) -> SDPTConfig:
    """Config of an adapter that has an effect: its gates are random unless `init_weights` is given."""
    return SDPTConfig(**{"init_weights": False, **config})


def attach(host: nn.Module, seed: int = 1, **config):
    """Attach an adapter that has an effect; see `acting`."""
    torch.manual_seed(seed)
    return get_peft_model(host, acting(**{"num_virtual_tokens": 4, **config}))


def parameter_keys(layers, adapter: str | None = "default", prefix: str = "base_model.model.") -> set[str]:
    """Keys of the prompts and gates of an adapter in some layers; with None, those of a saved adapter."""
    end = "" if adapter is None else f".{adapter}"
    return {f"{prefix}{name}.sdpt_{kind}{end}" for name in layers for kind in ("prompts", "gates")}


ROOT = Path(peft_sdpt.__file__).parents[1]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that can import the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
    )
