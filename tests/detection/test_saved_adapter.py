# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter is saved with its processor and class names, all of it or nothing."""

import pytest
import torch
from transformers import AutoProcessor

from peft_sdpt.detection import find_adapter, load_base_model, read_class_names, save_adapter, write_adapter
from peft_sdpt.errors import InputError
from tests.helpers.detectors import ROOT, attach, make_host

HOST = ROOT / "examples" / "host"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(HOST)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_adapter_is_found_again(processor, tmp_path):
    model = attach(make_host())
    written = save_adapter(tmp_path / "new", model, processor, ["dog", "café"], "## Results\n\nAP 0.5")
    assert written == names(tmp_path / "new")
    assert {"adapter_config.json", "adapter_model.safetensors", "class_names.json", "README.md"} <= set(written)
    assert "AP 0.5" in (tmp_path / "new" / "README.md").read_text()
    assert read_class_names(find_adapter(str(tmp_path / "new"))) == ["dog", "café"]
    assert find_adapter(str(tmp_path / "new")).name == "new"
    assert find_adapter(str(tmp_path / "new"), "other").name == "other"

    with (tmp_path / "new" / "README.md").open("a") as card:
        card.write("\nMine.\n")
    save_adapter(tmp_path / "new", model, processor, ["dog"])
    card = (tmp_path / "new" / "README.md").read_text()
    assert "Mine." in card and "AP 0.5" not in card
    write_adapter(tmp_path / "plain", model, processor, ["dog"])
    assert names(tmp_path / "plain") == written


def test_an_adapter_that_cannot_be_saved_leaves_the_old_one(processor, tmp_path, monkeypatch):
    model = attach(make_host())
    save_adapter(tmp_path, model, processor, ["dog"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(processor), "save_pretrained", full)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\)\.$"):
        save_adapter(tmp_path, model, processor, ["cat"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_of_an_adapter_is_not_a_base_model(processor, tmp_path):
    """transformers would load the adapter with its base model, and pass both off as the base model."""
    save_adapter(tmp_path, attach(make_host()), processor, ["dog"])
    with pytest.raises(InputError, match=r"model_name_or_path='.*': is the folder of an adapter; give its base model"):
        load_base_model(tmp_path)
