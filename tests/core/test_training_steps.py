# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Nothing that was computed before a training step is used after it, whichever optimizer makes the step.

Fused optimizers of PyTorch 2.13 write to parameters without raising their version.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

from peft_sdpt import SDPTLayer
from tests.helpers.detectors import LAYERS, attach, make_host, model_inputs, run

OPTIMIZERS = {
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD, fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "by data": lambda parameters: ByData(parameters),
}


class ByData:
    """An optimizer that PyTorch does not know."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def step(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad.sign()


def fresh(model):
    """A model with the same weights and prompts, and with empty caches."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, SDPTLayer):
            layer.refresh_inverses(force=True)
    return copied


def backward(model):
    outputs = model(**model_inputs())
    (outputs.logits[outputs.logits.isfinite()].sum() + outputs.pred_boxes.sum()).backward()


def trained(model, projections):
    """The prompts and gates. With `projections`, also the projections that SDPT inverts."""
    for name, parameter in model.named_parameters():
        if projections and name.endswith(("vision_proj.weight", "text_proj.weight", "text_proj.bias")):
            parameter.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("projections", [False, True])
@pytest.mark.parametrize("options", [{}, {"prompt_gate": None}], ids=str)
def test_evaluation_between_and_after_steps(options, projections, optimizer):
    """The test does not call `train` or `eval`, which would clear the caches."""
    model = attach(make_host(), **options)
    steps = OPTIMIZERS[optimizer](trained(model, projections))
    for _ in range(2):
        backward(model)
        before = run(model)  # fills the caches, which the step makes out of date
        steps.step()
        after = run(model)
        assert not torch.equal(after, before)
        assert torch.equal(after, run(fresh(model)))


@pytest.mark.parametrize("optimizer", ["AdamW, fused", "by data"])
@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_training_and_then_freezing(loaded, disabled, optimizer, tmp_path):
    model = attach(make_host())
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(make_host(), tmp_path)
    run(model)
    steps = OPTIMIZERS[optimizer](trained(model, projections=True))
    for _ in range(2):
        model.train()
        with model.disable_adapter() if disabled else nullcontext():
            backward(model)
        steps.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    assert torch.equal(run(model), run(fresh(model)))


def test_gradients_of_trained_projections_belong_to_the_current_weights():
    """The inverse is that of the current weight. No gradient flows through it, as the documentation says."""
    model = attach(make_host())
    steps = OPTIMIZERS["AdamW, fused"](trained(model, projections=True))
    for _ in range(2):
        steps.zero_grad()
        backward(model)
        steps.step()
    steps.zero_grad()
    copied = fresh(model)
    backward(model)
    backward(copied)
    weights = [
        each.get_parameter(f"base_model.model.{LAYERS[0]}.base_layer.vision_proj.weight") for each in (model, copied)
    ]
    assert torch.equal(weights[0].grad, weights[1].grad)


def test_a_moving_average_that_is_copied_in_evaluation():
    """`copy_to` of a moving average writes in place, through `.data`."""
    model = attach(make_host())
    run(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.data * 0.5)
    assert torch.equal(run(model), run(fresh(model)))


def test_what_no_counter_shows_needs_a_refresh(tmp_path):
    """A frozen model is not compared by value. `refresh_inverses` of the model refreshes all of it."""
    attach(make_host()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_host(), tmp_path)
    stale = run(model)
    weight = model.get_parameter(f"base_model.model.{LAYERS[0]}.base_layer.vision_proj.weight")
    weight.detach().numpy()[:] *= 1.5
    for layer in LAYERS:
        model.get_parameter(f"base_model.model.{layer}.sdpt_prompts.default").data.mul_(2)
    model.refresh_inverses()
    assert torch.equal(run(model), run(fresh(model))) and not torch.equal(run(model), stale)


def test_frozen_projections_are_inverted_once(monkeypatch):
    model = attach(make_host())
    monkeypatch.setattr("peft_sdpt.inverse_cache.inverse_projection", lambda *_: pytest.fail("an inverse is computed"))
    steps = OPTIMIZERS["AdamW, fused"](trained(model, projections=False))
    for mode in (True, False):
        model.train(mode)
        backward(model)
        steps.step()
        run(model)


def test_frozen_projections_are_not_compared_by_their_values():
    """Not after the first forward: PEFT freezes the weights after the inverses were computed."""
    model = attach(make_host())
    run(model)
    layers = [layer for layer in model.modules() if isinstance(layer, SDPTLayer)]
    assert layers and not any(state.has_values for layer in layers for state in layer.sdpt_inverses._states)
