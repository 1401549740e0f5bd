# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of deployment on a tiny host: it measures each way and ends in tables. No test is timed."""

import json
import sys

import pytest
from torch import nn
from transformers import GroundingDinoForObjectDetection

from benchmarks import deployment
from benchmarks.speed import full_hosts, measuring
from tests.helpers.detectors import host_config, randomise


def tiny():
    config = host_config("grounding_dino", layers=1)
    config.text_config.vocab_size = 30522
    return randomise(GroundingDinoForObjectDetection(config))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(full_hosts.MODELS, "grounding-dino-tiny", tiny)
    monkeypatch.setattr(measuring, "SECONDS", 0.0)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["deployment", "--device", "cpu", *arguments])
    deployment.main()


def test_a_run_ends_in_tables(tmp_path, monkeypatch, capsys):
    page = tmp_path / "deployment.md"
    page.write_text("a\n<!-- results: begin -->\n<!-- results: end -->\nb\n")
    monkeypatch.setattr(deployment, "DOCS", tmp_path)
    ways = ["base", "tuned", "baked", "int8", "int8-dynamic"]
    flags = ["--model", "grounding-dino-tiny", "--image_size", "64", "64", "--repeats", "3", "--users", "3"]
    call(monkeypatch, *flags, "--only", *ways, "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["ways"]) == ways and list(results["many"]) == [*deployment.USERS, "base"]
    assert all(len(way["seconds"]) == 3 for way in results["ways"].values())
    sizes = {name: way["bytes"] for name, way in results["ways"].items()}
    assert sizes["int8"] < sizes["base"] < sizes["baked"] < sizes["tuned"]
    many = {name: way["bytes"] for name, way in results["many"].items()}
    # One copy of the weights serves all users, or there is one for each of them.
    assert many["base"] < many["mixed"] == many["switching"] < 1.5 * many["base"]
    assert many["merged"] >= 3 * many["base"]
    call(monkeypatch, "--render", str(tmp_path / "results.json"))
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("b\n")
    for name in ways:
        assert f"| {deployment.LABELS[name]} | " in text


def test_fusion_layers_are_not_quantised():
    model = deployment.tune(tiny())
    baked = deployment.quantised(model, dynamic=False)
    weights = {name: type(module.weight) for name, module in baked.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in weights if ".fusion_layer.attn." in name}
    assert {weights[name] for name in inside} == {nn.Parameter}
    assert sum(kind is not nn.Parameter for kind in weights.values()) > 20


WRONG = {
    "repeats": (["--repeats", "2"], "--repeats 2: must be at least 3"),
    "users": (["--users", "1"], "--users 1: must be at least 2"),
    "only": (["--only", "baked"], "--only baked: must have tuned"),
    "adapter": (["--dataset_name", "x"], "--dataset_name x: AP needs --adapter"),
    "render": (["--render", "nowhere.json"], "--render nowhere.json: no such file"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
