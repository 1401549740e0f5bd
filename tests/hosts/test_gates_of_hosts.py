# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Gates on every base model, and at the second place in Grounding DINO, the attention of its decoder to the text."""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import peft_sdpt
from peft_sdpt import SDPTConfig, SDPTLayer, initialize_sdpt_prototypes
from peft_sdpt.hosts import (
    GROUNDING_DINO_DECODER,
    HOSTS,
    Context,
    CrossAttentionHost,
    Heads,
    JointAttentionHost,
    find_hosts,
)
from peft_sdpt.hosts.declaration import attribute_of
from peft_sdpt.layer import SharedSDPTLayer
from tests.helpers import detectors
from tests.helpers.tiny import Case, cases, lxmert, randomise, sam3
from tests.helpers.tiny.blip import TEXT, VISION

N = 3
attach = partial(detectors.attach, num_virtual_tokens=N)
CASES = {case.name: case for case in cases()}
DECODER = "encoder_attn_text"
DETECTORS = ("grounding_dino", "mm_grounding_dino")


@dataclass(frozen=True)
class Place:
    """Fusion layers of a base model that an adapter is put on."""

    name: str
    case: Case
    config: dict[str, Any] = field(default_factory=dict)


PLACES = [
    *(Place(name, case) for name, case in CASES.items()),
    *(Place(f"{name}, decoder", CASES[name], {"target_modules": [DECODER]}) for name in DETECTORS),
    Place("grounding_dino, both", CASES["grounding_dino"], {"target_modules": ["fusion_layer.attn", DECODER]}),
    Place("bridgetower, hidden", CASES["bridgetower"], {"image_attends_prompts": False}),
    Place(
        "sam3, independent",
        CASES["sam3"],
        {"prompt_mode": "independent", "target_modules": sam3.DECODER},
    ),
]
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)


@torch.no_grad()
def run(case, model, padding: int = 0, **changes):
    return case.outputs(model, {**case.inputs(padding), **changes})


def bare(case):
    """Frozen, as PEFT leaves it: for weights that are trained, torch may take other kernels."""
    return run(case, case.make().requires_grad_(False))


def adapted(model) -> dict[str, SDPTLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SDPTLayer)}


@every_place
def test_a_fresh_adapter_is_the_base_model(place, tmp_path):
    case = place.case
    model = attach(case.make(), init_weights=True, **place.config)
    expected = bare(case)
    assert torch.equal(run(case, model), expected)
    assert torch.equal(case.outputs(model, case.inputs(0)).detach(), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(case, PeftModel.from_pretrained(case.make(), tmp_path)), expected)
    # In training it is not called as it is, but computes the same.
    torch.manual_seed(0)
    host = case.outputs(case.make().requires_grad_(False).train(), case.inputs(0))
    torch.manual_seed(0)
    outputs = case.outputs(model.train(), case.inputs(0))
    torch.testing.assert_close(outputs, host, rtol=0, atol=case.tolerance)


@every_place
def test_every_layer_has_gates_for_its_heads_and_sides(place):
    model = attach(place.case.make(), prompt_groups=[1, 2], **place.config)
    config = model.peft_config["default"]
    assert set(config.fusion_gates) == set(config.fusion_layers)
    for layer in adapted(model).values():
        hidden = layer.fusion_host.image_reads is not None and not config.image_attends_prompts
        sides = layer.fusion_host.num_sides - hidden
        heads = layer.fusion_host.num_heads(layer.base_layer)
        assert layer.sdpt_gates["default"].shape == (sides, 2, heads)
        assert f"gates of {heads} heads" in repr(layer)


@every_place
def test_random_gates_act_in_every_layer(place):
    case = place.case
    model = attach(case.make(), **place.config)
    expected = run(case, model)
    assert (expected - bare(case)).abs().max() > 1e-3
    for name, layer in adapted(model).items():
        if isinstance(layer, SharedSDPTLayer):
            continue
        without = copy.deepcopy(model)
        twin = adapted(without)[name]
        nn.init.zeros_(twin.sdpt_gates["default"])
        assert (run(case, without) - expected).abs().max() > 1e-5


@every_place
def test_random_gates_are_saved_and_loaded(place, tmp_path):
    case = place.case
    model = attach(case.make(), **place.config)
    expected = run(case, model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(run(case, loaded), expected)


@every_place
def test_gradients_reach_gates_and_tokens(place):
    case = place.case
    weights = torch.randn(bare(case).shape, generator=torch.Generator().manual_seed(0))
    for fresh in (True, False):
        model = attach(case.make(), init_weights=fresh, **place.config).train()
        (case.outputs(model, case.inputs(0)) * weights).sum().backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
            elif "sdpt_gates" in name:
                assert parameter.grad.isfinite().all() and (parameter.grad != 0).all(), name
            elif fresh:
                assert (parameter.grad == 0).all(), name
            else:
                assert parameter.grad.isfinite().all() and (parameter.grad.abs().amax(-1) > 0).all(), name


@every_place
def test_scales(place):
    case = place.case
    model = attach(case.make(), **place.config)
    expected = run(case, model)
    model.base_model.set_scale("default", 0)
    assert torch.equal(run(case, model), bare(case))
    model.base_model.set_scale("default", 0.5)
    half = run(case, model)
    assert not torch.equal(half, expected) and not torch.equal(half, bare(case))
    model.base_model.set_scale("default", 1)
    assert torch.equal(run(case, model), expected)


@every_place
def test_a_mixed_batch_equals_each_adapter_alone(place):
    case = place.case
    model = attach(case.make(), **place.config)
    torch.manual_seed(2)
    model.add_adapter("other", SDPTConfig(num_virtual_tokens=2, init_weights=False, **place.config))
    model.eval()
    alone = {"default": run(case, model), "__base__": bare(case)}
    model.set_adapter("other")
    alone["other"] = run(case, model)
    for names in (["default", "other"], ["other", "__base__"], ["default", "default"]):
        mixed = run(case, model, adapter_names=names)
        for sample, name in enumerate(names):
            # Each sample has products of its own, which round differently in single precision.
            torch.testing.assert_close(mixed[sample], alone[name][sample], rtol=0, atol=2 * case.tolerance)


@every_place
def test_padding_changes_nothing(place):
    model = attach(place.case.make(), **place.config)
    tolerance = place.case.tolerance
    torch.testing.assert_close(run(place.case, model, padding=3), run(place.case, model), rtol=0, atol=tolerance)


def as_dtype(inputs, dtype):
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@every_place
def test_bfloat16(place):
    case = place.case
    inputs = as_dtype(case.inputs(0), torch.bfloat16)
    host = case.make().to(torch.bfloat16).requires_grad_(False)
    if "glip" in place.name or place.name.startswith(("original", "mmdetection")):
        pytest.skip("the stand-in for the base model mixes precisions")
    with torch.no_grad():
        expected = case.outputs(host, inputs)
        fresh = attach(copy.deepcopy(host), init_weights=True, **place.config)
        assert torch.equal(case.outputs(fresh, inputs), expected)
    outputs = case.outputs(attach(host, **place.config), inputs)
    assert outputs.isfinite().all() and not torch.equal(outputs, expected)
    outputs.float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in host.parameters() if p.requires_grad)


@every_place
def test_an_adapter_without_gates_beside_one_with_gates(place):
    """The prompts of one are in the base model's softmax, those of the other have their own."""
    case = place.case
    model = attach(case.make(), prompt_gate=None, **place.config)
    published = run(case, model)
    torch.manual_seed(2)
    model.add_adapter("other", SDPTConfig(num_virtual_tokens=2, init_weights=False, **place.config))
    model.eval()
    model.base_model.set_adapter(["default", "other"])
    both = run(case, model)
    assert (both - published).abs().max() > 1e-4
    model.base_model.set_scale("other", 0)
    assert torch.equal(run(case, model), published)


# The formula. The attention within a module of a base model: where it is, its projections, and its output projection if
# it has one.
PROJECTIONS = {
    "LxmertAttention": ("query", "key", "value", None),
    "BridgeTowerCrossAttention": ("query", "key", "value", None),
    "BlipTextSelfAttention": ("query", "key", "value", None),
    "Blip2QFormerMultiHeadAttention": ("query", "key", "value", None),
    "InstructBlipQFormerMultiHeadAttention": ("query", "key", "value", None),
    "InstructBlipVideoQFormerMultiHeadAttention": ("query", "key", "value", None),
    "Sam3Attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "Sam3LiteTextAttention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "OmDetTurboMultiheadAttention": ("query", "key", "value", "out_proj"),
    "FlavaSelfAttention": ("query", "key", "value", None),
    "ViltSelfAttention": ("query", "key", "value", None),
    "GroundingDinoMultiheadAttention": ("query", "key", "value", "out_proj"),
    "MMGroundingDinoMultiheadAttention": ("query", "key", "value", "out_proj"),
}
ATTENTIONS = {
    "LxmertCrossAttentionLayer": ["att"],
    "BridgeTowerBertCrossLayer": ["crossattention.self"],
    "BlipTextLayer": ["crossattention.self"],
    "Blip2QFormerLayer": ["crossattention.attention"],
    "InstructBlipQFormerLayer": ["crossattention.attention"],
    "InstructBlipVideoQFormerLayer": ["crossattention.attention"],
    "Sam3DetrEncoderLayer": ["cross_attn"],
    "Sam3LiteTextDetrEncoderLayer": ["cross_attn"],
    "Sam3DetrDecoderLayer": ["text_cross_attn", "vision_cross_attn"],
    "Sam3LiteTextDetrDecoderLayer": ["text_cross_attn", "vision_cross_attn"],
    "Sam3MaskDecoder": ["prompt_cross_attn"],
    "Sam3LiteTextMaskDecoder": ["prompt_cross_attn"],
}
HEADS = 4
GROUPS = [1, 2]


def add_formula(attention: nn.Module, tokens: torch.Tensor, gates: torch.Tensor) -> None:
    """Make an attention of a base model compute the formula, with tokens `(N, E)` and gates `(groups, heads)`."""
    query, key, value, out = PROJECTIONS[type(attention).__name__]
    original = attention.forward

    def forward(*args, **kwargs):
        states = args[0] if args else next(kwargs[n] for n in ("hidden_states", "query", "queries") if n in kwargs)
        outputs = original(*args, **kwargs)
        project = {name: getattr(attention, name) for name in (query, key, value)}
        prompts = (tokens - project[key].bias) @ torch.linalg.pinv(project[key].weight).T
        q, k, v = project[query](states), project[key](prompts), project[value](prompts)
        read = []
        for head in range(HEADS):
            size = q.shape[-1] // HEADS
            part = slice(head * size, (head + 1) * size)
            total, start = 0, 0
            for group, length in enumerate(GROUPS):
                rows = slice(start, start + length)
                weights = torch.softmax(q[..., part] @ k[rows, part].T / size**0.5, dim=-1)
                total = total + torch.tanh(gates[group, head]) * (weights @ v[rows, part])
                start += length
            read.append(total)
        read = torch.cat(read, dim=-1)
        # Linear, so it does not matter whether it is added before or after.
        added = read if out is None else F.linear(read, getattr(attention, out).weight)
        return (outputs[0] + added, *outputs[1:])

    attention.forward = forward


def has_formula(place: Place) -> bool:
    """Bi-directional attentions have tests of their own, in `tests/core`."""
    layers = {name: module for name, module in place.case.make().named_modules() if name in place.case.layers}
    classes = {type(module).__name__ for module in layers.values()}
    return "decoder" in place.name or not classes.isdisjoint({*ATTENTIONS, *PROJECTIONS})


FORMULA = [place for place in PLACES if has_formula(place)]


@pytest.mark.parametrize("place", FORMULA, ids=lambda place: place.name)
def test_the_formula(place):
    """Outputs and gradients are those of a computation that uses neither hooks nor specs, in float64."""
    case = place.case
    published = {"pinv_rtol": None, "prompt_space": "aligned"}
    model = attach(case.make(), prompt_groups=GROUPS, **published, **place.config).double()
    inputs = as_dtype(case.inputs(0), torch.float64)
    outputs = case.outputs(model, inputs)
    weights = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (outputs * weights).sum().backward()

    host = case.make().double().requires_grad_(False)
    layers = adapted(model.base_model.model)
    tokens, gates = {}, {}
    for name, layer in layers.items():
        owner = case.shared.get(name, name)
        if owner not in tokens:
            for found, parameters in ((tokens, layers[owner].sdpt_prompts), (gates, layers[owner].sdpt_gates)):
                found[owner] = parameters["default"].detach().double().clone().requires_grad_()
        if layer.side == 1 and not model.peft_config["default"].image_attends_prompts:
            continue
        module = host.get_submodule(name)
        for place_in_module, inner in enumerate(ATTENTIONS.get(type(module).__name__, [""])):
            side = place_in_module if layer.side is None else layer.side
            own = tokens[owner][side] if tokens[owner].dim() == 3 else tokens[owner]
            add_formula(module.get_submodule(inner), own, gates[owner][side])
    expected = case.outputs(host, inputs)
    (expected * weights).sum().backward()
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    for owner in tokens:
        torch.testing.assert_close(layers[owner].sdpt_prompts["default"].grad, tokens[owner].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layers[owner].sdpt_gates["default"].grad, gates[owner].grad, rtol=1e-5, atol=1e-5)


def test_names_in_specs_exist():
    """All of them, also those without which a layer is still found."""
    seen = set()
    for case in CASES.values():
        model = case.make()
        for name, spec in find_hosts(model).items():
            contexts = spec.contexts if isinstance(spec, CrossAttentionHost) else [spec]
            for heads in [getattr(context, "heads", None) for context in contexts]:
                if heads is not None and heads.dropout is not None:
                    assert attribute_of(model.get_submodule(name), heads.dropout) is not None
                    seen.add(spec.name)
    have_gates = {spec.name for spec in HOSTS if isinstance(spec, (CrossAttentionHost, JointAttentionHost))}
    assert have_gates - seen == {spec for spec in have_gates if "SAM 3" in spec}  # which drops no weights


def test_weights_are_dropped_where_the_base_model_drops_them():
    layer = adapted(attach(lxmert.make()))["base_model.model." + lxmert.LAYERS[0]]
    (context,) = layer.fusion_host.contexts
    (prompts,) = layer.input_prompts(["default"])
    queries = torch.randn(2, 5, lxmert.WIDTH)
    read = partial(context.heads.read, layer.base_layer, layer.base_layer.att.key, queries, prompts.gated)
    layer.base_layer.att.dropout.p = 0.5
    kept = read()
    assert torch.equal(read(), kept)
    layer.train()
    assert not torch.equal(read(), kept)
    layer.base_layer.att.dropout.p = 0.0
    assert torch.equal(read(), kept)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["blip", "blip_2", "instructblip", "flava", "vilt"])
def test_gradients_under_checkpointing(name, use_reentrant):
    """In BLIP and the Q-Formers, the fusion layer checkpoints itself. In the others, the layer around it does."""
    case = CASES[name]

    def gradients(checkpointing):
        model = attach(case.make())
        if checkpointing:
            # By hand, because what `gradient_checkpointing_enable` does to embeddings raises an error in BLIP.
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
        for each, parameter in model.named_parameters():
            # The older kind needs an input with a gradient.
            if re.search(r"(embeddings.*|qformer|model)\.layer_?norm\.", each, re.IGNORECASE) or "cls_token" in each:
                parameter.requires_grad_(True)
        layer = next(iter(adapted(model.train()).values()))
        spec = layer.fusion_host
        heads = spec.contexts[0].heads if isinstance(spec, CrossAttentionHost) else spec.heads
        calls = []
        attribute_of(layer.base_layer, heads.value).register_forward_hook(lambda *_: calls.append(1))
        case.outputs(model, case.inputs(0)).pow(2).mean().backward()
        return {each: p.grad for each, p in model.named_parameters() if "sdpt" in each}, len(calls)

    (got, more), (expected, fewer) = gradients(True), gradients(False)
    assert (more, fewer) == (4, 2)  # for tokens and for prompts, and again in the backward pass
    for each, gradient in got.items():
        torch.testing.assert_close(gradient, expected[each])


def make_captioner():
    torch.manual_seed(0)
    text = BlipTextConfig(**TEXT, bos_token_id=1, sep_token_id=2, eos_token_id=2)
    return randomise(
        BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=BlipVisionConfig(**VISION)))
    )


@pytest.mark.parametrize("fresh", [True, False])
def test_a_cache_is_filled_once(fresh):
    """Also where gradients are wanted, and a fresh adapter must have the values of the base model."""
    model = attach(make_captioner(), init_weights=fresh)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ids = torch.randint(3, 50, (2, 4), generator=torch.Generator().manual_seed(4))
    host = model.base_model.model
    image = host.vision_model(pixels).last_hidden_state
    first = host.text_decoder(ids[:, :3], encoder_hidden_states=image, use_cache=True)
    key = "cache" if "cache" in first else "past_key_values"
    second = host.text_decoder(ids[:, 3:], encoder_hidden_states=image, use_cache=True, **{key: first[key]})
    whole = host.text_decoder(ids, encoder_hidden_states=image, use_cache=False)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1])


@pytest.mark.parametrize("name", ["lxmert", "vilt"])
def test_compiled_layers_follow_their_prompts(name):
    case = CASES[name]
    model = attach(case.make())
    expected = run(case, model)
    torch._dynamo.reset()
    for layer in adapted(model).values():
        layer.forward = torch.compile(layer.forward, backend="eager")
    with model.disable_adapter():
        assert torch.equal(run(case, model), bare(case))
    assert torch.equal(run(case, model), expected)
    model.base_model.set_scale("default", 0.5)
    half = run(case, model)
    assert not torch.allclose(half, expected, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(run(case, model), bare(case))
    model.base_model.set_scale("default", 1)
    assert torch.equal(run(case, model), expected)


def test_a_compiled_model_with_gates_is_right():
    case = CASES["instructblip"]
    model = attach(case.make())
    expected = run(case, model)
    torch._dynamo.reset()
    torch.testing.assert_close(run(case, torch.compile(model, backend="eager")), expected, rtol=0, atol=1e-5)


def test_another_thread_sees_no_prompts():
    """Hooks belong to a module, and another thread may call it while they are there."""
    layer = adapted(attach(lxmert.make()))["base_model.model." + lxmert.LAYERS[0]]
    host = layer.base_layer
    text, image = torch.randn(2, 5, lxmert.WIDTH), torch.randn(2, 6, lxmert.WIDTH)
    with torch.no_grad():
        (expected,), (plain,) = layer(text, image), host(text, image)
    found = []

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            with torch.no_grad():
                thread = threading.Thread(target=lambda: found.append(host(2 * text, image)))
            thread.start()
            thread.join()

    handle = host.att.query.register_forward_hook(meanwhile)
    with torch.no_grad():
        (got,) = layer(text, image)
        handle.remove()
        assert torch.equal(got, expected) and not torch.equal(got, plain)
        # Threads divide the work differently.
        torch.testing.assert_close(found[0][0], host(2 * text, image)[0])


def test_no_hook_stays_after_an_error():
    layer = adapted(attach(lxmert.make()))["base_model.model." + lxmert.LAYERS[0]]
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5, lxmert.WIDTH), torch.randn(3, 6, lxmert.WIDTH))
    layer(torch.randn(2, 5, lxmert.WIDTH), torch.randn(2, 6, lxmert.WIDTH))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.base_layer.modules())


def test_lora_on_the_other_projections():
    """The projections are called, so those of another tuner's adapter count."""
    config = LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False)
    torch.manual_seed(5)
    host = inject_adapter_in_model(config, lxmert.make())
    merged = copy.deepcopy(host)
    for module in list(merged.modules()):
        if hasattr(module, "merge"):
            module.merge()
    models = [attach(each) for each in (host, merged)]
    torch.testing.assert_close(*(run(lxmert.CASE, model) for model in models), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(lxmert.CASE, models[0]), run(lxmert.CASE, attach(lxmert.make())), atol=1e-2)


@pytest.mark.parametrize("name", ["lxmert", "vilt", "sam3"])
def test_a_quantised_base_model(name):
    case = CASES[name]
    host = torch.ao.quantization.quantize_dynamic(case.make(), {nn.Linear}, dtype=torch.qint8)
    expected = run(case, host)
    assert torch.equal(run(case, attach(copy.deepcopy(host), init_weights=True)), expected)
    quantised, plain = run(case, attach(host)), run(case, attach(case.make()))
    assert not torch.allclose(quantised, expected, atol=1e-2)
    # As far from the plain model as without prompts.
    assert (quantised - plain).abs().mean() < 3 * (expected - bare(case)).abs().mean()


class TestDecoderOfGroundingDino:
    @pytest.mark.parametrize("name", DETECTORS)
    def test_it_is_the_attention_to_the_text_only(self, name):
        host = CASES[name].make()
        places = [each for each, spec in find_hosts(host).items() if spec is GROUNDING_DINO_DECODER]
        assert places == [f"model.decoder.layers.{index}.{DECODER}" for index in range(2)]
        same = [each for each, module in host.named_modules() if type(module) is type(host.get_submodule(places[0]))]
        assert len(same) > len(places)

    def test_it_is_adapted_only_if_it_is_named(self):
        host = CASES["grounding_dino"].make()
        assert list(attach(host).peft_config["default"].fusion_layers) == detectors.LAYERS
        with pytest.raises(ValueError, match=r"has \[2\], but GroundingDinoForObjectDetection has 2 fusion layers"):
            attach(CASES["grounding_dino"].make(), layers_to_transform=2)
        targets = ["fusion_layer.attn", DECODER]
        layers = attach(CASES["grounding_dino"].make(), target_modules=targets).peft_config["default"].fusion_layers
        width, inner = detectors.REACHED, detectors.D_MODEL
        expected = dict.fromkeys(detectors.LAYERS, width)
        expected |= {f"model.decoder.layers.{index}.{DECODER}": inner for index in range(2)}
        assert layers == expected

    def test_lora_by_default_leaves_it_out(self):
        case = CASES["grounding_dino"]

        def with_lora(**config):
            return set(attach(case.make(), lora_rank=2, **config).peft_config["default"].lora_layers)

        everything, others = with_lora(), with_lora(target_modules=["fusion_layer.attn", DECODER])
        assert others < everything
        assert everything - others == {
            f"model.decoder.layers.{index}.{DECODER}.{name}"
            for index in range(2)
            for name in ("query", "key", "value", "out_proj")
        }

    def test_it_can_have_prompts_without_gates(self):
        case = CASES["grounding_dino"]
        model = attach(case.make(), target_modules=[DECODER], prompt_gate=None)
        assert (run(case, model) - bare(case)).abs().max() > 1e-4
        padded = run(case, model, padding=3)
        torch.testing.assert_close(padded, run(case, model), rtol=0, atol=case.tolerance)

    def test_prototypes_are_for_the_encoder(self):
        def model(targets):
            config = {"target_modules": targets, "init_weights": "prototypes", "num_virtual_tokens": 2}
            return attach(CASES["grounding_dino"].make(), **config)

        inputs = detectors.model_inputs()
        labels = [{"boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]]), "class_labels": torch.tensor([0])}] * 2
        both = model(["fusion_layer.attn", DECODER])
        before = {name: layer.tokens().clone() for name, layer in adapted(both).items()}
        initialize_sdpt_prototypes(both, [(inputs, labels)], prototypes="random")
        for name, layer in adapted(both).items():
            assert torch.equal(layer.tokens(), before[name]) == (DECODER in name)
        with pytest.raises(ValueError, match="has prompts in the decoder only, and prototypes are for"):
            initialize_sdpt_prototypes(model([DECODER]), [(inputs, labels)])

    def test_the_full_size_model(self):
        with torch.device("meta"):
            host = CASES["grounding_dino"].full_size()
            model = get_peft_model(host, SDPTConfig(target_modules=["fusion_layer.attn", DECODER]))
        assert len(model.peft_config["default"].fusion_layers) == 12
        assert set(map(tuple, model.peft_config["default"].fusion_gates.values())) == {(2, 4), (1, 8)}


class Reader(nn.Module):
    """A cross-attention with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.heads, self.factor, self.drop = 2, 0.3, 0.0

    def forward(self, queries, image):
        q, k, v = (
            states.unflatten(-1, (2, 4)).transpose(1, 2)
            for states in (self.query(queries), self.key(image), self.value(image))
        )
        return self.out(((q @ k.mT * self.factor).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Careless(Reader):
    def forward(self, queries, image):
        return self.out(F.linear(queries, self.query.weight) + self.value(image).mean(1, keepdim=True))


HEADS_OF_READER = Heads(query="query", value="value", out="out", number="heads", scale="factor", dropout="drop")


@pytest.fixture
def registered():
    before = list(HOSTS)

    def register(heads):
        context = Context(key="key", tokens=("image",), heads=heads)
        peft_sdpt.register_host(
            CrossAttentionHost(
                name="reader", class_names=("Reader",), arguments=("queries", "image"), contexts=(context,)
            )
        )

    yield register
    HOSTS[:] = before


def reader(cls, **config) -> SDPTLayer:
    torch.manual_seed(0)
    model = attach(nn.ModuleDict({"layer": cls()}).eval(), **config)
    return model.base_model.model["layer"]


def test_a_spec_of_your_own_may_name_a_scale(registered):
    registered(HEADS_OF_READER)
    layer = reader(Reader, pinv_rtol=None).double()
    host = layer.base_layer
    queries, image = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double()
    keys = layer.tokens().unflatten(-1, (2, 4)).transpose(0, 1)
    prompts = (layer.tokens() - host.key.bias) @ torch.linalg.pinv(host.key.weight).T
    values = host.value(prompts).unflatten(-1, (2, 4)).transpose(0, 1)
    states = host.query(queries).unflatten(-1, (2, 4)).transpose(1, 2)
    read = (states @ keys.mT * 0.3).softmax(-1) @ values * layer.sdpt_gates["default"].tanh().view(1, 2, 1, 1)
    expected = host(queries, image) + F.linear(read.transpose(1, 2).flatten(2), host.out.weight)
    torch.testing.assert_close(layer(queries, image), expected, rtol=0, atol=1e-10)


def test_a_spec_without_heads_has_no_gates(registered):
    registered(None)
    with pytest.warns(
        UserWarning, match=r"The fusion layer 'layer' \(reader\) has no gates, because its spec names no"
    ):
        layer = reader(Reader)
    assert not layer.sdpt_gates and "no gates" in repr(layer)
    with pytest.raises(
        ValueError, match=r"SDPTConfig.prompt_groups=\[1, 2\] needs gates, and 'layer' \(reader\) has none"
    ):
        reader(Reader, prompt_groups=[1, 2])
    queries, image = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    assert not torch.allclose(layer(queries, image), layer.base_layer(queries, image), atol=1e-3)


def test_a_module_that_does_not_call_its_query_projection(registered):
    registered(HEADS_OF_READER)
    layer = reader(Careless)
    with pytest.raises(ValueError, match=r"Careless has not called 'query' before its output projection"):
        layer(torch.randn(2, 3, 8), torch.randn(2, 5, 8))
