# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The journal of a detection: what is done so far, so that a killed run can go on.

Each process writes one line for each batch that it has finished into a file of its own. A line is complete or is not
counted. At the end, the main process joins the lines of all files in the order of the images. Nothing but the place of
each line is kept in memory. The plan of a finished run stays beside its results, so that the run is not done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ..errors import InputError, hint
from ..files import read_json, whole_file, write_problem
from ..wording import quoted, shown_path

FOLDER = "detections.unfinished"
PLAN = "plan.json"
# The plan of the finished run whose results are in the output folder. The name does not end with `.json`, because the
# folder may also be one of a data set, whose JSON files have annotations.
FINISHED = ".detections.plan"
# Setting with a digest of each adapter by name.
WEIGHTS = "weights"
LINES = ".jsonl"
# Sentence for errors of `--resume`.
START_ANEW = "Without --resume, the command starts from the beginning."


class PlannedImage(NamedTuple):
    """An image of a detection.

    Attributes:
        source: Absolute path of the image, as text.
        name: Name of the image to write.
        width, height: Size in pixels.
    """

    source: str
    name: str
    width: int
    height: int


class Journal:
    """The journal of a detection in its output folder. See the module.

    Args:
        output_dir: The output folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        self._finished = output_dir / FINISHED
        # A name of its own for each process of each run, so that nothing is written after a line that is cut off.
        self.file = self.folder / f"{secrets.token_hex(8)}{LINES}"
        # Maps the number of each finished batch to its file and to the position in it.
        self._places: dict[int, tuple[Path, int]] = {}

    def has_plan(self) -> bool:
        """Return whether there is an earlier run, finished or not."""
        return (self.folder / PLAN).is_file() or self.is_finished()

    def is_finished(self) -> bool:
        """Return whether the last run is finished."""
        return not (self.folder / PLAN).is_file() and self._finished.is_file()

    def planned_names(self) -> set[str]:
        """Return the names of the images that the last run may have written."""
        names = set[str]()
        for file in (self._finished, self.folder / PLAN):
            with contextlib.suppress(InputError, TypeError, KeyError, ValueError):
                names |= {str(name) for _, name, *_ in read_json(file)["images"]}
        return names

    def start(self, settings: Mapping[str, Any], images: list[PlannedImage]) -> None:
        """Forget an earlier run, and begin a new one.

        Args:
            settings: What the results depend on, by flag.
            images: The images, in the order of the batches.
        """
        self._remove_unfinished()
        with whole_file(self.folder / PLAN) as unfinished:
            unfinished.write_text(json.dumps({"settings": settings, "images": images}))
        self._finished.unlink(missing_ok=True)

    def resume(self, settings: Mapping[str, Any], images: list[PlannedImage]) -> None:
        """Go on with the last run, finished or not. The arguments are those of `start`.

        Raises:
            InputError: Its settings or images are others, or a file of the journal cannot be read.
        """
        with hint(START_ANEW):
            self._compare(settings, images)
            for file in sorted(self.folder.glob(f"*{LINES}")):
                self.read(file)

    def _compare(self, settings: Mapping[str, Any], images: list[PlannedImage]) -> None:
        """Raise an `InputError` if the last run has other settings or images."""
        file, kind = (self._finished, "finished") if self.is_finished() else (self.folder / PLAN, "unfinished")
        run = f"the {kind} run in {self.folder.parent}"
        plan = read_json(file)
        try:
            before, images_before = dict(plan["settings"]), [PlannedImage(*image) for image in plan["images"]]
            weights_before = dict(before.pop(WEIGHTS))
        except (TypeError, KeyError, ValueError):
            raise InputError(f"{file}: is damaged.") from None
        now = json.loads(json.dumps(settings))
        weights = now.pop(WEIGHTS)
        for name, value in now.items():
            if before.get(name) != value:
                raise InputError(f"--resume: {name} is {quoted(value)}, but was {quoted(before.get(name))} in {run}.")
        for name, digest in weights.items():
            if weights_before.get(name) != digest:
                raise InputError(f"--resume: adapter {name} has other weights than in {run}.")
        self._compare_images(images_before, images, run)

    @staticmethod
    def _compare_images(before: list[PlannedImage], now: list[PlannedImage], run: str) -> None:
        """Raise an `InputError` that names the first image that was added, is missing or has changed."""
        sources_before, sources = ({image.source for image in images} for images in (before, now))
        for image in now:
            if image.source not in sources_before:
                raise InputError(f"--resume: {shown_path(image.source)} was added; {run} did not have this image.")
        for image in before:
            if image.source not in sources:
                raise InputError(f"--resume: {shown_path(image.source)}, an image of {run}, is missing.")
        for old, new in zip(before, now, strict=False):
            path = shown_path(new.source)
            if (old.source, old.name) != (new.source, new.name):
                raise InputError(f"--resume: {path} has another place in the order of the images than in {run}.")
            if old != new:
                size, size_before = f"{new.width} x {new.height}", f"{old.width} x {old.height}"
                raise InputError(f"--resume: {path} has changed: it has {size} pixels, but had {size_before} in {run}.")

    def read(self, file: Path) -> None:
        """Find the finished batches in a file. A last line that is cut off is left out."""
        position = 0
        try:
            with open(file, "rb") as lines:
                for line in lines:
                    # After a power cut, a line may have other damage.
                    with contextlib.suppress(ValueError, TypeError, KeyError):
                        if line.endswith(b"\n"):
                            self._places.setdefault(int(json.loads(line)["batch"]), (file, position))
                    position += len(line)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}).") from None

    def add(self, batch: int, images: list[dict[str, Any]]) -> None:
        """Write that a batch is done.

        Args:
            batch: Number of the batch.
            images: What was found in each of its images.

        Raises:
            InputError: The line cannot be written.
        """
        line = json.dumps({"batch": batch, "images": images}).encode() + b"\n"
        try:
            with open(self.file, "ab") as lines:
                position = lines.tell()
                lines.write(line)
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({write_problem(error)}).") from None
        self._places[batch] = (self.file, position)

    def done(self) -> set[int]:
        """Return the numbers of the finished batches."""
        return {*self._places}

    def images(self) -> Iterator[dict[str, Any]]:
        """Yield what was found in each image, in the order of the batches."""
        with contextlib.ExitStack() as stack:
            files: dict[Path, Any] = {}
            for _, (file, position) in sorted(self._places.items()):
                if file not in files:
                    files[file] = stack.enter_context(open(file, "rb"))
                files[file].seek(position)
                yield from json.loads(files[file].readline())["images"]

    def finish(self) -> None:
        """Keep the plan only, after the results are written."""
        os.replace(self.folder / PLAN, self._finished)
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        # The plan goes first: lines without a plan are nothing to resume.
        for file in (self.folder / PLAN, *self.folder.glob(f"*{LINES}")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it does not exist, or somebody else has put a file there
            self.folder.rmdir()


def write_list(file: TextIO, entries: Iterator[dict[str, Any]]) -> None:
    """Write a JSON list, one entry at a time."""
    file.write("[")
    for number, entry in enumerate(entries):
        file.write((", " if number else "") + json.dumps(entry))
    file.write("]")
