# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SDPTConfig: defaults, rules, JSON."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from peft import PeftConfig
from peft.utils import PeftType

from peft_sdpt import SDPTConfig, __version__


def test_defaults():
    config = SDPTConfig()
    assert config.peft_type == PeftType.SDPT
    assert config.num_virtual_tokens == 20
    assert config.target_modules is None and config.exclude_modules is None and config.layers_to_transform is None
    assert config.init_weights == "normal" and config.prompt_mode == "unified"
    assert config.prompt_gate == "zero" and config.prompt_groups is None and config.fusion_gates is None
    assert config.group_sizes == (20,)
    assert config.image_attends_prompts is True
    assert config.prompt_space == "reachable"
    assert config.pinv_rtol == 0.03 and config.prompt_dropout == 0.0
    assert config.modules_to_save is None and config.fusion_layers is None
    assert not config.is_prompt_learning
    assert config.peft_sdpt_version == __version__


@pytest.mark.parametrize(
    ("field", "value", "rule", "error"),
    [
        ("num_virtual_tokens", 0, "at least 1", ValueError),
        ("num_virtual_tokens", -3, "at least 1", ValueError),
        ("num_virtual_tokens", True, "an integer", TypeError),
        ("num_virtual_tokens", 2.0, "an integer", TypeError),
        ("num_virtual_tokens", "10", "an integer", TypeError),
        ("num_virtual_tokens", None, "an integer", TypeError),
        ("target_modules", "(attn", "a valid regular expression", ValueError),
        ("target_modules", [], "non-empty", ValueError),
        ("target_modules", [""], "non-empty", ValueError),
        ("target_modules", "", "not empty", ValueError),
        ("target_modules", ["attn", 3], "a list of module names", TypeError),
        ("target_modules", 3, "a list of module names", TypeError),
        ("exclude_modules", "(attn", "a valid regular expression", ValueError),
        ("exclude_modules", "", "not empty", ValueError),
        ("exclude_modules", [], "non-empty", ValueError),
        ("exclude_modules", ["attn", 3], "a list of module names", TypeError),
        ("layers_to_transform", -1, "non-negative", ValueError),
        ("layers_to_transform", [0, -1], "non-negative", ValueError),
        ("layers_to_transform", [1, 1], "without repetitions", ValueError),
        ("layers_to_transform", [], "non-empty", ValueError),
        ("layers_to_transform", True, "an integer or a list", TypeError),
        ("layers_to_transform", [0, True], "an integer or a list", TypeError),
        ("layers_to_transform", "0", "an integer or a list", TypeError),
        ("layers_to_transform", 0.0, "an integer or a list", TypeError),
        ("init_weights", "sparse", "one of", ValueError),
        ("init_weights", None, "one of", ValueError),
        ("init_weights", 3, "one of", ValueError),
        ("init_weights", 1, "one of", ValueError),  # 1 equals True
        ("prompt_gate", "x", "None or one of", ValueError),
        ("prompt_gate", True, "None or one of", ValueError),
        ("prompt_gate", 0, "None or one of", ValueError),
        ("prompt_groups", [], "positive and add up to num_virtual_tokens=20", ValueError),
        ("prompt_groups", [19], "positive and add up to num_virtual_tokens=20", ValueError),
        ("prompt_groups", [20, 0], "positive and add up to num_virtual_tokens=20", ValueError),
        ("prompt_groups", [21, -1], "positive and add up to num_virtual_tokens=20", ValueError),
        ("prompt_groups", 20, "None or a list of integers", TypeError),
        ("prompt_groups", {5, 15}, "None or a list of integers", TypeError),  # a set has no order
        ("prompt_groups", "20", "None or a list of integers", TypeError),
        ("prompt_groups", [20.0], "None or a list of integers", TypeError),
        ("prompt_groups", [19, True], "None or a list of integers", TypeError),
        ("prompt_groups", [np.float64(20)], "None or a list of integers", TypeError),
        ("fusion_gates", ["attn"], "a mapping of module names to numbers of sides and heads", TypeError),
        ("fusion_gates", {"attn": 2}, "a mapping of module names to numbers of sides and heads", TypeError),
        ("fusion_gates", {"attn": [2]}, "a mapping of module names to numbers of sides and heads", TypeError),
        ("fusion_gates", {"attn": [2, 0]}, "a mapping of module names to numbers of sides and heads", TypeError),
        ("fusion_gates", {"attn": [2, "4"]}, "a mapping of module names to numbers of sides and heads", TypeError),
        ("fusion_gates", {3: [2, 4]}, "a mapping of module names to numbers of sides and heads", TypeError),
        ("prompt_mode", "shared", "one of", ValueError),
        ("prompt_mode", True, "one of", ValueError),
        ("prompt_space", "whole", "None or one of", ValueError),
        ("prompt_space", True, "None or one of", ValueError),
        ("image_attends_prompts", 1, "True or False", TypeError),
        ("image_attends_prompts", None, "True or False", TypeError),
        ("pinv_rtol", 0, "between 0 and 1", ValueError),
        ("pinv_rtol", 1.0, "between 0 and 1", ValueError),
        ("pinv_rtol", -0.1, "between 0 and 1", ValueError),
        ("pinv_rtol", float("nan"), "between 0 and 1", ValueError),
        ("pinv_rtol", True, "None or a number", TypeError),
        ("pinv_rtol", "0.1", "None or a number", TypeError),
        ("prompt_dropout", 1.0, "below 1", ValueError),
        ("prompt_dropout", -0.1, "at least 0", ValueError),
        ("prompt_dropout", float("nan"), "at least 0", ValueError),
        ("prompt_dropout", False, "a number", TypeError),
        ("prompt_dropout", None, "a number", TypeError),
        ("modules_to_save", "head", "a list of module names", TypeError),
        ("modules_to_save", [1], "a list of module names", TypeError),
        ("modules_to_save", [], "non-empty", ValueError),
        ("lora_rank", 0, "None or at least 1", ValueError),
        ("lora_rank", -8, "None or at least 1", ValueError),
        ("lora_rank", True, "None or an integer", TypeError),
        ("lora_rank", 8.0, "None or an integer", TypeError),
        ("lora_rank", "8", "None or an integer", TypeError),
        ("lora_rank", np.float64(8), "None or an integer", TypeError),
        ("lora_alpha", 16, "None where lora_rank is None", ValueError),
        ("lora_target_modules", ["query"], "None where lora_rank is None", ValueError),
        ("lora_target_modules", [], "non-empty", ValueError),
        ("lora_target_modules", "", "not empty", ValueError),
        ("lora_target_modules", "(query", "a valid regular expression", ValueError),
        ("lora_target_modules", ["query", 3], "a list of module names", TypeError),
        ("lora_layers", ["query"], "a mapping of module names to pairs of integers", TypeError),
        ("lora_layers", {"query": [3]}, "a mapping of module names to pairs of integers", TypeError),
        ("lora_layers", {"query": [3, "4"]}, "a mapping of module names to pairs of integers", TypeError),
        ("fusion_layers", {"attn": 0}, "a mapping of module names to prompt dimensions", TypeError),
        ("fusion_layers", {"attn": "128"}, "a mapping of module names to prompt dimensions", TypeError),
        ("fusion_layers", ["attn"], "a mapping of module names to prompt dimensions", TypeError),
        ("fusion_layers_digest", 1, "None or a string", TypeError),
        ("inference_mode", 1, "True or False", TypeError),
        ("inference_mode", "yes", "True or False", TypeError),
        ("inference_mode", None, "True or False", TypeError),
        ("num_virtual_tokens", np.float64(2), "an integer", TypeError),
        ("num_virtual_tokens", np.bool_(True), "an integer", TypeError),
        ("layers_to_transform", [np.float64(1)], "an integer or a list", TypeError),
        ("peft_sdpt_version", 1, "a version", TypeError),
    ],
)
def test_a_bad_value_names_field_value_and_rule(field, value, rule, error):
    with pytest.raises(error) as caught:
        SDPTConfig(**{field: value})
    message = str(caught.value)
    assert f"SDPTConfig.{field} " in message
    # A single layer index is shown as the list of one that it stands for.
    assert message.endswith((f"got {value!r}", f"got [{value!r}]"))
    assert rule in message


@pytest.mark.parametrize(
    ("value", "rule", "error"),
    [
        (0, "None or positive and at most 1e\\+09", ValueError),
        (-1.0, "None or positive and at most 1e\\+09", ValueError),
        (float("nan"), "None or positive and at most 1e\\+09", ValueError),
        (float("inf"), "None or positive and at most 1e\\+09", ValueError),
        (True, "None or a number", TypeError),
        ("16", "None or a number", TypeError),
    ],
)
def test_a_bad_scaling_of_lora(value, rule, error):
    with pytest.raises(error, match=f"SDPTConfig.lora_alpha must be {rule}, got {value!r}"):
        SDPTConfig(lora_rank=8, lora_alpha=value)


def test_the_scaling_of_lora():
    assert SDPTConfig(lora_rank=8).lora_scaling == SDPTConfig(lora_rank=3).lora_scaling == 2
    assert SDPTConfig(lora_rank=8, lora_alpha=4).lora_scaling == 0.5
    assert SDPTConfig(lora_rank=np.int64(8)).lora_rank == 8


def test_the_prompt_space_of_each_mode():
    assert SDPTConfig().prompt_space == SDPTConfig(fusion_layers={"attn": 128}).prompt_space == "reachable"
    assert SDPTConfig(prompt_mode="independent").prompt_space == "aligned"
    with pytest.raises(ValueError, match=r"SDPTConfig.prompt_space must be 'aligned' or None where prompt_mode is"):
        SDPTConfig(prompt_mode="independent", prompt_space="reachable")


def test_groups_need_gates():
    with pytest.raises(ValueError, match=r"SDPTConfig.prompt_groups must be None where prompt_gate is None, because"):
        SDPTConfig(prompt_gate=None, prompt_groups=[12, 8])
    config = SDPTConfig(num_virtual_tokens=5, prompt_groups=[2, 3])
    assert config.group_sizes == (2, 3) and config.gate_shape([2, 4]) == (2, 2, 4)


def test_a_config_of_before_gates_is_of_the_published_way():
    """Such a config names fusion layers and no gates. A copy may have gates, and belongs to no base model then."""
    old = SDPTConfig(fusion_layers={"attn": 128})
    assert old.prompt_gate is None and old.parameter_shapes() == {"attn.sdpt_prompts": (20, 128)}
    assert SDPTConfig(fusion_layers={"attn": 128}, fusion_gates={}).prompt_gate == "zero"
    old.mark_as_saved(has_weights=False)
    assert old.belongs_to_base_model
    copied = dataclasses.replace(old, prompt_gate="zero")
    assert copied.prompt_gate == "zero" and not copied.belongs_to_base_model


def test_collections_are_normalised():
    assert SDPTConfig(num_virtual_tokens=5, prompt_groups=(2, 3)).prompt_groups == [2, 3]
    assert SDPTConfig(fusion_layers={"attn": 8}, fusion_gates={"attn": (2, 4)}).fusion_gates == {"attn": [2, 4]}
    assert SDPTConfig(layers_to_transform=2).layers_to_transform == [2]
    assert SDPTConfig(layers_to_transform=(2, 0)).layers_to_transform == [2, 0]
    assert SDPTConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]
    assert SDPTConfig(modules_to_save=("head",)).modules_to_save == ["head"]


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = SDPTConfig(lora_rank=2, lora_alpha=np.float32(4), pinv_rtol=np.float64(0.5), prompt_dropout=np.float32(0))
    values = [getattr(config, name) for name in ("lora_alpha", "pinv_rtol", "prompt_dropout")]
    assert values == [4.0, 0.5, 0.0] and {type(value) for value in values} == {float}
    config.save_pretrained(tmp_path)
    assert SDPTConfig(lora_rank=2, lora_alpha=np.int64(4)).lora_scaling == 2.0


def test_integers_of_numpy_are_integers(tmp_path):
    config = SDPTConfig(num_virtual_tokens=np.int64(3), layers_to_transform=np.uint8(2))
    assert type(config.num_virtual_tokens) is int and config.num_virtual_tokens == 3
    assert config.layers_to_transform == [2]
    config = SDPTConfig(num_virtual_tokens=np.int64(3), prompt_groups=(np.int64(2), np.uint8(1)))
    assert [type(size) for size in config.prompt_groups] == [int, int] and config.prompt_groups == [2, 1]
    config.save_pretrained(tmp_path)
    assert SDPTConfig.from_pretrained(tmp_path).prompt_groups == [2, 1]
    config = SDPTConfig(layers_to_transform=[np.int32(0), 1])
    assert [type(index) for index in config.layers_to_transform] == [int, int]
    config.save_pretrained(tmp_path)
    assert SDPTConfig.from_pretrained(tmp_path).layers_to_transform == [0, 1]


def test_bool_init_weights():
    """As in other tuners, True is the default. False, also from a file, starts the gates at random as well."""
    assert SDPTConfig(init_weights=True).init_weights == SDPTConfig().init_weights == "normal"
    assert SDPTConfig(init_weights=False).init_weights is False


def test_json_round_trip(tmp_path):
    config = SDPTConfig(
        num_virtual_tokens=3,
        target_modules=["attn"],
        exclude_modules="nothing",
        layers_to_transform=[0],
        init_weights=False,
        prompt_groups=[1, 2],
        prompt_mode="independent",
        image_attends_prompts=False,
        pinv_rtol=0.1,
        prompt_dropout=0.2,
        modules_to_save=["head"],
        fusion_layers={"layers.0.attn": 128},
        fusion_gates={"layers.0.attn": [1, 4]},
    )
    assert config.prompt_gate == "zero"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SDPT"
    for config_class in (PeftConfig, SDPTConfig):
        loaded = config_class.from_pretrained(tmp_path)
        assert type(loaded) is SDPTConfig
        assert loaded.to_dict() == config.to_dict()


def test_only_an_unchanged_config_of_an_adapter_belongs_to_a_base_model(tmp_path):
    # As attaching fills it in.
    own = SDPTConfig(
        target_modules=["attn"], fusion_layers={"layers.0.attn": 128}, fusion_gates={"layers.0.attn": [2, 4]}
    )
    assert not own.belongs_to_base_model and not dataclasses.replace(own, num_virtual_tokens=8).belongs_to_base_model
    own.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for config in (
        loaded,
        copy.deepcopy(loaded),
        SDPTConfig(**loaded.to_dict()),
        # Fields that do not decide what the prompts are.
        dataclasses.replace(loaded, attn_implementation="eager", inference_mode=True, pinv_rtol=None),
    ):
        assert config.belongs_to_base_model
    for changes in (
        {"num_virtual_tokens": 8},
        {"exclude_modules": ["x"]},
        {"prompt_space": "aligned"},
        {"prompt_gate": None},
        {"prompt_groups": [12, 8]},
        {"image_attends_prompts": False},
        {"fusion_gates": {"layers.0.attn": [2, 8]}},
    ):
        assert not dataclasses.replace(loaded, **changes).belongs_to_base_model
    loaded.target_modules.append("other")
    assert not loaded.belongs_to_base_model


def test_names_of_layers_are_plain():
    config = SDPTConfig(fusion_layers={"_orig_mod.layers.0.attn": 8, "module.layers.1._orig_mod.attn": 8})
    assert config.fusion_layers == {"layers.0.attn": 8, "layers.1.attn": 8}
    config = SDPTConfig(fusion_layers={"attn": 8}, fusion_gates={"_orig_mod.attn": [2, 4]})
    assert config.fusion_gates == {"attn": [2, 4]}
