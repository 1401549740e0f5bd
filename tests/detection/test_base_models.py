# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The config tells which base models can be trained. Every other one raises a one-line error."""

import json
import shutil

import pytest
import torch

from peft_sdpt.detection import GroundedDetectionLoss, load_base_config, load_base_model
from peft_sdpt.errors import InputError
from tests.helpers.detectors import ROOT, attach, make_host, model_inputs
from tests.helpers.tiny import cases

HOST = ROOT / "examples" / "host"
TRAINED = ("grounding_dino", "mm_grounding_dino")


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_each_supported_base_model_is_trained_or_refused(case, tmp_path):
    config = getattr(case.make(), "config", None)
    if hasattr(config, "save_pretrained"):  # the ports of other code bases do not have it
        config.save_pretrained(tmp_path)
    if case.name in TRAINED:
        assert type(load_base_config(tmp_path)) is type(config)
        return
    reason = "must be a Grounding DINO" if (tmp_path / "config.json").exists() else "cannot be loaded as a detector"
    with pytest.raises(InputError, match=reason) as raised:
        load_base_config(tmp_path)
    assert str(raised.value).startswith(f"model_name_or_path={str(tmp_path)!r}: ")


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_not_refused_trains(name):
    model = attach(make_host(name)).train()
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    loss = GroundedDetectionLoss(model.config)(model(**model_inputs()), labels)
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert loss.isfinite() and all(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "owlvit"}, "its type is 'owlvit'"),
        ({"model_type": "clip"}, "its type is 'clip'"),
        ({"model_type": "nosuch"}, "cannot be loaded as a detector"),
        ({"num_queries": "many"}, "cannot be loaded as a detector"),
        ({"focal_alpha": None}, "cannot be loaded as a detector"),
        ({"backbone_config": {"model_type": "nosuch"}}, "cannot be loaded as a detector"),
        ({"backbone_config": 5}, "cannot be loaded as a detector"),
        ({"model_type": ["a"]}, "cannot be loaded as a detector"),
        ({"more": json.loads("[" * 900 + "]" * 900)}, "cannot be loaded as a detector"),
        ({"model_type": "x" * 5000}, "cannot be loaded as a detector"),
        ({"encoder_layers": 10**9}, "'encoder_layers' in its config must be at most 1,000, got 1000000000"),
        ({"backbone_config__depths": [1, 1, 1, 10**9]}, "'depths' in its config must be at most 1,000"),
        ({"text_config__num_hidden_layers": 10**9}, "'num_hidden_layers' in its config must be at most 1,000"),
        ({"num_queries": 10**9}, "'num_queries' in its config must be at most 10,000,000"),
        ({"text_config__max_position_embeddings": 10**400}, "max_position_embeddings' in its config must be at most"),
    ],
)
def test_a_config_of_another_kind_or_a_damaged_one_is_refused(tmp_path, change, message):
    config = json.loads((HOST / "config.json").read_text())
    for name, value in change.items():
        outer, _, inner = name.rpartition("__")
        (config[outer] if outer else config)[inner] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message) as raised:
        load_base_config(tmp_path)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


@pytest.mark.parametrize("change", [{"d_model": -1}, {"activation_function": "nosuch"}, {"decoder_ffn_dim": 10**4}])
def test_a_model_that_cannot_be_built_is_refused(tmp_path, change):
    for file in HOST.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((HOST / "config.json").read_text()) | change))
    with pytest.raises(InputError, match="cannot be loaded as a detector") as raised:
        load_base_model(tmp_path)
    assert str(raised.value).isprintable()


def test_an_adapter_on_the_hub_is_not_a_base_model(hub, tmp_path):
    """transformers would load the adapter together with its base model, or with a model in the same repository."""
    for file in HOST.iterdir():
        shutil.copy(file, tmp_path)
    attach(load_base_model(HOST)).save_pretrained(tmp_path)
    hub.add("user/adapter", tmp_path)
    for load in (load_base_config, load_base_model):
        with pytest.raises(InputError, match="model_name_or_path='user/adapter': is the repository of an adapter"):
            load("user/adapter")


def test_folders_that_are_no_base_model_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as a detector"):
        load_base_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded as a detector"):
        load_base_config(tmp_path)
    shutil.copy(HOST / "config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is the folder of an adapter"):
        load_base_config(tmp_path)
