# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that start as prototypes of the downstream tokens: which tokens, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sdpt import SDPTConfig, SDPTLayer, initialize_sdpt_prototypes
from peft_sdpt.prototypes import _Sample, _within
from tests.helpers.detectors import HOST_NAMES, LAYERS, PUBLISHED, FusionStack, make_host

CLS, SEP, PERIOD = 101, 102, 1012
# Two classes, of one and of two tokens.
IDS = torch.tensor([[CLS, 300, PERIOD, 400, 401, PERIOD, SEP]])


def batch(boxes=((0.25, 0.5, 0.5, 1.0),), classes=(1,), padded=0, seed=0):
    """A picture with boxes; `padded` pixels on its right are padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, 64, 64, dtype=torch.long)
    mask[:, :, 64 - padded :] = 0
    inputs = {
        "pixel_values": torch.randn(1, 3, 64, 64, generator=generator),
        "pixel_mask": mask,
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "token_type_ids": torch.zeros_like(IDS),
    }
    label = {"boxes": torch.tensor(boxes).reshape(-1, 4), "class_labels": torch.tensor(classes, dtype=torch.long)}
    return inputs, [label]


def attach(name="grounding_dino", count=3, **config):
    torch.manual_seed(0)
    return get_peft_model(
        make_host(name),
        SDPTConfig(**{**PUBLISHED, "init_weights": "prototypes", "num_virtual_tokens": count, **config}),
    )


def query_states(model, inputs):
    """What each fusion layer's query projections make of its tokens, image and text, in the bare host."""
    states = {}

    def look(module, args, kwargs):
        image = kwargs.get("vision_features", args[0] if args else None)
        text = kwargs.get("text_features", args[1] if len(args) > 1 else None)
        states[module] = (module.vision_proj(image)[0], module.text_proj(text)[0])

    layers = [model.base_model.model.get_submodule(name) for name in LAYERS]
    hooks = [layer.base_layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad(), model.disable_adapter():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [states[layer.base_layer] for layer in layers]


def prompts(model):
    return [model.base_model.model.get_submodule(name).sdpt_prompts["default"].detach() for name in LAYERS]


def rows_of(tokens, states):
    """For each token the row of `states` that it is, or None."""
    distances = torch.cdist(tokens.double(), states.double())
    return [int(row.argmin()) if row.min() < 1e-4 else None for row in distances]


def token_centres():
    """Of the two levels of a 64 x 64 picture, as shares of it: 8 and 16 pixels wide."""
    centres = []
    for cells in (8, 4):
        places = (torch.arange(cells) + 0.5) / cells
        centres.append(torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).reshape(-1, 2))
    return torch.cat(centres)


@pytest.mark.parametrize("name", HOST_NAMES)
def test_random_prototypes_are_tokens_of_objects_and_of_the_names_shown(name):
    model, data = attach(name, count=2, prompt_mode="independent"), batch()
    initialize_sdpt_prototypes(model, [data, batch(seed=1)], prototypes="random", num_batches=1)
    centres = token_centres()
    allowed = set((centres[:, 0] < 0.5).nonzero().flatten().tolist())
    for tokens, (image, text) in zip(prompts(model), query_states(model, data[0]), strict=True):
        assert len(image) == len(centres)
        found = set(rows_of(tokens[0], image))
        assert found <= allowed and len(found) == 2
        # Of the two tokens of the class that is shown.
        assert set(rows_of(tokens[1], text)) == {3, 4}


def test_unified_prototypes_are_of_both_modalities_and_none_is_there_twice():
    """Before the first fusion the words of a prompt are the same in each picture."""
    model, data = attach(count=4), [batch(seed=seed) for seed in range(3)]
    initialize_sdpt_prototypes(model, data, prototypes="random")
    image, text = zip(*(query_states(model, inputs)[0] for inputs, _ in data), strict=True)
    tokens = prompts(model)[0]
    of_text = [row for row in rows_of(tokens, text[0]) if row is not None]
    of_image = [row for row in rows_of(tokens, torch.cat(image)) if row is not None]
    assert set(of_text) <= {3, 4} and len(of_text) + len(of_image) == 4 and of_image
    assert torch.pdist(tokens).min() > 0.1


def test_padding_is_no_part_of_the_picture():
    """Boxes are shares of the picture: a box on its left half is on the left quarter of what it is padded to."""
    model, data = attach(), batch(padded=32)
    initialize_sdpt_prototypes(model, [data], prototypes="random", seed=1)
    allowed = set((token_centres()[:, 0] < 0.25).nonzero().flatten().tolist())
    for tokens, (image, _) in zip(prompts(model), query_states(model, data[0]), strict=True):
        found = {row for row in rows_of(tokens, image) if row is not None}
        assert found and found <= allowed


@pytest.mark.parametrize("kind", ["kmeans", "mean"])
def test_centres_are_means_of_groups_of_candidates(kind):
    model, data = attach(prompt_mode="independent"), batch(boxes=((0.5, 0.5, 1.0, 1.0),), classes=(0, 1, 1))
    data[1][0]["boxes"] = data[1][0]["boxes"].expand(3, -1)
    initialize_sdpt_prototypes(model, [data], prototypes=kind)
    for tokens, (image, text) in zip(prompts(model), query_states(model, data[0]), strict=True):
        for centres, states in ((tokens[0], image), (tokens[1], text[[1, 3, 4]])):
            groups = torch.cdist(states, centres).argmin(1) if kind == "kmeans" else None
            if kind == "kmeans":
                for number, centre in enumerate(centres):
                    torch.testing.assert_close(centre, states[groups == number].mean(0), rtol=0, atol=1e-3)
            else:
                # Groups differ in size by one at most, so the means of all are near that of the whole.
                assert (centres.mean(0) - states.mean(0)).norm() < 0.5 * states.std(0).norm()


def test_the_same_seed_gives_the_same_and_more_batches_give_others():
    data = [batch(seed=0), batch(seed=1)]
    found = []
    for seed, count in ((0, 1), (0, 1), (1, 1), (0, 2)):
        model = attach()
        initialize_sdpt_prototypes(model, data, num_batches=count, seed=seed)
        found.append(torch.stack(prompts(model)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])


def test_nothing_but_the_prompts_is_changed():
    model, data = attach(), batch()
    model.add_adapter("other", SDPTConfig(num_virtual_tokens=2))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    initialize_sdpt_prototypes(model, [data], prototypes="random")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.active_adapters == ["default"] and not any(
        module.disable_adapters for module in model.modules() if isinstance(module, SDPTLayer)
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"base_model.model.{name}.sdpt_prompts.default" for name in LAYERS}
    assert all(tokens.requires_grad for name, tokens in model.named_parameters() if name in changed)


def test_they_are_saved_and_loaded_as_any_prompts(tmp_path):
    model, data = attach(), batch()
    initialize_sdpt_prototypes(model, [data])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_host(), tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(prompts(loaded), prompts(model), strict=True))


def test_until_it_is_called_they_are_normal():
    normal = attach(init_weights="normal")
    assert all(torch.equal(one, other) for one, other in zip(prompts(attach()), prompts(normal), strict=True))


def test_points_within_boxes():
    points = torch.tensor([[0.1, 0.1], [0.5, 0.5], [0.9, 0.2]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.9, 0.5, 0.1, 0.8]])
    assert _within(points, boxes).tolist() == [False, True, True]
    assert not _within(points, boxes[:0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": "best"}, "prototypes must be one of .*'best'"),
        ({"num_batches": 0}, "num_batches must be at least 1, got 0"),
        ({"adapter_name": "none"}, "adapter_name must name .*'none'"),
    ],
)
def test_bad_arguments(change, message):
    model = attach()
    before = prompts(model)
    with pytest.raises(ValueError, match=message):
        initialize_sdpt_prototypes(model, [batch()], **change)
    assert all(torch.equal(one, other) for one, other in zip(prompts(model), before, strict=True))


@pytest.mark.parametrize("data", [[], [batch(boxes=(), classes=())]], ids=["no batch", "no box"])
def test_too_few_objects(data):
    with pytest.raises(ValueError, match="too few for 3 prompts"):
        initialize_sdpt_prototypes(attach(), data)


def test_each_modality_needs_enough_where_prompts_are_independent():
    with pytest.raises(ValueError, match="and 2 text tokens of objects, too few for 3 prompts"):
        initialize_sdpt_prototypes(attach(prompt_mode="independent"), [batch()])


def test_a_host_that_does_not_say_where_its_tokens_lie():
    model = get_peft_model(FusionStack(), SDPTConfig())
    with pytest.raises(ValueError, match=r"model must be a Grounding DINO .*, got FusionStack: "):
        initialize_sdpt_prototypes(model, [batch()])


def test_coordinates_start_as_the_nearest_to_the_same_prototypes():
    published, default = attach(), attach(**dict.fromkeys(("prompt_space", "pinv_rtol")))
    for model in (published, default):
        initialize_sdpt_prototypes(model, [batch()])
    for name in LAYERS:
        one, other = (model.base_model.model.get_submodule(name) for model in (published, default))
        assert other.sdpt_inverses.basis is not None and one.sdpt_inverses.basis is None
        with torch.no_grad():
            for a, b in zip(*(layer.input_prompts(["default"]) for layer in (one, other)), strict=True):
                torch.testing.assert_close(a.tokens, b.tokens, rtol=0, atol=1e-4)


def test_no_more_candidates_are_held_than_are_looked_at(monkeypatch):
    """Any row may stay, whenever it was added, and what does not stay is not projected."""
    monkeypatch.setattr("peft_sdpt.prototypes.MOST_CANDIDATES", 10)
    projected, held = [], []
    sample = _Sample(1, seed=0)
    for start in range(0, 1000, 100):
        sample.add(torch.arange(start, start + 100.0)[:, None], lambda rows: projected.append(len(rows)) or rows)
        held.append(len(sample.rows))
    assert held == projected == [10] * 10
    assert sample.rows.unique().numel() == 10 and len({int(row) // 100 for row in sample.rows}) > 3
    few = _Sample(1, seed=0)
    few.add(torch.arange(4.0)[:, None], torch.nn.Identity())
    few.add(torch.arange(4.0, 7.0)[:, None], torch.nn.Identity())
    assert few.rows.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
