# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A damaged adapter, or one of somebody else, cannot change the base model, hang, or fill the memory."""

import io
import json
import math
import re

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn

import peft_sdpt
import peft_sdpt.saving
from peft_sdpt import SDPTConfig
from tests.helpers.detectors import (
    LAYERS,
    REACHED,
    FusionStack,
    acting,
    adapted_layers,
    attach,
    make_host,
    model_inputs,
    run,
    snapshot,
)
from tests.helpers.fuzz import time_bound

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PROMPTS = f"{PREFIX}{LAYERS[0]}.sdpt_prompts"


@pytest.fixture
def folder(tmp_path):
    """A saved adapter with a head in `modules_to_save`."""
    attach(make_host(), modules_to_save=["enc_output"]).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder, **tensors):
    weights = load_file(folder / WEIGHTS)
    for key, change in tensors.items():
        weights[key] = change(weights[key]) if callable(change) else change
    save_file(weights, folder / WEIGHTS)


def change_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def loads(folder):
    """All ways to load an adapter, as functions of a base model."""

    def beside_another(host):
        get_peft_model(host, SDPTConfig()).load_adapter(folder, adapter_name="other")

    def over_its_own(host):
        model = attach(host, modules_to_save=["enc_output"])
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))

    return {
        "from_pretrained": lambda host: PeftModel.from_pretrained(host, folder),
        "low_cpu_mem_usage": lambda host: PeftModel.from_pretrained(host, folder, low_cpu_mem_usage=True),
        "config=": lambda host: PeftModel.from_pretrained(host, folder, config=PeftConfig.from_pretrained(folder)),
        "load_adapter": beside_another,
        "transformers": lambda host: host.load_adapter(str(folder)),
        "set_peft_model_state_dict": over_its_own,
    }


WAYS = list(loads(None))


def base_weights(host):
    """The weights of the base model under their plain names."""
    return {
        key.replace("base_layer.", "").replace("original_module.", ""): value.clone()
        for key, value in host.state_dict().items()
        if "sdpt_" not in key and ".modules_to_save." not in key
    }


def check_refused(folder, way, match):
    """Check that loading an adapter in this way raises an error, and that the base model keeps its weights."""
    host = make_host()
    before, weights = snapshot(host), base_weights(host)
    with pytest.raises(ValueError, match=match) as raised:
        loads(folder)[way](host)
    assert len(str(raised.value)) < 3000 and str(raised.value).isprintable()
    assert base_weights(host).keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in base_weights(host).items())
    if way not in ("load_adapter", "set_peft_model_state_dict"):  # these two have attached an adapter before
        assert snapshot(host) == before


# ---- tensors of the base model


STRANGERS = {
    "an inverted projection": (f"{PREFIX}{LAYERS[0]}.base_layer.vision_proj.weight", torch.zeros(128, 32)),
    "the same, of the bare base model": (f"{PREFIX}{LAYERS[0]}.vision_proj.weight", torch.zeros(128, 32)),
    "the box head": (f"{PREFIX}bbox_embed.0.layers.2.bias", torch.full((4,), 9.0)),
    "the base model's copy of a saved module": (
        f"{PREFIX}model.enc_output.original_module.bias",
        torch.zeros(1),
    ),
    "no prefix": ("model.level_embed", torch.zeros(2, 32)),
    "a name with the adapter's": (f"{PREFIX}model.encoder.layers.0.default.weight", torch.zeros(3)),
    "an unknown name": ("anything", torch.zeros(1)),
    "the name of an attribute": (f"{PREFIX}config", torch.zeros(1)),
    "the inverse": (f"{PREFIX}{LAYERS[0]}.sdpt_inverses.side_0_rtol_0_03", torch.zeros(32, 128)),
    "a scale": (f"{PREFIX}{LAYERS[0]}.sdpt_scale", torch.zeros(1)),
}


@pytest.mark.parametrize(
    ("stranger", "way"),
    [*((stranger, "from_pretrained") for stranger in STRANGERS), *(("the box head", way) for way in WAYS[1:])],
)
def test_a_tensor_that_the_config_does_not_declare_is_refused_by_name(stranger, way, folder):
    key, tensor = STRANGERS[stranger]
    change_weights(folder, **{key: tensor})
    if stranger == "the base model's copy of a saved module":
        match = "expected|declare"
    else:
        match = rf"have 1 tensor that its config does not declare, and nothing was loaded.*'{re.escape(key)}'"
    check_refused(folder, way, match)


@pytest.mark.parametrize("name", ["bbox_embed", "vision_proj", "d", "model"])
def test_a_config_that_declares_more_is_refused_unless_all_of_it_is_there(name, folder):
    """So an adapter can replace only complete modules, which its config names."""
    change_config(folder, modules_to_save=["enc_output", name])
    change_weights(folder, **{f"{PREFIX}bbox_embed.0.layers.2.bias": torch.full((4,), 9.0)})
    host = make_host()
    before = snapshot(host)
    with pytest.raises((ValueError, TypeError)):
        PeftModel.from_pretrained(host, folder)
    assert snapshot(host) == before


def test_modules_to_save_without_their_weights_are_refused_before_the_base_model_is_touched(folder):
    weights = load_file(folder / WEIGHTS)
    heads = [key for key in weights if "enc_output" in key]
    assert heads
    save_file({key: value for key, value in weights.items() if key != heads[0]}, folder / WEIGHTS)
    for way in WAYS[:5]:
        check_refused(
            folder, way, r"the tensor '.*enc_output.*' of modules_to_save: expected \(.*, found no such tensor"
        )


def test_without_the_adapter_the_base_model_is_as_before(folder):
    """This also holds if the adapter has a head in `modules_to_save`."""
    change_weights(
        folder, **{key: lambda value: value + 1 for key in load_file(folder / WEIGHTS) if "enc_output" in key}
    )
    for way in WAYS[:3]:
        host = make_host()
        bare, weights = run(host), base_weights(host)
        model = loads(folder)[way](host)
        assert not torch.equal(run(model), bare)
        with model.disable_adapter():
            assert torch.equal(run(model), bare)
        assert all(torch.equal(value, weights[key]) for key, value in base_weights(host).items())


def test_a_tensor_of_another_adapter_is_not_loaded(tmp_path):
    model = attach(make_host())
    model.add_adapter("other", acting())
    model.save_pretrained(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(".other")}
    change_weights(tmp_path, **{f"{PROMPTS}.other": torch.full((20, REACHED), 5.0)})
    model.load_adapter(tmp_path, adapter_name="default")
    assert before and all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    check_refused(tmp_path, "from_pretrained", "declare")


@pytest.mark.parametrize("key", [f"{PROMPTS}.None", f"{PREFIX}{PREFIX}model.enc_output.weight"])
def test_keys_that_peft_could_not_load_are_refused_first(key, folder):
    weights = load_file(folder / WEIGHTS)
    old = PROMPTS if "prompts" in key else f"{PREFIX}model.enc_output.weight"
    weights[key] = weights.pop(old)
    save_file(weights, folder / WEIGHTS)
    check_refused(folder, "from_pretrained", "do not fit|declare")


def test_weights_in_both_formats_are_checked(folder):
    """transformers loads the other file with `use_safetensors=False`."""
    weights = load_file(folder / WEIGHTS)
    torch.save(weights, folder / "adapter_model.bin")
    PeftModel.from_pretrained(make_host(), folder)
    torch.save(weights | {f"{PREFIX}bbox_embed.0.layers.2.bias": torch.full((4,), 9.0)}, folder / "adapter_model.bin")
    check_refused(folder, "transformers", "declare")


@pytest.mark.parametrize("modules", [None, ["model.enc_output_norm"]])
def test_other_modules_to_save_make_a_new_adapter_of_the_same_base_model(modules, folder):
    config = PeftConfig.from_pretrained(folder)
    config.modules_to_save = modules
    run(get_peft_model(make_host(), config))


def test_a_state_dict_of_the_whole_model_is_no_adapter():
    model = attach(make_host())
    with pytest.raises(ValueError, match="tensors that its config does not declare, and nothing was loaded"):
        set_peft_model_state_dict(model, model.state_dict())
    set_peft_model_state_dict(model, get_peft_model_state_dict(model))


def test_the_check_of_transformers_own_way_is_installed_once():
    """The package may be imported again."""
    before = PeftConfig.from_pretrained.__func__
    peft_sdpt._check_what_transformers_loads()
    assert PeftConfig.from_pretrained.__func__ is before and before.checks_sdpt


# ---- numbers


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 1e30, -1e30]


@pytest.mark.parametrize(
    ("kind", "number", "way"),
    [
        *(("prompts", number, "from_pretrained") for number in BAD_NUMBERS),
        *(("gates", math.nan, way) for way in WAYS),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(kind, number, way, folder):
    def put(tensor):
        tensor.view(-1)[-1] = number
        return tensor

    change_weights(folder, **{PROMPTS.replace("prompts", kind): put})
    check_refused(folder, way, rf"damaged, .* finite.* the {kind} of the fusion layer '{re.escape(LAYERS[0])}'")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_are_read(dtype, folder):
    change_weights(folder, **{PROMPTS: lambda value: value.to(dtype)})
    assert run(PeftModel.from_pretrained(make_host(), folder)).isfinite().any()
    change_weights(folder, **{PROMPTS: lambda value: value.float().fill_(math.nan).to(dtype)})
    check_refused(folder, "from_pretrained", "damaged")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_prompts_that_are_no_floating_point_numbers_are_refused(dtype, folder):
    change_weights(folder, **{PROMPTS: lambda value: value.to(dtype)})
    check_refused(folder, "from_pretrained", "damaged")


def test_numbers_of_lora_and_of_saved_modules_are_checked(tmp_path):
    attach(make_host(), lora_rank=2, modules_to_save=["enc_output"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    for part in ("sdpt_lora_A", "sdpt_lora_B", "enc_output"):
        key = next(key for key in weights if part in key)
        for number in (math.nan, -math.inf):
            save_file(weights | {key: torch.full_like(weights[key], number)}, tmp_path / WEIGHTS)
            check_refused(tmp_path, "from_pretrained", "damaged")
    # A buffer may be a mask with infinite numbers.
    peft_sdpt.saving.check_numbers({}, {"a.mask": torch.full((2,), -math.inf)}, "adapter")
    with pytest.raises(ValueError, match="damaged"):
        peft_sdpt.saving.check_numbers({}, {"a.mask": torch.full((2,), math.nan)}, "adapter")


def test_a_size_of_400_digits_is_not_written_out(tmp_path):
    attach(make_host(), lora_rank=2).save_pretrained(tmp_path)
    change_config(tmp_path, lora_rank=10**400)
    check_refused(tmp_path, "from_pretrained", "do not fit its config")


# ---- sizes


@pytest.mark.parametrize("tokens", [10**6, 10**8, 10**400])
@pytest.mark.parametrize("layers", ["named", None, {}])
def test_sizes_are_compared_with_the_header_of_the_file_first(layers, tokens, folder, monkeypatch):
    def allocate(*_, **__):
        raise AssertionError("memory is allocated")

    monkeypatch.setattr("peft_sdpt.layer.init_prompts", allocate)
    monkeypatch.setattr(peft_sdpt.saving, "load_file", allocate)
    change_config(folder, num_virtual_tokens=tokens)
    if layers != "named":
        change_config(folder, fusion_layers=layers)
    check_refused(folder, "from_pretrained", "does not name its fusion layers" if layers is None else "do not fit")
    check_refused(folder, "transformers", "does not name its fusion layers" if layers is None else "do not fit")


@pytest.mark.parametrize(
    "values", [{"num_virtual_tokens": 10**8}, {"num_virtual_tokens": 10**400}, {"lora_rank": 10**7}], ids=str
)
def test_an_adapter_is_smaller_than_its_base_model(values, monkeypatch):
    """A config without weights cannot be compared with the sizes in a file."""
    monkeypatch.setattr("peft_sdpt.layer.init_prompts", lambda *_: pytest.fail("memory is allocated"))
    host = make_host()
    before = snapshot(host)
    for attach_to in (get_peft_model, lambda host, config: inject_adapter_in_model(config, host)):
        with pytest.raises(ValueError, match="which is more than GroundingDinoForObjectDetection itself has"):
            attach_to(host, SDPTConfig(**values))
    assert snapshot(host) == before


def test_weights_as_a_pickle_are_refused_unless_they_are_tensors(folder):
    (folder / WEIGHTS).unlink()
    ran = []

    class Payload:
        def __reduce__(self):
            return ran.append, (1,)

    for weights in ([1, 2], {"a": 1}, {1: torch.zeros(1)}, "x", Payload()):
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        (folder / "adapter_model.bin").write_bytes(buffer.getvalue())
        check_refused(folder, "from_pretrained", "cannot be loaded, and nothing was put on the base model")
        check_refused(folder, "transformers", "cannot be loaded, and nothing was put on the base model")
    assert not ran


def test_a_link_that_leads_nowhere_is_refused(folder):
    for target in ("nowhere", WEIGHTS):
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(target)
        check_refused(folder, "from_pretrained", "cannot be loaded, and nothing was put on the base model")


# ---- regular expressions


CATASTROPHIC = [r"([a-z0-9._]+)+!", r"(a|a)*b|(.*)*!", r"(?:(?:[a-z._0-9]*)*)*!"]


@pytest.mark.parametrize(("pattern", "digest"), zip(CATASTROPHIC, ["right", "wrong", None], strict=True))
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "lora_target_modules"])
def test_a_regular_expression_of_a_stranger_does_not_run(field, digest, pattern, tmp_path):
    attach(make_host(), **({"lora_rank": 2} if field.startswith("lora") else {})).save_pretrained(tmp_path)
    config = SDPTConfig.from_pretrained(tmp_path)
    setattr(config, field, pattern)
    config.save_pretrained(tmp_path)  # writes the right digest
    if digest != "right":
        change_config(tmp_path, fusion_layers_digest=digest and "0123456789abcdef")
    with time_bound():
        for way in ("from_pretrained", "transformers", "load_adapter"):
            loads(tmp_path)[way](make_host())


def test_the_layers_that_an_expression_has_selected_are_loaded(tmp_path):
    for number, options in enumerate(
        ({"target_modules": r".*\.1\.fusion_layer\.attn"}, {"exclude_modules": r".*\.0\.fusion_layer\.attn"})
    ):
        model = attach(make_host(), **options)
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(make_host(), tmp_path / str(number))
        assert adapted_layers(loaded) == [PREFIX + LAYERS[1]] and torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "lora_target_modules"])
def test_an_expression_beside_no_weights_has_a_time_limit(field, tmp_path):
    """Whoever wrote it: names of modules take microseconds to match."""
    options = {"lora_rank": 1} if field.startswith("lora") else {}
    SDPTConfig(**{field: r"((?:[a-z0-9._]|[a-z])+)+[!?]"}, **options).save_pretrained(tmp_path)
    host = make_host()
    before = snapshot(host)
    with time_bound(), pytest.raises(ValueError, match=r"the regular expression '.*' takes too long on the name '"):
        PeftModel.from_pretrained(host, str(tmp_path))
    assert snapshot(host) == before


@pytest.mark.parametrize(
    "pattern", ["(" * 10_000, "a{99999999999999999999}", "[", "(?P<n>)(?P<n>)"], ids=lambda p: p[:9]
)
def test_an_expression_that_cannot_be_compiled_is_refused(pattern):
    with pytest.raises(ValueError, match=r"SDPTConfig\.target_modules must be a valid regular expression") as raised:
        SDPTConfig(target_modules=pattern)
    assert len(str(raised.value)) < 400


# ---- damaged base models


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["vision_proj.weight", "text_proj.weight", "text_proj.bias"])
def test_a_damaged_base_model_is_refused_before_any_layer_is_touched(part, number):
    host = make_host()
    with torch.no_grad():
        host.get_parameter(f"{LAYERS[1]}.{part}").view(-1)[3] = number
    before = snapshot(host)[:3]
    with pytest.raises(ValueError, match=rf"The fusion layer '{re.escape(LAYERS[1])}' \(.*\) cannot be adapted: "):
        attach(host)
    assert snapshot(host)[:3] == before and adapted_layers(host) == []


def test_weights_that_become_damaged_are_refused_in_the_next_forward():
    model = attach(make_host())
    weight = model.get_parameter(f"{PREFIX}{LAYERS[1]}.base_layer.vision_proj.weight")
    good = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        weight[0, 0] = math.inf
    bad = {key: value.clone() for key, value in model.state_dict().items()}
    for damage in (
        lambda: None,
        lambda: model.load_state_dict(bad),
        lambda: (weight.mul_(1e30), model.half(), model.float()),
    ):
        with torch.no_grad():
            damage()
        with pytest.raises(ValueError, match="cannot invert a projection weight with numbers that are not finite"):
            run(model)
        model.load_state_dict(good)
        run(model)


def test_an_injection_that_fails_in_the_middle_is_undone(monkeypatch):
    """This happens if the memory is full."""
    from peft_sdpt.layer import init_prompts

    host, calls = make_host(), []

    def fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return init_prompts(*args)

    monkeypatch.setattr("peft_sdpt.layer.init_prompts", fails)
    before = snapshot(host)
    with pytest.raises(MemoryError):
        attach(host, lora_rank=2)
    assert snapshot(host) == before
    model = attach(host)
    tuned = run(model)
    calls.clear()
    with pytest.raises(MemoryError):
        model.add_adapter("second", acting())
    assert list(model.peft_config) == ["default"] and torch.equal(run(model), tuned)
    model.add_adapter("second", acting())


def fail(*_):
    raise MemoryError


def test_a_combination_that_fails_in_the_middle_is_undone(monkeypatch):
    model = attach(make_host())
    monkeypatch.setattr("peft_sdpt.layer.init_prompts", fail)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["default"], [1.0], "c")
    monkeypatch.undo()
    model.add_weighted_adapter(["default"], [1.0], "c")


def test_an_adapter_that_cannot_be_replaced_stays(monkeypatch):
    host = inject_adapter_in_model(acting(num_virtual_tokens=4), make_host())
    layers = adapted_layers(host)
    monkeypatch.setattr("peft_sdpt.layer.init_prompts", fail)
    with pytest.raises(MemoryError):
        inject_adapter_in_model(acting(num_virtual_tokens=4), host)
    assert adapted_layers(host) == layers and all("default" in host.get_submodule(name).sdpt_prompts for name in layers)
    run(host)


# ---- names of adapters


UNFIT = [
    "__base__",
    "",
    "a.b",
    "keys",
    "sdpt_gates",
    "x" * 300,
    "a\0b",
    "/tmp/x",
    "\ud800",
    "items",
    "training",
    "_parameters",
    "forward",
    "modules_to_save",
    5,
    None,
]


@pytest.mark.parametrize("name", UNFIT)
def test_a_name_with_a_meaning_is_refused_everywhere(name, folder):
    model = attach(make_host(), modules_to_save=["enc_output"])
    state, tuned = list(model.state_dict()), run(model)
    for add in (
        lambda: model.add_adapter(name, SDPTConfig()),
        lambda: model.load_adapter(folder, adapter_name=name),
        lambda: model.base_model.add_weighted_adapter(["default"], [1.0], name),
        lambda: get_peft_model(make_host(), SDPTConfig(), adapter_name=name),
        lambda: PeftModel.from_pretrained(make_host(), folder, adapter_name=name),
        lambda: inject_adapter_in_model(SDPTConfig(), make_host(), adapter_name=name),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            add()
        if isinstance(name, str):
            assert str(raised.value).startswith("adapter_name must be a name without full stops that has no meaning")
    assert list(model.state_dict()) == state and list(model.peft_config) == ["default"]
    assert torch.equal(run(model), tuned)


@pytest.mark.parametrize("name", ["weight", "attn", "0", "model", "enc_output"])
def test_the_name_of_a_part_of_the_model_is_refused_beside_another_adapter(name):
    model = attach(make_host(), modules_to_save=["enc_output"])
    with pytest.raises(ValueError, match=rf"adapter_name='{name}' is also the name of a part of the model"):
        model.add_adapter(name, SDPTConfig())
    assert list(model.peft_config) == ["default"]


def test_the_name_of_a_part_of_the_model_works_alone(tmp_path):
    """PEFT allows such a name. A second adapter then raises an error."""
    model = get_peft_model(make_host(), acting(), adapter_name="attn")
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), tmp_path / "attn")), run(model))
    with pytest.raises(ValueError, match="adapter_name='attn' is also the name of a part of the model"):
        model.add_adapter("second", SDPTConfig())
    assert list(model.peft_config) == ["attn"]


@pytest.mark.parametrize("name", ["sdpt", "default2", "ä ß", "a/b", "bird"])
def test_other_names_work(name, tmp_path):
    model = attach(make_host(), modules_to_save=["enc_output"])
    tuned = run(model)
    model.add_adapter(name, acting(num_virtual_tokens=3, modules_to_save=["enc_output"]))
    assert torch.equal(run(model), tuned)
    model.set_adapter(name)
    other = run(model)
    assert not torch.equal(other, tuned)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_host(), tmp_path)
    loaded.load_adapter(tmp_path / name, adapter_name=name)
    assert torch.equal(run(loaded), tuned)
    loaded.set_adapter(name)
    assert torch.equal(run(loaded), other)
    model.delete_adapter(name)
    assert torch.equal(run(model), tuned)


def test_another_size_under_a_taken_name_says_so(tmp_path):
    attach(make_host(), num_virtual_tokens=7).save_pretrained(tmp_path)
    model = attach(make_host())
    tuned = run(model)
    message = (
        rf"The weights do not fit the SDPT adapter 'default' of this model, and nothing was loaded.*"
        rf"'{re.escape(LAYERS[0])}': expected \(4, {REACHED}\), found \(7, {REACHED}\)"
        ".*To load another adapter beside it, choose another adapter_name"
    )
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(run(model), tuned)
    model.load_adapter(tmp_path, adapter_name="other")


# ---- inference mode


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_inference_mode_can_be_trained(low_cpu_mem_usage, folder):
    def train(model):
        model.train()
        torch.manual_seed(0)
        out = model(**model_inputs())
        (out.logits[out.logits.isfinite()].sum() + out.pred_boxes.sum()).backward()
        torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad]).step()
        return run(model.eval())

    def attached(hosts):
        model = attach(hosts[0], modules_to_save=["enc_output"], lora_rank=2)
        model.add_adapter("second", acting())
        load = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        return model, PeftModel.from_pretrained(hosts[1], folder, **load)

    expected = attached([make_host(), make_host()])
    hosts = [make_host(), make_host()]
    with torch.inference_mode():
        models = attached(hosts)
        before = [run(model) for model in models]
    for model, result, other in zip(models, before, expected, strict=True):
        assert torch.equal(run(model), result) and torch.equal(run(other), result)
        assert torch.equal(train(model), train(other))
        assert not torch.equal(run(model), result)
    models[0].set_adapter("second")
    train(models[0])


def test_a_base_model_of_inference_mode_can_be_used():
    with torch.inference_mode():
        host = make_host()
        model = attach(host)
        assert torch.equal(run(model), run(attach(make_host())))
    with pytest.raises(ValueError, match=r"The base model was made in torch\.inference_mode, and PyTorch cannot train"):
        model.train()(**model_inputs())


@pytest.mark.parametrize("number", BAD_NUMBERS[:3])
def test_tokens_that_are_set_must_be_finite(number):
    layer = attach(make_host()).get_submodule(PREFIX + LAYERS[0])
    before = layer.tokens()
    with pytest.raises(ValueError, match="tokens of 'default' must be finite"):
        layer.set_tokens("default", torch.full_like(before, number))
    assert torch.equal(layer.tokens(), before)


def test_plain_modules_are_checked_too(tmp_path):
    model = get_peft_model(FusionStack(), acting())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights | {f"{PREFIX}head.weight": torch.zeros(3, 32)}, tmp_path / WEIGHTS)
    stack = FusionStack()
    before = {key: value.clone() for key, value in stack.state_dict().items()}
    with pytest.raises(ValueError, match=r"declare.*'base_model\.model\.head\.weight'"):
        PeftModel.from_pretrained(stack, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in stack.state_dict().items())
    assert not any(isinstance(module, nn.ParameterDict) for module in stack.modules())
