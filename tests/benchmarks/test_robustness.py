# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The comparison of robustness: its plan, one small run, and its tables."""

import json
import sys

import pytest

from benchmarks.robustness import __main__ as command
from benchmarks.robustness import running
from benchmarks.robustness.cost import SUBJECTS, step_costs
from benchmarks.robustness.grid import DISTANCES, RATES, TRIED, Cell, plan
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.report import cost_table, report
from benchmarks.transfer.tasks import Task
from tests.helpers.detectors import ROOT
from tests.helpers.small_tasks import write_small_task

HOST = str(ROOT / "examples" / "host")


@pytest.fixture(scope="module")
def task(made_once):
    return Task("twemoji", made_once("robust-task", lambda folder: write_small_task(folder, train=8, val=2, test=2)))


def test_the_plan_has_each_run_once_and_knows_its_methods():
    cells = plan(["twemoji", "noto-new"], 3)
    assert len({cell.key for cell in cells}) == len(cells) == 2 * (1 + 3 * 11) + len(TRIED)
    assert {cell.method for cell in cells} - {"zero-shot"} <= METHODS.keys() == RATES.keys()
    # Whatever is stopped has complete seeds first.
    seeds = [cell.seed for cell in cells if cell.split == "test"]
    assert seeds == sorted(seeds)
    assert Cell("a", "gated").key != Cell("a", "gated", eps=3.0).key


@pytest.mark.parametrize(("method", "way"), [("gated-windows", "free"), ("zero-shot", "none")])
def test_a_run_trains_and_measures(task, monkeypatch, method, way):
    monkeypatch.setattr(running, "ATTACK_STEPS", {"test": 1})
    monkeypatch.setattr(running, "DISTANCES", (2, 8))
    result = running.run_cell(Cell("twemoji", method, way, steps=2), task, HOST, "cpu", num_images=2)
    assert set(result["pgd"]) == {"2", "8"} == set(result["features"])
    values = [result["clean"], result["signs"], *result["pgd"].values(), *result["transfer"].values()]
    assert all(0 <= value <= 1 for value in values)
    assert result["images"] == 2
    if method != "zero-shot":
        assert len(result["losses"]) == 2
        # 20 tokens in each of three fusion layers, their gates, and 10 tokens in each block of the backbone.
        assert result["trained"] > 15_360


def test_costs_are_relative_to_clean_images(task, monkeypatch):
    monkeypatch.setattr("benchmarks.robustness.cost.ROUNDS", 1)
    monkeypatch.setattr("benchmarks.robustness.cost.BATCH", 1)
    costs = step_costs(task, HOST, "cpu")
    assert costs.keys() == SUBJECTS.keys()
    assert costs["clean images"] == 1.0
    assert "| fast |" in cost_table({"on": "a CPU", **costs})


def result_of(cell: Cell, clean: float) -> dict:
    return {
        **{name: getattr(cell, name) for name in Cell.__dataclass_fields__},
        "clean": clean,
        "pgd": {str(distance): clean / 2 for distance in DISTANCES},
        "transfer": {"2": 0.4},
        "features": {"2": 0.5, "8": 0.3},
        "vanish": {"2": 0.2},
        "images": 64,
        "on": "a CPU",
    }


def test_the_table_has_means_over_seeds_of_the_cells_that_are_there():
    cells = [Cell("twemoji", "gated", "fast", seed) for seed in range(2)]
    cells.append(Cell("twemoji", "gated", "fast", eps=8.0))
    found = {cell.key: result_of(cell, clean) for cell, clean in zip(cells, (0.5, 0.7, 0.1), strict=True)}
    text = report(found)
    (row,) = [line for line in text.splitlines() if line.startswith("| SDPT")]
    chosen = Cell("twemoji", split="val", **TRIED[1])
    assert "| SDPT, defaults | fast | learning rate 0.1 | 40.0 | 20.0 |" in report({chosen.key: result_of(chosen, 0.4)})
    assert "| SDPT, defaults | fast | 2 | 60.0 ± 14.1 | 30.0 ± 7.1 |" in row


def test_the_command_refuses_wrong_flags_and_renders(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["benchmarks.robustness", *map(str, flags)])
        try:
            command.main()
        except SystemExit as exit:
            return exit.code
        return 0

    assert run("--seeds", 0) == 2
    assert "--seeds 0: must be at least 1" in capsys.readouterr().err
    assert run("--render", tmp_path / "no.json") == 2
    assert run("--tasks", "nothing", "--output_dir", tmp_path / "out") == 2
    assert "--tasks nothing: is unknown" in capsys.readouterr().err
    monkeypatch.setattr(command, "DOCS", tmp_path)
    (tmp_path / "robustness.md").write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    files = []
    for name, clean in (("one", 0.5), ("two", 0.9)):
        cell = Cell("twemoji", "gated")
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"machine": {}, "cells": {cell.key: result_of(cell, clean)}}))
    assert run("--render", *files) == 0
    assert "| 50.0 |" in (tmp_path / "robustness.md").read_text()
