# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Threads that call a model at the same time, as in a server, get the same outputs as one thread alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sdpt import SDPTConfig
from peft_sdpt.calls import SWITCHING
from tests.helpers.detectors import LAYERS, acting, attach, make_host, model_inputs, run
from tests.helpers.patience import PATIENCE
from tests.helpers.tiny import cases

THREADS, CALLS = 4, 3
MIXES = [["default", "default"], ["b", "b"], ["__base__", "__base__"], ["default", "b"]]


@pytest.fixture(autouse=True)
def switch_often():
    """Let Python switch between threads as often as possible, so that errors show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def several(**options):
    """A model with two adapters, the first of which is active."""
    model = attach(make_host(), **options)
    model.add_adapter("b", acting(num_virtual_tokens=2, **options))
    return model.eval()


def at_once(*calls):
    """Run each function in its own thread, all at the same time. Return their results."""
    start = threading.Barrier(len(calls))

    def wait_and(call):
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(wait_and, call) for call in calls]]


def repeated(call, want):
    """Return a function that makes a call several times and returns the number of wrong results."""
    return lambda: sum(not torch.equal(call(), want) for _ in range(CALLS))


@pytest.mark.parametrize(
    "options", [{}, {"prompt_gate": None}, {"lora_rank": 2, "modules_to_save": ["enc_output"]}], ids=str
)
def test_calls_with_different_adapter_names(options):
    model = several(**options)
    want = [run(model, adapter_names=names) for names in MIXES]
    plain = run(model)
    assert len({tuple(result.tolist()) for result in want}) == len(MIXES)
    calls = [
        repeated(lambda names=names: run(model, adapter_names=names), result)
        for names, result in zip(MIXES, want, strict=True)
    ]
    assert at_once(*calls, repeated(lambda: run(model), plain)) == [0] * (len(MIXES) + 1)
    # The calls leave no state in the layers.
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("case", [case for case in cases() if case.name != "vilt"], ids=lambda case: case.name)
def test_every_base_model(case):
    """ViLT shuffles image tokens with a random generator that all threads share, so its rounding differs."""
    model = attach(case.make())
    model.add_adapter("b", acting(num_virtual_tokens=2))
    model.eval()
    mixes = [None, *MIXES] if case.mixed_batches else [None] * THREADS

    @torch.no_grad()
    def call(names):
        return case.outputs(model, case.inputs(0) | ({"adapter_names": names} if names else {}))

    want = [call(names) for names in mixes]
    calls = [repeated(lambda names=names: call(names), result) for names, result in zip(mixes, want, strict=True)]
    assert at_once(*calls) == [0] * len(mixes)


def test_a_switch_of_another_thread_takes_effect_in_the_next_call():
    """A call uses one adapter, and one scale, in all layers."""
    model = several()
    allowed = []
    for name in ("default", "b"):
        for scale in (1.0, 0.5):
            model.set_adapter(name)
            model.set_scale(name, scale)
            allowed.append(run(model))
    with model.disable_adapter():
        allowed.append(run(model))
    done = threading.Event()

    def switch():
        turn = 0
        while not done.is_set():
            turn += 1
            model.set_adapter(("default", "b")[turn % 2])
            model.set_scale(("default", "b")[turn // 2 % 2], (1.0, 0.5)[turn // 4 % 2])
            if turn % 5 == 0:
                model.disable_adapter_layers()
                model.enable_adapter_layers()
        return 0

    def call():
        try:
            found = [run(model) for _ in range(4 * CALLS)]
            return sum(not any(torch.equal(result, each) for each in allowed) for result in found)
        finally:
            done.set()

    assert at_once(switch, call) == [0, 0]


def test_a_call_without_names_inside_one_with_names():
    """Without luck: a plain call while another call has names, also for copies of `modules_to_save`."""
    model = several(modules_to_save=["enc_output"])
    copies = model.base_model.model.model.enc_output.modules_to_save
    with torch.no_grad():
        for number, name in enumerate(("default", "b"), 1):
            copies[name].weight.mul_(number * 1.5)
    want = run(model)
    found = []
    module = model.base_model.model.get_submodule(LAYERS[0])
    inside = []

    def call_plainly(*_):
        if not inside:
            inside.append(1)
            found.append(at_once(lambda: run(model))[0])
            found.append(run(model))

    handle = module.register_forward_hook(call_plainly)
    run(model, adapter_names=["b", "__base__"])
    handle.remove()
    assert all(torch.equal(result, want) for result in found) and len(found) == 2


def test_a_switch_in_the_middle_of_a_call_waits_for_the_next_one():
    """The switch always happens between the first two fusion layers, so the test does not depend on timing."""
    model = several()
    want = {}
    for name in ("b", "default"):
        model.set_adapter(name)
        want[name] = run(model)

    def switch(*_):
        model.set_adapter("b")
        model.set_scale("default", 0.5)

    handle = model.base_model.model.get_submodule(LAYERS[0]).register_forward_hook(switch)
    assert torch.equal(run(model), want["default"])
    handle.remove()
    assert torch.equal(run(model), want["b"])


def test_an_adapter_can_be_added_while_others_are_used():
    model = several()
    want = run(model, adapter_names=MIXES[3])

    def add():
        for number in range(CALLS):
            model.add_adapter(f"new{number}", acting())
        return 0

    assert at_once(repeated(lambda: run(model, adapter_names=MIXES[3]), want), add) == [0, 0]


def test_an_adapter_with_other_layers_can_be_added_during_a_call(monkeypatch):
    """Without luck: a call in the middle of the injection."""
    model = attach(make_host(), layers_to_transform=[0], prompt_gate=None)
    want, found = run(model), []
    replace = type(model.base_model)._replace_module

    def replace_and_call(self, *args):
        replace(self, *args)
        found.append(run(model))

    monkeypatch.setattr(type(model.base_model), "_replace_module", replace_and_call)
    model.add_adapter("b", acting(prompt_gate=None))
    assert len(found) == 1 and torch.equal(found[0], want) and torch.equal(run(model), want)


def test_a_thread_or_replica_of_the_base_model_takes_the_names():
    """The base model may call a fusion layer in a thread of its own, or a replica of it."""
    model = several()
    want = run(model, adapter_names=MIXES[3])
    layer = model.base_model.model.get_submodule(LAYERS[1])
    forward = layer.forward

    def in_a_thread(*args, **kwargs):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.no_grad()(forward), *args, **kwargs).result(PATIENCE)

    def in_a_replica(*args, **kwargs):
        replica = shallow_copy(layer)
        del replica.__dict__["forward"]
        return replica(*args, **kwargs)

    for call in (in_a_thread, in_a_replica):
        layer.forward = call
        assert torch.equal(run(model, adapter_names=MIXES[3]), want)


def test_a_model_inside_another_is_called_with_its_own_adapters():
    """An example is a teacher that a module of the student calls."""
    inner, outer = several(), several()
    want_inner, want = run(inner), run(outer, adapter_names=MIXES[3])
    found = []
    hook = outer.base_model.model.get_submodule(LAYERS[0]).register_forward_hook(lambda *_: found.append(run(inner)))
    assert torch.equal(run(outer, adapter_names=MIXES[3]), want) and torch.equal(found[0], want_inner)
    hook.remove()


def test_the_first_calls_after_a_change_of_weights():
    model = several()
    layer = model.base_model.model.get_submodule(LAYERS[0])
    image, text = torch.randn(2, 9, 32), torch.randn(2, 5, 32)

    @torch.no_grad()
    def call():
        return layer(image, text)[0][0]

    for _ in range(10):
        with torch.no_grad():
            layer.base_layer.vision_proj.weight.mul_(1.01)
            layer.base_layer.text_proj.weight.mul_(1.01)
        found = at_once(*[call] * THREADS)
        layer.refresh_inverses(force=True)
        assert all(torch.equal(result, call()) for result in found)


def test_attention_weights_of_some_calls():
    """Only some of the threads ask for attention weights."""
    model = several(attn_implementation="eager")

    def call(wanted):
        with torch.no_grad():
            outputs = model(**model_inputs(), output_attentions=wanted)
        if not wanted:
            return [outputs.pred_boxes]
        flat = nn.Module()  # only its attributes are used
        flat.found = []

        def walk(value):
            if isinstance(value, torch.Tensor):
                flat.found.append(value)
            else:
                for each in value:
                    walk(each)

        walk(outputs.encoder_attentions)
        return [outputs.pred_boxes, *flat.found]

    want = {wanted: call(wanted) for wanted in (True, False)}
    assert len(want[True]) > 4

    def wrong(wanted):
        def count():
            results = [call(wanted) for _ in range(CALLS)]
            return sum(
                len(result) != len(want[wanted]) or not all(map(torch.equal, result, want[wanted]))
                for result in results
            )

        return count

    assert at_once(*(wrong(wanted) for wanted in (True, False, True, False))) == [0] * THREADS


def test_replicas_of_a_model_take_names():
    """DataParallel calls shallow copies of the model, each in its own thread."""
    model = several()
    want = [run(model, adapter_names=names) for names in MIXES[:2]]
    replicas = [shallow_copy(model) for _ in range(2)]
    found = at_once(
        *(
            lambda replica=replica, names=names: run(replica, adapter_names=names)
            for replica, names in zip(replicas, MIXES[:2], strict=True)
        )
    )
    assert all(map(torch.equal, found, want))


def shallow_copy(module):
    """Copy all modules and share all parameters, as `torch.nn.parallel.replicate` does."""
    copies = {old: old._replicate_for_data_parallel() for old in module.modules()}
    for old, new in copies.items():
        for name, child in old._modules.items():
            new._modules[name] = None if child is None else copies[child]
        for name, parameter in old._parameters.items():
            new._parameters[name] = parameter
    return copies[module]


def test_the_lock_is_free_after_an_error():
    model = several()
    with pytest.raises(ValueError, match="non-existing"):
        run(model, adapter_names=["x", "y"])
    with pytest.raises(ValueError, match="x"):
        model.set_adapter("x")
    assert at_once(lambda: SWITCHING.acquire(timeout=PATIENCE) and SWITCHING.release() is None) == [True]


def test_plain_injection_uses_the_state_of_the_layers():
    """Without a PeftModel, the state of a call is not stored."""
    model = get_peft_model(make_host(), SDPTConfig(init_weights=False))
    assert torch.equal(run(model.base_model.model), run(model))
