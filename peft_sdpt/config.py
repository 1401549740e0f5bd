# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a user may set, and the rules for it."""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from peft.config import PeftConfig
from peft.utils import PeftType

from .model_card import complete_card
from .saving import check_saved_weights
from .version import __version__

INIT_WEIGHTS = (
    "normal",
    "uniform",
    "xavier_uniform",
    "xavier_normal",
    "kaiming_uniform",
    "kaiming_normal",
    "zeros",
    "prototypes",
)
PROMPT_MODES = ("unified", "independent")
PROMPT_SPACES = ("reachable", "aligned")
ATTN_IMPLEMENTATIONS = ("fused", "eager")


@dataclass
class SDPTConfig(PeftConfig):
    """Configuration of an SDPT adapter (arXiv 2407.11414).

    Every field is checked when the config is made; a value that breaks a rule raises a `ValueError`
    (or `TypeError` for a wrong type) that names the field, the value and the rule.

    Args:
        num_virtual_tokens: prototype tokens N of each fusion layer. At least 1. The paper's headline of 0.04 % of
            GLIP-L is about 10 of the aligned space, and 20 as coordinates.
        target_modules: None for every fusion layer of the host, or which of them: a list of
            module names (or ends of names), or a regular expression for the whole name.
        layers_to_transform: None for all, or the index or indices of fusion layers, counted from 0
            over all fusion layers of the host in their order (`cpt_layers` of the released code).
            An index the host does not have raises when the adapter is attached.
        init_weights: how prototype tokens start, always from torch's default CPU generator, so that
            `torch.manual_seed` gives the same start on every device. `"normal"` is N(0, 1), `"uniform"` is
            U(-1, 1) (the released default), `"xavier_*"` and `"kaiming_*"` are torch's with their default arguments on
            each set of tokens (fan_in: their width E, fan_out N), `"zeros"` is the origin of the aligned space,
            `"prototypes"` is for `initialize_sdpt_prototypes`, to be called next, and until then `"normal"`. No start
            leaves the host's outputs as they were: a prompt takes its share of every softmax, one at the origin too.
            True and False are accepted because PEFT's tools set them; both mean `"normal"`.
        prompt_mode: `"unified"` is the method: one set of tokens, mapped into both input spaces.
            `"independent"` is the paper's ablation: two sets in the aligned space, one a modality,
            each mapped by its own inverse, and twice the parameters. The released code uses these
            directly as query and key rows and cuts their columns after the softmax, so there they
            only dilute the attention; here they have values, like unified tokens.
        prompt_space: what a token's numbers are. `"reachable"`: its coordinates in an orthonormal basis of what the
            projections of the layer reach together, at most half as many as E in the hosts of the paper. `"aligned"`:
            the token itself, as published; the part of it that no projection reaches has no effect and no
            gradient. None for `"reachable"` in a new adapter of unified tokens, and else for `"aligned"`.
        image_attends_prompts: True lets both modalities see prompts. False is the released code's
            masking, in which only text tokens do.
        pinv_rtol: a number between 0 and 1 drops the singular values of a projection below that share of the largest,
            so that one learning rate serves ill-conditioned projections too, where steps of the optimizer would be
            leaps; None for the full inverse of the paper.
        prompt_dropout: probability of zeroing an entry of the prototype tokens in training, scaled
            to keep the mean (`torch.nn.functional.dropout`). 0 <= p < 1.
        attn_implementation: `"fused"` computes a bi-directional attention without attention weights and without the
            projections of image tokens, wherever that is less work: same outputs, faster than the host. `"eager"` does
            as the host does. With `output_attentions=True` it is the host's way in any case. Other kinds of fusion run
            as the host runs them.
        modules_to_save: names of other modules to train and save whole, a head for instance.
        fusion_layers: not to be set by hand. Filled in when the adapter is attached: module name of each adapted
            fusion layer, and how many numbers a token of it has. Saved with the adapter, so that loading onto a host
            with other layers is refused before that host is touched.
        peft_sdpt_version: not to be set by hand. The version of this package that made the adapter. In
            `adapter_config.json` it also says what to import: without `import peft_sdpt`, PEFT ends in
            `KeyError: 'SDPT'`.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prototype tokens of each fusion layer."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Fusion attentions to adapt: names, a regular expression, None for all."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the fusion layers to adapt, None for all."}
    )
    init_weights: str | bool = field(
        default="normal", metadata={"help": f"Start of the tokens, one of {INIT_WEIGHTS}."}
    )
    prompt_mode: str = field(
        default="unified",
        metadata={"help": "One set of tokens for both modalities, or one each ('independent')."},
    )
    prompt_space: str | None = field(
        default=None, metadata={"help": f"What a token's numbers are, one of {PROMPT_SPACES}, or None."}
    )
    image_attends_prompts: bool = field(
        default=True, metadata={"help": "Whether image tokens see prompts, or only text tokens."}
    )
    pinv_rtol: float | None = field(
        default=0.03,
        metadata={"help": "Relative bound below which singular values are dropped, None for all."},
    )
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the prototype tokens."})
    attn_implementation: str = field(
        default="fused",
        metadata={"help": f"How a bi-directional attention is computed, one of {ATTN_IMPLEMENTATIONS}."},
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save whole."})
    fusion_layers: dict[str, int] | None = field(
        default=None, metadata={"help": "Filled in when attached: numbers of a token in each adapted layer."}
    )
    peft_sdpt_version: str = field(
        default=__version__, metadata={"help": "Filled in: version of the package to import before loading."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Whether `fusion_layers` was found on a host in this process, not read with an adapter. No field: never saved.
        self.attached = False
        self.peft_type = PeftType.SDPT
        if isinstance(self.init_weights, bool):
            self.init_weights = "normal"
        if self.prompt_space is None:
            # An adapter saved before there was a choice has tokens of the aligned space, and names its layers.
            new = self.fusion_layers is None and self.prompt_mode == "unified"
            self.prompt_space = "reachable" if new else "aligned"
        self.num_virtual_tokens = _plain_int(self.num_virtual_tokens)
        self.layers_to_transform = _plain_int(self.layers_to_transform)
        if _is_int(self.layers_to_transform):
            self.layers_to_transform = [self.layers_to_transform]
        for name in ("target_modules", "layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            # Sets have no order that survives a process: sorted, two saves are the same file.
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value, key=str) if isinstance(value, set) else list(value))
        if isinstance(self.layers_to_transform, list):
            self.layers_to_transform = [_plain_int(index) for index in self.layers_to_transform]
        self._check()

    def prompt_shape(self, width: int) -> tuple[int, ...]:
        """Shape of the prompts of a fusion layer in which a token has `width` numbers."""
        shape = (self.num_virtual_tokens, width)
        return (2, *shape) if self.prompt_mode == "independent" else shape

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> SDPTConfig:
        """Load a config, and look whether the weights beside it are whole and its own.

        `PeftModel.from_pretrained` and `load_adapter` load an adapter's config by this method, before they touch the
        host and before they load its weights. What they would stumble over later is therefore found while the host
        is as it was. Not so where they are not asked for the config: with `config=`, with the host's own
        `load_adapter`, and where there are no weights at all; a load that fails then leaves the host changed.

        Args:
            pretrained_model_name_or_path: folder, or repository of the Hub.
            subfolder: within it.
            kwargs: for `huggingface_hub.hf_hub_download`; others are ignored.

        Raises:
            ValueError: there is no config, one of its values breaks a rule, or there are weights beside it that
                cannot be fetched or read, or are not those of the config.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SDPTConfig):
            shapes = {name: config.prompt_shape(width) for name, width in (config.fusion_layers or {}).items()}
            download, _, _ = cls._split_kwargs(kwargs)
            check_saved_weights(pretrained_model_name_or_path, subfolder, shapes, **download)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and complete the model card if PEFT has put one there."""
        # PEFT's model tells the class of its host here, for its automatic classes. Kept, so that the config saved or
        # pushed alone after that does not lose it.
        self.auto_mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping
        super().save_pretrained(save_directory, **kwargs)
        complete_card(save_directory, self)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # `push_to_hub` has put the card of the repository, or transformers' empty one, over ours.
        complete_card(working_dir, self)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _check(self) -> None:
        if not _is_int(self.num_virtual_tokens):
            self._refuse("num_virtual_tokens", "an integer", TypeError)
        if self.num_virtual_tokens < 1:
            self._refuse("num_virtual_tokens", "at least 1")

        if isinstance(self.target_modules, str):
            if not self.target_modules:
                self._refuse("target_modules", "None, a list of names or a regular expression that is not empty")
            try:
                re.compile(self.target_modules)
            except re.error as error:
                self._refuse("target_modules", f"a valid regular expression ({error})")
        elif self.target_modules is not None:
            self._check_names("target_modules")
        if self.modules_to_save is not None:
            self._check_names("modules_to_save")

        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            if not isinstance(layers, list) or not all(_is_int(index) for index in layers):
                self._refuse("layers_to_transform", "an integer or a list of integers", TypeError)
            if not layers or min(layers) < 0 or len(set(layers)) != len(layers):
                self._refuse("layers_to_transform", "non-empty, non-negative, without repeats")

        if self.init_weights not in INIT_WEIGHTS:
            self._refuse("init_weights", f"one of {INIT_WEIGHTS}")
        if self.prompt_mode not in PROMPT_MODES:
            self._refuse("prompt_mode", f"one of {PROMPT_MODES}")
        if self.prompt_space not in PROMPT_SPACES:
            self._refuse("prompt_space", f"None or one of {PROMPT_SPACES}")
        if self.prompt_space == "reachable" and self.prompt_mode == "independent":
            self._refuse("prompt_space", "'aligned' or None where prompt_mode is 'independent'")
        if self.attn_implementation not in ATTN_IMPLEMENTATIONS:
            self._refuse("attn_implementation", f"one of {ATTN_IMPLEMENTATIONS}")
        if not _is_bool(self.image_attends_prompts):
            self._refuse("image_attends_prompts", "True or False", TypeError)

        if self.pinv_rtol is not None:
            if not _is_number(self.pinv_rtol):
                self._refuse("pinv_rtol", "None or a number", TypeError)
            if not 0 < self.pinv_rtol < 1:
                self._refuse("pinv_rtol", "None or between 0 and 1, both excluded")
        if not _is_number(self.prompt_dropout):
            self._refuse("prompt_dropout", "a number", TypeError)
        if not 0 <= self.prompt_dropout < 1:
            self._refuse("prompt_dropout", "at least 0 and below 1")

        if self.fusion_layers is not None and not (
            isinstance(self.fusion_layers, dict)
            and all(isinstance(name, str) for name in self.fusion_layers)
            and all(_is_int(width) and width > 0 for width in self.fusion_layers.values())
        ):
            self._refuse("fusion_layers", "None or a mapping of module names to numbers of a token", TypeError)
        if not _is_bool(self.inference_mode):
            self._refuse("inference_mode", "True or False", TypeError)
        if not isinstance(self.peft_sdpt_version, str):
            self._refuse("peft_sdpt_version", "a version", TypeError)

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(name, "a list of module names", TypeError)
        if not value or not all(value):
            self._refuse(name, "non-empty, of non-empty names")

    def _refuse(self, name: str, rule: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"SDPTConfig.{name} must be {rule}, got {getattr(self, name)!r}")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not _is_bool(value)


def _plain_int(value: Any) -> Any:
    """The `int` that an integer of NumPy or the like stands for; anything else as it is."""
    try:
        return value if _is_bool(value) else operator.index(value)
    except TypeError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not _is_bool(value)
