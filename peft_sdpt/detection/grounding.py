# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Class names in, class scores out: the text side of training and evaluating a grounded detector.

A grounded detector reads its classes from a prompt, "red blood cell. platelet.", and scores text *tokens*. These
functions write prompts from class names, split a long list over several prompts, and turn token scores into class
scores.

`post_process_grounded_object_detection` of transformers 5.24 scores a box by the best of *all* tokens, the separators
included, and names it by text cut from the prompt. COCO metrics need a score of each class, so here a class is scored
by its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# [CLS], [SEP], ".", "?" and [PAD]: transformers' Grounding DINO hard-codes these ids as the borders of phrases.
BORDER_TOKEN_IDS = (101, 102, 1012, 1029, 0)


def class_prompt(class_names: Sequence[str]) -> str:
    """Write the prompt of some classes, one phrase a class, each closed by a full stop.

    Full stops and question marks inside a name would split its phrase in two, so they become spaces. The last phrase
    needs its full stop as well: transformers' phrase masks let the tokens of an open phrase see only themselves.

    Raises:
        ValueError: if there is no name, or a name has no word in it.

    >>> class_prompt(["Red Blood Cell", "st. bernard"])
    'red blood cell. st bernard.'
    """
    phrases = []
    for name in class_names:
        phrase = " ".join(name.lower().replace(".", " ").replace("?", " ").split())
        if not phrase:
            raise ValueError(f"class_names: {name!r} has no word to prompt with; every class needs a name.")
        phrases.append(phrase)
    if not phrases:
        raise ValueError("class_names: the list is empty; a prompt needs at least one class name.")
    return " ".join(f"{phrase}." for phrase in phrases)


def phrase_lengths(class_names: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens that each class takes of a prompt, its full stop included.

    Raises:
        ValueError: if the tokenizer knows nothing of a name: the classes after it would be taken for one another.
    """
    tokens = [tokenizer(class_prompt([name]), add_special_tokens=False)["input_ids"] for name in class_names]
    for name, ids in zip(class_names, tokens, strict=True):
        # All but the closing full stop.
        if set(ids[:-1]) <= {tokenizer.unk_token_id}:
            raise ValueError(
                f"class_names: the tokenizer finds no token in {name!r}; every class needs a word it knows."
            )
    return [len(ids) for ids in tokens]


def split_classes(class_names: Sequence[str], tokenizer: Any, max_text_len: int) -> list[list[int]]:
    """Split classes over as few prompts as their order allows, none longer than `max_text_len` tokens.

    Longer prompts are cut by the host's base model and crash its detection head (transformers 5.24).

    Args:
        class_names: names of all classes.
        tokenizer: the host's tokenizer.
        max_text_len: the host's `config.max_text_len`, [CLS] and [SEP] included.

    Returns:
        Indices into `class_names`, a list a prompt.

    Raises:
        ValueError: if one name alone does not fit, or has no token.
    """
    chunks: list[list[int]] = []
    room = 0
    for index, length in enumerate(phrase_lengths(class_names, tokenizer)):
        if length > max_text_len - 2:
            raise ValueError(
                f"class_names: {class_names[index]!r} takes {length} tokens; the host reads at most {max_text_len - 2} "
                "a prompt."
            )
        if length > room:
            chunks.append([])
            room = max_text_len - 2
        chunks[-1].append(index)
        room -= length
    return chunks


def class_token_maps(input_ids: Tensor, num_tokens: int | None = None) -> list[Tensor]:
    """Find the tokens of each class in prompts that `class_prompt` wrote.

    Args:
        input_ids: (B, L).
        num_tokens: width of the maps; the detector's logits are as wide as its `max_text_len`. Defaults to L.

    Returns:
        B boolean tensors (C_b, num_tokens), a row a class in the prompt's order; prompts may differ in their number of
        classes.
    """
    is_border = torch.isin(input_ids, input_ids.new_tensor(BORDER_TOKEN_IDS))
    # A phrase starts at each word token that follows a border; what it is numbered is how many started so far.
    starts = ~is_border & torch.cat([is_border.new_ones(len(input_ids), 1), is_border[:, :-1]], dim=1)
    phrase = starts.cumsum(dim=1).masked_fill(is_border, 0)
    if num_tokens is not None:
        phrase = torch.nn.functional.pad(phrase, (0, num_tokens - phrase.shape[1]))
    return [row == torch.arange(1, int(row.max()) + 1, device=row.device)[:, None] for row in phrase]


def class_scores(logits: Tensor, token_maps: Sequence[Tensor]) -> list[Tensor]:
    """Score each class by the mean probability of its own tokens.

    Args:
        logits: (B, Q, T), the detector's token logits, -inf at padding.
        token_maps: from `class_token_maps(input_ids, T)`.

    Returns:
        B tensors (Q, C_b) of scores in [0, 1].
    """
    return [
        row.sigmoid() @ (token_map / token_map.sum(-1, keepdim=True)).to(row.dtype).T
        for row, token_map in zip(logits, token_maps, strict=True)
    ]
