# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fused attention against the host's own way, and what is reused between calls."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_sdpt.fused_attention
import peft_sdpt.layer
from peft_sdpt import SDPTConfig
from peft_sdpt.fused_attention import absorbing_pays
from tests.helpers.detectors import D_MODEL, HOST_NAMES, LAYERS, attach, make_host, model_inputs, run
from tests.helpers.layers import NL, TOLERANCE, VARIANTS, make_inputs, make_layer


def outputs(layer, *inputs):
    (image, _), (text, _) = layer(*inputs)
    return image, text


def fused_and_eager(name="grounding_dino", dtype=torch.float64, **changes):
    fused = make_layer(name, dtype, **{**changes, "attn_implementation": "fused"})
    return fused, make_layer(name, dtype, **{**changes, "attn_implementation": "eager"})


@pytest.fixture(params=["kernels", "one chunk", "many chunks"])
def way(request, monkeypatch):
    """Each way to run the fused attention, whatever the sizes and the device."""
    monkeypatch.setattr(peft_sdpt.fused_attention, "_kernels_pay", lambda *_: request.param == "kernels")
    if request.param == "many chunks":
        monkeypatch.setattr(peft_sdpt.fused_attention, "_LOGITS_AT_A_TIME", 500)
    return request.param


@pytest.fixture
def counted(monkeypatch):
    """Numbers of calls of the two attentions."""
    import peft_sdpt.hosts.bi_attention as module

    counts = {"fused": 0, "eager": 0}

    def count(kind, function):
        def counting(*args, **kwargs):
            counts[kind] += 1
            return function(*args, **kwargs)

        return counting

    monkeypatch.setattr(module, "fused_bi_attention", count("fused", module.fused_bi_attention))
    monkeypatch.setattr(module, "bi_attention", count("eager", module.bi_attention))
    return counts


# With random gates, which act. A layer is without gates unless it asks for them.
GATED = {"prompt_gate": "zero", "init_weights": False}
with_and_without_gates = pytest.mark.parametrize("gates", [{}, GATED], ids=["published", "gated"])
WAYS_AND_HOSTS = [
    *((name, dtype, variant, {}) for name in HOST_NAMES for dtype in TOLERANCE for variant in VARIANTS),
    *((HOST_NAMES[0], dtype, variant, GATED) for dtype in TOLERANCE for variant in VARIANTS),
    *((HOST_NAMES[1], torch.float64, "default", GATED | groups) for groups in ({}, {"prompt_groups": [1, 3]})),
]


@pytest.mark.parametrize("masks", ["both", "image", "text", "none"])
@pytest.mark.parametrize(("name", "dtype", "variant", "gates"), WAYS_AND_HOSTS, ids=str)
def test_outputs_and_gradients_are_those_of_the_eager_way(name, dtype, variant, gates, masks, way, counted, device):
    results = []
    for layer in fused_and_eager(name, dtype, device=device, **VARIANTS[variant], **gates):
        image, text, *rest = make_inputs(dtype, masks=masks, device=device)
        image.requires_grad_(), text.requires_grad_()
        found = outputs(layer, image, text, *rest)
        generator = torch.Generator().manual_seed(3)
        loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in found)
        parameters = [*layer.sdpt_prompts.values(), *layer.sdpt_gates.values()]
        assert len(parameters) == (2 if gates else 1)
        results.append([*found, *torch.autograd.grad(loss, [*parameters, image, text])])
    assert counted == {"fused": 1, "eager": 1}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


def test_no_weights_are_returned(way):
    (_, image_weights), (_, text_weights) = make_layer(attn_implementation="fused")(*make_inputs())
    assert image_weights is None and text_weights is None


def test_padded_rows(way, device):
    """A sample without any text, or without any image: what the host gives, and where that is NaN anything."""
    for variant in ({}, {"image_attends_prompts": False}, GATED):
        fused, eager = fused_and_eager(device=device, **variant)
        image, text, image_mask, text_mask = make_inputs(device=device)
        image_mask[0], text_mask[1] = True, True
        for one, other in zip(
            outputs(fused, image, text, image_mask, text_mask),
            outputs(eager, image, text, image_mask, text_mask),
            strict=True,
        ):
            assert one[other.isfinite()].isfinite().all()
            torch.testing.assert_close(one[other.isfinite()], other[other.isfinite()], rtol=0, atol=1e-10)


@with_and_without_gates
def test_padding_may_come_first(way, gates, monkeypatch, device):
    """Whole chunks of padding, before any token and after."""
    fused, eager = fused_and_eager(device=device, **gates)
    image, text, image_mask, text_mask = make_inputs(device=device)
    if gates:  # the base model needs a token of each modality
        image_mask[:, :4], text_mask[:, :1] = True, True
        if way == "many chunks":
            monkeypatch.setattr(peft_sdpt.fused_attention, "_LOGITS_AT_A_TIME", 100)
    else:
        image_mask[:, :10], text_mask[:, :2] = True, True
    found = []
    for layer in (fused, eager):
        outs = outputs(layer, image, text, image_mask, text_mask)
        loss = sum(out.square().sum() for out in outs)
        parameters = [*layer.sdpt_prompts.values(), *layer.sdpt_gates.values()]
        found.append([*outs, *torch.autograd.grad(loss, parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("other", [{"prompt_gate": None}, GATED], ids=["published", "gated"])
@with_and_without_gates
def test_mixed_adapters(way, gates, other, device):
    fused, eager = fused_and_eager(**gates)
    for layer in (fused, eager):
        torch.manual_seed(5)
        layer.update_layer("other", SDPTConfig(num_virtual_tokens=2, attn_implementation="fused", **other))
        layer.to(device)
    names, inputs = ["default", "__base__", "other"], make_inputs(device=device)
    for one, other in zip(
        (x for pair in fused(*inputs, adapter_names=names) for x in pair[:1]),
        (x for pair in eager(*inputs, adapter_names=names) for x in pair[:1]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@with_and_without_gates
def test_dropout_keeps_the_mean(gates):
    """Weights are dropped in both directions, and values come with their bias."""
    fused, _ = fused_and_eager(host={"fusion_dropout": 0.4}, **gates)
    inputs = make_inputs()
    expected = outputs(fused, *inputs)
    fused.train()
    torch.manual_seed(0)
    # Each sample of a batch has weights of its own dropped.
    repeated = [tensor.repeat(20, *[1] * (tensor.ndim - 1)) for tensor in inputs]
    drawn = [outputs(fused, *repeated) for _ in range(200)]
    for place in range(2):
        samples = torch.cat([pair[place].unflatten(0, (20, len(inputs[0]))) for pair in drawn])
        spread = samples.std(0)
        assert spread.median() > 0.05
        error = (samples.mean(0) - expected[place]).abs() / (spread / len(samples) ** 0.5 + 1e-9)
        assert error.quantile(0.99) < 4


@pytest.mark.parametrize("sizes", [(7,), (5, 1, 1)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("size", [10**6, 100])
def test_gradients_with_dropped_weights(size, dropout, sizes, monkeypatch):
    """Of everything that has one, against differences; one seed drops the same weights in each call."""
    monkeypatch.setattr(peft_sdpt.fused_attention, "_LOGITS_AT_A_TIME", size)
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()

    image_bias = torch.zeros(2, 1, 1, 15, dtype=torch.float64)
    image_bias[1, ..., 9:12] = -torch.inf

    def call(*differentiated):
        torch.manual_seed(1)
        outs = peft_sdpt.fused_attention._BothDirections.apply(*differentiated, image_bias, 5, sizes, dropout)
        return tuple(out for out in outs if out is not None)

    inputs = tensor(2, 12, 4), tensor(2, 3, 4), tensor(2, 2, 7, 4), tensor(2, 2, 7, 4), tensor(2, 2, 1, 7)
    assert torch.autograd.gradcheck(call, inputs)


@with_and_without_gates
@pytest.mark.parametrize("autocast", [False, True])
def test_dropped_weights_in_half_precision(autocast, gates):
    """The same weights are dropped as in single precision: one seed draws the same in all dtypes."""
    fused, _ = fused_and_eager(dtype=torch.float32, host={"fusion_dropout": 0.4}, **gates)
    inputs = make_inputs(torch.float32)
    found = {}
    for half in (False, True):
        if half and not autocast:
            fused.base_layer.bfloat16()
            inputs = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half and autocast):
            outs = outputs(fused.train(), *inputs)
            assert all(out.dtype == (torch.bfloat16 if half else torch.float32) for out in outs)
            # A backward within autocast, too.
            grad = torch.autograd.grad(sum(out.float().square().sum() for out in outs), fused.sdpt_prompts["default"])
        found[half] = [*outs, *grad]
    for one, other in zip(found[True], found[False], strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_a_second_derivative_is_refused():
    fused, eager = fused_and_eager()
    for layer in (eager, fused):
        prompts = layer.sdpt_prompts["default"]
        (grad,) = torch.autograd.grad(
            sum(out.square().sum() for out in outputs(layer, *make_inputs())), prompts, create_graph=True
        )
        if layer is eager:
            grad.sum().backward()
            assert prompts.grad.abs().sum() > 0
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()


@with_and_without_gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_the_truth_as_the_host(dtype, gates):
    fused, eager = fused_and_eager(dtype=torch.float32, **gates)
    inputs = make_inputs(torch.float32)
    truth = outputs(eager, *inputs)
    halves = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    errors = []
    for layer in (fused, eager):
        layer = copy.deepcopy(layer)
        layer.base_layer.to(dtype)
        layer.refresh_inverses()
        found = outputs(layer, *halves)
        assert all(o.dtype == dtype for o in found)
        errors.append([(o.float() - t).abs().mean() for o, t in zip(found, truth, strict=True)])
    for of_fused, of_eager in zip(*errors, strict=True):
        assert of_fused < 1.5 * of_eager


def test_float16_logits_that_overflow_in_the_host_stay_finite():
    fused, eager = fused_and_eager(dtype=torch.float32)
    for layer in (fused, eager):
        layer.base_layer.vision_proj.weight.data *= 3e3
        layer.base_layer.half()
        layer.refresh_inverses()
    inputs = [tensor.half() * 40 if tensor.is_floating_point() else tensor for tensor in make_inputs(torch.float32)]
    assert not all(o.isfinite().all() for o in outputs(eager, *inputs))
    assert all(o.isfinite().all() for o in outputs(fused, *inputs))


@with_and_without_gates
def test_autocast(way, gates):
    fused, eager = fused_and_eager(dtype=torch.float32, **gates)
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(fused, *inputs)
    for one, other in zip(found, outputs(eager, *inputs), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.1)


@with_and_without_gates
def test_compiles_without_graph_breaks(way, gates):
    fused, _ = fused_and_eager(dtype=torch.float32, **gates)
    inputs = make_inputs(torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for one, other in zip(outputs(compiled, *inputs), outputs(fused, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ---- when it is not taken


def test_a_long_text_over_a_small_image_is_projected(counted):
    weight = torch.empty(1024, 256)
    assert absorbing_pays(6380, 266, weight, 4) and absorbing_pays(6380, 42, weight, 4)
    assert not absorbing_pays(64, 266, weight, 4)
    layer = make_layer(attn_implementation="fused")
    image, text, *_ = make_inputs()
    layer(image[:, :1], text)
    assert counted == {"fused": 0, "eager": 1}


@pytest.mark.parametrize("why", ["another tuner's adapter", "a hook", "a class of its own"])
def test_projections_that_are_more_than_their_weights_are_called(why, counted):
    fused, eager = fused_and_eager()
    for layer in (fused, eager):
        attention = layer.base_layer
        if why == "another tuner's adapter":
            torch.manual_seed(0)
            config = LoraConfig(target_modules=["values_vision_proj"], init_lora_weights=False)
            inject_adapter_in_model(config, attention).double()
        elif why == "a hook":
            attention.out_vision_proj.register_forward_hook(lambda module, args, output: 2 * output)
        else:

            class Doubled(nn.Linear):
                def forward(self, tokens):
                    return 2 * super().forward(tokens)

            attention.values_vision_proj.__class__ = Doubled
    for one, other in zip(outputs(fused, *make_inputs()), outputs(eager, *make_inputs()), strict=True):
        assert torch.equal(one, other)
    assert counted == {"fused": 0, "eager": 2}


def test_attention_weights_are_those_of_the_eager_implementation(counted):
    """As with transformers' sdpa: a call that asks for weights runs as any other, and the config chooses."""
    model = attach(make_host())
    with torch.no_grad():
        first = model(**model_inputs())
        asked = model(**model_inputs(), output_attentions=True)
        assert counted == {"fused": 4, "eager": 0}
        assert all(weights is None for weights in asked.encoder_attentions[0])
        assert torch.equal(asked.logits, first.logits)
        # Also of an adapter that is attached already.
        model.peft_config["default"].attn_implementation = "eager"
        eager = model(**model_inputs(), output_attentions=True)
        assert counted == {"fused": 4, "eager": 2}
        assert all(weights is not None for weights in eager.encoder_attentions[0])
        torch.testing.assert_close(eager.logits, first.logits)


def test_a_call_that_asks_for_attention_weights_leaves_an_earlier_one_as_it_was():
    """Activation checkpointing runs the layers of the first call again, after the second."""
    plain, checkpointed = attach(make_host()), attach(make_host())
    for layer in checkpointed.base_model.model.model.encoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    gradients = []
    for model in (plain, checkpointed):
        out = model.train()(**model_inputs())
        model(**model_inputs(), output_attentions=True)
        out.pred_boxes.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_left_in_a_host_that_is_unloaded():
    host = make_host()
    hooks = {name: len(module._forward_pre_hooks) for name, module in host.named_modules()}
    model = attach(host)
    model.add_adapter("other", SDPTConfig())
    assert {name: len(module._forward_pre_hooks) for name, module in model.unload().named_modules()} == hooks


# ---- what is computed once


@pytest.fixture
def mapped(monkeypatch):
    """How often tokens were mapped into an input space."""
    calls = []
    to_input_space = peft_sdpt.layer.to_input_space
    monkeypatch.setattr(peft_sdpt.layer, "to_input_space", lambda *args: calls.append(1) or to_input_space(*args))
    return calls


def test_prompts_are_mapped_once_in_evaluation(mapped):
    layer = make_layer(attn_implementation="fused").eval()
    inputs = make_inputs()
    with torch.no_grad():
        expected = outputs(layer, *inputs)
        assert len(mapped) == 2
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(outputs(layer, *inputs), expected, strict=True))
        assert len(mapped) == 2
    outputs(layer, *inputs)
    assert len(mapped) == 4  # with gradients each call needs its own
    with torch.inference_mode():
        outputs(layer, *inputs)
    layer(*inputs)[0][0].sum().backward()  # what was kept in inference mode does not get into a graph


def prompts_changed(layer):
    layer.sdpt_prompts["default"].mul_(1.5)


def prompts_replaced(layer):
    layer.sdpt_prompts["default"] = nn.Parameter(layer.sdpt_prompts["default"].detach() * 1.5)


def weight_changed(layer):
    layer.base_layer.vision_proj.weight.mul_(1.5)


def bias_changed(layer):
    layer.base_layer.text_proj.bias.add_(0.5)


def gates_changed(layer):
    layer.sdpt_gates["default"].mul_(0.5)


def gates_set_to_zero(layer):
    layer.sdpt_gates["default"].zero_()


def gates_replaced(layer):
    layer.sdpt_gates["default"] = nn.Parameter(layer.sdpt_gates["default"].detach() * 0.5)


def gates_with_other_data(layer):
    layer.sdpt_gates["default"].data = layer.sdpt_gates["default"].detach() * 0.5


def scaled(layer):
    layer.set_scale("default", 0.5)


def adapter_added(layer):
    layer.update_layer("other", SDPTConfig(num_virtual_tokens=2, prompt_gate=None))
    layer.set_adapter(["default", "other"])


def loaded(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def moved(layer):
    layer.to(torch.bfloat16).to(torch.float64)


def trained(layer):
    layer.train()
    prompts_changed(layer)
    layer.eval()


def gated_adapter_added(layer):
    layer.update_layer("other", SDPTConfig(num_virtual_tokens=2, **GATED))
    layer.set_adapter(["default", "other"])


def stepped_uncounted(layer, parameters=None):
    """A step of an optimizer that writes through `.data`, in a loop that never calls `train`."""
    with torch.enable_grad():
        outputs(layer, *make_inputs())[0].sum().backward()
    prompts = (layer.sdpt_prompts if parameters is None else parameters)["default"]
    prompts.data -= 0.1 * prompts.grad


def gates_stepped_uncounted(layer):
    stepped_uncounted(layer, layer.sdpt_gates)


CHANGES = [
    prompts_changed,
    prompts_replaced,
    weight_changed,
    bias_changed,
    adapter_added,
    loaded,
    moved,
    trained,
    stepped_uncounted,
    gated_adapter_added,
]
CHANGES_OF_GATES = [
    gates_changed,
    gates_set_to_zero,
    gates_replaced,
    gates_with_other_data,
    scaled,
    gates_stepped_uncounted,
]


@pytest.mark.parametrize(
    ("change", "gates"),
    [*((change, {}) for change in CHANGES), *((change, GATED) for change in [*CHANGES, *CHANGES_OF_GATES])],
    ids=lambda value: "gated" if value == GATED else "published" if value == {} else value.__name__,
)
@torch.no_grad()
def test_what_is_kept_is_dropped_when_something_changes(change, gates):
    layer = make_layer(attn_implementation="fused", **gates).eval()
    inputs = make_inputs()
    before = outputs(layer, *inputs)
    change(layer)
    after = outputs(layer, *inputs)
    with torch.enable_grad():  # in which nothing is kept
        fresh = outputs(layer, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(after, fresh, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


# ---- what is kept for the way back


def test_nothing_before_the_first_adapted_layer_is_kept_for_the_backward():
    """The second layer alone is adapted: what is saved for its backward is saved after it has begun."""
    model = attach(make_host(), layers_to_transform=[1]).train()
    begun, early = [], []
    layer = model.base_model.model.get_submodule(LAYERS[1])
    layer.register_forward_pre_hook(lambda *_: begun.append(True))
    saved = []

    def pack(tensor):
        (saved if begun else early).append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**model_inputs())
    assert saved and not early


@pytest.mark.parametrize("init_weights", [False, "normal"])
def test_the_forward_computes_no_inverse_and_waits_for_no_number(init_weights, monkeypatch):
    model = attach(make_host(), init_weights=init_weights)
    run(model)
    model.train()

    def fail(*args, **kwargs):
        raise AssertionError("in a forward")

    monkeypatch.setattr(torch.linalg, "pinv", fail)
    layer = model.base_model.model.get_submodule(LAYERS[0])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(2, 40, D_MODEL), torch.randn(2, NL, D_MODEL))
    names = {event.name for event in profile.events()}
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}
    # No loop over heads or samples: as many products for any number of them.
    products = sum(event.name in ("aten::bmm", "aten::mm", "aten::addmm") for event in profile.events())
    assert products <= 16
