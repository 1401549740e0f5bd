# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or not there, whatever happens while they are written."""

import json
import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoProcessor, get_scheduler

from peft_sdpt.detection.saved_adapter import write_adapter
from peft_sdpt.errors import InputError
from peft_sdpt.files import DIGESTS, LOCK, only_writer, whole_files, write_digests
from peft_sdpt.training import checkpoints
from peft_sdpt.training.averaging import averaged, parameter_groups, trained_parameters
from peft_sdpt.training.checkpoints import Checkpoints, Progress, claim_output_dir, latest, remove_unfinished
from tests.helpers.detectors import LAYERS, ROOT, attach, make_host, parameter_keys
from tests.helpers.disk import file_size_limit

RUN = {"--learning_rate": "0.2", "betas": (0.9, 0.99)}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test gets to see it."""


def make_run(folder, run=RUN, total_limit=None, write=None):
    """Return all objects whose state the training script saves. `write(folder, model)` writes the adapter."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = attach(make_host())
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    scheduler = get_scheduler("cosine", optimizer, 2, 100)
    average = AveragedModel(torch.nn.ParameterList(trained_parameters(model).values()))
    accelerator.register_for_checkpointing(scheduler, progress, average)
    save = (lambda folder: write(folder, model)) if write else model.save_pretrained
    return model, optimizer, progress, Checkpoints(accelerator, folder, save, run, total_limit)


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


def names(folder):
    return {path.name for path in folder.iterdir()}


def fully(folder, model):
    """Write an adapter with a tokenizer, whose errors are plain exceptions."""
    write_adapter(folder, model, AutoProcessor.from_pretrained(ROOT / "examples" / "host"), ["cat"])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_is_really_full_leaves_the_earlier_checkpoints(tmp_path):
    *_, kept = make_run(tmp_path, write=fully)
    kept.save(1)
    before = contents(tmp_path)
    # At each of these sizes, a different library cannot write its file.
    sizes = {(tmp_path / "step_1" / name).stat().st_size for name in names(tmp_path / "step_1")}
    for size in {0, *(size - 1 for size in sizes)}:
        with file_size_limit(size), pytest.raises(InputError, match=r"step 2 cannot be written \(.+\); .*step_1\.$"):
            kept.save(2)
        assert contents(tmp_path) == before and names(tmp_path) == {"step_1"}
    with file_size_limit(max(sizes)):
        kept.save(2)
    make_run(tmp_path, write=fully)[-1].load(tmp_path / "step_2")


@pytest.mark.parametrize("kind", [OSError, RuntimeError, SafetensorError, Exception])
def test_a_full_disk_is_known_in_the_words_of_any_library(tmp_path, kind):
    def full(*_):
        raise kind("No space left on device (os error 28)")

    with pytest.raises(InputError, match=r"step 1 cannot be written \(No space left .*\); the last .* is none\.$"):
        make_run(tmp_path, write=full)[-1].save(1)
    assert names(tmp_path) == set()


def test_a_bug_is_no_full_disk(tmp_path):
    def broken(*_):
        raise Exception("a bug")

    with pytest.raises(Exception, match=r"^a bug$"):
        make_run(tmp_path, write=broken)[-1].save(1)
    assert latest(tmp_path) is None


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_refused(tmp_path):
    make_run(tmp_path, write=fully)[-1].save(1)
    folder, chance, kept = tmp_path / "step_1", random.Random(0), make_run(tmp_path)[-1]
    assert {"optimizer.bin", "random_states_0.pkl", "custom_checkpoint_2.pkl", "run.json"} < names(folder)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for place in (0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(8))):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
            name = r"\w+" if file.name == DIGESTS else file.name
            with pytest.raises(InputError, match=f"step_1': cannot be read .*{name}.*(is damaged|is missing)"):
                kept.load(folder)
        file.write_bytes(whole)
    kept.load(folder)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    *_, kept = make_run(tmp_path)
    kept.save(1)
    folder = tmp_path / "step_1"
    pickled = sorted(file for file in folder.iterdir() if file.suffix in (".pkl", ".bin"))
    assert len(pickled) == 5
    for file in pickled:
        whole = file.read_bytes()
        state = torch.load(file, weights_only=False)
        torch.save({**state, "more": Payload(tmp_path / "ran")}, file)
        # Somebody who changes the file can also change its digest, or remove all digests.
        write_digests(folder)
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"it has an object of posix\.mkdir, and only tensors and plain values"
            ):
                kept.load(folder)
            (folder / DIGESTS).unlink(missing_ok=True)
        assert not (tmp_path / "ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
        torch.load(file, weights_only=False)
        (tmp_path / "ran").rmdir()  # shows that the code runs without the check
        file.write_bytes(whole)
    kept.load(folder)


def test_all_random_numbers_come_back(tmp_path):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    kept = make_run(tmp_path)[-1]
    kept.save(1)
    expected = drawn()
    kept = make_run(tmp_path)[-1]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    kept.load(tmp_path / "step_1")
    assert drawn() == expected


def test_a_checkpoint_without_digests_is_loaded_and_told(tmp_path, capsys):
    make_run(tmp_path)[-1].save(1)
    (tmp_path / "step_1" / DIGESTS).unlink()
    make_run(tmp_path)[-1].load(tmp_path / "step_1")
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'step_1'} has no {DIGESTS}, so damage to its files may go unnoticed\n"


def test_a_checkpoint_of_a_stranger_is_one_line(tmp_path):
    *_, kept = make_run(tmp_path)
    kept.save(1)
    folder = tmp_path / "step_1"
    run, progress = folder / "run.json", folder / "custom_checkpoint_1.pkl"
    whole = contents(folder)
    texts = [
        "[" * 100_000,
        "[]",
        "5",
        '"text"',
        "null",
        "{}",
        '{"a": "\\ud800"}',
        '{"--learning_rate": ' + "9" * 5000 + "}",
    ]
    texts.append(json.dumps({"--learning_rate": "\n" * 5000}))
    states = [[], 5, {"step": "1"}, {"other": 1}, {"losses": {}}, {"seconds": None}]
    for change in [
        *((lambda text=text: run.write_text(text)) for text in texts),
        *((lambda state=state: torch.save(state, progress)) for state in states),
    ]:
        change()
        write_digests(folder)
        with pytest.raises(
            InputError, match=r"step_1': (is not a complete|belongs to another run|cannot be read)"
        ) as raised:
            kept.load(folder)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
        for name, content in whole.items():
            (folder / name).write_bytes(content)
    kept.load(folder)


def test_neither_clocks_nor_times_of_files_decide_which_checkpoint_is_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: -1e9)
    *_, kept = make_run(tmp_path, total_limit=2)
    for step in (8, 9, 10):
        kept.save(step)
        os.utime(tmp_path / f"step_{step}", (2_000_000_000 - step * 1_000_000,) * 2)
    assert names(tmp_path) == {"step_9", "step_10"} and latest(tmp_path) == tmp_path / "step_10"


def test_an_output_folder_is_claimed_by_one_run_at_a_time(tmp_path):
    accelerator, folder = Accelerator(cpu=True), tmp_path / "out"
    for first in (False, True, None):
        with claim_output_dir(folder, accelerator, first):
            for second in (False, True, None):
                with (
                    pytest.raises(InputError, match=rf"^output_dir='{folder}': another command is writing"),
                    claim_output_dir(folder, accelerator, second),
                ):
                    pytest.fail("must not be entered")
        assert names(folder) == set()


@pytest.mark.parametrize("shared", [True, False])
def test_the_machines_of_a_launch_share_the_output_folder(tmp_path, monkeypatch, shared):
    """As the second process of a launch sees it. The files of the main process come with the broadcasts."""
    received = iter([[[]], ["0123456789abcdef.unfinished"]])
    monkeypatch.setattr(checkpoints, "broadcast_object_list", lambda _: next(received))
    monkeypatch.setattr(checkpoints, "gather_object", lambda values: values)
    if shared:
        (tmp_path / "0123456789abcdef.unfinished").touch()
    process = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False, wait_for_everyone=lambda: None)
    message = rf"^output_dir='{tmp_path}': process 1 does not see the files of the main process there; choose a folder"
    with (
        nullcontext() if shared else pytest.raises(InputError, match=message),
        claim_output_dir(tmp_path, process, None),
    ):
        assert shared


def test_what_a_killed_run_left_is_removed_by_the_next_that_trains(tmp_path):
    left = tmp_path / "step_3.unfinished"
    accelerator = Accelerator(cpu=True)
    for resuming, stays in ((None, True), (True, False)):
        left.mkdir(exist_ok=True)
        (tmp_path / LOCK).touch()
        with claim_output_dir(tmp_path, accelerator, resuming):
            assert left.exists() == stays
    left.mkdir()
    with only_writer(tmp_path), pytest.raises(InputError), claim_output_dir(tmp_path, accelerator, True):
        pytest.fail("must not be entered")
    assert left.exists()  # the other run is writing it
    (tmp_path / "step_1").mkdir()
    with (
        pytest.raises(InputError, match="has step_1 of an earlier run"),
        claim_output_dir(tmp_path, accelerator, False),
    ):
        pytest.fail("must not be entered")


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
