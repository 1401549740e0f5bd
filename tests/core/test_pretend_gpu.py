# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The pretend GPU of the tests: it behaves as CUDA does, and it notes what waits for it."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.pretend import PretendTensor, pretend_gpu

HERE = "test_pretend_gpu.py"


@pytest.fixture
def syncs():
    with pretend_gpu() as log:
        yield log


def kinds(syncs):
    return [sync.kind for sync in syncs.of(HERE)]


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool((x > 0).all()), "item"),
        (lambda x: x.tolist(), "to the CPU"),
        (lambda x: x.cpu(), "to the CPU"),
        (lambda x: torch.empty(3).copy_(x), "to the CPU"),
        (lambda x: torch.tensor([1.0], device="pretend"), "to the device"),
        (lambda x: x[torch.tensor([0, 1])], "to the device"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.long().repeat_interleave(x.long()), "repeat_interleave"),
    ],
)
def test_notes_what_waits_with_its_line(syncs, ask, kind):
    x = torch.ones(3).to("pretend")
    syncs.clear()
    ask(x)
    assert kinds(syncs) == [kind]


def test_notes_nothing_else(syncs):
    x = torch.ones(3).to("pretend")
    index = torch.arange(2, device="pretend")
    syncs.clear()
    y = torch.full((3,), 2.0, device="pretend") + x.new_zeros(()) + 1
    z = torch.where(x > 0, y, x)[index].amax() + torch.zeros_like(x)[:1]
    x[index] = z
    x.to("cpu", non_blocking=True)
    assert not syncs and x.is_cpu is False and str(z.device) == "pretend:0"


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: cpu @ x,
        lambda x, cpu: torch.cat([x, cpu]),
        lambda x, cpu: cpu[x.long()],
        lambda x, cpu: nn.functional.linear(cpu[None], x[None]),
        lambda x, cpu: x.index_put_((x.long() * 0,), cpu),
    ],
)
def test_refuses_tensors_of_the_cpu(syncs, meet):
    with pytest.raises(RuntimeError, match="same device"):
        meet(torch.ones(3).to("pretend"), torch.ones(3))


def test_refuses_to_be_an_array(syncs):
    with pytest.raises(TypeError, match="can't convert pretend"):
        torch.ones(3).to("pretend").numpy()


def test_a_module_trains_as_on_the_cpu(syncs):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = torch.randn(5, 3)
    there = copy.deepcopy(module).to("pretend")
    assert all(isinstance(value, PretendTensor) for value in (*there.parameters(), *there.buffers()))
    for each, inputs in ((module, x), (there, x.to("pretend"))):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters())
        each(inputs).square().sum().backward()
        optimizer.step()
    for mine, theirs in zip(there.to("cpu").state_dict().values(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_other_tests_see_no_accelerator():
    with pretend_gpu():
        pass
    assert not torch.accelerator.is_available() and not torch.accelerator.device_count()
    assert type(torch.ones(3) + 1) is torch.Tensor
    parameter = nn.Linear(1, 1)
    before = parameter.weight
    assert parameter.double().weight is before
