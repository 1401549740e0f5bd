# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to BLIP and its successors, OmDet-Turbo, FLAVA and ViLT."""

from __future__ import annotations

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

from peft_sdpt import SDPTLayer
from peft_sdpt.hosts import BLIP, FLAVA, OMDET_TURBO, QFORMER, VILT, find_hosts
from tests.helpers.detectors import PUBLISHED, attach
from tests.helpers.tiny import cases, randomise
from tests.helpers.tiny.blip import TEXT, VISION

CASES = {case.name: case for case in cases()}


def make_captioner():
    torch.manual_seed(0)
    text = BlipTextConfig(**TEXT, bos_token_id=1, sep_token_id=2, eos_token_id=2)
    return randomise(
        BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=BlipVisionConfig(**VISION)))
    )


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_the_same_with_and_without_a_cache(num_beams):
    """A cache holds keys and values of the image, those of prompts among them, and is asked for them again."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))

    def captions(model, use_cache):
        generator = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
        return model.generate(pixel_values=pixels, use_cache=use_cache, **generator)

    bare = captions(make_captioner(), True)
    model = attach(make_captioner(), num_virtual_tokens=20).eval()
    cached, plain = captions(model, True), captions(model, False)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, bare)


@pytest.mark.parametrize(
    ("name", "host", "expected"),
    [
        ("blip", BLIP, ["text_encoder.encoder.layer.0", "text_encoder.encoder.layer.1"]),
        ("blip_2", QFORMER, ["qformer.encoder.layer.0", "qformer.encoder.layer.2"]),
        ("omdet_turbo", OMDET_TURBO, ["decoder.layers.0.self_attn", "decoder.layers.1.self_attn"]),
        ("flava", FLAVA, [f"multimodal_model.encoder.layer.{index}.attention.attention" for index in range(2)]),
        ("vilt", VILT, [f"encoder.layer.{index}.attention.attention" for index in range(2)]),
    ],
)
def test_only_where_image_and_text_meet(name, host, expected):
    """Not in layers without cross-attention, and not in encoders of one modality made of the same class."""
    model = CASES[name].make()
    assert find_hosts(model) == dict.fromkeys(expected, host)
    if host.within:
        same_class = [n for n, module in model.named_modules() if type(module).__name__ in host.class_names]
        assert len(same_class) > len(expected)


def append_and_drop(attention, z, hidden_states, mask=None):
    """The paper's words, on the weights of a joint self-attention."""
    states = torch.cat([hidden_states, z.expand(len(hidden_states), -1, -1)], dim=1)

    def heads(tokens):
        return tokens.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    logits = heads(attention.query(states)) @ heads(attention.key(states)).mT / attention.attention_head_size**0.5
    if mask is not None:
        logits = logits + torch.nn.functional.pad(mask, (0, len(z)))
    context = (logits.softmax(-1) @ heads(attention.value(states))).transpose(1, 2).flatten(2)
    return context[:, : hidden_states.shape[1]]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["vilt", "flava"])
def test_a_joint_attention_equals_append_and_drop(name, masked):
    model = attach(CASES[name].make(), **PUBLISHED).double()
    layer = next(module for module in model.modules() if isinstance(module, SDPTLayer))
    attention = layer.base_layer
    z = (layer.sdpt_prompts["default"] - attention.key.bias) @ torch.linalg.inv(attention.key.weight).T
    states = torch.randn(2, 7, attention.key.in_features, dtype=torch.double)
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.double)
    mask[1, ..., 5:] = torch.finfo(torch.double).min
    mask = mask if masked else None
    outputs = layer(states, mask, output_attentions=True)
    torch.testing.assert_close(outputs[0], append_and_drop(attention, z, states, mask), rtol=0, atol=1e-9)
    assert outputs[1].shape == (2, attention.num_attention_heads, 7, 7 + 4)
    # A mask of rows and columns does the same.
    if masked:
        square = layer(states, mask.expand(-1, -1, 7, -1))[0]
        torch.testing.assert_close(square, outputs[0])


def test_attentions_of_the_models_have_a_column_for_each_prompt():
    inputs = CASES["vilt"].inputs(0)
    bare = CASES["vilt"].make()(**inputs, output_attentions=True).attentions
    tuned = attach(CASES["vilt"].make(), num_virtual_tokens=4, prompt_gate=None)(
        **inputs, output_attentions=True
    ).attentions
    assert all(
        b.shape[:-1] == t.shape[:-1] and b.shape[-1] + 4 == t.shape[-1] for b, t in zip(bare, tuned, strict=True)
    )


@pytest.mark.parametrize("name", ["blip_2", "omdet_turbo"])
def test_sdpa_and_eager_agree(name):
    case = CASES[name]
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = case.make()
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            pytest.skip(f"{name} has no {implementation}")
        with torch.no_grad():
            outputs.append(case.outputs(attach(model), case.inputs(2)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
