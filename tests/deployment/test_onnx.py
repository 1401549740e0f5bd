# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Exported ONNX files detect what the models in PyTorch detect."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoProcessor

import detect_onnx
import export_onnx as export_script
from peft_sdpt.deployment import export_onnx, export_program, exporting
from peft_sdpt.deployment import onnx as conversion
from peft_sdpt.detection import class_prompt, class_scores, class_token_maps, detect, split_classes
from peft_sdpt.errors import InputError, MissingExtraError
from tests.helpers.detectors import HOST_NAMES, PUBLISHED, ROOT, acting, attach, make_host, run_python
from tests.helpers.pretend import pretend_gpu
from tests.helpers.programs import ON_DEMAND, alone
from tests.helpers.tiny import omdet_turbo

NAMES = ["red cat", "dog", "house"]
# More than one prompt of 32 tokens.
MANY = ["cat", "dog", "red house", "bird", "horse", "cow", "old man", "fish", "tree", "table", "lamp", "door", "shoe"]
MANY += ["hat", "boat", "plane", "bed"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def processor():
    processor = AutoProcessor.from_pretrained(ROOT / "examples/host")
    processor.image_processor.size = {"shortest_edge": 48, "longest_edge": 80}
    return processor


# As in published detectors, the coarsest feature map is not one of the backbone. Exports of these take much longer.
MORE_LEVELS = {"num_feature_levels": 3, "d_model": 64}


def make_detector(name: str, **changes) -> nn.Module:
    """A tiny detector with the vocabulary of the processor."""
    host = make_host(name, layers=1, **changes)
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


# ---- what is exported


def make_tuned(name: str, kind: str, **changes) -> nn.Module:
    detector = make_detector(name, **changes)
    if kind == "bare":
        return detector
    if kind == "several":
        model = attach(detector)
        torch.manual_seed(7)
        model.add_adapter("published", acting(**PUBLISHED))
        model.base_model.set_adapter(["default", "published"])
        return model.eval()
    options = {"gated": {}, "published": PUBLISHED, "eager": {"attn_implementation": "eager"}}[kind]
    return attach(detector, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bare", "gated", "published", "eager", "several"])
@pytest.mark.parametrize("name", HOST_NAMES)
def test_fixed_text_changes_nothing(name, kind, processor):
    """The module that is exported, in PyTorch. The tests below compare files of two such modules."""
    model = make_tuned(name, kind, **MORE_LEVELS)
    chunks = split_classes(MANY, processor.tokenizer, model.config.max_text_len)
    prompts = [class_prompt([MANY[index] for index in chunk]) for chunk in chunks]
    assert len(prompts) > 1
    before = state(model)
    fixed = exporting.FixedDetector(exporting._plain_copy(model), processor.tokenizer, prompts, chunks)
    exporting._pad_always(fixed)
    assert_unchanged(before, state(model))
    for inputs in (images(2, 51, 90), images(1, 64, 64)):
        for output, expected in zip(
            fixed(**inputs).values(), scores_and_boxes(model, processor, MANY, inputs), strict=True
        ):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_program_is_made_on_the_device_of_the_model(processor):
    """In PyTorch, before `torch.export`, which needs a real device."""
    model = make_tuned("grounding_dino", "gated")
    inputs = images(2, 51, 90)
    expected = scores_and_boxes(model, processor, ["dog", "cat"], inputs)
    host = exporting._plain_copy(model)
    with pretend_gpu():
        model.to("pretend")
        inputs = exporting._moved(inputs, host.to("pretend").device)
        fixed = exporting.FixedDetector(host, processor.tokenizer, ["dog. cat."], [[0, 1]])
        reference = exporting._scores_and_boxes(
            exporting.TokenDetector(model), processor.tokenizer, ["dog. cat."], **inputs
        )
        for outputs in (fixed(**inputs), reference):
            for found, wanted in zip(outputs.values(), expected, strict=True):
                torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5)


def test_half_precision_is_exported_in_float32(processor):
    model = make_tuned("grounding_dino", "gated").bfloat16()
    plain = exporting._plain_copy(model)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def state(model: nn.Module):
    """Everything of a model that an export must leave as it was."""
    return (
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
    )


def assert_unchanged(before, after) -> None:
    assert before[0] == after[0]
    for earlier, later in zip(before[1:], after[1:], strict=True):
        for (*facts, values), (*facts_after, values_after) in zip(earlier, later, strict=True):
            assert facts == facts_after
            assert torch.equal(values, values_after)


# ---- files for any size, which the command writes

SIZES = [(2, 64, 96), (1, 51, 133), (3, 128, 128), (2, 47, 34), (1, 16, 48)]


@pytest.fixture(scope="module")
def saved(processor, tmp_path_factory):
    """An adapter of MM Grounding DINO, in a folder beside its base model."""
    folder = tmp_path_factory.mktemp("saved")
    # Each stage of the backbone makes an export for any size a third longer. One merge of pixels is among two stages.
    make_detector("mm_grounding_dino", stages=2).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = make_tuned("mm_grounding_dino", "gated", stages=2)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "class_names.json").write_text(json.dumps(NAMES))
    (folder / "adapter" / "detection.json").write_text(json.dumps({"threshold": 0.25}))
    return SimpleNamespace(model=model, adapter=folder / "adapter", base=folder / "base")


def run_command(*arguments) -> tuple[str, str, int]:
    """Run the script. Returns what it printed to stdout and stderr, and its exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["export_onnx.py", *map(str, arguments)])
        try:
            export_script.main()
        except SystemExit as end:
            code = end.code
    return out.getvalue(), err.getvalue(), code


@pytest.fixture(scope="module")
def any_size(saved, tmp_path_factory):
    """The only export of these tests, because it takes a minute."""
    results = {}

    def keep(module, name):
        function = getattr(module, name)
        patch.setattr(module, name, lambda *args: results.setdefault(name, function(*args)))

    with pytest.MonkeyPatch.context() as patch:
        keep(exporting, "export_graph")
        keep(conversion, "_convert")
        file = tmp_path_factory.mktemp("onnx") / "detector.onnx"
        out, err, code = run_command("--adapter", saved.adapter, "--output", file)
    return SimpleNamespace(file=file, model=saved.model, out=out, err=err, code=code, results=results)


@pytest.fixture
def exported_before(any_size, monkeypatch):
    """Takes the results of that export in further ones."""
    monkeypatch.setattr(exporting, "export_graph", lambda *args: any_size.results["export_graph"])
    monkeypatch.setattr(conversion, "_convert", lambda *args: any_size.results["_convert"])


@pytest.mark.slow
def test_the_command_exports_a_saved_adapter(any_size):
    assert any_size.code == 0
    # Apart from the progress bar of transformers, nothing is printed to stderr.
    assert all("Loading weights" in line for line in any_size.err.splitlines() if line)
    lines = any_size.out.splitlines()
    assert lines[0] == "exporting 3 classes: red cat, dog, house. This takes minutes."
    assert lines[1].startswith(f"{any_size.file}: ") and lines[1].endswith(" MB, opset 18")
    assert lines[2:4] == [
        "inputs: pixel_values (batch, 3, height, width), pixel_mask (batch, height, width)",
        "outputs: scores (batch, 6, 3), boxes (batch, 6, 4)",
    ]
    assert lines[4].startswith("largest difference to PyTorch, in 95% of the queries: ") and len(lines) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_sizes_and_batches_vary(any_size, processor, batch, height, width):
    assert_same(any_size.file, any_size.model, processor, NAMES, images(batch, height, width, seed=height))


@pytest.mark.slow
def test_metadata(any_size):
    assert_metadata(metadata_of(any_size.file))


def assert_metadata(metadata: dict) -> None:
    assert metadata.pop("box_format").startswith("left, top, right, bottom")
    assert metadata.pop("peft_sdpt_version")
    assert metadata == {
        "class_names": NAMES,
        "prompts": ["red cat. dog. house."],
        "threshold": 0.25,
        "image_size": {"shortest_edge": 48, "longest_edge": 80},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": pytest.approx(1 / 255),
    }


@ON_DEMAND
@pytest.mark.slow
def test_the_command_writes_a_program_with_the_same_inputs_outputs_and_metadata(
    exported_before, any_size, saved, processor, tmp_path
):
    """It is the same graph as in the ONNX file. It runs in a process with PyTorch alone."""
    out, _, code = run_command("--adapter", saved.adapter, "--output", tmp_path / "detector.pt2")
    assert code == 0
    lines, lines_of_onnx = out.splitlines(), any_size.out.splitlines()
    assert lines[1].startswith(f"{tmp_path / 'detector.pt2'}: ") and lines[1].endswith(" MB")
    assert lines[2:4] == lines_of_onnx[2:4] and len(lines) == 5
    inputs = [images(*size, seed=size[1]) for size in SIZES]
    outputs, metadata, names = alone(tmp_path / "detector.pt2", inputs, tmp_path)
    assert_metadata(metadata)
    assert any("fusion_layer" in name for name in names) and not any("embeddings.word" in name for name in names)
    for each, found in zip(inputs, outputs, strict=True):
        expected = dict(zip(("scores", "boxes"), scores_and_boxes(saved.model, processor, NAMES, each), strict=True))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_the_file_has_no_text_backbone_and_no_rare_operators(any_size):
    graph = onnx.load(any_size.file).graph
    assert not {"SplitToSequence", "SequenceAt", "If", "Loop"} & {node.op_type for node in graph.node}
    assert all(node.domain in ("", "ai.onnx") for node in graph.node)
    embeddings = any_size.model.get_base_model().model.text_backbone.get_input_embeddings().weight
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
def test_the_script_without_pytorch_detects_the_same(any_size, processor, photos):
    chunks = split_classes(NAMES, processor.tokenizer, any_size.model.config.max_text_len)
    for file, found in zip(photos, detections_alone(any_size.file, photos), strict=True):
        (expected,) = detect(any_size.model, processor, [Image.open(file)], NAMES, chunks)
        assert len(found) == len(expected["scores"]) == 6 * 3
        # Scores that differ by less than a rounding error can be in another order.
        by_score = sorted(
            (NAMES[label], score, [x, y, x + w, y + h])
            for label, score, (x, y, w, h) in zip(
                *(expected[k].tolist() for k in ("labels", "scores", "boxes")), strict=True
            )
        )
        for (name, score, box), each in zip(
            by_score, sorted(found, key=lambda d: (d["name"], d["score"])), strict=True
        ):
            assert each["name"] == name
            assert each["score"] == pytest.approx(score, abs=TOLERANCE)
            assert each["box"] == pytest.approx(box, abs=200 * TOLERANCE)


@pytest.mark.slow
def test_what_is_said_of_the_file_and_the_model_stays_as_it_was(exported_before, any_size, processor, tmp_path):
    model = any_size.model.train()
    before = state(model)
    exported = export_onnx(model, processor, NAMES, tmp_path / "d.onnx")
    assert_unchanged(before, state(model))
    model.eval()
    assert exported.path == tmp_path / "d.onnx"
    assert exported.num_bytes == exported.path.stat().st_size
    opset = next(each.version for each in onnx.load(exported.path).opset_import if not each.domain)
    assert exported.opset == opset == 18
    assert exported.prompts == ["red cat. dog. house."]
    assert 0 < exported.difference < TOLERANCE


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(exported_before, any_size, processor, tmp_path, monkeypatch):
    """The check compares with the model, so a fault in the export cannot go unseen."""
    corners = exporting._corners
    monkeypatch.setattr(exporting, "_corners", lambda boxes: corners(boxes) + 0.01)
    for export, name in ((export_onnx, "d.onnx"), (export_program, "d.pt2")):
        with pytest.raises(InputError, match=r"differ from those of the model by 1\.0e-02"):
            export(any_size.model, processor, NAMES, tmp_path / name)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_images_are_encoded_once_for_several_prompts(processor):
    model = make_detector("grounding_dino")
    calls = []
    model.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    fixed = exporting.FixedDetector(model, processor.tokenizer, ["dog.", "cat.", "tree."], [[0], [1], [2]])
    calls.clear()
    for seed in range(2):
        fixed(**images(1, 40, 56, seed=seed))
    assert len(calls) == 2


def test_a_fixed_size_is_padded_by_the_script(photos, processor):
    metadata = exporting._preparation(processor.image_processor, (40, 56))
    for file in photos:
        image = Image.open(file)
        found = detect_onnx.prepare(image, metadata)
        ratio = min(40 / image.height, 56 / image.width)
        width, height = int(image.width * ratio), int(image.height * ratio)
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        inputs = processor.image_processor(small, do_resize=False, return_tensors="pt")
        for name, values in found.items():
            assert values.shape[-2:] == (40, 56)
            expected = nn.functional.pad(inputs[name], (0, 56 - width, 0, 40 - height))
            torch.testing.assert_close(torch.from_numpy(values), expected, rtol=0, atol=1e-5)


# ---- wrong input


def test_the_command_names_flags(saved, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "d.onnx"
    folder.mkdir()
    for arguments, message in (
        (["--adapter", tmp_path / "none"], f"--adapter {tmp_path / 'none'}: no such folder"),
        ([], "--class_names: is needed without an --adapter that has class names."),
        (["--adapter", saved.adapter, "--output", tmp_path / "no" / "d.onnx"], "--output "),
        (["--adapter", saved.adapter, "--output", tmp_path / "d.pt"], "d.pt: must end with .onnx or .pt2"),
        (["--adapter", saved.adapter, "--output", folder], "is a folder"),
        (["--adapter", saved.adapter, "--threshold", "1"], "--threshold 1.0: must be at least 0 and below 1."),
        (["--adapter", saved.adapter, "--fixed_size", "4", "4"], "--fixed_size 4x4: is too small"),
        (["--adapter", saved.adapter, "--class_names", "dog", "Dog"], "class names: dog is given 2 times."),
    ):
        output = () if "--output" in arguments else ("--output", tmp_path / "d.onnx")
        printed, errors, code = run_command(*arguments, *output)
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
        (["dög", "dog"], {}, "are the same tokens"),
        (["dog"], {"threshold": 2}, "threshold=2: must be at least 0 and below 1"),
        (["dog"], {"fixed_size": (0, 50)}, "fixed_size=0x50: is too small"),
        (["dog"], {"fixed_size": (64,)}, r"fixed_size=\(64,\): must be a height and a width in pixels"),
    ],
)
def test_wrong_arguments(bare, processor, tmp_path, class_names, options, message):
    for export, name in ((export_onnx, "d.onnx"), (export_program, "d.pt2")):
        with pytest.raises(InputError, match=message):
            export(bare, processor, class_names, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_only_programs_work_without_classes(bare, processor, tmp_path):
    with pytest.raises(InputError, match="class_names: the list is empty"):
        export_onnx(bare, processor, None, tmp_path / "d.onnx")
    with pytest.raises(InputError, match=r"d\.onnx: must end with \.pt2"):
        export_program(bare, processor, None, tmp_path / "d.onnx")


def test_models_that_cannot_be_exported(bare, processor, tmp_path):
    meta = make_detector("grounding_dino").to("meta")
    other = make_detector("grounding_dino")
    other.config.tie_word_embeddings = False  # PEFT would ask for the embeddings of the output
    lora = get_peft_model(other, LoraConfig(target_modules=["fc1"]))
    int8 = torch.ao.quantization.quantize_dynamic(make_detector("grounding_dino"), {nn.Linear}, torch.qint8)
    for model, message in (
        (omdet_turbo.make(), "model='omdet-turbo': must be a Grounding DINO"),
        (nn.Linear(2, 2), "model='Linear': must be a Grounding DINO"),
        (bare.model, "with its heads"),
        (meta, "is on the meta device"),
        (lora, "merge_and_unload"),
        (int8, "is quantised or sharded"),
    ):
        with pytest.raises(InputError, match=message):
            export_onnx(model, processor, NAMES, tmp_path / "d.onnx")


def test_missing_packages(bare, processor, tmp_path, monkeypatch):
    find = conversion.find_spec
    monkeypatch.setattr(conversion, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(MissingExtraError, match=r"needs the package onnxscript: pip install peft_sdpt\[onnx\]"):
        export_onnx(bare, processor, NAMES, tmp_path / "d.onnx")
