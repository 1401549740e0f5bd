# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What the main job writes into the cards of its adapters, and what it pushes to the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image

from peft_sdpt.commands import train as command
from peft_sdpt.errors import InputError
from peft_sdpt.training import prepare_push, push
from tests.helpers.hub import OWNER, READER, wait_little
from tests.helpers.main_job import HOST, TWO_STEPS

REPO = "user/adapter"
WEIGHTS = "adapter_model.safetensors"
MADE_BY_US = "Tokens for [SDPT"

pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def train(main_job, small_task, capsys):
    """Run it for a step; returns exit code and the last line of what it says of errors."""

    def train(*flags):
        capsys.readouterr()
        code = main_job("--dataset_name", small_task, "--max_train_steps", 1, *flags)
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()[-1:] or [""]

    return train


PUSH = ("--push_to_hub", "--hub_model_id", REPO, "--hub_token", OWNER)


def test_the_main_job_writes_results_into_its_cards(train, small_task, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n")
    assert train()[0] == 0
    metrics = json.loads((out / "metrics.json").read_text())
    last, best = ((out / name / "README.md").read_text() for name in ("", "best"))
    for name, row in (("before", "before, the base model alone"), ("after", "after")):
        assert f"| {row} | {' | '.join(f'{metrics[name][key]:.3f}' for key in ('AP', 'AP50', 'AP75'))} |" in last
    assert f"`{small_task.name}`" in last and "split `test`, 4 images of 40 classes" in last and MADE_BY_US in last
    assert "after 1 training step." in last
    assert "(detections.png)" in last and "# My own words" in last and "license: mit" in last
    assert "library_name: peft" in last
    assert f"| validation | {metrics['best']['AP']:.3f} |" in best and "detections.png" not in best
    assert str(tmp_path) not in last + best
    assert train("--output_dir", out)[0] == 0
    assert (out / "README.md").read_text().count("## Results") == 1


def test_the_main_job_pushes_what_belongs_there(train, hub, tmp_path):
    code, said, _ = train(*PUSH, "--checkpointing_steps", 1)
    assert code == 0 and f"pushed to {hub.endpoint}/{REPO}" in said
    files = hub.repositories[REPO].files()
    adapter = {
        *("adapter_config.json", WEIGHTS, "README.md", "class_names.json", "detection.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    pictures = {"detections.png", "report.png"}
    assert set(files) == adapter | {"metrics.json"} | pictures | {f"best/{name}" for name in adapter}
    assert all(content == (tmp_path / "out" / name).read_bytes() for name, content in files.items())
    assert not [name for name in (tmp_path / "out").rglob("*.json") if OWNER in name.read_text()]
    assert OWNER.encode() not in b"".join(files.values())

    # Resumed by the same command without pushing, and pushed again.
    code, _, error = train("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    assert code == 0, error
    assert 'find_adapter(".")' in (tmp_path / "out" / "best" / "README.md").read_text()
    assert train(*PUSH, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")[0] == 0
    for folder in ("", "/best"):
        card = hub.repositories[REPO].files()[f"{folder}/README.md".lstrip("/")].decode()
        assert f'find_adapter("{REPO}{folder}")' in card


def run_card(card: str, small_task, folder, monkeypatch, capsys) -> tuple[dict, list[str]]:
    """Run the detection code of a model card without changes, beside a picture. Returns its names and its output."""
    (code,) = re.findall(r"```python\n(from peft_sdpt import detection\n.*?)```", card, re.DOTALL)
    assert 10 <= len(code.splitlines()) <= 13
    monkeypatch.chdir(folder)
    picture = min((small_task / "images").glob("test_*"))
    with Image.open(picture) as image:
        image.convert("RGB").save(folder / "photo.jpg", quality=95)
    capsys.readouterr()
    namespace: dict = {}
    exec(code, namespace)
    return namespace, capsys.readouterr().out.splitlines()


def check_found(namespace: dict, said: list[str], threshold: float) -> None:
    scores = namespace["found"]["scores"]
    assert namespace["threshold"] == threshold
    assert len(said) == (scores >= threshold).sum() > 0
    assert all(re.fullmatch(r"[a-z ]+ \d\.\d+ \[\d+, \d+, \d+, \d+\]", line) for line in said)


@pytest.mark.parametrize("folder", [".", "best"])
def test_the_code_of_a_card_runs_in_its_folder(trained, small_task, tmp_path, monkeypatch, capsys, folder):
    out = Path(shutil.copytree(trained(*TWO_STEPS) / folder, tmp_path / "copy"))
    namespace, said = run_card((out / "README.md").read_text(), small_task, out, monkeypatch, capsys)
    check_found(namespace, said, json.loads((out / "detection.json").read_text())["threshold"])


def test_the_code_of_a_pushed_card_runs_anywhere(train, hub, small_task, tmp_path, monkeypatch, capsys):
    """The code needs only the names of repositories, because the base model is on the Hub as well."""
    hub.add("IDEA-Research/grounding-dino-tiny", HOST)
    code, _, error = train(*PUSH, "--model_name_or_path", "IDEA-Research/grounding-dino-tiny")
    assert code == 0, error
    shutil.move(tmp_path / "out", tmp_path / "gone")
    files = hub.repositories[REPO].files()
    for path in ("", "best/"):
        (tmp_path / "anywhere").mkdir(exist_ok=True)
        card = files[f"{path}README.md"].decode()
        namespace, said = run_card(card, small_task, tmp_path / "anywhere", monkeypatch, capsys)
        check_found(namespace, said, json.loads(files[f"{path}detection.json"])["threshold"])
        assert "\nlicense: apache-2.0\n" in card and "\nbase_model: IDEA-Research/grounding-dino-tiny\n" in card


def test_a_push_that_fails_at_the_end_loses_nothing(train, hub, impatient, tmp_path):
    hub.refused = {"/commit/": 500}
    code, _, error = train(*PUSH)
    assert code == 2
    assert error[0].startswith("train_detection.py: --hub_model_id user/adapter: the upload failed (")
    assert f"All files are still in {tmp_path / 'out'}" in error[0] and "hf upload user/adapter" in error[0]
    assert (tmp_path / "out" / WEIGHTS).is_file() and (tmp_path / "out" / "metrics.json").is_file()
    assert not hub.repositories[REPO].commits


@pytest.mark.parametrize("fault", ["stalled", "page", "reset", "loop", 500])
@pytest.mark.parametrize("step", ["/api/repos/create", "/auth-check", "/commit/"])
def test_a_hub_that_answers_wrongly_is_one_line(hub, monkeypatch, tmp_path, step, fault):
    """The push fails before the run, or after it. After it, all files stay. The next try works."""
    wait_little(monkeypatch, 0.2 if fault == "stalled" else 5.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WEIGHTS).write_bytes(b"weights")
    accelerator = Accelerator(cpu=True)

    def push_all():
        return push(prepare_push(REPO, OWNER, accelerator), REPO, tmp_path / "out", [WEIGHTS])

    if isinstance(fault, int):
        hub.refused = {step: fault}
    else:
        hub.faults = {step: fault}
    at_start = step in ("/api/repos/create", "/auth-check")
    # The content of the answer to the check of rights is not read.
    if (step, fault) != ("/auth-check", "page"):
        with pytest.raises(InputError, match="cannot be pushed to" if at_start else "the upload failed") as raised:
            push_all()
        assert str(raised.value).isprintable() and str(raised.value).startswith(f"repo_id='{REPO}': ")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"weights"
    hub.faults, hub.refused = {}, {}
    assert push_all() == f"{hub.endpoint}/{REPO}"
    assert hub.repositories[REPO].files()[WEIGHTS] == b"weights"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--push_to_hub",), "--push_to_hub: needs --hub_model_id user/name."),
        (("--push_to_hub", "--hub_model_id", ""), "--hub_model_id: is empty."),
        (("--push_to_hub", "--hub_model_id", "name"), "--hub_model_id name: must be user/name."),
        (("--hub_model_id", REPO), f"--hub_model_id {REPO}: nothing is uploaded without --push_to_hub."),
        ((*PUSH, "--eval_only"), "--push_to_hub: cannot be used with --eval_only, which trains no adapter."),
        (("--push_to_hub", "--hub_model_id", REPO), "--hub_token: there is no token; log in by `hf auth login`"),
        ((*PUSH[:3], "--hub_token", READER), f"--hub_model_id {REPO}: cannot be pushed to (403"),
        ((*PUSH[:3], "--hub_token", "wrong"), f"--hub_model_id {REPO}: cannot be pushed to (Client error '401"),
        ((*PUSH, "--hub_model_id", "other/name"), "--hub_model_id other/name: cannot be pushed to ("),
        ((*PUSH, "--hub_model_id", "user/a name"), "--hub_model_id user/a name: cannot be pushed to ("),
    ],
)
def test_pushing_is_checked_before_any_work(train, hub, monkeypatch, flags, message):
    monkeypatch.setattr(command, "read_data", lambda *_: pytest.fail("began to work"))
    code, _, error = train(*flags)
    assert code == 2 and message in error[0]
    assert not hub.repositories


def test_a_repository_of_somebody_else_or_a_hub_out_of_reach(train, hub, tmp_path, monkeypatch, request):
    monkeypatch.setattr(command, "read_data", lambda *_: pytest.fail("began to work"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("# Theirs")
    hub.add("other/adapter", tmp_path / "theirs")
    hub.add(REPO, tmp_path / "theirs")
    for flags in (("--hub_model_id", "other/adapter"), ("--hub_token", READER)):
        code, _, error = train(*PUSH, *flags)
        assert code == 2 and "cannot be pushed to" in error[0] and "403" in error[0]
    request.getfixturevalue("offline")
    code, _, error = train(*PUSH)
    assert code == 2 and "cannot be pushed to" in error[0] and "offline" in error[0]
