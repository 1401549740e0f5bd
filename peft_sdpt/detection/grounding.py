# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts from class names, and class scores from token scores.

A grounded detector reads its classes from a prompt such as "red blood cell. platelet." and scores text *tokens*. These
functions write prompts from class names, split a long list of classes into several prompts, and turn token scores into
class scores.

`post_process_grounded_object_detection` of transformers 5.24 scores a box by the best of *all* tokens, including the
separators, and cuts the name of its class from the prompt. COCO metrics need a score for each class, so these functions
score a class by its own tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..wording import enumerated, is_control, quoted

# [CLS], [SEP], ".", "?" and [PAD]: Grounding DINO in transformers hard-codes these ids as the borders of phrases.
BORDER_TOKEN_IDS = (101, 102, 1012, 1029, 0)
# Where a name that was made for a program may start a new word: hotDog, USBPort. Hyphens are only between words of
# at least two letters, so not in t-shirt.
HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
HYPHENS = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
# A full stop that ends a phrase in a prompt. It has no spaces before it, because looking for them takes quadratic time
# in a long row of spaces.
PHRASE_END = re.compile(r"\.(?:\s+|$)")


def class_prompt(class_names: Sequence[str]) -> str:
    """Write a prompt with one phrase per class. A full stop ends each phrase.

    Underscores become spaces, and so do hyphens between words. A name such as "hotDog" is split into its words.
    Detectors are trained on natural text, and find fewer objects with names such as "hot_dog".

    Full stops and question marks inside a name would split its phrase in two, so they become spaces. The last phrase
    needs its full stop too: with the masks of transformers, the tokens of an open phrase attend only to themselves.

    Args:
        class_names: Names of the classes.

    Returns:
        The prompt, in lower case.

    Raises:
        InputError: There are no names, a name has no word, or a name is a prompt of several classes.

    Example:
        >>> class_prompt(["Red_Blood_Cell", "st. bernard"])
        'red blood cell. st bernard.'
    """
    phrases = []
    for name in class_names:
        if len(classes := _phrases(name)) > 1:
            raise InputError(
                f"class_names: {quoted(name)} is a prompt of {len(classes)} classes; pass a list with one name per "
                "class."
            )
        words = " ".join(map(_split_humps, HYPHENS.sub(" ", name.replace("_", " ")).split()))
        phrase = " ".join(words.lower().replace(".", " ").replace("?", " ").split())
        if not phrase:
            raise InputError(f"class_names: {quoted(name)} has no word for a prompt; every class needs a name.")
        phrases.append(phrase)
    if not phrases:
        raise InputError("class_names: the list is empty; a prompt needs at least one class name.")
    return " ".join(f"{phrase}." for phrase in phrases)


def _split_humps(word: str) -> str:
    """Split a word in camel case. Names such as iPhone and McDonald, and parts of one letter, stay as they are."""
    parts = HUMPS.split(word)
    is_name = parts[0] == "Mc" or any(sum(map(str.isalpha, part)) < 2 for part in parts)
    return word if is_name else " ".join(parts)


def names_as_words(class_names: Sequence[str]) -> list[str]:
    """Return a line about the names that `class_prompt` reads as other words. The list is empty if there are none."""
    words = {name: class_prompt([name]).rstrip(".") for name in class_names}
    changed = [f"{quoted(name)} as {quoted(phrase)}" for name, phrase in words.items() if phrase != plain_name(name)]
    return [f"class names are read as words: {enumerated(changed)}"] if changed else []


def clean_name(name: str) -> str:
    """Return a class name that can be drawn and printed: on one line, and without control characters.

    The tokenizer drops the same characters, so the prompt does not change.

    Args:
        name: Any text.

    Example:
        >>> clean_name("red\\n cell\\x1b ")
        'red cell'
    """
    kept = (letter for letter in name if letter.isspace() or not is_control(letter))
    return " ".join("".join(kept).split())


def plain_name(name: str) -> str:
    """Return a class name in lower case, with single spaces. Letter case and spaces do not matter to a detector."""
    return " ".join(name.lower().split())


def split_caption(text: str) -> list[str]:
    """Split a text that a person wrote into class names.

    Args:
        text: The name of one class, several names with commas between them, or a prompt of Grounding DINO. A prompt
            ends with a full stop, or has one between spaces.

    Returns:
        The class names. If the text has no name, the list has the text itself.

    Example:
        >>> split_caption("cat . dog . red apple .")
        ['cat', 'dog', 'red apple']
        >>> split_caption("cat, dog")
        ['cat', 'dog']
        >>> split_caption("St. Bernard")
        ['St. Bernard']
    """
    # cat.dog, but not U.S.A
    dotted = re.fullmatch(r"[^\W\d_]{3,}(\.[^\W\d_]{3,})+\.?", text.strip())
    phrases = text.split(".") if dotted else _phrases(text)
    names = [name.strip() for phrase in phrases for name in re.split(r"[,;|\n]", phrase)]
    return [name for name in names if name] or [text]


def _phrases(text: str) -> list[str]:
    """Return the phrases of a prompt. Any other text is one phrase."""
    if not (text.rstrip().endswith(".") or " . " in text):
        return [text]
    return [phrase for phrase in PHRASE_END.split(text.strip()) if phrase]


def phrase_lengths(class_names: Sequence[str], tokenizer: Any) -> list[int]:
    """Count the tokens of each class in a prompt.

    Args:
        class_names: Names of the classes.
        tokenizer: Tokenizer of the detector.

    Returns:
        For each class, the number of its tokens, including its full stop.

    Raises:
        InputError: The tokenizer knows no word of a name. Such a class would have no tokens of its own, and the classes
            after it would be mixed up. The error is also raised if two names have the same tokens, because they would
            get the same scores. An uncased tokenizer drops accents, and replaces characters that it does not know.
    """
    tokens = [tokenizer(class_prompt([name]), add_special_tokens=False)["input_ids"] for name in class_names]
    first: dict[tuple[int, ...], str] = {}
    for name, ids in zip(class_names, tokens, strict=True):
        # The last token is the full stop.
        if set(ids[:-1]) <= {tokenizer.unk_token_id}:
            raise InputError(
                f"class_names: the tokenizer knows no word of {quoted(name)}; every class needs a word that it knows."
            )
        if first.setdefault(tuple(ids), name) != name:
            read = quoted(tokenizer.decode(ids[:-1]))
            raise InputError(
                f"class_names: {quoted(first[tuple(ids)])} and {quoted(name)} are the same tokens for this tokenizer, "
                f"{read}, so a prompt cannot tell them apart; rename one of them."
            )
    return [len(ids) for ids in tokens]


def split_classes(class_names: Sequence[str], tokenizer: Any, max_text_len: int) -> list[list[int]]:
    """Split classes into as few prompts of at most `max_text_len` tokens as their order allows.

    Grounding DINO in transformers 5.24 cuts longer prompts, and its detection head then fails.

    Args:
        class_names: Names of all classes.
        tokenizer: Tokenizer of the detector.
        max_text_len: The detector's `config.max_text_len`. It includes [CLS] and [SEP].

    Returns:
        For each prompt, a list of indices into `class_names`.

    Raises:
        InputError: A single name does not fit into a prompt, or `phrase_lengths` raises the error.
    """
    chunks: list[list[int]] = []
    room = 0
    for index, length in enumerate(phrase_lengths(class_names, tokenizer)):
        if length > max_text_len - 2:
            raise InputError(
                f"class_names: {quoted(class_names[index])} has {length} tokens, but a prompt takes at most "
                f"{max_text_len - 2}."
            )
        if length > room:
            chunks.append([])
            room = max_text_len - 2
        chunks[-1].append(index)
        room -= length
    return chunks


def class_token_maps(input_ids: Tensor, num_tokens: int | None = None) -> list[Tensor]:
    """Find the tokens of each class in prompts from `class_prompt`.

    Args:
        input_ids: Token ids of shape (B, L).
        num_tokens: Width of the maps. None for L. The detector's logits are `config.max_text_len` wide.

    Returns:
        For each prompt, a boolean tensor of shape (number of its classes, num_tokens). Its rows are in the order of
        the classes in the prompt.
    """
    phrases = phrase_numbers(input_ids, num_tokens)
    # The numbers of phrases are read once for all prompts, because each read waits for the GPU.
    counts = phrases.amax(dim=1).tolist()
    numbers = torch.arange(1, max(counts, default=0) + 1, device=phrases.device)
    maps = phrases[:, None] == numbers[:, None]
    return [token_map[:count] for token_map, count in zip(maps, counts, strict=True)]


def phrase_numbers(input_ids: Tensor, num_tokens: int | None = None) -> Tensor:
    """Number the phrases of prompts from 1. This does not wait for the GPU.

    Args:
        input_ids: Token ids of shape (B, L).
        num_tokens: Width of the result. None for L.

    Returns:
        For each token, the number of its phrase, shape (B, num_tokens). 0 for separators and padding.
    """
    # Compared one by one, because a tensor of the ids would have to be copied to the device.
    is_border = functools.reduce(torch.logical_or, [input_ids == border for border in BORDER_TOKEN_IDS])
    # A phrase starts at each word token after a border. The sum numbers the phrases from 1.
    starts = ~is_border & torch.cat([is_border.new_ones(len(input_ids), 1), is_border[:, :-1]], dim=1)
    phrases = starts.cumsum(dim=1).masked_fill(is_border, 0)
    if num_tokens is not None:
        phrases = torch.nn.functional.pad(phrases, (0, num_tokens - phrases.shape[1]))
    return phrases


def class_scores(logits: Tensor, token_maps: Sequence[Tensor]) -> list[Tensor]:
    """Score each class by the mean probability of its own tokens.

    Args:
        logits: The detector's token logits of shape (B, queries, T), -inf at padding.
        token_maps: The result of `class_token_maps(input_ids, T)`.

    Returns:
        For each image, a tensor of shape (queries, number of its classes) with scores in [0, 1].
    """
    return [
        row.sigmoid() @ (token_map / token_map.sum(-1, keepdim=True)).to(row.dtype).T
        for row, token_map in zip(logits, token_maps, strict=True)
    ]
