# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A tuned detector as an exported program."""

import json

import pytest
import torch
from transformers import AutoProcessor, BertModel, GroundingDinoForObjectDetection

from peft_sdpt.deployment import export_program
from peft_sdpt.deployment.program import _size
from peft_sdpt.detection import class_scores, class_token_maps
from peft_sdpt.errors import InputError
from tests.helpers.detectors import ROOT, FusionStack, attach, host_config, randomise, run_python

SIZE = (64, 96)
CLASSES = ["red cell", "platelet"]
# Reads a program, runs it on saved inputs, and saves its outputs, where only PyTorch can be imported.
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("peft", "peft_sdpt", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
folder = sys.argv[1]
files = {"detector.json": ""}
exported = torch.export.load(f"{folder}/detector.pt2", extra_files=files)
program = exported.module()
with torch.no_grad():
    outputs = [program(**inputs) for inputs in torch.load(f"{folder}/inputs.pt")]
names = [*exported.state_dict, *exported.constants]
torch.save({"outputs": outputs, "description": files["detector.json"], "names": names}, f"{folder}/outputs.pt")
assert not {"peft", "peft_sdpt", "transformers"} & set(sys.modules)
"""


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


def alone(folder, inputs):
    """Run the program in a folder with PyTorch alone. Returns its outputs, description and names of weights."""
    torch.save(inputs, folder / "inputs.pt")
    result = run_python(ALONE, str(folder))
    assert result.returncode == 0, result.stderr
    saved = torch.load(folder / "outputs.pt")
    return saved["outputs"], json.loads(saved["description"]), saved["names"]


def corners(boxes):
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1).clamp(0, 1)


def pixels(batch, seed, height=SIZE[0], width=SIZE[1]):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, height, width, dtype=torch.long)
    mask[0, :, -16:] = 0
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=generator), "pixel_mask": mask}


@pytest.mark.slow
@torch.no_grad()
def test_fixed_classes_in_a_process_with_pytorch_alone(model, processor, tmp_path):
    exported = export_program(model, processor, CLASSES, tmp_path / "detector.pt2", image_size=SIZE)
    assert exported.path == tmp_path / "detector.pt2"
    assert exported.num_bytes == exported.path.stat().st_size
    assert 0 <= exported.difference < 1e-5
    inputs = [pixels(batch, batch) for batch in (1, 2, 5)]
    outputs, description, names = alone(tmp_path, inputs)
    assert description["class_names"] == CLASSES and description["image_size"] == list(SIZE)
    assert description["image_mean"] == list(processor.image_processor.image_mean)
    for images, found in zip(inputs, outputs, strict=True):
        batch = len(images["pixel_values"])
        text = processor.tokenizer(["red cell. platelet."] * batch, return_tensors="pt")
        expected = model(**images, **text)
        scores = class_scores(expected.logits, class_token_maps(text["input_ids"], expected.logits.shape[-1]))
        torch.testing.assert_close(found["scores"], torch.stack(scores), rtol=0, atol=1e-5)
        torch.testing.assert_close(found["boxes"], corners(expected.pred_boxes), rtol=0, atol=1e-5)
    # The text model is not in the file, and the tuned model is as it was.
    assert any("fusion_layer" in name for name in names) and not [name for name in names if "embeddings.word" in name]
    assert isinstance(model.get_base_model().model.text_backbone, BertModel)


@pytest.mark.slow
@torch.no_grad()
def test_any_text_in_a_process_with_pytorch_alone(model, processor, tmp_path):
    export_program(model, processor, None, tmp_path / "detector.pt2", image_size=SIZE)
    texts = [["cat."], ["a dog. red apple. tree.", "cat."], ["cell."] * 3]
    inputs = [
        {**pixels(len(text), len(text)), **processor.tokenizer(text, padding=True, return_tensors="pt")}
        for text in texts
    ]
    outputs, description, _ = alone(tmp_path, inputs)
    assert description["class_names"] is None
    for arguments, found in zip(inputs, outputs, strict=True):
        expected = model(**arguments)
        torch.testing.assert_close(found["logits"], expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(found["boxes"], corners(expected.pred_boxes), rtol=0, atol=1e-5)


def test_the_default_size_is_that_of_a_square_image(model, processor):
    assert _size(processor, None) == (96, 96)


REFUSED = {
    "suffix": ({"path": "detector.pt"}, r"path=detector\.pt: must end with \.pt2"),
    "another model": (
        {"model": FusionStack()},
        "model=FusionStack: must be a Grounding DINO, MM Grounding DINO or LLMDet",
    ),
    "no size": ({"image_size": (64,)}, r"image_size=\(64,\): must be a height and a width in pixels"),
    "small size": ({"image_size": (8, 8)}, r"image_size=\(8, 8\): an image has only 2 positions for 6 queries"),
    "one name": ({"class_names": "cat"}, "class_names='cat': must be a list of names"),
    "no class": ({"class_names": []}, "class_names"),
    "many classes": (
        {"class_names": [f"cell {n}" for n in "abcdefghijklmnop"]},
        "16 classes need 2 prompts, but a program has one",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused(model, processor, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": model, "processor": processor, "class_names": None, "path": "detector.pt2", **changes}
    with pytest.raises(InputError, match=message):
        export_program(**arguments)
    assert not list(tmp_path.iterdir())
