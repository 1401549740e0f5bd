# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers does with a tuned model: pipelines, the Trainer, automatic classes."""

import pytest
import torch
from peft import AutoPeftModel, get_peft_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor, Trainer, TrainingArguments, pipeline

from peft_sdpt.detection.loss import GroundedDetectionLoss
from tests.helpers.detectors import ROOT, acting, attach, make_host, model_inputs

HOST = str(ROOT / "examples" / "host")


def load_host():
    return AutoModelForZeroShotObjectDetection.from_pretrained(HOST)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the shipped host, on disk."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    get_peft_model(load_host(), acting()).save_pretrained(folder)
    return folder


def detect(model):
    processor = AutoProcessor.from_pretrained(HOST)
    found = pipeline(
        "zero-shot-object-detection",
        model=model,
        processor=processor,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    picture = Image.new("RGB", (96, 96), (200, 30, 30))
    return found(picture, candidate_labels=["red apple.", "monkey."], threshold=0.0)


def test_a_pipeline_takes_a_tuned_model(adapter):
    model = AutoPeftModel.from_pretrained(adapter)
    tuned = detect(model)
    assert tuned and {"score", "label", "box"} <= tuned[0].keys()
    with model.disable_adapter():
        bare = detect(model)
    assert bare == detect(load_host()) != tuned


def test_the_automatic_class_finds_the_host_of_an_adapter(adapter):
    model = AutoPeftModel.from_pretrained(adapter)
    assert type(model.get_base_model()).__name__ == "MMGroundingDinoForObjectDetection"
    assert model.peft_config["default"].base_model_name_or_path == HOST


class Samples(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        inputs = {key: value[0] for key, value in model_inputs(1, seed=index).items()}
        labels = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
        return {**inputs, "labels": labels}


def collate(samples):
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "labels"}
    return {**batch, "labels": [sample["labels"] for sample in samples]}


def make_trainer(model, folder):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.1,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Samples(),
        eval_dataset=Samples(),
        data_collator=collate,
        compute_loss_func=GroundedDetectionLoss(model.config),
    )
    trainer.loss_is_scaled_for_ga = False
    return trainer


def prompts(model):
    """The prompts and gates."""
    return [parameter.detach().clone() for name, parameter in model.named_parameters() if "sdpt_" in name]


def test_the_trainer_trains_saves_resumes_and_ends_with_the_best(tmp_path):
    model = attach(make_host())
    start = prompts(model)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses.keys() == {2, 4}
    assert not any(torch.equal(one, other) for one, other in zip(start, prompts(model), strict=True))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{min(losses, key=losses.get)}")
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files

    resumed = attach(make_host(), seed=2)
    make_trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(one, other) for one, other in zip(prompts(resumed), prompts(model), strict=True))
