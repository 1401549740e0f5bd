# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LXMERT, BridgeTower and SAM 3: what each alone does. What holds of every host is in `tests/test_hosts.py`."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import Sam3TrackerConfig, Sam3TrackerModel, Sam3VideoConfig, Sam3VideoModel
from transformers.models.sam3 import modeling_sam3
from transformers.models.sam3_lite_text import modeling_sam3_lite_text

from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.hosts import BRIDGETOWER, SAM3_DECODER, SAM3_ENCODER, SAM3_MASK_DECODER, find_hosts
from tests.helpers import detectors
from tests.helpers.detectors import PUBLISHED
from tests.helpers.tiny import bridgetower, lxmert, sam3

N = 3
attach = partial(detectors.attach, num_virtual_tokens=N)
TEXT, IMAGE = ("cross_modal_text_layers", "cross_modal_image_layers")


def layer_of(model, name: str) -> SDPTLayer:
    return model.base_model.model.get_submodule(name)


def appended(tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    return torch.cat([tokens, prompts.expand(len(tokens), -1, -1)], dim=1)


def inverted(prompts: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    return (prompts - projection.bias) @ torch.linalg.pinv(projection.weight).T


def attend(query, key, value, num_heads: int, mask=None) -> torch.Tensor:
    """Attention over projected states, with a mask that is added to the logits."""
    query, key, value = (each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in (query, key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hiding(lengths: list[int], total: int) -> torch.Tensor:
    """An additive mask `(B, 1, 1, total)`."""
    hidden = torch.arange(total) >= torch.tensor(lengths)[:, None]
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -1e9)[:, None, None, :]


class TestLxmert:
    def layer(self) -> SDPTLayer:
        return layer_of(attach(lxmert.make().double(), **PUBLISHED), lxmert.LAYERS[0])

    def test_equals_append_and_drop_in_both_directions(self):
        layer = self.layer()
        prompts = inverted(layer.sdpt_prompts["default"].double(), layer.base_layer.att.key)
        text, image = random(2, 5, lxmert.WIDTH), random(2, 6, lxmert.WIDTH, seed=1)
        sides = ((text, hiding([5, 3], 5)), (image, hiding([6, 4], 6)))
        for (queries, _), (context, mask) in (sides, sides[::-1]):
            (got,) = layer(queries, context, ctx_att_mask=mask)
            host = layer.base_layer
            longer, longer_mask = appended(context, prompts), F.pad(mask, (0, N))
            (expected,) = host(appended(queries, prompts), longer, ctx_att_mask=longer_mask)
            torch.testing.assert_close(got, expected[:, : queries.shape[1]], rtol=1e-6, atol=1e-6)
            assert not torch.allclose(got, host(queries, context, ctx_att_mask=mask)[0], atol=1e-3)

    def test_the_whole_of_a_token_is_the_key_of_both_modalities(self):
        layer = self.layer()
        (prompts,) = layer.input_prompts(["default"])
        tokens = layer.sdpt_prompts["default"].double()
        torch.testing.assert_close(layer.base_layer.att.key(prompts.tokens.double()), tokens, rtol=0, atol=1e-4)

    def test_attention_weights_have_a_column_for_each_prompt(self):
        model = attach(lxmert.make(), prompt_gate=None)
        weights = model(**lxmert.inputs(0), output_attentions=True).cross_encoder_attentions
        assert [tuple(each.shape) for each in weights] == [(2, 4, 5, 6 + N)] * 2
        for each in weights:
            torch.testing.assert_close(each.sum(-1), torch.ones(2, 4, 5))
            assert (each[..., 6:] > 0).all() and (each[1, ..., 4:6] < 1e-6).all()

    def test_positional_arguments(self):
        layer = self.layer()
        text, image, mask = random(2, 5, lxmert.WIDTH), random(2, 6, lxmert.WIDTH, seed=1), hiding([6, 4], 6)
        named = layer(input_tensor=text, ctx_tensor=image, ctx_att_mask=mask, output_attentions=True)
        for got, expected in zip(layer(text, image, mask, True), named, strict=True):
            assert torch.equal(got, expected)

    def test_all_image_tokens_are_seen_without_a_mask(self):
        model = attach(lxmert.make())
        inputs = lxmert.inputs(0)
        inputs["visual_attention_mask"] = torch.ones(2, 6, dtype=torch.long)
        expected = model(**inputs).pooled_output
        del inputs["visual_attention_mask"]
        torch.testing.assert_close(model(**inputs).pooled_output, expected)


class TestBridgeTower:
    def parts(self, model, index: int = 0) -> tuple[SDPTLayer, SDPTLayer]:
        return layer_of(model, f"{TEXT}.{index}"), layer_of(model, f"{IMAGE}.{index}")

    def expected(self, layer, prompts, queries, context, mask, context_mask):
        """A cross-modal layer, with prompts appended to what it attends to."""
        host = layer.base_layer
        states = host.attention(queries, attention_mask=mask)[0]
        cross = host.crossattention.self
        longer = appended(context, inverted(prompts, cross.key))
        longer_mask = None if context_mask is None else F.pad(context_mask, (0, len(prompts)))
        attended = attend(cross.query(states), cross.key(longer), cross.value(longer), 4, longer_mask)
        return host.feed_forward_chunk(host.crossattention.output(attended, states))

    @pytest.mark.parametrize("mode", ["unified", "independent"])
    def test_tokens_through_an_inverse_a_direction(self, mode):
        model = attach(bridgetower.make().double(), **PUBLISHED, prompt_mode=mode)
        text_layer, image_layer = self.parts(model)
        tokens = text_layer.sdpt_prompts["default"].double()
        text_tokens, image_tokens = (tokens, tokens) if mode == "unified" else tokens
        text, image = random(2, 5, bridgetower.WIDTH), random(2, 7, bridgetower.WIDTH, seed=1)
        mask = hiding([5, 3], 5)
        # As BridgeTower calls them.
        got = text_layer(text, image, attention_mask=mask)[0]
        expected = self.expected(text_layer, text_tokens, text, image, mask, None)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        got = image_layer(image, text, encoder_attention_mask=mask)[0]
        expected = self.expected(image_layer, image_tokens, image, text, None, mask)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    def test_both_directions_train_the_one_set(self):
        def gradient(*features):
            model = attach(bridgetower.make(), layers_to_transform=1)
            result = model(**bridgetower.inputs(0))
            sum(getattr(result, name).pow(2).sum() for name in features).backward()
            return self.parts(model, 1)[0].sdpt_prompts["default"].grad

        text, image = gradient("text_features"), gradient("image_features")
        assert text.abs().max() > 1e-4 and image.abs().max() > 1e-4
        both = gradient("text_features", "image_features")
        torch.testing.assert_close(text + image, both, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("features", "side"), [("text_features", 0), ("image_features", 1)])
    def test_independent_tokens_act_in_one_direction(self, features, side):
        model = attach(bridgetower.make(), prompt_mode="independent", layers_to_transform=1)
        model(**bridgetower.inputs(0))[features].pow(2).sum().backward()
        gradient = self.parts(model, 1)[0].sdpt_prompts["default"].grad
        assert (gradient[side].abs().amax(-1) > 0).all() and (gradient[1 - side] == 0).all()

    def test_prompts_hidden_from_the_image(self):
        model = attach(bridgetower.make(), image_attends_prompts=False, layers_to_transform=1)
        host = bridgetower.make()
        with torch.no_grad():
            result, bare = model(**bridgetower.inputs(0)), host(**bridgetower.inputs(0))
        assert torch.equal(result.image_features, bare.image_features)
        assert not torch.allclose(result.text_features, bare.text_features, atol=1e-3)

    @pytest.mark.parametrize(
        "config",
        [
            {"target_modules": [f"{IMAGE}.1"]},
            {"target_modules": [f"{TEXT}.1"]},
            {"target_modules": rf".*\.?{IMAGE}\.1"},
            {"layers_to_transform": [1]},
        ],
    )
    def test_either_part_names_the_pair(self, config):
        model = attach(bridgetower.make(), **config)
        assert model.peft_config["default"].fusion_layers == {f"{TEXT}.1": bridgetower.WIDTH}
        adapted = [n for n, module in model.base_model.model.named_modules() if isinstance(module, SDPTLayer)]
        assert adapted == [f"{IMAGE}.1", f"{TEXT}.1"]

    def test_layers_are_counted_in_pairs(self):
        with pytest.raises(ValueError, match=r"has \[2\], but BridgeTowerModel has 2 fusion layers, numbered 0 to 1"):
            attach(bridgetower.make(), layers_to_transform=[1, 2])

    def test_a_layer_whose_other_part_is_trained_whole_is_none(self):
        host = bridgetower.make()
        with pytest.raises(ValueError, match="has no fusion layer that SDPT knows outside of modules_to_save"):
            attach(host, modules_to_save=[IMAGE])
        assert not any(isinstance(module, SDPTLayer) for module in host.modules())

    def test_a_cross_layer_outside_of_bridgetower_is_no_host(self):
        layer = bridgetower.make().cross_modal_text_layers[0]
        assert BRIDGETOWER.matches(layer, [bridgetower.make()]) and not BRIDGETOWER.matches(layer)
        assert find_hosts(nn.ModuleDict({TEXT: nn.ModuleList([layer])})) == {}

    def test_two_adapters_of_which_one_is_deleted(self):
        model = attach(bridgetower.make())
        inputs = bridgetower.inputs(0)
        expected = bridgetower.outputs(model, inputs)
        torch.manual_seed(2)
        model.add_adapter("other", SDPTConfig(num_virtual_tokens=2, init_weights=False))
        model.set_adapter("other")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {
            f"base_model.model.{TEXT}.{index}.sdpt_{kind}.other" for index in range(2) for kind in ("prompts", "gates")
        }
        alone = bridgetower.outputs(model, inputs)
        assert not torch.allclose(alone, expected, atol=1e-3)
        model.delete_adapter("default")
        assert torch.equal(bridgetower.outputs(model, inputs), alone)
        for index in range(2):
            for part in self.parts(model, index):
                assert list(part.sdpt_prompts) == list(part.sdpt_config) == ["other"]

    def test_a_mixed_batch_of_adapters_of_one_direction_and_both(self):
        model = attach(bridgetower.make())
        torch.manual_seed(2)
        model.add_adapter("text", SDPTConfig(num_virtual_tokens=2, image_attends_prompts=False))
        inputs = bridgetower.inputs(0)
        alone = []
        for sample, name in enumerate(["default", "text"]):
            model.set_adapter(name)
            alone.append(bridgetower.outputs(model, inputs)[sample])
        mixed = bridgetower.outputs(model.eval(), {**inputs, "adapter_names": ["default", "text"]})
        torch.testing.assert_close(mixed, torch.stack(alone), rtol=0, atol=1e-5)

    def test_each_set_is_saved_once(self, tmp_path):
        model = attach(bridgetower.make())
        prompts, gates = (
            {f"base_model.model.{TEXT}.{index}.sdpt_{kind}" for index in range(2)} for kind in ("prompts", "gates")
        )
        state = get_peft_model_state_dict(model)
        assert set(state) == prompts | gates
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert set(saved) == prompts | gates
        assert sum(saved[key].numel() for key in prompts) == 2 * N * bridgetower.WIDTH
        for kind in ("sdpt_prompts", "sdpt_gates"):
            assert sum(kind in key for key in model.state_dict()) == 2
        other = attach(bridgetower.make(), seed=2)
        expected = bridgetower.outputs(model, bridgetower.inputs(0))
        assert not torch.equal(bridgetower.outputs(other, bridgetower.inputs(0)), expected)
        set_peft_model_state_dict(other, state)
        assert torch.equal(bridgetower.outputs(other, bridgetower.inputs(0)), expected)
        loaded = PeftModel.from_pretrained(bridgetower.make(), tmp_path, is_trainable=True)
        assert sum(p.requires_grad for p in loaded.parameters()) == 4

    @pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
    def test_a_copy_shares_within_itself(self, how, tmp_path):
        model = attach(bridgetower.make())
        if how == "torch.save":
            torch.save(model, tmp_path / "model.pt")
            other = torch.load(tmp_path / "model.pt", weights_only=False)
        else:
            other = copy.deepcopy(model)
        for index in range(2):
            text_layer, image_layer = self.parts(other, index)
            assert image_layer.sdpt_prompts["default"] is text_layer.sdpt_prompts["default"]
            assert text_layer.sdpt_prompts["default"] is not self.parts(model, index)[0].sdpt_prompts["default"]
        expected = bridgetower.outputs(model, bridgetower.inputs(0))
        assert torch.equal(bridgetower.outputs(other, bridgetower.inputs(0)), expected)

    def test_unloading_leaves_nothing(self):
        host = attach(bridgetower.make()).unload()
        assert not any(isinstance(module, SDPTLayer) for module in host.modules())
        assert type(host.cross_modal_image_layers[0]).__name__ == "BridgeTowerBertCrossLayer"


def roi_align(features: torch.Tensor, boxes: tuple[torch.Tensor, ...], size: int) -> torch.Tensor:
    """Stands in for torchvision's, which is not needed otherwise: features at a grid of points within each box."""
    points = (torch.arange(size) + 0.5) / size
    scale = torch.tensor([features.shape[-1], features.shape[-2]])
    found = []
    for image, corners in zip(features, boxes, strict=True):
        start, end = corners[:, None, None, :2], corners[:, None, None, 2:]
        grid = torch.stack(torch.meshgrid(points, points, indexing="xy"), dim=-1)
        grid = (start + (end - start) * grid) / scale * 2 - 1
        found.append(F.grid_sample(image.expand(len(corners), -1, -1, -1), grid, align_corners=False))
    return torch.cat(found)


@pytest.fixture
def boxes(monkeypatch):
    """Example boxes: two for the first picture, one for the second."""
    stand_in = SimpleNamespace(ops=SimpleNamespace(roi_align=roi_align))
    for module in (modeling_sam3, modeling_sam3_lite_text):
        monkeypatch.setattr(module, "torchvision", stand_in, raising=False)
    return {
        "input_boxes": torch.tensor([[[0.4, 0.5, 0.3, 0.4], [0.6, 0.6, 0.2, 0.2]], [[0.3, 0.3, 0.4, 0.4], [0.0] * 4]]),
        "input_boxes_labels": torch.tensor([[1, 0], [1, -10]]),
    }


every_sam3 = pytest.mark.parametrize("name", list(sam3.CLASSES))


class TestSam3:
    @every_sam3
    def test_eager_and_sdpa_are_the_same(self, name):
        # In double precision. What is left is the softmax of the eager attention, which is in float32.
        eager, sdpa = (attach(sam3.make(name, attention).double()).eval() for attention in ("eager", "sdpa"))
        for model, attention in ((eager, "eager"), (sdpa, "sdpa")):
            assert layer_of(model, sam3.ENCODER[0]).base_layer.cross_attn.config._attn_implementation == attention
        for changes in ({}, {"attention_mask": None}, {"adapter_names": ["default", "__base__"]}):
            inputs = {**sam3.inputs(0), **changes}
            inputs["pixel_values"] = inputs["pixel_values"].double()
            with torch.no_grad():
                torch.testing.assert_close(sam3.outputs(eager, inputs), sam3.outputs(sdpa, inputs), rtol=0, atol=5e-6)

    @every_sam3
    def test_attention_weights_and_hidden_states(self, name):
        model = attach(sam3.make(name, "eager"), prompt_gate=None)
        asked = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            result, plain = model(**sam3.inputs(0), **asked), model(**sam3.inputs(0))
        # 16 image tokens, 5 text tokens, 6 queries after the presence token.
        sizes = [tuple(weights.shape) for weights in result.detr_encoder_attentions]
        assert sizes == [(2, 4, 16, 16), (2, 4, 16, 5 + N)] * 2
        sizes = [tuple(weights.shape) for weights in result.detr_decoder_attentions]
        assert sizes == [(2, 4, 7, 7), (2, 4, 7, 5 + N), (2, 4, 7, 16 + N)] * 2
        (weights,) = result.mask_decoder_attentions
        assert weights.shape == (2, 4, 16, 5 + N)
        for seen in (*result.detr_encoder_attentions[1::2], weights):
            # Padding of the second text is hidden, prompts are not.
            assert (seen[1, ..., 3:5] < 1e-6).all() and (seen[..., 5:] > 0).all()
        assert [each.shape for each in result.encoder_hidden_states] == [(2, 16, sam3.WIDTH)] * 3
        assert [each.shape for each in result.decoder_hidden_states] == [(2, 7, sam3.WIDTH)] * 3
        torch.testing.assert_close(result.pred_masks, plain.pred_masks)

    def expected(self, attention, query, key, value, prompts, mask):
        """An attention with prompts appended to keys and values."""
        keys, values = attention.k_proj(appended(key, prompts)), attention.v_proj(appended(value, prompts))
        return attention.o_proj(attend(attention.q_proj(query), keys, values, 4, F.pad(mask, (0, len(prompts)))))

    @every_sam3
    @pytest.mark.parametrize("independent", [False, True])
    def test_a_decoder_layer_on_its_own(self, name, independent):
        mode = "independent" if independent else "unified"
        model = attach(sam3.make(name).double(), target_modules=sam3.DECODER, **PUBLISHED, prompt_mode=mode)
        layer = layer_of(model, sam3.DECODER[0])
        host = layer.base_layer
        tokens = layer.sdpt_prompts["default"].double()
        text_tokens, image_tokens = tokens if independent else (tokens, tokens)
        queries, position = random(2, 7, sam3.WIDTH), random(2, 6, sam3.WIDTH, seed=1)
        text, image, places = (random(2, size, sam3.WIDTH, seed=size) for size in (5, 16, 17))
        places = places[:, :16]
        mask, bias = hiding([5, 3], 5), random(2, 4, 7, 16, seed=3)
        # As the decoder calls it.
        got = layer(
            queries,
            query_pos=position,
            text_features=text,
            vision_features=image,
            vision_pos_encoding=places,
            text_cross_attn_mask=mask,
            vision_cross_attn_mask=bias,
        )

        position = F.pad(position, (0, 0, 1, 0))
        states = queries + host.self_attn(queries + position, queries + position, queries)[0]
        states = host.self_attn_layer_norm(states)
        text_prompts = inverted(text_tokens, host.text_cross_attn.k_proj)
        added = self.expected(host.text_cross_attn, states + position, text, text, text_prompts, mask)
        states = host.text_cross_attn_layer_norm(states + added)
        image_prompts = inverted(image_tokens, host.vision_cross_attn.k_proj)
        added = self.expected(host.vision_cross_attn, states + position, image + places, image, image_prompts, bias)
        states = host.vision_cross_attn_layer_norm(states + added)
        expected = host.mlp_layer_norm(states + host.mlp(states))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    @every_sam3
    def test_an_encoder_layer_and_the_mask_decoder_see_a_longer_concept(self, name):
        model = attach(sam3.make(name).double(), **PUBLISHED)
        image, places, text = random(2, 16, sam3.WIDTH), random(2, 16, sam3.WIDTH, seed=1), random(2, 5, sam3.WIDTH)
        valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        layer = layer_of(model, sam3.ENCODER[0])
        longer = appended(text, inverted(layer.sdpt_prompts["default"].double(), layer.base_layer.cross_attn.k_proj))
        got = layer(image, prompt_feats=text, vision_pos_encoding=places, prompt_cross_attn_mask=hiding([5, 3], 5))
        expected = layer.base_layer(image, longer, places, F.pad(hiding([5, 3], 5), (0, N)))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

        layer = layer_of(model, sam3.MASK_DECODER)
        attention = layer.base_layer.prompt_cross_attn
        longer = appended(text, inverted(layer.sdpt_prompts["default"].double(), attention.k_proj))
        features = [random(2, sam3.WIDTH, size, size) for size in (16, 8, 4)]
        queries = random(2, 6, sam3.WIDTH)
        given = {"decoder_queries": queries, "backbone_features": features, "encoder_hidden_states": image}
        got = layer(**given, prompt_features=text, prompt_mask=valid)
        expected = layer.base_layer(**given, prompt_features=longer, prompt_mask=F.pad(valid, (0, N), value=True))
        torch.testing.assert_close(got.pred_masks, expected.pred_masks, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.semantic_seg, expected.semantic_seg, rtol=1e-6, atol=1e-6)
        # Without a concept there is nothing to append to.
        assert torch.equal(layer(**given).pred_masks, layer.base_layer(**given).pred_masks)

    @every_sam3
    def test_a_mixed_batch_without_a_mask(self, name):
        model = attach(sam3.make(name)).eval()
        inputs = {**sam3.inputs(0), "attention_mask": None}
        with torch.no_grad():
            mixed = sam3.outputs(model, {**inputs, "adapter_names": ["default", "__base__"]})
            adapted = sam3.outputs(model, inputs)
            with model.disable_adapter():
                bare = sam3.outputs(model, inputs)
        torch.testing.assert_close(mixed, torch.stack([adapted[0], bare[1]]), rtol=1e-5, atol=1e-5)

    @every_sam3
    @pytest.mark.parametrize("mask", [True, False])
    def test_example_boxes(self, name, mask, boxes):
        model = attach(sam3.make(name)).eval()
        inputs = {**sam3.inputs(0), **boxes}
        if not mask:
            inputs["attention_mask"] = None
        with torch.no_grad():
            adapted = sam3.outputs(model, inputs)
            assert not torch.allclose(adapted, sam3.outputs(model, {**inputs, "input_boxes": None}), atol=1e-3)
            with model.disable_adapter():
                bare = sam3.outputs(model, inputs)
            mixed = sam3.outputs(model, {**inputs, "adapter_names": ["__base__", "default"]})
            # One more box that is padding.
            inputs["input_boxes"] = F.pad(inputs["input_boxes"], (0, 0, 0, 1))
            inputs["input_boxes_labels"] = F.pad(inputs["input_boxes_labels"], (0, 1), value=-10)
            padded = sam3.outputs(model, inputs)
        assert (adapted - bare).abs().max() > 1e-3
        torch.testing.assert_close(mixed, torch.stack([bare[0], adapted[1]]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded, adapted, rtol=1e-4, atol=1e-5)

    @every_sam3
    def test_embeddings_made_before(self, name):
        model = attach(sam3.make(name))
        inputs = sam3.inputs(0)
        with torch.no_grad():
            expected = sam3.outputs(model, inputs)
            host = model.base_model.model
            text = host.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=True)
            image = host.get_vision_features(inputs["pixel_values"])
            given = {"vision_embeds": image, "text_embeds": text, "attention_mask": inputs["attention_mask"]}
            assert torch.equal(sam3.outputs(model, given), expected)

    def test_gradients_under_checkpointing(self):
        """Of what lies before the fusion layers; these the host does not checkpoint."""

        def gradients(checkpointing):
            model = attach(sam3.make("sam3_lite_text")).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            sam3.outputs(model, sam3.inputs(0)).pow(2).mean().backward()
            return [p.grad for p in model.parameters() if p.requires_grad]

        for got, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(got, expected)

    def test_which_models_have_these_layers(self):
        def families(model):
            return [host.name for host in find_hosts(model).values()]

        expected = [SAM3_ENCODER.name] * 6 + [SAM3_DECODER.name] * 6 + [SAM3_MASK_DECODER.name]
        with torch.device("meta"):
            video = Sam3VideoModel(Sam3VideoConfig())
            tracker = Sam3TrackerModel(Sam3TrackerConfig())
        assert families(video) == expected and families(tracker) == []
        assert all(name.startswith("detector_model.") for name in find_hosts(video))


@pytest.mark.parametrize("partly", [False, True])
def test_injecting_from_a_state_dict_wraps_both_modules_of_a_layer(partly):
    """Only the first has weights to be found by."""
    case = bridgetower.CASE
    model = attach(case.make())
    state = get_peft_model_state_dict(model)
    layers = list(case.layers)
    if partly:
        state = {key: value for key, value in state.items() if layers[0] in key}
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    host = case.make()
    inject_adapter_in_model(SDPTConfig(num_virtual_tokens=N), host, state_dict=state)
    wrapped = [name for name, module in host.named_modules() if isinstance(module, SDPTLayer)]
    expected = layers[:1] if partly else layers
    assert set(wrapped) == {*expected, *(part for part, name in case.shared.items() if name in expected)}
    if not partly:
        set_peft_model_state_dict(host, state)
        with torch.no_grad():
            assert torch.equal(case.outputs(host, case.inputs(0)), case.outputs(model, case.inputs(0)))
