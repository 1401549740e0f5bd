# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Hosts whose projections are kept quantised: what they stand for is inverted."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_sdpt import SDPTLayer
from tests.helpers.detectors import LAYERS, attach, make_host, model_inputs, run


def fusion_linears(host):
    return [n for n, m in host.named_modules() if isinstance(m, nn.Linear) and ".fusion_layer." in n]


def replace(host, make):
    for name in fusion_linears(host):
        parent, _, child = name.rpartition(".")
        setattr(host.get_submodule(parent), child, make(host.get_submodule(name)))
    return host


def dynamic_int8(host):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is to move to torchao
        return torch.ao.quantization.quantize_dynamic(host, {nn.Linear}, torch.qint8)


def torchao_int8(host):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(host, quantization.Int8WeightOnlyConfig())
    return host


def bitsandbytes_4bit(host):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        return new.to("cpu")

    return replace(host, make)


def bitsandbytes_8bit(host):
    bnb = pytest.importorskip("bitsandbytes")

    def make(linear):
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = linear.bias
        return new.to("cpu")

    return replace(host, make)


@pytest.fixture(params=[dynamic_int8, torchao_int8, bitsandbytes_4bit, bitsandbytes_8bit])
def quantise(request):
    return request.param


@pytest.fixture
def quantised(quantise):
    return quantise(make_host())


def dense(projection, width=32):
    """The weight that a projection applies, from what it does to unit vectors."""
    with torch.no_grad():
        origin = projection(torch.zeros(1, width))
        return (projection(torch.eye(width)) - origin).T


def test_the_inverse_is_of_the_map_that_the_host_applies(quantised):
    maps = {name: dense(quantised.get_submodule(f"{name}.vision_proj")) for name in LAYERS}
    model = attach(quantised)
    for name, weight in maps.items():
        inverse = model.base_model.model.get_submodule(name).inverse(0)
        assert inverse.dtype == torch.float32
        # Inputs are rounded too by some kernels, to one part in 127.
        torch.testing.assert_close(inverse @ weight, torch.eye(32), rtol=0, atol=0.06)


def test_prompts_act_on_a_quantised_host(quantised):
    bare = run(quantised)
    model = attach(quantised)
    assert not torch.equal(run(model), bare)
    assert {p.dtype for n, p in model.named_parameters() if "sdpt_" in n} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(run(model), bare)


# On the CPU, bitsandbytes 0.50 does not come through PEFT's loading, with LoRA as little as with SDPT.
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_onto_a_quantised_host(low_cpu_mem_usage, tmp_path):
    model = attach(torchao_int8(make_host()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(torchao_int8(make_host()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded), run(model))


def test_another_quantised_weight_loaded_in_place_is_seen():
    model, other = attach(torchao_int8(make_host())), attach(torchao_int8(make_host(seed=3)))
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))


def test_quantised_after_the_adapter_was_loaded_the_inverse_follows():
    """The way for dynamic int8, whose layers PyTorch lets nobody load a part of a state dict into."""
    quantised = attach(dynamic_int8(make_host()))
    after = dynamic_int8(attach(make_host()).eval())
    assert torch.equal(run(after), run(quantised))


def test_inverses_are_taken_once(quantised, monkeypatch):
    model = attach(quantised)
    monkeypatch.setattr("peft_sdpt.inverse_cache.inverse_projection", lambda *_: pytest.fail("taken again"))
    run(model)
    run(model)
    assert all(
        layer.sdpt_inverses.up_to_date(layer.projections) for layer in model.modules() if isinstance(layer, SDPTLayer)
    )


# PyTorch's dynamic int8 has no gradients.
@pytest.mark.parametrize("quantise", [torchao_int8, bitsandbytes_4bit, bitsandbytes_8bit])
def test_prompts_learn_on_a_quantised_host(quantise):
    model = attach(quantise(make_host())).train()
    model(**model_inputs()).pred_boxes.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_a_weight_of_an_unknown_kind_is_refused():
    host = make_host()
    projection = host.get_submodule(f"{LAYERS[0]}.vision_proj")
    projection.weight = nn.Parameter(projection.weight.to(torch.int16), requires_grad=False)
    with pytest.raises(TypeError, match=r"cannot invert a projection weight of dtype torch\.int16"):
        attach(host)
