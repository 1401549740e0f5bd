# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The script that detects with an ONNX file: how it reads images, and its errors. No file is exported here."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import detect_onnx
from peft_sdpt.detection import read_image

GREY = (np.arange(60 * 40, dtype=np.float32).reshape(40, 60) / (60 * 40) * 65535).astype(np.uint16)
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("grey16.png", Image.fromarray(GREY), {}),
        ("grey.png", RGB.convert("L"), {}),
        ("alpha.png", RGB.convert("RGBA"), {}),
        ("grey_alpha.png", RGB.convert("LA"), {}),
        ("palette.png", RGB.convert("P"), {}),
        ("bits.png", RGB.convert("1"), {}),
        ("cmyk.jpg", RGB.convert("CMYK"), {}),
        *((f"turned{number}.jpg", RGB, {"exif": exif(number)}) for number in (3, 6, 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_are_read_as_in_training(name, image, options, tmp_path):
    image.save(tmp_path / name, **options)
    assert np.array_equal(detect_onnx.read_image(tmp_path / name), read_image(tmp_path / name))


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["detect_onnx.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        detect_onnx.main()
    return ended.value.code


def test_a_model_that_is_none(monkeypatch, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"no model")
    for file in (tmp_path / "photo.jpg", tmp_path / "missing.onnx", tmp_path):
        message = run(monkeypatch, file, "photo.jpg")
        assert message.startswith(f"{file}: cannot be loaded as an ONNX file (") and "\n" not in message
    assert run(monkeypatch, "any.onnx", "photo.jpg", "--threshold", "7").startswith("--threshold 7.0: must be at least")


def test_images_that_cannot_be_read_do_not_end_the_others(monkeypatch, tmp_path, capsys):
    RGB.save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:2000])
    Image.fromarray(GREY).save(tmp_path / "deep.tif")
    monkeypatch.setattr(detect_onnx, "load", lambda path: (None, {}))
    monkeypatch.setattr(detect_onnx, "detect", lambda *_: [])
    files = [tmp_path / name for name in ("missing.jpg", "text.jpg", "cut.png", "deep.tif", "good.png")]
    assert run(monkeypatch, "any.onnx", *files) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'good.png'}: no objects\n"
    assert [line.partition(": cannot be read (")[0] for line in printed.err.splitlines()] == [str(f) for f in files[:4]]
