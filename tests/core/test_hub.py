# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters on the Hub: pushed, loaded, refused, and what their cards say; with the real client and a server of ours."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from peft_sdpt import SDPTConfig, __version__
from peft_sdpt.model_card import with_section
from tests.helpers.bi_multi_head import FusionTower
from tests.helpers.detectors import ROOT, adapted_layers, attach, make_host, run, snapshot
from tests.helpers.hub import FAULTS, OWNER, READER, wait_little
from tests.helpers.patience import PATIENCE
from tests.helpers.tiny import cases

REPO = "user/adapter"
WEIGHTS = "adapter_model.safetensors"
MADE_BY_US = "Tokens for [SDPT"

# PEFT asks the Hub also when a model with a name is saved.
pytestmark = pytest.mark.usefixtures("hub")


def named_host(name="IDEA-Research/grounding-dino-tiny"):
    host = make_host()
    host.name_or_path = name
    return host


def card_of(hub, path="README.md", repo=REPO):
    return hub.repositories[repo].files()[path].decode()


# ---- pushing and loading


def test_push_a_model_and_load_it(hub):
    model = attach(named_host())
    model.push_to_hub(REPO, token=OWNER)
    assert {"adapter_config.json", WEIGHTS, "README.md"} == set(hub.repositories[REPO].files())
    loaded = PeftModel.from_pretrained(make_host(), REPO)
    assert torch.equal(run(loaded), run(model))
    assert type(PeftConfig.from_pretrained(REPO)) is SDPTConfig
    second = attach(make_host())
    second.load_adapter(REPO, "second")
    second.set_adapter("second")
    assert torch.equal(run(second), run(model))
    assert hub.fetched().count(WEIGHTS) == 1  # checked and loaded, fetched once


def test_push_by_git_lfs(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.lfs = (".safetensors",)
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    assert [*hub.stored.values()] == [hub.repositories[REPO].files()[WEIGHTS]]
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO)), run(model))


def test_push_and_load_a_config_alone(hub):
    SDPTConfig(num_virtual_tokens=7).push_to_hub(REPO, token=OWNER)
    assert set(hub.repositories[REPO].files()) == {"adapter_config.json", "README.md"}
    for config_class in (PeftConfig, SDPTConfig):
        assert config_class.from_pretrained(REPO).num_virtual_tokens == 7


def test_revisions(hub):
    models = {branch: attach(make_host(), seed=seed) for seed, branch in enumerate(("main", "other"))}
    models["main"].push_to_hub(REPO, token=OWNER)
    models["other"].push_to_hub(REPO, token=OWNER, revision="other")
    for branch, model in models.items():
        loaded = PeftModel.from_pretrained(make_host(), REPO, revision=branch)
        assert torch.equal(run(loaded), run(model))
    commit = hub.repositories[REPO].branches["other"]
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO, revision=commit)), run(models["other"]))
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(host, REPO, revision="nosuch")
    assert snapshot(host) == before


def test_subfolders(hub, tmp_path):
    models = [attach(make_host(), seed=seed) for seed in range(2)]
    models[0].save_pretrained(tmp_path / "out")
    models[1].save_pretrained(tmp_path / "out" / "best")
    hub.add(REPO, tmp_path / "out")
    for subfolder, model in ((None, models[0]), ("best", models[1])):
        assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO, subfolder=subfolder)), run(model))
    local = PeftModel.from_pretrained(make_host(), tmp_path / "out", subfolder="best")
    assert torch.equal(run(local), run(models[1]))


def test_private_repositories(hub):
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER, private=True)
    assert hub.repositories[REPO].private
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'user/adapter'"):
        PeftModel.from_pretrained(host, REPO)
    assert snapshot(host) == before
    assert torch.equal(run(PeftModel.from_pretrained(host, REPO, token=READER)), run(model))
    second = attach(make_host())
    second.load_adapter(REPO, "second", token=READER)


def test_offline_from_the_cache(hub, monkeypatch, request):
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    PeftModel.from_pretrained(make_host(), REPO)
    request.getfixturevalue("offline")
    asked = len(hub.requests)
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO)), run(model))
    assert len(hub.requests) == asked
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'user/other'"):
        PeftModel.from_pretrained(host, "user/other")
    assert snapshot(host) == before


def test_a_subfolder_offline_is_refused_before_the_host_is_touched(hub, tmp_path, request):
    """PEFT 0.21 looks for sub/sub/adapter_model.safetensors; a snapshot of the repository has it."""
    model = attach(make_host())
    model.save_pretrained(tmp_path / "out" / "best")
    hub.add(REPO, tmp_path / "out")
    PeftModel.from_pretrained(make_host(), REPO, subfolder="best")
    snapshot_download(REPO)
    request.getfixturevalue("offline")
    host = make_host()
    before = snapshot(host)
    with pytest.raises(ValueError, match="'user/adapter/best' cannot be loaded, and nothing was put on the base model"):
        PeftModel.from_pretrained(host, REPO, subfolder="best")
    assert snapshot(host) == before
    folder = snapshot_download(REPO, local_files_only=True)
    assert torch.equal(run(PeftModel.from_pretrained(host, folder, subfolder="best")), run(model))


def test_another_process(hub, tmp_path):
    """With nothing but the environment to tell where the Hub is."""
    code = """
import sys
import torch, peft_sdpt
torch.set_num_threads(1)
from peft import PeftModel
from tests.helpers.detectors import attach, make_host, run
model = PeftModel.from_pretrained(make_host(), "user/adapter")
if sys.argv[2] == "push":
    model.push_to_hub("user/again", token="hf_owner")
print(run(model).sum().item())
"""
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    outputs = [str(run(model).sum().item())]
    for step, settings in (
        ("push", {}),
        ("load", {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}),
    ):
        result = start(code, step, **settings)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout.splitlines()[-1])
    assert len({*outputs}) == 1
    weights = [hub.repositories[name].files()[WEIGHTS] for name in (REPO, "user/again")]
    assert weights[0] == weights[1]


def start(code, *arguments, **settings):

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-c", code, str(ROOT / "tests"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)


# ---- what goes wrong leaves the host as it was


def loads(name=REPO):
    """The ways of loading that ask for the config first, on a host and beside another adapter."""
    return (
        (make_host(), lambda host: PeftModel.from_pretrained(host, name)),
        (make_host(), lambda host: PeftModel.from_pretrained(host, name, is_trainable=True, low_cpu_mem_usage=True)),
        (attach(make_host()), lambda model: model.load_adapter(name, "second")),
    )


def refused(message, name=REPO):
    for host, load in loads(name):
        before, layers = snapshot(host), adapted_layers(host)
        with pytest.raises(ValueError, match=message) as caught:
            load(host)
        assert snapshot(host) == before and adapted_layers(host) == layers
        assert not hasattr(host, "peft_config") or list(host.peft_config) == ["default"]
    return caught.value


def damage(content, how):
    if how == "cut in the tensors":
        return content[:-100]
    if how == "cut in the header":
        return content[:20]
    if how == "empty":
        return b""
    return b"\xff" * len(content)


@pytest.mark.parametrize("how", ["cut in the tensors", "cut in the header", "empty", "other bytes"])
@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_damaged_weights(hub, tmp_path, where, how):
    folder = tmp_path / "out"
    attach(make_host()).save_pretrained(folder)
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes(), how))
    hub.add(REPO, folder)
    name = str(folder) if where == "folder" else REPO
    error = refused("weights of the SDPT adapter .* cannot be loaded, and nothing was put on the base model: ", name)
    assert name in str(error)


@pytest.mark.parametrize("mode", ["unified", "independent"])
def test_weights_of_another_config(tmp_path, mode):
    attach(make_host(), prompt_mode=mode).save_pretrained(tmp_path)
    assert SDPTConfig.from_pretrained(tmp_path).prompt_mode == mode
    weights = load_file(tmp_path / WEIGHTS)
    changed = {key: value[..., :3, :].contiguous() for key, value in weights.items()}
    save_file(changed, tmp_path / WEIGHTS)
    refused(r"do not fit its config.*expected \((2, 4, 128|4, 64)\), found \((2, 3, 128|3, 64)\)", str(tmp_path))
    save_file(dict(list(weights.items())[:1]), tmp_path / WEIGHTS)
    refused("do not fit its config.*found no prompts", str(tmp_path))


def test_a_download_that_breaks_off_goes_on(hub, impatient):
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    hub.dropped = {WEIGHTS: 2}
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO)), run(model))


def test_a_download_that_breaks_off_for_good(hub, impatient):
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    hub.dropped = {WEIGHTS: 10**6}
    refused("cannot be loaded, and nothing was put on the base model: RemoteProtocolError")
    hub.dropped = {}
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO)), run(model))


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "other bytes"])
def test_an_answer_that_is_not_the_file(hub, monkeypatch, fault):
    """The base model stays unchanged, and the next try works."""
    wait_little(monkeypatch, 0.1 if fault == "stalled" else 5.0)
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    host = make_host()
    before = snapshot(host)
    for file in ("adapter_config.json", WEIGHTS):
        hub.faults = {file: fault}
        with pytest.raises(
            ValueError, match=r"cannot be loaded, and nothing was put|Can't find 'adapter_config\.json'"
        ):
            PeftModel.from_pretrained(host, REPO)
    assert snapshot(host) == before
    hub.faults = {}
    assert torch.equal(run(PeftModel.from_pretrained(host, REPO)), run(model))


def test_damaged_weights_leave_the_cache(hub):
    """huggingface_hub compares the length alone, and would give out the damaged file again."""
    model = attach(make_host())
    model.push_to_hub(REPO, token=OWNER)
    hub.faults = {WEIGHTS: "other bytes"}
    refused("cannot be loaded, and .*: the downloaded adapter_model.safetensors had another content than on the Hub")
    hub.faults = {}
    assert torch.equal(run(PeftModel.from_pretrained(make_host(), REPO)), run(model))


def test_weights_that_the_hub_does_not_give_out(hub):
    attach(make_host()).push_to_hub(REPO, token=OWNER)
    for status in (401, 403):
        hub.refused = {WEIGHTS: status}
        refused("cannot be loaded, and nothing was put on the base model")


def test_what_the_hub_has_not(hub):
    refused(r"Can't find 'adapter_config\.json' at 'user/nosuch'", "user/nosuch")


def test_pushing_without_the_right_to(hub):
    model = attach(make_host())
    for token, repo in ((None, REPO), (READER, REPO), (OWNER, "other/adapter"), ("wrong", REPO)):
        with pytest.raises(Exception, match=r"401|403"):
            model.push_to_hub(repo, token=token)
    assert not hub.repositories


# ---- cards


def test_the_card(tmp_path):
    model = attach(named_host(), pinv_rtol=0.2, modules_to_save=["text_projection"])
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "IDEA-Research/grounding-dino-tiny"
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "zero-shot-object-detection"
    assert {"sdpt", "base_model:adapter:IDEA-Research/grounding-dino-tiny"} <= {*card.data.tags}
    assert "More Information Needed" not in card.text
    for text in (
        "# SDPT adapter for IDEA-Research/grounding-dino-tiny",
        "import peft_sdpt  # first; without it, PEFT raises KeyError: 'SDPT'",
        'from_pretrained("IDEA-Research/grounding-dino-tiny")',
        "| tokens | 4 per layer, 520 parameters in total with the gates |",
        "| fusion layers | 2, with tokens of width 64;",
        "| `pinv_rtol` | 0.2 |",
        "| fully trained modules | `text_projection` |",
        f"- peft_sdpt {__version__}",
    ):
        assert text in card.text
    saved = card.content
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == saved


def test_the_card_of_a_host_from_a_folder_does_not_tell_where_that_was(tmp_path):
    (tmp_path / "a host").mkdir()
    attach(named_host(str(tmp_path / "a host"))).save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "`a host`" in card
    data = ModelCard(card).data
    assert data.base_model is None and not [tag for tag in data.tags if tag.startswith("base_model")]
    attach(make_host()).save_pretrained(tmp_path / "nameless")
    assert "SDPT adapter for the base model" in (tmp_path / "nameless" / "README.md").read_text()


def test_the_card_of_a_host_of_another_kind_says_how_that_is_loaded(tmp_path):
    lxmert = next(case for case in cases() if case.name == "lxmert")
    attach(lxmert.make()).save_pretrained(tmp_path / "lxmert")
    attach(FusionTower("glip")).save_pretrained(tmp_path / "glip")
    of_lxmert, of_glip = (ModelCard.load(tmp_path / name / "README.md") for name in ("lxmert", "glip"))
    name = type(lxmert.make()).__name__
    assert (
        f"from transformers import {name}\n" in of_lxmert.text
        and f"base_model = {name}.from_pretrained(" in of_lxmert.text
    )
    assert "base_model = ...  # the model that these tokens belong to" in of_glip.text
    for card in (of_lxmert, of_glip):
        assert card.data.pipeline_tag is None and "open-vocabulary-detection" not in card.data.tags


def test_what_the_author_wrote_stays(tmp_path):
    model = attach(named_host())
    card = "---\nlicense: mit\n---\n\n# My cells\n\nTrained on **my** cells.\n"
    (tmp_path / "README.md").write_text(card)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        written = ModelCard.load(tmp_path / "README.md")
        assert written.data.license == "mit"
        assert written.text.startswith("\n# My cells\n\nTrained on **my** cells.\n\n<!-- adapter: begin")
        assert written.text.count(MADE_BY_US) == written.text.count("### Framework versions") == 1
    # Also behind the section, and a title in place of ours.
    (tmp_path / "README.md").write_text(written.content + "\n## Limits\n\nOnly my cells.\n")
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again == written.content + "\n## Limits\n\nOnly my cells.\n"


def test_a_section_whose_end_was_lost_takes_no_text_with_it():
    text = with_section("# Mine\n", "results", "AP 0.5")
    assert with_section(text, "results", "AP 0.6") == text.replace("0.5", "0.6")
    assert with_section(text, "results", None) == "# Mine\n"
    broken = text.replace("<!-- results: end -->", "Mine too.")
    assert "Mine too." in with_section(broken, "results", "AP 0.6")
    assert with_section(text.replace("Written by a program", "Written by us"), "results", "AP 0.5") == text


def test_files_that_are_no_card_of_an_adapter_are_left_alone(tmp_path):
    file = tmp_path / "README.md"
    for text in ("# My project\n", "---\nlibrary_name: keras\n---\n# A model\n", "", "---\nlist\n"):
        file.write_text(text)
        SDPTConfig().save_pretrained(tmp_path)
        assert file.read_text() == text
    file.write_text("---\nbroken: [\n---\n# A model\n")
    with pytest.warns(UserWarning, match="not completed, because it cannot be read as a model card"):
        SDPTConfig().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    file.unlink()
    SDPTConfig().save_pretrained(tmp_path)
    assert not file.exists()


def test_the_card_of_a_pushed_model(hub):
    """transformers 5.24 puts an empty card over the one that was saved, but keeps the one that the Hub has."""
    model = attach(named_host())
    model.push_to_hub(REPO, token=OWNER)
    assert MADE_BY_US not in card_of(hub)
    model.peft_config["default"].push_to_hub(REPO, token=OWNER)
    mapping = json.loads(hub.repositories[REPO].files()["adapter_config.json"])["auto_mapping"]
    assert mapping["base_model_class"] == "GroundingDinoForObjectDetection"
    assert MADE_BY_US in card_of(hub) and "More Information Needed" not in card_of(hub)
    model.push_to_hub(REPO, token=OWNER)
    assert MADE_BY_US in card_of(hub)
    # The config first, and all is in order.
    model.peft_config["default"].push_to_hub("user/second", token=OWNER)
    model.push_to_hub("user/second", token=OWNER)
    assert card_of(hub, repo="user/second") == card_of(hub)


def test_the_config_names_the_package(tmp_path):
    attach(make_host()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["peft_sdpt_version"] == __version__
    file.write_text(json.dumps({**config, "peft_sdpt_version": "0.0.9"}))
    assert SDPTConfig.from_pretrained(tmp_path).peft_sdpt_version == "0.0.9"
    del config["peft_sdpt_version"]  # of the time before the field
    file.write_text(json.dumps(config))
    PeftModel.from_pretrained(make_host(), tmp_path)
