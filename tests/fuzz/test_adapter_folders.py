# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files beside an adapter are read correctly, or raise an error of one line, within a time limit."""

import copy
import functools
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from peft_sdpt.detection import (
    InputError,
    common_base_model,
    find_adapter,
    load_base_model,
    load_processor,
    read_class_names,
    read_threshold,
    save_adapter,
    split_classes,
)
from peft_sdpt.detection.grounding import clean_name
from peft_sdpt.detection.saved_adapter import MAX_IMAGE_SIZE, PROCESSOR_FILES
from tests.helpers.detectors import ROOT, attach
from tests.helpers.fuzz import BAD_STRINGS, json_values, time_bound

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("offline")]

HOST = ROOT / "examples" / "host"
FILES = (
    *("adapter_config.json", "class_names.json", "detection.json", "processor_config.json"),
    *("tokenizer_config.json", "tokenizer.json"),
)
# Bytes that are not JSON, or JSON that is hard to read.
DAMAGE = (
    b"",
    b"{",
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b"\xff\xfe",
    b"9" * 5000,
    b'"\\ud800"',
    b"NaN",
    b"\x00" * 100,
    b"\xef\xbb\xbf{}",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A saved adapter, and the content of its files."""
    folder = tmp_path_factory.mktemp("good")
    threshold = {"threshold": 0.3, "f1": 0.5, "precision": 0.5, "recall": 0.5, "split": "val"}
    torch.manual_seed(0)
    model = attach(load_base_model(HOST))
    save_adapter(folder, model, AutoProcessor.from_pretrained(HOST), ["dog", "red apple"], threshold=threshold)
    return folder, {name: json.loads((folder / name).read_text()) for name in FILES}


@pytest.fixture(scope="module")
def folder(good, tmp_path_factory):
    """A copy of the adapter, of which each test changes one file at a time."""
    return shutil.copytree(good[0], tmp_path_factory.mktemp("changed") / "adapter")


@functools.cache
def good_processor():
    return load_processor(None, HOST)


def read(folder, changed):
    """Read the files that `sdpt-detect` reads before the weights. Read the processor only if its files have changed."""
    adapter = find_adapter(str(folder))
    names, threshold = read_class_names(adapter), read_threshold(adapter)
    base_model = common_base_model([adapter])
    processor = load_processor(adapter, HOST) if changed in PROCESSOR_FILES else good_processor()
    split_classes(names, processor.tokenizer, 256)
    return names, threshold, base_model, processor


def check(folder, changed) -> None:
    """Read a folder, and check that the result is correct or the error has one line."""
    with time_bound():
        try:
            names, threshold, base_model, processor = read(folder, changed)
        except InputError as error:
            message = str(error)
            assert message.isprintable() and 20 < len(message) < 2000, message
            return
    assert all(isinstance(name, str) and name == clean_name(name) != "" for name in names)
    assert threshold is None or 0 <= threshold < 1
    assert isinstance(base_model, str) and base_model.isprintable()
    size = dict(processor.image_processor.size)
    assert min(size.values()) <= MAX_IMAGE_SIZE and all(isinstance(edge, int) and edge > 0 for edge in size.values())
    assert max(processor.tokenizer("a red dog.")["input_ids"]) < 30_000


def places(value, path=()):
    """Return the paths of all values in a JSON value, but only of a few values of a long list."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in [*inner][:40]:
        yield from places(each, (*path, name))


def test_the_folder_is_good(good):
    names, threshold, base_model, _ = read(good[0], FILES[-1])
    assert (names, threshold, base_model) == (["dog", "red apple"], 0.3, str(HOST))


@given(st.data())
def test_any_value_in_a_file(good, folder, data):
    name = data.draw(st.sampled_from(FILES))
    content = copy.deepcopy(good[1][name])
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([*places(content)][1:] or [(0,)]))
        inner = content
        for part in path:
            inner = inner[part]
        if isinstance(inner, dict) and data.draw(st.integers(0, 4)) == 0:
            inner.pop(last, None)
        else:
            inner[last] = data.draw(json_values | st.sampled_from((10**9, 4096, 4097)))
    file = folder / name
    try:
        file.write_text(json.dumps(content))
        check(folder, name)
    finally:
        shutil.copy(good[0] / name, file)


@given(
    st.sampled_from(FILES),
    st.sampled_from(DAMAGE) | st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()),
)
def test_any_file(good, folder, name, content):
    file = folder / name
    try:
        file.write_bytes(content)
        check(folder, name)
    finally:
        shutil.copy(good[0] / name, file)


@given(st.sampled_from(FILES), st.integers(0, 2000), st.integers(0, 2000), st.binary(max_size=4))
def test_damaged_bytes(good, folder, name, start, length, put):
    file = folder / name
    content = file.read_bytes()
    try:
        file.write_bytes(content[:start] + put + content[start + length :])
        check(folder, name)
    finally:
        shutil.copy(good[0] / name, file)


@given(st.lists(st.sampled_from(BAD_STRINGS) | st.text(max_size=30), max_size=5))
def test_any_class_names(good, folder, names):
    file = folder / "class_names.json"
    try:
        file.write_text(json.dumps(names))
        check(folder, file.name)
    finally:
        shutil.copy(good[0] / file.name, file)
