# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Importing the package makes SDPT a method of PEFT, once."""

import importlib
import pickle
import sys

import pytest
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

import peft_sdpt
from peft_sdpt import SDPTConfig, SDPTLayer, SDPTModel
from peft_sdpt.lora import SDPTLoraLayer
from tests.helpers.detectors import run_python


def test_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SDPT] is SDPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SDPT] is SDPTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SDPT] == "sdpt_" == SDPTModel.prefix
    assert SDPTModel.tuner_layer_cls == (SDPTLayer, SDPTLoraLayer)
    assert PeftType("SDPT") is PeftType.SDPT
    assert pickle.loads(pickle.dumps(PeftType.SDPT)) is PeftType.SDPT
    assert list(PeftType).count("SDPT") == 1
    assert set(peft_sdpt.__all__) == {
        *("SDPTConfig", "SDPTLayer", "SDPTModel"),
        *("initialize_sdpt_prototypes", "register_host"),
    }
    assert peft_sdpt.__version__


def test_reload_changes_nothing():
    before = list(PeftType)
    importlib.reload(peft_sdpt)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SDPT] is SDPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SDPT] is SDPTModel


def test_import_after_its_modules_were_dropped(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft_sdpt"]:
        monkeypatch.delitem(sys.modules, name)
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        monkeypatch.setitem(mapping, PeftType.SDPT, mapping[PeftType.SDPT])  # restored afterwards
    again = importlib.import_module("peft_sdpt")
    assert again.SDPTConfig is not SDPTConfig
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SDPT] is again.SDPTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SDPT] is again.SDPTModel
    assert list(PeftType).count("SDPT") == 1


def test_a_method_of_the_same_name_is_a_clear_error(monkeypatch):
    class SDPTModelOfPeft:
        __module__ = "peft.tuners.sdpt.model"

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SDPT, SDPTModelOfPeft)
    with pytest.raises(ImportError, match=r"already has a method SDPT, peft\.tuners\.sdpt\.model"):
        importlib.reload(peft_sdpt)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SDPT] is SDPTModelOfPeft


def test_loading_needs_the_import_and_only_that(tmp_path):
    SDPTConfig(num_virtual_tokens=7).save_pretrained(tmp_path)
    code = """
import sys, traceback
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except Exception:
    traceback.print_exc()
import peft_sdpt
import peft_sdpt
config = PeftConfig.from_pretrained(sys.argv[1])
print(type(config).__name__, config.num_virtual_tokens)
"""
    process = run_python(code, str(tmp_path))
    assert process.stderr.rstrip().endswith("KeyError: 'SDPT'")
    assert process.stdout.split() == ["SDPTConfig", "7"]
    assert type(PeftConfig.from_pretrained(tmp_path)) is SDPTConfig
