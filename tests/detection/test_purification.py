# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Purifiers: what they return, and the gradient that goes through."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from peft_sdpt.detection import Purifier, parse_purifier
from peft_sdpt.errors import InputError

PURIFIERS = ("jpeg:75", "jpeg:10", "bits:1", "bits:4", "bits:8")


def images(batch: int = 2, height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(batch, 3, 5, 7, generator=generator)
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear")


@pytest.mark.parametrize("text", PURIFIERS)
def test_the_gradient_is_that_of_the_identity(text):
    before = images().requires_grad_()
    weights = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    after = parse_purifier(text)(before)
    (after * weights).sum().backward()
    assert torch.equal(before.grad, weights)
    assert torch.equal(after.detach(), parse_purifier(text)(images()))
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert after.min() >= 0 and after.max() <= 1


def test_bits_by_hand_and_idempotent():
    values = torch.tensor([0.0, 0.1, 1 / 6 - 1e-3, 1 / 6 + 1e-3, 0.5 - 1e-3, 0.9, 1.0]).expand(1, 3, 1, 7)
    wanted = torch.tensor([0, 0, 0, 1 / 3, 1 / 3, 1, 1]).expand(1, 3, 1, 7)
    assert torch.equal(parse_purifier("bits:2")(values), wanted)
    for bits in range(1, 9):
        once = parse_purifier(f"bits:{bits}")(images())
        assert torch.equal(parse_purifier(f"bits:{bits}")(once), once)
        assert len(once.unique()) <= 2**bits


def test_jpeg_is_that_of_pillow_and_nearly_idempotent():
    before = images()
    after = parse_purifier("jpeg:75")(before)
    for image, found in zip(before, after, strict=True):
        array = np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=75)
        assert (np.asarray(Image.open(file)) == (found.permute(1, 2, 0) * 255).round().numpy()).all()
    change = (after - before).abs().mean()
    again = (parse_purifier("jpeg:75")(after) - after).abs().mean()
    assert change > 1e-3
    assert again < change / 3


def test_a_purifier_is_written_as_it_is_read():
    assert parse_purifier("jpeg:75") == Purifier("jpeg", 75)
    for text in PURIFIERS:
        assert str(parse_purifier(text)) == text


@pytest.mark.parametrize("text", ["", "jpeg", "jpeg:", "jpeg:7.5", "bits:-1", "bits:four", "75", "jpeg:1000", "jpeg:²"])
def test_text_that_is_no_purifier(text):
    with pytest.raises(InputError, match="must be a kind and a number, such as jpeg:75 or bits:4"):
        parse_purifier(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blur:3", "must be one of jpeg:N, bits:N"),
        ("jpeg:0", "the quality must be from 1 to 100"),
        ("jpeg:101", "the quality must be from 1 to 100"),
        ("bits:0", "the number of bits per channel must be from 1 to 8"),
        ("bits:9", "the number of bits per channel must be from 1 to 8"),
    ],
)
def test_purifiers_that_do_not_exist(text, message):
    with pytest.raises(InputError, match=f"purify='{text}': {message}"):
        parse_purifier(text)
