# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The main job on the pretend GPU: devices do not mix, and a step waits only where it must."""

import json

import pytest
import torch
from accelerate import Accelerator, PartialState

from peft_sdpt.commands import train
from tests.helpers.main_job import reset_accelerate
from tests.helpers.pretend import pretend_gpu


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Let the main job run on the pretend GPU. Yields the log of waits."""
    make = train.make_accelerator

    def make_accelerator(*args, **kwargs):
        accelerator = make(*args, **kwargs)
        accelerator.state.device = PartialState._shared_state["device"] = torch.device("pretend", 0)
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", make_accelerator)
    with pretend_gpu() as syncs:
        yield syncs
    # Accelerate would keep the device for the tests after this one.
    reset_accelerate()


def test_steps_wait_for_the_gpu_in_their_loss_only(main_job, small_task, tmp_path, on_a_gpu, monkeypatch):
    step, ends, of_steps = train.train_step, [], []

    def noted(*args):
        of_loop = on_a_gpu[ends[-1] :] if ends else []
        start = len(on_a_gpu)
        step(*args)
        of_steps.append([sync for sync in on_a_gpu[start:] if "peft_sdpt/" in sync.where])
        ends.append(len(on_a_gpu))
        assert not of_loop

    def prepare(accelerator, *objects, device_placement=None):
        assert device_placement is None  # DeepSpeed refuses it
        return real_prepare(accelerator, *objects)

    real_prepare = Accelerator.prepare
    monkeypatch.setattr(Accelerator, "prepare", prepare)
    monkeypatch.setattr(train, "train_step", noted)
    flags = ("--max_train_steps", 3, "--per_device_train_batch_size", 2, "--image_size", 128, "--with_tracking")
    assert main_job("--dataset_name", small_task, *flags, "--validation_steps", 9) == 0
    # The costs that SciPy matches, and what it matched; then the results of the step before.
    assert [[sync.kind for sync in syncs] for syncs in of_steps] == [
        ["to the CPU", "to the device"],
        ["to the CPU", "to the device", "to the CPU"],
        ["to the CPU", "to the device", "to the CPU"],
    ]
    curves = json.loads((tmp_path / "out" / "metrics.json").read_text())["curves"]["loss"]
    assert curves["step"] == [1, 2, 3] and all(value > 0 for value in curves["value"])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
