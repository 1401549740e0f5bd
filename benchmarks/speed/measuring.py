# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring time and memory of all methods of a cell, in one process."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.training import trained_parameters

from .cells import Cell
from .full_hosts import fusion_inputs, labels, make_host, model_inputs, sharing_copy
from .methods import METHODS, saved_bytes, suitable

# Quick cells get more rounds than requested, up to this total time or this number of rounds.
SECONDS, MOST_ROUNDS = 20.0, 40

# A call prepares a method and returns the function to time.
Subject = Callable[[], Callable[[], Any]]


def measure(
    cell: Cell,
    repeats: int,
    device: str,
    dtype: torch.dtype,
    tick: Callable[[str], None] = lambda _: None,
    seconds: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure time, memory and size of each method of a cell.

    Args:
        cell: The cell.
        repeats: Minimum number of rounds, after a warm-up and a measurement of memory.
        device: Device to measure on.
        dtype: Dtype of the base model.
        tick: Called with the name of a method before each of its calls.
        seconds: Until then, quick cells get more rounds. None for `SECONDS`.

    Returns:
        For each method: `seconds` of each round; `trained`, the number of trained parameters; `saved_bytes`, the size
        of the adapter on the disk; `held_bytes`, the memory of weights, buffers and optimizer; `peak_bytes`, this
        memory plus the peak of what a call allocates.
    """
    host = make_host(cell.host, device, dtype)
    subjects, results = {}, {}
    for name in cell.methods or suitable(cell.task, cell.is_fusion):
        if name not in suitable(cell.task, cell.is_fusion):
            continue
        if cell.task == "attach":
            subjects[name] = partial(_attaching, host, name)
            results[name] = {}
            continue
        model = METHODS[name].attach(sharing_copy(host)).train(cell.task == "training")
        run, state = _runs(cell, model, device, dtype)
        subjects[name] = partial(_as_it_is, run)
        tick(name)
        run()  # warm-up, which also makes the state of the optimizer
        held = sum(_sizes([*model.parameters(), *model.buffers(), *state()]).values())
        tick(name)
        results[name] = {
            "trained": sum(parameter.numel() for parameter in trained_parameters(model).values()),
            "saved_bytes": saved_bytes(model),
            "held_bytes": held,
            "peak_bytes": held + allocated(run, device),
        }
        gc.collect()
    for name, each in in_turns(subjects, repeats, device, tick, seconds).items():
        results[name]["seconds"] = each
    return results


def _as_it_is(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def _attaching(host: nn.Module, name: str) -> Callable[[], Any]:
    return partial(METHODS[name].attach, sharing_copy(host))


def _runs(
    cell: Cell, model: nn.Module, device: str, dtype: torch.dtype
) -> tuple[Callable[[], Any], Callable[[], list[torch.Tensor]]]:
    """Return the function to time, and a function that returns the tensors of its optimizer."""
    if cell.is_fusion:
        inputs = fusion_inputs(cell.host, cell.size, cell.tokens, device, dtype)
    else:
        inputs = model_inputs(cell.size, cell.tokens, device, dtype)
    if cell.task == "inference":

        def infer() -> None:
            with torch.no_grad():
                model(**inputs)

        return infer, list

    trained = list(trained_parameters(model).values())
    if cell.is_fusion:
        # Both inputs need gradients, because earlier layers are trained or have prompts.
        leaves = [inputs[name].requires_grad_() for name in ("image", "text")]

        def forward_and_backward() -> None:
            outputs = model(**inputs)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            for leaf in (*leaves, *trained):
                leaf.grad = None

        return forward_and_backward, list

    loss_function, targets = GroundedDetectionLoss(model.config), labels(inputs)
    # A rate so small that the random weights hardly change: the targets are made up.
    optimizer = torch.optim.AdamW(trained, lr=1e-7)

    def step() -> None:
        loss_function(model(**inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> list[torch.Tensor]:
        return [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]

    return step, state


def _sizes(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Return the bytes of each storage. Tensors that share a storage count once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def in_turns(
    subjects: dict[str, Subject],
    repeats: int,
    device: str,
    tick: Callable[[str], None] = lambda _: None,
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Measure the seconds of each subject in rounds, so that disturbances affect all subjects. See `measure`.

    Each round starts with a different subject, so that the order of the subjects changes.
    """
    seconds = SECONDS if seconds is None else seconds
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    names, begin, rounds = list(subjects), time.perf_counter(), 0
    while rounds < repeats or (rounds < MOST_ROUNDS and time.perf_counter() - begin < seconds):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            run = subjects[name]()
            tick(name)
            _wait(device)
            start = time.perf_counter()
            result = run()
            _wait(device)
            measured[name].append(time.perf_counter() - start)
            del run, result
        rounds += 1
    return measured


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocated(run: Callable[[], Any], device: str) -> int:
    """Return the peak memory in bytes of the tensors that a call allocates.

    On a GPU, torch counts it. On a CPU, it is computed from the allocations that the profiler of torch records, and is
    the same in each run. The peak memory of the process would include memory that the C library keeps from earlier
    calls, and would need a process for each method.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@contextlib.contextmanager
def _silent_profiler() -> Iterator[None]:
    """Silence stderr in this context, because some builds of the profiler write to it, into the progress bar."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    ordered = sorted(values)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        below, part = math.floor(place), place % 1
        return ordered[below] + (part * (ordered[below + 1] - ordered[below]) if part else 0.0)

    return at(0.25), at(0.5), at(0.75)
