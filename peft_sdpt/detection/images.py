# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Images from files, from folders, and from folders in which new images arrive."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError, hint
from ..wording import counted, enumerated, shown_path
from .decoding import Size, opened, orientation_of, read_image, shown_size

Item = TypeVar("Item")

# Phones store photos as HEIC. The package that reads them is optional, because its wheels contain code under the GPL.
try:
    from pillow_heif import register_heif_opener
except ImportError:
    READS_HEIF = False
else:
    register_heif_opener()
    READS_HEIF = True

# The formats that Pillow can both read and write in full colour.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
WRITABLE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
# The formats to read from strangers. Pillow knows more, and runs another program to read some of them.
READABLE_FORMATS = tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)
VIDEO_SUFFIXES = {".3gp", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".webm", ".wmv"}
# The suffixes of the images in a folder.
SUFFIXES = WRITABLE_SUFFIXES | (HEIF_SUFFIXES if READS_HEIF else set())
SECONDS_BETWEEN_LOOKS = 0.5


def files_in(folder: Path, without: Path | None = None) -> list[Path]:
    """Find the files in a folder and its subfolders.

    Hidden files and folders are skipped: files that are still being copied, or files that macOS stores beside a photo.
    Links to folders are followed, but no folder is searched twice.

    Args:
        folder: The folder.
        without: A subfolder that is not searched. It may not exist.

    Returns:
        The files, sorted.

    Raises:
        InputError: A folder cannot be read.
    """

    def failed(error: OSError) -> None:
        # A subfolder may be removed during the search.
        if not isinstance(error, FileNotFoundError) or error.filename == str(folder):
            raise InputError(f"{shown_path(Path(error.filename))}: cannot be read ({error.strerror}).") from None

    searched = {os.path.realpath(path) for path in (folder, without) if path}
    files = []
    for parent, subfolders, names in os.walk(folder, onerror=failed, followlinks=True):
        new = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(parent, name))
            if real not in searched and not name.startswith("."):
                searched.add(real)
                new.append(name)
        subfolders[:] = new
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def images_in(folder: Path, without: Path | None = None) -> tuple[list[Path], list[Path]]:
    """Find the files in a folder and its subfolders, as `files_in` does.

    Returns:
        The files with the suffix of an image, and the other files.

    Raises:
        InputError: A folder cannot be read.
    """
    files = files_in(folder, without)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return images, sorted(set(files) - set(images))


def as_text(path: str | Path) -> str:
    """Return a path with forward slashes, as text that can be encoded as UTF-8.

    On Linux, the name of a file can have any bytes. Bytes that are not UTF-8 become the replacement character.
    """
    text = path.as_posix() if isinstance(path, Path) else path
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def absolute_folders(inputs: Iterable[Path]) -> set[Path]:
    """Return the absolute paths of those inputs that are folders."""
    return {Path(os.path.abspath(path)) for path in inputs if path.is_dir()}


def relative_name(path: Path, folders: set[Path]) -> Path:
    """Return the path of a file below the outermost of the folders that contains it.

    Args:
        path: The file.
        folders: Absolute paths of folders.

    Returns:
        The relative path, or the name of the file if it is in none of the folders.
    """
    absolute = Path(os.path.abspath(path))
    return next((absolute.relative_to(each) for each in reversed(absolute.parents) if each in folders), Path(path.name))


def passed_over(files: list[Path], folders: set[Path]) -> str:
    """Write one line about the files in folders that are not read as images.

    Args:
        files: At least one file.
        folders: Absolute paths of the folders.
    """

    def is_a(suffixes: set[str]) -> list[str]:
        return [shown_path(relative_name(path, folders)) for path in files if path.suffix.lower() in suffixes]

    videos, photos = is_a(VIDEO_SUFFIXES), is_a(HEIF_SUFFIXES)
    others = is_a({path.suffix.lower() for path in files} - VIDEO_SUFFIXES - HEIF_SUFFIXES)
    parts = []
    if others:
        kind = counted(len(others), "file that is not an image", "files that are not images")
        parts.append(f"{kind}: {enumerated(others)}")
    if videos:
        kind = counted(len(videos), "video")
        parts.append(f"{kind}, whose frames must be extracted first, for instance with ffmpeg: {enumerated(videos)}")
    if photos:
        kind = counted(len(photos), "HEIC photo, which needs", "HEIC photos, which need")
        parts.append(f"{kind} pip install pillow-heif: {enumerated(photos)}")
    return "passed over " + "; ".join(parts)


def has_several_frames(image: Image.Image) -> bool:
    """Return whether an open image is an animation or has several pages.

    The further pictures in some JPEG files of phones are previews or depth maps, and those in a PSD file are layers.
    """
    return image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False)


def find_images(inputs: list[Path], skip_bad_images: bool, without: Path | None = None) -> dict[Path, Size]:
    """Find all images in files and folders, each once, and check their headers.

    Notes about files that are not read, and about images of which only the first frame is read, go to stderr.

    Args:
        inputs: Files and folders. Folders are searched with their subfolders.
        skip_bad_images: Whether to skip files that are not images, instead of raising.
        without: A subfolder that is not searched.

    Returns:
        The (width, height) of each image as it is shown. The order is that of the inputs.

    Raises:
        InputError: A folder has no images, a file is not an image, or no image is left.
    """
    folders = absolute_folders(inputs)
    paths, others = [], []
    for path in inputs:
        images, not_images = images_in(path, without) if path.is_dir() else ([path], [])
        if not images:
            note = f" ({passed_over(not_images, folders)})" if not_images else ""
            raise InputError(f"{shown_path(path)}: no image in this folder{note}.")
        paths += images
        others += not_images
    if others:
        note_on_stderr(passed_over(once(others), folders))
    good: dict[Path, Size] = {}
    animated = []
    for path in once(paths):
        try:
            with needs_heif(path), opened(path, shown_path(path)) as image:
                if has_several_frames(image):
                    animated.append(shown_path(relative_name(path, folders)))
                size = shown_size(image.size, orientation_of(image))
            good[path] = size
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
    if not good:
        raise InputError("inputs: none of them can be opened as an image.")
    if animated:
        files = counted(len(animated), "file")
        note_on_stderr(f"only the first frame or page of {files} is read: {enumerated(animated)}")
    return good


def once(paths: list[Path]) -> list[Path]:
    """Return each file once, though several inputs may contain it."""
    return [*{os.path.abspath(path): path for path in paths}.values()]


def needs_heif(path: Path) -> AbstractContextManager:
    """Add the package that reads HEIC photos to the message of an error."""
    is_missing = not READS_HEIF and path.suffix.lower() in HEIF_SUFFIXES
    return hint("HEIC photos need pip install pillow-heif.") if is_missing else nullcontext()


def note_on_stderr(text: str) -> None:
    """Print a line on stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def skip_or_raise(error: InputError, skip_bad_images: bool) -> None:
    """Print an error on stderr, or raise it."""
    if not skip_bad_images:
        raise error
    note_on_stderr(f"skipped: {error}")


def read_images(paths: list[Path], skip_bad_images: bool) -> Iterator[tuple[Path, Image.Image]]:
    """Yield each path with its image in RGB.

    Raises:
        InputError: An image cannot be opened and `skip_bad_images` is False.
    """
    for path in paths:
        try:
            image = read_image(path, shown_path(path))
        except InputError as error:
            skip_or_raise(error, skip_bad_images)
        else:
            yield path, image


def watch(folders: list[Path], without: Path | None = None) -> Iterator[Iterator[tuple[Path, Image.Image]]]:
    """Look into folders and their subfolders until Ctrl-C. Each look yields the new images with their paths.

    An image that is still being written cannot be opened completely. The next look tries again if the file has changed.

    Args:
        folders: The folders.
        without: A subfolder that is not searched.
    """
    # Maps each file to its size and modification time when it was tried last, or to None once it was yielded.
    tried: dict[Path, tuple[int, int] | None] = {}
    # Files that were passed over, and those of them that a line was printed about.
    others: set[Path] = set()
    noted: set[Path] = set()
    animated_noted = False
    interrupted = False

    def interrupt(*_) -> None:
        # The current image is finished and its results written first. A second Ctrl-C does not wait for that.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note_others() -> None:
        if others - noted:
            note_on_stderr(passed_over(sorted(others - noted), absolute_folders(folders)))
            noted.update(others)

    def look() -> Iterator[tuple[Path, Image.Image]]:
        nonlocal others, animated_noted
        found = [images_in(folder, without) for folder in folders]
        others = {path for _, not_images in found for path in not_images}
        for path in once([path for images, _ in found for path in images]):
            if interrupted:
                return
            try:
                # Read before the file is opened, so that anything written meanwhile counts as a change.
                stat = path.stat()
                state = (stat.st_size, stat.st_mtime_ns)
                if path in tried and tried[path] in (None, state):
                    continue
                tried[path] = state
                image = read_image(path, shown_path(path))
                with opened(path, shown_path(path)) as header:
                    animated = has_several_frames(header)
            except (OSError, InputError):  # the file was removed, or is not complete yet
                continue
            tried[path] = None
            if animated and not animated_noted:
                animated_noted = True
                note_on_stderr(f"only the first frame or page of files such as {shown_path(path)} is read")
            yield path, image

    handler_before = signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            yield look()
            # The files that come later are named at the end. A copied photo may have another suffix for some time.
            if not noted:
                note_others()
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        signal.signal(signal.SIGINT, handler_before)
    note_others()
    for path, state in tried.items():
        if state is not None:
            print(f"skipped: {shown_path(path)} cannot be opened as an image.", file=sys.stderr)


def batches(
    items: Iterable[tuple[Path, Item]], batch_size: int, size_of: Callable[[Item], Size]
) -> Iterator[list[tuple[Path, Item]]]:
    """Group consecutive images of the same size into batches.

    Images of different sizes would be padded, and padding changes the scores of a detector. The detections in an image
    must not depend on the other images in its batch.

    Args:
        items: The path of each image, and the image or something else that tells its size.
        batch_size: Maximum number of images in a batch.
        size_of: Returns the (width, height) of an item.
    """
    batch: list[tuple[Path, Item]] = []
    for path, item in items:
        if batch and (len(batch) == batch_size or size_of(item) != size_of(batch[0][1])):
            yield batch
            batch = []
        batch.append((path, item))
    if batch:
        yield batch
