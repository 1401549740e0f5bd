# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The common corruptions of ImageNet-C (arXiv 1903.12261), as arXiv 1907.07484 uses them to test detectors.

The parameters are those of the published code. Its package `imagecorruptions` can no longer be imported. The fork
`imagecorruptions-imaug` can, but it needs a graphical system (libGL), compiles code at run time, and two of its
corruptions ignore the seed. The tests compare this module with it where it is installed. "frost" is left out, because
it needs photos of frost.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage, signal

from ..errors import InputError

SEVERITIES = (1, 2, 3, 4, 5)
# Shares of red, green and blue in grey (ITU-R 601).
GREY = (0.299, 0.587, 0.114)

# Takes an image of shape (H, W, 3) with values in [0, 1], a severity from 0 to 4, and a random generator. Returns the
# corrupted image, whose values may lie outside [0, 1].
_Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _gaussian_noise(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    return x + random.normal(size=x.shape, scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity])


def _shot_noise(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[severity]
    return random.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    is_hit = random.random(x.shape) <= (0.03, 0.06, 0.09, 0.17, 0.27)[severity]
    return np.where(is_hit, random.random(x.shape) <= 0.5, x)


def _defocus_blur(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    radius, alias = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity]
    reach = max(8, radius)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(float)
    disk /= disk.sum()
    # The edge of the disk is smoothed with a few samples of a Gaussian function.
    taps = np.exp(-(np.arange(-1 - (radius > 8), 2 + (radius > 8)) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return signal.fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1))


def _glass_blur(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity]
    x = np.floor(_smooth(x, sigma) * 255) / 255
    height, width, _ = x.shape
    # The published code goes through the pixels from the last to the first. It means to swap each one with a random
    # neighbour, but its assignment of views copies the neighbour. The pixels of ImageNet-C were made this way.
    rows, columns = (np.arange(size - reach, reach, -1) for size in (height, width))
    number = np.arange(height * width).reshape(height, width)
    for _ in range(rounds if len(rows) and len(columns) else 0):
        step = random.integers(-reach, reach, size=(len(rows), len(columns), 2))
        neighbour = number.copy()
        place = np.ix_(rows, columns)
        neighbour[place] = number[place] + step[..., 1] * width + step[..., 0]
        # A neighbour that comes later in the image was already replaced by its own neighbour, and so on.
        is_replaced = np.zeros((height, width), dtype=bool)
        is_replaced[place] = True
        goes_on = is_replaced.ravel()[neighbour] & (neighbour > number)
        source, neighbour, goes_on = neighbour.ravel().copy(), neighbour.ravel(), goes_on.ravel()
        is_open = goes_on.copy()
        while is_open.any():
            reached = source[is_open]
            source[is_open], is_open[is_open] = neighbour[reached], goes_on[reached]
        x = x.reshape(-1, 3)[source].reshape(x.shape)
    return _smooth(x, sigma)


def _motion_blur(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity]
    return _moved(x, radius, sigma, random.uniform(-45, 45))


def _zoom_blur(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity]
    factors = np.arange(1, stop, step)
    height, width, _ = x.shape
    return (x + sum(_enlarged(x, factor)[:height, :width] for factor in factors)) / (len(factors) + 1)


def _snow(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity]
    flakes = _enlarged(random.normal(size=(*x.shape[:2], 1), loc=mean, scale=spread), zoom)
    flakes = np.where(flakes < least, 0, flakes).clip(0, 1)
    flakes = _moved(flakes, int(radius), sigma, random.uniform(-135, -45))[: x.shape[0], : x.shape[1]]
    flakes = np.round(flakes * 255) / 255
    grey = (x @ GREY)[..., None]
    return keep * x + (1 - keep) * np.maximum(x, 1.5 * grey + 0.5) + flakes + np.rot90(flakes, 2)


def _fog(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    strength, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity]
    height, width, _ = x.shape
    fog = _plasma(2 ** (max(height, width) - 1).bit_length(), decay, random)[:height, :width, None]
    return (x + strength * fog) * x.max() / (x.max() + strength)


def _brightness(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    # The value of HSV grows. Hue and saturation stay.
    value = x.max(axis=-1, keepdims=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity]).clip(max=1)
    return np.divide(x, value, out=np.ones_like(x), where=value > 0) * brighter


def _contrast(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1))
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity] + mean


def _elastic_transform(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    strength = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[severity]
    height, width, _ = x.shape
    sigma, most = (0.01 * height, 0.01 * width), 0.005 * height
    dx, dy = (
        ndimage.gaussian_filter(random.uniform(-most, most, (height, width)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    rows, columns = np.indices((height, width))
    places = [rows + strength * dy, columns + strength * dx]
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)], axis=-1)


def _pixelate(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity]
    height, width, _ = x.shape
    small = _to_image(x).resize((max(1, int(width * share)), max(1, int(height * share))), Image.Resampling.BOX)
    return _to_array(small.resize((width, height), Image.Resampling.NEAREST))


def _jpeg_compression(x: np.ndarray, severity: int, random: np.random.Generator) -> np.ndarray:
    return _to_array(compress(_to_image(x), (25, 18, 15, 10, 7)[severity]))


CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def corrupt(image: Image.Image, name: str, severity: int, seed: int | Sequence[int] = 0) -> Image.Image:
    """Corrupt an image. The boxes of its objects stay where they are, as in arXiv 1907.07484.

    Args:
        image: The image, RGB, of any size.
        name: Name of the corruption, a key of `CORRUPTIONS`.
        severity: From 1, the weakest, to 5.
        seed: Seed of what is random, one or several numbers of at least 0. The result depends on the arguments alone.

    Returns:
        A new image of the same size.

    Raises:
        InputError: The corruption or the severity is unknown, or the image is not RGB.
    """
    check_corruption(name, severity)
    if image.mode != "RGB":
        raise InputError(f"image: must be RGB to be corrupted, got {image.mode}.")
    return _to_image(CORRUPTIONS[name](_to_array(image), severity - 1, np.random.default_rng(seed)))


def check_corruption(name: str, severity: int) -> None:
    """Raise an `InputError` for a corruption or a severity that does not exist."""
    if name not in CORRUPTIONS:
        raise InputError(f"corruptions={name!r}: must be one of {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise InputError(f"severities={severity}: must be from {SEVERITIES[0]} to {SEVERITIES[-1]}.")


def mean_precision_under_corruption(
    table: Mapping[str, Mapping[int, float]], clean_precision: float
) -> dict[str, float]:
    """Compute the two numbers of arXiv 1907.07484 from the AP under each corruption.

    Args:
        table: Maps the name of each corruption to the AP at each severity. The paper uses all five severities.
        clean_precision: AP on the images themselves.

    Returns:
        `mPC`, the mean over the corruptions of the mean over the severities, and `rPC`, its share of the clean AP. The
        share is NaN if the clean AP is 0.

    Raises:
        InputError: The table is empty.
    """
    if not table or not all(table.values()):
        raise InputError("table: must have a corruption, and a severity for each corruption.")
    mpc = float(np.mean([np.mean([*precisions.values()]) for precisions in table.values()]))
    return {"mPC": mpc, "rPC": mpc / clean_precision if clean_precision else float("nan")}


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Write an image as JPEG and read it.

    Args:
        image: The image, RGB.
        quality: Quality of Pillow, from 1 to 100.

    Returns:
        The image that was read.
    """
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64) / 255


def _to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(x.clip(0, 1) * 255).astype(np.uint8))


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Blur an image of shape (H, W, 3), but not its channels."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _moved(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """Blur an image of shape (H, W, C) in one direction, by an angle in degrees."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width, _ = x.shape
    rows, columns = np.arange(height), np.arange(width)
    blurred = np.zeros_like(x)
    for distance, weight in enumerate(weights):
        dy, dx = (-int(np.ceil(distance * part(np.deg2rad(angle)) - 0.5)) for part in (np.sin, np.cos))
        # Beyond the border of the image, the published code stops too.
        if abs(dy) >= height or abs(dx) >= width:
            break
        blurred += weight * x[(rows - dy).clip(0, height - 1)][:, (columns - dx).clip(0, width - 1)]
    return blurred


def _enlarged(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarge the centre of an image of shape (H, W, C). The result has a few more rows and columns than the image."""
    for axis in (0, 1):
        size = x.shape[axis]
        cut = int(np.ceil(size / factor))
        # As `scipy.ndimage.zoom` with linear interpolation, but quickly.
        places = np.linspace(0, cut - 1, max(round(cut * factor), size)) + (size - cut) // 2
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (places - low).reshape(-1, *[1] * (x.ndim - 1 - axis))
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x


def _plasma(size: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """Make a cloud by the diamond-square algorithm.

    Args:
        size: Number of rows and columns, a power of two.
        decay: By what the random part is divided when the step is halved.
        random: Random generator.

    Returns:
        Shape (size, size), from 0 to 1.
    """
    cloud = np.zeros((size, size))
    step, spread = size, 100.0

    def mean(total: np.ndarray) -> np.ndarray:
        return total / 4 + spread * random.uniform(-spread, spread, total.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        total = corners + np.roll(corners, -1, axis=0)
        cloud[half::step, half::step] = mean(total + np.roll(total, -1, axis=1))
        centres = cloud[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        cloud[::step, half::step] = mean(above)
        beside = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        cloud[half::step, ::step] = mean(beside)
        step, spread = half, spread / decay
    cloud -= cloud.min()
    return cloud / max(cloud.max(), np.finfo(float).tiny)
