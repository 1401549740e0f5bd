# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring robustness, run as a user runs it."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

import robustness
from peft_sdpt.commands import robustness as command
from peft_sdpt.commands.robustness_results import doubts, make_tables, part_name
from peft_sdpt.detection import (
    DetectionSplit,
    Purifier,
    average_precision,
    detect_changed,
    find_adapter,
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


def test_the_table_and_the_picture(measured, adapter, small_task):
    content = results(measured)
    table = (measured / "robustness.md").read_text()
    assert str(adapter) in table
    for name in ("clean", "pgd 8", "transfer 8", "fog 5", "adaptive 8 bits:3"):
        part = content["parts"][name]
        assert f"{part['AP']:.3f} ({part['AP50']:.3f})" in table
    assert f"mPC {content['summary']['mPC']:.3f}, rPC {content['summary']['rPC']:.3f}" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 4 + 2 + 4
    clean, purified = (content["parts"][name] for name in ("clean", "clean bits:3"))
    assert f"Unchanged: {clean['AP']:.3f} ({clean['AP50']:.3f})" in table
    after = rows[rows.index("| after a purifier | unchanged | 8/255 |") + 2 :]
    assert [row.split(" | ")[0] for row in after] == [
        *("| bits:3, transferred", "| bits:3, PGD that does not know it"),
        *("| bits:3, PGD through it", "| bits:3, lowest per image"),
    ]
    assert {row.split(" | ")[1] for row in after} == {f"{purified['AP']:.3f} ({purified['AP50']:.3f})"}
    assert f"Measured on 2 images of {small_task} (split test)." in table
    assert re.search(
        r"Image size: (longest edge 192, shortest edge 96|shortest edge 96, longest edge 192)\. Seed: 0\.", table
    )
    assert "| attack, 1 step | 8/255 |" in rows and any(row.startswith("| PGD, adaptive |") for row in rows)
    # The truth, the base model, attacked, with the adapter, attacked, and the change.
    assert Image.open(measured / "robustness.png").width == 6 * 320 + 5 * 6


def test_the_same_command_measures_nothing_again(measured, adapter, run, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(measured, tmp_path / "copy")
    monkeypatch.setattr(command, "detect_changed", None)
    monkeypatch.setattr(command, "draw_attack", None)
    before = {file.name: file.read_bytes() for file in out.glob("robustness.*")}
    assert run("--adapter", adapter, output=out) == 0
    assert before == {file.name: file.read_bytes() for file in out.glob("robustness.*")}
    printed = capsys.readouterr().out
    assert "12 parts, 12 already measured" in printed
    assert printed.endswith((out / "robustness.md").read_text())


def test_a_run_that_stops_in_the_middle_goes_on(measured, adapter, run, tmp_path, monkeypatch, capsys):
    detect, calls = command.detect_changed, 0

    def stops(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return detect(*args, **kwargs)

    picture = tmp_path / "out" / "robustness.png"
    picture.parent.mkdir()
    picture.write_text("a picture of other parts")
    with monkeypatch.context() as patch:
        patch.setattr(command, "detect_changed", stops)
        assert run("--adapter", adapter) == 130
    assert not picture.exists()
    printed = capsys.readouterr()
    assert printed.err.endswith("robustness.py: stopped; the same command goes on.\n")
    assert re.findall("^(.+) left, ", printed.out, re.MULTILINE) == ["10 parts", "9 parts", "8 parts", "7 parts"]
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
    assert "7 parts, 5 already measured" in printed
    assert re.findall(r"^(.+): AP 0", printed, re.MULTILINE) == ["clean bits:1", "transfer 8 bits:1"]
    # The parts that were there before stay, but the table has only those of the flags.
    assert set(results(out)["parts"]) == PARTS | {"clean bits:1", "transfer 8 bits:1"}
    assert "PGD through" not in printed and "fog" not in printed
    assert printed.index("| bits:1, transferred") < printed.index("| bits:3, transferred")


def test_other_settings_are_refused(measured, adapter, run, tmp_path, monkeypatch, capsys):
    """So that a wrong flag does not cost the results of hours."""
    out = shutil.copytree(measured, tmp_path / "copy")
    monkeypatch.setattr(command, "detect_changed", None)
    for flags, names in (
        (("--adapter", adapter, "--image_size", 64), "another --image_size"),
        (("--adapter", adapter, "--num_images", 1), "other images (--dataset_name, --eval_split, --num_images)"),
        (("--adapter", adapter, "--seed", 1, "--image_size", 64), "another --image_size and another --seed"),
        (("--attack", "pgd"), "another --adapter"),
    ):
        assert run(*flags, output=out) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"robustness.py: {out / 'robustness.json'}: was measured with ")
        assert f"{names}; choose another --output_dir" in error
    assert results(out) == results(measured)


def test_a_base_model_that_changes_in_its_folder_is_noticed(measured, adapter, run, tmp_path, monkeypatch, capsys):
    """Its path stays the same, so the weights count. A copy in another folder is the same base model."""
    out, moved = shutil.copytree(measured, tmp_path / "copy"), shutil.copytree(HOST, tmp_path / "host")
    flags = ("--adapter", adapter, "--model_name_or_path", moved)
    with monkeypatch.context() as patch:
        patch.setattr(command, "detect_changed", None)
        assert run(*flags, output=out) == 0
        assert f"The adapter was trained on another base model: {HOST}." in capsys.readouterr().out
        weights = load_file(moved / "model.safetensors")
        name = min(name for name in weights if weights[name].is_floating_point())
        weights[name] = weights[name] + 0.01
        save_file(weights, moved / "model.safetensors", {"format": "pt"})
        assert run(*flags, output=out) == 2
    assert "robustness.json: was measured with another base model (--model_name_or_path);" in capsys.readouterr().err


def test_without_an_adapter_the_base_model_is_measured(run, tmp_path, capsys):
    assert run("--corruptions", "none", "--purify", "none", "--attack", "features", "--num_images", 50) == 0
    assert set(results(tmp_path / "out")["parts"]) == {"clean", "signs 8", "features 8"}
    note = "There are only 4 images, so all of them are measured."
    assert capsys.readouterr().out.count(f"\n{note}\n") == 2
    assert f"\n\n{note}\n\n" in (tmp_path / "out" / "robustness.md").read_text()
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
        (("--corruptions", "all", "fog"), "--corruptions all: cannot be used with other values"),
        (("--corruptions", "none", "--severities", 6), "--severities 6: must be from 1 to 5"),
        (("--attack", "pgd", "transfer"), "--attack transfer: needs --adapter"),
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
    assert run("--attack", "pgd", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("robustness.py: ") and message in error
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_an_attack_that_does_not_exist(run, capsys):
    assert run("--attack", "fgsm") == 2
    assert "argument --attack: invalid choice: 'fgsm'" in capsys.readouterr().err


def test_several_processes_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(command, "make_accelerator", lambda *_: SimpleNamespace(num_processes=2))
    assert run("--attack", "pgd") == 2
    assert "robustness.py: this command needs one process, but 2 were started." in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 1, "parts": {}}', "no JSON"])
def test_a_file_of_somebody_else_stays(run, tmp_path, capsys, content):
    file = tmp_path / "out" / "robustness.json"
    file.parent.mkdir()
    file.write_text(content)
    assert run("--attack", "pgd") == 2
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
    data, split = command.read_data(args, accelerator, {})
    assert len(data) == 4
    assert split == "without splits, so an adapter may have been trained on these images"
    args.output_dir.mkdir()
    ids = {"train": data.image_ids[:2], "val": data.image_ids[2:3], "test": data.image_ids[3:]}
    (args.output_dir / "splits.json").write_text(json.dumps({"image_ids": ids}))
    held_out, split = command.read_data(args, accelerator, {})
    assert held_out.image_ids == data.image_ids[3:]
    assert split == "the images that training held out"


@pytest.fixture
def flags(monkeypatch):
    """Parse flags as the command does."""

    def flags(*values) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, values)])
        return command.parse_args(None, HOST, "twemoji", {})

    return flags


def test_values_are_unique_and_sorted(flags):
    args = flags("--purify", "jpeg:75", "jpeg:9", "jpeg:075", "bits:8", "--eps", 4, 2, 4.0, "--attack", "vanish", "pgd")
    assert command.check_args(args) == []
    assert args.purify == [Purifier("bits", 8), Purifier("jpeg", 9), Purifier("jpeg", 75)]
    assert (args.eps, args.attack) == ([2, 4], ["pgd", "vanish"])


def test_what_the_user_should_know_about_the_flags(flags):
    args = flags("--eps", 2 / 255, 8, "--adapter", "a")
    (note,) = command.check_args(args)
    assert note.startswith("--eps is in levels of 255, so --eps 0.00784314 is less than a tenth")
    assert args.attack == list(command.ATTACKS)
    args = flags()
    (note,) = command.check_args(args)
    assert note == "The attack transfer is left out, because it needs --adapter."
    assert args.attack == [name for name in command.ATTACKS if name != "transfer"]
    assert command.check_args(flags("--attack", "none", "--eps", 0.001)) == []


def test_an_adapter_of_other_classes(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    found = find_adapter(str(folder))
    assert command.mismatches(found, HOST, ["dog"]) == command.mismatches(None, HOST, ["dog"]) == []
    (folder / "class_names.json").write_text('["cat", "dog"]')
    assert command.mismatches(found, HOST, ["dog", "cat"]) == []
    assert command.mismatches(found, f"{HOST}/../host", ["dog", "horse"]) == [
        "The adapter was not trained on these classes: horse.",
        "The data set does not have these classes of the adapter: cat.",
    ]


def test_the_time_that_is_left():
    found = [command.about_time(seconds) for seconds in (59, 60, 29 * 60, 100 * 60, 10 * 3600)]
    assert found == ["less than a minute", "about 1 minute", "about 29 minutes", "about 2 hours", "about 10 hours"]
    # An attack takes far longer than a detection.
    plain, attack = (command.Job("", settings, {"a": None}) for settings in ({}, {"steps": 20, "restarts": 2}))
    assert plain.cost == 1 and attack.cost == 121


def test_a_detector_that_finds_nothing(flags, tmp_path):
    """rPC does not exist then, and JSON has no NaN."""
    args = flags("--corruptions", "fog", "--severities", 1, "--attack", "none", "--purify", "jpeg:50")
    command.check_args(args)
    nothing = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    parts = dict.fromkeys(("clean", "clean jpeg:50", "fog 1"), nothing)
    measurements = SimpleNamespace(precision=parts.__getitem__)
    summary = command.summarise(SimpleNamespace(args=args), measurements, parts)
    assert summary == {"mPC": 0.0, "rPC": None}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    table = make_tables(["About."], parts, summary, args, command.ATTACKS)
    assert (
        table
        == """About.
Unchanged: 0.000 (0.000)

| corruption, by severity | 1 |
| --- | --- |
| fog | 0.000 (0.000) |

mPC 0.000, rPC -

| after a purifier | unchanged |
| --- | --- |
| jpeg:50 | 0.000 (0.000) |

Doubtful:

* AP on unchanged images is too low to compare anything with it (0.000)."""
    )
    fine = {name: {**nothing, "AP": 0.5} for name in parts}
    assert make_tables([], fine, {"mPC": 0.5, "rPC": 1.0}, args, {}).endswith("\n\nAll checks of the table passed.")


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
    fine = {
        "clean": 0.6,
        "signs 1": 0.5,
        "signs 2": 0.5,
        "pgd 1": 0.3,
        "pgd 2": 0.1,
        "transfer 1": 0.4,
        "transfer 2": 0.3,
    }
    fine |= {"pgd 1 jpeg:75": 0.4, "adaptive 1 jpeg:75": 0.405}

    def found(summary=None, **changes):
        parts = {name: {"AP": value} for name, value in {**fine, **changes}.items()}
        return doubts(parts, summary or {}, args)

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
    assert found(**{"pgd 1": 0.495, "transfer 1": 0.505}) == [
        "pgd: does hardly more harm than random signs at 1/255 (0.495 instead of 0.500)."
    ]
    # No attack can take away more than everything.
    assert found(**{"signs 2": 0.0, "pgd 2": 0.0, "transfer 2": 0.0}) == []
    assert found(clean=0.04) == ["AP on unchanged images is too low to compare anything with it (0.040)."]
    assert found({"rPC": 1.02}) == [
        "rPC is above 1, so AP is higher on corrupted images than on unchanged ones (1.020)."
    ]
    assert found({"rPC": 0.9}) == found({"rPC": None}) == []


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
