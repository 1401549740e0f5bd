# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How often the CPU waits for a GPU, and that devices do not mix, on the pretend GPU."""

from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import GroundingDinoProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from peft_sdpt.detection import FeatureCache, GroundedDetectionLoss, class_scores, class_token_maps, detect
from peft_sdpt.detection.devices import to_cpu, to_device
from peft_sdpt.errors import InputError
from tests.detection.test_loss import make_inputs, make_labels
from tests.helpers.detectors import HOST_NAMES, acting, attach, make_host, model_inputs, moved
from tests.helpers.pretend import pretend_gpu
from tests.helpers.words import make_tokenizer


@pytest.fixture
def syncs():
    with pretend_gpu() as log:
        yield log


@pytest.fixture
def processor(tmp_path):
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    return GroundingDinoProcessor(images, make_tokenizer(tmp_path))


def batch(images: int):
    """Outputs of a detector, and labels. Prompts and numbers of boxes differ, and one image has no boxes."""
    host = make_host()
    layouts = [[1, 3], [2, 2], [3, 1], [2]]
    classes = [[1, 0], [0], [], [0, 0, 0]]
    with torch.no_grad():
        outputs = host(**make_inputs([layouts[i % 4] for i in range(images)]))
    return host.config, outputs, make_labels([classes[i % 4] for i in range(images)])


@pytest.mark.parametrize("images", [1, 7])
def test_token_maps_wait_once_for_any_number_of_prompts(syncs, images):
    ids = make_inputs([[1, 3], [2, 2], [3, 1], [2], [1, 1, 1], [4], [2, 1]][:images])["input_ids"]
    expected = class_token_maps(ids, 16)
    there = ids.to("pretend")
    syncs.clear()
    maps = class_token_maps(there, 16)
    assert [sync.kind for sync in syncs] == ["to the CPU"]
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(maps, expected, strict=True))
    logits = torch.randn(images, 5, 16)
    there = logits.to("pretend")
    syncs.clear()
    scores = class_scores(there, maps)
    assert not syncs
    for mine, theirs in zip(scores, class_scores(logits, expected), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs)


@pytest.mark.parametrize("images", [1, 4, 9])
def test_the_loss_reads_once_and_uploads_once_for_any_number_of_images(syncs, images):
    config, outputs, labels = batch(images)
    loss = GroundedDetectionLoss(config)
    expected = loss(outputs, labels)
    outputs, labels = moved(outputs), moved(labels)
    leaves = ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits")
    for name in leaves:
        outputs[name] = outputs[name].requires_grad_()
    syncs.clear()
    result = loss(outputs, labels)
    # The costs for SciPy, and what it matched.
    assert [sync.kind for sync in syncs] == ["to the CPU", "to the device"], Counter(syncs)
    syncs.clear()
    result.backward()
    assert not syncs
    torch.testing.assert_close(result.detach().cpu(), expected)
    assert all(outputs[name].grad.cpu().isfinite().all() for name in leaves)


def test_the_gradient_of_the_loss_waits_for_nothing():
    """Seen by the profiler on the CPU. PyTorch computes some gradients in another way for the pretend GPU."""
    config, outputs, labels = batch(4)
    for name in ("logits", "pred_boxes", "enc_outputs_class", "enc_outputs_coord_logits"):
        outputs[name].requires_grad_()
    loss = GroundedDetectionLoss(config)(outputs, labels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    ran = {event.name for event in profile.events()}
    assert "aten::mul" in ran
    assert not ran & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_wrong_labels_on_a_gpu_are_named(syncs):
    config, outputs, labels = batch(4)
    labels[3]["class_labels"][1] = 1
    outputs, labels = moved(outputs), moved(labels)
    with pytest.raises(InputError, match=r"labels\[3\]: class label 1 must be from 0 to 0, .* 1 phrase\."):
        GroundedDetectionLoss(config)(outputs, labels)
    labels[3]["class_labels"][1] = 0
    labels[1]["boxes"] = labels[1]["boxes"] * 100
    with pytest.raises(InputError, match=r"labels\[1\]: box \[.* must be centre x"):
        GroundedDetectionLoss(config)(outputs, labels)
    labels[1]["boxes"] = labels[1]["boxes"].cpu()
    with pytest.raises(
        InputError, match=r"labels\[1\]: must be on the device of the outputs, pretend:0, got pretend:0"
    ):
        GroundedDetectionLoss(config)(outputs, labels)


@pytest.mark.parametrize("limit", [5, None])
@pytest.mark.parametrize("images", [1, 4])
def test_detection_reads_its_results_once_for_any_number_of_images(syncs, images, limit, processor):
    host = make_host()
    pictures = [Image.effect_noise((50 + 8 * i, 64), 90).convert("RGB") for i in range(images)]
    names, chunks = ["dog", "red cat", "cup"], [[0, 1], [2]]
    arguments = processor, pictures, names, chunks, 0.3, limit
    expected = detect(host, *arguments)
    there = host.to("pretend")
    syncs.clear()
    results = detect(there, *arguments)
    for mine, theirs in zip(results, expected, strict=True):
        assert len(mine["scores"]) and mine["best_score"] == pytest.approx(theirs["best_score"])
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-3)
    ours = [sync.kind for sync in syncs.of("peft_sdpt/")]
    # The sizes of the prompts; without a limit, the number of detections; and the results. For each prompt.
    assert ours == (["to the CPU", "to the CPU"] if limit else ["to the CPU", "item", "to the CPU"]) * 2


def test_stored_features_are_found_without_the_pixels_of_the_device(syncs, tmp_path):
    detector = attach(make_host()).train().to("pretend")
    inputs = model_inputs()
    cache = FeatureCache(tmp_path, detector)
    found = []
    for make in (to_device, lambda inputs, device: {name: value.to(device) for name, value in inputs.items()}):
        there = make(inputs, torch.device("pretend"))
        with torch.no_grad(), cache.used():
            detector(**there)
            syncs.clear()
            detector(**there)
        found.append([sync.kind for sync in syncs.of("detection/")])
    read, features = "to the CPU", "to the device"
    # First the prompts: their masks, which the model makes on the device, are part of their key. Then two levels of the
    # pictures, whose pixels are read only if they are nowhere else.
    assert found == [[read, features, features, features], [read, features, read, features, features]]


def test_copies_that_are_made_together_are_exact(syncs):
    values = [
        torch.tensor([True, False, True]),
        torch.tensor([[2**40 + 1], [-3]]),
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.zeros(0, 4),
        torch.randn(2, 3).bfloat16().T,
        torch.randn(3, requires_grad=True),
    ]
    there = [value.detach().to("pretend") for value in values]
    kept = torch.randn(2)
    there.insert(2, to_device({"kept": [kept]}, torch.device("pretend"))["kept"][0])
    syncs.clear()
    *copies, last = to_cpu(there)
    assert [sync.kind for sync in syncs] == ["to the CPU"]
    assert copies.pop(2) is kept
    for copy, value in zip([*copies, last], values, strict=True):
        assert copy.dtype == value.dtype and not copy.requires_grad and torch.equal(copy, value)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_a_detector_trains_on_a_gpu_as_on_the_cpu(name, gpu):
    """Outputs, loss and gradients. In double precision, since a GPU may round products of float32 to fewer bits."""
    detector = attach(make_host(name)).double().train()
    inputs = make_inputs([[1, 3], [2, 2], [3, 1]])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = make_labels([[1, 0], [], [1, 1, 0]])
    results = []
    for device in ("cpu", gpu):
        detector.zero_grad()
        detector.to(device)
        outputs = detector(**to_device(inputs, torch.device(device)))
        loss = GroundedDetectionLoss(detector.config)(outputs, to_device(labels, torch.device(device)))
        loss.backward()
        gradients = [parameter.grad for parameter in detector.parameters() if parameter.requires_grad]
        assert len(gradients) == 4 and all(gradient.device.type == torch.device(device).type for gradient in gradients)
        results.append([value.detach().cpu() for value in (outputs.logits, outputs.pred_boxes, loss, *gradients)])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_mixed_adapters_on_a_gpu_are_those_of_the_cpu(name, gpu):
    detector = attach(make_host(name)).double().eval()
    detector.add_adapter("other", acting(num_virtual_tokens=2))
    inputs = {name: value.double() if name == "pixel_values" else value for name, value in model_inputs(3).items()}
    names = ["other", "__base__", "default"]
    results = []
    for device in ("cpu", gpu):
        detector.to(device)
        with torch.no_grad():
            outputs = detector(**to_device(inputs, torch.device(device)), adapter_names=names)
        results.append([outputs.logits.cpu(), outputs.pred_boxes.cpu()])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)
