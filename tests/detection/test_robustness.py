# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detecting in changed images: attacked, with random signs, corrupted, and purified."""

import dataclasses
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GroundingDinoProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

from peft_sdpt.detection import (
    DetectionSplit,
    attack_split,
    average_precision,
    corrupt,
    corrupt_split,
    detect_changed,
    lowest_rows,
    parse_purifier,
)
from peft_sdpt.detection.attacks import Attack
from peft_sdpt.detection.pixels import PixelRange, process_images
from peft_sdpt.detection.robustness import Adversary, RandomSigns, image_precisions
from peft_sdpt.errors import InputError
from tests.helpers.detectors import attach, make_host
from tests.helpers.words import make_tokenizer

NAMES = ["dog", "cat", "horse"]
SIZES = [(96, 64), (64, 64), (96, 64), (64, 64)]
BOX, OTHER, FAR = (5, 10, 20, 20), (30, 10, 30, 20), (5, 40, 20, 20)
ATTACK = Attack(8 / 255, steps=2)


def noise(index: int) -> Image.Image:
    width, height = SIZES[index]
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def data():
    """Images of two sizes, one of them without objects and one with a crowd."""
    return DetectionSplit(
        class_names=NAMES,
        image_ids=list("abcd"),
        sizes=SIZES,
        boxes=[[BOX, OTHER], [FAR], [], [OTHER, FAR]],
        labels=[[0, 2], [1], [], [2, 1]],
        crowds=[[False, False], [False], [], [False, True]],
        open_image=noise,
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    size = {"shortest_edge": 64, "longest_edge": 128}
    return GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size=size), make_tokenizer(tmp_path_factory.mktemp("words"))
    )


@pytest.fixture(scope="module")
def tuned():
    return attach(make_host()).eval()


def test_on_a_gpu_as_on_the_cpu(tuned, processor, data, gpu):
    models = (attach(make_host()).eval().to(gpu), tuned)
    attack, purify, some = dataclasses.replace(ATTACK, steps=1), parse_purifier("bits:6"), [1, 3]
    found, wanted = (attack_split(m, processor, data, attack, 2, purify=purify, indices=some) for m in models)
    assert {row[0] for row in found} == {row[0] for row in wanted} == {0, 1}
    # A real GPU rounds differently, which turns the sign of small gradients.
    if gpu.type != "cuda":
        same(found, wanted)
    signs = RandomSigns(processor, 0.1)
    same(*(detect_changed(model, processor, data, signs, 2, indices=some)[0] for model in models))


@pytest.fixture
def inputs(data, processor):
    """The first and the third image, which have the same size."""
    return [0, 2], process_images(processor.image_processor, [noise(0), noise(2)])


def columns(rows) -> torch.Tensor:
    """Rows as numbers, in the order of images and scores."""
    return torch.tensor(sorted(rows, key=lambda row: (row[0], -row[5])))


def same(first, second) -> None:
    torch.testing.assert_close(columns(first), columns(second), rtol=1e-4, atol=1e-3)


def test_an_attack_of_no_size_detects_as_before(tuned, processor, data):
    (clean,) = detect_changed(tuned, processor, data, None, 2)
    assert {row[0] for row in clean} == {0, 1, 2, 3}
    assert attack_split(tuned, processor, data, Attack(0.0, steps=1), 2) == clean
    assert attack_split(tuned, processor, data, ATTACK, 2) != clean


@pytest.mark.parametrize("loss", ["all", "vanish", "features"])
def test_an_image_is_attacked_in_the_same_way_whatever_else_is(tuned, processor, data, loss):
    attack = dataclasses.replace(ATTACK, loss=loss)
    whole = attack_split(tuned, processor, data, attack, 4)
    indices = [3, 0, 2]
    part = attack_split(tuned, processor, data, attack, 1, indices=indices)
    same([(indices[row[0]], *row[1:]) for row in part], [row for row in whole if row[0] != 1])


def test_the_seed_decides_the_random_start(tuned, processor, data):
    first, again, other = (attack_split(tuned, processor, data, ATTACK, 4, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_transfer_attacks_the_base_model(tuned, processor, data, inputs):
    images, pixels = inputs
    with torch.no_grad():
        before = tuned(**prompt(processor, pixels)).logits
    by_context = Adversary(tuned, processor, data, ATTACK, attacked=tuned.disable_adapter)(images, pixels)
    base_model = make_host()
    by_model = Adversary(tuned, processor, data, ATTACK, attacked=base_model)(images, pixels)
    direct = Adversary(base_model, processor, data, ATTACK)(images, pixels)
    # Gradients may be summed in another order, so a few that are almost 0 have another sign.
    assert share_of_others(by_context, direct) < 1e-3
    assert share_of_others(by_model, direct) == 0
    assert share_of_others(Adversary(tuned, processor, data, ATTACK)(images, pixels), direct) > 0.05
    with torch.no_grad():
        assert torch.equal(tuned(**prompt(processor, pixels)).logits, before)


def share_of_others(one, other):
    return (one != other).float().mean().item()


def prompt(processor, pixels):
    return {**pixels, **processor.tokenizer(["dog.cat.horse."] * len(pixels["pixel_values"]), return_tensors="pt")}


def test_the_model_stays_as_it_is(tuned, processor, data):
    tuned.train()
    tuned.base_model.model.model.encoder.eval()
    modes = [module.training for module in tuned.modules()]
    state = torch.get_rng_state()
    attack_split(tuned, processor, data, ATTACK, 4)
    assert [module.training for module in tuned.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tuned.parameters())
    tuned.eval()


def test_purifiers_stand_in_front_of_the_detector(tuned, processor, data):
    jpeg, bits = parse_purifier("jpeg:30"), parse_purifier("bits:2")
    together = detect_changed(tuned, processor, data, None, 4, [None, jpeg, bits])
    assert len({tuple(columns(rows).flatten().tolist()) for rows in together}) == 3
    for purify, rows in zip((None, jpeg, bits), together, strict=True):
        assert detect_changed(tuned, processor, data, None, 4, [purify])[0] == rows
    purified = dataclasses.replace(data, open_image=partial(open_purified, bits))
    same(detect_changed(tuned, processor, purified, None, 4)[0], together[2])


def test_a_purifier_leaves_padding_alone(processor):
    """An image with fewer positions than queries is padded, after the purifier."""
    model = attach(make_host(two_stage=True, num_queries=81)).eval()
    small = DetectionSplit(NAMES, ["a"], [(64, 64)], [[BOX]], [[0]], [[False]], lambda _: noise(1))
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    # Zero is grey for a detector, and one bit makes black or white of it.
    attack_split(model, processor, small, dataclasses.replace(ATTACK, steps=1), 1, purify=parse_purifier("bits:1"))
    for inputs in seen:
        is_padding = inputs["pixel_mask"][:, None].expand_as(inputs["pixel_values"]) == 0
        assert is_padding.any()
        assert (inputs["pixel_values"][is_padding] == 0).all()
    assert len(seen) == 2


def open_purified(purify, index: int) -> Image.Image:
    """The images of this module have the size that the detector sees, so a purifier may come before resizing."""
    values = torch.from_numpy(np.array(noise(index))).permute(2, 0, 1)[None] / 255
    return Image.fromarray((purify(values)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def test_an_attack_goes_through_the_purifier(tuned, processor, data, inputs):
    images, pixels = inputs
    purify = parse_purifier("bits:3")
    change = Adversary(tuned, processor, data, ATTACK, purify=purify)
    assert not torch.equal(change(images, pixels), Adversary(tuned, processor, data, ATTACK)(images, pixels))
    (wanted,) = detect_changed(tuned, processor, data, change, 4, [purify])
    assert attack_split(tuned, processor, data, ATTACK, 4, purify=purify) == wanted


def test_classes_of_several_prompts(processor, data):
    """The prompt of an image has its own classes, as many others as fit, and labels that are their numbers."""
    names = ["platelet", "dog", "cell", "horse", "red", "cat", "white", "blood"]
    split = data.with_classes([*NAMES, *(name for name in names if name not in NAMES)])
    split = dataclasses.replace(
        split.with_classes(names), labels=[[names.index(NAMES[label]) for label in row] for row in data.labels]
    )
    model = attach(make_host(max_text_len=10)).eval()
    change = Adversary(model, processor, split, ATTACK)
    prompts, labels = zip(*map(change._prompt_and_labels, range(4)), strict=True)
    for image, (text, label) in enumerate(zip(prompts, labels, strict=True)):
        phrases = text.rstrip(".").split(".")
        assert [phrases[number].strip() for number in label["class_labels"]] == [
            NAMES[c] for c, crowd in zip(data.labels[image], data.crowds[image], strict=True) if not crowd
        ]
        assert 1 < len(phrases) < len(names)
        assert len(label["boxes"]) == len(label["class_labels"])
    rows = attack_split(model, processor, split, ATTACK, 4)
    assert {row[6] for row in rows} - set(range(len(phrases)))


def test_random_signs_change_each_value_by_eps(processor, inputs):
    images, pixels = inputs
    unit = PixelRange.of(processor.image_processor)
    before = unit.to_images(pixels["pixel_values"])
    found = unit.to_images(RandomSigns(processor, 4 / 255, seed=1)(images, pixels))
    change = found - before
    inside = (before > 4 / 255) & (before < 1 - 4 / 255)
    torch.testing.assert_close(change[inside].abs(), torch.full_like(change[inside], 4 / 255))
    assert found.min() > -1e-6 and found.max() < 1 + 1e-6
    assert change[inside].sign().mean().abs() < 0.05
    # An image alone gets the same signs.
    alone = RandomSigns(processor, 4 / 255, seed=1)([2], {"pixel_values": pixels["pixel_values"][1:]})
    torch.testing.assert_close(unit.to_images(alone)[0], found[1])


def test_a_corrupted_split(data):
    corrupted = pickle.loads(pickle.dumps(corrupt_split(data, "gaussian_noise", 2, seed=3)))
    for index in (0, 1):
        assert corrupted.open_image(index) == corrupt(noise(index), "gaussian_noise", 2, (3, index))
    assert corrupted.subset([1]).open_image(0) == corrupted.open_image(1)
    assert corrupted.boxes == data.boxes
    with pytest.raises(InputError, match="severities=9"):
        corrupt_split(data, "snow", 9)


# ---- the lowest of several attacks


def test_precision_of_each_image_by_hand(data):
    rows = [(0, *BOX, 0.9, 0), (1, *BOX, 0.8, 1), (1, *FAR, 0.7, 1), (2, *BOX, 0.5, 0), (3, *OTHER, 0.2, 2)]
    found = image_precisions(data, rows)
    # One of two classes, the second detection, no object, and a crowd that does not count.
    np.testing.assert_allclose(found, [0.5, 0.5, np.nan, 1.0])
    assert np.isnan(image_precisions(data, [])[2])
    assert np.nansum(image_precisions(data, [])) == 0


@pytest.mark.parametrize("seed", range(3))
def test_precision_of_each_image_is_that_of_the_image_alone(seed):
    """More images than are measured together."""
    random = np.random.default_rng(seed)
    boxes = [[tuple(map(float, random.integers(5, 40, 4))) for _ in range(random.integers(0, 4))] for _ in range(40)]
    labels = [[int(random.integers(3)) for _ in image] for image in boxes]
    crowds = [[bool(random.random() < 0.2) for _ in image] for image in boxes]
    many = DetectionSplit(NAMES, list(range(40)), [(100, 100)] * 40, boxes, labels, crowds, noise)
    rows = []
    for image in range(40):
        for box in [*boxes[image], *boxes[image], (1.0, 2.0, 50.0, 30.0)]:
            moved = np.array(box) + random.normal(0, 2, 4).clip(-4, 4)
            rows.append((image, *moved.tolist(), float(random.random()), int(random.integers(3))))
    found = image_precisions(many, rows)
    for image in range(40):
        mine = [(0, *row[1:]) for row in rows if row[0] == image]
        alone = average_precision(many.subset([image]), mine)["AP"]
        np.testing.assert_allclose(found[image], alone, atol=1e-4)


def test_the_lowest_of_each_image(data):
    first = [(0, *BOX, 0.9, 0), (0, *OTHER, 0.9, 2), (1, *BOX, 0.9, 1), (2, *BOX, 0.9, 1), (3, *OTHER, 0.5, 2)]
    second = [(0, *BOX, 0.8, 0), (1, *FAR, 0.8, 1), (3, *OTHER, 0.4, 2)]
    found = lowest_rows(data, [first, second])
    # Of equal ones, as for the last two images, it is the first.
    assert sorted(found) == sorted([second[0], first[2], first[3], first[4]])
