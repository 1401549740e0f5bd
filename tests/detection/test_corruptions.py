# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The corruptions of ImageNet-C, against the published code, and mPC by hand."""

import math

import numpy as np
import pytest
from PIL import Image

from peft_sdpt.detection import corrupt, mean_precision_under_corruption
from peft_sdpt.detection.corruptions import CORRUPTIONS, SEVERITIES
from peft_sdpt.errors import InputError

SIZE = (120, 96)
# The mean of the pixels of `picture()` after each severity, and their mean distance to it, by imagecorruptions-imaug
# 1.1.5. What is random is the mean over 64 seeds.
PUBLISHED = {
    "gaussian_noise": ((128.3, 15.9), (128.4, 23.4), (128.4, 33.9), (128.3, 46.3), (128.2, 61.4)),
    "shot_noise": ((127.9, 17.4), (126.9, 26.3), (125.0, 36.7), (120.4, 53.6), (115.2, 66.5)),
    "impulse_noise": ((128.7, 3.8), (128.7, 7.6), (128.6, 11.5), (128.5, 21.7), (128.4, 34.4)),
    "defocus_blur": ((128.2, 2.2), (128.2, 3.6), (128.2, 7.6), (129.9, 12.0), (129.6, 17.7)),
    "glass_blur": ((128.3, 8.2), (128.1, 6.7), (129.0, 16.8), (128.7, 14.1), (128.8, 16.4)),
    "motion_blur": ((127.7, 11.1), (127.3, 18.3), (126.8, 26.7), (126.2, 34.1), (125.9, 38.0)),
    "zoom_blur": ((128.1, 11.5), (127.9, 15.1), (127.5, 18.4), (127.3, 21.6), (127.1, 25.1)),
    "snow": ((171.6, 42.9), (197.8, 69.1), (197.0, 68.3), (210.3, 81.5), (225.3, 96.5)),
    "fog": ((127.4, 38.2), (127.3, 42.4), (126.8, 46.4), (127.4, 46.9), (127.9, 49.3)),
    "brightness": ((145.2, 16.5), (159.2, 30.5), (168.4, 39.7), (174.0, 45.2), (176.8, 48.0)),
    "contrast": ((128.2, 32.9), (128.2, 38.3), (128.3, 43.8), (128.3, 49.3), (128.2, 52.0)),
    "elastic_transform": ((128.3, 6.7), (128.3, 8.7), (128.3, 11.3), (128.3, 13.3), (128.3, 15.8)),
    "pixelate": ((129.1, 3.6), (129.2, 4.2), (128.9, 5.7), (128.9, 7.3), (129.0, 8.6)),
    "jpeg_compression": ((128.9, 5.1), (128.4, 6.3), (128.8, 7.1), (128.8, 9.5), (129.5, 12.6)),
}
# Those that draw no random numbers.
FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pixels_are_those_of_the_published_code(name):
    image = picture()
    for severity, (mean, distance) in zip(SEVERITIES, PUBLISHED[name], strict=True):
        found = [pixels(corrupt(image, name, severity, seed)) for seed in range(2 if name in FIXED else 12)]
        means = [one.mean() for one in found]
        distances = [np.abs(one - pixels(image)).mean() for one in found]
        for values, wanted in ((means, mean), (distances, distance)):
            # The published code rounds down. What is random differs by a few standard errors.
            tolerance = 0.6 + 4 * np.std(values) / np.sqrt(len(values))
            assert np.mean(values) == pytest.approx(wanted, abs=tolerance)


class Random:
    """The functions of `numpy.random` that the published code calls, with numbers of a generator."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def normal(self, size=None, loc=0, scale=1):
        return self.generator.normal(loc, scale, size)

    def poisson(self, lam):
        return self.generator.poisson(lam)

    def uniform(self, low, high, size=None):
        return self.generator.uniform(low, high, size)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [SIZE, (61, 200)])
def test_with_the_random_numbers_of_the_published_code(name, size, monkeypatch):
    """Equal but for rounding. Needs `pip install imagecorruptions-imaug`."""
    published = pytest.importorskip("imagecorruptions.corruptions", exc_type=ImportError)
    image = picture(size)
    for severity in SEVERITIES:
        random = Random(7)
        numpy = type("Numpy", (), {"__getattr__": lambda self, name: getattr(np, name), "random": random})()
        monkeypatch.setattr(published, "np", numpy)

        def shuffle(height, width, x, parameters, seed, random=random):
            _, reach, rounds = parameters
            rows, columns = (range(size - reach, reach, -1) for size in (height, width))
            for _ in range(rounds):
                steps = random.generator.integers(-reach, reach, size=(len(rows), len(columns), 2))
                for row, of_row in zip(rows, steps, strict=True):
                    for column, (dx, dy) in zip(columns, of_row, strict=True):
                        x[row, column] = x[row + dy, column + dx]
            return x

        monkeypatch.setattr(published, "_shuffle_pixels_njit_glass_blur", shuffle)
        seeds = {"impulse_noise": {"seed": random.generator}, "glass_blur": {"seed": 0}}
        wanted = np.uint8(getattr(published, name)(image, severity, **seeds.get(name, {})))
        found = pixels(corrupt(image, name, severity, 7))
        assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (3, 200), (64, 33)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size_stays_as_it_is(name, size):
    for severity in (1, 5):
        found = corrupt(picture(size), name, severity)
        assert (found.size, found.mode) == (size, "RGB")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_alone_decides(name):
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first, again, other = (pixels(corrupt(picture(), name, 3, seed)) for seed in ((5, 1), (5, 1), (5, 2)))
    assert (first == again).all()
    assert (first == other).all() == (name in FIXED)
    assert (np.random.get_state()[1] == state).all()


def test_black_and_white_stay_in_range():
    for colour in ("black", "white"):
        for name in CORRUPTIONS:
            assert np.isfinite(pixels(corrupt(Image.new("RGB", (40, 40), colour), name, 5))).all()
    assert pixels(corrupt(Image.new("RGB", (4, 4)), "brightness", 5)) == pytest.approx(128)


def test_wrong_corruptions():
    with pytest.raises(InputError, match="corruptions='frost': must be one of gaussian_noise, shot_noise"):
        corrupt(picture(), "frost", 1)
    for severity in (0, 6, 1.5):
        with pytest.raises(InputError, match=f"severities={severity}: must be from 1 to 5"):
            corrupt(picture(), "snow", severity)
    with pytest.raises(InputError, match="must be RGB to be corrupted, got L"):
        corrupt(picture().convert("L"), "snow", 1)


def test_mean_precision_by_hand():
    table = {"snow": {1: 0.4, 5: 0.2}, "fog": {1: 0.3, 5: 0.1}}
    found = mean_precision_under_corruption(table, 0.5)
    assert found == {"mPC": pytest.approx(0.25), "rPC": pytest.approx(0.5)}
    # The mean over severities comes first.
    found = mean_precision_under_corruption({"snow": {1: 0.4, 3: 0.3, 5: 0.2}, "fog": {1: 0.1}}, 0.4)
    assert found == {"mPC": pytest.approx(0.2), "rPC": pytest.approx(0.5)}
    assert math.isnan(mean_precision_under_corruption(table, 0.0)["rPC"])
    for empty in ({}, {"snow": {}}):
        with pytest.raises(InputError, match="table: must have a corruption"):
            mean_precision_under_corruption(empty, 0.5)
