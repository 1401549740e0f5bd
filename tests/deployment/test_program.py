# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A detector as an exported program. Programs for fixed classes and images of any size are tested in test_onnx.py."""

import zipfile

import pytest
import torch
from transformers import AutoProcessor, BertModel, GroundingDinoForObjectDetection

from peft_sdpt.deployment import bake, export_program
from tests.helpers.detectors import ROOT, attach, host_config, randomise
from tests.helpers.programs import ON_DEMAND, alone


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "examples" / "host")


@pytest.fixture(scope="module")
def model():
    """A tuned detector of one layer, with the vocabulary of the small base model."""
    config = host_config("grounding_dino", layers=1)
    config.text_config.vocab_size = 30522
    torch.manual_seed(0)
    return attach(randomise(GroundingDinoForObjectDetection(config)).eval()).eval()


def corners(boxes):
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1).clamp(0, 1)


def pixels(batch, height, width):
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, height, width, dtype=torch.long)
    mask[0, :, -16:] = 0
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator), "pixel_mask": mask}


@ON_DEMAND
@pytest.mark.slow
@torch.no_grad()
def test_any_text_and_any_size_in_a_process_with_pytorch_alone(model, processor, tmp_path):
    exported = export_program(model, processor, None, tmp_path / "detector.pt2")
    assert exported.path == tmp_path / "detector.pt2" and exported.num_bytes == exported.path.stat().st_size
    assert exported.inputs["pixel_values"] == ["batch", 3, "height", "width"]
    assert exported.inputs["input_ids"] == exported.inputs["attention_mask"] == ["batch", "tokens"]
    assert exported.outputs == {"logits": ["batch", 6, 32], "boxes": ["batch", 6, 4]}
    assert 0 < exported.difference < 1e-5 and exported.opset is None
    texts = [["cat."], ["a dog. red apple. tree.", "cat."], ["cell."] * 3]
    inputs = [
        {**pixels(len(text), *size), **processor.tokenizer(text, padding=True, return_tensors="pt")}
        for text, size in zip(texts, [(64, 96), (51, 133), (16, 48)], strict=True)
    ]
    outputs, metadata, _ = alone(tmp_path / "detector.pt2", inputs, tmp_path)
    assert metadata["class_names"] is None and metadata["prompts"] == []
    for arguments, found in zip(inputs, outputs, strict=True):
        expected = model(**arguments)
        torch.testing.assert_close(found["logits"], expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found["boxes"], corners(expected.pred_boxes), rtol=0, atol=1e-5)
    assert isinstance(model.get_base_model().model.text_backbone, BertModel)


@pytest.mark.slow
@torch.no_grad()
def test_a_fixed_size_in_a_process_with_pytorch_alone(model, processor, tmp_path):
    """The model is in half precision, and the program in single precision."""
    half = bake(model).bfloat16()
    options = {"fixed_size": (64, 96), "threshold": 0.4}
    exported = export_program(half, processor, ["red cell", "platelet"], tmp_path / "detector.pt2", **options)
    assert exported.inputs == {"pixel_values": ["batch", 3, 64, 96], "pixel_mask": ["batch", 64, 96]}
    assert exported.outputs == {"scores": ["batch", 6, 2], "boxes": ["batch", 6, 4]}
    assert exported.prompts == ["red cell. platelet."] and exported.difference < 1e-4
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    images = pixels(3, 64, 96)
    (outputs,), metadata, _ = alone(exported.path, [images], tmp_path)
    assert metadata["class_names"] == ["red cell", "platelet"] and metadata["threshold"] == 0.4
    assert metadata["image_size"] == {"max_height": 64, "max_width": 96}
    expected = half.float()(**images, **processor.tokenizer(exported.prompts * 3, return_tensors="pt"))
    torch.testing.assert_close(outputs["boxes"], corners(expected.pred_boxes), rtol=0, atol=1e-4)
    with pytest.raises((AssertionError, RuntimeError), match="96"):  # by version of PyTorch
        torch.export.load(exported.path).module()(**pixels(1, 64, 64))
    # No paths of this machine are in the file.
    with zipfile.ZipFile(exported.path) as archive:
        assert not any(b"site-packages" in archive.read(name) for name in archive.namelist())
