# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped host, the main job and the recipe, run as a user runs them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

import pretrain_host
import train_detection
from coco_metrics import evaluate
from peft_sdpt import SDPTLayer
from pictograms import tasks

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "examples" / "host"


@pytest.fixture(scope="module")
def host():
    return AutoModelForZeroShotObjectDetection.from_pretrained(HOST, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def small_task(tmp_path_factory):
    """The built-in task with few pictures, as a COCO folder."""
    folder = tmp_path_factory.mktemp("task")
    task = dataclasses.replace(tasks.TASKS["twemoji"], train=12, val=4, test=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "twemoji", task)
        tasks.write_task("twemoji", folder, disable_progress=True)
    return folder


@pytest.fixture
def main_job(monkeypatch, tmp_path):
    """Run the main job in this process; returns its exit code, 0 when it just returns."""

    def run(*flags) -> int:
        # Warm-up starts at a rate of zero: the first of a few steps would do nothing.
        arguments = ["--output_dir", tmp_path / "out", "--num_warmup_steps", 0, *flags]
        monkeypatch.setattr(sys, "argv", ["train_detection.py", *map(str, arguments)])
        try:
            train_detection.main()
        except SystemExit as exit:
            return exit.code
        return 0

    return run


def test_the_shipped_host_loads_in_single_precision(host):
    assert AutoModelForZeroShotObjectDetection.from_pretrained(HOST).dtype == torch.float32
    assert {p.dtype for p in load_file(HOST / "model.safetensors").values() if p.is_floating_point()} == {torch.float16}


def test_the_aligned_space_of_the_shipped_host_is_wider_than_its_inputs(host):
    fusion = host.model.encoder.layers[0].fusion_layer.attn
    assert fusion.embed_dim >= 4 * fusion.vision_dim == 4 * host.config.d_model


def test_the_shipped_host_finds_pictograms_it_was_trained_on(host):
    scenes = pretrain_host.held_out_scenes(seen=True, num_images=60)
    metrics = evaluate(host, AutoProcessor.from_pretrained(HOST), scenes, 20, Accelerator())
    # Few pictures of 355 classes are a noisy measure; the recipe measures 500.
    assert metrics["AP50"] > 0.7


def test_main_job_trains_measures_and_saves(main_job, small_task, tmp_path):
    assert main_job("--dataset_name", small_task, "--max_train_steps", 2, "--per_device_train_batch_size", 4) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {
        *("before", "after", "trainable_parameters", "total_parameters", "train_seconds", "args"),
    }
    assert set(metrics["before"]) == set(metrics["after"]) == {"AP", "AP50", "AP75"}
    prompts = load_file(out / "adapter_model.safetensors")
    assert metrics["trainable_parameters"] == sum(p.numel() for p in prompts.values())
    assert metrics["trainable_parameters"] < 0.005 * metrics["total_parameters"]
    assert (out / "adapter_config.json").is_file() and (out / "detections.png").is_file()

    # The saved adapter gives the very numbers that were measured before saving.
    assert main_job("--dataset_name", small_task, "--eval_only", "--adapter", out) == 0
    again = json.loads((out / "eval_metrics.json").read_text())
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert again["before"] == metrics["before"] and again["after"] == metrics["after"]
    assert again["trainable_parameters"] == 0


def test_main_job_goes_on_from_a_saved_adapter(main_job, small_task, tmp_path, host):
    first = tmp_path / "first"
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1, "--output_dir", first) == 0
    assert main_job("--dataset_name", small_task, "--max_train_steps", 1, "--adapter", first) == 0
    before, after = (load_file(f / "adapter_model.safetensors") for f in (first, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    # One step of one rate moves no entry further than about that rate: it went on, it did not start anew.
    assert max((before[key] - after[key]).abs().max() for key in before) < 0.3


def test_main_job_is_the_same_twice(main_job, small_task, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for out in runs:
        assert main_job("--dataset_name", small_task, "--max_train_steps", 2, "--output_dir", out, "--seed", 3) == 0
    one, two = (load_file(out / "adapter_model.safetensors") for out in runs)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradient_accumulation_is_the_whole_batch(small_task, main_job, tmp_path):
    """Two halves accumulated move the prompts as one batch does, but for the count of boxes in each half."""
    for out, flags in (("whole", (8, 1)), ("halves", (4, 2))):
        assert (
            main_job(
                *("--dataset_name", small_task, "--max_train_steps", 1, "--output_dir", tmp_path / out),
                *("--per_device_train_batch_size", flags[0], "--gradient_accumulation_steps", flags[1]),
            )
            == 0
        )
    whole, halves = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "halves"))
    moved = torch.cat([(whole[key] - halves[key]).flatten() for key in whole])
    # Adam's first steps follow the sign of the gradient, which is noise where the gradient is nearly none.
    assert (moved.abs() < 1e-3).float().mean() > 0.8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_virtual_tokens", 0), "--num_virtual_tokens 0"),
        (("--learning_rate", -1), "--learning_rate -1"),
        (("--learning_rate", "inf"), "--learning_rate inf"),
        (("--weight_decay", -1), "--weight_decay -1"),
        (("--num_warmup_steps", -1), "--num_warmup_steps -1"),
        (("--seed", -1), "--seed -1"),
        (("--output_dir", "/proc/nowhere"), "--output_dir /proc/nowhere"),
        (("--learning_rate", 1e37, "--max_train_steps", 4), "boxes are not finite any more at step"),
        (("--max_train_steps", 0), "--max_train_steps 0"),
        (("--dataset_name", "no/such folder"), "no/such folder"),
        (("--eval_split", "nosuch"), "nosuch.json: no such file"),
        (("--pinv_rtol", 2), "--pinv_rtol 2.0"),
        (("--adapter", "somewhere", "--num_virtual_tokens", 5), "--num_virtual_tokens: belongs to the adapter"),
        (("--model_name_or_path", "no-such-folder"), "--model_name_or_path no-such-folder"),
        (("--adapter", "no-such-folder"), "--adapter no-such-folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(main_job, small_task, flags, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main_job("--dataset_name", small_task, *flags) == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1]
    assert "Traceback" not in error


def test_many_classes_are_asked_in_part_and_never_without_those_of_the_picture(small_task):
    from coco_data import load_split

    data = load_split(str(small_task), "train")
    collate = train_detection.Collator(data, AutoProcessor.from_pretrained(HOST), max_text_len=40)
    assert sum(collate.lengths) > collate.room
    inputs, labels = collate([0, 1, 2])
    assert inputs["input_ids"].shape[1] <= 40
    for image, label in enumerate(labels):
        prompt = collate.processor.tokenizer.decode(inputs["input_ids"][image], skip_special_tokens=True)
        names = [name.strip() for name in prompt.split(".")]
        assert [names[c] for c in label["class_labels"]] == [data.class_names[c] for c in data.labels[image]]


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one_does(small_task, tmp_path):
    # torchrun, because `accelerate launch --cpu --num_processes 2` starts one process (accelerate 1.15).
    for processes in (1, 2):
        subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
                *(str(ROOT / "examples" / "train_detection.py"), "--dataset_name", str(small_task)),
                *("--max_train_steps", "2", "--num_warmup_steps", "0"),
                *("--per_device_train_batch_size", str(4 // processes), "--output_dir", str(tmp_path / str(processes))),
            ],
            check=True,
            timeout=240,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert one["before"] == pytest.approx(two["before"], abs=2e-4)
    assert one["after"] == pytest.approx(two["after"], abs=2e-2)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "12")
    # The same global batches, but for the order in which their losses are summed. A step is 0.2.
    assert all(torch.allclose(one[key], two[key], atol=5e-3) for key in one)


@pytest.mark.slow
def test_a_killed_pre_training_goes_on_as_if_nothing_had_happened(tmp_path):
    flags = [
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--per_device_train_batch_size", "2"),
        *("--num_eval_images", "2", "--mixed_precision", "no"),
    ]
    command = [sys.executable, str(ROOT / "examples" / "pretrain_host.py"), *flags, "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=240)

    killed = subprocess.Popen([*command, str(tmp_path / "killed")])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run([*command, str(tmp_path / "killed")], check=True, timeout=240)

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path / "killed")
    assert not any(isinstance(module, SDPTLayer) for module in model.modules())
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["steps"] == 4


@pytest.mark.skipif(not (ROOT.parent / "shared" / "datasets" / "bccd").is_dir(), reason="the photographs are not here")
def test_real_photographs_go_through_training(main_job, tmp_path):
    bccd = ROOT.parent / "shared" / "datasets" / "bccd"
    assert main_job("--dataset_name", bccd, "--max_train_steps", 1, "--eval_split", "val") == 0
    assert (
        PeftModel.from_pretrained(AutoModelForZeroShotObjectDetection.from_pretrained(HOST), tmp_path / "out")
        .peft_config["default"]
        .num_virtual_tokens
        == 10
    )
