# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the server runs, and measures what it says."""

import dataclasses
import sys

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install peft_sdpt[serve]")

from benchmarks import serving


@pytest.fixture
def run(monkeypatch):
    def run(*flags) -> None:
        monkeypatch.setattr(sys, "argv", ["serving", *map(str, flags)])
        serving.main()

    return run


def test_three_servers_answer_all_clients_each_with_its_adapter(run, monkeypatch, capsys):
    batches, scores, differences = [], {}, []
    real = serving.answer

    def noted(model, tokenizer, questions, limit):
        batches.append(questions)
        found = real(model, tokenizer, questions, limit)
        for question, detections in zip(questions, found, strict=True):
            image = question.pixels["pixel_values"].numpy().tobytes()
            scores.setdefault((question.adapter, image), []).append(detections["best_score"])
        return found

    def noted_with_differences(model, tokenizer, questions, limit):
        for name in ("adapter0", "adapter1", "__base__"):
            if name != questions[0].adapter:
                pair = [dataclasses.replace(questions[0], adapter=each) for each in (name, questions[0].adapter)]
                one, other = (found["best_score"] for found in real(model, tokenizer, pair, limit))
                differences.append(abs(one - other))
        return noted(model, tokenizer, questions, limit)

    monkeypatch.setattr(serving.serve, "answer", noted_with_differences)
    monkeypatch.setattr(serving, "answer", noted)
    run("--rounds", 1, "--requests", 4, "--clients", 4, "--adapters", 2, "--image_size", 64)
    # Two rounds of three servers. Each server gets all requests, and the last one makes no batches.
    assert sum(map(len, batches)) == 2 * 3 * 4
    assert sum(len(batch) == 1 for batch in batches) >= 2 * 4 and max(map(len, batches)) > 1
    # The three servers give the same answers, which are those of the adapter of the request and of no other.
    assert {len(each) for each in scores.values()} == {3}
    assert all(each == pytest.approx(each[:1] * 3, abs=1e-5) for each in scores.values())
    assert min(differences) > 1e-3
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == ["| mixed adapters", "| one adapter per batch", "| no batches"]
    assert lines[1].endswith("| 1.00 (1.00 to 1.00) |")


@pytest.mark.parametrize("flag", ["adapters", "clients", "max_batch_size", "image_size", "rounds", "requests"])
def test_numbers_below_one_are_refused(flag, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(f"--{flag}", 0)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"benchmarks.serving: --{flag} 0: must be at least 1.\n"
