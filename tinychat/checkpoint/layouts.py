"""Layouts: how the files of a quantized checkpoint hold a linear. One file each, found by the directory.

A layout's file has

    recognises(raw)        whether a `quantization_config` is of its kind
    parse(raw, where)      the `Layout` it describes; ConfigError, naming `where`, for what is not implemented
    for_writing(...)       the `WritableLayout` for such weights, or None; see `for_writing` below
    ENDINGS                of the names of a linear's tensors, after its module's; the first says that it is quantized

What it knows is arrays: neither files nor models.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from tinychat.checkpoint.quoting import quote
from tinychat.errors import ConfigError, UsageError
from tinychat.qtensor import QTensor, Weight


@dataclass(frozen=True)
class Part:
    """A tensor that stands for a quantized linear among others."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # as safetensors spells them
    optional: bool = False


class Layout(Protocol):
    """What a `quantization_config` says. `group_size` -1: one group per row."""

    @property
    def method(self) -> str:
        """What people call it: awq, gptq, ..."""
        ...

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        ...

    @property
    def endings(self) -> tuple[str, ...]:
        """The file's ENDINGS."""
        ...

    @property
    def rows_together(self) -> int:
        """Outputs that share a word as `read` gives it: rows move in multiples of these."""
        ...

    def excludes(self, module: str) -> bool:
        """Whether the configuration says that `module` is not quantized."""
        ...

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a linear of `shape` (N, K) cannot be held; None if it can."""
        ...

    def parts(self, shape: tuple[int, int]) -> dict[str, Part]:
        """The tensors of a linear that fits, by ending."""
        ...

    def read(self, shape: tuple[int, int], tensors: Mapping[str, np.ndarray]) -> Weight:
        """The weight that `parts` stand for. ValueError says which of their values cannot be."""
        ...


class WritableLayout(Layout, Protocol):
    """One in which checkpoints are written too."""

    def pack(self, q: QTensor) -> dict[str, np.ndarray]:
        """The parts of a linear, by ending. ValueError for what the layout cannot hold."""
        ...

    def excluding(self, modules: Collection[str], in_layers: Collection[str] = ()) -> WritableLayout:
        """With these modules left as they are; `in_layers`: what the others are called within each layer, if alike."""
        ...

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` to write into config.json."""
        ...


def parse(raw: Mapping[str, Any], where: str) -> Layout:
    """From `quantization_config` of config.json, or an old file of its own; `where` names it in a `ConfigError`."""
    for layout in _layouts().values():
        if layout.recognises(raw):
            found: Layout = layout.parse(raw, where)
            return found
    known = ", ".join(name.replace("_", "-") for name in _layouts())
    raise ConfigError(
        f"{where} says quant_method {quote(raw.get('quant_method'))}; supported are {known}, and checkpoints that are "
        f"not quantized"
    )


def for_writing(bits: int, group_size: int, *, symmetric: bool = False, act_order: bool = False) -> WritableLayout:
    """The layout for such weights: the first that offers itself; UsageError where none does.

    symmetric   every zero is 2**(bits - 1)
    act_order   weights may have a `permutation`
    """
    for layout in _layouts().values():
        found: WritableLayout | None = layout.for_writing(bits, group_size, symmetric, act_order)
        if found is not None:
            return found
    raise UsageError(f"{bits} bits cannot be written: no checkpoint layout holds them; 2, 3, 4 and 8 there are")


def first_endings() -> set[str]:
    """Endings that mark a quantized linear in one layout or another."""
    return {layout.ENDINGS[0] for layout in _layouts().values()}


def _layouts() -> dict[str, ModuleType]:
    package = importlib.import_module(__package__)
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        layout = importlib.import_module(f"{__package__}.{module.name}")
        if hasattr(layout, "recognises"):
            found[module.name] = layout
    return found
