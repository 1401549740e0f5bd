# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring robustness, run as a user runs it."""

import argparse
import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

import robustness
from peft_sdpt.commands import robustness as command
from peft_sdpt.commands.robustness_results import doubts, part_name
from peft_sdpt.detection import (
    DetectionSplit,
    average_precision,
    detect_changed,
    load_base_model,
    load_detector,
    load_processor,
    load_split,
    parse_purifier,
)
from peft_sdpt.detection.attacks import Attack
from peft_sdpt.detection.robustness import Adversary, RandomSigns
from tests.helpers.detectors import acting
from tests.helpers.main_job import HOST, reset_accelerate
from tests.helpers.small_tasks import write_small_task

# Two images, and a little of everything.
SHORT = (
    *("--num_images", 2, "--eps", 8, "--steps", 1, "--attack", "pgd", "transfer"),
    *("--corruptions", "contrast", "fog", "--severities", 1, 5, "--purify", "bits:3"),
)
PARTS = {
    *("clean", "clean bits:3", "contrast 1", "contrast 5", "fog 1", "fog 5", "signs 8"),
    *("pgd 8", "pgd 8 bits:3", "transfer 8", "transfer 8 bits:3", "adaptive 8 bits:3"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    get_peft_model(load_base_model(HOST), acting()).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, small_task):
    """Run the script in this process; returns its exit code, 0 when it just returns."""

    def run(*flags, output=tmp_path / "out") -> int:
        arguments = ["robustness.py", "--dataset_name", small_task, "--output_dir", output, *SHORT, *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        reset_accelerate()
        try:
            robustness.main()
        except SystemExit as exit:
            return exit.code
        return 0

    return run


@pytest.fixture(scope="module")
def measured(tmp_path_factory, small_task, adapter):
    """The results of a whole run, which tests read or copy, and what it printed."""
    out = tmp_path_factory.mktemp("measured") / "out"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--dataset_name", small_task, "--output_dir", out, *SHORT, "--adapter", adapter]
        patch.setattr(sys, "argv", ["robustness.py", *map(str, arguments)])
        reset_accelerate()
        robustness.main()
    return out


def results(out):
    content = json.loads((out / "robustness.json").read_text())
    for part in content["parts"].values():
        assert part.pop("seconds") >= 0
    return content


def test_all_parts_are_measured(measured):
    content = results(measured)
    parts = content["parts"]
    assert set(parts) == PARTS
    for name, part in parts.items():
        assert 0 <= part["AP"] <= part["AP50"] <= 1
        rows = np.load(measured / "detections" / f"{name.replace(' ', '-').replace(':', '-')}.npy")
        assert rows.shape[1] == 7 and set(rows[:, 0]) == {0, 1}
    # One large step is enough for the small base model.
    assert parts["pgd 8"]["AP"] < 0.7 * parts["signs 8"]["AP"]
    assert parts["contrast 5"]["AP"] < parts["contrast 1"]["AP"] <= parts["clean"]["AP"] + 0.1
    summary = content["summary"]
    mean = np.mean([parts[name]["AP"] for name in ("contrast 1", "contrast 5", "fog 1", "fog 5")])
    assert summary["mPC"] == pytest.approx(mean)
    assert summary["rPC"] == pytest.approx(mean / parts["clean"]["AP"])
    assert summary["lowest 8"]["AP"] <= min(parts["pgd 8"]["AP"], parts["transfer 8"]["AP"])
    assert summary["lowest 8 bits:3"]["AP"] <= parts["adaptive 8 bits:3"]["AP"]


def test_the_table_and_the_picture(measured, adapter):
    content = results(measured)
    table = (measured / "robustness.md").read_text()
    assert str(adapter) in table
    for name in ("clean", "pgd 8", "transfer 8", "fog 5", "adaptive 8 bits:3"):
        part = content["parts"][name]
        assert f"{part['AP']:.3f} ({part['AP50']:.3f})" in table
    assert f"mPC {content['summary']['mPC']:.3f}, rPC {content['summary']['rPC']:.3f}" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 4 + 2 + 5
    # The truth, the base model, attacked, defended, and the change.
    assert Image.open(measured / "robustness.png").width == 5 * 320 + 4 * 6


def test_the_same_command_measures_nothing_again(measured, adapter, run, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(measured, tmp_path / "copy")
    monkeypatch.setattr(command, "detect_changed", None)
    monkeypatch.setattr(command, "draw_attack", None)
    before = {file.name: file.read_bytes() for file in out.glob("robustness.*")}
    assert run("--adapter", adapter, output=out) == 0
    assert before == {file.name: file.read_bytes() for file in out.glob("robustness.*")}
    printed = capsys.readouterr().out
    assert "12 parts, of which 12 are there" in printed
    assert printed.endswith((out / "robustness.md").read_text())


def test_a_run_that_stops_in_the_middle_goes_on(measured, adapter, run, tmp_path, monkeypatch, capsys):
    detect, calls = command.detect_changed, 0

    def stops(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return detect(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(command, "detect_changed", stops)
        assert run("--adapter", adapter) == 130
    assert capsys.readouterr().err.endswith("robustness.py: stopped; the same command goes on.\n")
    # The first change has two parts.
    done = ["clean", "clean bits:3", "fog 1", "fog 5", "contrast 1"]
    assert list(results(tmp_path / "out")["parts"]) == done
    assert run("--adapter", adapter) == 0
    assert results(tmp_path / "out") == results(measured)
    for name in ("robustness.md", "robustness.png"):
        assert (tmp_path / "out" / name).read_bytes() == (measured / name).read_bytes()


def test_only_what_is_new_is_measured(measured, adapter, run, tmp_path, capsys):
    out = shutil.copytree(measured, tmp_path / "copy")
    few = ("--adapter", adapter, "--corruptions", "none", "--attack", "transfer")
    assert run(*few, "--purify", "bits:3", "bits:1", output=out) == 0
    printed = capsys.readouterr().out
    assert "7 parts, of which 5 are there" in printed
    assert re.findall(r"^(.+): AP 0", printed, re.MULTILINE) == ["clean bits:1", "transfer 8 bits:1"]
    # The parts that were there before stay, but the table has only those of the flags.
    assert set(results(out)["parts"]) == PARTS | {"clean bits:1", "transfer 8 bits:1"}
    assert "PGD through" not in printed and "fog" not in printed


def test_other_settings_are_refused(measured, adapter, run, tmp_path, monkeypatch, capsys):
    """So that a wrong flag does not cost the results of hours."""
    out = shutil.copytree(measured, tmp_path / "copy")
    monkeypatch.setattr(command, "detect_changed", None)
    for flags, names in (
        (("--adapter", adapter, "--image_size", 64), "the image size"),
        (("--adapter", adapter, "--num_images", 1), "the images"),
        (("--adapter", adapter, "--num_images", 4, "--seed", 1), "the images, --seed"),
        ((), "--adapter"),
    ):
        assert run(*flags, output=out) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"robustness.py: {out / 'robustness.json'}: has parts with other values of {names};")
    assert results(out) == results(measured)


def test_without_an_adapter_the_base_model_is_measured(run, tmp_path, capsys):
    assert run("--corruptions", "none", "--purify", "none", "--attack", "features", "transfer") == 0
    assert set(results(tmp_path / "out")["parts"]) == {"clean", "signs 8", "features 8"}
    assert "transferred" not in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "robustness.png").width == 4 * 320 + 3 * 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eps", 0), "--eps 0: must be above 0 and at most 255"),
        (("--eps", 1, 256), "--eps 256: must be above 0 and at most 255"),
        (("--eps", "nan"), "--eps nan: must be above 0"),
        (("--steps", 0), "--steps 0: must be at least 1"),
        (("--restarts", -1), "--restarts -1: must be at least 1"),
        (("--num_images", 0), "--num_images 0: must be at least 1"),
        (("--per_device_eval_batch_size", 0), "--per_device_eval_batch_size 0: must be at least 1"),
        (("--seed", -1), "--seed -1: must be at least 0 and below 4294967296"),
        (("--attack", "none", "pgd"), "--attack none: cannot be used with other values"),
        (("--corruptions", "frost"), "--corruptions frost: must be one of gaussian_noise"),
        (("--corruptions", "all", "fog"), "--corruptions all: must be one of gaussian_noise"),
        (("--severities", 1, 6), "--severities 6: must be from 1 to 5"),
        (("--purify", "jpeg"), "--purify jpeg: must be a kind and a number"),
        (("--purify", "bits:9"), "--purify bits:9: the number of bits per channel must be from 1 to 8"),
        (("--adapter", ""), "--adapter: is empty"),
        (("--adapter", "/nowhere"), "--adapter /nowhere: no such folder"),
        (("--eval_split", "other"), "no split 'other'"),
        (("--model_name_or_path", "/nowhere"), "--model_name_or_path /nowhere: cannot be loaded as a detector"),
        (("--image_size", 5), "--image_size 5: does not suit this base model"),
    ],
)
def test_wrong_flags_end_with_one_line(run, offline, capsys, tmp_path, flags, message):
    assert run(*flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("robustness.py: ") and message in error
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_an_attack_that_does_not_exist(run, capsys):
    assert run("--attack", "fgsm") == 2
    assert "argument --attack: invalid choice: 'fgsm'" in capsys.readouterr().err


def test_several_processes_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(command, "make_accelerator", lambda *_: SimpleNamespace(num_processes=2))
    assert run() == 2
    assert "robustness.py: this command needs one process, but 2 were started." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 1, "parts": {}}', "no JSON"])
def test_a_file_of_somebody_else_stays(run, tmp_path, capsys, content):
    file = tmp_path / "out" / "robustness.json"
    file.parent.mkdir()
    file.write_text(content)
    assert run() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error
    assert "was not written by this command" in error or "not JSON" in error
    assert file.read_text() == content


def test_damaged_detections_are_named(measured, adapter, run, tmp_path, capsys):
    out = shutil.copytree(measured, tmp_path / "copy")
    file = out / "detections" / "pgd-8.npy"
    file.write_bytes(file.read_bytes()[:200])
    assert run("--adapter", adapter, output=out) == 2
    assert f"{file}: cannot be read" in capsys.readouterr().err


def test_a_data_set_without_splits(tmp_path, small_task, monkeypatch, capsys):
    """The images that training held out are measured, or all of them."""
    folder = tmp_path / "photos"
    shutil.copytree(small_task, folder)
    for file in (folder / "train.json", folder / "val.json"):
        file.unlink()
    (folder / "test.json").rename(folder / "photos.json")
    monkeypatch.setattr(
        sys, "argv", ["robustness.py", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "out")]
    )
    seen = []
    monkeypatch.setattr(command, "run", lambda args, *_: seen.append(args))
    robustness.main()
    (args,) = seen
    accelerator = SimpleNamespace(
        num_processes=1, process_index=0, is_local_main_process=False, is_main_process=True, print=print
    )
    data = command.read_data(args, accelerator, {})
    assert len(data) == 4
    assert "all of its images are measured" in capsys.readouterr().out
    args.output_dir.mkdir()
    ids = {"train": data.image_ids[:2], "val": data.image_ids[2:3], "test": data.image_ids[3:]}
    (args.output_dir / "splits.json").write_text(json.dumps({"image_ids": ids}))
    assert command.read_data(args, accelerator, {}).image_ids == data.image_ids[3:]


@pytest.mark.slow
def test_attacks_on_the_small_base_model(tmp_path):
    """What was measured when this was designed."""
    data = load_split(str(write_small_task(tmp_path / "task", train=4, val=4, test=6)), "test")
    model, processor = load_detector(HOST), load_processor(None, HOST)

    def precision(change) -> float:
        return average_precision(data, detect_changed(model, processor, data, change, 6)[0])["AP"]

    clean = precision(None)
    assert clean > 0.4
    assert precision(RandomSigns(processor, 4 / 255)) == pytest.approx(clean, abs=0.03)
    attacks = [Attack(1 / 255, steps=2), Attack(4 / 255, steps=5), Attack(32 / 255, steps=3)]
    attacked = [precision(Adversary(model, processor, data, attack)) for attack in attacks]
    assert clean > attacked[0] > attacked[1]
    assert attacked[1] < 0.35 * clean
    assert attacked[2] < 0.02


def test_what_is_doubtful_is_said():
    args = argparse.Namespace(attack=["pgd", "transfer"], eps=[1.0, 2.0], purify=[parse_purifier("jpeg:75")])
    fine = {"signs 1": 0.5, "signs 2": 0.5, "pgd 1": 0.3, "pgd 2": 0.1, "transfer 1": 0.4, "transfer 2": 0.3}
    fine |= {"pgd 1 jpeg:75": 0.4, "adaptive 1 jpeg:75": 0.405}

    def found(**changes):
        parts = {name: {"AP": value} for name, value in {**fine, **changes}.items()}
        return doubts(parts, args)

    assert found() == []
    assert found(**{"pgd 2": 0.32}) == [
        "pgd: AP is higher at 2/255 than at 1/255 (0.320 instead of at most 0.300).",
        "pgd: AP is higher than for transfer at 2/255 (0.320 instead of at most 0.300).",
    ]
    assert found(**{"transfer 1": 0.55}) == [
        "transfer: AP is higher than with random signs at 1/255 (0.550 instead of at most 0.500)."
    ]
    assert found(**{"adaptive 1 jpeg:75": 0.45}) == [
        "jpeg:75: AP is higher for the attack through it than for the one that does not know it, at 1/255 (0.450 "
        "instead of at most 0.400)."
    ]


def test_names_of_parts():
    assert part_name("clean") == "clean"
    assert part_name("pgd", 0.5, parse_purifier("jpeg:75")) == "pgd 0.5 jpeg:75"
    # Numbers that print the same in a table are still two parts.
    assert part_name("pgd", 1.0000001) != part_name("pgd", 1.0)


def test_the_images_do_not_depend_on_their_order():
    data = DetectionSplit(["dog"], list("abcdef"), [(8, 8)] * 6, [[]] * 6, [[]] * 6, [[]] * 6, lambda _: None)
    taken = [data.image_ids[index] for index in sorted(command.shuffled(data, range(6), 3)[:3])]
    turned = data.subset([5, 4, 3, 2, 1, 0])
    assert {turned.image_ids[index] for index in command.shuffled(turned, range(6), 3)[:3]} == set(taken)
