# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fused attention as a GPU runs it: how many kernels, what is stored, and in which precision. All on the CPU."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import peft_sdpt.fused_attention
from peft_sdpt.attention import GatedPrompts, Side, SideInput, add_validity, bi_attention
from peft_sdpt.fused_attention import fused_bi_attention
from tests.helpers.pretend import pretend_gpu

# Operations that only look at memory in another way, or reserve it.
VIEWS = {"view", "expand", "transpose", "slice", "unsqueeze", "permute", "_unsafe_view", "detach", "select", "squeeze"}
VIEWS |= {"alias", "split", "split_with_sizes", "t", "as_strided", "empty", "empty_like", "new_empty", "unbind"}
GROUNDING_DINO = (256, 256, 1024, 4)
GLIP_L = (256, 768, 2048, 8)


class Kernels(TorchDispatchMode):
    """Counts operations that a GPU would launch a kernel for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return sum(self.counts.values())


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The fused attention treats tensors of the CPU like those of a GPU."""
    monkeypatch.setattr(peft_sdpt.fused_attention, "_on_cpu", lambda tensor: False)


def make_sides(sizes, device="cpu", dtype=torch.float32):
    image_dim, text_dim, width, _ = sizes

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, device=device, dtype=dtype).requires_grad_(False)

    image = Side(linear(image_dim, width), linear(image_dim, width), linear(width, image_dim))
    return image, Side(linear(text_dim, width), linear(text_dim, width), linear(width, text_dim))


def make_inputs(sizes, batch, length, text_length, gated=True, device="cpu", dtype=torch.float32):
    """Inputs of both sides, and the tensors that get gradients."""
    image_dim, text_dim, _, heads = sizes
    torch.manual_seed(0)
    leaves = [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        for shape in ((batch, length, image_dim), (batch, text_length, text_dim), (10, image_dim), (10, text_dim))
    ]
    image, text, *prompts = leaves
    gates = torch.linspace(-0.8, 0.9, heads).view(1, 1, heads).to(image)
    mask = [torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device) for tokens in (image, text)]
    if gated:
        of_gates = [GatedPrompts(tokens, (len(tokens),), gates) for tokens in prompts]
        return (
            SideInput(image, mask[0], None, None, of_gates[0]),
            SideInput(text, mask[1], None, None, of_gates[1]),
            leaves,
        )
    return SideInput(image, mask[0], prompts[0]), SideInput(text, mask[1], prompts[1]), leaves


def options(sizes, **more):
    return {"num_heads": sizes[3], "scale": (sizes[2] // sizes[3]) ** -0.5, **more}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sizes", [GROUNDING_DINO, GLIP_L], ids=["Grounding DINO", "GLIP-L"])
def test_training_launches_few_kernels(sizes, batch, dropout, gated):
    """With chunks that fit the cache of a CPU, there are 9938 forward and 11391 backward for GLIP-L and batch 4."""
    # 800 x 1333 pixels and 256 text tokens. The meta device computes nothing.
    image, text, leaves = make_inputs(sizes, batch, 22223, 256, gated, "meta")
    mask = {"text_mask_function": add_validity} if sizes is GLIP_L else {}
    counts = []
    with Kernels() as kernels:
        outs = fused_bi_attention(image, text, *make_sides(sizes, "meta"), **options(sizes, dropout=dropout, **mask))
        counts.append(kernels.total)
        torch.autograd.grad(outs, leaves, [torch.empty_like(out) for out in outs])
        counts.append(kernels.total - counts[0])
    # Each chunk has at least 2**23 logits, so its kernels take longer than their launch.
    chunks = max(1, batch * 22223 * sizes[3] * 266 / 2**23)
    assert counts[0] < 100 + 25 * chunks and counts[1] < 100 + 25 * chunks, (counts, chunks)
    assert max(counts) < 900


def stored(call):
    """Sizes in bytes of the tensors that a call stores for its backward, by dtype."""
    kept, sizes = [], {}

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = (tensor.dtype, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return list(sizes.values())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_stores_the_image_tokens_once(autocast, gated):
    length, text_length = 2000, 64
    image, text, _ = make_inputs(GROUNDING_DINO, 1, length, text_length, gated)
    sides = make_sides(GROUNDING_DINO)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = stored(lambda: fused_bi_attention(image, text, *sides, **options(GROUNDING_DINO)))
    element = 2 if autocast else 4
    of_image = [size for dtype, size in found if size >= length * 256 * element]
    assert of_image == [length * 256 * element]
    # The logits, `length * 4 * text_length`, are not smaller than the image tokens, so none of them is stored.


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_on_a_gpu_stores_no_logits(dtype, gated):
    """The bias of the image's queries gets gradients. As a mask of `scaled_dot_product_attention`, it is expanded."""
    sizes, length, text_length = (16, 16, 64, 4), 500, 40
    with pretend_gpu():
        image, text, _ = make_inputs(sizes, 1, length, text_length, gated, "pretend", dtype)
        sides = [Side(*(module.to("pretend") for module in side)) for side in make_sides(sizes, dtype=dtype)]
        found = stored(lambda: fused_bi_attention(image, text, *sides, **options(sizes)))
    of_image = length * 16 * dtype.itemsize
    assert [size for _, size in found if size >= of_image] == [of_image]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_half_precision_is_as_exact_as_the_eager_attention(as_on_gpu, chunks, dtype, gated, monkeypatch):
    """Products are in half precision there, softmaxes and sums are not."""
    sizes = (32, 24, 128, 4)
    if chunks == "many":
        monkeypatch.setattr(peft_sdpt.fused_attention, "_LOGITS_AT_A_TIME_ON_GPU", 20_000)
    torch.manual_seed(1)
    sides = make_sides(sizes)

    def results(attention, dtype):
        image, text, leaves = make_inputs(sizes, 2, 300, 12, gated)
        image.mask[1, 200:], text.mask[0, 8:] = True, True
        image = image._replace(tokens=image.tokens.to(dtype))
        text = text._replace(tokens=text.tokens.to(dtype))
        cast = [Side(*(nn.Linear(1, 1).to(dtype) for _ in side)) for side in sides]
        for side, of_dtype in zip(sides, cast, strict=True):
            for one, other in zip(side, of_dtype, strict=True):
                other.weight, other.bias = (nn.Parameter(p.to(dtype), False) for p in (one.weight, one.bias))
        outs = attention(image, text, *cast, **options(sizes))
        assert all(out.dtype == dtype for out in outs)
        torch.manual_seed(2)
        loss = sum((out.float() * torch.randn(out.shape)).sum() for out in outs)
        return [*outs, *torch.autograd.grad(loss, leaves)]

    def eager(*args, **kwargs):
        (image, _), (text, _) = bi_attention(*args, **kwargs)
        return image, text

    truth = results(eager, torch.float64)
    calls = Kernels()
    with calls:
        found = results(fused_bi_attention, dtype)
    assert not any("scaled_dot" in name for name in calls.counts)
    for one, other, right in zip(found, results(eager, dtype), truth, strict=True):
        assert (one - right).norm() < 1.5 * (other - right).norm() + 1e-3 * right.norm()


def test_a_long_image_does_not_overflow_in_float16(as_on_gpu):
    """A text token reads a sum over all image tokens. In half precision, the sum itself has no number."""
    sizes = (16, 16, 64, 4)
    sides = make_sides(sizes, dtype=torch.float16)
    image, text, leaves = make_inputs(sizes, 1, 30_000, 4, dtype=torch.float16)
    with torch.no_grad():
        image.tokens.abs_().add_(3)
    for side in sides:
        for module in side:
            module.weight.data *= 1e-2
    outs = fused_bi_attention(image, text, *sides, **options(sizes))
    assert all(out.isfinite().all() for out in outs)
    loss = sum(out.float().sum() for out in outs)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


WAYS = [
    # On the CPU, dtype, gradients, and whether the kernels are called.
    (True, torch.float32, False, False),
    (True, torch.float32, True, False),
    (True, torch.bfloat16, False, True),
    (True, torch.bfloat16, True, False),
    (False, torch.float32, False, False),
    (False, torch.float32, True, False),
    (False, torch.bfloat16, False, True),
    (False, torch.bfloat16, True, False),
]


@pytest.mark.parametrize(("on_cpu", "dtype", "gradients", "expected"), WAYS, ids=str)
def test_the_way_that_was_measured_as_the_best(on_cpu, dtype, gradients, expected, monkeypatch):
    monkeypatch.setattr(peft_sdpt.fused_attention, "_on_cpu", lambda tensor: on_cpu)
    sizes = (16, 16, 64, 4)
    image, text, _ = make_inputs(sizes, 1, 50, 4, dtype=dtype)
    with torch.set_grad_enabled(gradients), Kernels() as kernels:
        fused_bi_attention(image, text, *make_sides(sizes, dtype=dtype), **options(sizes))
    assert any("scaled_dot" in name for name in kernels.counts) == expected


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_one_graph_is_enough_for_all_image_sizes(dropout):
    """A loop over chunks would be another graph for each size."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    sizes = (16, 16, 64, 4)
    sides = make_sides(sizes)

    def call(image, text):
        return fused_bi_attention(image, text, *sides, **options(sizes, dropout=dropout))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=graphs)
    for length in (40, 50, 77):
        image, text, leaves = make_inputs(sizes, 2, length, 5)
        found = []
        for function in (compiled, call):
            torch.manual_seed(0)
            outs = function(image, text)
            torch.manual_seed(1)
            grads = torch.autograd.grad(sum((out * torch.randn(out.shape)).sum() for out in outs), leaves)
            found.append([*outs, *grads])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert graphs.frame_count == 1
