# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""With any names, a model card has the same parts, and shows the names as they are."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from peft_sdpt import SDPTConfig
from peft_sdpt.commands.train_results import describe_best, describe_last, public_name
from peft_sdpt.detection import load_processor, write_threshold
from peft_sdpt.model_card import (
    LICENCE_FIELDS,
    MAX_SHOWN,
    _read,
    complete_card,
    licence_of,
    with_section,
    write_licence,
    write_section,
)
from peft_sdpt.wording import is_control, printable
from tests.helpers.cards import read_card
from tests.helpers.detectors import ROOT
from tests.helpers.fuzz import BAD_STRINGS, json_values, time_bound

pytestmark = pytest.mark.fuzz

KEYS = {"library_name", "tags", "base_model", "pipeline_tag", *LICENCE_FIELDS}
LINKS = {"https://arxiv.org/abs/2407.11414", "report.png", "detections.png"}
COMMENTS = [f"{name}: {end}" for name in ("adapter", "detection", "results") for end in ("begin", "end")]
# Text that could become markup, HTML or YAML, or end a part of the card.
MARKUP = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</code></td></table>", "<!-- results: end -->"),
    *("-->", "[a](javascript:x)", "![a](x)", "<http://x>", "http://x.y", "www.x.y", "a@b.c", "[a]: http://x", "&lt;"),
    *("&#60;", "`", "``", "```", "~~~", "a`b", "|", "a|b", "\\|", "\\", "*a*", "**", "_a_", "__a__", "a_b", "~~a~~"),
    *("$$x$$", ":smile:", "# a", "## a", "- a", "+ a", "* a", "1. a", "1) a", "> a", "---", "===", "    a", "\ta"),
    *("| a | b |", "|---|", "a: b", ": {", "{a: b}", "!!python/object:os.system", "&a", "*a", "%YAML", "? a", '"a'),
    *(
        "'a",
        '"); import os; ("',
        "{0}",
        "%s",
        "{source}",
        "\\u0022",
        "True",
        "None",
        "import",
        "a\n\n# b",
        "a\n---\nb: c",
        "a\r\n```\r\nb",
    ),
    *("True", "None", "import", "\u202e", "\u200b", "\x7f", "\x85"),
)
names = st.one_of(
    st.sampled_from((*BAD_STRINGS, *MARKUP)),
    st.lists(st.sampled_from((*MARKUP, "dog", " ", "\n")), max_size=4).map("".join),
    st.text(max_size=20),
)


@functools.cache
def processor():
    return load_processor(None, ROOT / "examples" / "host")


def record(class_names: list[str]) -> dict:
    metrics = {"AP": 0.5, "AP50": 0.6, "AP75": 0.4}
    return {
        "args": {},
        "before": metrics,
        "after": metrics,
        "best": {"AP": 0.5},
        "curves": {"loss": {"step": [1]}},
        "classes": {name: {"objects": 3, "before": metrics, "after": metrics} for name in class_names},
        "at_threshold": {"threshold": 0.3, "f1": 0.5, "precision": 0.5, "recall": 0.5},
        "errors": [],
    }


def shown_as(name: str) -> str:
    return printable(name, MAX_SHOWN)


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


@given(
    st.lists(names, min_size=1, max_size=4, unique=True), names, names, names, names, st.lists(names, max_size=2), names
)
def test_any_names_in_a_card(class_names, data_set, split, base_model, source, modules, licence):
    modules = [name for name in modules if name]
    # A config takes no control characters.
    base_model, revision = (
        "".join(letter for letter in each if not is_control(letter)) for each in (base_model, source)
    )
    with time_bound(), tempfile.TemporaryDirectory() as folder:
        card = Path(folder, "README.md")
        card.write_text("---\nlibrary_name: peft\n---\n")
        config = SDPTConfig(
            base_model_name_or_path=base_model,
            revision=revision,
            modules_to_save=modules or None,
            auto_mapping={"parent_library": "transformers.x", "base_model_class": data_set},
        )
        complete_card(folder, config)
        threshold = {"threshold": 0.3, "f1": 0.5, "precision": 0.5, "recall": 0.5, "split": split}
        write_threshold(folder, processor(), class_names, threshold, source)
        results = [describe_best(data_set, split, {"AP": 0.5, "AP50": 0.6, "AP75": 0.4, "step": 3})]
        results.append(describe_last("four images", record(class_names), ["report.png"]))
        write_section(card, "results", "\n\n".join(results))
        write_licence(card, licence_of(folder) or {"license": "other", "license_name": "mine"})
        before = card.read_text(encoding="utf-8")
        complete_card(folder, config)  # and again, as when it is saved again
        content = card.read_text(encoding="utf-8")
        assert content == before

    data, shown = read_card(content)
    assert set(data) <= KEYS and data["library_name"] == "peft"
    assert data.get("base_model") == (base_model if is_hub_id(base_model) else None)
    assert [comment.split(".")[0].strip() for comment in shown.comments] == COMMENTS
    assert set(shown.links) <= LINKS | {f"https://huggingface.co/{base_model}"}
    # The class names in the table and in the results, and everything else that has a name.
    expected = [shown_as(name) for name in (*modules, *class_names, split, split, public_name(data_set))]
    found = iter(shown.names)
    assert all(name in found for name in expected), (shown.names, expected)
    rows = {row[0] for row in shown.rows}
    assert {"classes", "image size", "score threshold", "tokens"} <= rows
    assert {shown_as(name) for name in class_names} <= rows
    assert shown.titles.count("Results") == 2 and len(shown.titles) == 5
    # The code has the source as a string, and no other change.
    line = next(line for line in shown.python[1].splitlines() if "find_adapter" in line)
    assert eval(line.partition("find_adapter")[2].partition("  # ")[0]) == source


@given(st.one_of(json_values, names), st.one_of(json_values, names), names)
def test_any_card_of_a_stranger(value, tags, text):
    """The card is completed, or stays as it is with a warning. The licence is a short text."""
    with time_bound(), tempfile.TemporaryDirectory() as folder:
        card = Path(folder, "README.md")
        try:
            front = json.dumps(
                {"library_name": "peft", "license": value, "license_name": value, "tags": tags, "x": value}
            )
            card.write_text(f"---\n{front}\n---\n{text}\n", encoding="utf-8")
        except UnicodeEncodeError:
            return
        before = card.read_text(encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            warned: list[str] = []
            patch.setattr("warnings.warn", lambda message, **_: warned.append(str(message)))
            complete_card(folder, SDPTConfig())
        after = card.read_text(encoding="utf-8")
        assert "\n<!-- adapter: begin" in after or (after == before and len(warned) == 1 and warned[0].isprintable())
        assert all(name.isprintable() for name in licence_of(folder).values())


@given(names, st.text(max_size=50))
def test_a_section_is_replaced_and_removed(name, text):
    text = text.replace("\r", "")
    once = with_section(f"# Mine\n{text}\n", "results", f"a\n{shown_as(name)}".replace("<!--", "").replace("-->", ""))
    assert with_section(once, "results", "b").count("<!-- results: begin") == 1
    assert "results: begin" not in with_section(once, "results", None) or "results: begin" in text


def test_long_cards_are_read_in_little_time_or_not_at_all(tmp_path):
    card = tmp_path / "README.md"
    parts = (
        "\n",
        "---\n",
        "<!-- adapter: begin",
        "### Framework versions\n",
        "- PEFT 1\n",
        "[",
        "a: &a [*a]\n",
        "- a\n",
    )
    for part in parts:
        for before, after in (("---\n", "\n---\n"), ("---\nlibrary_name: peft\n---\n", "")):
            for size in (19_000, 900_000):
                card.write_text(f"{before}{part * (size // len(part))}{after}")
                with time_bound(), pytest.MonkeyPatch.context() as patch:
                    patch.setattr("warnings.warn", lambda *_, **__: None)
                    complete_card(tmp_path, SDPTConfig())
                    licence_of(tmp_path)
    card.write_text("a" * 1_000_001)
    with pytest.raises(ValueError, match="it has more than 1,000,000 bytes"):
        _read(card)
