"""A method by its name: `rtn`, `awq`, `gptq`, `awq+gptq`. Perhaps a transformation first, and then a way of rounding.

Each stage is a file of this package with `NEEDS_CALIBRATION` and one function:

    transform(config, layer, index, observed, grid, act_scales, clips)  an equal layer that is easier to round, findings
    round_layer(config, layer, index, observed, grid, act_order)        the layer as it is written, findings

A way of rounding says by `NEEDS_GRAMS` whether it wants `Observed.grams`. `observed` is of the layer as it came; what
a transformation does to the inputs of a linear is in `Dense.columns`. A transformation alone is rounded to nearest. The
files are the registry: a stage is found by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, replace
from types import ModuleType

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.errors import UsageError
from tinychat.quantize import rtn
from tinychat.quantize.activations import Activations
from tinychat.quantize.grid import Grid
from tinychat.quantize.report import GroupResult
from tinychat.weights import Layer

MUCH_LOST = 2  # bits
ACT_ORDERS = "static", "free"


@dataclass(frozen=True)
class Method:
    """What is done to each layer. The modules are stages; `transformation` may be none.

    act_order   GPTQ's: columns are rounded by falling importance, in groups of the file ("static") or in groups of
                that order ("free")
    act_scales  AWQ's: what is written can hold an act_scale
    """

    name: str
    transformation: ModuleType | None
    rounding: ModuleType
    act_order: str | None = None
    act_scales: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Whether `apply` wants activations."""
        stages = (self.transformation, self.rounding)
        return any(stage is not None and stage.NEEDS_CALIBRATION for stage in stages)

    def check(self, config: ModelConfig) -> None:
        """UsageError where what it writes of such a model could not be run."""
        if self.permutes and config.experts is not None:
            raise UsageError(
                "free act-order permutes the inputs of experts, which the cpu backend does not run; choose static"
            )

    @property
    def permutes(self) -> bool:
        """Whether weights get a `permutation`."""
        return self.act_order == "free"

    def follows(self, grid: Grid) -> bool:
        """Whether `apply` wants to know what the layers before, as they are written, make of the sampled tokens.

        GPTQ makes up for its own errors as it goes, by moments of the unquantized model's activations. With 4 bits
        little is lost then, and a search that follows it does worse; with 3 it does better for one model and worse for
        another, with 2 better for all (measured: benchmarks/results/quality.md).
        """
        return self.transformation is not None and (self.rounding is rtn or grid.bits <= MUCH_LOST)

    def apply(
        self, config: ModelConfig, layer: PackedLayer, index: int, activations: Activations | None, grid: Grid
    ) -> tuple[PackedLayer, Layer, list[GroupResult]]:
        """Block `index`, of `Dense` linears: (as it was before rounding, as it is written, what was found).

        `activations` stand at the block's entrance, and are left at its exit: that of the unquantized model.
        """
        results: list[GroupResult] = []
        searches = self.transformation is not None
        observed = activations.advance(layer, index, self.rounding.NEEDS_GRAMS, searches) if activations else None
        entered = None
        if activations is not None and self.follows(grid) and self.rounding is not rtn:
            entered = activations.drifted()  # what a transformation leaves there is of rounding to nearest
        if self.transformation is not None:
            how = self.act_scales, not self.permutes  # limits are of the file's groups
            layer, results = self.transformation.transform(config, layer, index, observed, grid, *how)
            if self.rounding is not rtn:  # and these are losses of scales and limits rounded to nearest
                alone = self.name.partition("+")[0]
                results = [replace(found, group=f"{found.group}, {alone} alone") for found in results]
        if observed is not None:  # rounding has no use for samples, and needs the room
            observed.samples.clear()
            observed.held_out.clear()
        made, found = self.rounding.round_layer(config, layer, index, observed, grid, self.act_order)
        if activations is not None and entered is not None:
            activations.follow(made, index, entered)
        return layer, made, results + found


def names() -> list[str]:
    """The names that a method may have."""
    stages = _stages()
    transformations = [name for name, stage in stages.items() if hasattr(stage, "transform")]
    roundings = [name for name, stage in stages.items() if hasattr(stage, "round_layer")]
    combined = [f"{first}+{then}" for first in transformations for then in roundings if then != "rtn"]
    return sorted([*transformations, *roundings, *combined])


def find(name: str, act_order: str | None = None) -> Method:
    """The method called `name`; UsageError, listing those there are, where there is none."""
    if name not in names():
        raise UsageError(f"no method {name!r}; there are: {', '.join(names())}")
    first, _, then = name.partition("+")
    stage = _stages()[first]
    rounding = stage if hasattr(stage, "round_layer") else _stages()[then] if then else rtn
    if act_order and not rounding.NEEDS_GRAMS:
        raise UsageError(f"act-order is the order in which gptq rounds columns; {name!r} rounds them all alike")
    if act_order not in (None, *ACT_ORDERS):
        raise UsageError(f"act-order {act_order!r}; there are: {', '.join(ACT_ORDERS)}, and None")
    return Method(name, None if rounding is stage else stage, rounding, act_order)


def _stages() -> dict[str, ModuleType]:
    package = importlib.import_module(__package__)
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        stage = importlib.import_module(f"{__package__}.{module.name}")
        if hasattr(stage, "NEEDS_CALIBRATION"):
            found[module.name] = stage
    return found
