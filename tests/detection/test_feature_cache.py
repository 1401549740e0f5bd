# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Stored features of the frozen backbones: the same training but for rounding, whatever has become of the files."""

import errno
import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save
from transformers import (
    GroundingDinoForObjectDetection,
)

from peft_sdpt.detection import feature_cache, stored_tensors
from peft_sdpt.detection.feature_cache import FeatureCache
from peft_sdpt.detection.stored_tensors import read_tensors
from peft_sdpt.errors import InputError
from tests.helpers.backbones import counted
from tests.helpers.detectors import HOST_NAMES, attach, host_config, make_host, model_inputs
from tests.helpers.disk import file_size_limit
from tests.helpers.patience import PATIENCE


@pytest.fixture(params=HOST_NAMES)
def detector(request):
    return attach(make_host(request.param)).train()


@pytest.fixture
def tiny():
    return attach(make_host()).train()


def of(config):
    """A detector of a configuration, its weights the same each time."""
    torch.manual_seed(0)
    return attach(GroundingDinoForObjectDetection(config))


def backbones(detector):
    host = detector.get_base_model().model
    return {"picture": host.backbone.conv_encoder.model, "prompt": host.text_backbone}


def mixed(batch=2, seed=0):
    """A batch with a picture that is padded, and a prompt that is."""
    inputs = model_inputs(batch, seed=seed)
    mask = torch.ones(batch, 64, 64, dtype=torch.long)
    mask[-1, 40:] = mask[-1, :, 52:] = 0
    return inputs | {"pixel_mask": mask, "pixel_values": inputs["pixel_values"] * mask[:, None]}


def trained(detector, cache=None, inputs=None):
    """Outputs of a batch in training, and the gradients of all prompts."""
    detector.zero_grad()
    with cache.used() if cache else nullcontext():
        outputs = detector(**(inputs or mixed()))
    values = [outputs.logits.nan_to_num(neginf=0), outputs.pred_boxes, outputs.encoder_pred_boxes]
    sum(value.square().sum() for value in values).backward()
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.grad is not None]
    assert gradients
    return torch.cat([value.detach().flatten() for value in (*values, *gradients)])


def entries(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_outputs_and_gradients_are_those_without_it_bit_for_bit(detector, tmp_path):
    plain = trained(detector)
    cache = FeatureCache(tmp_path, detector)
    for computed in ({"picture": 2, "prompt": 2}, {"picture": 0, "prompt": 0}):
        with counted() as count:
            assert torch.equal(trained(detector, cache), plain)
        assert count == computed
    assert torch.equal(trained(detector), plain)
    assert not any("forward" in vars(module) for module in backbones(detector).values())
    assert all(module.training for module in detector.modules())
    assert len(entries(tmp_path)) == 4 and not list(tmp_path.rglob("*.unfinished"))


def test_prompts_that_are_never_met_again_are_not_kept(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny)
    with torch.no_grad(), counted() as count, cache.used(prompts=False):
        for _ in range(2):
            tiny(**mixed())
    assert count == {"picture": 2, "prompt": 4} and len(entries(tmp_path)) == 2


def test_of_samples_that_are_alike_one_is_computed(tiny, tmp_path):
    inputs = {name: value[:1].repeat(3, *[1] * (value.ndim - 1)) for name, value in mixed().items()}
    cache = FeatureCache(tmp_path, tiny)
    plain = trained(tiny, inputs=inputs)
    with counted() as count:
        assert torch.equal(trained(tiny, cache, inputs), plain)
    assert count == {"picture": 1, "prompt": 1}


def test_entries_are_the_same_in_whatever_batch_they_were_computed(tiny, tmp_path):
    whole, single = tmp_path / "whole", tmp_path / "single"
    trained(tiny, FeatureCache(whole, tiny))
    cache = FeatureCache(single, tiny)
    for row in (1, 0):
        trained(tiny, cache, {name: value[row : row + 1] for name, value in mixed().items()})
    there = [{path.relative_to(folder): path.read_bytes() for path in entries(folder)} for folder in (whole, single)]
    assert there[0] == there[1]


def wider(inputs):
    """Padded as beside a larger picture."""
    pad = (0, 32)
    return inputs | {name: torch.nn.functional.pad(inputs[name], pad) for name in ("pixel_values", "pixel_mask")}


def another_word(inputs):
    ids = inputs["input_ids"].clone()
    ids[0, 1] = 777
    return inputs | {"input_ids": ids}


def another_end_of_phrase(inputs):
    """The same length, and other masks and positions."""
    ids = inputs["input_ids"].clone()
    ids[:, 2] = 1012
    return inputs | {"input_ids": ids}


def longer(inputs):
    """Padded as beside a longer prompt."""
    text = {name: torch.nn.functional.pad(inputs[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    return inputs | text | {"token_type_ids": torch.zeros_like(text["input_ids"])}


def one_pixel(inputs):
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 0, 0] += 1e-3
    return inputs | {"pixel_values": pixels}


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (lambda inputs: inputs, (0, 0)),
        (one_pixel, (1, 0)),
        (lambda inputs: inputs | {"pixel_values": inputs["pixel_values"].flip(0)}, (0, 0)),
        (lambda inputs: inputs | {"pixel_mask": torch.ones_like(inputs["pixel_mask"])}, (0, 0)),
        (wider, (2, 0)),
        (another_word, (0, 1)),
        (another_end_of_phrase, (0, 2)),
        (longer, (0, 2)),
    ],
)
def test_what_is_another_picture_or_prompt_is_computed(detector, tmp_path, change, computed):
    cache = FeatureCache(tmp_path, detector)
    trained(detector, cache)
    changed = change(mixed())
    plain = trained(detector, inputs=changed)
    with counted() as count:
        assert torch.equal(trained(detector, cache, changed), plain)
    assert (count["picture"], count["prompt"]) == computed


@pytest.mark.parametrize(("part", "computed"), [("picture", (2, 0)), ("prompt", (0, 2)), ("fusion", (0, 0))])
def test_another_weight_is_another_host(tiny, tmp_path, part, computed):
    trained(tiny, FeatureCache(tmp_path, tiny))
    module = backbones(tiny).get(part, tiny.get_base_model().model.encoder)
    with torch.no_grad():
        next(parameter for parameter in module.parameters() if parameter.ndim > 1).view(-1)[5] += 0.5
    plain = trained(tiny)
    with counted() as count:
        assert torch.equal(trained(tiny, FeatureCache(tmp_path, tiny)), plain)
    assert (count["picture"], count["prompt"]) == computed


def test_another_configuration_is_another_host(tmp_path):
    """What weights do not show."""
    for activation, computed in (("gelu", 2), ("relu", 2), ("gelu", 0)):
        config = host_config("grounding_dino")
        config.backbone_config.hidden_act = activation
        detector = of(config)
        plain = trained(detector)
        with counted() as count:
            assert torch.equal(trained(detector, FeatureCache(tmp_path, detector)), plain)
        assert count["picture"] == computed


def test_another_precision_is_computed(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny)
    trained(tiny, cache)
    for computed in (4, 0):
        with torch.autocast("cpu", torch.bfloat16), counted() as count:
            plain = trained(tiny)
            count.update(picture=0, prompt=0)
            assert torch.equal(trained(tiny, cache), plain)
        assert sum(count.values()) == computed


def test_half_precision_is_kept_as_it_is(tmp_path):
    detector = attach(make_host().to(torch.bfloat16))
    inputs = mixed()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    cache = FeatureCache(tmp_path, detector)
    with torch.no_grad():
        plain = detector(**inputs).pred_boxes
        for _ in range(2):
            with cache.used():
                assert torch.equal(detector(**inputs).pred_boxes, plain)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def flip_header(data):
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("damage", [cut, flip, flip_header, lambda _: b"", lambda data: bytes(len(data))])
def test_an_entry_that_is_damaged_is_computed_again(tiny, tmp_path, damage):
    cache = FeatureCache(tmp_path, tiny)
    plain = trained(tiny, cache)
    whole = {file: file.read_bytes() for file in entries(tmp_path)}
    for file, data in whole.items():
        file.write_bytes(damage(data))
    with counted() as count:
        assert torch.equal(trained(tiny, cache), plain)
    assert sum(count.values()) == 4
    assert {file: file.read_bytes() for file in entries(tmp_path)} == whole


def test_an_entry_under_the_name_of_another_is_not_taken(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny)
    plain = trained(tiny, cache)
    one, two = (file for file in entries(tmp_path) if file.parent.name.startswith("pictures-"))
    two.write_bytes(one.read_bytes())
    with counted() as count:
        assert torch.equal(trained(tiny, cache), plain)
    assert count["picture"] == 1


def test_a_folder_that_is_cleared_at_work_is_filled_again(tiny, tmp_path):
    cache = FeatureCache(tmp_path / "cache", tiny)
    plain = trained(tiny, cache)
    for file in entries(tmp_path):
        file.unlink()
    for folder in (*(tmp_path / "cache").iterdir(), tmp_path / "cache"):
        folder.rmdir()
    assert torch.equal(trained(tiny, cache), plain) and len(entries(tmp_path)) == 4


def in_processes(count, work):
    """Run `work(number)` in processes that start as this one is; gives their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def test_killed_while_it_writes_it_leaves_nothing_that_is_used(tiny, tmp_path):
    @torch.no_grad()
    def die_in_the_middle(_):
        replace, calls = os.replace, []

        def killing(*args):
            calls.append(args)
            if len(calls) == 2:
                with open(args[0], "r+b") as file:
                    file.truncate(os.path.getsize(args[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        cache = FeatureCache(tmp_path, tiny)
        os.replace = killing
        with cache.used():
            tiny(**mixed())

    plain = trained(tiny)
    assert in_processes(1, die_in_the_middle) == [-signal.SIGKILL]
    (left,) = tmp_path.rglob("*.unfinished")
    assert len(entries(tmp_path)) == 1
    with counted() as count:
        assert torch.equal(trained(tiny, FeatureCache(tmp_path, tiny)), plain)
    assert sum(count.values()) == 3 and left.exists()  # another process may be writing it
    os.utime(left, (time.time() - 2 * feature_cache.ABANDONED,) * 2)
    FeatureCache(tmp_path, tiny)
    assert not left.exists() and len(entries(tmp_path)) == 4


def test_processes_share_a_folder(tiny, tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    with torch.no_grad():
        plain = [tiny(**mixed(4, seed)).pred_boxes for seed in range(4)]

    @torch.no_grad()
    def work(_):
        cache = FeatureCache(tmp_path, tiny)
        for seed in (0, 1, 2, 3, 0, 1):
            barrier.wait(PATIENCE)
            with cache.used():
                assert torch.equal(tiny(**mixed(4, seed)).pred_boxes, plain[seed])

    assert in_processes(2, work) == [0, 0]
    # Of each seed four pictures, and prompts of which three are not the second.
    assert len(list(tmp_path.glob("pictures-*/*.safetensors"))) == 16
    assert not list(tmp_path.rglob("*.unfinished"))


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_is_told_once_and_leaves_no_half_entry(tiny, tmp_path, monkeypatch, capsys):
    cache = FeatureCache(tmp_path, tiny)
    plain = trained(tiny)
    write = Path.write_bytes

    def half(path, data):
        write(path, data[: len(data) // 2])
        full()

    monkeypatch.setattr(Path, "write_bytes", half)
    assert all(torch.equal(trained(tiny, cache), plain) for _ in range(2))
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(
        "safetensors: cannot be written ([Errno 28] No space left on device). Features that are not stored are "
        "computed in each epoch."
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("forward" in vars(module) for module in backbones(tiny).values())
    # The disk has free space again.
    monkeypatch.undo()
    assert torch.equal(trained(tiny, cache), plain) and len(entries(tmp_path)) == 4


def test_a_disk_that_is_really_full(tiny, tmp_path, capsys):
    cache = FeatureCache(tmp_path, tiny)
    plain = trained(tiny)
    with file_size_limit(100):
        assert torch.equal(trained(tiny, cache), plain)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("total", "free", "stored"), [(2**40, 2**27, 0), (2**40, 2**30, 4), (0, 0, 4)])
def test_room_is_left_for_the_adapter(tiny, tmp_path, monkeypatch, capsys, total, free, stored):
    monkeypatch.setattr(stored_tensors.shutil, "disk_usage", lambda _: Mock(total=total, free=free))
    trained(tiny, FeatureCache(tmp_path, tiny))
    assert len(entries(tmp_path)) == stored
    assert ("less than 256 MB would be left on the disk" in capsys.readouterr().err) == (stored == 0)


def test_a_folder_that_becomes_a_file_does_not_end_the_run(tiny, tmp_path, capsys):
    cache = FeatureCache(tmp_path / "cache", tiny)
    plain = trained(tiny)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    assert torch.equal(trained(tiny, cache), plain)
    assert "cannot be written" in capsys.readouterr().err


def test_whatever_an_entry_holds_it_is_computed_again(tiny, tmp_path):
    """The entry is a file of another program, or its header is damaged at any place."""
    cache = FeatureCache(tmp_path, tiny)
    trained(tiny, cache)
    (key, file) = next((file.stem, file) for file in entries(tmp_path) if file.parent.name.startswith("pictures-"))
    whole = file.read_bytes()
    right = read_tensors(file, key)
    assert right is not None
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        read = read_tensors(file, key)
        # White space at the end of the header has no meaning.
        assert read is None or all(torch.equal(one, two) for one, two in zip(read, right, strict=True)), place
    about = {"entry": f"{key} 0"}
    foreign = [
        save({}, metadata=about),
        save({"other": torch.zeros(2)}, metadata=about),
        save({"0": torch.zeros(())}),
        save({"0": torch.zeros(2, dtype=torch.bool), "1": torch.zeros(0)}, metadata=about),
        save({"0": torch.zeros(2, dtype=torch.float8_e4m3fn)}, metadata=about),
        save({"0": torch.zeros(2, dtype=torch.complex64)}, metadata=about),
        (2**62).to_bytes(8, "little") + whole[8:],
        b"[" * 10_000,
    ]
    for data in foreign:
        file.write_bytes(data)
        assert read_tensors(file, key) is None
    file.unlink()
    file.mkdir()
    assert read_tensors(file, key) is None


def test_what_trains_below_the_fusion_layers_is_refused(tiny, tmp_path):
    parameter = tiny.get_base_model().model.text_backbone.encoder.layer[0].output.dense.bias
    parameter.requires_grad_(True)
    with pytest.raises(InputError, match=r"cache_folder=...: encoder.layer.0.output.dense.bias of \w+ trains"):
        FeatureCache(tmp_path, tiny)


def test_what_trains_above_is_not(tmp_path):
    detector = attach(make_host(), modules_to_save=["text_projection"])
    plain = trained(detector)
    cache = FeatureCache(tmp_path, detector)
    assert all(torch.equal(trained(detector, cache), plain) for _ in range(2))


def test_a_host_of_other_parts_is_refused(tmp_path):
    with pytest.raises(InputError, match="MM Grounding DINO, got Linear"):
        FeatureCache(tmp_path, torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("backbone_config", "drop_path_rate"),
        ("backbone_config", "hidden_dropout_prob"),
        ("backbone_config", "attention_probs_dropout_prob"),
        ("text_config", "hidden_dropout_prob"),
        ("text_config", "attention_probs_dropout_prob"),
        (None, None),
    ],
)
def test_features_are_without_dropout_and_it_is_known_where_there_is_some(tmp_path, part, name):
    config = host_config("grounding_dino")
    if part:
        setattr(getattr(config, part), name, 0.5)
    detector = of(config).train()
    cache = FeatureCache(tmp_path, detector)
    assert cache.leaves_out_dropout == bool(part)
    for module in backbones(detector).values():
        module.eval()
    plain = trained(detector)
    detector.train()
    assert all(torch.equal(trained(detector, cache), plain) for _ in range(2))
