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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

# [CLS], [SEP], ".", "?" and [PAD]: Grounding DINO in transformers hard-codes these ids as the borders of phrases.
BORDER_TOKEN_IDS = (101, 102, 1012, 1029, 0)


def class_prompt(class_names: Sequence[str]) -> str:
    """Write a prompt with one phrase per class. A full stop ends each phrase.

    Full stops and question marks inside a name would split its phrase in two, so they become spaces. The last phrase
    needs its full stop too: with the masks of transformers, the tokens of an open phrase attend only to themselves.

    Args:
        class_names: Names of the classes.

    Returns:
        The prompt, in lower case.

    Raises:
        InputError: There are no names, or a name has no word.

    Example:
        >>> class_prompt(["Red Blood Cell", "st. bernard"])
        'red blood cell. st bernard.'
    """
    phrases = []
    for name in class_names:
        phrase = " ".join(name.lower().replace(".", " ").replace("?", " ").split())
        if not phrase:
            raise InputError(f"class_names: {name!r} has no word for a prompt; every class needs a name.")
        phrases.append(phrase)
    if not phrases:
        raise InputError("class_names: the list is empty; a prompt needs at least one class name.")
    return " ".join(f"{phrase}." for phrase in phrases)


def split_caption(text: str) -> list[str]:
    """Split a caption as users of Grounding DINO write it into class names.

    Args:
        text: A class name, or a caption: it ends with a full stop, or has a full stop between spaces.

    Returns:
        The names in the caption, or the class name alone.

    Example:
        >>> split_caption("cat . dog . person ."), split_caption("st. bernard")
        (['cat', 'dog', 'person'], ['st. bernard'])
    """
    if " . " not in text and not text.rstrip().endswith("."):
        return [text]
    return [name for part in text.split(".") if (name := part.strip())]


def phrase_lengths(class_names: Sequence[str], tokenizer: Any) -> list[int]:
    """Count the tokens of each class in a prompt.

    Args:
        class_names: Names of the classes.
        tokenizer: Tokenizer of the detector.

    Returns:
        For each class, the number of its tokens, including its full stop.

    Raises:
        InputError: The tokenizer knows no word of a name. Such a class would have no tokens of its own, and the classes
            after it would be mixed up.
    """
    tokens = [tokenizer(class_prompt([name]), add_special_tokens=False)["input_ids"] for name in class_names]
    for name, ids in zip(class_names, tokens, strict=True):
        # The last token is the full stop.
        if set(ids[:-1]) <= {tokenizer.unk_token_id}:
            raise InputError(
                f"class_names: the tokenizer knows no word of {name!r}; every class needs a word that it knows."
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
        InputError: A single name does not fit into a prompt, or the tokenizer knows no word of it.
    """
    chunks: list[list[int]] = []
    room = 0
    for index, length in enumerate(phrase_lengths(class_names, tokenizer)):
        if length > max_text_len - 2:
            raise InputError(
                f"class_names: {class_names[index]!r} has {length} tokens, but a prompt takes at most "
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
    is_border = torch.isin(input_ids, input_ids.new_tensor(BORDER_TOKEN_IDS))
    # A phrase starts at each word token after a border. The sum numbers the phrases from 1.
    starts = ~is_border & torch.cat([is_border.new_ones(len(input_ids), 1), is_border[:, :-1]], dim=1)
    phrase = starts.cumsum(dim=1).masked_fill(is_border, 0)
    if num_tokens is not None:
        phrase = torch.nn.functional.pad(phrase, (0, num_tokens - phrase.shape[1]))
    return [row == torch.arange(1, int(row.max()) + 1, device=row.device)[:, None] for row in phrase]


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
