# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A small word-piece tokenizer with the ids that Grounding DINO hard-codes."""

from collections.abc import Sequence
from pathlib import Path

from transformers import BertTokenizerFast

SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS = ["red", "white", "blood", "cell", "platelet", "dog", "cat", "horse", "hot", "##dog", "##s", "st", "bernard"]
WORDS += ["what", "is", "this", *"abcdefg"]
FIRST_WORD = 200


def make_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> BertTokenizerFast:
    """Words from id `FIRST_WORD` on; small enough for the vocabulary of `hosts.make_host`."""
    pieces = [f"[unused{i}]" for i in range(1030)]
    for piece, index in SPECIAL.items():
        pieces[index] = piece
    pieces[FIRST_WORD : FIRST_WORD + len(words)] = words
    file = folder / "vocab.txt"
    file.write_text("\n".join(pieces) + "\n")
    return BertTokenizerFast(vocab=str(file), do_lower_case=True)
