# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tuner layer: a fusion layer with unified prototype tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_map

from .attention import GatedPrompts, Prompts
from .calls import Choice, activation
from .config import SDPTConfig
from .gates import factors_of, gate_sides_and_heads, init_gates
from .hosts import FusionHost
from .initialization import init_prompts, prompt_dim
from .inverse import to_aligned_space, to_input_space
from .inverse_cache import MAX_SIDES, InverseCache, name_of_inverse
from .weights import (
    TensorState,
    WeightState,
    bias_of,
    device_and_dtype,
    is_adapted,
    is_of_inference_mode,
    is_sharded,
    is_trained,
    refuse_adapted,
)

CANNOT_MERGE = (
    "SDPT prompts are extra keys and values of the attention and cannot be merged into weights: keep "
    "the adapter as it is, or call unload() to get the bare base model back."
)


def _refresh_after_load(layer: SDPTLayer, incompatible_keys: Any) -> None:
    """Refresh the inverses after `load_state_dict`, because compiled code does not compare weights."""
    if any(map(is_adapted, layer.projections)):
        return  # the next forward refuses the other tuner's adapter
    certain = all(WeightState.is_certain(projection) for projection in layer.projections)
    with suppress(ValueError):  # if a weight is not finite, the next forward raises the error
        layer.refresh_inverses(force=not certain)


def _values_of(base: Any, outputs: Any) -> Any:
    """Return a tensor with the values of `base` and the gradients of `outputs`.

    Attention weights have columns of prompts in `outputs`, or are None there. They are those of `base`.
    """
    if not isinstance(outputs, torch.Tensor) or base.shape != outputs.shape:
        return base
    return base + (outputs - outputs.detach())


def _reading_waits(tensor: torch.Tensor) -> bool:
    """Return whether the value of a tensor is on a device that Python has to wait for."""
    return tensor.device.type != "cpu"


def _is_read_in_each_call(gates: torch.Tensor) -> bool:
    # PyTorch does not count the changes of optimizers that are fused, or write through `.data`.
    return torch.is_grad_enabled() or gates.requires_grad


def read_gates(layers: Iterable[Any], adapters: Collection[str]) -> dict[int, dict[str, bool]]:
    """Read which adapters have gates of zero, where a layer in evaluation would have to wait for a GPU.

    All layers are read at once, so a call of a model waits once, before it begins.

    Args:
        layers: Layers of this tuner.
        adapters: Names of the adapters that are used.

    Returns:
        By the id of a layer: whether all gates of an adapter are zero, by its name.
    """
    gates = {
        (id(layer), name): layer.sdpt_gates[name]
        for layer in layers
        if isinstance(layer, SDPTLayer) and not layer.training
        for name in adapters
        if name in layer.sdpt_gates
    }
    gates = {
        key: each
        for key, each in gates.items()
        if _reading_waits(each) and not each.is_meta and not is_sharded(each) and _is_read_in_each_call(each)
    }
    read: dict[int, dict[str, bool]] = {}
    if gates:
        device = next(iter(gates.values())).device
        acting = torch.stack([each.any().to(device, non_blocking=True) for each in gates.values()]).tolist()
        for (layer_id, name), acts in zip(gates, acting, strict=True):
            read.setdefault(layer_id, {})[name] = not acts
    return read


class _Fixed(NamedTuple):
    """Fields of an adapter's config as they were when it was attached. Changing the config does not change them."""

    pinv_rtol: float | None
    image_attends_prompts: bool
    group_sizes: tuple[int, ...]
    # Names of the inverses of both sides. `torch.compile` cannot write a tolerance as text.
    inverses: tuple[str, ...]

    @classmethod
    def of(cls, config: SDPTConfig) -> _Fixed:
        names = tuple(name_of_inverse(side, config.pinv_rtol) for side in range(MAX_SIDES))
        return cls(config.pinv_rtol, config.image_attends_prompts, config.group_sizes, names)


class _KnownPrompts(NamedTuple):
    """Prompts in the input spaces, and the state from which they were computed."""

    states: list[TensorState]
    scales: list[float]
    version: int
    prompts: list[Prompts]


class SDPTLayer(nn.Module, BaseTunerLayer):
    """A fusion layer whose tokens also attend to prompts (arXiv 2407.11414, section 3).

    The layer takes and returns what the wrapped module does. If there are no prompts to see (adapters are disabled, or
    none is active on this layer), it calls the wrapped module, so the outputs are those of the base model bit for bit.
    In evaluation, so are those of an adapter whose gates are zero, as they are at the start; with gradients, the
    wrapped module may then be called twice. In training and in compiled code, they are computed with the prompts, and
    equal but for rounding. Adapters have no gates on a layer whose spec names no heads.

    With `attn_implementation="eager"`, attention weights have one more column for each prompt that a direction sees,
    after the columns of the base model. Those of a bi-directional attention are `(B * heads, Nv, Nl + N)` for image
    tokens (`Nl` if prompts are hidden from the image) and `(B * heads, Nl, Nv + N)` for text tokens. With `"fused"`,
    weights are None, as with the sdpa attention of transformers. Prompts of several active adapters follow one another
    in the order of activation. Where the forward of the base model runs, prompts with gates add no columns.

    The inverse projections are computed when an adapter is attached. They are computed again before the next forward
    if the weight of a projection has changed: by `load_state_dict`, an operation in place, a new parameter or new
    `.data`, a cast, a merge of another tuner's adapter, or a training step of any optimizer. PyTorch does not count
    other writes to a frozen weight: in place through `weight.data`, through NumPy, by another process, or into a
    quantised weight. Call `refresh_inverses(force=True)` after such a write, or `SDPTModel.refresh_inverses`. An
    adapter of another tuner that acts on an inverted projection without being merged into it raises an error. No
    gradient flows to the weights through their inverse.

    Args:
        base_layer: Fusion layer of the base model.
        fusion_host: Spec of the fusion layer.
        adapter_name: Name of the first adapter.
        config: Config of the first adapter.
        side: Index of the side that `base_layer` is. None if it has all sides of the fusion layer.

    Attributes:
        sdpt_prompts: The trained parameters, by adapter name: `(N, r)`, coordinates of tokens in the basis of what the
            projections reach, or tokens `(N, E)` if the adapter has `prompt_space="aligned"` or the projections reach
            all of the aligned space. In independent mode `(2, N, E)`, with one set for each side. `tokens` returns the
            tokens in all cases.
        sdpt_gates: The trained gates, by adapter name: `(sides, groups, heads)`, with a row for each side whose prompts
            are seen. Prompts count with the factor `tanh(gate)`. Adapters with `prompt_gate=None` have none.
        sdpt_scale: Factor of the gates, by adapter name; see `set_scale`.
        sdpt_inverses: The inverse projections and the basis.
    """

    adapter_layer_names: tuple[str, ...] = ("sdpt_prompts", "sdpt_gates")
    other_param_names: tuple[str, ...] = ("sdpt_config", "sdpt_fixed", "sdpt_scale")
    # The adapters of the samples in the current call. See `peft_sdpt.calls`.
    sdpt_call: Choice | None = None
    sdpt_compiled_call: Choice | None = None
    base_layer: nn.Module

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
        self._make_prompts()
        self.sdpt_config: dict[str, SDPTConfig] = {}
        self.sdpt_fixed: dict[str, _Fixed] = {}
        self.sdpt_inverses = InverseCache()
        self._known_prompts: _KnownPrompts | None = None
        self._known_silent: dict[str, tuple[TensorState, bool]] = {}
        # A new module is in training mode, and prompt dropout would act in a base model in evaluation mode.
        self.training = base_layer.training
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _make_prompts(self) -> None:
        self.sdpt_prompts: MutableMapping[str, nn.Parameter] = nn.ParameterDict()  # type: ignore[assignment] # it is one
        self.sdpt_gates: MutableMapping[str, nn.Parameter] = nn.ParameterDict()  # type: ignore[assignment] # it is one
        self.sdpt_scale: dict[str, float] = {}

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """The projections that are inverted, one for each side of the module."""
        return self.fusion_host.projections(self.get_base_layer())

    @property
    def embed_dim(self) -> int:
        """Dimension E of the aligned space."""
        return self.projections[0].out_features

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Add the prompts of an adapter, initialized as `config` says."""
        self._add_settings(adapter_name, config)
        self.sdpt_scale[adapter_name] = 1.0
        dim = prompt_dim(config, self.fusion_host, self.projections)
        heads = self.fusion_host.num_heads(self.get_base_layer())
        gates = gate_sides_and_heads(config, self.fusion_host, heads)
        self.sdpt_prompts[adapter_name] = nn.Parameter(init_prompts(config, dim, self.embed_dim, gates is not None))
        if gates is not None:
            self.sdpt_gates[adapter_name] = nn.Parameter(init_gates(config, config.gate_shape(gates)))
        elif adapter_name in self.sdpt_gates:
            del self.sdpt_gates[adapter_name]  # of an adapter of this name that is replaced
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.refresh_inverses()

    def _add_settings(self, adapter_name: str, config: SDPTConfig) -> None:
        self.sdpt_config[adapter_name] = config
        self.sdpt_fixed[adapter_name] = _Fixed.of(config)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, if the layer has it."""
        super().delete_adapter(adapter_name)
        self._known_silent.pop(adapter_name, None)
        self.sdpt_inverses.keep(*self._needed_inverses())

    def tokens(self, adapter_name: str = "default") -> torch.Tensor:
        """Return the prototype tokens of an adapter, `(N, E)` or `(2, N, E)`."""
        self._follow_weights()
        return self._tokens(adapter_name, self.sdpt_prompts[adapter_name])

    @torch.no_grad()
    def set_tokens(self, adapter_name: str, tokens: torch.Tensor) -> None:
        """Set the prototype tokens of an adapter. If its prompts are coordinates, the nearest reachable tokens are set.

        Args:
            adapter_name: Name of the adapter.
            tokens: Tokens of the aligned space, `(N, E)`, or `(2, N, E)` in independent mode.

        Raises:
            ValueError: The layer has no such adapter, or `tokens` has another shape or is not finite.
        """
        if adapter_name not in self.sdpt_prompts:
            raise ValueError(f"adapter_name must be one of {sorted(self.sdpt_prompts)}, got {adapter_name!r}")
        shape = (*self.sdpt_prompts[adapter_name].shape[:-1], self.embed_dim)
        if tokens.shape != shape:
            raise ValueError(f"tokens of {adapter_name!r} must have the shape {shape}, got {tuple(tokens.shape)}")
        if not tokens.isfinite().all():
            raise ValueError(f"tokens of {adapter_name!r} must be finite")
        self._follow_weights()
        prompts = self.sdpt_prompts[adapter_name]
        if self._has_coordinates(prompts):
            assert self.sdpt_inverses.basis is not None
            tokens = tokens.to(self.sdpt_inverses.basis) @ self.sdpt_inverses.basis
        prompts.copy_(tokens)

    def inverse(self, side: int, adapter_name: str = "default") -> torch.Tensor:
        """Return the inverse projection `(d, E)` that an adapter uses on a side of the module."""
        self._follow_weights()
        return self.sdpt_inverses.inverse(side, self.sdpt_fixed[adapter_name].pinv_rtol)

    def set_inverse(self, side: int, inverse: torch.Tensor, adapter_name: str = "default") -> None:
        """Use another inverse `(d, E)` until a weight changes, for experiments.

        Adapters with the same tolerance share it.
        """
        before = self.inverse(side, adapter_name)
        self.sdpt_inverses.set_inverse(side, self.sdpt_fixed[adapter_name].pinv_rtol, inverse.to(before))

    def _has_coordinates(self, prompts: torch.Tensor) -> bool:
        return prompts.shape[-1] < self.embed_dim

    def _tokens(self, adapter_name: str, prompts: torch.Tensor) -> torch.Tensor:
        if not self._has_coordinates(prompts):
            return prompts
        assert self.sdpt_inverses.basis is not None
        return to_aligned_space(prompts, self.sdpt_inverses.basis)

    def refresh_inverses(self, force: bool = False) -> None:
        """Compute the inverse projections again if a weight has changed, or in any case with `force`.

        Raises:
            ValueError: Another tuner's adapter acts on a projection, or a weight is not finite.
        """
        self._known_prompts = None
        self._known_silent.clear()
        self.sdpt_inverses.require(self.projections, *self._needed_inverses(), force=force)

    def _needed_inverses(self) -> tuple[list[float | None], bool]:
        """Return the tolerances of the adapters, and whether one of them has coordinates."""
        rtols = [fixed.pinv_rtol for fixed in self.sdpt_fixed.values()]
        return rtols, any(map(self._has_coordinates, self.sdpt_prompts.values()))

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Call the fusion layer with prompts. See the class for attention weights.

        Args:
            adapter_names: For each sample, the adapter to use, or `"__base__"` for the base model. None if all samples
                use the active adapters. `model(..., adapter_names=[...])` passes it on.
        """
        enabled, active, scales, choice, known_silent = activation(self, adapter_names)
        wanted = active if choice is None else choice.adapters
        names = [name for name in wanted if name in self.sdpt_prompts and scales[name] != 0]
        if not enabled or (not names and choice is None):
            if not torch.compiler.is_compiling() and any(map(is_trained, self.projections)):
                # A step may follow, and the weights may be frozen before they are looked at again.
                self.sdpt_inverses.forget()
            return self.base_layer(*args, **kwargs)
        # A test of values would wait for a GPU in training, and break the graph of torch.compile.
        silent = []
        if not (self.training or torch.compiler.is_compiling()):
            silent = [name for name in names if self._is_silent(name, known_silent)]
            if not torch.is_grad_enabled():
                names = [name for name in names if name not in silent]
        if choice is not None:
            choice.check_length(len(self.fusion_host.bind(args, kwargs)[self.fusion_host.arguments[0]]))
        prompts = self.input_prompts(names, choice, scales)
        if all(side.tokens is None and side.gated is None for side in prompts):
            return self.base_layer(*args, **kwargs)
        eager = any(self.sdpt_config[name].attn_implementation == "eager" for name in names)
        outputs = self.fusion_host.attend(self.base_layer, args, kwargs, prompts, eager)
        if self.fusion_host.keeps_base_forward or any(name not in silent for name in names):
            return outputs
        # Gradients are wanted, to the gates above all, but the values are those of the base model.
        with torch.no_grad():
            base = self.base_layer(*args, **kwargs)
        return tree_map(_values_of, base, outputs)

    def _is_silent(self, name: str, known: Mapping[str, bool]) -> bool:
        """Return whether the gates of an adapter are all zero. `known` has what was read for this call."""
        gates = self.sdpt_gates.get(name)
        if gates is None or gates.is_meta:
            return False
        if name in known:
            return known[name]
        if _is_read_in_each_call(gates) or not _reading_waits(gates):
            self._known_silent.pop(name, None)
            return not gates.any()
        stored = self._known_silent.get(name)
        if stored is None or not stored[0].still_holds(gates):
            stored = self._known_silent[name] = TensorState.of(gates), not gates.any()
        return stored[1]

    def gate_factors(self, adapter_name: str, scale: float | None = None) -> torch.Tensor:
        """Return the factors of what heads read from the prompts of an adapter, `(sides, groups, heads)`.

        Args:
            adapter_name: Name of an adapter with gates.
            scale: Factor of the gates. None for the one that `set_scale` has set.
        """
        scale = self.sdpt_scale[adapter_name] if scale is None else scale
        return factors_of(self.sdpt_gates[adapter_name]) * scale

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the gates of an adapter by `scale`. `SDPTModel.set_scale` does so in all layers, with checks."""
        self.sdpt_scale[adapter_name] = scale

    def input_prompts(
        self,
        names: Sequence[str],
        choice: Choice | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> list[Prompts]:
        """Map the prompts of some adapters into the input space of each side of the module.

        In evaluation without gradients they are computed once, and again when something that they depend on has
        changed: the adapters, their prompts, a weight or a bias.

        Args:
            names: Names of adapters that this layer has.
            choice: The adapter of each sample; None if all samples see all prompts.
            scales: Factor of the gates of each adapter. None for those that `set_scale` has set.

        Returns:
            Prompts of each side, with tokens `(sum of N, d)`, or `(B, sum of N, d)` with a choice.

        Raises:
            ValueError: Another tuner's adapter acts on a projection, or a base model that was made in inference mode is
                trained.
        """
        projections = self.projections
        for projection in projections:
            refuse_adapted(projection)
        # Comparing versions would break the graph of torch.compile. There, the load hook refreshes the inverses.
        scales = self.sdpt_scale if scales is None else scales
        if torch.compiler.is_compiling():
            return self._map_prompts(names, choice, scales, projections)
        self._follow_weights()
        if self.training and torch.is_grad_enabled() and any(map(is_of_inference_mode, projections)):
            raise ValueError(
                "The base model was made in torch.inference_mode, and PyTorch cannot train with such weights. Load it "
                "outside of inference_mode. An adapter may be attached in inference_mode."
            )
        if self.training or torch.is_grad_enabled():
            # The prompts are not cached, because an optimizer may write through `.data`, which PyTorch does not count.
            self._known_prompts = None
            return self._map_prompts(names, choice, scales, projections)
        biases = [bias for bias in map(bias_of, projections) if bias is not None]
        gates = [self.sdpt_gates[name] for name in names if name in self.sdpt_gates]
        sources = [*(self.sdpt_prompts[name] for name in names), *gates, *biases]
        # Trained parameters are compared by their values. A GPU would wait for that, so nothing is cached there.
        if choice is not None or any(source.requires_grad and _reading_waits(source) for source in sources):
            return self._map_prompts(names, choice, scales, projections)
        # Read before the prompts are mapped, because other threads may change what they depend on.
        factors = [scales[name] for name in names]
        version = self.sdpt_inverses.version
        known = self._known_prompts
        if (
            known is not None
            and (known.scales, known.version) == (factors, version)
            and len(known.states) == len(sources)
            and all(state.still_holds(source) for state, source in zip(known.states, sources, strict=True))
        ):
            return known.prompts
        states = [TensorState.of(source) for source in sources]
        prompts = self._map_prompts(names, None, scales, projections)
        self._known_prompts = _KnownPrompts(states, factors, version, prompts)
        return prompts

    def _map_prompts(
        self,
        names: Sequence[str],
        choice: Choice | None,
        scales: Mapping[str, float],
        projections: Sequence[nn.Linear],
    ) -> list[Prompts]:
        # With a choice, each sample takes one set of tokens from adapters of one kind, however many there are.
        kinds = [[name] for name in names] if choice is None else self._kinds(names)
        tokens = {
            name: F.dropout(
                self._tokens(name, self.sdpt_prompts[name]), self.sdpt_config[name].prompt_dropout, self.training
            )
            for name in names
        }
        sides = []
        for place, projection in enumerate(projections):
            side = place if self.side is None else self.side
            plain: list[tuple[list[str], torch.Tensor]] = []
            gated: list[tuple[list[str], torch.Tensor]] = []
            for kind in kinds:
                fixed = self.sdpt_fixed[kind[0]]
                if side == self.fusion_host.image_reads and not fixed.image_attends_prompts:
                    continue
                parts = {
                    name: to_input_space(
                        # In independent mode, each side has its own set.
                        tokens[name][side] if tokens[name].dim() == 3 else tokens[name],
                        self.sdpt_inverses[fixed.inverses[place]],
                        bias_of(projection),
                    )
                    for name in kind
                }
                part = parts[kind[0]] if choice is None else choice.take(parts)
                (gated if kind[0] in self.sdpt_gates else plain).append((kind, part))
            sides.append(self._together(plain, gated, side, choice, scales))
        return sides

    def _kinds(self, names: Sequence[str]) -> list[list[str]]:
        """Group adapters by everything that their tokens must have in common to take turns in a batch."""
        kinds: dict[Any, list[str]] = {}
        for name in names:
            prompts, gates = self.sdpt_prompts[name], self.sdpt_gates.get(name)
            shapes = tuple(prompts.shape), None if gates is None else tuple(gates.shape)
            kind = self.sdpt_fixed[name], shapes, prompts.dtype
            kinds.setdefault(kind, []).append(name)
        return list(kinds.values())

    def _together(
        self,
        plain: Sequence[tuple[list[str], torch.Tensor]],
        gated: Sequence[tuple[list[str], torch.Tensor]],
        side: int,
        choice: Choice | None,
        scales: Mapping[str, float],
    ) -> Prompts:
        """Put the prompts of a side together. Each kind of gated prompts is a group, or several if it has them.

        Args:
            plain, gated: Adapters of one kind, and their prompts in the input space, `(N, d)` or `(B, N, d)`.
        """
        tokens = mask = of_gates = None
        if plain:
            tokens = torch.cat([part for _, part in plain], dim=-2)
            if choice is not None:
                hidden = []
                for kind, part in plain:
                    uses = torch.stack([choice.uses(name) for name in kind]).any(0)
                    hidden.append(~uses[:, None].expand(-1, part.shape[-2]))
                mask = torch.cat(hidden, dim=1)
        if gated:
            gates = []
            for kind, _ in gated:
                factors = {name: self.gate_factors(name, scales[name]) for name in kind}
                # Without a row for a side that is hidden. The row of the other one is then the only row.
                rows = {name: factor[min(side, len(factor) - 1)] for name, factor in factors.items()}
                gates.append(rows[kind[0]][None] if choice is None else choice.take(rows))
            sizes = tuple(size for kind, _ in gated for size in self.sdpt_fixed[kind[0]].group_sizes)
            of_gates = GatedPrompts(torch.cat([part for _, part in gated], dim=-2), sizes, torch.cat(gates, dim=1))
        return Prompts(tokens, mask, of_gates)

    @property
    def device_of_adapters(self) -> torch.device:
        """The device of the prompts."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def _follow_weights(self) -> None:
        if not self.sdpt_inverses.up_to_date(self.projections):
            self.refresh_inverses()

    def _apply(self, fn: Any, recurse: bool = True) -> SDPTLayer:
        self._known_prompts = None
        before = self.sdpt_inverses.before_apply(self.projections)
        super()._apply(fn, recurse)
        self.sdpt_inverses.after_apply(before, self.projections)
        return self

    def train(self, mode: bool = True) -> SDPTLayer:
        self._known_prompts = None
        self._known_silent.clear()
        return super().train(mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return device_and_dtype(self.fusion_host.projections(base_layer)[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def extra_repr(self) -> str:
        heads = self.fusion_host.num_heads(self.get_base_layer())
        gates = "no gates" if heads is None else f"gates of {heads} heads"
        return f"embed_dim={self.embed_dim}, fusion_host={self.fusion_host.name!r}, {gates}"


class SharedSDPTLayer(SDPTLayer):
    """The second module of a fusion layer whose two directions are different modules.

    It uses the prompts of the first module and has none of its own, so they are trained, saved and counted once.
    """

    def _make_prompts(self) -> None:
        # It is in a tuple, so that the first module does not become a submodule of this one.
        self._first: tuple[SDPTLayer, ...] = ()

    def share(self, first: SDPTLayer) -> None:
        """Use the prompts of `first` from now on."""
        self._first = (first,)

    @property
    def sdpt_prompts(self) -> MutableMapping[str, nn.Parameter]:  # type: ignore[override] # nobody assigns it here
        return self._first[0].sdpt_prompts if self._first else {}

    @property
    def sdpt_gates(self) -> MutableMapping[str, nn.Parameter]:  # type: ignore[override] # nobody assigns it here
        return self._first[0].sdpt_gates if self._first else {}

    @property
    def sdpt_scale(self) -> dict[str, float]:  # type: ignore[override] # nobody assigns it here
        return self._first[0].sdpt_scale if self._first else {}

    def update_layer(self, adapter_name: str, config: SDPTConfig) -> None:
        """Add an adapter. Its prompts are added to the first module."""
        self._add_settings(adapter_name, config)
        self.refresh_inverses()
