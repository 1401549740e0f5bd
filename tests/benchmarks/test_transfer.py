# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The transfer suite: what each method trains, which runs are made, and that a killed suite goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import asdict
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoProcessor

from benchmarks import EXAMPLES, runs
from benchmarks.results import BEGIN, END
from benchmarks.transfer import __main__ as suite
from benchmarks.transfer import grid, retention, running, tuning
from benchmarks.transfer.conditioning import make_ill_conditioned
from benchmarks.transfer.diagnosis import diagnose
from benchmarks.transfer.gate_rules import RULES as GATE_RULES
from benchmarks.transfer.grid import Cell, best_rate, leaders, measures_known, plan
from benchmarks.transfer.inverses import replace_inverses
from benchmarks.transfer.methods import METHODS
from benchmarks.transfer.one_text import text_computed_once
from benchmarks.transfer.plots import plots
from benchmarks.transfer.prompts import TransformerMap, _Drawn
from benchmarks.transfer.report import Runs, report
from benchmarks.transfer.retention import at_scales, has_known_names, known_classes, known_split
from benchmarks.transfer.running import load_host, run_cell
from benchmarks.transfer.tasks import Task
from benchmarks.transfer.tuning import Diverged, tune
from examples.pictograms import read_categories
from examples.pictograms.tasks import TASKS
from peft_sdpt import SDPTLayer
from peft_sdpt.attention import Prompts
from peft_sdpt.detection.grounding import class_prompt
from peft_sdpt.training import trained_parameters
from tests.helpers.main_job import reset_accelerate
from tests.helpers.patience import PATIENCE
from tests.helpers.small_tasks import write_small_task

HOST = str(EXAMPLES / "host")
NAMES = ["dog", "cat", "fire engine"]
FEW_KNOWN = known_split().subset([0, 1])


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return Task("few", write_small_task(tmp_path_factory.mktemp("few"), train=12, val=3, test=4))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(HOST)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two steps of two pictures."""
    reset_accelerate()
    monkeypatch.setattr(grid, "STEPS", 2)
    monkeypatch.setattr(grid, "STEPS_OF_ALL", 2)
    monkeypatch.setattr(tuning, "BATCH", 2)
    monkeypatch.setattr(running, "BATCH", 2)
    monkeypatch.setattr(running, "known_split", lambda: FEW_KNOWN)
    monkeypatch.setattr(grid, "RETENTION_TASKS", ("few", "one", "two"))
    # Warm-up starts at a rate of zero.
    monkeypatch.setattr(tuning, "WARM_UP", 0)


# ---- methods


def inputs_of(processor, names=NAMES):
    text = processor.tokenizer([class_prompt(names)], return_tensors="pt")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, **text}


def head_size(host):
    """Parameters outside the backbones, the projections that follow them and the fusion layers."""
    model = host.model
    outside = [model.backbone, model.text_backbone, model.input_proj_vision, model.text_projection]
    outside += [layer.fusion_layer for layer in model.encoder.layers]
    frozen = sum(parameter.numel() for module in outside for parameter in module.parameters())
    return sum(parameter.numel() for parameter in host.parameters()) - frozen


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_it_is_called_after(method, processor):
    torch.manual_seed(0)
    host = load_host(HOST, "cpu")
    total = sum(parameter.numel() for parameter in host.parameters())
    head = head_size(host)
    model = METHODS[method].attach(host, processor, NAMES, {})
    trained = trained_parameters(model)
    number = sum(parameter.numel() for parameter in trained.values())
    # Three fusion layers of width 512 over 128 and 128: twenty tokens each, and ten of what is as published.
    expected = {
        # Two directions of four heads have gates in each layer.
        "gated": 15360 + 24,
        "gated-more": 61440 + 24,
        "gated-lora-small": 38 * 768 + 24 + 77824 // 8,
        # In feed-forward networks: those of images, of text and of queries.
        "gated-lora": 40 * 768 + 24 + 3 * (77824 // 8 + 2 * (3 * (128 + 1024) + 3 * (128 + 512) + 2 * (128 + 512))),
        "sdpt-defaults": 15360,
        "sdpt": 15360,
        "sdpt-hidden": 15360,
        "sdpt-independent": 61440,
        "sdpt-more": 61440,
        # Of 512 dimensions two projections of 128 reach 256.
        "sdpt-reachable": 7680,
        "text-prompts": 7680,
        "image-prompts": 7680,
        "both-prompts": 15360,
        "learned-projections": 30720 + 3 * 2 * (512 + 1) * 128,
        "mudpt": 15360 + 2 * (128 + 1) * 128,
        # A block of width 128 with two norms around it and a linear map, in either direction.
        "mudpt-paper": 3 * 2 * 2 * 128 + 2 * (12 * 128 * 128 + 9 * 128 + 2 * 4 * 128 + (128 + 1) * 128),
        "spt": 7680,
        "published-recipe": 15360 + head,
        "lora-matched": 21248,
        # Rank 2: two projections of 128 and a feed-forward network of 1024 in each of three layers.
        "lora-image": 3 * 2 * (2 * 2 * 128 + 2 * (128 + 1024)),
        # The outputs of the projections and of fc1, and the inputs of fc2.
        "scales-image": 3 * (2 * 128 + 2 * 1024),
        "lora-outside": 77824,
        "full": total,
        "text-embeddings": len(processor.tokenizer(class_prompt(NAMES)).input_ids) * 384,
        "probe": len(processor.tokenizer(class_prompt(NAMES)).input_ids) * 128,
    }.get(method)
    assert number == expected if expected else 0 < number < 0.02 * total
    outputs = model(**inputs_of(processor))
    # Heads and boxes: something of what is trained is reached from either.
    (outputs.logits.nan_to_num(neginf=0.0).square().sum() + outputs.pred_boxes.sum()).backward()
    reached = [name for name, parameter in trained.items() if parameter.grad is not None and parameter.grad.any()]
    assert reached
    others = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all(model.get_parameter(name).grad is None for name in others)


@pytest.mark.parametrize(
    "method",
    [
        "text-embeddings",
        "probe",
        "bitfit",
        "lora",
        "lora-matched",
        "lora-image",
        "scales-image",
        "lora-outside",
        "full",
    ],
)
def test_these_start_as_the_host(method, processor):
    inputs = inputs_of(processor)
    with torch.no_grad():
        expected = load_host(HOST, "cpu").eval()(**inputs)
        found = METHODS[method].attach(load_host(HOST, "cpu"), processor, NAMES, {}).eval()(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["text-embeddings", "probe"])
def test_what_is_trained_for_one_prompt_is_refused_another(method, processor):
    model = METHODS[method].attach(load_host(HOST, "cpu"), processor, NAMES, {}).eval()
    with pytest.raises(ValueError, match="the prompt must have"):
        model(**inputs_of(processor, [*NAMES, "bee"]))


def test_prompts_of_one_side_are_seen_by_the_other_side_alone(processor):
    """Text tokens attend to image prompts, and image tokens to text prompts."""
    for kind, seen_by in (("image-prompts", 1), ("text-prompts", 0)):
        model = METHODS[kind].attach(load_host(HOST, "cpu"), processor, NAMES, {}).eval()
        fusion = model.model.encoder.layers[0].fusion_layer.attn
        inputs = {
            "vision_features": torch.randn(1, 9, 128),
            "text_features": torch.randn(1, 5, 128),
        }
        with torch.no_grad():
            changed = [pair[0] for pair in fusion(**inputs)]
            bare = [pair[0] for pair in fusion.layer(**inputs)]
            prompts = [Prompts(tokens) for tokens in fusion.make()]
        assert prompts[seen_by].tokens is None and prompts[1 - seen_by].tokens.shape == (20, 128)
        assert not torch.allclose(changed[seen_by], bare[seen_by], atol=1e-3)
        torch.testing.assert_close(changed[1 - seen_by], bare[1 - seen_by], rtol=0, atol=1e-5)


def test_a_map_of_mudpt_is_a_transformer_block_between_norms():
    torch.manual_seed(0)
    mapping = TransformerMap(128, 96)
    for parameter in mapping.parameters():  # so that no bias is zero and no norm the identity
        torch.nn.init.normal_(parameter, std=0.2)
    block = torch.nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0.0, activation=lambda x: x * torch.sigmoid(1.702 * x), norm_first=True
    )
    parts = {
        "self_attn": mapping.attention, "linear1": mapping.mlp[0], "linear2": mapping.mlp[2],
        "norm1": mapping.attention_norm, "norm2": mapping.mlp_norm,
    }  # fmt: skip
    for name, part in parts.items():
        block.get_submodule(name).load_state_dict(part.state_dict())
    layers = torch.randn(3, 2, 128)  # of each layer its tokens, which see one another alone
    expected = mapping.projection(mapping.last_norm(block(mapping.first_norm(layers).transpose(0, 1)))).transpose(0, 1)
    found = torch.stack([mapping(tokens) for tokens in layers])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_prompts_of_mudpt_are_coupled_both_ways_after_the_first_layer(processor):
    torch.manual_seed(0)
    model = METHODS["mudpt-paper"].attach(load_host(HOST, "cpu"), processor, NAMES, {})
    makes = [layer.fusion_layer.attn.make for layer in model.model.encoder.layers]
    assert all(make.maps is makes[0].maps for make in makes)
    for number, make in enumerate(makes):
        image, text = make()
        assert image.shape == text.shape == (2, 128)
        torch.testing.assert_close(image, make.own.image + make.maps[1](make.own.text))
        added = make.maps[0](make.own.image) if number else torch.zeros(2, 128)
        torch.testing.assert_close(text, make.own.text + added)
    # The earlier row, with linear maps, goes both ways in every layer.
    torch.manual_seed(0)
    model = METHODS["mudpt"].attach(load_host(HOST, "cpu"), processor, NAMES, {})
    for make in (layer.fusion_layer.attn.make for layer in model.model.encoder.layers):
        torch.testing.assert_close(make()[1], make.own.text + make.maps[0](make.own.image))


def test_prompts_of_spt_start_as_image_tokens_of_their_layer(processor):
    """Different rows of what reaches the layer in the bare host, none of them padding."""
    torch.manual_seed(0)
    inputs = inputs_of(processor)
    inputs = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    inputs["pixel_values"] = torch.randn(2, 3, 64, 64)
    inputs["pixel_mask"] = torch.ones(2, 64, 64, dtype=torch.long)
    inputs["pixel_mask"][1, :, 32:] = 0
    host = load_host(HOST, "cpu").eval()
    seen = []
    for layer in host.model.encoder.layers:
        attention = layer.fusion_layer.attn
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0], kwargs["vision_attention_mask"])), with_kwargs=True
        )
    with torch.no_grad():
        host(**inputs)
    method = METHODS["spt"]
    model = method.attach(load_host(HOST, "cpu"), processor, NAMES, {}).train()
    method.start(model, [(inputs, None)])
    assert model.training
    for layer, (tokens, padding) in zip(model.model.encoder.layers, seen, strict=True):
        fusion = layer.fusion_layer.attn
        assert padding[1].any() and "forward" not in vars(fusion)
        real = tokens[~padding]
        nearest = (fusion.make.image.detach()[:, None] - real).norm(dim=-1).min(dim=1)
        assert nearest.values.max() < 1e-4 and len(nearest.indices.unique()) == 20
        assert fusion.make.image.requires_grad and torch.is_grad_enabled()


def test_rows_are_drawn_uniformly_whatever_the_parts():
    torch.manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(2000):
        rows = _Drawn(3)
        for part in torch.arange(12.0)[:, None].split([1, 4, 7]):
            rows.add(part)
        drawn = rows.drawn().flatten().long()
        assert len(drawn.unique()) == 3
        counts[drawn] += 1
    assert (counts - 500).abs().max() < 80  # four standard deviations
    rows = _Drawn(3)
    rows.add(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="3 prompts need as many image tokens, got 2"):
        rows.drawn()


def test_the_published_recipe_trains_the_head_and_leaves_what_is_inverted(task, processor):
    torch.manual_seed(0)
    host = load_host(HOST, "cpu")
    before = {name: parameter.clone() for name, parameter in host.named_parameters()}
    data = task.load("train")
    model = METHODS["published-recipe"].attach(host, processor, data.class_names, {})
    layers = [module for module in model.modules() if isinstance(module, SDPTLayer)]
    inverses = [layer.inverse(side).clone() for layer in layers for side in range(2)]
    tokens = [layer.tokens().detach().clone() for layer in layers]
    tune(model, processor, data, steps=2, learning_rate=0.001, seed=0)
    after = {name.replace(".base_layer", ""): parameter for name, parameter in host.named_parameters()}
    moved = {name for name, parameter in before.items() if not torch.equal(parameter, after[name])}
    for part in ("text_enhancer_layer", "deformable_layer", "decoder.layers", "bbox_embed", "class_embed"):
        assert any(part in name for name in moved)
    for part in ("backbone", "input_proj_vision", "text_projection", "fusion_layer"):
        assert not any(part in name for name in moved)
    assert all(
        torch.equal(*pair) for pair in zip(inverses, [la.inverse(s) for la in layers for s in (0, 1)], strict=True)
    )
    assert not any(torch.equal(old, layer.tokens()) for old, layer in zip(tokens, layers, strict=True))


# ---- a run


def test_a_cell_is_the_same_twice_and_moves_what_it_trains(task):
    cell = Cell("few", "sdpt", 0.1)
    one, other = (run_cell(cell, task, HOST, "cpu") for _ in range(2))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert len(one["losses"]) == 2 and one["trained"] == 15360 and 0 < one["pictures"] <= 12
    assert 0 <= one["AP"] <= one["AP50"] <= 1
    assert len(one["start"]) == len(one["end"]) == 3 and one["start"] != one["end"]
    still = run_cell(dataclasses.replace(cell, learning_rate=1e-9), task, HOST, "cpu")
    assert still["losses"][0] == one["losses"][0] and still["losses"][1] != one["losses"][1]


def test_a_frozen_text_encoder_is_called_once_a_prompt(processor):
    calls = []
    for method, expected in (("sdpt", 2), ("full", 4)):
        model = METHODS[method].attach(load_host(HOST, "cpu"), processor, NAMES, {}).eval()
        encoder = next(module for name, module in model.named_modules() if name.endswith(".text_backbone"))
        calls.clear()
        encoder.embeddings.register_forward_hook(lambda *_: calls.append(1))
        one, other = inputs_of(processor), inputs_of(processor, ["bee"])
        two = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in one.items()}
        with torch.no_grad():
            expected_logits = [model(**inputs).logits for inputs in (one, two, other)]
        calls.clear()
        with torch.no_grad(), text_computed_once(model):
            found = [model(**inputs).logits for inputs in (one, two, other, one)]
        assert len(calls) == expected
        for a, b in zip(found, expected_logits, strict=False):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert "forward" not in vars(encoder)


def test_the_text_that_is_kept_knows_no_dropout(processor):
    host = load_host(HOST, "cpu")
    for module in host.model.text_backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    kept = []
    for train in (True, False):
        host.train(train)
        with text_computed_once(host):
            inputs = inputs_of(processor)
            asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
            kept.append(host.model.text_backbone(**asked).last_hidden_state)
            assert host.model.text_backbone.training is train
    assert torch.equal(*kept)
    assert not torch.equal(host.train().model.text_backbone(**asked).last_hidden_state, kept[0])


def test_other_inverses(processor):
    """A ridge that is nearly nothing is the full inverse; scaled prompts are as long as layer-normed tokens."""
    model = METHODS["sdpt"].attach(load_host(HOST, "cpu"), processor, NAMES, {})
    layer = next(module for module in model.modules() if isinstance(module, SDPTLayer))
    full = [layer.inverse(side).clone() for side in range(2)]
    replace_inverses(model, "ridge 1e-9")
    for side, before in enumerate(full):
        torch.testing.assert_close(layer.inverse(side), before, rtol=0, atol=1e-5)
    replace_inverses(model, "ridge 0.3")
    assert all(layer.inverse(side).norm() < 0.9 * before.norm() for side, before in enumerate(full))
    replace_inverses(model, "scaled")
    with torch.no_grad():
        for prompts in layer.eval().input_prompts(["default"]):
            assert abs(prompts.tokens.norm(dim=-1).mean() - 128**0.5) < 1.5
    with pytest.raises(ValueError, match="rule='none': must be one of"):
        replace_inverses(model, "none")
    # The field that asks for it.
    fields = {"inverse": "scaled", "num_virtual_tokens": 3}
    model = METHODS["sdpt"].attach(load_host(HOST, "cpu"), processor, NAMES, fields)
    assert sum(parameter.numel() for parameter in trained_parameters(model).values()) == 3 * 3 * 512


def test_an_inverse_of_one_modality_and_a_quiet_start(processor):
    host = make_ill_conditioned(load_host(HOST, "cpu"), 300.0)
    model = METHODS["sdpt"].attach(host, processor, NAMES, {})
    layer = next(module for module in model.modules() if isinstance(module, SDPTLayer))
    full = [layer.inverse(side).clone() for side in range(2)]
    for place, modality in enumerate(("images", "text")):
        replace_inverses(model, f"0.1 of {modality} alone")
        new = [layer.inverse(side) for side in range(2)]
        assert new[place].norm() < 0.5 * full[place].norm() and torch.equal(new[1 - place], full[1 - place])
    replace_inverses(model, "0.1 of neither alone")  # which is the full one of both
    torch.manual_seed(0)
    replace_inverses(model, "quiet start")
    torch.manual_seed(0)
    with torch.no_grad():
        for prompts in layer.eval().input_prompts(["default"]):
            torch.testing.assert_close(prompts.tokens, torch.randn(10, 128), rtol=0, atol=0.05)


def test_other_gates_and_sizes_of_tokens(processor):
    """Each rule starts as the base model, and its gates stand for other factors then; each setting can be run."""
    inputs = inputs_of(processor)

    def boxes(model):
        with torch.no_grad():
            return model.eval()(**inputs).pred_boxes

    def attached(**fields):
        torch.manual_seed(0)
        return METHODS["gated"].attach(load_host(HOST, "cpu"), processor, NAMES, fields)

    bare, found = boxes(load_host(HOST, "cpu")), {}
    for rule in (None, *GATE_RULES):
        model = attached(**({} if rule is None else {"gate": rule}))
        assert torch.equal(boxes(model), bare)
        layers = [module for module in model.modules() if isinstance(module, SDPTLayer)]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                layer.sdpt_gates["default"].copy_(torch.linspace(-1, 2, 8).view(2, 1, 4) * (number + 1))
        model.train(), model.eval()
        found[rule] = boxes(model)
        assert layers[0].gate_factors("default").shape == (2, 1, 4)
    one_per_layer = layers[0].gate_factors("default")
    assert torch.equal(one_per_layer, one_per_layer[..., :1].expand(2, 1, 4))
    pairs = itertools.combinations([bare, *found.values()], 2)
    assert all((one - other).abs().max() > 1e-5 for one, other in pairs)
    # Tokens of another size differ in nothing else.
    usual, small = attached(), attached(**{"std of initial tokens": 0.5})
    for one, other in zip(usual.modules(), small.modules(), strict=True):
        if isinstance(one, SDPTLayer):
            tokens = one.sdpt_prompts["default"], other.sdpt_prompts["default"]
            assert tokens[1].std().item() == pytest.approx(0.5) and tokens[0].std().item() == pytest.approx(4, rel=0.03)
            torch.testing.assert_close(tokens[0] / tokens[0].std(), tokens[1] / tokens[1].std())
    cells = grid.tried_cells(["one"], ["gated", "gated-more"])
    assert {cell.method for cell in cells} == {"gated", "gated-more"} and {cell.split for cell in cells} == {"val"}
    assert len({cell.key for cell in cells}) == len(cells) > 10
    for cell in cells:
        METHODS[cell.method].attach(load_host(HOST, "cpu"), processor, NAMES, dict(cell.fields))


def test_what_prompts_do(processor):
    model = METHODS["sdpt-defaults"].attach(load_host(HOST, "cpu"), processor, NAMES, {}).eval()
    inputs = inputs_of(processor)

    def loss(outputs, labels):
        return outputs.pred_boxes.square().sum() * labels[0]["weight"]

    batch = (inputs, [{"weight": torch.tensor(2.0)}])
    found = diagnose(model, [batch, batch], loss)
    layers = [module for module in model.modules() if isinstance(module, SDPTLayer)]
    assert len(found) == len(layers) == 3 and model.training is False
    once = loss(model(**inputs), batch[1])
    gradients = torch.autograd.grad(once, [layer.sdpt_prompts["default"] for layer in layers])
    for row, layer, gradient in zip(found, layers, gradients, strict=True):
        assert row["gradient"] == pytest.approx(gradient.norm().item(), rel=1e-3)
        assert row["unreached"] == 0  # coordinates are of nothing else
        with torch.no_grad():
            lengths = [prompts.tokens.norm(dim=-1).mean().item() for prompts in layer.input_prompts(["default"])]
        assert [row["image_prompts"], row["text_prompts"]] == pytest.approx(lengths)
        assert 0 < row["image_attention"] < 1 and 0 < row["text_attention"] < 1
    # Prompts that nothing attends to, and tokens that nothing reaches.
    model = METHODS["sdpt"].attach(load_host(HOST, "cpu"), processor, NAMES, {"image_attends_prompts": False})
    for row in diagnose(model, [batch], loss):
        assert row["image_attention"] == 0 < row["text_attention"] and row["unreached"] == pytest.approx(0.5, abs=0.05)


def test_an_ill_conditioned_host_computes_the_same(processor):
    inputs = inputs_of(processor)
    with torch.no_grad():
        expected = load_host(HOST, "cpu").double().eval()(**{**inputs, "pixel_values": inputs["pixel_values"].double()})
        host = make_ill_conditioned(load_host(HOST, "cpu").double(), 300.0).eval()
        found = host(**{**inputs, "pixel_values": inputs["pixel_values"].double()})
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-9)
    for layer in (layer.fusion_layer.attn for layer in host.model.encoder.layers):
        assert 150 < torch.linalg.cond(layer.vision_proj.weight) < 3000


def test_zero_shot_is_the_bare_host(task):
    result = run_cell(Cell("few", "zero-shot", shots=0), task, HOST, "cpu")
    assert set(result) == {"AP", "AP50", "AP75", "known"}


def test_prototypes_are_made_of_the_training_pictures(task):
    default, prototypes = (
        run_cell(Cell("few", "sdpt", 0.1, fields=fields), task, HOST, "cpu")
        for fields in ((), (("init_weights", "prototypes"),))
    )
    assert default["losses"][0] != prototypes["losses"][0]


def test_a_run_that_diverges_counts_as_nothing_found(task, processor):
    result = run_cell(Cell("few", "sdpt", 1e30), task, HOST, "cpu")
    assert result["diverged"] >= 1 and result["AP"] == 0 and result["known"] == 0
    model = METHODS["sdpt"].attach(load_host(HOST, "cpu"), processor, task.load("train").class_names, {})
    with pytest.raises(Diverged):
        tune(model, processor, task.load("train"), steps=2, learning_rate=1e30, seed=0)


# ---- names that the base model knew


def test_known_names_are_of_pre_training_and_of_no_task():
    classes = known_classes()
    names = [read_categories()[index] for index in classes]
    assert len(set(classes)) == 40 and classes == known_classes() and all(name.seen for name in names)
    assert not {index for each in TASKS.values() for index in each.classes()} & set(classes)
    data = known_split()
    assert len(data) == retention.NUM_IMAGES and data.class_names == [name.name for name in names]
    assert set(data.sizes) == {(96, 96)}
    # All of them are there, so that the AP is of all.
    assert {label for labels in data.labels for label in labels} == set(range(40))


def test_only_the_small_base_model_has_known_names(tmp_path, monkeypatch):
    assert has_known_names(HOST)
    monkeypatch.chdir(EXAMPLES)
    assert has_known_names("host")
    assert not has_known_names(str(tmp_path)) and not has_known_names("IDEA-Research/grounding-dino-tiny")


def test_runs_of_the_first_seed_measure_known_names(task):
    cell = Cell("few", "sdpt", 0.001)
    result = run_cell(cell, task, HOST, "cpu")
    # Known names are measured at the size of pre-training, and the task at its own.
    large = run_cell(Cell("few", "zero-shot", shots=0), dataclasses.replace(task, image_size=128), HOST, "cpu")
    bare = run_cell(Cell("few", "zero-shot", shots=0), task, HOST, "cpu")
    assert large["AP"] != bare["AP"] and large["known"] == bare["known"] > 0.5
    assert 0 < result["known"] <= 1 and "scaled" not in result  # there are no gates
    for other in (
        {"seed": 1}, {"task": "another"}, {"shots": 5}, {"shots": None}, {"split": "val"}, {"times": 3},
        {"condition": 30.0}, {"fields": (("num_virtual_tokens", 5),)},
    ):  # fmt: skip
        assert not measures_known(dataclasses.replace(cell, **other))
    # One of those: seed 1.
    assert "known" not in run_cell(dataclasses.replace(cell, seed=1), task, HOST, "cpu")


@pytest.mark.parametrize("method", ["text-embeddings", "probe"])
def test_what_is_trained_for_one_prompt_has_no_known_names(task, method):
    result = run_cell(Cell("few", method, 0.001), task, HOST, "cpu")
    assert result["known"] is None and result["AP"] >= 0


class Gated(torch.nn.Module):
    """A model with one gate, whose scale is noted."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Module()
        self.layer.sdpt_gates = torch.nn.ParameterDict({"default": torch.zeros(1)})
        self.scales = []

    def set_scale(self, name, scale):
        assert name == "default"
        self.scales.append(scale)


def test_gates_are_scaled_and_set_back():
    model = Gated()
    assert at_scales(model, lambda: model.scales[-1] + 1) == {"0.4": 1.4, "0.7": 1.7}
    assert model.scales == [0.4, 0.7, 1.0]
    with pytest.raises(ZeroDivisionError):
        at_scales(model, lambda: 1 / 0)
    assert model.scales[-1] == 1.0
    model.layer.sdpt_gates.clear()  # a scale without gates does nothing
    assert at_scales(model, lambda: 0) == {} and at_scales(torch.nn.Linear(1, 1), lambda: 0) == {}


def test_a_run_with_gates_keeps_pairs_of_task_and_known_names(task, monkeypatch):
    monkeypatch.setattr(running, "at_scales", lambda _, measure: {"0.4": measure()})
    result = run_cell(Cell("few", "sdpt", 0.001), task, HOST, "cpu")
    assert result["scaled"] == {"0.4": (result["AP"], result["known"])}


def test_runs_without_known_names_are_repeated_once():
    tasks, methods = ["one"], ["sdpt", "text-embeddings"]
    results: dict = {}
    for _ in range(3):
        results |= measured(plan(tasks, methods, 2, results))
    assert not [cell for cell in plan(tasks, methods, 2, results) if cell.retention]
    again = [cell for cell in plan(tasks, methods, 2, results, True) if cell.retention]
    # Not the one that replaces the names.
    assert [cell.method for cell in again] == ["zero-shot", "sdpt"] and not any(cell.seed for cell in again)
    assert [cell.key for cell in again] == [
        "one zero-shot retention test",
        f"one sdpt retention {again[1].learning_rate} 10 shots seed 0 test",
    ]
    assert all(grid.measures_known(cell) and not grid.is_diagnosed(cell) for cell in again)
    # The plan stays when they are measured, and it has none of them if the runs have measured it themselves.
    results |= {cell.key: {**measured([cell])[cell.key], "known": 0.5} for cell in again}
    whole = plan(tasks, methods, 2, results, True)
    assert all(cell.key in results for cell in whole) and [cell for cell in whole if cell.retention] == again
    for cell in whole:
        results[cell.key]["known"] = 0.5
    assert not [cell for cell in plan(tasks, methods, 2, results, True) if cell.retention]


def test_known_names_are_in_the_report_and_in_a_plot():
    tasks, methods = ["one", "two"], ["sdpt", "lora", "text-embeddings"]
    results = {"machine": dict.fromkeys(("host", "torch", "transformers", "peft", "peft_sdpt"), "x")}
    results |= {"tasks": tasks, "methods": methods, "seeds": 1, "retention": True, "cells": {}}
    for _ in range(3):
        for cell in plan(tasks, methods, 1, results["cells"], True):
            values = {**asdict(cell), **measured([cell])[cell.key]}
            # Runs of the first method do not have it, so that these are repeated.
            if measures_known(cell) and (cell.method != "sdpt" or cell.retention):
                values["known"] = None if cell.method == "text-embeddings" else 0.75 + 0.1 * (cell.task == "two")
                values["AP"] = 0.25
                if cell.method == "sdpt":
                    values["scaled"] = {"0.4": (0.1, 0.9), "0.7": (0.2, 0.8)}
            results["cells"].setdefault(cell.key, values)
    text = report(results)
    assert "more are known to be missing" not in text
    assert "| method | one | known names after one | two | known names after two |" in text
    assert "| zero-shot | 25.0 | 75.0 | 25.0 | 85.0 |" in text
    assert "| SDPT, published | 25.0 | 75.0 | 25.0 | 85.0 |" in text
    assert "| SDPT, published | 10.0 | 90.0 | 20.0 | 80.0 | 25.0 | 80.0 |" in text and text.count("0.0 | 90.0") == 1
    drawn = plots(results)["transfer-retention.svg"]
    shown = {
        "".join(each.itertext()).strip() for each in ElementTree.fromstring(drawn).iter() if each.tag.endswith("text")
    }
    assert {"zero-shot", "SDPT, published", "LoRA, r = 8"} <= shown and "class-text embeddings" not in shown
    # Before one of them is measured, its row has a gap, and it has no point.
    del results["cells"][Cell("two", "lora", results_rate(results, "lora")).key]
    assert (
        "| LoRA, r = 8 | 25.0 | 75.0 |  |  |" in report(results)
        and "LoRA, r = 8" not in plots(results)["transfer-retention.svg"]
    )
    # Earlier results say nothing of it.
    del results["retention"]
    assert "known names" not in report(results) and "transfer-retention.svg" not in plots(results)


def results_rate(results, method):
    return best_rate(results["tasks"][0], method, results["cells"])


@pytest.mark.parametrize(
    ("method", "rate", "tokens", "others"),
    [
        ("sdpt-lora", 0.1, 15360, 77824),
        ("gated-lora", 0.3, 40 * 768 + 24, 69120),
        ("learned-projections", 0.1, 30720, 3 * 2 * (512 + 1) * 128),
        ("mudpt", 0.1, 15360, 2 * (128 + 1) * 128),
        ("mudpt-paper", 0.1, 3 * 2 * 2 * 128, 2 * (12 * 128 * 128 + 9 * 128 + 2 * 4 * 128 + (128 + 1) * 128)),
    ],
)
def test_tokens_have_a_rate_of_their_own_beside_weights(task, monkeypatch, method, rate, tokens, others):
    groups = []

    class Spy(torch.optim.AdamW):
        def __init__(self, parameters, **kwargs):
            super().__init__(parameters, **kwargs)
            groups.extend((group["lr"], sum(p.numel() for p in group["params"])) for group in self.param_groups)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    run_cell(Cell("few", method, 0.001), task, HOST, "cpu")
    assert groups == [(pytest.approx(rate), tokens), (0.001, others)]


# ---- which runs


def measured(cells, value=lambda cell: 0.5):
    return {cell.key: {"AP": value(cell), "AP50": 0.6, "AP75": 0.4, "trained": 7, "on": "n"} for cell in cells}


def test_rates_are_chosen_before_methods_are_compared():
    tasks, methods = ["one", "two"], ["sdpt", "lora", "full"]
    first = plan(tasks, methods, 2, {})
    assert [cell.task for cell in first if cell.method == "zero-shot"] == tasks
    rates = [cell for cell in first if cell.method != "zero-shot"]
    assert len(rates) == 4 * len(methods) and all(cell.split == "val" and cell.task == "one" for cell in rates)
    # Of equals the first, and the best where one is better.
    results = measured(first, lambda cell: 0.9 if cell.learning_rate in (0.3, 0.01) else 0.1)
    assert best_rate("one", "sdpt", results) == 0.3 and best_rate("one", "lora", results) == 0.01
    assert best_rate("one", "full", results) == METHODS["full"].rates[0]
    assert best_rate("one", "bitfit", results) is None

    second = plan(tasks, methods, 2, results)
    assert second[: len(first)] == first
    compared = [c for c in second[len(first) :] if c.shots == grid.SHOTS and not c.fields and c.method != "sdpt"]
    assert {(c.task, c.method, c.seed) for c in compared} >= {
        (t, m, s) for t in tasks for m in methods[1:] for s in (0, 1)
    }
    assert all(cell.split == "test" for cell in second[len(first) :])
    assert not [cell for cell in second if cell.shots in (1, 5, None)]
    third = plan(tasks, methods, 2, measured(second) | results)
    assert {cell.shots for cell in third if cell not in second} == {1, 5, None}
    assert {cell.seed for cell in third if cell.shots == 1} == {0, 1}
    # With the first seed: all pictures, more steps, rules that the config does not have.
    rare = [c for c in third if c.shots is None or c.times > 1 or "inverse" in dict(c.fields)]
    assert rare and not any(cell.seed for cell in rare)
    # The runs of the main table first, then those of one seed before the next.
    main = [c for c in third if not c.fields and c.condition is None and c.times == 1 and not c.retention]
    main = [c for c in main if c.shots == grid.SHOTS or c.method == "zero-shot"]
    order = [(cell not in main, cell.seed) for cell in third]
    assert main and order == sorted(order) and len(main) < len(third)
    assert len({cell.key for cell in third}) == len(third)


def test_the_leaders_are_ours_and_the_best_others():
    rates = {grid.OURS: 0.1, "lora": 0.1, "full": 0.1, "bitfit": 0.1, "probe": 0.1}
    good = {"lora": 0.3, "full": 0.9, "bitfit": 0.5, "probe": 0.4, grid.OURS: 0.1}
    cells = grid.compare_cells(["one"], rates, 2, [grid.SHOTS])
    results = measured(cells, lambda c: good[c.method])
    assert leaders(["one"], rates, results) == [grid.OURS, "full", "bitfit", "probe"]
    assert leaders(["one"], rates, measured(cells[1:])) is None
    del rates[grid.OURS]
    assert leaders(["one"], rates, results) == ["full", "bitfit", "probe", "lora"]


def test_inverses_are_compared_on_harder_hosts_at_rates_of_their_method():
    cells = grid.condition_cells(["one"], ["lora", "sdpt", grid.UNGATED], 2)
    assert {cell.condition for cell in cells} == set(grid.CONDITIONS)
    rates = {name: {cell.learning_rate for cell in cells if cell.method == name} for name in ("sdpt", grid.UNGATED)}
    assert rates == {"sdpt": {0.03, 0.1, 0.3}, grid.UNGATED: {0.1, 0.3}}
    # What the config has, with every seed; other rules with the first, at one rate.
    assert {cell.seed for cell in cells if "pinv_rtol" in dict(cell.fields)} == {0, 1}
    assert {(cell.seed, cell.learning_rate) for cell in cells if "inverse" in dict(cell.fields)} == {(0, 0.3)}
    assert grid.condition_cells(["one"], ["lora"], 2) == []


def test_longer_runs_and_what_prompts_do_are_in_the_report():
    look = {"image_prompts": 6.0, "text_prompts": 5.0, "image_attention": 0.05, "text_attention": 0.025}
    look |= {"image_tokens": 11.0, "text_tokens": 12.0}
    rows = [{**look, "gradient": 0.001, "unreached": 0.5}] * 3
    results = {"machine": {"host": "h", "torch": "", "transformers": "", "peft": "", "peft_sdpt": ""}}
    results |= {"tasks": ["one"], "methods": ["sdpt", grid.OURS, grid.UNGATED], "seeds": 2, "cells": {}}
    for _ in range(2):  # rates, and then the rest
        planned = plan(["one"], results["methods"], 2, results["cells"])
        results["cells"] |= measured(planned, lambda cell: 0.75 if cell.times > 1 else 0.5 * cell.times)
    for cell in planned:
        if cell.method in grid.DIAGNOSED and not cell.fields:
            results["cells"][cell.key] |= {"start": rows, "end": [{**row, "image_prompts": 40.0} for row in rows]}
    assert {cell.steps for cell in planned if cell.times > 1} == {3 * grid.STEPS}
    text = report({**results, "cells": {cell.key: {**asdict(cell), **results["cells"][cell.key]} for cell in planned}})
    assert "| SDPT, defaults | 50.0 → 75.0 |" in text and "| SDPT without gates | 50.0 → 75.0 |" in text
    assert "| uniform | 12.5 | 25.0 | 50.0 |" in text
    # What the config has at each rate that a method has, with both seeds; other rules at one, with the first.
    for row in (
        "30 times worse | SDPT, published | pinv_rtol=0.03 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0",
        "30 times worse | SDPT, published | scaled |  |  | 50.0",
        "300 times worse | SDPT without gates | pinv_rtol=None |  | 50.0 ± 0.0 | 50.0 ± 0.0",
    ):
        assert f"| {row} |" in text
    shown = "11.0 → 11.0 | 6.0 → 40.0 | 12.0 → 12.0 | 5.0 → 5.0 | 5.0% → 5.0% | 2.5% → 2.5%"
    shown += " | 0.0010 → 0.0010 | 50% → 50%"
    for label in ("SDPT, published", "SDPT without gates", "SDPT, published, condition 300 times worse"):
        assert all(f"| one | {label} | {layer} | {shown} |" in text for layer in range(3))


def test_a_mean_is_of_the_seeds_that_all_tasks_have():
    cells = {}
    for task, seed, value in [("one", 0, 0.2), ("one", 1, 0.4), ("one", 2, 0.9), ("two", 0, 0.4), ("two", 1, 0.8)]:
        cell = Cell(task, "lora", 0.003, seed=seed)
        cells[cell.key] = {**asdict(cell), "AP": value}
    for cell in grid.rates_cells("one", ["lora"]):
        cells[cell.key] = {**asdict(cell), "AP": float(cell.learning_rate == 0.003)}
    runs = Runs({"cells": cells, "tasks": ["one", "two"], "seeds": 3, "methods": ["lora"]})
    assert runs.values("one", "lora") == [0.2, 0.4, 0.9]
    assert runs.over_tasks("lora") == pytest.approx([0.3, 0.6])
    assert runs.over_tasks("bitfit") == []


# ---- the command


class Pool:
    """In this process, one after the other."""

    def __init__(self, *_):
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def command(monkeypatch, tmp_path, task):
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(grid, "ABLATIONS", {"num_virtual_tokens": (2,)})
    monkeypatch.setattr(grid, "FEWER", (1,))
    monkeypatch.setattr(grid, "CONDITIONS", (30.0,))
    monkeypatch.setattr(grid, "INVERSES", {"sdpt": ((), (("inverse", "scaled"),))})
    monkeypatch.setattr(grid, "CONDITION_RATES", (0.03,))
    monkeypatch.setattr(grid, "STARTS", ((), (("init_weights", "prototypes"),)))
    monkeypatch.setattr(grid, "PARTS", (0.5,))

    def run(*flags):
        arguments = ["--folders", task.folder, "--no_built_in", "--seeds", 1, "--num_processes", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["suite", "--output_dir", *map(str, [tmp_path, *arguments])])
        try:
            suite.main()
        except SystemExit as end:
            return end.code
        return 0

    return run


def test_a_killed_suite_goes_on_and_ends_in_tables_and_pictures(command, monkeypatch, tmp_path, capsys):
    made = []

    def run_some(cell, *_):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(cell.key)
        return {"AP": 0.25, "AP50": 0.5, "AP75": 0.2, "trained": 5}

    monkeypatch.setattr(suite, "run_cell", run_some)
    monkeypatch.setattr(runs, "device_name", lambda device: "one machine")
    assert command("--methods", "sdpt", "lora") == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["cells"]) == made[:3]

    def run_rest(cell, *_):
        made.append(cell.key)
        return {"AP": 0.25, "AP50": 0.5, "AP75": 0.2, "trained": 5}

    monkeypatch.setattr(suite, "run_cell", run_rest)
    # On another machine: a run says where it was made.
    monkeypatch.setattr(runs, "device_name", lambda device: "another")
    assert command("--methods", "sdpt", "lora") == 0
    assert len(made) == len(set(made))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cells"]) == len(made)
    text = (tmp_path / "report.md").read_text()
    assert f"{len(made)} runs (3 on one machine, {len(made) - 3} on another).\n" in text
    assert "more are known to be missing" not in text and "| SDPT, published | 5 |" in text and "25.0" in text
    for name in ("transfer-parameters.svg", "transfer-shots.svg"):
        assert ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")
    assert plots(results) == plots(results)

    # Another host, or other versions, are another comparison.
    results["machine"]["torch"] = "0"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert command("--methods", "sdpt") == 2
    assert "was measured with torch 0" in capsys.readouterr().err


def test_a_suite_of_real_runs(command, monkeypatch, tmp_path):
    """Every kind of run once, on pictures."""
    monkeypatch.setattr(
        "benchmarks.transfer.grid.METHODS",
        {name: dataclasses.replace(METHODS[name], rates=METHODS[name].rates[:1]) for name in METHODS},
    )
    assert command("--methods", "sdpt-defaults", "sdpt") == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    # Zero-shot, rates, comparison, conditions, an ablation, starts, more steps, one picture a class and all.
    assert len(cells) == 1 + 2 + 2 + (1 + 2) + 1 + 2 + 1 + 2 + 2
    assert all(0 <= cell["AP"] <= 1 for cell in cells.values())


def test_a_run_that_fails_does_not_end_the_others(command, monkeypatch, tmp_path, capsys):
    def run_some(cell, *_):
        if cell.method == "lora" and cell.learning_rate == 0.01:
            raise RuntimeError("out of memory")
        return {"AP": 0.25, "AP50": 0.5, "AP75": 0.2, "trained": 5}

    monkeypatch.setattr(suite, "run_cell", run_some)
    assert command("--methods", "sdpt", "lora") == 1
    assert "few0 lora 0.01 10 shots seed 0 val: RuntimeError: out of memory" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1 + 8 - 1


def test_runs_are_made_by_processes_of_their_own(tmp_path, task):
    """The command as it is called, and nothing but what a bare host finds: it is told to begin nothing more."""
    arguments = [
        "--output_dir",
        tmp_path,
        "--folders",
        task.folder,
        "--no_built_in",
        "--num_processes",
        1,
        "--minutes",
        0.01,
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.transfer", *map(str, arguments)],
        cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert list(cells) == [Cell(task.folder.name, "zero-shot", shots=0).key]
    assert all(0 < cell["AP"] <= 1 for cell in cells.values())
    # One bar, which those of the runs are not written into.
    assert "evaluating" not in ended.stderr and "run/s" in ended.stderr


def test_results_go_into_the_page(command, monkeypatch, tmp_path):
    found = {"AP": 0.123456789, "AP50": 0.5, "AP75": 0.2, "trained": 5, "losses": [2.0, 1.0], "seconds": 3.0}
    monkeypatch.setattr(suite, "run_cell", lambda *_: found)
    assert command("--methods", "sdpt") == 0
    monkeypatch.setattr(suite, "DOCS", tmp_path)
    (tmp_path / "transfer.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert command("--render", tmp_path / "results.json") == 0
    page = (tmp_path / "transfer.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page and "12.3" in page
    # What the page is made of is beside it: it makes the same page, and a run goes on from it.
    file = tmp_path / "transfer.json"
    cells = json.loads(file.read_text())["cells"].values()
    assert {cell["AP"] for cell in cells} == {0.1235}
    assert not {"losses", "seconds"} & {name for cell in cells for name in cell}
    assert command("--render", file) == 0
    assert (tmp_path / "transfer.md").read_text() == page
    monkeypatch.setattr(suite, "run_cell", None)
    (tmp_path / "results.json").write_text(file.read_text())
    assert command("--methods", "sdpt") == 0


def test_a_report_of_half_a_suite():
    cells = plan(["one"], ["sdpt", "lora"], 3, {})[:4]
    results = {
        "machine": dict.fromkeys(("host", "torch", "transformers", "peft", "peft_sdpt"), "x"),
        "tasks": ["one"],
        "seeds": 3,
        "methods": ["sdpt", "lora"],
        "cells": {cell.key: {**dataclasses.asdict(cell), **measured([cell])[cell.key]} for cell in cells},
    }
    text = report(results)
    assert "5 more are known to be missing" in text and "Not yet." in text
    assert all(ElementTree.fromstring(svg) is not None for svg in plots(results).values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", 0), "--seeds 0: must be at least 1"),
        (("--image_size", 0), "--image_size 0"),
        (("--num_processes", 0), "--num_processes 0"),
        (("--folders", "nowhere"), "--folders nowhere: is not a folder"),
        (("--render", "nowhere.json"), "--render nowhere.json: no such file"),
        (("--device", "cuda"), "--device cuda: torch sees no GPU here"),
    ],
)
def test_bad_flags(command, flags, message, capsys):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is one")
    assert command(*flags) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_no_tasks(command, tmp_path, task, capsys, monkeypatch):
    assert command("--folders", task.folder, task.folder) == 2
    assert "several tasks are called" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command("--folders", tmp_path / "empty") == 2
    assert "empty" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["suite", "--no_built_in"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "--no_built_in: needs tasks" in capsys.readouterr().err
