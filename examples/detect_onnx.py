# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detect objects with an ONNX file that `sdpt-export` wrote.

    python examples/detect_onnx.py detector.onnx photo.jpg

The script needs only NumPy, Pillow and ONNX Runtime. Copy it into a program that has no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_image(file: str) -> Image.Image:
    """Read an image upright, as RGB with 8 bits per channel."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow would cut values of more than 8 bits off at 255.
        if Image.open(file).format != "PNG":
            raise ValueError("has more than 8 bits per channel; convert it to 8 bits")
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 65535 * 255).round().astype(np.uint8))
    return image.convert("RGB")


def load(path: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Load an ONNX file and its metadata."""
    try:
        session = onnxruntime.InferenceSession(path)
    except Exception as error:  # ONNX Runtime has many kinds of errors
        raise SystemExit(f"{path}: cannot be loaded as an ONNX file ({str(error).splitlines()[0]})") from None
    metadata = session.get_modelmeta().custom_metadata_map
    return session, {key: json.loads(value) for key, value in metadata.items()}


def new_size(width: int, height: int, edges: dict | None) -> tuple[int, int]:
    """Return the width and height of a resized image, rounded as transformers does."""
    if edges is None:
        return width, height
    if "height" in edges:
        return edges["width"], edges["height"]
    if "max_height" in edges:
        ratio = min(edges["max_height"] / height, edges["max_width"] / width)
        return int(width * ratio), int(height * ratio)
    short, long = min(width, height), max(width, height)
    edge = exact = edges["shortest_edge"]
    if long / short * edge > edges["longest_edge"]:
        exact = edges["longest_edge"] * short / long
        edge = round(exact)
    other = long if edge == short else int(exact * long / short)
    return (edge, other) if width < height else (other, edge)


def prepare(image: Image.Image, metadata: dict) -> dict[str, np.ndarray]:
    """Make the inputs of the detector from an RGB image."""
    edges = metadata["image_size"]
    resized = image.resize(new_size(*image.size, edges), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float32) * np.float32(metadata["rescale_factor"])
    pixels = (pixels - np.float32(metadata["image_mean"])) / np.float32(metadata["image_std"])
    mask = np.ones(pixels.shape[:2], dtype=np.int64)
    if "max_height" in (edges or {}):  # a file with a fixed size
        missing = [(0, edges["max_height"] - pixels.shape[0]), (0, edges["max_width"] - pixels.shape[1])]
        pixels, mask = np.pad(pixels, [*missing, (0, 0)]), np.pad(mask, missing)
    return {"pixel_values": pixels.transpose(2, 0, 1)[None], "pixel_mask": mask[None]}


def detect(
    session: onnxruntime.InferenceSession, metadata: dict, image: Image.Image, threshold: float | None = None
) -> list[dict]:
    """Return the detections in an RGB image, the best first, with boxes (left, top, right, bottom) in pixels."""
    scores, boxes = session.run(["scores", "boxes"], prepare(image, metadata))
    queries, classes = np.nonzero(scores[0] >= (metadata["threshold"] if threshold is None else threshold))
    found = [
        {
            "name": metadata["class_names"][label],
            "score": float(scores[0, query, label]),
            "box": (boxes[0, query] * ([image.width, image.height] * 2)).tolist(),
        }
        for query, label in zip(queries, classes, strict=True)
    ]
    return sorted(found, key=lambda detection: -detection["score"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="The ONNX file.")
    parser.add_argument("images", nargs="+", help="Images.")
    parser.add_argument("--threshold", type=float, help="Lowest score of a detection. Default: that of the file.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threshold is not None and not 0 <= args.threshold < 1:
        raise SystemExit(f"--threshold {args.threshold}: must be at least 0 and below 1")
    session, metadata = load(args.model)
    failed = False
    for file in args.images:
        try:
            image = read_image(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{file}: cannot be read ({error})", file=sys.stderr)
            failed = True
            continue
        found = detect(session, metadata, image, args.threshold)
        for detection in found:
            left, top, right, bottom = (round(edge) for edge in detection["box"])
            print(f"{file}: {detection['name']} {detection['score']:.2f} ({left}, {top}, {right}, {bottom})")
        if not found:
            print(f"{file}: no objects")
    sys.exit(failed)


if __name__ == "__main__":
    main()
