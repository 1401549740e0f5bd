# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Images with any number of bits are read as a viewer shows them: upright, RGB and 8 bits."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from peft_sdpt.detection.decoding import is_turned, read_image
from peft_sdpt.errors import InputError

# A ramp of grey values, from black to white.
RAMP = np.linspace(0, 1, 48).reshape(6, 8)
EIGHT_BITS = (255 * RAMP).round().astype(int)
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def grey(values: np.ndarray, dtype) -> Image.Image:
    return Image.fromarray(values.astype(dtype))


def channels_of(file: io.BytesIO) -> np.ndarray:
    image = read_image(file, "ramp")
    assert image.mode == "RGB"
    values = np.asarray(image).astype(int)
    assert (values == values[..., :1]).all()
    return values[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_sixteen_bits(kind):
    deep = grey((65535 * RAMP).round(), np.uint16)
    assert abs(channels_of(encoded(deep, kind)) - EIGHT_BITS).max() <= 1
    # As bright as the same image in 8 bits.
    assert abs(channels_of(encoded(deep, kind)) - channels_of(encoded(grey(EIGHT_BITS, np.uint8), kind))).max() <= 1


def test_a_tiff_says_its_range():
    """Microscopes store 12 bits in 16. Without the tag, such images look like dark images."""
    values = grey((4095 * RAMP).round(), np.uint16)
    assert abs(channels_of(encoded(values, "TIFF", tiffinfo={MAX_SAMPLE_VALUE: 4095})) - EIGHT_BITS).max() <= 1
    assert channels_of(encoded(values, "TIFF")).max() == round(255 * 4095 / 65535)


def test_a_tiff_of_twelve_bits():
    """Pillow reads such files but does not write them."""
    values = (4095 * RAMP).round().astype(int).ravel().tolist()
    packed = bytearray()
    for one, two in zip(values[::2], values[1::2], strict=True):
        packed += bytes([one >> 4, (one & 15) << 4 | two >> 8, two & 255])
    entries = [(256, 3, 8), (257, 3, 6), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 6)]
    entries.append((279, 4, len(packed)))
    directory = len(entries).to_bytes(2, "little")
    for tag, kind, value in sorted(entries):
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        directory += value.to_bytes(4, "little")
    file = b"II*\0" + (8 + len(packed)).to_bytes(4, "little") + bytes(packed) + directory + bytes(4)
    assert abs(channels_of(io.BytesIO(file)) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_zero_is_white(dtype):
    largest = np.iinfo(dtype).max
    inverted = grey((largest * (1 - RAMP)).round(), dtype)
    file = encoded(inverted, "TIFF")
    # Pillow writes the tag only together with its own conversion, so it is changed in the file.
    content = bytearray(file.getvalue())
    entry = PHOTOMETRIC.to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    content[content.index(entry) + 8] = 0
    assert abs(channels_of(io.BytesIO(bytes(content))) - EIGHT_BITS).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "what"), [(np.float32, "floating-point numbers"), (np.int32, "integers of more than 16 bits")]
)
def test_a_range_that_is_not_known_is_refused(dtype, what):
    with pytest.raises(InputError, match=rf"^x\.tif: cannot be opened as an image \(its pixels are {what}.*8 or 16"):
        read_image(encoded(grey(1000 * RAMP, dtype), "TIFF"), "x.tif")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_like_others(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    deep = channels_of(encoded(grey((65535 * RAMP).round(), np.uint16), kind, exif=exif))
    plain = channels_of(encoded(grey(EIGHT_BITS, np.uint8), kind, exif=exif))
    assert deep.shape == ((8, 6) if orientation >= 5 else (6, 8))
    assert abs(deep - plain).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_as_pillow_converts_them(mode):
    image = grey(EIGHT_BITS, np.uint8).convert(mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    # Pillow 12 cannot read an uncompressed file in YCbCr that it wrote.
    file = encoded(image, "TIFF", compression="tiff_adobe_deflate")
    assert abs(np.asarray(read_image(file, "x")).astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("stored", "orientation", "annotated", "expected"),
    [
        ((64, 48), 6, (48, 64), True),
        ((64, 48), 6, (64, 48), False),
        ((64, 48), 3, (64, 48), None),
        ((64, 48), 1, (64, 48), None),
        ((64, 64), 8, (64, 64), None),
        ((64, 48), 6, (10, 10), None),
    ],
)
def test_what_a_size_tells(stored, orientation, annotated, expected):
    assert is_turned(stored, orientation, annotated) is expected


def test_an_orientation_that_does_not_exist():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 9
    assert (channels_of(encoded(grey(EIGHT_BITS, np.uint8), "PNG", exif=exif)) == EIGHT_BITS).all()
