"""What a quantization did, for the user's eyes and for machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tinychat.decoder import PackedLayer
from tinychat.qtensor import QTensor
from tinychat.quantize.dense import Dense
from tinychat.weights import QUANTIZED, Layer

BLOCK = "whole block"
_ROWS = 32  # of a weight compared at a time: what stays in the cache


@dataclass(frozen=True)
class GroupResult:
    """What was found for one group of one layer. Losses are relative: mean error^2 over mean output^2.

    `alpha` is 0 where no scales were better; where there is none to find, as of the whole block (group `BLOCK`, all
    groups together, in one sample), it is None. A group "..., awq alone" is of what AWQ finds, rounded to
    nearest: before GPTQ.
    """

    layer: int
    group: str
    alpha: float | None
    loss_rtn: float
    loss: float
    clipped: bool = False


@dataclass
class Report:
    """A quantization. `kept` are the linears left in 16 bits and why; sizes are of the weight files.

    `rounding` has, for each canonical linear, layer by layer, what rounding did to its weights, scaled ones where the
    method scales: mean error^2 over mean weight^2. The losses of `groups` tell what that does to the outputs.
    `dead_inputs` of each canonical linear, over all layers, were 0 in all calibration tokens, so nothing was known of
    their weights; `zero_groups` of weights are all 0.
    """

    method: str
    bits: int
    group_size: int
    calibration: str = "none"
    notes: list[str] = field(default_factory=list)  # what was done otherwise than asked for
    groups: list[GroupResult] = field(default_factory=list)
    rounding: dict[str, list[float]] = field(default_factory=dict)
    dead_inputs: dict[str, int] = field(default_factory=dict)
    zero_groups: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    quantized_weights: int = 0
    quantized_bits: float = 0
    bytes_before: int | None = None
    bytes_after: int | None = None
    seconds: float = 0

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears: codes, scales and zeros."""
        return self.quantized_bits / self.quantized_weights if self.quantized_weights else 0.0

    def count(self, exact: PackedLayer, layer: Layer) -> None:
        """Add the linears of a quantized layer, `exact` before it was rounded, to the totals."""
        for name in QUANTIZED:
            error = power = 0.0
            linear, stack = getattr(layer, name), getattr(exact, name)
            if linear is None:
                continue
            parts = (part for one in (stack if isinstance(stack, tuple) else (stack,)) for part in one.parts())
            for part, segment in zip(parts, linear.segments, strict=True):
                if isinstance(segment, QTensor):
                    self.quantized_weights += segment.codes.size
                    self.quantized_bits += segment.bits_per_weight * segment.codes.size
                    change, total, zero_groups = _squares(part, segment)
                    error, power = error + change, power + total
                    self.zero_groups += zero_groups
            if power:
                self.rounding.setdefault(name, []).append(error / power)

    def count_dead(self, dead: Mapping[str, int]) -> None:
        """Add the dead inputs of a layer's linears."""
        for linear, n in dead.items():
            name = linear.partition(".")[0]  # of an expert
            self.dead_inputs[name] = self.dead_inputs.get(name, 0) + n

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        values = {key: value for key, value in found.items() if key != "bits_per_weight"}
        return Report(**{**values, "groups": [GroupResult(**group) for group in found["groups"]]})

    def __str__(self) -> str:
        group = "whole rows" if self.group_size == -1 else f"groups of {self.group_size}"
        lines = [f"{self.method}, {self.bits} bits in {group}; calibrated on: {self.calibration}", *self.notes]
        names = list(dict.fromkeys(result.group for result in self.groups))
        if names:
            lines.append("")
            width = max(28, 4 + max(map(len, names)))
            lines.append(f"{'relative loss, all layers':<{width}}{'rtn':>11}{self.method:>11}{'change':>9}   alpha")
        for name in names:
            found = [result for result in self.groups if result.group == name]
            before = float(np.mean([result.loss_rtn for result in found]))
            after = float(np.mean([result.loss for result in found]))
            change = f"{after / before - 1:+.1%}" if before else "0"
            alphas = [result.alpha for result in found if result.alpha is not None]
            lines.append(f"  {name:<{width - 2}}{before:>11.3e}{after:>11.3e}{change:>9}   {_spread(alphas)}".rstrip())
        if names:
            lines.append("")
        if self.rounding:
            means = ", ".join(f"{name} {np.mean(errors):.2e}" for name, errors in self.rounding.items())
            lines.append(f"relative squared error of the {'scaled ' if names else ''}weights: {means}")
        if self.dead_inputs:
            counts = ", ".join(f"{n:,} of {name}" for name, n in self.dead_inputs.items())
            lines.append(f"inputs that are 0 in all calibration tokens: {counts}")
        if self.zero_groups:
            lines.append(f"groups of weights that are all 0, and stay so: {self.zero_groups:,}")
        if self.kept:
            reasons = sorted(set(self.kept.values()))
            n = len(self.kept)
            lines.append(f"left in 16 bits: {n} linear{'s' if n > 1 else ''}, because")
            for reason in reasons:
                modules = [module for module, why in self.kept.items() if why == reason]
                more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
                lines.append(f"  {reason}: {', '.join(modules[:3])}{more}")
        sizes = ""
        if self.bytes_before is not None and self.bytes_after is not None:
            sizes = f"{size(self.bytes_before)} -> {size(self.bytes_after)}; "
        lines.append(f"{sizes}{self.bits_per_weight:.3f} bits per quantized weight; {self.seconds:.1f} s")
        return "\n".join(lines)


def _squares(exact: Dense, q: QTensor) -> tuple[float, float, int]:
    """(sum of (weight - q)^2, sum of weight^2, groups without a weight other than 0)."""
    error = power = 0.0
    zero_groups = 0
    starts = np.arange(0, q.shape[1], q.group_size)
    for first in range(0, len(q.codes), _ROWS):
        rows = slice(first, first + _ROWS)
        part = exact.of_rows(rows).cpu().numpy()
        if q.permutation is not None:
            part = part[:, q.permutation]
        change = QTensor(q.codes[rows], q.scales[rows], q.zeros[rows], q.bits, q.group_size).dequantize() - part
        error, power = error + float(np.vdot(change, change)), power + float(np.vdot(part, part))
        if not part[:, starts].all():  # few have to be looked at
            zero_groups += int((~np.logical_or.reduceat(part != 0, starts, axis=1)).sum())
    return error, power, zero_groups


def _spread(alphas: list[float]) -> str:
    if not alphas:
        return ""
    text = f"{min(alphas):.2f} .. {max(alphas):.2f}" if min(alphas) < max(alphas) else f"{alphas[0]:.2f}"
    kept = sum(alpha == 0 for alpha in alphas)
    return f"{text}, {kept} of {len(alphas)} not scaled" if kept else text


def size(n: int) -> str:
    """Bytes, for reading."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
