# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A tuned model as a plain PyTorch model."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GroundingDinoForObjectDetection

from peft_sdpt import SDPTConfig
from peft_sdpt.deployment.baking import BakedBiAttention, BakedFusionLayer, bake
from peft_sdpt.errors import InputError
from peft_sdpt.hosts import BiAttentionHost
from peft_sdpt.layer import SDPTLayer
from peft_sdpt.weights import is_plain_linear
from tests.core.test_lora_rank import moved
from tests.helpers.detectors import LAYERS, FusionStack, acting, attach, make_host, model_inputs, run
from tests.helpers.tiny import cases

CASES = cases()
every_host = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@torch.no_grad()
def outputs_of(case, model, padding=0):
    return case.outputs(model, case.inputs(padding))


def assert_plain(model):
    """Check that nothing of PEFT is left in a model."""
    assert not [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert not [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    assert not [name for name in model.state_dict() if "sdpt" in name or "base_layer" in name or "default" in name]
    assert not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@every_host
def test_it_computes_what_the_tuned_model_computes(case):
    model = attach(case.make())
    expected, before = outputs_of(case, model), {name: value.clone() for name, value in model.state_dict().items()}
    baked = bake(model)
    assert_plain(baked)
    assert type(baked) is type(case.make())
    assert torch.equal(outputs_of(case, baked), expected)
    layers = [module for module in baked.modules() if isinstance(module, BakedFusionLayer)]
    assert len(layers) == len(case.layers) + len(case.shared)
    # The tuned model is as it was, and shares no memory with the copy.
    for parameter in [*baked.parameters(), *baked.buffers()]:
        parameter.zero_()
    assert torch.equal(outputs_of(case, model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_host
def test_the_projections_of_a_bi_directional_attention_keep_their_names(case):
    model = attach(case.make())
    hosts = {type(module.fusion_host) for module in model.modules() if isinstance(module, SDPTLayer)}
    names = set(bake(model).state_dict())
    if hosts == {BiAttentionHost}:
        added = {
            f"{layer}.{name}{side}" for layer in case.layers for name in ("gated_prompts", "gates") for side in "01"
        }
        assert names == {*case.make().state_dict(), *added}
    else:
        assert {name.replace(".fusion_layer.", ".") for name in names} >= set(case.make().state_dict())


@every_host
def test_silent_gates_are_the_base_model_bit_for_bit(case):
    bare = case.make().requires_grad_(False)
    model = attach(case.make(), init_weights=True)
    baked = bake(model)
    silent = [name for name in [*case.layers, *case.shared] if isinstance(baked.get_submodule(name), BakedFusionLayer)]
    gates = {name for name, parameter in model.named_parameters() if "sdpt_gates" in name}
    if len(gates) == len(case.layers):
        assert not silent
        assert torch.equal(outputs_of(case, baked), outputs_of(case, bare))
        assert baked.state_dict().keys() == bare.state_dict().keys()
    else:
        assert silent  # prompts without gates always act


@every_host
def test_prompts_without_gates(case):
    model = attach(case.make(), prompt_gate=None, init_weights="uniform")
    assert torch.equal(outputs_of(case, bake(model), 3), outputs_of(case, model, 3))


def pickled_or_none(model):
    file = io.BytesIO()
    try:
        torch.save(model, file)
    except (AttributeError, pickle.PicklingError):
        return None
    return file.getvalue()


@every_host
def test_the_copy_is_copied_pickled_saved_and_cast(case, tmp_path):
    baked = bake(attach(case.make()))
    pickled = pickled_or_none(baked)
    # Backbones of transformers 5.24 have hooks that cannot be pickled, and so do other models after their first call.
    assert (pickled is None) == (pickled_or_none(case.make()) is None)
    expected = outputs_of(case, baked)
    assert torch.equal(outputs_of(case, copy.deepcopy(baked)), expected)
    if pickled is not None:
        assert torch.equal(outputs_of(case, torch.load(io.BytesIO(pickled), weights_only=False)), expected)
    # Tied weights share memory, which safetensors does not store twice.
    state = {name: value.clone() for name, value in baked.state_dict().items()}
    save_file(state, tmp_path / "baked.safetensors")
    other = bake(attach(case.make(), seed=2))
    assert not torch.equal(outputs_of(case, other), expected)
    other.load_state_dict(load_file(tmp_path / "baked.safetensors"))
    assert torch.equal(outputs_of(case, other), expected)
    tensors = [*copy.deepcopy(baked).to(torch.bfloat16).parameters()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}


VARIANTS = {
    "hidden from the image": {"image_attends_prompts": False},
    "independent": {"prompt_mode": "independent"},
    "groups": {"num_virtual_tokens": 5, "prompt_groups": [2, 3]},
    "eager": {"attn_implementation": "eager"},
    "published": {"prompt_gate": None, "prompt_space": "aligned", "pinv_rtol": None, "init_weights": "uniform"},
    "some layers": {"layers_to_transform": [1]},
    "dropout": {"prompt_dropout": 0.5},
    "decoder": {"target_modules": ["fusion_layer.attn", "encoder_attn_text"]},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_config(config):
    model = attach(make_host(), **config)
    expected = run(model.eval())
    # Dropout of prompts is not built in, and the mode of the tuned model does not change.
    model.train()
    modes = [module.training for module in model.modules()]
    baked = bake(model)
    assert [module.training for module in model.modules()] == modes
    assert_plain(baked)
    assert torch.equal(run(baked), expected)


def test_attention_weights_are_those_of_the_tuned_model():
    model = attach(make_host(), attn_implementation="eager")
    with torch.no_grad():
        outputs = [each(**model_inputs(), output_attentions=True).encoder_attentions for each in (model, bake(model))]
    tuned, baked = ([weights for part in parts if part for weights in part] for parts in outputs)
    assert tuned and all(map(torch.equal, tuned, baked))


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_several_active_adapters_and_scales(prompt_gate):
    model = attach(make_host(), prompt_gate=prompt_gate)
    model.add_adapter("second", acting(num_virtual_tokens=2, prompt_gate=prompt_gate))
    model.add_adapter("unused", acting(num_virtual_tokens=50, prompt_gate=prompt_gate))
    model.base_model.set_adapter(["default", "second"])
    if prompt_gate:
        model.base_model.set_scale("second", -0.5)
    model.eval()
    baked = bake(model)
    assert torch.equal(run(baked), run(model))
    assert not torch.equal(run(baked), run(bake(attach(make_host(), prompt_gate=prompt_gate))))
    # Nothing of an adapter that is not active is copied.
    layer = baked.get_submodule(LAYERS[0])
    assert {len(buffer) for name, buffer in layer.named_buffers() if "prompts" in name} == {6}


def test_a_model_in_training_is_not_written(monkeypatch):
    """Other threads may train it."""
    model = attach(make_host(), prompt_dropout=0.5).train()
    layers = [module for module in model.modules() if isinstance(module, SDPTLayer)]
    before, written = [{**layer.__dict__} for layer in layers], []
    real = SDPTLayer.__setattr__

    def noted(layer, name, value):
        if any(layer is each for each in layers):
            written.append(name)
        real(layer, name, value)

    monkeypatch.setattr(SDPTLayer, "__setattr__", noted)
    baked = bake(model)
    assert not written and [layer.__dict__ for layer in layers] == before
    # Without the dropout of prompts.
    assert torch.equal(run(baked), run(model.eval()))


def test_an_adapter_of_scale_zero_is_the_base_model():
    model = attach(make_host(), lora_rank=2)
    moved(model)
    model.base_model.set_scale("default", 0.0)
    baked = bake(model)
    assert baked.state_dict().keys() == make_host().state_dict().keys()
    assert torch.equal(run(baked), run(make_host().requires_grad_(False)))


def test_lora_and_saved_modules_are_merged():
    model = moved(attach(make_host(), lora_rank=3, modules_to_save=["text_projection"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "text_projection" in name and "modules_to_save" in name:
                parameter.mul_(1.5)
    model.eval()
    baked = bake(model)
    assert_plain(baked)
    added = {f"{layer}.{name}{side}" for layer in LAYERS for name in ("gated_prompts", "gates") for side in "01"}
    assert baked.state_dict().keys() == {*make_host().state_dict(), *added}
    torch.testing.assert_close(run(baked), run(model), rtol=0, atol=2e-5)
    with model.disable_adapter():
        assert (run(baked).nan_to_num(neginf=0) - run(model).nan_to_num(neginf=0)).abs().max() > 0.01


def test_a_model_with_injected_adapters():
    """What `add_adapter` of transformers makes."""
    host = make_host()
    inject_adapter_in_model(acting(num_virtual_tokens=4), host)
    host._hf_peft_config_loaded = True
    expected = run(host.eval())
    baked = bake(host)
    assert_plain(baked)
    assert torch.equal(run(baked), expected)
    assert host._hf_peft_config_loaded and set(host.peft_config) == {"default"}


def test_a_compiled_model():
    stack = attach(FusionStack()).eval()
    inputs = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = stack(*inputs)
        assert torch.equal(bake(torch.compile(stack, backend="eager"))(*inputs), expected)
        compiled = torch.compile(bake(stack), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=0, atol=1e-5)


def test_transformers_loads_the_base_model_of_a_baked_model(tmp_path):
    """What the page says: prompts are extra tensors that transformers does not know."""
    baked = bake(attach(make_host()))
    baked.save_pretrained(tmp_path)
    loaded, info = GroundingDinoForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.rpartition(".")[2][:-1] for key in info["unexpected_keys"]} == {"gated_prompts", "gates"}
    assert torch.equal(run(loaded.eval().requires_grad_(False)), run(make_host().requires_grad_(False)))


def with_lora(host):
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"]), host, "lora")
    return attach(host)


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def inactive(model):
    model.base_model.set_adapter([])
    return model


REFUSED = {
    "bare": (make_host, r"model=GroundingDinoForObjectDetection: has no SDPT adapter to bake"),
    "disabled": (lambda: disabled(attach(make_host())), "its adapters are disabled"),
    "inactive": (lambda: inactive(attach(make_host())), r"none of its SDPT adapters \['default'\] is active"),
    "lora": (lambda: with_lora(make_host()), r"'.*fc1' has an adapter of another tuner \(Linear\) that is not merged"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_baked(make, message):
    with pytest.raises(InputError, match=message):
        bake(make())


def test_lora_on_quantised_weights_is_refused():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    host = make_host()
    quantize_(host.model.decoder, Int8WeightOnlyConfig())
    model = moved(attach(host, lora_rank=2, lora_target_modules=["fc1"]))
    with pytest.raises(
        InputError, match="cannot be merged into a Linear, for instance because its weight is quantised"
    ):
        bake(model)


def outside_of_fusion_layers(baked):
    """As on the page of the docs."""
    fusion = {part for layer in baked.modules() if isinstance(layer, BakedFusionLayer) for part in layer.modules()}
    return lambda module, name: isinstance(module, nn.Linear) and module not in fusion


@every_host
def test_int8_leaves_out_the_fusion_layers_of_every_base_model(case):
    baked = bake(attach(case.make()))
    suits = outside_of_fusion_layers(baked)
    for name in (*case.layers, *case.shared):
        linear = [part for part in baked.get_submodule(name).modules() if isinstance(part, nn.Linear)]
        assert linear and not [part for part in linear if suits(part, name)]


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8(kind):
    """What the page says of torchao."""
    from torchao import quantization

    model = attach(make_host())
    baked = bake(model)
    quantization.quantize_(baked, getattr(quantization, kind)(), filter_fn=outside_of_fusion_layers(baked))
    quantised = {name for name, parameter in baked.named_parameters() if type(parameter) is not nn.Parameter}
    assert len(quantised) > 20
    fusion = [baked.get_submodule(name) for name in LAYERS]
    assert all(map(is_plain_linear, (part for layer in fusion for part in layer.children())))
    difference = (run(baked).nan_to_num(neginf=0) - run(model).nan_to_num(neginf=0)).abs().mean()
    assert 0 < difference < 0.2


def test_merged_adapters_of_another_tuner_are_kept():
    host = make_host()
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["fc1", "vision_proj"], init_lora_weights=False), host, "lora")
    for module in host.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    model = attach(host)
    baked = bake(model)
    assert_plain(baked)
    # The baked attention is the fused one, because its projections are plain linear layers again.
    torch.testing.assert_close(run(baked), run(model), rtol=0, atol=1e-4)


@every_host
def test_sdpt_cannot_be_attached_again(case):
    baked = bake(attach(case.make()))
    expected = outputs_of(case, baked)
    with pytest.raises(ValueError, match=r"(?i)fusion layer"):
        get_peft_model(baked, SDPTConfig())
    assert torch.equal(outputs_of(case, baked), expected)


def test_kinds():
    assert type(bake(attach(make_host())).get_submodule(LAYERS[0])) is BakedBiAttention
