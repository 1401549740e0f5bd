# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Sections that measure: kernels, what is saved for backward, and time and memory."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..results import cpu_name, device_name, versions
from ..speed.cells import LARGE, LONG, SHORT, SMALL, Cell
from ..speed.full_hosts import fusion_inputs, make_host, sharing_copy
from ..speed.kept import first_saves
from ..speed.measuring import allocated, in_turns, measure, quartiles
from ..speed.methods import METHODS
from .attention import CHOSEN, CHUNKS, KERNELS, KINDS, ONE_CHUNK, attend, make_problem, use_way
from .running import Run

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# Parts of the names of kernels that compute attention.
ATTENTION_KERNELS = ("attention", "cudnn", "flash", "fmha", "sdpa")
# The most kernels that forward and backward of a layer may launch. The loop for a CPU launches thousands.
MOST_LAUNCHES = 400


def about(run: Run) -> None:
    """The machine and the libraries."""
    more = ("accelerate", "numpy", "scipy", "triton")
    packages = versions() | {name: found for name in more if (found := _version(name))}
    machine: dict[str, Any] = {"device": device_name(run.device), "cpu": cpu_name(), "cores": os.cpu_count()}
    if run.device == "cuda":
        machine |= {
            "memory": torch.cuda.get_device_properties(0).total_memory,
            "capability": list(torch.cuda.get_device_capability()),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    run.say(**machine, threads=torch.get_num_threads(), python=platform.python_version(), **packages, dry=run.dry,
            date=time.strftime("%Y-%m-%d"), matmul_precision=torch.get_float32_matmul_precision())  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Return the version of the driver, or None if there is no command that tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- kernels


def kernels(run: Run) -> None:
    """Which attention kernels run, and how many kernels are launched."""
    shape = (1, 60, 8) if run.dry else (1, 6380, 32)
    for kind in KINDS:
        master = make_problem(kind, run.device, *shape, tiny=run.dry)
        for dtype, training, way in itertools.product((FLOAT32, BFLOAT16), (False, True), (KERNELS, CHOSEN)):
            launched = _launched(run, partial(_attention_step, master.in_dtype(dtype), way, training))
            attention = {name for name in launched if any(part in name.lower() for part in ATTENTION_KERNELS)}
            run.say(
                kind=kind, dtype=_name(dtype), training=training, way=way, launches=len(launched),
                kernels=sorted(attention),
            )  # fmt: skip
        # GLIP's own rate. With dropout, no kernel of PyTorch computes both directions from one matrix of logits.
        master = make_problem(kind, run.device, 4, *shape[1:], tiny=run.dry)
        launched = _launched(run, partial(_attention_step, master.in_dtype(FLOAT32), CHOSEN, True, 0.1))
        run.say(kind=kind, batch=4, dropout=0.1, training=True, way=CHOSEN, launches=len(launched))
        if run.device == "cuda":
            run.require(len(launched) <= MOST_LAUNCHES, f"{kind} with dropout launches {len(launched)} kernels")


def _attention_step(problem: Any, way: str, training: bool, dropout: float = 0.0) -> None:
    with use_way(way), torch.set_grad_enabled(training):
        outputs = attend(problem, way, gated=False, dropout=dropout)
        if training:
            torch.autograd.grad([out.float().sum() for out in outputs], problem.leaves, allow_unused=True)


def _launched(run: Run, call: Callable[[], Any]) -> list[str]:
    """Return the names of all kernels that a call launches on a GPU, or of all operations on a CPU."""
    call()
    on_gpu = run.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [event.name for event in recorded.events() if event.device_type == wanted]


# ---- casts


def autocast(run: Run) -> None:
    """What a layer saves for backward under autocast, and in bfloat16.

    The difference is a cast of the image, casts of the weights, and a softmax in float32 over the few gated prompts. A
    cast of the image for each use or each head would be several times as much.
    """
    for kind in KINDS:
        master = make_problem(kind, run.device, 1, *((3000, 32) if run.dry else (22223, 256)))
        for gated in (False, True):
            pure, cast = master.in_dtype(BFLOAT16), master.in_dtype(FLOAT32)
            saved = {"bfloat16": _saved(run, pure, gated, False), "autocast": _saved(run, cast, gated, True)}
            allowed = 3 * pure.image.nbytes + sum(p.weight.nbytes for side in pure.sides for p in side)
            run.say(kind=kind, gated=gated, image_bytes=pure.image.nbytes, saved_bytes=saved)
            more = saved["autocast"] - saved["bfloat16"]
            run.require(more <= allowed, f"{kind}, gated {gated}: autocast saves {more} bytes more, at most {allowed}")


def _saved(run: Run, problem: Any, gated: bool, enabled: bool) -> int:
    """Return the bytes that autograd saves, apart from inputs and weights."""
    sizes: list[int] = []
    known = [*problem.leaves, *(parameter for side in problem.sides for p in side for parameter in p.parameters())]
    with torch.autocast(run.device, BFLOAT16, enabled=enabled), first_saves(known, sizes.append):
        attend(problem, CHOSEN, gated)
    return sum(sizes)


# ---- time and memory


def layers(run: Run) -> None:
    """Time and memory of one fusion layer with each way. Cells that matter most come first."""
    grounding, glip, large, small = "grounding-dino-fusion", "glip-l-fusion", (LARGE, LONG), (SMALL, SHORT)
    cells = [
        # host, shape, dtype, batch, dropout
        (grounding, large, FLOAT32, 1, 0.0),
        (grounding, large, BFLOAT16, 1, 0.0),
        (glip, large, FLOAT32, 1, 0.0),
        (glip, large, BFLOAT16, 1, 0.0),
        (glip, large, FLOAT32, 1, 0.1),
        (glip, large, BFLOAT16, 4, 0.1),
        (grounding, large, BFLOAT16, 4, 0.0),
        (grounding, large, FLOAT32, 4, 0.0),
        (grounding, small, FLOAT32, 1, 0.0),
        (grounding, small, BFLOAT16, 1, 0.0),
    ]
    if run.dry:
        cells = [(grounding, ((64, 64), 8), FLOAT32, 1, 0.0), (glip, ((64, 64), 8), BFLOAT16, 2, 0.1)]
    rounds, seconds = (2, 0.0) if run.dry else (7, 1.0)
    for host, shape, dtype, batch, dropout in cells:
        attached = _attached(host, run.device, dtype, dropout)
        inputs = fusion_inputs(host, *shape, run.device, dtype)
        inputs = {name: tensor.repeat(batch, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}
        for training in (True,) if dropout else (False, True):
            calls = {
                name: _layer_call(attached[method], way, inputs, training)
                for name, (method, way) in _subjects(batch, dropout).items()
            }
            memory = {name: _memory(call, run.device) for name, call in calls.items()}
            subjects = {name: partial(_same, call) for name, call in calls.items() if memory[name] is not None}
            times = in_turns(subjects, rounds, run.device, seconds=seconds)
            run.say(
                layer=host, size=list(shape[0]), tokens=shape[1], dtype=_name(dtype), batch=batch, dropout=dropout,
                training=training, peak_bytes=memory,
                milliseconds={name: 1e3 * quartiles(each)[1] for name, each in times.items()},
            )  # fmt: skip


def _same(call: Callable[[], Any]) -> Callable[[], Any]:
    return call


def _memory(call: Callable[[], Any], device: str) -> int | None:
    """Return the peak of what a call allocates, in bytes, after a warm-up. None if it needs too much."""
    try:
        call()
        return allocated(call, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _subjects(batch: int, dropout: float) -> dict[str, tuple[str, str]]:
    """Return the method and the way of each subject, by its name."""
    fused = [CHOSEN, ONE_CHUNK]
    if not dropout:
        fused.append(KERNELS)
        # With many samples or with dropout, the chunks of a CPU are thousands of kernels.
        fused += [CHUNKS] if batch == 1 else []
    subjects = {"base model": ("host", CHOSEN), "eager": ("sdpt-eager", CHOSEN)}
    subjects |= {way: ("sdpt", way) for way in fused}
    return subjects | {f"gated, {way}": ("sdpt-gated", way) for way in fused if way != CHUNKS}


def _attached(host: str, device: str, dtype: torch.dtype, dropout: float) -> dict[str, nn.Module]:
    """Return a layer with each method. Attaching takes longer than a measurement, because it inverts projections."""
    layer = make_host(host, device, dtype)
    if host == "glip-l-fusion":
        layer.layers[0].attn.dropout = dropout
    else:
        layer.layers[0].drop_path = nn.Identity()
    methods = ("host", "sdpt", "sdpt-eager", "sdpt-gated")
    return {method: METHODS[method].attach(sharing_copy(layer)) for method in methods}


def _layer_call(layer: nn.Module, way: str, inputs: dict[str, torch.Tensor], training: bool) -> Callable[[], Any]:
    leaves = [inputs[name].requires_grad_() for name in ("image", "text")]
    leaves += [parameter for parameter in layer.parameters() if parameter.requires_grad]
    layer.train(training)

    def call() -> None:
        with use_way(way), torch.set_grad_enabled(training):
            outputs = layer(**inputs)
            if training:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])

    return call


def whole_models(run: Run) -> None:
    """The main cells of `benchmarks.speed`, by its own code."""
    tiny = "grounding-dino-tiny"
    cells = [
        (Cell(tiny, "training", LARGE, LONG), FLOAT32),
        (Cell(tiny, "inference", LARGE, LONG), FLOAT32),
        (Cell(tiny, "inference", LARGE, LONG), BFLOAT16),
        (Cell(tiny, "training", LARGE, LONG), BFLOAT16),
        (Cell(tiny, "training", SMALL, SHORT), FLOAT32),
    ]
    if run.dry:
        cells = [(Cell("grounding-dino-fusion", "training", (64, 64), 8), FLOAT32)]
    methods = ("host", "sdpt", "sdpt-eager", "sdpt-gated", "released", "lora")
    for cell, dtype in cells:
        results = measure(replace(cell, methods=methods), 2 if run.dry else 5, run.device, dtype, seconds=0.0)
        run.say(cell=cell.key, dtype=_name(dtype), results=results)
