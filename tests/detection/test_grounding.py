# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts of class names, the tokens of each class, and scores, against what transformers does with the same tokens."""

import itertools
import random
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import GroundingDinoProcessor
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps

from peft_sdpt.detection.grounding import (
    PHRASE_END,
    class_prompt,
    class_scores,
    class_token_maps,
    phrase_lengths,
    split_caption,
    split_classes,
)
from peft_sdpt.errors import InputError
from peft_sdpt.wording import quoted
from tests.helpers.words import WORDS, make_tokenizer

WHOLE_WORDS = [word for word in WORDS if not word.startswith("##")]


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("names", "prompt"),
    [
        (["dog"], "dog."),
        (["Red Blood Cell", "platelet"], "red blood cell. platelet."),
        (["st. bernard", "What is this?"], "st bernard. what is this."),
        (["dog?cat.", "  hot\t dog \n"], "dog cat. hot dog."),
        # Names with underscores, hyphens or inner capitals are split into words. Other names stay.
        (["hot_dog", "__red__blood_cell"], "hot dog. red blood cell."),
        (["HotDog", "redBloodCell", "USBPort"], "hot dog. red blood cell. usb port."),
        (["traffic-light", "t-shirt", "x-ray"], "traffic light. t-shirt. x-ray."),
        (["personOnBike", "GoToGate", "FireEXTINGUISHER"], "person on bike. go to gate. fire extinguisher."),
        (["RBC", "iPhone", "ESP32", "McDonald", "3-4"], "rbc. iphone. esp32. mcdonald. 3-4."),
    ],
)
def test_class_prompt(names, prompt):
    assert class_prompt(names) == prompt


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat . dog . person .", ["cat", "dog", "person"]),
        ("cat. red apple.", ["cat", "red apple"]),
        ("cat . dog", ["cat", "dog"]),
        (" cat.  dog.\n", ["cat", "dog"]),
        ("cat, dog , red apple,", ["cat", "dog", "red apple"]),
        ("cat; dog|owl\nred apple", ["cat", "dog", "owl", "red apple"]),
        ("cat.dog.person", ["cat", "dog", "person"]),
        # One name.
        ("cat", ["cat"]),
        ("cat.", ["cat"]),
        ("st. bernard", ["st. bernard"]),
        ("U.S.A.", ["U.S.A"]),
        ("3.5 inch disk", ["3.5 inch disk"]),
        (".", ["."]),
    ],
)
def test_split_caption(text, names):
    assert split_caption(text) == names


def test_phrases_of_any_text():
    """A full stop ends a phrase together with the spaces around it."""
    for text in map("".join, itertools.product("a. \n,", repeat=6)):
        stripped = text.strip()
        is_prompt = stripped.endswith(".") or " . " in text
        phrases = re.split(r"\s*\.(?:\s+|$)", stripped) if is_prompt else [text]
        names = [name.strip() for phrase in phrases for name in re.split(r"[,\n]", phrase)]
        assert split_caption(text) == ([name for name in names if name] or [text])


def test_spaces_are_looked_at_once():
    text = f"cat{' ' * 1000}dog  . owl."
    # Looking for a full stop after the spaces would look at all that follow, from each space.
    assert not [place for place in range(len(text)) if text[place] != "." and PHRASE_END.match(text, place)]
    assert split_caption(text) == [f"cat{' ' * 1000}dog", "owl"]


@pytest.mark.parametrize("name", ["cat . dog . person .", "cat. dog."])
def test_a_prompt_in_place_of_a_name_is_refused(name):
    assert class_prompt(["tench, Tinca tinca"]) == "tench, tinca tinca."
    with pytest.raises(InputError, match=rf"class_names: '{name}' is a prompt of \d classes; pass a list"):
        class_prompt(["owl", name])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dög", "cat", "dog"], "'dög' and 'dog' are the same tokens for this tokenizer, 'dog'"),
        (["dog \N{SNOWMAN}", "dog \N{SKULL}"], r"are the same tokens for this tokenizer, 'dog \[UNK\]'"),
        (["DOG", "dog"], "'DOG' and 'dog' are the same tokens"),
    ],
)
def test_names_that_a_prompt_cannot_hold(tokenizer, names, message):
    with pytest.raises(InputError, match=message):
        phrase_lengths(names, tokenizer)
    with pytest.raises(InputError, match=message):
        split_classes(names, tokenizer, 256)


@pytest.mark.parametrize("names", [[""], ["dog", "  "], ["?.", "dog"]])
def test_class_without_a_word_is_refused(names):
    empty = next(name for name in names if name != "dog")
    with pytest.raises(ValueError, match="has no word") as error:
        class_prompt(names)
    assert quoted(empty) in str(error.value)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match="list is empty"):
        class_prompt([])


def test_tokenizer_has_the_ids_that_hosts_hard_code(tokenizer):
    ids = tokenizer(["hotdogs. dog?", "cat."], padding=True)["input_ids"]
    assert ids[0][0] == 101 and ids[0][-1] == 102 and ids[1][-1] == 0
    assert (ids[0][4], ids[0][6]) == (1012, 1029)


@pytest.mark.parametrize("max_text_len", [8, 11, 32])
def test_split_classes_fits_keeps_order_and_is_not_longer_than_needed(tokenizer, max_text_len):
    generator = random.Random(max_text_len)
    names = [" ".join(generator.choices(WHOLE_WORDS, k=generator.randint(1, 4))) for _ in range(40)]
    names[7] = "Hotdogs? St. Bernard"
    chunks = split_classes(names, tokenizer, max_text_len)

    def length(chunk):
        return len(tokenizer(class_prompt([names[i] for i in chunk]))["input_ids"])

    assert [i for chunk in chunks for i in chunk] == list(range(len(names)))
    assert len(chunks) > 1
    for chunk in chunks:
        assert 0 < length(chunk) <= max_text_len
    for chunk, following in itertools.pairwise(chunks):
        assert length([*chunk, following[0]]) > max_text_len


def test_split_classes_uses_the_last_token_of_a_prompt(tokenizer):
    # [CLS] a. b. c. [SEP] is eight tokens.
    assert split_classes(["a", "b", "c"], tokenizer, 8) == [[0, 1, 2]]
    assert split_classes(["a", "b", "c"], tokenizer, 7) == [[0, 1], [2]]
    assert split_classes([], tokenizer, 8) == []


def test_split_classes_refuses_a_name_longer_than_a_prompt(tokenizer):
    name = "a b c d e"  # and its full stop
    assert split_classes(["dog", name], tokenizer, 8) == [[0], [1]]
    with pytest.raises(ValueError, match=r"'a b c d e f' has 7 tokens, but a prompt takes at most 6"):
        split_classes(["dog", "a b c d e f"], tokenizer, 8)


# A zero-width space is a character to Python and nothing to the tokenizer; all that it does not know is one [UNK].
@pytest.mark.parametrize("name", ["\u200b", "\u732b", "\u732b \u9d09"])
def test_a_name_without_known_tokens_is_refused(tokenizer, name):
    with pytest.raises(ValueError, match="knows no word of"):
        split_classes(["dog", name], tokenizer, 32)


PROMPTS = [
    "dog.",
    "hotdogs. red blood cell. cat.",
    "cat. st bernard.",
    "dog. cat. horse. a. b. c. d. e.",
    "what is this? dog. . cat",  # not from class_prompt: a question mark, an empty phrase, no last full stop
]


@pytest.mark.parametrize("wider", [0, 9])
def test_class_token_maps_are_those_of_transformers(tokenizer, wider):
    ids = tokenizer(PROMPTS, padding=True, return_tensors="pt")["input_ids"]
    width = ids.shape[1] + wider
    maps = class_token_maps(ids, width if wider else None)
    expected = build_label_maps(torch.zeros(len(PROMPTS), 3, width), ids)
    assert [len(m) for m in maps] == [1, 3, 2, 8, 3]
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.dtype == torch.bool
        assert torch.equal(ours, theirs.bool())


def test_class_token_maps_by_hand(tokenizer):
    ids = tokenizer(["hotdogs. red blood cell.", "cat."], padding=True, return_tensors="pt")["input_ids"]
    # [CLS] hot ##dog ##s . red blood cell . [SEP], and [CLS] cat . [SEP] with padding
    first, second = class_token_maps(ids, 12)
    assert [row.nonzero().flatten().tolist() for row in first] == [[1, 2, 3], [5, 6, 7]]
    assert [row.nonzero().flatten().tolist() for row in second] == [[1]]
    assert first.shape == (2, 12) and second.shape == (1, 12)


def test_every_class_of_a_prompt_gets_its_row(tokenizer):
    names = ["St. Bernard", "dog?", "Red blood cell.", "what. is. this"]
    ids = tokenizer(class_prompt(names), return_tensors="pt")["input_ids"]
    (rows,) = class_token_maps(ids)
    assert rows.sum(1).tolist() == [2, 1, 3, 3]


@pytest.fixture
def scored(tokenizer):
    """Two prompts of different lengths and random logits as a detector returns them, -inf at padding."""
    text = tokenizer(["hotdogs. cat.", "dog."], padding=True, return_tensors="pt")
    logits = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    logits[:, :, text["input_ids"].shape[1] :] = float("-inf")
    logits[1, :, 4:] = float("-inf")
    return text["input_ids"], logits


def test_class_scores_are_means_over_the_own_tokens(scored):
    ids, logits = scored
    first, second = class_scores(logits, class_token_maps(ids, 16))
    probabilities = logits.sigmoid()
    torch.testing.assert_close(first, torch.stack([probabilities[0, :, 1:4].mean(-1), probabilities[0, :, 5]], -1))
    torch.testing.assert_close(second, probabilities[1, :, 1:2])


def test_class_scores_ignore_separators_and_transformers_does_not(scored, tokenizer):
    ids, logits = scored
    expected = class_scores(logits, class_token_maps(ids, 16))
    logits[:, :, 0], logits[0, :, 4] = 8.0, 9.0  # [CLS], and the full stop after the first class
    for ours, before in zip(class_scores(logits, class_token_maps(ids, 16)), expected, strict=True):
        assert torch.equal(ours, before)

    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil(), tokenizer)
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.full((2, 5, 4), 0.5), input_ids=ids)
    theirs = processor.post_process_grounded_object_detection(outputs, threshold=0.0, text_threshold=0.0)
    torch.testing.assert_close(theirs[0]["scores"], torch.full((5,), 9.0).sigmoid())
    assert (theirs[0]["scores"] > expected[0].max(-1).values + 0.01).all()


def test_class_scores_in_half_precision_and_with_nan(scored):
    ids, logits = scored
    maps = class_token_maps(ids, 16)
    half = class_scores(logits.bfloat16(), maps)
    assert half[0].dtype == torch.bfloat16
    torch.testing.assert_close(half[0].float(), class_scores(logits, maps)[0], rtol=0, atol=0.02)
    logits[0, 2, 1] = float("nan")
    assert class_scores(logits, maps)[0][2, 0].isnan()
