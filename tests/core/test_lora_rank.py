# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens with LoRA outside the fusion layers, as one adapter (`SDPTConfig(lora_rank=...)`)."""

import copy
import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForZeroShotObjectDetection

from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.lora import DEFAULT_LORA_TARGETS, SDPTLoraLayer
from tests.core.test_transformers import make_trainer
from tests.helpers.detectors import (
    HOST_NAMES,
    LAYERS,
    ROOT,
    FusionStack,
    acting,
    attach,
    make_host,
    model_inputs,
    parameter_keys,
    run,
    run_python,
    snapshot,
)
from tests.helpers.hub import OWNER
from tests.helpers.tiny import cases

QUERY = "model.decoder.layers.0.self_attn.query"
VALUE = "model.encoder.layers.1.deformable_layer.self_attn.value_proj"
FUSION = "model.encoder.layers.0.fusion_layer.attn"


def tuned(name="grounding_dino", seed=1, host=None, **config):
    """A tiny host with tokens and LoRA that acts: its matrices B are not zero."""
    model = attach(host or make_host(name), seed, lora_rank=3, **config)
    return moved(model, seed).eval()


def moved(model, seed=1, adapter_name="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            if adapter_name in layer.sdpt_lora_B:
                matrix = layer.sdpt_lora_B[adapter_name]
                matrix.copy_(0.3 * torch.randn(matrix.shape, generator=generator))
    return model


def copy_prompts(source, target):
    """Give the default adapter of a model the prompts and gates of another one's."""
    keys = parameter_keys(LAYERS)
    state = {key: value for key, value in source.state_dict().items() if key in keys}
    assert state.keys() == keys
    target.load_state_dict(state, strict=False)


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SDPTLoraLayer)}


def lora_keys(model):
    return {key for key in get_peft_model_state_dict(model) if "lora" in key}


# ---- attaching


@pytest.mark.parametrize("name", HOST_NAMES)
def test_it_is_what_peft_lora_beside_sdpt_computes_and_trains(name):
    """The three steps that one field replaces: the same layers, outputs and gradients."""
    model = tuned(name)
    host = make_host(name)
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=DEFAULT_LORA_TARGETS), host, "lora")
    other = attach(host)
    theirs = {name: module for name, module in host.named_modules() if hasattr(module, "lora_A")}
    ours = lora_layers(model.base_model.model)
    assert theirs.keys() == ours.keys() and len(ours) > 20
    with torch.no_grad():
        for layer, own in ((theirs[name], ours[name]) for name in ours):
            layer.lora_A["lora"].weight.copy_(own.sdpt_lora_A["default"])
            layer.lora_B["lora"].weight.copy_(own.sdpt_lora_B["default"])
        copy_prompts(model, other)
    assert torch.equal(run(model), run(other))
    for each in (model, other):
        each(**model_inputs()).pred_boxes.sum().backward()
    for name in ours:
        assert torch.equal(theirs[name].lora_A["lora"].weight.grad, ours[name].sdpt_lora_A["default"].grad)
        assert torch.equal(theirs[name].lora_B["lora"].weight.grad, ours[name].sdpt_lora_B["default"].grad)
    assert model.get_nb_trainable_parameters()[0] == other.get_nb_trainable_parameters()[0]


def test_a_new_adapter_starts_as_one_without_lora():
    model = attach(make_host(), lora_rank=3)
    with_tokens = attach(make_host())
    copy_prompts(with_tokens, model)
    assert torch.equal(run(model), run(with_tokens)) and not torch.equal(run(model), run(make_host()))


def test_only_tokens_gates_and_lora_train():
    model = tuned()
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    layers = lora_layers(model)
    assert trained.keys() == {
        *parameter_keys(LAYERS),
        *(f"{name}.sdpt_lora_{which}.default" for name in layers for which in "AB"),
    }
    layer = layers[f"base_model.model.{QUERY}"]
    assert layer.sdpt_lora_A["default"].shape == (3, 32) and layer.sdpt_lora_B["default"].shape == (32, 3)
    assert model.get_nb_trainable_parameters()[0] == sum(shape.numel() for shape in trained.values())
    status = model.get_model_status()
    assert status.peft_types == {"default": "SDPT"} and status.enabled is True
    assert status.requires_grad == {"default": True} and status.active_adapters == ["default"]
    assert status.num_adapter_layers == len(LAYERS) + len(layers)


def test_the_scaling():
    for config, scaling in (({}, 2.0), ({"lora_alpha": 3}, 1.0), ({"lora_alpha": 1.5}, 0.5)):
        layers = lora_layers(attach(make_host(), lora_rank=3, **config))
        assert {layer.sdpt_lora_scaling["default"] for layer in layers.values()} == {scaling}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([QUERY], [QUERY]),
        ((".".join(QUERY.split(".")[2:]),), [QUERY]),
        (["fc1"], [f"model.{part}.fc1" for part in ("encoder.layers.0.deformable_layer",)]),
        (r".*decoder\.layers\.0\.self_attn\.query", [QUERY]),
    ],
    ids=str,
)
def test_lora_target_modules(targets, expected):
    names = [name.removeprefix("base_model.model.") for name in lora_layers(tuned(lora_target_modules=targets))]
    assert set(expected) <= set(names)
    if targets != ["fc1"]:
        assert names == expected


def test_disabled_unloaded_and_deleted_adapters_leave_the_host_bit_for_bit():
    host = make_host()
    bare, names = run(host), [name for name, _ in host.named_modules()]
    model = tuned(host=host)
    outputs = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), bare)
    assert torch.equal(run(model), outputs) and not torch.equal(outputs, bare)
    model.delete_adapter("default")
    assert torch.equal(run(host), bare)
    assert model.unload() is host and torch.equal(run(host), bare)
    assert [name for name, _ in host.named_modules()] == names


def test_merging_is_refused():
    model = tuned()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="cannot be merged into weights"):
            merge()
    layer = next(iter(lora_layers(model).values()))
    for operation in (layer.merge, layer.unmerge):
        with pytest.raises(NotImplementedError, match="cannot be merged into weights"):
            operation()


REFUSED = [
    ({"lora_target_modules": ["nosuch"]}, r"lora_target_modules: \['nosuch'\] matches no module\."),
    ({"lora_target_modules": [QUERY, "nosuch"]}, r"lora_target_modules: \['nosuch'\] matches no module\."),
    ({"lora_target_modules": r".*\.nosuch"}, r"lora_target_modules: \['\.\*\\\\\.nosuch'\] matches no module\."),
    (
        {"lora_target_modules": ["vision_proj"]},
        rf"matches '{FUSION}\.vision_proj', which is in the fusion layer '{FUSION}'\. SDPT inverts weights",
    ),
    ({"lora_target_modules": ["fusion_layer.attn"]}, f"matches '{FUSION}', which is in the fusion layer '{FUSION}'"),
    (
        {"lora_target_modules": ["decoder.layers.0.self_attn"]},
        r"matches 'model\.decoder\.layers\.0\.self_attn', which is not a linear layer \(GroundingDinoMultihead",
    ),
    (
        {"lora_target_modules": [QUERY], "modules_to_save": ["self_attn.query"]},
        r"matches no module outside of modules_to_save=\['self_attn\.query'\]\.",
    ),
    ({"modules_to_save": ["model"]}, "no fusion layer"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=str)
def test_unfit_targets_are_refused_and_leave_the_host_alone(config, message):
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=message):
        attach(host, lora_rank=2, **config)
    assert snapshot(host) == before
    model = attach(host)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", SDPTConfig(lora_rank=2, **config))
    assert list(model.peft_config) == ["default"] and not lora_layers(model)


def test_a_base_model_without_the_default_targets_asks_for_names():
    with pytest.raises(ValueError, match=r"SDPTConfig.lora_rank=2 needs lora_target_modules.*FusionStack has none"):
        attach(FusionStack(), lora_rank=2)
    model = attach(FusionStack(), lora_rank=2, lora_target_modules=["head"])
    assert list(lora_layers(model)) == ["base_model.model.head"]


def test_a_layer_that_is_never_called_is_refused():
    class Host(FusionStack):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(ValueError, match=r"matches 'attention\.out_proj', which nn\.MultiheadAttention never calls"):
        attach(Host(), lora_rank=2, lora_target_modules=["out_proj"])


def test_a_layer_with_an_adapter_of_another_tuner_is_refused():
    host = make_host()
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=[QUERY]), host, "lora")
    with pytest.raises(ValueError, match=r"which has an adapter of another tuner \(peft\.tuners\.lora\.layer\)"):
        attach(host, lora_rank=2)


def test_a_fusion_layer_that_is_not_adapted_can_have_lora():
    inside = f"{LAYERS[1]}.out_vision_proj"
    model = tuned(layers_to_transform=[0], lora_target_modules=[inside])
    assert list(lora_layers(model)) == [f"base_model.model.{inside}"]
    # The saved name stays as it was when another adapter puts a layer around it.
    model.add_adapter("second", SDPTConfig())
    assert lora_keys(model) == {f"base_model.model.{inside}.sdpt_lora_{which}" for which in "AB"}
    with pytest.raises(ValueError, match="is in the fusion layer"):
        model.add_adapter("third", SDPTConfig(layers_to_transform=[0], lora_rank=1, lora_target_modules=[inside]))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_other_base_models_take_lora_by_name(case):
    """The default fits or asks for names; with a name, the layer acts."""
    try:
        get_peft_model(case.make(), SDPTConfig(lora_rank=2))
    except ValueError as error:
        assert "needs lora_target_modules" in str(error)
    host = case.make()
    inside = (*case.layers, *case.shared)
    linear = [name for name, module in host.named_modules() if type(module) is nn.Linear]
    linear = [name for name in linear if not name.startswith(inside) and "out_proj" not in name]
    if linear:  # some hosts are fusion layers and nothing else
        model = get_peft_model(host, SDPTConfig(lora_rank=2, lora_target_modules=linear))
        assert list(lora_layers(host)) == linear
        with model.disable_adapter(), torch.no_grad():
            bare = case.outputs(case.make(), case.inputs(0))
            assert torch.allclose(case.outputs(model, case.inputs(0)), bare, atol=1e-6, equal_nan=True)


# ---- beside other tuners


def test_beside_lora_of_peft():
    host = make_host()
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), host, "lora")
    with_lora = run(host)
    with pytest.raises(ValueError, match=r"lora_target_modules=None means .* and so '.*\.fc1', .* Name other layers"):
        tuned(host=host)
    model = tuned(host=host, lora_target_modules=[QUERY, VALUE])
    assert not any(".lora_A." in key for key in get_peft_model_state_dict(model))
    model.set_adapter("default")
    assert all(layer.active_adapters == ["lora"] for layer in host.modules() if hasattr(layer, "lora_A"))
    with torch.no_grad():
        mixed = model(**model_inputs(), adapter_names=["__base__", "__base__"])
    assert torch.equal(torch.cat([mixed.logits.flatten(), mixed.pred_boxes.flatten()]), with_lora)


def test_lora_of_peft_around_the_layers_leaves_ours_alone(tmp_path):
    model = tuned()
    before = run(model)
    host = model.base_model.model
    host.config.tie_word_embeddings = False
    around = inject_adapter_in_model(LoraConfig(target_modules=["query"]), host, "theirs")
    assert torch.equal(run(around), before)  # B of LoRA is zero
    assert all(layer.active_adapters == ["default"] for layer in lora_layers(host).values())
    host.peft_config = {"default": model.peft_config["default"]}
    torch.save(get_peft_model_state_dict(model), tmp_path / "weights.pt")
    other = attach(make_host(), seed=5, lora_rank=3)
    set_peft_model_state_dict(other, torch.load(tmp_path / "weights.pt"))
    assert torch.equal(run(other), before)


# ---- saving and loading


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 1}, {"lora_target_modules": ["fc1", QUERY]}], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip(low_cpu_mem_usage, config, tmp_path):
    model = tuned(**config)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    host = make_host()
    bare = run(host)
    loaded = PeftModel.from_pretrained(host, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(loaded), run(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(run(loaded), bare)
    trainable = PeftModel.from_pretrained(make_host(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_the_file_and_the_config(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    layers = [name.removeprefix("base_model.model.") for name in lora_layers(model)]
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        *parameter_keys(LAYERS, None),
        *(f"base_model.model.{name}.sdpt_lora_{which}" for name in layers for which in "AB"),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_rank"] == 3 and config["lora_alpha"] is None
    assert config["lora_target_modules"] is None
    linear = {name: make_host().get_submodule(name) for name in layers}
    assert config["lora_layers"] == {name: [each.in_features, each.out_features] for name, each in linear.items()}
    assert PeftConfig.from_pretrained(tmp_path).belongs_to_base_model


def test_fresh_process(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(run(model), tmp_path / "outputs.pt")
    code = (
        "import sys, torch; from peft import PeftModel; from tests.helpers.detectors import make_host, run\n"
        "model = PeftModel.from_pretrained(make_host(), sys.argv[1] + '/adapter')\n"
        "assert torch.allclose(run(model), torch.load(sys.argv[1] + '/outputs.pt'), atol=1e-5, equal_nan=True)\n"
    )
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_hosts_own_load_adapter(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    host = make_host()
    host.load_adapter(str(tmp_path))
    assert torch.equal(run(host), run(model))


def test_the_automatic_class_loads_it(tmp_path):
    base = AutoModelForZeroShotObjectDetection.from_pretrained(ROOT / "examples" / "host")
    model = moved(attach(base, lora_rank=2))
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path)
    assert get_peft_model_state_dict(loaded).keys() == get_peft_model_state_dict(model).keys()
    for key, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, get_peft_model_state_dict(model)[key])


def test_push_and_load(hub):
    model = tuned()
    model.push_to_hub("user/adapter", token=OWNER)
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), "user/adapter")), run(model))
    second = attach(make_host())
    second.load_adapter("user/adapter", "second")
    second.set_adapter("second")
    assert torch.equal(run(second), run(model))


def test_injecting_from_a_state_dict():
    model = tuned(lora_target_modules=[QUERY, VALUE])
    state_dict = get_peft_model_state_dict(model)
    keys = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    host = make_host()
    host = inject_adapter_in_model(SDPTConfig(num_virtual_tokens=4, lora_rank=3), host, state_dict=keys)
    assert list(lora_layers(host)) == list(lora_layers(model.base_model.model))
    set_peft_model_state_dict(host, state_dict)
    assert torch.equal(run(host), run(model))


def test_deepcopy_and_the_state_dict_of_the_whole_model():
    model = tuned()
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), run(model))
    other = tuned(seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), run(model))


@pytest.mark.parametrize("name", [QUERY, QUERY.removesuffix(".query"), "model.decoder"], ids=str)
def test_an_adapter_of_a_compiled_model_loads_on_the_plain_one_and_back(name, tmp_path):
    def compiled():
        host = make_host()
        host.set_submodule(name, torch.compile(host.get_submodule(name), backend="eager"))
        return host

    model = tuned(host=compiled())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == get_peft_model_state_dict(tuned()).keys()
    for host in (make_host(), compiled()):
        loaded = get_peft_model_state_dict(PeftModel.from_pretrained(host, tmp_path))
        assert loaded.keys() == saved.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)


def fault(weights, kind):
    key = f"base_model.model.{QUERY}.sdpt_lora_A"
    if kind == "missing":
        del weights[key]
    elif kind == "surplus":
        weights["base_model.model.model.nosuch.sdpt_lora_B"] = torch.zeros(2, 3)
    else:
        weights[key] = torch.zeros(2, 32)
    return {
        "missing": rf"LoRA matrix '{QUERY}\.sdpt_lora_A': expected \(3, 32\), found no such matrix",
        "surplus": r"LoRA matrix 'model\.nosuch\.sdpt_lora_B': expected no such matrix, found \(2, 3\)",
        "shape": rf"LoRA matrix '{QUERY}\.sdpt_lora_A': expected \(3, 32\), found \(2, 32\)",
    }[kind]


@pytest.mark.parametrize("kind", ["missing", "surplus", "shape"])
def test_weights_that_do_not_fit_are_refused_before_the_host_is_touched(kind, tmp_path):
    tuned().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    message = fault(weights, kind)
    save_file(weights, file)
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


@pytest.mark.parametrize("kind", ["missing", "surplus", "shape"])
def test_a_state_dict_that_does_not_fit_is_refused_as_a_whole(kind):
    model = tuned()
    weights = {key: torch.zeros_like(value) for key, value in get_peft_model_state_dict(model).items()}
    message = fault(weights, kind)
    before = run(model)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, weights)
    assert torch.equal(run(model), before)


def test_two_keys_for_one_matrix_are_refused():
    model = tuned()
    weights = get_peft_model_state_dict(model)
    weights[f"module.base_model.model.{QUERY}.sdpt_lora_A"] = weights[f"base_model.model.{QUERY}.sdpt_lora_A"]
    with pytest.raises(ValueError, match=f"two keys for the LoRA matrix '{QUERY}.sdpt_lora_A'"):
        set_peft_model_state_dict(model, weights)


def test_another_base_model_is_refused_and_left_as_it_was(tmp_path):
    tuned(lora_target_modules=[QUERY, VALUE]).save_pretrained(tmp_path)
    host = make_host(decoder_ffn_dim=48)
    tuned_ffn = attach(make_host(), lora_rank=3, lora_target_modules=["fc1"])
    tuned_ffn.save_pretrained(tmp_path / "fc1")
    before = snapshot(host)
    with pytest.raises(ValueError, match=r"made for another base model.*fc1\.sdpt_lora_B': expected \(48, 3\), found"):
        PeftModel.from_pretrained(host, tmp_path / "fc1")
    assert snapshot(host) == before
    PeftModel.from_pretrained(host, tmp_path)  # has LoRA on attention, which is as wide in both


def test_the_layers_of_a_saved_adapter_do_not_depend_on_the_default(tmp_path, monkeypatch):
    model = tuned()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("peft_sdpt.lora.DEFAULT_LORA_TARGETS", r".*\.fc1")
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), run(model))


def test_a_saved_adapter_on_a_base_model_whose_layer_cannot_have_lora(tmp_path):
    tuned().save_pretrained(tmp_path)
    host = make_host()
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=[QUERY]), host, "lora")
    with pytest.raises(ValueError, match=f"The adapter has LoRA for '{QUERY}', which has an adapter of another tuner"):
        PeftModel.from_pretrained(host, tmp_path)
    host = make_host()
    host.model.decoder.layers[0].self_attn.query = nn.Identity()
    with pytest.raises(ValueError, match=f"The adapter has LoRA for '{QUERY}', which is not a linear layer"):
        PeftModel.from_pretrained(host, tmp_path)


def test_an_adapter_from_before_these_fields_still_belongs_to_its_base_model(tmp_path):
    model = attach(make_host())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    for name in ("lora_rank", "lora_alpha", "lora_target_modules", "lora_layers"):
        assert values.pop(name) is None
    file.write_text(json.dumps(values))
    assert PeftConfig.from_pretrained(tmp_path).belongs_to_base_model
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), run(model))


@pytest.mark.parametrize("change", [{"lora_rank": 2}, {"lora_rank": None, "lora_target_modules": None}], ids=str)
def test_a_changed_config_starts_anew(change, tmp_path):
    tuned().save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    for name, value in change.items():
        setattr(config, name, value)
    assert not config.belongs_to_base_model
    model = get_peft_model(make_host(), config)
    assert len(lora_layers(model)) == (0 if change["lora_rank"] is None else len(config.lora_layers))


def test_a_config_can_be_used_on_several_hosts():
    config = SDPTConfig(lora_rank=2, lora_target_modules=["fc1"])
    first, second = get_peft_model(make_host(), config), get_peft_model(make_host(decoder_ffn_dim=48), config)
    sizes = [model.peft_config["default"].lora_layers["model.decoder.layers.0.fc1"] for model in (first, second)]
    assert sizes == [[32, 64], [32, 48]]


# ---- several adapters


def several():
    """One adapter with LoRA, one without, and one with LoRA on other layers."""
    model = tuned()
    torch.manual_seed(2)
    model.add_adapter("plain", acting(num_virtual_tokens=2))
    model.add_adapter("other", acting(num_virtual_tokens=3, lora_rank=1, lora_target_modules=["fc1", QUERY]))
    return moved(model, 3, "other")


def test_adapters_with_and_without_lora_take_turns(tmp_path):
    model = several()
    outputs = {}
    for name in ("default", "plain", "other"):
        model.set_adapter(name)
        outputs[name] = run(model)
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {name}
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("plain", tmp_path / "plain"), ("other", tmp_path / "other")):
        assert torch.equal(run(PeftModel.from_pretrained(make_host(), folder)), outputs[name])
    assert not any("lora" in key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors"))


@pytest.mark.parametrize("deleted", ["default", "other", "plain"])
def test_after_deleting_the_active_adapter_all_layers_agree(deleted):
    model = several()
    model.set_adapter(deleted)
    model.delete_adapter(deleted)
    active = sorted({"default", "other", "plain"} - {deleted})[:1]
    assert model.active_adapters == active
    layers = [module for module in model.modules() if isinstance(module, (SDPTLayer, SDPTLoraLayer))]
    assert all(layer.active_adapters == active for layer in layers)
    kept = run(model)
    model.set_adapter(active[0])
    assert torch.equal(run(model), kept)


def test_several_active_adapters():
    model = several()
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    layer = lora_layers(model)[f"base_model.model.{QUERY}"]
    x = torch.randn(2, 5, 32)
    expected = layer.base_layer(x)
    for name in ("default", "other"):
        matrices = layer.sdpt_lora_B[name] @ layer.sdpt_lora_A[name] * layer.sdpt_lora_scaling[name]
        expected = expected + x @ matrices.T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    model.set_adapter("default")
    assert not torch.equal(run(model), both)


@pytest.mark.parametrize("names", [["default", "plain"], ["other", "__base__"], ["other", "default"]], ids=str)
def test_a_mixed_batch_equals_each_sample_alone(names):
    model = several()
    inputs = model_inputs()
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names)
        for index, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**inputs)
            else:
                model.set_adapter(name)
                alone = model(**inputs)
            assert torch.allclose(mixed.logits[index], alone.logits[index], atol=1e-5)
            assert torch.allclose(mixed.pred_boxes[index], alone.pred_boxes[index], atol=1e-5)


def test_a_mixed_batch_needs_a_name_for_each_sample():
    layer = lora_layers(tuned())[f"base_model.model.{QUERY}"]
    with pytest.raises(ValueError, match=r"`adapter_names` should be the same as the number of inputs, but got 3 and"):
        layer(torch.randn(2, 5, 32), adapter_names=["default"] * 3)


def test_adapters_with_lora_are_not_combined():
    model = several()
    with pytest.raises(ValueError, match="adapter 'default' has lora_rank=3, which cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "both")
    assert "both" not in model.peft_config


@pytest.mark.parametrize("name", ["self_attn.query", "model.decoder"])
def test_a_module_with_lora_is_not_trained_whole_by_another_adapter(name):
    model = tuned()
    before = run(model)
    with pytest.raises(ValueError, match=r"modules_to_save=.* names '.*', which has the LoRA part of another SDPT"):
        model.add_adapter("second", SDPTConfig(modules_to_save=[name]))
    assert list(model.peft_config) == ["default"] and torch.equal(run(model), before)


def test_modules_to_save_beside_lora(tmp_path):
    model = tuned(modules_to_save=["enc_output"])
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), run(model))


# ---- precision, quantisation, compilation


def test_a_host_in_half_precision():
    model = tuned(host=make_host().to(torch.bfloat16))
    matrices = [p for name, p in model.named_parameters() if "sdpt_lora" in name]
    assert {p.dtype for p in matrices} == {torch.float32}
    inputs = model_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    layer, x = lora_layers(model)[f"base_model.model.{QUERY}"], torch.randn(2, 5, 32).bfloat16()
    assert layer(x).dtype == torch.bfloat16 and not torch.equal(layer(x), layer.base_layer(x))
    assert model(**inputs).logits.isfinite().any()
    torch.manual_seed(1)
    config = SDPTConfig(lora_rank=2)
    plain = get_peft_model(make_host().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for name, p in plain.named_parameters() if "sdpt_lora" in name} == {torch.bfloat16}


def test_a_quantised_layer():
    host = FusionStack()
    host.head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    host = torch.ao.quantization.quantize_dynamic(host, {"head.0"}, torch.qint8)
    model = moved(attach(host, lora_rank=2, lora_target_modules=["head.0"]))
    layer = lora_layers(model)["base_model.model.head.0"]
    x = torch.randn(4, 32)
    matrices = layer.sdpt_lora_B["default"] @ layer.sdpt_lora_A["default"] * 2
    assert torch.allclose(layer(x), layer.base_layer(x) + x @ matrices.T, atol=1e-6)


def test_it_compiles_without_graph_breaks():
    layer = lora_layers(tuned())[f"base_model.model.{QUERY}"]
    x = torch.randn(2, 5, 32)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


# ---- training and cards


def test_the_trainer_resumes_with_the_same_weights(tmp_path):
    model = attach(make_host(), lora_rank=2)
    make_trainer(model, tmp_path).train()
    weights = get_peft_model_state_dict(model)
    assert any(value.any() for key, value in weights.items() if key.endswith("lora_B"))
    resumed = attach(make_host(), seed=2, lora_rank=2)
    make_trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = get_peft_model_state_dict(resumed)
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


def test_the_card_tells_of_lora(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    size = sum(p.numel() for name, p in model.named_parameters() if "sdpt_lora" in name)
    assert (
        f"| LoRA | rank 3, scaled by 2, on {len(lora_layers(model))} linear layers, {size:,} parameters in total"
        in text
    )
    attach(make_host()).save_pretrained(tmp_path / "plain")
    assert "LoRA" not in ModelCard.load(tmp_path / "plain" / "README.md").text


def test_prompts_where_another_adapter_has_lora_on_an_inverted_projection_are_refused():
    model = tuned(layers_to_transform=[0], lora_target_modules=[f"{LAYERS[1]}.vision_proj"])
    for active in (True, False):
        if not active:
            model.add_adapter("plain", SDPTConfig(layers_to_transform=[0]))
            model.set_adapter("plain")
        with pytest.raises(ValueError, match=r"adapters \['default'\] have LoRA on a projection that SDPT inverts"):
            model.add_adapter("second", SDPTConfig())
    assert set(model.peft_config) == {"default", "plain"}


def test_a_mixed_batch_where_prompts_pass_lora_of_another_adapter():
    """The value projection of a fusion layer with prompts gets them once for all samples."""
    model = tuned(layers_to_transform=[0], lora_target_modules=[f"{LAYERS[1]}.values_text_proj"])
    model.add_adapter("second", SDPTConfig(num_virtual_tokens=3, init_weights=False))
    model.eval()
    mixed = model(**model_inputs(), adapter_names=["default", "second"]).pred_boxes
    for place, name in enumerate(("default", "second")):
        alone = model(**model_inputs(), adapter_names=[name] * 2).pred_boxes
        assert torch.allclose(mixed[place], alone[place], atol=1e-5)


def test_a_default_device_of_meta_leaves_lora_on_the_cpu():
    host = make_host()
    with torch.device("meta"):
        model = get_peft_model(host, SDPTConfig(lora_rank=2))
    assert {parameter.device.type for parameter in model.parameters() if parameter.requires_grad} == {"cpu"}


def test_the_default_layers_are_those_of_grounding_dino_alone():
    case = next(case for case in cases() if "omdet" in case.name)
    with pytest.raises(ValueError, match="needs lora_target_modules"):
        get_peft_model(case.make(), SDPTConfig(lora_rank=2))
