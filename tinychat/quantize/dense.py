"""A decoder block as the searches work on it: matrices computed with in fp32, run by the decoder's own functions.

Fused linears stay fused; a segment that the output format cannot express carries the reason and keeps 16 bits.
It knows no quantization method and no file layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tinychat.backends import arithmetic
from tinychat.backends.reference import TorchOps
from tinychat.decoder import PackedLayer
from tinychat.errors import CheckpointError, UsageError
from tinychat.qtensor import QTensor, Weight
from tinychat.quantize import threads
from tinychat.quantize.device import CPU
from tinychat.quantize.grid import FP16_MAX, Grid, as_float, as_stored, stacked
from tinychat.weights import LINEARS, NORMS, OF_EXPERTS, QUANTIZED, Layer, Linear

PIECE = 2**18  # numbers of a weight, in whole rows, that are rounded at a time: what stays in the cache
MULTIPLIED = 2**21  # numbers of a weight, at most about so many, that a thread multiplies with at a time
SLICE = 2**23  # numbers of a weight that are in fp32 at once to be multiplied with
ALIKE = 512, 16  # rows of a part: a multiple of the first that is less; a product then rounds as the whole one does

# For segment i of a canonical linear, of shape (N, K): its name for the user, and why it stays in 16 bits (None: it
# is quantized).
Plan = Callable[[str, int, tuple[int, int]], tuple[str, str | None]]


@dataclass(frozen=True, eq=False)
class Dense:
    """A fused linear. For each segment: its outputs, its name, and why it stays in 16 bits (None: quantized).

    Of a whole layer only `stored` is kept, in the 16 bits that it came in; `weight` is made anew where it is used, and
    scales are applied on the way: a layer before and after a method, and one linear in fp32, take little more than one.
    """

    name: str  # canonical: qkv, out, up, down; of expert 3: up.3, down.3
    stored: torch.Tensor  # [N, K], as the source has it
    bias: torch.Tensor | None  # fp32 [N]
    rows: tuple[int, ...]
    modules: tuple[str, ...]
    kept: tuple[str | None, ...]
    limits: torch.Tensor | None = None  # fp32 [N, groups, 2]: weights are rounded as if within them; None: as they lie
    columns: torch.Tensor | None = None  # fp32 [K]: weight is multiplied by it, and what was observed of its inputs is
    # to be divided by it; None: 1
    divisors: torch.Tensor | None = None  # fp32 [N]: weight, multiplied, is divided by it; None: 1
    grid: Grid | None = None  # weight, as it then is, is rounded to it, within `limits`; None: it is not
    reading: torch.Tensor | None = None  # fp32 [K]: weight, rounded, is divided by it; None: 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.stored.shape[0], self.stored.shape[1]

    @property
    def quantized(self) -> bool:
        """Whether any segment is."""
        return any(reason is None for reason in self.kept)

    @property
    def _piece(self) -> int:
        """Numbers; see PIECE. A GPU would spend its time in starting on so little."""
        return PIECE if self.stored.is_cpu else SLICE

    @property
    def weight(self) -> torch.Tensor:
        """fp32 [N, K]: a copy, except where it is `stored` so."""
        if self.grid is None:
            return self.of_rows(slice(None))
        made = torch.empty(self.shape)
        for rows, piece in self.slices(self._piece):
            weight = piece.of_rows(slice(None))
            if piece.quantized:
                self.grid.round_trip(weight, piece.modules[0], piece.limits, self.reading, made[rows])
            else:  # it will be written in fp16
                weight = weight.half().float()
                made[rows] = weight if self.reading is None else weight / self.reading
        return made

    @property
    def operand(self) -> torch.Tensor:
        """The same, as it is `stored` where nothing is done to it."""
        plain = self.grid is None and self.columns is None and self.divisors is None
        return self.stored if plain else self.weight

    def of_rows(self, rows: slice) -> torch.Tensor:
        """Some rows of the weight before it is rounded."""
        weight = self.stored[rows]
        if self.columns is None and self.divisors is None:
            return weight.float()
        weight = weight.to(torch.float32, copy=True)
        if self.columns is not None:
            weight *= self.columns
        if self.divisors is not None:
            weight /= self.divisors[rows, None]
        return weight

    def parts(self) -> Iterator[Dense]:
        """Each segment as a linear of its own."""
        return (part for _, part in self.slices())

    def slices(self, numbers: int | None = None) -> Iterator[tuple[slice, Dense]]:
        """(its rows, a linear of its own) for as many rows of a segment as have so many numbers (None: all), in turn.

        What is done row by row need not be in fp32 at once.
        """
        n = len(self.stored) if numbers is None else max(1, numbers // self.shape[1])
        n -= n % next((length for length in ALIKE if length < n), 1) if n < len(self.stored) else 0
        end = 0
        for length, module, reason in zip(self.rows, self.modules, self.kept, strict=True):
            begin, end = end, end + length
            for first in range(begin, end, n):
                rows = slice(first, min(first + n, end))
                whole = {name: getattr(self, name) for name in ("stored", "bias", "limits", "divisors")}
                cut: dict[str, Any] = {name: None if x is None else x[rows] for name, x in whole.items()}
                yield rows, replace(self, rows=(rows.stop - first,), modules=(module,), kept=(reason,), **cut)

    def scaled(self, columns: torch.Tensor) -> Dense:
        """The same linear for inputs divided by `columns` [K]. Limits are lost: they were of other weights."""
        before = 1.0 if self.columns is None else self.columns
        return replace(self, limits=None, columns=before * columns)

    def divided(self, divisors: torch.Tensor) -> Dense:
        """The same linear with its last outputs divided by `divisors`; rounding knows no difference: rows have scales
        of their own."""
        first = len(self.stored) - len(divisors)
        rows = torch.cat([torch.ones(first), divisors])
        before = 1.0 if self.divisors is None else self.divisors
        bias = None if self.bias is None else self.bias / rows
        limits = None if self.limits is None else self.limits / rows[:, None, None]
        return replace(self, bias=bias, limits=limits, divisors=before * rows)

    def rounded(self, grid: Grid, reading: torch.Tensor | None = None) -> Dense:
        """The same linear with its weights on the grid, and then divided by `reading`; a large one's each time anew."""
        made = replace(self, grid=grid, reading=reading)
        if self.stored.numel() > SLICE:
            return made
        return replace(made, stored=made.weight, limits=None, columns=None, divisors=None, grid=None, reading=None)

    def quantize(self, grid: Grid) -> QTensor:
        """A linear of one segment rounded to nearest, within its limits."""
        pieces = (piece for _, piece in self.slices(self._piece))
        return stacked([grid.quantize(piece.weight, piece.modules[0], piece.limits) for piece in pieces])


class DenseOps(TorchOps):
    """The reference operations on `Dense` linears; `watch(linear, x)` sees every linear's input [T, K].

    With a `grid` weights are rounded to it as they are used. `stream` is what `add_norm` normed last.
    """

    def __init__(self, watch: Callable[[Dense, torch.Tensor], None] | None = None, grid: Grid | None = None):
        super().__init__()
        self._watch = watch
        self._grid = grid
        self.stream = torch.empty(0)

    def linear(self, x: torch.Tensor, weight: Dense) -> torch.Tensor:  # type: ignore[override]
        """y = x W^T + b."""
        if self._watch:
            self._watch(weight, x)
        used = weight if self._grid is None else weight.rounded(self._grid)
        cpu = arithmetic.multiplier(x)
        if cpu is None and used.stored.numel() <= SLICE:
            return torch.nn.functional.linear(x, used.weight, used.bias)
        y = torch.empty(len(x), used.shape[0])
        if cpu is None:
            for rows, piece in used.slices(SLICE):
                y[:, rows] = torch.nn.functional.linear(x, piece.weight, piece.bias)
            return y
        product, n = arithmetic.Product(cpu, x), threads.count()
        pieces = n * -(-used.stored.numel() // (n * MULTIPLIED))
        cuts = used.slices(-(-used.stored.numel() // pieces))
        threads.each(lambda cut: product.into(y[:, cut[0]], cut[1].operand), cuts)
        return y if used.bias is None else y.add_(used.bias)

    def add_norm(self, *given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops.add_norm`."""
        self.stream, normed = super().add_norm(*given, **more)
        return self.stream, normed


def dense_layer(layer: Layer, plan: Plan, device: torch.device = CPU) -> PackedLayer:
    """`layer` on `device`: each linear a `Dense`, vectors in fp32. UsageError where it is quantized already."""

    def linear(name: str, found: Linear, expert: int | None = None) -> Dense:
        parts, modules, kept = [], [], []
        for i, segment in enumerate(found.segments, (expert or 0) * len(found.segments)):
            module, reason = plan(name, i, segment.shape)
            reason = reason if name in QUANTIZED else "a router chooses experts, and takes little room"
            if not isinstance(segment, np.ndarray):
                raise UsageError(
                    f"{module} is quantized already, to {segment.bits} bits; quantize the original checkpoint instead"
                )
            parts.append(as_stored(segment).to(device))
            modules.append(module)
            kept.append(reason)
        bias = None if found.bias is None else as_float(found.bias).to(device)
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
        made[name] = None if values is None else as_float(values).to(device)
    made["act_scale"] = None if layer.act_scale is None else as_float(layer.act_scale).to(device)
    return PackedLayer(**made)


def quantized_layer(layer: PackedLayer, quantize: Callable[[Dense], QTensor]) -> Layer:
    """`layer` as it is written: what `quantize` makes of quantized segments, fp16 values everywhere else."""

    def linear(dense: Dense | tuple[Dense, ...]) -> Linear:
        if isinstance(dense, tuple):  # of experts
            return Linear(tuple(segment for one in dense for segment in linear(one).segments))
        segments: list[Weight] = [
            quantize(part) if part.kept[0] is None else half(part.weight.cpu().numpy(), part.modules[0])
            for part in dense.parts()
        ]
        bias = None
        if dense.bias is not None:
            bias = half(dense.bias.cpu().numpy(), f"the bias of {', '.join(dense.modules)}").astype(np.float32)
        return Linear(tuple(segments), bias)

    where = f"of the layer of {layer.qkv.modules[0]}"
    found = {name: getattr(layer, name) for name in (*LINEARS, *OF_EXPERTS)}
    made: dict[str, Any] = {name: linear(dense) for name, dense in found.items() if dense is not None}
    for name in NORMS:
        values = getattr(layer, name)
        made[name] = None if values is None else half(values.cpu().numpy(), f"{name} {where}").astype(np.float32)
    if layer.act_scale is not None:
        made["act_scale"] = half(layer.act_scale.cpu().numpy(), f"act_scale {where}").astype(np.float32)
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
