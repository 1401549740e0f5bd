# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Finding the image files of a data set, and opening them."""

from __future__ import annotations

import functools
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from ...errors import InputError
from ...wording import counted, enumerated, printable, quoted, shown_path
from ..decoding import Size, is_turned, opened, orientation_of, read_image, shown_size
from ..images import SUFFIXES, files_in

# Threads that read the headers of images. A network disk answers several requests at the same time.
THREADS = 8
# Largest number of letters of a path on Linux.
MAX_PATH = 4096
# The end of a message about a name that is not found, if it leads out of the folder of the data set.
OUTSIDE = " The name leads out of the folder of the data set; allow_outside_images=True follows it."
# Several threads may open images of the same split.
_LOCK = threading.Lock()


class ImageFinder:
    """Finds image files by the names that annotations give.

    A name is looked for in each folder. Annotation tools also write names with backslashes, with folders that the
    export does not have, and with accents in another Unicode form than the file system. So a name that does not exist
    is looked for without its first folders, and in any Unicode form and letter case.

    Args:
        folders: Folders to look in, in this order.
        root: The folder of the data set. Files outside it are not found. None allows them.
    """

    def __init__(self, folders: Iterable[Path], root: Path | None):
        self.folders = list(dict.fromkeys(folder for folder in folders if folder.is_dir()))
        self.root = root
        self._stored: dict[Path, dict[str, Path | None]] = {}
        self._stems: dict[str, Path] | None = None

    def find(self, name: str) -> Path | None:
        """Return the path of an image, or None."""
        for candidate in shortened(name):
            for folder in self.folders:
                path = folder / candidate
                if os.path.isfile(path) and not leads_out(path, self.root):
                    return path
        for candidate in shortened(name):
            for folder in self.folders:
                stored = self._by_letters(folder).get(_letters(candidate))
                if stored is not None:
                    return stored
        return None

    def find_stem(self, stem: str) -> Path | None:
        """Return an image with this stem and any suffix, directly in a folder. None if there is no such image."""
        if self._stems is None:
            files = [file for folder in reversed(self.folders) for file in folder.iterdir()]
            self._stems = {file.stem: file for file in files if file.suffix.lower() in SUFFIXES}
        return self._stems.get(stem)

    def _by_letters(self, folder: Path) -> dict[str, Path | None]:
        """Return all files in a folder by the letters of their relative path, or None if two files have the same."""
        if folder not in self._stored:
            stored: dict[str, Path | None] = {}
            for path in files_in(folder):
                letters = _letters(path.relative_to(folder).as_posix())
                stored[letters] = None if letters in stored else path
            self._stored[folder] = stored
        return self._stored[folder]


def _letters(name: str) -> str:
    """Return a name in composed Unicode and lower case."""
    return unicodedata.normalize("NFC", name).casefold()


def leads_out(path: Path, root: Path | None) -> bool:
    """Return whether a path leads out of the folder of a data set, by its name alone.

    Links are not resolved, so a link in the folder may point anywhere. The user who made the link intended this.

    Args:
        path: An absolute path.
        root: The absolute path of the folder. None for a data set that may lead anywhere.
    """
    return root is not None and not Path(os.path.normpath(path)).is_relative_to(root)


def shortened(name: str) -> list[str]:
    """Return a name, and the same with forward slashes, without its first folder, its first two folders and so on."""
    if len(name) > MAX_PATH:
        return []
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return [name, *("/".join(parts[start:]) for start in range(len(parts)))]


@dataclass
class SplitImages:
    """Opens the images of a split by index, as RGB and upright.

    It checks the size each time, because files may change during a run.

    A photo with an EXIF orientation is turned, unless its annotations belong to the photo as it is stored. The
    annotated size tells this, except for square photos, and for photos that are mirrored or turned by 180 degrees. Such
    photos are read like the other photos of the split, or else of other splits. If no photo tells, they are turned, as
    in image viewers.

    Attributes:
        source: Maps an index to a path or a file object. It raises `InputError` if the image is missing.
        where: Maps an index to the name of the image for error messages.
        annotations: Name of the annotations for error messages.
        sizes: The annotated (width, height) of each image in pixels. If it is None, the size of the image as it is
            shown is read from its header.
        undecided: Images opened so far that have an EXIF orientation while their size does not tell whether to turn
            them.
    """

    source: Callable[[int], str | Path | IO[bytes]]
    where: Callable[[int], str]
    annotations: str
    sizes: list[Size | None]
    undecided: set[int] = field(default_factory=set, init=False)
    _shown: dict[int, Size] = field(default_factory=dict, init=False)
    _votes: list[bool] | None = field(default=None, init=False)
    _turn_undecided: bool | None = field(default=None, init=False)

    def __call__(self, index: int) -> Image.Image:
        image = read_image(self.source(index), self.where(index), functools.partial(self._turns, index))
        size = self.sizes[index]
        expected, says = (self._shown.get(index), "its header") if size is None else (size, self.annotations)
        if expected is not None and image.size != expected:
            raise InputError(f"{self.where(index)}: {image.size} pixels, but {says} says {expected}.")
        return image

    def known_sizes(self) -> list[Size | None]:
        """Return the size of each image. Sizes that are not annotated are read from the headers of the images.

        Returns:
            The sizes. None for an image that does not open. Opening it raises the error.
        """
        missing = [index for index, size in enumerate(self.sizes) if size is None]
        for index, header in self._headers(missing).items():
            self._shown[index] = shown_size(*header)
        return [self._shown.get(index) if size is None else size for index, size in enumerate(self.sizes)]

    def turns_undecided(self) -> bool:
        """Tell whether photos are turned whose size does not tell it. The headers of all images are read once."""
        return self.decide([]) if self._turn_undecided is None else self._turn_undecided

    def decide(self, votes: list[bool]) -> bool:
        """Decide whether such photos are turned, by the other photos of the split, or else by those of other splits."""
        with _LOCK:
            votes = self.votes() or votes
            self._turn_undecided = 2 * sum(votes) >= len(votes)
            return self._turn_undecided

    def votes(self) -> list[bool]:
        """Return for each photo whose size tells it whether the photo is turned."""
        if self._votes is None:
            annotated = [index for index, size in enumerate(self.sizes) if size is not None]
            decisions = [
                is_turned(*header, self.sizes[index])  # type: ignore[arg-type]  # it has a size
                for index, header in self._headers(annotated).items()
            ]
            self._votes = [decision for decision in decisions if decision is not None]
        return self._votes

    def _turns(self, index: int, stored: Size, orientation: int) -> bool:
        size = self.sizes[index]
        decision = True if size is None else is_turned(stored, orientation, size)
        if decision is None:
            self.undecided.add(index)
            return self.turns_undecided()
        return decision

    def _headers(self, indices: list[int]) -> dict[int, tuple[Size, int]]:
        """Return the stored size and the EXIF orientation of those images that open."""

        def header(index: int) -> tuple[Size, int] | None:
            try:
                with opened(self.source(index), self.where(index)) as image:
                    return image.size, orientation_of(image)
            except InputError:
                return None

        with ThreadPoolExecutor(THREADS) as pool:
            headers = pool.map(header, indices)
        return {index: header for index, header in zip(indices, headers, strict=True) if header is not None}


@dataclass(frozen=True)
class ImagePaths:
    """The files of a split, as the `source` of `SplitImages`.

    Attributes:
        paths: Path of each image. None if it was not found.
        names: Name of each image in the annotations.
        folders: Folders that were searched, for the error message.
        annotations: Name of the annotation file, for the error message.
        root: The folder of the data set, which images may not be outside. None allows that.
    """

    paths: list[Path | None]
    names: list[str]
    folders: list[Path]
    annotations: str
    root: Path | None

    def __call__(self, index: int) -> Path:
        path = self.paths[index]
        if path is not None and os.path.isfile(path) and not leads_out(path, self.root):
            return path
        searched = ", ".join(map(str, self.folders)) or "no folder, because none of the usual ones exists"
        existing = [folder for folder in self.folders if folder.is_dir()]
        there = sorted(printable(file.name, 80) for each in existing for file in each.iterdir() if file.is_file())
        name = self.names[index].replace("\\", "/")
        is_outside = any(leads_out(folder / name, self.root) for folder in self.folders)
        raise InputError(
            f"{self.where(index)}: no such image, but {self.annotations} lists it; looked in {searched}, with "
            f"{enumerated(there) or 'no files'}.{OUTSIDE * is_outside}"
        )

    def where(self, index: int) -> str:
        return shown_path(self.paths[index] or self.names[index])


def split_images(
    paths: list[Path | None],
    names: list[str],
    folders: list[Path],
    sizes: list[Size | None],
    annotations: Path,
    root: Path | None,
) -> SplitImages:
    """Make the `SplitImages` of image files.

    Args:
        paths: Path of each image. None if it was not found.
        names: Name of each image in the annotations.
        folders: Folders that were searched, for error messages.
        sizes: The annotated (width, height) of each image, or None.
        annotations: The annotation file or folder.
        root: The folder of the data set, which images may not be outside. None allows that.

    Raises:
        InputError: Several entries belong to the same file.
    """
    found: dict[Path, str] = {}
    for name, path in zip(names, paths, strict=True):
        if path in found:
            raise InputError(
                f"{annotations}: the images {quoted(found[path])} and {quoted(name)} are both found at {path}; each "
                "image needs one entry, and a file of its own."
            )
        if path is not None:
            found[path] = name
    source = ImagePaths(paths, names, folders, annotations.name, root)
    return SplitImages(source, source.where, annotations.name, sizes)


def unannotated_images(folders: Iterable[Path], stems: set[str]) -> list[str]:
    """Return a line about the images in these folders that have none of these stems, so that they are not used."""
    images = {
        file.name: None
        for folder in dict.fromkeys(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and file.stem not in stems
    }
    names = enumerated(printable(name, 80) for name in images)
    return [f"{counted(len(images), 'image')} without an annotation file: {names}"] if images else []
