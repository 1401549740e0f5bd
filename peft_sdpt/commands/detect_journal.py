# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The journal of a detection: what is done so far, so that a killed run can go on.

Each process writes one line for each batch that it has finished into a file of its own. A line is complete or is not
counted. At the end, the main process joins the lines of all files in the order of the images. Nothing but the place of
each line is kept in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from ..errors import InputError, hint
from ..files import read_json, whole_file, write_problem
from ..wording import quoted

FOLDER = "detections.unfinished"
PLAN = "plan.json"
LINES = ".jsonl"
# Sentence for errors of `--resume`.
START_ANEW = "Without --resume, the command starts from the beginning."


class Journal:
    """The journal of a detection in its output folder. See the module.

    Args:
        output_dir: The output folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER
        # A name of its own for each process of each run, so that nothing is written after a line that is cut off.
        self.file = self.folder / f"{secrets.token_hex(8)}{LINES}"
        # Maps the number of each finished batch to its file and to the position in it.
        self._places: dict[int, tuple[Path, int]] = {}

    def has_plan(self) -> bool:
        """Return whether there is an unfinished run."""
        return (self.folder / PLAN).is_file()

    def planned_names(self) -> set[str]:
        """Return the names of the images that an unfinished run may have written."""
        with contextlib.suppress(InputError, TypeError, KeyError):
            return {str(name) for name in read_json(self.folder / PLAN)["names"]}
        return set()

    def start(self, settings: Mapping[str, Any], names: list[str]) -> None:
        """Forget an unfinished run, and begin a new one.

        Args:
            settings: What the results depend on, by flag.
            names: Names of the images to write.
        """
        self.remove()
        with whole_file(self.folder / PLAN) as unfinished:
            unfinished.write_text(json.dumps({"settings": settings, "names": names}))

    def resume(self, settings: Mapping[str, Any]) -> None:
        """Go on with the unfinished run.

        Raises:
            InputError: Its settings are others, or a file of the journal cannot be read.
        """
        with hint(START_ANEW):
            plan = read_json(self.folder / PLAN)
            before = plan.get("settings") if isinstance(plan, dict) else None
            if not isinstance(before, dict):
                raise InputError(f"{self.folder / PLAN}: is damaged.")
            for name, value in json.loads(json.dumps(settings)).items():
                if before.get(name) != value:
                    raise InputError(
                        f"--resume: {name} is {quoted(value)}, but was {quoted(before.get(name))} in the unfinished "
                        f"run in {self.folder.parent}."
                    )
            for file in sorted(self.folder.glob(f"*{LINES}")):
                self.read(file)

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

    def remove(self) -> None:
        """Remove the journal."""
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
