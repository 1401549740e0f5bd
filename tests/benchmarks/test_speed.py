# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on tiny hosts: methods do what the tables say of them, and a run ends in tables. No test is timed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.models.swin.modeling_swin import SwinLayer

from benchmarks import peers
from benchmarks import results as results_page
from benchmarks.speed import __main__ as speed
from benchmarks.speed import cells, epochs, full_hosts, kept, measuring, methods, report
from benchmarks.speed.cells import Cell
from benchmarks.speed.full_hosts import Fusion, fusion_inputs, labels, make_host, model_inputs, sharing_copy
from benchmarks.speed.glip_fusion import GlipFusionLayer
from benchmarks.speed.measuring import allocated, in_turns, measure
from benchmarks.speed.methods import METHODS, suitable
from benchmarks.speed.plot import draw
from benchmarks.speed.released import ReleasedFusion
from benchmarks.window_prompts import PromptedWindows
from peft_sdpt import SDPTLayer
from peft_sdpt.training import trained_parameters
from tests.helpers.backbones import counted
from tests.helpers.detectors import HOST_NAMES, make_attention
from tests.helpers.detectors import make_host as tiny_host

SIZE, TOKENS = (64, 64), 8
TABLE_TASKS = ("inference", "training")
MODELS = ("grounding-dino-tiny", "mm-grounding-dino-tiny")


@pytest.fixture(autouse=True)
def small_hosts(monkeypatch):
    """Hosts of the grid, small; the grid, short; rounds, as many as are asked for."""
    for key, name in zip(MODELS, HOST_NAMES, strict=True):
        monkeypatch.setitem(full_hosts.MODELS, key, lambda name=name: tiny_host(name))
    monkeypatch.setitem(full_hosts.FUSIONS, "glip-l-fusion", lambda: Fusion(GlipFusionLayer(16, 24, 96, 4)))
    monkeypatch.setitem(full_hosts.FUSION_SHAPES, "glip-l-fusion", (16, 24, (8, 16)))
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    monkeypatch.setattr(epochs, "NUM_IMAGES", 2)
    monkeypatch.setattr(epochs, "BATCH_SIZE", 1)
    grid = [
        Cell(MODELS[0], "attach"),
        Cell("small-host", "epoch"),
        *(
            Cell(host, task, SIZE, TOKENS)
            for host in (MODELS[0], "glip-l-fusion")
            for task in ("inference", "training")
        ),
    ]
    for module in (cells, speed, report):
        monkeypatch.setattr(module, "everything", lambda: grid)
    monkeypatch.setattr(speed, "affordable", lambda: [*grid[:3], Cell(MODELS[0], "training", SIZE, TOKENS, cells.FEW)])


def attached(method: str, host: str = MODELS[0]):
    torch.manual_seed(0)
    return METHODS[method].attach(sharing_copy(make_host(host, "cpu", torch.float32)))


@torch.no_grad()
def outputs(model, host: str = MODELS[0]) -> torch.Tensor:
    if host.endswith("-fusion"):
        return torch.cat([part.flatten() for part in model(**inputs_of(host))])
    result = model(**inputs_of(host))
    return torch.cat([result.logits[..., :TOKENS].flatten(), result.pred_boxes.flatten()])


def inputs_of(host: str):
    make = fusion_inputs if host.endswith("-fusion") else lambda _, *rest: model_inputs(*rest)
    return make(host, SIZE, TOKENS, "cpu", torch.float32)


# ---- methods


# Parameters that each is to train, by what their names have in them.
TRAINS = {
    "host": (),
    "sdpt": ("sdpt_prompts",),
    "sdpt-eager": ("sdpt_prompts",),
    "sdpt-gated": ("sdpt_prompts", "sdpt_gates"),
    "released": ("cpt_input",),
    "lora": ("lora_A", "lora_B"),
    "ia3": ("ia3_l",),
    "bitfit": (".bias",),
    "vpt": (".prompts",),
    "full": ("",),
}


@pytest.mark.parametrize("host", [*MODELS, "glip-l-fusion", "grounding-dino-fusion"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_says_and_every_part_of_it_is_reached(method, host):
    is_fusion = host.endswith("-fusion")
    if is_fusion and not METHODS[method].fuses:
        pytest.skip("not on fusion layers")
    model = attached(method, host).eval()
    trained = trained_parameters(model)
    assert bool(trained) == METHODS[method].trained
    for name in trained:
        assert any(part in name for part in TRAINS[method]), name
    if not trained:
        return
    inputs = inputs_of(host)
    if is_fusion:
        loss = sum(part.square().sum() for part in model(**inputs))
    else:
        result = model(**inputs)
        loss = result.logits.masked_fill(result.logits == -torch.inf, 0).sum() + result.pred_boxes.sum()
        loss = loss + result.enc_outputs_class.masked_fill(result.enc_outputs_class == -torch.inf, 0).sum()
    loss.backward()
    reached = [name for name, parameter in trained.items() if parameter.grad is not None]
    # Some of a whole host are never reached: pooler of the text encoder, mask token, unused norms.
    assert reached if method in ("full", "bitfit") else len(reached) >= 0.8 * len(trained)


@pytest.mark.parametrize("host", [*MODELS, "glip-l-fusion", "grounding-dino-fusion"])
def test_before_training_they_give_what_the_bare_host_gives(host):
    bare = outputs(make_host(host, "cpu", torch.float32), host)
    for method in suitable("training", host.endswith("-fusion")):
        got = outputs(attached(method, host).eval(), host)
        if method in ("host", "lora", "ia3", "bitfit", "full"):
            torch.testing.assert_close(got, bare, msg=method)
        else:  # prompts take a share of every softmax from the start
            assert got.shape == bare.shape and not torch.allclose(got, bare), method


@pytest.mark.parametrize("host", ["glip-l-fusion", "grounding-dino-fusion"])
def test_the_released_algorithm_is_sdpt_with_prompts_hidden_from_the_image(host):
    released, ours = attached("released", host).double(), attached("sdpt", host).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(host).items()}
    layer = next(module for module in ours.modules() if isinstance(module, SDPTLayer))
    layer.update_layer("default", dataclasses.replace(layer.sdpt_config["default"], image_attends_prompts=False))
    prompts = next(module for module in released.modules() if isinstance(module, ReleasedFusion)).cpt_input
    with torch.no_grad():
        prompts.copy_(layer.sdpt_prompts["default"][None])
        released.eval(), ours.eval()
        for got, wanted in zip(released(**inputs), ours(**inputs), strict=True):
            # Its inverse is one of single precision.
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_window_prompts_are_more_tokens_of_each_window(monkeypatch):
    """As if they were appended to the windows and their rows dropped, by the host's own attention."""
    block = next(module for module in tiny_host().modules() if isinstance(module, SwinLayer))
    attention, norm = block.attention, block.layernorm_before
    windows = norm(torch.randn(3, 16, norm.normalized_shape[0]))
    with torch.no_grad():
        prompted = PromptedWindows(attention, norm, num_tokens=2)
        longer = torch.cat([windows, norm(prompted.prompts).expand(3, -1, -1)], dim=1)
        bias = nn.functional.pad(attention.relative_position_bias(), (0, 2, 0, 2))
        monkeypatch.setattr(attention.relative_position_bias, "forward", lambda: bias)
        wanted = attention(longer)[0][:, :-2]
        monkeypatch.undo()
        torch.testing.assert_close(prompted(windows)[0], wanted)
        none = PromptedWindows(attention, norm, num_tokens=0)
        mask = torch.zeros(3, 16, 16).masked_fill(torch.rand(3, 16, 16) < 0.3, -100.0)
        torch.testing.assert_close(none(windows, mask)[0], attention(windows, mask)[0])


def test_copies_share_the_weights_and_what_is_trained_is_their_own():
    host = make_host(MODELS[0], "cpu", torch.float32)
    where = {name: parameter.data_ptr() for name, parameter in host.named_parameters()}
    frozen = sharing_copy(host)
    assert {name: parameter.data_ptr() for name, parameter in frozen.named_parameters()} == where
    assert not trained_parameters(frozen)
    assert all(parameter.requires_grad for parameter in host.parameters())
    full = METHODS["full"].attach(sharing_copy(host))
    assert not set(where.values()) & {parameter.data_ptr() for parameter in full.parameters()}
    bitfit = METHODS["bitfit"].attach(sharing_copy(host))
    shared = {name for name, parameter in bitfit.named_parameters() if parameter.data_ptr() == where[name]}
    assert shared == where.keys() - trained_parameters(bitfit).keys()
    assert not any("backbone" in name for name in trained_parameters(bitfit))


def test_lora_and_ia3_find_their_projections_and_none_of_the_backbones():
    for method, needed in (
        ("lora", (*peers.FUSION_QUERIES[:2], *peers.FUSION_OUTS[:2], *peers.ATTENTION)),
        ("ia3", (*peers.FUSION_QUERIES[:2], *peers.FUSION_VALUES[:2], "key", "value", "value_proj", "fc2")),
    ):
        names = list(trained_parameters(attached(method)))
        assert not any("backbone" in name for name in names)
        for projection in needed:
            assert any(f".{projection}." in name for name in names), (method, projection)


def test_full_hosts_have_the_parameters_of_the_published_ones():
    assert 172e6 < parameters("grounding-dino-tiny") < 173e6
    assert 232e6 < parameters("grounding-dino-base") < 234e6
    assert 171e6 < parameters("mm-grounding-dino-tiny") < 174e6


def parameters(name: str) -> int:
    swin = full_hosts.SWIN_BASE if name.endswith("base") else full_hosts.SWIN_TINY
    family = full_hosts.MMGroundingDinoConfig if name.startswith("mm") else full_hosts.GroundingDinoConfig
    model = {full_hosts.MMGroundingDinoConfig: full_hosts.MMGroundingDinoForObjectDetection}.get(
        family, full_hosts.GroundingDinoForObjectDetection
    )
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in full_hosts.detector(model, family, swin).parameters())


def test_a_prompt_has_as_many_tokens_as_are_asked_for_and_boxes_of_its_classes():
    for tokens in (8, 32, 256):
        inputs = model_inputs(SIZE, tokens, "cpu", torch.float32)
        assert inputs["input_ids"].shape == (1, tokens)
        (label,) = labels(inputs)
        assert len(label["boxes"]) == 10
        assert label["class_labels"].max() < (inputs["input_ids"] == full_hosts.PERIOD).sum()


def test_the_grid_has_what_the_tables_are_to_show(monkeypatch):
    monkeypatch.undo()
    keys = {cell.key for cell in cells.everything()}
    assert len(keys) == len(cells.everything()) == 2 + 8 + 2 + 24
    assert {cell.key for cell in cells.affordable()} < keys
    for cell in cells.affordable():
        assert set(cell.methods or ()) <= METHODS.keys()


# ---- measuring


def test_rounds_take_all_methods_in_turns():
    order = []
    subjects = {name: lambda name=name: lambda: order.append(name) for name in "abc"}
    seconds = in_turns(subjects, 4, "cpu")
    assert order == list("abcbcacababc")
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)


def test_memory_is_that_of_tensors_at_once():
    def run():
        for _ in range(3):
            torch.zeros(1000, 1000).add_(1)
        first = torch.zeros(1000, 1000)
        return first + 1

    # The numbers that are added and filled in are tensors, too.
    assert 8_000_000 <= allocated(run, "cpu") < 8_000_100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", [*MODELS, "glip-l-fusion"])
def test_a_training_cell_measures_all_that_the_tables_need(host, dtype):
    results = measure(Cell(host, "training", SIZE, TOKENS), 2, "cpu", dtype)
    assert tuple(results) == suitable("training", host.endswith("-fusion"))
    for name, result in results.items():
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
        assert result["peak_bytes"] > result["held_bytes"] > 0
        assert bool(result["trained"]) == bool(result["saved_bytes"]) == METHODS[name].trained
    if host in MODELS:
        # Both moments of AdamW, in the dtype of what is trained, and a copy that is trained.
        assert results["full"]["held_bytes"] > 2.9 * results["vpt"]["held_bytes"] - 1e5


def test_stored_features_are_there_before_epochs_are_timed():
    begun = []
    with counted() as count:
        results = epochs.measure_epochs(2, "cpu", lambda name: begun.append((name, sum(count.values()))))
        begun.append(("end", sum(count.values())))
    computed = {"cached": [], "sdpt": []}
    for (name, before), (_, after) in itertools.pairwise(begun):
        computed[name].append(after - before)
    # The pictures and the one prompt, in the epoch before the first that counts.
    assert computed == {"cached": [3, 0, 0], "sdpt": [4, 4]}
    assert {name: len(result["seconds"]) for name, result in results.items()} == {"sdpt": 2, "cached": 2}


def test_what_a_step_keeps_is_told_by_part(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["kept.py", "--size", "64", "64", "--tokens", "8", "--methods", "sdpt", "lora", "full"]
    )
    kept.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| MB | SDPT | LoRA | full fine-tuning |"
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [*kept.PARTS.values(), kept.REST, "total"]
    columns = [kept.kept(attached(name).train(), inputs_of(MODELS[0])) for name in ("sdpt", "lora", "full")]
    # Every part is found; only one that trains the backbones keeps anything in them.
    assert set(columns[2]) == {*kept.PARTS.values(), kept.REST}
    assert not any("backbone" in part for column in columns[:2] for part in column)
    assert columns[0].total() < columns[1].total() < columns[2].total()


# ---- the command


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["speed.py", *map(str, arguments)])
    try:
        speed.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def measured_cells():
    return {}


@pytest.fixture
def measured_once(measured_cells, monkeypatch):
    """The command measures a cell once for all tests, in two rounds."""
    monkeypatch.setattr(speed, "LEAST_REPEATS", 2)

    def measure_once(cell, repeats, device, dtype, tick):
        key = (cell, repeats, device, dtype)
        if key not in measured_cells:
            measured_cells[key] = measure(*key, tick)
        return measured_cells[key]

    monkeypatch.setattr(speed, "measure", measure_once)


@pytest.mark.usefixtures("measured_once")
def test_a_run_ends_in_results_tables_and_a_picture(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "--output_dir", tmp_path, "--all", "--device", "cpu") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cells"]) == 6
    for cell in results["cells"].values():
        for name, result in cell["methods"].items():
            assert len(result["seconds"]) == 2, name
    text = (tmp_path / "report.md").read_text()
    assert report.NOT_YET not in text.partition("### ")[2]
    for label in (METHODS[name].label for name in METHODS.keys() - {"cached"}):
        assert label in text
    assert "Nothing." in text and "Nothing." in capsys.readouterr().out
    picture = ElementTree.parse(tmp_path / "report.svg").getroot()
    words = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {"time", "peak memory", METHODS["sdpt"].label, METHODS["full"].label} <= words
    assert {cell["label"] for cell in results["cells"].values() if cell["task"] in TABLE_TASKS} <= words
    # A mark of each ratio of time, and one of memory: not of what a row is measured by.
    ratios = sum(len(cell["methods"]) - 1 for cell in results["cells"].values() if cell["task"] in TABLE_TASKS)
    marks = [element for element in picture.iter() if element.tag.endswith("use")]
    assert len(marks) >= 2 * ratios
    assert draw(results) == draw(results)

    page = tmp_path / "performance.md"
    page.write_text(f"a\n{results_page.BEGIN}\nold\n{results_page.END}\nb\n")
    monkeypatch.setattr(speed, "DOCS", tmp_path)
    for _ in range(2):
        assert command(monkeypatch, "--render", tmp_path / "results.json") == 0
        text = page.read_text()
        assert text.startswith("a\n") and text.endswith(f"{results_page.END}\nb\n") and "old" not in text
    assert (tmp_path / "performance-cpu.svg").exists()


@pytest.mark.usefixtures("measured_once")
def test_a_killed_run_goes_on_with_the_cells_that_it_lacks(tmp_path, monkeypatch, capsys):
    real, measured = speed.measure, []

    def interrupted(cell, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell.key)
        return real(cell, *rest)

    monkeypatch.setattr(speed, "measure", interrupted)
    arguments = ("--output_dir", tmp_path, "--device", "cpu")
    assert command(monkeypatch, *arguments) == 130
    before = json.loads((tmp_path / "results.json").read_text())
    assert list(before["cells"]) == [measured[0], "small-host-epoch", measured[1]]
    monkeypatch.setattr(speed, "measure", real)
    assert command(monkeypatch, *arguments) == 0
    after = json.loads((tmp_path / "results.json").read_text())
    assert len(after["cells"]) == 4 and before["cells"].items() <= after["cells"].items()
    # The few methods of the default, and what the grid has beside.
    assert after["cells"]["grounding-dino-tiny-64x64-8-training"]["methods"].keys() == {"sdpt", "lora"}
    text = (tmp_path / "report.md").read_text()
    assert "full fine-tuning" in text.partition("### Not measured here")[2]
    assert "- GLIP-L, 64x64, 8 tokens: all methods (inference and training)." in capsys.readouterr().out

    # `--all` measures that cell again, with all methods.
    assert command(monkeypatch, *arguments, "--all", "--only", "*tiny*training") == 0
    after = json.loads((tmp_path / "results.json").read_text())
    assert set(after["cells"]["grounding-dino-tiny-64x64-8-training"]["methods"]) == set(suitable("training", False))


@pytest.mark.usefixtures("measured_once")
def test_results_of_another_kind_are_not_mixed(tmp_path, monkeypatch, capsys):
    arguments = ("--output_dir", tmp_path, "--device", "cpu", "--only", "*attach")
    assert command(monkeypatch, *arguments) == 0
    assert command(monkeypatch, *arguments, "--dtype", "bfloat16") == 2
    assert "dtype float32; choose another --output_dir" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert command(monkeypatch, *arguments) == 2
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "4"], "--repeats 4: must be at least 5"),
        (["--only", "glop*"], "--only glop*: matches no cell; the cells are grounding"),
        (["--render", "nowhere.json"], "--render nowhere.json: no such file"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_flags(arguments, message, monkeypatch, capsys):
    assert command(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_ratios_are_of_the_same_round():
    """A machine that is ten times slower in one round changes no ratio."""
    cell = {"a": {"seconds": [1.0, 10.0, 1.0]}, "b": {"seconds": [2.0, 20.0, 2.0]}}
    assert report.ratios(cell, "a", "b") == (0.5, 0.5, 0.5)


def test_an_aim_that_is_missed_says_so():
    def cell(host, ours):
        methods = {
            name: {"seconds": [ours if name == "sdpt" else 1.0] * 5, "peak_bytes": 2, "held_bytes": 1}
            for name in METHODS
        }
        return {"host": host, "label": host, "task": "inference", "is_fusion": "fusion" in host, "methods": methods}

    def verdicts(*found):
        rows = report.aims({"cells": {c["host"] + str(i): c for i, c in enumerate(found)}}).splitlines()[2:]
        return [row.split(" | ")[-1].strip(" |") for row in rows]

    both = cell("grounding-dino-fusion", 0.5), cell("grounding-dino-fusion", 0.95)
    assert verdicts(*both)[0] == "in 1 of 2"
    assert verdicts(both[0])[:2] == ["yes", report.NOT_YET]
    assert verdicts(both[1])[0] == "no"


def test_saved_sizes_are_those_of_the_files(tmp_path):
    model = attached("sdpt")
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    assert methods.saved_bytes(model) == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert methods.saved_bytes(attached("full")) > 4 * sum(p.numel() for p in make_attention().parameters())
