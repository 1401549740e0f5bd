# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Decoding image files as an image viewer shows them: upright, and as RGB with 8 bits per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import InputError
from ..wording import printable

# If an image were more oblong, its shorter side would have no pixels left after a processor resizes it.
MAX_ASPECT_RATIO = 100
# TIFF tags. Pillow has no names for their numbers.
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281
WHITE_IS_ZERO = 0  # a value of PHOTOMETRIC

Size = tuple[int, int]


def read_image(
    source: str | Path | IO[bytes],
    where: str | None = None,
    turn: Callable[[Size, int], bool] | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read an image as RGB with 8 bits per channel.

    Values of more than 8 bits are scaled by the range of the format, so that the brightest value that it can store
    becomes 255.

    Args:
        source: A path or a file object.
        where: Name of the image for error messages. None for `source`.
        turn: Takes the stored (width, height) and the EXIF orientation, and returns whether to rotate and mirror the
            image as the orientation says. None to do so always, as viewers do.
        formats: Names of the formats that may be read, as in `PIL.Image.open`. None for all that Pillow knows.

    Returns:
        The image.

    Raises:
        InputError: The file is not an image, is damaged, has values whose range is not known, or is too oblong for a
            detector.
    """
    with opened(source, str(source) if where is None else where, formats) as image:
        orientation = orientation_of(image)
        is_deep = image.mode == "F" or image.mode.startswith("I")
        pixels = _eight_bits(image) if is_deep else image
        if orientation != 1 and (turn is None or turn(image.size, orientation)):
            pixels.getexif()[ExifTags.Base.Orientation] = orientation
            pixels = ImageOps.exif_transpose(pixels)
        return pixels.convert("RGB")


@contextmanager
def opened(source: str | Path | IO[bytes], where: str, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Open an image and read its header only. The arguments are those of `read_image`.

    Raises:
        InputError: As in `read_image`, also if the code in this context reads the pixels and they are damaged.
    """
    try:
        with Image.open(source, formats=formats) as image:
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are too oblong for a detector")
            yield image
    except Exception as error:  # the readers of Pillow raise many kinds of errors
        raise InputError(f"{where}: cannot be opened as an image ({printable(str(error), 300)}).") from None


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, from 1 (upright) to 8. Its pixels are not decoded."""
    if image.format == "TIFF":  # Pillow turns it, and gives its size as it is shown
        return 1
    # Not `image.getexif()`, which decodes a PNG to look for EXIF data after its pixels.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in range(1, 9) else 1


def shown_size(size: Size, orientation: int) -> Size:
    """Return the (width, height) of an image after it is turned as its EXIF orientation says."""
    width, height = size
    return (height, width) if orientation >= 5 else (width, height)


def is_turned(stored: Size, orientation: int, annotated: Size) -> bool | None:
    """Tell by its annotated size whether the annotations of an image belong to the turned image.

    Args:
        stored: (width, height) of the image as it is stored.
        orientation: Its EXIF orientation.
        annotated: (width, height) that its annotations give.

    Returns:
        True for the image as it is shown, False for the image as it is stored. None if the size does not tell, because
        the image is upright anyway, is square, or is turned by 180 degrees or mirrored only.
    """
    shown = shown_size(stored, orientation)
    if shown == stored or annotated not in (stored, shown):
        return None
    return annotated == shown


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits.

    Raises:
        ValueError: The format does not say which value is white.
    """
    tags = getattr(image, "tag_v2", {})
    white = 2**16 - 1  # Pillow scales the values of JPEG 2000 and PPM files to 16 bits.
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
        white = tags.get(MAX_SAMPLE_VALUE, (0,))[0] or white
    elif not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in ("PNG", "PPM")):
        kind = "floating-point numbers" if image.mode == "F" else "integers of more than 16 bits, or with a sign"
        raise ValueError(f"its pixels are {kind}, whose range is not known; convert the image to 8 or 16 bits")
    shares = np.asarray(image, dtype=np.float32) / white
    # Pillow inverts such images of 8 bits, but not of 16 bits.
    if image.format == "TIFF" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray((255 * shares).round().clip(0, 255).astype(np.uint8))
