# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Saving and loading adapters, and refusing those of another host."""

import dataclasses
import json
import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.grounding_dino.modeling_grounding_dino import (
    GroundingDinoBiMultiHeadAttention,
)

from peft_sdpt import SDPTConfig, SDPTLayer
from tests.helpers.detectors import (
    GATES,
    HOST_NAMES,
    LAYERS,
    NUM_GATES,
    REACHED,
    FusionStack,
    acting,
    adapted_layers,
    attach,
    host_config,
    make_host,
    parameter_keys,
    run,
    run_python,
    snapshot,
)


def saved(path, name: str = "grounding_dino", host: dict | None = None, **config):
    """Save an adapter of a tiny host; returns the outputs of the tuned host."""
    model = attach(make_host(name, **(host or {})), **config)
    model.save_pretrained(path)
    return run(model)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prompt_gate": None},
        {"prompt_groups": [1, 3]},
        {"prompt_mode": "independent"},
        {"layers_to_transform": [1]},
        {"image_attends_prompts": False, "pinv_rtol": 0.5, "num_virtual_tokens": 3},
        {"target_modules": r".*\.0\.fusion_layer\.attn"},
    ],
    ids=str,
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_round_trip(name, low_cpu_mem_usage, config, tmp_path):
    tuned = saved(tmp_path, name, **config)
    host = make_host(name)
    bare = run(host)
    model = PeftModel.from_pretrained(host, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(model), tuned) and not torch.equal(tuned, bare)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert torch.equal(run(model), bare)

    trainable = PeftModel.from_pretrained(make_host(name), tmp_path, is_trainable=True)
    keys = parameter_keys(adapted_layers(host))
    if config.get("prompt_gate", "zero") is None:
        keys = {key for key in keys if "sdpt_gates" not in key}
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == keys
    assert torch.equal(run(trainable), tuned)


def test_coordinates_on_a_host_of_lower_precision(tmp_path):
    """Their basis is one of rounded weights there, and nearly the same."""
    saved(tmp_path)
    exact, rounded = (
        PeftModel.from_pretrained(make_host().to(dtype), tmp_path) for dtype in (torch.float32, torch.bfloat16)
    )
    for name in LAYERS:
        one, other = (model.base_model.model.get_submodule(name).tokens() for model in (exact, rounded))
        assert 0 < (one - other).norm() < 0.01 * one.norm()


@pytest.mark.parametrize("prompt_gate", ["zero", None])
def test_the_file_holds_prompts_and_gates_alone(prompt_gate, tmp_path):
    saved(tmp_path, prompt_gate=prompt_gate)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {f"base_model.model.{name}.sdpt_prompts": (4, REACHED) for name in LAYERS}
    if prompt_gate is not None:
        expected |= {f"base_model.model.{name}.sdpt_gates": GATES for name in LAYERS}
    assert shapes == expected
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fusion_layers"] == dict.fromkeys(LAYERS, REACHED)
    assert config["prompt_gate"] == prompt_gate and config["prompt_groups"] is None
    assert config["fusion_gates"] == ({} if prompt_gate is None else {name: [2, 2] for name in LAYERS})
    assert config["num_virtual_tokens"] == 4 and config["peft_type"] == "SDPT"


def test_size_at_the_shapes_of_grounding_dino(tmp_path):
    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            config = host_config("grounding_dino", d_model=256)
            self.layers = nn.ModuleList(GroundingDinoBiMultiHeadAttention(config) for _ in range(6))

    model = get_peft_model(Fusion(), SDPTConfig())
    parameters = 6 * (20 * 512 + NUM_GATES)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * parameters < size < 260_000


def test_load_adapter_beside_another(tmp_path):
    second = saved(tmp_path / "second", seed=8, num_virtual_tokens=2)
    model = attach(make_host())
    first = run(model)
    result = model.load_adapter(tmp_path / "second", "second")
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert torch.equal(run(model), first)
    model.set_adapter("second")
    assert torch.equal(run(model), second)
    model.set_adapter("default")
    assert torch.equal(run(model), first)


def test_saving_one_of_several_adapters(tmp_path):
    model = attach(make_host())
    torch.manual_seed(9)
    model.add_adapter("second", acting(num_virtual_tokens=2))
    model.set_adapter("second")
    second = run(model)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(make_host(), tmp_path / "second", adapter_name="other")
    assert torch.equal(run(loaded), second)


def test_fresh_process(tmp_path):
    tuned = saved(tmp_path)
    code = """
import sys, torch
torch.set_num_threads(1)
import peft_sdpt
from peft import PeftConfig, PeftModel
from tests.helpers.detectors import make_host, run
assert type(PeftConfig.from_pretrained(sys.argv[1])) is peft_sdpt.SDPTConfig
model = PeftModel.from_pretrained(make_host(), sys.argv[1])
torch.save(run(model), sys.argv[1] + "/outputs.pt")
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), tuned)


def test_modules_to_save_round_trip(tmp_path):
    model = attach(FusionStack(), modules_to_save=["head"])
    image, text = torch.randn(2, 5, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
        tuned = model(image, text)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == parameter_keys(["layers.0", "layers.1"], None) | {
        "base_model.model.head.weight",
        "base_model.model.head.bias",
    }
    host = FusionStack()
    host.head.load_state_dict(model.base_model.model.head.original_module.state_dict())
    loaded = PeftModel.from_pretrained(host, tmp_path)
    assert torch.equal(loaded(image, text), tuned)


def test_state_dict_functions_on_an_injected_model():
    model = attach(make_host())
    state = get_peft_model_state_dict(model)
    assert set(state) == parameter_keys(LAYERS, None)
    host = make_host()
    inject_adapter_in_model(SDPTConfig(num_virtual_tokens=4), host, "other")
    assert not torch.equal(run(host), run(model))
    set_peft_model_state_dict(host, state, "other")
    assert torch.equal(run(host), run(model))


def test_injecting_from_a_state_dict():
    model = attach(make_host(), layers_to_transform=[1])
    host = make_host()
    state = get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        inject_adapter_in_model(SDPTConfig(num_virtual_tokens=4), host, state_dict=state)
    assert adapted_layers(host) == LAYERS[1:]
    set_peft_model_state_dict(host, state)
    assert torch.equal(run(host), run(model))
    # The config names the layers that have prompts, and no others.
    assert list(host.peft_config["default"].fusion_layers) == LAYERS[1:]


def test_low_cpu_mem_usage_starts_without_weights_but_with_inverses():
    host = inject_adapter_in_model(SDPTConfig(num_virtual_tokens=4), make_host(), low_cpu_mem_usage=True)
    layer = host.get_submodule(LAYERS[0])
    assert layer.sdpt_prompts["default"].is_meta
    assert not layer.base_layer.vision_proj.weight.is_meta
    exact = torch.linalg.pinv(layer.base_layer.vision_proj.weight.double(), rtol=0.1).float()
    torch.testing.assert_close(layer.inverse(0), exact)
    model = attach(make_host())
    set_peft_model_state_dict(host, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(run(host), run(model))


def test_the_hosts_own_load_adapter(tmp_path):
    tuned = saved(tmp_path)
    host = make_host()
    host.load_adapter(str(tmp_path))
    assert torch.equal(run(host), tuned)


# ---- adapters of another host

OTHER_HOSTS = {
    "wider": ({"d_model": 64}, rf"'{LAYERS[0]}': expected \(4, 128\), found \(4, {REACHED}\)"),
    "more layers": (
        {"layers": 3},
        rf"'{LAYERS[0].replace('0', '2')}': expected \(4, {REACHED}\), found no prompts",
    ),
    "fewer layers": (
        {"layers": 1},
        rf"'{LAYERS[1]}': expected no such fusion layer, found \(4, {REACHED}\)",
    ),
}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", HOST_NAMES)
@pytest.mark.parametrize("other", OTHER_HOSTS)
def test_a_wrong_host_is_refused_and_left_as_it_was(other, name, low_cpu_mem_usage, tmp_path):
    saved(tmp_path, name)
    changes, message = OTHER_HOSTS[other]
    host = make_host(name, **changes)
    before = snapshot(host)
    for load in (
        lambda: PeftModel.from_pretrained(host, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage),
        lambda: PeftModel.from_pretrained(
            host, tmp_path, config=PeftConfig.from_pretrained(tmp_path), is_trainable=True
        ),
        lambda: host.load_adapter(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match=message):
            load()
        assert adapted_layers(host) == []
        assert snapshot(host) == before


@pytest.mark.parametrize("other", OTHER_HOSTS)
def test_a_second_adapter_of_another_host_leaves_the_first_alone(other, tmp_path):
    changes, _ = OTHER_HOSTS[other]
    saved(tmp_path, host=changes)
    model = attach(make_host())
    before, first = snapshot(model), run(model)
    with pytest.raises(ValueError, match=r"made for another base model.*expected .* found"):
        model.load_adapter(tmp_path, "second")
    assert snapshot(model) == before and torch.equal(run(model), first)
    assert list(model.peft_config) == ["default"]
    assert all(list(module.sdpt_prompts) == ["default"] for module in model.modules() if isinstance(module, SDPTLayer))
    assert model.active_adapter == "default"


@pytest.mark.parametrize("kind", ["prompts", "gates"])
@pytest.mark.parametrize("fault", ["another shape", "missing", "surplus"])
def test_weights_that_do_not_fit_are_refused_as_a_whole(fault, kind, tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    key = f"base_model.model.{LAYERS[1]}.sdpt_{kind}"
    shape, wrong = {"prompts": ((4, REACHED), (5, REACHED)), "gates": (GATES, (2, 1, 4))}[kind]
    layer = f"the {kind} of the fusion layer '{LAYERS[1]}'"
    if fault == "another shape":
        weights[key] = torch.zeros(wrong)
        message = f"{layer}: expected {shape}, found {wrong}"
    elif fault == "missing":
        del weights[key]
        message = f"{layer}: expected {shape}, found no {kind}"
    else:
        weights[key.replace("layers.1", "layers.7")] = torch.zeros(shape)
        message = (
            f"the {kind} of the fusion layer '{LAYERS[1].replace('1', '7')}': expected no such fusion layer, found"
        )
    save_file(weights, file)
    model = attach(make_host())
    before = run(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        set_peft_model_state_dict(model, weights)
    assert torch.equal(run(model), before)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(run(model), before)
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=re.escape(message)):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


def test_reloading_weights_into_an_adapter(tmp_path):
    tuned = saved(tmp_path, seed=11)
    model = attach(make_host())
    assert not torch.equal(run(model), tuned)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(run(model), tuned)
    assert "sdpt_inverse" not in " ".join(model.state_dict())


# ---- base models in wrappers


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_compiled_layer() -> nn.Module:
    host = make_host()
    host.model.encoder.layers[0] = compiled(host.model.encoder.layers[0])
    return host


WRAPPED = {
    "plain": make_host,
    "compiled": lambda: compiled(make_host()),
    "compiled layer": with_compiled_layer,
    "DataParallel": lambda: nn.DataParallel(make_host()),
}


@pytest.mark.parametrize(
    "config",
    [{}, {"target_modules": r".*encoder\.layers\.0\.fusion_layer\.attn"}, {"exclude_modules": [LAYERS[1]]}],
    ids=str,
)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_a_wrapped_base_model(wrapper, config, tmp_path):
    model = attach(WRAPPED[wrapper](), **config)
    layers = LAYERS[:1] if config else LAYERS
    assert list(model.peft_config["default"].fusion_layers) == layers
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.module." if wrapper == "DataParallel" else "base_model.model."
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == parameter_keys(layers, None, prefix)
    for make in WRAPPED.values():
        loaded = PeftModel.from_pretrained(make(), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(prompts_of(loaded), prompts_of(model), strict=True))
        assert len(prompts_of(loaded)) == 2 * len(layers)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_config_with_names_of_wrappers(prefix, tmp_path):
    tuned = saved(tmp_path, target_modules=LAYERS)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["fusion_layers_digest"]
    for field in ("fusion_layers", "fusion_gates"):
        config[field] = {prefix + name: value for name, value in config[field].items()}
    config["target_modules"] = [prefix + name for name in config["target_modules"]]
    file.write_text(json.dumps(config))
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), tuned)
    loaded = PeftModel.from_pretrained(compiled(make_host()), tmp_path)
    assert len(prompts_of(loaded)) == 4


def test_compiled_modules_are_not_saved_whole(tmp_path):
    saved(tmp_path, modules_to_save=["enc_output"])
    inner = make_host()
    inner.model.enc_output = compiled(inner.model.enc_output)
    for host in (compiled(make_host()), inner):
        for start in (
            lambda host: PeftModel.from_pretrained(host, tmp_path),
            lambda host: attach(host, modules_to_save=["enc_output"]),
        ):
            with pytest.raises(ValueError, match=r"modules_to_save=.* names '.*enc_output', which is compiled"):
                start(host)
            assert adapted_layers(host) == []
    # Compiled afterwards, it trains on from what it has saved.
    model = attach(make_host(), modules_to_save=["enc_output"])
    again = compiled(model)
    again.save_pretrained(tmp_path / "again")
    model.load_adapter(tmp_path / "again", "default")
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path / "again")), run(model))


def test_modules_that_were_saved_under_compiled_names_are_refused_before_the_base_model_is_touched(tmp_path):
    saved(tmp_path, modules_to_save=["enc_output"])
    file = tmp_path / "adapter_model.safetensors"
    weights = {key.replace("model.enc_output", "_orig_mod.model.enc_output"): v for key, v in load_file(file).items()}
    save_file(weights, file)
    host = make_host()
    before = snapshot(host)
    with pytest.raises(
        ValueError, match=r"_orig_mod\.model\.enc_output.*Rename the key to 'base_model\.model\.model\.enc"
    ):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


def test_a_layer_in_a_checkpoint_wrapper_is_saved_and_loaded(tmp_path):
    model = attach(make_host())
    layers = model.base_model.model.model.encoder.layers
    for index in range(2):
        layers[index] = checkpoint_wrapper(layers[index])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_host(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(prompts_of(loaded), prompts_of(model), strict=True))
    other = attach(make_host(), seed=7)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "default")
    assert all(torch.equal(a, b) for a, b in zip(prompts_of(model), prompts_of(other), strict=True))


def test_a_state_dict_of_several_adapters_loads_the_one_that_is_named():
    model = attach(make_host())
    model.add_adapter("second", SDPTConfig(num_virtual_tokens=4))
    keys = parameter_keys(LAYERS) | parameter_keys(LAYERS, "second")
    state = {key: value for key, value in model.state_dict().items() if key in keys}
    other = attach(make_host(), seed=3)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(run(other), run(model))
    twice = get_peft_model_state_dict(model)
    twice |= {f"module.{key}": value + 1 for key, value in twice.items()}
    with pytest.raises(ValueError, match=f"two keys for the prompts of the fusion layer '{LAYERS[0]}'"):
        set_peft_model_state_dict(other, twice)
    twice = {key: value for key, value in twice.items() if "module." not in key or "gates" in key}
    with pytest.raises(ValueError, match=f"two keys for the gates of the fusion layer '{LAYERS[0]}'"):
        set_peft_model_state_dict(other, twice)


def prompts_of(model: nn.Module) -> list[torch.Tensor]:
    """The prompts and gates of all layers."""
    layers = [module for module in model.modules() if isinstance(module, SDPTLayer)]
    return [p for layer in layers for parameters in (layer.sdpt_prompts, layer.sdpt_gates) for p in parameters.values()]


@pytest.mark.parametrize(
    "prefix", ["module.", "module.module.", "_orig_mod.", "base_model.model.", "module._orig_mod."]
)
def test_keys_with_what_wrappers_put_before_them(prefix, tmp_path):
    tuned = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = {prefix + key: value for key, value in load_file(file).items()}
    save_file(weights, file)
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), tuned)
    model = attach(make_host(), seed=5)
    set_peft_model_state_dict(model, weights)
    assert torch.equal(run(model), tuned)


def test_names_within_another_tuners_model(tmp_path):
    """LoRA's `PeftModel` as the base model puts its own names before those of the fusion layers."""

    def make():
        host = make_host()
        host.config.tie_word_embeddings = False
        return get_peft_model(host, LoraConfig(target_modules=["out_vision_proj"]))

    model = attach(make())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fusion_layers"] == dict.fromkeys(LAYERS, REACHED)
    for host in (make_host(), make()):
        loaded = PeftModel.from_pretrained(host, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(prompts_of(loaded), prompts_of(model), strict=True))


def test_loading_over_a_model_with_sdpt_adapters_names_the_way(tmp_path):
    saved(tmp_path)
    model = attach(make_host(), seed=3)
    before = run(model)
    for load in (
        lambda: PeftModel.from_pretrained(model, tmp_path),
        lambda: PeftModel.from_pretrained(torch.compile(model, backend="eager"), tmp_path, adapter_name="other"),
        lambda: get_peft_model(model, SDPTConfig()),
    ):
        with pytest.raises(
            ValueError, match=r"is a PeftModel with the SDPT adapters \['default'\] already.*load_adapter"
        ):
            load()
    assert torch.equal(run(model), before) and list(model.peft_config) == ["default"]


# ---- configs that are used again


def test_a_changed_config_starts_on_any_base_model(tmp_path):
    saved(tmp_path)
    own = SDPTConfig(num_virtual_tokens=4)
    used = get_peft_model(make_host(), own).peft_config["default"]
    loaded = PeftConfig.from_pretrained(tmp_path)
    changed = [dataclasses.replace(config, num_virtual_tokens=8) for config in (own, used, loaded)]
    for config in (own, used, *changed):
        model = get_peft_model(make_host(d_model=64, layers=3), config)
        assert list(model.peft_config["default"].fusion_layers.values()) == [128] * 3
        assert model.peft_config["default"].num_virtual_tokens == config.num_virtual_tokens
    with pytest.raises(ValueError, match="made for another base model"):
        get_peft_model(make_host(d_model=64, layers=3), loaded)
    loaded.num_virtual_tokens = 8
    assert len(adapted_layers(get_peft_model(make_host(d_model=64, layers=3), loaded))) == 3


@pytest.mark.parametrize("change", [{"attn_implementation": "eager"}, {}], ids=str)
def test_a_config_that_is_given_beside_an_adapter_is_refused_before_the_base_model_is_touched(change, tmp_path):
    saved(tmp_path)
    config = SDPTConfig(**{**PeftConfig.from_pretrained(tmp_path).to_dict(), **change})
    host = make_host(layers=3)
    before = snapshot(host)
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(host, tmp_path, config=config)
    assert snapshot(host) == before


def test_a_config_that_is_changed_after_use_leaves_models_alone():
    config = acting(num_virtual_tokens=4, prompt_groups=[1, 3])
    torch.manual_seed(1)
    first = get_peft_model(make_host(), config)
    before = run(first)
    config.pinv_rtol, config.prompt_space, config.image_attends_prompts, config.num_virtual_tokens = (
        0.3,
        "aligned",
        False,
        2,
    )
    config.prompt_gate = config.prompt_groups = None
    second = get_peft_model(make_host(), config)
    assert torch.equal(run(first.train().eval()), before)
    layer = next(module for module in first.modules() if isinstance(module, SDPTLayer))
    layer.refresh_inverses(force=True)
    assert layer.tokens().shape == (4, 128)
    assert torch.equal(run(first), before) and not torch.equal(run(second), before)


@pytest.mark.parametrize("name", ["fusion_layers_digest", "prompt_space"])
def test_an_adapter_that_was_saved_without_a_field(name, tmp_path):
    """Of an adapter that was saved before the field, another base model is refused before it is touched as well."""
    tuned = saved(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path)), tuned)
    host = make_host(layers=3)
    before = snapshot(host)
    with pytest.raises(ValueError, match="made for another base model"):
        PeftModel.from_pretrained(host, tmp_path)
    assert snapshot(host) == before


def test_a_refused_second_injection_keeps_the_first_config():
    host = inject_adapter_in_model(SDPTConfig(num_virtual_tokens=4), make_host())
    first = host.peft_config["default"]
    with pytest.raises(ValueError, match="layers_to_transform has"):
        inject_adapter_in_model(SDPTConfig(layers_to_transform=7), host)
    assert host.peft_config == {"default": first}
