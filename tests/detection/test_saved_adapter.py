# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter is saved with its processor and class names, all of it or nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from peft_sdpt.detection import (
    common_base_model,
    find_adapter,
    load_base_config,
    load_base_model,
    load_detector,
    load_processor,
    read_class_names,
    read_threshold,
    save_adapter,
    set_image_size,
    write_adapter,
)
from peft_sdpt.detection.grounding import clean_name
from peft_sdpt.errors import InputError
from peft_sdpt.model_card import licence_of
from tests.helpers.detectors import ROOT, attach, make_host
from tests.helpers.fuzz import time_bound
from tests.helpers.hub import FAULTS, wait_little

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


THRESHOLD = {"threshold": 0.31, "f1": 0.8, "precision": 0.75, "recall": 0.86, "split": "val"}


def test_a_threshold_is_saved_read_and_named_in_the_card(processor, tmp_path):
    model = attach(make_host())
    assert "detection.json" in save_adapter(tmp_path, model, processor, ["dog", "a|b"], threshold=THRESHOLD)
    assert read_threshold(find_adapter(str(tmp_path))) == 0.31
    card = (tmp_path / "README.md").read_text()
    assert "| score threshold | 0.31, which has the best F1 on the split `val`: F1 0.80, precision 0.75," in card
    assert "| classes | 2: `dog`, <code>a&#124;b</code> |" in card
    assert "| image size | resized to shortest edge 96 pixels, longest edge 192 pixels |" in card
    # The threshold of another adapter does not stay beside a new one.
    assert "detection.json" not in save_adapter(tmp_path, model, processor, ["dog"])
    assert read_threshold(find_adapter(str(tmp_path))) is None and not (tmp_path / "detection.json").exists()
    assert "score threshold" not in (tmp_path / "README.md").read_text()
    write_adapter(tmp_path / "many", model, processor, [f"class {i}" for i in range(1203)], threshold=THRESHOLD)
    card = (tmp_path / "many" / "README.md").read_text()
    assert (
        "| classes | 1,203: `class 0`," in card and "`class 99`, and 1,103 more, which `class_names.json` lists" in card
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"detection\.json: not JSON \("),
        ("\udcff", r"detection\.json: not JSON \("),
        *(
            (content, r"detection\.json: must be a JSON object with a threshold of at least 0 and below 1\.$")
            for content in ("[]", "{}", "0.3", '{"threshold": "0.3"}', '{"threshold": true}', '{"threshold": null}')
        ),
        *(
            (f'{{"threshold": {value}}}', r"with a threshold of at least 0 and below 1\.$")
            for value in ("NaN", "Infinity", "-0.1", "1", "1e999")
        ),
    ],
)
def test_a_damaged_threshold_is_one_line(processor, tmp_path, content, message):
    save_adapter(tmp_path, attach(make_host()), processor, ["dog"], threshold=THRESHOLD)
    (tmp_path / "detection.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=message) as error:
        read_threshold(find_adapter(str(tmp_path)))
    assert len(str(error.value).splitlines()) == 1


def test_thresholds_at_the_limits_are_read(processor, tmp_path):
    save_adapter(tmp_path, attach(make_host()), processor, ["dog"])
    for content, expected in (('{"threshold": 0}', 0.0), ('{"threshold": 0.999, "more": []}', 0.999)):
        (tmp_path / "detection.json").write_text(content)
        assert read_threshold(find_adapter(str(tmp_path))) == expected


def test_an_adapter_in_a_folder_of_a_repository_is_found(hub, processor, tmp_path):
    model = attach(make_host())
    for folder, threshold in ((".", None), ("best", THRESHOLD), ("best/more", None)):
        save_adapter(tmp_path / "out" / folder, model, processor, [folder], threshold=threshold)
    hub.add("user/adapter", tmp_path / "out")
    best, last = find_adapter("user/adapter/best"), find_adapter("user/adapter")
    assert best.name == "best" and read_class_names(best) == ["best"] and read_threshold(best) == 0.31
    assert last.name == "adapter" and read_class_names(last) == ["."] and read_threshold(last) is None
    assert not [name for name in hub.fetched() if name.startswith("best/more")]
    with pytest.raises(InputError, match=r"source='user/adapter/worst': is not a saved adapter"):
        find_adapter("user/adapter/worst")


def test_the_licence_of_a_card(hub, processor, tmp_path):
    model = attach(make_host())
    licence = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    save_adapter(tmp_path, model, processor, ["dog"], licence=licence)
    assert licence_of(tmp_path) == licence
    save_adapter(tmp_path, model, processor, ["dog"])
    assert licence_of(tmp_path) == licence
    save_adapter(tmp_path, model, processor, ["dog"], licence={"license": "mit"})
    assert licence_of(tmp_path) == {"license": "mit"}
    hub.add("user/adapter", tmp_path)
    assert licence_of("user/adapter") == {"license": "mit"}
    for nothing in ("user/nowhere", tmp_path / "nowhere", "not an id", ""):
        assert licence_of(nothing) == {}
    for text in ("# A card without metadata", "---\nlicense: [a, b]\n---\n", "---\nbroken: [\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == {}


def test_files_are_readable_as_the_umask_says(processor, tmp_path):
    model = attach(make_host())
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            folder = tmp_path / f"{mask:o}"
            save_adapter(folder, model, processor, ["dog"], threshold=THRESHOLD)
            model.save_pretrained(folder / "plain")
        finally:
            os.umask(before)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 10
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
            path.name: oct(mode) for path in files
        }


# ---- the files of a stranger


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """An adapter of the small base model, saved with all files."""
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(folder, attach(load_base_model(HOST)), processor, ["dog"], threshold=THRESHOLD)
    return folder


@pytest.fixture
def stranger(saved, tmp_path):
    """A copy of the saved adapter, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "stranger"))


def change(file: Path, **values) -> None:
    """Change fields of a JSON file. `image_processor__size` is the field `size` in the field `image_processor`."""
    content = json.loads(file.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        inner = content
        for part in outer:
            inner = inner[part]
        inner[last] = value
    file.write_text(json.dumps(content))


def read_all(folder: Path) -> None:
    """Read everything beside the weights of an adapter, as `sdpt-detect` does."""
    adapter = find_adapter(str(folder))
    read_class_names(adapter)
    read_threshold(adapter)
    load_processor(adapter, HOST)
    common_base_model([adapter])


def refused(message: str, folder: Path, read=read_all) -> None:
    with pytest.raises(InputError, match=message) as raised:
        read(folder)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1500


@pytest.mark.parametrize("value", [5, True, ["a"], {"a": 1}, 1e400, 10**400, "a\0b", "a\nb", "\x1b[31m"])
def test_a_base_model_is_named_in_a_line_of_text(stranger, value):
    change(stranger / "adapter_config.json", base_model_name_or_path=value)
    refused(
        "base_model_name_or_path must be None or (a string|at most 4096 letters without control characters), got ",
        stranger,
    )


@pytest.mark.parametrize("value", ["x" * 4000, "x/" * 2000, "/etc/passwd", "../..", "a b", "C:\\x"])
def test_a_base_model_that_is_anything_is_refused_when_it_is_loaded(stranger, offline, value):
    change(stranger / "adapter_config.json", base_model_name_or_path=value)
    adapter = find_adapter(str(stranger))
    for load in (load_base_config, load_base_model):
        refused("cannot be loaded as a detector", common_base_model([adapter]), load)


@pytest.mark.parametrize("field", ["peft_type", "task_type", "num_virtual_tokens", "fusion_layers", "lora_rank"])
@pytest.mark.parametrize("value", [["a"], "x" * 5000, "a\nb", {"a": {}}])
def test_a_config_of_odd_types_is_refused(stranger, field, value):
    change(stranger / "adapter_config.json", **{field: value})
    refused("source=.*: (is not an adapter that can be loaded|is not an SDPT adapter)", stranger)


DEEP = "[" * 100_000
JSON_FILES = ("adapter_config.json", "class_names.json", "detection.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("file", [*JSON_FILES, *TOKENIZER_FILES])
@pytest.mark.parametrize(
    "content", ["", "[5]", "[[1]]", "null", "5", '"x"', "{", '"\\ud800"', "9" * 5000, DEEP, "\udcff"]
)
def test_a_file_that_is_not_what_it_should_be_is_refused(stranger, file, content):
    (stranger / file).write_text(content, errors="surrogateescape")
    refused(file.removesuffix("_config.json").removesuffix(".json") if file in JSON_FILES else "processor", stranger)


def test_an_empty_tokenizer_is_refused(stranger):
    (stranger / "tokenizer.json").write_text("{}")
    refused("has no processor that can be loaded \\(KeyError: 'added_tokens'\\)", stranger)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"shortest_edge": 0, "longest_edge": 100}, "must be whole numbers of pixels"),
        ({"shortest_edge": -5, "longest_edge": 100}, "must be whole numbers of pixels"),
        ({"shortest_edge": "96", "longest_edge": 100}, "must be whole numbers of pixels"),
        ({"shortest_edge": 96.5, "longest_edge": 100}, "must be whole numbers of pixels"),
        ({"shortest_edge": 10**9, "longest_edge": 10**9}, "must be at most 4,096 pixels"),
        ({"height": 10**5, "width": 10**5}, "must be at most 4,096 pixels"),
        ({"shortest_edge": 96}, "cannot process an image"),
        ({"longest_edge": 96}, "processor"),
        ({}, "has no processor that can be loaded"),
        ("x", "has no processor that can be loaded"),
        ([], "has no processor that can be loaded"),
    ],
)
def test_images_are_resized_to_a_size_that_a_machine_can_hold(stranger, size, message):
    change(stranger / "processor_config.json", image_processor__size=size)
    refused(message, stranger)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_mean", [], "cannot process an image"),
        ("image_std", [0.0, 0.0, 0.0], "makes pixels that are not finite"),
        ("rescale_factor", "x", "cannot process an image"),
        ("resample", 10**9, "cannot process an image"),
        ("pad_size", {"height": 10**6, "width": 10**6}, "must not cut images or add a frame"),
        ("do_center_crop", True, "must not cut images or add a frame"),
        ("image_processor_type", 5, "has no processor that can be loaded"),
        ("image_processor_type", "NoSuchImageProcessor", "has no processor that can be loaded"),
    ],
)
def test_a_processor_is_tried_on_an_image(stranger, field, value, message):
    change(stranger / "processor_config.json", **{f"image_processor__{field}": value})
    refused(message, stranger)


def test_sizes_that_a_run_can_have_are_loaded(processor, tmp_path):
    set_image_size(processor, 800)
    try:
        save_adapter(tmp_path, attach(make_host()), processor, ["dog"])
    finally:
        set_image_size(processor, 96)
    loaded = load_processor(find_adapter(str(tmp_path)), HOST)
    assert dict(loaded.image_processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    for size in (0, -1, 4097, 10**9):
        with pytest.raises(InputError, match=f"image_size={size}: must be from 1 to 4,096 pixels"):
            set_image_size(processor, size)


def test_a_tokenizer_of_another_base_model_is_refused(stranger):
    content = json.loads((stranger / "tokenizer.json").read_text())
    content["model"]["vocab"]["zebra"] = 999_999
    (stranger / "tokenizer.json").write_text(json.dumps(content))
    refused(r"its tokenizer has the token 999,999, but the base model knows the tokens below \d", stranger)


@pytest.mark.parametrize("names", [[5], ["dog", None], {"dog": 1}, [["dog"]]])
def test_class_names_are_a_list_of_names(stranger, names):
    (stranger / "class_names.json").write_text(json.dumps(names))
    refused(r"class_names\.json: must be a JSON list of names\.$", stranger)


@pytest.mark.parametrize("name", ["", " ", "\0", "\u2028", "x" * 1001])
def test_a_class_name_that_is_no_name_is_refused(stranger, name):
    (stranger / "class_names.json").write_text(json.dumps(["dog", name]))
    refused(r"class_names\.json: a name must have at least one letter and at most 1,000, got ", stranger)


def test_class_names_are_cleaned_as_in_training(stranger):
    names = ["a\nb", "\x1b[31mred", "می\u200cخواهم", "👩\u200d🚀", "co\u00adop"]
    (stranger / "class_names.json").write_text(json.dumps(names))
    read = read_class_names(find_adapter(str(stranger)))
    assert read == ["a b", "[31mred", *names[2:]] == list(map(clean_name, names))


def test_many_class_names_are_read(stranger):
    names = [f"class {number}" for number in range(100_000)]
    (stranger / "class_names.json").write_text(json.dumps(names))
    assert read_class_names(find_adapter(str(stranger))) == names


class Payload:
    """Unpickling an object of this class makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_no_pickle_runs(stranger, tmp_path, save):
    """Weights of an adapter or of a base model are never unpickled, under any file name."""
    for content in (Payload(tmp_path / "ran"), [1, 2], {"a": Payload(tmp_path / "ran")}):
        for name in ("adapter_model.bin", "adapter_model.safetensors"):
            (stranger / "adapter_model.safetensors").unlink(missing_ok=True)
            with (stranger / name).open("wb") as file:
                save(content, file)
            refused(
                "is not a saved adapter|cannot be loaded, and nothing was put on the base model",
                stranger,
                lambda folder: load_detector(HOST, [find_adapter(str(folder))]),
            )
        base = Path(shutil.copytree(HOST, tmp_path / "base", dirs_exist_ok=True))
        (base / "model.safetensors").unlink(missing_ok=True)
        with (base / "pytorch_model.bin").open("wb") as file:
            save(content, file)
        refused("cannot be loaded as a detector", base, load_base_model)
    assert not (tmp_path / "ran").exists()


def test_no_code_of_a_repository_runs(stranger, tmp_path, monkeypatch):
    """By default, transformers asks on the terminal whether to run the code."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    base = Path(shutil.copytree(HOST, tmp_path / "base"))
    for folder in (stranger, base):
        (folder / "code.py").write_text(code)
    (base / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    for load in (load_base_config, load_base_model):
        refused("cannot be loaded as a detector .*custom code", base, load)
    processor_config = {"processor_class": None, "auto_map": {"AutoProcessor": "code.Mine"}}
    (stranger / "processor_config.json").write_text(json.dumps(processor_config))
    (stranger / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    refused("processor", stranger)
    assert not (tmp_path / "ran").exists()


# ---- a Hub that answers wrongly


@pytest.mark.parametrize("fault", [*FAULTS, 401, 404, 429, 500])
@pytest.mark.parametrize("file", ["adapter_config.json", "detection.json"])
def test_an_adapter_is_downloaded_completely_or_not_at_all(hub, saved, monkeypatch, file, fault):
    """A failed download of an optional file is an error too. The next try works."""
    wait_little(monkeypatch, 0.1 if fault == "stalled" else 5.0)
    hub.add("user/adapter", saved)
    if isinstance(fault, int):
        hub.refused = {file: fault}
    else:
        hub.faults = {file: fault}
    with pytest.raises(InputError, match="source='user/adapter': ") as raised:
        find_adapter("user/adapter")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
    hub.faults, hub.refused = {}, {}
    adapter = find_adapter("user/adapter")
    assert {path.name for path in adapter.folder.iterdir()} == {path.name for path in saved.iterdir()} - {"README.md"}
    assert all(path.read_bytes() == (saved / path.name).read_bytes() for path in adapter.folder.iterdir())


def load_base_processor(name):
    return load_processor(None, name)


@pytest.mark.parametrize(
    ("load", "file", "fault"),
    [
        (load_base_config, "/config.json", "other bytes"),
        (load_base_config, "/config.json", "page"),
        (load_base_model, "model.safetensors", "other bytes"),
        (load_base_model, "model.safetensors", "short"),
        (load_base_processor, "tokenizer.json", "other bytes"),
        (load_base_processor, "tokenizer.json", "no etag"),
        (load_base_processor, "tokenizer.json", 500),
        (load_base_processor, "tokenizer_config.json", "page"),
        (load_base_processor, "processor_config.json", 404),
    ],
)
def test_a_base_model_is_downloaded_completely_or_not_at_all(hub, monkeypatch, processor, load, file, fault):
    """If the Hub does not give out a file, transformers would load a tokenizer without words. The next try works."""
    wait_little(monkeypatch, 5.0)
    hub.add("user/base", HOST)
    if isinstance(fault, int):
        hub.refused = {file: fault}
    else:
        hub.faults = {file: fault}
    with pytest.raises(InputError, match=r"model_name_or_path='user/base': (cannot be loaded as|has no processor)"):
        load("user/base")
    hub.faults, hub.refused = {}, {}
    loaded = load("user/base")
    if load is load_base_processor:
        assert loaded.tokenizer("a red dog.")["input_ids"] == processor.tokenizer("a red dog.")["input_ids"]


def test_a_list_of_files_that_never_comes(hub, saved, monkeypatch):
    """An adapter is loaded without the list of files. Loading a base model has a time limit."""
    wait_little(monkeypatch, 0.1)
    hub.add("user/adapter", saved)
    hub.add("user/base", HOST)
    hub.faults = {"/api/models/": "stalled"}
    assert read_class_names(find_adapter("user/adapter")) == ["dog"]
    with time_bound():
        load_base_config("user/base")


def test_the_cache_serves_an_adapter_that_was_downloaded_before(hub, saved, monkeypatch, request):
    wait_little(monkeypatch, 5.0)
    hub.add("user/adapter", saved)
    before = find_adapter("user/adapter")
    hub.refused = {"/": 503}
    assert find_adapter("user/adapter") == before
    request.getfixturevalue("offline")
    assert find_adapter("user/adapter") == before
