# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SDPT on whole hosts, through PEFT."""

import copy
import dataclasses
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

import peft_sdpt.hosts
from peft_sdpt import SDPTConfig, SDPTLayer, register_host
from peft_sdpt.hosts import GROUNDING_DINO, HOSTS
from tests.helpers.detectors import (
    GATES,
    HOST_NAMES,
    LAYERS,
    NUM_GATES,
    REACHED,
    WIDTH,
    FusionStack,
    acting,
    adapted_layers,
    attach,
    make_attention,
    make_host,
    model_inputs,
    parameter_keys,
    run,
)


@pytest.fixture(params=HOST_NAMES)
def host(request) -> nn.Module:
    return make_host(request.param)


# ---- attaching and taking off


def test_every_layer_gets_prompts_and_outputs_change(host):
    bare = run(host)
    model = attach(host)
    assert adapted_layers(host) == LAYERS
    assert model.base_model.targeted_module_names == LAYERS
    tuned = run(model)
    finite = bare.isfinite()
    assert torch.equal(finite, tuned.isfinite())
    assert (tuned - bare)[finite].abs().max() > 1e-2


def test_disabled_unloaded_and_deleted_adapters_leave_the_host_bit_for_bit(host):
    bare = run(host)
    names = [name for name, _ in host.named_modules()]
    model = attach(host)
    tuned = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), bare)
    assert torch.equal(run(model), tuned)
    model.add_adapter("second", SDPTConfig(num_virtual_tokens=2))
    model.set_adapter("second")
    model.delete_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(run(host), bare)
    unloaded = model.unload()
    assert unloaded is host and torch.equal(run(host), bare)
    assert [name for name, _ in host.named_modules()] == names
    assert not hasattr(host, "peft_config")
    assert torch.equal(run(attach(host)), tuned)


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_only_prompts_and_gates_train(host, prompt_gate, capsys):
    model = attach(host, prompt_gate=prompt_gate)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {f"base_model.model.{n}.sdpt_prompts.default": (4, REACHED) for n in LAYERS}
    if prompt_gate is not None:
        shapes |= {f"base_model.model.{n}.sdpt_gates.default": GATES for n in LAYERS}
    assert {name: tuple(p.shape) for name, p in trainable.items()} == shapes
    model.print_trainable_parameters()
    number = 2 * (4 * REACHED + (0 if prompt_gate is None else NUM_GATES))
    assert f"trainable params: {number:,} " in capsys.readouterr().out
    host.train()
    outputs = model(**model_inputs())
    (outputs.pred_boxes.sum() + outputs.logits[outputs.logits.isfinite()].sum()).backward()
    for parameter in model.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
    assert all(p.grad.abs().max() > 0 for p in trainable.values())


def test_status_and_repr(host):
    model = attach(host)
    status = model.get_model_status()
    assert status.peft_types == {"default": "SDPT"}
    assert status.adapter_model_type == "SDPTModel"
    assert status.num_adapter_layers == 2 and status.enabled is True
    assert status.trainable_params == 2 * (4 * REACHED + NUM_GATES)
    assert status.requires_grad == {"default": True} and status.merged_adapters == []
    layer_status = model.get_layer_status()
    assert [layer.name for layer in layer_status] == [f"model.{name}" for name in LAYERS]
    assert {layer.module_type for layer in layer_status} == {"SDPTLayer"}
    assert f"embed_dim={WIDTH}" in repr(model)
    assert all(f"({kind}): ParameterDict" in repr(model) for kind in ("sdpt_prompts", "sdpt_gates"))


def test_padding_of_the_text_changes_nothing(host):
    model = attach(host.double())
    outputs = []
    for padding in (0, 5):
        inputs = model_inputs(padding=padding)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            outputs.append(model(**inputs))
    short, long = outputs
    torch.testing.assert_close(long.pred_boxes, short.pred_boxes, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        long.encoder_last_hidden_state_vision,
        short.encoder_last_hidden_state_vision,
        rtol=0,
        atol=1e-9,
    )


def test_samples_of_a_batch_do_not_see_each_other(host):
    model = attach(host.double())
    inputs = model_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        both = model(**inputs).pred_boxes
        alone = [model(**{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(2)]
    for index in range(2):
        torch.testing.assert_close(both[index], alone[index].pred_boxes[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_attention_outputs_have_the_hosts_shapes_and_the_prompt_columns(host, prompt_gate):
    model = attach(copy.deepcopy(host), attn_implementation="eager", prompt_gate=prompt_gate)
    with torch.no_grad():
        bare = host(**model_inputs(), output_attentions=True).encoder_attentions
        tuned = model(**model_inputs(), output_attentions=True).encoder_attentions
    gates = [model.base_model.model.get_submodule(name).sdpt_gates.get("default") for name in LAYERS]
    # Per layer: fused image, fused text, text enhancer, deformable attention.
    grown = []
    # Image tokens read the prompts of the text, the second side, and text tokens those of the image.
    for side, (bare_layers, tuned_layers) in zip((1, 0, None, None), zip(bare, tuned, strict=True), strict=True):
        assert len(bare_layers) == len(tuned_layers) == 2
        for before, after, gate in zip(bare_layers, tuned_layers, gates, strict=True):
            difference = [b - a for a, b in zip(before.shape, after.shape, strict=True)]
            grown.append(difference)
            if difference == [0, 0, 4]:
                ones = torch.ones(after.shape[:-1])
                if gate is None:
                    torch.testing.assert_close(after.sum(-1), ones)
                else:
                    torch.testing.assert_close(after[..., :-4].sum(-1), ones)
                    factors = gate[side, 0].detach().tanh().repeat(len(after) // gate.shape[-1])[:, None]
                    torch.testing.assert_close(after[..., -4:].sum(-1), factors * ones)
    assert grown.count([0, 0, 4]) == 4
    assert all(set(difference) == {0} for difference in grown if difference != [0, 0, 4])


def test_casting_the_model(host):
    model = attach(host)

    def fused(dtype):
        # Before the choice of proposals, which rounding makes in another order.
        inputs = {**model_inputs(), "pixel_values": model_inputs()["pixel_values"].to(dtype)}
        with torch.no_grad():
            return model(**inputs).encoder_last_hidden_state_text

    exact = fused(torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        buffers = [buffer for name, buffer in model.named_buffers() if "sdpt_" in name]
        assert len(buffers) == 6
        assert {buffer.dtype for buffer in buffers} == {torch.promote_types(dtype, torch.float32)}
        low = fused(dtype)
        assert low.dtype == dtype
        assert (low.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_adapter_of_a_bfloat16_host_is_float32_unless_asked_otherwise():
    torch.manual_seed(0)
    model = get_peft_model(make_host().bfloat16(), acting())
    prompts = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in prompts} == {torch.float32}
    pixels = model_inputs()["pixel_values"].bfloat16()
    outputs = model(**{**model_inputs(), "pixel_values": pixels})
    outputs.pred_boxes.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in prompts)
    plain = get_peft_model(make_host().bfloat16(), SDPTConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters() if p.requires_grad} == {torch.bfloat16}
    assert run(plain, pixel_values=pixels).isnan().sum() == 0


def test_deepcopy(host):
    model = attach(host)
    twin = copy.deepcopy(model)
    tuned = run(model)
    assert torch.equal(run(twin), tuned)
    model.unload()
    assert torch.equal(run(twin), tuned)


def test_changed_base_weights_are_seen(host):
    model = attach(host)
    before, generator = run(model), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in LAYERS:
            weight = host.get_submodule(name).base_layer.text_proj.weight
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    changed = run(model)
    assert not torch.equal(changed, before)
    twin = make_host("mm_grounding_dino" if "MM" in type(host).__name__ else "grounding_dino")
    twin.load_state_dict(copy.deepcopy(model).unload().state_dict())
    assert torch.equal(run(attach(twin)), changed)


# ---- which layers


def test_layers_to_transform_picks_by_index(host):
    assert adapted_layers(attach(host, layers_to_transform=1)) == [f"base_model.model.{LAYERS[1]}"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["fusion_layer.attn"], LAYERS),
        ([LAYERS[1]], LAYERS[1:]),
        (["layers.0.fusion_layer.attn"], LAYERS[:1]),
        (r".*encoder\.layers\.\d+\.fusion_layer\.attn", LAYERS),
        (r".*\.1\.fusion_layer\.attn", LAYERS[1:]),
    ],
)
def test_target_modules_narrow(targets, expected):
    model = attach(make_host(), target_modules=targets)
    assert model.base_model.targeted_module_names == expected


def test_target_modules_and_layers_to_transform_both_hold():
    model = attach(
        make_host(layers=3),
        target_modules=r".*\.[12]\.fusion_layer\.attn",
        layers_to_transform=[0, 2],
    )
    assert [name.split(".")[3] for name in model.base_model.targeted_module_names] == ["2"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layers_to_transform": 2}, r"layers_to_transform has \[2\].* has 2 fusion layers"),
        ({"layers_to_transform": [0, 5, 6]}, r"layers_to_transform has \[5, 6\]"),
        ({"target_modules": ["nowhere"]}, r"\['nowhere'\] matches no module.*layers\.0\.fusion"),
        ({"target_modules": ["fusion_layer.attn", "x"]}, r"\['x'\] matches no module"),
        ({"target_modules": "attn"}, r"\['attn'\] matches no module"),
        ({"target_modules": "all-linear"}, r"\['all-linear'\] matches no module"),
        (
            {"target_modules": ["vision_proj"]},
            r"matches 'model\.encoder\.layers\.0\.fusion_layer\.attn\.vision_proj' \(Linear\), which "
            r"is not a fusion layer\. Fusion layers of this base model: model\.encoder\.layers\.0\.fusion_layer\.attn",
        ),
        (
            {"target_modules": r".*fusion_layer.*"},
            r"layers\.0\.fusion_layer' \(GroundingDinoFusionLayer\), which is not a fusion layer",
        ),
        (
            {"target_modules": [LAYERS[0]], "layers_to_transform": [1]},
            r"matches none of the fusion layers that layers_to_transform=\[1\] asks for",
        ),
    ],
)
def test_unfit_targets_are_refused_and_leave_the_host_alone(config, message):
    host = make_host()
    bare, flags = run(host), [p.requires_grad for p in host.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(host, SDPTConfig(**config))
    assert adapted_layers(host) == [] and not hasattr(host, "peft_config")
    assert [p.requires_grad for p in host.parameters()] == flags
    assert torch.equal(run(host), bare)


def test_a_model_without_fusion_layers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no fusion layer .* Grounding DINO, .* \(GroundingDinoBiMul"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), SDPTConfig())


def test_a_class_of_the_right_name_without_the_projections_is_no_host():
    class GroundingDinoBiMultiHeadAttention(nn.Module):
        pass

    with pytest.raises(ValueError, match="has no fusion layer"):
        get_peft_model(nn.Sequential(GroundingDinoBiMultiHeadAttention()), SDPTConfig())


def test_a_subclass_of_a_fusion_attention_is_a_host():
    stack = FusionStack()
    cls = type(stack.layers[0])
    stack.layers[0].__class__ = type("Mine", (cls,), {})
    assert attach(stack).base_model.targeted_module_names == ["layers.0", "layers.1"]


def test_a_config_can_be_used_on_several_hosts():
    config = SDPTConfig()
    first = get_peft_model(make_host(), config)
    assert first.peft_config["default"] is config
    second = get_peft_model(make_host(d_model=64, layers=1), config)
    assert first.peft_config["default"].fusion_layers == dict.fromkeys(LAYERS, REACHED)
    assert second.peft_config["default"].fusion_layers == {LAYERS[0]: 128}


def test_excluded_layers_are_not_adapted():
    for excluded in (["layers.0.fusion_layer.attn"], [LAYERS[0]], r".*\.0\.fusion_layer\.attn"):
        model = attach(make_host(), exclude_modules=excluded)
        assert adapted_layers(model.base_model.model) == LAYERS[1:]
        assert list(model.peft_config["default"].fusion_layers) == LAYERS[1:]
    host = make_host()
    with pytest.raises(ValueError, match=r"exclude_modules=\['attn'\] leaves no fusion layer to adapt; it excludes"):
        attach(host, exclude_modules=["attn"])
    with pytest.raises(ValueError, match="leaves no fusion layer"):
        attach(host, layers_to_transform=[1], exclude_modules=[LAYERS[1]])
    assert adapted_layers(host) == []
    with pytest.warns(UserWarning, match="no modules were excluded"):
        assert adapted_layers(attach(host, exclude_modules=["nowhere"]).base_model.model) == LAYERS


def test_layers_that_are_not_adapted_by_default(monkeypatch, tmp_path):
    """They are adapted where they are named, and do not count in `layers_to_transform`."""

    class OptionalFusion(type(make_attention())):
        pass

    def make():
        host = make_host(layers=3)
        attention = host.get_submodule(LAYERS[0])
        attention.__class__ = OptionalFusion
        return host

    optional = dataclasses.replace(
        GROUNDING_DINO, name="optional", class_names=("OptionalFusion",), adapted_by_default=False
    )
    monkeypatch.setattr(peft_sdpt.hosts, "HOSTS", [*HOSTS])
    register_host(optional)
    layers = [*LAYERS, LAYERS[0].replace("0", "2")]
    for config, expected in (
        ({}, layers[1:]),
        ({"layers_to_transform": [0]}, layers[1:2]),
        ({"target_modules": [layers[0]]}, layers[:1]),
        ({"target_modules": ["fusion_layer.attn"]}, layers),
        ({"target_modules": ["fusion_layer.attn"], "layers_to_transform": [1]}, layers[2:]),
        ({"target_modules": ["fusion_layer.attn"], "exclude_modules": [layers[1]]}, [layers[0], layers[2]]),
    ):
        model = attach(make(), **config)
        assert adapted_layers(model.base_model.model) == expected, config
    with pytest.raises(ValueError, match=r"has \[2\], but GroundingDinoForObjectDetection has 2 fusion layers"):
        attach(make(), layers_to_transform=[2])
    # An adapter of before the spec was known has the same layers.
    attach(make(), layers_to_transform=[1]).save_pretrained(tmp_path)
    assert adapted_layers(PeftModel.from_pretrained(make(), tmp_path).base_model.model) == layers[2:]
    # Nothing but such layers.
    host = make()
    for name in layers[1:]:
        parent, _, child = name.rpartition(".")
        setattr(host.get_submodule(parent), child, nn.Identity())
    with pytest.raises(ValueError, match="has no fusion layer that is adapted by default; name one in target_modules"):
        attach(host)


@pytest.mark.parametrize("name", ["a.b", "", "__base__"])
def test_an_unfit_adapter_name_is_refused_and_leaves_no_trace(name):
    model = attach(make_host())
    before = run(model)
    with pytest.raises(
        ValueError, match=r"adapter_name must be a name without full stops that has no meaning in .*; got"
    ):
        model.add_adapter(name, SDPTConfig())
    model.add_adapter("good", SDPTConfig())
    assert torch.equal(run(model), before) and sorted(model.peft_config) == ["default", "good"]
    host = make_host()
    with pytest.raises(ValueError, match="adapter_name must be"):
        get_peft_model(host, SDPTConfig(), adapter_name=name)
    assert adapted_layers(host) == []


@pytest.mark.parametrize("change", [{"prompt_mode": "x"}, {"num_virtual_tokens": -3}, {"pinv_rtol": 2}])
def test_a_config_that_was_made_invalid_is_refused(change):
    config, host = SDPTConfig(), make_host()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=rf"SDPTConfig\.{next(iter(change))} must be"):
        get_peft_model(host, config)
    assert adapted_layers(host) == []


def test_plain_modules_are_hosts():
    stack = FusionStack().eval()
    image, text = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    bare = stack(image, text)
    model = attach(stack)
    assert not torch.allclose(model(image, text), bare, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(image, text), bare)


# ---- several adapters


def test_adapters_of_different_size_and_layers_take_turns(host):
    model = attach(host)
    first = run(model)
    torch.manual_seed(2)
    model.add_adapter("second", acting(num_virtual_tokens=2, layers_to_transform=[1]))
    assert torch.equal(run(model), first)
    model.set_adapter("second")
    second = run(model)
    assert not torch.equal(second, first)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == parameter_keys(LAYERS[1:], "second")

    model.base_model.set_adapter(["default", "second"])
    both = run(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == parameter_keys(LAYERS) | parameter_keys(LAYERS[1:], "second")

    model.set_adapter("default")
    assert torch.equal(run(model), first)
    model.delete_adapter("second")
    assert torch.equal(run(model), first)
    layer = host.get_submodule(LAYERS[1])
    assert list(layer.sdpt_prompts) == list(layer.sdpt_gates) == list(layer.sdpt_scale) == ["default"]


def test_an_added_adapter_is_frozen_until_it_is_active():
    model = attach(make_host(), layers_to_transform=[0])
    model.add_adapter("second", SDPTConfig())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == parameter_keys(LAYERS[:1])


def test_a_refused_second_adapter_leaves_no_trace():
    model = attach(make_host())
    first, names = run(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"layers_to_transform has \[7\]"):
        model.add_adapter("second", SDPTConfig(layers_to_transform=7))
    assert list(model.peft_config) == ["default"] and torch.equal(run(model), first)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_refused_second_injection_leaves_no_trace():
    host = inject_adapter_in_model(SDPTConfig(), make_host())
    before = run(host)
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(ValueError, match="layers_to_transform has"),
    ):
        inject_adapter_in_model(SDPTConfig(layers_to_transform=7), host, "second")
    assert list(host.peft_config) == ["default"] and torch.equal(run(host), before)


# Which of three adapters are gated.
GATED = {
    "gated": [{}, {}, {}],
    "published": [{"prompt_gate": None}] * 3,
    "both": [{}, {"prompt_gate": None}, {}],
}
with_and_without_gates = pytest.mark.parametrize("gated", GATED)


def three_adapters(host=None, gated="gated"):
    """ "default", "second" (another size, one layer), "third" (hidden from the image); "default" is active."""
    first, second, third = GATED[gated]
    model = attach(host or make_host(), **first)
    torch.manual_seed(5)
    model.add_adapter("second", acting(num_virtual_tokens=2, layers_to_transform=[1], **second))
    model.add_adapter("third", acting(num_virtual_tokens=3, image_attends_prompts=False, **third))
    return model.eval()


@pytest.mark.parametrize(
    "names",
    [
        ["default", "default", "default"],
        ["default", "second", "__base__"],
        ["third", "__base__", "second"],
        ["third", "third", "__base__"],
        ["__base__", "__base__", "__base__"],
    ],
)
@with_and_without_gates
def test_a_mixed_batch_equals_each_sample_alone(host, names, gated):
    model = three_adapters(host, gated)
    inputs = model_inputs(3)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names)
        for index, name in enumerate(names):
            sample = {key: value[index : index + 1] for key, value in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**sample)
            else:
                model.set_adapter(name)
                alone = model(**sample)
                model.set_adapter("default")
            torch.testing.assert_close(mixed.logits[index], alone.logits[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mixed.pred_boxes[index], alone.pred_boxes[0], rtol=1e-4, atol=1e-5)
        # No hook stays behind.
        assert torch.equal(model(**inputs).logits, model(**inputs, adapter_names=None).logits)


@with_and_without_gates
def test_a_mixed_batch_sees_each_prompt_where_it_belongs(host, gated):
    """What the equality above could not tell if prompts did little."""
    model = three_adapters(host, gated)
    outputs = {name: run(model, adapter_names=[name, "default"]) for name in ("default", "second", "third", "__base__")}
    for one, other in itertools.combinations(outputs.values(), 2):
        assert (one - other).nan_to_num().abs().max() > 1e-3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["default", "nosuch"],
            r"non-existing adapter\(s\): nosuch\. This model has the adapters \['default', 'second'",
        ),
        (["default"], "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2"),
        (["__base__"] * 3, "Length of `adapter_names` should be the same as the number of inputs, but got 3 and 2"),
    ],
)
def test_wrong_adapter_names_are_refused(names, message):
    model = three_adapters()
    before = run(model)
    with pytest.raises(ValueError, match=message):
        run(model, adapter_names=names)
    assert torch.equal(run(model), before)


def test_a_mixed_batch_is_for_inference():
    model = three_adapters().train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        run(model, adapter_names=["default", "second"])


def test_a_mixed_batch_takes_modules_to_save_of_each_adapter():
    model = attach(make_host(), modules_to_save=["enc_output"])
    model.add_adapter("second", acting(num_virtual_tokens=2, modules_to_save=["enc_output"]))
    copies = model.base_model.model.model.enc_output.modules_to_save
    with torch.no_grad():
        for index, name in enumerate(("default", "second")):
            copies[name].weight += index + 1.0
        mixed = model.eval()(**model_inputs(), adapter_names=["second", "default"])
        for index, name in enumerate(("second", "default")):
            model.set_adapter(name)
            alone = model(**{key: value[index : index + 1] for key, value in model_inputs().items()})
            torch.testing.assert_close(mixed.logits[index], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_takes_the_hosts_own_module_where_an_adapter_has_no_copy():
    model = attach(make_host(), modules_to_save=["enc_output"])
    model.add_adapter("second", acting(num_virtual_tokens=2))
    with torch.no_grad():
        model.base_model.model.model.enc_output.modules_to_save["default"].weight += 1.0
        mixed = model.eval()(**model_inputs(), adapter_names=["second", "default"])
        alone = attach(make_host())
        alone.add_adapter("second", SDPTConfig(num_virtual_tokens=2))
        alone.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "enc_output" not in k and ".second" in k}, strict=False
        )
        alone.set_adapter("second")
        expected = alone(**{key: value[:1] for key, value in model_inputs().items()})
    torch.testing.assert_close(mixed.logits[0], expected.logits[0], rtol=1e-4, atol=1e-5)


def combined(model, adapters, weights, **options):
    model.base_model.add_weighted_adapter(adapters, weights, "both", **options)
    return model


@pytest.mark.parametrize("prompt_gate", ["zero", None])
@pytest.mark.parametrize("mode", ["unified", "independent"])
def test_cat_is_what_activating_all_gives(host, mode, prompt_gate):
    model = attach(host, prompt_mode=mode, prompt_gate=prompt_gate)
    torch.manual_seed(5)
    model.add_adapter("second", acting(num_virtual_tokens=2, prompt_mode=mode, prompt_gate=prompt_gate))
    combined(model, ["default", "second"], [1.0, 1.0])
    assert model.peft_config["both"].num_virtual_tokens == 6 and model.active_adapters == ["default"]
    assert model.peft_config["both"].prompt_groups == (None if prompt_gate is None else [4, 2])
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".both"))
    model.base_model.set_adapter(["default", "second"])
    active = run(model)
    model.set_adapter("both")
    torch.testing.assert_close(run(model), active)


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_linear_is_the_weighted_sum_of_tokens_and_gates(prompt_gate, tmp_path):
    model = attach(make_host(), prompt_gate=prompt_gate)
    model.add_adapter("second", acting(num_virtual_tokens=4, prompt_gate=prompt_gate))
    combined(model, ["default", "second"], [0.25, -2.0], combination_type="linear")
    for layer in [m for m in model.modules() if isinstance(m, SDPTLayer)]:
        for parameters in (layer.sdpt_prompts, layer.sdpt_gates) if prompt_gate else (layer.sdpt_prompts,):
            expected = 0.25 * parameters["default"] - 2.0 * parameters["second"]
            torch.testing.assert_close(parameters["both"], expected)
        assert prompt_gate or not layer.sdpt_gates
    model.set_adapter("both")
    outputs = run(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(make_host(), tmp_path / "both")
    assert torch.equal(run(loaded), outputs)


def test_one_name_for_all_samples_is_refused():
    model = attach(make_host()).eval()
    with pytest.raises(ValueError, match="adapter_names must be a list with a name for each sample, got 'default'"):
        model(**model_inputs(), adapter_names="default")


def test_containers_in_modules_to_save_are_refused_before_the_host_is_changed():
    host = make_host()
    with pytest.raises(
        TypeError, match=r"modules_to_save=\['bbox_embed'\] names '.*bbox_embed', which is a ModuleList"
    ):
        attach(host, modules_to_save=["bbox_embed"])
    assert adapted_layers(host) == []


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (["default", "second"], [1.0, 1.0]),
            {"combination_type": "svd"},
            "combination_type must be 'cat' or 'linear'",
        ),
        ((["default", "second"], [1.0]), {}, "adapters and weights must be equally long"),
        (("default", [1.0] * 7), {}, "adapters must be a list, got 'default'"),
        ((["default"], 1.0), {}, "weights must be a list, got 1.0"),
        (([], []), {}, "adapters and weights must be equally long, at least 1"),
        ((["default", "nosuch"], [1.0, 1.0]), {}, r"adapters has \['nosuch'\]"),
        ((["default", "second"], [1.0, 1.0]), {}, "needs adapters of one fusion_layers"),
        ((["default", "third"], [1.0, 1.0]), {}, "needs adapters of one image_attends_prompts"),
        (
            (["default", "small"], [1.0, 1.0]),
            {"combination_type": "linear"},
            "needs adapters of one num_virtual_tokens",
        ),
        ((["default", "whole"], [1.0, 1.0]), {}, "has modules_to_save"),
        (
            (["default", "published"], [1.0, 1.0]),
            {},
            r"combination_type 'cat' needs adapters of one prompt_gate; .* have \['zero', None\]",
        ),
        (
            (["default", "published"], [1.0, 1.0]),
            {"combination_type": "linear"},
            r"combination_type 'linear' needs adapters of one prompt_gate",
        ),
        (
            (["default", "groups"], [1.0, 1.0]),
            {"combination_type": "linear"},
            r"combination_type 'linear' needs adapters of one prompt_groups; .* have \[None, \[1, 3\]\]",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_and_leaves_no_trace(arguments, options, message):
    model = three_adapters()
    model.add_adapter("small", SDPTConfig(num_virtual_tokens=2))
    model.add_adapter("whole", SDPTConfig(num_virtual_tokens=4, modules_to_save=["enc_output"]))
    model.add_adapter("published", SDPTConfig(num_virtual_tokens=4, prompt_gate=None))
    model.add_adapter("groups", SDPTConfig(num_virtual_tokens=4, prompt_groups=[1, 3]))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        combined(model, *arguments, **options)
    assert list(model.peft_config) == ["default", "second", "third", "small", "whole", "published", "groups"]
    assert [name for name, _ in model.named_parameters()] == names


def test_another_tuners_adapter_is_not_combined(host):
    host.config.tie_word_embeddings = False  # or PEFT asks the host for its embeddings
    inject_adapter_in_model(LoraConfig(target_modules=["values_text_proj"]), host, "lora")
    model = attach(host)
    with pytest.raises(ValueError, match=r"has \['lora'\], but the SDPT adapters of this model are \['default'\]"):
        combined(model, ["default", "lora"], [1.0, 1.0])


@pytest.mark.parametrize("weight", ["a", None, float("nan"), True])
def test_weights_that_are_not_numbers_are_refused(weight):
    model = attach(make_host())
    with pytest.raises(ValueError, match="weights must be finite numbers, got"):
        model.add_weighted_adapter(["default"], [weight], "new")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("second", "adapter_name 'second' is taken"),
        ("a.b", "must be a name without full stops that has no meaning .*; got 'a.b'"),
        ("__base__", "got '__base__'"),
        ("", "got ''"),
    ],
)
def test_a_combination_of_an_unfit_name_is_refused(name, message):
    model = three_adapters()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["default"], [1.0], name)
    assert list(model.peft_config) == ["default", "second", "third"]


@pytest.mark.parametrize("operation", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_a_way_out(operation):
    model = attach(make_host())
    before = run(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged into weights.*unload\(\)"):
        getattr(model, operation)()
    assert torch.equal(run(model), before)


def test_a_refused_merge_merges_nothing_of_other_tuners():
    model = nn.ModuleDict({"adapted": nn.Linear(32, 32), "stack": FusionStack()})
    inject_adapter_in_model(LoraConfig(target_modules=["adapted"], init_lora_weights=False), model)
    weight = model.adapted.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        tuned = attach(model)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        tuned.merge_and_unload()
    assert torch.equal(model.adapted.base_layer.weight, weight)


# ---- the rest of PEFT's surface


def test_inject_adapter_in_model(host):
    torch.manual_seed(1)
    injected = inject_adapter_in_model(acting(num_virtual_tokens=4), host)
    assert injected is host and adapted_layers(host) == LAYERS
    twin = make_host("mm_grounding_dino" if "MM" in type(host).__name__ else "grounding_dino")
    assert torch.equal(run(host), run(attach(twin)))


def test_modules_to_save_train_whole():
    stack = FusionStack()
    model = attach(stack, modules_to_save=["head"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = {f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert trainable == parameter_keys(["layers.0", "layers.1"]) | whole


def test_a_fusion_layer_that_is_trained_whole_gets_no_prompts():
    model = attach(FusionStack(), modules_to_save=["layers.1"])
    assert model.base_model.targeted_module_names == ["layers.0"]
    assert model.peft_config["default"].fusion_layers == {"layers.0": REACHED}


def test_beside_lora_in_the_same_host():
    host = make_host()
    host.config.tie_word_embeddings = False  # PEFT's LoRA asks this host for embeddings otherwise
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), host)
    with_lora = run(host)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model = attach(host)
    assert adapted_layers(host) == LAYERS
    assert not torch.equal(run(model), with_lora)


def test_a_mixed_batch_picks_among_adapters_of_this_tuner():
    host = make_host()
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"]), host, "lora")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model = attach(host).eval()
    with pytest.raises(
        ValueError, match=r"non-existing adapter\(s\): lora\. This model has the adapters \['default'\]"
    ):
        run(model, adapter_names=["default", "lora"])


def lora_on_the_queries(host) -> list:
    """LoRA on every projection that SDPT inverts; returns its layers."""
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["text_proj", "vision_proj"], init_lora_weights=False), host)
    return [module for module in host.modules() if isinstance(module, LoraLayer)]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_lora_on_an_inverted_projection_is_refused_unless_merged():
    host = make_host()
    lora_layers = lora_on_the_queries(host)
    assert len(lora_layers) == 2 * len(LAYERS)
    before = run(host)
    with pytest.raises(ValueError, match=r"adapter 'default' of another tuner .*Merge or disable it"):
        attach(host)
    assert not any(isinstance(module, SDPTLayer) for module in host.modules())
    assert torch.equal(run(host), before)

    for layer in lora_layers:
        layer.merge()
    model = attach(host)
    merged = run(model)
    assert not torch.equal(merged, before)
    # PEFT unmerges through `.data`, which PyTorch does not count.
    for layer in lora_layers:
        layer.unmerge()
    with pytest.raises(ValueError, match="Merge or disable it"):
        run(model)
    for layer in lora_layers:
        layer.merge()
    torch.testing.assert_close(run(model), merged)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_inverse_follows_a_merge_of_another_tuner():
    host = make_host()
    lora_layers = lora_on_the_queries(host)
    for layer in lora_layers:
        layer.enable_adapters(False)
    model = attach(host)
    before = run(model)
    for layer in lora_layers:
        layer.enable_adapters(True)
        layer.merge()
    merged = run(model)
    assert not torch.equal(merged, before)
    for module in model.modules():
        if isinstance(module, SDPTLayer):
            module.refresh_inverses(force=True)
    assert torch.equal(run(model), merged)


def test_prompts_learn_what_other_prompts_do():
    def fused(model):
        return model(**model_inputs()).encoder_last_hidden_state_text

    with torch.no_grad():
        target = fused(attach(make_host(), seed=2))
    model = attach(make_host())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        loss = (fused(model) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_state_dict_of_the_whole_model_loads_back():
    model, other = attach(make_host()), attach(make_host(seed=5), seed=6)
    assert not torch.equal(run(model), run(other))
    other.load_state_dict(model.state_dict())
    other.get_base_model().load_state_dict(model.get_base_model().state_dict())
    assert torch.equal(run(model), run(other))
