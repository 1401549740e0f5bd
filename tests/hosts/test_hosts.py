# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What holds of every host: `tests/tiny` has one small model of each."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.detection.base_models import TRAINED
from peft_sdpt.hosts import BiAttentionHost
from peft_sdpt.layer import SharedSDPTLayer
from tests.helpers import detectors
from tests.helpers.detectors import acting
from tests.helpers.tiny import cases

CASES = cases()
N = 3
attach = partial(detectors.attach, num_virtual_tokens=N)

every_host = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def bare():
    """Outputs of each host without prompts, frozen as PEFT leaves it: for others torch may take other kernels."""
    known = {}

    def outputs(case):
        if case.name not in known:
            with torch.no_grad():
                known[case.name] = case.outputs(case.make().requires_grad_(False), case.inputs(0))
        return known[case.name]

    return outputs


def gates_of(case, model):
    """Shapes of the gates, by the names of the layers: a row for each side, and one for each head."""
    shapes = {}
    for name in case.layers:
        layer = model.base_model.model.get_submodule(name)
        if isinstance(layer.fusion_host, BiAttentionHost):
            shapes[name] = (2, 1, layer.get_base_layer().num_heads)
        elif (heads := layer.fusion_host.num_heads(layer.get_base_layer())) is not None:
            shapes[name] = (layer.fusion_host.num_sides, 1, heads)
    return shapes


@torch.no_grad()
def run(case, model, padding: int = 0):
    return case.outputs(model, case.inputs(padding))


@every_host
def test_every_fusion_layer_gets_prompts_that_act(case, bare):
    model = attach(case.make())
    adapted = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, SDPTLayer)}
    holders = {name: module for name, module in adapted.items() if not isinstance(module, SharedSDPTLayer)}
    assert {name: module.embed_dim for name, module in holders.items()} == case.layers
    widths = {
        name: min(module.embed_dim, sum(p.in_features for p in module.projections))
        if not case.shared
        else module.embed_dim
        for name, module in holders.items()
    }
    assert widths == model.peft_config["default"].fusion_layers
    shared = {name: module for name, module in adapted.items() if isinstance(module, SharedSDPTLayer)}
    assert set(shared) == set(case.shared)
    for name, module in shared.items():
        assert module.sdpt_prompts["default"] is adapted[case.shared[name]].sdpt_prompts["default"]
        assert module.sdpt_gates.get("default") is adapted[case.shared[name]].sdpt_gates.get("default")
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"base_model.model.{n}.sdpt_prompts.default": (N, width) for n, width in widths.items()}
    gates = gates_of(case, model)
    expected |= {f"base_model.model.{n}.sdpt_gates.default": shape for n, shape in gates.items()}
    assert trained == expected
    assert model.peft_config["default"].fusion_gates == {n: [sides, heads] for n, (sides, _, heads) in gates.items()}
    outputs = run(case, model)
    assert outputs.isfinite().all()
    assert (outputs - bare(case)).abs().max() > 1e-3


@every_host
def test_each_layer_acts_alone(case, bare):
    for index in range(len(case.layers)):
        model = attach(case.make(), layers_to_transform=index)
        assert (run(case, model) - bare(case)).abs().max() > 1e-5, list(case.layers)[index]


@every_host
def test_a_gradient_reaches_every_prompt(case):
    model = attach(case.make()).train()
    outputs = case.outputs(model, case.inputs(0))
    (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and (parameter.grad.abs().amax(-1) > 0).all(), name
        else:
            assert parameter.grad is None


@every_host
def test_prompts_are_keys(case):
    """The projection that is inverted gives prototype tokens back, or the nearest that it can reach."""
    model = attach(case.make(), pinv_rtol=None).double()
    for name in [*case.layers, *case.shared]:
        layer = model.base_model.model.get_submodule(name)
        for projection, prompts in zip(layer.projections, layer.input_prompts(["default"]), strict=True):
            weight, bias = projection.weight, projection.bias if projection.bias is not None else 0
            tokens = layer.tokens()
            keys = prompts.tokens if prompts.gated is None else prompts.gated.tokens
            reached = (tokens - bias) @ (weight @ torch.linalg.pinv(weight)).T + bias
            torch.testing.assert_close(projection(keys), reached, rtol=1e-9, atol=1e-9)


@every_host
def test_padding_changes_nothing(case):
    model = attach(case.make())
    torch.testing.assert_close(run(case, model, padding=3), run(case, model), rtol=0, atol=case.tolerance)


@every_host
def test_a_sample_does_not_see_the_other(case):
    model = attach(case.make())
    inputs = case.inputs(0)
    twice = {name: torch.cat([v[1:], v[1:]]) if torch.is_tensor(v) and len(v) == 2 else v for name, v in inputs.items()}
    with torch.no_grad():
        together, alone = case.outputs(model, inputs), case.outputs(model, twice)
    torch.testing.assert_close(together[1], alone[1], rtol=0, atol=case.tolerance)
    assert not torch.equal(together[0], alone[0])


@every_host
def test_save_and_load(case, tmp_path):
    model = attach(case.make())
    expected = run(case, model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        *(f"base_model.model.{name}.sdpt_prompts" for name in case.layers),
        *(f"base_model.model.{name}.sdpt_gates" for name in gates_of(case, model)),
    }
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(case.make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(run(case, loaded), expected)


@every_host
def test_disabled_unloaded_and_deleted_prompts_leave_the_host_bit_for_bit(case, bare):
    model = attach(case.make())
    with model.disable_adapter():
        assert torch.equal(run(case, model), bare(case))
    model.add_adapter("other", acting(num_virtual_tokens=2, layers_to_transform=0))
    model.set_adapter("other")
    assert not torch.equal(run(case, model), bare(case))
    model.delete_adapter("other")
    assert torch.equal(run(case, model), run(case, attach(case.make())))
    host = attach(case.make()).unload()
    assert not any(isinstance(module, SDPTLayer) for module in host.modules())
    assert torch.equal(run(case, host), bare(case))


@every_host
def test_a_copy_has_prompts_of_its_own(case, bare):
    model = attach(case.make())
    expected = run(case, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert torch.equal(run(case, model), expected)
    assert not torch.equal(run(case, other), expected)


@pytest.mark.parametrize("prompt_gate", ["zero", None])
@every_host
def test_a_mixed_batch_equals_each_adapter_alone(case, bare, prompt_gate):
    model = attach(case.make(), prompt_gate=prompt_gate)
    torch.manual_seed(2)
    model.add_adapter("other", acting(num_virtual_tokens=2, prompt_gate=prompt_gate))
    model.eval()
    # Gates hide prompts from samples without a mask.
    gated = prompt_gate is not None and gates_of(case, model).keys() == case.layers.keys()
    if not case.mixed_batches and not gated:
        with pytest.raises(ValueError, match="has no mask that could hide prompts from some samples"):
            case.outputs(model, {**case.inputs(0), "adapter_names": ["default", "other"]})
        return
    alone = {"default": run(case, model), "__base__": bare(case)}
    model.set_adapter("other")
    alone["other"] = run(case, model)
    for names in (["default", "other"], ["other", "__base__"], ["default", "default"]):
        with torch.no_grad():
            mixed = case.outputs(model, {**case.inputs(0), "adapter_names": names})
        for sample, name in enumerate(names):
            # Each sample has products of its own, which round differently in single precision.
            torch.testing.assert_close(mixed[sample], alone[name][sample], rtol=0, atol=2 * case.tolerance)


@every_host
def test_bfloat16(case):
    model = attach(case.make().to(torch.bfloat16))
    inputs = {
        name: value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in case.inputs(0).items()
    }
    outputs = case.outputs(model, inputs)
    assert outputs.isfinite().all()
    outputs.float().sum().backward()
    prompts = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in prompts)


@every_host
def test_modes_that_the_host_has_no_sides_for_are_refused(case, bare):
    host = case.make()
    one_sided = any(case.sides.get(name, 1) == 1 for name in case.layers)
    if one_sided:
        with pytest.raises(ValueError, match=r"prompt_mode='independent' gives each of two sides its own tokens"):
            attach(host, prompt_mode="independent")
    else:
        model = attach(case.make(), prompt_mode="independent")
        assert all(p.shape[:2] == (2, N) for name, p in model.named_parameters() if "sdpt_prompts" in name)
        assert not torch.equal(run(case, model), bare(case))
    if not case.image_reads:
        with pytest.raises(ValueError, match=r"image_attends_prompts=False hides prompts from image tokens, and '"):
            attach(host, image_attends_prompts=False)
    else:
        model = attach(case.make(), image_attends_prompts=False)
        assert not torch.equal(run(case, model), bare(case))
        assert not torch.equal(run(case, model), run(case, attach(case.make())))
    assert not any(isinstance(module, SDPTLayer) for module in host.modules())
    assert torch.equal(run(case, host.requires_grad_(False)), bare(case))


@every_host
def test_the_full_size_model_takes_prompts(case):
    if case.full_size is None:
        pytest.skip("cannot be built with today's libraries")
    host = case.full_size()
    total = sum(p.numel() for p in host.parameters())
    with torch.device("meta"):
        model = get_peft_model(host, SDPTConfig())
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith(".sdpt_prompts.default") for name in trainable) == case.full_size_layers
    gates = {name for name in trainable if name.endswith(".sdpt_gates.default")}
    assert len(gates) == len(model.peft_config["default"].fusion_gates)
    assert len(gates) == case.full_size_layers or not case.image_reads or case.shared
    tokens = sum(size for name, size in trainable.items() if name not in gates)
    # The row of the table in the README, and whether the commands work with the model.
    row = readme_rows()[IN_README[case.name]]
    assert row[2] == f"{tokens:,}".replace(",", " ") and row[3].startswith(f"{100 * tokens / total:.3f} %")
    assert row[4] == ("yes" if isinstance(host.config, TRAINED) else "no")
    assert sum(trainable.values()) / total < 0.005


# Maps the name of a case to its row in the README.
IN_README = {
    "grounding_dino": "Grounding DINO",
    "mm_grounding_dino": "MM Grounding DINO, LLMDet",
    "lxmert": "LXMERT",
    "bridgetower": "BridgeTower",
    "sam3": "SAM 3",
    "sam3_lite_text": "SAM 3 Lite Text",
    "blip": "BLIP",
    "blip_2": "BLIP-2",
    "instructblip": "InstructBLIP, InstructBlipVideo",
    "instructblipvideo": "InstructBLIP, InstructBlipVideo",
    "omdet_turbo": "OmDet-Turbo",
    "flava": "FLAVA",
    "vilt": "ViLT",
}


def readme_rows() -> dict[str, list[str]]:
    """Return the cells of the table of base models in the README, by the first cell."""
    text = (detectors.ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.partition("## Supported base models")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row for row in rows}
