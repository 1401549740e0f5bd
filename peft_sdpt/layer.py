# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: a fusion attention with unified prototype tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import SideInput, bi_attention
from .config import SDPTConfig
from .hosts import FusionHost
from .projection import to_input_space
from .weights import WeightState, bias_of, device_and_dtype, inverse_of, refuse_adapted

CANNOT_MERGE = (
    "SDPT prompts are extra keys and values of the attention and cannot be merged into weights: keep "
    "the adapter as it is, or call unload() to get the bare host back."
)

_INITIALISERS = {
    "uniform": lambda tokens: nn.init.uniform_(tokens, -1.0, 1.0),
    "normal": nn.init.normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "zeros": nn.init.zeros_,
}


def init_prompts(config: SDPTConfig, width: int) -> torch.Tensor:
    """Prototype tokens as `config` starts them.

    Drawn on the CPU from torch's default generator, so that a seed means the same on every device.

    Returns:
        `(N, width)`, or `(2, N, width)` for independent mode (image set, text set); float32.
    """
    tokens = torch.empty(prompt_shape(config, width), device="cpu", dtype=torch.float32)
    # Set by set: torch takes the fans of a 3-D tensor for those of a convolution.
    for token_set in tokens.view(-1, config.num_virtual_tokens, width):
        _INITIALISERS[config.init_weights](token_set)
    return tokens


def prompt_shape(config: SDPTConfig, width: int) -> tuple[int, ...]:
    """Shape of the prompts that `config` gives a fusion layer of this width."""
    shape = (config.num_virtual_tokens, width)
    return (2, *shape) if config.prompt_mode == "independent" else shape


def _refresh_after_load(layer: SDPTLayer, incompatible_keys: Any) -> None:
    """`load_state_dict` hook: compiled code does not compare weights, so do it here."""
    layer.refresh_inverses(force=not all(WeightState.is_certain(query) for query in layer._queries()))


class SDPTLayer(nn.Module, BaseTunerLayer):
    """A fusion attention whose tokens also attend to prompts (arXiv 2407.11414, section 3).

    Takes and returns what the wrapped attention does. With no prompts to see (adapters disabled, none
    active on this layer) the call goes to the wrapped module itself, so outputs are the host's bit for
    bit. Otherwise the attention weights have, after the host's columns, one for each prompt that the
    direction sees: `(B * heads, Nv, Nl + N)` for image tokens (`Nl` where prompts are hidden from the
    image) and `(B * heads, Nl, Nv + N)` for text tokens. Prompts of several active adapters follow
    one another in the order of activation.

    The inverse projections are computed when an adapter is attached and again, before the next
    forward, when a projection weight has changed: by `load_state_dict`, an operation in place, a new
    parameter or new `.data`, a cast, a merge of another tuner's adapter. Other writes that PyTorch does
    not count, in place through `weight.data`, through numpy or into a quantised weight, go unseen: call
    `refresh_inverses(force=True)` after such a write. An adapter of another tuner that acts on a query
    projection without being merged into it is refused. No gradient
    flows to the weights through their inverse.

    Args:
        base_layer: the host's fusion attention.
        fusion_host: the declaration it fits.
        adapter_name: name of the first adapter.
        config: its configuration.

    Attributes:
        sdpt_prompts: adapter name to `(N, E)`, or `(2, N, E)` in independent mode.
        sdpt_image_inverse: adapter name to `(d, E)`, from the aligned space to image tokens. Not saved, and never
            below float32, whatever the dtype of the host.
        sdpt_text_inverse: the same for text tokens.
    """

    adapter_layer_names = ("sdpt_prompts",)
    other_param_names = ("sdpt_config",)

    def __init__(self, base_layer: nn.Module, fusion_host: FusionHost, adapter_name: str, config: SDPTConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fusion_host = fusion_host
        self.sdpt_prompts = nn.ParameterDict()
        self.sdpt_config: dict[str, SDPTConfig] = {}
        self.sdpt_image_inverse = BufferDict(persistent=False)
        self.sdpt_text_inverse = BufferDict(persistent=False)
        self._inverted: tuple[WeightState, WeightState] | None = None
        # A new module starts in training mode, and prompt dropout would act in an evaluated host.
        self.training = base_layer.training
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def width(self) -> int:
        """Width E of the aligned space."""
        return self._queries()[0].out_features

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Add the prompts of an adapter, with the start that `config` asks for."""
        self.sdpt_config[adapter_name] = config
        self.sdpt_prompts[adapter_name] = nn.Parameter(init_prompts(config, self.width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.refresh_inverses()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, if it is there."""
        super().delete_adapter(adapter_name)
        for inverses in (self.sdpt_image_inverse, self.sdpt_text_inverse):
            if adapter_name in inverses:
                del inverses[adapter_name]

    def refresh_inverses(self, force: bool = False) -> None:
        """Recompute the inverse projections if a weight has changed since; with `force`, anyway."""
        queries = self._queries()
        for query in queries:
            refuse_adapted(query)
        if force or not self._inverses_hold():
            for inverses in (self.sdpt_image_inverse, self.sdpt_text_inverse):
                inverses.clear()
        for inverses, query in zip((self.sdpt_image_inverse, self.sdpt_text_inverse), queries, strict=True):
            # Adapters with the same tolerance share one tensor.
            known = {self.sdpt_config[name].pinv_rtol: value for name, value in inverses.items()}
            for name, config in self.sdpt_config.items():
                if name not in inverses:
                    if config.pinv_rtol not in known:
                        known[config.pinv_rtol] = inverse_of(query, config.pinv_rtol)
                    inverses[name] = known[config.pinv_rtol]
        self._inverted = tuple(WeightState.of(query) for query in queries)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Same arguments and results as the wrapped attention; see the class for the weights.

        Args:
            adapter_names: of each sample the adapter whose prompts it sees, `"__base__"` for none; as
                `model(..., adapter_names=[...])` passes it on. None: all see those that are active.
        """
        asked = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        names = [name for name in asked if name in self.sdpt_prompts]
        if self.disable_adapters or (not names and adapter_names is None):
            return self.base_layer(*args, **kwargs)
        image, text, image_mask, text_mask = self.fusion_host.bind(args, kwargs)
        if adapter_names is not None and len(adapter_names) != len(image):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(image)} respectively."
            )
        if not names:
            return self.base_layer(*args, **kwargs)
        image_prompts, text_prompts = self._prompts(names)
        # They stay in float32 on a half-precision host, whose projections take what its own tokens are.
        image_prompts = image_prompts.to(image.dtype)
        text_prompts = text_prompts.to(text.dtype) if text_prompts is not None else None
        image_hidden = text_hidden = None
        if adapter_names is not None:
            shown = [name for name in names if self.sdpt_config[name].image_attends_prompts]
            image_hidden, text_hidden = (self._hidden(adapter_names, owners, image.device) for owners in (names, shown))
        base = self.base_layer
        return bi_attention(
            SideInput(image, image_mask, image_prompts, image_hidden),
            SideInput(text, text_mask, text_prompts, text_hidden),
            self.fusion_host.image_side(base),
            self.fusion_host.text_side(base),
            num_heads=base.num_heads,
            scale=base.scale,
            dropout=base.dropout if base.training else 0.0,
            image_mask_function=self.fusion_host.image_mask,
            text_mask_function=self.fusion_host.text_mask,
        )

    def _prompts(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts of these adapters as input tokens of the host: image `(N, dv)`, text `(N, dl)`.

        Text prompts are those that the image attends to: None when no adapter shows it any.
        """
        # Comparing versions would break the graph of torch.compile; there the load hook serves.
        if not torch.compiler.is_compiling() and not self._inverses_hold():
            self.refresh_inverses()
        image_query, text_query = self._queries()
        for query in (image_query, text_query):
            refuse_adapted(query)
        image_prompts, text_prompts = [], []
        for name in names:
            config = self.sdpt_config[name]
            tokens = F.dropout(self.sdpt_prompts[name], config.prompt_dropout, self.training)
            image_tokens, text_tokens = tokens.unbind(0) if tokens.dim() == 3 else (tokens, tokens)
            image_prompts.append(to_input_space(image_tokens, self.sdpt_image_inverse[name], bias_of(image_query)))
            if config.image_attends_prompts:
                text_prompts.append(to_input_space(text_tokens, self.sdpt_text_inverse[name], bias_of(text_query)))
        return torch.cat(image_prompts), torch.cat(text_prompts) if text_prompts else None

    def _hidden(self, adapter_names: Sequence[str], owners: list[str], device: torch.device) -> torch.Tensor | None:
        """`(B, N)`, True where a prompt of `owners`, one after the other, is not of the sample's adapter."""
        if not owners:
            return None
        sizes = torch.tensor([self.sdpt_config[name].num_virtual_tokens for name in owners])
        owner = torch.arange(len(owners)).repeat_interleave(sizes)
        number = {name: index for index, name in enumerate(owners)}
        wanted = torch.tensor([number.get(name, -1) for name in adapter_names])
        return (wanted[:, None] != owner).to(device)

    def _queries(self) -> tuple[nn.Module, nn.Module]:
        base = self.get_base_layer()
        return self.fusion_host.image_side(base).query, self.fusion_host.text_side(base).query

    def _inverses_hold(self) -> bool:
        """Whether the inverses are those of the weights as they are now."""
        return self._inverted is not None and all(
            state.still_holds(query) for state, query in zip(self._inverted, self._queries(), strict=True)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SDPTLayer:
        held, before = self._inverses_hold(), [device_and_dtype(query) for query in self._queries()]
        super()._apply(fn, recurse)
        if any(device.type == "meta" for device, _ in before):
            # No weights yet, perhaps uninitialised memory: at load time or at the next forward.
            self._inverted = None
        elif held and [dtype for _, dtype in before] == [device_and_dtype(query)[1] for query in self._queries()]:
            # Only moved, and the inverses with them.
            self._inverted = tuple(WeightState.of(query) for query in self._queries())
        else:
            # A cast rounds the weights, and has cast the inverses too, below float32 perhaps.
            self.refresh_inverses(force=True)
        return self

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return device_and_dtype(self.fusion_host.image_side(base_layer).query)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def extra_repr(self) -> str:
        return f"width={self.width}, fusion_host={self.fusion_host.name!r}"
