# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The comparison of robustness: its plan, one small run, and its tables."""

import json
import sys
from itertools import groupby

import pytest

from benchmarks.robustness import __main__ as command
from benchmarks.robustness import running
from benchmarks.robustness.cost import SUBJECTS, step_costs
from benchmarks.robustness.grid import COMPARED, DISTANCES, RATES, TRIED, WITH_ALL_ATTACKS, Cell, plan
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
    assert len({cell.key for cell in cells}) == len(cells) == 2 * (1 + 3 * len(COMPARED)) + len(TRIED)
    assert {cell.method for cell in cells} - {"zero-shot"} <= METHODS.keys() == RATES.keys()
    assert set(WITH_ALL_ATTACKS) <= set(cells)
    # A plan that is stopped has complete rows.
    rows = [(cell.method, cell.adversarial, cell.weight, cell.augmentation) for cell in cells if cell.split == "test"]
    assert len([row for row, _ in groupby(rows)]) == 1 + len(COMPARED)
    assert Cell("a", "gated").key != Cell("a", "gated", eps=3.0).key


@pytest.mark.parametrize("cell", [Cell("twemoji", "gated-windows", "free", steps=2), WITH_ALL_ATTACKS[0]])
def test_a_run_trains_and_measures(task, monkeypatch, cell):
    monkeypatch.setattr(running, "ATTACK_STEPS", {"test": 1})
    monkeypatch.setattr(running, "DISTANCES", (2, 8))
    result = running.run_cell(cell, task, HOST, "cpu", num_images=2)
    values = [result["clean"], *result["pgd"].values()]
    if cell.method == "zero-shot":
        assert set(result["pgd"]) == {"2", "8"} == set(result["features"])
        values += [result["signs"], *result["transfer"].values(), *result["vanish"].values()]
    else:
        assert set(result["pgd"]) == {"2"} and "transfer" not in result
    assert all(0 <= value <= 1 for value in values)
    assert result["images"] == 2
    if cell.method != "zero-shot":
        assert len(result["losses"]) == 2
        # 20 tokens in each of three fusion layers, their gates, and 10 tokens in each block of the backbone.
        assert result["trained"] == 21_464


def test_a_run_that_diverges_has_an_ap_of_0(task):
    result = running.run_cell(Cell("twemoji", "gated", rate=1e30, steps=20), task, HOST, "cpu", num_images=2)
    assert (result["clean"], result["pgd"]) == (0.0, {"2": 0.0}) and result["diverged"] < 20


def test_costs_are_relative_to_clean_images(task, monkeypatch):
    monkeypatch.setattr("benchmarks.robustness.cost.ROUNDS", 1)
    monkeypatch.setattr("benchmarks.robustness.cost.BATCH", 1)
    costs = step_costs(task, HOST, "cpu")
    assert costs.keys() == SUBJECTS.keys()
    assert costs["clean images"] == 1.0 and min(costs.values()) > 0
    assert "| fast |" in cost_table({"on": "a CPU", **costs})


def result_of(cell: Cell, clean: float) -> dict:
    return {
        **{name: getattr(cell, name) for name in Cell.__dataclass_fields__},
        "clean": clean,
        "pgd": {"2": clean / 2},
        "trained": 15384,
        "images": 64,
        "on": "a CPU",
    }


def test_the_table_has_means_over_seeds_of_the_cells_that_are_there():
    cells = [Cell("twemoji", "gated", "fast", seed) for seed in range(2)]
    cells.append(Cell("twemoji", "gated", "fast", eps=8.0))
    found = {cell.key: result_of(cell, clean) for cell, clean in zip(cells, (0.5, 0.7, 0.1), strict=True)}
    text = report(found)
    (row,) = [line for line in text.splitlines() if line.startswith("| SDPT")]
    assert row == "| SDPT, defaults | fast | 15 384 | 2 | 60.0 ± 14.1 | 30.0 ± 7.1 |"
    chosen = Cell("twemoji", split="val", **TRIED[1])
    row = "| SDPT, defaults | fast | learning rate 0.1 | 40.0 | 20.0 |"
    assert row in report({chosen.key: result_of(chosen, 0.4)})


def test_rows_name_their_weight_and_missing_augmentation():
    cells = [Cell("twemoji", "gated", "fast", weight=0.5), Cell("twemoji", "gated", "bank", augmentation=False)]
    text = report({cell.key: result_of(cell, 0.5) for cell in cells})
    assert "| fast, weight 0.5 |" in text and "| bank (AdvPT), no augmentation |" in text


def test_runs_with_all_attacks_have_a_table_of_their_own():
    cell = WITH_ALL_ATTACKS[2]
    more = {
        "pgd": {str(distance): 0.6 / distance for distance in DISTANCES},
        "transfer": {"2": 0.4},
        "features": {"2": 0.5, "8": 0.35},
        "vanish": {"2": 0.2},
    }
    # Runs on a validation split may have other distances.
    tried = Cell("twemoji", "gated", "fast", split="val")
    other = {**result_of(tried, 0.7), "transfer": {"2": 0.4}}
    text = report({cell.key: {**result_of(cell, 0.7), **more}, tried.key: other})
    assert "| SDPT, defaults | fast | 15 384 | 1 | 70.0 | 30.0 |" in text
    assert "| SDPT, defaults | fast | 60.0 | 30.0 | 15.0 | 7.5 | 40.0 | 50.0 | 35.0 | 20.0 |" in text


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
    assert "no.json: no such file" in capsys.readouterr().err
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
    assert json.loads((tmp_path / "robustness.json").read_text())["cells"][Cell("twemoji", "gated").key]["clean"] == 0.5
