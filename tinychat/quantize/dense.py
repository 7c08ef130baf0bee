"""A decoder block as the searches work on it: whole fp32 matrices, run by the decoder's own functions.

Fused linears stay fused; a segment that the output format cannot express carries the reason and keeps 16 bits.
It knows no quantization method and no file layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tinychat.backends.reference import TorchOps
from tinychat.decoder import PackedLayer
from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import QTensor, Weight
from tinychat.quantize.grid import FP16_MAX, Grid, as_float
from tinychat.weights import LINEARS, NORMS, OF_EXPERTS, QUANTIZED, Layer, Linear

# For segment i of a canonical linear, of shape (N, K): its name for the user, and why it stays in 16 bits (None: it
# is quantized).
Plan = Callable[[str, int, tuple[int, int]], tuple[str, str | None]]


@dataclass(frozen=True, eq=False)
class Dense:
    """A fused linear. For each segment: its outputs, its name, and why it stays in 16 bits (None: quantized)."""

    name: str  # canonical: qkv, out, up, down; of expert 3: up.3, down.3
    weight: torch.Tensor  # fp32 [N, K]
    bias: torch.Tensor | None  # fp32 [N]
    rows: tuple[int, ...]
    modules: tuple[str, ...]
    kept: tuple[str | None, ...]
    limits: torch.Tensor | None = None  # fp32 [N, groups, 2]: weights are rounded as if within them; None: as they lie
    columns: torch.Tensor | None = None  # fp32 [K]: what was observed of its inputs is to be divided by it; None: 1

    @property
    def quantized(self) -> bool:
        """Whether any segment is."""
        return any(reason is None for reason in self.kept)

    def segments(self) -> Iterator[tuple[torch.Tensor, str, str | None]]:
        """(weight [N_i, K], module, why it stays in 16 bits) of each segment."""
        return zip(self.weight.split(self.rows), self.modules, self.kept, strict=True)

    def parts(self) -> Iterator[Dense]:
        """Each segment as a linear of its own."""
        end = 0
        for n, module, reason in zip(self.rows, self.modules, self.kept, strict=True):
            rows = slice(end, end + n)
            end += n
            bias, limits = (None if x is None else x[rows] for x in (self.bias, self.limits))
            yield Dense(self.name, self.weight[rows], bias, (n,), (module,), (reason,), limits, self.columns)

    def scaled(self, columns: torch.Tensor) -> Dense:
        """The same linear for inputs divided by `columns` [K]. Limits are lost: they were of other weights."""
        before = 1.0 if self.columns is None else self.columns
        return replace(self, weight=self.weight * columns, limits=None, columns=before * columns)

    def rounded(self, grid: Grid) -> Dense:
        """The same linear with its weights on the grid."""
        found = [
            part.weight if part.kept[0] is not None else grid.round_trip(part.weight, part.modules[0], part.limits)
            for part in self.parts()
        ]
        return replace(self, weight=torch.cat(found) if len(found) > 1 else found[0])


class DenseOps(TorchOps):
    """The reference operations on `Dense` linears; `watch(linear, x)` sees every linear's input [T, K]."""

    def __init__(self, watch: Callable[[Dense, torch.Tensor], None] | None = None):
        super().__init__()
        self._watch = watch

    def linear(self, x: torch.Tensor, weight: Dense) -> torch.Tensor:  # type: ignore[override]
        """y = x W^T + b."""
        if self._watch:
            self._watch(weight, x)
        return torch.nn.functional.linear(x, weight.weight, weight.bias)


def dense_layer(layer: Layer, plan: Plan) -> PackedLayer:
    """`layer` in fp32, each linear a `Dense`. UsageError where it is quantized already."""

    def linear(name: str, found: Linear, expert: int | None = None) -> Dense:
        parts, modules, kept = [], [], []
        for i, segment in enumerate(found.segments, (expert or 0) * len(found.segments)):
            module, reason = plan(name, i, segment.shape)
            reason = reason if name in QUANTIZED else "a router chooses experts, and takes little room"
            if not isinstance(segment, np.ndarray):
                raise UsageError(
                    f"{module} is quantized already, to {segment.bits} bits; quantize the original checkpoint instead"
                )
            parts.append(as_float(segment))
            modules.append(module)
            kept.append(reason)
        bias = None if found.bias is None else as_float(found.bias)
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]
        name = name if expert is None else f"{name}.{expert}"
        return Dense(name, weight, bias, tuple(len(p) for p in parts), tuple(modules), tuple(kept))

    made: dict[str, Any] = {}
    for name in (*LINEARS, *OF_EXPERTS):
        found: Linear | None = getattr(layer, name)
        if found is not None and layer.router is not None and name in ("up", "down"):
            experts = found.parts(layer.router.segments[0].shape[0])
            made[name] = tuple(linear(name, one, index) for index, one in enumerate(experts))
        elif found is not None:
            made[name] = linear(name, found)
    for name in NORMS:
        values = getattr(layer, name)
        made[name] = None if values is None else as_float(values)
    made["act_scale"] = None if layer.act_scale is None else as_float(layer.act_scale)
    return PackedLayer(**made)


def quantized_layer(layer: PackedLayer, quantize: Callable[[Dense], QTensor]) -> Layer:
    """`layer` as it is written: what `quantize` makes of quantized segments, fp16 values everywhere else."""

    def linear(dense: Dense | tuple[Dense, ...]) -> Linear:
        if isinstance(dense, tuple):  # of experts
            return Linear(tuple(segment for one in dense for segment in linear(one).segments))
        segments: list[Weight] = [
            quantize(part) if part.kept[0] is None else half(part.weight.numpy(), part.modules[0])
            for part in dense.parts()
        ]
        bias = None
        if dense.bias is not None:
            bias = half(dense.bias.numpy(), f"the bias of {', '.join(dense.modules)}").astype(np.float32)
        return Linear(tuple(segments), bias)

    where = f"of the layer of {layer.qkv.modules[0]}"
    found = {name: getattr(layer, name) for name in (*LINEARS, *OF_EXPERTS)}
    made: dict[str, Any] = {name: linear(dense) for name, dense in found.items() if dense is not None}
    for name in NORMS:
        values = getattr(layer, name)
        made[name] = None if values is None else half(values.numpy(), f"{name} {where}").astype(np.float32)
    if layer.act_scale is not None:
        made["act_scale"] = half(layer.act_scale.numpy(), f"act_scale {where}").astype(np.float32)
    return Layer(**made)


def part(layer: PackedLayer, name: str) -> Any:
    """A linear or norm of `layer`; "up.3" is that of expert 3."""
    name, _, expert = name.partition(".")
    found = getattr(layer, name)
    return found[int(expert)] if expert else found


def linears_of(layer: PackedLayer) -> dict[str, Dense]:
    """All linears of `layer`, those of experts one by one."""
    found = {name: getattr(layer, name) for name in (*LINEARS, *OF_EXPERTS)}
    stacks = (stack if isinstance(stack, tuple) else (stack,) for stack in found.values() if stack is not None)
    return {linear.name: linear for stack in stacks for linear in stack}


def changed(layer: PackedLayer, **parts: torch.Tensor | Dense) -> PackedLayer:
    """`layer` with some of its linears and norms replaced; names are those of `part`."""
    replaced: dict[str, Any] = {}
    for name, made in parts.items():
        name, _, expert = name.partition(".")
        if expert:
            stack = replaced.get(name, getattr(layer, name))
            replaced[name] = (*stack[: int(expert)], made, *stack[int(expert) + 1 :])
        else:
            replaced[name] = made
    return replace(layer, **replaced)


def half(array: np.ndarray, name: str) -> np.ndarray:
    """`array` in fp16; CheckpointError where a value is beyond fp16's range or not finite."""
    if array.dtype == np.float16:
        return array
    largest = float(np.abs(array).max(initial=0).astype(np.float32))
    if not largest <= FP16_MAX:
        raise CheckpointError(
            f"{name}: its largest value is {largest:.5g}; the checkpoint written is fp16, which ends at {FP16_MAX:.0f}"
        )
    return array.astype(np.float16)
