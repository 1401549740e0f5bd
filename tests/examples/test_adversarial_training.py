# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The flags `--adversarial` of the main job: resuming, what equals plain training, and wrong flags."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from peft_sdpt.detection import GroundedDetectionLoss, TrainingSamples, adversarial, load_split, make_views
from peft_sdpt.detection.adversarial import AdversarialViews, BankViews, FreeViews, Views
from peft_sdpt.errors import InputError
from tests.helpers.main_job import HOST, Killed, kill, prompts, same_prompts, same_run

# Two batches per step, clean and attacked images, and everything that is random.
RUN = (
    *("--max_train_steps", 4, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2),
    *("--prompt_dropout", 0.3, "--validation_steps", 4, "--checkpointing_steps", 2, "--adv_weight", 0.5),
)
METHODS = {
    "bank": ("--adversarial", "bank", "--adv_steps", 1, "--no_augmentation"),
    "free": ("--adversarial", "free", "--adv_steps", 2),
    "pgd": ("--adversarial", "pgd", "--adv_steps", 2, "--adv_eps", 4, "--adv_loss", "class"),
}
TWO_STEPS = ("--max_train_steps", 2, "--no_augmentation")


# "fast" is "pgd" with one step.
@pytest.mark.parametrize("method", ["bank", "free", "pgd"])
def test_a_killed_adversarial_run_goes_on_as_if_nothing_had_happened(
    main_job, trained, at_step, small_task, tmp_path, method
):
    flags = (*RUN, *METHODS[method])
    whole = trained(*flags)
    run = ("--dataset_name", small_task, *flags, "--resume_from_checkpoint", "latest", "--output_dir")
    # The loss of training is computed four times per step: two batches, clean and attacked.
    at_step(4 * 3, kill)
    with pytest.raises(Killed):
        main_job(*run, tmp_path / "killed")
    assert (tmp_path / "killed" / "step_2").is_dir()
    assert main_job(*run, tmp_path / "killed") == 0
    assert same_run(whole, tmp_path / "killed")


@pytest.mark.parametrize("method", [("free", "--adv_steps", 1), ("bank", "--adv_steps", 1)])
def test_an_attack_that_may_change_nothing_is_plain_training(main_job, trained, small_task, tmp_path, method):
    plain = trained(*TWO_STEPS)
    assert main_job("--dataset_name", small_task, *TWO_STEPS, "--adv_eps", 0, "--adversarial", *method) == 0
    assert same_prompts(plain, tmp_path / "out")


def test_attacked_images_change_the_prompts_and_are_in_the_results(trained):
    plain, attacked = trained(*TWO_STEPS), trained(*TWO_STEPS, "--adversarial", "fast")
    assert not same_prompts(plain, attacked)
    assert (
        "`--adversarial fast --adv_eps 2 --adv_steps 1 --adv_weight 1 --adv_loss all`"
        in (attacked / "README.md").read_text()
    )
    assert "attacked" not in (plain / "README.md").read_text()
    args = json.loads((attacked / "metrics.json").read_text())["args"]
    assert (args["adversarial"], args["adv_eps"], args["adv_steps"], args["adv_weight"], args["adv_loss"]) == (
        *("fast", 2.0, 1, 1.0, "all"),
    )


def test_a_stopped_free_run_finishes_its_batches_first(main_job, trained, at_step, small_task, tmp_path, capsys):
    flags = (*RUN, *METHODS["free"])
    run = ("--dataset_name", small_task, *flags, "--output_dir", tmp_path / "stopped")
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main_job(*run) == 130
    assert "stopped after step 2 of 4" in capsys.readouterr().err
    assert main_job(*run, "--resume_from_checkpoint", "latest") == 0
    assert same_run(trained(*flags), tmp_path / "stopped")


def test_free_training_reads_each_image_once_for_its_replays(main_job, small_task, monkeypatch):
    seen = []
    compute = FreeViews.of_batch

    def of_batch(self, index, inputs, labels):
        seen.append((int(labels[0]["number"]), len(self.moving)))
        yield from compute(self, index, inputs, labels)

    monkeypatch.setattr(FreeViews, "of_batch", of_batch)
    flags = ("--max_train_steps", 5, "--per_device_train_batch_size", 2, "--adversarial", "free", "--adv_steps", 3)
    assert main_job("--dataset_name", small_task, *flags) == 0
    assert seen == [(0, 0), (0, 1), (0, 1), (2, 0), (2, 1)]


def test_a_bank_is_made_once_and_again_where_it_is_damaged(main_job, small_task, tmp_path, monkeypatch):
    made = []
    compute = adversarial.perturb

    def perturb(detector, loss_function, inputs, *arguments, **options):
        made.append(len(inputs["pixel_values"]))
        return compute(detector, loss_function, inputs, *arguments, **options)

    monkeypatch.setattr(adversarial, "perturb", perturb)
    flags = ("--dataset_name", small_task, *TWO_STEPS, *METHODS["bank"], "--checkpointing_steps", 1)
    flags = (*flags, "--resume_from_checkpoint", "latest", "--per_device_eval_batch_size", 5)
    assert main_job(*flags) == 0
    assert made == [5, 5, 2]
    first = prompts(tmp_path / "out")
    files = sorted((tmp_path / "out" / "adversaries").iterdir())
    assert len(files) == 12
    contents = [file.read_bytes() for file in files]
    files[0].write_bytes(contents[0][:-1] + b"?")
    files[1].unlink()
    made.clear()
    assert main_job(*flags) == 0
    assert 1 <= len(made) <= 2
    assert [file.read_bytes() for file in files] == contents
    assert all(torch.equal(tensor, first[name]) for name, tensor in prompts(tmp_path / "out").items())


def test_a_bank_that_vanishes_is_named(main_job, at_step, small_task, tmp_path, capsys):
    folder = tmp_path / "out" / "adversaries"
    at_step(1, lambda: [file.unlink() for file in folder.iterdir()])
    assert main_job("--dataset_name", small_task, *TWO_STEPS, *METHODS["bank"]) == 2
    assert "has no adversarial image" in capsys.readouterr().err


def test_a_bank_is_trained_on_from_stored_features(main_job, trained, small_task, tmp_path):
    flags = (*TWO_STEPS, *METHODS["bank"])
    plain = trained(*flags)
    assert main_job("--dataset_name", small_task, *flags, "--cache_features", tmp_path / "cache") == 0
    one, two = prompts(plain), prompts(tmp_path / "out")
    assert all(torch.allclose(one[name], two[name], atol=1e-2) for name in one)


def test_a_bank_of_other_labels_or_images_is_made_anew(small_task, made_once):
    """Also two equal images have a bank of their own, because their random starts differ."""
    processor, model = AutoProcessor.from_pretrained(HOST), AutoModelForZeroShotObjectDetection.from_pretrained(HOST)
    data = load_split(str(small_task), "train").subset([0, 0, 1])

    def files(folder, data, loss="all"):
        loss_function = GroundedDetectionLoss(model.config)
        views = make_views("bank", model, loss_function, processor, steps=1, loss=loss, folder=folder)
        samples = TrainingSamples(data, 3, processor, model.config.max_text_len, 0, augmentation=False)
        views.prepare(samples, 4, Accelerator(cpu=True))
        return {file.name for file in folder.iterdir()}

    folder = made_once("bank", lambda folder: folder.mkdir(exist_ok=True))
    first = files(folder, data)
    assert len(first) == 3
    assert files(folder, data) == first
    moved = replace(data, labels=[[(label + 1) % len(data.class_names) for label in row] for row in data.labels])
    assert len(files(folder, moved)) == 6
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.ndim > 1).add_(0.1)
    assert len(files(folder, data)) == 9


def test_views_that_are_used_wrongly_say_so(small_task, tmp_path):
    processor, model = AutoProcessor.from_pretrained(HOST), AutoModelForZeroShotObjectDetection.from_pretrained(HOST)
    data = load_split(str(small_task), "train")
    samples = TrainingSamples(data, 4, processor, model.config.max_text_len, 0, augmentation=False)
    batches = [samples.collate([samples[number]]) for number in range(2)]
    common = (model, GroundedDetectionLoss(model.config), processor.image_processor)

    free = make_views("free", *common)
    free.begin()
    view = next(views := free.of_batch(0, *batches[0]))
    with pytest.raises(InputError, match="the gradient of a view must be computed"):
        next(views)
    assert view.inputs["pixel_values"].requires_grad
    with pytest.raises(InputError, match="`begin` must be called"):
        next(free.of_batch(0, *batches[1]))
    with pytest.raises(InputError, match="`prepare` must be called before training"):
        next(make_views("bank", *common, folder=tmp_path).of_batch(0, *batches[0]))
    inputs, labels = batches[0]
    with pytest.raises(InputError, match="labels: must have a `number` for each image"):
        next(make_views("fast", *common).of_batch(0, inputs, [{"boxes": labels[0]["boxes"]}]))
    one_class = replace(data, class_names=["cat"], labels=[[0] * len(row) for row in data.labels])
    samples = TrainingSamples(one_class, 4, processor, model.config.max_text_len, 0)
    with pytest.raises(InputError, match="loss='mislabel': needs at least two classes"):
        make_views("pgd", *common, loss="mislabel").prepare(samples, 4, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "slow"}, "method='slow': must be one of none, bank"),
        ({"method": "fast", "steps": 2}, "steps=2: must be 1"),
        ({"method": "free", "loss": "vanish"}, "loss='vanish': must be \"all\""),
        ({"method": "fast", "weight": 0}, "weight=0: must be above 0"),
        ({"method": "bank"}, "folder=None: must be a folder"),
    ],
)
def test_wrong_views_are_refused(arguments, message):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=message):
        make_views(arguments.pop("method"), model, None, None, **arguments)


def test_checkpoints_of_plain_runs_do_not_name_the_attack(trained):
    run = json.loads((trained(*TWO_STEPS, "--checkpointing_steps", 1) / "step_1" / "run.json").read_text())
    assert not any("adv" in name for name in run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adv_eps", 2), "--adv_eps 2.0: needs --adversarial"),
        (("--adversarial", "fast", "--adv_eps", 300), "--adv_eps 300.0: must be at least 0 and at most 255"),
        (("--adversarial", "fast", "--adv_eps", "nan"), "--adv_eps nan: must be at least 0"),
        (("--adversarial", "fast", "--adv_weight", 0), "--adv_weight 0.0: must be above 0 and at most 1"),
        (("--adversarial", "pgd", "--adv_steps", 0), "--adv_steps 0: must be at least 1"),
        (("--adversarial", "fast", "--adv_steps", 2), "--adv_steps 2: --adversarial fast has one step"),
        (("--adversarial", "free", "--adv_loss", "box"), "--adv_loss box: --adversarial free attacks by"),
        (("--adversarial", "bank"), "--adversarial bank: attacks each image once"),
        (("--adversarial", "fast", "--eval_only"), "--adversarial fast: cannot be used with --eval_only"),
        (("--adversarial", "free", "--checkpointing_steps", 3), "--checkpointing_steps 3: must be a multiple of"),
        (
            ("--adversarial", "pgd", "--no_augmentation", "--cache_features", "cache"),
            "--cache_features: cannot be used with --adversarial pgd",
        ),
    ],
)
def test_wrong_flags_of_an_attack_are_one_line(main_job, small_task, capsys, flags, message):
    assert main_job("--dataset_name", small_task, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_resumed_run_keeps_its_attack(main_job, trained, small_task, tmp_path, capsys):
    plain = (*RUN[:-2], "--resume_from_checkpoint", trained(*RUN, *METHODS["pgd"]) / "step_2")
    assert main_job("--dataset_name", small_task, *plain) == 2
    assert "--adversarial" in capsys.readouterr().err
    whole = trained(*RUN, *METHODS["pgd"])
    flags = (*RUN, *METHODS["pgd"], "--adv_eps", 3, "--resume_from_checkpoint", whole / "step_2")
    assert main_job("--dataset_name", small_task, *flags) == 2
    assert "--adv_eps" in capsys.readouterr().err


def test_views_have_the_weights_of_the_objective():
    assert [cls.replays for cls in (Views, AdversarialViews, BankViews)] == [1, 1, 1]
    free = make_views("free", torch.nn.Linear(1, 1), None, None, steps=3)
    assert free.replays == 3
