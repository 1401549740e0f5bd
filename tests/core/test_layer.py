# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The layer against a reference that appends prompts to the host's own inputs and drops their rows."""

import copy
import pickle

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

import peft_sdpt.inverse_cache
import peft_sdpt.layer
from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.config import INIT_WEIGHTS
from peft_sdpt.hosts import GROUNDING_DINO
from tests.helpers.detectors import ATTENTION_CLASSES, D_MODEL, HOST_NAMES, WIDTH, host_config, make_attention
from tests.helpers.layers import NL, NV, TOLERANCE, VARIANTS, N, make_inputs, make_layer


def tokens_of(layer: SDPTLayer) -> torch.Tensor:
    """Tokens of the aligned space; of coordinates, in the orthogonal polar factor of the columns of the projections."""
    prompts = layer.sdpt_prompts["default"]
    if prompts.shape[-1] == WIDTH:
        return prompts
    weights = [layer.base_layer.vision_proj.weight, layer.base_layer.text_proj.weight]
    factor, _ = scipy.linalg.polar(torch.cat(weights, dim=1).double().cpu().numpy())
    return prompts @ torch.from_numpy(factor).to(prompts).T


def append_and_drop(layer: SDPTLayer, image, text, image_mask, text_mask):
    """The paper's words, on the host's own attention, with nothing of the package in it."""
    attention, config = layer.base_layer, layer.sdpt_config["default"]
    tokens = tokens_of(layer)
    image_set, text_set = tokens if config.prompt_mode == "independent" else (tokens, tokens)

    def back(z, projection):
        inverse = torch.linalg.pinv(projection.weight.double(), rtol=config.pinv_rtol)
        return (z - projection.bias) @ inverse.to(z.dtype).T

    batch = image.shape[0]
    z_v, z_l = back(image_set, attention.vision_proj), back(text_set, attention.text_proj)
    image = torch.cat([image, z_v.expand(batch, -1, -1)], dim=1)
    text = torch.cat([text, z_l.expand(batch, -1, -1)], dim=1)
    if image_mask is not None:
        image_mask = F.pad(image_mask, (0, N), value=False)
    if text_mask is None:
        text_mask = torch.zeros(batch, NL, dtype=torch.bool, device=text.device)
    # The released masking hides the text-side prompts from the image.
    text_mask = F.pad(text_mask, (0, N), value=not config.image_attends_prompts)
    (image_out, image_weights), (text_out, text_weights) = attention(
        image, text, vision_attention_mask=image_mask, text_attention_mask=text_mask
    )
    visible = NL + (N if config.image_attends_prompts else 0)
    return (
        (image_out[:, :NV], image_weights[:, :NV, :visible]),
        (text_out[:, :NL], text_weights[:, :NL]),
    )


def flat(outputs):
    (image_out, image_weights), (text_out, text_weights) = outputs
    return image_out, image_weights, text_out, text_weights


def gradients(run, layer, inputs):
    """Gradients of the prompts, the image and the text of a function that weighs every output."""
    image, text = (t.clone().requires_grad_() for t in inputs[:2])
    outputs = flat(run(image, text, *inputs[2:]))
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, [layer.sdpt_prompts["default"], image, text])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", HOST_NAMES)
def test_equals_append_and_drop(name, dtype, variant, device):
    layer = make_layer(name, dtype, device=device, **VARIANTS[variant])
    inputs = make_inputs(dtype, device=device)
    for result, expected in zip(flat(layer(*inputs)), flat(append_and_drop(layer, *inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE[dtype])
    bare = flat(layer.base_layer(*inputs))
    assert (layer(*inputs)[1][0] - bare[2]).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_append_and_drop(variant, device):
    layer = make_layer(device=device, **VARIANTS[variant])
    inputs = make_inputs(device=device)

    def reference(*inputs):
        return append_and_drop(layer, *inputs)

    for result, expected in zip(gradients(layer, layer, inputs), gradients(reference, layer, inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
        assert result.abs().max() > 1e-3


@pytest.mark.parametrize("masks", ["none", "image", "text"])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_masks_and_batch_size(batch, masks, device):
    layer = make_layer(device=device)
    inputs = make_inputs(batch=batch, masks=masks, device=device)
    for result, expected in zip(flat(layer(*inputs)), flat(append_and_drop(layer, *inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_logits_beyond_the_clamps():
    layer, (image, text, image_mask, text_mask) = make_layer(), make_inputs()
    inputs = (1e5 * image, text, image_mask, text_mask)
    base = layer.base_layer
    logits = base.vision_proj(inputs[0]) @ base.text_proj(text).transpose(1, 2) * base.scale
    assert logits.max() - logits.min() > 100_000
    for result, expected in zip(flat(layer(*inputs)), flat(append_and_drop(layer, *inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_fully_padded_text_is_finite_because_prompts_are_seen(device):
    layer, (image, text, image_mask, text_mask) = make_layer(device=device), make_inputs(device=device)
    text_mask[1] = True
    outputs = flat(layer(image, text, image_mask, text_mask))
    assert all(output.isfinite().all() for output in outputs)
    assert layer.base_layer(image, text, image_mask, text_mask)[0][0][1].isnan().all()


@pytest.mark.parametrize("variant", ["default", "independent", "image sees no prompts"])
def test_gradcheck(variant):
    layer = make_layer(num_virtual_tokens=2, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(1, 2, D_MODEL, dtype=torch.float64, generator=generator)
    text = torch.randn(1, 2, D_MODEL, dtype=torch.float64, generator=generator)
    text_mask = torch.tensor([[False, True]])
    tokens = layer.sdpt_prompts["default"]

    def run(tokens, image, text):
        state = {"sdpt_prompts.default": tokens}
        outputs = torch.func.functional_call(layer, state, (image, text, None, text_mask))
        return outputs[0][0], outputs[1][0]

    inputs = [t.detach().clone().requires_grad_() for t in (tokens, image, text)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert layer.sdpt_prompts["default"] is tokens


def test_what_no_projection_reaches_has_no_effect_and_no_gradient():
    layer, inputs = make_layer(prompt_space="aligned"), make_inputs()
    base = layer.base_layer
    reachable = torch.cat([base.vision_proj.weight, base.text_proj.weight], dim=1)
    basis = torch.linalg.qr(reachable).Q  # (E, 2 d), half of the aligned space
    before = flat(layer(*inputs))
    grad = gradients(layer, layer, inputs)[0]
    outside = grad - grad @ basis @ basis.T
    assert outside.abs().max() < 1e-10 < grad.abs().max()

    with torch.no_grad():
        noise = torch.randn(N, WIDTH, dtype=torch.float64)
        layer.sdpt_prompts["default"] += noise - noise @ basis @ basis.T
    for result, expected in zip(flat(layer(*inputs)), before, strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        layer.sdpt_prompts["default"] += noise @ basis @ basis.T
    assert (layer(*inputs)[0][0] - before[0]).abs().max() > 1e-2


@pytest.mark.parametrize("rtol", [None, 0.6])
def test_coordinates_compute_what_their_tokens_do(rtol):
    whole, coordinates = make_layer(prompt_space="aligned", pinv_rtol=rtol), make_layer(pinv_rtol=rtol)
    inputs = make_inputs()
    tokens = whole.sdpt_prompts["default"].detach()
    coordinates.set_tokens("default", tokens)
    assert coordinates.sdpt_prompts["default"].shape == (N, 2 * D_MODEL) and tokens.shape == (N, WIDTH)
    for one, other in zip(flat(whole(*inputs)), flat(coordinates(*inputs)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    # The gradient of a token has no other part than that of its coordinates.
    of_tokens, of_coordinates = (gradients(layer, layer, inputs)[0] for layer in (whole, coordinates))
    torch.testing.assert_close(of_tokens, of_coordinates @ coordinates.sdpt_inverses.basis.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("init_weights", [name for name in INIT_WEIGHTS if name != "prototypes"])
def test_coordinates_start_as_large_as_tokens(init_weights):
    """In what has an effect."""
    reached, sizes = make_layer().sdpt_inverses.basis, []
    for space in ("reachable", "aligned"):
        layer = make_layer(prompt_space=space, num_virtual_tokens=200, init_weights=init_weights)
        sizes.append((layer.tokens().detach() @ reached).square().mean().sqrt())
    torch.testing.assert_close(*sizes, rtol=0.03, atol=1e-12)


def test_adapters_with_coordinates_and_without_in_one_layer():
    layer, inputs = make_layer(), make_inputs()
    assert layer.sdpt_inverses.basis.shape == (WIDTH, 2 * D_MODEL)
    torch.manual_seed(7)
    layer.update_layer("whole", SDPTConfig(num_virtual_tokens=2, prompt_space="aligned", prompt_gate=None))
    layer.set_adapter(["default", "whole"])
    joined = make_layer(num_virtual_tokens=N + 2, prompt_space="aligned")
    assert joined.sdpt_inverses.basis is None
    joined.set_tokens("default", torch.cat([layer.tokens("default"), layer.tokens("whole")]))
    torch.testing.assert_close(layer(*inputs)[1][0], joined(*inputs)[1][0], rtol=0, atol=1e-10)


def test_attention_dropout_drops_weights_in_training_only():
    layer, inputs = make_layer(host={"fusion_dropout": 0.5}), make_inputs()
    evaluated = layer(*inputs)
    assert torch.equal(evaluated[0][0], layer(*inputs)[0][0])
    layer.train()
    base = layer.base_layer
    torch.manual_seed(5)
    (image_out, image_weights), (text_out, text_weights) = layer(*inputs)
    # Returned weights are those before dropout, as the host returns them.
    torch.testing.assert_close(image_weights, evaluated[0][1])
    # The host's order: the image's dropout is drawn first, then the text's.
    torch.manual_seed(5)
    image_probs, text_probs = F.dropout(image_weights, 0.5), F.dropout(text_weights, 0.5)
    tokens = layer.tokens()
    for out, probs, features, query, value, project in (
        (image_out, image_probs, inputs[1], base.text_proj, base.values_text_proj, "vision"),
        (text_out, text_probs, inputs[0], base.vision_proj, base.values_vision_proj, "text"),
    ):
        prompts = (tokens - query.bias) @ torch.linalg.pinv(query.weight).T
        values = value(torch.cat([features, prompts.expand(3, -1, -1)], dim=1))
        values = values.unflatten(-1, (base.num_heads, -1)).transpose(1, 2).flatten(0, 1)
        attended = (probs @ values).unflatten(0, (3, -1)).transpose(1, 2).flatten(2)
        expected = getattr(base, f"out_{project}_proj")(attended)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("space", ["aligned", "reachable"])
def test_prompt_dropout_zeroes_entries_of_the_tokens_in_training_only(monkeypatch, space):
    layer, inputs = make_layer(prompt_dropout=0.5, num_virtual_tokens=64, prompt_space=space), make_inputs()
    seen = []
    original = peft_sdpt.layer.to_input_space

    def spy(tokens, inverse, bias):
        seen.append(tokens.detach())
        return original(tokens, inverse, bias)

    monkeypatch.setattr(peft_sdpt.layer, "to_input_space", spy)
    tokens = layer.tokens()
    layer(*inputs)
    assert torch.equal(seen[0], tokens)
    layer.train()
    seen.clear()
    layer(*inputs)
    dropped = seen[0] == 0
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(seen[0][~dropped], 2 * tokens[~dropped])
    assert torch.equal(seen[0], seen[1])  # one unified token, dropped alike on both sides


def test_a_layer_on_an_evaluated_host_is_in_evaluation_mode():
    attention = make_attention()
    assert not SDPTLayer(attention, GROUNDING_DINO, "a", SDPTConfig()).training
    assert SDPTLayer(attention.train(), GROUNDING_DINO, "a", SDPTConfig()).training


def test_keyword_and_positional_arguments_are_the_same():
    layer, (image, text, image_mask, text_mask) = make_layer(), make_inputs()
    by_name = layer(
        image,
        text_attention_mask=text_mask,
        text_features=text,
        vision_attention_mask=image_mask,
    )
    for result, expected in zip(flat(by_name), flat(layer(image, text, image_mask, text_mask)), strict=True):
        assert torch.equal(result, expected)


def test_wrong_arguments_are_refused():
    layer, (image, text, _, _) = make_layer(), make_inputs()
    with pytest.raises(TypeError, match="got 'mask' as well"):
        layer(image, text, mask=None)
    with pytest.raises(TypeError, match="got 'text_features' twice"):
        layer(image, text, text_features=text)
    with pytest.raises(TypeError, match=r"needs .*text_features"):
        layer(image)
    with pytest.raises(TypeError, match="got 5 arguments"):
        layer(image, text, None, None, None)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_without_visible_prompts_the_host_is_called_itself(name):
    layer, inputs = make_layer(name, torch.float32), make_inputs(torch.float32)
    bare = flat(layer.base_layer(*inputs))

    def is_bare():
        return all(torch.equal(a, b) for a, b in zip(flat(layer(*inputs)), bare, strict=True))

    assert not any(torch.equal(a, b) for a, b in zip(flat(layer(*inputs)), bare, strict=True))
    layer.enable_adapters(False)
    assert is_bare()
    layer.enable_adapters(True)
    assert not is_bare()
    layer.set_adapter([])
    assert is_bare()
    layer.set_adapter("elsewhere")
    assert is_bare()


def test_active_adapters_concatenate():
    layer, inputs = make_layer(), make_inputs()
    alone = layer(*inputs)
    torch.manual_seed(7)
    layer.update_layer("second", SDPTConfig(num_virtual_tokens=2, image_attends_prompts=False, prompt_gate=None))
    assert all(torch.equal(a, b) for a, b in zip(flat(layer(*inputs)), flat(alone), strict=True))
    layer.set_adapter(["default", "second"])
    (_, image_weights), (text_out, text_weights) = layer(*inputs)
    assert image_weights.shape[-1] == NL + N  # the second adapter hides its prompts from the image
    assert text_weights.shape[-1] == NV + N + 2

    joined = make_layer(num_virtual_tokens=N + 2)
    with torch.no_grad():
        joined.sdpt_prompts["default"].copy_(torch.cat([layer.sdpt_prompts["default"], layer.sdpt_prompts["second"]]))
    torch.testing.assert_close(text_out, joined(*inputs)[1][0], rtol=0, atol=1e-10)


def test_adapters_share_an_inverse_of_the_same_tolerance():
    layer = make_layer()
    layer.update_layer("same", SDPTConfig())
    layer.update_layer("other", SDPTConfig(pinv_rtol=0.6))
    for side in range(2):
        assert layer.inverse(side, "same") is layer.inverse(side, "default")
        assert not torch.allclose(layer.inverse(side, "other"), layer.inverse(side, "default"))
    assert len(list(layer.buffers())) == 5  # two inverses of each side, and one basis
    layer.delete_adapter("same")
    assert len(list(layer.buffers())) == 5
    layer.delete_adapter("default")
    assert len(list(layer.buffers())) == 3 and list(layer.sdpt_prompts) == ["other"]
    layer.inverse(0, "other")


# ---- start of the tokens


@pytest.mark.parametrize("prompt_gate", ["zero", None])
@pytest.mark.parametrize("mode", ["unified", "independent"])
@pytest.mark.parametrize(
    ("init_weights", "low", "high", "deviation"),
    [
        ("uniform", -1, 1, 3**-0.5),
        (True, None, None, 1.0),
        (False, None, None, 1.0),
        ("normal", None, None, 1.0),
        # fan_in E = 128, fan_out N = 200
        ("xavier_uniform", -((6 / 328) ** 0.5), (6 / 328) ** 0.5, (2 / 328) ** 0.5),
        ("xavier_normal", None, None, (2 / 328) ** 0.5),
        ("kaiming_uniform", -((6 / 128) ** 0.5), (6 / 128) ** 0.5, (2 / 128) ** 0.5),
        ("kaiming_normal", None, None, (2 / 128) ** 0.5),
        ("zeros", 0, 0, 0.0),
    ],
)
def test_every_start(init_weights, low, high, deviation, mode, prompt_gate):
    if prompt_gate is not None and init_weights in ("normal", True, False):
        deviation *= 4

    def start(seed):
        attention = make_attention()
        torch.manual_seed(seed)
        options = {"init_weights": init_weights, "prompt_mode": mode, "prompt_gate": prompt_gate}
        config = SDPTConfig(num_virtual_tokens=200, prompt_space="aligned", **options)
        layer = SDPTLayer(attention, GROUNDING_DINO, "default", config)
        return layer.sdpt_prompts["default"].detach()

    tokens = start(0)
    assert tokens.shape == ((200, WIDTH) if mode == "unified" else (2, 200, WIDTH))
    for values in tokens if mode == "independent" else [tokens]:
        assert values.std().item() == pytest.approx(deviation, rel=0.03)
        assert values.mean().item() == pytest.approx(0, abs=max(0.02, 0.02 * deviation))
        if low is not None:
            assert low <= values.min() <= 0.99 * low
            assert 0.99 * high <= values.max() <= high
        else:
            assert values.abs().max() > 3 * deviation
    assert torch.equal(tokens, start(0))
    if init_weights != "zeros":
        assert not torch.equal(tokens, start(1))
        if mode == "independent":
            assert not torch.equal(tokens[0], tokens[1])


def test_zeros_is_not_the_identity_without_gates():
    layer, inputs = make_layer(init_weights="zeros"), make_inputs()
    assert (layer(*inputs)[0][0] - layer.base_layer(*inputs)[0][0]).abs().max() > 1e-2


# ---- the inverses follow the weights


@pytest.fixture
def counted(monkeypatch):
    """Number of inverses computed so far, as a list of one."""
    count, original = [0], peft_sdpt.inverse_cache.inverse_projection

    def counting(weight, rtol=None):
        count[0] += 1
        return original(weight, rtol)

    monkeypatch.setattr(peft_sdpt.inverse_cache, "inverse_projection", counting)
    return count


def assert_inverses_are_right(layer: SDPTLayer, inputs) -> None:
    for result, expected in zip(flat(layer(*inputs)), flat(append_and_drop(layer, *inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def other_weight(layer: SDPTLayer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    weight = layer.base_layer.vision_proj.weight
    return torch.randn(weight.shape, generator=generator).to(weight)


def change_copy(layer, weight):
    with torch.no_grad():
        layer.base_layer.vision_proj.weight.copy_(weight)


def change_text_in_place(layer, weight):
    with torch.no_grad():
        layer.base_layer.text_proj.weight.add_(weight)


def change_data(layer, weight):
    layer.base_layer.vision_proj.weight.data = weight


def change_data_twice(layer, weight):
    layer.base_layer.vision_proj.weight.data = torch.zeros_like(weight)
    layer.base_layer.vision_proj.weight.data = weight


def change_parameter(layer, weight):
    layer.base_layer.vision_proj.weight = nn.Parameter(weight, requires_grad=False)


def change_linear(layer, weight):
    linear = nn.Linear(D_MODEL, WIDTH, dtype=weight.dtype).requires_grad_(False)
    layer.base_layer.text_proj = linear


def change_load(layer, weight):
    layer.base_layer.load_state_dict({"vision_proj.weight": weight}, strict=False)


def change_load_assign(layer, weight):
    layer.base_layer.load_state_dict({"vision_proj.weight": weight}, strict=False, assign=True)


def change_swap(layer, weight):
    other = nn.Parameter(weight, requires_grad=False)
    torch.utils.swap_tensors(layer.base_layer.vision_proj.weight, other)


CHANGES = [
    change_copy,
    change_text_in_place,
    change_data,
    change_data_twice,
    change_parameter,
    change_linear,
    change_load,
    change_load_assign,
    change_swap,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_seen_before_the_next_forward(change, counted):
    layer, inputs = make_layer(), make_inputs()
    before = layer(*inputs)[0][0]
    change(layer, other_weight(layer))
    stale = counted[0]
    assert_inverses_are_right(layer, inputs)
    assert counted[0] == stale + 2
    assert (layer(*inputs)[0][0] - before).abs().max() > 1e-3


def test_nothing_is_recomputed_when_nothing_changed(counted):
    layer, inputs = make_layer(), make_inputs()
    assert counted[0] == 2
    layer(*inputs)
    layer.train()
    loss = layer(*inputs)[0][0].sum()
    loss.backward()
    torch.optim.SGD([layer.sdpt_prompts["default"]], lr=0.1).step()
    layer.eval()
    with torch.inference_mode():
        layer(*inputs)
    layer.load_state_dict({"sdpt_prompts.default": torch.zeros(N, 2 * D_MODEL)}, strict=False)
    layer.to(torch.float64)._apply(torch.clone)  # as a move to another device does
    layer.update_layer("same tolerance", SDPTConfig())
    layer(*inputs)
    assert counted[0] == 2
    layer.refresh_inverses()
    assert counted[0] == 2
    layer.refresh_inverses(force=True)
    assert counted[0] == 4


def test_a_write_that_pytorch_does_not_count_needs_a_forced_refresh():
    layer, inputs = make_layer(), make_inputs()
    layer.base_layer.vision_proj.weight.data.copy_(other_weight(layer))
    layer.refresh_inverses(force=True)
    assert_inverses_are_right(layer, inputs)


def test_loading_refreshes_at_once_for_compiled_code(counted):
    layer = make_layer()
    weight = other_weight(layer)
    layer.load_state_dict({"base_layer.vision_proj.weight": weight}, strict=False)
    assert counted[0] == 4
    expected = torch.linalg.pinv(weight)
    torch.testing.assert_close(layer.inverse(0), expected)


def test_weights_made_under_inference_mode(counted):
    layer, inputs = make_layer(), make_inputs()
    with torch.inference_mode():
        weight = other_weight(layer)
        layer.base_layer.vision_proj.weight = nn.Parameter(weight, requires_grad=False)
        layer(*inputs)
    assert counted[0] == 4
    with torch.no_grad():  # no gradient can pass such a weight, with SDPT or without
        result, expected = layer(*inputs), append_and_drop(layer, *inputs)
    assert counted[0] == 4
    torch.testing.assert_close(result[0][0], expected[0][0], rtol=0, atol=1e-10)


def test_inverses_recomputed_under_inference_mode_serve_training():
    layer, inputs = make_layer(), make_inputs()
    change_copy(layer, other_weight(layer))
    with torch.inference_mode():
        layer(*inputs)
    expected = gradients(lambda *i: append_and_drop(layer, *i), layer, inputs)
    for result, reference in zip(gradients(layer, layer, inputs), expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=0, atol=1e-9)


def test_inverses_are_not_saved_and_are_buffers():
    layer = make_layer()
    assert [key for key in layer.state_dict() if "inverse" in key] == []
    names = [name for name, _ in layer.named_buffers()]
    assert len(names) == 3 and all(name.startswith("sdpt_inverses.") for name in names)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["sdpt_prompts.default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_casting_the_layer_keeps_the_inverse_in_float32_or_better(dtype):
    layer = make_layer(dtype=torch.float32)
    layer.to(dtype)
    for side, projection in enumerate((layer.base_layer.vision_proj, layer.base_layer.text_proj)):
        inverse = layer.inverse(side)
        assert inverse.dtype == torch.promote_types(dtype, torch.float32)
        # Of the weights as they are now, rounded, and not a rounded inverse of the old ones.
        exact = torch.linalg.pinv(projection.weight.double())
        torch.testing.assert_close(inverse.double(), exact, rtol=0, atol=1e-6)


def test_a_cast_to_what_the_host_is_in_already_rounds_no_inverse():
    layer = make_layer(dtype=torch.bfloat16)
    inverse, basis = layer.inverse(0).clone(), layer.sdpt_inverses.basis.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.inverse(0), inverse) and inverse.dtype == torch.float32
    assert torch.equal(layer.sdpt_inverses.basis, basis) and basis.dtype == torch.float32


def test_an_adapter_that_takes_the_name_of_another_has_its_own_inverse_and_basis():
    layer = make_layer(pinv_rtol=0.6)
    for gates in ({}, {"prompt_gate": "zero", "init_weights": False}, {}):
        fresh = make_layer(pinv_rtol=None, prompt_space="aligned", **gates)
        layer.set_scale("default", 0.5)
        layer.update_layer("default", fresh.sdpt_config["default"])
        layer.set_tokens("default", fresh.tokens())
        assert list(layer.sdpt_gates) == list(fresh.sdpt_gates)
        if gates:
            layer.load_state_dict({"sdpt_gates.default": fresh.sdpt_gates["default"]}, strict=False)
        assert all(
            torch.equal(a, b) for a, b in zip(flat(layer(*make_inputs())), flat(fresh(*make_inputs())), strict=True)
        )


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (N, WIDTH - 1), (2, N, WIDTH)])
def test_tokens_of_another_shape_are_refused(shape):
    layer = make_layer()
    before = layer.tokens()
    with pytest.raises(ValueError, match=rf"tokens of 'default' must have the shape \({N}, {WIDTH}\), got"):
        layer.set_tokens("default", torch.zeros(shape))
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'other'"):
        layer.set_tokens("other", before)
    assert torch.equal(layer.tokens(), before)


def test_half_and_double_of_a_parent_module():
    parent = nn.Sequential(make_layer(dtype=torch.float32))
    for cast, expected in ((parent.half, torch.float32), (parent.double, torch.float64)):
        cast()
        assert {buffer.dtype for buffer in parent.buffers()} == {expected}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_half_precision_host_with_float32_prompts(name, dtype):
    layer = make_layer(name, torch.float32)
    exact = layer(*make_inputs(torch.float32))
    layer.base_layer.to(dtype)
    assert layer.sdpt_prompts["default"].dtype == torch.float32
    image, text, image_mask, text_mask = make_inputs(dtype)
    result = layer(image, text, image_mask, text_mask)
    for half, full in zip(flat(result), flat(exact), strict=True):
        assert half.dtype == dtype
        assert (half.float() - full).abs().max() < 0.08 * full.abs().max()
    result[1][0].float().sum().backward()
    grad = layer.sdpt_prompts["default"].grad
    assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0


def test_autocast():
    layer, inputs = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    exact = layer(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(*inputs)
    assert result[0][0].dtype == torch.bfloat16
    for low, full in zip(flat(result), flat(exact), strict=True):
        assert (low.float() - full).abs().max() < 0.08 * full.abs().max()
    result[0][0].float().sum().backward()
    assert layer.sdpt_prompts["default"].grad.abs().max() > 0


def test_deepcopy_is_independent():
    layer, inputs = make_layer(), make_inputs()
    expected = flat(layer(*inputs))
    twin = copy.deepcopy(layer)
    assert all(torch.equal(a, b) for a, b in zip(flat(twin(*inputs)), expected, strict=True))
    change_copy(layer, other_weight(layer))
    with torch.no_grad():
        layer.sdpt_prompts["default"].zero_()
    assert all(torch.equal(a, b) for a, b in zip(flat(twin(*inputs)), expected, strict=True))
    twin.load_state_dict(layer.state_dict())
    assert_inverses_are_right(twin, inputs)


def test_pickle():
    layer, inputs = make_layer(), make_inputs()
    twin = pickle.loads(pickle.dumps(layer))
    pairs = zip(flat(twin(*inputs)), flat(layer(*inputs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_meta_layer_gets_its_inverses_with_its_weights(counted, prompt_gate):
    real, inputs = make_layer(prompt_gate=prompt_gate, init_weights=False), make_inputs()
    with torch.device("meta"):
        attention = ATTENTION_CLASSES["grounding_dino"](host_config("grounding_dino")).double()
    config = SDPTConfig(num_virtual_tokens=N, attn_implementation="eager", prompt_gate=prompt_gate)
    layer = SDPTLayer(attention.eval(), GROUNDING_DINO, "default", config)
    assert all(buffer.is_meta for buffer in layer.buffers())
    image, text = (t.to("meta") for t in inputs[:2])
    assert layer(image, text)[0][1].shape == (3 * real.base_layer.num_heads, NV, NL + N)
    meta = counted[0]
    layer.to_empty(device="cpu")
    assert counted[0] == meta  # not of uninitialised memory
    layer.load_state_dict(real.state_dict())
    for result, expected in zip(flat(layer(*inputs)), flat(real(*inputs)), strict=True):
        assert torch.equal(result, expected)


def test_merging_is_refused_with_a_way_out():
    layer = make_layer()
    for operation in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match=r"cannot be merged .* unload\(\)"):
            operation()


def test_compiles_without_graph_breaks():
    layer, inputs = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for result, expected in zip(flat(compiled(*inputs)), flat(layer(*inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    # A change that compiled code cannot compare for, so seen at load time.
    weight = other_weight(layer)
    layer.load_state_dict({"base_layer.vision_proj.weight": weight}, strict=False)
    for result, expected in zip(flat(compiled(*inputs)), flat(append_and_drop(layer, *inputs)), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_the_fused_attention(strict):
    """Without `strict`, fake tensors take the place of weights, and are no reason to call the projections."""
    changes = {"attn_implementation": "fused", "prompt_gate": "zero", "init_weights": False}
    layer, inputs = make_layer(dtype=torch.float32, **changes), make_inputs(torch.float32)
    with torch.no_grad():
        program = torch.export.export(layer, inputs, strict=strict)
        (image, _), (text, _) = layer(*inputs)
        (found_image, _), (found_text, _) = program.module()(*inputs)
    assert torch.allclose(found_image, image, atol=1e-6) and torch.allclose(found_text, text, atol=1e-6)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("scaled_dot_product_attention" in call for call in calls) == 2
    # The tokens and the prompts of the text, and what text tokens read. No projection of image tokens.
    linear = [node for node in program.graph.nodes if "linear" in str(node.target)]
    assert linear and not any(NV in node.meta["val"].shape[:-1] for node in linear)


def test_exports():
    layer, inputs = make_layer(dtype=torch.float32), make_inputs(torch.float32)
    program = torch.export.export(layer, inputs)
    pairs = zip(flat(program.module()(*inputs)), flat(layer(*inputs)), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
