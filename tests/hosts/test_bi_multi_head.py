# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The `BiMultiHeadAttention` family: whose mask means what, and what SDPT makes of it.

The reference is the paper's words on the host's own attention: append to both inputs, run, drop the rows.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from peft_sdpt import SDPTConfig, SDPTLayer, register_host
from peft_sdpt.hosts import (
    GLIP,
    HOSTS,
    MMDETECTION,
    MMDETECTION_3_0,
    ORIGINAL_GROUNDING_DINO,
    find_hosts,
    hide_invalid,
)
from tests.helpers.bi_multi_head import DL, DV, FLAVOURS, WIDTH, FusionTower
from tests.helpers.detectors import PUBLISHED, attach
from tests.helpers.tiny import randomise

N, NV, NL = 4, 7, 5
DECLARATIONS = {
    "glip": GLIP,
    "original_grounding_dino": ORIGINAL_GROUNDING_DINO,
    "mmdetection": MMDETECTION,
    "mmdetection_3.0": MMDETECTION_3_0,
}
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


def make_attention(flavour, dtype=torch.float64, **shapes):
    torch.manual_seed(0)
    return randomise(FLAVOURS[flavour][0](**shapes)).to(dtype).requires_grad_(False)


def make_layer(attention, host, **config):
    torch.manual_seed(1)
    return SDPTLayer(attention, host, "default", SDPTConfig(**{**PUBLISHED, "num_virtual_tokens": N, **config}))


def make_inputs(dtype=torch.float64, batch=3, dims=(DV, DL)):
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(batch, NV, dims[0], generator=generator, dtype=dtype)
    text = torch.randn(batch, NL, dims[1], generator=generator, dtype=dtype)
    image_padding = torch.arange(NV)[None] >= torch.tensor([NV, NV - 2, NV - 1])[:batch, None]
    text_padding = torch.arange(NL)[None] >= torch.tensor([NL - 2, NL, NL - 3])[:batch, None]
    return image, text, image_padding, text_padding


def masks_of(flavour, image_padding, text_padding):
    """The masks of a call, in the host's convention; None stays None."""
    _, takes_image_mask, ones_are_tokens = FLAVOURS[flavour]
    masks = {}
    if takes_image_mask and image_padding is not None:
        masks["attention_mask_v"] = image_padding
    if text_padding is not None:
        masks["attention_mask_l"] = (~text_padding).long() if ones_are_tokens else text_padding
    return masks


def append_and_drop(layer, flavour, image, text, image_padding, text_padding):
    """Prompts hidden from the image are padding there, which is the released masking."""
    attention, config = layer.base_layer, layer.sdpt_config["default"]
    tokens = layer.sdpt_prompts["default"]
    image_set, text_set = tokens if config.prompt_mode == "independent" else (tokens, tokens)

    def back(z, projection):
        return (z - projection.bias) @ torch.linalg.pinv(projection.weight.double()).to(z.dtype).T

    count, batch = config.num_virtual_tokens, len(image)
    image_length, text_length = image.shape[1], text.shape[1]
    image = torch.cat([image, back(image_set, attention.v_proj).expand(batch, -1, -1)], dim=1)
    text = torch.cat([text, back(text_set, attention.l_proj).expand(batch, -1, -1)], dim=1)
    if image_padding is not None:
        image_padding = F.pad(image_padding, (0, count), value=False)
    if text_padding is None and not config.image_attends_prompts:
        text_padding = torch.zeros(batch, text_length, dtype=torch.bool)
    if text_padding is not None:
        text_padding = F.pad(text_padding, (0, count), value=not config.image_attends_prompts)
    image, text = attention(image, text, **masks_of(flavour, image_padding, text_padding))
    return image[:, :image_length], text[:, :text_length]


def gradients(outputs, wanted):
    generator = torch.Generator().manual_seed(3)
    return torch.autograd.grad(
        sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs), wanted
    )


def agree(layer, flavour, inputs, tolerance):
    image, text = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    wanted = [layer.sdpt_prompts["default"], image, text]
    results = layer(image, text, **masks_of(flavour, *inputs[2:]))
    expected = append_and_drop(layer, flavour, image, text, *inputs[2:])
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    for one, other in zip(gradients(results, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert (results[1] - layer.base_layer(image, text, **masks_of(flavour, *inputs[2:]))[1]).abs().max() > 0.01


@pytest.mark.parametrize("masks", ["both", "image", "text", "none"])
@pytest.mark.parametrize("image_attends_prompts", [True, False])
@pytest.mark.parametrize("prompt_mode", ["unified", "independent"])
@every_flavour
def test_equals_append_and_drop(flavour, prompt_mode, image_attends_prompts, masks):
    layer = make_layer(
        make_attention(flavour),
        DECLARATIONS[flavour],
        prompt_mode=prompt_mode,
        image_attends_prompts=image_attends_prompts,
    )
    image, text, image_padding, text_padding = make_inputs()
    agree(
        layer,
        flavour,
        (
            image,
            text,
            image_padding if masks in ("both", "image") else None,
            text_padding if masks in ("both", "text") else None,
        ),
        1e-10,
    )


@pytest.mark.parametrize("count", [10, 700])
def test_at_the_shapes_of_glip_in_single_precision_with_the_released_masking(count):
    """What the released code computes at batch size 1; `tests/parity.py` compares with that code itself."""
    shapes = {"v_dim": 256, "l_dim": 768, "embed_dim": 2048, "num_heads": 8}
    attention = make_attention("glip", torch.float32, **shapes)
    layer = make_layer(attention, GLIP, num_virtual_tokens=count, image_attends_prompts=False)
    agree(layer, "glip", make_inputs(torch.float32, batch=1, dims=(256, 768)), 1e-5)


@every_flavour
def test_is_recognised_by_its_signature(flavour):
    tower = FusionTower(flavour)
    assert find_hosts(tower) == dict.fromkeys(["blocks.0.attn", "blocks.1.attn"], DECLARATIONS[flavour])


@pytest.mark.parametrize("lacks", ["a projection", "the order", "the class name", "the scale"])
def test_what_only_looks_alike_is_not(lacks):
    published = FLAVOURS["glip"][0]
    if lacks == "the order":

        class BiMultiHeadAttention(published):
            def forward(self, l, v, attention_mask_l=None):  # noqa: E741
                return super().forward(v, l, attention_mask_l)

        attention = BiMultiHeadAttention()
    elif lacks == "the class name":
        attention = type("Attention", (published.__base__,), {"forward": published.forward})()
    else:
        attention = published()
        delattr(attention, {"a projection": "values_l_proj", "the scale": "scale"}[lacks])
    assert find_hosts(nn.ModuleList([attention])) == {}
    with pytest.raises(ValueError, match=r"has no fusion layer that SDPT knows.*BiMultiHeadAttention"):
        attach(nn.ModuleList([attention]))


def test_a_boolean_text_mask_of_mmdetection_hides_nothing():
    """So it is in mmdetection, whose Grounding DINO passes one: -9e15 becomes True in it."""
    layer = make_layer(make_attention("mmdetection"), MMDETECTION)
    image, text, _, text_padding = make_inputs()
    for mask in (text_padding, ~text_padding):
        for result, expected in zip(layer(image, text, None, mask), layer(image, text), strict=True):
            torch.testing.assert_close(result, expected)
        for result, expected in zip(
            layer.base_layer(image, text, None, mask), layer.base_layer(image, text), strict=True
        ):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_masks_of_glip_are_of_any_dtype(dtype):
    layer = make_layer(make_attention("glip", torch.float32), GLIP)
    image, text, _, text_padding = make_inputs(torch.float32)
    mask = (~text_padding).to(dtype)
    shorter = text.masked_fill(text_padding[..., None], 9.0)
    torch.testing.assert_close(layer(image, text, mask)[0], layer(image, shorter, mask)[0])


@every_flavour
def test_arguments_are_taken_by_place_and_by_name(flavour):
    layer = make_layer(make_attention(flavour), DECLARATIONS[flavour])
    image, text, image_padding, text_padding = make_inputs()
    masks = masks_of(flavour, image_padding, text_padding)
    names = layer.fusion_host.arguments
    by_place = layer(image, text, *(masks[name] for name in names[2:]))
    by_name = layer(**dict(zip(names, (image, text), strict=False)), **masks)
    assert all(torch.equal(one, other) for one, other in zip(by_place, by_name, strict=True))
    for wrong, message in (
        (lambda: layer(image, text, None, None, None, None), "got 6 arguments"),
        (lambda: layer(image, text, mask=None), "got 'mask' as well"),
        (lambda: layer(image, **{names[0]: image}), f"got '{names[0]}' twice"),
        (lambda: layer(image), f"needs '{names[1]}'"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()


@pytest.mark.parametrize("levels", [1, 5])
def test_activation_checkpointing_changes_nothing(levels):
    """One attention may be called five times a layer, and blocks with arguments by place."""

    def grads(checkpointed):
        torch.manual_seed(0)
        model = attach(randomise(FusionTower("glip", levels=levels, checkpointed=checkpointed))).train()
        generator = torch.Generator().manual_seed(0)
        image, text = torch.randn(2, 10, DV, generator=generator), torch.randn(2, NL, DL, generator=generator)
        outputs = model(image, text, None, torch.tensor([[False] * NL, [False] * 3 + [True] * 2]))
        return gradients(outputs, [p for p in model.parameters() if p.requires_grad])

    for one, other in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(one, other)


# ---- the real class, which is on the package index


def load_groundingdino() -> types.ModuleType:
    """`fuse_modules` of an installed `rf-groundingdino`, without the package around it and what that imports."""
    folder = importlib.util.find_spec("groundingdino").submodule_search_locations[0]
    path = Path(folder) / "models" / "GroundingDINO" / "fuse_modules.py"
    # Of timm the file takes one class, for blocks that are not made here.
    stand_in = types.ModuleType("timm.models.layers")
    stand_in.DropPath = nn.Identity
    spec = importlib.util.spec_from_file_location("fuse_modules", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("timm", "timm.models", "timm.models.layers"):
            patch.setitem(sys.modules, name, stand_in)
        spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("groundingdino") is None, reason="rf-groundingdino is not installed")
class TestTheRealClass:
    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        real = load_groundingdino().BiMultiHeadAttention(DV, DL, WIDTH, 4, dropout=0.0)
        return randomise(real).double().requires_grad_(False)

    def test_ours_behaves_like_it(self, attention):
        ours = make_attention("original_grounding_dino")
        ours.load_state_dict(attention.state_dict())
        image, text, image_padding, text_padding = make_inputs()
        for masks in ({}, masks_of("original_grounding_dino", image_padding, text_padding)):
            for one, other in zip(attention(image, text, **masks), ours(image, text, **masks), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    def test_is_recognised(self, attention):
        assert find_hosts(nn.ModuleDict({"attn": attention})) == {"attn": ORIGINAL_GROUNDING_DINO}

    @pytest.mark.parametrize("image_attends_prompts", [True, False])
    def test_equals_append_and_drop(self, attention, image_attends_prompts):
        layer = make_layer(attention, ORIGINAL_GROUNDING_DINO, image_attends_prompts=image_attends_prompts)
        agree(layer, "original_grounding_dino", make_inputs(), 1e-10)

    def test_in_the_block_it_lives_in(self, attention, tmp_path):
        torch.manual_seed(0)
        block = load_groundingdino().BiAttentionBlock(DV, DL, WIDTH, 4, dropout=0.0, init_values=0.7)
        block = randomise(block).double()
        image, text, image_padding, text_padding = make_inputs()
        call = (image, text, image_padding, text_padding)
        bare = block(*call)
        model = attach(block)
        tuned = model(*call)
        assert all((one - other).abs().max() > 0.01 for one, other in zip(tuned, bare, strict=True))
        by_name = model(v=image, l=text, attention_mask_v=image_padding, attention_mask_l=text_padding)
        assert all(torch.equal(one, other) for one, other in zip(tuned, by_name, strict=True))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(model.unload(), tmp_path)(*call)
        assert all(torch.equal(one, other) for one, other in zip(tuned, again, strict=True))


# ---- a fusion layer of a user's own


class OwnAttention(FLAVOURS["glip"][0].__base__):
    """Text first, 1 = token for both masks, weights not returned."""

    def forward(self, words, pixels, word_mask=None, pixel_mask=None):
        def added(mask):
            return 0.0 if mask is None else torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))[:, None, None]

        return self.attend(pixels, words, added(pixel_mask), added(word_mask))


OWN = replace(
    GLIP,
    name="our own detector",
    class_names=("OwnAttention",),
    arguments=("words", "pixels", "word_mask", "pixel_mask"),
    image_tokens="pixels",
    text_tokens="words",
    image_mask="pixel_mask",
    text_mask="word_mask",
    image_mask_function=hide_invalid,
    text_mask_function=hide_invalid,
)


@pytest.fixture
def hosts_as_before():
    before = list(HOSTS)
    yield
    HOSTS[:] = before


def test_a_registered_fusion_layer_is_a_host(hosts_as_before, tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fusion": randomise(OwnAttention())}).double()
    with pytest.raises(ValueError, match=r"no fusion layer that SDPT knows.*peft_sdpt\.register_host"):
        attach(model)
    register_host(OWN)
    register_host(OWN)  # a cell of a notebook, run again
    assert HOSTS.count(OWN) == 1 and find_hosts(model) == {"fusion": OWN}
    tuned = attach(model, **PUBLISHED, num_virtual_tokens=N)
    layer = tuned.base_model.model["fusion"]
    image, text, image_padding, text_padding = make_inputs()
    results = layer(text, image, word_mask=(~text_padding).long(), pixel_mask=~image_padding)
    as_in_glip = make_layer(layer.base_layer, ORIGINAL_GROUNDING_DINO)
    as_in_glip.sdpt_prompts["default"] = layer.sdpt_prompts["default"]
    expected = as_in_glip.fusion_host.attend(
        layer.base_layer, (image, text, image_padding, text_padding), {}, as_in_glip.input_prompts(["default"])
    )
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    tuned.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tuned.unload(), tmp_path).base_model.model["fusion"]
    again = loaded(text, image, word_mask=(~text_padding).long(), pixel_mask=~image_padding)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))


def test_a_declaration_takes_the_place_of_one_of_the_same_name(hosts_as_before):
    changed = replace(GLIP, class_names=("Renamed",))
    register_host(changed)
    assert changed in HOSTS and GLIP not in HOSTS


def test_registering_something_else_is_refused():
    with pytest.raises(TypeError, match="host must be a FusionHost, for instance a BiAttentionHost; got 'glip'"):
        register_host("glip")
