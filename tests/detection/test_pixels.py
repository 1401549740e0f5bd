# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Images that have fewer positions than a detector has queries: oblong ones, and small ones."""

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import GroundingDinoImageProcessorPil

from peft_sdpt.detection import GroundedDetectionLoss, TrainingSamples, evaluate, pad_small_images
from peft_sdpt.detection.pixels import num_positions, process_images
from peft_sdpt.detection.prediction import check_image_size, detect
from peft_sdpt.errors import InputError
from tests.detection.test_metrics import BOX, make_split, processor  # noqa: F401
from tests.helpers.detectors import HOST_NAMES, attach, host_config, make_host

# (width, height) of images that have fewer than QUERIES positions after the processor resizes them to at most 128.
OBLONG = [(2000, 50), (50, 2000), (2000, 20), (100, 1), (1, 100)]
QUERIES = 30


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.effect_noise(size, 50 + seed).convert("RGB")


def inputs_of(model, processor, images) -> dict:  # noqa: F811
    pixels = process_images(processor.image_processor, images)
    text = processor.tokenizer(["dog."] * len(images), return_tensors="pt")
    return {**pixels, **text}


@pytest.mark.parametrize("name", HOST_NAMES)
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (100, 7), (3, 90), (40, 33)])
@torch.no_grad()
def test_positions_are_those_of_the_detector(name, size):
    """The number is compared with that of a model, which selects from all positions."""
    model = make_host(name, num_queries=1, num_feature_levels=3)
    pixels = {"pixel_values": torch.rand(1, 3, size[1], size[0])}
    text = {"input_ids": torch.tensor([[101, 500, 1012, 102]])}
    outputs = model(**pixels, **text)
    assert outputs.enc_outputs_class.shape[1] == num_positions(size[1], size[0], model.config)


@pytest.mark.parametrize("size", OBLONG)
def test_only_what_is_missing_is_padded(processor, size):  # noqa: F811
    config = make_host(num_queries=QUERIES).config
    inputs = inputs_of(None, processor, [noise(size)])
    height, width = inputs["pixel_values"].shape[-2:]
    assert num_positions(height, width, config) < QUERIES
    padded = pad_small_images(inputs, config)
    new = padded["pixel_values"].shape[-2:]
    assert num_positions(*new, config) >= QUERIES
    # The image is at the same place, the mask hides the rest, and one row or column less would not be enough.
    assert torch.equal(padded["pixel_values"][..., :height, :width], inputs["pixel_values"])
    assert padded["pixel_mask"].shape == (1, *new) and padded["pixel_mask"].sum() == height * width
    assert padded["pixel_mask"][:, :height, :width].all()
    fewer = (new[0] - 8, new[1]) if new[0] > height else (new[0], new[1] - 8)
    assert num_positions(*fewer, config) < QUERIES
    assert padded["input_ids"] is inputs["input_ids"]
    without_mask = {"pixel_values": inputs["pixel_values"]}
    assert torch.equal(pad_small_images(without_mask, config)["pixel_mask"], padded["pixel_mask"])


def test_images_that_are_large_enough_stay(processor):  # noqa: F811
    inputs = inputs_of(None, processor, [noise((64, 64))])
    padded = pad_small_images(inputs, make_host(num_queries=QUERIES).config)
    assert padded.keys() == inputs.keys() and all(padded[key] is inputs[key] for key in inputs)
    small = {"pixel_values": torch.rand(1, 3, 1, 1)}
    assert pad_small_images(small, host_config("grounding_dino", two_stage=False)).keys() == small.keys()


@pytest.mark.parametrize("name", HOST_NAMES)
def test_oblong_images_are_detected_evaluated_and_trained(processor, name):  # noqa: F811
    model = attach(make_host(name, num_queries=QUERIES))
    with pytest.raises(RuntimeError, match="selected index k out of range"):  # the error of transformers
        model(**inputs_of(model, processor, [noise(OBLONG[0])]))
    for size in OBLONG:
        (found,) = detect(model, processor, [noise(size)], ["dog"], [[0]], max_detections=None)
        x, y, width, height = found["boxes"].unbind(-1)
        assert len(x) == QUERIES and found["boxes"].isfinite().all() and found["scores"].isfinite().all()
        assert (x >= 0).all() and (x + width <= size[0] + 1e-3).all()
        assert (y >= 0).all() and (y + height <= size[1] + 1e-3).all()

    data = make_split([[(5, 5, 20, 20)], [BOX]], [[0], [0]], classes=1)
    data.sizes = [(2000, 50), (100, 100)]
    data.open_image = lambda index: noise(data.sizes[index])
    one, two = (evaluate(model, processor, data, size, Accelerator(cpu=True)) for size in (1, 2))
    assert one == two

    samples = TrainingSamples(data.subset([0]), 2, processor, model.config.max_text_len, seed=0)
    inputs, labels = samples.collate([samples[0], samples[1]])
    loss = GroundedDetectionLoss(model.config)(model(**pad_small_images(inputs, model.config)), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_images_without_any_pixels_left_are_named(processor):  # noqa: F811
    processor.image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 27})
    model, message = make_host(), r"an image of 2000 x 20 pixels cannot be resized by this processor"
    with pytest.raises(InputError, match=message):
        detect(model, processor, [noise((30, 30)), noise((2000, 20))], ["dog"], [[0]])
    # A run raises the error at its start.
    with pytest.raises(InputError, match=message):
        check_image_size(model, processor, sizes=[(30, 30), (2000, 20), (50, 60)])
    check_image_size(model, processor, sizes=[(30, 30), (2000, 40), (40, 2000), (50, 60)])


def test_an_image_size_that_is_mostly_padding_is_refused(processor):  # noqa: F811
    model = make_host(num_queries=QUERIES)
    processor.image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 27})
    with pytest.raises(InputError, match=r"image_size=16: .* \(a square image has only 5 positions for 30 queries\)"):
        check_image_size(model, processor, 16)
    processor.image_processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 40, "longest_edge": 67})
    check_image_size(model, processor, 40)
