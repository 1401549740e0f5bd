# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A cache of the inverse projections of a fusion layer, which are computed again when a weight has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from .inverse import inverse_projection, reachable_basis
from .weights import WeightState, dense_weight, device_and_dtype, is_adapted, is_trained, refuse_adapted

# A fusion layer joins at most two sequences.
MAX_SIDES = 2
_BASIS = "reachable_basis"


class _BeforeApply(NamedTuple):
    """The state before a module is moved or cast, for `InverseCache.after_apply`."""

    up_to_date: bool
    on_meta: bool
    dtypes: list[torch.dtype]


class InverseCache(BufferDict):
    """Inverse projections by side and tolerance, and the basis of what the projections reach together.

    Adapters with the same tolerance share them. They are buffers, so they move with the module; they are not saved,
    and are never below float32 whatever the dtype of the base model. The class is a `BufferDict` of PEFT, so PEFT does
    not treat them as buffers of one adapter.
    """

    def __init__(self) -> None:
        super().__init__(persistent=False)
        self._rtols: tuple[float | None, ...] = ()
        self._states: tuple[WeightState, ...] | None = None
        # Raised after each change, so that whatever is computed from the inverses is computed again.
        self.version = 0

    def inverse(self, side: int, rtol: float | None) -> torch.Tensor:
        """Return the inverse of the projection of a side, `(d, E)`."""
        inverse: torch.Tensor = self[name_of_inverse(side, rtol)]
        return inverse

    def set_inverse(self, side: int, rtol: float | None, inverse: torch.Tensor) -> None:
        """Replace the inverse of a side until a weight changes."""
        self[name_of_inverse(side, rtol)] = inverse
        self.version += 1

    @property
    def basis(self) -> torch.Tensor | None:
        """Basis from `reachable_basis`, `(E, r)`, or None if no adapter needs it."""
        return self._buffers.get(_BASIS)

    def require(
        self, projections: Sequence[nn.Linear], rtols: Iterable[float | None], needs_basis: bool, force: bool = False
    ) -> None:
        """Compute what is missing or out of date, and drop what is not needed any more.

        Args:
            projections: The projection of each side.
            rtols: Tolerances that adapters have.
            needs_basis: Whether an adapter needs the basis.
            force: Whether to compute everything again.

        Raises:
            ValueError: Another tuner's adapter acts on a projection, or a weight is not finite.
            TypeError: A weight is not floating point, and its quantisation is not supported.
        """
        for projection in projections:
            refuse_adapted(projection)
        rtols = tuple(dict.fromkeys(rtols))
        current = self.up_to_date(projections) and not force
        # Stored before the weights are read, because another thread may change them in between.
        states = tuple(WeightState.of(projection) for projection in projections)
        computed: dict[str, torch.Tensor] = {}
        for side, projection in enumerate(projections):
            for rtol in rtols:
                if not (current and name_of_inverse(side, rtol) in self):
                    with dense_weight(projection) as weight:
                        computed[name_of_inverse(side, rtol)] = inverse_projection(weight, rtol)
        if needs_basis and not (current and _BASIS in self):
            computed[_BASIS] = reachable_basis(list(_copies(projections)))
        # Added before others are dropped, because another thread may be reading.
        self.update(computed)
        self.keep(rtols, needs_basis)
        self._states = states
        self.version += 1

    def keep(self, rtols: Collection[float | None], needs_basis: bool) -> None:
        """Drop the inverses of other tolerances, and the basis if it is not needed any more."""
        self._rtols = tuple(rtols)
        names = {name_of_inverse(side, rtol) for side in range(MAX_SIDES) for rtol in rtols}
        if needs_basis:
            names.add(_BASIS)
        for name in [name for name in self if name not in names]:
            del self[name]

    def up_to_date(self, projections: Sequence[nn.Linear]) -> bool:
        """Return whether no weight has changed since the inverses were computed."""
        states = self._states
        if states is None:
            return False
        # A weight that was trained is compared by its values. If it is frozen now, its version is enough from now on.
        was_trained = any(state.has_values for state in states) and not any(map(is_trained, projections))
        renewed = tuple(WeightState.of(projection) for projection in projections) if was_trained else states
        if not all(state.still_holds(projection) for state, projection in zip(states, projections, strict=True)):
            return False
        self._states = renewed
        return True

    def forget(self) -> None:
        """Compute the inverses again when they are needed next."""
        self._states = None

    def before_apply(self, projections: Sequence[nn.Linear]) -> _BeforeApply:
        """Return what `after_apply` needs, before a module with these projections is moved or cast."""
        on_meta = any(device_and_dtype(projection)[0].type == "meta" for projection in projections)
        return _BeforeApply(self.up_to_date(projections), on_meta, self._dtypes(projections))

    def after_apply(self, before: _BeforeApply, projections: Sequence[nn.Linear]) -> None:
        """Follow a module that was moved or cast, together with this one."""
        if before.on_meta:
            # The weights may be uninitialised memory. The inverses are computed at load time or at the next forward.
            self._states = None
        elif before.up_to_date and before.dtypes == self._dtypes(projections):
            self._states = tuple(WeightState.of(projection) for projection in projections)
        elif any(map(is_adapted, projections)):
            # The next forward refuses the adapter of the other tuner. Here, the rest of the model would stay behind.
            self._states = None
        else:
            # A cast rounds the weights. It has cast the inverses too, perhaps below float32. If the cast made a weight
            # infinite, the next forward raises an error.
            with suppress(ValueError):
                self.require(projections, self._rtols, self.basis is not None, force=True)

    def _dtypes(self, projections: Sequence[nn.Linear]) -> list[torch.dtype]:
        return [device_and_dtype(projection)[1] for projection in projections] + [each.dtype for each in self.values()]


def name_of_inverse(side: int, rtol: float | None) -> str:
    """Return the name of the buffer with the inverse of a side."""
    # Names of buffers must not have full stops.
    return f"side_{side}_rtol_{rtol}".replace(".", "_")


def _copies(projections: Iterable[nn.Linear]) -> Iterator[torch.Tensor]:
    for projection in projections:
        with dense_weight(projection) as weight:
            # Copied, because a gathered weight is released after this.
            yield weight.detach().clone()
