# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods to compare, with the learning rates to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_sdpt import SDPTConfig
from peft_sdpt.lora import DEFAULT_LORA_TARGETS

from ..peers import (
    ATTENTION,
    ENCODER_IMAGE,
    LORA_TARGETS,
    PUBLISHED,
    in_layers,
    is_bitfit,
    is_released_head,
    train,
    with_peft,
)
from ..window_prompts import attach_window_prompts
from .gate_rules import change_gates, start_with_std
from .inverses import replace_inverses
from .prompts import attach_prompts, start_from_inputs
from .text_side import attach_probe, attach_trained_text

# Maps a frozen base model, its processor, the class names and fields of `SDPTConfig` to a model whose trained
# parameters require gradients. Additional fields: `inverse`, `gate` and `std of initial tokens` are rules from
# `inverses` and `gate_rules`, and `LoRA in` and `tokens in` are keys of `LORA_PLACES` and `TOKEN_PLACES`.
Attach = Callable[[nn.Module, Any, list[str], dict[str, Any]], nn.Module]
# Initializes this model from batches of training images: inputs of the model, and labels.
Start = Callable[[nn.Module, Iterable[tuple[Any, Any]]], None]

# The default of SDPT.
NUM_TOKENS = SDPTConfig().num_virtual_tokens
# That of MuDPT's released code.
MUDPT_TOKENS = 2
# Ratio of the learning rate of tokens to that of weights, from the best rates of both.
PROMPT_FACTOR = 100.0
# The best learning rate of gated tokens, which they also have beside LoRA.
PROMPT_RATE = 0.3
# LoRA on attention outside the fusion layers.
OUTSIDE_FUSION = in_layers(*ATTENTION)
# Places for LoRA inside SDPT's adapter, and for its tokens. The first is the default.
LORA_PLACES = {
    "attention and feed-forward": DEFAULT_LORA_TARGETS,
    "attention": OUTSIDE_FUSION,
    "encoder's image layers": ENCODER_IMAGE,
}
TOKEN_PLACES = {"encoder and decoder": r".*\.(fusion_layer\.attn|encoder_attn_text)"}
# Names of the tokens and gates of SDPT.
SDPT_PARAMETERS = r"sdpt_(prompts|gates)"
# Four rates per method, half a decade apart, shifted until the best one is not the lowest or highest.
PROMPT_RATES = (0.03, 0.1, 0.3, 1.0)
LARGE_PROMPT_RATES = (0.1, 0.3, 1.0, 3.0)
SCALE_RATES = (0.01, 0.03, 0.1, 0.3)
LARGE_ADAPTER_RATES = (0.003, 0.01, 0.03, 0.1)
MIDDLE_ADAPTER_RATES = (0.001, 0.003, 0.01, 0.03)
ADAPTER_RATES = (0.0003, 0.001, 0.003, 0.01)
SMALL_LORA_RATES = (0.003, 0.01, 0.03)
WEIGHT_RATES = (0.00003, 0.0001, 0.0003, 0.001)


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: Name for tables.
        attach: Makes the model from a frozen base model, which it may change.
        rates: Learning rates to choose from.
        prompts: A regular expression for the names of tokens, if the method also trains weights.
        prompt_factor: Ratio of the learning rate of tokens to that of weights.
        prompt_rate: Learning rate of tokens, instead of `prompt_factor`.
        start: Initializes the model from the training images. None if `attach` has done it.
        fixed_names: Whether the tuned model knows only the class names that it was tuned with.
    """

    label: str
    attach: Attach
    rates: tuple[float, ...]
    prompts: str = ""
    prompt_factor: float = 1.0
    prompt_rate: float | None = None
    start: Start | None = None
    fixed_names: bool = False

    def rate_of_tokens(self, learning_rate: float) -> float:
        """Return the learning rate of tokens beside weights with this learning rate."""
        return self.prompt_factor * learning_rate if self.prompt_rate is None else self.prompt_rate


def _sdpt(**fixed: Any) -> Attach:
    def attach(host: nn.Module, _processor: Any, _names: list[str], fields: dict[str, Any]) -> nn.Module:
        fields = {**fixed, **fields}
        # These are not fields of the config.
        inverse, gate, std = (fields.pop(name, None) for name in ("inverse", "gate", "std of initial tokens"))
        if place := fields.pop("LoRA in", None):
            fields["lora_target_modules"] = LORA_PLACES[place]
        if place := fields.pop("tokens in", None):
            fields["target_modules"] = TOKEN_PLACES[place]
        model: nn.Module = get_peft_model(host, SDPTConfig(**fields))
        if inverse:
            model = replace_inverses(model, inverse)
        if gate:
            model = change_gates(model, gate)
        return start_with_std(model, std) if std else model

    return attach


def _prompts(kind: str, num_tokens: int = NUM_TOKENS) -> Attach:
    return lambda host, _processor, _names, _fields: attach_prompts(host, kind, num_tokens)


def _lora_config(rank: int, targets: str) -> LoraConfig:
    """Return a config of LoRA with the scaling 2 for every rank."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


def _lora(rank: int, targets: str = LORA_TARGETS) -> Attach:
    return lambda host, _processor, _names, _fields: with_peft(host, _lora_config(rank, targets))


def _scales(host: nn.Module, _processor: Any, _names: list[str], _fields: dict[str, Any]) -> nn.Module:
    return with_peft(host, IA3Config(target_modules=ENCODER_IMAGE, feedforward_modules=r".*\.fc2"))


def _sdpt_and_lora(host: nn.Module, _processor: Any, _names: list[str], fields: dict[str, Any]) -> nn.Module:
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(_lora_config(8, OUTSIDE_FUSION), host, "lora")
    return get_peft_model(host, SDPTConfig(prompt_gate=None, **fields))


def _with_head(attach: Attach) -> Attach:
    """Also train what the released command trains of the base model."""
    return lambda *arguments: train(attach(*arguments), is_released_head)


METHODS: dict[str, Method] = {
    "gated": Method("SDPT, defaults", _sdpt(), PROMPT_RATES),
    "gated-more": Method(f"SDPT, {4 * NUM_TOKENS} tokens", _sdpt(num_virtual_tokens=4 * NUM_TOKENS), PROMPT_RATES),
    "gated-lora-small": Method(
        "SDPT, 38 tokens, with LoRA in attention, r = 1",
        _sdpt(num_virtual_tokens=38, lora_rank=1, lora_target_modules=OUTSIDE_FUSION),
        SMALL_LORA_RATES,
        SDPT_PARAMETERS,
        prompt_rate=PROMPT_RATE,
    ),
    "gated-lora": Method(
        "SDPT, 40 tokens, with LoRA, r = 3",
        _sdpt(num_virtual_tokens=40, lora_rank=3),
        SMALL_LORA_RATES,
        SDPT_PARAMETERS,
        prompt_rate=PROMPT_RATE,
    ),
    "sdpt-defaults": Method("SDPT without gates", _sdpt(prompt_gate=None), LARGE_PROMPT_RATES),
    "sdpt": Method("SDPT, published", _sdpt(**PUBLISHED), PROMPT_RATES),
    "sdpt-hidden": Method(
        "SDPT, published, only text sees prompts",
        _sdpt(**PUBLISHED, image_attends_prompts=False),
        PROMPT_RATES,
    ),
    "sdpt-independent": Method(
        "SDPT without gates, independent prompts", _sdpt(prompt_mode="independent", prompt_gate=None), PROMPT_RATES
    ),
    # As many parameters as with independent prompts, to see whether the second set or the number helps.
    "sdpt-more": Method(
        f"SDPT without gates, {4 * NUM_TOKENS} tokens",
        _sdpt(num_virtual_tokens=4 * NUM_TOKENS, prompt_gate=None),
        LARGE_PROMPT_RATES,
    ),
    "sdpt-reachable": Method(
        "SDPT, published, reachable coordinates",
        _sdpt(**{**PUBLISHED, "prompt_space": "reachable"}),
        LARGE_PROMPT_RATES,
    ),
    "text-prompts": Method("text-side prompts", _prompts("text"), PROMPT_RATES),
    "image-prompts": Method("image-side prompts", _prompts("image"), PROMPT_RATES),
    "both-prompts": Method("prompts on both sides, not unified", _prompts("both"), PROMPT_RATES),
    "learned-projections": Method(
        "learned projections", _prompts("learned"), ADAPTER_RATES, r"\.make\.tokens$", PROMPT_FACTOR
    ),
    "mudpt": Method("MuDPT-style prompts", _prompts("coupled"), ADAPTER_RATES, r"\.make\.own\.", PROMPT_FACTOR),
    "mudpt-paper": Method(
        "MuDPT, transformer maps",
        _prompts("coupled by transformers", MUDPT_TOKENS),
        MIDDLE_ADAPTER_RATES,
        r"\.make\.own\.",
        PROMPT_FACTOR,
    ),
    "spt": Method(
        "image-side prompts from the layers' own inputs (SPT)", _prompts("image"), PROMPT_RATES, start=start_from_inputs
    ),
    "vpt": Method("visual prompts in the backbone", lambda host, *_: attach_window_prompts(host), PROMPT_RATES),
    "text-embeddings": Method(
        "class-text embeddings",
        lambda host, processor, names, _: attach_trained_text(host, processor, names),
        LARGE_ADAPTER_RATES,
        fixed_names=True,
    ),
    "probe": Method(
        "linear probe of the class head",
        lambda host, processor, names, _: attach_probe(host, processor, names),
        PROMPT_RATES,
        fixed_names=True,
    ),
    "bitfit": Method("BitFit", lambda host, *_: train(host, is_bitfit), LARGE_ADAPTER_RATES),
    # The rank closest to SDPT in size: 21 248 parameters on examples/host, where 20 tokens have 15 360.
    "lora-matched": Method("LoRA, r = 1", _lora(1), MIDDLE_ADAPTER_RATES),
    "lora": Method("LoRA, r = 8", _lora(8), ADAPTER_RATES),
    # The LoRA part of "SDPT and LoRA" alone.
    # About as many parameters as SDPT, where most adaptation is said to happen.
    "lora-image": Method("LoRA in the encoder's image layers, r = 2", _lora(2, ENCODER_IMAGE), MIDDLE_ADAPTER_RATES),
    "scales-image": Method("scales in the encoder's image layers, (IA)³", _scales, SCALE_RATES),
    "lora-outside": Method("LoRA outside the fusion layers, r = 8", _lora(8, OUTSIDE_FUSION), MIDDLE_ADAPTER_RATES),
    "full": Method("full fine-tuning", lambda host, *_: train(host, lambda _: True), WEIGHT_RATES),
    # One rate for prompts and weights, as in the released command.
    "published-recipe": Method(
        "SDPT, published recipe: prompts and head", _with_head(_sdpt(**PUBLISHED)), WEIGHT_RATES
    ),
    "sdpt-lora": Method(
        "SDPT without gates, with LoRA, r = 8", _sdpt_and_lora, ADAPTER_RATES, "sdpt_prompts", PROMPT_FACTOR
    ),
}
