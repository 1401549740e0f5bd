# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the released code as adapters: the same tokens, and the same function on a GLIP."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from peft_sdpt import SDPTConfig
from peft_sdpt.convert import convert, main
from tests.helpers.bi_multi_head import DL, DV, WIDTH, Glip
from tests.helpers.detectors import ROOT, adapted_layers
from tests.helpers.patience import PATIENCE
from tests.helpers.tiny import randomise

N, NV, NL = 5, 9, 6
# Convolution `i` of GLIP's head has its fusion layer, a text layer and the convolution itself in the tower.
CPT_LAYERS = (0, 2)
ADAPTED = ["rpn.head.dyhead_tower.0.b_attn.attn", "rpn.head.dyhead_tower.6.b_attn.attn"]
FIRST, SECOND = (f"{name}.cpt_input" for name in ADAPTED)


class ReleasedAttention(Glip.BiMultiHeadAttention):
    """What the released code makes of GLIP's attention, in the words of the paper: append, mask, run, drop."""

    def __init__(self):
        super().__init__()
        self.cpt_input = nn.Parameter(torch.empty(1, N, WIDTH).uniform_(-1, 1))
        self.cpt_maskpad = nn.Parameter(torch.zeros(1, N))

    def forward(self, v, l, attention_mask_l=None):  # noqa: E741
        def back(projection):
            return (self.cpt_input - projection.bias) @ torch.linalg.pinv(projection.weight).T

        image, text = torch.cat([v, back(self.v_proj)], dim=1), torch.cat([l, back(self.l_proj)], dim=1)
        mask = torch.cat([attention_mask_l, self.cpt_maskpad], dim=1)
        image, text = super().forward(image, text, mask)
        return image[:, :-N], text[:, :-N]


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn = attention
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(DV), nn.LayerNorm(DL)
        self.gamma_v, self.gamma_l = nn.Parameter(torch.full((DV,), 0.7)), nn.Parameter(torch.full((DL,), 0.7))

    def forward(self, image, text, mask):
        image, text = self.layer_norm_v(image), self.layer_norm_l(text)
        more_image, more_text = self.attn(image, text, attention_mask_l=mask)
        return image + self.gamma_v * more_image, text + self.gamma_l * more_text


class Detector(nn.Module):
    """Fusion layers under the names that they have in GLIP, and what is between them."""

    def __init__(self, cpt_layers=()):
        super().__init__()
        torch.manual_seed(0)
        tower = []
        for index in range(3):
            fusion = nn.Module()
            fusion.b_attn = Block((ReleasedAttention if index in cpt_layers else Glip.BiMultiHeadAttention)())
            tower += [fusion, nn.Linear(DL, DL), nn.Linear(DV, DV)]
        self.rpn = nn.Module()
        self.rpn.head = nn.Module()
        self.rpn.head.dyhead_tower = nn.Sequential(*tower)

    def forward(self, image, text, mask):
        tower = self.rpn.head.dyhead_tower
        for fusion, text_layer, convolution in zip(tower[::3], tower[1::3], tower[2::3], strict=True):
            image, text = fusion.b_attn(image, text, mask)
            image, text = convolution(image), text_layer(text)
        return image, text


def released():
    """A detector with tokens, of which those of the first fusion layer are not those of the last."""
    detector = Detector(CPT_LAYERS)
    tokens = {key: value.clone() for key, value in detector.state_dict().items() if "cpt_" in key}
    randomise(detector)
    detector.load_state_dict(tokens, strict=False)
    return detector.eval()


def glip(detector):
    """The detector's host, which is what is left of it without tokens."""
    host = Detector()
    host.load_state_dict({key: value for key, value in detector.state_dict().items() if "cpt_" not in key})
    return host.eval()


def checkpoint_of(detector, prefix=""):
    """What the released code's checkpointer writes, optimizer and scheduler after one step included."""
    optimizer = torch.optim.AdamW([p for n, p in detector.named_parameters() if "cpt_input" in n], lr=1e-5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    sum(p.square().sum() for n, p in detector.named_parameters() if "cpt_input" in n).backward()
    optimizer.step()
    scheduler.step()
    detector.load_state_dict(before)
    return {
        "model": type(before)((prefix + key, value) for key, value in before.items()),
        "optimizer": optimizer.state_dict(),
        "scheduler": [scheduler.state_dict()],
        "iteration": 1,
    }


def inputs(padding=2):
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, NV, DV, generator=generator), torch.randn(1, NL, DL, generator=generator)
    mask = torch.ones(1, NL, dtype=torch.long)
    mask[:, NL - padding :] = 0
    return image, text, mask


@pytest.fixture
def saved(tmp_path):
    """Path of a checkpoint with these changes made to it."""

    def save(change=lambda checkpoint: None):
        checkpoint = checkpoint_of(released())
        checkpoint = change(checkpoint) or checkpoint
        torch.save(checkpoint, tmp_path / "model_final.pth")
        return tmp_path / "model_final.pth"

    return save


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_converted_adapter_computes_what_the_released_code_does(prefix, padding, tmp_path):
    detector = released()
    torch.save(checkpoint_of(detector, prefix), tmp_path / "model_final.pth")
    config = convert(tmp_path / "model_final.pth", tmp_path / "adapter", "somebody/glip-large")

    host = glip(detector)
    bare = host(*inputs(padding))
    model = PeftModel.from_pretrained(host, tmp_path / "adapter")
    assert adapted_layers(model) == [f"base_model.model.{name}" for name in ADAPTED]
    for name in ADAPTED:
        tokens = model.base_model.model.get_submodule(name).sdpt_prompts["default"]
        assert torch.equal(tokens, detector.state_dict()[f"{name}.cpt_input"][0]) and not tokens.requires_grad
    image, text = model(*inputs(padding))
    for one, other in zip((image, text), detector(*inputs(padding)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (text[:, : NL - padding] - bare[1][:, : NL - padding]).abs().max() > 0.1
    with model.disable_adapter():
        assert all(map(torch.equal, model(*inputs(padding)), bare))
    assert model.peft_config["default"].fusion_layers == config.fusion_layers


def test_what_is_written(tmp_path, saved):
    config = convert(str(saved()), str(tmp_path / "new" / "adapter"), base_model_name_or_path="somebody/glip-large")
    folder = tmp_path / "new" / "adapter"
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]
    weights = load_file(folder / "adapter_model.safetensors")
    assert {key: (tuple(value.shape), value.dtype) for key, value in weights.items()} == {
        f"base_model.model.{name}.sdpt_prompts": ((N, WIDTH), torch.float32) for name in ADAPTED
    }
    written = json.loads((folder / "adapter_config.json").read_text())
    expected = {
        "peft_type": "SDPT",
        "num_virtual_tokens": N,
        "target_modules": ADAPTED,
        "fusion_layers": dict.fromkeys(ADAPTED, WIDTH),
        "prompt_mode": "unified",
        "image_attends_prompts": False,
        "pinv_rtol": None,
        "prompt_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": "somebody/glip-large",
    }
    assert {name: written[name] for name in expected} == expected
    assert config == PeftConfig.from_pretrained(folder) and isinstance(config, SDPTConfig)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "somebody/glip-large" in card and "GLIP" in card


def test_training_goes_on_from_it(tmp_path, saved):
    convert(saved(), tmp_path / "adapter")
    model = PeftModel.from_pretrained(glip(released()), tmp_path / "adapter", is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"base_model.model.{name}.sdpt_prompts.default" for name in ADAPTED]
    model(*inputs())[1].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_a_bare_state_dict_and_other_precisions(tmp_path, saved):
    def half(checkpoint):
        return {key: value.half() for key, value in checkpoint["model"].items()}

    convert(saved(half), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ADAPTED:
        tokens = weights[f"base_model.model.{name}.sdpt_prompts"]
        assert torch.equal(tokens, released().state_dict()[f"{name}.cpt_input"][0].half().float())


def test_tokens_that_are_a_view_are_written_as_they_are(tmp_path, saved):
    def transpose(checkpoint):
        model = checkpoint["model"]
        model[FIRST] = model[FIRST].mT.contiguous().mT

    convert(saved(transpose), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(weights[f"base_model.model.{ADAPTED[0]}.sdpt_prompts"], released().state_dict()[FIRST][0])


def test_an_adapter_of_another_host_is_refused(tmp_path, saved):
    convert(saved(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"'{ADAPTED[1]}'.* matches no module|made for another host"):
        host = Detector()
        host.rpn.head.dyhead_tower = host.rpn.head.dyhead_tower[:6]
        PeftModel.from_pretrained(host, tmp_path / "adapter")


# ---- what cannot be converted


def change_model(**values):
    """Change entries of the model; None takes one out. `__` stands for the first attention with tokens."""

    def change(checkpoint):
        for key, value in values.items():
            key = key.replace("__", ADAPTED[0] + ".")
            model = checkpoint["model"]
            model[key] = value(model.get(key)) if callable(value) else value
            if model[key] is None:
                del model[key]

    return change


def without_tokens(checkpoint):
    checkpoint["model"] = {key: value for key, value in checkpoint["model"].items() if "cpt_input" not in key}


def independent(checkpoint):
    model = checkpoint["model"]
    for name in ADAPTED:
        model[f"{name}.cpt_vinput"] = model.pop(f"{name}.cpt_input")
        model[f"{name}.cpt_linput"] = torch.zeros(1, N, WIDTH)


def image_set_alone(checkpoint):
    independent(checkpoint)
    del checkpoint["model"][f"{ADAPTED[1]}.cpt_linput"]


def spoil(value):
    def change(tokens):
        tokens[0, 1, 2] = value
        return tokens

    return change


WRONG = {
    "no tokens": (without_tokens, r"no key ends with '\.cpt_input'"),
    "a matrix": (change_model(__cpt_input=lambda t: t[0]), rf"{FIRST} must be \(1, N, E\).*got \({N}, {WIDTH}\)"),
    "two sets": (change_model(__cpt_input=lambda t: t.repeat(2, 1, 1)), rf"{FIRST} must be .*got \(2, {N}, {WIDTH}\)"),
    "none": (change_model(__cpt_input=lambda t: t[:, :0]), rf"{FIRST} must be .*got \(1, 0, {WIDTH}\)"),
    "integers": (
        change_model(__cpt_input=lambda t: t.long()),
        rf"{FIRST} must have a floating-point dtype, got torch.int64",
    ),
    "no tensor": (change_model(__cpt_input=[1.0]), rf"{FIRST} must be a tensor, got list"),
    "other numbers of tokens": (
        change_model(__cpt_input=lambda t: t[:, :2]),
        rf"the same number of tokens, got 2 in {FIRST}, {N} in {SECOND}",
    ),
    "not a number": (change_model(__cpt_input=spoil(float("nan"))), rf"{FIRST} has values that are not finite"),
    "infinite": (change_model(__cpt_input=spoil(float("inf"))), rf"{FIRST} has values that are not finite"),
    "infinite in float32": (
        change_model(__cpt_input=lambda t: spoil(1e200)(t.double())),
        rf"{FIRST} has values that are not finite",
    ),
    "independent": (
        independent,
        rf"{ADAPTED[0]}\.cpt_vinput.*{ADAPTED[1]}\.cpt_linput.*prompt_mode='independent'.* a different method",
    ),
    "one of two sets": (image_set_alone, rf"{ADAPTED[1]}\.cpt_vinput needs {ADAPTED[1]}\.cpt_linput"),
    "the other of two sets": (
        change_model(__cpt_linput=torch.zeros(1, N, WIDTH)),
        rf"{ADAPTED[0]}\.cpt_linput needs {ADAPTED[0]}\.cpt_vinput",
    ),
    "both modes": (
        change_model(__cpt_vinput=torch.zeros(1, N, WIDTH)),
        rf"{ADAPTED[0]} has cpt_input and cpt_vinput",
    ),
    "unknown": (change_model(__cpt_scale=torch.zeros(1)), rf"{ADAPTED[0]}\.cpt_scale is unknown"),
    "a mask that shows prompts": (
        change_model(__cpt_maskpad=torch.ones(1, N)),
        rf"{ADAPTED[0]}\.cpt_maskpad must be zeros",
    ),
    "adapters as well": (
        change_model(**{"__adaptera.fc1.weight": torch.zeros(2, 2)}),
        rf"{ADAPTED[0]}\.adaptera\.fc1\.weight",
    ),
    "LoRA as well": (change_model(**{"__v_proj.lora_A": torch.zeros(2, 2)}), rf"{ADAPTED[0]}\.v_proj\.lora_A"),
    "no module": (change_model(cpt_input=torch.zeros(1, N, WIDTH)), "cpt_input belongs to no module"),
    "a list": (lambda checkpoint: [1, 2], "must be a state dict.*got list"),
    "no model": (lambda checkpoint: checkpoint.update(model=3), "must be a state dict.*got int"),
    "numbers for names": (lambda checkpoint: {0: torch.zeros(1)}, "must be a state dict"),
    "pickled objects": (
        lambda checkpoint: checkpoint.update(cfg=argparse.Namespace(vpt_only=-4)),
        r"must be readable by torch\.load with weights_only=True.*argparse\.Namespace",
    ),
}


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line(change, message, saved, tmp_path, capsys):
    file = saved(change)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "adapter")
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(tmp_path / "adapter")])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("peft_sdpt.convert: checkpoint=") and err.count("\n") == 1
    assert str(file) in err
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_all_that_is_wrong_is_named(saved, tmp_path):
    change = change_model(__cpt_scale=torch.zeros(1), __cpt_input=spoil(float("nan")))
    with pytest.raises(ValueError, match=r"cpt_scale.*; .*not finite|not finite.*; .*cpt_scale"):
        convert(saved(change), tmp_path / "adapter")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    file = tmp_path / "model.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth': must be readable by torch\.load"):
        convert(file, tmp_path / "adapter")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_off(share, saved, tmp_path):
    file = saved()
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"model_final\.pth': must be readable by torch\.load"):
        convert(file, tmp_path / "adapter")


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    for file in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(SystemExit) as ended:
            main([str(file), str(tmp_path / "adapter")])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1
        assert err.startswith("peft_sdpt.convert: ") and str(file) in err
    assert list(tmp_path.iterdir()) == []


# ---- where it is written


def test_an_adapter_that_is_there_is_left_alone(saved, tmp_path, capsys):
    file = saved()
    convert(file, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(
        FileExistsError, match=r"'.*adapter': must be a new or empty folder, but it has adapter_config\.json"
    ):
        convert(file, tmp_path / "adapter")
    with pytest.raises(SystemExit) as ended:
        main([str(file), str(tmp_path / "adapter")])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


def test_a_folder_in_use_and_a_file_are_left_alone(saved, tmp_path):
    file = saved()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes': must be a new or empty folder, but it has notes\.txt"):
        convert(file, tmp_path / "notes")
    with pytest.raises(FileExistsError, match="must be a new or empty folder, but it is a file"):
        convert(file, file)
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(saved, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    convert(saved(), tmp_path / "link")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file() and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("where", ["weights", "config"])
def test_nothing_is_left_of_a_conversion_that_fails(where, saved, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    file = saved()
    if where == "weights":
        monkeypatch.setattr("peft_sdpt.convert.save_file", fail)
    else:
        monkeypatch.setattr(SDPTConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(file, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == [file]


# ---- the command


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "peft_sdpt.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
    )


def test_command(saved, tmp_path, capsys):
    file, folder = saved(), tmp_path / "adapter"
    done = command(file, folder, "--base_model_name_or_path", "somebody/glip-large")
    assert done.returncode == 0, done.stderr
    size = (folder / "adapter_model.safetensors").stat().st_size
    for part in (
        *ADAPTED,
        "2 fusion layers",
        f"{N} tokens per layer",
        f"embedding dimension {WIDTH}",
        f"{size:,} bytes",
        str(folder),
    ):
        assert part in done.stdout
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/glip-large"
    with pytest.raises(SystemExit) as again:
        main([str(file), str(folder)])
    captured = capsys.readouterr()
    assert again.value.code == 2 and captured.out == ""
    assert captured.err.splitlines()[-1].startswith("peft_sdpt.convert: output_dir=")


def test_help_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("checkpoint", "output_dir", "--base_model_name_or_path", "GLIP"))


def test_paths_may_be_relative(saved, tmp_path, monkeypatch, capsys):
    file = saved()
    monkeypatch.chdir(tmp_path)
    main([file.name, "adapter"])
    assert Path("adapter", "adapter_config.json").is_file()
    assert capsys.readouterr().out.startswith("adapter: ")
