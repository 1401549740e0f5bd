# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""An adapter is saved with its processor and class names, all of it or nothing."""

import os

import pytest
import torch
from transformers import AutoProcessor

from peft_sdpt.detection import (
    find_adapter,
    load_base_model,
    read_class_names,
    read_threshold,
    save_adapter,
    write_adapter,
)
from peft_sdpt.errors import InputError
from peft_sdpt.model_card import licence_of
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


THRESHOLD = {"threshold": 0.31, "f1": 0.8, "precision": 0.75, "recall": 0.86, "split": "val"}


def test_a_threshold_is_saved_read_and_named_in_the_card(processor, tmp_path):
    model = attach(make_host())
    assert "detection.json" in save_adapter(tmp_path, model, processor, ["dog", "a|b"], threshold=THRESHOLD)
    assert read_threshold(find_adapter(str(tmp_path))) == 0.31
    card = (tmp_path / "README.md").read_text()
    assert "| score threshold | 0.31, which has the best F1 on the split `val`: F1 0.80, precision 0.75," in card
    assert "| classes | 2: `dog`, `a\\|b` |" in card
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
