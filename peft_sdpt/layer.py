# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: a fusion layer with unified prototype tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import Prompts
from .config import SDPTConfig
from .hosts import FusionHost
from .inverse import to_aligned_space, to_input_space
from .weights import TensorState, WeightState, basis_of, bias_of, device_and_dtype, inverse_of, refuse_adapted

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
# Until `initialize_sdpt_prototypes` has been called.
_INITIALISERS["prototypes"] = _INITIALISERS["normal"]


def init_prompts(config: SDPTConfig, width: int, token_width: int) -> torch.Tensor:
    """Prompts as `config` starts them.

    Drawn on the CPU from torch's default generator, so that a seed means the same on every device. Coordinates in an
    orthonormal basis start as tokens do: the size of what has an effect is the same.

    Args:
        config: of the adapter.
        width: numbers of a token.
        token_width: width E of the aligned space, which some starts take the size from.

    Returns:
        `(N, width)`, or `(2, N, width)` for independent mode (image set, text set); float32.
    """
    prompts = torch.empty(config.prompt_shape(width), device="cpu", dtype=torch.float32)
    initialise = _INITIALISERS[config.init_weights]
    # Set by set: torch takes the fans of a 3-D tensor for those of a convolution.
    for prompt_set in prompts.view(-1, config.num_virtual_tokens, width):
        if config.init_weights.startswith(("xavier", "kaiming")):
            prompt_set.copy_(initialise(torch.empty(len(prompt_set), token_width, device="cpu"))[:, :width])
        else:
            initialise(prompt_set)
    return prompts


def prompt_width(config: SDPTConfig, fusion_host: FusionHost, projections: Sequence[nn.Module]) -> int:
    """Numbers that a token has: the width E of the aligned space, or fewer where the projections reach less of it.

    Args:
        config: of the adapter.
        fusion_host: the declaration that the fusion layer fits.
        projections: those of the layer that are inverted.
    """
    width = projections[0].out_features
    # The modules of a split host know nothing of one another's projections.
    if config.prompt_space == "aligned" or fusion_host.split:
        return width
    return min(width, sum(projection.in_features for projection in projections))


def _refresh_after_load(layer: SDPTLayer, incompatible_keys: Any) -> None:
    """`load_state_dict` hook: compiled code does not compare weights, so do it here."""
    layer.refresh_inverses(force=not all(WeightState.is_certain(projection) for projection in layer._projections()))


class SDPTLayer(nn.Module, BaseTunerLayer):
    """A fusion layer whose tokens also attend to prompts (arXiv 2407.11414, section 3).

    Takes and returns what the wrapped module does. With no prompts to see (adapters disabled, none
    active on this layer) the call goes to the wrapped module itself, so outputs are the host's bit for
    bit. Otherwise attention weights have, after the host's columns, one for each prompt that the
    direction sees: those of a bi-directional attention are `(B * heads, Nv, Nl + N)` for image tokens (`Nl` where
    prompts are hidden from the image) and `(B * heads, Nl, Nv + N)` for text tokens. They are None where
    `attn_implementation` is `"fused"` and the model was not called with `output_attentions=True`. Prompts of several
    active adapters follow one another in the order of activation.

    The inverse projections are computed when an adapter is attached and again, before the next
    forward, when a projection weight has changed: by `load_state_dict`, an operation in place, a new
    parameter or new `.data`, a cast, a merge of another tuner's adapter. Other writes that PyTorch does
    not count, in place through `weight.data`, through numpy or into a quantised weight, go unseen: call
    `refresh_inverses(force=True)` after such a write. An adapter of another tuner that acts on an inverted
    projection without being merged into it is refused. No gradient
    flows to the weights through their inverse.

    Args:
        base_layer: the host's fusion layer.
        fusion_host: the declaration it fits.
        adapter_name: name of the first adapter.
        config: its configuration.
        side: which side of the fusion layer `base_layer` is; None where it has all of them.

    Attributes:
        sdpt_prompts: what is trained: adapter name to `(N, r)`, coordinates of tokens in `sdpt_basis`, or to tokens
            `(N, E)` where the adapter has `prompt_space="aligned"` or the projections reach all of the aligned space;
            `(2, N, E)` in independent mode, one set a side. `tokens` gives the tokens of either.
        sdpt_basis: adapter name to `(E, r)`, an orthonormal basis of what the layer's projections reach, for adapters
            with coordinates. Not saved, and never below float32.
        sdpt_inverses: for each side of the module, adapter name to `(d, E)`, from the space of prompts to the side's
            tokens. Not saved, and never below float32, whatever the dtype of the host.
        output_attentions: whether the module's attention weights are asked for. The nearest module around it that
            takes `output_attentions` sets it in each call.
    """

    adapter_layer_names = ("sdpt_prompts",)
    other_param_names = ("sdpt_config",)

    def __init__(
        self,
        base_layer: nn.Module,
        fusion_host: FusionHost,
        adapter_name: str,
        config: SDPTConfig,
        side: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fusion_host = fusion_host
        self.side = side
        self._hold_prompts()
        self.sdpt_config: dict[str, SDPTConfig] = {}
        for place in range(len(fusion_host.inverted)):
            # Modules of the layer itself: where PEFT looks for what belongs to an adapter.
            self.add_module(f"sdpt_inverse_{place}", BufferDict(persistent=False))
        self.sdpt_basis = BufferDict(persistent=False)
        self._inverted: tuple[WeightState, ...] | None = None
        self._known_prompts: tuple[list[TensorState], list[Prompts]] | None = None
        # What the call in progress was asked for; the model sets it.
        self.output_attentions = False
        # A new module starts in training mode, and prompt dropout would act in an evaluated host.
        self.training = base_layer.training
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _hold_prompts(self) -> None:
        self.sdpt_prompts = nn.ParameterDict()

    @property
    def width(self) -> int:
        """Width E of the space that prompts live in."""
        return self._projections()[0].out_features

    @property
    def sdpt_inverses(self) -> tuple[BufferDict, ...]:
        return tuple(getattr(self, f"sdpt_inverse_{place}") for place in range(len(self.fusion_host.inverted)))

    @property
    def _computed(self) -> tuple[BufferDict, ...]:
        return (*self.sdpt_inverses, self.sdpt_basis)

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Add the prompts of an adapter, with the start that `config` asks for."""
        self._forget(adapter_name)
        self.sdpt_config[adapter_name] = config
        width = prompt_width(config, self.fusion_host, self._projections())
        self.sdpt_prompts[adapter_name] = nn.Parameter(init_prompts(config, width, self.width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.refresh_inverses()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, if it is there."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Drop what was computed for an adapter: one that takes its name may want another inverse."""
        for computed in self._computed:
            if adapter_name in computed:
                del computed[adapter_name]

    def tokens(self, adapter_name: str = "default") -> torch.Tensor:
        """Prototype tokens of an adapter, `(N, E)` or `(2, N, E)`."""
        self._follow_weights()
        return self._tokens(adapter_name, self.sdpt_prompts[adapter_name])

    @torch.no_grad()
    def set_tokens(self, adapter_name: str, tokens: torch.Tensor) -> None:
        """Make the prompts of an adapter these tokens, `(N, E)` or `(2, N, E)`; of coordinates, the nearest.

        Raises:
            ValueError: the layer has no such adapter, or its tokens have another shape.
        """
        if adapter_name not in self.sdpt_prompts:
            raise ValueError(f"adapter_name must be one of {sorted(self.sdpt_prompts)}, got {adapter_name!r}")
        shape = self.sdpt_config[adapter_name].prompt_shape(self.width)
        if tokens.shape != shape:
            raise ValueError(f"tokens of {adapter_name!r} must have the shape {shape}, got {tuple(tokens.shape)}")
        self._follow_weights()
        if adapter_name in self.sdpt_basis:
            basis = self.sdpt_basis[adapter_name]
            tokens = tokens.to(basis) @ basis
        self.sdpt_prompts[adapter_name].copy_(tokens)

    def _tokens(self, adapter_name: str, prompts: torch.Tensor) -> torch.Tensor:
        if adapter_name in self.sdpt_basis:
            return to_aligned_space(prompts, self.sdpt_basis[adapter_name])
        return prompts

    def refresh_inverses(self, force: bool = False) -> None:
        """Recompute the inverse projections, and the basis, if a weight has changed since; with `force`, anyway."""
        projections = self._projections()
        for projection in projections:
            refuse_adapted(projection)
        self._known_prompts = None
        if force or not self._inverses_hold():
            for computed in self._computed:
                computed.clear()
        for inverses, projection in zip(self.sdpt_inverses, projections, strict=True):
            # Adapters with the same tolerance share one tensor.
            known = {self.sdpt_config[name].pinv_rtol: value for name, value in inverses.items()}
            for name, config in self.sdpt_config.items():
                if name not in inverses:
                    if config.pinv_rtol not in known:
                        known[config.pinv_rtol] = inverse_of(projection, config.pinv_rtol)
                    inverses[name] = known[config.pinv_rtol]
        for name, config in self.sdpt_config.items():
            if name not in self.sdpt_basis and prompt_width(config, self.fusion_host, projections) < self.width:
                # Adapters share one.
                shared = next(iter(self.sdpt_basis.values()), None)
                self.sdpt_basis[name] = basis_of(projections) if shared is None else shared
        self._inverted = tuple(WeightState.of(projection) for projection in projections)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Same arguments and results as the wrapped module; see the class for the weights.

        Args:
            adapter_names: of each sample the adapter whose prompts it sees, `"__base__"` for none; as
                `model(..., adapter_names=[...])` passes it on. None: all see those that are active.
        """
        asked = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        names = [name for name in asked if name in self.sdpt_prompts]
        if self.disable_adapters or (not names and adapter_names is None):
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            samples = len(self.fusion_host.bind(args, kwargs)[self.fusion_host.arguments[0]])
            if len(adapter_names) != samples:
                raise ValueError(
                    "Length of `adapter_names` should be the same as the number of inputs, but got "
                    f"{len(adapter_names)} and {samples} respectively."
                )
        prompts = self._prompts(names, adapter_names)
        if all(side.tokens is None for side in prompts):
            return self.base_layer(*args, **kwargs)
        eager = self.output_attentions or any(self.sdpt_config[n].attn_implementation == "eager" for n in names)
        return self.fusion_host.attend(self.base_layer, args, kwargs, prompts, eager)

    def _prompts(self, names: list[str], adapter_names: Sequence[str] | None) -> list[Prompts]:
        """Prompts of these adapters as input tokens of the host, for each side of the module.

        In evaluation without gradients they are computed once, and again when something that they depend on has
        changed: the adapters, their tokens, a weight or a bias.
        """
        projections = self._projections()
        for projection in projections:
            refuse_adapted(projection)
        # Comparing versions would break the graph of torch.compile; there the load hook serves.
        if torch.compiler.is_compiling():
            return self._map_prompts(names, adapter_names, projections)
        self._follow_weights()
        if self.training or torch.is_grad_enabled():
            # An optimizer may follow that writes through `.data`, which PyTorch does not count.
            self._known_prompts = None
            return self._map_prompts(names, adapter_names, projections)
        if adapter_names is not None:
            return self._map_prompts(names, adapter_names, projections)
        biases = [bias for bias in map(bias_of, projections) if bias is not None]
        sources = [*(self.sdpt_prompts[name] for name in names), *biases]
        if self._known_prompts is not None:
            states, prompts = self._known_prompts
            if len(states) == len(sources) and all(
                state.still_holds(source) for state, source in zip(states, sources, strict=True)
            ):
                return prompts
        prompts = self._map_prompts(names, None, projections)
        self._known_prompts = [TensorState.of(source) for source in sources], prompts
        return prompts

    def _map_prompts(
        self, names: list[str], adapter_names: Sequence[str] | None, projections: Sequence[nn.Module]
    ) -> list[Prompts]:
        tokens = {
            name: F.dropout(
                self._tokens(name, self.sdpt_prompts[name]), self.sdpt_config[name].prompt_dropout, self.training
            )
            for name in names
        }
        prompts = []
        for place, (projection, inverses) in enumerate(zip(projections, self.sdpt_inverses, strict=True)):
            side = place if self.side is None else self.side
            shown = [
                name
                for name in names
                if self.sdpt_config[name].image_attends_prompts or side != self.fusion_host.image_reads
            ]
            if not shown:
                prompts.append(Prompts(None))
                continue
            parts = [
                to_input_space(
                    # In independent mode each side has a set.
                    tokens[name][side] if tokens[name].dim() == 3 else tokens[name],
                    inverses[name],
                    bias_of(projection),
                )
                for name in shown
            ]
            hidden = None if adapter_names is None else self._hidden(adapter_names, shown, parts[0].device)
            prompts.append(Prompts(torch.cat(parts), hidden))
        return prompts

    def _hidden(self, adapter_names: Sequence[str], owners: list[str], device: torch.device) -> torch.Tensor:
        """`(B, N)`, True where a prompt of `owners`, one after the other, is not of the sample's adapter."""
        sizes = torch.tensor([self.sdpt_config[name].num_virtual_tokens for name in owners])
        owner = torch.arange(len(owners)).repeat_interleave(sizes)
        number = {name: index for index, name in enumerate(owners)}
        wanted = torch.tensor([number.get(name, -1) for name in adapter_names])
        return (wanted[:, None] != owner).to(device)

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.fusion_host.projections(self.get_base_layer())

    def _follow_weights(self) -> None:
        if not self._inverses_hold():
            self.refresh_inverses()

    def _inverses_hold(self) -> bool:
        """Whether the inverses are those of the weights as they are now."""
        return self._inverted is not None and all(
            state.still_holds(projection) for state, projection in zip(self._inverted, self._projections(), strict=True)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SDPTLayer:
        self._known_prompts = None
        held, before = self._inverses_hold(), self._dtypes()
        on_meta = any(device_and_dtype(each)[0].type == "meta" for each in self._projections())
        owners = [{name: id(value) for name, value in each.items()} for each in self._computed]
        super()._apply(fn, recurse)
        if on_meta:
            # No weights yet, perhaps uninitialised memory: at load time or at the next forward.
            self._inverted = None
        elif held and before == self._dtypes():
            # Only moved, and the inverses with them; adapters that shared one go on to.
            for each, owner in zip(self._computed, owners, strict=True):
                first: dict[int, str] = {}
                for name, shared in owner.items():
                    each[name] = each[first.setdefault(shared, name)]
            self._inverted = tuple(WeightState.of(projection) for projection in self._projections())
        else:
            # A cast rounds the weights, and has cast the inverses too, below float32 perhaps.
            self.refresh_inverses(force=True)
        return self

    def _dtypes(self) -> list[torch.dtype]:
        """Of the projections, and of all that is computed from them, which is not below float32 as they may be."""
        computed = [value.dtype for each in self._computed for value in each.values()]
        return [device_and_dtype(each)[1] for each in self._projections()] + computed

    def train(self, mode: bool = True) -> SDPTLayer:
        self._known_prompts = None
        return super().train(mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return device_and_dtype(self.fusion_host.projections(base_layer)[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def extra_repr(self) -> str:
        return f"width={self.width}, fusion_host={self.fusion_host.name!r}"


class SharedSDPTLayer(SDPTLayer):
    """The second module of a fusion layer whose directions are modules in different places.

    It sees the prompts of the first one, and holds none of its own: they are trained, saved and counted once.
    """

    def _hold_prompts(self) -> None:
        # In a tuple, so that the first module does not become a part of this one.
        self._first: tuple[SDPTLayer, ...] = ()

    def share(self, first: SDPTLayer) -> None:
        """See the prompts of `first` from now on."""
        self._first = (first,)

    @property
    def sdpt_prompts(self) -> Mapping[str, nn.Parameter]:
        return self._first[0].sdpt_prompts if self._first else {}

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Take on an adapter, whose prompts the first module gets."""
        self._forget(adapter_name)
        self.sdpt_config[adapter_name] = config
        self.refresh_inverses()
