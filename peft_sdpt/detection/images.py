# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Images from files, from folders, and from folders in which new images arrive."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError
from .decoding import opened, read_image

# The formats that Pillow can both read and write in full colour.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
SECONDS_BETWEEN_LOOKS = 0.5


def images_in(folder: Path) -> list[Path]:
    """Return the files in a folder with the suffix of an image, sorted.

    Raises:
        InputError: The folder cannot be read.
    """
    try:
        # Hidden files are skipped: files that are still being copied, or files that macOS stores beside a photo.
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}).") from None


def find_images(inputs: list[Path], skip_bad_images: bool) -> list[Path]:
    """Find all images in files and folders, each once, and check their headers.

    Args:
        inputs: Files and folders.
        skip_bad_images: Whether to skip files that are not images, instead of raising.

    Raises:
        InputError: A folder has no images, a file is not an image, or no image is left.
    """
    paths = []
    for path in inputs:
        images = images_in(path) if path.is_dir() else [path]
        if not images:
            raise InputError(f"{path}: no image in this folder.")
        paths += images
    good = []
    for path in {os.path.abspath(path): path for path in paths}.values():
        try:
            with opened(path, str(path)):
                good.append(path)
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
    if not good:
        raise InputError("inputs: none of them can be opened as an image.")
    return good


def skip_or_raise(error: InputError, skip_bad_images: bool) -> None:
    """Print an error on stderr, or raise it."""
    if not skip_bad_images:
        raise error
    tqdm.write(f"skipped: {error}", file=sys.stderr)


def read_images(paths: list[Path], skip_bad_images: bool) -> Iterator[tuple[Path, Image.Image]]:
    """Yield each path with its image in RGB.

    Raises:
        InputError: An image cannot be opened and `skip_bad_images` is False.
    """
    for path in paths:
        try:
            image = read_image(path, str(path))
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
        else:
            yield path, image


def watch(folders: list[Path]) -> Iterator[Iterator[tuple[Path, Image.Image]]]:
    """Look into folders again and again until Ctrl-C. Each look yields the new images with their paths.

    An image that is still being written cannot be opened completely. The next look tries again if the file has changed.
    """
    # Maps each file to its size and modification time when it was tried last, or to None once it was yielded.
    tried: dict[Path, tuple[int, int] | None] = {}
    interrupted = False

    def interrupt(*_) -> None:
        # The current image is finished and its results written first. A second Ctrl-C does not wait for that.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def look() -> Iterator[tuple[Path, Image.Image]]:
        for path in [path for folder in folders for path in images_in(folder)]:
            if interrupted:
                return
            try:
                # Read before the file is opened, so that anything written meanwhile counts as a change.
                stat = path.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if path in tried and tried[path] in (None, state):
                    continue
                tried[path] = state
                image = read_image(path, str(path))
            except (OSError, InputError):  # the file was removed, or is not complete yet
                continue
            tried[path] = None
            yield path, image

    handler_before = signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            yield look()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        signal.signal(signal.SIGINT, handler_before)
    for path, state in tried.items():
        if state is not None:
            print(f"skipped: {path} cannot be opened as an image.", file=sys.stderr)


def batches(images: Iterable[tuple[Path, Image.Image]], size: int) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Group consecutive images of the same size into batches of at most `size`.

    Images of different sizes would be padded, and padding changes the scores of a detector. The detections in an image
    must not depend on the other images in its batch.
    """
    batch: list[tuple[Path, Image.Image]] = []
    for path, image in images:
        if batch and (len(batch) == size or image.size != batch[0][1].size):
            yield batch
            batch = []
        batch.append((path, image))
    if batch:
        yield batch
