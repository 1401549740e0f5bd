# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A batch whose samples use different adapters: compiled, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_map

import peft_sdpt.calls
from peft_sdpt import SDPTLayer
from peft_sdpt.calls import Choice
from tests.helpers.detectors import (
    HOST_NAMES,
    PUBLISHED,
    FusionStack,
    acting,
    attach,
    make_host,
    model_inputs,
    run,
)
from tests.helpers.pretend import pretend_gpu

INPUTS = (torch.randn(3, 40, 32), torch.randn(3, 5, 32))
# Settings of three adapters: all of one kind, and with different numbers of tokens, gates or inverses.
KINDS = {
    "one kind": [{}, {}, {}],
    "no gates": [PUBLISHED, PUBLISHED, PUBLISHED],
    "independent": [{"prompt_mode": "independent"}] * 3,
    "hidden from the image": [{"image_attends_prompts": False}] * 3,
    "groups": [{"prompt_groups": [1, 3]}] * 3,
    "sizes": [{}, {"num_virtual_tokens": 7}, {}],
    "gates": [{}, {"prompt_gate": None}, {}],
    "inverses": [{}, {"pinv_rtol": 0.3}, {}],
    "layers": [{}, {"layers_to_transform": [1]}, {}],
    "LoRA": [{"lora_rank": 2, "lora_target_modules": ["head"]}] * 3,
    "ranks of LoRA": [{"lora_rank": rank, "lora_target_modules": ["head"]} for rank in (2, 3, 2)],
}
NAMES = ("default", "b", "c")
LISTS = (["default", "b", "c"], ["b", "b", "__base__"], ["__base__"] * 3, ["c", "default", "default"])


def three_adapters(host, *settings):
    torch.manual_seed(0)
    settings = settings or [{}] * 3
    model = attach(host, **settings[0])
    for name, changes in zip(NAMES[1:], settings[1:], strict=True):
        model.add_adapter(name, acting(**{"num_virtual_tokens": 4, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sdpt_lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("names", LISTS[:2], ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_gets_what_it_gets_alone(kind, names):
    model = three_adapters(FusionStack(), *KINDS[kind])
    with torch.no_grad():
        mixed = model(*INPUTS, adapter_names=names)
        for sample, name in enumerate(names):
            single = [tensor[sample : sample + 1] for tensor in INPUTS]
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(*single)
            else:
                model.set_adapter(name)
                alone = model(*single)
            torch.testing.assert_close(mixed[sample : sample + 1], alone, rtol=0, atol=1e-5)


def test_adapters_of_one_kind_add_the_keys_of_one(monkeypatch):
    """However many adapters a batch uses, each sample sees its own prompts only."""
    model = three_adapters(FusionStack())
    layer = next(module for module in model.modules() if isinstance(module, SDPTLayer))
    seen = []
    real = layer.input_prompts
    monkeypatch.setattr(layer, "input_prompts", lambda *args: seen.append(real(*args)) or seen[-1])
    with torch.no_grad():
        model(*INPUTS, adapter_names=["default", "b", "c"])
    assert [side.gated.tokens.shape for side in seen[0]] == [(3, 4, 32), (3, 4, 32)]
    assert all(side.gated.sizes == (4,) and side.gated.gates.shape[:2] == (3, 1) for side in seen[0])


def test_adapters_of_several_kinds_add_the_keys_of_one_of_each():
    model = three_adapters(FusionStack(), *KINDS["sizes"])
    layer = next(module for module in model.modules() if isinstance(module, SDPTLayer))
    choice = Choice.of(["b", "c", "default"], torch.device("cpu"))
    for side in layer.input_prompts(["b", "c", "default"], choice):
        assert side.gated.tokens.shape == (3, 7 + 4, 32) and side.gated.sizes == (7, 4)


@pytest.mark.parametrize("kind", ["one kind", "no gates", "sizes", "LoRA", "ranks of LoRA"])
def test_a_damaged_adapter_does_not_spoil_other_samples(kind):
    model = three_adapters(FusionStack(), *KINDS[kind])
    names = ["default", "b", "c"]
    with torch.no_grad():
        expected = model(*INPUTS, adapter_names=names)
        for name, parameter in model.named_parameters():
            if name.endswith(".b"):
                parameter.fill_(torch.nan)
        found = model(*INPUTS, adapter_names=names)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_layer_whose_adapters_were_deleted(monkeypatch):
    """PEFT leaves the layer in the model, without adapters."""
    model = three_adapters(FusionStack(), {"lora_rank": 2, "lora_target_modules": ["head"]}, {}, {})
    names = ["b", "__base__", "c"]
    with torch.no_grad():
        expected = model(*INPUTS, adapter_names=names)
        model.delete_adapter("default")
        assert torch.equal(model(*INPUTS, adapter_names=names), expected)


@pytest.mark.parametrize("kind", ["one kind", "ranks of LoRA"])
def test_new_names_need_no_new_graph_of_a_compiled_base_model(kind):
    model = three_adapters(FusionStack(), *KINDS[kind])
    with torch.no_grad():
        expected = [model(*INPUTS, adapter_names=names) for names in LISTS]
        torch._dynamo.reset()
        graphs = CompileCounter()
        model.get_base_model().compile(backend=graphs, fullgraph=True)
        for names, each in zip(LISTS, expected, strict=True):
            torch.testing.assert_close(model(*INPUTS, adapter_names=names), each, rtol=0, atol=1e-5)
        assert graphs.frame_count == 1
        # Calls without names are other code, and do not see the names of an earlier call.
        model.set_adapter("b")
        single = model(*INPUTS)
    torch.testing.assert_close(single, model(*INPUTS, adapter_names=["b"] * 3), rtol=0, atol=1e-5)


def test_a_model_that_is_compiled_whole_takes_names():
    model = three_adapters(FusionStack())
    with torch.no_grad():
        expected = [model(*INPUTS, adapter_names=names) for names in LISTS[:2]]
        torch._dynamo.reset()
        graphs = CompileCounter()
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        for number, names in enumerate(LISTS[:2]):
            found = compiled(*INPUTS, adapter_names=names)
            torch.testing.assert_close(found, expected[number], rtol=0, atol=1e-5)
            # The names are constants of the graph.
            assert graphs.frame_count == number + 1


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("settings", [{}, PUBLISHED], ids=["defaults", "published"])
def test_tolerances_do_not_break_dynamic_shapes(settings, dynamic):
    """A tolerance is a symbol with `dynamic=True`, which cannot be written as text."""
    torch._dynamo.reset()
    model = attach(FusionStack(), **settings).eval()
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for length in (40, 60, 77):
            inputs = torch.randn(2, length, 32), torch.randn(2, 5, 32)
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=0, atol=1e-5)
    assert graphs.frame_count == (1 if dynamic else 2)


def test_autocast_is_not_asked_for_in_the_forward(monkeypatch):
    """`torch.compile` of torch 2.11 cannot trace `torch.amp.is_autocast_available`."""
    model = attach(FusionStack()).eval()

    def fail(device_type):
        raise AssertionError("asked for autocast")

    monkeypatch.setattr(torch.amp, "is_autocast_available", fail)
    model(*INPUTS)


# ---- on a GPU


@pytest.fixture
def syncs():
    with pretend_gpu() as log:
        yield log


def there(inputs):
    return {name: value.to("pretend") for name, value in inputs.items()}


@pytest.mark.parametrize("name", HOST_NAMES)
def test_a_mixed_batch_uploads_its_names_once(name, syncs, monkeypatch):
    model = three_adapters(make_host(name))
    names = ["b", "__base__"]
    expected = run(model, adapter_names=names)
    model.to("pretend")
    inputs = there(model_inputs())
    uploads = []
    real = peft_sdpt.calls._choices
    monkeypatch.setattr(peft_sdpt.calls, "_choices", lambda *args: uploads.append(args) or real(*args))
    with torch.no_grad():
        model(**inputs, adapter_names=names)
        syncs.clear()
        uploads.clear()
        model(**inputs, adapter_names=names)
    assert not syncs.of("peft_sdpt/")
    assert len(uploads) == 1
    model.to("cpu")
    torch.testing.assert_close(run(model, adapter_names=names), expected)


@pytest.mark.parametrize("first", ["cpu", "pretend"])
def test_layers_on_several_devices(first, syncs):
    model = three_adapters(FusionStack(), *KINDS["LoRA"])
    stack = model.get_base_model()
    names = ["b", "__base__", "c"]
    with torch.no_grad():
        expected = model(*INPUTS, adapter_names=names)
        other = "pretend" if first == "cpu" else "cpu"
        stack.layers[0].to(first), stack.layers[1].to(other), stack.head.to(first)
        for part in (*stack.layers, stack.head):
            device = part.device_of_adapters
            part.register_forward_pre_hook(lambda _, args, device=device: tuple(x.to(device) for x in args))
            part.register_forward_hook(lambda _, args, out: tree_map(lambda x: None if x is None else x.cpu(), out))
        found = model(*INPUTS, adapter_names=names)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapters", ["acting", "silent"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation with gradients", "frozen evaluation"])
def test_a_call_waits_for_the_gpu_once_at_most(mode, adapters, syncs):
    model = attach(make_host(), init_weights="normal" if adapters == "silent" else False)
    model.train(mode == "training")
    if mode == "frozen evaluation":
        model.requires_grad_(False)
    model.to("pretend")
    inputs = there(model_inputs())
    with torch.set_grad_enabled(mode in ("training", "evaluation with gradients")):
        model(**inputs)
        syncs.clear()
        model(**inputs)
    waits = syncs.of("peft_sdpt/")
    assert len(waits) == (1 if mode.startswith("evaluation") else 0), waits
