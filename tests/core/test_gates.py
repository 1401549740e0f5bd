# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Gated prompts: what they add to the base model's attention, from its own outputs on."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial

import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import peft_sdpt.fused_attention
import peft_sdpt.layer
from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.lora import SDPTLoraLayer
from tests.helpers import layers
from tests.helpers.bi_multi_head import FLAVOURS
from tests.helpers.detectors import (
    D_MODEL,
    GATES,
    HOST_NAMES,
    LAYERS,
    REACHED,
    FusionStack,
    acting,
    attach,
    make_host,
    model_inputs,
    parameter_keys,
    run,
    snapshot,
)
from tests.helpers.layers import NL, NV, VARIANTS, N, make_inputs
from tests.hosts import test_bi_multi_head as bi_multi_head

make_layer = partial(layers.make_layer, prompt_gate="zero", init_weights=False)
every_host = pytest.mark.parametrize("name", HOST_NAMES)


@pytest.fixture(params=["eager", "kernels", "one chunk", "many chunks"])
def way(request, monkeypatch):
    """Each way to run the attention, whatever the sizes and the device. Returns the config that asks for it."""
    monkeypatch.setattr(peft_sdpt.fused_attention, "_kernels_pay", lambda *_: request.param == "kernels")
    if request.param == "many chunks":
        monkeypatch.setattr(peft_sdpt.fused_attention, "_LOGITS_AT_A_TIME", 200)
    return {"attn_implementation": "eager" if request.param == "eager" else "fused"}


@pytest.fixture
def no_choice(monkeypatch):
    """The fused attention runs also where it is more work."""
    import peft_sdpt.hosts.bi_attention as module

    monkeypatch.setattr(module, "absorbing_pays", lambda *_: True)


# ---- the formula


def tokens_of(layer: SDPTLayer, name: str) -> torch.Tensor:
    """Tokens of the aligned space; of coordinates, in the orthogonal polar factor of the columns of the projections."""
    prompts = layer.sdpt_prompts[name]
    weights = [projection.weight for projection in layer.projections]
    if prompts.shape[-1] == len(weights[0]):
        return prompts
    factor, _ = scipy.linalg.polar(torch.cat(weights, dim=1).double().cpu().numpy())
    return prompts @ torch.from_numpy(factor).to(prompts).T


def branches(layer: SDPTLayer, image: torch.Tensor, text: torch.Tensor, name: str = "default", factor: float = 1.0):
    """What an adapter adds to the image and to the text: head by head, group by group, in the words of the formula.

    Returns:
        For each, what is added, and the weights `(B, heads, L, N)`. None if the image does not see the prompts.
    """
    base, spec, config = layer.base_layer, layer.fusion_host, layer.sdpt_config[name]
    query, value, out = zip(spec.image_projections, spec.text_projections, strict=True)
    tokens = tokens_of(layer, name)
    dim = layer.embed_dim // base.num_heads
    found = []
    # The image reads the prompts of the text, the second side; the text reads those of the image.
    for reads, (reader, inputs) in ((1, (0, image)), (0, (1, text))):
        if reads == 1 and not config.image_attends_prompts:
            found.append(None)
            continue
        own = tokens[reads] if config.prompt_mode == "independent" else tokens
        projection = getattr(base, query[reads])
        inverse = torch.linalg.pinv(projection.weight.double(), rtol=config.pinv_rtol).to(own.dtype)
        prompts = (own - projection.bias) @ inverse.T
        queries = getattr(base, query[reader])(inputs) * base.scale
        keys, values = projection(prompts), getattr(base, value[reads])(prompts)
        gates = layer.sdpt_gates[name][reads if len(layer.sdpt_gates[name]) == 2 else 0]
        heads, weights = [], []
        for head in range(base.num_heads):
            part = slice(head * dim, (head + 1) * dim)
            read, start = 0, 0
            for group, size in enumerate(config.group_sizes):
                rows = slice(start, start + size)
                gate = factor * torch.tanh(gates[group, head])
                attention = (queries[..., part] @ keys[rows, part].T).softmax(-1) * gate
                read = read + attention @ values[rows, part]
                weights.append(attention)
                start += size
            heads.append(read)
        weights = torch.cat(weights, -1).unflatten(-1, (base.num_heads, -1)).transpose(1, 2)
        found.append((torch.cat(heads, -1) @ getattr(base, out[reader]).weight.T, weights))
    return found


def formula(layer: SDPTLayer, image, text, *masks, **scales: float):
    """Outputs of a layer with gated adapters, by default the one of the name "default"."""
    (image_out, _), (text_out, _) = layer.base_layer(
        image, text, **dict(zip(("vision_attention_mask", "text_attention_mask"), masks, strict=True))
    )
    for name, scale in (scales or {"default": 1.0}).items():
        of_image, of_text = branches(layer, image, text, name, scale)
        image_out = image_out + (0 if of_image is None else of_image[0])
        text_out = text_out + of_text[0]
    return image_out, text_out


def outputs(layer, *inputs, **options):
    (image, _), (text, _) = layer(*inputs, **options)
    return image, text


def close(found, expected, atol=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def with_gradients(function, layer, inputs, parameters):
    """Outputs, and gradients of the parameters and the inputs of a function that weighs every output."""
    image, text = (tensor.clone().requires_grad_() for tensor in inputs[:2])
    found = function(image, text, *inputs[2:])
    generator = torch.Generator().manual_seed(3)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in found)
    return [*found, *torch.autograd.grad(loss, [*parameters, image, text])]


@pytest.mark.parametrize("masks", ["both", "none"])
@pytest.mark.parametrize("groups", [None, [1, 3]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_add_what_the_formula_says(variant, groups, masks, way, no_choice, device):
    layer = make_layer(**VARIANTS[variant], prompt_groups=groups, device=device, **way)
    inputs = make_inputs(masks=masks, device=device)
    parameters = [layer.sdpt_prompts["default"], layer.sdpt_gates["default"]]
    expected = with_gradients(lambda *inputs: formula(layer, *inputs), layer, inputs, parameters)
    for training in (False, True):
        layer.train(training)
        close(with_gradients(lambda *inputs: outputs(layer, *inputs), layer, inputs, parameters), expected)
        if not training:
            with torch.no_grad():  # in which prompts are kept for the next call
                assert equal(outputs(layer, *inputs), outputs(layer, *inputs))
                close(outputs(layer, *inputs), expected[:2])
    # Each part says something.
    assert all(part.abs().max() > 1e-3 for part in expected)
    of_image, of_text = branches(layer, *inputs[:2])
    assert (of_image is None) == (not layer.sdpt_config["default"].image_attends_prompts)
    assert all(branch[0].abs().max() > 0.05 for branch in (of_image, of_text) if branch is not None)


def test_mm_grounding_dino_adds_the_same(way, device):
    layer, inputs = make_layer("mm_grounding_dino", device=device, **way), make_inputs(device=device)
    close(outputs(layer, *inputs), formula(layer, *inputs))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_attentions_with_other_masks_add_the_same(flavour, way, no_choice):
    host = bi_multi_head.DECLARATIONS[flavour]
    gates = {"prompt_gate": "zero", "init_weights": False, "prompt_groups": [3, 1]}
    layer = bi_multi_head.make_layer(bi_multi_head.make_attention(flavour), host, **gates, **way)
    image, text, *padding = bi_multi_head.make_inputs()
    masks = bi_multi_head.masks_of(flavour, *padding)
    bare = layer.base_layer(image, text, **masks)
    expected = [out + added for out, (added, _) in zip(bare, branches(layer, image, text), strict=True)]
    close(layer(image, text, **masks), expected)
    assert all((one - other).abs().max() > 0.05 for one, other in zip(bare, expected, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_weights_are_those_of_the_base_model_and_of_the_prompts(variant):
    layer, inputs = make_layer(prompt_groups=[1, 3], **VARIANTS[variant]), make_inputs()
    (_, image_weights), (_, text_weights) = layer(*inputs)
    bare = layer.base_layer(*inputs)
    for found, own, branch, length in (
        (image_weights, bare[0][1], branches(layer, *inputs[:2])[0], NL),
        (text_weights, bare[1][1], branches(layer, *inputs[:2])[1], NV),
    ):
        close([found[..., :length]], [own])
        assert found.shape[-1] == length + (0 if branch is None else N)
        if branch is not None:
            close([found[..., length:]], [branch[1].flatten(0, 1)])


def test_gradcheck(way, no_choice):
    layer = make_layer(num_virtual_tokens=3, prompt_groups=[1, 2], **way)
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(2, 3, D_MODEL, dtype=torch.float64, generator=generator)
    text = torch.randn(2, 2, D_MODEL, dtype=torch.float64, generator=generator)
    text_mask = torch.tensor([[False, True], [False, False]])

    def call(prompts, gates, image, text):
        state = {"sdpt_prompts.default": prompts, "sdpt_gates.default": gates}
        (image, _), (text, _) = torch.func.functional_call(layer, state, (image, text, None, text_mask))
        return image, text

    parameters = layer.sdpt_prompts["default"], layer.sdpt_gates["default"]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (*parameters, image, text)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, way, no_choice, device):
    exact = make_layer(dtype=torch.float32, prompt_groups=[1, 3], device=device, **way).double()
    inputs = make_inputs(device=device)
    expected = formula(exact, *inputs)
    bare = [out for out, _ in exact.base_layer(*inputs)]
    layer = make_layer(dtype=torch.float32, prompt_groups=[1, 3], device=device, **way)
    layer.base_layer.to(dtype)
    assert layer.sdpt_gates["default"].dtype == torch.float32
    found = outputs(layer, *make_inputs(dtype, device=device))
    for low, full, without in zip(found, expected, bare, strict=True):
        error = (low - full).abs().max()
        assert low.dtype == dtype and error < 0.03 * full.abs().max() and error < 0.1 * (full - without).abs().max()
    sum(out.float().square().sum() for out in found).backward()
    gates = layer.sdpt_gates["default"]
    assert gates.grad.dtype == torch.float32 and gates.grad.isfinite().all() and gates.grad.all()


def test_dropout(way, no_choice):
    layer, inputs = make_layer(host={"fusion_dropout": 0.5}, **way), make_inputs()
    evaluated = outputs(layer, *inputs)
    layer.train()

    def drawn(seed):
        torch.manual_seed(seed)
        return outputs(layer, *inputs)

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert equal(first, again) and [out.shape for out in first] == [out.shape for out in evaluated]
    for one, two, exact in zip(first, other, evaluated, strict=True):
        assert not torch.equal(one, two) and not torch.allclose(one, exact)


def test_dropout_leaves_the_draws_of_the_base_model_as_they_are():
    layer, inputs = make_layer(init_weights="normal", host={"fusion_dropout": 0.5}).train(), make_inputs()
    torch.manual_seed(0)
    found = outputs(layer, *inputs)
    torch.manual_seed(0)
    close(found, [out for out, _ in layer.base_layer(*inputs)])


@pytest.mark.parametrize("image_attends_prompts", [True, False])
def test_a_gate_is_of_one_head_one_group_and_one_direction(image_attends_prompts):
    layer = make_layer(init_weights="normal", prompt_groups=[1, 3], image_attends_prompts=image_attends_prompts)
    inputs, gates = make_inputs(), layer.sdpt_gates["default"]
    assert gates.shape == (2 if image_attends_prompts else 1, 2, 2)
    bare = [out for out, _ in layer.base_layer(*inputs)]
    for place in torch.cartesian_prod(*map(torch.arange, gates.shape)).tolist():
        with torch.no_grad():
            gates.zero_()[tuple(place)] = 1.0
        found = outputs(layer, *inputs)
        close(found, formula(layer, *inputs))
        # The first row is of the prompts of the image, which the text reads.
        changed = [(one - other).abs().max() > 1e-2 for one, other in zip(found, bare, strict=True)]
        assert changed == [place[0] == 1, place[0] == 0]


# ---- the start


@every_host
@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_fresh_adapter_is_the_base_model(name, implementation, tmp_path):
    host = make_host(name)
    bare = run(host.requires_grad_(False))
    model = get_peft_model(host, SDPTConfig(attn_implementation=implementation))

    def is_bare(model):
        found = run(model)
        with torch.enable_grad():  # `run` forbids gradients
            outs = model(**model_inputs())
        assert outs.pred_boxes.requires_grad == any(p.requires_grad for p in model.parameters())
        assert torch.equal(torch.cat([outs.logits.flatten(), outs.pred_boxes.flatten()]), bare)
        return torch.equal(found, bare)

    assert is_bare(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": True}
        assert is_bare(PeftModel.from_pretrained(make_host(name), tmp_path, **options))
    assert run(model).isnan().sum() == 0


@every_host
def test_a_fresh_adapter_has_the_attention_weights_of_the_base_model(name):
    host = make_host(name).requires_grad_(False)
    bare = host(**model_inputs(), output_attentions=True).encoder_attentions
    for implementation in ("eager", "fused"):
        model = get_peft_model(copy.deepcopy(host), SDPTConfig(attn_implementation=implementation))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = model(**model_inputs(), output_attentions=True).encoder_attentions
            # Per kind of attention, and layer.
            assert all(equal(*kinds) for kinds in zip(found, bare, strict=True))


@every_host
@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_a_fresh_adapter_is_the_base_model_in_training_up_to_rounding(name, implementation):
    host = make_host(name).double()
    inputs = {**model_inputs(), "pixel_values": model_inputs()["pixel_values"].double()}
    expected = host.train()(**inputs)
    found = get_peft_model(host, SDPTConfig(attn_implementation=implementation)).train()(**inputs)
    for field in ("logits", "pred_boxes", "encoder_last_hidden_state_vision"):
        torch.testing.assert_close(found[field], expected[field].detach(), rtol=0, atol=1e-9)


@every_host
def test_gradients_of_a_fresh_adapter(name):
    """They reach the gates. They reach no token until a gate has moved, and are then not NaN either."""
    gradients = {}
    for implementation in ("eager", "fused"):
        for training in (False, True):
            torch.manual_seed(1)
            model = get_peft_model(make_host(name).double(), SDPTConfig(attn_implementation=implementation))
            inputs = {**model_inputs(), "pixel_values": model_inputs()["pixel_values"].double()}
            out = model.train(training)(**inputs)
            (out.encoder_last_hidden_state_vision.square().sum() + out.pred_boxes.sum()).backward()
            trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
            assert trained.keys() == parameter_keys(LAYERS)
            for key, parameter in trained.items():
                assert parameter.grad.isfinite().all()
                assert parameter.grad.all() if "gates" in key else not parameter.grad.any(), key
            gradients[implementation, training] = [p.grad for p in trained.values()]
            torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0).step()
            for parameter in trained.values():
                assert parameter.isfinite().all()
                parameter.grad = None
            model(**inputs).encoder_last_hidden_state_vision.square().sum().backward()
            assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in trained.values())
    first, *others = gradients.values()
    for other in others:
        close(other, first, 1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_at_zero_are_those_of_the_formula(variant, way, no_choice):
    layer, inputs = make_layer(init_weights="normal", **VARIANTS[variant], **way), make_inputs()
    parameters = [layer.sdpt_prompts["default"], layer.sdpt_gates["default"]]
    expected = with_gradients(lambda *inputs: formula(layer, *inputs), layer, inputs, parameters)
    for training in (False, True):
        layer.train(training)
        found = with_gradients(lambda *inputs: outputs(layer, *inputs), layer, inputs, parameters)
        close(found, expected)
        if not training:
            assert equal(found[:2], [out for out, _ in layer.base_layer(*inputs)])


def test_false_starts_gates_at_random_and_all_else_at_zero():
    for start in (*peft_sdpt.config.INIT_WEIGHTS, True):
        layer = make_layer(init_weights=start)
        assert layer.sdpt_gates["default"].shape == GATES and not layer.sdpt_gates["default"].any()
    stack = attach(FusionStack(layers=40))
    gates = torch.cat([p.flatten() for name, p in stack.named_parameters() if "sdpt_gates" in name])
    assert len(gates) == 160 and abs(gates.mean()) < 0.25 and abs(gates.std() - 1) < 0.2
    again = torch.cat([p.flatten() for n, p in attach(FusionStack(layers=40)).named_parameters() if "sdpt_gates" in n])
    assert torch.equal(gates, again)


def test_gates_take_no_random_number_from_the_tokens():
    found = []
    for gate in ("zero", None):
        torch.manual_seed(3)
        model = get_peft_model(FusionStack(), SDPTConfig(prompt_gate=gate))
        found.append([p.detach() for name, p in model.named_parameters() if "sdpt_prompts" in name])
    # Those of gated prompts are four times as large.
    assert len(found[0]) == 2 and equal(found[0], [4 * tokens for tokens in found[1]])


def test_a_sample_without_text_is_as_in_the_base_model(way, no_choice):
    """The other samples are not touched by its NaN."""
    layer, (image, text, image_mask, text_mask) = make_layer(**way), make_inputs()
    text_mask[1] = True
    found = outputs(layer, image, text, image_mask, text_mask)
    assert layer.base_layer(image, text, image_mask, text_mask)[0][0][1].isnan().all()
    expected = formula(layer, image, text, image_mask, text_mask)
    close([out[[0, 2]] for out in found], [out[[0, 2]] for out in expected])


# ---- gates that are written to


def fill(gates: nn.Parameter, value: float):
    with torch.no_grad():
        gates.fill_(value)


def step(gates: nn.Parameter, value: float):
    """A step of an optimizer that leads to the value."""
    gates.grad = gates.detach() - value
    torch.optim.SGD([gates], lr=1.0).step()
    gates.grad = None


def other_data(gates: nn.Parameter, value: float):
    gates.data = torch.full_like(gates, value)


def data_in_place(gates: nn.Parameter, value: float):
    gates.data.fill_(value)


def name_of(how) -> str:
    return how if isinstance(how, str) else how.__name__


WRITES = [fill, step, other_data, data_in_place]


def write(model, how, value):
    """Write to the gates of a model in one of the ways, or by a state dict."""
    if how == "load_state_dict":
        state = {key: torch.full_like(v, value) for key, v in model.state_dict().items() if "sdpt_gates" in key}
        model.load_state_dict(state, strict=False)
    elif how == "set_peft_model_state_dict":
        state = get_peft_model_state_dict(model)
        state |= {key: torch.full_like(v, value) for key, v in state.items() if "sdpt_gates" in key}
        set_peft_model_state_dict(model, state)
    else:
        for key, parameter in model.named_parameters():
            if "sdpt_gates" in key:
                how(parameter, value)


class Tests(TorchFunctionMode):
    """Counts how often it is tested whether gates are zero."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.any
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", [*WRITES, "load_state_dict", "set_peft_model_state_dict"], ids=name_of)
@pytest.mark.parametrize("waits", [False, True], ids=["cpu", "device"])
def test_what_is_written_to_gates_takes_effect_at_once(how, waits, monkeypatch):
    if waits and how is data_in_place:
        pytest.skip("PyTorch does not count it: the docstring of the layer says so of weights")
    monkeypatch.setattr(peft_sdpt.layer, "_reading_waits", lambda _: waits)
    bare = run(make_host().requires_grad_(False))
    torch.manual_seed(1)
    model = get_peft_model(make_host(), SDPTConfig(num_virtual_tokens=4))
    assert torch.equal(run(model), bare)
    twin = copy.deepcopy(model)
    expected = {}
    for value in (0.3, 0.7):
        write(twin, fill, value)
        expected[value] = run(twin.train().eval())
        assert (expected[value] - bare).nan_to_num().abs().max() > 1e-2
    assert not torch.equal(*expected.values())
    for _ in range(2):
        for value in (0.7,) if how is data_in_place else (0.3, 0.7):
            write(model, how, value)
            assert torch.equal(run(model), expected[value])
        write(model, how, 0.0)
        assert torch.equal(run(model), bare)


def test_a_step_in_a_loop_that_never_calls_train_takes_effect_at_once(monkeypatch):
    """Of an optimizer that writes through `.data`, which PyTorch does not count."""
    for waits in (False, True):
        monkeypatch.setattr(peft_sdpt.layer, "_reading_waits", lambda _: waits)  # noqa: B023 - called in this turn
        layer, inputs = make_layer(init_weights="normal", attn_implementation="fused"), make_inputs()
        gates = layer.sdpt_gates["default"]
        with torch.no_grad():
            bare = outputs(layer, *inputs)
        sum(out.square().sum() for out in outputs(layer, *inputs)).backward()
        gates.data -= 0.1 * gates.grad
        with torch.no_grad():
            found = outputs(layer, *inputs)
            close(found, formula(layer, *inputs))
        assert not equal(found, bare)


def test_gates_are_tested_once_where_the_test_would_wait(monkeypatch):
    model = get_peft_model(make_host(), SDPTConfig())
    # A fused optimizer changes trained gates without raising their version.
    for waits, trained, count in ((False, False, 3), (True, True, 3), (True, False, 1)):
        count *= len(LAYERS)
        monkeypatch.setattr(peft_sdpt.layer, "_reading_waits", lambda _: waits)  # noqa: B023 - called in this turn
        model.set_requires_grad("default", trained)
        with Tests() as tests:
            for _ in range(3):
                for layer in LAYERS:
                    with torch.no_grad():
                        image, text, *_ = make_inputs(torch.float32)
                        model.base_model.model.get_submodule(layer)(image, text)
        assert tests.count == count
    layer = model.base_model.model.get_submodule(LAYERS[0])
    assert layer._known_silent
    # What is known is no obstacle to copies.
    layer = pickle.loads(pickle.dumps(copy.deepcopy(layer))).train()
    with Tests() as tests:
        layer(*make_inputs(torch.float32)[:2])
    assert tests.count == 0


# ---- several adapters


def several(**options):
    """Two gated adapters, and one without gates."""
    layer = make_layer(**options)
    torch.manual_seed(6)
    layer.update_layer("second", acting(num_virtual_tokens=2, pinv_rtol=0.6, attn_implementation="fused"))
    layer.update_layer("hidden", acting(num_virtual_tokens=3, image_attends_prompts=False, prompt_groups=[2, 1]))
    layer.update_layer("published", SDPTConfig(num_virtual_tokens=3, prompt_gate=None))
    return layer


@pytest.mark.parametrize("names", [["default", "second"], ["hidden", "default"], ["second", "hidden", "default"]])
def test_branches_of_active_adapters_add_up(names, way, no_choice):
    layer, inputs = several(**way), make_inputs()
    layer.set_adapter(names)
    expected = formula(layer, *inputs, **dict.fromkeys(names, 1.0))
    close(outputs(layer, *inputs), expected)
    with torch.no_grad():
        close(outputs(layer, *inputs), expected)


@pytest.mark.parametrize("names", [["published", "default"], ["second", "published", "hidden"]])
def test_a_gated_and_a_published_adapter_together(names, way, no_choice):
    layer, inputs = several(**way), make_inputs()
    layer.set_adapter("published")
    expected = outputs(layer, *inputs)
    for name in names:
        if name != "published":
            added = [0 if branch is None else branch[0] for branch in branches(layer, *inputs[:2], name)]
            expected = [out + more for out, more in zip(expected, added, strict=True)]
    layer.set_adapter(names)
    close(outputs(layer, *inputs), expected)


@pytest.mark.parametrize("gates", ["zero", "scaled"])
def test_an_adapter_without_effect_beside_others(gates, way):
    layer, inputs = several(**way), make_inputs()
    if gates == "zero":
        fill(layer.sdpt_gates["second"], 0.0)
    else:
        layer.set_scale("second", 0.0)
    with torch.no_grad():
        for others in (["default"], ["hidden"], ["published"], ["default", "hidden", "published"]):
            layer.set_adapter(others)
            expected = outputs(layer, *inputs)
            for names in (["second", *others], [*others, "second"]):
                layer.set_adapter(names)
                assert equal(outputs(layer, *inputs), expected)


@pytest.mark.parametrize(
    "names",
    [
        ["default", "__base__", "second"],
        ["second", "second", "default"],
        ["published", "default", "__base__"],
        ["hidden", "published", "hidden"],
    ],
    ids=str,
)
def test_samples_with_adapters_of_their_own(names, way, no_choice):
    layer, inputs = several(**way), make_inputs()
    bare = [out for out, _ in layer.base_layer(*inputs)]
    alone = {"__base__": bare}
    for name in ("default", "second", "hidden", "published"):
        layer.set_adapter(name)
        alone[name] = outputs(layer, *inputs)
    layer.set_adapter("default")
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            mixed = outputs(layer, *inputs, adapter_names=names)
        for sample, name in enumerate(names):
            close([out[sample] for out in mixed], [out[sample] for out in alone[name]])


def test_a_batch_of_samples_without_an_effect_is_the_base_model():
    model = get_peft_model(make_host(), SDPTConfig())
    model.add_adapter("second", acting(num_virtual_tokens=2))
    model.eval()
    bare = run(make_host().requires_grad_(False))
    for names in (["default", "__base__"], ["__base__", "__base__"], ["default", "default"]):
        assert torch.equal(run(model, adapter_names=names), bare)
    assert not torch.equal(run(model, adapter_names=["default", "second"]), bare)


# ---- the scale


def test_the_scale_multiplies_the_branch(way, no_choice):
    layer, inputs = several(**way), make_inputs()
    layer.set_adapter(["default", "second"])
    for scale in (0.4, 2.0, -1.0, 0.0, 1.0):
        layer.set_scale("default", scale)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                close(outputs(layer, *inputs), formula(layer, *inputs, default=scale, second=1.0))


def linear_layers(model):
    return [module for module in model.modules() if isinstance(module, SDPTLoraLayer)]


@every_host
@pytest.mark.parametrize("config", [{}, {"lora_rank": 2}, {"image_attends_prompts": False}], ids=str)
def test_the_scale_goes_from_the_base_model_to_the_adapter(name, config, tmp_path):
    bare = run(make_host(name).requires_grad_(False))
    model = attach(make_host(name), **config)
    for layer in linear_layers(model):
        nn.init.normal_(layer.sdpt_lora_B["default"], std=0.1)
    model.add_adapter("other", acting())
    tuned = run(model.eval())
    model.base_model.set_scale("default", 0)
    assert torch.equal(run(model), bare)
    assert torch.equal(run(model, adapter_names=["default", "__base__"]), bare)
    model.set_scale("default", 0.5)
    half = run(model)
    assert not torch.equal(half, bare) and not torch.equal(half, tuned)
    # It is not saved, and another adapter has its own.
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert torch.equal(run(PeftModel.from_pretrained(make_host(name), tmp_path)), tuned)
    model.set_scale("other", 0)
    assert torch.equal(run(model), half)
    model.set_scale("default", 1)
    assert torch.equal(run(model), tuned)
    model.set_scale("default", 0.5)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(run(model), tuned)


def test_the_scale_multiplies_the_lora_part():
    model = attach(make_host(), lora_rank=2)
    layer = linear_layers(model)[0]
    nn.init.normal_(layer.sdpt_lora_B["default"])
    inputs = torch.randn(2, 5, layer.base_layer.in_features)
    bare, whole = layer.base_layer(inputs), layer(inputs)
    model.set_scale("default", 0.25)
    torch.testing.assert_close(layer(inputs), bare + 0.25 * (whole - bare))
    model.set_scale("default", 0.0)
    assert torch.equal(layer(inputs), bare)


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("nosuch", 1.0, r"adapter_name must be one of \['default', 'published', 'whole'\], got 'nosuch'"),
        (
            "published",
            0.5,
            r"adapter_name='published': scale multiplies gates, and the layer '.*' has none: prompt_gate is None",
        ),
        ("whole", 0.5, r"adapter_name='whole': an adapter with modules_to_save=\['enc_output'\] cannot be scaled"),
        ("default", float("nan"), "scale must be a finite number, got nan"),
        ("default", float("inf"), "scale must be a finite number, got inf"),
        ("default", True, "scale must be a finite number, got True"),
        ("default", "0.5", "scale must be a finite number, got '0.5'"),
        ("default", None, "scale must be a finite number, got None"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(name, scale, message):
    model = attach(make_host())
    model.add_adapter("published", SDPTConfig(prompt_gate=None))
    model.add_adapter("whole", SDPTConfig(modules_to_save=["enc_output"]))
    before = run(model)
    with pytest.raises(ValueError, match=message):
        model.base_model.set_scale(name, scale)
    assert torch.equal(run(model), before)
    scales = {s for m in model.modules() if isinstance(m, SDPTLayer) for s in m.sdpt_scale.values()}
    assert scales == {1.0}


# ---- combinations


def two(**options):
    """A stack with two adapters in float64, and inputs."""
    model = attach(FusionStack().eval(), **options)
    torch.manual_seed(5)
    model.add_adapter("second", acting(**{"num_virtual_tokens": 2, **options}))
    model = model.double()
    inputs = torch.randn(2, 7, D_MODEL).double(), torch.randn(2, 5, D_MODEL).double()

    @torch.no_grad()
    def with_adapters(*names, **scales):
        for name, scale in scales.items():
            model.set_scale(name, scale)
        model.base_model.set_adapter(list(names))
        found = model(*inputs)
        for name in scales:
            model.set_scale(name, 1.0)
        return found

    return model, with_adapters


def parameters_of(model, kind, name):
    return [p.detach() for key, p in model.named_parameters() if key.endswith(f".sdpt_{kind}.{name}")]


OPTIONS = [{}, {"prompt_mode": "independent"}, {"image_attends_prompts": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cat_with_weights_is_what_scales_give(options):
    model, outputs = two(**options)
    for number, (first, second) in enumerate([(1.0, 1.0), (0.4, 1.0), (-0.5, 0.9), (0.0, 1.0)]):
        name = f"both{number}"
        model.base_model.add_weighted_adapter(["default", "second"], [first, second], name)
        assert model.peft_config[name].prompt_groups == [4, 2] and model.peft_config[name].num_virtual_tokens == 6
        expected = outputs("default", "second", default=first, second=second)
        close([outputs(name)], [expected])
        # The combination has a scale of its own.
        close([outputs(name, **{name: 0.5})], [outputs("default", "second", default=first / 2, second=second / 2)])
    for kind, dim in (("prompts", -2), ("gates", -2)):
        joined = zip(parameters_of(model, kind, "default"), parameters_of(model, kind, "second"), strict=True)
        assert equal(parameters_of(model, kind, "both0"), [torch.cat(parts, dim=dim) for parts in joined])


def test_cat_of_a_combination_keeps_its_groups(tmp_path):
    model, outputs = two()
    model.base_model.add_weighted_adapter(["second", "default"], [0.5, 1.0], "both")
    model.base_model.add_weighted_adapter(["both", "second"], [1.0, 0.25], "three")
    assert model.peft_config["three"].prompt_groups == [2, 4, 2]
    close([outputs("three")], [outputs("default", "second", second=0.75)])
    model.save_pretrained(tmp_path, selected_adapters=["three"])
    loaded = PeftModel.from_pretrained(FusionStack().eval(), tmp_path / "three")
    assert loaded.peft_config["default"].prompt_groups == [2, 4, 2]
    for kind in ("prompts", "gates"):
        assert equal(parameters_of(loaded, kind, "default"), parameters_of(model.float(), kind, "three"))


@pytest.mark.parametrize("combination_type", ["cat", "linear"])
def test_a_scale_does_not_count_in_combinations(combination_type):
    model, outputs = two(num_virtual_tokens=4)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 1.0], "both", combination_type)
    model.set_scale("default", 0.3)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 1.0], "scaled", combination_type)
    close([outputs("scaled")], [outputs("both")])


def test_linear_adds_parameters():
    """The gates of a sum are no sum of what they stand for."""
    model, outputs = two(num_virtual_tokens=4, prompt_groups=[1, 3])
    model.base_model.add_weighted_adapter(["default", "second"], [0.25, -2.0], "sum", combination_type="linear")
    assert model.peft_config["sum"].prompt_groups == [1, 3]
    for kind in ("prompts", "gates"):
        parts = zip(parameters_of(model, kind, "default"), parameters_of(model, kind, "second"), strict=True)
        close(parameters_of(model, kind, "sum"), [0.25 * one - 2.0 * other for one, other in parts])
    assert not torch.allclose(outputs("sum"), outputs("default"))


@pytest.mark.parametrize("weights", [[50.0, 1.0], [1.0, -50.0]])
def test_weights_that_no_gate_can_stand_for_are_refused(weights):
    model, outputs = two()
    before, names = outputs("default"), [name for name, _ in model.named_parameters()]
    with pytest.raises(
        ValueError,
        match=r"weights \[.*50.*\] of the adapters \['default', 'second'\] are too large: a gate stands for a factor",
    ):
        model.base_model.add_weighted_adapter(["default", "second"], weights, "both")
    assert list(model.peft_config) == ["default", "second"]
    assert [name for name, _ in model.named_parameters()] == names and torch.equal(outputs("default"), before)
    # A combination by parameters has no such bound.
    model, outputs = two(num_virtual_tokens=4)
    model.base_model.add_weighted_adapter(["default", "second"], weights, "both", combination_type="linear")
    assert outputs("both").isfinite().all()


# ---- saving


def without_gate_fields(folder):
    """Make a config file one of before gates."""
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    assert [values.pop(name) for name in ("prompt_gate", "prompt_groups", "fusion_gates")] == [None, None, {}]
    file.write_text(json.dumps(values))


@every_host
@pytest.mark.parametrize("digest", [True, False])
def test_an_adapter_of_before_gates_is_as_published(name, digest, tmp_path):
    model = attach(make_host(name), prompt_gate=None)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.{layer}.sdpt_prompts" for layer in LAYERS
    }
    without_gate_fields(tmp_path)
    if not digest:
        file = tmp_path / "adapter_config.json"
        values = json.loads(file.read_text())
        del values["fusion_layers_digest"]
        file.write_text(json.dumps(values))
    config = SDPTConfig.from_pretrained(tmp_path)
    assert config.prompt_gate is None and config.belongs_to_base_model
    loaded = PeftModel.from_pretrained(make_host(name), tmp_path)
    assert torch.equal(run(loaded), run(model))
    assert not any("sdpt_gates" in key for key, _ in loaded.named_parameters())
    # What is saved again is the same adapter, also for versions that know gates.
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_host(name), tmp_path / "again")
    assert again.peft_config["default"].prompt_gate is None and torch.equal(run(again), run(model))
    # Beside a gated adapter.
    model = attach(make_host(name), seed=9)
    gated = run(model)
    model.load_adapter(tmp_path, "old")
    assert torch.equal(run(model), gated)
    model.set_adapter("old")
    assert torch.equal(run(model), run(loaded))
    host = make_host(name, layers=3)
    before = snapshot(host)
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


def test_a_published_adapter_with_gates_in_its_file_is_refused(tmp_path):
    attach(make_host(), prompt_gate=None).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{LAYERS[0]}.sdpt_gates": torch.zeros(GATES)}, file)
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=rf"the gates of the fusion layer '{LAYERS[0]}': expected no gates, found \(2"):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


@pytest.mark.parametrize("image_attends_prompts", [True, False])
def test_a_base_model_with_other_heads_is_refused(image_attends_prompts, tmp_path):
    """Its prompts have the same dimension, so nothing but the gates can tell."""
    attach(make_host(), image_attends_prompts=image_attends_prompts).save_pretrained(tmp_path / "gated")
    sides = 2 if image_attends_prompts else 1
    config = PeftConfig.from_pretrained(tmp_path / "gated")
    assert config.fusion_gates == {key: [sides, 2] for key in LAYERS}
    assert config.fusion_layers == dict.fromkeys(LAYERS, REACHED)
    host = make_host(encoder_attention_heads=8)
    before = snapshot(host)
    with pytest.raises(
        ValueError,
        match=rf"made for another base model.* the gates of the fusion layer '{LAYERS[0]}': "
        rf"expected \({sides}, 1, 4\), found \({sides}, 1, 2\)",
    ):
        PeftModel.from_pretrained(host, tmp_path / "gated")
    assert snapshot(host) == before
    # Published prompts do not depend on the heads.
    attach(make_host(), prompt_gate=None).save_pretrained(tmp_path / "published")
    PeftModel.from_pretrained(host, tmp_path / "published")


# ---- compiled and distributed


@pytest.mark.parametrize(
    ("options", "training"),
    [({}, False), ({"attn_implementation": "eager"}, True), ({"prompt_groups": [1, 3]}, True)],
    ids=str,
)
def test_compiled_layers_are_as_eager_ones(options, training):
    # One layer, because tracing takes most of the time.
    model = attach(FusionStack(layers=1).eval(), init_weights="normal", **options).train(training)
    inputs = torch.randn(2, 7, D_MODEL), torch.randn(2, 5, D_MODEL)
    torch._dynamo.reset()  # a limit counts what other tests have compiled
    compilations = []

    def backend(graph, examples):
        compilations.append(1)
        return aot_eager(graph, examples)

    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def gradients(module):
        model.zero_grad()
        out = module(*inputs)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    found = []
    for value in (0.0, 0.6):
        write(model, fill, value)
        found.append(gradients(compiled))
        close(found[-1], gradients(model), 1e-5)
    assert not torch.equal(found[0][0], found[1][0])
    assert len(compilations) == 1
    model.set_scale("default", 0.5)
    close(gradients(compiled), gradients(model), 1e-5)


class BothOutputs(FusionStack):
    """A stack whose text tokens count as well."""

    def forward(self, image, text):
        for layer in self.layers:
            (image_delta, _), (text_delta, _) = layer(image, text)
            image, text = image + image_delta, text + text_delta
        return self.head(image).sum() + self.head(text).sum()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("start", [False, "normal"])
@pytest.mark.parametrize("image_attends_prompts", [True, False])
def test_distributed_training_finds_no_unused_parameter(image_attends_prompts, start, process_group):
    """An unused one would end the second step with an error."""
    model = attach(BothOutputs(), init_weights=start, image_attends_prompts=image_attends_prompts).train()
    shapes = {tuple(p.shape) for name, p in model.named_parameters() if "sdpt_gates" in name}
    assert shapes == {(2 if image_attends_prompts else 1, 1, 2)}
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(3):
        wrapped(torch.randn(2, 7, D_MODEL), torch.randn(2, 5, D_MODEL)).backward()
        gates = [p.grad for name, p in model.named_parameters() if "sdpt_gates" in name]
        assert len(gates) == 2 and all(grad.all() for grad in gates)
