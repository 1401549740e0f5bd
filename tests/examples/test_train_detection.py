# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The main job, run as a user runs it: trained, measured, killed, resumed, and given bad input."""

import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import ExifTags, Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    OwlViTConfig,
    OwlViTForObjectDetection,
)

import train_detection
from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.commands import train, train_results
from peft_sdpt.commands.train_results import print_images, size_of
from peft_sdpt.files import LOCK, only_writer, write_digests
from peft_sdpt.model_card import licence_of
from peft_sdpt.training import checkpoints
from tests.detection.test_metrics import BOX, make_split
from tests.helpers.detectors import ROOT, attach, make_host, run_python
from tests.helpers.disk import file_size_limit
from tests.helpers.main_job import (
    EVERYTHING,
    HOST,
    ONE_STEP,
    SCRIPT,
    SHORT,
    TWO_STEPS,
    Killed,
    edit,
    kill,
    launched,
    prompts,
    same_run,
)
from tests.helpers.patience import PATIENCE, wait_until


def test_main_job_trains_measures_and_saves(main_job, trained, small_task, tmp_path):
    out = Path(shutil.copytree(trained(*TWO_STEPS), tmp_path / "out"))
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {
        *("before", "after", "best", "trainable_parameters", "total_parameters", "train_seconds", "args"),
        *("threshold", "at_threshold", "errors", "images", "classes", "precision_recall", "curves"),
    }
    assert set(metrics["before"]) == set(metrics["after"]) == {"AP", "AP50", "AP75"}
    prompts = load_file(out / "adapter_model.safetensors")
    assert metrics["trainable_parameters"] == sum(p.numel() for p in prompts.values())
    assert metrics["trainable_parameters"] < 0.005 * metrics["total_parameters"]
    assert all((out / name).is_file() for name in ("adapter_config.json", "detections.png", "report.png"))
    assert json.loads((out / "class_names.json").read_text())[:2] == ["monkey", "horse"]
    assert not list(out.rglob("*.unfinished"))

    # The saved adapter gives the very numbers that were measured before saving.
    assert main_job("--dataset_name", small_task, "--eval_only", "--adapter", out, charts=True) == 0
    again = json.loads((out / "eval_metrics.json").read_text())
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert again["before"] == metrics["before"] and again["after"] == metrics["after"]
    assert again["trainable_parameters"] == 0
    # The threshold is the one that was saved with the adapter, although the evaluation suggests another one.
    assert again["at_threshold"] == metrics["at_threshold"] and again["errors"] == metrics["errors"]
    assert (again["threshold"]["split"], metrics["threshold"]["split"]) == ("test", "val")
    for when in ("before", "after"):
        assert {name: entry[when] for name, entry in again["classes"].items()} == {
            name: entry[when] for name, entry in metrics["classes"].items()
        }


def test_main_job_goes_on_from_a_saved_adapter(main_job, trained, small_task, tmp_path):
    first = trained(*ONE_STEP)
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1, "--adapter", first) == 0
    before, after = (load_file(f / "adapter_model.safetensors") for f in (first, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    # One step of one rate, 0.3, moves no entry further than that: it went on, it did not start anew.
    assert max((before[key] - after[key]).abs().max() for key in before) < 0.301


def test_main_job_is_the_same_twice(main_job, trained, small_task, tmp_path):
    first = trained(*TWO_STEPS)
    assert main_job("--dataset_name", small_task, *TWO_STEPS) == 0
    one, two = (load_file(out / "adapter_model.safetensors") for out in (first, tmp_path / "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradient_accumulation_is_the_whole_batch(small_task, main_job, tmp_path):
    for out, flags in (("whole", (8, 1)), ("quarters", (2, 4))):
        run = ("--dataset_name", small_task, "--max_train_steps", 2, "--output_dir", tmp_path / out)
        sizes = ("--per_device_train_batch_size", flags[0], "--gradient_accumulation_steps", flags[1])
        assert main_job(*run, *sizes) == 0
    whole, quarters = (prompts(tmp_path / out) for out in ("whole", "quarters"))
    # A step is 0.2 long in each entry. Sums are rounded in another order, so a few entries whose gradient is almost 0
    # have a step with another sign.
    for key in whole:
        assert ((whole[key] - quarters[key]).abs() > 5e-3).float().mean() < 1e-3


def test_gradients_are_clipped(small_task, main_job, tmp_path):
    """Adam does not see the length of gradients, but for what it adds to the root of their square."""
    for out, norm in (("free", 1e3), ("clipped", 1e-9)):
        flags = ("--max_train_steps", 1, "--max_grad_norm", norm, "--output_dir", tmp_path / out)
        assert main_job("--dataset_name", small_task, *flags) == 0
    free, clipped = (prompts(tmp_path / out) for out in ("free", "clipped"))
    start = prompts_of_the_start()
    moved = [sum((run[key] - start[key]).abs().sum() for key in start) for run in (free, clipped)]
    assert 0 < moved[1] < 0.1 * moved[0]


def prompts_of_the_start():
    """What seed 0 gives a new adapter of the shipped host."""
    set_seed(0)
    model = get_peft_model(AutoModelForZeroShotObjectDetection.from_pretrained(HOST), SDPTConfig())
    return {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}


# Before the first checkpoint, after one, and before the last.
@pytest.mark.parametrize("step", [1, 3, 6])
def test_killed_at_a_step_it_goes_on_as_if_nothing_had_happened(main_job, trained, at_step, small_task, tmp_path, step):
    whole = trained(*EVERYTHING)
    run = ("--dataset_name", small_task, *EVERYTHING, "--resume_from_checkpoint", "latest", "--output_dir")
    at_step(step, kill, accumulated=2)
    with pytest.raises(Killed):
        main_job(*run, tmp_path / "killed")
    assert (tmp_path / "killed" / "step_2").is_dir() == (step > 2)
    assert main_job(*run, tmp_path / "killed") == 0
    assert same_run(whole, tmp_path / "killed")


def test_a_resumed_run_needs_its_random_numbers(main_job, trained, at_step, small_task, tmp_path, capsys):
    """The check above could not fail if they did nothing; and without them nothing is resumed."""
    whole = trained(*EVERYTHING)
    run = ("--dataset_name", small_task, *EVERYTHING, "--resume_from_checkpoint", "latest", "--output_dir")
    at_step(4, kill, accumulated=2)
    with pytest.raises(Killed):
        main_job(*run, tmp_path / "killed")
    numbers = tmp_path / "killed" / "step_2" / "random_states_0.pkl"
    state = torch.load(numbers, weights_only=False)
    right = numbers.read_bytes()
    numbers.write_bytes(right[:100])
    assert main_job(*run, tmp_path / "killed") == 2
    assert "step_2: cannot be read" in capsys.readouterr().err
    state["torch_manual_seed"] = torch.Generator().manual_seed(99).get_state()
    torch.save(state, numbers)
    write_digests(numbers.parent)
    assert main_job(*run, tmp_path / "killed") == 0
    assert not same_run(whole, tmp_path / "killed")


def test_ctrl_c_saves_a_checkpoint_and_says_so_in_one_line(main_job, trained, at_step, small_task, tmp_path, capsys):
    whole = trained(*EVERYTHING)
    run = ("--dataset_name", small_task, *EVERYTHING, "--output_dir")
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT), accumulated=2)
    capsys.readouterr()
    assert main_job(*run, tmp_path / "stopped") == 130
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1] == ("train_detection.py: stopped after step 3 of 6; resume by --resume_from_checkpoint latest")
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    assert main_job(*run, tmp_path / "stopped", "--resume_from_checkpoint", tmp_path / "stopped" / "step_3") == 0
    assert same_run(whole, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(main_job, at_step, small_task, tmp_path, capsys):
    at_step(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert main_job("--dataset_name", small_task, "--max_train_steps", 4) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "train_detection.py: interrupted."
    assert not list((tmp_path / "out").glob("step_*"))


def test_checkpoints_come_each_epoch_and_the_newest_are_kept(main_job, small_task, tmp_path):
    flags = ("--checkpointing_steps", "epoch", "--num_train_epochs", 3, "--checkpoints_total_limit", 2)
    assert main_job("--dataset_name", small_task, "--per_device_train_batch_size", 6, *flags) == 0
    assert {path.name for path in (tmp_path / "out").glob("step_*")} == {"step_4", "step_6"}


def test_a_checkpoint_is_an_adapter_as_well(main_job, trained, small_task, tmp_path):
    whole = trained(*TWO_STEPS)
    assert main_job("--dataset_name", small_task, "--eval_only", "--adapter", whole / "step_2") == 0
    after, evaluated = (
        json.loads(file.read_text())["after"] for file in (whole / "metrics.json", tmp_path / "out/eval_metrics.json")
    )
    assert evaluated == after


def test_a_folder_with_checkpoints_is_not_trained_into_anew(main_job, trained, small_task, tmp_path, capsys):
    shutil.copytree(trained(*ONE_STEP), tmp_path / "out")
    assert main_job("--dataset_name", small_task, *ONE_STEP) == 2
    assert "has step_1 of an earlier run; resume it by --resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--learning_rate", 0.1), "belongs to another run, with --learning_rate '0.3' instead of '0.1'"),
        (("--max_train_steps", 2), "belongs to another run, with training steps 1 instead of 2"),
        (("--shots", 1), "belongs to another run, with training images"),
        (("--lora_rank", 2), "belongs to another run, with --lora_rank 'None' instead of '2'"),
        (("--per_device_train_batch_size", 3), "belongs to another run, with images per step 4 instead of 3"),
        (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere: is not a complete checkpoint"),
    ],
)
def test_a_checkpoint_of_other_arguments_is_refused(main_job, trained, small_task, tmp_path, capsys, flags, message):
    shutil.copytree(trained(*ONE_STEP), tmp_path / "out")
    assert main_job("--dataset_name", small_task, *ONE_STEP, "--resume_from_checkpoint", "latest", *flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(("split", "kind"), [("train", "training"), ("val", "validation"), ("test", "evaluation")])
def test_data_that_changed_since_the_checkpoint_are_refused(main_job, trained, own_task, tmp_path, capsys, split, kind):
    shutil.copytree(trained(*ONE_STEP), tmp_path / "out")
    edit(own_task / f"{split}.json", lambda coco: coco["annotations"].pop())
    assert main_job("--dataset_name", own_task, *ONE_STEP, "--resume_from_checkpoint", "latest") == 2
    assert f"belongs to another run, with {kind} images" in capsys.readouterr().err.strip().splitlines()[-1]


def test_gradients_that_are_not_finite_get_into_no_checkpoint(main_job, at_step, small_task, tmp_path, capsys):
    def poison():
        parameters = [p for m in gc.get_objects() if isinstance(m, SDPTLayer) for p in m.sdpt_prompts.values()]
        for parameter in filter(lambda parameter: parameter.requires_grad, parameters):
            parameter.register_hook(lambda gradient: gradient * float("nan"))

    at_step(2, poison)
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    assert main_job("--dataset_name", small_task, *flags) == 2
    assert "gradients are not finite any more at step 2" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("step_*")] == ["step_1"]
    assert all(value.isfinite().all() for value in prompts(tmp_path / "out" / "step_1").values())


def test_an_older_checkpoint_is_not_gone_on_from_beside_newer_ones(main_job, trained, small_task, tmp_path, capsys):
    shutil.copytree(trained(*TWO_STEPS), tmp_path / "whole")
    run = ("--dataset_name", small_task, *TWO_STEPS)
    first = ("--resume_from_checkpoint", tmp_path / "whole" / "step_1")
    assert main_job(*run, "--output_dir", tmp_path / "whole", *first) == 2
    assert "has step_2, which the checkpoints of the resumed run would mix with" in capsys.readouterr().err
    # Elsewhere it is, and keeps a best of its own.
    assert main_job(*run, "--output_dir", tmp_path / "out", *first) == 0
    assert same_run(tmp_path / "whole", tmp_path / "out") or not (tmp_path / "out" / "best").exists()
    assert all(torch.equal(value, prompts(tmp_path / "whole")[key]) for key, value in prompts(tmp_path / "out").items())


def test_an_evaluation_leaves_a_run_at_work_in_its_folder_alone(main_job, small_task, tmp_path):
    at_work = tmp_path / "out" / "step_7.unfinished"
    at_work.mkdir(parents=True)
    assert main_job("--dataset_name", small_task, "--eval_only") == 0 and at_work.is_dir()
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1) == 0 and not at_work.exists()


def test_a_picture_that_vanishes_in_mid_run_is_named_and_nothing_is_lost(
    main_job, trained, at_step, own_task, tmp_path, capsys
):
    whole = trained(*EVERYTHING)
    run = ("--dataset_name", own_task, *EVERYTHING)
    aside = tmp_path / "aside"
    at_step(3, lambda: shutil.move(own_task / "images", aside), accumulated=2)
    assert main_job(*run) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "/images/train_" in error and "Traceback" not in error
    # That of the step before, and one of this step, in which no checkpoint was due.
    assert {path.name for path in (tmp_path / "out").glob("step_*")} == {"step_2", "step_3"}
    shutil.move(aside, own_task / "images")
    assert main_job(*run, "--resume_from_checkpoint", tmp_path / "out" / "step_3") == 0
    assert same_run(whole, tmp_path / "out")


def test_a_worker_that_misses_a_picture_says_so_in_one_line(main_job, at_step, own_task, capsys):
    at_step(1, lambda: shutil.rmtree(own_task / "images"))
    flags = ("--max_train_steps", 40, "--per_device_train_batch_size", 1, "--dataloader_num_workers", 1)
    assert main_job("--dataset_name", own_task, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"train_detection.py: {own_task}/images/train_") and "Traceback" not in error


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(main_job, at_step, small_task, tmp_path, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        at_step(3, lambda: patch.setattr(torch, "save", full))
        flags = ("--max_train_steps", 4, "--checkpointing_steps", 2)
        assert main_job("--dataset_name", small_task, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint of step 4 cannot be written" in error and "No space left" in error
    assert error.endswith("step_2.") and [path.name for path in (tmp_path / "out").glob("step_*")] == ["step_2"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--checkpointing_steps", 1), "the checkpoint of step 1 cannot be written ("),
        (("--validation_steps", 1), "out/best: cannot be written ("),
        ((), "out: cannot be written ("),
    ],
)
def test_a_really_full_disk_is_one_line_and_leaves_earlier_results(
    main_job, trained, at_step, small_task, tmp_path, capsys, flags, said
):
    out = Path(shutil.copytree(trained(*ONE_STEP), tmp_path / "out", ignore=shutil.ignore_patterns("step_*")))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with contextlib.ExitStack() as stack:
        at_step(1, lambda: stack.enter_context(file_size_limit(4000)))
        steps = ("--max_train_steps", 2 if flags else 1, "--validation_steps", 9)
        assert main_job("--dataset_name", small_task, *steps, *flags) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert said in line and "File too large" in line
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not [path for path in out.rglob("*") if path.suffix == ".unfinished" or path.name.startswith("step_")]


def test_a_folder_that_another_command_writes_to_is_refused(main_job, small_task, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "step_3.unfinished").mkdir(parents=True)
    with only_writer(out):
        for flags in ((), ("--eval_only",), ("--resume_from_checkpoint", "latest")):
            assert main_job("--dataset_name", small_task, *flags) == 2
            error = capsys.readouterr().err
            assert error.splitlines() == [
                f"train_detection.py: --output_dir {out}: another command is writing to this folder; wait until it "
                "ends, or choose another folder."
            ]
        assert {path.name for path in out.iterdir()} == {LOCK, "step_3.unfinished"}


def test_workers_change_nothing(main_job, trained, small_task, tmp_path):
    whole = trained(*EVERYTHING)
    assert main_job("--dataset_name", small_task, *EVERYTHING, "--dataloader_num_workers", 2) == 0
    assert same_run(whole, tmp_path / "out")


def test_the_best_on_validation_is_kept_beside_the_last(main_job, small_task, tmp_path, monkeypatch):
    scores = iter([0.5, 0.2, 0.4, 0.3, 0.6])  # before, three validations, after
    analyse = train.analyse_precision

    def scripted(*args):
        return {**analyse(*args), "metrics": dict.fromkeys(("AP", "AP50", "AP75"), next(scores))}

    monkeypatch.setattr(train, "analyse_precision", scripted)
    flags = ("--max_train_steps", 3, "--validation_steps", 1, "--checkpointing_steps", 1)
    assert main_job("--dataset_name", small_task, *flags) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    threshold = json.loads((out / "best" / "detection.json").read_text())
    assert metrics["best"] == {"AP": 0.4, "AP50": 0.4, "AP75": 0.4, "step": 2, "threshold": threshold}
    assert [(each["step"], each["AP"]) for each in metrics["curves"]["validation"]] == [(1, 0.2), (2, 0.4), (3, 0.3)]
    assert metrics["before"]["AP"] == 0.5 and metrics["after"]["AP"] == 0.6
    for folder, step in (("", 3), ("best", 2)):
        kept, then = prompts(out / folder), prompts(out / f"step_{step}")
        assert all(torch.equal(kept[key], then[key]) for key in then)


def test_without_a_validation_split_only_the_last_is_kept(main_job, own_task, tmp_path, capsys):
    (own_task / "val.json").unlink()
    assert main_job("--dataset_name", own_task, "--max_train_steps", 1) == 0
    assert "has no split val: only the last adapter is saved" in capsys.readouterr().out
    out = tmp_path / "out"
    assert not (out / "best").exists()
    # The evaluation split suggests the threshold instead.
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["threshold"] == json.loads((out / "detection.json").read_text())
    assert metrics["threshold"]["split"] == "test" and metrics["curves"]["validation"] == []
    assert metrics["at_threshold"] == {key: value for key, value in metrics["threshold"].items() if key != "split"}


def test_the_report_has_what_happened(main_job, trained, small_task, tmp_path, capsys):
    """The file, the screen and the card have the same numbers."""
    assert main_job("--dataset_name", small_task, *TWO_STEPS) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    card = (out / "README.md").read_text()
    truth = json.loads((small_task / "test.json").read_text())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    objects = Counter(names[annotation["category_id"]] for annotation in truth["annotations"])
    classes = metrics["classes"]
    assert list(classes) == list(names.values())
    assert {name: entry["objects"] for name, entry in classes.items()} == {name: objects[name] for name in classes}
    for when in ("before", "after"):
        occurring = [entry[when]["AP"] for entry in classes.values() if entry[when]]
        assert len(occurring) == len(objects)
        assert sum(occurring) / len(occurring) == pytest.approx(metrics[when]["AP"], abs=1e-3)
        curve = metrics["precision_recall"][when]
        assert sum(curve) / len(curve) == pytest.approx(metrics[when]["AP50"], abs=1e-3)
    # Each object is found, missed or confused at the threshold.
    at, errors = metrics["at_threshold"], metrics["errors"]
    missed = sum(error["count"] for error in errors if error["error"] == "missed")
    confused = sum(error["count"] for error in errors if error["error"] == "confused")
    found = at["recall"] * objects.total()
    assert missed <= objects.total() - found + 0.1 <= missed + confused + 0.2
    assert metrics["threshold"]["threshold"] == at["threshold"] and metrics["threshold"]["split"] == "val"
    assert metrics["images"]["test"] == {
        **{"images": 4, "images_without_objects": 0, "objects": objects.total()},
        "most_objects": max(Counter(annotation["image_id"] for annotation in truth["annotations"]).values()),
    }
    assert metrics["curves"]["loss"]["step"] == [1, 2] and min(metrics["curves"]["loss"]["value"]) > 0
    assert [each["step"] for each in metrics["curves"]["validation"]] == [2]

    worst = min((entry["after"]["AP"], name) for name, entry in classes.items() if entry["after"])[1]
    assert f"  {worst} " in said and f"at a score of at least {at['threshold']:g}: F1 {at['f1']:.3f}" in said
    assert f"suggested score threshold: {at['threshold']:g}, from the split val" in said
    assert f"| {worst} | {classes[worst]['before']['AP']:.3f} | {classes[worst]['after']['AP']:.3f} |" in card
    assert f"F1 {at['f1']:.3f}, precision {at['precision']:.3f}" in card and "report.png" in card
    # Lists of numbers are on one line.
    assert len((out / "metrics.json").read_text().splitlines()) < 1500


def test_a_chart_that_fails_loses_nothing(main_job, small_task, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such font\n\x1b[31m")

    out = tmp_path / "out"
    out.mkdir()
    (out / "eval_report.png").write_text("of an earlier run")
    monkeypatch.setattr(train_results, "draw_report", fail)
    assert main_job("--dataset_name", small_task, "--eval_only", charts=True) == 0
    said = capsys.readouterr().out
    assert "eval_report.png could not be drawn: no such font \\x1b[31m\n" in said
    assert f"wrote eval_detections.png, eval_metrics.json in {out}\n" in said
    assert json.loads((out / "eval_metrics.json").read_text())["before"]["AP"] > 0
    assert sorted(path.name for path in out.iterdir()) == ["eval_detections.png", "eval_metrics.json"]


def test_strange_names_and_oblong_photos_are_trained_measured_and_reported(main_job, own_task, tmp_path, capsys):
    """Names have line breaks, and photos have fewer positions than the detector has queries."""
    for split in ("train", "val", "test"):

        def change(coco):
            for number, category in enumerate(coco["categories"]):
                category["name"] += f"\n\x00 ${number}_{{x}}$ <b>|`"
            image = coco["images"][0]
            Image.effect_noise((2000, 50), 90).convert("RGB").save(own_task / "images" / image["file_name"])
            image |= {"width": 2000, "height": 50}
            for annotation in coco["annotations"]:
                if annotation["image_id"] == image["id"]:
                    annotation["bbox"] = [4, 5, 30, 40]

        edit(own_task / f"{split}.json", change)
    assert main_job("--dataset_name", own_task, *ONE_STEP, charts=True) == 0
    out, said = tmp_path / "out", capsys.readouterr().out
    name = json.loads((out / "class_names.json").read_text())[0]
    assert name == "monkey $0_{x}$ <b>|`"
    assert name in json.loads((out / "metrics.json").read_text())["classes"]
    assert "could not be drawn" not in said and (out / "report.png").is_file() and (out / "detections.png").is_file()
    # In a model card, names are shown as they are. They are not HTML, and do not end a cell of a table.
    results = (out / "README.md").read_text().partition("## Results")[2]
    assert "&#60;b&#62;&#124;&#96;" in results and "<b>" not in results


def test_one_of_a_kind_is_singular(capsys):
    one, two = make_split([[BOX]]), make_split([[BOX], []], classes=2)
    assert (size_of(one), size_of(two)) == ("1 image of 1 class", "2 images of 2 classes")
    print_images({"train": two, "val": make_split([[BOX] * 2], classes=2)}, {"val"}, 1, 900)
    assert capsys.readouterr().out.splitlines() == [
        "train: 1 of 2 images has no objects",
        "val: 1 image has more than 1 object, and AP counts the 1 best detections per image; "
        "--max_detections 100 counts more",
    ]


def test_images_without_objects_and_with_many_are_told(main_job, own_task, tmp_path, capsys):
    for split, number in (("train", 1), ("test", 2)):

        def empty(coco, number=number):
            images = [image["id"] for image in coco["images"][:number]]
            coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] not in images]

        edit(own_task / f"{split}.json", empty)
    assert main_job("--dataset_name", own_task, "--max_train_steps", 1, "--max_detections", 2) == 0
    said, metrics = capsys.readouterr().out, json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "train: 1 of 12 images has no objects\n" in said and "test: 2 of 4 images have no objects\n" in said
    assert "val: 4 images in COCO format from" in said
    crowded = [line for line in said.splitlines() if "more than 2 objects, and AP counts the 2 best detections" in line]
    assert crowded and all(line.endswith("--max_detections 100 counts more") for line in crowded)
    assert not [line for line in crowded if line.startswith("train")]
    assert metrics["images"]["test"]["images_without_objects"] == 2
    assert metrics["images"]["train"]["images_without_objects"] == 1


def test_a_threshold_that_nothing_suggests_is_the_default(main_job, small_task, tmp_path, monkeypatch, capsys):
    """No detection is right."""
    monkeypatch.setattr(train, "detect_split", lambda *_, **__: [])
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["threshold"] is None and metrics["at_threshold"]["threshold"] == 0.3
    assert {error["error"] for error in metrics["errors"]} == {"missed"}
    assert not list((tmp_path / "out").rglob("detection.json"))
    assert "suggested score threshold" not in capsys.readouterr().out


def test_the_licence_is_that_of_the_base_model_or_the_flag(main_job, trained, small_task, tmp_path, capsys):
    assert licence_of(trained(*TWO_STEPS)) == licence_of(trained(*TWO_STEPS) / "best") == {"license": "apache-2.0"}
    # The licence of the card in the output folder stays, unless the flag gives another one.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run = ("--dataset_name", small_task, "--max_train_steps", 1)
    for flags, licence in (((), "mit"), (("--license", "cc-by-4.0"), "cc-by-4.0")):
        assert main_job(*run, *flags) == 0
        assert licence_of(tmp_path / "out") == licence_of(tmp_path / "out" / "best") == {"license": licence}
    for wrong in ("Apache 2", ""):
        assert main_job(*run, "--license", wrong) == 2
        assert f"--license{' ' * bool(wrong)}{wrong}: " in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="files have no such permissions")
def test_all_files_of_a_run_are_readable_as_the_umask_says(main_job, small_task, tmp_path):
    before = os.umask(0o027)
    try:
        assert main_job("--dataset_name", small_task, *ONE_STEP) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"out", "best", "step_1"}
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): "0o640" for path in files}


LORA = ("--lora_rank", 2, "--lora_learning_rate", 0.01)


def test_lora_trains_at_its_own_rate_and_is_a_part_of_the_adapter(main_job, trained, small_task, tmp_path):
    out = Path(shutil.copytree(trained(*ONE_STEP, *LORA), tmp_path / "out"))
    weights = prompts(out)
    # Adam moves each entry of its first step by the rate. B starts at zero.
    steps = torch.cat([value.abs().flatten() for key, value in weights.items() if key.endswith("sdpt_lora_B")])
    assert steps.max() == pytest.approx(0.01, rel=1e-3) and steps.median() > 0.001
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trainable_parameters"] == sum(value.numel() for value in weights.values())
    assert metrics["args"]["lora_rank"] == 2 and metrics["args"]["lora_learning_rate"] == 0.01
    assert "| LoRA | rank 2" in (out / "README.md").read_text()

    assert main_job("--dataset_name", small_task, "--eval_only", "--adapter", out, charts=True) == 0
    again = json.loads((out / "eval_metrics.json").read_text())
    assert again["before"] == metrics["before"] and again["after"] == metrics["after"]

    further = ("--adapter", out, "--lora_learning_rate", 0.001, "--output_dir", tmp_path / "further")
    assert main_job("--dataset_name", small_task, *ONE_STEP, *further) == 0
    then = prompts(tmp_path / "further")
    moved = {key: (then[key] - value).abs().max().item() for key, value in weights.items()}
    assert all(0 < moved[key] < 0.002 for key in moved if "lora" in key)
    assert all(moved[key] > 0.1 for key in moved if "prompts" in key)


def test_a_rate_for_lora_that_an_adapter_has_not_is_refused(main_job, trained, small_task, capsys):
    flags = ("--adapter", trained(*ONE_STEP), "--lora_learning_rate", 0.1)
    assert main_job("--dataset_name", small_task, *ONE_STEP, *flags) == 2
    assert "--lora_learning_rate 0.1: --adapter " in capsys.readouterr().err


def test_a_killed_run_with_lora_goes_on_as_if_nothing_had_happened(main_job, trained, at_step, small_task, tmp_path):
    whole = trained(*EVERYTHING, *LORA)
    run = ("--dataset_name", small_task, *EVERYTHING, *LORA, "--resume_from_checkpoint", "latest", "--output_dir")
    at_step(4, kill, accumulated=2)
    with pytest.raises(Killed):
        main_job(*run, tmp_path / "killed")
    assert (tmp_path / "killed" / "step_2").is_dir()
    assert main_job(*run, tmp_path / "killed") == 0
    assert same_run(whole, tmp_path / "killed")


def test_a_moving_average_is_what_is_saved_and_measured(main_job, trained, small_task, tmp_path):
    """Over two steps of decay d the average is d p1 + (1 - d) p2."""
    plain, average = trained(*TWO_STEPS), tmp_path / "out"
    assert main_job("--dataset_name", small_task, *TWO_STEPS, "--ema_decay", 0.75) == 0
    first, second = (prompts(plain / name) for name in ("step_1", "step_2"))
    for key, value in prompts(average).items():
        torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * second[key])
        assert torch.equal(prompts(average / "step_2")[key], second[key])


def test_bf16_ends_near_single_precision(main_job, trained, small_task, tmp_path):
    single = prompts(trained(*TWO_STEPS))
    assert main_job("--dataset_name", small_task, "--max_train_steps", 2, "--mixed_precision", "bf16") == 0
    half = prompts(tmp_path / "out")
    assert {value.dtype for value in half.values()} == {torch.float32}
    moved = torch.cat([(single[key] - half[key]).abs().flatten() for key in single])
    assert moved.max() > 0
    # A step is 0.2 long in each entry.
    assert moved.median() < 0.02


def test_tracking_logs_loss_rate_precision_and_prompt_norms(main_job, small_task, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ("--max_train_steps", 3, "--validation_steps", 2, "--with_tracking", "--report_to", "tensorboard")
    assert main_job("--dataset_name", small_task, *flags) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "out" / "train_detection"))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["loss"] == steps["learning_rate"] == steps["prompt_norm/layer_0"] == [1, 2, 3]
    assert steps["validation/AP"] == [2, 3] and steps["before/AP50"] == [0] and steps["after/AP50"] == [3]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert events.Scalars("after/AP50")[0].value == pytest.approx(metrics["after"]["AP50"])
    (tokens,) = (
        value
        for key, value in prompts(tmp_path / "out").items()
        if key.endswith("layers.0.fusion_layer.attn.sdpt_prompts")
    )
    norm = tokens.norm(dim=-1).mean().item()
    assert events.Scalars("prompt_norm/layer_0")[-1].value == pytest.approx(norm)


def test_processes_that_accelerate_does_not_see_are_refused(main_job, small_task, capsys, monkeypatch):
    """They would all write into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert main_job("--dataset_name", small_task) == 2
    assert "set ACCELERATE_USE_CPU=true" in capsys.readouterr().err.strip().splitlines()[-1]


def test_shots_of_which_there_are_not_enough_are_told(main_job, small_task, capsys):
    assert main_job("--dataset_name", small_task, "--shots", 11, "--max_train_steps", 1) == 0
    assert "--shots 11: class 'monkey' is on" in capsys.readouterr().out


def test_shots_train_on_few_images_and_write_down_which(main_job, small_task, tmp_path):
    drawn = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ("--shots", 1, "--seed", seed, "--max_train_steps", 1, "--output_dir", tmp_path / out)
        assert main_job("--dataset_name", small_task, *flags) == 0
        drawn.append(json.loads((tmp_path / out / "shots.json").read_text()))
    assert drawn[0] == drawn[1] and drawn[0]["shots"] == 1
    assert drawn[0]["image_ids"] != drawn[2]["image_ids"]
    coco = json.loads((small_task / "train.json").read_text())
    assert set(drawn[0]["image_ids"]) < {image["id"] for image in coco["images"]}
    kept = {a["category_id"] for a in coco["annotations"] if a["image_id"] in drawn[0]["image_ids"]}
    assert kept == {a["category_id"] for a in coco["annotations"]}


def test_classes_of_splits_are_matched_by_name(main_job, own_task, tmp_path, capsys):
    """Each file has its own order of classes and lacks classes that it does not use, as some tools write it."""

    def reorder(coco):
        coco["categories"].reverse()
        used = {annotation["category_id"] for annotation in coco["annotations"]}
        coco["categories"] = [category for category in coco["categories"] if category["id"] in used]
        coco["categories"][0]["name"] = "big_Ape"

    before = json.loads((own_task / "train.json").read_text())["categories"]
    edit(own_task / "test.json", reorder)
    assert main_job("--dataset_name", own_task, "--max_train_steps", 1) == 0
    saved = json.loads((tmp_path / "out" / "class_names.json").read_text())
    assert saved == [*(category["name"] for category in before), "big_Ape"]
    output = capsys.readouterr().out
    assert "class names are read as words: 'big_Ape' as 'big ape'" in output
    assert "split train has no class 'big_Ape', which another split has" in output


def test_a_data_set_without_splits_is_divided(main_job, own_task, tmp_path, capsys):
    coco = json.loads((own_task / "train.json").read_text())
    for split in ("val", "test"):
        (own_task / f"{split}.json").unlink()
    ids = sorted(image["id"] for image in coco["images"])
    assert main_job("--dataset_name", own_task, "--max_train_steps", 1, "--seed", 1) == 0
    line = "the data set has no splits; its images are divided: 8 train, 2 val, 2 test (see splits.json)"
    assert line in capsys.readouterr().out
    written = (tmp_path / "out" / "splits.json").read_text()
    record = json.loads(written)["image_ids"]
    assert sorted(record["train"] + record["val"] + record["test"]) == ids
    before = json.loads((tmp_path / "out" / "metrics.json").read_text())["before"]
    # An evaluation with any seed measures the same images, in the same folder and of the adapter.
    flags = ("--dataset_name", own_task, "--eval_only")
    for more in ((), ("--output_dir", tmp_path / "again", "--adapter", tmp_path / "out" / "best")):
        assert main_job(*flags, *more) == 0
    assert (tmp_path / "out" / "splits.json").read_text() == written
    assert json.loads((tmp_path / "again" / "splits.json").read_text())["image_ids"] == record
    for folder in ("out", "again"):
        assert json.loads((tmp_path / folder / "eval_metrics.json").read_text())["before"] == before
    # Another seed makes other splits in another folder.
    assert main_job(*flags, "--output_dir", tmp_path / "other") == 0
    assert json.loads((tmp_path / "other" / "splits.json").read_text())["image_ids"]["test"] != record["test"]
    capsys.readouterr()
    assert main_job(*flags, "--train_split", "val", "--output_dir", tmp_path / "other") == 2
    assert "--train_split val: the data set has only one split, train." in capsys.readouterr().err
    shutil.copy(own_task / "images" / "train_0000.png", own_task / "images" / "new.png")
    new = {"id": 999, "file_name": "new.png"}
    edit(own_task / "train.json", lambda coco: coco["images"].append({**coco["images"][0], **new}))
    assert main_job(*flags) == 2
    assert "splits.json: does not list the image 999" in capsys.readouterr().err


def test_more_objects_than_queries_are_told(main_job, own_task, capsys):
    """The small base model has 50 queries."""

    def crowd(coco):
        box = {"image_id": coco["images"][0]["id"], "category_id": coco["categories"][0]["id"], "bbox": [0, 0, 9, 9]}
        coco["annotations"] += [{"id": 1000 + index, **box} for index in range(60)]

    edit(own_task / "test.json", crowd)
    assert main_job("--dataset_name", own_task, "--eval_only") == 0
    assert "test: 1 image with more objects than the 50 queries of the detector" in capsys.readouterr().out


def test_undecided_photos_are_told(main_job, own_task, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    for file in list((own_task / "images").glob("test_*.png"))[:2]:
        with Image.open(file) as image:
            image.load()
        image.save(file, exif=exif)
    assert main_job("--dataset_name", own_task, "--eval_only") == 0
    assert "split test: 2 photos have an EXIF orientation, and the size does not tell" in capsys.readouterr().out


def test_names_for_prompts_are_what_the_adapter_is_saved_with(main_job, small_task, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"monkey": "small ape"}))
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1, "--class_names_file", names) == 0
    assert json.loads((tmp_path / "out" / "class_names.json").read_text())[:2] == ["small ape", "horse"]


def test_images_that_do_not_open_are_left_out_only_when_asked(main_job, own_task, tmp_path, capsys):
    for split in ("train", "val", "test"):
        picture = own_task / "images" / f"{split}_0001.png"
        picture.write_bytes(picture.read_bytes()[:200])
    run = ("--dataset_name", own_task, "--max_train_steps", 1, "--output_dir")
    assert main_job(*run, tmp_path / "strict") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "_0001.png" in error and "--skip_bad_images" in error
    assert main_job(*run, tmp_path / "out", "--skip_bad_images") == 0
    output = capsys.readouterr().out
    assert output.count("left out: ") == 3 and "test split of 3 images" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_virtual_tokens", 0), "--num_virtual_tokens 0"),
        (("--learning_rate", -1), "--learning_rate -1"),
        (("--learning_rate", "inf"), "--learning_rate inf"),
        (("--lora_rank", 0), "--lora_rank 0: must be at least 1"),
        (("--lora_rank", 1, "--lora_learning_rate", 0), "--lora_learning_rate 0.0: must be positive"),
        (("--lora_learning_rate", 0.1), "--lora_learning_rate 0.1: needs --lora_rank"),
        (
            ("--lora_rank", 1, "--lora_learning_rate", 1e37, "--validation_steps", 9),
            "not finite any more at step 2: lower --learning_rate or --lora_learning_rate",
        ),
        (("--weight_decay", -1), "--weight_decay -1"),
        (("--num_warmup_steps", -1), "--num_warmup_steps -1"),
        (("--seed", -1), "--seed -1"),
        (("--output_dir", "/proc/nowhere"), "--output_dir /proc/nowhere: cannot be written ("),
        (
            ("--learning_rate", 1e37, "--validation_steps", 9),
            # The first step moves gates, the second moves tokens.
            "boxes are not finite any more at step 3: lower --learning_rate",
        ),
        (
            ("--learning_rate", 1e37, "--max_train_steps", 2),
            "for float32. If training caused this, lower the learning rate.",
        ),
        (("--max_train_steps", 0), "--max_train_steps 0"),
        (("--dataset_name", "no/such folder"), "no/such folder"),
        (("--eval_split", "nosuch"), "no split 'nosuch'"),
        (("--train_split", "nosuch"), "no split 'nosuch'"),
        (("--validation_split", "nosuch"), "no split 'nosuch'"),
        (("--shots", 0), "--shots 0"),
        (("--image_size", 16), "--image_size 16: does not suit this base model"),
        (("--ema_decay", 1), "--ema_decay 1.0"),
        (("--prompt_dropout", 1), "--prompt_dropout 1.0"),
        (("--checkpointing_steps", 0), "--checkpointing_steps 0"),
        (("--checkpointing_steps", "often"), "--checkpointing_steps often"),
        (("--checkpoints_total_limit", 0), "--checkpoints_total_limit 0"),
        (("--dataloader_num_workers", -1), "--dataloader_num_workers -1"),
        (("--dataset_name", ""), "--dataset_name: is empty"),
        (("--adapter", ""), "--adapter: is empty"),
        (("--class_names_file", "no-such.json"), "no-such.json"),
        (("--class_names_column", "synonym"), "no `synonym`"),
        (("--bbox_format", "xyxy"), "--bbox_format"),
        (("--with_tracking", "--report_to", "nosuch"), "--report_to nosuch"),
        (("--eval_only", "--resume_from_checkpoint", "latest"), "--resume_from_checkpoint"),
        (("--pinv_rtol", 2), "--pinv_rtol 2.0"),
        (
            ("--adapter", "somewhere", "--num_virtual_tokens", 5),
            "--num_virtual_tokens: cannot be changed, because --adapter",
        ),
        (("--adapter", "somewhere", "--lora_rank", 5), "--lora_rank: cannot be changed, because --adapter"),
        (("--model_name_or_path", "no-such-folder"), "--model_name_or_path no-such-folder"),
        (("--adapter", "no-such-folder"), "--adapter no-such-folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main_job, small_task, offline, flags, message, capsys):
    assert main_job("--dataset_name", small_task, *flags) == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error


@pytest.fixture
def strange_host(tmp_path):
    """A zero-shot detector without fusion layers, with a processor that loads."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {"image_size": 32, "patch_size": 16, **text}
    config = OwlViTConfig(text_config={"vocab_size": 1100, **text}, vision_config=vision, projection_dim=16)
    OwlViTForObjectDetection(config).save_pretrained(tmp_path / "owlvit")
    AutoProcessor.from_pretrained(HOST).save_pretrained(tmp_path / "owlvit")
    return tmp_path / "owlvit"


def test_a_base_model_of_another_kind_is_refused_before_anything_else(
    main_job, small_task, strange_host, tmp_path, monkeypatch, capsys
):
    for name in ("make_accelerator", "load_splits", "load_base_model"):
        monkeypatch.setattr(train, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    for flags in ((), ("--image_size", 32), ("--eval_only",)):
        assert main_job("--dataset_name", small_task, "--model_name_or_path", strange_host, *flags) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--model_name_or_path {strange_host}: must be a Grounding DINO, MM Grounding DINO or LLMDet" in error
        assert "its type is 'owlvit'" in error
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_host_is_refused(main_job, small_task, tmp_path, capsys):
    attach(make_host()).save_pretrained(tmp_path / "theirs")
    assert main_job("--dataset_name", small_task, "--adapter", tmp_path / "theirs") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--adapter {tmp_path / 'theirs'}: cannot be loaded on the base model" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda coco: coco.pop("categories"), "not a COCO file"),
        (lambda coco: coco["images"].clear(), "has the unknown image_id"),
        (lambda coco: coco["categories"].clear(), "unknown category_id"),
        (lambda coco: [coco[part].clear() for part in ("images", "annotations")], "has no images"),
        (lambda coco: [coco[part].clear() for part in ("categories", "annotations")], "has no categories"),
        (lambda coco: coco["images"].append(coco["images"][0]), "image ids are not unique"),
        (lambda coco: coco["annotations"][0].update(category_id=999), "unknown category_id 999"),
        (lambda coco: coco["annotations"][0].update(bbox=[0, 0, 0, 5]), "is empty"),
        (lambda coco: coco["annotations"][0].update(bbox=[0, 0, 500, 5]), "lies outside its image"),
        (lambda coco: coco["annotations"][0].update(bbox=[0, float("nan"), 5, 5]), "must be four finite numbers"),
        (lambda coco: coco["images"][0].update(file_name="gone.png"), "gone.png: no such image"),
        (lambda coco: coco["categories"][0].update(name="horse"), "several categories named horse ('horse', 'horse')"),
    ],
)
def test_bad_annotations_are_one_line_and_exit_code_2(main_job, own_task, change, message, capsys):
    edit(own_task / "test.json", change)
    assert main_job("--dataset_name", own_task) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train_detection.py: ") and message in error


def test_an_annotation_file_that_is_not_json_is_one_line(main_job, own_task, capsys):
    (own_task / "train.json").write_text("images:")
    assert main_job("--dataset_name", own_task) == 2
    assert "train.json: not JSON" in capsys.readouterr().err.strip().splitlines()[-1]


def keep_one_image(coco):
    del coco["images"][1:]
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] == coco["images"][0]["id"]]


@pytest.mark.slow
def test_a_vocabulary_as_large_as_that_of_lvis_takes_the_memory_of_one_prompt(small_task, tmp_path):
    """1203 classes against 300, which fill several prompts too: sampled in training, in chunks in evaluation."""
    words = json.loads((HOST / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in words if word.isalpha() and word.isascii()]
    sizes, runs = (300, 1203), []
    for num_classes in sizes:
        data = tmp_path / f"{num_classes}"
        runs += [data, tmp_path / f"{num_classes}-out"]
        shutil.copytree(small_task, data)
        for file in data.glob("*.json"):

            def enlarge(coco, more=num_classes - 40):
                pairs = itertools.islice(itertools.permutations(words, 2), more)
                coco["categories"] += [{"id": 1000 + i, "name": " ".join(pair)} for i, pair in enumerate(pairs)]

            edit(file, enlarge)
        # The four images of the test split are one batch. Those of the validation split would be another one like it.
        edit(data / "val.json", keep_one_image)
    process = launched(("-c", PEAK_MEMORY, SCRIPT, *runs), stdout=subprocess.PIPE, text=True)
    lines = process.communicate(timeout=PATIENCE)[0].splitlines()
    assert process.returncode == 0
    for num_classes, out in zip(sizes, runs[1::2], strict=True):
        assert len(json.loads((out / "class_names.json").read_text())) == num_classes
    few, many = (int(line.removeprefix("peak: ")) for line in lines if line.startswith("peak: "))
    assert many < 1.1 * few


# Runs a script for each pair of a data set and an output folder. Prints the most memory that the process had until
# then, kB.
PEAK_MEMORY = """
import resource, runpy, sys
script, *folders = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
for data, out in zip(folders[::2], folders[1::2]):
    sys.argv = [script, "--dataset_name", data, "--max_train_steps", "1", "--output_dir", out]
    runpy.run_path(script, run_name="__main__")
    print("peak:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# More kills for a soak: KILLS=20 python -m pytest -k soak
KILLS = int(os.environ.get("KILLS", 2))


@pytest.mark.slow
def test_soak_killed_at_random_instants_it_ends_in_the_same_prompts(main_job, small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as in the processes that are killed
    # Enough that none ends before it is killed. Kills after steps are at most three steps and a second apart.
    steps = 6 + 6 * KILLS
    run = (
        *("--dataset_name", small_task, *SHORT, *EVERYTHING, "--max_train_steps", steps, "--validation_steps", 8),
        *("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--resume_from_checkpoint", "latest"),
        "--output_dir",
    )
    assert main_job(*run, tmp_path / "whole") == 0
    out, chance = tmp_path / "killed", random.Random(0)

    def newest():
        return int(folder.name.removeprefix("step_")) if (folder := checkpoints.latest(out)) else 0

    for number in range(KILLS):
        process, first = launched([SCRIPT, *run, out], stderr=subprocess.DEVNULL), newest()
        # Every third while it starts, loads and measures, the others after some steps.
        further = (3, 0, 1)[number % 3]
        pause = chance.uniform(0, 0.5 if further else 8)
        deadline = time.monotonic() + (PATIENCE if further else pause)
        while newest() < first + max(further, 1) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(pause if further else 0)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < newest() <= steps
    assert main_job(*run, out) == 0
    assert same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one_does(main_job, small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for processes in (1, 2):
        flags = (
            *("--dataset_name", small_task, "--max_train_steps", 2, "--num_warmup_steps", 0, "--ema_decay", 0.5),
            *("--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 4 // processes),
            *("--checkpointing_steps", 1, "--output_dir", tmp_path / str(processes)),
        )
        if processes == 1:
            assert main_job(*flags) == 0
        else:
            # torchrun, because `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15).
            launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, SCRIPT)
            assert launched((*launcher, *flags)).wait(timeout=PATIENCE) == 0
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert one["before"] == pytest.approx(two["before"], abs=2e-4)
    assert one["after"] == pytest.approx(two["after"], abs=2e-2)
    # The same global batches, but for the order in which their losses are summed. A step is 0.2.
    for folder in ("", "step_1", "step_2"):
        one, two = (prompts(tmp_path / n / folder) for n in "12")
        assert all(torch.allclose(one[key], two[key], atol=5e-3) for key in one)
    files = [{str(path.relative_to(tmp_path / n)) for path in (tmp_path / n).rglob("*")} for n in "12"]
    # Each process has random numbers of its own; all else is written once.
    assert files[1] - files[0] == {f"step_{step}/random_states_1.pkl" for step in (1, 2)} and files[0] < files[1]


@pytest.mark.slow
def test_two_processes_are_stopped_and_resumed_together(small_task, tmp_path):
    run = (
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, SCRIPT, "--dataset_name", small_task),
        *("--max_train_steps", 12, "--per_device_train_batch_size", 1, "--prompt_dropout", 0.3),
        *("--checkpointing_steps", 2, "--validation_steps", 6, "--resume_from_checkpoint", "latest", "--output_dir"),
    )
    assert launched([*run, tmp_path / "whole"]).wait(timeout=PATIENCE) == 0
    process = launched([*run, tmp_path / "stopped"], stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "stopped" / "step_2").is_dir)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    assert "resume by --resume_from_checkpoint latest" in process.communicate(timeout=PATIENCE)[1]
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    assert launched([*run, tmp_path / "stopped"]).wait(timeout=PATIENCE) == 0
    assert same_run(tmp_path / "whole", tmp_path / "stopped")


LEFT_WORKER = """
import multiprocessing, os, signal, sys
from torch.utils.data import DataLoader
from peft_sdpt.training import make_worker_init_fn

multiprocessing.set_start_method(sys.argv[1])
batches = iter(DataLoader(range(40), num_workers=1, worker_init_fn=make_worker_init_fn(1)))
next(batches)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
assert [int(batch) for batch in batches] == list(range(1, 40))
batches = iter(DataLoader(range(40), num_workers=1, worker_init_fn=make_worker_init_fn(1)))
next(batches)
multiprocessing.kept = batches  # as the traceback of an error may keep it, to the very end
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_is_left_at_the_end_does_not_hold_it_up(method):
    result = run_python(LEFT_WORKER, method)
    assert result.returncode == 0 and "DataLoader" not in result.stderr and "Traceback" not in result.stderr


IMPORT = """
import atexit, signal
registered, register = [], atexit.register
atexit.register = lambda function, *args, **kwargs: registered.append(function) or register(function, *args, **kwargs)
before = [signal.getsignal(number) for number in signal.valid_signals()]
import peft_sdpt.detection, peft_sdpt.training
assert registered  # torch registers some
assert not [f for f in registered if (getattr(f, "__module__", None) or "").startswith("peft_sdpt")], registered
assert peft_sdpt.training.make_worker_init_fn(0) is None
assert peft_sdpt.training.interruption._exit_flag.cache_info().currsize == 0
assert [signal.getsignal(number) for number in signal.valid_signals()] == before
"""


def test_an_import_registers_no_exit_or_signal_handler():
    result = run_python(IMPORT)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_workers_at_work(small_task, tmp_path):
    run = (SCRIPT, "--dataset_name", small_task, "--max_train_steps", 60, "--per_device_train_batch_size", 1)
    process = launched(
        [*run, "--dataloader_num_workers", 2, "--checkpointing_steps", 2, "--output_dir", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((tmp_path / "step_2").is_dir)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130 and "resume by --resume_from_checkpoint latest" in error


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two_is_not_passed_over(small_task, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2)
    command = (*launcher, SCRIPT, "--dataset_name", small_task, "--eval_only", "--output_dir", tmp_path)
    process = launched(command, stderr=subprocess.PIPE, text=True)
    error = process.communicate(timeout=PATIENCE)[1]
    assert "To start N processes on the CPU: ACCELERATE_USE_CPU=true torchrun" in error
    assert process.returncode == 0


@pytest.mark.skipif(not (ROOT.parent / "shared" / "datasets" / "bccd").is_dir(), reason="the photographs are not here")
def test_real_photographs_go_through_training(main_job, tmp_path):
    bccd = ROOT.parent / "shared" / "datasets" / "bccd"
    assert main_job("--dataset_name", bccd, "--max_train_steps", 1, "--eval_split", "val") == 0
    assert (
        PeftModel.from_pretrained(AutoModelForZeroShotObjectDetection.from_pretrained(HOST), tmp_path / "out")
        .peft_config["default"]
        .num_virtual_tokens
        == 20
    )


def test_an_empty_output_dir_is_not_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_detection.py", "--output_dir", ""])
    with pytest.raises(SystemExit) as stopped:
        train_detection.main()
    assert stopped.value.code == 2 and "argument --output_dir: is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
