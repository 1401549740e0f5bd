# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures from files, folders, and folders in which new ones arrive."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..errors import InputError

# Those that Pillow both reads and writes in full colour.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
# Scaled to a host's size the shorter side must keep some pixels.
MOST_OBLONG = 100
SECONDS_BETWEEN_LOOKS = 0.5


def read_image(source: Any, where: str, size: tuple[int, int] | None = None) -> Image.Image:
    """The whole picture as RGB, turned as its EXIF says unless it is stored in `size`.

    Cameras store a turned picture as it left the sensor, and annotations may be of either.

    Args:
        source: a path or a file object.
        where: what the error names.
        size: (width, height), pixels.

    Raises:
        InputError: if it is no picture, a damaged one, or a line that no host can scale.
    """
    with opened(source, where) as picture:
        return (picture if picture.size == size else ImageOps.exif_transpose(picture)).convert("RGB")


@contextmanager
def opened(source: Any, where: str) -> Iterator[Image.Image]:
    """A picture whose header is read.

    Raises:
        InputError: as `read_image`, also when reading on in this context finds a part damaged or missing.
    """
    try:
        with Image.open(source) as picture:
            if max(picture.size) > MOST_OBLONG * min(picture.size):
                raise ValueError(f"{picture.width} x {picture.height} pixels are too oblong for a host")
            yield picture
    except Exception as error:  # Pillow's many readers raise many kinds
        raise InputError(f"{where}: not a picture that opens ({error}).") from None


def images_in(folder: Path) -> list[Path]:
    """The files of a folder that look like pictures by their suffix, sorted."""
    try:
        # Hidden ones are no photographs: files that are still being copied, or what macOS keeps beside a photograph.
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error}).") from None


def find_images(inputs: list[Path], skip_bad_images: bool) -> list[Path]:
    """All pictures of the inputs, each once; their headers are read already.

    Raises:
        InputError: a folder has none; a file is none, unless such are skipped; none is left.
    """
    paths = []
    for path in inputs:
        found = images_in(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: no picture in this folder.")
        paths += found
    kept = []
    for path in {os.path.abspath(path): path for path in paths}.values():
        try:
            with opened(path, str(path)):
                kept.append(path)
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
    if not kept:
        raise InputError("none of the inputs opens as a picture.")
    return kept


def skip_or_raise(error: InputError, skip_bad_images: bool) -> None:
    if not skip_bad_images:
        raise error
    tqdm.write(f"skipped: {error}", file=sys.stderr)


def read_images(paths: list[Path], skip_bad_images: bool) -> Iterator[tuple[Path, Image.Image]]:
    for path in paths:
        try:
            picture = read_image(path, str(path))
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
        else:
            yield path, picture


def watch(folders: list[Path]) -> Iterator[Iterator[tuple[Path, Image.Image]]]:
    """Look into folders time and again until Ctrl-C; gives, of each look, the pictures that were not given before.

    A picture that is still being written does not open in full; it is tried again once the file has changed.
    """
    # Of each file that was tried its size and time of change, None once it was given.
    tried: dict[Path, tuple[int, int] | None] = {}
    interrupted = False

    def interrupt(*_) -> None:
        # What is at work is finished and written. A second Ctrl-C does not wait for it.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def look() -> Iterator[tuple[Path, Image.Image]]:
        for path in [path for folder in folders for path in images_in(folder)]:
            if interrupted:
                return
            try:
                # Before it is opened: what is written meanwhile is a change.
                stat = path.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if path in tried and tried[path] in (None, state):
                    continue
                tried[path] = state
                picture = read_image(path, str(path))
            except (OSError, InputError):  # gone again, or not there in full
                continue
            tried[path] = None
            yield path, picture

    handler_before = signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            yield look()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        signal.signal(signal.SIGINT, handler_before)
    for path, state in tried.items():
        if state is not None:
            print(f"left out: {path} did not open as a picture.", file=sys.stderr)


def batches(pictures: Iterable[tuple[Path, Image.Image]], size: int) -> Iterator[list[tuple[Path, Image.Image]]]:
    """At most `size` pictures at a time, in order, all as large as one another.

    Unequal ones would be padded, and a host scores a padded picture differently: what is found in a picture must not
    depend on its neighbours.
    """
    batch: list[tuple[Path, Image.Image]] = []
    for path, picture in pictures:
        if batch and (len(batch) == size or picture.size != batch[0][1].size):
            yield batch
            batch = []
        batch.append((path, picture))
    if batch:
        yield batch
