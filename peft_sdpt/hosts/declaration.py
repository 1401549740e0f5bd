# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What SDPT has to know of any fusion layer; the three kinds of fusion are in the files beside this one."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attention import Prompts


@dataclass(frozen=True, kw_only=True)
class FusionHost(ABC):
    """Declaration of a family of fusion layers: names and conventions.

    A *side* of a fusion layer is a sequence that prompts are appended to, with the projection that is inverted for it.
    A module belongs to the family when its class, or one it derives from, has one of `class_names`, its forward starts
    with `arguments`, and all that the declaration names is there. Nothing is imported for that, so a host needs no
    dependency.

    Attributes:
        name: what a user calls the host. Registering another of the same name replaces it.
        class_names: class names of the module that is adapted.
        arguments: the first parameters of its forward, in their order. The first one is a tensor `(B, L, d)`.
        within: class names, one of which has to hold the module; empty where any model may.
        split: for hosts whose two directions are modules in different places: the parts of their full names in which
            they differ. The module of the first reads the image, that of the second the text; both see one set of
            tokens, which lives in the first.
        adapted_by_default: whether an adapter adapts such layers if `target_modules` does not name them.
            `layers_to_transform` counts only the layers that are adapted by default.
        image_reads: which side image tokens attend to, and `image_attends_prompts=False` therefore hides; None where
            that cannot be told apart.
    """

    name: str
    class_names: tuple[str, ...]
    arguments: tuple[str, ...]
    within: tuple[str, ...] = ()
    split: tuple[str, str] | None = None
    image_reads: int | None = None
    adapted_by_default: bool = True

    @property
    @abstractmethod
    def inverted(self) -> tuple[str, ...]:
        """Dotted attribute names of the projections whose inverse is taken, one a side of the module."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Dotted names of all attributes that a module of the family has."""
        return self.inverted

    @property
    def num_sides(self) -> int:
        """Sides of a fusion layer, 1 or 2; with two, `prompt_mode="independent"` can give each its own tokens."""
        return 2 if self.split else len(self.inverted)

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompts],
        eager: bool = False,
    ) -> Any:
        """What `module(*args, **kwargs)` returns when its tokens also attend to prompts.

        Args:
            module: a module of the family.
            args, kwargs: of the call.
            prompts: for each side of the module; at least one has tokens.
            eager: whether the module's own way is asked for, weights and all, where there is a faster one.
        """

    def matches(self, module: nn.Module, ancestors: Iterable[nn.Module] = ()) -> bool:
        """Whether `module` is a fusion layer of this family.

        Args:
            module: any module.
            ancestors: the modules that hold it.
        """
        return (
            _is_a(module, self.class_names)
            and all(_attribute(module, name) is not None for name in self.needed)
            and parameters_of(type(module))[: len(self.arguments)] == self.arguments  # type: ignore[arg-type] # hashable
            and (not self.within or any(_is_a(ancestor, self.within) for ancestor in ancestors))
        )

    def projections(self, module: nn.Module) -> tuple[nn.Linear, ...]:
        """Return the projections that are inverted, one for each side of the module.

        They are `nn.Linear` or act like it: another tuner's layer, a quantised one.
        """
        return tuple(_attribute(module, name) for name in self.inverted)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Values by name, of a call's positional arguments and all its named ones.

        Raises:
            TypeError: an argument is given twice, or the first is missing, as the host itself raises it.
        """
        bound = dict(zip(self.arguments, args, strict=False))
        twice = sorted(bound.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"{self.class_names[0]} takes {self.arguments}, got {twice[0]!r} twice")
        bound.update(kwargs)
        if self.arguments[0] not in bound:
            raise TypeError(f"{self.class_names[0]} needs {self.arguments[0]!r}")
        return bound

    def replace(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The call's arguments with other values, each at its place."""
        args, kwargs = list(args), dict(kwargs)
        for name, value in changes.items():
            place = self.arguments.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return args, kwargs

    def leader(self, name: str) -> str:
        """Full name of the module that holds the tokens, of that of a module of the same fusion layer."""
        return _exchange(name, self.split[1], self.split[0]) if self.split else name

    def side_of(self, name: str) -> int | None:
        """Which side the module of this full name is; None where a module has all sides of its fusion layer."""
        return int(self.split[1] in name.split(".")) if self.split else None


def _exchange(name: str, part: str, other: str) -> str:
    return ".".join(other if item == part else item for item in name.split("."))


def _is_a(module: nn.Module, class_names: Iterable[str]) -> bool:
    return not {cls.__name__ for cls in type(module).__mro__}.isdisjoint(class_names)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Names of the parameters of a module class's forward, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined] # of a module class
