# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The spec of a fusion layer: what SDPT needs to know about it. Each kind of fusion has its own module."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attention import Prompts


@dataclass(frozen=True, kw_only=True)
class FusionHost(ABC):
    """Spec of a family of fusion layers: names and conventions.

    A *side* of a fusion layer is a sequence that prompts are appended to, with the projection that is inverted for it.
    A module belongs to the family if its class, or a base class of it, has one of `class_names`, its forward starts
    with `arguments`, and it has every attribute that the spec names. The classes are not imported, so a spec needs no
    dependency.

    Attributes:
        name: What users call the base model. Registering another spec of the same name replaces this one.
        class_names: Class names of the module that is adapted.
        arguments: The first parameters of its forward, in order. The first one is a tensor `(B, L, d)`.
        within: Class names. A module around it must have one of them. Empty if it may be in any module.
        named: A part that its full name must have, between dots. None if it may have any name.
        split: For fusion layers whose two directions are modules in different places: the parts of their full names in
            which they differ. The first module reads the image, the second reads the text. Both use one set of tokens,
            which belongs to the first.
        image_reads: The side that image tokens attend to, which `image_attends_prompts=False` hides. None if the module
            does not distinguish who attends.
        adapted_by_default: Whether such layers are adapted if `target_modules` does not name them.
            `layers_to_transform` counts only the layers that are adapted by default.
    """

    # Whether `attend` with gates of zero is the forward of the base model, with its outputs bit for bit.
    keeps_base_forward: ClassVar[bool] = False

    name: str
    class_names: tuple[str, ...]
    arguments: tuple[str, ...]
    within: tuple[str, ...] = ()
    named: str | None = None
    split: tuple[str, str] | None = None
    image_reads: int | None = None
    adapted_by_default: bool = True

    @property
    @abstractmethod
    def inverted(self) -> tuple[str, ...]:
        """Dotted attribute names of the projections that are inverted, one for each side of the module."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Dotted names of all attributes that a module of the family must have."""
        return self.inverted

    @property
    def num_sides(self) -> int:
        """Number of sides of a fusion layer. With two, `prompt_mode="independent"` gives each its own tokens."""
        return 2 if self.split else len(self.inverted)

    def num_heads(self, module: nn.Module) -> int | None:
        """Return the number of heads of the attention, each of which has gates. None if the family has no gates."""
        return None

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompts],
        eager: bool = False,
    ) -> Any:
        """Return what `module(*args, **kwargs)` returns if its tokens also attend to prompts.

        Args:
            module: A module of the family.
            args, kwargs: Arguments of the call.
            prompts: Prompts of each side of the module. At least one side has some.
            eager: Whether to compute the attention as the module does, with weights, even if there is a faster way.
        """

    def matches(self, module: nn.Module, ancestors: Iterable[nn.Module] = (), name: str = "") -> bool:
        """Return whether `module` is a fusion layer of this family.

        Args:
            module: Any module.
            ancestors: The modules around it.
            name: Its full name.
        """
        return (
            is_a(module, self.class_names)
            and all(attribute_of(module, attribute) is not None for attribute in self.needed)
            and parameters_of(type(module))[: len(self.arguments)] == self.arguments  # type: ignore[arg-type] # hashable
            and (not self.within or any(is_a(ancestor, self.within) for ancestor in ancestors))
            and (self.named is None or self.named in name.split("."))
        )

    def projections(self, module: nn.Module) -> tuple[nn.Linear, ...]:
        """Return the projections that are inverted, one for each side of the module.

        They are `nn.Linear`, or act like it: another tuner's layer or a quantised layer.
        """
        return tuple(attribute_of(module, name) for name in self.inverted)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name.

        Raises:
            TypeError: An argument is given twice, or the first one is missing. The module itself would raise too.
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
        """Return the arguments of a call with some values replaced."""
        args, kwargs = list(args), dict(kwargs)
        for name, value in changes.items():
            place = self.arguments.index(name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return args, kwargs

    def leader(self, name: str) -> str:
        """Return the full name of the module that holds the tokens, given any module of the fusion layer."""
        return _exchange(name, self.split[1], self.split[0]) if self.split else name

    def side_of(self, name: str) -> int | None:
        """Return the side of the module with this full name; None if a module has all sides of its fusion layer."""
        return int(self.split[1] in name.split(".")) if self.split else None


def _exchange(name: str, part: str, other: str) -> str:
    return ".".join(other if item == part else item for item in name.split("."))


def is_a(module: nn.Module, class_names: Iterable[str]) -> bool:
    """Return whether the class of a module, or a base class of it, has one of these names."""
    return not {cls.__name__ for cls in type(module).__mro__}.isdisjoint(class_names)


def attribute_of(module: Any, name: str) -> Any:
    """Return the attribute of a module with this dotted name, or None."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


@functools.cache
def parameters_of(cls: type) -> tuple[str, ...]:
    """Return the names of the parameters of a module class's forward, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined] # of a module class
