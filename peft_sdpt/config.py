# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fields of an SDPT adapter's config, and the rules for their values."""

from __future__ import annotations

import hashlib
import json
import numbers
import operator
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from peft.utils import PeftType

from .saving import GATES_KEY, LARGEST, LORA_KEYS, PROMPTS_KEY, SavedConfig, Shapes, lora_name, plain_name
from .version import __version__
from .wording import is_control, printable, quoted

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
PROMPT_GATES = ("zero",)
ATTN_IMPLEMENTATIONS = ("fused", "eager")
# Largest number of letters of a path on Linux.
MAX_PATH = 4096
# Each module of the base model is compared with each name in a field.
MAX_NAMES = 1000
# Fields with names of modules: a list, or a regular expression.
_NAME_FIELDS = ("target_modules", "exclude_modules", "lora_target_modules")
# Fields that determine which prompts an adapter has, and what their entries mean.
_SHAPING_FIELDS = (
    "num_virtual_tokens",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "prompt_mode",
    "prompt_space",
    "fusion_layers",
)
# The same for gates and for the LoRA part. They count only if an adapter has them, so that adapters without them keep
# their digest.
_GATE_SHAPING_FIELDS = ("prompt_gate", "prompt_groups", "image_attends_prompts", "fusion_gates")
_LORA_SHAPING_FIELDS = ("lora_rank", "lora_target_modules", "lora_layers")


@dataclass
class SDPTConfig(SavedConfig):
    """Configuration of an SDPT adapter (arXiv 2407.11414).

    Every field is checked when the config is made. A value that breaks a rule raises a `ValueError`, or a `TypeError`
    for a wrong type, that names the field, the value and the rule.

    Args:
        num_virtual_tokens (`int`, *optional*, defaults to 20): Number N of prototype tokens per fusion layer, at least
            1. The paper's 0.04 % of GLIP-L corresponds to about 10 tokens of the aligned space, or 20 as coordinates.
        target_modules (`list[str]` or `str`, *optional*): The fusion layers to adapt. A list holds module names or ends
            of names; a string is a regular expression for the whole name. None adapts every fusion layer that is
            adapted by default.
        exclude_modules (`list[str]` or `str`, *optional*): The fusion layers that are not adapted: names or a regular
            expression, as in `target_modules`.
        layers_to_transform (`list[int]` or `int`, *optional*): The fusion layers to adapt by index, counted from 0 over
            the fusion layers that are adapted by default, in the order of the base model (`cpt_layers` of the released
            code). None adapts all of these. An index that the base model does not have raises an error when the adapter
            is attached.
        init_weights (`str` or `bool`, *optional*, defaults to `"normal"`): Initialization of the prototype tokens. They
            are drawn from torch's default CPU generator, so `torch.manual_seed` gives the same tokens on every device.
            `"normal"` is N(0, 4²) with gates and N(0, 1) without. `"uniform"` is U(-1, 1), the released default.
            `"xavier_uniform"`, `"xavier_normal"`, `"kaiming_uniform"` and `"kaiming_normal"` are torch's with their
            default arguments, applied to each set of tokens (fan_in is their dimension E, fan_out is N). `"zeros"` is
            the origin of the aligned space. `"prototypes"` is `"normal"` until you call `initialize_sdpt_prototypes`.
            With gates, every initialization leaves the outputs of the base model unchanged. Without them, none does,
            because each prompt takes a share of every softmax. As in other tuners of PEFT, True is the default, and
            False also starts the gates at random, from N(0, 1), so that the adapter has an effect at once (for
            debugging).
        prompt_gate (`str`, *optional*, defaults to `"zero"`): `"zero"` gives prompts a softmax of their own, and a
            trained gate for each head and each direction that starts at zero: `tanh(gate)` times what a head reads from
            the prompts is added to what it reads from the base model's tokens. A new adapter then equals the base
            model. None is the published method: prompts are keys and values in the softmax of the base model. All
            supported base models have gates. A fusion layer of your own has none if its spec names no heads, and its
            prompts are then as published.
        prompt_groups (`list[int]`, *optional*): Sizes of groups of prompts, each with its own softmax and gates. They
            add up to `num_virtual_tokens`. None is one group. `add_weighted_adapter` makes groups when it
            concatenates adapters.
        prompt_mode (`str`, *optional*, defaults to `"unified"`): `"unified"` is the method: one set of tokens, mapped
            into both input spaces. `"independent"` is the paper's ablation: two sets in the aligned space, one for each
            modality, each mapped by its own inverse, with twice the parameters. The released code uses the independent
            sets as query and key rows without values; here they have values, like unified tokens.
        prompt_space (`str`, *optional*): The space of the trained parameters. `"reachable"` trains the coordinates of a
            token in an orthonormal basis of the space that the projections of the layer reach together, at most half as
            many as E in the base models of the paper. `"aligned"` trains the token itself, as published; the part of it
            that no projection reaches has no effect and no gradient. None means `"reachable"` for unified tokens and
            `"aligned"` for independent ones.
        image_attends_prompts (`bool`, *optional*, defaults to True): Whether image tokens attend to prompts. False is
            the masking of the released code: only text tokens attend to prompts.
        pinv_rtol (`float`, *optional*, defaults to 0.03): Singular values of a projection below this fraction of the
            largest one are dropped when it is inverted. It must be between 0 and 1. One learning rate then also serves
            ill-conditioned projections, for which steps of the optimizer would otherwise be too large. None computes
            the full inverse, as published.
        prompt_dropout (`float`, *optional*, defaults to 0.0): Probability of zeroing an entry of the prototype tokens
            in training, scaled to keep the mean (`torch.nn.functional.dropout`). It is at least 0 and below 1.
        attn_implementation (`str`, *optional*, defaults to `"fused"`): `"fused"` computes a bi-directional attention
            without attention weights and without projecting image tokens, wherever that is less work. Its outputs are
            the same, and it is faster than the base model. `"eager"` computes it as the base model does, and returns
            attention weights. Other kinds of fusion always run as in the base model.
        modules_to_save (`list[str]`, *optional*): Names of other modules to train and save whole, for instance a head.
        lora_rank (`int`, *optional*): Rank r of LoRA (arXiv 2106.09685) on linear layers outside the fusion layers, at
            least 1. It is trained, saved, loaded and switched with the tokens, as one adapter. It needs a lower
            learning rate than the tokens. None trains tokens alone.
        lora_alpha (`float`, *optional*): LoRA is scaled by `lora_alpha / lora_rank`. It must be positive. None means
            twice the rank, so the factor is 2 for every rank.
        lora_target_modules (`list[str]` or `str`, *optional*): The linear layers with LoRA: names or a regular
            expression, as in `target_modules`. They must be outside the fusion layers that are adapted, whose weights
            SDPT inverts. None means the projections of all attention and the feed-forward networks in the encoder and
            decoder of Grounding DINO and MM Grounding DINO; other base models need names here.
        fusion_layers (`dict[str, int]`, *optional*): Do not set this by hand. It is filled in when the adapter is
            attached, and maps the name of each adapted fusion layer to the dimension of its prompts. It is saved with
            the adapter, so that loading onto a base model with other layers raises an error before that model is
            changed.
        fusion_gates (`dict[str, list[int]]`, *optional*): Do not set this by hand. It is filled in when the adapter is
            attached, and maps the name of each adapted fusion layer with gates to the number of its sides and heads
            that have gates.
        lora_layers (`dict[str, list[int]]`, *optional*): Do not set this by hand. It is filled in when the adapter is
            attached, and maps the name of each linear layer with LoRA to its numbers of inputs and outputs. It is saved
            and checked as `fusion_layers` is.
        fusion_layers_digest (`str`, *optional*): Do not set this by hand. It is filled in when the config is saved, and
            tells whether a field that determines the prompts has changed since. A changed config belongs to no base
            model.
        peft_sdpt_version (`str`): Do not set this by hand. The version of this package that made the adapter. In
            `adapter_config.json`, it also shows which package to import: without `import peft_sdpt`, PEFT raises
            `KeyError: 'SDPT'`.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of prototype tokens per fusion layer."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Fusion layers to adapt: a list of names, a regular expression, or None for all by default."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Fusion layers not to adapt: a list of names or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the fusion layers to adapt, or None for all by default."}
    )
    init_weights: str | bool = field(
        default="normal", metadata={"help": f"Initialization of the tokens: one of {INIT_WEIGHTS}."}
    )
    prompt_gate: str | None = field(
        default="zero",
        metadata={"help": "'zero': prompts have their own softmax and gates that start at zero. None: as published."},
    )
    prompt_groups: list[int] | None = field(
        default=None, metadata={"help": "Sizes of groups of prompts with their own softmax and gates, or None for one."}
    )
    prompt_mode: str = field(
        default="unified",
        metadata={"help": "One set of tokens for both modalities ('unified'), or one for each ('independent')."},
    )
    prompt_space: str | None = field(
        default=None, metadata={"help": f"Space of the trained parameters: one of {PROMPT_SPACES}, or None."}
    )
    image_attends_prompts: bool = field(
        default=True, metadata={"help": "Whether image tokens attend to prompts, or only text tokens do."}
    )
    pinv_rtol: float | None = field(
        default=0.03,
        metadata={"help": "Singular values below this fraction of the largest one are dropped; None keeps all."},
    )
    prompt_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the prototype tokens."})
    attn_implementation: str = field(
        default="fused",
        metadata={"help": f"How a bi-directional attention is computed: one of {ATTN_IMPLEMENTATIONS}."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of other modules to train and save whole."}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Rank of LoRA outside the fusion layers, or None for tokens alone."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "LoRA is scaled by lora_alpha / lora_rank; None means twice the rank."}
    )
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Linear layers with LoRA: a list of names, a regular expression, or None for the default."},
    )
    fusion_layers: dict[str, int] | None = field(
        default=None, metadata={"help": "Filled in when attached: dimension of the prompts of each adapted layer."}
    )
    fusion_gates: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Filled in when attached: numbers of sides and heads with gates of each layer."}
    )
    lora_layers: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Filled in when attached: inputs and outputs of each linear layer with LoRA."}
    )
    fusion_layers_digest: str | None = field(
        default=None, metadata={"help": "Filled in when saved: digest of the fields that determine the prompts."}
    )
    peft_sdpt_version: str = field(
        default=__version__, metadata={"help": "Filled in: version of the package to import before loading."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SDPT")
        if self.init_weights is True:
            self.init_weights = "normal"
        if self.fusion_layers is not None and self.fusion_gates is None:
            # The config of an adapter that is older than gates. Later copies of it may have another `prompt_gate`.
            self.prompt_gate, self.fusion_gates = None, {}
        if self.prompt_space is None:
            self.prompt_space = self.default_prompt_space
        self.num_virtual_tokens = _plain_int(self.num_virtual_tokens)
        self.lora_rank = _plain_int(self.lora_rank)
        for name in ("pinv_rtol", "prompt_dropout", "lora_alpha"):
            setattr(self, name, _plain_number(getattr(self, name)))
        self.layers_to_transform = _plain_int(self.layers_to_transform)
        if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
            self.layers_to_transform = [self.layers_to_transform]
        if isinstance(self.prompt_groups, tuple):
            self.prompt_groups = list(self.prompt_groups)
        for name in (*_NAME_FIELDS, "layers_to_transform", "modules_to_save"):
            value = getattr(self, name)
            # Sorted, because the order of a set differs between processes, and two saves should be the same file.
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value, key=str) if isinstance(value, set) else list(value))
        if isinstance(self.layers_to_transform, list):
            self.layers_to_transform = [_plain_int(index) for index in self.layers_to_transform]
        if isinstance(self.prompt_groups, list):
            self.prompt_groups = [_plain_int(size) for size in self.prompt_groups]
        self.check()
        if self.fusion_layers is not None:
            self.fusion_layers = {plain_name(name): dim for name, dim in self.fusion_layers.items()}
        if self.fusion_gates is not None:
            self.fusion_gates = {plain_name(name): list(gates) for name, gates in self.fusion_gates.items()}
        if self.lora_layers is not None:
            self.lora_layers = {lora_name(name): list(size) for name, size in self.lora_layers.items()}

    @property
    def default_prompt_space(self) -> str:
        """What None means for `prompt_space`."""
        return "aligned" if self.prompt_mode == "independent" else "reachable"

    @property
    def belongs_to_base_model(self) -> bool:
        """Whether this config was saved with an adapter, and the fields that determine its prompts are unchanged."""
        return self.fusion_layers_digest is not None and self.fusion_layers_digest == self._digest()

    def mark_as_saved(self, has_weights: bool) -> None:
        if self.fusion_layers is None:
            return
        if has_weights:
            # A regular expression of somebody else could run for years, also where PEFT matches names. The names that
            # it selected are known, and replace it.
            if isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str):
                self.target_modules, self.exclude_modules = list(self.fusion_layers), None
            if isinstance(self.lora_target_modules, str):
                self.lora_target_modules = list(self.lora_layers or ())
        if has_weights or self.fusion_layers_digest is None:
            self.fusion_layers_digest = self._digest()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are saved."""
        values: dict[str, Any] = super().to_dict()
        return values | {"fusion_layers_digest": None if self.fusion_layers is None else self._digest()}

    def _digest(self) -> str:
        names: tuple[str, ...] = _SHAPING_FIELDS
        if self.prompt_gate is not None:
            names += _GATE_SHAPING_FIELDS
        if self.lora_rank is not None:
            names += _LORA_SHAPING_FIELDS
        values = json.dumps([getattr(self, name) for name in names], sort_keys=True, default=sorted)
        return hashlib.sha256(values.encode()).hexdigest()[:16]

    def prompt_shape(self, dim: int) -> tuple[int, ...]:
        """Return the shape of the prompts of a fusion layer whose prompts have dimension `dim`."""
        shape = (self.num_virtual_tokens, dim)
        return (2, *shape) if self.prompt_mode == "independent" else shape

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of prompts of each group."""
        return (self.num_virtual_tokens,) if self.prompt_groups is None else tuple(self.prompt_groups)

    def gate_shape(self, sides_and_heads: list[int]) -> tuple[int, ...]:
        """Return the shape of the gates of a fusion layer, `(sides, groups, heads)`."""
        sides, heads = sides_and_heads
        return sides, len(self.group_sizes), heads

    def parameter_shapes(self) -> Shapes | None:
        """Return the shape of each parameter by its plain name, or None before the adapter is attached.

        They are prompts and gates (`prompt_shape`, `gate_shape`), and LoRA matrices A `(r, in)` and B `(out, r)`.
        """
        if self.fusion_layers is None:
            return None
        shapes: Shapes = {name + PROMPTS_KEY: self.prompt_shape(dim) for name, dim in self.fusion_layers.items()}
        shapes |= {name + GATES_KEY: self.gate_shape(numbers) for name, numbers in (self.fusion_gates or {}).items()}
        if self.lora_rank is not None:
            for name, (inputs, outputs) in (self.lora_layers or {}).items():
                for key, shape in zip(LORA_KEYS, ((self.lora_rank, inputs), (outputs, self.lora_rank)), strict=True):
                    shapes[name + key] = shape
        return shapes

    @property
    def lora_scaling(self) -> float:
        """Factor of the LoRA part. It has no meaning where `lora_rank` is None."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / (self.lora_rank or 1)

    def check(self) -> None:
        """Check all fields. This is called when the config is made, and when it is attached.

        Raises:
            ValueError: A value breaks a rule.
            TypeError: A value has the wrong type.
        """
        if not _is_int(self.num_virtual_tokens):
            self._refuse("num_virtual_tokens", "an integer", TypeError)
        if self.num_virtual_tokens < 1:
            self._refuse("num_virtual_tokens", "at least 1")

        for name in _NAME_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str):
                if not value:
                    self._refuse(name, "None, a list of names or a regular expression that is not empty")
                try:
                    re.compile(value)
                except (re.error, RecursionError, OverflowError) as error:
                    self._refuse(name, f"a valid regular expression ({printable(str(error), 100)})")
            elif value is not None:
                self._check_names(name)
        if self.modules_to_save is not None:
            self._check_names("modules_to_save")

        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            if not isinstance(layers, list) or not all(_is_int(index) for index in layers):
                self._refuse("layers_to_transform", "an integer or a list of integers", TypeError)
            if not layers or min(layers) < 0 or len(set(layers)) != len(layers):
                self._refuse("layers_to_transform", "a non-empty list of non-negative integers without repetitions")

        if self.prompt_gate is not None and self.prompt_gate not in PROMPT_GATES:
            self._refuse("prompt_gate", f"None or one of {PROMPT_GATES}")
        if self.prompt_groups is not None:
            groups = self.prompt_groups
            if not isinstance(groups, list) or not all(_is_int(size) for size in groups):
                self._refuse("prompt_groups", "None or a list of integers", TypeError)
            if not groups or min(groups) < 1 or sum(groups) != self.num_virtual_tokens:
                number = quoted(self.num_virtual_tokens)
                self._refuse("prompt_groups", f"positive and add up to num_virtual_tokens={number}")
            if self.prompt_gate is None:
                self._refuse("prompt_groups", "None where prompt_gate is None, because groups differ by their gates")

        for name, values in (
            ("init_weights", (*INIT_WEIGHTS, True, False)),
            ("prompt_mode", PROMPT_MODES),
            ("attn_implementation", ATTN_IMPLEMENTATIONS),
        ):
            value = getattr(self, name)
            if not isinstance(value, (str, bool)) or value not in values:  # 1 equals True
                self._refuse(name, f"one of {values}")
        if self.prompt_space not in PROMPT_SPACES:
            self._refuse("prompt_space", f"None or one of {PROMPT_SPACES}")
        if self.prompt_space == "reachable" and self.prompt_mode == "independent":
            self._refuse("prompt_space", "'aligned' or None where prompt_mode is 'independent'")
        for name in ("image_attends_prompts", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False", TypeError)

        if self.pinv_rtol is not None:
            if not _is_number(self.pinv_rtol):
                self._refuse("pinv_rtol", "None or a number", TypeError)
            if not 0 < self.pinv_rtol < 1:
                self._refuse("pinv_rtol", "None or between 0 and 1, both excluded")
        if not _is_number(self.prompt_dropout):
            self._refuse("prompt_dropout", "a number", TypeError)
        if not 0 <= self.prompt_dropout < 1:
            self._refuse("prompt_dropout", "at least 0 and below 1")

        self._check_lora()
        if self.fusion_layers is not None and not (
            isinstance(self.fusion_layers, dict)
            and all(isinstance(name, str) for name in self.fusion_layers)
            and all(_is_int(dim) and dim > 0 for dim in self.fusion_layers.values())
        ):
            self._refuse("fusion_layers", "None or a mapping of module names to prompt dimensions", TypeError)
        if self.fusion_gates is not None and not (
            isinstance(self.fusion_gates, dict)
            and all(isinstance(name, str) for name in self.fusion_gates)
            and all(
                isinstance(gates, (list, tuple)) and len(gates) == 2 and all(_is_int(n) and n > 0 for n in gates)
                for gates in self.fusion_gates.values()
            )
        ):
            self._refuse("fusion_gates", "None or a mapping of module names to numbers of sides and heads", TypeError)
        if not isinstance(self.fusion_layers_digest, (str, type(None))):
            self._refuse("fusion_layers_digest", "None or a string", TypeError)
        if not isinstance(self.peft_sdpt_version, str):
            self._refuse("peft_sdpt_version", "a version", TypeError)
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))):
                self._refuse(name, "None or a string", TypeError)
            if value is not None and (len(value) > MAX_PATH or any(map(is_control, value))):
                self._refuse(name, f"None or at most {MAX_PATH} letters without control characters")
        if not isinstance(self.auto_mapping, (dict, type(None))):
            self._refuse("auto_mapping", "None or a mapping", TypeError)

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_target_modules"):
                if getattr(self, name) is not None:
                    self._refuse(name, "None where lora_rank is None")
        elif not _is_int(self.lora_rank):
            self._refuse("lora_rank", "None or an integer", TypeError)
        elif self.lora_rank < 1:
            self._refuse("lora_rank", "None or at least 1")
        if self.lora_alpha is not None:
            if not _is_number(self.lora_alpha):
                self._refuse("lora_alpha", "None or a number", TypeError)
            if not 0 < self.lora_alpha <= LARGEST:
                self._refuse("lora_alpha", f"None or positive and at most {LARGEST:g}")
        if self.lora_layers is not None and not (
            isinstance(self.lora_layers, dict)
            and all(isinstance(name, str) for name in self.lora_layers)
            and all(
                isinstance(size, (list, tuple)) and len(size) == 2 and all(_is_int(number) for number in size)
                for size in self.lora_layers.values()
            )
        ):
            self._refuse("lora_layers", "None or a mapping of module names to pairs of integers", TypeError)

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(name, "a list of module names", TypeError)
        if not value or not all(value) or len(value) > MAX_NAMES:
            self._refuse(name, f"a non-empty list of at most {MAX_NAMES} non-empty names")

    def _refuse(self, name: str, rule: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"SDPTConfig.{name} must be {rule}, got {quoted(getattr(self, name))}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain_number(value: Any) -> Any:
    """Convert a number of NumPy or a similar type to `float`. Return anything else as it is."""
    return float(value) if isinstance(value, numbers.Real) and type(value) not in (int, float, bool) else value


def _plain_int(value: Any) -> Any:
    """Convert an integer of NumPy or a similar type to `int`. Return anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value
