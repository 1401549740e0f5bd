# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Errors of the library as one line of a command, with flags in place of arguments."""

import errno
import re

import pytest

from peft_sdpt.detection import load_split
from peft_sdpt.errors import InputError, hint, one_line_errors, with_flags
from tests.helpers.detectors import ROOT

FLAGS = {"split": "eval_split", "skip_bad_boxes": "skip_bad_boxes", "folder": "output_dir", "rate": "learning_rate"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("split='test': is missing.", "--eval_split test: is missing."),
        ("split='a b': is missing.", "--eval_split a b: is missing."),
        ('split="it\'s": is missing.', "--eval_split it's: is missing."),
        ("split='': is empty.", "--eval_split: is empty."),
        ("rate=0.5: must be below 0.1.", "--learning_rate 0.5: must be below 0.1."),
        ("must be below rate=0.1.", "must be below --learning_rate 0.1."),
        ("(see rate=0.1)", "(see --learning_rate 0.1)"),
        ("rate=1e-4, split='x'; bad.", "--learning_rate 1e-4, --eval_split x; bad."),
        ("skip_bad_boxes=True leaves them out.", "--skip_bad_boxes leaves them out."),
        ("pass folder=... as well.", "pass --output_dir as well."),
        ("folder=...: is missing.", "--output_dir: is missing."),
        ("other='x' stays, as does prefix_split='x'.", "other='x' stays, as does prefix_split='x'."),
        ("SDPTConfig.split='x' stays.", "SDPTConfig.split='x' stays."),
        ("the split of the data stays.", "the split of the data stays."),
    ],
)
def test_arguments_become_flags(message, expected):
    assert with_flags(message, FLAGS) == expected


def test_without_flags_a_message_stays():
    assert with_flags("split='test': is missing.", {}) == "split='test': is missing."


def failing(error, flags=None):
    with pytest.raises(SystemExit) as ended, one_line_errors("command.py", flags):
        raise error
    return ended.value.code


def test_an_input_error_is_one_line_and_exit_code_2(capsys):
    assert failing(InputError("split='test': is\n  missing."), FLAGS) == 2
    assert capsys.readouterr().err == "command.py: --eval_split test: is missing.\n"
    assert failing(InputError("split='test': is missing.")) == 2
    assert capsys.readouterr().err == "command.py: split='test': is missing.\n"


def test_an_error_of_a_worker_is_printed_without_its_traceback(capsys):
    text = "Caught InputError in DataLoader worker process 0.\nTraceback:\npeft_sdpt.errors.InputError: a.png: gone"
    assert failing(InputError(text)) == 2
    assert capsys.readouterr().err == "command.py: a.png: gone\n"


@pytest.mark.parametrize(("message", "line"), [("", "interrupted."), ("stopped.", "stopped.")])
def test_an_interruption_has_exit_code_130(message, line, capsys):
    assert failing(KeyboardInterrupt(message)) == 130
    assert capsys.readouterr().err == f"command.py: {line}\n"


def test_a_hint_follows_the_message_of_an_input_error_only():
    with (
        pytest.raises(InputError, match=r"^adapter='a': has no names\. Pass --class_names\.$"),
        hint("Pass --class_names."),
    ):
        raise InputError("adapter='a': has no names.")
    with pytest.raises(KeyError, match="a bug"), hint("Pass --class_names."):
        raise KeyError("a bug")


def test_other_errors_pass_through():
    with pytest.raises(KeyError), one_line_errors("command.py"):
        raise KeyError("a bug")


FULL = OSError(errno.ENOSPC, "No space left on device", "events.out")


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "[Errno 28] No space left on device: 'events.out'"),
        (OSError(errno.EFBIG, "too large"), "[Errno 27] too large"),
        (Exception("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (RuntimeError("a\nb [errno 28] full"), "a b [errno 28] full"),
        (caused(TypeError("cannot log"), FULL), "cannot log"),
        (caused(KeyError(1), caused(TypeError(), FULL)), "1"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_2_in_any_words(error, said, capsys):
    assert failing(error) == 2
    assert capsys.readouterr().err == f"command.py: a file cannot be written ({said}).\n"


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), Exception("(os error 2)"), Exception("os error 280")])
def test_other_errors_of_files_are_no_full_disk(error):
    loop = caused(ValueError(), error)
    error.__cause__ = loop
    with pytest.raises(type(error)), one_line_errors("command.py"):
        raise error


def test_an_error_of_the_library_is_a_value_error_with_its_argument():
    with pytest.raises(ValueError, match=r"^bbox_format='yxyx': must be one of xywh, xyxy, cxcywh, "):
        load_split("nowhere", "train", bbox_format="yxyx")


# Flags of other programs, which messages tell a user to run.
OTHER_FLAGS = {"cpu", "num_processes", "nproc_per_node", "save", "spec"}


def test_the_library_names_no_flags_of_scripts():
    for file in (ROOT / "peft_sdpt").rglob("*.py"):
        if file.name != "convert.py" and file.parent.name != "commands":
            text = re.sub(r'""".*?"""|#[^\n]*', "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert set(re.findall(r"--([a-z]\w+)", text)) <= OTHER_FLAGS, file
