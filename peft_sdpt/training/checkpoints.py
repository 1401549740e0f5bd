# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Saving a run: checkpoints to resume from, and adapters to use, each written whole or not at all.

A folder or a file gets its name only once all of it is on the disk, so a run can be killed at any instant.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import load_peft_weights, set_peft_model_state_dict

from ..errors import InputError
from ..files import UNFINISHED, WRITE_ERRORS, publish_folder, whole_files

RUN_FILE = "run.json"


@dataclass
class Progress:
    """How far a run has come; a part of its checkpoints.

    Attributes:
        step: optimizer steps taken.
        seconds: time spent in training steps.
        before: metrics and shown detections of the bare host.
        validated: step of the last validation.
        best: metrics on the validation split of the best adapter so far, and its `step`.
    """

    step: int = 0
    seconds: float = 0.0
    before: dict = field(default_factory=dict)
    validated: int = 0
    best: dict = field(default_factory=dict)

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Checkpoints:
    """The folders `step_N` of a run, as `Accelerator.save_state` writes them, with the adapter in place of the model.

    Args:
        accelerator: with the model prepared, and everything that a checkpoint holds prepared or registered.
        folder: where the folders `step_N` are.
        write_adapter: writes the adapter, and what belongs to it, into a folder.
        run: what makes the run the run it is; one that differs in any of it cannot be resumed from these.
        total_limit: how many to keep, the newest; None keeps all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        write_adapter: Callable[[Path], None],
        run: dict,
        total_limit: int | None = None,
    ):
        self.accelerator, self.folder, self.write_adapter = accelerator, folder, write_adapter
        self.run, self.total_limit = run, total_limit
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def _save_adapter(self, models: list, weights: list, folder: str) -> None:
        # Without the host's weights: they are frozen, and may be thousand times larger.
        weights.clear()
        if self.accelerator.is_main_process:
            self.write_adapter(Path(folder))

    def _load_adapter(self, models: list, folder: str) -> None:
        model = self.accelerator.unwrap_model(models.pop())
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))

    def save(self, step: int) -> None:
        """Write `step_<step>`, unless this run has done so already.

        Raises:
            InputError: in every process, if it cannot be written in one; the earlier checkpoints are as they were.
        """
        final = self.folder / f"step_{step}"
        if final.is_dir():
            return
        unfinished = final.with_name(final.name + UNFINISHED)
        problem = []
        try:
            self.accelerator.save_state(str(unfinished))
        except WRITE_ERRORS as error:
            problem = [str(error)]
        problem = gather_object(problem)
        if not problem and self.accelerator.is_main_process:
            try:
                (unfinished / RUN_FILE).write_text(json.dumps(self.run, indent=2) + "\n")
                publish_folder(unfinished, final)
                self._remove_old()
            except OSError as error:
                problem = [str(error)]
        problem = gather_object(problem)
        if problem:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {step} cannot be written ({problem[0]}); "
                f"the last complete one is {latest(self.folder) or 'none'}."
            )

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: if it is no complete checkpoint, one of another run, or cannot be read; or where this run
                would write are checkpoints that are not before it.
        """
        where = f"checkpoint={str(checkpoint)!r}"
        try:
            run = json.loads((checkpoint / RUN_FILE).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: no complete checkpoint ({error}).") from None
        newest = latest(self.folder)
        if newest and newest.resolve() != checkpoint.resolve():
            raise InputError(
                f"{where}: {self.folder} has {newest.name}, which what follows would mix with; remove the checkpoints "
                "after it, or choose another output folder."
            )
        for name, value in self.run.items():
            # As JSON, because that is how it was written: a tuple has become a list.
            if (then := run.get(name)) != json.loads(json.dumps(value)):
                raise InputError(f"{where}: is of another run, with {name} {then!r} instead of {value!r}.")
        try:
            # Accelerate passes over random numbers that it cannot read.
            torch.load(checkpoint / f"random_states_{self.accelerator.process_index}.pkl", weights_only=False)
            self.accelerator.load_state(str(checkpoint))
        except Exception as error:  # a damaged file can bring up anything
            raise InputError(f"{where}: cannot be read ({error}).") from None

    def _remove_old(self) -> None:
        for _, folder in _complete(self.folder)[: -self.total_limit] if self.total_limit else []:
            # First out of sight: half a removal must not look like a checkpoint.
            doomed = folder.with_name(folder.name + UNFINISHED)
            os.replace(folder, doomed)
            shutil.rmtree(doomed)


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of most steps in a folder."""
    found = _complete(folder)
    return found[-1][1] if found else None


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints with their steps, in order."""
    return sorted((int(m[1]), path) for path in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", path.name)))


def claim_output_dir(output_dir: Path, accelerator: Accelerator, resuming: bool) -> None:
    """Check before any work that a run can write its results, and that they would not mix with those of another run.

    Clears away what a killed run was about to write. All processes of a launch call this together.

    Args:
        output_dir: Folder for the results. It is made if it does not exist.
        accelerator: The accelerator of the launch.
        resuming: Whether the run goes on from a checkpoint.

    Raises:
        InputError: The folder cannot be written, or holds checkpoints and the run does not resume.
    """
    if accelerator.is_main_process:
        check_writable(output_dir)
        remove_unfinished(output_dir)
    accelerator.wait_for_everyone()
    earlier = latest(output_dir)
    if earlier and not resuming:
        raise InputError(
            f"output_dir={str(output_dir)!r}: has {earlier.name} of an earlier run; go on from it with "
            "resume_from_checkpoint='latest', or choose another folder."
        )


def check_writable(output_dir: Path) -> None:
    """Make a folder, if it does not exist, and check that it can be written.

    Raises:
        InputError: It cannot.
    """
    try:
        with whole_files(output_dir):
            pass
    except InputError as error:
        raise InputError(f"output_dir={str(output_dir)!r}: cannot be written ({error.__cause__}).") from None


def remove_unfinished(folder: Path) -> None:
    """Clear away what a killed run was about to write."""
    places = (folder, folder / "best")
    for path in (*folder.glob(f"step_*{UNFINISHED}"), *(place / f"files{UNFINISHED}" for place in places)):
        shutil.rmtree(path, ignore_errors=True)
