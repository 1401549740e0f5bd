# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped host and the recipe that makes it."""

import json
import signal
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

import pretrain_host
from peft_sdpt import SDPTLayer
from peft_sdpt.detection.metrics import evaluate
from tests.helpers.detectors import ROOT
from tests.helpers.main_job import HOST, launched, reset_accelerate
from tests.helpers.patience import wait_until


@pytest.fixture(scope="module")
def host():
    return AutoModelForZeroShotObjectDetection.from_pretrained(HOST, dtype=torch.float32).eval()


def test_the_shipped_host_loads_in_single_precision(host):
    assert AutoModelForZeroShotObjectDetection.from_pretrained(HOST).dtype == torch.float32
    assert {p.dtype for p in load_file(HOST / "model.safetensors").values() if p.is_floating_point()} == {torch.float16}


def test_the_aligned_space_of_the_shipped_host_is_wider_than_its_inputs(host):
    fusion = host.model.encoder.layers[0].fusion_layer.attn
    assert fusion.embed_dim >= 4 * fusion.vision_dim == 4 * host.config.d_model


def test_the_shipped_host_finds_pictograms_it_was_trained_on(host):
    scenes = pretrain_host.held_out_scenes(seen=True, num_images=20)
    metrics = evaluate(host, AutoProcessor.from_pretrained(HOST), scenes, 20, Accelerator())
    # Few pictures of 355 classes are a noisy measure; the recipe measures 500.
    assert metrics["AP50"] > 0.7


@pytest.mark.slow
def test_a_killed_pre_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    flags = [
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--per_device_train_batch_size", "2"),
        *("--num_eval_images", "2", "--mixed_precision", "no"),
    ]

    def run(folder):
        reset_accelerate()
        monkeypatch.setattr(sys, "argv", ["pretrain_host.py", *flags, "--output_dir", str(folder)])
        pretrain_host.main()

    run(tmp_path / "whole")
    killed = launched([ROOT / "examples" / "pretrain_host.py", *flags, "--output_dir", tmp_path / "killed"])
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    wait_until(lambda: checkpoint.exists() or killed.poll() is not None)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert checkpoint.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    run(tmp_path / "killed")

    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path / "killed")
    assert not any(isinstance(module, SDPTLayer) for module in model.modules())
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["steps"] == 4
