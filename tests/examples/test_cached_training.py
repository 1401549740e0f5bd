# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The main job with `--cache_features`: the same training but for rounding."""

import errno
import json
import shutil
from contextlib import contextmanager

import pytest
from PIL import Image
from transformers import AutoModelForZeroShotObjectDetection

from peft_sdpt.commands import train
from peft_sdpt.detection import stored_tensors
from tests.helpers.backbones import counted
from tests.helpers.detectors import attach
from tests.helpers.main_job import HOST, SHORT, Killed, kill, run_main_job, same_prompts, same_run

RUN = (
    *("--num_train_epochs", 2, "--per_device_train_batch_size", 4, "--no_augmentation", "--prompt_dropout", 0.3),
    *("--gradient_accumulation_steps", 1, "--checkpointing_steps", 2),
)


@contextmanager
def recorded():
    """Within, every loss that the main job computes."""
    values, compute = [], train.GroundedDetectionLoss.__call__

    def call(*args, **kwargs):
        loss = compute(*args, **kwargs)
        values.append(loss.item())
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.GroundedDetectionLoss, "__call__", call)
        yield values


@pytest.fixture(scope="module")
def runs(made_once, small_task):
    """A folder of the outputs of a run without stored features (plain) and of one that stores them (filling).

    With their losses (losses.json), and the folder of the features (cache).
    """

    def train(folder):
        losses = {}
        for name, flags in (("plain", ()), ("filling", ("--cache_features", folder / "cache"))):
            with recorded() as values:
                run = ("--dataset_name", small_task, *SHORT, *RUN, "--output_dir", folder / name)
                assert run_main_job(*run, *flags) == 0
            losses[name] = values
        (folder / "losses.json").write_text(json.dumps(losses))

    return made_once("cached-runs", train)


def same_but_for_rounding(one, two):
    """Whether two output folders hold the same adapters as far as any CPU can tell.

    A stored picture was computed alone; of a batch some CPUs round its last bits otherwise. Six steps make 4e-5 of it,
    and other pictures 0.7.
    """
    return same_prompts(one, two, lambda first, second: (first - second).norm() <= 1e-3 * first.norm())


def test_the_main_job_is_the_same_with_it(main_job, runs, small_task, tmp_path):
    shutil.copytree(runs / "cache", tmp_path / "cache")
    with recorded() as filled:
        assert main_job("--dataset_name", small_task, *RUN, "--cache_features", tmp_path / "cache") == 0
    losses = json.loads((runs / "losses.json").read_text())
    for values, out in ((losses["filling"], runs / "filling"), (filled, tmp_path / "out")):
        assert values == pytest.approx(losses["plain"], rel=1e-3) and len(values) == 6
        assert same_but_for_rounding(runs / "plain", out)
    # What is read is what was computed.
    assert same_run(runs / "filling", tmp_path / "out")
    # Twelve pictures to train on and four to validate on; all are asked for one prompt.
    assert len(list((tmp_path / "cache").glob("pictures-*/*"))) == 16
    assert len(list((tmp_path / "cache").glob("prompts-*/*"))) == 1


def test_backbones_do_not_run_in_the_second_epoch(main_job, at_step, small_task, tmp_path):
    with counted() as count:
        # Three steps an epoch, each at work on its loss.
        at_step(4, lambda: count.update(picture=0, prompt=0))
        flags = ("--cache_features", tmp_path / "cache", "--validation_steps", 3)
        assert main_job("--dataset_name", small_task, *RUN, *flags) == 0
    # The four pictures that are measured in the end, outside of training.
    assert count == {"picture": 4, "prompt": 4}


@pytest.mark.slow
def test_killed_with_or_without_it_is_resumed_with_or_without(main_job, runs, at_step, small_task, tmp_path):
    run = ("--dataset_name", small_task, *RUN, "--resume_from_checkpoint", "latest", "--output_dir")
    cache = ("--cache_features", tmp_path / "cache")
    shutil.copytree(runs / "cache", tmp_path / "cache")
    for killed, resumed in (((), (cache,)), (cache, (cache, ()))):
        at_step(4, kill)
        with pytest.raises(Killed):
            main_job(*run, tmp_path / "killed", *killed)
        for flags in resumed:
            shutil.copytree(tmp_path / "killed", tmp_path / "out")
            assert main_job(*run, tmp_path / "out", *flags) == 0
            assert same_but_for_rounding(runs / "plain", tmp_path / "out")
            if killed and flags:
                assert same_run(runs / "filling", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "killed")


def test_another_picture_under_the_same_name_is_seen(main_job, runs, own_task, tmp_path):
    run = ("--dataset_name", own_task, *RUN, "--output_dir")
    cache = ("--cache_features", tmp_path / "cache")
    shutil.copytree(runs / "cache", tmp_path / "cache")
    for file in (own_task / "images").glob("train_*.png"):
        Image.open(file).convert("RGB").transpose(Image.Transpose.ROTATE_180).save(file)
    assert main_job(*run, tmp_path / "plain") == 0
    assert main_job(*run, tmp_path / "stored", *cache) == 0
    assert same_but_for_rounding(tmp_path / "plain", tmp_path / "stored")
    assert not same_but_for_rounding(runs / "filling", tmp_path / "stored")


def test_mixed_sizes_and_workers_change_nothing(main_job, own_task, tmp_path, capsys):
    """Pictures of mixed sizes are padded as in the batch that they are in, which is a size of its own."""
    for split in ("train", "val"):
        coco = json.loads((own_task / f"{split}.json").read_text())
        for image in coco["images"][::3]:
            file = own_task / "images" / image["file_name"]
            picture = Image.open(file).convert("RGB")
            wide = Image.new("RGB", (picture.width + 40, picture.height))
            wide.paste(picture)
            wide.save(file)
            image["width"] += 40
        (own_task / f"{split}.json").write_text(json.dumps(coco))
    cache = ("--cache_features", tmp_path / "cache")
    run = ("--dataset_name", own_task, *RUN, "--max_train_steps", 5, "--output_dir")
    assert main_job(*run, tmp_path / "plain") == 0
    assert main_job(*run, tmp_path / "stored", *cache, "--dataloader_num_workers", 1) == 0
    assert same_but_for_rounding(tmp_path / "plain", tmp_path / "stored")
    assert "padded to the largest of their batch" in capsys.readouterr().out
    # Alone, each is met again as it was.
    alone = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4, "--cache_features")
    with counted() as count:
        assert main_job(*run, tmp_path / "alone", *alone, tmp_path / "alone-cache") == 0
    assert "padded to the largest" not in capsys.readouterr().out
    assert len(list((tmp_path / "alone-cache").glob("pictures-*/*"))) == 16
    # Four are measured before and after, and four validated after the last step.
    assert count["picture"] == 16 + 2 * 4 + 4


def test_dropout_in_the_backbones_makes_it_another_run(main_job, small_task, tmp_path, capsys):
    host = AutoModelForZeroShotObjectDetection.from_pretrained(HOST)
    host.config.backbone_config.drop_path_rate = 0.1
    host.save_pretrained(tmp_path / "host")
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "host" / file).write_bytes((HOST / file).read_bytes())
    run = (
        *("--dataset_name", small_task, "--model_name_or_path", tmp_path / "host", "--no_augmentation"),
        *("--max_train_steps", 1, "--checkpointing_steps", 1),
    )
    cache = ("--cache_features", tmp_path / "cache")
    assert main_job(*run, *cache) == 0
    assert "have dropout; stored features are computed without it" in capsys.readouterr().out
    assert main_job(*run, "--resume_from_checkpoint", "latest") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "belongs to another run, with dropout in backbones 'left out" in error
    assert main_job(*run, *cache, "--resume_from_checkpoint", "latest") == 0


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache_features", "here"), "--cache_features: augmentation changes the images in each epoch"),
        (
            ("--cache_features", "here", "--no_augmentation", "--eval_only"),
            "--cache_features: cannot be used with --eval_only",
        ),
        (("--cache_features", "", "--no_augmentation"), "--cache_features: is empty."),
        (
            ("--cache_features", "/proc/nowhere", "--no_augmentation"),
            "--cache_features /proc/nowhere: cannot be written (",
        ),
        (
            ("--cache_features", HOST / "config.json", "--no_augmentation"),
            f"--cache_features {HOST / 'config.json'}: cannot be written (",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_measured(
    main_job,
    small_task,
    flags,
    message,
    capsys,
    monkeypatch,
    tmp_path,
):
    monkeypatch.chdir(tmp_path)
    assert main_job("--dataset_name", small_task, *flags) == 2
    error = capsys.readouterr().err
    assert message in error.strip().splitlines()[-1] and "Traceback" not in error
    assert "before" not in error and not (tmp_path / "here").exists()


def test_a_disk_that_fills_up_does_not_end_the_main_job(
    main_job, runs, at_step, small_task, tmp_path, capsys, monkeypatch
):
    def fill():
        monkeypatch.setattr(stored_tensors.shutil, "disk_usage", full)

    at_step(2, fill)
    flags = (*RUN, "--cache_features", tmp_path / "cache", "--output_dir", tmp_path / "out")
    assert main_job("--dataset_name", small_task, *flags) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "No space left" in line)
    assert f"{tmp_path / 'cache'}/" in line and line.endswith(
        "Features that are not stored are computed in each epoch."
    )
    assert not list((tmp_path / "cache").rglob("*.unfinished"))
    # The cache has entries of eight of the twelve training images, and of no validation image.
    assert len(list((tmp_path / "cache").glob("pictures-*/*"))) == 8
    assert same_but_for_rounding(runs / "plain", tmp_path / "out")


def test_a_trained_backbone_of_an_adapter_is_refused_before_anything_is_measured(
    main_job,
    small_task,
    tmp_path,
    capsys,
):
    host = AutoModelForZeroShotObjectDetection.from_pretrained(HOST)
    attach(host, modules_to_save=["text_backbone"]).save_pretrained(tmp_path / "adapter")
    flags = ("--adapter", tmp_path / "adapter", "--no_augmentation", "--cache_features", tmp_path / "cache")
    assert main_job("--dataset_name", small_task, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trains, so its stored features would become outdated" in error
