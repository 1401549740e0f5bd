# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The samples of a run: their order, their augmentation, what they are asked for."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.samples import GREY, SCALES, Purpose, TrainingSamples, augment, generator_of
from tests.helpers.words import make_tokenizer

SIZE = (60, 40)


class Processor:
    """A detector's tokenizer, and pictures that stay as they are."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @staticmethod
    def image_processor(pictures, return_tensors):
        return {"pixel_values": torch.tensor([picture.getpixel((0, 0))[0] for picture in pictures])}


class Pictures:
    """Index -> a picture of one grey that tells its index."""

    def __call__(self, index):
        return Image.new("RGB", SIZE, (index, index, index))


def make_split(num_images=5, names=("red", "blue"), labels=None):
    labels = labels or [[i % len(names)] for i in range(num_images)]
    return DetectionSplit(
        class_names=list(names),
        image_ids=list(range(num_images)),
        sizes=[SIZE] * num_images,
        boxes=[[(10.0 + j, 5, 20, 10) for j in range(len(image))] for image in labels],
        labels=labels,
        crowds=[[False] * len(image) for image in labels],
        open_image=Pictures(),
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    words = [f"w{i}" for i in range(60)] + ["red", "blue"]
    return Processor(make_tokenizer(tmp_path_factory.mktemp("words"), words))


def samples(processor, data=None, num_samples=15, seed=0, augmentation=False, max_text_len=256):
    return TrainingSamples(data or make_split(), num_samples, processor, max_text_len, seed, augmentation)


def shown(dataset):
    return [dataset[k]["image"].getpixel((0, 0))[0] for k in range(len(dataset))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def marked(box):
    """A black picture that is white in a box."""
    picture = Image.new("RGB", SIZE)
    x, y, width, height = box
    picture.paste((255, 255, 255), (x, y, x + width, y + height))
    return picture


@pytest.mark.parametrize("seed", range(40))
def test_boxes_go_where_the_picture_goes(seed):
    box = (12, 8, 20, 16)
    picture, boxes, kept = augment(marked(box), torch.tensor([box], dtype=torch.float32), generator(seed))
    assert picture.size == SIZE and kept.tolist() == [True]
    # Half white is where the edge is; around the picture it is darker.
    rows, columns = (torch.tensor(np.array(picture.convert("L"))) > 190).nonzero(as_tuple=True)
    x, y, width, height = boxes[0].tolist()
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    torch.testing.assert_close(
        torch.tensor(found).float(), torch.tensor([x, y, x + width, y + height]), rtol=0, atol=1.1
    )


def test_augmentation_flips_shrinks_and_enlarges_within_its_bounds():
    halves, scales, flipped = marked((0, 0, SIZE[0] // 2, SIZE[1])), [], 0
    for seed in range(200):
        picture, boxes, _ = augment(halves, torch.tensor([[28.0, 18, 4, 4]]), generator(seed))
        scales.append(boxes[0, 2].item() / 4)
        flipped += picture.getpixel((SIZE[0] * 3 // 4, SIZE[1] // 2)) == (255, 255, 255)
    assert 70 < flipped < 130
    # Windows are of whole pixels.
    assert SCALES[0] - 0.01 <= min(scales) < 0.85 and 1.2 < max(scales) <= SCALES[1] + 0.01


def test_around_a_smaller_picture_it_is_grey():
    smaller = []
    for seed in range(40):
        picture, boxes, _ = augment(Image.new("RGB", SIZE), torch.tensor([[28.0, 18, 4, 4]]), generator(seed))
        scale = boxes[0, 2].item() / 4
        grey = GREY in {colour for _, colour in picture.getcolors(maxcolors=10_000)}
        assert grey or scale > 0.95
        assert not grey or scale < 1
        smaller.append(grey)
    assert True in smaller and False in smaller


def test_a_box_that_is_nearly_cut_away_is_gone_and_others_are_cut():
    at_the_edge, in_the_middle = [0.0, 0.0, 4.0, 40.0], [28.0, 15.0, 4.0, 10.0]
    outcomes = set()
    for seed in range(100):
        both = torch.tensor([at_the_edge, in_the_middle])
        picture, boxes, kept = augment(Image.new("RGB", SIZE), both, generator(seed))
        assert kept[1]
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        assert (low >= 0).all() and (high <= torch.tensor(picture.size) + 1e-3).all()
        zoom = boxes[1, 2:] / torch.tensor([4.0, 10.0])
        visible = boxes[0, 2:].prod() / (4 * 40 * zoom.prod())
        assert bool(kept[0]) == bool(visible >= 0.25 - 1e-5)
        outcomes.add(bool(kept[0]))
    assert outcomes == {True, False}


def test_each_epoch_has_every_picture_once_in_an_order_of_its_own(processor):
    order = shown(samples(processor))
    epochs = [order[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_sample_follows_from_seed_and_number_alone(processor):
    data = make_split(names=[f"w{i}" for i in range(50)], num_images=50)
    one, two = (samples(processor, data, 100, 3, augmentation=True, max_text_len=30) for _ in range(2))
    torch.manual_seed(1)
    forward = [one[k] for k in range(100)]
    torch.manual_seed(2)
    backward = [two[k] for k in reversed(range(100))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a["prompt"] == b["prompt"] and a["image"].tobytes() == b["image"].tobytes()
        assert torch.equal(a["labels"]["boxes"], b["labels"]["boxes"])
    assert len({sample["prompt"] for sample in forward}) > 50


def test_seeds_differ_and_the_order_of_epochs_is_not_that_of_samples(processor):
    assert shown(samples(processor, seed=0)) != shown(samples(processor, seed=1))
    boxes = [samples(processor, seed=seed, augmentation=True)[0]["labels"]["boxes"] for seed in range(8)]
    assert len({tuple(box.flatten().tolist()) for box in boxes}) == 8
    assert generator_of(0, 5, Purpose.SAMPLE).initial_seed() != generator_of(0, 5, Purpose.EPOCH).initial_seed()


def test_workers_change_nothing(processor):
    dataset = samples(processor, num_samples=12, augmentation=True)
    runs = []
    for workers in (0, 2):
        loader = DataLoader(dataset, 4, collate_fn=dataset.collate, num_workers=workers)
        runs.append([(inputs["pixel_values"], labels) for inputs, labels in loader])
    for (pixels, labels), (others, other_labels) in zip(*runs, strict=True):
        assert torch.equal(pixels, others)
        for label, other in zip(labels, other_labels, strict=True):
            assert all(torch.equal(label[key], other[key]) for key in label)


def test_labels_are_places_in_the_prompt_and_boxes_are_shares(processor):
    sample = samples(processor, make_split(1, labels=[[1, 0]]))[0]
    assert sample["prompt"] == "red. blue."
    assert sample["labels"]["class_labels"].tolist() == [1, 0]
    expected = torch.tensor([[20 / 60, 10 / 40, 20 / 60, 10 / 40], [21 / 60, 10 / 40, 20 / 60, 10 / 40]])
    torch.testing.assert_close(sample["labels"]["boxes"], expected)


def test_crowds_are_not_trained_on(processor):
    data = make_split(1, labels=[[1, 0]])
    data.crowds = [[True, False]]
    assert samples(processor, data)[0]["labels"]["class_labels"].tolist() == [0]
    data.crowds = [[True, True]]
    assert samples(processor, data)[0]["labels"]["boxes"].shape == (0, 4)


def test_many_classes_are_asked_in_part_with_those_of_the_picture_among_others(processor):
    names = [f"w{i}" for i in range(60)]
    data = make_split(60, names, labels=[[i, (i + 7) % 60] for i in range(60)])
    dataset = samples(processor, data, num_samples=120, max_text_len=42)
    asked = []
    for number in range(120):
        sample = dataset[number]
        phrases = sample["prompt"].rstrip(".").split(". ")
        assert len(processor.tokenizer(sample["prompt"])["input_ids"]) == 42
        picture = sample["image"].getpixel((0, 0))[0]
        assert [phrases[c] for c in sample["labels"]["class_labels"]] == [names[c] for c in data.labels[picture]]
        assert phrases == sorted(phrases, key=names.index)
        asked += phrases
    assert set(asked) == set(names)


def test_a_picture_of_more_classes_than_fit_is_asked_for_some_of_them(processor):
    names = [f"w{i}" for i in range(60)]
    dataset = samples(processor, make_split(1, names, labels=[list(range(60))]), num_samples=50, max_text_len=20)
    seen = set()
    for number in range(50):
        sample = dataset[number]
        phrases = sample["prompt"].rstrip(".").split(". ")
        assert [phrases[c] for c in sample["labels"]["class_labels"]] == phrases
        seen |= set(phrases)
    assert seen == set(names)


def test_samples_end(processor):
    made = samples(processor, num_samples=7)
    assert len(list(made)) == len(made) == 7
    for number in (7, -1):
        with pytest.raises(IndexError, match=f"number must be at least 0 and below 7, got {number}"):
            made[number]
