# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The check for a GPU, on the CPU with tiny shapes: it passes, and it finds what is wrong."""

from __future__ import annotations

import json
import math
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import attention, correctness, measurements
from benchmarks.gpu_check.running import Run, Section
from benchmarks.results import DOCS
from benchmarks.speed import full_hosts
from benchmarks.speed.full_hosts import Fusion
from benchmarks.speed.glip_fusion import GlipFusionLayer
from peft_sdpt import fused_attention


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    return end.value.code


def rows_of(file) -> list[dict]:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


def endings(rows: list[dict]) -> dict[str, dict]:
    """How each section ended."""
    return {row["section"]: row for row in rows if "status" in row}


@pytest.mark.slow
def test_a_dry_run_passes_and_writes_all_that_is_measured(tmp_path, monkeypatch, capsys):
    before = sorted(DOCS.iterdir())
    # Several chunks also of tiny shapes.
    monkeypatch.setattr(fused_attention, "_LOGITS_AT_A_TIME", 2000)
    # Smaller layers, which are inverted faster.
    monkeypatch.setitem(full_hosts.FUSIONS, "grounding-dino-fusion", correctness.small_fusion)
    monkeypatch.setitem(full_hosts.FUSION_SHAPES, "grounding-dino-fusion", (32, 32, (8, 16)))
    monkeypatch.setitem(full_hosts.FUSIONS, "glip-l-fusion", lambda: Fusion(GlipFusionLayer(16, 24, 96, 4)))
    monkeypatch.setitem(full_hosts.FUSION_SHAPES, "glip-l-fusion", (16, 24, (8, 16)))
    assert command(monkeypatch, "--dry", "--output", tmp_path / "it.jsonl") == 0, capsys.readouterr().out
    assert sorted(DOCS.iterdir()) == before
    rows = rows_of(tmp_path / "it.jsonl")
    names = [section.name for section in gpu_check.SECTIONS]
    ends = endings(rows)
    assert list(ends) == names
    assert {row["status"] for row in ends.values()} == {"passed"}
    assert "13 of 13 sections passed" in capsys.readouterr().out

    def of(section: str, *fields: str) -> list[dict]:
        found = [row for row in rows if row["section"] == section and "status" not in row]
        assert found and all(set(fields) <= row.keys() for row in found), section
        return found

    (about,) = of("about", "device", "torch", "transformers", "peft", "peft_sdpt", "date", "threads")
    assert about["dry"] is True and about["torch"] == torch.__version__
    layers = of("layers_against_float64", "kind", "way", "gated")
    seen = {(row["kind"], row["dtype"], row["way"], row["gated"]) for row in layers if "errors" in row}
    assert len(seen) == 2 * 3 * 5 * 2
    # Outputs of image and text, and gradients of both, of their prompts, and of the gates.
    assert {len(row["errors"]) for row in layers if "errors" in row} == {7}
    assert len([row for row in layers if "dropout" in row]) == 2 * 4 * 2
    detectors = of("detectors")
    assert len(detectors) == 2 + 1 and "mixed_batch" in detectors[-1]
    assert len(of("synchronisations", "training", "waits")) == 2 * 3 + 2 * 3
    assert all(row["saved_bytes"].keys() == {"bfloat16", "autocast"} for row in of("autocast"))
    assert all(row["launches"] > 0 for row in of("kernels", "kind", "way", "training"))
    for row in of("layers", "layer", "size", "tokens", "dtype", "batch", "dropout", "training"):
        assert row["milliseconds"].keys() == row["peak_bytes"].keys()
        assert {"base model", "eager", "one chunk", "chosen", "gated, one chunk"} <= row["milliseconds"].keys()
        assert ("kernels" in row["milliseconds"]) == (row["dropout"] == 0)
        assert min(row["milliseconds"].values()) > 0 and min(row["peak_bytes"].values()) > 0
    for row in of("whole_models", "cell", "dtype"):
        assert {"host", "sdpt", "sdpt-eager", "sdpt-gated", "lora", "released"} == row["results"].keys()
        assert all(len(result["seconds"]) == 2 for result in row["results"].values())
    assert {row["graphs"] for row in of("compiled_dynamic", "image", "text")} == {1}


def off(outputs):
    return tuple(1.01 * output for output in outputs)


def wrong_kernels(monkeypatch):
    real = fused_attention.fused_bi_attention
    monkeypatch.setattr(fused_attention, "fused_bi_attention", lambda *args, **options: off(real(*args, **options)))


def wrong_device(monkeypatch):
    """The second detector of each pair, which is that of the device, has other prompts."""
    real, calls = correctness.tuned, []

    def tuned(host, **config):
        model = real(host, **config)
        calls.append(model)
        if len(calls) % 2 == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5 if parameter.requires_grad else 1.0)
        return model

    monkeypatch.setattr(correctness, "tuned", tuned)


def waiting_layer(monkeypatch):
    monkeypatch.setattr(correctness, "waits", lambda call, device: ["peft_sdpt/layer.py:1"])


def many_casts(monkeypatch):
    real = measurements.attend

    def attend(problem, way, gated):
        image, text = real(problem, way, gated)
        return image + sum(problem.image.to(torch.bfloat16).square().sum() for _ in range(4)), text

    monkeypatch.setattr(measurements, "attend", attend)


def wrong_replicas(monkeypatch):
    class Wrong(correctness.DistributedDataParallel):
        def forward(self, **inputs):
            return off(super().forward(**inputs))

    monkeypatch.setattr(correctness, "DistributedDataParallel", Wrong)


def wrong_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda **inputs: off(model(**inputs)))


def last_is_nan(tensors):
    return [*tensors[:-1], torch.full_like(tensors[-1], float("nan"))]


def poisoned_gradients(monkeypatch):
    """The last gradient of the compiled layer, of the replica, and of the second detector of each pair is nan."""
    real = correctness.gradients_of

    def gradients_of(model, call, inputs):
        found = real(model, call, inputs)
        return found if call is model else last_is_nan(found)

    monkeypatch.setattr(correctness, "gradients_of", gradients_of)
    real_results, calls = correctness._results, []

    def results(name, config, device):
        calls.append(name)
        found = real_results(name, config, device)
        return found if len(calls) % 2 else {**found, "gradients": last_is_nan(found["gradients"])}

    monkeypatch.setattr(correctness, "_results", results)


def poisoned_outputs(monkeypatch):
    """The last output of the compiled layer is nan."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda **inputs: last_is_nan(model(**inputs)))


@pytest.mark.parametrize(
    ("fault", "sections"),
    [
        (wrong_kernels, ["layers_against_float64"]),
        (wrong_device, ["detectors"]),
        (waiting_layer, ["synchronisations"]),
        (many_casts, ["autocast"]),
        (wrong_replicas, ["distributed"]),
        (wrong_compiler, ["compiled", "compiled_training", "cuda_graphs"]),
        (poisoned_gradients, ["detectors", "distributed", "compiled_training"]),
        (poisoned_outputs, ["compiled", "compiled_dynamic", "cuda_graphs"]),
    ],
)
def test_a_wrong_result_fails_its_section_and_the_others_go_on(fault, sections, tmp_path, monkeypatch, capsys):
    fault(monkeypatch)
    file = tmp_path / "it.jsonl"
    assert command(monkeypatch, "--dry", "--only", "about", *sections, "--output", file) == 1
    ends = endings(rows_of(file))
    assert ends["about"]["status"] == "passed"
    for section in sections:
        assert ends[section]["status"] == "failed" and ends[section]["faults"], ends[section]
    assert f"These did not pass: {', '.join(sections)}." in capsys.readouterr().out


def test_a_replica_is_freed_before_its_group(monkeypatch):
    """Otherwise about one run in a thousand hangs."""
    replicas, alive = [], []

    class Counted(correctness.DistributedDataParallel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            replicas.append(weakref.ref(self))

    real = torch.distributed.destroy_process_group

    def destroy():
        alive.extend(replica() for replica in replicas)
        real()

    monkeypatch.setattr(correctness, "DistributedDataParallel", Counted)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    run = Run("cpu", dry=True)
    correctness.distributed(run)
    assert alive == [None] and not run.faults


def endless(run):
    run.say(begun=True)
    while True:
        time.sleep(0.01)


def broken(run):
    raise RuntimeError("CUDA error: out of luck")


def wrong_and_endless(run):
    run.require(False, "wrong")
    endless(run)


def test_a_section_that_breaks_or_takes_too_long_ends_alone(tmp_path, monkeypatch):
    sections = [
        Section("endless", endless, 0.02),
        Section("wrong_and_endless", wrong_and_endless, 0.02),
        Section("broken", broken, 60),
        Section("good", lambda run: run.say(error=0.5, errors=[float("inf"), {"nan": float("nan")}]), 60),
    ]
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    assert command(monkeypatch, "--dry", "--output", tmp_path / "it.jsonl") == 1
    rows = rows_of(tmp_path / "it.jsonl")
    ends = endings(rows)
    assert [row["status"] for row in ends.values()] == ["stopped", "failed", "failed", "passed"]
    assert ends["endless"]["error"] == "it took longer than its budget of 0.4 s"
    assert ends["wrong_and_endless"]["faults"] == ["wrong"]
    assert ends["broken"]["error"] == "RuntimeError: CUDA error: out of luck" and "broken" in ends["broken"]["trace"]
    assert {"section": "good", "error": 0.5, "errors": ["inf", {"nan": "nan"}]} in rows


def test_logits_of_padding_are_left_out_and_others_that_are_not_finite_are_not():
    logits = torch.tensor([1.0, -torch.inf, torch.nan, torch.inf])
    found = correctness.flat(SimpleNamespace(logits=logits, pred_boxes=torch.zeros(1)))
    assert torch.equal(found.isfinite(), torch.tensor([True, True, False, False, True])) and found[1] == 0
    assert correctness.error(found, found) == math.inf


def test_lines_that_wait_are_named_without_the_folders_of_the_machine():
    assert correctness.in_package(correctness.__file__) == "benchmarks/gpu_check/correctness.py"
    assert correctness.in_package(torch.__file__) == "torch/__init__.py"
    assert correctness.in_package("<string>") == "<string>"


def test_correctness_comes_first_and_all_budgets_are_within_eight_minutes():
    names = [section.name for section in gpu_check.SECTIONS]
    assert names[:3] == ["about", "layers_against_float64", "detectors"]
    assert names.index("synchronisations") < names.index("layers") < names.index("whole_models")
    assert sum(section.seconds for section in gpu_check.SECTIONS) <= 470


@pytest.mark.parametrize(("way", "calls", "chunks"), [("kernels", 2, 0), ("chunks", 0, 20), ("one chunk", 0, 1)])
def test_ways_are_what_their_names_say(way, calls, chunks, monkeypatch):
    counts = {"kernels": 0, "chunks": 0}

    def counting(name, real):
        def counted(*args, **options):
            counts[name] += 1
            return real(*args, **options)

        return counted

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting("kernels", F.scaled_dot_product_attention))
    monkeypatch.setattr(fused_attention, "softmax_by_group", counting("chunks", fused_attention.softmax_by_group))
    problem = attention.make_problem("Grounding DINO", "cpu", 1, 20, 5, tiny=True)
    # One image token at a time: it has 4 heads and 5 text tokens and 10 prompts.
    monkeypatch.setattr(fused_attention, "_LOGITS_AT_A_TIME", 60)
    with torch.no_grad(), attention.use_way(way):
        attention.attend(problem, way, gated=False)
    assert counts == {"kernels": calls, "chunks": chunks}


def test_results_go_into_the_docs_only_after_a_whole_run_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "device_name", lambda device: "NVIDIA H100 80GB HBM3")

    def output(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, arguments)])
        return gpu_check.output_of(gpu_check.parse_args())

    assert output() == DOCS / "gpu-h100-80gb-hbm3.jsonl"
    assert output("--dry") is None and output("--only", "about") is None
    assert output("--dry", "--output", tmp_path / "a") == tmp_path / "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--dry", "--output", "nowhere/it.jsonl"], "--output nowhere/it.jsonl: "),
    ],
)
def test_bad_flags(arguments, message, monkeypatch, capsys):
    assert command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_default_file_that_cannot_be_written_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "output_of", lambda args: tmp_path / "nowhere" / "gpu.jsonl")
    assert command(monkeypatch, "--dry") == 2
    message = f"benchmarks.gpu_check: --output {tmp_path / 'nowhere' / 'gpu.jsonl'}: No such file or directory.\n"
    assert capsys.readouterr().err == message
