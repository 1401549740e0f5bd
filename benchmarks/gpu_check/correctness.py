# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Sections that check results: layers against float64, and whole models on the device against the CPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from peft import get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
)
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer

from peft_sdpt import SDPTConfig
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.training import trained_parameters

from ..peers import PUBLISHED
from ..speed.full_hosts import CLS, PERIOD, SEP, Fusion, detector, sharing_copy
from ..speed.methods import METHODS
from .attention import (
    CHOSEN,
    CHUNKS,
    EAGER,
    KINDS,
    ONE_CHUNK,
    WAYS,
    Problem,
    added_by_gates,
    appended_and_dropped,
    attend,
    make_problem,
    use_way,
    with_gradients,
)
from .running import Run

# Limits for the largest error of outputs and gradients, relative to the largest value. An H200 stays below 3e-6,
# 2e-2 and 3e-3 with each way.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# In float64, a gradient and a difference quotient agree to 3e-7, on a CPU and on an H200.
DROPOUT_LIMIT = 1e-5
# For tiny detectors in float32 on two devices, relative to the largest value. An H200 stays below 7e-4.
DETECTOR_LIMIT = 1e-3
# For the loss in bfloat16 relative to float32. An H200 stays below 3e-2.
AUTOCAST_LIMIT = 0.1
# An H200 stays below 3e-7.
COMPILED_LIMIT = 1e-4


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 without TF32, which has ten bits."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the largest error relative to the largest true value. It is inf if a value is not finite."""
    true = true.detach().double().cpu()
    largest = ((found.detach().double().cpu() - true).abs().max() / true.abs().max().clamp_min(1e-12)).item()
    # The maximum of several errors would leave out a nan.
    return largest if math.isfinite(largest) else math.inf


# ---- layers


def layers_against_float64(run: Run) -> None:
    """Outputs and gradients of all ways, with and without gates, against prompts that are appended and dropped."""
    shape = (2, 60, 8) if run.dry else (2, 1500, 40)
    with exact_products():
        for kind in KINDS:
            master = make_problem(kind, run.device, *shape, tiny=run.dry)
            exact = master.in_dtype(torch.float64)
            truths = {
                False: with_gradients(appended_and_dropped(exact), exact),
                True: with_gradients(added_by_gates(exact), exact),
            }
            for dtype, gated, way in itertools.product(LIMITS, (False, True), (EAGER, *WAYS, CHOSEN)):
                problem = master.in_dtype(dtype)
                with use_way(way):
                    found = with_gradients(attend(problem, way, gated), problem)
                errors = list(map(error, found, truths[gated]))
                name = str(dtype).removeprefix("torch.")
                run.say(kind=kind, dtype=name, way=way, gated=gated, errors=errors)
                run.require(
                    all(each < LIMITS[dtype] for each in errors),
                    f"{kind}, {name}, {way}, gated {gated}: errors {errors}, limit {LIMITS[dtype]}",
                )
            for gated, way in itertools.product((False, True), (EAGER, CHUNKS, ONE_CHUNK, CHOSEN)):
                found = dropout_error(exact, way, gated)
                run.say(kind=kind, way=way, gated=gated, dropout=found)
                run.require(
                    found < DROPOUT_LIMIT, f"{kind}, {way}, gated {gated}: gradients with dropout off by {found}"
                )


def dropout_error(problem: Problem, way: str, gated: bool) -> float:
    """Return how far gradients with attention dropout are from a difference quotient with the same dropped weights."""
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf) for leaf in problem.leaves]

    def gradients_at(distance: float) -> tuple[float, list[torch.Tensor]]:
        moved = problem.in_dtype(torch.float64)
        with torch.no_grad():
            for leaf, step in zip(moved.leaves, steps, strict=True):
                leaf += distance * step
        torch.manual_seed(0)
        with use_way(way):
            total = sum(out.square().sum() for out in attend(moved, way, gated, dropout=0.1))
            return total.item(), torch.autograd.grad(total, moved.leaves, allow_unused=True)

    _, gradients = gradients_at(0.0)
    slope = sum((gradient * step).sum().item() for gradient, step in zip(gradients, steps, strict=True)
                if gradient is not None)  # fmt: skip
    distance = 1e-6
    quotient = (gradients_at(distance)[0] - gradients_at(-distance)[0]) / (2 * distance)
    return abs(quotient - slope) / abs(slope)


# ---- detectors


DETECTORS = {
    "Grounding DINO": (GroundingDinoForObjectDetection, GroundingDinoConfig),
    "MM Grounding DINO": (MMGroundingDinoForObjectDetection, MMGroundingDinoConfig),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "eager": {"attn_implementation": "eager"},
    "published": PUBLISHED,
}
# Without dropout, whose random numbers differ between devices.
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "fusion_dropout": 0.0, "fusion_droppath": 0.0}
SMALL = {"d_model": 32, "encoder_ffn_dim": 256, "encoder_attention_heads": 4, **NO_DROPOUT}


def small_detector(name: str) -> nn.Module:
    """Return a tiny detector with the same random weights in each call."""
    text = BertConfig(
        vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    swin = {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "drop_path_rate": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return detector(
        *DETECTORS[name], swin, text_config=text, encoder_layers=2, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=64, num_queries=6, **SMALL,
    ).eval()  # fmt: skip


def tuned(host: nn.Module, **config: Any) -> nn.Module:
    """Attach an adapter with random gates, because gates that are zero have no effect."""
    torch.manual_seed(1)
    return get_peft_model(host, SDPTConfig(**{"num_virtual_tokens": 4, "init_weights": False, **config}))


def batch(device: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return two images with prompts of two classes, of which the second is shorter, and boxes to find."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(
        [[CLS, 1020, 1021, PERIOD, 1022, 1023, PERIOD, SEP], [CLS, 1030, PERIOD, 1031, PERIOD, SEP, 0, 0]]
    )
    inputs = {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]])
    targets = [
        {"class_labels": torch.tensor([0, 1]), "boxes": boxes},
        {"class_labels": torch.tensor([0]), "boxes": boxes[:1]},
    ]
    return _to(device, inputs), [_to(device, target) for target in targets]


def _to(device: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def flat(outputs: Any) -> torch.Tensor:
    """Return class logits and boxes. Logits of padding are -inf."""
    logits = outputs.logits.float()
    logits = logits.masked_fill(logits.isneginf(), 0.0)
    return torch.cat([logits.flatten(), outputs.pred_boxes.float().flatten()])


def detectors(run: Run) -> None:
    """Outputs, gradients, two training steps, bfloat16 and a mixed batch of tiny detectors, on CPU and device."""
    with exact_products():
        # A dry run compares the CPU with itself.
        configs = {"default": CONFIGS["default"]} if run.dry else CONFIGS
        for name, (label, config) in itertools.product(DETECTORS, configs.items()):
            on_cpu, found = (_results(name, config, device) for device in ("cpu", run.device))
            errors = {what: error(found[what], on_cpu[what]) for what in ("outputs", "losses")}
            errors["gradients"] = max(map(error, found["gradients"], on_cpu["gradients"]))
            autocast = error(found["autocast"], on_cpu["losses"][:1])
            run.say(detector=name, config=label, errors=errors, autocast=autocast)
            run.require(
                all(each < DETECTOR_LIMIT for each in errors.values()),
                f"{name}, {label}: errors {errors}, limit {DETECTOR_LIMIT}",
            )
            run.require(autocast < AUTOCAST_LIMIT, f"{name}, {label}: loss in bfloat16 off by {autocast}")
        mixed = error(*(_mixed_batch(device) for device in (run.device, "cpu")))
        run.say(mixed_batch=mixed)
        run.require(mixed < DETECTOR_LIMIT, f"mixed batch: error {mixed}, limit {DETECTOR_LIMIT}")


def _results(name: str, config: dict[str, Any], device: str) -> dict[str, Any]:
    model = tuned(small_detector(name), **config).to(device)
    inputs, targets = batch(device)
    loss_function = GroundedDetectionLoss(model.config)
    results: dict[str, Any] = {}
    with torch.no_grad():
        results["outputs"] = flat(model(**inputs))
    with torch.autocast(device, torch.bfloat16):
        autocast = loss_function(model(**inputs), targets)
    autocast.backward()
    results["autocast"] = autocast[None]
    trained = list(trained_parameters(model).values())
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    optimizer.zero_grad()
    model.train()
    losses = []
    for _ in range(2):
        loss = loss_function(model(**inputs), targets)
        losses.append(loss.detach())
        loss.backward()
        results.setdefault("gradients", [parameter.grad.clone() for parameter in trained])
        optimizer.step()
        optimizer.zero_grad()
    results["losses"] = torch.stack(losses)
    return results


@torch.no_grad()
def _mixed_batch(device: str) -> torch.Tensor:
    model = tuned(small_detector("Grounding DINO")).eval()
    model.add_adapter("other", SDPTConfig(num_virtual_tokens=3, init_weights=False))
    return flat(model.to(device)(**batch(device)[0], adapter_names=["other", "__base__"]))


# ---- waiting for the device


def synchronisations(run: Run) -> None:
    """Where Python waits for the GPU. A layer never does. A detector does not more often than without SDPT."""
    if run.device == "cuda":
        found = waits(lambda: torch.ones(1, device="cuda").item(), "cuda")
        run.require(len(found) == 1, f"a call that waits once was seen to wait {len(found)} times")
    for method, training in itertools.product(("sdpt", "sdpt-eager", "sdpt-gated"), (True, False)):
        layer = METHODS[method].attach(small_fusion()).to(run.device)
        found = waits(_call_of_layer(layer, run.device, training), run.device)
        run.say(layer=method, training=training, waits=dict(Counter(found)))
        run.require(not found, f"a layer with {method} waits, training {training}: {found}")
    for name, training in itertools.product(DETECTORS, (True, False)):
        methods = ("lora" if training else "host", "sdpt", "sdpt-gated")
        host = small_detector(name).requires_grad_(False)
        models = {method: METHODS[method].attach(sharing_copy(host)).to(run.device) for method in methods}
        found = {method: waits(_call_of_detector(model, run.device, training), run.device)
                 for method, model in models.items()}  # fmt: skip
        run.say(detector=name, training=training, waits={method: dict(Counter(each)) for method, each in found.items()})
        most = len(found[methods[0]])
        for method in methods[1:]:
            run.require(
                len(found[method]) <= most,
                f"{name} with {method} waits {len(found[method])} times, training {training}; {methods[0]}: {most}",
            )
        if not training:
            # An adapter that is trained, as in a validation: each call reads once whether its gates are zero.
            model = METHODS["sdpt-gated"].attach(sharing_copy(host)).to(run.device).eval()
            found = waits(torch.no_grad()(partial(model, **batch(run.device)[0])), run.device)
            run.say(detector=name, training=training, trained=True, waits=dict(Counter(found)))
            run.require(len(found) <= most + 1, f"{name}, trained, waits {len(found)} times in evaluation, host {most}")


def waits(call: Callable[[], Any], device: str) -> list[str]:
    """Return the lines of code that wait for the GPU in a call. They have been called before."""
    call()
    if device != "cuda":
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{in_package(each.filename)}:{each.lineno}" for each in caught
            if "synchronizing CUDA operation" in str(each.message)]  # fmt: skip


def in_package(file: str) -> str:
    """Return the path of a source file below the folder of its top package, wherever that is installed."""
    packages = [folder for folder in Path(file).parents if (folder / "__init__.py").exists()]
    return Path(file).relative_to(packages[-1].parent).as_posix() if packages else file


def _evaluation(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    # Frozen, as a loaded adapter is.
    return torch.no_grad()(partial(model.requires_grad_(False), **inputs))


def _call_of_layer(layer: nn.Module, device: str, training: bool) -> Callable[[], Any]:
    layer.train(training)
    inputs = {name: tensor.requires_grad_(training) for name, tensor in tokens(device, 800, 8).items()}
    if not training:
        return _evaluation(layer, inputs)

    def train() -> None:
        image, text = layer(**inputs)
        torch.autograd.backward([image, text], [torch.ones_like(image), torch.ones_like(text)])

    return train


def _call_of_detector(model: nn.Module, device: str, training: bool) -> Callable[[], Any]:
    inputs, targets = batch(device)
    model.train(training)
    if not training:
        return _evaluation(model, inputs)
    loss_function = GroundedDetectionLoss(model.config)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=1e-4)

    def step() -> None:
        loss_function(model(**inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- a fusion layer in other surroundings


def small_fusion() -> nn.Module:
    """Return a small fusion layer of Grounding DINO, frozen, with the same random weights in each call."""
    torch.manual_seed(0)
    layer = GroundingDinoFusionLayer(GroundingDinoConfig(**SMALL)).requires_grad_(False)
    layer.vision_param.fill_(0.7)
    layer.text_param.fill_(0.7)
    return Fusion(layer)


def tokens(device: str, image_length: int, text_length: int) -> dict[str, torch.Tensor]:
    """Return two samples for `small_fusion`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"image": image_length, "text": text_length}
    return {name: torch.randn(2, length, SMALL["d_model"], generator=generator).to(device)
            for name, length in shapes.items()}  # fmt: skip


def total_of(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return sum(out.square().mean() for out in outputs)


def gradients_of(model: nn.Module, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of what is trained in `model` after a call of it, and clear them."""
    trained = trained_parameters(model).values()
    total_of(call(**inputs)).backward()
    gradients = [parameter.grad.clone() for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients


def backend(run: Run, training: bool) -> str:
    """Return the compiler. A dry run only traces, and differentiates in training, because compiling C++ takes long."""
    return "inductor" if run.device == "cuda" else "aot_eager" if training else "eager"


def compiled(run: Run, dynamic: bool | None) -> None:
    """A compiled layer, without a break of the graph, at several shapes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tuned(small_fusion()).to(run.device).eval()
    fast = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend(run, False))
    for image_length, text_length in ((40, 5), (60, 5), (60, 7)):
        inputs = tokens(run.device, image_length, text_length)
        with torch.no_grad():
            found = max(map(error, fast(**inputs), model(**inputs)))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        run.say(dynamic=dynamic, image=image_length, text=text_length, error=found, graphs=graphs)
        run.require(found < COMPILED_LIMIT, f"dynamic {dynamic}, {image_length}, {text_length}: error {found}")


def compiled_training(run: Run) -> None:
    """Gradients of a compiled layer."""
    torch._dynamo.reset()
    model = tuned(small_fusion()).to(run.device).train()
    inputs = tokens(run.device, 40, 5)
    fast = torch.compile(model, fullgraph=True, backend=backend(run, True))
    found = max(map(error, gradients_of(model, fast, inputs), gradients_of(model, model, inputs)))
    run.say(gradients=found)
    run.require(found < COMPILED_LIMIT, f"gradients: error {found}")


def cuda_graphs(run: Run) -> None:
    """A layer whose kernels are recorded once and replayed. Later calls take other inputs."""
    torch._dynamo.reset()
    model = tuned(small_fusion()).to(run.device).eval()
    # "reduce-overhead" is a mode of inductor only.
    mode = "reduce-overhead" if run.device == "cuda" else None
    fast = torch.compile(model, fullgraph=True, mode=mode, backend=backend(run, False))
    errors = []
    for factor in (1.0, 1.0, 1.0, 0.5, 2.0):
        inputs = {name: factor * tensor for name, tensor in tokens(run.device, 40, 5).items()}
        with torch.no_grad():
            outputs = [output.clone() for output in fast(**inputs)]
            errors.append(max(map(error, outputs, model(**inputs))))
    run.say(errors=errors)
    run.require(all(each < COMPILED_LIMIT for each in errors), f"errors {errors}")


def gradients_of_replica(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a copy of `model` with DistributedDataParallel.

    The copy is freed on return, before the caller ends the process group. If a replica is the last to hold a group,
    torch 2.13 keeps Python's lock while it waits for a thread of gloo that may need the lock. Then the process hangs.
    """
    device_ids = [0] if next(model.parameters()).is_cuda else None
    wrapped = DistributedDataParallel(copy.deepcopy(model), device_ids=device_ids)
    return gradients_of(wrapped.module, wrapped, inputs)


def distributed(run: Run) -> None:
    """A training step with DistributedDataParallel in one process has the gradients of one without it."""
    model = tuned(small_fusion()).to(run.device).train()
    inputs = tokens(run.device, 40, 5)
    true = gradients_of(model, model, inputs)
    name = "nccl" if run.device == "cuda" else "gloo"
    torch.distributed.init_process_group(name, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = max(map(error, gradients_of_replica(model, inputs), true))
        run.say(backend=name, gradients=found)
        run.require(found < DETECTOR_LIMIT, f"gradients: error {found}")
    finally:
        torch.distributed.destroy_process_group()
