# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A saved adapter with random damage raises a named error and keeps the base model unchanged, or loads correctly."""

import copy
import json
import math
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from peft_sdpt import SDPTConfig
from tests.helpers.detectors import LAYERS, adapted_layers, attach, make_host, run
from tests.helpers.fuzz import json_values, scalars, time_bound

pytestmark = pytest.mark.fuzz
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", None, 5]


class Subject:
    """A base model, and the files of an adapter that fits it."""

    def __init__(self, folder):
        self.folder = folder
        attach(make_host(), modules_to_save=["enc_output"], lora_rank=1).save_pretrained(folder)
        self.config = json.loads((folder / CONFIG).read_text())
        self.weights = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", self.weights[:8])
        self.header = json.loads(self.weights[8 : 8 + length])
        self.data = self.weights[8 + length :]
        self.make_host()
        self.bare = run(self.host)
        self.state = {key: value.clone() for key, value in self.host.state_dict().items()}
        self.modules = [(name, type(module)) for name, module in self.host.named_modules()]

    def make_host(self):
        self.host = make_host()

    def check(self, config=None, weights=None):
        """Load an adapter with these files, and check the result or the error."""
        content = (
            config if isinstance(config, bytes) else json.dumps(self.config if config is None else config).encode()
        )
        (self.folder / CONFIG).write_bytes(content)
        (self.folder / WEIGHTS).write_bytes(self.weights if weights is None else weights)
        try:
            with time_bound(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns about fields that it does not know
                model = PeftModel.from_pretrained(self.host, self.folder)
        except Exception as error:
            # PEFT reads the file itself to find the type of the adapter, and raises what it finds.
            if config is None or (isinstance(config, dict) and config.get("peft_type") == "SDPT"):
                assert isinstance(error, (ValueError, TypeError)), repr(error)
                assert any(word in str(error) for word in ("SDPT", "adapter", "task type", "argument")), repr(error)
            assert len(str(error)) < 4000
            assert [(name, type(module)) for name, module in self.host.named_modules()] == self.modules
            self.check_base_model()
            return
        # The adapter has the values of its files, and the base model is unchanged.
        try:
            stored = load_file(self.folder / WEIGHTS)
            assert len(adapted_layers(model)) == len([key for key in stored if key.endswith(".sdpt_prompts")])
            for name, parameter in model.named_parameters():
                if ".sdpt_" in name:
                    saved = stored[name.removesuffix(".default")]
                    assert parameter.shape == saved.shape and torch.equal(parameter, saved.to(parameter))
            assert not run(model).isnan().any()
            with model.disable_adapter():
                assert torch.equal(run(model), self.bare)
        finally:
            self.make_host()

    def check_base_model(self):
        assert all(torch.equal(value, self.state[key]) for key, value in self.host.state_dict().items())


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(tmp_path_factory.mktemp("adapter"))


FIELDS = sorted(SDPTConfig(fusion_layers={"a": 1}).to_dict())


@given(changes=st.dictionaries(st.sampled_from([*FIELDS, "unknown", "__class__"]), json_values | scalars, max_size=2))
def test_configs_with_other_values(subject, changes):
    subject.check({**subject.config, **changes})


@given(data=st.data())
def test_configs_that_are_changed_inside(subject, data):
    """Layers, gates and LoRA layers are missing, renamed, or of another size."""
    config = copy.deepcopy(subject.config)
    field = data.draw(st.sampled_from(["fusion_layers", "fusion_gates", "lora_layers", "modules_to_save"]))
    values = config[field]
    if isinstance(values, dict) and values:
        name = data.draw(st.sampled_from(sorted(values)))
        action = data.draw(st.sampled_from(["delete", "rename", "size", "add"]))
        size = values.pop(name) if action in ("delete", "rename") else values[name]
        if action == "rename":
            values[data.draw(st.sampled_from(LAYERS) | st.text(max_size=9))] = size
        elif action == "size":
            values[name] = data.draw(json_values | st.lists(st.integers(), min_size=2, max_size=2) | st.integers())
        elif action == "add":
            values[data.draw(st.sampled_from(["model.enc_output", "bbox_embed.0", "x", ""]))] = size
    else:
        config[field] = data.draw(json_values)
    for missing in data.draw(st.lists(st.sampled_from(FIELDS), max_size=1)):
        config.pop(missing, None)
    subject.check(config)


@given(data=st.data())
def test_headers_that_are_changed(subject, data):
    """The names, types, shapes and offsets of tensors are changed."""
    header = copy.deepcopy(subject.header)
    base = sorted(subject.state)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(header)))
        action = data.draw(
            st.sampled_from(["rename", "copy", "delete", "dtype", "shape", "offsets", "value", "metadata"])
        )
        other = data.draw(
            st.sampled_from(base).map("base_model.model.{}".format) | st.sampled_from(base) | st.text(max_size=12)
        )
        entry = header[key]
        if action in ("rename", "copy"):
            header[other] = header.pop(key) if action == "rename" else copy.deepcopy(entry)
        elif action == "delete" and len(header) > 1:
            del header[key]
        elif action == "metadata":
            header["__metadata__"] = data.draw(json_values)
        elif not isinstance(entry, dict) or "shape" not in entry:
            continue
        elif action == "dtype":
            entry["dtype"] = data.draw(st.sampled_from(DTYPES))
        elif action == "shape":
            shape = st.lists(st.integers(-1, 2**63), max_size=3)
            sizes = entry["shape"] if isinstance(entry["shape"], list) else [1]
            entry["shape"] = data.draw(shape | st.permutations(sizes) | json_values)
        elif action == "offsets":
            entry["data_offsets"] = data.draw(st.lists(st.integers(-1, 2**63), min_size=2, max_size=2) | json_values)
        else:
            header[key] = data.draw(json_values)
    blob = json.dumps(header).encode()
    subject.check(weights=struct.pack("<Q", len(blob)) + blob + subject.data)


@given(data=st.data())
def test_bytes_that_are_changed(subject, data):
    """In the weights, bits flip, parts are missing or added, or the length of the header is changed."""
    weights = bytearray(subject.weights)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(weights) - 1, 0)))
        action = data.draw(st.sampled_from(["flip", "cut", "insert", "length"]))
        if action == "flip" and weights:
            weights[place] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del weights[place:]
        elif action == "insert":
            weights[place:place] = data.draw(st.binary(max_size=40))
        elif action == "length":
            weights[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    subject.check(weights=bytes(weights))


@given(number=st.floats(width=32), place=st.integers(0, 10**6), key=st.data())
def test_numbers_that_are_changed(subject, number, place, key):
    """Any number in any tensor is loaded as it is, or raises an error."""
    name = key.draw(st.sampled_from(sorted(name for name in subject.header if name != "__metadata__")))
    begin, end = subject.header[name]["data_offsets"]
    position = begin + place % ((end - begin) // 4) * 4
    data = bytearray(subject.data)
    data[position : position + 4] = struct.pack("<f", number)
    (length,) = struct.unpack("<Q", subject.weights[:8])
    subject.check(weights=subject.weights[: 8 + length] + bytes(data))


@given(content=st.binary(max_size=200) | st.integers(1, 10**5).map(lambda depth: b"[" * depth))
def test_a_config_that_is_no_json(subject, content):
    subject.check(config=content)


def test_without_damage_the_adapter_loads(subject):
    """This shows that the tests above do not pass only because loading always fails."""
    subject.check()
    model = PeftModel.from_pretrained(make_host(), subject.folder)
    assert not torch.equal(run(model), subject.bare) and math.isfinite(run(model).nan_to_num(0, 0, 0).sum())
