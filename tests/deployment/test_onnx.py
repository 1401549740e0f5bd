# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Exported ONNX files detect what the models in PyTorch detect."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor

import export_onnx as script
from peft_sdpt.deployment import onnx as exporting
from peft_sdpt.deployment.onnx import export_onnx
from peft_sdpt.detection import class_prompt, class_scores, class_token_maps, detect, split_classes
from peft_sdpt.errors import InputError, MissingExtraError
from tests.helpers.detectors import PUBLISHED, ROOT, acting, attach, make_host, run_python
from tests.helpers.tiny import omdet_turbo

NAMES = ["red cat", "dog", "house"]
# More than one prompt of 32 tokens.
MANY = ["cat", "dog", "red house", "bird", "horse", "cow", "old man", "fish", "tree", "table", "lamp", "door", "shoe"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def processor():
    processor = AutoProcessor.from_pretrained(ROOT / "examples/host")
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 80}
    return processor


def make_detector(name: str) -> nn.Module:
    """A tiny detector with the vocabulary of the processor."""
    host = make_host(name, layers=1)
    torch.manual_seed(5)
    host.model.text_backbone.set_input_embeddings(nn.Embedding(6400, 16))
    host.config.text_config.vocab_size = 6400
    return host.eval()


def images(batch: int, height: int, width: int, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, height, width, dtype=torch.long)
    if padded:
        mask[-1, :, -10:] = 0
        mask[-1, -7:] = 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


@torch.no_grad()
def scores_and_boxes(model: nn.Module, processor, class_names: list[str], inputs: dict) -> tuple[torch.Tensor, ...]:
    """What the file must give, from the model as it is used in Python, one prompt after the other."""
    all_scores, all_boxes = [], []
    batch = len(inputs["pixel_values"])
    for chunk in split_classes(class_names, processor.tokenizer, model.config.max_text_len):
        text = processor.tokenizer([class_prompt([class_names[i] for i in chunk])] * batch, return_tensors="pt")
        outputs = model(**inputs, **text)
        maps = class_token_maps(text["input_ids"], outputs.logits.shape[-1])
        scores = torch.zeros(batch, model.config.num_queries, len(class_names))
        scores[..., chunk] = torch.stack(class_scores(outputs.logits, maps))
        centre, size = outputs.pred_boxes[..., :2], outputs.pred_boxes[..., 2:]
        all_scores.append(scores)
        all_boxes.append(torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1))
    return torch.cat(all_scores, dim=1), torch.cat(all_boxes, dim=1)


def assert_same(file, model, processor, class_names, inputs) -> None:
    session = onnxruntime.InferenceSession(str(file))
    found = session.run(["scores", "boxes"], {name: tensor.numpy() for name, tensor in inputs.items()})
    for output, expected in zip(found, scores_and_boxes(model, processor, class_names, inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=TOLERANCE)


def metadata_of(file) -> dict:
    session = onnxruntime.InferenceSession(str(file))
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


# ---- a file for any size


@pytest.fixture(scope="module")
def tuned():
    """Grounding DINO with two active adapters, one with default gates, and one as published."""
    model = attach(make_detector("grounding_dino"))
    torch.manual_seed(7)
    model.add_adapter("published", acting(**PUBLISHED))
    model.base_model.set_adapter(["default", "published"])
    return model.eval()


@pytest.fixture(scope="module")
def any_size(tuned, processor, tmp_path_factory):
    before = state(tuned)
    file = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    exported = export_onnx(tuned, processor, NAMES, file, threshold=0.4)
    return SimpleNamespace(file=file, exported=exported, before=before, after=state(tuned))


def state(model: nn.Module):
    """Everything of a model that an export must leave as it was."""
    return (
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "height", "width"), [(2, 64, 96), (1, 51, 133), (3, 128, 128), (2, 47, 34)], ids=lambda n: str(n)
)
def test_sizes_and_batches_vary(any_size, tuned, processor, batch, height, width):
    assert_same(any_size.file, tuned, processor, NAMES, images(batch, height, width, seed=height))


@pytest.mark.slow
def test_prompts_of_all_active_adapters_act(any_size, tuned, processor):
    inputs = images(1, 64, 64)
    both = scores_and_boxes(tuned, processor, NAMES, inputs)[0]
    with tuned.disable_adapter():
        assert (scores_and_boxes(tuned, processor, NAMES, inputs)[0] - both).abs().max() > 100 * TOLERANCE
    for name in ("default", "published"):
        tuned.base_model.set_adapter(name)
        assert (scores_and_boxes(tuned, processor, NAMES, inputs)[0] - both).abs().max() > 100 * TOLERANCE
    tuned.base_model.set_adapter(["default", "published"])


@pytest.mark.slow
def test_the_model_stays_as_it_was(any_size):
    modules, parameters, buffers = zip(any_size.before, any_size.after, strict=True)
    assert modules[0] == modules[1]
    for before, after in (parameters, buffers):
        for (*facts, values), (*facts_after, values_after) in zip(before, after, strict=True):
            assert facts == facts_after
            assert torch.equal(values, values_after)


@pytest.mark.slow
def test_what_is_said_of_the_file(any_size):
    exported = any_size.exported
    assert exported.path == any_size.file
    assert exported.num_bytes == any_size.file.stat().st_size
    model = onnx.load(any_size.file)
    assert exported.opset == next(each.version for each in model.opset_import if not each.domain) == 18
    assert exported.inputs == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
    }
    assert exported.outputs == {"scores": ["batch", 6, 3], "boxes": ["batch", 6, 4]}
    assert 0 < exported.difference < TOLERANCE
    metadata = metadata_of(any_size.file)
    assert metadata.pop("box_format").startswith("left, top, right, bottom")
    assert metadata.pop("peft_sdpt_version")
    assert metadata == {
        "class_names": NAMES,
        "prompts": ["red cat. dog. house."],
        "threshold": 0.4,
        "image_size": {"shortest_edge": 48, "longest_edge": 80},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 1 / 255,
    }


@pytest.mark.slow
def test_the_file_has_no_text_backbone_and_no_rare_operators(any_size, tuned):
    graph = onnx.load(any_size.file).graph
    assert not {"SplitToSequence", "SequenceAt", "If", "Loop"} & {node.op_type for node in graph.node}
    assert all(node.domain in ("", "ai.onnx") for node in graph.node)
    embeddings = tuned.get_base_model().model.text_backbone.get_input_embeddings().weight
    assert all(list(tensor.dims) != list(embeddings.shape) for tensor in graph.initializer)


ALONE = """
import json, sys
class Missing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "peft", "peft_sdpt", "transformers", "onnx", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
import detect_onnx
from PIL import Image
session, metadata = detect_onnx.load(sys.argv[2])
print(json.dumps([detect_onnx.detect(session, metadata, Image.open(file), 0.0) for file in sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    files = []
    for seed, (width, height) in enumerate([(120, 90), (60, 200), (48, 48)]):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        files.append(folder / f"{seed}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def detections_alone(file, photos) -> list[list[dict]]:
    done = run_python(ALONE, str(ROOT / "examples"), str(file), *map(str, photos))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_script_without_pytorch_detects_the_same(any_size, tuned, processor, photos):
    chunks = split_classes(NAMES, processor.tokenizer, tuned.config.max_text_len)
    for file, found in zip(photos, detections_alone(any_size.file, photos), strict=True):
        (expected,) = detect(tuned, processor, [Image.open(file)], NAMES, chunks)
        assert len(found) == len(expected["scores"]) == 6 * 3
        # Scores that differ by less than a rounding error can be in another order.
        by_score = sorted(
            (NAMES[label], score, [x, y, x + w, y + h])
            for label, score, (x, y, w, h) in zip(*(expected[k].tolist() for k in ("labels", "scores", "boxes")))
        )
        for (name, score, box), each in zip(by_score, sorted(found, key=lambda d: (d["name"], d["score"]))):
            assert each["name"] == name
            assert each["score"] == pytest.approx(score, abs=TOLERANCE)
            assert each["box"] == pytest.approx(box, abs=200 * TOLERANCE)


# ---- files of a fixed size


@pytest.fixture(scope="module")
def several_prompts(processor, tmp_path_factory):
    """A bare MM Grounding DINO, with classes that do not fit into one prompt."""
    model = make_detector("mm_grounding_dino")
    file = tmp_path_factory.mktemp("onnx") / "prompts.onnx"
    return model, export_onnx(model, processor, MANY, file, fixed_size=(40, 56))


def test_several_prompts_and_a_bare_model(several_prompts, processor):
    model, exported = several_prompts
    assert exported.prompts == ["cat. dog. red house. bird. horse. cow. old man. fish. tree. table. lamp.", "door. shoe."]
    assert exported.inputs["pixel_values"] == ["batch", 3, 40, 56]
    assert exported.outputs["scores"] == ["batch", 12, 13]
    for batch in (1, 3):
        assert_same(exported.path, model, processor, MANY, images(batch, 40, 56, seed=batch))


def test_the_image_is_encoded_once_for_several_prompts(several_prompts):
    graph = onnx.load(several_prompts[1].path).graph
    # The patches of Swin, and the maps that the detector adds to those of the backbone.
    assert sum(node.op_type == "Conv" for node in graph.node) == 3


def test_a_fixed_size_without_pytorch(several_prompts, photos):
    for found in detections_alone(several_prompts[1].path, photos):
        assert len(found) == 12 * 13
        assert all(0 <= each["score"] <= 1 for each in found)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script. Returns what it printed, and its exit code."""

    def run(*arguments) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = end.code
        output = capsys.readouterr()
        return output.out, output.err, code

    return run


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """An eager adapter of MM Grounding DINO, in a folder beside its base model."""
    folder = tmp_path_factory.mktemp("saved")
    make_detector("mm_grounding_dino").save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = attach(make_detector("mm_grounding_dino"), attn_implementation="eager")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "class_names.json").write_text(json.dumps(NAMES))
    (folder / "adapter" / "detection.json").write_text(json.dumps({"threshold": 0.25}))
    return SimpleNamespace(model=model.eval(), adapter=folder / "adapter", base=folder / "base")


def test_the_command_exports_a_saved_adapter(saved, processor, tmp_path, command):
    file = tmp_path / "detector.onnx"
    printed, errors, code = command("--adapter", saved.adapter, "--output", file, "--fixed_size", 40, 56)
    assert (errors, code) == ("", 0)
    lines = printed.splitlines()
    assert lines[0] == "exporting 3 classes: red cat, dog and house. This takes minutes."
    assert lines[1].startswith(f"{file}: 0.") and lines[1].endswith(" MB, opset 18")
    assert lines[2:4] == [
        "inputs: pixel_values (batch, 3, 40, 56), pixel_mask (batch, 40, 56)",
        "outputs: scores (batch, 6, 3), boxes (batch, 6, 4)",
    ]
    assert lines[4].startswith("largest difference to PyTorch: ") and len(lines) == 5
    assert metadata_of(file)["threshold"] == 0.25
    assert_same(file, saved.model, processor, NAMES, images(2, 40, 56))


# ---- wrong input


def test_the_command_names_flags(saved, tmp_path, command):
    for arguments, message in (
        (["--adapter", tmp_path / "none"], f"--adapter {tmp_path / 'none'}: no such folder"),
        ([], "--class_names: is needed without an --adapter that has class names."),
        (["--adapter", saved.adapter, "--output", tmp_path / "no" / "d.onnx"], "--output "),
        (["--adapter", saved.adapter, "--output", tmp_path], "is a folder"),
        (["--adapter", saved.adapter, "--threshold", "1"], "--threshold 1.0: must be at least 0 and below 1."),
        (["--adapter", saved.adapter, "--fixed_size", "4", "4"], "--fixed_size 4x4: is too small"),
        (["--adapter", saved.adapter, "--class_names", "dog", "Dog"], "class names: dog is given 2 times."),
    ):
        output = () if "--output" in arguments else ("--output", tmp_path / "d.onnx")
        printed, errors, code = command(*arguments, *output)
        assert (printed, code) == ("", 2)
        assert errors.startswith("export_onnx.py: ") and message in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bare():
    return make_detector("grounding_dino")


@pytest.mark.parametrize(
    ("class_names", "options", "message"),
    [
        ([], {}, "class_names: the list is empty"),
        ("dog", {}, "class_names='dog': must be a list of names"),
        (["dog", "dog"], {}, "are the same tokens"),
        (["dog"], {"threshold": 2}, "threshold=2: must be at least 0 and below 1"),
        (["dog"], {"fixed_size": (0, 50)}, "fixed_size=0x50: is too small"),
    ],
)
def test_wrong_arguments(bare, processor, tmp_path, class_names, options, message):
    with pytest.raises(InputError, match=message):
        export_onnx(bare, processor, class_names, tmp_path / "d.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported(bare, processor, tmp_path):
    with torch.device("meta"):
        meta = make_detector("grounding_dino")
    int8 = torch.ao.quantization.quantize_dynamic(make_detector("grounding_dino"), {nn.Linear}, torch.qint8)
    for model, message in (
        (omdet_turbo.make(), "model='omdet-turbo': must be a Grounding DINO"),
        (nn.Linear(2, 2), "model='Linear': must be a Grounding DINO"),
        (bare.model, "with its heads"),
        (meta, "is on the meta device"),
        (int8, "is quantised or sharded"),
    ):
        with pytest.raises(InputError, match=message):
            export_onnx(model, processor, NAMES, tmp_path / "d.onnx")


def test_missing_packages(bare, processor, tmp_path, monkeypatch):
    find = exporting.find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingExtraError, match=r"needs the package onnxscript: pip install peft_sdpt\[onnx\]"):
        export_onnx(bare, processor, NAMES, tmp_path / "d.onnx")


def test_a_file_that_differs_is_not_written(bare, processor, tmp_path, monkeypatch):
    """The check compares with the model, so a fault in the export cannot go unseen."""
    corners = exporting._corners
    calls = []

    def faulty(boxes):
        calls.append(boxes)
        return corners(boxes) + (0.01 if len(calls) == 1 else 0)  # the first call is in the export

    monkeypatch.setattr(exporting, "_corners", faulty)
    with pytest.raises(InputError, match=r"differ from those of the model by 1\.0e-02"):
        export_onnx(bare, processor, NAMES, tmp_path / "d.onnx", fixed_size=(40, 56))
    assert not list(tmp_path.iterdir())
