# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SDPT under Accelerate and torch.distributed, compiled and exported."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import GroundingDinoForObjectDetection

from peft_sdpt import SDPTLayer
from tests.helpers.detectors import LAYERS, ROOT, FusionStack, attach, make_host, model_inputs, run, run_python

# ---- sharded and offloaded

SHARDED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tests.helpers.detectors import D_MODEL, FusionStack, attach
import peft_sdpt.inverse_cache

torch.set_num_threads(1)
dist.init_process_group("gloo")
inputs = [torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(length)) for length in (7, 5)]

def gradients(model):
    model(*inputs).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]

def check(config):
    expected_output = attach(FusionStack(), **config)(*inputs)
    expected = gradients(attach(FusionStack(), **config))

    # Unused parameters would end this with an error in the second step.
    wrapped = DistributedDataParallel(attach(FusionStack(), **config), find_unused_parameters=False)
    for _ in range(2):
        wrapped.zero_grad()
        for one, other in zip(gradients(wrapped), expected, strict=True):
            torch.testing.assert_close(one, other)

    taken = []
    peft_sdpt.inverse_cache.inverse_projection = lambda *a: taken.append(1) or take(*a)
    model = attach(FusionStack(), **config)
    for layer in model.base_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(3):
        assert torch.equal(model(*inputs), expected_output)
    # As on a GPU, where the gates of all layers would be read before they are gathered.
    peft_sdpt.layer._reading_waits = lambda tensor: True
    for gradients_on in (True, False):
        with torch.set_grad_enabled(gradients_on):
            assert torch.equal(model(*inputs), expected_output)
    peft_sdpt.layer._reading_waits = waits
    # Once when attached, once for the gathered weights: not in every forward.
    assert len(taken) <= 8, len(taken)
    for one, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, other)

take = peft_sdpt.inverse_cache.inverse_projection
waits = peft_sdpt.layer._reading_waits
mesh = init_device_mesh("cpu", (2,))
for config in CONFIGS:
    check(config)

host = FusionStack()
for layer in host.layers:
    fully_shard(layer, mesh=mesh)
try:
    attach(host)
except ValueError as error:
    assert "Attach SDPT first" in str(error)
else:
    raise AssertionError("attached to a sharded host")
print("all is well")
"""


@pytest.mark.slow
def test_two_processes_with_ddp_and_with_fsdp2(tmp_path):
    """Without and with LoRA."""
    script = tmp_path / "sharded.py"
    script.write_text(f"CONFIGS = {[{}, {'lora_rank': 2, 'lora_target_modules': ['head']}]}\n{SHARDED}")
    code = "import runpy, sys; sys.argv[0] = 'torchrun'; runpy.run_module('torch.distributed.run', run_name='__main__')"
    flags = ["--standalone", "--nproc_per_node", "2", str(script), str(ROOT / "tests")]
    result = run_python(code, *flags)
    assert result.stdout.count("all is well") == 2, result.stderr[-3000:]


def test_offloaded_fusion_layers_are_refused():
    host = make_host()
    projection = host.get_submodule(f"{LAYERS[1]}.text_proj")
    weights = dict(projection.state_dict())
    add_hook_to_module(projection, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    with pytest.raises(ValueError, match="cannot be attached to offloaded fusion layers"):
        attach(host)
    assert not any(isinstance(module, SDPTLayer) for module in host.modules())


def test_device_map(tmp_path):
    expected = run(attach(make_host()))
    make_host().save_pretrained(tmp_path / "host")
    attach(make_host()).save_pretrained(tmp_path / "adapter")
    host = GroundingDinoForObjectDetection.from_pretrained(tmp_path / "host", device_map={"": "cpu"})
    assert torch.equal(run(PeftModel.from_pretrained(host, tmp_path / "adapter")), expected)


# ---- compiled and exported


def test_prompts_are_swapped_in_place_under_compiled_code(tmp_path):
    """What serves instead of PEFT's hotswap_adapter, which takes LoRA only."""
    inputs = (torch.randn(2, 7, 32), torch.randn(2, 5, 32))
    other = attach(FusionStack(), seed=9)
    other.save_pretrained(tmp_path)
    model = attach(FusionStack())
    compilations = []

    def backend(graph, examples):
        compilations.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        first = compiled(*inputs)
        once = len(compilations)
        set_peft_model_state_dict(model, load_peft_weights(tmp_path))
        second = compiled(*inputs)
        assert not torch.equal(first, second)
        torch.testing.assert_close(second, other(*inputs))
    assert len(compilations) == once


def test_a_tuned_detector_exports_with_equal_outputs():
    model = attach(make_host()).eval()
    inputs = {**model_inputs(), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**inputs)
        program = torch.export.export(model.get_base_model(), (), inputs, strict=False)
        exported = program.module()(**inputs)
    torch.testing.assert_close(exported.pred_boxes, expected.pred_boxes)
    torch.testing.assert_close(exported.logits, expected.logits)
