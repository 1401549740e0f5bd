# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run, and the progress of the run, which is stored in them.

A checkpoint gets its name only after all of it is on the disk. So a run may be killed at any time. A checkpoint has a
digest of each of its files. Its files are read as tensors and plain values, so no code in them runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils import load as load_torch
from peft import load_peft_weights, set_peft_model_state_dict

from ..errors import InputError
from ..files import (
    DIGESTS,
    UNFINISHED,
    check_digests,
    check_writable,
    only_writer,
    publish_folder,
    read_json,
    write_digests,
    write_problem,
)
from ..wording import quoted

RUN_FILE = "run.json"


@dataclass
class Progress:
    """The progress of a run, which is stored in its checkpoints.

    Attributes:
        step: Number of optimizer steps so far.
        seconds: Time spent in training steps.
        before: Results of the base model without an adapter.
        losses: The loss of each step, as a mean over the processes.
        validated: Step of the last validation.
        validations: For each validation, its metrics and its `step`.
        thresholds: Score thresholds that the last validation suggests.
        best: Metrics of the best adapter so far on the validation split, and its `step`.
    """

    step: int = 0
    seconds: float = 0.0
    before: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validated: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    thresholds: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if type(value) is not type(vars(self).get(name)):
                raise ValueError(f"the progress has {name} = {quoted(value)}")
        vars(self).update(state)


class Checkpoints:
    """The checkpoints of a run: folders `step_N` from `Accelerator.save_state`, with the adapter instead of the model.

    Args:
        accelerator: The accelerator. Everything that a checkpoint holds must be prepared or registered with it.
        folder: Folder of the checkpoints.
        write_adapter: Writes the adapter and its other files into a folder.
        run: Everything that determines the result of the run. A run can only resume from checkpoints with the same
            values.
        total_limit: Number of checkpoints to keep; older ones are removed. None keeps all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        write_adapter: Callable[[Path], None],
        run: dict[str, Any],
        total_limit: int | None = None,
    ):
        self.accelerator, self.folder, self.write_adapter = accelerator, folder, write_adapter
        self.run, self.total_limit = run, total_limit
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def _save_adapter(self, models: list, weights: list, folder: str) -> None:
        # The weights of the base model are left out: they are frozen and may be a thousand times larger.
        weights.clear()
        if self.accelerator.is_main_process:
            self.write_adapter(Path(folder))

    def _load_adapter(self, models: list, folder: str) -> None:
        model = self.accelerator.unwrap_model(models.pop())
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))

    def save(self, step: int) -> None:
        """Write the checkpoint `step_<step>`, unless it exists. All processes of a launch call this together.

        Args:
            step: Number of optimizer steps so far.

        Raises:
            InputError: A process cannot write its part. All processes raise it, and earlier checkpoints stay as they
                are.
        """
        final = self.folder / f"step_{step}"
        if final.is_dir():
            return
        unfinished = final.with_name(final.name + UNFINISHED)
        problem: list[str] = []
        with _noted(problem):
            self.accelerator.save_state(str(unfinished))
        problem = gather_object(problem)
        if not problem and self.accelerator.is_main_process:
            with _noted(problem):
                (unfinished / RUN_FILE).write_text(json.dumps(self.run, indent=2) + "\n")
                write_digests(unfinished)
                publish_folder(unfinished, final)
                self._remove_old()
        problem = gather_object(problem)
        if problem:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise InputError(
                f"the checkpoint of step {step} cannot be written ({problem[0]}); "
                f"the last complete checkpoint is {latest(self.folder) or 'none'}."
            )

    def resume(self, resume_from_checkpoint: str | os.PathLike | None) -> Path | None:
        """Load a checkpoint, if there is one. All processes of a launch call this together.

        Args:
            resume_from_checkpoint: Folder of a checkpoint. "latest" loads the newest checkpoint of this run, if it
                exists. None loads no checkpoint.

        Returns:
            The folder of the loaded checkpoint, or None.

        Raises:
            InputError: The checkpoint cannot be loaded; see `load`.
        """
        latest_one = resume_from_checkpoint == "latest"
        checkpoint = latest(self.folder) if latest_one else resume_from_checkpoint
        if checkpoint is None:
            if latest_one:
                self.accelerator.print(f"{self.folder} has no checkpoint yet: starting from the beginning")
            return None
        self.load(Path(checkpoint))
        self.accelerator.print(f"resuming from {checkpoint}")
        return Path(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint. All processes of a launch call this together.

        Args:
            checkpoint: Folder of the checkpoint.

        Raises:
            InputError: The folder is not a complete checkpoint, belongs to another run, or cannot be read, or the
                folder of this run has newer checkpoints.
        """
        where = f"checkpoint={str(checkpoint)!r}"
        try:
            has_digests = check_digests(checkpoint)
        except (InputError, OSError) as error:
            raise InputError(f"{where}: cannot be read ({error}).") from None
        try:
            run = read_json(checkpoint / RUN_FILE)
        except InputError as error:
            raise InputError(f"{where}: is not a complete checkpoint ({error}).") from None
        newest = latest(self.folder)
        if newest and newest.resolve() != checkpoint.resolve():
            raise InputError(
                f"{where}: {self.folder} has {newest.name}, which the checkpoints of the resumed run would mix with; "
                "remove the newer checkpoints or choose another output folder."
            )
        run = run if isinstance(run, dict) else {}
        for name in self.run | run:
            value, then = self.run.get(name), run.get(name)
            # Compared as JSON, which turns a tuple into a list.
            if then != json.loads(json.dumps(value)):
                raise InputError(
                    f"{where}: belongs to another run, with {name} {quoted(then)} instead of {quoted(value)}."
                )
        if not has_digests:
            self.accelerator.print(f"{checkpoint} has no {DIGESTS}, so damage to its files may go unnoticed")
        try:
            with _only_data():
                # The random states are read here first, because Accelerate ignores those that it cannot read.
                load_torch(checkpoint / f"random_states_{self.accelerator.process_index}.pkl", map_location="cpu")
                self.accelerator.load_state(str(checkpoint))
        except Exception as error:  # a damaged file can raise anything
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it has an object of {code[1]}, and only tensors and plain values are read" if code else error
            raise InputError(f"{where}: cannot be read ({reason}).") from None

    def _remove_old(self) -> None:
        for _, folder in _complete(self.folder)[: -self.total_limit] if self.total_limit else []:
            # Renamed first, because a partly removed folder must not look like a checkpoint.
            doomed = folder.with_name(folder.name + UNFINISHED)
            os.replace(folder, doomed)
            shutil.rmtree(doomed)


def latest(folder: Path) -> Path | None:
    """Find the newest complete checkpoint in a folder.

    Args:
        folder: Folder of the checkpoints, which need not exist.

    Returns:
        The checkpoint with the highest step. None if there is no checkpoint.
    """
    checkpoints = _complete(folder)
    return checkpoints[-1][1] if checkpoints else None


def _complete(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of all complete checkpoints in a folder, sorted by step."""
    return sorted((int(m[1]), path) for path in folder.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", path.name)))


@contextlib.contextmanager
def _noted(problem: list[str]) -> Iterator[None]:
    """Add an error to a list instead of raising it, so that all processes can raise it together.

    Only an `InputError` and errors of writing are added. Other exceptions pass through.
    """
    try:
        yield
    except InputError as error:
        problem.append(str(error))
    except Exception as error:
        if (reason := write_problem(error)) is None:
            raise
        problem.append(reason)


@contextlib.contextmanager
def _only_data() -> Iterator[None]:
    """Let `torch.load` read only tensors and plain values in this context, so that no code in a file runs.

    accelerate 1.15 reads the states of registered objects with `weights_only=False`. The environment variable of torch
    overrides this argument.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def claim_output_dir(output_dir: Path, accelerator: Accelerator, resuming: bool | None) -> Iterator[None]:
    """Check that a run can write its results, and prevent other commands from writing to the folder in this context.

    The function also removes the unfinished files of a killed run. All processes of a launch call it together, before
    the run does any work.

    Args:
        output_dir: Folder for the results. It is made if it does not exist.
        accelerator: The accelerator of the launch.
        resuming: Whether the run resumes from a checkpoint. None if it does not train. Checkpoints and unfinished files
            in the folder are then left as they are.

    Raises:
        InputError: The folder cannot be written, another command is writing to it, machines of the launch do not share
            it, or it has checkpoints and the run trains without resuming. All processes raise it.
    """
    with contextlib.ExitStack() as claim:
        problem: list[str] = []
        if accelerator.is_main_process:
            with _noted(problem):
                check_writable(output_dir, "output_dir")
                claim.enter_context(only_writer(output_dir, "output_dir"))
                if resuming is not None:
                    remove_unfinished(output_dir)
                if resuming is False and (earlier := latest(output_dir)):
                    raise InputError(
                        f"output_dir={str(output_dir)!r}: has {earlier.name} of an earlier run; resume it by "
                        "resuming=True, or choose another folder."
                    )
        (problem,) = broadcast_object_list([problem])
        if problem:
            raise InputError(problem[0])
        if accelerator.num_processes > 1:
            _check_shared(output_dir, accelerator)
        yield


def _check_shared(output_dir: Path, accelerator: Accelerator) -> None:
    """Raise an `InputError` in all processes if one of them does not see the files of the main process in a folder.

    Every process writes a part of a checkpoint, and reads the files that the main process writes.
    """
    (name,) = broadcast_object_list([f"{secrets.token_hex(8)}{UNFINISHED}"])
    if accelerator.is_main_process:
        (output_dir / name).touch()
    accelerator.wait_for_everyone()
    blind = [] if (output_dir / name).exists() else [accelerator.process_index]
    blind = gather_object(blind)
    if accelerator.is_main_process:
        (output_dir / name).unlink()
    if blind:
        raise InputError(
            f"output_dir={str(output_dir)!r}: process {blind[0]} does not see the files of the main process there; "
            "choose a folder that all machines share."
        )


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished checkpoints and files that a killed run left in a folder."""
    places = (folder, folder / "best")
    for path in (*folder.glob(f"step_*{UNFINISHED}"), *(place / f"files{UNFINISHED}" for place in places)):
        shutil.rmtree(path, ignore_errors=True)
