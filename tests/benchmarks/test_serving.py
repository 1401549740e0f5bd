# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the server runs, and measures what it says."""

import sys

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install peft_sdpt[serve]")

from benchmarks import serving


def test_three_servers_answer_all_clients(monkeypatch, capsys):
    asked = []
    real = serving.answer
    monkeypatch.setattr(serving.serve, "answer", lambda *args, **kwargs: asked.append(args[2]) or real(*args, **kwargs))
    monkeypatch.setattr(serving, "answer", lambda *args, **kwargs: asked.append(args[2]) or real(*args, **kwargs))
    flags = ("--rounds", 1, "--requests", 4, "--clients", 4, "--adapters", 2, "--image_size", 64)
    monkeypatch.setattr(sys, "argv", ["serving", *map(str, flags)])
    serving.main()
    # Two rounds of three servers. Each server gets all requests, and the last one makes no batches.
    assert sum(map(len, asked)) == 2 * 3 * 4
    assert sum(len(batch) == 1 for batch in asked) >= 2 * 4 and max(map(len, asked)) > 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == ["| mixed adapters", "| one adapter per batch", "| no batches"]
    assert lines[1].endswith("| 1.00 (1.00 to 1.00) |")
