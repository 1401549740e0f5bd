# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or not there, whatever happens while they are written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from peft_sdpt.errors import InputError
from peft_sdpt.files import whole_files
from peft_sdpt.training import checkpoints
from peft_sdpt.training.averaging import averaged, parameter_groups, trained_parameters
from peft_sdpt.training.checkpoints import Checkpoints, Progress, latest, remove_unfinished
from tests.helpers.detectors import LAYERS, attach, make_host, parameter_keys

RUN = {"--learning_rate": "0.2", "betas": (0.9, 0.99)}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test gets to see it."""


def make_run(folder, run=RUN, total_limit=None):
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = attach(make_host())
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    return model, optimizer, progress, Checkpoints(accelerator, folder, model.save_pretrained, run, total_limit)


def take_step(model, optimizer, progress):
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    progress.step += 1


def state(model, optimizer, progress):
    return [*(p.detach().clone() for p in trained_parameters(model).values()), torch.get_rng_state(), progress.step]


def same(one, two):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))


def test_a_checkpoint_brings_back_prompts_optimizer_random_numbers_and_progress(tmp_path):
    model, optimizer, progress, kept = make_run(tmp_path)
    for _ in range(2):
        take_step(model, optimizer, progress)
    kept.save(2)
    take_step(model, optimizer, progress)
    expected = state(model, optimizer, progress)

    model, optimizer, progress, kept = make_run(tmp_path)
    torch.manual_seed(77)
    kept.load(tmp_path / "step_2")
    assert progress.step == 2
    take_step(model, optimizer, progress)
    assert same(state(model, optimizer, progress), expected)


def test_a_checkpoint_holds_the_adapter_and_not_the_host(tmp_path):
    model, _, _, kept = make_run(tmp_path)
    kept.save(1)
    files = {path.name for path in (tmp_path / "step_1").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.bin", "run.json"} <= files
    host = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(path.stat().st_size for path in (tmp_path / "step_1").iterdir()) < host
    assert "model.safetensors" not in files


def test_the_newest_are_kept(tmp_path):
    *_, kept = make_run(tmp_path, total_limit=2)
    for step in (2, 9, 10, 100):
        kept.save(step)
    assert {path.name for path in tmp_path.iterdir()} == {"step_10", "step_100"}
    assert latest(tmp_path) == tmp_path / "step_100"


def test_only_whole_checkpoints_count(tmp_path):
    assert latest(tmp_path) is None
    for name in ("step_4", "step_5.unfinished", "step_x", "files.unfinished", "best"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == tmp_path / "step_4"
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step_4", "step_x", "best"}


def test_killed_at_any_file_operation_the_last_whole_checkpoint_still_resumes(tmp_path, monkeypatch):
    """Ends the process, so to say, before the n-th call that touches the disk, for every n."""
    *_, kept = make_run(tmp_path, total_limit=1)
    kept.save(1)
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal:
                if function is rmtree:  # in the middle of it
                    next(Path(args[0]).iterdir()).unlink()
                raise Killed
            return function(*args, **kwargs)

        return call

    rmtree = shutil.rmtree
    for owner, name in ((torch, "save"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "makedirs")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    monkeypatch.setattr(checkpoints.Path, "write_text", dying(checkpoints.Path.write_text))
    fatal, step, outcomes = 0, 1, set()
    while True:
        fatal, calls, before = fatal + 1, 0, step
        try:
            kept.save(before + 1)
        except Killed:
            pass
        else:
            break
        step = int(latest(tmp_path).name.removeprefix("step_"))
        assert step in (before, before + 1)
        outcomes.add(step - before)
        again, reloaded = calls, make_run(tmp_path)[-1]
        calls = again + 1000  # loading is not under attack
        reloaded.load(latest(tmp_path))
        remove_unfinished(tmp_path)
    # It was killed before the checkpoint was there as well as after, when the old one was being removed.
    assert outcomes == {0, 1} and fatal > 10


def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_which(tmp_path, monkeypatch):
    *_, kept = make_run(tmp_path)
    kept.save(1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"step 2 cannot be written \(.*No space left.*step_1\."):
        kept.save(2)
    assert {path.name for path in tmp_path.iterdir()} == {"step_1"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    make_run(tmp_path)[-1].save(1)
    other = make_run(tmp_path, RUN | {"--learning_rate": "0.1"})[-1]
    with pytest.raises(
        InputError, match=r"step_1': belongs to another run, with --learning_rate '0.2' instead of '0.1'"
    ):
        other.load(tmp_path / "step_1")


@pytest.mark.parametrize(
    "damage", ["missing", "no run.json", "run.json cut", "prompts cut", "optimizer cut", "random cut"]
)
def test_what_is_no_whole_checkpoint_is_refused(tmp_path, damage):
    make_run(tmp_path)[-1].save(1)
    folder = tmp_path / "step_1"
    if damage == "missing":
        folder = tmp_path / "step_2"
    elif damage == "no run.json":
        (folder / "run.json").unlink()
    else:
        name = {"run.json": "run.json", "prompts": "adapter_model.safetensors", "optimizer": "optimizer.bin"}
        name["random"] = "random_states_0.pkl"
        file = folder / name[damage.split()[0]]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=f"checkpoint='.*{folder.name}': (is not a complete|cannot be read)"):
        make_run(tmp_path)[-1].load(folder)


def test_files_arrive_whole_or_not_at_all(tmp_path):
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(InputError, match="cannot be written"), whole_files(tmp_path) as folder:
        (folder / "metrics.json").write_text("half")
        raise OSError("No space left on device")
    assert (tmp_path / "metrics.json").read_text() == "old"
    with whole_files(tmp_path) as folder:
        (folder / "metrics.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "new"


def test_an_average_is_in_place_for_a_while():
    model = attach(make_host())
    trained = torch.nn.ParameterList(trained_parameters(model).values())
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    start = [p.detach().clone() for p in trained]
    average.update_parameters(trained)
    with torch.no_grad():
        for parameter in trained:
            parameter += 1.0
    average.update_parameters(trained)
    with averaged(model, average):
        for parameter, first in zip(trained_parameters(model).values(), start, strict=True):
            torch.testing.assert_close(parameter.detach(), first + 0.1)
    for parameter, first in zip(trained_parameters(model).values(), start, strict=True):
        torch.testing.assert_close(parameter.detach(), first + 1.0)
    with averaged(model, None):
        assert torch.equal(next(iter(trained_parameters(model).values())), trained[0])


def test_groups_of_parameters_have_their_rates():
    model = attach(make_host(), lora_rank=2)
    groups = parameter_groups(model, 0.3, 0.01)
    assert [group["lr"] for group in groups] == [0.3, 0.01]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tokens, lora = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    # Gates have the rate of the tokens.
    assert tokens == parameter_keys(LAYERS)
    assert tokens | lora == trained_parameters(model).keys() and not tokens & lora
    for rates, message in (((-1.0,), "learning_rate must"), ((0.3, float("nan")), "lora_learning_rate must")):
        with pytest.raises(ValueError, match=message):
            parameter_groups(model, *rates)
    with pytest.raises(ValueError, match=r"learning_rate must be a positive and finite number, got '0\.3'"):
        parameter_groups(model, "0.3")
    with pytest.raises(ValueError, match=r"no parameter to train.*is_trainable=True"):
        parameter_groups(make_host().requires_grad_(False), 0.3)
    (group,) = parameter_groups(attach(make_host()), 0.3)
    assert group["lr"] == 0.3 and len(group["params"]) == 4


def test_run_files_are_readable(tmp_path):
    make_run(tmp_path)[-1].save(1)
    assert json.loads((tmp_path / "step_1" / "run.json").read_text())["--learning_rate"] == "0.2"
